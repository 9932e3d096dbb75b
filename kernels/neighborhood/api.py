"""The public functions: they check their arguments."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels._checks import (
    check_bias,
    check_maps,
    check_tensors,
    pair,
    positive_pair,
    resolve_backend,
    resolve_scale,
)
from zoo.kernels.neighborhood import natten
from zoo.kernels.neighborhood.dispatch import attend
from zoo.kernels.neighborhood.ops import unpacked

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
    check_maps(query, key, value, extra_key, extra_value)
    inputs = query, key, value, rel_pos_bias, extra_key, extra_value
    return _attend(query, inputs, kernel_size, dilation, stride, is_causal, scale, return_lse, backend)


def neighborhood_attention_2d_qkvpacked(
    qkv: Tensor,
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
    """`neighborhood_attention_2d` of queries, keys and values that are one tensor, as one linear layer makes them.

    Their gradient is one tensor as well, which "triton" writes in place. Of three tensors it would be put together from
    three, which takes as long as reading and writing it once more.

    Args:
        qkv: [batch, height, width, 3, heads, head_dim], float16, bfloat16, float32 or float64, any strides.

    The other arguments, what is returned and what is raised are those of `neighborhood_attention_2d`.
    """
    check_tensors(qkv=qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [batch, height, width, 3, heads, head_dim], got shape {tuple(qkv.shape)}")
    query = qkv.select(3, 0)
    check_maps(query, query, query, extra_key, extra_value)
    inputs = qkv, None, None, rel_pos_bias, extra_key, extra_value
    return _attend(query, inputs, kernel_size, dilation, stride, is_causal, scale, return_lse, backend)


def _attend(query, inputs, kernel_size, dilation, stride, is_causal, scale, return_lse, backend):
    """What the public functions return, once maps and extra tokens were checked."""
    height, width = query.shape[1:3]
    kernel_size = positive_pair("kernel_size", kernel_size)
    dilation = positive_pair("dilation", dilation)
    stride = positive_pair("stride", stride)
    is_causal = pair("is_causal", is_causal, bool)
    _check_geometry((height, width), kernel_size, dilation, stride)
    rel_pos_bias = inputs[3]
    if rel_pos_bias is not None:
        shape = query.shape[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1
        check_bias("rel_pos_bias", rel_pos_bias, query, shape, "[heads, 2 * kernel_size - 1 per axis]")
    scale = resolve_scale(scale, query)
    backend = resolve_backend(backend, BACKENDS)

    geometry = kernel_size, dilation, stride, is_causal
    if backend == "natten":
        out, lse = natten.neighborhood_attention_2d(*unpacked(*inputs[:3]), *geometry, *inputs[3:], scale)
        return (out, lse) if return_lse else out
    return attend(inputs, (*geometry, 0), scale, return_lse, backend)


def _check_geometry(size, kernel_size, dilation, stride) -> None:
    for axis, length, k, d, s in zip(("height", "width"), size, kernel_size, dilation, stride, strict=True):
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation may not exceed the map: along the {axis} {k} * {d} = {k * d} > {length}; "
                "pad the map or take a smaller kernel_size or dilation"
            )
        if s > k:
            raise ValueError(f"stride may not exceed kernel_size: along the {axis} {s} > {k}")
