"""The meaning of window attention: every query against the whole map, then a mask. Slow; any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_pairs(length: int, window: int, shift: int, device=None) -> tuple[Tensor, Tensor]:
    """Pairs of tokens of one axis, query by key.

    Returns:
        Two tensors [length, length]: whether the two are in one window, and the index of their offset in one axis of
        the bias table (meaningless where they are not).
    """
    token = torch.arange(length, device=device)
    window_of = (token - shift).div(window, rounding_mode="floor")
    offset = token[None, :] - token[:, None] + window - 1
    return window_of[:, None] == window_of[None, :], offset.clamp(0, 2 * window - 2)


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
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    _, height, width, _, _ = key.shape
    if query.shape[1:3] != key.shape[1:3]:  # every window has the same query
        q = q.repeat(1, height // window_size[0], width // window_size[1], 1, 1)

    same_row, dy = axis_pairs(height, window_size[0], shift[0], query.device)
    same_col, dx = axis_pairs(width, window_size[1], shift[1], query.device)
    visible = same_row[:, None, :, None] & same_col[None, :, None, :]  # [query row, query column, key row, key column]

    logits = scale * torch.einsum("bhwnd,byxnd->bnhwyx", q, k)
    if rel_pos_bias is not None:
        logits = logits + rel_pos_bias.to(dtype)[:, dy[:, None, :, None], dx[None, :, None, :]]
    weights = logits.masked_fill(~visible, float("-inf")).flatten(-2).softmax(dim=-1)
    return torch.einsum("bnhwk,bknd->bhwnd", weights, v.flatten(1, 2)).to(query.dtype)
