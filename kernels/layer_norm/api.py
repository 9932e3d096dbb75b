"""The public function: torch's layer norm, or on a GPU kernels of our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._autograd import is_eager, needs_grad
from zoo.kernels._launch import HAS_TRITON, device_of

MOST = 1024  # channels that one program holds
LEAST_WITH_GRAD = 2**23  # numbers


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last axis.

    torch gives every token a block of threads, which at 64 channels has little to do: on an H200 its kernel moves
    0.3 TB/s there. Eager calls on a GPU take kernels that hold several tokens a program; with gradients only on large
    maps, as those take the host 0.1 ms longer than torch's, and more inside a model. Compilers see torch's function and
    fuse it with what is around it.

    Args:
        x: [..., channels], any floating dtype.
        weight: [channels].
        bias: [channels].
        eps: Added to the variance.
        dtype: Of the output; by default float32 under autocast, as torch has it, else that of `x`.

    Returns:
        The shape of `x`. Gradients of the kernels are of first order, and repeat bit by bit.
    """
    grad = needs_grad(x, weight, bias)
    if not _takes_triton(x, weight, bias, grad):
        out = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
        return out if dtype is None else out.to(dtype)
    from zoo.kernels.layer_norm import triton

    if dtype is None:
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    with device_of(x):
        run = triton.LayerNorm.apply if grad else triton.forward
        return run(x.contiguous(), weight, bias, eps, dtype)


def _takes_triton(x: Tensor, weight: Tensor, bias: Tensor, grad: bool) -> bool:
    if not (is_eager(x, weight, bias) and x.is_cuda and HAS_TRITON) or (grad and x.numel() < LEAST_WITH_GRAD):
        return False
    if not torch.is_autocast_enabled("cuda") and not x.dtype == weight.dtype == bias.dtype:  # torch's error
        return False
    dtypes = torch.float16, torch.bfloat16, torch.float32
    fits = x.dtype in dtypes and weight.dtype in dtypes and bias.dtype in dtypes
    return fits and x.numel() > 0 and x.shape[-1] <= MOST and weight.shape == bias.shape == x.shape[-1:]
