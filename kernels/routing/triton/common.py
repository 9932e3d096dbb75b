"""What the forward and backward kernels share: where a region's tokens are.

Names in the kernels: M runs over the tokens of a tile, all of one region; N over those of a block, of one region or of
several in a row; D over the head dimension. Tensors come with their strides (batch, y, x, head, dim); all address
arithmetic is in int64.
"""

import triton
import triton.language as tl


@triton.jit
def locate(pid, heads, tiles, regions):
    """Program number -> batch, head, region, tile of the region. Heads first: they share cache lines."""
    head = pid % heads
    pid = pid // heads
    tile = pid % tiles
    pid = pid // tiles
    region = pid % regions
    batch = pid // regions
    return batch.to(tl.int64), head.to(tl.int64), region, tile


@triton.jit
def position(region, token, height, width, cols, region_y, region_x):
    """Row and column of tokens [rows] of regions, and whether they are in the map."""
    y = region // cols * region_y + token // region_x
    x = region % cols * region_x + token % region_x
    return y, x, (y < height) & (x < width)


@triton.jit
def token_pointers(tensor, strides, batch, head, y, x, d):
    """Pointers [rows, D] to the tokens at `y`, `x` [rows]."""
    rows = y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
    return tensor + batch * strides[0] + head * strides[3] + rows[:, None] + d[None, :] * strides[4]


@triton.jit
def token_rows(batch, head, y, x, height, width, heads):
    """Where the tokens at `y`, `x` are in a contiguous [batch, height, width, heads]."""
    return ((batch * height + y) * width + x) * heads + head
