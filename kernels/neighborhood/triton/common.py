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
def class_base(tensor, strides, batch, head, residue_y, residue_x):
    """Pointer to the first member of a residue class."""
    return tensor + batch * strides[0] + head * strides[3] + residue_y * strides[1] + residue_x * strides[2]


@triton.jit
def member_offset(strides, y, x, dilation_y, dilation_x):
    """Distance in memory from the first member of a class to member `y`, `x`, scalars or [rows]."""
    return y.to(tl.int64) * strides[1] * dilation_y + x.to(tl.int64) * strides[2] * dilation_x


@triton.jit
def member_offsets(strides, y, x, d, dilation_y, dilation_x):
    """The same for every element of the members: [rows, D]. Worth making once outside a loop over blocks."""
    return member_offset(strides, y, x, dilation_y, dilation_x)[:, None] + d[None, :] * strides[4]


@triton.jit
def tile_base(tensor, strides, batch, head, residue_y, residue_x, y, x, dilation_y, dilation_x):
    """Pointer to member `y`, `x`, scalars, of a residue class."""
    base = class_base(tensor, strides, batch, head, residue_y, residue_x)
    return base + member_offset(strides, y, x, dilation_y, dilation_x)


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
def keys_of_tile(query, first, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL):
    """One axis of the keys that a tile of queries from `first` sees.

    Returns the windows of `query` [M], start and end; the bounds of all the tile's windows; and those of the keys that
    every query of the tile sees. Windows move with the query, so both bounds come from the first and the last query.
    """
    last = tl.minimum(first + TILE, members) - 1
    return (
        window_start(query, members, KERNEL, STRIDE, CAUSAL),
        window_end(query, members, KERNEL, STRIDE, CAUSAL),
        window_start(first, members, KERNEL, STRIDE, CAUSAL),
        window_end(last, members, KERNEL, STRIDE, CAUSAL),
        window_start(last, members, KERNEL, STRIDE, CAUSAL),
        window_end(first, members, KERNEL, STRIDE, CAUSAL),
    )


@triton.jit
def queries_of_tile(key, first, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL):
    """The same with the roles exchanged: the queries that see a tile of keys."""
    last = tl.minimum(first + TILE, members) - 1
    return (
        first_query(key, members, KERNEL, STRIDE, CAUSAL),
        last_query(key, members, KERNEL, STRIDE, CAUSAL) + 1,
        first_query(first, members, KERNEL, STRIDE, CAUSAL),
        last_query(last, members, KERNEL, STRIDE, CAUSAL) + 1,
        first_query(last, members, KERNEL, STRIDE, CAUSAL),
        last_query(first, members, KERNEL, STRIDE, CAUSAL) + 1,
    )


@triton.jit
def window_bits(start, end, low):
    """A bit for every member from `start` to `end`, counted from `low`."""
    return ((1 << (end - start)) - 1) << (start - low)


@triton.jit
def visibility(y, x, start_y, end_y, start_x, end_x, low_y, low_x, BITS: tl.constexpr):
    """[M, N]: whether y, x [N] are between start and end [M].

    BITS says that nothing lies 32 or more beyond low; it takes two operations a pair instead of four.
    """
    if BITS:
        rows = (window_bits(start_y, end_y, low_y)[:, None] & (1 << (y - low_y))[None, :]) != 0
        cols = (window_bits(start_x, end_x, low_x)[:, None] & (1 << (x - low_x))[None, :]) != 0
    else:
        rows = (y[None, :] >= start_y[:, None]) & (y[None, :] < end_y[:, None])
        cols = (x[None, :] >= start_x[:, None]) & (x[None, :] < end_x[:, None])
    return rows & cols


@triton.jit
def bias_offsets(qy, qx, ky, kx, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr):
    """[M, N]: where the bias of query [M] and key [N] is in a table [2 * KERNEL_Y - 1, 2 * KERNEL_X - 1]."""
    from_query = (KERNEL_Y - 1 - qy) * (2 * KERNEL_X - 1) + KERNEL_X - 1 - qx
    return from_query[:, None] + (ky * (2 * KERNEL_X - 1) + kx)[None, :]


# What becomes of the bias: there is none; it is read pair by pair from its table; or it was laid out for whole tiles
# beforehand, hidden pairs at -inf, which pays where many tiles look alike.
NO_BIAS = tl.constexpr(0)
TABLE = tl.constexpr(1)
UNROLLED = tl.constexpr(2)


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
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Base-2 logits [M, N] of a tile and a block: the bias added, -inf where query and key do not see each other.

    M are the tile's members, at `my`, `mx`, that see those from start to end; N are the block's, at `ny`, `nx`.
    """
    if BIAS == UNROLLED:
        unrolled = tl.load(bias + block * (M * N) + m[:, None] * N + n[None, :])
        logits = tl.where(unrolled == float("-inf"), unrolled, logits + unrolled)
    elif BIAS == TABLE:
        visible = visibility(ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, BITS)
        if OF_KEYS:
            offsets = tl.trans(bias_offsets(ny, nx, my, mx, KERNEL_Y, KERNEL_X))
        else:
            offsets = bias_offsets(my, mx, ny, nx, KERNEL_Y, KERNEL_X)
        logits += tl.load(bias + offsets, mask=visible, other=0.0).to(tl.float32) * LOG2E
        logits = tl.where(visible, logits, float("-inf"))
    elif BITS:
        visible = visibility(ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, BITS)
        logits = tl.where(visible, logits, float("-inf"))
    else:
        if not full:
            visible = visibility(ny, nx, start_y, end_y, start_x, end_x, low_y, low_x, BITS)
            logits = tl.where(visible, logits, float("-inf"))
    return logits


@triton.jit
def row_strides(height, width, heads):
    """Strides of a contiguous [batch, height, width, heads], such as the log-sum-exp."""
    return height.to(tl.int64) * width * heads, width.to(tl.int64) * heads, heads, 1, 0
