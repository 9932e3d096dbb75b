"""The bias table laid out for whole tiles, and the gradient of the table.

Both go by patterns: tiles whose queries see their keys in the same way, relative to the tile, share their bias pair by
pair. A map of any size has few patterns, those of its borders and that of its interior.
"""

import triton
import triton.language as tl

from zoo.kernels.neighborhood.triton.common import (
    LOG2E,
    bias_offsets,
    class_base,
    keys_of_tile,
    load,
    locate,
    member_pointers,
    pattern,
    queries_of_tile,
    token_rows,
    visibility,
)


@triton.jit
def pair_bias(bias, head, my, mx, ny, nx, visible, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, OF_KEYS):
    """[M, N] base-2 bias of the pairs of a tile and a block, -inf where hidden."""
    bias += head * ((2 * KERNEL_Y - 1) * (2 * KERNEL_X - 1))
    if OF_KEYS:
        offsets = tl.trans(bias_offsets(ny, nx, my, mx, KERNEL_Y, KERNEL_X))
    else:
        offsets = bias_offsets(my, mx, ny, nx, KERNEL_Y, KERNEL_X)
    x = tl.load(bias + offsets, mask=visible, other=0.0).to(tl.float32) * LOG2E
    return tl.where(visible, x, float("-inf"))


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
    CAUSAL_Y: tl.constexpr,
    CAUSAL_X: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    OF_KEYS: tl.constexpr,
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
        start_y, end_y, low_y, _, _, _ = queries_of_tile(my, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, CAUSAL_Y)
        start_x, end_x, low_x, _, _, _ = queries_of_tile(mx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, CAUSAL_X)
    else:
        start_y, end_y, low_y, _, _, _ = keys_of_tile(my, first_y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, CAUSAL_Y)
        start_x, end_x, low_x, _, _, _ = keys_of_tile(mx, first_x, members_x, TILE_X, KERNEL_X, STRIDE_X, CAUSAL_X)
    row = (kind_y * patterns_y + pattern_y).to(tl.int64) * (kinds_x * patterns_x) + kind_x * patterns_x + pattern_x
    to = unrolled + (row * heads + head) * (blocks_y * blocks_x) * (M * N)
    for block in range(blocks_y * blocks_x):
        ny = low_y + block // blocks_x * BLOCK_Y + n // BLOCK_X
        nx = low_x + block % blocks_x * BLOCK_X + n % BLOCK_X
        visible = visibility(ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, False)
        x = pair_bias(bias, head, my, mx, ny, nx, visible, KERNEL_Y, KERNEL_X, OF_KEYS)
        tl.store(to + block * (M * N) + m[:, None] * N + n[None, :], x)


@triton.jit
def tiles_of_pattern(number, tiles, members, KERNEL: tl.constexpr, TILE: tl.constexpr, PLAIN: tl.constexpr):
    """First tile with a pattern, and how many have it; they are next to each other."""
    first, count = 0, 0
    for tile in range(tiles):
        same = (pattern(tile, members, KERNEL, TILE, PLAIN, False) == number) & (tile * TILE < members)
        first = tl.where(same & (count == 0), tile, first)
        count += same.to(tl.int32)
    return first, count


@triton.jit
def classes_of_kind(kind, length, dilation):
    """First residue, and how many, of the classes of the most members (kind 0), or of one fewer (kind 1)."""
    longest = (length + dilation - 1) % dilation + 1
    return tl.where(kind == 0, 0, longest), tl.where(kind == 0, longest, dilation - longest)


