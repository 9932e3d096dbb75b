"""The bias table laid out for whole tiles, and the gradient of the table, alone or with the others on the way.

Both go by patterns: tiles whose queries see their keys in the same way, relative to the tile, share their bias pair by
pair. A map of any size has few patterns, those of its borders and that of its interior.
"""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import (
    LOG2E,
    add_product,
    block_members,
    classes_of_kind,
    keys_of_tile,
    load,
    load_shift,
    locate,
    member_offset,
    member_offsets,
    norm_of,
    pair_bias,
    pattern,
    products,
    queries_of_tile,
    recomputed_weights,
    store,
    store_shift,
    strides_of,
    tiles_like,
    token_base,
    visibility,
)


@triton.jit
def unroll_kernel(
    bias,  # [heads, 2 * KERNEL_Y - 1, 2 * KERNEL_X - 1], contiguous
    unrolled,  # [kinds_y, patterns_y, kinds_x, patterns_x, heads, blocks_y, blocks_x, M, N] float32
    layout,  # see `tile_bias`
    heads,
    tiles_y,
    tiles_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BORDER_Y: tl.constexpr,
    BORDER_X: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    OF_KEYS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Lay out the bias of every pattern: one program per tile of either kind of class."""
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    most_y, most_x, patterns_y, patterns_x, kinds_x, blocks_y, blocks_x = layout
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    kind_x = pid % kinds_x
    pid = pid // kinds_x
    tile_y = pid % tiles_y
    kind_y = pid // tiles_y
    members_y, members_x = most_y - kind_y, most_x - kind_x
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    if (first_y >= members_y) | (first_x >= members_x):
        return
    pattern_y = pattern(tile_y, members_y, KERNEL_Y, TILE_Y, PLAIN, OF_KEYS)
    pattern_x = pattern(tile_x, members_x, KERNEL_X, TILE_X, PLAIN, OF_KEYS)
    # The first tile of a pattern speaks for the others.
    again_y = (tile_y > 0) & (pattern(tile_y - 1, members_y, KERNEL_Y, TILE_Y, PLAIN, OF_KEYS) == pattern_y)
    again_x = (tile_x > 0) & (pattern(tile_x - 1, members_x, KERNEL_X, TILE_X, PLAIN, OF_KEYS) == pattern_x)
    if again_y | again_x:
        return

    m, n = tl.arange(0, M), tl.arange(0, N)
    my = tl.minimum(first_y + m // TILE_X, members_y - 1)
    mx = tl.minimum(first_x + m % TILE_X, members_x - 1)
    if OF_KEYS:
        start_y, end_y, low_y, _, _, _ = queries_of_tile(my, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y)
        start_x, end_x, low_x, _, _, _ = queries_of_tile(mx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X)
    else:
        start_y, end_y, low_y, _, _, _ = keys_of_tile(my, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y)
        start_x, end_x, low_x, _, _, _ = keys_of_tile(mx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X)
    row = (kind_y * patterns_y + pattern_y).to(tl.int64) * (kinds_x * patterns_x) + kind_x * patterns_x + pattern_x
    to = unrolled + (row * heads + head) * (blocks_y * blocks_x) * (M * N)
    for block in range(blocks_y * blocks_x):
        ny = low_y + block // blocks_x * BLOCK_Y + n // BLOCK_X
        nx = low_x + block % blocks_x * BLOCK_X + n % BLOCK_X
        visible = visibility(my, mx, ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, 0, False)
        x = pair_bias(bias, head, my, mx, ny, nx, visible, KERNEL_Y, KERNEL_X, OF_KEYS, EXACT)
        tl.store(to + block * (M * N) + m[:, None] * N + n[None, :], x)


@triton.jit
def tiles_of_row(
    row,
    layout,
    height,
    width,
    dilation_y,
    dilation_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The tiles that share row `row` of unrolled bias: a pattern in one kind of class, per axis.

    Returns, for y and then for x: members of the classes, first class, number of classes, first tile, number of tiles.
    """
    most_y, most_x, patterns_y, patterns_x, kinds_x, blocks_y, blocks_x = layout
    row_y, row_x = row // (kinds_x * patterns_x), row % (kinds_x * patterns_x)
    members_y, members_x = most_y - row_y // patterns_y, most_x - row_x // patterns_x
    class_y, classes_y = classes_of_kind(row_y // patterns_y, height, dilation_y)
    class_x, classes_x = classes_of_kind(row_x // patterns_x, width, dilation_x)
    tile_y, tiles_y = tiles_like(row_y % patterns_y, members_y, KERNEL_Y, TILE_Y, PLAIN)
    tile_x, tiles_x = tiles_like(row_x % patterns_x, members_x, KERNEL_X, TILE_X, PLAIN)
    return members_y, class_y, classes_y, tile_y, tiles_y, members_x, class_x, classes_x, tile_x, tiles_x


@triton.jit
def gradient_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,
    unrolled,  # where BLOCKS > 1, see `unroll_kernel`
    out,
    lse,
    d_out,
    do_strides,
    d_lse,
    shift,  # [batch, height, width, heads], see `store_shift`: read, or written where QUERY
    d_query,  # see `strides_of`, as are the next two
    d_key,
    d_value,
    d_unrolled,  # [parts, some heads, blocks_y, blocks_x, M, N] float32
    starts,  # [rows] int32: the first part of each row, written for `fold_kernel`
    layout,
    batches,
    height,
    width,
    heads,
    dilation_y,
    dilation_x,
    first_head,
    some_heads,
    rows,  # kinds_y * patterns_y * kinds_x * patterns_x
    part_tiles,  # a part is so many tiles of one row, at most
    scale,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BORDER_Y: tl.constexpr,
    BORDER_X: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    RADIUS: tl.constexpr,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERY: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum d_logits over the tiles of a part: for one block of their keys, or for all of them.

    A program that goes through all BLOCKS of a tile makes the gradient of its queries on the way (QUERY); where the
    tile holds its whole class, also those of keys and values (KEY_VALUE).
    """
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
    blocks_y, blocks_x = layout[5], layout[6]
    pid = tl.program_id(0)
    head = (first_head + pid % some_heads).to(tl.int64)
    pid = pid // some_heads
    first_block = 0
    part = pid
    if not QUERY:
        first_block = pid % (blocks_y * blocks_x)
        part = pid // (blocks_y * blocks_x)
    row, start, total = 0, 0, 0
    for r in range(rows):
        _, _, classes_y, _, tiles_y, _, _, classes_x, _, tiles_x = tiles_of_row(
            r, layout, height, width, dilation_y, dilation_x, KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, PLAIN
        )
        total += tl.maximum(tl.cdiv(batches * classes_y * classes_x * tiles_y * tiles_x, part_tiles), 1)
        row += (part >= total).to(tl.int32)
        start = tl.where(part >= total, total, start)
    members_y, from_class_y, classes_y, from_y, tiles_y, members_x, from_class_x, classes_x, from_x, tiles_x = (
        tiles_of_row(row, layout, height, width, dilation_y, dilation_x, KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, PLAIN)
    )
    tl.store(starts + row, start)  # every part of the row stores the same

    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    # All of this is the same, relative to the tile, for every tile of the row.
    first_y, first_x = from_y * TILE_Y, from_x * TILE_X
    qy, qx = first_y + m // TILE_X, first_x + m % TILE_X
    q_inside = (qy < members_y) & (qx < members_x)
    start_y, end_y, low_y, high_y, _, _ = keys_of_tile(qy, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y)
    start_x, end_x, low_x, high_x, _, _ = keys_of_tile(qx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X)
    held = None
    if BLOCKS == 1:
        ky, kx, k_inside = block_members(
            low_y + first_block // blocks_x * BLOCK_Y, low_x + first_block % blocks_x * BLOCK_X, high_y, high_x,
            n, BLOCK_X, RADIUS,
        )  # fmt: skip
        visible = visibility(qy, qx, ky, kx, start_y, end_y, start_x, end_x, low_y, low_x, RADIUS, False)
        visible = visible & q_inside[:, None]
        if bias is not None:
            held = pair_bias(bias, head, qy, qx, ky, kx, visible, KERNEL_Y, KERNEL_X, False, EXACT)
        else:
            held = tl.where(visible, 0.0, float("-inf"))
    else:
        unrolled += (row.to(tl.int64) * heads + head) * (BLOCKS * M * N)
    q_offsets = member_offsets(q_strides, qy, qx, d, dilation_y, dilation_x)
    k_offsets = member_offsets(k_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    v_offsets = member_offsets(v_strides, n // BLOCK_X, n % BLOCK_X, d, dilation_y, dilation_x)
    do_offsets = member_offsets(do_strides, qy, qx, d, dilation_y, dilation_x)
    o_strides, d_strides = strides_of(height, width, heads, dim), strides_of(height, width, heads, dim, PACKED)
    r_strides = strides_of(height, width, heads, 1)
    r_offsets = member_offset(r_strides, qy, qx, dilation_y, dilation_x)
    o_offsets = member_offsets(o_strides, qy, qx, d, dilation_y, dilation_x)
    dq_offsets = member_offsets(d_strides, qy, qx, d, dilation_y, dilation_x)

    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums = sums + (tl.zeros([M, N], dtype=tl.float32),)  # noqa: RUF005  (Triton has no starred tuples)
    first = (part - start) * part_tiles
    stop = tl.minimum(first + part_tiles, batches * classes_y * classes_x * tiles_y * tiles_x)
    for item in range(first, stop):
        batch, only, class_y, class_x, tile_y, tile_x = locate(item, 1, tiles_y, tiles_x, classes_y, classes_x)
        y = (from_class_y + class_y + tile_y * TILE_Y * dilation_y).to(tl.int32)
        x = (from_class_x + class_x + tile_x * TILE_X * dilation_x).to(tl.int32)
        q_tile = token_base(query, q_strides, batch, y, x, head)
        k_tile = token_base(key, k_strides, batch, y, x, head)
        v_tile = token_base(value, v_strides, batch, y, x, head)
        do_tile = token_base(d_out, do_strides, batch, y, x, head)
        at = token_base(0, r_strides, batch, y, x, head) + r_offsets
        q = load(q_tile + q_offsets, q_inside, d, dim, EVEN_D)
        do = load(do_tile + do_offsets, q_inside, d, dim, EVEN_D)
        q_lse = tl.load(lse + at, mask=q_inside, other=0.0) * UNIT
        dq = tl.zeros([M, BLOCK_D], dtype=tl.float32)
        q_shift = tl.zeros([M], dtype=tl.float32)
        q_norm = 1.0
        if not QUERY:
            q_shift, q_norm = load_shift(shift, at, q_inside, EXACT)
        elif BLOCKS > 1:
            o = load(token_base(out, o_strides, batch, y, x, head) + o_offsets, q_inside, d, dim, EVEN_D)
            q_shift += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if QUERY:
            if d_lse is not None:
                q_shift -= tl.load(d_lse + at, mask=q_inside, other=0.0)
        added = ()
        for i in tl.static_range(BLOCKS):
            number = first_block + i
            block_y, block_x = low_y + number // blocks_x * BLOCK_Y, low_x + number % blocks_x * BLOCK_X
            ky, kx, k_inside = block_members(block_y, block_x, high_y, high_x, n, BLOCK_X, RADIUS)
            k_block = k_tile + member_offset(k_strides, block_y, block_x, dilation_y, dilation_x)
            v_block = v_tile + member_offset(v_strides, block_y, block_x, dilation_y, dilation_x)
            k = load(k_block + k_offsets, k_inside, d, dim, EVEN_D)
            v = load(v_block + v_offsets, k_inside, d, dim, EVEN_D)
            pairs = held if BLOCKS == 1 else tl.load(unrolled + i * (M * N) + m[:, None] * N + n[None, :])
            logits = products(q, k, EXACT, PRECISION) * (scale * UNIT)
            if not EXACT:
                logits -= q_lse[:, None]
            logits = tl.where(pairs == float("-inf"), pairs, logits + pairs)
            weights = recomputed_weights(logits, q_lse[:, None], EXACT)
            d_weights = products(do, v, EXACT, PRECISION)
            if EXACT:
                if QUERY:  # only of one block, see `store_shift`
                    q_norm = norm_of(tl.sum(weights, 1))
                weights *= q_norm[:, None]
            if QUERY:
                if BLOCKS == 1:  # rounds less than the sum over out * d_out
                    q_shift += tl.sum(weights * d_weights, 1)
            d_logits = weights * (d_weights - q_shift[:, None])
            added = added + (sums[i] + d_logits,)  # noqa: RUF005
            if QUERY:
                dq = add_product(dq, d_logits.to(k.dtype), k, EXACT, PRECISION)
            if KEY_VALUE:
                dk = tl.dot(tl.trans(d_logits.to(q.dtype)), q, input_precision=PRECISION)
                dk_tile = token_base(d_key, d_strides, batch, y, x, head)
                dk_offsets = member_offsets(d_strides, ky, kx, d, dilation_y, dilation_x)
                store(dk_tile + dk_offsets, dk * scale, k_inside, d, dim, EVEN_D)
                dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
                dv_tile = token_base(d_value, d_strides, batch, y, x, head)
                dv_offsets = member_offsets(d_strides, ky, kx, d, dilation_y, dilation_x)
                store(dv_tile + dv_offsets, dv, k_inside, d, dim, EVEN_D)
        sums = added
        if QUERY:
            if not KEY_VALUE:
                store_shift(shift, at, q_shift, q_norm, q_inside, EXACT)
            dq_tile = token_base(d_query, d_strides, batch, y, x, head)
            store(dq_tile + dq_offsets, dq * scale, q_inside, d, dim, EVEN_D)

    if bias is not None:
        place = (part.to(tl.int64) * some_heads + head - first_head) * (blocks_y * blocks_x) + first_block
        for i in tl.static_range(BLOCKS):
            tl.store(d_unrolled + (place + i) * (M * N) + m[:, None] * N + n[None, :], sums[i])


@triton.jit
def fold_kernel(
    d_unrolled,  # as `gradient_kernel` leaves it
    starts,
    sums,  # [some heads, rows, TILE_Y, 2 * KERNEL_Y - 1, 2 * KERNEL_X - 1], of the dtype to sum in
    layout,
    height,
    width,
    dilation_y,
    dilation_x,
    some_heads,
    rows,
    parts,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BORDER_Y: tl.constexpr,
    BORDER_X: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sum the pairs of one row of patterns and one of queries that have the same offset; the caller sums the rest."""
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    blocks_y, blocks_x = layout[5], layout[6]
    pid = tl.program_id(0)
    offset_y = pid % (2 * KERNEL_Y - 1)
    query_y = pid // (2 * KERNEL_Y - 1) % TILE_Y
    row = pid // (2 * KERNEL_Y - 1) // TILE_Y % rows
    head = pid // (2 * KERNEL_Y - 1) // TILE_Y // rows
    members_y, _, _, tile_y, _, members_x, _, _, tile_x, _ = tiles_of_row(
        row, layout, height, width, dilation_y, dilation_x, KERNEL_Y, KERNEL_X, TILE_Y, TILE_X, PLAIN
    )
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    _, _, low_y, _, _, _ = keys_of_tile(first_y, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, BORDER_Y)
    _, _, low_x, _, _, _ = keys_of_tile(first_x, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, BORDER_X)
    first_part = tl.load(starts + row)
    last_part = tl.load(starts + row + 1, mask=row + 1 < rows, other=parts)

    i, o = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_O)
    # Where the key with this offset lies among the keys of the tile, for every query of the row.
    place_y = first_y + query_y + offset_y - (KERNEL_Y - 1) - low_y
    query_x = i % TILE_X
    place_x = (first_x + query_x)[:, None] + o[None, :] - (KERNEL_X - 1) - low_x
    inside = (place_x >= 0) & (place_x < blocks_x * BLOCK_X) & (o < 2 * KERNEL_X - 1)[None, :]
    inside = inside & (place_y + 0 * place_x >= 0) & (place_y + 0 * place_x < blocks_y * BLOCK_Y)
    block = place_y // BLOCK_Y * blocks_x + place_x // BLOCK_X
    pair = (block * M + query_y * TILE_X + query_x[:, None]) * N + place_y % BLOCK_Y * BLOCK_X + place_x % BLOCK_X
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=sums.dtype.element_ty)
    for first in range(first_part, last_part, BLOCK_P // TILE_X):
        part = first + i // TILE_X
        at = (part.to(tl.int64) * some_heads + head) * (blocks_y * blocks_x * M * N)
        acc += tl.load(d_unrolled + at[:, None] + pair, mask=(part < last_part)[:, None] & inside, other=0.0)
    tl.store(sums + pid.to(tl.int64) * (2 * KERNEL_X - 1) + o, tl.sum(acc, 0), mask=o < 2 * KERNEL_X - 1)
