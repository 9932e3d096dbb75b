"""Fused neighborhood attention for GPUs: launches the kernels of `forward`, `backward` and `bias`."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from zoo.kernels.neighborhood import window
from zoo.kernels.neighborhood.triton import backward as _backward
from zoo.kernels.neighborhood.triton import bias as _bias
from zoo.kernels.neighborhood.triton import forward as _forward
from zoo.kernels.neighborhood.triton import tuning
from zoo.kernels.neighborhood.triton.common import NO_BIAS, TABLE, UNROLLED

BLOCK_E = 32  # extra tokens taken at a time
# Programs among which the sums over the whole batch are split: enough to fill a large GPU.
BIAS_PROGRAMS = 1024
EXTRA_PROGRAMS = 512
# Bias is unrolled where at least so many tiles share each pattern and it stays small; its gradient is summed for as
# many heads at a time as stay within these bytes, and for one at least.
UNROLL_REUSE = 4
UNROLL_BYTES = 2**26


@lru_cache(maxsize=256)
def _axis(length, kernel_size, dilation, stride, is_causal, plain, tile, of_keys) -> tuple[int, int, int, int, int]:
    """Of one axis: most members of a class, kinds of classes, tiles, patterns, and most members a tile meets."""
    most = window.class_length(length, dilation, 0)
    kinds = 1 if length % dilation == 0 else 2
    head, tail = (kernel_size, kernel_size) if of_keys else (kernel_size // 2, kernel_size - kernel_size // 2 - 1)
    patterns = reach = 0
    for members in range(most - kinds + 1, most + 1):
        geometry = members, kernel_size, stride, is_causal
        for number, first in enumerate(range(0, members, tile)):
            last = min(first + tile, members) - 1
            if of_keys:
                span = window.last_query(last, *geometry) + 1 - window.first_query(first, *geometry)
            else:
                span = window.window_end(last, *geometry) - window.window_start(first, *geometry)
            reach = max(reach, span)
            pattern = window.tile_pattern(number, tile, members, head, tail) if plain else number
            patterns = max(patterns, pattern + 1)
    return most, kinds, -(-most // tile), patterns, reach


class _Problem:
    """Arguments that every kernel takes."""

    def __init__(self, query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale):
        self.query, self.key, self.value = query, key, value
        self.batch, self.height, self.width, self.heads, self.dim = query.shape
        self.kernel_size, self.dilation, self.stride, self.is_causal = geometry
        self.scale = scale
        # Windows that move by one with the query and shift at both borders. Others differ from tile to tile.
        self.plain = self.stride == (1, 1) and not any(self.is_causal)
        self.bias = None if rel_pos_bias is None else rel_pos_bias.contiguous()
        self.extra = 0 if extra_key is None else extra_key.shape[1]
        # What is absent is never read; any tensor does.
        self.extra_key, self.extra_value = (query if x is None else x.unsqueeze(2) for x in (extra_key, extra_value))
        self.window_options = {
            "KERNEL_Y": self.kernel_size[0],
            "KERNEL_X": self.kernel_size[1],
            "STRIDE_Y": self.stride[0],
            "STRIDE_X": self.stride[1],
            "CAUSAL_Y": self.is_causal[0],
            "CAUSAL_X": self.is_causal[1],
            "PLAIN": self.plain,
        }
        block_d = max(16, triton.next_power_of_2(self.dim))
        self.dim_options = {
            "BLOCK_D": block_d,
            "EVEN_D": block_d == self.dim,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        }

    @property
    def inputs(self):
        """Query, key and value, each followed by its strides."""
        return [y for x in (self.query, self.key, self.value) for y in (x, x.stride())]

    @property
    def extras(self):
        """Extra key and value, each followed by its strides."""
        return [y for x in (self.extra_key, self.extra_value) for y in (x, x.stride())]

    @property
    def shape(self):
        """Height, width, heads and head dimension."""
        return self.height, self.width, self.heads, self.dim

    def config(self, kernel: str) -> tuning.Config:
        """Tile sizes for one kernel."""
        q = self.query
        return tuning.config(kernel, self.kernel_size, self.dim, q.dtype, self.bias is not None, q.device)

    def axes(self, config: tuning.Config, of_keys: bool):
        """`_axis` of both axes, item by item."""
        rows, cols = (
            _axis(n, k, d, s, c, self.plain, tile, of_keys)
            for n, k, d, s, c, tile in zip(
                (self.height, self.width),
                self.kernel_size,
                self.dilation,
                self.stride,
                self.is_causal,
                (config.tile_y, config.tile_x),
            )
        )
        return list(zip(rows, cols))

    def grid(self, tiles) -> tuple[int]:
        """A program for every tile of every class, head and image."""
        return (self.batch * self.heads * math.prod(tiles) * math.prod(self.dilation),)

    def walk(self, kernel: str):
        """How one kernel goes over the map: grid, tiles, bias, its layout, and options."""
        config = self.config(kernel)
        of_keys = kernel == "key_value"
        most, kinds, tiles, patterns, reach = self.axes(config, of_keys)
        grid = self.grid(tiles)
        blocks = [-(-r // b) for r, b in zip(reach, (config.block_y, config.block_x))]
        # The last block may stick out by all but one of its members.
        bits = max(r + b for r, b in zip(reach, (config.block_y, config.block_x))) <= 32
        bias, mode, layout = self.query, NO_BIAS, (0,) * 7
        if self.bias is not None:
            bias, mode = self.bias, TABLE
            rows = math.prod(kinds) * math.prod(patterns) * self.heads
            shape = rows, *blocks, config.tile_y * config.tile_x, config.block_y * config.block_x
            if grid[0] >= UNROLL_REUSE * rows and 4 * math.prod(shape) <= UNROLL_BYTES:
                mode, layout = UNROLLED, (*most, *patterns, kinds[1], *blocks)
                bias = self.query.new_empty(shape, dtype=torch.float32)
                _bias.unroll_kernel[(math.prod(kinds) * math.prod(tiles) * self.heads,)](
                    self.bias,
                    bias,
                    layout,
                    self.heads,
                    *tiles,
                    OF_KEYS=of_keys,
                    **self.window_options,
                    **config.tile_options(),
                )
        options = {"BIAS": mode.value, "BITS": bits} | self.window_options | self.dim_options | config.options()
        return grid, tiles, bias, layout, options


def forward(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale) -> tuple[Tensor, Tensor]:
    """Output like `query`, contiguous, and log-sum-exp [batch, height, width, heads] in float32."""
    p = _Problem(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    grid, tiles, bias, layout, options = p.walk("forward")
    _forward.forward_kernel[grid](
        *p.inputs,
        bias,
        layout,
        *p.extras,
        out,
        out.stride(),
        lse,
        *p.shape,
        p.extra,
        *tiles,
        *p.dilation,
        scale,
        BLOCK_E=BLOCK_E,
        HAS_EXTRA=p.extra > 0,
        **options,
    )
    return out, lse


def backward(
    grad_out, grad_lse, query, key, value, rel_pos_bias, extra_key, extra_value, out, lse, geometry, scale
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rel_pos_bias, extra_key and extra_value (None where there is none)."""
    p = _Problem(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale)
    d_query, d_key, d_value = (query.new_empty(query.shape) for _ in range(3))
    shift = torch.empty_like(lse)
    if d_query.numel() == 0:
        d_others = (None if x is None else torch.zeros_like(x) for x in (rel_pos_bias, extra_key, extra_value))
        return d_query, d_key, d_value, *d_others

    _query_gradient(p, out, lse, grad_out, grad_lse, shift, d_query)
    _key_value_gradients(p, lse, grad_out, shift, d_key, d_value)
    d_bias = None if rel_pos_bias is None else _bias_gradient(p, lse, grad_out, shift)
    d_extra = (None, None) if extra_key is None else _extra_gradients(p, lse, grad_out, shift, extra_key)
    return d_query, d_key, d_value, d_bias, *d_extra


