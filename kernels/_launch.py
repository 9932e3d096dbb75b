"""Launching Triton kernels at little cost to the host."""

from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # once: calls are hot, and compilers cannot trace the search
_MOST = 4096  # sets of arguments remembered
_PLAIN = frozenset({int, float, bool, tuple, type(None)})
_compiled: dict[tuple, tuple] = {}


def launch(kernel, programs: int, arguments: tuple, options: dict) -> None:
    """Run `kernel[(programs,)](*arguments, **options)`.

    What Triton works out of the arguments at every launch takes longer than many a small kernel runs. Here it does so
    once for arguments that it compiles alike.

    Args:
        kernel: A `triton.jit` function of a module, whose compile-time parameters come last.
        programs: Number of programs.
        arguments: What is not known at compile time, a tensor first: tensors, numbers, tuples of them, or None.
        options: Compile-time arguments by name, and how to compile.
    """
    device = arguments[0].get_device()
    kinds = [x if type(x) in _PLAIN else (x.dtype, x.data_ptr() % 16) for x in arguments]
    key = id(kernel), device, *options.values(), *kinds
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(programs, 1, 1)](*arguments, *constants, stream=torch._C._cuda_getCurrentRawStream(device))
        return
    compiled = kernel[(programs,)](*arguments, **options)
    if compiled is None:  # Triton's interpreter
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def device_of(x: Tensor):
    """Context in which kernels run on the GPU that `x` is on; Triton takes the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
