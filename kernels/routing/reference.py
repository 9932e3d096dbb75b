"""The meaning of bi-level routing attention: gather each region's chosen regions, then softmax. Slow; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.routing import regions


def routing_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_size: tuple[int, int],
    topk: int,
    scale: float,
    soft: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `zoo.kernels.routing_attention_2d`.

    `dtype` is that of the second level's arithmetic, at least float32 by default; the first level's always is.
    """
    _, height, width, _, _ = query.shape
    dtype = dtype or torch.promote_types(query.dtype, torch.float32)
    affinity = regions.affinities(regions.means(query, region_size), regions.means(key, region_size), scale)
    routes = regions.choose(affinity, topk)

    q, k, v = (regions.split(x.to(dtype), region_size) for x in (query, key, value))
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    k, v = k[batch, routes], v[batch, routes]  # [batch, regions, topk, tokens of a region, heads, head_dim]
    if soft:
        weights = regions.weigh(affinity, routes).to(dtype)[..., None, None, None]
        k, v = weights * k, weights * v
    logits = scale * torch.einsum("brqnd,brknd->brnqk", q, k.flatten(2, 3))
    out = torch.einsum("brnqk,brknd->brqnd", logits.softmax(-1), v.flatten(2, 3))
    return regions.join(out, height, width, region_size).to(query.dtype)