def _query_gradient(p: _Problem, out, lse, grad_out, grad_lse, shift, d_query) -> None:
    """Fills `d_query`, and `shift` for the other kernels."""
    grid, tiles, bias, layout, options = p.walk("query")
    _backward.query_kernel[grid](
        *p.inputs,
        bias,
        layout,
        *p.extras,
        out,
        out.stride(),
        lse,
        grad_out,
        grad_out.stride(),
        lse if grad_lse is None else grad_lse.contiguous(),
        shift,
        d_query,
        d_query.stride(),
        *p.shape,
        p.extra,
        *tiles,
        *p.dilation,
        p.scale,
        BLOCK_E=BLOCK_E,
        HAS_EXTRA=p.extra > 0,
        HAS_D_LSE=grad_lse is not None,
        **options,
    )


def _key_value_gradients(p: _Problem, lse, grad_out, shift, d_key, d_value) -> None:
    """Fills `d_key` and `d_value`."""
    grid, tiles, bias, layout, options = p.walk("key_value")
    _backward.key_value_kernel[grid](
        *p.inputs,
        bias,
        layout,
        lse,
        grad_out,
        grad_out.stride(),
        shift,
        d_key,
        d_key.stride(),
        d_value,
        d_value.stride(),
        *p.shape,
        *tiles,
        *p.dilation,
        p.scale,
        **options,
    )


