"""Registered torch operators behind `neighborhood_attention_2d`: compile, export, fx and TorchScript see one node.

`zoo::neighborhood_attention_2d` takes the checked arguments of the public function and returns the output and the
log-sum-exp of the logits; `zoo::neighborhood_attention_2d_backward` is its gradient. Both run on every device.
"""

import torch
from torch import Tensor

from zoo.kernels.neighborhood import tiled

_GEOMETRY = "int[2] kernel_size, int[2] dilation, int[2] stride, bool[2] is_causal, float scale"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? rel_pos_bias, Tensor? extra_key, Tensor? extra_value"

torch.library.define("zoo::neighborhood_attention_2d", f"({_INPUTS}, {_GEOMETRY}) -> (Tensor, Tensor)")
# Where an input is None its gradient is an empty tensor: operators cannot return optional tensors.
torch.library.define(
    "zoo::neighborhood_attention_2d_backward",
    f"(Tensor grad_out, Tensor grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_GEOMETRY}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _geometry(kernel_size, dilation, stride, is_causal):
    return tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal)


@torch.library.impl("zoo::neighborhood_attention_2d", "CompositeExplicitAutograd")
def _forward(
    query, key, value, rel_pos_bias, extra_key, extra_value, kernel_size, dilation, stride, is_causal, scale
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(kernel_size, dilation, stride, is_causal)
    return tiled.forward(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale)


@torch.library.register_fake("zoo::neighborhood_attention_2d")
def _forward_fake(
    query, key, value, rel_pos_bias, extra_key, extra_value, kernel_size, dilation, stride, is_causal, scale
):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=_lse_dtype(query.dtype))


@torch.library.impl("zoo::neighborhood_attention_2d_backward", "CompositeExplicitAutograd")
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
):
    geometry = _geometry(kernel_size, dilation, stride, is_causal)
    inputs = query, key, value, rel_pos_bias, extra_key, extra_value
    grads = tiled.backward(grad_out, grad_lse, *inputs, out, lse, geometry, scale)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("zoo::neighborhood_attention_2d_backward")
def _backward_fake(
    grad_out, grad_lse, query, key, value, rel_pos_bias, extra_key, extra_value, out, lse, *geometry_and_scale
):
    inputs = query, key, value, rel_pos_bias, extra_key, extra_value
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, kernel_size, dilation, stride, is_causal, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.geometry_and_scale = kernel_size, dilation, stride, is_causal, scale


def _autograd_backward(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    grads = torch.ops.zoo.neighborhood_attention_2d_backward(
        grad_out, grad_lse, *inputs, out, lse, *ctx.geometry_and_scale
    )
    return *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)), *(None,) * 5


torch.library.register_autograd("zoo::neighborhood_attention_2d", _autograd_backward, setup_context=_setup_context)
