"""Attention operators on 2-D token grids."""

from zoo.kernels.circular import circular_attention_2d
from zoo.kernels.neighborhood import neighborhood_attention_2d

__all__ = ["circular_attention_2d", "neighborhood_attention_2d"]
