"""Fused backward pass. Weights are recomputed from the log-sum-exp; no sum is atomic, so runs repeat bit by bit.

A key is in the windows of several blocks. `window_kernel` writes what each window adds to its gradient, `sum_kernel`
sums that. Likewise every program of `query_kernel` writes its share of the gradients of the tables.
"""

import triton
import triton.language as tl

from zoo.kernels.halo.triton.common import (
    locate,
    one_hot,
    pair_logits,
    relative_gradient,
    relative_logits,
    table_rows,
    token_pointers,
    token_rows,
    window_tokens,
)
from zoo.kernels.neighborhood.triton.common import LOG2E, load, store


@triton.jit
def table_gradient(
    d_table, d_relative, at, q, d, dim, R: tl.constexpr, W: tl.constexpr, WIN: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one program's share of the gradient of a table [2 * WIN - 1, dim]. Returns [M, R], see below."""
    d_rows = relative_gradient(d_relative, at, R, W, WIN).to(q.dtype)
    r = tl.arange(0, R)
    share = tl.dot(tl.trans(d_rows), q, input_precision=PRECISION)
    store(d_table + r[:, None] * dim + d[None, :], share, r < 2 * WIN - 1, d, dim, EVEN_D)
    return d_rows


@triton.jit
def query_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    rel_height,
    rel_width,
    out,
    o_strides,
    lse,
    d_out,
    do_strides,
    shift,  # [batch, SIDE * blocks_y, SIDE * blocks_x, heads], written for `window_kernel`: sum(out * d_out)
    d_query,
    dq_strides,
    d_tables,  # [programs, 2, 2 * WIN - 1, dim] float32, contiguous; the caller sums over programs
    blocks_y,
    blocks_x,
    heads,
    dim,
    v_dim,
    scale,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    HAS_REL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIN: tl.constexpr = BLOCK + 2 * HALO
    PARTS: tl.constexpr = (SIDE * SIDE + M - 1) // M
    batch, head, block_y, block_x, part = locate(tl.program_id(0), heads, blocks_y, blocks_x, PARTS)
    m, d, v_d = part * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, V)
    in_y, in_x, q_inside = m // SIDE, m % SIDE, m < SIDE * SIDE
    qy, qx = block_y * SIDE + in_y, block_x * SIDE + in_x
    q = load(token_pointers(query, q_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
    o = load(token_pointers(out, o_strides, batch, head, qy, qx, v_d), q_inside, v_d, v_dim, EVEN_V)
    do = load(token_pointers(d_out, do_strides, batch, head, qy, qx, v_d), q_inside, v_d, v_dim, EVEN_V)
    rows = token_rows(batch, head, qy, qx, blocks_y * SIDE, blocks_x * SIDE, heads)
    q_lse = tl.load(lse + rows, mask=q_inside, other=float("inf")) * LOG2E  # no weight outside
    q_shift = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(shift + rows, q_shift, mask=q_inside)
    rel_y, rel_x = None, None
    if HAS_REL:
        rel_y = relative_logits(q, rel_height, in_y, d, dim, R, W, WIN, EVEN_D, PRECISION)
        rel_x = relative_logits(q, rel_width, in_x, d, dim, R, W, WIN, EVEN_D, PRECISION)

    dq = tl.zeros([M, D], dtype=tl.float32)
    d_rel_y = tl.zeros([M, W], dtype=tl.float32)
    d_rel_x = tl.zeros([M, W], dtype=tl.float32)
    for first in range(0, WIN * WIN, N):
        n = first + tl.arange(0, N)
        y, x, on_map = window_tokens(n, block_y, block_x, blocks_y * BLOCK, blocks_x * BLOCK, BLOCK, HALO)
        k = load(token_pointers(key, k_strides, batch, head, y, x, d), on_map, d, dim, EVEN_D)
        v = load(token_pointers(value, v_strides, batch, head, y, x, v_d), on_map, v_d, v_dim, EVEN_V)
        weights = tl.exp2(pair_logits(q, k, n, rel_y, rel_x, scale, WIN, W, HAS_REL, PRECISION) - q_lse[:, None])
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        d_logits = (weights * (d_weights - q_shift[:, None])).to(k.dtype)
        dq = tl.dot(d_logits, k, dq, input_precision=PRECISION)
        if HAS_REL:
            hot_y, hot_x = one_hot(n // WIN, W, k.dtype), one_hot(n % WIN, W, k.dtype)
            d_rel_y = tl.dot(d_logits, tl.trans(hot_y), d_rel_y, input_precision=PRECISION)
            d_rel_x = tl.dot(d_logits, tl.trans(hot_x), d_rel_x, input_precision=PRECISION)

    dq *= scale
    if HAS_REL:
        table: tl.constexpr = 2 * WIN - 1
        to = d_tables + tl.program_id(0).to(tl.int64) * (2 * table) * dim
        d_rows = table_gradient(to, d_rel_y, in_y, q, d, dim, R, W, WIN, EVEN_D, PRECISION)
        dq = tl.dot(d_rows, table_rows(rel_height, d, dim, R, WIN, EVEN_D).to(q.dtype), dq, input_precision=PRECISION)
        d_rows = table_gradient(to + table * dim, d_rel_x, in_x, q, d, dim, R, W, WIN, EVEN_D, PRECISION)
        dq = tl.dot(d_rows, table_rows(rel_width, d, dim, R, WIN, EVEN_D).to(q.dtype), dq, input_precision=PRECISION)
    store(token_pointers(d_query, dq_strides, batch, head, qy, qx, d), dq, q_inside, d, dim, EVEN_D)


@triton.jit
def window_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    rel_height,
    rel_width,
    lse,
    d_out,
    do_strides,
    shift,
    d_keys,  # [batch, blocks_y, blocks_x, WIN * WIN, heads, dim] float32, contiguous
    d_values,
    blocks_y,
    blocks_x,
    heads,
    dim,
    v_dim,
    scale,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    HAS_REL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per part of a block's window, against all queries of the block."""
    WIN: tl.constexpr = BLOCK + 2 * HALO
    PARTS: tl.constexpr = (WIN * WIN + N - 1) // N
    batch, head, block_y, block_x, part = locate(tl.program_id(0), heads, blocks_y, blocks_x, PARTS)
    n, d, v_d = part * N + tl.arange(0, N), tl.arange(0, D), tl.arange(0, V)
    y, x, on_map = window_tokens(n, block_y, block_x, blocks_y * BLOCK, blocks_x * BLOCK, BLOCK, HALO)
    k = load(token_pointers(key, k_strides, batch, head, y, x, d), on_map, d, dim, EVEN_D)
    v = load(token_pointers(value, v_strides, batch, head, y, x, v_d), on_map, v_d, v_dim, EVEN_V)

    dk = tl.zeros([N, D], dtype=tl.float32)
    dv = tl.zeros([N, V], dtype=tl.float32)
    for first in range(0, SIDE * SIDE, M):
        m = first + tl.arange(0, M)
        in_y, in_x, q_inside = m // SIDE, m % SIDE, m < SIDE * SIDE
        qy, qx = block_y * SIDE + in_y, block_x * SIDE + in_x
        q = load(token_pointers(query, q_strides, batch, head, qy, qx, d), q_inside, d, dim, EVEN_D)
        do = load(token_pointers(d_out, do_strides, batch, head, qy, qx, v_d), q_inside, v_d, v_dim, EVEN_V)
        rows = token_rows(batch, head, qy, qx, blocks_y * SIDE, blocks_x * SIDE, heads)
        q_lse = tl.load(lse + rows, mask=q_inside, other=float("inf")) * LOG2E
        q_shift = tl.load(shift + rows, mask=q_inside, other=0.0)
        rel_y, rel_x = None, None
        if HAS_REL:
            rel_y = relative_logits(q, rel_height, in_y, d, dim, R, W, WIN, EVEN_D, PRECISION)
            rel_x = relative_logits(q, rel_width, in_x, d, dim, R, W, WIN, EVEN_D, PRECISION)
        weights = tl.exp2(pair_logits(q, k, n, rel_y, rel_x, scale, WIN, W, HAS_REL, PRECISION) - q_lse[:, None])
        dv = tl.dot(tl.trans(weights.to(do.dtype)), do, dv, input_precision=PRECISION)
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        d_logits = weights * (d_weights - q_shift[:, None])
        dk = tl.dot(tl.trans(d_logits.to(q.dtype)), q, dk, input_precision=PRECISION)

    block = (batch * blocks_y + block_y) * blocks_x + block_x
    to = (block * (WIN * WIN) + n) * heads + head
    store(d_keys + to[:, None] * dim + d[None, :], dk * scale, on_map, d, dim, EVEN_D)
    store(d_values + to[:, None] * v_dim + v_d[None, :], dv, on_map, v_d, v_dim, EVEN_V)


@triton.jit
def sum_kernel(
    windows,  # [batch, blocks_y, blocks_x, WIN * WIN, channels] float32, as `window_kernel` leaves them
    sums,  # [batch, BLOCK * blocks_y, BLOCK * blocks_x, channels], contiguous
    blocks_y,
    blocks_x,
    channels,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    N: tl.constexpr,
):
    """Sum over the windows that hold a token: one program per part of a row of the map."""
    WIN: tl.constexpr = BLOCK + 2 * HALO
    REACH: tl.constexpr = (HALO + BLOCK - 1) // BLOCK  # blocks from a token to the furthest that sees it
    size = BLOCK * blocks_x * channels
    parts = tl.cdiv(size, N)
    part, row = tl.program_id(0) % parts, tl.program_id(0) // parts
    y, batch = row % (BLOCK * blocks_y), (row // (BLOCK * blocks_y)).to(tl.int64)
    place = part * N + tl.arange(0, N)
    x, channel = place // channels, place % channels
    acc = tl.zeros([N], dtype=tl.float32)
    for near_y in range(-REACH, REACH + 1):
        block_y = y // BLOCK + near_y
        in_y = y - block_y * BLOCK + HALO
        if (block_y >= 0) & (block_y < blocks_y) & (in_y >= 0) & (in_y < WIN):
            for near_x in range(-REACH, REACH + 1):
                block_x = x // BLOCK + near_x
                in_x = x - block_x * BLOCK + HALO
                inside = (block_x >= 0) & (block_x < blocks_x) & (in_x >= 0) & (in_x < WIN) & (place < size)
                token = ((batch * blocks_y + block_y) * blocks_x + block_x) * (WIN * WIN) + in_y * WIN + in_x
                acc += tl.load(windows + token * channels + channel, mask=inside, other=0.0)
    tl.store(sums + row.to(tl.int64) * size + place, acc.to(sums.dtype.element_ty), mask=place < size)
