"""Fused forward pass: one program per query tile, online softmax over blocks of its haloed keys."""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import (
    HELD,
    LOG2E,
    UNROLLED,
    add_product,
    block_members,
    class_base,
    exponential,
    keys_of_tile,
    load,
    logarithm,
    mask_and_bias,
    member_offset,
    member_offsets,
    pair_bias,
    products,
    sees_all,
    store,
    strides_of,
    tile_bias,
    tile_of_program,
    visibility,
)


@triton.jit
def accumulate(logits, value, acc, top, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Fold one block of logits [M, N] and its values [N, D] into the running softmax."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = exponential(logits - new_top[:, None], EXACT)
    shrink = exponential(top - new_top, EXACT)
    acc = add_product(acc * shrink[:, None], weights.to(value.dtype), value, EXACT, PRECISION)
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
    out,  # contiguous
    lse,  # [batch, height, width, heads], contiguous
    batches,
    height,
    width,
    heads,
    extra,
    dilation_y,
    dilation_x,
    scale,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BORDER_Y: tl.constexpr,
    BORDER_X: tl.constexpr,
    RADIUS: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_E: tl.constexpr,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    IMAGES: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program takes the same tile of IMAGES images in turn; of one, unless all keys of a tile are in one block."""
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
    group, head, residue_y, residue_x, members_y, members_x, tile_y, tile_x = tile_of_program(
        tl.program_id(0), height, width, heads, dilation_y, dilation_x, TILE_Y, TILE_X
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if (first_y >= members_y) | (first_x >= members_x):
        return  # classes differ in length by one

    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    qy, qx = first_y + m // TILE_X, first_x + m % TILE_X
    q_inside = (qy < members_y) & (qx < members_x)
    qy, qx = tl.minimum(qy, members_y - 1), tl.minimum(qx, members_x - 1)  # keeps bias offsets in the table
    start_y, end_y, low_y, high_y, full_low_y, full_high_y = keys_of_tile(
        qy, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y
    )
    start_x, end_x, low_x, high_x, full_low_x, full_high_x = keys_of_tile(
        qx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X
    )
    blocks_x = tl.cdiv(high_x - low_x, BLOCK_X)
    row_of_blocks = bias_layout[6] if BIAS == UNROLLED else blocks_x
    pairs = None
    if BIAS == HELD:
        ky, kx, _ = block_members(low_y, low_x, high_y, high_x, n, BLOCK_X, RADIUS)
        visible = visibility(qy, qx, ky, kx, start_y, end_y, start_x, end_x, low_y, low_x, RADIUS, BITS)
        pairs = pair_bias(bias, head, qy, qx, ky, kx, visible, KERNEL_Y, KERNEL_X, False, EXACT)
    elif BIAS > 0:
        bias = tile_bias(
            bias, bias_layout, head, heads, tile_y, tile_x, members_y, members_x,
            KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, N, PLAIN, False, BIAS,
        )  # fmt: skip
    q_offsets = member_offsets(q_strides, qy, qx, d, dilation_y, dilation_x)
    k_offsets = member_offsets(k_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    v_offsets = member_offsets(v_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    o_strides, r_strides = strides_of(height, width, heads, dim), strides_of(height, width, heads, 1)

    for image in range(IMAGES):
        batch = tl.minimum(group * IMAGES + image, batches - 1)  # the last group may repeat its last image
        q_base = class_base(query, q_strides, batch, head, residue_y, residue_x)
        k_base = class_base(key, k_strides, batch, head, residue_y, residue_x)
        v_base = class_base(value, v_strides, batch, head, residue_y, residue_x)
        q = load(q_base + q_offsets, q_inside, d, dim, EVEN_D)
        acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
        # Finite, so that a block of which a query sees nothing leaves no nan.
        top = tl.full([M], -1e30, dtype=tl.float32)
        total = tl.zeros([M], dtype=tl.float32)
        for block in range(1 if IMAGES > 1 else tl.cdiv(high_y - low_y, BLOCK_Y) * blocks_x):
            row, col = block // blocks_x, block % blocks_x
            block_y, block_x = low_y + row * BLOCK_Y, low_x + col * BLOCK_X
            ky, kx, k_inside = block_members(block_y, block_x, high_y, high_x, n, BLOCK_X, RADIUS)
            k_block = k_base + member_offset(k_strides, block_y, block_x, dilation_y, dilation_x)
            v_block = v_base + member_offset(v_strides, block_y, block_x, dilation_y, dilation_x)
            k = load(k_block + k_offsets, k_inside, d, dim, EVEN_D)
            v = load(v_block + v_offsets, k_inside, d, dim, EVEN_D)
            full = sees_all(
                block_y, block_x, first_y, first_x, full_low_y, full_high_y, full_low_x, full_high_x,
                TILE_Y, TILE_X, BLOCK_Y, BLOCK_X, RADIUS,
            )  # fmt: skip
            logits = products(q, k, EXACT, PRECISION) * (scale * UNIT)
            logits = mask_and_bias(
                logits, bias, row * row_of_blocks + col, m, n, qy, qx, ky, kx,
                start_y, end_y, start_x, end_x, low_y, low_x, full, pairs,
                KERNEL_Y, KERNEL_X, M, N, False, RADIUS, BIAS, BITS, EXACT,
            )  # fmt: skip
            acc, top, total = accumulate(logits, v, acc, top, total, EXACT, PRECISION)

        if extra_key is not None:
            ek_base = class_base(extra_key, ek_strides, batch, head, 0, 0)
            ev_base = class_base(extra_value, ev_strides, batch, head, 0, 0)
            for first in range(0, extra, BLOCK_E):
                token = first + tl.arange(0, BLOCK_E)
                k = load(ek_base + member_offsets(ek_strides, token, token * 0, d, 1, 1), token < extra, d, dim, EVEN_D)
                v = load(ev_base + member_offsets(ev_strides, token, token * 0, d, 1, 1), token < extra, d, dim, EVEN_D)
                logits = products(q, k, EXACT, PRECISION) * (scale * UNIT)
                logits = tl.where((token < extra)[None, :], logits, float("-inf"))
                acc, top, total = accumulate(logits, v, acc, top, total, EXACT, PRECISION)

        o_base = class_base(out, o_strides, batch, head, residue_y, residue_x)
        o_pointers = o_base + member_offsets(o_strides, qy, qx, d, dilation_y, dilation_x)
        store(o_pointers, acc / total[:, None], q_inside, d, dim, EVEN_D)
        rows = class_base(lse, r_strides, batch, head, residue_y, residue_x)
        rows += member_offset(r_strides, qy, qx, dilation_y, dilation_x)
        tl.store(rows, logarithm(top, total, EXACT), mask=q_inside)
