"""The table of our models that ``zoo models`` prints."""

import csv
from fnmatch import fnmatch
from importlib import resources
from typing import NamedTuple

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint

import zoo  # noqa: F401  (registers our models)
from zoo.errors import UserError


class ModelRow(NamedTuple):
    """One line of the table."""

    name: str
    parameters: int
    input_size: tuple[int, int, int]
    top1: float | None
    has_weights: bool


def our_models() -> list[str]:
    """Return every model that ``zoo.backbones`` registers, once for each of its published weights (``arch.tag``)."""
    names = []
    for arch in timm.list_models():
        if model_entrypoint(arch).__module__.startswith("zoo.backbones."):
            names += list(get_arch_pretrained_cfgs(arch)) or [arch]
    return names


def published_top1() -> dict[str, float]:
    """Return the published ImageNet-1k top-1 accuracies, in percent, by model name."""
    table = resources.files("zoo").joinpath("published.csv")
    if not table.is_file():
        return {}
    with table.open() as file:
        return {row["model"]: float(row["top1"]) for row in csv.DictReader(file) if row["top1"]}


def describe(name: str, top1: dict[str, float]) -> ModelRow:
    """Describe one model; it is built on the meta device, so without memory or initialisation."""
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = get_pretrained_cfg(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelRow(name, parameters, cfg.input_size, top1.get(name), cfg.has_weights)


def print_models(pattern: str = "*") -> None:
    """Print the models whose name matches ``pattern``; a pattern without wildcards may match any part of it."""
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = [name for name in our_models() if fnmatch(name, wanted) or fnmatch(name.partition(".")[0], wanted)]
    if not names:
        raise UserError(f"none of our models matches {pattern!r}")
    top1 = published_top1()
    table = Table(
        "model", "parameters", "input", "top-1", "weights", title=f"{len(names)} models", title_justify="left"
    )
    for column in table.columns[1:4]:
        column.justify = "right"
    progress = Console(stderr=True)
    for row in (describe(name, top1) for name in track(names, "reading", console=progress, transient=True)):
        table.add_row(
            row.name,
            format_count(row.parameters),
            f"{row.input_size[1]} x {row.input_size[2]}",
            "" if row.top1 is None else f"{row.top1:.1f}",
            "published" if row.has_weights else "",
        )
    Console().print(table)


def format_count(count: int) -> str:
    """Write a count of parameters in millions, or in thousands below one million."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"
