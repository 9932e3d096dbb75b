"""Agent attention as two `scaled_dot_product_attention`s, which are fused where torch has a kernel for the call."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels._sdpa import biased_attention
from zoo.kernels._symbols import is_symbol


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
    if agent_bias is not None:
        agent_bias = agent_bias.to(query.dtype).contiguous()
    if query_bias is not None:
        query_bias = query_bias.to(query.dtype).contiguous()
    q, k, v, a = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), agent.transpose(1, 2)
    keys = k.shape[2]
    if k.is_cuda and not is_symbol(keys) and keys >= 2048 and keys % 8 == 0:  # rows of other lengths make products slow
        gathered = gather_in_parts(a, k, v, agent_bias, scale, 1024 if keys % 1024 == 0 else keys)
    else:
        gathered = biased_attention(a, k, v, agent_bias, scale)
    out = biased_attention(q, a, gathered, query_bias, query_scale)
    return out.transpose(1, 2)


def gather_in_parts(agent: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, part: int) -> Tensor:
    """[batch, heads, agents, dim] from keys and values [batch, heads, keys, dim], a multiple of `part`.

    A fused kernel takes all keys of an image and a head in turn, in a single program where agents are few; of a large
    map that leaves most of a GPU idle, and its gradient more so. All logits of few agents take little more memory than
    the keys.
    """
    logits = torch.matmul(scale * agent, key.transpose(2, 3))
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    parts = torch.matmul(weights.unflatten(3, (-1, part)).transpose(2, 3), value.unflatten(2, (-1, part)))
    return parts.sum(2)
