"""Tile sizes of the fused kernels. Any entry computes the same function; the table only says which is fast.

`tuning.json` is written by scripts/tune_kernels.py, one part per compute capability. Devices and problems that it does
not know take a default that fits every GPU.
"""

import json
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A tile of `tile_y * tile_x` rows against blocks of `block_y * block_x`: powers of two, products at least 16."""

    tile_y: int
    tile_x: int
    block_y: int
    block_x: int
    num_warps: int
    num_stages: int

    def tile_options(self) -> dict:
        """The tile as keyword arguments of a kernel."""
        return {"TILE_Y": self.tile_y, "TILE_X": self.tile_x, "BLOCK_Y": self.block_y, "BLOCK_X": self.block_x}

    def options(self) -> dict:
        """The tile and how to compile for it."""
        return self.tile_options() | {"num_warps": self.num_warps, "num_stages": self.num_stages}


SMALL = 8  # members of a class that one tile holds
WIDE = Config(4, 8, 2, 16, 4, 1)  # for float32 and the largest head dimensions


def span(size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]) -> int:
    """What the best tile sizes depend on: how many keys a tile of 8 queries meets along an axis, at most.

    Where a window covers its class these are fewer than said here, but as many for each query. A class that one tile
    holds is told apart by its length.
    """
    lengths = [-(-n // d) for n, d in zip(size, dilation)]
    return max(n if n <= SMALL else k + 7 for n, k in zip(lengths, kernel_size))


def default(kernel: str, dim: int, span: int) -> Config:
    """Tile sizes that fit every GPU."""
    if span <= SMALL:
        return Config(8, 8, 8, 8, 4, 1)
    if dim > 64:
        return Config(4, 8, 2, 16, 2, 1) if kernel == "bias" else Config(8, 8, 4, 16, 4, 2)
    if kernel == "bias":  # as often as possible, one block holds all keys of a tile
        return Config(2, 8, 8, 16, 2, 1) if span <= 16 else Config(4, 4, 16, 16, 4, 1)
    return Config(4, 8, 2, 16, 2, 2)


@lru_cache
def _table() -> dict:
    return json.loads((files(__package__) / "tuning.json").read_text())


@lru_cache
def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else ""


@lru_cache(maxsize=256)
def config(kernel: str, span: int, dim: int, dtype: torch.dtype, has_bias: bool, device: torch.device) -> Config:
    """Tile sizes for one kernel: "forward", "query", "key_value" or "bias".

    `span` is that of the function of this name.
    """
    if dtype.itemsize > 2 or dim > 128:
        return WIDE
    small = span <= SMALL
    # The entry of the nearest span among those of the smallest head dimension that holds `dim`.
    entries = [
        entry
        for entry in _table().get(_capability(device), [])
        if entry["kernel"] == kernel
        and entry["dim"] >= dim
        and (entry["span"] <= SMALL) == small
        and (entry["bias"] == has_bias or (kernel == "bias" and not small))
    ]
    if not entries:
        return default(kernel, dim, span)
    nearest = min(entries, key=lambda e: (e["dim"], abs(e["span"] - span)))
    return Config(*nearest["config"])