@triton.jit
def gradient_kernel(
    query,
    q_strides,
    key,
    k_strides,
    value,
    v_strides,
    bias,
    lse,
    d_out,
    do_strides,
    shift,
    d_unrolled,  # [parts, kinds_y, patterns_y, kinds_x, patterns_x, some heads, blocks_y, blocks_x, M, N] float32
    layout,
    batches,
    height,
    width,
    heads,
    dim,
    tiles_y,
    tiles_x,
    dilation_y,
    dilation_x,
    first_head,
    some_heads,
    rows,  # kinds_y * patterns_y * kinds_x * patterns_x
    parts,
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
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum d_logits over a part of the tiles of one pattern, for one block of its keys."""
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    most_y, most_x, patterns_y, patterns_x, kinds_x, blocks_y, blocks_x = layout
    pid = tl.program_id(0)
    head = (first_head + pid % some_heads).to(tl.int64)
    pid = pid // some_heads
    block = pid % (blocks_y * blocks_x)
    pid = pid // (blocks_y * blocks_x)
    row = pid % rows
    part = pid // rows
    kind_y, pattern_y = row // (kinds_x * patterns_x) // patterns_y, row // (kinds_x * patterns_x) % patterns_y
    kind_x, pattern_x = row % (kinds_x * patterns_x) // patterns_x, row % patterns_x
    members_y, members_x = most_y - kind_y, most_x - kind_x
    from_y, rows_y = tiles_of_pattern(pattern_y, tiles_y, members_y, KERNEL_Y, TILE_Y, PLAIN)
    from_x, rows_x = tiles_of_pattern(pattern_x, tiles_x, members_x, KERNEL_X, TILE_X, PLAIN)
    from_class_y, classes_y = classes_of_kind(kind_y, height, dilation_y)
    from_class_x, classes_x = classes_of_kind(kind_x, width, dilation_x)

    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    # All of this is the same, relative to the tile, for every tile of the pattern.
    qy, qx = from_y * TILE_Y + m // TILE_X, from_x * TILE_X + m % TILE_X
    q_inside = (qy < members_y) & (qx < members_x)
    start_y, end_y, low_y, high_y, _, _ = keys_of_tile(
        qy, from_y * TILE_Y, members_y, TILE_Y, KERNEL_Y, STRIDE_Y, CAUSAL_Y
    )
    start_x, end_x, low_x, high_x, _, _ = keys_of_tile(
        qx, from_x * TILE_X, members_x, TILE_X, KERNEL_X, STRIDE_X, CAUSAL_X
    )
    ky = low_y + block // blocks_x * BLOCK_Y + n // BLOCK_X
    kx = low_x + block % blocks_x * BLOCK_X + n % BLOCK_X
    k_inside = (ky < high_y) & (kx < high_x)
    visible = visibility(ky, kx, start_y, end_y, start_x, end_x, low_y, low_x, False) & q_inside[:, None]
    pairs = pair_bias(bias, head, qy, qx, ky, kx, visible, KERNEL_Y, KERNEL_X, False)

    acc = tl.zeros([M, N], dtype=tl.float32)
    for item in range(part, batches * classes_y * classes_x * rows_y * rows_x, parts):
        batch, only, class_y, class_x, tile_y, tile_x = locate(item, 1, rows_y, rows_x, classes_y, classes_x)
        residue_y, residue_x = from_class_y + class_y, from_class_x + class_x
        down, right = tile_y * TILE_Y, tile_x * TILE_X
        q_base = class_base(query, q_strides, batch, head, residue_y, residue_x)
        k_base = class_base(key, k_strides, batch, head, residue_y, residue_x)
        v_base = class_base(value, v_strides, batch, head, residue_y, residue_x)
        do_base = class_base(d_out, do_strides, batch, head, residue_y, residue_x)
        y, x = qy + down, qx + right
        q = load(member_pointers(q_base, q_strides, y, x, d, dilation_y, dilation_x), q_inside, d, dim, EVEN_D)
        do = load(member_pointers(do_base, do_strides, y, x, d, dilation_y, dilation_x), q_inside, d, dim, EVEN_D)
        at = token_rows(batch, head, residue_y, residue_x, y, x, height, width, heads, dilation_y, dilation_x)
        q_lse = tl.load(lse + at, mask=q_inside, other=0.0) * LOG2E
        q_shift = tl.load(shift + at, mask=q_inside, other=0.0)
        y, x = ky + down, kx + right
        k = load(member_pointers(k_base, k_strides, y, x, d, dilation_y, dilation_x), k_inside, d, dim, EVEN_D)
        v = load(member_pointers(v_base, v_strides, y, x, d, dilation_y, dilation_x), k_inside, d, dim, EVEN_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + pairs
        weights = tl.exp2(logits - q_lse[:, None])
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        acc += weights * (d_weights - q_shift[:, None])

    place = ((part.to(tl.int64) * rows + row) * some_heads + head - first_head) * (blocks_y * blocks_x) + block
    tl.store(d_unrolled + place * (M * N) + m[:, None] * N + n[None, :], acc)


@triton.jit
def fold_kernel(
    d_unrolled,  # as `gradient_kernel` leaves it
    sums,  # [some heads, rows, TILE_Y, 2 * KERNEL_Y - 1, 2 * KERNEL_X - 1] float32
    layout,
    tiles_y,
    tiles_x,
    some_heads,
    rows,
    parts,
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
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sum the pairs of one pattern and one row of queries that have the same offset; the caller sums the rest."""
    M: tl.constexpr = TILE_Y * TILE_X
    N: tl.constexpr = BLOCK_Y * BLOCK_X
    most_y, most_x, patterns_y, patterns_x, kinds_x, blocks_y, blocks_x = layout
    pid = tl.program_id(0)
    offset_y = pid % (2 * KERNEL_Y - 1)
    query_y = pid // (2 * KERNEL_Y - 1) % TILE_Y
    row = pid // (2 * KERNEL_Y - 1) // TILE_Y % rows
    head = pid // (2 * KERNEL_Y - 1) // TILE_Y // rows
    kind_y, pattern_y = row // (kinds_x * patterns_x) // patterns_y, row // (kinds_x * patterns_x) % patterns_y
    kind_x, pattern_x = row % (kinds_x * patterns_x) // patterns_x, row % patterns_x
    tile_y, _ = tiles_of_pattern(pattern_y, tiles_y, most_y - kind_y, KERNEL_Y, TILE_Y, PLAIN)
    tile_x, _ = tiles_of_pattern(pattern_x, tiles_x, most_x - kind_x, KERNEL_X, TILE_X, PLAIN)
    first_y, first_x = tile_y * TILE_Y, tile_x * TILE_X
    _, _, low_y, _, _, _ = keys_of_tile(first_y, first_y, most_y - kind_y, TILE_Y, KERNEL_Y, STRIDE_Y, CAUSAL_Y)
    _, _, low_x, _, _, _ = keys_of_tile(first_x, first_x, most_x - kind_x, TILE_X, KERNEL_X, STRIDE_X, CAUSAL_X)

    p, o = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_O)
    # Where the key with this offset lies among the keys of the tile.
    place_y = first_y + query_y + offset_y - (KERNEL_Y - 1) - low_y + 0 * o
    reached = (place_y >= 0) & (place_y < blocks_y * BLOCK_Y) & (o < 2 * KERNEL_X - 1)
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    for query_x in range(TILE_X):
        place_x = first_x + query_x + o - (KERNEL_X - 1) - low_x
        inside = reached & (place_x >= 0) & (place_x < blocks_x * BLOCK_X)
        block = place_y // BLOCK_Y * blocks_x + place_x // BLOCK_X
        pair = (block * M + query_y * TILE_X + query_x) * N + place_y % BLOCK_Y * BLOCK_X + place_x % BLOCK_X
        for first in range(0, parts, BLOCK_P):
            part = (first + p).to(tl.int64)
            at = ((part * rows + row) * some_heads + head) * (blocks_y * blocks_x * M * N)
            acc += tl.load(
                d_unrolled + at[:, None] + pair[None, :], mask=(part < parts)[:, None] & inside[None, :], other=0.0
            )
    tl.store(sums + pid.to(tl.int64) * (2 * KERNEL_X - 1) + o, tl.sum(acc, 0), mask=o < 2 * KERNEL_X - 1)
