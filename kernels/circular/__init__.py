"""Circular local attention (CLEAR, arXiv:2412.16112)."""

from zoo.kernels.circular.api import circular_attention_2d

__all__ = ["circular_attention_2d"]
