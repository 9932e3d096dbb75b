"""Registered torch operators behind `halo_attention_2d`: compile, export, fx and TorchScript see one node.

`zoo::halo_attention_2d` takes the checked arguments of the public function and returns the output and the log-sum-exp
of the logits, which only its gradient, `zoo::halo_attention_2d_backward`, may use. `backend` is "triton", "tiled", or
"auto" for the first of them that can run the call.
"""

import torch
from torch import Tensor

from zoo.kernels._autograd import register_gradient
from zoo.kernels._launch import device_of
from zoo.kernels.halo import tiled
from zoo.kernels.neighborhood import ops as neighborhood

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? rel_height, Tensor? rel_width"
_OPTIONS = 'int block_size, int halo_size, int stride, float scale, str backend="auto"'

torch.library.define("zoo::halo_attention_2d", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
# Where an input is None its gradient is an empty tensor: operators cannot return optional tensors.
torch.library.define(
    "zoo::halo_attention_2d_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def why_not_triton(query: Tensor, value: Tensor) -> str | None:
    """What keeps the fused kernels from these tensors, or None."""
    return neighborhood.why_not_triton(query if query.shape[-1] >= value.shape[-1] else value)


def takes_triton(query: Tensor, value: Tensor, backend: str) -> bool:
    """Whether a call with this backend runs the fused kernels."""
    return backend == "triton" or (backend == "auto" and query.is_cuda and why_not_triton(query, value) is None)


def _run(direction: str, query: Tensor, value: Tensor, backend: str, *arguments):
    """`forward` or `backward` of the backend."""
    if takes_triton(query, value, backend):
        from zoo.kernels.halo import triton

        with device_of(query):
            return getattr(triton, direction)(*arguments)
    with torch.autocast(query.device.type, enabled=False):  # sums stay in float32
        return getattr(tiled, direction)(*arguments)


def _forward(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale, backend="auto"):
    inputs = query, key, value, rel_height, rel_width
    return _run("forward", query, value, backend, *inputs, block_size, halo_size, stride, scale)


torch.library.impl("zoo::halo_attention_2d", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("zoo::halo_attention_2d")
def _forward_fake(query, key, value, *_):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.shape[:-1]
    return query.new_empty(*rows, value.shape[-1]), query.new_empty(rows, dtype=lse_dtype)


def _backward(
    grad_out, query, key, value, rel_height, rel_width, out, lse, block_size, halo_size, stride, scale, backend="auto"
):
    inputs = query, key, value, rel_height, rel_width
    options = block_size, halo_size, stride, scale
    grads = _run("backward", query, value, backend, grad_out, *inputs, out, lse, *options)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


torch.library.impl("zoo::halo_attention_2d_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("zoo::halo_attention_2d_backward")
def _backward_fake(grad_out, query, key, value, rel_height, rel_width, *_):
    inputs = query, key, value, rel_height, rel_width
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


halo_attention_2d = register_gradient("halo_attention_2d", _forward, _backward, inputs=5)
