"""What the forward and backward kernels share: index arithmetic, addresses, and the logits of one block.

Names in the kernels: M runs over the members of a tile, N over those of a block, D over the head dimension. Tiles
and blocks are rectangles of members of one residue class. Tensors come with their strides (batch, y, x, head, dim); all
address arithmetic is in int64.
"""

from types import FunctionType

import triton
import triton.language as tl

from zoo.kernels.neighborhood import window


@triton.jit
def minimum(a, b):
    """The smaller of two integers or blocks of them."""
    return tl.minimum(a, b)


@triton.jit
def maximum(a, b):
    """The larger of two integers or blocks of them."""
    return tl.maximum(a, b)


def _jit(function):
    """The source that the other backends run on Python integers; Triton's interpreter lacks Python's min and max."""
    names = {**function.__globals__, "tl": tl, "min": minimum, "max": maximum}
    return triton.jit(FunctionType(function.__code__, names, function.__name__))


class_length = _jit(window.class_length)
classes_of_kind = _jit(window.classes_of_kind)
window_start = _jit(window.window_start)
window_end = _jit(window.window_end)
first_query = _jit(window.first_query)
last_query = _jit(window.last_query)
tile_pattern = _jit(window.tile_pattern)
pattern_tiles = _jit(window.pattern_tiles)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Logits come in base 2, for which GPUs have an instruction; EXACT ones, of float32, in base e: the products with a
# rounded constant and the instruction would each add as much error as plain torch makes in all.
@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """2 ** x; if EXACT, e ** x to about a unit in the last place."""
    if EXACT:
        whole = tl.floor(tl.maximum(x, -87.0) * LOG2E + 0.5)
        r = tl.where(x < -87.0, 0.0, x - whole * LN2)  # at most ln(2) / 2, for which eight terms of the series do
        y = ((r * (1 / 5040) + 1 / 720) * r + 1 / 120) * r + 1 / 24
        y = (((y * r + 1 / 6) * r + 1 / 2) * r + 1.0) * r + 1.0
        y *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2 ** whole
        y = tl.where(x < -87.0, 0.0, y)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def recomputed_weights(logits, lse, EXACT: tl.constexpr):
    """Weights of the backward pass, 0 where `logits` are -inf; `lse` was taken from them unless EXACT.

    In float32 it is taken from them last: where the weight is large they are nearly equal, and nothing is rounded.
    """
    if EXACT:
        logits = tl.where(logits == float("-inf"), logits, logits - lse)
    return exponential(logits, EXACT)


@triton.jit
def logarithm(top, total, EXACT: tl.constexpr):
    """Natural logarithm of a sum of which `top` is taken out: that of `total` * 2 ** top or, if EXACT, * e ** top."""
    y = tl.log(total)
    if EXACT:
        y += total * exponential(-y, True) - 1.0 + top
    else:
        y += top * LN2
    return y


# The log-sum-exp is rounded, so weights made of it do not quite sum to 1, which in float32 is most of the gradients'
# error: the first of the backward kernels divides by the sum, and leaves its inverse to the others beside `shift`.
@triton.jit
def norm_of(total):
    """What brings weights to a sum of 1; finite where rounding left no weight, or there is no query."""
    return 1.0 / tl.maximum(total, 1e-30)


@triton.jit
def store_shift(shift, rows, q_shift, q_norm, inside, EXACT: tl.constexpr):
    """Keep what the backward kernels share of the queries at `rows`: [..., 2] if EXACT."""
    if EXACT:
        tl.store(shift + 2 * rows, q_shift, mask=inside)
        tl.store(shift + 2 * rows + 1, q_norm, mask=inside)
    else:
        tl.store(shift + rows, q_shift, mask=inside)


@triton.jit
def load_shift(shift, rows, inside, EXACT: tl.constexpr):
    """The shift of the queries at `rows`, and the factor of their weights."""
    if EXACT:
        q_shift = tl.load(shift + 2 * rows, mask=inside, other=0.0)
        q_norm = tl.load(shift + 2 * rows + 1, mask=inside, other=0.0)
    else:
        q_shift = tl.load(shift + rows, mask=inside, other=0.0)
        q_norm = 1.0
    return q_shift, q_norm


