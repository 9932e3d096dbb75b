"""The public function: checks its arguments. The rest is that of neighborhood attention, whose windows it narrows."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels._checks import check_maps, resolve_backend, resolve_scale
from zoo.kernels.neighborhood.dispatch import attend

BACKENDS = ("auto", "reference", "tiled", "triton")


def circular_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    radius: int,
    *,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token of a 2-D map to the tokens inside a circle around it.

    Token `(y, x)` attends to the tokens `(y', x')` of the map with

        (y' - y) ** 2 + (x' - x) ** 2 < radius ** 2

    strictly, so a radius of 1 is the token alone. What of the circle lies beyond the border is lost: there a query sees
    fewer tokens. With `j` running over the tokens that query `i` sees, then over the extra tokens,

        out[i] = sum_j softmax_j(scale * query[i] . key[j]) * value[j]

    Paper: CLEAR (arXiv:2412.16112). Its text tokens, and the pooled tokens of its down-sampled variant, are extra
    tokens here.

    Args:
        query: [batch, height, width, heads, head_dim], float16, bfloat16, float32 or float64, any strides.
        key: Shape, dtype and device of `query`.
        value: Shape, dtype and device of `query`.
        radius: Radius of the circle in tokens, at least 1. It may exceed the map.
        extra_key: [batch, tokens, heads, head_dim], keys that every query sees, such as text; with `extra_value`.
        extra_value: Shape of `extra_key`.
        scale: Factor of the logits, `head_dim ** -0.5` by default.
        return_lse: Whether to return the log-sum-exp of the logits too, with which results over other keys can be
            merged. It is differentiable.
        backend: "auto" takes the fastest exact one; "reference", "tiled" or "triton" take that one or raise.

    Returns:
        [batch, height, width, heads, head_dim], dtype of `query`; with `return_lse` also the log-sum-exp
        [batch, height, width, heads], float32 or better. Sums are accumulated in float32 or better. A key
        that is not finite reaches only the queries that see it; so does a value, except with "triton", where it may
        reach the rest of their tile. Gradients are of first order; backend="reference" also has higher ones.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or `backend` does not support the call.
    """
    check_maps(query, key, value, extra_key, extra_value)
    height, width = query.shape[1:3]
    if height < 1 or width < 1:
        raise ValueError(f"query must be a map of at least one token, got height {height} and width {width}")
    if isinstance(radius, bool) or not isinstance(radius, int):
        raise TypeError(f"radius must be an int, got {radius!r}")
    if radius < 1:
        raise ValueError(f"radius must be at least 1, got {radius}")
    scale = resolve_scale(scale, query)
    backend = resolve_backend(backend, BACKENDS)

    if radius > height + width:  # either sees the whole map; its square stays small
        radius = height + width
    kernel_size = 2 * radius - 1, 2 * radius - 1
    geometry = kernel_size, (1, 1), (1, 1), (False, False), radius
    return attend((query, key, value, None, extra_key, extra_value), geometry, scale, return_lse, backend)
