"""Index ranges of neighborhood attention along one axis; every backend and every rank uses these.

An axis of `length` tokens with dilation `d` splits into `d` residue classes: token `i` is member `i // d` of class
`i % d`. Attention never leaves a class, so everything below `class_length` speaks of members of one class.

`border` says what becomes of a window that reaches over the border: it is SHIFTED inwards; it is CAUSAL, so it ends at
its query and is cut at the start of the axis; or it is CLIPPED at both ends. As False is 0 and True is 1, a flag that
says whether an axis is causal does for it. CLIPPED windows have no stride: each query has its own.

The functions are plain integer arithmetic on purpose: they run on Python integers and, compiled as they are by
`triton.jit`, inside the fused kernels.
"""

from __future__ import annotations

# The functions below write these as numbers: compiled, they see no variables but their own.
SHIFTED, CAUSAL, CLIPPED = 0, 1, 2


def borders(is_causal, radius):
    """`border` of each axis. A circle of `radius` > 0 is cut out of CLIPPED windows."""
    return (CLIPPED, CLIPPED) if radius > 0 else is_causal


def class_length(length, dilation, residue):
    """Number of tokens `i < length` with `i % dilation == residue`."""
    return (length - residue + dilation - 1) // dilation


def classes_of_kind(kind, length, dilation):
    """First residue and number of the classes of the most members (kind 0) or of one member fewer (kind 1)."""
    longest = (length + dilation - 1) % dilation + 1
    return longest * kind, longest + (dilation - 2 * longest) * kind


def window_start(query, length, kernel_size, stride, border):
    """First key that member `query` of a class of `length` members attends to.

    Queries in one group of `stride` share the window of the group's leader: its centre, or its last member where the
    axis is CAUSAL. CLIPPED windows are their query's own.
    """
    if border == 2:
        start = max(query - kernel_size // 2, 0)
    elif border == 1:
        leader = min(query // stride * stride + stride - 1, length - 1)
        start = max(leader - kernel_size + 1, 0)
    else:
        leader = min(query // stride * stride + stride // 2, length - 1)
        start = min(max(leader - kernel_size // 2, 0), length - kernel_size)
    return start


def window_end(query, length, kernel_size, stride, border):
    """One past the last key that member `query` of a class of `length` members attends to."""
    if border == 2:
        end = min(query - kernel_size // 2 + kernel_size, length)
    elif border == 1:
        end = query + 1
    else:
        leader = min(query // stride * stride + stride // 2, length - 1)
        end = min(max(leader - kernel_size // 2, 0), length - kernel_size) + kernel_size
    return end


def first_query(key, length, kernel_size, stride, border):
    """First member of a class of `length` members whose window holds member `key`."""
    if border == 2:
        first = max(key + kernel_size // 2 - kernel_size + 1, 0)
    elif border == 1:
        first = key
    else:
        leader = key - (kernel_size - 1) + kernel_size // 2  # of the first group whose window ends after the key
        group = (max(leader - stride // 2, 0) + stride - 1) // stride
        first = min(group, (length - 1) // stride) * stride
        first = first * (key >= kernel_size)  # the windows of the first members all start at 0
    return first


def last_query(key, length, kernel_size, stride, border):
    """Last member of a class of `length` members whose window holds member `key`; before the first where none does."""
    if border == 2:
        last = min(key + kernel_size // 2, length - 1)
    elif border == 1:
        last = min((key + kernel_size - stride) // stride * stride + stride - 1, length - 1)
        last = last + (length - 1 - last) * (key + kernel_size >= length)  # a last group cut short is led by its end
    else:
        last = min((key + kernel_size // 2 - stride // 2) // stride * stride + stride - 1, length - 1)
        last = last + (length - 1 - last) * (
            key + kernel_size >= length
        )  # the windows of the last members all end there
    return last


def tile_pattern(tile, tile_size, members, head, tail):
    """Number of the pattern in which tile `tile` of a class of `members` members sees its keys (or is seen by queries).

    The windows of members below `head` and of the last `tail` are shifted; tiles that hold none of them look alike.
    Patterns are numbered along the axis: those of the first tiles, that of the interior, those of the last tiles.
    """
    interior = (head + tile_size - 1) // tile_size
    first_shifted = max(members - tail - tile_size + 1, 0)
    first_tail = max((first_shifted + tile_size - 1) // tile_size, interior + 1)
    return min(tile, interior) + max(tile - first_tail + 1, 0)


def pattern_tiles(pattern, tile_size, members, head, tail):
    """First tile with pattern number `pattern` of `tile_pattern`, and how many have it; they are next to each other."""
    tiles = (members + tile_size - 1) // tile_size
    interior = (head + tile_size - 1) // tile_size
    first_shifted = max(members - tail - tile_size + 1, 0)
    first_tail = max((first_shifted + tile_size - 1) // tile_size, interior + 1)
    first = pattern + (first_tail - interior - 1) * (pattern > interior)
    last = pattern + (first_tail - interior - 1) * (pattern >= interior)
    return first, max(min(last, tiles - 1) - first + 1, 0)
