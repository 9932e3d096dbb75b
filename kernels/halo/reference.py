"""The meaning of halo attention: gather every block's window, then softmax. Slow; any dtype, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def halo_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `zoo.kernels.halo_attention_2d`. `dtype` is that of the arithmetic, at least float32 by default."""
    dtype = dtype or torch.promote_types(query.dtype, torch.float32)
    blocks_y, blocks_x = key.shape[1] // block_size, key.shape[2] // block_size
    side, win = block_size // stride, block_size + 2 * halo_size

    def windows(x: Tensor) -> Tensor:
        """[batch, height, width, heads, dim] -> [batch, blocks_y, blocks_x, win, win, heads, dim]"""
        padded = F.pad(x.to(dtype), (0, 0, 0, 0) + (halo_size,) * 4)
        rows, cols = (
            torch.arange(blocks, device=x.device)[:, None] * block_size + torch.arange(win, device=x.device)
            for blocks in (blocks_y, blocks_x)
        )
        return padded[:, rows[:, None, :, None], cols[None, :, None, :]]

    # Axes: Y and X blocks; i and j a query's row and column in its block, y and x a key's in the window.
    q = query.to(dtype).unflatten(1, (blocks_y, side)).unflatten(3, (blocks_x, side))  # [b, Y, i, X, j, n, d]
    logits = scale * torch.einsum("bYiXjnd,bYXyxnd->bYXnijyx", q, windows(key))
    if rel_height is not None and rel_width is not None:
        row = torch.arange(win, device=q.device) - torch.arange(side, device=q.device)[:, None] + win - 1
        logits = logits + torch.einsum("bYiXjnd,iyd->bYXnijy", q, rel_height.to(dtype)[row])[..., :, None]
        logits = logits + torch.einsum("bYiXjnd,jxd->bYXnijx", q, rel_width.to(dtype)[row])[..., None, :]
    weights = logits.flatten(-2).softmax(dim=-1).view_as(logits)
    out = torch.einsum("bYXnijyx,bYXyxnd->bYiXjnd", weights, windows(value))
    return out.flatten(3, 4).flatten(1, 2).to(query.dtype)
