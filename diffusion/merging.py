"""Token merging: similar tokens of a map become one, and are told apart again after the work on them.

The matching is that of `Token Merging for Fast Stable Diffusion` (https://arxiv.org/abs/2303.17604): the map is cut
into cells, one token of each is a destination, and every other token, a source, may merge into the destination that is
most like it. Nothing here is learnt. Results are the same in every run, also on a GPU: no sum depends on the order in
which its threads come.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities that are computed at a time, so that memory does not grow with the square of the number of tokens.
_CHUNK = 1 << 26


class Matching(NamedTuple):
    """Which tokens may merge, and into which: what `match_tokens` found. Indices of tokens count row by row.

    Attributes:
        destinations: [destinations], the tokens that others merge into, in ascending order.
        sources: [batch, sources], all other tokens, those most like their destination first.
        targets: [batch, sources], for every entry of `sources` its place in `destinations`.
    """

    destinations: Tensor
    sources: Tensor
    targets: Tensor


def match_tokens(x: Tensor, size: tuple[int, int], cell: tuple[int, int], draw: Tensor | None = None) -> Matching:
    """Match every token of a map with the destination of largest cosine similarity.

    Rows and columns that are left over where a cell does not divide the map hold sources only. Of equally similar
    destinations the first is taken, and of equally similar sources the first is ranked first.

    Args:
        x: [batch, height * width, channels], the tokens to compare, row by row, any floating dtype.
        size: (height, width) of the map.
        cell: (height, width) of the cells.
        draw: [height // cell height, width // cell width], integers: which token of its cell, row by row, is the
            destination. By default the first.

    Raises:
        ValueError: The tokens are not those of a map of `size`, the cell exceeds it, or `draw` is of another shape.
    """
    (height, width), (rows, cols) = size, cell
    if x.dim() != 3 or x.shape[1] != height * width:
        raise ValueError(f"x must be [batch, {height} * {width} tokens, channels], got shape {tuple(x.shape)}")
    if rows > height or cols > width:
        raise ValueError(f"cell may not exceed the map, got cells of {rows}x{cols} on a map of {height}x{width}")
    cells = height // rows, width // cols
    if draw is not None and tuple(draw.shape) != cells:
        raise ValueError(f"draw must have an entry for each of {cells[0]}x{cells[1]} cells, got {tuple(draw.shape)}")

    first = torch.arange(height * width, device=x.device).view(height, width)
    first = first[: cells[0] * rows : rows, : cells[1] * cols : cols]
    chosen = (first if draw is None else first + draw // cols * width + draw % cols).flatten()
    is_source = torch.ones(height * width, dtype=torch.uint8, device=x.device).scatter(0, chosen, 0)
    destinations, sources = is_source.argsort(stable=True).tensor_split([chosen.numel()])

    x = x.detach()  # an order has no gradient
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(x.dtype)  # a token of zeros is like no other
    keys = x[:, destinations].transpose(1, 2)
    chunk = max(1, _CHUNK // max(1, x.shape[0] * chosen.numel()))
    best = [(x[:, part] @ keys).max(-1) for part in sources.split(chunk)]
    similarity, targets = (torch.cat(parts, 1) for parts in zip(*best))
    rank = similarity.argsort(dim=1, descending=True, stable=True)
    return Matching(destinations, sources[rank], targets.gather(1, rank))


def merge_tokens(x: Tensor, matching: Matching, count: int) -> Tensor:
    """Merge the `count` best matched sources into their destinations, each the mean of itself and what it takes up.

    Args:
        x: [batch, tokens, channels].
        matching: Of those tokens, or of others in the same places.
        count: How many sources to merge, at most all of them.

    Returns:
        [batch, tokens - count, channels]: the other sources, ranked as in `matching`, then the destinations.
    """
    batch, length, channels = x.shape
    destinations, sources, targets = matching
    bags = torch.arange(destinations.numel(), device=x.device).expand(batch, -1)
    sample = torch.arange(batch, device=x.device)[:, None]

    # The tokens of one mean side by side: unlike atomic additions, such sums are the same in every run.
    bag, order = torch.cat([bags, targets[:, :count]], 1).sort(dim=1, stable=True)
    members = torch.cat([destinations.expand(batch, -1), sources[:, :count]], 1).gather(1, order)
    starts = torch.searchsorted(bag, bags.contiguous())
    merged = F.embedding_bag(
        (members + sample * length).flatten(),
        x.reshape(-1, channels),
        (starts + sample * members.shape[1]).flatten(),
        mode="mean",
    )
    return torch.cat([_take(x, sources[:, count:]), merged.view(batch, -1, channels)], 1)


def unmerge_tokens(x: Tensor, matching: Matching, count: int) -> Tensor:
    """Undo `merge_tokens`: every token that was merged gets what its destination has.

    Args:
        x: [batch, tokens - count, channels], laid out as `merge_tokens` returns it.
        matching: As given to `merge_tokens`.
        count: As given to `merge_tokens`.

    Returns:
        [batch, tokens, channels], in the places of the map.
    """
    destinations, sources, targets = matching
    batch, kept = x.shape[0], sources.shape[1] - count
    place = torch.arange(x.shape[1], device=x.device).expand(batch, -1)
    tokens = torch.cat([sources, destinations.expand(batch, -1)], 1)
    places = torch.cat([kept + targets[:, :count], place], 1)
    return _take(x, torch.empty_like(tokens).scatter(1, tokens, places))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens [batch, tokens] of `x`."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
