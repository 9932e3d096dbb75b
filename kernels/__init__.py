"""Attention operators on 2-D token grids."""

from zoo.kernels.agent import agent_attention, pool_agents
from zoo.kernels.circular import circular_attention_2d
from zoo.kernels.halo import halo_attention_2d
from zoo.kernels.neighborhood import (
    explain_backend,
    neighborhood_attention_2d,
    neighborhood_attention_2d_qkvpacked,
)
from zoo.kernels.routing import routing_attention_2d
from zoo.kernels.window import window_attention_2d

__all__ = [
    "agent_attention",
    "circular_attention_2d",
    "explain_backend",
    "halo_attention_2d",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_qkvpacked",
    "pool_agents",
    "routing_attention_2d",
    "window_attention_2d",
]
