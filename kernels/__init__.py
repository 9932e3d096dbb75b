"""Attention operators on 2-D token grids."""

from zoo.kernels.neighborhood import explain_backend, neighborhood_attention_2d

__all__ = ["explain_backend", "neighborhood_attention_2d"]
