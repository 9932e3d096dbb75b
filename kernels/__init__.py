"""Attention operators on 2-D token grids."""

from zoo.kernels.halo import halo_attention_2d
from zoo.kernels.neighborhood import neighborhood_attention_2d
from zoo.kernels.window import window_attention_2d

__all__ = ["halo_attention_2d", "neighborhood_attention_2d", "window_attention_2d"]
