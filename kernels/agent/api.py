"""The public functions: check their arguments and pick a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from zoo.kernels.agent import reference, sdpa

BACKENDS = ("auto", "reference", "sdpa")


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention through a few agents: they gather from all keys, then every query reads from them.

    With `i` running over queries, `j` over keys and `a` over agents, per head,

        gathered[a] = sum_j softmax_j(scale * agent[a] . key[j] + agent_bias[a, j]) * value[j]
        out[i] = sum_a softmax_a(query_scale * query[i] . agent[a] + query_bias[i, a]) * gathered[a]

    so time and memory grow with queries * agents + agents * keys, not with queries * keys.

    Paper: Agent Attention (https://arxiv.org/abs/2312.08874).

    Args:
        query: [batch, queries, heads, head_dim], floating point, any strides.
        key: [batch, keys, heads, head_dim].
        value: [batch, keys, heads, value_dim].
        agent: [batch, agents, heads, head_dim], such as `pool_agents` of the query.
        agent_bias: [heads, agents, keys], any floating dtype.
        query_bias: [heads, queries, agents], any floating dtype.
        scale: Factor of the agents' logits, `head_dim ** -0.5` by default.
        query_scale: Factor of the queries' logits, `scale` by default.
        backend: "auto" takes the fastest; "sdpa", two fused attentions of torch, or "reference" take that one.

    Returns:
        [batch, queries, heads, value_dim], dtype of `query`.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape or device, there are no keys or agents, or `backend` is unknown.
    """
    tensors = query, key, value, agent
    if not torch.jit.is_scripting():
        if has_torch_function((*tensors, agent_bias, query_bias)):  # torch.fx records one call
            return handle_torch_function(
                agent_attention, (*tensors, agent_bias, query_bias), *tensors,
                agent_bias=agent_bias, query_bias=query_bias, scale=scale, query_scale=query_scale, backend=backend,
            )  # fmt: skip
        _check(query, key, value, agent, agent_bias, query_bias, scale, query_scale, backend)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if query_scale is None:
        query_scale = scale
    # Of an empty result scaled_dot_product_attention drops its mask from the graph, and the bias its gradient.
    if backend == "reference" or query.numel() == 0:
        return reference.agent_attention(*tensors, agent_bias, query_bias, scale, query_scale)
    return sdpa.agent_attention(*tensors, agent_bias, query_bias, scale, query_scale)


def pool_agents(query: Tensor, side: int) -> Tensor:
    """Agents that are means of the queries: those of a `side` x `side` grid of bins over the map.

    Where `side` does not divide a side of the map, bins overlap, as in adaptive average pooling: bin `i` of an axis of
    `n` tokens reaches from `floor(i * n / side)` up to, but not including, `ceil((i + 1) * n / side)`.

    Args:
        query: [batch, height, width, heads, head_dim].
        side: Number of bins per axis.

    Returns:
        [batch, side * side, heads, head_dim], the bins row by row.
    """
    heads, dim = query.shape[3], query.shape[4]
    pooled = F.adaptive_avg_pool2d(query.flatten(3).permute(0, 3, 1, 2), side)
    return pooled.flatten(2).transpose(1, 2).unflatten(2, (heads, dim))


def _check(query, key, value, agent, agent_bias, query_bias, scale, query_scale, backend) -> None:
    named = {"query": query, "key": key, "value": value, "agent": agent}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if query.dim() != 4:
        raise ValueError(f"query must be [batch, queries, heads, head_dim], got shape {tuple(query.shape)}")
    if not query.dtype.is_floating_point:
        raise TypeError(f"query must be of a floating dtype, got {query.dtype}")
    for name, x in named.items():
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}")
    batch, queries, heads, dim = query.shape
    for name, tokens in (("key", "keys"), ("agent", "agents")):
        shape = tuple(named[name].shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, heads, dim):
            raise ValueError(f"{name} must be [{batch}, {tokens}, {heads}, {dim}] to go with query, got shape {shape}")
        if shape[1] == 0:
            raise ValueError(f"{name} must hold at least one token, got shape {shape}")
    keys, agents = key.shape[1], agent.shape[1]
    if value.dim() != 4 or tuple(value.shape[:3]) != (batch, keys, heads):
        raise ValueError(
            f"value must be [{batch}, {keys}, {heads}, value_dim] to go with key, got shape {tuple(value.shape)}"
        )
    biases = (
        ("agent_bias", agent_bias, "[heads, agents, keys]", (heads, agents, keys)),
        ("query_bias", query_bias, "[heads, queries, agents]", (heads, queries, agents)),
    )
    for name, bias, axes, shape in biases:
        if bias is None:
            continue
        if not isinstance(bias, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(bias).__name__}")
        if not bias.dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating dtype, got {bias.dtype}")
        if bias.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {bias.device}")
        if tuple(bias.shape) != shape:
            raise ValueError(f"{name} must be {axes} = {shape}, got {tuple(bias.shape)}")
    for name, factor in (("scale", scale), ("query_scale", query_scale)):
        if factor is not None and not isinstance(factor, (int, float)):
            raise TypeError(f"{name} must be a number or None, got {type(factor).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
