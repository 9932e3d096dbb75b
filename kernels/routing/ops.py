"""Registered torch operators behind `routing_attention_2d`: compile, export, fx and TorchScript see one node.

`zoo::routing_attention_2d` takes the checked arguments of the public function and returns the output, the log-sum-exp
of the logits and the chosen regions, the latter two for `zoo::routing_attention_2d_backward`, its gradient. `backend`
is "triton", "tiled", or "auto" for the first of them that can run the call.
"""

import torch
from torch import Tensor

from zoo.kernels._autograd import register_gradient
from zoo.kernels._launch import device_of
from zoo.kernels.neighborhood.ops import takes_triton
from zoo.kernels.routing import regions, tiled

_OPTIONS = 'SymInt[2] region_size, SymInt topk, float scale, bool soft=False, str backend="auto"'

torch.library.define(
    "zoo::routing_attention_2d", f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "zoo::routing_attention_2d_backward",
    f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor routes, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
)


def _implementation(query: Tensor, backend: str):
    if takes_triton(query, backend):
        from zoo.kernels.routing import triton

        return triton
    return tiled


def _forward(query, key, value, region_size, topk, scale, soft=False, backend="auto"):
    region_size = tuple(region_size)
    with torch.autocast(query.device.type, enabled=False), device_of(query):  # sums stay in float32
        affinity = regions.affinities(regions.means(query, region_size), regions.means(key, region_size), scale)
        routes = regions.choose(affinity, topk)
        weights = regions.weigh(affinity, routes) if soft else None
        implementation = _implementation(query, backend)
        out, lse = implementation.forward(query, key, value, routes, weights, region_size, scale)
    return out, lse, routes


torch.library.impl("zoo::routing_attention_2d", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("zoo::routing_attention_2d")
def _forward_fake(query, key, value, region_size, topk, *_):
    batch, height, width, heads, _ = query.shape
    rows, cols = regions.grid(height, width, region_size)
    return (
        query.new_empty(query.shape),
        query.new_empty(batch, height, width, heads, dtype=torch.promote_types(query.dtype, torch.float32)),
        query.new_empty(batch, rows * cols, topk, dtype=torch.int64),
    )


def _backward(grad_out, query, key, value, out, lse, routes, region_size, topk, scale, soft=False, backend="auto"):
    region_size = tuple(region_size)
    weights = None
    with torch.autocast(query.device.type, enabled=False), device_of(query):
        if soft:
            query_means, key_means = regions.means(query, region_size), regions.means(key, region_size)
            weights = regions.weigh(regions.affinities(query_means, key_means, scale), routes)
        d_query, d_key, d_value, d_weights = _implementation(query, backend).backward(
            grad_out, query, key, value, routes, weights, out, lse, region_size, scale
        )
        if soft:
            d_means = regions.weigh_backward(d_weights, weights, routes, query_means, key_means, scale)
            d_query, d_key = (
                (d + regions.means_backward(d_mean, d, region_size)).to(d.dtype)
                for d, d_mean in zip((d_query, d_key), d_means)
            )
    return d_query, d_key, d_value


torch.library.impl("zoo::routing_attention_2d_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("zoo::routing_attention_2d_backward")
def _backward_fake(grad_out, query, key, value, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


routing_attention_2d = register_gradient("routing_attention_2d", _forward, _backward, inputs=3)
