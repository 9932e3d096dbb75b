"""The bias of all pairs of a window from its table, and back, in one kernel each. No sum is atomic."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._autograd import differentiable_gradient, made_of_operators
from zoo.kernels._launch import launch
from zoo.kernels._sdpa import ALIGNMENT
from zoo.kernels.neighborhood.dense import dense_bias


@triton.jit
def spread_kernel(
    table,  # [heads, 2 * ROWS - 1, 2 * COLS - 1] of any strides
    strides,
    bias,  # [heads, tokens, tokens], rows of `row` numbers
    row,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    N: tl.constexpr,
):
    """One program per query and head."""
    TOKENS: tl.constexpr = ROWS * COLS
    query, head = tl.program_id(0) % TOKENS, tl.program_id(0) // TOKENS
    key = tl.arange(0, N)
    dy, dx = key // COLS - query // COLS + ROWS - 1, key % COLS - query % COLS + COLS - 1
    place = head * strides[0] + dy * strides[1] + dx * strides[2]
    values = tl.load(table + place, mask=key < TOKENS, other=0.0)
    to = bias + (head * TOKENS + query).to(tl.int64) * row + key
    tl.store(to, values.to(bias.dtype.element_ty), mask=key < TOKENS)


@triton.jit
def gather_kernel(
    d_bias,  # [heads, tokens, tokens] of any strides
    strides,
    d_table,  # [heads, 2 * ROWS - 1, 2 * COLS - 1], contiguous
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    N: tl.constexpr,
):
    """One program per number of the table, which adds up the pairs of that offset."""
    HEIGHT: tl.constexpr = 2 * ROWS - 1
    WIDTH: tl.constexpr = 2 * COLS - 1
    offset, head = tl.program_id(0) % (HEIGHT * WIDTH), tl.program_id(0) // (HEIGHT * WIDTH)
    query = tl.arange(0, N)
    y, x = query // COLS + offset // WIDTH - ROWS + 1, query % COLS + offset % WIDTH - COLS + 1
    inside = (query < ROWS * COLS) & (y >= 0) & (y < ROWS) & (x >= 0) & (x < COLS)
    place = head.to(tl.int64) * strides[0] + query.to(tl.int64) * strides[1] + (y * COLS + x) * strides[2]
    total = tl.sum(tl.load(d_bias + place, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(d_table + tl.program_id(0), total.to(d_table.dtype.element_ty))


def forward(table: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """`dense_bias` on a GPU."""
    heads, tokens = table.shape[0], rows * cols
    row = -(-tokens // ALIGNMENT) * ALIGNMENT
    bias = table.new_empty(heads, tokens, row, dtype=dtype)
    launch(spread_kernel, heads * tokens, (table, table.stride(), bias, row), _options(rows, cols))
    return bias[..., :tokens]


class DenseBias(torch.autograd.Function):
    """`forward` with gradients."""

    @staticmethod
    def forward(ctx, table: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(table)
        ctx.of = rows, cols, dtype
        return forward(table, rows, cols, dtype)

    @staticmethod
    def backward(ctx, d_bias: Tensor):
        (table,) = ctx.saved_tensors
        rows, cols, dtype = ctx.of
        if made_of_operators(d_bias):
            grads = differentiable_gradient(lambda x: dense_bias(x, rows, cols, dtype), (table,), d_bias)
            return *grads, None, None, None
        d_table = d_bias.new_empty(table.shape, dtype=table.dtype)
        launch(gather_kernel, d_table.numel(), (d_bias, d_bias.stride(), d_table), _options(rows, cols))
        return d_table, None, None, None


@lru_cache
def _options(rows: int, cols: int) -> dict:
    return {"ROWS": rows, "COLS": cols, "N": triton.next_power_of_2(rows * cols)}
