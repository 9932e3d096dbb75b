"""Golden cases: what the authors' own code computes from weights and inputs that are functions of their names.

A case is `tests/golden/FAMILY/NAME.json` (where it comes from, shapes of the weights and inputs) and `NAME.npz` (the
outputs). Weights and inputs are drawn from generators seeded by the CRC-32 of their names, so they need no storage.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ROOT = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    name: str
    call: str
    state_dict: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def list_cases(family: str) -> list[str]:
    """Names of the cases of `tests/golden/FAMILY`."""
    names = sorted(path.stem for path in (_ROOT / family).glob("*.json"))
    if not names:
        raise FileNotFoundError(f"no golden cases in {_ROOT / family}")
    return names


def load_case(family: str, name: str) -> Case:
    """The case with its weights and inputs filled in."""
    meta = json.loads((_ROOT / family / f"{name}.json").read_text())
    with np.load(_ROOT / family / f"{name}.npz") as arrays:
        outputs = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    inputs = {key: make_input(key, shape) for key, shape in meta["inputs"].items()}
    return Case(name, meta["call"], fill_state_dict(meta["state_dict"]), inputs, outputs)


def fill_state_dict(entries: dict[str, dict]) -> dict[str, Tensor]:
    """Weights for `entries`, {name: {"shape": ..., "dtype": ...}}; integers are structure and left out."""
    return {
        name: _fill(name, tuple(entry["shape"]))
        for name, entry in entries.items()
        if entry["dtype"].startswith("float")
    }


def make_input(name: str, shape) -> Tensor:
    """Standard normal input of that name."""
    return torch.from_numpy(_noise(f"input:{name}", tuple(shape)))


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in units of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def _fill(name: str, shape: tuple[int, ...]) -> Tensor:
    noise = _noise(name, shape)
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        value = 1 + 0.1 * np.abs(noise)
    elif leaf == "running_mean" or (leaf == "bias" and len(shape) == 1):
        value = 0.1 * noise
    elif leaf == "weight" and len(shape) == 1:  # scale of a norm
        value = 1 + 0.1 * noise
    elif leaf == "weight" and len(shape) >= 2:  # linear or convolution
        value = (noise.astype(np.float64) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    elif len(shape) <= 1:  # layer scales, temperatures
        value = 0.5 + 0.1 * noise
    else:  # tables, tokens
        value = 0.2 * noise
    return torch.from_numpy(np.asarray(value))
