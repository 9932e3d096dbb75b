"""Window attention as `scaled_dot_product_attention` of all windows at once, on every device.

The function is plain torch on the shapes of its arguments, so compile, export and TorchScript take it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels._cells import cut
from zoo.kernels._sdpa import biased_attention
from zoo.kernels._symbols import is_symbol
from zoo.kernels.window.bias import pair_bias


def window_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `zoo.kernels.window_attention_2d`."""
    batch, height, width, heads = key.shape[0], key.shape[1], key.shape[2], key.shape[3]
    rows, cols = window_size
    windows = (height // rows) * (width // cols)
    if is_shared(query, key):
        query = query.repeat(1, height // rows, width // cols, 1, 1)
    shifted = is_symbol(shift[0]) or is_symbol(shift[1]) or shift[0] > 0 or shift[1] > 0
    bias = None if rel_pos_bias is None else pair_bias(rel_pos_bias, rows, cols, query.dtype)

    # The fused kernels take [outer, inner, tokens, dim], with a mask that they broadcast along `outer`.
    if shifted:  # every window has a mask of its own
        outer, inner = batch, windows * heads
        query, key, value = [_roll(x, height - shift[0], width - shift[1]) for x in (query, key, value)]
        bias = _shift_mask(bias, key, window_size, shift)
    else:
        outer, inner = batch * windows, heads

    query, key, value = [_partition(x, window_size, outer, inner) for x in (query, key, value)]
    out = biased_attention(query, key, value, bias, scale)

    if _is_column(width, cols) and not shifted:
        return out.transpose(1, 2).reshape(batch, height, width, heads, value.shape[-1])
    out = out.reshape(batch, height // rows, width // cols, heads, rows, cols, value.shape[-1])
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads, value.shape[-1])
    return _roll(out, shift[0], shift[1]) if shifted else out


def is_shared(query: Tensor, key: Tensor) -> bool:
    """Whether all windows have the same query: of maps of any size, which may be that of a window, one of no symbol."""
    if is_symbol(key.shape[1]) or is_symbol(key.shape[2]):
        return not is_symbol(query.shape[1]) and not is_symbol(query.shape[2])
    return query.shape[1] != key.shape[1] or query.shape[2] != key.shape[2]


def _is_column(width: int, cols: int) -> bool:
    """Whether windows are all below each other, so that each is a run of tokens."""
    return not is_symbol(width) and not is_symbol(cols) and width == cols


def _roll(x: Tensor, down: int, right: int) -> Tensor:
    """`torch.roll` of a map, by 0 or more. ONNX has none by symbols."""
    if is_symbol(down) or is_symbol(right):
        for axis, size, shift in ((1, x.shape[1], down), (2, x.shape[2], right)):
            last = torch.arange(size - shift, size, device=x.device)
            x = x.index_select(axis, torch.cat([last, torch.arange(size - shift, device=x.device)]))
        return x
    return x.roll((down, right), (1, 2))


def _partition(x: Tensor, window_size: tuple[int, int], outer: int, inner: int) -> Tensor:
    """[batch, height, width, heads, dim] -> [outer, inner, tokens of a window, dim]

    `outer` and `inner` are cut from batch, windows, heads. Where windows are below each other, nothing is copied.
    """
    rows, cols = window_size
    if _is_column(x.shape[2], cols) and inner == x.shape[3]:  # the same in fewer steps, which the host of a GPU feels
        return x.reshape(outer, rows * cols, inner, x.shape[-1]).transpose(1, 2)
    x = cut(x, (-1, rows), (-1, cols))
    return x.permute(0, 1, 2, 5, 3, 4, 6).reshape(outer, inner, rows * cols, x.shape[-1])


def _shift_mask(bias: Tensor | None, like: Tensor, window_size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Bias [heads, tokens, tokens] of one window -> [windows * heads, tokens, tokens] of all windows of a rolled map.

    The last windows of a rolled map hold tokens from both its ends, which do not see each other.
    """
    height, width, heads = like.shape[1], like.shape[2], like.shape[3]
    rows, cols = window_size
    wrapped_row = torch.arange(height, device=like.device) >= height - shift[0]
    wrapped_col = torch.arange(width, device=like.device) >= width - shift[1]
    end = 2 * wrapped_row[:, None] + wrapped_col.int()
    end = end.view(height // rows, rows, width // cols, cols).transpose(1, 2).reshape(-1, 1, rows * cols)
    hidden = (end != end.transpose(1, 2)).unsqueeze(1)
    if bias is None:
        bias = torch.zeros((heads, 1, 1), dtype=like.dtype, device=like.device)
    return bias.masked_fill(hidden, float("-inf")).flatten(0, 1)
