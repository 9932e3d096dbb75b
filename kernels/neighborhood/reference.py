"""The meaning of neighborhood and circular attention: gather windows, then softmax. Slow; any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.neighborhood.window import borders, class_length, window_end, window_start


def axis_windows(length: int, kernel_size: int, dilation: int, stride: int, border: int, device=None):
    """Windows of every token of one axis.

    Returns:
        Three tensors [length, slots]: the token each window slot holds, the index of that slot in one axis of the bias
        table, and whether the query may see it (causal and clipped windows have slots it may not).
    """
    keys, offsets, visible = [], [], []
    slots = min(kernel_size, length)
    for token in range(length):
        residue, query = token % dilation, token // dilation
        members = class_length(length, dilation, residue)
        start = window_start(query, members, kernel_size, stride, border)
        end = window_end(query, members, kernel_size, stride, border)
        window = list(range(start, end)) + [query] * (slots - (end - start))
        keys.append([residue + dilation * member for member in window])
        offsets.append([member - query + kernel_size - 1 for member in window])
        visible.append([slot < end - start for slot in range(slots)])
    return (torch.tensor(x, device=device).view(length, slots) for x in (keys, offsets, visible))


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
    radius: int,
    rel_pos_bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.neighborhood_attention_2d`; also returns the log-sum-exp [batch, height, width, heads].

    With `radius` > 0 a query sees only what is inside the circle of `zoo.kernels.circular_attention_2d`. `dtype` is
    that of the arithmetic, at least float32 by default.
    """
    _, height, width, _, _ = query.shape
    dtype = dtype or torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (query, key, value))

    border = borders(is_causal, radius)
    rows, row_offsets, row_visible = axis_windows(
        height, kernel_size[0], dilation[0], stride[0], border[0], query.device
    )
    cols, col_offsets, col_visible = axis_windows(
        width, kernel_size[1], dilation[1], stride[1], border[1], query.device
    )
    y, x = rows[:, None, :, None], cols[None, :, None, :]  # [height, width, window rows, window columns]
    visible = row_visible[:, None, :, None] & col_visible[None, :, None, :]
    if radius > 0:
        dy, dx = (x - torch.arange(len(x), device=x.device)[:, None] for x in (rows, cols))
        visible &= dy[:, None, :, None] ** 2 + dx[None, :, None, :] ** 2 < radius**2

    logits = scale * torch.einsum("bhwnd,bhwyxnd->bhwnyx", q, k[:, y, x])
    if rel_pos_bias is not None:
        bias = rel_pos_bias.to(dtype)[:, row_offsets[:, None, :, None], col_offsets[None, :, None, :]]
        logits = logits + bias.permute(1, 2, 0, 3, 4)
    logits = logits.masked_fill(~visible[:, :, None], float("-inf")).flatten(-2)

    if extra_key is not None:
        extra_logits = scale * torch.einsum("bhwnd,btnd->bhwnt", q, extra_key.to(dtype))
        logits = torch.cat([logits, extra_logits], dim=-1)

    weights = logits.softmax(dim=-1)
    window = rows.shape[1] * cols.shape[1]
    values = v[:, y, x].masked_fill(~visible[..., None, None], 0).flatten(3, 4)  # 0 * nan would be nan
    out = torch.einsum("bhwnk,bhwknd->bhwnd", weights[..., :window], values)
    if extra_value is not None:
        out = out + torch.einsum("bhwnt,btnd->bhwnd", weights[..., window:], extra_value.to(dtype))
    return out.to(query.dtype), logits.logsumexp(dim=-1)
