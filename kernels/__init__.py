"""Attention operators on 2-D token grids."""

from zoo.kernels.agent import agent_attention, pool_agents
from zoo.kernels.neighborhood import neighborhood_attention_2d
from zoo.kernels.window import window_attention_2d

__all__ = ["agent_attention", "neighborhood_attention_2d", "pool_agents", "window_attention_2d"]
