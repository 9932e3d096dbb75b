"""Neighborhood and circular attention as batched matrix products: tiles of queries against the union of their windows.

Tiles that see their keys in the same pattern form one group; a map has few (the borders, the interior, the remainder),
however large it is. Groups are worked off in chunks, so memory beyond inputs and outputs does not grow with the map,
and the backward pass recomputes the weights from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels._softmax import softmax_parts
from zoo.kernels.neighborhood.window import borders, class_length, window_end, window_start

# Of 4, 6, 8 and 10 the fastest for windows of 3 to 13 on two CPU cores: larger tiles waste more products on keys that
# a query does not see.
TILE = 4
# Logits held at a time. 2**19 float32 are 2 MiB, about a second-level cache.
CHUNK = 2**19


class AxisTiles(NamedTuple):
    """Tiles of one axis with the same pattern: each runs from its own first query and key in the same steps."""

    first_queries: Tensor  # [tiles]
    first_keys: Tensor  # [tiles]
    query_steps: Tensor  # [q]
    key_steps: Tensor  # [k]
    offsets: Tensor  # [q, k], members from query to key
    visible: Tensor  # [q, k]


class Tiles(NamedTuple):
    """Tiles of the map with the same pattern; tokens are numbered row by row."""

    first_queries: Tensor  # [tiles]
    first_keys: Tensor  # [tiles]
    query_steps: Tensor  # [q]
    key_steps: Tensor  # [k]
    offsets: Tensor | None  # [q * k], into the flattened bias table; None for circles, which have no bias
    hidden: Tensor | None  # [q, k], None where every query sees every key


def axis_tiles(length: int, kernel_size: int, dilation: int, stride: int, border: int) -> list[AxisTiles]:
    """Cut one axis into tiles of consecutive members of one residue class, grouped by pattern."""
    patterns: dict[tuple, list[tuple[int, int]]] = {}
    for residue in range(min(dilation, length)):
        members = class_length(length, dilation, residue)
        size = -(-members // -(-members // TILE))  # as even as possible
        for first in range(0, members, size):
            queries = range(first, min(first + size, members))
            starts = [window_start(q, members, kernel_size, stride, border) for q in queries]
            ends = [window_end(q, members, kernel_size, stride, border) for q in queries]
            first_key, end_key = min(starts), max(ends)
            windows = ((s - first, e - first) for s, e in zip(starts, ends))
            firsts = residue + dilation * first, residue + dilation * first_key
            patterns.setdefault((first_key - first, end_key - first, *windows), []).append(firsts)

    groups = []
    for (first_key, end_key, *windows), firsts in patterns.items():
        queries, keys = torch.arange(len(windows), device="cpu"), torch.arange(first_key, end_key, device="cpu")
        starts, ends = (torch.tensor(x, device="cpu")[:, None] for x in zip(*windows))
        visible = (starts <= keys) & (keys < ends)
        first_queries, first_keys = (torch.tensor(x, device="cpu") for x in zip(*firsts))
        steps = dilation * queries, dilation * (keys - first_key)
        groups.append(AxisTiles(first_queries, first_keys, *steps, keys - queries[:, None], visible))
    return groups


def map_tiles(height, width, kernel_size, dilation, stride, is_causal, radius, device) -> Iterator[Tiles]:
    """All groups of tiles of a map."""

    def tokens(rows: Tensor, cols: Tensor) -> Tensor:
        """Every row with every column, as token numbers [rows * columns]."""
        return (rows[:, None] * width + cols).flatten()

    def pattern(rows: Tensor, cols: Tensor) -> Tensor:
        """[row queries * column queries, row keys * column keys]."""
        return (rows[:, None, :, None] + cols[None, :, None, :]).flatten(2).flatten(0, 1)

    border = borders(is_causal, radius)
    for r, c in product(
        axis_tiles(height, kernel_size[0], dilation[0], stride[0], border[0]),
        axis_tiles(width, kernel_size[1], dilation[1], stride[1], border[1]),
    ):
        first_queries, first_keys, query_steps, key_steps = map(tokens, r[:4], c[:4])
        if radius > 0:
            offsets = None
            hidden = pattern(r.offsets**2, c.offsets**2) >= radius**2
            seen = ~hidden.all(dim=0)  # not the corners of the square
            key_steps, hidden = key_steps[seen], hidden[:, seen]
        else:
            # Any entry of the table does for pairs that are hidden.
            rows, cols = ((axis.offsets + k - 1) * axis.visible for axis, k in zip((r, c), kernel_size))
            offsets = pattern(rows * (2 * kernel_size[1] - 1), cols).flatten()
            hidden = pattern(~r.visible, ~c.visible)
        tensors = first_queries, first_keys, query_steps, key_steps, offsets, hidden if hidden.any() else None
        yield Tiles(*(None if x is None else x.to(device) for x in tensors))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _kept_map_tiles(*geometry_and_device) -> list[Tiles]:
    return list(map_tiles(*geometry_and_device))


def _chunks(groups: Iterable[Tiles], batch: int, heads: int, extra: int) -> Iterator[tuple[Tiles, slice, slice]]:
    """Pieces of work of at most `CHUNK` logits where possible: a group, its tiles, and rows of batch * heads."""
    for group in groups:
        tiles = len(group.first_queries)
        logits = heads * len(group.query_steps) * (len(group.key_steps) + extra)
        tile_step = min(tiles, max(1, CHUNK // logits))
        batch_step = max(1, CHUNK // (logits * tile_step))
        for b in range(0, batch, batch_step):
            for t in range(0, tiles, tile_step):
                yield group, slice(t, t + tile_step), slice(b * heads, min(b + batch_step, batch) * heads)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, ..., heads, dim] -> contiguous [batch * heads, tokens, dim]."""
    return x.to(dtype).flatten(1, -3).transpose(1, 2).flatten(0, 1).contiguous()


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_heads_first`, contiguous, in the shape and dtype of `like`."""
    x = x.view(like.shape[0], like.shape[-2], *x.shape[1:]).transpose(1, 2).to(like.dtype)
    return x.contiguous().view(like.shape)


def _rows(firsts: Tensor, steps: Tensor, batch_heads: int, tokens: int) -> Tensor:
    """Tokens of tiles, for every batch and head, as rows of a flattened [batch_heads * tokens, ...] tensor."""
    firsts = torch.arange(batch_heads, device=firsts.device)[:, None] * tokens + firsts
    return (firsts[:, :, None] + steps).flatten()


class _Problem:
    """The tensors of one call, heads first, and the logits of one piece of work."""

    def __init__(self, query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale):
        self.batch, height, width, self.heads, self.dim = query.shape
        self.tokens = height * width
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.scale = scale
        self.query = _heads_first(query, self.dtype) * scale
        self.key, self.value = _heads_first(key, self.dtype), _heads_first(value, self.dtype)
        # 0 * nan would reach every query of a tile. Moved into the key, a nan stays with the queries that see it.
        most, least = self.value.amax(dim=-1, keepdim=True), self.value.amin(dim=-1, keepdim=True)
        self.key = self.key + (most * 0 + least * 0)  # 0, or nan for what is not finite
        self.value = self.value.nan_to_num(0.0, 0.0, 0.0)
        self.bias = None if rel_pos_bias is None else rel_pos_bias.to(self.dtype).flatten(1)
        self.extra_key = self.extra_value = None
        if extra_key is not None:
            self.extra_key, self.extra_value = (_heads_first(x, self.dtype) for x in (extra_key, extra_value))
        # The groups of a wide circle are too many and too large to keep, and quickly made next to their products.
        tiles = map_tiles if geometry[-1] > 0 else _kept_map_tiles
        self.groups = tiles(height, width, *geometry, query.device)

    def chunks(self):
        extra = 0 if self.extra_key is None else self.extra_key.shape[1]
        return _chunks(self.groups, self.batch, self.heads, extra)

    def gather(self, x: Tensor, rows: Tensor, batch_heads: slice, tile_size: int) -> Tensor:
        """Rows of `x` [batch * heads, tokens, dim] -> [rows of batch * heads * tiles, tile_size, dim]."""
        return x[batch_heads].flatten(0, 1).index_select(0, rows).unflatten(0, (-1, tile_size))

    def logits(self, q: Tensor, k: Tensor, group: Tiles, batch_heads: slice) -> Tensor:
        """[batch * heads * tiles, q, keys, then extra tokens]."""
        logits = torch.bmm(q, k.transpose(1, 2))
        per_head = logits.unflatten(0, (-1, self.heads, logits.shape[0] // (batch_heads.stop - batch_heads.start)))
        if self.bias is not None:
            bias = self.bias.index_select(1, group.offsets).view(self.heads, 1, *logits.shape[1:])
            per_head += bias
        if group.hidden is not None:
            logits.masked_fill_(group.hidden, float("-inf"))
        if self.extra_key is not None:
            extra = self.extra(q, batch_heads) @ self.extra_key[batch_heads].transpose(1, 2)
            logits = torch.cat([logits, extra.view(*logits.shape[:2], extra.shape[-1])], dim=-1)
        return logits

    def extra(self, x: Tensor, batch_heads: slice) -> Tensor:
        """[batch * heads * tiles, q, n] -> [batch * heads, tiles * q, n], to meet the extra tokens."""
        count = batch_heads.stop - batch_heads.start
        return x.reshape(count, x.shape[0] * x.shape[1] // count, x.shape[-1])  # -1 cannot be told where n is 0


def forward(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale) -> tuple[Tensor, Tensor]:
    """Output like `query` and log-sum-exp [batch, height, width, heads]; `geometry` is kernel size to radius."""
    p = _Problem(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale)
    out = torch.empty_like(p.query)
    lse = p.query.new_empty(*p.query.shape[:2], 1)
    for group, tiles, bh in p.chunks():
        rows = bh.stop - bh.start
        q_rows = _rows(group.first_queries[tiles], group.query_steps, rows, p.tokens)
        k_rows = _rows(group.first_keys[tiles], group.key_steps, rows, p.tokens)
        q_size, k_size = len(group.query_steps), len(group.key_steps)
        q = p.gather(p.query, q_rows, bh, q_size)
        logits = p.logits(q, p.gather(p.key, k_rows, bh, k_size), group, bh)
        weights, total, lse_tile = softmax_parts(logits)
        tile = torch.bmm(weights[..., :k_size], p.gather(p.value, k_rows, bh, k_size))
        if extra_value is not None:
            tile += (p.extra(weights[..., k_size:], bh) @ p.extra_value[bh]).view_as(tile)
        out[bh].flatten(0, 1).index_copy_(0, q_rows, tile.div_(total).flatten(0, 1))
        lse[bh].flatten(0, 1).index_copy_(0, q_rows, lse_tile.flatten(0, 1))
    return _heads_last(out, query), _heads_last(lse, query[..., :1].to(p.dtype)).squeeze(-1)


def backward(
    grad_out, grad_lse, query, key, value, rel_pos_bias, extra_key, extra_value, out, lse, geometry, scale, packed=False
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rel_pos_bias, extra_key and extra_value (None where there is none).

    If packed, the first is that of all three, [batch, height, width, 3, heads, dim].
    """
    p = _Problem(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale)
    d_out = _heads_first(grad_out, p.dtype)
    # d logits = weights * (d weights - sum(weights * d weights)); the sum is out . d out, and lse adds its gradient.
    shift = (out.to(p.dtype) * grad_out.to(p.dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift = shift - grad_lse.to(p.dtype).unsqueeze(-1)
    shift, lse = _heads_first(shift, p.dtype), _heads_first(lse.unsqueeze(-1), p.dtype)
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (p.query, p.key, p.value))
    d_bias = None if p.bias is None else torch.zeros_like(p.bias)
    d_extra_key = d_extra_value = None
    if extra_key is not None:
        d_extra_key, d_extra_value = torch.zeros_like(p.extra_key), torch.zeros_like(p.extra_value)

    for group, tiles, bh in p.chunks():
        rows = bh.stop - bh.start
        q_rows = _rows(group.first_queries[tiles], group.query_steps, rows, p.tokens)
        k_rows = _rows(group.first_keys[tiles], group.key_steps, rows, p.tokens)
        q_size, k_size = len(group.query_steps), len(group.key_steps)
        q, do, row_lse, row_shift = (p.gather(x, q_rows, bh, q_size) for x in (p.query, d_out, lse, shift))
        k, v = (p.gather(x, k_rows, bh, k_size) for x in (p.key, p.value))
        weights = p.logits(q, k, group, bh).sub_(row_lse).exp_()
        d_weights = torch.bmm(do, v.transpose(1, 2))
        if extra_key is not None:
            extra = p.extra(do, bh) @ p.extra_value[bh].transpose(1, 2)
            d_weights = torch.cat([d_weights, extra.view(*d_weights.shape[:2], extra.shape[-1])], dim=-1)
        d_logits = d_weights.sub_(row_shift).mul_(weights)

        window, d_window = weights[..., :k_size], d_logits[..., :k_size]
        dq = torch.bmm(d_window, k)
        d_key[bh].flatten(0, 1).index_add_(0, k_rows, torch.bmm(d_window.transpose(1, 2), q).flatten(0, 1))
        d_value[bh].flatten(0, 1).index_add_(0, k_rows, torch.bmm(window.transpose(1, 2), do).flatten(0, 1))
        if d_bias is not None:
            per_head = d_window.unflatten(0, (-1, p.heads, d_window.shape[0] // rows)).sum((0, 2))
            d_bias.index_add_(1, group.offsets, per_head.flatten(1))
        if extra_key is not None:
            d_extra = p.extra(d_logits[..., k_size:], bh)
            dq += (d_extra @ p.extra_key[bh]).view_as(dq)
            d_extra_key[bh] += d_extra.transpose(1, 2) @ p.extra(q, bh)
            d_extra_value[bh] += p.extra(weights[..., k_size:], bh).transpose(1, 2) @ p.extra(do, bh)
        d_query[bh].flatten(0, 1).index_copy_(0, q_rows, dq.flatten(0, 1))

    grads = _heads_last(d_query * scale, query), _heads_last(d_key, key), _heads_last(d_value, value)
    return (
        *((torch.stack(grads, 3), None, None) if packed else grads),
        None if d_bias is None else d_bias.view(rel_pos_bias.shape).to(rel_pos_bias.dtype),
        None if extra_key is None else _heads_last(d_extra_key, extra_key),
        None if extra_key is None else _heads_last(d_extra_value, extra_value),
    )
