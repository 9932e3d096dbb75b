"""CLEAR: convolution-like local attention for diffusion transformers. Paper: arXiv:2412.16112.

Checkpoints hold, under the names of diffusers' Flux, the weights that distillation changed; see `load_clear_weights`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.diffusion.grid import Grid
from zoo.diffusion.processor import GridAttnProcessor, dense_attention
from zoo.kernels import circular_attention_2d

TRAINING_TOKENS = 4608  # Flux at 1024 x 1024: 64 * 64 image and 512 text tokens
_MAX_LISTED = 3  # names that an error lists

# What distillation trains in every attention layer; text's own projections and the norms stay.
_TRAINED = re.compile(r"\.attn\.(to_[qkv]|to_out\.0)\.(weight|bias)$")
_SPATIAL = re.compile(r"\.processor(\.processor)?\.spatial_weight$")


class ClearAttnProcessor(GridAttnProcessor, nn.Module):
    """Every image token sees a circle around it, all text and, pooled, the whole map; text sees text and image.

    Args:
        radius: The circle, in tokens: those at a Euclidean distance of less than `radius`. It may exceed the map.
        down_factor: Side of the blocks of tokens whose keys and values are pooled into one, by the learned
            `spatial_weight` [1, 1, 1, down_factor, 1, down_factor, 1], for every image token to see too. It must divide
            the sides of the map. None pools nothing, and there are no weights.
        proportional: Whether to scale the logits by sqrt(log n / log 4608), with n the number of tokens, tenfold if
            pooled, as the authors do at sizes beyond 1024 x 1024.
        grid: See `GridAttnProcessor`.

    Raises:
        TypeError: A number is no int.
        ValueError: `radius` is below 1, or `down_factor` below 2.
    """

    def __init__(
        self,
        radius: int,
        down_factor: int | None = None,
        proportional: bool = False,
        grid: Grid | tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        GridAttnProcessor.__init__(self, grid)
        for name, value, least in (("radius", radius, 1), ("down_factor", down_factor, 2)):
            if name == "down_factor" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.radius = radius
        self.down_factor = down_factor
        self.proportional = proportional
        self.spatial_weight = None
        if down_factor is not None:
            shape = 1, 1, 1, down_factor, 1, down_factor, 1
            self.spatial_weight = nn.Parameter(torch.full(shape, 1 / down_factor**2))

    def extra_repr(self) -> str:
        return f"radius={self.radius}, down_factor={self.down_factor}, proportional={self.proportional}"

    def check(self, grid: Grid, layer: str) -> None:
        f = self.down_factor
        if f is not None and (grid.height % f or grid.width % f):
            raise ValueError(
                f"down_factor must divide the map: {f} does not divide {grid.height} x {grid.width}, the map of {layer}"
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float):
        if self.proportional:
            tokens = grid.tokens if self.down_factor is None else 10 * grid.tokens
            scale = scale * math.sqrt(math.log(tokens) / math.log(TRAINING_TOKENS))
        (q, words), (k, text_k), (v, text_v) = (grid.split(x) for x in (query, key, value))
        extra_key, extra_value = text_k, text_v
        if self.down_factor is not None:
            # Through nn.Module, so that hooks which bring offloaded weights are run.
            pooled = nn.Module.__call__(self, k), nn.Module.__call__(self, v)
            extra_key, extra_value = (
                x if words is None else torch.cat((text, x), dim=1) for text, x in zip((text_k, text_v), pooled)
            )
        image = circular_attention_2d(q, k, v, self.radius, extra_key=extra_key, extra_value=extra_value, scale=scale)
        return image, None if words is None else dense_attention(words, key, value, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Blocks of the map `x` [batch, height, width, heads, head_dim] as tokens [batch, blocks, heads, head_dim]."""
        f = self.down_factor
        blocks = x.unflatten(1, (-1, f)).unflatten(3, (-1, f))
        weight = self.spatial_weight.view(f, f).to(x.dtype)
        return torch.einsum("bifjghd,fg->bijhd", blocks, weight).flatten(1, 2)


def load_clear_weights(model: nn.Module, path: str | Path) -> None:
    """Replace the attention weights of `model` by those of a CLEAR checkpoint, and fill the attached processors.

    Takes the authors' files (`clear_local_16.safetensors`, `clear_local_8_down_4.safetensors`) and those of
    `save_clear_weights`. The window is no weight: a file says it in its name or metadata, and it must be that of
    the attached `ClearAttnProcessor`. `detach()` does not bring the replaced weights back.

    Args:
        model: The transformer, not the pipeline, with `ClearAttnProcessor` attached.
        path: The safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: `model` has no `ClearAttnProcessor`.
        ValueError: The file is unreadable, of another radius, down_factor or width, or names weights that the model
            does not have, or lacks some. The model is unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    clear = _clear_processor(model)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read as safetensors: {error}") from error

    radius, factor = _window_of(path.name, metadata)
    if radius is not None and (radius, factor) != (clear.radius, clear.down_factor):
        raise ValueError(
            f"{path.name} is for radius={radius}, down_factor={factor}, but radius={clear.radius}, "
            f"down_factor={clear.down_factor} is attached"
        )
    own = clear_parameters(model)
    for problem, names in (
        ("lacks", sorted(own.keys() - weights.keys())),
        ("has, which the model does not,", sorted(weights.keys() - own.keys())),
        ("has other shapes for", [n for n in own if n in weights and own[n].shape != weights[n].shape]),
    ):
        if names:
            listed = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
            example = names[0]
            shapes = ""
            if example in own and example in weights:
                shapes = f" ({tuple(weights[example].shape)}, the model has {tuple(own[example].shape)})"
            raise ValueError(f"{path.name} {problem} {len(names)} weights: {listed}{shapes}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def save_clear_weights(model: nn.Module, path: str | Path) -> None:
    """Write what distillation trains, under the authors' names, for `load_clear_weights`.

    Args:
        model: The transformer with `ClearAttnProcessor` attached.
        path: The safetensors file to write.

    Raises:
        TypeError: `model` has no `ClearAttnProcessor`.
    """
    clear = _clear_processor(model)
    weights = {name: parameter.detach().contiguous().cpu() for name, parameter in clear_parameters(model).items()}
    metadata = {"format": "pt", "radius": str(clear.radius), "down_factor": str(clear.down_factor or 1)}
    save_file(weights, path, metadata=metadata)


def clear_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What distillation trains of `model`, by the authors' names: see `load_clear_weights`."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".")  # under LoRA
        if _TRAINED.search(name):
            found[name] = parameter
        elif _SPATIAL.search(name):
            found[_SPATIAL.sub(".processor.spatial_weight", name)] = parameter
    return found


def _clear_processor(model: nn.Module) -> ClearAttnProcessor:
    """An attached processor, for its window."""
    for module in model.modules():
        if isinstance(module, ClearAttnProcessor):
            return module
    raise TypeError(f"model must have a ClearAttnProcessor attached, got {type(model).__name__} without")


def _window_of(name: str, metadata: dict[str, str]) -> tuple[int | None, int | None]:
    """Radius and down_factor that a file says it is for, or None twice."""
    if "radius" in metadata:
        radius, factor = int(metadata["radius"]), int(metadata.get("down_factor", 1))
    else:
        match = re.search(r"clear_local_(\d+)(?:_down_(\d+))?", name)
        if match is None:
            return None, None
        radius, factor = int(match[1]), int(match[2] or 1)
    return radius, None if factor == 1 else factor
