"""Biases of agents for every place on a map, from tables that are stretched over it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._autograd import is_eager, needs_grad
from zoo.kernels._launch import HAS_TRITON, device_of
from zoo.kernels._symbols import is_symbol


def map_bias(
    table: Tensor, rows: Tensor, cols: Tensor, first: Tensor | None, height: int, width: int, agents_last: bool = False
) -> Tensor:
    """The sum of a table, a value per row and a value per column, each stretched over the map linearly.

    In torch that is a dozen small operators, which on a large map take the host longer than the attention runs.

    Args:
        table: [heads, agents, table height, table width].
        rows: [heads, agents, length].
        cols: [heads, agents, length].
        first: [heads, agents], the bias of one token before those of the map, or None for no such token.
        height: Rows of the map.
        width: Columns of the map.
        agents_last: Whether tokens come before agents.

    Returns:
        [heads, agents, tokens] or [heads, tokens, agents].
    """
    if not torch.jit.is_scripting():
        if _takes_triton(table, rows, cols, first, height, width):
            return _in_triton(table, rows, cols, first, height, width, agents_last)
    bias = resize_map(table, height, width)
    rows, cols = resize_axis(rows, 2, height), resize_axis(cols, 2, width)
    if agents_last:
        rows, cols = rows.transpose(1, 2).unsqueeze(2), cols.transpose(1, 2).unsqueeze(1)
        bias = (bias.permute(0, 2, 3, 1) + rows + cols).flatten(1, 2)
        return bias if first is None else torch.cat([first.unsqueeze(1), bias], 1)
    bias = (bias + rows.unsqueeze(3) + cols.unsqueeze(2)).flatten(2)
    return bias if first is None else torch.cat([first.unsqueeze(2), bias], 2)


def _in_triton(table: Tensor, *arguments) -> Tensor:
    from zoo.kernels.agent import triton

    with device_of(table):
        return triton.map_bias(table, *arguments)


def _takes_triton(table: Tensor, rows: Tensor, cols: Tensor, first: Tensor | None, height: int, width: int) -> bool:
    if not (table.is_cuda and HAS_TRITON and is_eager(table, rows, cols, first)):
        return False
    tensors = [x for x in (table, rows, cols, first) if x is not None]
    narrow = all(x.element_size() <= 4 and x.device == table.device for x in tensors)
    return narrow and height > 0 and width > 0 and not needs_grad(*tensors)


def resize_axis(table: Tensor, axis: int, size: int) -> Tensor:
    """Stretch one axis of `table` linearly."""
    if not is_symbol(size) and table.shape[axis] == size:
        return table
    lines = table.movedim(axis, -1)
    # As a map of one column: of a list, torch's gradient on a GPU is not deterministic.
    resized = resize_map(lines.flatten(0, -2).unsqueeze(0).unsqueeze(3), size, 1)
    return resized[0, :, :, 0].unflatten(0, lines.shape[:-1]).movedim(-1, axis)


def resize_map(x: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """Stretch the last two axes."""
    # To its own size, which a symbol may be, the map is stretched to itself.
    if not is_symbol(height) and not is_symbol(width) and x.shape[-2] == height and x.shape[-1] == width:
        return x
    if x.is_cuda and mode == "bilinear":  # channels first, one thread would make a place of all maps, one by one
        x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, size=(height, width), mode=mode, align_corners=False)
