"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels._checks import check_maps, positive_pair, resolve_backend, resolve_scale
from zoo.kernels.neighborhood.ops import takes_triton, why_not_triton
from zoo.kernels.routing import ops, reference, regions

BACKENDS = ("auto", "reference", "tiled", "triton")


def routing_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_size: int | tuple[int, int],
    topk: int,
    *,
    soft: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token of a 2-D map to the tokens of the regions that its own region chooses.

    The map is cut into regions of `region_size` tokens from its top left corner; those at the bottom and the right are
    filled up with zeros where the map ends. With `mean` over the tokens of a region that are in the map, taken over
    all heads at once,

        affinity[r, s] = scale * mean(query[r]) . mean(key[s])
        chosen[r] = the topk regions s of largest affinity[r, s], ties by number, row by row
        out[i] = sum_j softmax_j(scale * query[i] . key[j]) * value[j]

    where `i` is a token of region `r`, and `j` runs over all tokens of the regions in `chosen[r]`, the filling
    included: a zero key and a zero value. No gradient passes through the choice. With `soft`, keys and values of `s`
    are multiplied by softmax(affinity[r, s]) over the chosen regions, and the gradient passes through these weights.

    For a fixed number of regions instead, pad the map to a multiple of it and divide.

    Paper: BiFormer, Vision Transformer with Bi-Level Routing Attention (arXiv:2303.08810).

    Args:
        query: [batch, height, width, heads, head_dim], float16, bfloat16, float32 or float64, any strides.
        key: Shape, dtype and device of `query`.
        value: Shape, dtype and device of `query`.
        region_size: Tokens of a region, per axis (height, width) or one for both; it need not divide the map.
        topk: Number of regions that each region chooses, at most all.
        soft: Whether to weigh the chosen regions.
        scale: Factor of the logits and of the affinities, `head_dim ** -0.5` by default.
        backend: "auto" takes the fastest exact one; "reference", "tiled" or "triton" take that one or raise.

    Returns:
        [batch, height, width, heads, head_dim], dtype of `query`. Affinities and sums are computed in float32 or
        better. A value that is not finite reaches only regions that chose its region; a query or a key that is not
        finite changes the choice itself. Gradients are of first order; backend="reference" also has higher ones.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or `backend` does not support the call.
    """
    check_maps(query, key, value)
    region_size = positive_pair("region_size", region_size)
    if not isinstance(topk, int) or isinstance(topk, bool):
        raise TypeError(f"topk must be an int, got {topk!r}")
    rows, cols = regions.grid(query.shape[1], query.shape[2], region_size)
    if not 1 <= topk <= rows * cols:
        raise ValueError(f"topk must be from 1 to the number of regions, {rows} * {cols} = {rows * cols}, got {topk}")
    if not isinstance(soft, bool):
        raise TypeError(f"soft must be a bool, got {soft!r}")
    scale = resolve_scale(scale, query)
    backend = resolve_backend(backend, BACKENDS)

    options = region_size, topk, scale, soft
    if backend == "reference":
        return reference.routing_attention_2d(query, key, value, *options)
    if backend == "triton" and (obstacle := why_not_triton(query)) is not None:
        raise ValueError(f"backend='triton' {obstacle}")
    fused = takes_triton(query, backend)
    return ops.routing_attention_2d(query, key, value, *options, "triton" if fused else "tiled")[0]
