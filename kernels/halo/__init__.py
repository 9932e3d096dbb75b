"""Blocked local attention with a halo, as in HaloNet (arXiv:2103.12731)."""

from zoo.kernels.halo.api import halo_attention_2d

__all__ = ["halo_attention_2d"]
