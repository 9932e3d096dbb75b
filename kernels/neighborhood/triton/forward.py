"""Fused forward pass: one program per query tile, online softmax over blocks of its haloed keys."""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import (
    LN2,
    LOG2E,
    UNROLLED,
    class_base,
    class_length,
    keys_of_tile,
    load,
    locate,
    mask_and_bias,
    member_offset,
    member_offsets,
    row_strides,
    store,
    tile_bias,
)


@triton.jit
def accumulate(logits, value, acc, top, total, PRECISION: tl.constexpr):
    """Fold one block of base-2 logits [M, N] and its values [N, D] into the running softmax."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def forward_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,
    bias_layout,
    extra_key,  # extra tokens have strides (batch, token, 0, head, dim)
    ek_strides,
    extra_value,
    ev_strides,
    out,
    o_strides,
    lse,  # [batch, height, width, heads], contiguous
    height,
    width,
    heads,
    dim,
    extra,
    tiles_y,
    tiles_x,
    dilation_y,
    dilation_x,
    scale,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    CAUSAL_Y: tl.constexpr,
    CAUSAL_X: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    batch, head, residue_y, residue_x, tile_y, tile_x = locate(
        tl.program_id(0), heads, tiles_y, tiles_x, dilation_y, dilation_x
    )
    members_y = class_length(height, dilation_y, residue_y).to(tl.int32)
    members_x = class_length(width, dilation_x, residue_x).to(tl.int32)
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if (first_y >= members_y) | (first_x >= members_x):
        return  # classes differ in length by one

    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    qy, qx = first_y + m // TILE_X, first_x + m % TILE_X
    q_inside = (qy < members_y) & (qx < members_x)
    qy, qx = tl.minimum(qy, members_y - 1), tl.minimum(qx, members_x - 1)  # keeps bias offsets in the table
    q_base = class_base(query, q_strides, batch, head, residue_y, residue_x)
    q = load(q_base + member_offsets(q_strides, qy, qx, d, dilation_y, dilation_x), q_inside, d, dim, EVEN_D)

    start_y, end_y, low_y, high_y, full_low_y, full_high_y = keys_of_tile(
        qy, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, CAUSAL_Y
    )
    start_x, end_x, low_x, high_x, full_low_x, full_high_x = keys_of_tile(
        qx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, CAUSAL_X
    )
    k_base = class_base(key, k_strides, batch, head, residue_y, residue_x)
    v_base = class_base(value, v_strides, batch, head, residue_y, residue_x)
    bias = tile_bias(
        bias, bias_layout, head, heads, tile_y, tile_x, members_y, members_x,
        KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, N, PLAIN, False, BIAS,
    )  # fmt: skip

    k_offsets = member_offsets(k_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    v_offsets = member_offsets(v_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    # Finite, so that a block of which a query sees nothing leaves no nan.
    top = tl.full([M], -1e30, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    blocks_x = tl.cdiv(high_x - low_x, BLOCK_X)
    row_of_blocks = bias_layout[6] if BIAS == UNROLLED else blocks_x
    for block in range(tl.cdiv(high_y - low_y, BLOCK_Y) * blocks_x):
        row, col = block // blocks_x, block % blocks_x
        block_y, block_x = low_y + row * BLOCK_Y, low_x + col * BLOCK_X
        ky, kx = block_y + n // BLOCK_X, block_x + n % BLOCK_X
        k_inside = (ky < high_y) & (kx < high_x)
        k_block = k_base + member_offset(k_strides, block_y, block_x, dilation_y, dilation_x)
        v_block = v_base + member_offset(v_strides, block_y, block_x, dilation_y, dilation_x)
        k = load(k_block + k_offsets, k_inside, d, dim, EVEN_D)
        v = load(v_block + v_offsets, k_inside, d, dim, EVEN_D)
        full = (block_y >= full_low_y) & (block_y + BLOCK_Y <= full_high_y)
        full = full & (block_x >= full_low_x) & (block_x + BLOCK_X <= full_high_x)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        logits = mask_and_bias(
            logits, bias, row * row_of_blocks + col, m, n, qy, qx, ky, kx,
            start_y, end_y, start_x, end_x, low_y, low_x, full,
            KERNEL_Y, KERNEL_X, M, N, False, BIAS, BITS,
        )  # fmt: skip
        acc, top, total = accumulate(logits, v, acc, top, total, PRECISION)

    if HAS_EXTRA:
        ek_base = class_base(extra_key, ek_strides, batch, head, 0, 0)
        ev_base = class_base(extra_value, ev_strides, batch, head, 0, 0)
        for first in range(0, extra, BLOCK_E):
            token = first + tl.arange(0, BLOCK_E)
            k = load(ek_base + member_offsets(ek_strides, token, token * 0, d, 1, 1), token < extra, d, dim, EVEN_D)
            v = load(ev_base + member_offsets(ev_strides, token, token * 0, d, 1, 1), token < extra, d, dim, EVEN_D)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            logits = tl.where((token < extra)[None, :], logits, float("-inf"))
            acc, top, total = accumulate(logits, v, acc, top, total, PRECISION)

    o_base = class_base(out, o_strides, batch, head, residue_y, residue_x)
    o_pointers = o_base + member_offsets(o_strides, qy, qx, d, dilation_y, dilation_x)
    store(o_pointers, acc / total[:, None], q_inside, d, dim, EVEN_D)
    r_strides = row_strides(height, width, heads)
    r_base = class_base(lse, r_strides, batch, head, residue_y, residue_x)
    rows = r_base + member_offset(r_strides, qy, qx, dilation_y, dilation_x)
    tl.store(rows, top * LN2 + tl.log(total), mask=q_inside)
