"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.neighborhood import dense, natten, ops, reference

BACKENDS = ("auto", "reference", "tiled", "triton", "natten")


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    *,
    rel_pos_bias: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token of a 2-D map to the window of tokens around it.

    Along each axis, token `i` belongs to the residue class `i % dilation` and attends to `kernel_size` consecutive
    members of it, centred on itself where the map allows and shifted inwards at the borders. With `j` running over the
    product of both axes' windows, then over the extra tokens,

        out[i] = sum_j softmax_j(scale * query[i] . key[j] + rel_pos_bias[i, j]) * value[j]

    where the bias of key `(y', x')` for query `(y, x)` is `rel_pos_bias[head, dy + kernel_size[0] - 1,
    dx + kernel_size[1] - 1]` with `dy = (y' - y) / dilation[0]`, `dx = (x' - x) / dilation[1]`; extra tokens have none.

    Papers: Neighborhood Attention (arXiv:2204.07143), dilation (arXiv:2209.15001), stride (arXiv:2504.16922).

    Args:
        query: [batch, height, width, heads, head_dim], float16, bfloat16, float32 or float64, any strides.
        key: Shape, dtype and device of `query`.
        value: Shape, dtype and device of `query`.
        kernel_size: Window size, per axis (height, width) or one for both; odd or even. A window of even size reaches
            one token further towards the start of the axis.
        dilation: Distance in tokens between neighbours in a window. `kernel_size * dilation` may not exceed the map.
        stride: Queries that share a window: those in one group of `stride` members use that of the group's centre.
            At most `kernel_size`.
        is_causal: Whether a query sees no later token of the axis. The window then ends at the query, and is cut at
            the start of the axis instead of shifted.
        rel_pos_bias: Bias table [heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1], any floating dtype.
        extra_key: [batch, tokens, heads, head_dim], keys that every query sees, such as text; with `extra_value`.
        extra_value: Shape of `extra_key`.
        scale: Factor of the logits, `head_dim ** -0.5` by default.
        return_lse: Whether to return the log-sum-exp of the logits too, with which results over other keys can be
            merged. It is differentiable.
        backend: "auto" takes the fastest exact one; "reference", "tiled", "triton" or "natten" take that one or raise.

    Returns:
        [batch, height, width, heads, head_dim], dtype of `query`; with `return_lse` also the log-sum-exp
        [batch, height, width, heads], float32 or better. Sums are accumulated in float32 or better. A key
        that is not finite reaches only the queries that see it; so does a value, except with "triton", where it may
        reach the rest of their tile. Gradients are of first order; backend="reference" also has higher ones.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or `backend` does not support the call.
        ImportError: `backend` is not installed.
    """
    _check_tensors(query, key, value, extra_key, extra_value)
    height, width = query.shape[1:3]
    kernel_size = _pair("kernel_size", kernel_size, int)
    dilation = _pair("dilation", dilation, int)
    stride = _pair("stride", stride, int)
    is_causal = _pair("is_causal", is_causal, bool)
    _check_geometry((height, width), kernel_size, dilation, stride)
    if rel_pos_bias is not None:
        _check_bias(rel_pos_bias, query, kernel_size)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")

    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")

    tensors, geometry = (query, key, value), (kernel_size, dilation, stride, is_causal)
    options = rel_pos_bias, extra_key, extra_value, float(scale)
    covers_map = dense.covers_map(height, width, kernel_size, dilation, is_causal)
    backend, _ = ops.choose_backend(query, backend, covers_map, return_lse)
    if backend == "dense":
        return dense.neighborhood_attention_2d(*tensors, kernel_size, dilation, *options)
    if backend in ("reference", "natten"):
        module = reference if backend == "reference" else natten
        out, lse = module.neighborhood_attention_2d(*tensors, *geometry, *options)
    else:
        out, lse = torch.ops.zoo.neighborhood_attention_2d(*tensors, *options[:3], *geometry, options[3], backend)
    return (out, lse) if return_lse else out


def _check_tensors(query, key, value, extra_key, extra_value) -> None:
    if (extra_key is None) != (extra_value is None):
        missing = "extra_key" if extra_key is None else "extra_value"
        raise ValueError(f"extra_key and extra_value go together, but {missing} is None")
    named = {"query": query, "key": key, "value": value}
    if extra_key is not None:
        named |= {"extra_key": extra_key, "extra_value": extra_value}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if query.dim() != 5:
        raise ValueError(f"query must be [batch, height, width, heads, head_dim], got shape {tuple(query.shape)}")
    if not query.dtype.is_floating_point:
        raise TypeError(f"query must be of a floating dtype, got {query.dtype}")
    batch, _, _, heads, dim = query.shape
    for name, x in named.items():
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}")
    for name in ("key", "value"):
        if named[name].shape != query.shape:
            raise ValueError(
                f"{name} must have the shape of query, {tuple(query.shape)}, got {tuple(named[name].shape)}"
            )
    if extra_key is not None:
        for name in ("extra_key", "extra_value"):
            shape = tuple(named[name].shape)
            if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, heads, dim):
                raise ValueError(
                    f"{name} must be [{batch}, tokens, {heads}, {dim}] to go with query, got shape {shape}"
                )
        if extra_key.shape != extra_value.shape:
            raise ValueError(
                f"extra_value must have the shape of extra_key, {tuple(extra_key.shape)}, "
                f"got {tuple(extra_value.shape)}"
            )


def _pair(name: str, value, kind: type) -> tuple:
    """One value for both axes, or two, as a tuple."""
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value, value
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(x, kind) and (kind is bool or not isinstance(x, bool)) for x in value)
    ):
        return tuple(value)
    raise TypeError(f"{name} must be one {kind.__name__} or a (height, width) pair of them, got {value!r}")


def _check_geometry(size, kernel_size, dilation, stride) -> None:
    for name, values in (("kernel_size", kernel_size), ("dilation", dilation), ("stride", stride)):
        if min(values) < 1:
            raise ValueError(f"{name} must be at least 1 on both axes, got {values}")
    for axis, length, k, d, s in zip(("height", "width"), size, kernel_size, dilation, stride, strict=True):
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation may not exceed the map: along the {axis} {k} * {d} = {k * d} > {length}; "
                "pad the map or take a smaller kernel_size or dilation"
            )
        if s > k:
            raise ValueError(f"stride may not exceed kernel_size: along the {axis} {s} > {k}")


def _check_bias(rel_pos_bias, query: Tensor, kernel_size: tuple[int, int]) -> None:
    if not isinstance(rel_pos_bias, Tensor):
        raise TypeError(f"rel_pos_bias must be a torch.Tensor or None, got {type(rel_pos_bias).__name__}")
    if not rel_pos_bias.dtype.is_floating_point:
        raise TypeError(f"rel_pos_bias must be of a floating dtype, got {rel_pos_bias.dtype}")
    if rel_pos_bias.device != query.device:
        raise ValueError(f"rel_pos_bias must be on the device of query, {query.device}, got {rel_pos_bias.device}")
    shape = query.shape[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1
    if tuple(rel_pos_bias.shape) != shape:
        raise ValueError(
            f"rel_pos_bias must be [heads, 2 * kernel_size - 1 per axis] = {shape}, got {tuple(rel_pos_bias.shape)}"
        )
