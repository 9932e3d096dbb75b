"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels._checks import (
    check_bias,
    check_map,
    check_tensors,
    pair,
    positive_pair,
    resolve_backend,
    resolve_scale,
)
from zoo.kernels._symbols import is_symbol
from zoo.kernels.window import fused, reference, tiled

BACKENDS = ("auto", "reference", "tiled", "triton")


def window_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    *,
    rel_pos_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention within the windows of a grid laid over a 2-D map.

    The grid starts at the token `shift`. Windows are `window_size` tokens high and wide; those at the borders are cut
    there if the grid is shifted. With `j` running over the tokens of the window of token `i`,

        out[i] = sum_j softmax_j(scale * query[i] . key[j] + rel_pos_bias[i, j]) * value[j]

    where the bias of key `(y', x')` for query `(y, x)` is `rel_pos_bias[head, y' - y + window_size[0] - 1,
    x' - x + window_size[1] - 1]`. A query of the size of one window is that of every window of its image.

    Papers: Swin (arXiv:2103.14030), queries shared by all windows: GC ViT (arXiv:2206.09959).

    Args:
        query: [batch, height, width, heads, head_dim], or [batch, *window_size, heads, head_dim] for one query shared
            by all windows of an image; float16, bfloat16, float32 or float64, any strides.
        key: [batch, height, width, heads, head_dim], dtype and device of `query`. Height and width are multiples of
            `window_size`.
        value: [batch, height, width, heads, value_dim], dtype and device of `query`.
        window_size: Tokens of a window, per axis (height, width) or one number for both.
        shift: Tokens by which the grid is moved down and right, less than `window_size`; 0 for a shared query. What
            Swin obtains with a cyclic shift and a mask.
        rel_pos_bias: Bias table [heads, 2 * window_size[0] - 1, 2 * window_size[1] - 1], any floating dtype.
        scale: Factor of the logits, `head_dim ** -0.5` by default.
        backend: "auto" takes the fastest exact one; "reference", "tiled" or "triton" take that one or raise.

    Returns:
        [batch, height, width, heads, value_dim], dtype of `query`. A key or value that is not finite may reach every
        query of its window, and with `shift` those at the opposite border. Gradients are of first order;
        backend="reference" also has higher ones.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or `backend` does not support the call.
    """
    check_tensors(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_map(name, x)
    window_size, shift = positive_pair("window_size", window_size), pair("shift", shift, int)
    _check_geometry(query, key, value, window_size, shift)
    if rel_pos_bias is not None:
        shape = key.shape[3], 2 * window_size[0] - 1, 2 * window_size[1] - 1
        check_bias("rel_pos_bias", rel_pos_bias, query, shape, "[heads, 2 * window_size - 1 per axis]")
    scale = resolve_scale(scale, query)
    backend = resolve_backend(backend, BACKENDS)

    options = window_size, shift, rel_pos_bias, scale
    if backend == "triton" and (obstacle := fused.why_not_triton(key, value, shift)) is not None:
        raise ValueError(f"backend='triton' {obstacle}")
    if backend == "triton" or (backend == "auto" and _takes_triton(key, value, window_size, shift)):
        return fused.window_attention_2d(query, key, value, window_size, rel_pos_bias, scale)
    # On an empty batch scaled_dot_product_attention drops its mask from the graph, and the bias its gradient.
    module = reference if backend == "reference" or key.shape[0] == 0 else tiled
    images = _images_at_once(key, window_size)
    if key.shape[0] <= images:
        return module.window_attention_2d(query, key, value, *options)
    chunks = zip(*(x.split(images) for x in (query, key, value)), strict=True)
    return torch.cat([module.window_attention_2d(*chunk, *options) for chunk in chunks])


def _takes_triton(key: Tensor, value: Tensor, window_size: tuple[int, int], shift: tuple[int, int]) -> bool:
    """Whether the fused kernels are faster: for small windows, in half precision.

    On an H200 windows of 7 x 7 of 128 maps of 56 x 56, 2 heads of 32, take 0.4 ms forward and 1.1 to 1.3 with the
    gradients where torch's attention takes 1.2 and 1.7; below each other, 0.13 and 0.94 where it takes 0.86 and 1.2.
    Windows of 14 x 14 of as many maps of that size, 8 heads, take 0.11 and 0.48 of the GPU's time where torch's takes
    0.19 and 0.74. With gradients, calls on smaller maps are bound by the host, and either may win.
    """
    if not key.is_cuda or any(map(is_symbol, (*key.shape[1:3], *window_size))):
        return False
    if torch.jit.is_tracing():  # which knows no operators with lists of bool
        return False
    fits = max(window_size) <= (14 if key.shape[-1] <= 32 else 8) and key.shape[-1] <= 128 and key.element_size() <= 2
    return fits and fused.why_not_triton(key, value, shift) is None


def _images_at_once(key: Tensor, window_size: tuple[int, int]) -> int:
    """On CUDA, what keeps `batch * windows` and `batch * heads` below 2**16.

    Beyond, torch's fused kernels do not start, or miss the gradient of a bias.
    """
    if not key.is_cuda:
        return key.shape[0]
    windows = (key.shape[1] // window_size[0]) * (key.shape[2] // window_size[1])
    return max(1, (2**16 - 1) // max(windows, key.shape[3]))


def _check_geometry(query: Tensor, key: Tensor, value: Tensor, window_size, shift) -> None:
    if value.shape[:4] != key.shape[:4]:
        raise ValueError(
            f"value must have the shape of key but for head_dim, {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if min(shift) < 0 or shift[0] >= window_size[0] or shift[1] >= window_size[1]:
        raise ValueError(f"shift must be at least 0 and less than window_size {window_size} on each axis, got {shift}")
    for axis, length, window in zip(("height", "width"), key.shape[1:3], window_size, strict=True):
        if length % window:
            raise ValueError(
                f"the map must be a multiple of window_size: along the {axis} {length} is none of {window}; "
                f"pad it to {-(-length // window) * window}"
            )
    if tiled.is_shared(query, key) or query.shape != key.shape:
        window_shape = (key.shape[0], *window_size, *key.shape[3:])
        if tuple(query.shape) != window_shape:
            raise ValueError(
                f"query must have the shape of key, {tuple(key.shape)}, or of one window, {window_shape}, "
                f"got {tuple(query.shape)}"
            )
        if max(shift) > 0:
            raise ValueError(f"shift must be 0 where all windows share a query, got {shift}")
