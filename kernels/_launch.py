"""Launching Triton kernels at little cost to the host."""

from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # once: calls are hot, and compilers cannot trace the search
_MOST = 4096  # sets of arguments remembered
_compiled: dict[tuple, object] = {}


def launch(kernel, programs: int, arguments: tuple, options: dict) -> None:
    """Run `kernel[(programs,)](*arguments, **options)`.

    What Triton works out of the arguments at every launch takes longer than many a small kernel runs. Here it does so
    once for arguments that it compiles alike.

    Args:
        kernel: A `triton.jit` function whose compile-time parameters come last.
        programs: Number of programs.
        arguments: What is not known at compile time, a tensor first: tensors, numbers, tuples of them, or None.
        options: Compile-time arguments by name, and how to compile.
    """
    kinds = (
        (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument
        for argument in arguments
    )
    key = kernel, arguments[0].get_device(), *options.values(), *kinds
    compiled = _compiled.get(key)
    if compiled is not None:
        constants = (options[name] for name in kernel.arg_names[len(arguments) :])
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[key] = kernel[(programs,)](*arguments, **options)  # nothing from Triton's interpreter


def device_of(x: Tensor):
    """Context in which kernels run on the GPU that `x` is on; Triton takes the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
