"""Agent attention (arXiv:2312.08874)."""

from zoo.kernels.agent.api import agent_attention, pool_agents

__all__ = ["agent_attention", "pool_agents"]
