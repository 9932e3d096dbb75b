"""What the forward and backward kernels share: addresses, and the logits of some queries and some keys.

Names in the kernels: M runs over queries of one block, N over keys of its window, D over the query and key dimension,
V over the value dimension, W over a window's rows or columns, R over the rows of a relative table. A block has SIDE *
SIDE queries, BLOCK * BLOCK tokens, and WIN * WIN keys around it. Tensors come with their strides (batch, y, x, head,
dim); all address arithmetic is in int64.
"""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import LOG2E, load


@triton.jit
def locate(pid, heads, blocks_y, blocks_x, parts):
    """Program number -> batch, head, block row, block column, part. Heads first: they share cache lines."""
    head = pid % heads
    pid = pid // heads
    part = pid % parts
    pid = pid // parts
    block_x = pid % blocks_x
    pid = pid // blocks_x
    block_y = pid % blocks_y
    batch = pid // blocks_y
    return batch.to(tl.int64), head.to(tl.int64), block_y.to(tl.int64), block_x.to(tl.int64), part


@triton.jit
def token_pointers(tensor, strides, batch, head, y, x, d):
    """Pointers [rows, D] to the tokens at `y`, `x` [rows] of the map."""
    rows = batch * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2] + head * strides[3]
    return tensor + rows[:, None] + d[None, :] * strides[4]


@triton.jit
def token_rows(batch, head, y, x, height, width, heads):
    """Where the tokens at `y`, `x` are in a contiguous [batch, height, width, heads]."""
    return ((batch * height + y) * width + x) * heads + head


@triton.jit
def window_tokens(n, block_y, block_x, height, width, BLOCK: tl.constexpr, HALO: tl.constexpr):
    """Keys `n` [N] of a window, row by row: their y and x on the map, and whether they are on it."""
    WIN: tl.constexpr = BLOCK + 2 * HALO
    y, x = block_y * BLOCK - HALO + n // WIN, block_x * BLOCK - HALO + n % WIN
    return y, x, (y >= 0) & (y < height) & (x >= 0) & (x < width) & (n < WIN * WIN)


@triton.jit
def table_rows(table, d, dim, R: tl.constexpr, WIN: tl.constexpr, EVEN_D: tl.constexpr):
    """A relative table [2 * WIN - 1, dim], contiguous, as [R, D]."""
    r = tl.arange(0, R)
    return load(table + r[:, None] * dim + d[None, :], r < 2 * WIN - 1, d, dim, EVEN_D)


@triton.jit
def relative_logits(
    q, table, at, d, dim, R: tl.constexpr, W: tl.constexpr, WIN: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[M, W]: base-2 logits of queries in rows `at` [M] of their block, by the rows of the window; or columns."""
    rows = table_rows(table, d, dim, R, WIN, EVEN_D).to(q.dtype)
    logits = tl.dot(q, tl.trans(rows), input_precision=PRECISION) * LOG2E
    place = tl.arange(0, W)[None, :] + (WIN - 1 - at)[:, None]
    return tl.gather(logits, tl.maximum(tl.minimum(place, R - 1), 0), 1)


@triton.jit
def relative_gradient(d_relative, at, R: tl.constexpr, W: tl.constexpr, WIN: tl.constexpr):
    """Transpose of the shift in `relative_logits`: [M, W] -> [M, R], by the rows of the table."""
    place = tl.arange(0, R)[None, :] - (WIN - 1 - at)[:, None]
    shifted = tl.gather(d_relative, tl.maximum(tl.minimum(place, W - 1), 0), 1)
    return tl.where((place >= 0) & (place < WIN), shifted, 0.0)


@triton.jit
def one_hot(at, W: tl.constexpr, dtype: tl.constexpr):
    """[W, N]: 1 in row `at` [N] of every column. A product with it spreads [M, W] over the keys."""
    return (tl.arange(0, W)[:, None] == at[None, :]).to(dtype)


@triton.jit
def spread(relative, at, logits, W: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """`logits` [M, N] plus column `at` [N] of `relative` [M, W]."""
    hot = one_hot(at, W, dtype)
    high = relative.to(dtype)
    logits = tl.dot(high, hot, logits, input_precision=PRECISION)
    if dtype != tl.float32:  # in two parts, for more digits than the dtype has
        logits = tl.dot((relative - high.to(tl.float32)).to(dtype), hot, logits, input_precision=PRECISION)
    return logits


@triton.jit
def pair_logits(
    q, k, n, rel_y, rel_x, scale, WIN: tl.constexpr, W: tl.constexpr, HAS_REL: tl.constexpr, PRECISION: tl.constexpr
):
    """[M, N]: base-2 logits, -inf beyond the window."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if HAS_REL:
        logits = spread(rel_y, n // WIN, logits, W, k.dtype, PRECISION)
        logits = spread(rel_x, n % WIN, logits, W, k.dtype, PRECISION)
    return tl.where((n < WIN * WIN)[None, :], logits, float("-inf"))