@triton.jit
def products(a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """a [M, D] @ b [N, D] transposed. If EXACT, in up to four sums over D: one long sum would round more."""
    PARTS: tl.constexpr = a.shape[1] // 16 if EXACT and PRECISION == "ieee" else 1
    if PARTS >= 4:
        a_even, a_odd = halves(a)
        b_even, b_odd = halves(b)
        c = sum_of_two(a_even, b_even)
        c = tl.fma(sum_of_two(a_odd, b_odd), 1.0, c)  # see `add_product`
    elif PARTS >= 2:
        c = sum_of_two(a, b)
    else:
        c = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return c


@triton.jit
def sum_of_two(a, b):
    """`products` of float32, in two sums."""
    a_even, a_odd = halves(a)
    b_even, b_odd = halves(b)
    c = tl.dot(a_even, tl.trans(b_even), input_precision="ieee")
    return tl.fma(tl.dot(a_odd, tl.trans(b_odd), input_precision="ieee"), 1.0, c)


@triton.jit
def halves(x):
    """The even and the odd columns of [R, C]."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def add_product(acc, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b. If EXACT, each product is added up by itself first: one long sum would round more."""
    if EXACT:
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)  # an addition would be drawn into the product
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def locate(pid, heads, tiles_y, tiles_x, dilation_y, dilation_x):
    """Program number -> batch, head, residues, tile row, tile column. Heads first: they share cache lines."""
    head = pid % heads
    pid = pid // heads
    residue_x = pid % dilation_x
    pid = pid // dilation_x
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    residue_y = pid % dilation_y
    pid = pid // dilation_y
    tile_y = pid % tiles_y
    batch = pid // tiles_y
    return batch.to(tl.int64), head.to(tl.int64), residue_y.to(tl.int64), residue_x.to(tl.int64), tile_y, tile_x


