"""The meaning of neighborhood attention: gather each query's window, then softmax. Slow; any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.neighborhood.window import class_length, window_end, window_start


def axis_windows(length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, device=None):
    """Windows of every token of one axis.

    Returns:
        Three tensors [length, kernel_size]: the token each window slot holds, the index of that slot in one axis of
        the bias table, and whether the query may see it (only causal windows have slots it may not).
    """
    keys, offsets, visible = [], [], []
    for token in range(length):
        residue, query = token % dilation, token // dilation
        members = class_length(length, dilation, residue)
        start = window_start(query, members, kernel_size, stride, is_causal)
        end = window_end(query, members, kernel_size, stride, is_causal)
        slots = list(range(start, end)) + [query] * (kernel_size - (end - start))
        keys.append([residue + dilation * slot for slot in slots])
        offsets.append([slot - query + kernel_size - 1 for slot in slots])
        visible.append([slot < end - start for slot in range(kernel_size)])
    return (torch.tensor(x, device=device).view(length, kernel_size) for x in (keys, offsets, visible))


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
    rel_pos_bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.neighborhood_attention_2d`; also returns the log-sum-exp [batch, height, width, heads].

    `dtype` is that of the arithmetic, at least float32 by default.
    """
    _, height, width, _, _ = query.shape
    dtype = dtype or torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (query, key, value))

    rows, row_offsets, row_visible = axis_windows(
        height, kernel_size[0], dilation[0], stride[0], is_causal[0], query.device
    )
    cols, col_offsets, col_visible = axis_windows(
        width, kernel_size[1], dilation[1], stride[1], is_causal[1], query.device
    )
    y, x = rows[:, None, :, None], cols[None, :, None, :]  # [height, width, kernel rows, kernel columns]
    visible = row_visible[:, None, :, None] & col_visible[None, :, None, :]

    logits = scale * torch.einsum("bhwnd,bhwyxnd->bhwnyx", q, k[:, y, x])
    if rel_pos_bias is not None:
        bias = rel_pos_bias.to(dtype)[:, row_offsets[:, None, :, None], col_offsets[None, :, None, :]]
        logits = logits + bias.permute(1, 2, 0, 3, 4)
    logits = logits.masked_fill(~visible[:, :, None], float("-inf")).flatten(-2)

    if extra_key is not None:
        extra_logits = scale * torch.einsum("bhwnd,btnd->bhwnt", q, extra_key.to(dtype))
        logits = torch.cat([logits, extra_logits], dim=-1)

    weights = logits.softmax(dim=-1)
    window = kernel_size[0] * kernel_size[1]
    out = torch.einsum("bhwnk,bhwknd->bhwnd", weights[..., :window], v[:, y, x].flatten(3, 4))
    if extra_value is not None:
        out = out + torch.einsum("bhwnt,btnd->bhwnd", weights[..., window:], extra_value.to(dtype))
    return out.to(query.dtype), logits.logsumexp(dim=-1)
