"""Neighborhood attention in torch's own operators, for maps whose size may be a symbol: what exporters write out.

Every residue class is cut into tiles of `TILE` consecutive queries. Their windows lie in `TILE + kernel_size - 1`
consecutive keys; the tiles of the whole map are one batch, in which keys that a query does not see are masked. Nothing
branches on the size of the map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels._symbols import crop
from zoo.kernels.neighborhood.tiled import TILE


class _Axis(NamedTuple):
    """Tiles of one axis, those of a residue class next to each other: [tiles, ...]."""

    queries: Tensor  # [tiles * TILE], tokens
    keys: Tensor  # [tiles * k], tokens
    offsets: Tensor  # [tiles * TILE * k], into one axis of the bias table
    visible: Tensor  # [tiles, TILE, k]
    num_tiles: int


def _axis(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    steps = torch.arange(TILE, device=device)
    slots = torch.arange(TILE + kernel_size - 1, device=device)
    per_class = (length + dilation * TILE - 1) // (dilation * TILE)
    residue = torch.arange(dilation, device=device)[:, None, None]
    members = (length - 1 - residue) // dilation + 1
    # A class may end within its last tile, whose further queries repeat the last.
    tiles = torch.arange(per_class, device=device)[None, :, None]
    queries = torch.minimum(tiles * TILE + steps, members - 1)  # [classes, tiles of a class, TILE]
    starts = (queries - kernel_size // 2).clamp(min=0).minimum(members - kernel_size)
    keys = starts[:, :, :1] + slots
    visible = (starts[..., None] <= keys[:, :, None]) & (keys[:, :, None] < starts[..., None] + kernel_size)
    offsets = (keys[:, :, None] - queries[..., None]).clamp(1 - kernel_size, kernel_size - 1) + kernel_size - 1
    keys = residue + dilation * torch.minimum(keys, members - 1)
    queries = residue + dilation * queries
    num_tiles = dilation * per_class
    return _Axis(queries.flatten(), keys.flatten(), offsets.flatten(), visible.flatten(0, 1), num_tiles)


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.neighborhood_attention_2d`; also returns the log-sum-exp [batch, height, width, heads]."""
    batch, height, width, heads, dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows, cols = (
        _axis(length, k, d, query.device) for length, k, d in zip((height, width), kernel_size, dilation, strict=True)
    )
    spans = [TILE + k - 1 for k in kernel_size]

    def tiled(x: Tensor, row_tokens: Tensor, col_tokens: Tensor, sides: tuple[int, int]) -> Tensor:
        """[batch, height, width, heads, dim] -> [batch * heads * tiles, tokens of a tile, dim]"""
        x = x.to(dtype).index_select(1, row_tokens).index_select(2, col_tokens)
        x = x.reshape(batch, rows.num_tiles, sides[0], cols.num_tiles, sides[1], heads, dim)
        return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(-1, sides[0] * sides[1], dim)

    def joined(x: Tensor) -> Tensor:
        """[batch * heads * tiles, TILE * TILE, n] -> [batch, height, width, heads, n]"""
        tiles = (axis.num_tiles // d for axis, d in zip((rows, cols), dilation, strict=True))
        down, across = tiles
        x = x.reshape(batch, heads, dilation[0], down, dilation[1], across, TILE, TILE, x.shape[-1])
        x = x.permute(0, 3, 6, 2, 5, 7, 4, 1, 8)  # a token is dilation * its number in the class + residue
        x = x.reshape(batch, down * TILE * dilation[0], across * TILE * dilation[1], heads, x.shape[-1])
        return crop(x, height, width)

    q = tiled(query, rows.queries, cols.queries, (TILE, TILE)) * scale
    k, v = (tiled(x, rows.keys, cols.keys, spans) for x in (key, value))
    tiles = rows.num_tiles * cols.num_tiles
    mask = rows.visible[:, None, :, None, :, None] & cols.visible[None, :, None, :, None, :]
    mask = torch.where(mask, 0.0, float("-inf")).to(dtype).reshape(1, tiles, TILE**2, spans[0] * spans[1])
    if rel_pos_bias is not None:
        bias = rel_pos_bias.to(dtype).index_select(1, rows.offsets).index_select(2, cols.offsets)
        bias = bias.reshape(heads, rows.num_tiles, TILE, spans[0], cols.num_tiles, TILE, spans[1])
        mask = mask + bias.permute(0, 1, 4, 2, 5, 3, 6).reshape(heads, *mask.shape[1:])
    logits = torch.bmm(q, k.transpose(1, 2)).reshape(batch, heads, *mask.shape[1:]) + mask
    logits = logits.reshape(-1, *mask.shape[2:])
    out = joined(torch.bmm(logits.softmax(-1), v)).to(query.dtype)
    return out, joined(logits.logsumexp(-1, keepdim=True)).squeeze(-1)
