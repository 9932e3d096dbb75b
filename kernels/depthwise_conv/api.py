"""The public function: torch's convolution, or on a GPU a kernel of our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._autograd import is_eager, needs_grad, transformed
from zoo.kernels._launch import HAS_TRITON
from zoo.kernels.depthwise_conv import ops

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
MOST_TAPS = 49


def add_depthwise_conv(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`base` plus a convolution of every channel of `x`, zero-padded so that the map keeps its size.

    For torch's convolution values are copied out of the tensor that they share with queries and keys; its bias and the
    sum are two more passes over memory. On an H200 all that takes 1.3 to 2.3 times as long as one kernel.

    Args:
        base: [batch, height, width, channels], any floating dtype; or [batch, tokens, channels], of which those of the
            map are the last ones, row by row, and what is before them, such as a class token, stays as it is.
        x: [batch, height, width, channels], any strides.
        weight: [channels, 1, size, size], an odd `size`.
        bias: [channels], or None.

    Returns:
        The shape of `base`, in the dtype to which torch promotes it and the convolution, which under autocast is of
        autocast's.
    """
    if not torch.jit.is_scripting():
        if _takes_triton(base, x, weight, bias):
            return _in_triton(base, x, weight, bias)
    return in_torch(base, x, weight, bias)


def _in_triton(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = base.flatten(1, 2) if base.dim() == 4 else base
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    arguments = x, weight, bias, tokens, torch.promote_types(base.dtype, autocast)
    if is_eager(base, x, weight, bias):
        run = ops.Convolution.apply if needs_grad(base, x, weight, bias) else ops.forward
    else:
        run = torch.ops.zoo.depthwise_conv_2d
    return run(*arguments).view(base.shape)


def in_torch(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`add_depthwise_conv` in torch's own operators."""
    padding = weight.shape[-1] // 2
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
    out = out.permute(0, 2, 3, 1)
    if base.dim() == 4:
        return base + out
    out = out.flatten(1, 2)
    return base + F.pad(out, (0, 0, base.shape[1] - out.shape[1], 0))


def _takes_triton(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (x.is_cuda and HAS_TRITON) or torch.jit.is_tracing():
        return False
    # Compiled training is bound by the host, which operators of ours take more of than torch's.
    if needs_grad(base, x, weight, bias) if torch.compiler.is_compiling() else transformed():
        return False
    tensors = [base, x, weight] if bias is None else [base, x, weight, bias]
    if not torch.is_autocast_enabled("cuda") and any(t.dtype != x.dtype for t in tensors[2:]):  # torch's error
        return False
    if not all(t.dtype in DTYPES and t.device == x.device for t in tensors):
        return False
    size = weight.shape[-1]
    fits = weight.shape == (x.shape[3], 1, size, size) and size % 2 == 1 and size**2 <= MOST_TAPS
    return fits and ops.fits(base, x)
