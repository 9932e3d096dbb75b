"""Sizes that an exporter may know as symbols."""

import torch


def is_symbol(size: int) -> bool:
    """Whether a size stands for many: what is traced with it may not depend on its value."""
    if not torch.jit.is_scripting():
        return isinstance(size, torch.SymInt)
    return False


def ceil_div(length: int, size: int) -> int:
    """Number of pieces of `size` that cover `length`, without negative numbers on the way: ONNX rounds them to 0."""
    return (length + size - 1) // size