def _bias_gradient(p: _Problem, lse, grad_out, shift) -> Tensor:
    config = p.config("bias")
    most, kinds, tiles, patterns, reach = p.axes(config, of_keys=False)
    blocks = [-(-r // b) for r, b in zip(reach, (config.block_y, config.block_x))]
    layout = (*most, *patterns, kinds[1], *blocks)
    rows = math.prod(kinds) * math.prod(patterns)
    pairs = math.prod(blocks) * config.tile_y * config.tile_x * config.block_y * config.block_x
    parts = max(1, min(p.grid(tiles)[0] // p.heads, BIAS_PROGRAMS // (p.heads * math.prod(blocks))))
    some = max(1, min(p.heads, UNROLL_BYTES // (4 * pairs * rows * parts)))  # heads at a time
    d_unrolled = lse.new_empty(parts, rows, some, pairs)
    sums = lse.new_empty(p.heads, rows, config.tile_y, *p.bias.shape[1:])
    for first in range(0, p.heads, some):
        some = min(some, p.heads - first)
        _bias.gradient_kernel[(some * math.prod(blocks) * rows * parts,)](
            *p.inputs,
            p.bias,
            lse,
            grad_out,
            grad_out.stride(),
            shift,
            d_unrolled,
            layout,
            p.batch,
            *p.shape,
            *tiles,
            *p.dilation,
            first,
            some,
            rows,
            parts,
            p.scale,
            **p.window_options,
            **p.dim_options,
            **config.options(),
        )
        _bias.fold_kernel[(some * rows * config.tile_y * p.bias.shape[1],)](
            d_unrolled,
            sums[first:],
            layout,
            *tiles,
            some,
            rows,
            parts,
            BLOCK_P=32,
            BLOCK_O=triton.next_power_of_2(p.bias.shape[2]),
            **p.window_options,
            **config.tile_options(),
        )
    return sums.sum((1, 2)).to(p.bias.dtype)


def _extra_gradients(p: _Problem, lse, grad_out, shift, extra_key) -> tuple[Tensor, Tensor]:
    if p.extra == 0:
        return torch.zeros_like(extra_key), torch.zeros_like(extra_key)
    tokens = p.height * p.width
    block_n = 64 if p.query.element_size() < 4 else 32
    programs = p.batch * p.heads * -(-p.extra // BLOCK_E)
    parts = max(1, min(-(-EXTRA_PROGRAMS // programs), -(-tokens // (4 * block_n))))
    sums = lse.new_empty(2, parts, *extra_key.shape)
    _backward.extra_kernel[(programs * parts,)](
        p.query,
        p.query.stride(),
        *p.extras,
        lse,
        grad_out,
        grad_out.stride(),
        shift,
        *sums,
        p.batch,
        tokens,
        p.width,
        p.heads,
        p.dim,
        p.extra,
        -(-tokens // parts),
        p.scale,
        BLOCK_E=BLOCK_E,
        BLOCK_N=block_n,
        **p.dim_options,
    )
    d_extra_key, d_extra_value = sums.sum(1).to(extra_key.dtype)
    return d_extra_key, d_extra_value
