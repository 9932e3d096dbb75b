"""Maps cut into cells: windows, regions, stripes."""

from torch import Tensor


def cut(x: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    """[batch, height, width, ...] -> [batch, down, across, height of a cell, width of a cell, ...]

    Args:
        x: A map.
        rows: How many cells are below each other, or -1, and the height of one; their product is the height of the map.
        cols: How many are beside each other, or -1, and the width of one.
    """
    return x.unflatten(2, cols).unflatten(1, rows).transpose(2, 3)


def join(x: Tensor) -> Tensor:
    """Inverse of `cut`."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
