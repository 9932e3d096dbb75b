"""Registered torch operators behind the fused `agent_attention` and `pool_agents`: compilers see one node each.

`zoo::agent_attention` takes the checked arguments of the public function and returns the output, what agents gather and
the log-sum-exp of their logits, which only its gradient, `zoo::agent_attention_backward`, may use. `zoo::pool_agents`
is the mean of [batch, height, width, channels] in the bins of a grid, [batch, side * side, channels].
"""

import torch
from torch import Tensor

from zoo.kernels._autograd import register_gradient
from zoo.kernels._launch import device_of
from zoo.kernels.neighborhood import ops as neighborhood

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor agent, Tensor? agent_bias, Tensor? query_bias"
_OPTIONS = "float scale, float query_scale"
MOST_AGENTS = 128

torch.library.define("zoo::agent_attention", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
# Where an input is None its gradient is an empty tensor: operators cannot return optional tensors.
torch.library.define(
    "zoo::agent_attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor gathered, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def why_not_triton(query: Tensor, value: Tensor, agent: Tensor) -> str | None:
    """What keeps the fused kernels from these tensors, or None."""
    if agent.shape[1] > MOST_AGENTS:
        return f"needs at most {MOST_AGENTS} agents, got {agent.shape[1]}"
    if max(query.shape[3], value.shape[3]) > 128:
        return f"needs a head_dim of at most 128, got {query.shape[3]} and {value.shape[3]}"
    return neighborhood.why_not_triton(query)


def _forward(query, key, value, agent, agent_bias, query_bias, scale, query_scale):
    from zoo.kernels.agent import triton

    with device_of(query):
        return triton.forward(query, key, value, agent, agent_bias, query_bias, scale, query_scale)


torch.library.impl("zoo::agent_attention", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("zoo::agent_attention")
def _forward_fake(query, key, value, agent, *_):
    batch, queries, heads, _ = query.shape
    agents, v_dim = agent.shape[1], value.shape[3]
    return (
        query.new_empty(batch, queries, heads, v_dim),
        query.new_empty(batch, heads, agents, v_dim),
        query.new_empty(batch, heads, agents, dtype=torch.float32),
    )


def _backward(grad_out, query, *arguments):
    from zoo.kernels.agent import triton

    with device_of(query):
        grads = triton.backward(grad_out, query, *arguments)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


torch.library.impl("zoo::agent_attention_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("zoo::agent_attention_backward")
def _backward_fake(grad_out, query, key, value, agent, agent_bias, query_bias, *_):
    inputs = query, key, value, agent, agent_bias, query_bias
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


agent_attention = register_gradient("agent_attention", _forward, _backward, inputs=6)

torch.library.define("zoo::pool_agents", "(Tensor x, int side) -> Tensor")


def pool(x, side):
    from zoo.kernels.agent import triton

    with device_of(x):
        return triton.pool(x, side)


torch.library.impl("zoo::pool_agents", "CompositeExplicitAutograd", pool)


@torch.library.register_fake("zoo::pool_agents")
def _pool_fake(x, side):
    return x.new_empty(x.shape[0], side * side, x.shape[3])


def _save_map(ctx, inputs, output) -> None:
    x, ctx.side = inputs
    ctx.size = x.shape[1:3]


def _pool_backward(ctx, grad):
    height, width = ctx.size
    rows, cols = (_bins(n, ctx.side, grad) for n in (height, width))
    rows, cols = ((x / x.sum(1, keepdim=True)).to(grad.dtype).t() for x in (rows, cols))
    batch, _, channels = grad.shape
    grad = torch.matmul(rows, grad.reshape(batch, ctx.side, -1)).reshape(batch, height, ctx.side, channels)
    return torch.matmul(cols, grad), None


def pool_by_products(x: Tensor, side: int) -> Tensor:
    """`zoo::pool_agents` as two products, along rows and along columns."""
    _, height, width, channels = x.shape

    def means(members: Tensor, x: Tensor) -> Tensor:
        """[side, tokens] and [..., tokens, channels] -> [..., side, channels], divided at once: no sum overflows."""
        count = members.sum(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return (torch.matmul(members, x) / count).to(x.dtype)

    x = means(_bins(width, side, x), x)  # [batch, height, side, channels]
    x = means(_bins(height, side, x), x.flatten(2))
    return x.unflatten(2, (side, channels)).flatten(1, 2)


def _bins(length: int, side: int, like: Tensor) -> Tensor:
    """[side, length]: 1 for every token of an axis in a bin, else 0."""
    index, token = torch.arange(side, device=like.device), torch.arange(length, device=like.device)
    first, end = index * length // side, ((index + 1) * length + side - 1) // side
    return ((token >= first[:, None]) & (token < end[:, None])).to(like.dtype)


torch.library.register_autograd("zoo::pool_agents", _pool_backward, setup_context=_save_map)
