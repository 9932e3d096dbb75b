"""Fused layer norm. No sum is atomic, so runs repeat bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels._autograd import differentiable_gradient, made_of_operators
from zoo.kernels._launch import launch
from zoo.kernels._symbols import ceil_div

TILE = 2048  # numbers that a program holds at a time
PROGRAMS = 1024  # among which the sums over tokens are split


@triton.jit
def standardize(x, inside, eps, DIM: tl.constexpr):
    """Rows of `x` [R, D] with mean 0 and variance 1, and what they were divided by, inverted [R]."""
    mean = tl.sum(x, 1) / DIM
    x = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
    return x * scale[:, None], scale


@triton.jit
def forward_kernel(x, weight, bias, out, rows, eps, DIM: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """One program per R rows of `x` [rows, DIM]."""
    r, d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    inside = (r < rows)[:, None] & (d < DIM)[None, :]
    place = r[:, None] * DIM + d[None, :]
    values, _ = standardize(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), inside, eps, DIM)
    w = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=d < DIM, other=0.0).to(tl.float32)
    tl.store(out + place, (values * w[None, :] + b[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    d_out, x, weight, d_x, shares, rows, eps, turns, DIM: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """One program per `turns` times R rows; `shares` [programs, 2, DIM] of the gradients of weight and bias."""
    d = tl.arange(0, D)
    w = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    d_weight = tl.zeros([R, D], dtype=tl.float32)
    d_bias = tl.zeros([R, D], dtype=tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for turn in range(0, turns):
        r = (program * turns + turn) * R + tl.arange(0, R)
        inside = (r < rows)[:, None] & (d < DIM)[None, :]
        place = r[:, None] * DIM + d[None, :]
        values, scale = standardize(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), inside, eps, DIM)
        g = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        d_weight += g * values
        d_bias += g
        g = g * w[None, :]
        along = tl.sum(g * values, 1) / DIM
        g = (g - (tl.sum(g, 1) / DIM)[:, None] - values * along[:, None]) * scale[:, None]
        tl.store(d_x + place, g.to(d_x.dtype.element_ty), mask=inside)
    to = shares + program * (2 * DIM) + d
    tl.store(to, tl.sum(d_weight, 0), mask=d < DIM)
    tl.store(to + DIM, tl.sum(d_bias, 0), mask=d < DIM)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Of contiguous `x`, in `dtype`."""
    out = torch.empty_like(x, dtype=dtype)
    rows, options = _tiles(x)
    launch(forward_kernel, ceil_div(rows, options["R"]), (x, weight, bias, out, rows, eps), options)
    return out


class LayerNorm(torch.autograd.Function):
    """`forward` with gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return forward(x, weight, bias, eps, dtype)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, weight, bias = ctx.saved_tensors
        if made_of_operators(d_out):
            grads = differentiable_gradient(_in_torch(d_out.dtype, ctx.eps), (x, weight, bias), d_out)
            return *grads, None, None
        d_x = torch.empty_like(x)
        rows, options = _tiles(x)
        turns = ceil_div(rows, PROGRAMS * options["R"])
        programs = ceil_div(rows, turns * options["R"])
        shares = x.new_empty(programs, 2, x.shape[-1], dtype=torch.float32)
        launch(backward_kernel, programs, (d_out.contiguous(), x, weight, d_x, shares, rows, ctx.eps, turns), options)
        d_weight, d_bias = shares.sum(0).to(weight.dtype)
        return d_x, d_weight, d_bias, None, None


def _in_torch(dtype: torch.dtype, eps: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`forward` in torch's own operators."""

    def run(x, weight, bias):
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(dtype)

    return run


def _tiles(x: Tensor) -> tuple[int, dict]:
    """Number of tokens, and how the kernels hold them."""
    dim = x.shape[-1]
    return x.numel() // dim, _options(dim)


@lru_cache
def _options(dim: int) -> dict:
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "R": max(1, TILE // block), "D": block, "num_warps": 4}
