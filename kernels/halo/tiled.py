"""Halo attention as batched matrix products: the queries of a block against the keys of its window.

A problem is one block of one head of one image; they are all alike, and worked off in chunks, so memory beyond inputs
and outputs grows with the halo but never with the square of the map. The backward pass recomputes the weights from the
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._softmax import softmax_parts

# Logits held at a time. 2**19 float32 are 2 MiB, about a second-level cache.
CHUNK = 2**19


class _Problems:
    """The tensors of one call laid out problem by problem, and the logits of some of them."""

    def __init__(self, query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale):
        self.batch, height, width, self.heads, _ = key.shape
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.blocks = height // block_size, width // block_size
        self.side, self.win = block_size // stride, block_size + 2 * halo_size
        self.halo, self.scale = halo_size, scale
        self.padded = height + 2 * halo_size, width + 2 * halo_size
        self.query = self.split(query)
        self.key, self.value = self.pad(key), self.pad(value)
        self.tables = None if rel_height is None else [self.aligned(x) for x in (rel_height, rel_width)]
        # Of every window, its tokens in the padded map.
        rows, cols = (
            torch.arange(n, device=key.device)[:, None] * block_size + torch.arange(self.win, device=key.device)
            for n in self.blocks
        )
        tokens = rows[:, None, :, None] * self.padded[1] + cols[None, :, None, :]
        self.windows = tokens.view(self.blocks[0] * self.blocks[1], -1)

    def split(self, x: Tensor) -> Tensor:
        """Queries, or what goes with them, [batch, height, width, heads, dim] -> [problems, side * side, dim]"""
        x = x.to(self.dtype).unflatten(1, (self.blocks[0], self.side)).unflatten(3, (self.blocks[1], self.side))
        return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(-1, self.side**2, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """Inverse of `split`, contiguous."""
        x = x.view(self.batch, self.heads, *self.blocks, self.side, self.side, x.shape[-1])
        return x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2).contiguous()

    def pad(self, x: Tensor) -> Tensor:
        """Keys or values, [batch, height, width, heads, dim] -> [batch * heads * padded tokens, dim]"""
        x = F.pad(x.to(self.dtype).permute(0, 3, 1, 2, 4), (0, 0) + (self.halo,) * 4)
        return x.reshape(-1, x.shape[-1])

    def crop(self, x: Tensor) -> Tensor:
        """Inverse of `pad`, contiguous."""
        x = x.view(self.batch, self.heads, *self.padded, x.shape[-1]).permute(0, 2, 3, 1, 4)
        return x[:, self.halo : self.padded[0] - self.halo, self.halo : self.padded[1] - self.halo].contiguous()

    def aligned(self, table: Tensor) -> Tensor:
        """Rows of a relative table [2 * win - 1, dim] by query and key of one axis, [side, dim, win]"""
        return table.to(self.dtype)[self.win - self.side :].unfold(0, self.win, 1).flip(0)

    def folded(self, d_aligned: Tensor, like: Tensor) -> Tensor:
        """Transpose of `aligned`: gradient of a table."""
        d_table = d_aligned.new_zeros(like.shape)
        for i, d_rows in enumerate(d_aligned):
            d_table[self.win - 1 - i : 2 * self.win - 1 - i] += d_rows.T
        return d_table.to(like.dtype)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some problems at a time, and the rows of `key` and `value` that their windows hold."""
        step = max(1, CHUNK // (self.side * self.win) ** 2)
        blocks, tokens = len(self.windows), self.padded[0] * self.padded[1]
        for first in range(0, len(self.query), step):
            problem = torch.arange(first, min(first + step, len(self.query)), device=self.query.device)
            rows = (problem // blocks * tokens)[:, None] + self.windows[problem % blocks]
            yield slice(first, first + step), rows.flatten()

    def window(self, x: Tensor, rows: Tensor) -> Tensor:
        """[problems of the chunk, win * win, dim]"""
        return x.index_select(0, rows).view(-1, self.win**2, x.shape[-1])

    def by_axis(self, x: Tensor, axis: int) -> Tensor:
        """[n, side * side, dim] -> [side, n * side, dim], one matrix for every row (axis 0) or column of the blocks"""
        x = x.unflatten(1, (self.side, self.side)).movedim(1 + axis, 0)
        return x.reshape(self.side, -1, x.shape[-1])

    def by_block(self, x: Tensor, axis: int) -> Tensor:
        """Inverse of `by_axis`, but for the side by side of its queries: [n, side, side, dim]"""
        return x.view(self.side, -1, self.side, x.shape[-1]).movedim(0, 1 + axis)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """[n, side * side, win * win]"""
        logits = torch.bmm(q, k.transpose(1, 2)).mul_(self.scale)
        if self.tables is not None:
            pairs = logits.view(-1, self.side, self.side, self.win, self.win)
            for axis, table in enumerate(self.tables):
                relative = self.by_block(torch.bmm(self.by_axis(q, axis), table), axis)
                pairs += relative.unsqueeze(4 - axis)
        return logits


def forward(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, [batch, height, width, heads, v_dim] and [batch, height, width, heads], of the queries'
    height and width."""
    p = _Problems(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale)
    out = p.query.new_empty(*p.query.shape[:2], value.shape[-1])
    lse = p.query.new_empty(*p.query.shape[:2], 1)
    for some, rows in p.chunks():
        logits = p.logits(p.query[some], p.window(p.key, rows))
        weights, total, lse[some] = softmax_parts(logits)
        out[some] = torch.bmm(weights, p.window(p.value, rows)).div_(total)
    return p.join(out).to(query.dtype), p.join(lse).squeeze(-1)


def backward(
    grad_out, query, key, value, rel_height, rel_width, out, lse, block_size, halo_size, stride, scale
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rel_height and rel_width (None where there is none)."""
    p = _Problems(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale)
    d_out, lse = p.split(grad_out), p.split(lse.unsqueeze(-1))
    # d logits = weights * (d weights - sum(weights * d weights)), and the sum is out . d out.
    shift = (p.split(out) * d_out).sum(-1, keepdim=True)
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (p.query, p.key, p.value))
    d_tables = None if p.tables is None else [torch.zeros_like(x) for x in p.tables]

    for some, rows in p.chunks():
        q, do = p.query[some], d_out[some]
        k, v = (p.window(x, rows) for x in (p.key, p.value))
        weights = p.logits(q, k).sub_(lse[some]).exp_()
        d_value.index_add_(0, rows, torch.bmm(weights.transpose(1, 2), do).flatten(0, 1))
        d_logits = torch.bmm(do, v.transpose(1, 2)).sub_(shift[some]).mul_(weights)
        d_key.index_add_(0, rows, torch.bmm(d_logits.transpose(1, 2), q).flatten(0, 1), alpha=scale)
        dq = torch.bmm(d_logits, k).mul_(scale)
        if d_tables is not None:
            pairs = d_logits.view(-1, p.side**2, p.win, p.win)
            for axis, table in enumerate(p.tables):
                d_relative = p.by_axis(pairs.sum(3 - axis), axis)
                d_tables[axis] += torch.bmm(p.by_axis(q, axis).transpose(1, 2), d_relative)
                dq += p.by_block(torch.bmm(d_relative, table.transpose(1, 2)), axis).flatten(1, 2)
        d_query[some] = dq

    return (
        p.join(d_query).to(query.dtype),
        p.crop(d_key).to(key.dtype),
        p.crop(d_value).to(value.dtype),
        None if d_tables is None else p.folded(d_tables[0], rel_height),
        None if d_tables is None else p.folded(d_tables[1], rel_width),
    )
