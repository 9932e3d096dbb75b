"""Fused forward pass: one program per part of a block's queries, online softmax over the keys of its window."""

import triton
import triton.language as tl

from zoo.kernels.halo.triton.common import (
    locate,
    pair_logits,
    relative_logits,
    token_pointers,
    token_rows,
    window_tokens,
)
from zoo.kernels.neighborhood.triton.common import LN2, load, store
from zoo.kernels.neighborhood.triton.forward import accumulate


@triton.jit
def forward_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    rel_height,  # [2 * WIN - 1, dim], contiguous
    rel_width,
    out,
    o_strides,
    lse,  # [batch, SIDE * blocks_y, SIDE * blocks_x, heads], contiguous
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
    rel_y, rel_x = None, None
    if HAS_REL:
        rel_y = relative_logits(q, rel_height, in_y, d, dim, R, W, WIN, EVEN_D, PRECISION)
        rel_x = relative_logits(q, rel_width, in_x, d, dim, R, W, WIN, EVEN_D, PRECISION)

    acc = tl.zeros([M, V], dtype=tl.float32)
    top = tl.full([M], -1e30, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    for first in range(0, WIN * WIN, N):
        n = first + tl.arange(0, N)
        y, x, on_map = window_tokens(n, block_y, block_x, blocks_y * BLOCK, blocks_x * BLOCK, BLOCK, HALO)
        k = load(token_pointers(key, k_strides, batch, head, y, x, d), on_map, d, dim, EVEN_D)
        v = load(token_pointers(value, v_strides, batch, head, y, x, v_d), on_map, v_d, v_dim, EVEN_V)
        logits = pair_logits(q, k, n, rel_y, rel_x, scale, WIN, W, HAS_REL, PRECISION)
        acc, top, total = accumulate(logits, v, acc, top, total, False, PRECISION)

    o_pointers = token_pointers(out, o_strides, batch, head, qy, qx, v_d)
    store(o_pointers, acc / total[:, None], q_inside, v_d, v_dim, EVEN_V)
    rows = token_rows(batch, head, qy, qx, blocks_y * SIDE, blocks_x * SIDE, heads)
    tl.store(lse + rows, top * LN2 + tl.log(total), mask=q_inside)
