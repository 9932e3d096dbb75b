"""Sizes that an exporter may know as symbols."""

import torch
from torch import Tensor


def is_symbol(size: int) -> bool:
    """Whether a size stands for many: what is traced with it may not depend on its value."""
    if not torch.jit.is_scripting():
        return isinstance(size, torch.SymInt)
    return False


def ceil_div(length: int, size: int) -> int:
    """Number of pieces of `size` that cover `length`, without negative numbers on the way: ONNX rounds them to 0."""
    return (length + size - 1) // size


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of [batch, height, width, ...]."""
    if is_symbol(height) or is_symbol(width):  # of a slice, torch 2.11 would not know the size
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))
    return x[:, :height, :width]
