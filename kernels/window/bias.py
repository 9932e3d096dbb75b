"""The bias of all pairs of a window: torch's operators, or on a GPU kernels of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels._autograd import is_eager, needs_grad
from zoo.kernels._launch import HAS_TRITON, device_of
from zoo.kernels._symbols import is_symbol
from zoo.kernels.neighborhood.dense import dense_bias

MOST = 4096  # tokens of a window that one program holds


def pair_bias(table: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """`dense_bias`. Eager calls on a GPU make it in one step where that takes seven, and its gradient takes nine.

    It is little work, but the host has as many steps to take for it as for the attention itself.
    """
    if not torch.jit.is_scripting():
        if _takes_triton(table, rows, cols, dtype):
            return _by_triton(table, rows, cols, dtype)
    return dense_bias(table, rows, cols, dtype)


def _by_triton(table: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    from zoo.kernels.window import triton

    with device_of(table):
        run = triton.DenseBias.apply if needs_grad(table) else triton.forward
        return run(table, rows, cols, dtype)


def _takes_triton(table: Tensor, rows: int, cols: int, dtype: torch.dtype) -> bool:
    if not (is_eager(table) and table.is_cuda and HAS_TRITON):
        return False
    if is_symbol(rows) or is_symbol(cols) or table.numel() == 0 or rows * cols > MOST:
        return False
    return torch.float64 not in (table.dtype, dtype)
