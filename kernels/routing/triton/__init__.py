"""Fused bi-level routing attention for GPUs: launches the kernels of `forward` and `backward`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels._launch import launch
from zoo.kernels.routing import regions
from zoo.kernels.routing.triton import backward as _backward
from zoo.kernels.routing.triton import forward as _forward


class Config(NamedTuple):
    """A tile of at most `tile` rows against blocks of `block`: powers of two from 16."""

    tile: int
    block: int
    num_warps: int
    num_stages: int


def config(block_d: int, itemsize: int) -> Config:
    """Sizes with which every kernel stays below 80 KiB of shared memory."""
    if itemsize <= 2 and block_d <= 128:
        return Config(64, 64, 4, 2)
    return Config(32, 32, 4, 1) if block_d * itemsize <= 512 else Config(16, 16, 4, 1)


class _Problem:
    """Arguments that every kernel takes."""

    def __init__(self, query, key, value, routes, weights, region_size, scale):
        self.batch, _, _, self.heads, dim = query.shape
        self.regions, self.topk = routes.shape[1:]
        self.tokens = region_size[0] * region_size[1]
        self.inputs = [y for x in (query, key, value) for y in (x, x.stride())]
        self.weights = query if weights is None else weights.contiguous()  # what is absent is never read
        block_d = max(16, triton.next_power_of_2(dim))
        tile, block, num_warps, num_stages = config(block_d, query.element_size())
        block_m = max(16, min(tile, triton.next_power_of_2(self.tokens)))
        self.tiles = -(-self.tokens // block_m)
        self.programs = self.batch * self.heads * self.regions * self.tiles
        cols = regions.grid(*query.shape[1:3], region_size)[1]
        map_shape, region_shape = query.shape[1:], (self.regions, cols, *region_size)
        self.scalars = *map_shape, *region_shape, self.topk, self.tiles, scale
        self.options = {
            "BLOCK_M": block_m,
            "BLOCK_N": block,
            "BLOCK_D": block_d,
            "EVEN_D": block_d == dim,
            "SOFT": weights is not None,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "num_warps": num_warps,
            "num_stages": num_stages,
        }


def forward(query, key, value, routes, weights, region_size, scale) -> tuple[Tensor, Tensor]:
    """Output like `query`, contiguous, and log-sum-exp [batch, height, width, heads] in float32."""
    p = _Problem(query, key, value, routes, weights, region_size, scale)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() > 0:
        launch(
            _forward.forward_kernel,
            p.programs,
            (*p.inputs, routes, p.weights, out, out.stride(), lse, *p.scalars),
            p.options,
        )
    return out, lse


def backward(
    grad_out, query, key, value, routes, weights, out, lse, region_size, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and weights (None where there are none)."""
    p = _Problem(query, key, value, routes, weights, region_size, scale)
    d_query, d_key, d_value = (query.new_empty(query.shape) for _ in range(3))
    if d_query.numel() == 0:
        return d_query, d_key, d_value, None if weights is None else torch.zeros_like(weights)

    shift = torch.empty_like(lse)
    parts = lse  # never written
    if weights is not None:
        parts = lse.new_empty(p.batch, p.heads, p.regions, p.tiles, p.topk, p.tokens)
    launch(
        _backward.query_kernel,
        p.programs,
        (
            *p.inputs,
            routes,
            p.weights,
            out,
            out.stride(),
            lse,
            grad_out,
            grad_out.stride(),
            shift,
            d_query,
            d_query.stride(),
            parts,
            *p.scalars,
        ),
        p.options,
    )
    # Who chose a region: its numbers in the table, sorted. Atomic sums would need no such list, but differ by run.
    numbers, visits = routes.flatten(1).sort(stable=True)
    every = torch.arange(p.regions, device=routes.device).expand(p.batch, -1).contiguous()
    ends = torch.searchsorted(numbers, every, right=True)
    launch(
        _backward.key_value_kernel,
        p.programs,
        (
            *p.inputs,
            visits,
            ends,
            p.weights,
            lse,
            grad_out,
            grad_out.stride(),
            shift,
            d_key,
            d_key.stride(),
            d_value,
            d_value.stride(),
            *p.scalars,
        ),
        p.options,
    )
    return d_query, d_key, d_value, None if weights is None else parts.sum((1, 3, 5))
