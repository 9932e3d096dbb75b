"""Registered torch operators behind the public functions: compile, export, fx and TorchScript see one node.

`zoo::neighborhood_attention_2d` takes the checked arguments of the public functions and returns the output and the
log-sum-exp of the logits; `zoo::neighborhood_attention_2d_backward` is its gradient. Without key and value, the query
holds all three, [batch, height, width, 3, heads, head_dim], and so does its gradient. `radius` > 0 cuts a circle out of
windows of `2 * radius - 1`, which are then clipped at the borders. `backend` is "triton", "tiled", or "auto" for the
first of them that can run the call.
"""

import os

import torch
from torch import Tensor

from zoo.kernels._autograd import register_gradient
from zoo.kernels._launch import HAS_TRITON, device_of
from zoo.kernels.neighborhood import tiled

_INPUTS = "Tensor query, Tensor? key, Tensor? value, Tensor? rel_pos_bias, Tensor? extra_key, Tensor? extra_value"
_OPTIONS = (
    "int[2] kernel_size, int[2] dilation, int[2] stride, bool[2] is_causal, float scale, int radius=0, "
    'str backend="auto"'
)

torch.library.define("zoo::neighborhood_attention_2d", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
# Where an input is None its gradient is an empty tensor: operators cannot return optional tensors.
torch.library.define(
    "zoo::neighborhood_attention_2d_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def unpacked(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, of which the first may hold all."""
    return query.unbind(3) if key is None else (query, key, value)


def why_not_triton(query: Tensor) -> str | None:
    """What keeps the fused kernels from these tensors, or None."""
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs CUDA tensors, got {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {query.dtype}"
    if query.shape[-1] > 256:
        return f"needs a head_dim of at most 256, got {query.shape[-1]}"
    if not HAS_TRITON:
        return "needs the triton package: `pip install triton`"
    return None


def takes_triton(query: Tensor, backend: str) -> bool:
    """Whether a call with this backend runs the fused kernels."""
    return backend == "triton" or (backend == "auto" and query.device.type == "cuda" and why_not_triton(query) is None)


def choose_backend(query: Tensor, backend: str, covers_map: bool, return_lse: bool) -> tuple[str, str]:
    """What runs a call whose arguments were checked, and why: the one rule, for calls and for who asks about them.

    Args:
        query: Anything with the `device`, `dtype` and `shape` of the query.
        backend: What the call asks for.
        covers_map: Whether every query sees its whole residue class.
        return_lse: Whether the call returns the log-sum-exp.

    Returns:
        "triton", "dense", "tiled", "reference" or "natten", and the reason.

    Raises:
        ValueError: `backend` cannot run the call.
    """
    if backend in ("reference", "natten"):
        return backend, "asked for"
    if backend == "triton":
        if (obstacle := why_not_triton(query)) is not None:
            raise ValueError(f"backend='triton' {obstacle}")
        return "triton", "asked for"
    if takes_triton(query, backend):
        return "triton", "its fused kernels are the fastest on GPUs"
    # On an empty batch scaled_dot_product_attention drops its mask from the graph, and the bias its gradient.
    if backend == "auto" and covers_map and not return_lse and query.shape[0] > 0:
        return "dense", "the window covers the map: torch's scaled_dot_product_attention is exact"
    return "tiled", "asked for" if backend == "tiled" else "it runs everywhere"


def _run(direction: str, query: Tensor, backend: str, *arguments):
    """`forward` or `backward` of the backend."""
    if takes_triton(query, backend):
        from zoo.kernels.neighborhood import triton

        with device_of(query):
            return getattr(triton, direction)(*arguments)
    with torch.autocast(query.device.type, enabled=False):  # sums stay in float32
        return getattr(tiled, direction)(*arguments)


def _forward(
    query,
    key,
    value,
    rel_pos_bias,
    extra_key,
    extra_value,
    kernel_size,
    dilation,
    stride,
    is_causal,
    scale,
    radius=0,
    backend="auto",
):
    inputs = *unpacked(query, key, value), rel_pos_bias, extra_key, extra_value
    geometry = tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal), radius
    return _run("forward", query, backend, *inputs, geometry, scale)


torch.library.impl("zoo::neighborhood_attention_2d", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("zoo::neighborhood_attention_2d")
def _forward_fake(query, key, *_):
    if key is None:
        query = query.select(3, 0)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=lse_dtype)


def _backward(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    rel_pos_bias,
    extra_key,
    extra_value,
    out,
    lse,
    kernel_size,
    dilation,
    stride,
    is_causal,
    scale,
    radius=0,
    backend="auto",
):
    inputs = *unpacked(query, key, value), rel_pos_bias, extra_key, extra_value
    geometry = tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal), radius
    grads = _run("backward", query, backend, grad_out, grad_lse, *inputs, out, lse, geometry, scale, key is None)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


torch.library.impl("zoo::neighborhood_attention_2d_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("zoo::neighborhood_attention_2d_backward")
def _backward_fake(grad_out, grad_lse, query, key, value, rel_pos_bias, extra_key, extra_value, *_):
    inputs = query, key, value, rel_pos_bias, extra_key, extra_value
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


neighborhood_attention_2d = register_gradient(
    "neighborhood_attention_2d", _forward, _backward, inputs=6, differentiable=2
)
