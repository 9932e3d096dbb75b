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
    # As addresses: Triton would ask tensors for them again, and the driver whose they are.
    values = [x if type(x) in _PLAIN else x.data_ptr() for x in arguments]
    kinds = [x if x is value else (x.dtype, value % 16) for x, value in zip(arguments, values)]
    key = id(kernel), device, *options.values(), *kinds
    found = _compiled.get(key)
    if found is not None:
        compiled, constants, runtime = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # somebody watches launches
            compiled[(programs, 1, 1)](*values, *constants, stream=stream)
            return
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)
        return
    compiled = kernel[(programs,)](*arguments, **options)
    if compiled is None:  # Triton's interpreter
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    from triton import knobs

    constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
    _compiled[key] = compiled, constants, knobs.runtime


def device_of(x: Tensor):
    """Context in which kernels run on the GPU that `x` is on; Triton takes the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
