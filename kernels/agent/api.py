"""The public functions: check their arguments and pick a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from zoo.kernels._autograd import is_eager, needs_grad
from zoo.kernels._checks import check_bias, check_map, check_tensors, resolve_backend, resolve_scale
from zoo.kernels._launch import HAS_TRITON
from zoo.kernels._symbols import is_symbol
from zoo.kernels.agent import ops, reference, sdpa

BACKENDS = ("auto", "reference", "sdpa", "triton")
LEAST_COMPILED = 4096  # keys, where compiled training takes the fused kernels


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
        backend: "auto" takes the fastest; "triton", "sdpa", two fused attentions of torch, or "reference" take that
            one or raise.

    Returns:
        [batch, queries, heads, value_dim], dtype of `query`. Gradients of "triton" are of first order;
        backend="reference" also has higher ones.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape or device, there are no keys or agents, or `backend` is unknown or
            does not support the call.
    """
    tensors = query, key, value, agent
    if has_torch_function((*tensors, agent_bias, query_bias)):  # torch.fx records one call
        return handle_torch_function(
            agent_attention, (*tensors, agent_bias, query_bias), *tensors,
            agent_bias=agent_bias, query_bias=query_bias, scale=scale, query_scale=query_scale, backend=backend,
        )  # fmt: skip
    _check(query, key, value, agent, agent_bias, query_bias)
    scale = resolve_scale(scale, query)
    query_scale = scale if query_scale is None else resolve_scale(query_scale, query, "query_scale")
    backend = resolve_backend(backend, BACKENDS)
    if backend == "triton" and (obstacle := ops.why_not_triton(query, value, agent)) is not None:
        raise ValueError(f"backend='triton' {obstacle}")
    if query.numel() > 0 and (backend == "triton" or (backend == "auto" and _takes_triton(query, key, value, agent))):
        return ops.agent_attention(*tensors, agent_bias, query_bias, scale, query_scale)[0]
    # Of an empty result scaled_dot_product_attention drops its mask from the graph, and the bias its gradient.
    module = reference if backend == "reference" or query.numel() == 0 else sdpa
    return module.agent_attention(*tensors, agent_bias, query_bias, scale, query_scale)


def _takes_triton(query: Tensor, key: Tensor, value: Tensor, agent: Tensor) -> bool:
    """Whether the fused kernels are faster: in half precision.

    On an H200, 128 images of 197 tokens, 6 heads of 64 and 49 agents, take 0.08 ms where torch's attention takes 0.15,
    and 0.41 with the gradients where it takes 0.47; 12 of 65,536, 3 heads of 32 and 9 agents, 0.25 and 2.2, 1.1 and 10.
    Compiled training is bound by the host, which operators of ours take more of than torch's: only large maps gain.
    """
    if not query.is_cuda or is_symbol(agent.shape[1]) or torch.jit.is_tracing():
        return False
    keys = key.shape[1]
    if torch.compiler.is_compiling() and needs_grad(query, key, value) and (is_symbol(keys) or keys < LEAST_COMPILED):
        return False
    return query.element_size() == 2 and ops.why_not_triton(query, value, agent) is None


def pool_agents(query: Tensor, side: int) -> Tensor:
    """Agents that are means of the queries: those of a `side` x `side` grid of bins over the map.

    Where `side` does not divide a side of the map, bins overlap, as in adaptive average pooling: bin `i` of an axis of
    `n` tokens reaches from `floor(i * n / side)` up to, but not including, `ceil((i + 1) * n / side)`.

    Args:
        query: [batch, height, width, heads, head_dim].
        side: Number of bins per axis.

    Returns:
        [batch, side * side, heads, head_dim], the bins row by row.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: `query` is no map, or `side` is less than 1.
    """
    if not torch.jit.is_scripting():
        if has_torch_function((query,)):
            return handle_torch_function(pool_agents, (query,), query, side)
        _check_pooling(query, side)
        if _pools_by_triton(query):
            return _pool_by_triton(query, side)
        # On a GPU adaptive pooling has no deterministic gradient, and gives an image of any size to one block of
        # threads. Few file formats have it, and compilers leave it as it is.
        if torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling() or _is_large(query):
            return ops.pool_by_products(query.flatten(3), side).unflatten(2, (query.shape[3], query.shape[4]))
    heads, dim = query.shape[3], query.shape[4]
    pooled = F.adaptive_avg_pool2d(query.flatten(3).permute(0, 3, 1, 2), side)
    return pooled.flatten(2).transpose(1, 2).unflatten(2, (heads, dim))


def _check(query, key, value, agent, agent_bias, query_bias) -> None:
    check_tensors(query=query, key=key, value=value, agent=agent)
    if query.dim() != 4:
        raise ValueError(f"query must be [batch, queries, heads, head_dim], got shape {tuple(query.shape)}")
    batch, queries, heads, dim = query.shape
    for name, tokens, x in (("key", "keys", key), ("agent", "agents", agent)):
        shape = tuple(x.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, heads, dim):
            raise ValueError(f"{name} must be [{batch}, {tokens}, {heads}, {dim}] to go with query, got shape {shape}")
        if shape[1] == 0:
            raise ValueError(f"{name} must hold at least one token, got shape {shape}")
    keys, agents = key.shape[1], agent.shape[1]
    if value.dim() != 4 or tuple(value.shape[:3]) != (batch, keys, heads):
        raise ValueError(
            f"value must be [{batch}, {keys}, {heads}, value_dim] to go with key, got shape {tuple(value.shape)}"
        )
    if agent_bias is not None:
        check_bias("agent_bias", agent_bias, query, (heads, agents, keys), "[heads, agents, keys]")
    if query_bias is not None:
        check_bias("query_bias", query_bias, query, (heads, queries, agents), "[heads, queries, agents]")


def _check_pooling(query, side) -> None:
    check_tensors(query=query)
    check_map("query", query)
    if 0 in query.shape[1:3]:
        raise ValueError(f"query must be a map of at least 1 x 1, got shape {tuple(query.shape)}")
    if not isinstance(side, int) or isinstance(side, bool):
        raise TypeError(f"side must be an int, got {side!r}")
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")


def _pools_by_triton(query: Tensor) -> bool:
    """Where nothing needs a gradient: on an H200 torch's pooling takes two to six times as long."""
    if not (query.is_cuda and HAS_TRITON and query.element_size() <= 4) or torch.jit.is_tracing():
        return False
    return (torch.compiler.is_compiling() or is_eager(query)) and not needs_grad(query)


def _pool_by_triton(query: Tensor, side: int) -> Tensor:
    run = torch.ops.zoo.pool_agents if torch.compiler.is_compiling() else ops.pool
    return run(query.flatten(3), side).unflatten(2, (query.shape[3], query.shape[4]))


def _is_large(query: Tensor) -> bool:
    height, width = query.shape[1], query.shape[2]
    return query.is_cuda and not is_symbol(height) and not is_symbol(width) and height * width >= 2048
