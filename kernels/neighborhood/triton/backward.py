"""Fused backward pass. Weights are recomputed from the log-sum-exp; no sum is atomic, so runs repeat bit by bit.

Three kernels: the gradient of the queries (query tiles, as in the forward pass), of keys and values (key tiles against
the queries that see them), and of the extra tokens. That of the bias is in `bias`.
"""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import (
    LOG2E,
    UNROLLED,
    add_product,
    block_members,
    class_base,
    exponential,
    keys_of_tile,
    load,
    load_shift,
    mask_and_bias,
    member_offset,
    member_offsets,
    norm_of,
    products,
    queries_of_tile,
    recomputed_weights,
    sees_all,
    store,
    store_shift,
    strides_of,
    tile_bias,
    tile_of_program,
)


@triton.jit
def query_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,
    bias_layout,
    extra_key,
    ek_strides,
    extra_value,
    ev_strides,
    out,  # contiguous, as are the gradients
    lse,
    d_out,
    do_strides,
    d_lse,
    shift,  # [batch, height, width, heads], see `store_shift`, of sum(weights * d_weights) - d_lse
    d_query,
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
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
    batch, head, residue_y, residue_x, members_y, members_x, tile_y, tile_x = tile_of_program(
        tl.program_id(0), height, width, heads, dilation_y, dilation_x, TILE_Y, TILE_X
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if (first_y >= members_y) | (first_x >= members_x):
        return

    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    qy, qx = first_y + m // TILE_X, first_x + m % TILE_X
    q_inside = (qy < members_y) & (qx < members_x)
    qy, qx = tl.minimum(qy, members_y - 1), tl.minimum(qx, members_x - 1)  # keeps bias offsets in the table
    q_base = class_base(query, q_strides, batch, head, residue_y, residue_x)
    o_strides, r_strides = strides_of(height, width, heads, dim), strides_of(height, width, heads, 1)
    o_base = class_base(out, o_strides, batch, head, residue_y, residue_x)
    do_base = class_base(d_out, do_strides, batch, head, residue_y, residue_x)
    q = load(q_base + member_offsets(q_strides, qy, qx, d, dilation_y, dilation_x), q_inside, d, dim, EVEN_D)
    o = load(o_base + member_offsets(o_strides, qy, qx, d, dilation_y, dilation_x), q_inside, d, dim, EVEN_D)
    do = load(do_base + member_offsets(do_strides, qy, qx, d, dilation_y, dilation_x), q_inside, d, dim, EVEN_D)
    rows = class_base(0, r_strides, batch, head, residue_y, residue_x)
    rows += member_offset(r_strides, qy, qx, dilation_y, dilation_x)
    q_lse = tl.load(lse + rows, mask=q_inside, other=0.0) * UNIT

    start_y, end_y, low_y, high_y, full_low_y, full_high_y = keys_of_tile(
        qy, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y
    )
    start_x, end_x, low_x, high_x, full_low_x, full_high_x = keys_of_tile(
        qx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X
    )
    k_base = class_base(key, k_strides, batch, head, residue_y, residue_x)
    v_base = class_base(value, v_strides, batch, head, residue_y, residue_x)
    if BIAS > 0:
        bias = tile_bias(
            bias, bias_layout, head, heads, tile_y, tile_x, members_y, members_x,
            KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, N, PLAIN, False, BIAS,
        )  # fmt: skip

    k_offsets = member_offsets(k_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    v_offsets = member_offsets(v_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    dq = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    blocks_x = tl.cdiv(high_x - low_x, BLOCK_X)
    row_of_blocks = bias_layout[6] if BIAS == UNROLLED else blocks_x
    # sum(out * d_out) is sum(weights * d_weights) but for rounding, which counts in float32 where few keys are seen.
    SWEEPS: tl.constexpr = 2 if EXACT else 1
    q_shift = tl.zeros([M], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    q_norm = 1.0
    if SWEEPS == 1:
        q_shift += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    for sweep in tl.static_range(SWEEPS):
        if sweep + 1 == SWEEPS:
            if EXACT:
                q_norm = norm_of(total)
                q_shift *= q_norm
            if d_lse is not None:
                q_shift -= tl.load(d_lse + rows, mask=q_inside, other=0.0)
            store_shift(shift, rows, q_shift, q_norm, q_inside, EXACT)
        for block in range(tl.cdiv(high_y - low_y, BLOCK_Y) * blocks_x):
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
            if not EXACT:
                logits -= q_lse[:, None]
            logits = mask_and_bias(
                logits, bias, row * row_of_blocks + col, m, n, qy, qx, ky, kx,
                start_y, end_y, start_x, end_x, low_y, low_x, full, None,
                KERNEL_Y, KERNEL_X, M, N, False, RADIUS, BIAS, BITS, EXACT,
            )  # fmt: skip
            weights = recomputed_weights(logits, q_lse[:, None], EXACT)
            d_weights = products(do, v, EXACT, PRECISION)
            if sweep + 1 < SWEEPS:
                q_shift += tl.sum(weights * d_weights, 1)
                total += tl.sum(weights, 1)
            else:
                if EXACT:
                    weights *= q_norm[:, None]
                d_logits = weights * (d_weights - q_shift[:, None])
                dq = add_product(dq, d_logits.to(k.dtype), k, EXACT, PRECISION)

        if extra_key is not None:
            ek_base = class_base(extra_key, ek_strides, batch, head, 0, 0)
            ev_base = class_base(extra_value, ev_strides, batch, head, 0, 0)
            for first in range(0, extra, BLOCK_E):
                token = first + tl.arange(0, BLOCK_E)
                k = load(ek_base + member_offsets(ek_strides, token, token * 0, d, 1, 1), token < extra, d, dim, EVEN_D)
                v = load(ev_base + member_offsets(ev_strides, token, token * 0, d, 1, 1), token < extra, d, dim, EVEN_D)
                logits = products(q, k, EXACT, PRECISION) * (scale * UNIT) - q_lse[:, None]
                weights = exponential(tl.where((token < extra)[None, :], logits, float("-inf")), EXACT)
                d_weights = products(do, v, EXACT, PRECISION)
                if sweep + 1 < SWEEPS:
                    q_shift += tl.sum(weights * d_weights, 1)
                    total += tl.sum(weights, 1)
                else:
                    if EXACT:
                        weights *= q_norm[:, None]
                    d_logits = weights * (d_weights - q_shift[:, None])
                    dq = add_product(dq, d_logits.to(k.dtype), k, EXACT, PRECISION)

    d_strides = strides_of(height, width, heads, dim, PACKED)
    dq_base = class_base(d_query, d_strides, batch, head, residue_y, residue_x)
    dq_pointers = dq_base + member_offsets(d_strides, qy, qx, d, dilation_y, dilation_x)
    store(dq_pointers, dq * scale, q_inside, d, dim, EVEN_D)


@triton.jit
def key_value_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,
    bias_layout,
    lse,
    d_out,
    do_strides,
    shift,
    d_key,
    d_value,
    height,
    width,
    heads,
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
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Here the tile holds keys (M) and the blocks queries (N); logits are [M, N], the transpose of the forward's."""
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
    batch, head, residue_y, residue_x, members_y, members_x, tile_y, tile_x = tile_of_program(
        tl.program_id(0), height, width, heads, dilation_y, dilation_x, TILE_Y, TILE_X
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if (first_y >= members_y) | (first_x >= members_x):
        return

    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    ky, kx = first_y + m // TILE_X, first_x + m % TILE_X
    k_inside = (ky < members_y) & (kx < members_x)
    ky, kx = tl.minimum(ky, members_y - 1), tl.minimum(kx, members_x - 1)
    k_base = class_base(key, k_strides, batch, head, residue_y, residue_x)
    v_base = class_base(value, v_strides, batch, head, residue_y, residue_x)
    k = load(k_base + member_offsets(k_strides, ky, kx, d, dilation_y, dilation_x), k_inside, d, dim, EVEN_D)
    v = load(v_base + member_offsets(v_strides, ky, kx, d, dilation_y, dilation_x), k_inside, d, dim, EVEN_D)

    start_y, end_y, low_y, high_y, full_low_y, full_high_y = queries_of_tile(
        ky, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y
    )
    start_x, end_x, low_x, high_x, full_low_x, full_high_x = queries_of_tile(
        kx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X
    )
    q_base = class_base(query, q_strides, batch, head, residue_y, residue_x)
    do_base = class_base(d_out, do_strides, batch, head, residue_y, residue_x)
    if BIAS > 0:
        bias = tile_bias(
            bias, bias_layout, head, heads, tile_y, tile_x, members_y, members_x,
            KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, N, PLAIN, True, BIAS,
        )  # fmt: skip

    q_offsets = member_offsets(q_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    do_offsets = member_offsets(do_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    r_strides = strides_of(height, width, heads, 1)
    r_base = class_base(0, r_strides, batch, head, residue_y, residue_x)
    r_offsets = member_offset(r_strides, n // BLOCK_X, n % BLOCK_X, dilation_y, dilation_x)
    dk = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    blocks_x = tl.cdiv(high_x - low_x, BLOCK_X)
    row_of_blocks = bias_layout[6] if BIAS == UNROLLED else blocks_x
    for block in range(tl.cdiv(high_y - low_y, BLOCK_Y) * blocks_x):
        row, col = block // blocks_x, block % blocks_x
        block_y, block_x = low_y + row * BLOCK_Y, low_x + col * BLOCK_X
        qy, qx, q_inside = block_members(block_y, block_x, high_y, high_x, n, BLOCK_X, RADIUS)
        q_block = q_base + member_offset(q_strides, block_y, block_x, dilation_y, dilation_x)
        do_block = do_base + member_offset(do_strides, block_y, block_x, dilation_y, dilation_x)
        q = load(q_block + q_offsets, q_inside, d, dim, EVEN_D)
        do = load(do_block + do_offsets, q_inside, d, dim, EVEN_D)
        rows = r_base + member_offset(r_strides, block_y, block_x, dilation_y, dilation_x) + r_offsets
        q_lse = tl.load(lse + rows, mask=q_inside, other=float("inf")) * UNIT  # no weight outside
        q_shift, q_norm = load_shift(shift, rows, q_inside, EXACT)
        full = sees_all(
            block_y, block_x, first_y, first_x, full_low_y, full_high_y, full_low_x, full_high_x,
            TILE_Y, TILE_X, BLOCK_Y, BLOCK_X, RADIUS,
        )  # fmt: skip
        logits = products(k, q, EXACT, PRECISION) * (scale * UNIT)
        if not EXACT:
            logits -= q_lse[None, :]
        logits = mask_and_bias(
            logits, bias, row * row_of_blocks + col, m, n, ky, kx, qy, qx,
            start_y, end_y, start_x, end_x, low_y, low_x, full, None,
            KERNEL_Y, KERNEL_X, M, N, True, RADIUS, BIAS, BITS, EXACT,
        )  # fmt: skip
        weights = recomputed_weights(logits, q_lse[None, :], EXACT)
        if EXACT:
            weights *= q_norm[None, :]
        dv = add_product(dv, weights.to(do.dtype), do, EXACT, PRECISION)
        d_weights = products(v, do, EXACT, PRECISION)
        d_logits = weights * (d_weights - q_shift[None, :])
        dk = add_product(dk, d_logits.to(q.dtype), q, EXACT, PRECISION)

    d_strides = strides_of(height, width, heads, dim, PACKED)
    dk_base = class_base(d_key, d_strides, batch, head, residue_y, residue_x)
    dv_base = class_base(d_value, d_strides, batch, head, residue_y, residue_x)
    dk_pointers = dk_base + member_offsets(d_strides, ky, kx, d, dilation_y, dilation_x)
    dv_pointers = dv_base + member_offsets(d_strides, ky, kx, d, dilation_y, dilation_x)
    store(dk_pointers, dk * scale, k_inside, d, dim, EVEN_D)
    store(dv_pointers, dv, k_inside, d, dim, EVEN_D)


@triton.jit
def extra_kernel(
    query,
    q_strides,
    extra_key,
    ek_strides,
    extra_value,
    ev_strides,
    lse,
    d_out,
    do_strides,
    shift,
    d_extra_key,  # [parts, batch, extra, heads, dim] float32, contiguous; the caller sums the parts
    d_extra_value,
    batches,
    tokens,
    width,
    heads,
    extra,
    part_tokens,
    scale,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    blocks = tl.cdiv(extra, BLOCK_E)
    block = pid % blocks
    pid = pid // blocks
    batch = (pid % batches).to(tl.int64)
    part = (pid // batches).to(tl.int64)

    token = block * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = token < extra
    ek_base = class_base(extra_key, ek_strides, batch, head, 0, 0)
    ev_base = class_base(extra_value, ev_strides, batch, head, 0, 0)
    k = load(ek_base + member_offsets(ek_strides, token, token * 0, d, 1, 1), inside, d, dim, EVEN_D)
    v = load(ev_base + member_offsets(ev_strides, token, token * 0, d, 1, 1), inside, d, dim, EVEN_D)
    q_base = class_base(query, q_strides, batch, head, 0, 0)
    do_base = class_base(d_out, do_strides, batch, head, 0, 0)

    dk = tl.zeros([BLOCK_E, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_E, BLOCK_D], dtype=tl.float32)
    stop = tl.minimum(part * part_tokens + part_tokens, tokens)
    for first in range(part * part_tokens, stop, BLOCK_N):
        place = first + n
        q_inside = place < stop
        q = load(q_base + member_offsets(q_strides, place // width, place % width, d, 1, 1), q_inside, d, dim, EVEN_D)
        do = load(
            do_base + member_offsets(do_strides, place // width, place % width, d, 1, 1), q_inside, d, dim, EVEN_D
        )
        rows = (batch * tokens + place) * heads + head
        q_lse = tl.load(lse + rows, mask=q_inside, other=float("inf")) * UNIT
        q_shift, q_norm = load_shift(shift, rows, q_inside, EXACT)
        logits = products(k, q, EXACT, PRECISION) * (scale * UNIT) - q_lse[None, :]
        weights = exponential(logits, EXACT)
        if EXACT:
            weights *= q_norm[None, :]
        dv = add_product(dv, weights.to(do.dtype), do, EXACT, PRECISION)
        d_weights = products(v, do, EXACT, PRECISION)
        d_logits = weights * (d_weights - q_shift[None, :])
        dk = add_product(dk, d_logits.to(q.dtype), q, EXACT, PRECISION)

    to = ((part * batches + batch) * extra + token) * heads + head
    store(d_extra_key + to[:, None] * dim + d[None, :], dk * scale, inside, d, dim, EVEN_D)
    store(d_extra_value + to[:, None] * dim + d[None, :], dv, inside, d, dim, EVEN_D)
