"""Sizes that an exporter knows as symbols."""

import torch


def is_symbol(size: int) -> bool:
    """Whether a size stands for many: what is traced with it may not depend on its value."""
    if not torch.jit.is_scripting():
        return isinstance(size, torch.SymInt)
    return False
