"""The registered torch operator behind `add_depthwise_conv` on GPUs: compilers see one node.

`zoo::depthwise_conv_2d` is the convolution of `x` [batch, height, width, channels] plus, where it is given, `base`
[batch, tokens, channels]. Without one it returns the tokens of the map. Its gradients are made of itself and of torch's
gradient of the weight, so there are any number of orders.
"""

import torch
from torch import Tensor

from zoo.kernels._autograd import is_eager, made_of_operators
from zoo.kernels._launch import device_of

torch.library.define(
    "zoo::depthwise_conv_2d", "(Tensor x, Tensor weight, Tensor? bias, Tensor? base, ScalarType dtype) -> Tensor"
)


def fits(base: Tensor, x: Tensor) -> bool:
    """Whether the kernel takes these shapes: it counts tokens in 32 bits."""
    batch, height, width, channels = x.shape
    if base.dim() == 3:
        same = (base.shape[0], base.shape[2]) == (batch, channels) and base.shape[1] >= height * width
    else:
        same = base.shape == x.shape
    return same and 0 < x.numel() and base.numel() // channels < 2**31 - 2**16


def forward(x, weight, bias, base, dtype) -> Tensor:
    from zoo.kernels.depthwise_conv import triton

    with device_of(x):
        return triton.forward(x, weight, bias, base, dtype)


torch.library.impl("zoo::depthwise_conv_2d", "CompositeExplicitAutograd", forward)


@torch.library.register_fake("zoo::depthwise_conv_2d")
def _forward_fake(x, weight, bias, base, dtype) -> Tensor:
    tokens = x.shape[1] * x.shape[2] if base is None else base.shape[1]
    return x.new_empty(x.shape[0], tokens, x.shape[3], dtype=dtype)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, base, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, base)]


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    bias_dtype, base_dtype = ctx.dtypes
    prefix = grad.shape[1] - x.shape[1] * x.shape[2]
    # Of several gradients at once (`is_grads_batched`), torch takes no slices that are all, and reshapes them only.
    d_map = (grad if prefix == 0 else grad[:, prefix:]).reshape(x.shape)
    d_x = d_weight = d_bias = d_base = None
    if ctx.needs_input_grad[0]:
        eager = is_eager(d_map, weight) and not made_of_operators(grad)
        run = forward if eager else torch.ops.zoo.depthwise_conv_2d
        d_x = run(d_map, weight.flip(2, 3), None, None, x.dtype).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        d_weight = _weight_grad(d_map.to(x.dtype), x, weight)
    if ctx.needs_input_grad[2]:
        d_bias = d_map.sum((0, 1, 2), dtype=torch.float32).to(bias_dtype)
    if ctx.needs_input_grad[3]:
        d_base = grad.to(base_dtype)
    return d_x, d_weight, d_bias, d_base, None


def _weight_grad(d_map: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    d_map, x = d_map.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    padding = weight.shape[-1] // 2
    grads = torch.ops.aten.convolution_backward(
        d_map, x, weight.to(x.dtype), None, [1, 1], [padding, padding], [1, 1], False, [0, 0], weight.shape[0],
        [False, True, False],
    )  # fmt: skip
    return grads[1].to(weight.dtype)


torch.library.register_autograd("zoo::depthwise_conv_2d", _backward, setup_context=_save)


class Convolution(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a small map."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        return forward(*inputs)

    backward = staticmethod(_backward)
