"""Attention operators on 2-D token grids."""

from zoo.kernels.neighborhood import neighborhood_attention_2d
from zoo.kernels.routing import routing_attention_2d

__all__ = ["neighborhood_attention_2d", "routing_attention_2d"]
