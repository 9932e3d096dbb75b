"""The meaning of agent attention: two plain softmax attentions, one after the other. Any dtype, any device."""

from __future__ import annotations

import torch
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `zoo.kernels.agent_attention`. `dtype` is that of the arithmetic, at least float32 by default."""
    dtype = dtype or torch.promote_types(query.dtype, torch.float32)
    q, k, v, a = (x.to(dtype) for x in (query, key, value, agent))

    logits = scale * torch.einsum("bahd,bkhd->bhak", a, k)
    if agent_bias is not None:
        logits = logits + agent_bias.to(dtype)
    gathered = torch.einsum("bhak,bkhd->bahd", logits.softmax(-1), v)

    logits = query_scale * torch.einsum("bqhd,bahd->bhqa", q, a)
    if query_bias is not None:
        logits = logits + query_bias.to(dtype)
    return torch.einsum("bhqa,bahd->bqhd", logits.softmax(-1), gathered).to(query.dtype)
