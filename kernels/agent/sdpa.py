"""Agent attention as two `scaled_dot_product_attention`s, which are fused where torch has a kernel for the call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    query_scale: float,
) -> Tensor:
    """See `zoo.kernels.agent_attention`."""
    # Fused kernels take a mask of four axes, of the dtype of the query, with a contiguous last axis.
    if agent_bias is not None:
        agent_bias = agent_bias.to(query.dtype).contiguous().unsqueeze(0)
    if query_bias is not None:
        query_bias = query_bias.to(query.dtype).contiguous().unsqueeze(0)
    q, k, v, a = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), agent.transpose(1, 2)
    gathered = F.scaled_dot_product_attention(a, k, v, attn_mask=agent_bias, scale=scale)
    out = F.scaled_dot_product_attention(q, a, gathered, attn_mask=query_bias, scale=query_scale)
    return out.transpose(1, 2)
