"""Reading checkpoint files: safely, and with one clear error when a file is not what it should be."""

import pickle
import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch import LightningModule

from zoo.backbones._checkpoint import mismatches
from zoo.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code the file may hold.

    Args:
        path: A file written by ``torch.save`` (or a ``.safetensors`` file). Tensors are memory-mapped where the format
            allows, so that checking a large file is cheap.

    Raises:
        UserError: The file is missing, truncated, or not a checkpoint.
    """
    path = Path(path)
    if is_sharded(path):
        raise UserError(
            f"checkpoint {path} is a folder of shards, which only --ckpt_path with their own strategy reads; with "
            "save_distributed_checkpoint: false it saves files"
        )
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist or is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            checkpoint = load_file(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except PermissionError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # zip, pickle and end-of-file errors: to the user they are all one thing
        problem = "it is truncated or damaged, or not a file of PyTorch weights"
        found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            what = f"Python objects besides weights ({found[1]})"
            problem = f"it holds {what}, which are never loaded because they can run code"
        raise UserError(f"cannot read checkpoint {path} ({path.stat().st_size:,} bytes): {problem}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, expected a dictionary of weights")
    if "pytorch-lightning_version" in checkpoint:
        for key in ("state_dict", "hyper_parameters", "data_config"):
            if not isinstance(held := checkpoint.get(key, {}), dict):
                raise UserError(f"{path} is damaged: its {key} are a {type(held).__name__}, expected a dictionary")
    return checkpoint


def is_sharded(path: str | Path) -> bool:
    """Whether it is a folder into which the processes of a sharded strategy saved their parts, each of them."""
    return (Path(path) / ".metadata").is_file()  # written last


def read_lightning_checkpoint(path: str | Path) -> dict[str, Any]:
    """Like :func:`read_checkpoint`, for files written by Lightning's trainer."""
    checkpoint = read_checkpoint(path)
    if "state_dict" not in checkpoint or "pytorch-lightning_version" not in checkpoint:
        keys = ", ".join(map(repr, list(checkpoint)[:4])) or "nothing"
        raise UserError(
            f"{path} is not a checkpoint of `zoo fit`: it holds {keys}{', ...' if len(checkpoint) > 4 else ''}. "
            "A plain weights file goes to --model.checkpoint."
        )
    return checkpoint


def check_fits(checkpoint: dict[str, Any], model: LightningModule, path: str | Path) -> None:
    """Raise a :class:`UserError` unless the checkpoint's weights are those of ``model``, by name and shape."""
    problems = mismatches(model, checkpoint["state_dict"], strict=True)
    if problems:
        raise UserError(f"the weights in {path} do not fit the model: {'; '.join(problems)}")
