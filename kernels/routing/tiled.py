"""The second level of bi-level routing attention as batched matrix products: regions against those that they chose.

Work goes in chunks of regions, and of queries where one region fills a chunk by itself, so memory beyond inputs and
outputs does not grow with the map. The backward pass recomputes the weights from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.kernels._softmax import softmax_parts
from zoo.kernels.routing import regions

# Logits, or numbers gathered from the keys, held at a time. 2**19 float32 are 2 MiB, about a second-level cache.
CHUNK = 2**19


class _Problem:
    """The tensors of one call, as [batch * heads * regions, tokens of a region, dim], and one piece of work on them."""

    def __init__(self, query, key, value, routes, weights, region_size, scale):
        self.batch, self.height, self.width, self.heads, self.dim = query.shape
        self.region_size, self.scale = region_size, scale
        self.tokens = region_size[0] * region_size[1]
        self.regions, self.topk = routes.shape[1:]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = self.by_region(query) * scale, self.by_region(key), self.by_region(value)

        first = torch.arange(self.batch * self.heads, device=routes.device) * self.regions
        self.chosen = self.per_head(routes) + first.repeat_interleave(self.regions)[:, None]  # rows of key and value
        self.weights = None if weights is None else self.per_head(weights)

    def by_region(self, x: Tensor) -> Tensor:
        """[batch, height, width, heads, n] -> [batch * heads * regions, tokens of a region, n], contiguous."""
        x = regions.split(x.to(self.dtype), self.region_size).permute(0, 3, 1, 2, 4)
        return x.flatten(0, 2).contiguous()

    def by_token(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of `by_region`, contiguous."""
        x = x.view(self.batch, self.heads, self.regions, self.tokens, x.shape[-1]).permute(0, 2, 3, 1, 4)
        return regions.join(x, self.height, self.width, self.region_size).to(dtype).contiguous()

    def per_head(self, x: Tensor) -> Tensor:
        """[batch, regions, topk] -> [batch * heads * regions, topk]."""
        return x.repeat_interleave(self.heads, 0).flatten(0, 1)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of regions and the queries in them, of at most `CHUNK` logits where possible."""
        keys = self.topk * self.tokens
        query_step = max(1, min(self.tokens, CHUNK // keys))
        row_step = max(1, CHUNK // (keys * max(query_step, self.dim)))
        for row in range(0, self.query.shape[0], row_step):
            for first in range(0, self.tokens, query_step):
                yield slice(row, row + row_step), slice(first, first + query_step)

    def gather(self, x: Tensor, rows: slice) -> Tensor:
        """Keys or values that `rows` see, [rows, topk * tokens of a region, dim]."""
        chosen = self.chosen[rows]
        return x.index_select(0, chosen.flatten()).view(-1, self.topk * self.tokens, self.dim)

    def weigh(self, x: Tensor, rows: slice) -> Tensor:
        """[rows, queries, topk * tokens of a region], times the weight of each key's region."""
        if self.weights is None:
            return x
        return x * self.weights[rows].repeat_interleave(self.tokens, 1).unsqueeze(1)


def forward(query, key, value, routes, weights, region_size, scale) -> tuple[Tensor, Tensor]:
    """Output like `query` and log-sum-exp [batch, height, width, heads]; without `weights` routing is hard."""
    p = _Problem(query, key, value, routes, weights, region_size, scale)
    out = torch.empty_like(p.query)
    lse = p.query.new_empty(*p.query.shape[:2], 1)
    for rows, queries in p.chunks():
        logits = torch.bmm(p.query[rows, queries], p.gather(p.key, rows).transpose(1, 2))
        logits = p.weigh(logits, rows)
        shares, total, lse[rows, queries] = softmax_parts(logits)
        out[rows, queries] = torch.bmm(p.weigh(shares, rows), p.gather(p.value, rows)).div_(total)
    return p.by_token(out, query.dtype), p.by_token(lse, p.dtype).squeeze(-1)


def backward(
    grad_out, query, key, value, routes, weights, out, lse, region_size, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and weights."""
    p = _Problem(query, key, value, routes, weights, region_size, scale)
    d_out, lse = p.by_region(grad_out), p.by_region(lse.unsqueeze(-1))
    # d logits = shares * (d shares - sum(shares * d shares)), and the sum is out . d out.
    shift = p.by_region((out.to(p.dtype) * grad_out.to(p.dtype)).sum(-1, keepdim=True))
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (p.query, p.key, p.value))
    d_weights = None if weights is None else torch.zeros_like(p.weights)

    for rows, queries in p.chunks():
        q, do, k, v = p.query[rows, queries], d_out[rows, queries], p.gather(p.key, rows), p.gather(p.value, rows)
        products = torch.bmm(q, k.transpose(1, 2))
        shares = (p.weigh(products, rows) - lse[rows, queries]).exp_()
        d_shares = torch.bmm(do, v.transpose(1, 2))
        d_logits = (p.weigh(d_shares, rows) - shift[rows, queries]).mul_(shares)
        if d_weights is not None:
            terms = (d_logits * products).add_(shares * d_shares)
            d_weights[rows] += terms.sum(1).unflatten(1, (p.topk, p.tokens)).sum(-1)
        d_logits, shares = p.weigh(d_logits, rows), p.weigh(shares, rows)

        d_query[rows, queries] = torch.bmm(d_logits, k)
        chosen, seen = p.chosen[rows].flatten(), (-1, p.tokens, p.dim)
        d_key.index_add_(0, chosen, torch.bmm(d_logits.transpose(1, 2), q).view(seen))
        d_value.index_add_(0, chosen, torch.bmm(shares.transpose(1, 2), do).view(seen))

    d_query *= scale
    if d_weights is not None:
        d_weights = d_weights.view(p.batch, p.heads, p.regions, p.topk).sum(1)
    return *(p.by_token(d, query.dtype) for d in (d_query, d_key, d_value)), d_weights
