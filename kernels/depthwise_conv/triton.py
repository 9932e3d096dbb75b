"""Depthwise convolution of a map whose channels lie side by side, added to tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._launch import launch
from zoo.kernels._symbols import ceil_div

TILE = 4096  # numbers that a program holds


@triton.jit
def forward_kernel(
    x,  # [batch, height, width, DIM], the last axis of stride 1
    strides,
    base,  # [batch, tokens, DIM], likewise
    base_strides,
    weight,  # [DIM, SIZE, SIZE], contiguous
    bias,  # [DIM], contiguous
    out,  # [batch, tokens, DIM], contiguous
    batches,
    tokens,
    height,
    width,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """One program per P tokens, of any images, and C channels."""
    BLOCKS: tl.constexpr = (DIM + C - 1) // C
    p, c = tl.program_id(0) // BLOCKS * P + tl.arange(0, P), tl.program_id(0) % BLOCKS * C + tl.arange(0, C)
    image, token = p // tokens, p % tokens
    place = token - (tokens - height * width)  # on the map
    y, z = place // width, place % width
    inside = (p < batches * tokens)[:, None] & (c < DIM)[None, :]
    on_map = inside & (place >= 0)[:, None]
    row = x + (image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + z.to(tl.int64) * strides[2])[:, None]
    total = tl.zeros([P, C], dtype=tl.float32)
    for tap in tl.static_range(SIZE * SIZE):
        dy, dz = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        near = (y + dy >= 0) & (y + dy < height) & (z + dz >= 0) & (z + dz < width)
        shift = strides[1] * dy + strides[2] * dz
        values = tl.load(row + (shift + c)[None, :], mask=on_map & near[:, None], other=0.0).to(tl.float32)
        w = tl.load(weight + c * (SIZE * SIZE) + tap, mask=c < DIM, other=0.0).to(tl.float32)
        total += values * w[None, :]
    if HAS_BIAS:
        b = tl.load(bias + c, mask=c < DIM, other=0.0).to(tl.float32)
        total += tl.where(on_map, b[None, :], 0.0)
    if HAS_BASE:
        row = base + (image.to(tl.int64) * base_strides[0] + token.to(tl.int64) * base_strides[1])[:, None]
        total += tl.load(row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + p.to(tl.int64)[:, None] * DIM + c[None, :], total.to(out.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[batch, tokens, channels], contiguous, in `dtype`: the convolution of `x`, plus `base`."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, height, width, dim = x.shape
    tokens = height * width if base is None else base.shape[1]
    out = x.new_empty(batch, tokens, dim, dtype=dtype)
    options = _options(dim, weight.shape[-1], base is not None, bias is not None, TILE)
    # What is absent is never read; any tensor does.
    base = out if base is None else base if base.stride(2) == 1 else base.contiguous()
    weight = weight.contiguous()
    bias = weight if bias is None else bias.contiguous()
    arguments = x, x.stride()[:3], base, base.stride()[:2], weight, bias, out, batch, tokens, height, width
    programs = ceil_div(batch * tokens, options["P"]) * ceil_div(dim, options["C"])
    launch(forward_kernel, programs, arguments, options)
    return out


@lru_cache
def _options(dim: int, size: int, has_base: bool, has_bias: bool, tile: int) -> dict:
    c = 64 if dim % 64 == 0 else min(32, triton.next_power_of_2(dim))
    flags = {"HAS_BASE": has_base, "HAS_BIAS": has_bias}
    return {"DIM": dim, "SIZE": size, **flags, "P": tile // c, "C": c, "num_warps": 4}
