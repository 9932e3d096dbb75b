"""Bi-level routing attention (arXiv:2303.08810): regions choose regions, then tokens attend to tokens."""

from zoo.kernels.routing.api import routing_attention_2d

__all__ = ["routing_attention_2d"]