@triton.jit
def tile_of_program(pid, height, width, heads, dilation_y, dilation_x, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """`locate` where every tile of the map has a program, and the members of the tile's class per axis."""
    tiles_y, tiles_x = tl.cdiv(tl.cdiv(height, dilation_y), TILE_Y), tl.cdiv(tl.cdiv(width, dilation_x), TILE_X)
    batch, head, residue_y, residue_x, tile_y, tile_x = locate(pid, heads, tiles_y, tiles_x, dilation_y, dilation_x)
    members_y = class_length(height, dilation_y, residue_y).to(tl.int32)
    members_x = class_length(width, dilation_x, residue_x).to(tl.int32)
    return batch, head, residue_y, residue_x, members_y, members_x, tile_y, tile_x


@triton.jit
def strides_of(height, width, heads, dim, PACKED: tl.constexpr = 1):
    """Strides of a contiguous [batch, height, width, heads, dim]; of one without the last axis where `dim` is 1.

    Of PACKED tensors that are one in memory, [batch, height, width, PACKED, heads, dim], the strides of each.
    """
    token = tl.cast(heads, tl.int64) * (dim * PACKED)
    return token * width * height, token * width, token, dim, 1


@triton.jit
def class_base(tensor, strides, batch, head, residue_y, residue_x):
    """Pointer to the first member of a residue class."""
    return tensor + batch * strides[0] + head * strides[3] + residue_y * strides[1] + residue_x * strides[2]


@triton.jit
def member_offset(strides, y, x, dilation_y, dilation_x):
    """Distance in memory from the first member of a class to member `y`, `x`, scalars or [rows]."""
    # Places on the map fit 32 bits; their products with strides are made in one instruction so.
    return (y * dilation_y).to(tl.int64) * strides[1] + (x * dilation_x).to(tl.int64) * strides[2]


@triton.jit
def member_offsets(strides, y, x, d, dilation_y, dilation_x):
    """The same for every element of the members: [rows, D]. Worth making once outside a loop over blocks."""
    return member_offset(strides, y, x, dilation_y, dilation_x)[:, None] + d[None, :] * strides[4]


@triton.jit
def token_base(tensor, strides, batch, row, col, head):
    """Pointer to a token of the map, all scalars."""
    return (
        tensor + batch * strides[0] + row.to(tl.int64) * strides[1] + col.to(tl.int64) * strides[2] + head * strides[3]
    )


@triton.jit
def load(pointers, inside, d, dim, EVEN_D: tl.constexpr):
    """[rows, D], zero where not `inside` [rows] and beyond `dim`."""
    if EVEN_D:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def store(pointers, x, inside, d, dim, EVEN_D: tl.constexpr):
    """Store [rows, D] in the dtype of the memory."""
    x = x.to(pointers.dtype.element_ty)
    if EVEN_D:
        tl.store(pointers, x, mask=inside[:, None])
    else:
        tl.store(pointers, x, mask=inside[:, None] & (d < dim)[None, :])


@triton.jit
def keys_of_tile(
    query, first, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BORDER: tl.constexpr
):
    """One axis of the keys that a tile of queries from `first` sees.

    Returns the windows of `query` [M], start and end; the bounds of all the tile's windows; and those of the keys that
    every query of the tile sees. Windows move with the query, so both bounds come from the first and the last query.
    """
    last = tl.minimum(first + TILE, members) - 1
    return (
        window_start(query, members, KERNEL, STRIDE, BORDER),
        window_end(query, members, KERNEL, STRIDE, BORDER),
        window_start(first, members, KERNEL, STRIDE, BORDER),
        window_end(last, members, KERNEL, STRIDE, BORDER),
        window_start(last, members, KERNEL, STRIDE, BORDER),
        window_end(first, members, KERNEL, STRIDE, BORDER),
    )


@triton.jit
def queries_of_tile(
    key, first, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BORDER: tl.constexpr
):
    """The same with the roles exchanged: the queries that see a tile of keys."""
    last = tl.minimum(first + TILE, members) - 1
    return (
        first_query(key, members, KERNEL, STRIDE, BORDER),
        last_query(key, members, KERNEL, STRIDE, BORDER) + 1,
        first_query(first, members, KERNEL, STRIDE, BORDER),
        last_query(last, members, KERNEL, STRIDE, BORDER) + 1,
        first_query(last, members, KERNEL, STRIDE, BORDER),
        last_query(first, members, KERNEL, STRIDE, BORDER) + 1,
    )


@triton.jit
def window_bits(start, end, low):
    """A bit for every member from `start` to `end`, counted from `low`."""
    return ((1 << (end - start)) - 1) << (start - low)


@triton.jit
def visibility(
    my, mx, ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, RADIUS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """[M, N]: whether those at ny, nx [N] are between start and end of those at my, mx [M] and within the circle.

    BITS says that nothing lies 32 or more beyond low; it takes two operations a pair instead of four.
    """
    if RADIUS > 0:  # every member between start and end is on the map, and whatever is not is `FAR`
        dy, dx = my[:, None] - ny[None, :], mx[:, None] - nx[None, :]
        visible = dy * dy + dx * dx < RADIUS * RADIUS
    elif BITS:
        rows = (window_bits(start_y, end_y, low_y)[:, None] & (1 << (ny - low_y))[None, :]) != 0
        cols = (window_bits(start_x, end_x, low_x)[:, None] & (1 << (nx - low_x))[None, :]) != 0
        visible = rows & cols
    else:
        rows = (ny[None, :] >= start_y[:, None]) & (ny[None, :] < end_y[:, None])
        cols = (nx[None, :] >= start_x[:, None]) & (nx[None, :] < end_x[:, None])
        visible = rows & cols
    return visible


FAR = tl.constexpr(30_000)  # its square is an int32, and no radius reaches it


@triton.jit
def block_members(block_y, block_x, high_y, high_x, n, BLOCK_X: tl.constexpr, RADIUS: tl.constexpr):
    """y, x [N] of the members of a block, and whether they come before `high`. With a circle, others are put FAR."""
    y, x = block_y + n // BLOCK_X, block_x + n % BLOCK_X
    inside = (y < high_y) & (x < high_x)
    if RADIUS > 0:
        y = tl.where(inside, y, y + FAR)
    return y, x, inside


@triton.jit
def sees_all(
    block_y, block_x, first_y, first_x, full_low_y, full_high_y, full_low_x, full_high_x,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, RADIUS: tl.constexpr,
):  # fmt: skip
    """Whether every member of a tile sees every member of a block."""
    full = (block_y >= full_low_y) & (block_y + BLOCK_Y <= full_high_y)
    full = full & (block_x >= full_low_x) & (block_x + BLOCK_X <= full_high_x)
    if RADIUS > 0:  # from corner to corner
        dy = tl.maximum(block_y + BLOCK_Y - 1 - first_y, first_y + TILE_Y - 1 - block_y)
        dx = tl.maximum(block_x + BLOCK_X - 1 - first_x, first_x + TILE_X - 1 - block_x)
        full = full & (dy * dy + dx * dx < RADIUS * RADIUS)
    return full


@triton.jit
def bias_offsets(qy, qx, ky, kx, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr):
    """[M, N]: where the bias of query [M] and key [N] is in a table [2 * KERNEL_Y - 1, 2 * KERNEL_X - 1]."""
    from_query = (KERNEL_Y - 1 - qy) * (2 * KERNEL_X - 1) + KERNEL_X - 1 - qx
    return from_query[:, None] + (ky * (2 * KERNEL_X - 1) + kx)[None, :]


# What becomes of the bias: there is none; it is read pair by pair from its table; it was laid out for whole tiles
# beforehand, hidden pairs at -inf, which pays where many tiles look alike; or a program keeps that of its only block
# for several images.
NO_BIAS = tl.constexpr(0)  # their order is used
TABLE = tl.constexpr(1)
UNROLLED = tl.constexpr(2)
HELD = tl.constexpr(3)


@triton.jit
def pair_bias(bias, head, my, mx, ny, nx, visible, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, OF_KEYS, EXACT):
    """[M, N] bias of the pairs of a tile and a block, -inf where hidden."""
    bias += head * ((2 * KERNEL_Y - 1) * (2 * KERNEL_X - 1))
    if OF_KEYS:
        offsets = tl.trans(bias_offsets(ny, nx, my, mx, KERNEL_Y, KERNEL_X))
    else:
        offsets = bias_offsets(my, mx, ny, nx, KERNEL_Y, KERNEL_X)
    UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
    x = tl.load(bias + offsets, mask=visible, other=0.0).to(tl.float32) * UNIT
    return tl.where(visible, x, float("-inf"))


@triton.jit
def pattern(tile, members, KERNEL: tl.constexpr, TILE: tl.constexpr, PLAIN: tl.constexpr, OF_KEYS: tl.constexpr):
    """`tile_pattern` of a tile of queries, or of one of keys. Unless windows are PLAIN, every tile is its own."""
    if not PLAIN:
        number = tile
    elif OF_KEYS:
        number = tile_pattern(tile, TILE, members, KERNEL, KERNEL)
    else:
        number = tile_pattern(tile, TILE, members, KERNEL // 2, KERNEL - KERNEL // 2 - 1)
    return number


@triton.jit
def tiles_like(number, members, KERNEL: tl.constexpr, TILE: tl.constexpr, PLAIN: tl.constexpr):
    """First tile of queries with pattern `number`, and how many have it."""
    if PLAIN:
        first, count = pattern_tiles(number, TILE, members, KERNEL // 2, KERNEL - KERNEL // 2 - 1)
    else:
        first, count = number, (number * TILE < members).to(tl.int32)
    return first, count


@triton.jit
def tile_bias(
    bias,
    layout,
    head,
    heads,
    tile_y,
    tile_x,
    members_y,
    members_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    N: tl.constexpr,
    PLAIN: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Pointer to what one tile needs of the bias: the table of its head, or the tile's own [blocks, M, N].

    `layout` of unrolled bias: members of the longest class per axis (the others have one fewer), patterns per axis,
    kinds of classes along x, blocks per axis.
    """
    if BIAS == UNROLLED:
        most_y, most_x, patterns_y, patterns_x, kinds_x, blocks_y, blocks_x = layout
        row = (most_y - members_y) * patterns_y + pattern(tile_y, members_y, KERNEL_Y, TILE_Y, PLAIN, OF_KEYS)
        col = (most_x - members_x) * patterns_x + pattern(tile_x, members_x, KERNEL_X, TILE_X, PLAIN, OF_KEYS)
        place = (row.to(tl.int64) * (kinds_x * patterns_x) + col) * heads + head
        base = bias + place * (blocks_y * blocks_x) * (TILE_Y * TILE_X * N)
    else:
        base = bias + head * ((2 * KERNEL_Y - 1) * (2 * KERNEL_X - 1))
    return base


@triton.jit
def mask_and_bias(
    logits,
    bias,
    block,
    m,
    n,
    my,
    mx,
    ny,
    nx,
    start_y,
    end_y,
    start_x,
    end_x,
    low_y,
    low_x,
    full,
    pairs,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    OF_KEYS: tl.constexpr,
    RADIUS: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Logits [M, N] of a tile and a block: the bias added, -inf where query and key do not see each other.

    M are the tile's members, at `my`, `mx`, that see those from start to end; N are the block's, at `ny`, `nx`. `pairs`
    [M, N] is HELD bias.
    """
    if BIAS == UNROLLED:
        pairs = tl.load(bias + block * (M * N) + m[:, None] * N + n[None, :])
    if BIAS >= UNROLLED:
        logits = tl.where(pairs == float("-inf"), pairs, logits + pairs)
    elif BIAS == TABLE:
        visible = visibility(my, mx, ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, RADIUS, BITS)
        if OF_KEYS:
            offsets = tl.trans(bias_offsets(ny, nx, my, mx, KERNEL_Y, KERNEL_X))
        else:
            offsets = bias_offsets(my, mx, ny, nx, KERNEL_Y, KERNEL_X)
        UNIT: tl.constexpr = 1.0 if EXACT else LOG2E
        logits += tl.load(bias + offsets, mask=visible, other=0.0).to(tl.float32) * UNIT
        logits = tl.where(visible, logits, float("-inf"))
    elif BITS and RADIUS == 0:
        visible = visibility(my, mx, ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, RADIUS, BITS)
        logits = tl.where(visible, logits, float("-inf"))
    else:
        if not full:
            visible = visibility(my, mx, ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, RADIUS, BITS)
            logits = tl.where(visible, logits, float("-inf"))
    return logits
