"""A map cut into regions, and the first level of bi-level routing attention: which regions attend to which.

Regions are numbered row by row, and so are the tokens of a region. Where the region size does not divide the map, the
regions at the bottom and the right are filled up with zeros. Every backend uses these functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import _cells


def grid(height: int, width: int, region_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of regions."""
    return -(-height // region_size[0]), -(-width // region_size[1])


def _regions(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """[batch, height, width, ...] -> [batch, rows of regions, columns of regions, height of one, width of one, ...]."""
    height, width = x.shape[1], x.shape[2]
    rows, cols = grid(height, width, region_size)
    bottom, right = rows * region_size[0] - height, cols * region_size[1] - width
    if bottom or right:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, right, 0, bottom))
    return _cells.cut(x, (rows, region_size[0]), (cols, region_size[1]))


def split(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """[batch, height, width, ...] -> [batch, regions, tokens of a region, ...]."""
    return _regions(x, region_size).flatten(3, 4).flatten(1, 2)


def join(x: Tensor, height: int, width: int, region_size: tuple[int, int]) -> Tensor:
    """Inverse of `split`: [batch, regions, tokens of a region, ...] -> [batch, height, width, ...]."""
    x = x.unflatten(2, region_size).unflatten(1, grid(height, width, region_size))
    return _cells.join(x)[:, :height, :width]


def _divides(region_size: tuple[int, int], height: int, width: int) -> bool:
    """Whether every region is full."""
    return height % region_size[0] == 0 and width % region_size[1] == 0


def _tokens(height: int, width: int, region_size: tuple[int, int], like: Tensor) -> int | Tensor:
    """How many tokens of the map a region holds: one number if all hold as many, else [regions, 1]."""
    if _divides(region_size, height, width):
        return region_size[0] * region_size[1]
    return _regions(like.new_ones(1, height, width), region_size).sum((3, 4)).view(-1, 1)


def means(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """[batch, height, width, heads, dim] -> [batch, regions, heads * dim], float32 or better, without the filling."""
    pieces, dtype = _regions(x, region_size), torch.promote_types(x.dtype, torch.float32)
    if _divides(region_size, x.shape[1], x.shape[2]):
        return pieces.mean((3, 4), dtype=dtype).flatten(3).flatten(1, 2)
    total = pieces.sum((3, 4), dtype=dtype).flatten(3).flatten(1, 2)
    return total / _tokens(x.shape[1], x.shape[2], region_size, total)


def means_backward(grad: Tensor, like: Tensor, region_size: tuple[int, int]) -> Tensor:
    """Gradient of `means`' argument, of the shape of `like`, in the dtype of `grad`."""
    _, height, width, heads, dim = like.shape
    grad = grad / _tokens(height, width, region_size, grad)
    tokens = grad.unflatten(2, (heads, dim)).unsqueeze(2).expand(-1, -1, region_size[0] * region_size[1], -1, -1)
    return join(tokens, height, width, region_size)


def affinities(query_means: Tensor, key_means: Tensor, scale: float) -> Tensor:
    """[batch, regions of queries, regions of keys]."""
    return (query_means * scale) @ key_means.transpose(1, 2)


def choose(affinity: Tensor, topk: int) -> Tensor:
    """Numbers of the regions of the largest affinity, largest first, ties in order: [batch, regions, topk]."""
    # ONNX has no stable sort; ties are in order in its own operator. (To torch 2.11 compiling is exporting, too.)
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return affinity.topk(topk, dim=-1).indices
    return affinity.sort(dim=-1, descending=True, stable=True).indices[..., :topk].contiguous()


def weigh(affinity: Tensor, routes: Tensor) -> Tensor:
    """Softmax of the affinities over the chosen regions, [batch, regions, topk]."""
    return affinity.gather(-1, routes).softmax(-1)


def weigh_backward(
    d_weights: Tensor, weights: Tensor, routes: Tensor, query_means: Tensor, key_means: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of both means through `weigh` of their `affinities`."""
    d_chosen = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    regions = routes.shape[1]
    d_affinity = d_chosen.new_zeros(routes.shape[0], regions, regions).scatter(-1, routes, d_chosen) * scale
    return d_affinity @ key_means, d_affinity.transpose(1, 2) @ query_means
