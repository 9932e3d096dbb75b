"""Putting a processor into a diffusers model, and telling it the token grid of every call.

A forward pre-hook on the model derives the grid and sends it down in the argument that diffusers passes to every
attention layer anyway; a pre-hook on every attention layer takes it out. So the grid belongs to the call: there is
no state that two threads, two models or a recomputation for gradient checkpointing could disturb, and
`torch.compile` sees plain numbers.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from zoo.diffusion.grid import Grid, as_grid

_MAX_LISTED = 6  # layers that an error names


class Attachment:
    """What `attach` returns: the processors in place, until `detach()` or the end of a `with` block."""

    def __init__(self, model: nn.Module, processors: dict[str, Any], originals: dict[str, Any], hooks: list) -> None:
        self.model = model
        self.processors = processors  # by layer
        self._originals = originals
        self._hooks = hooks

    def detach(self) -> None:
        """Put the model's own processors back. Detaching again does nothing."""
        for hook in self._hooks:
            hook.remove()
        for name, processor in self._originals.items():
            self.model.get_submodule(name).set_processor(processor)
        self._hooks, self._originals = [], {}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc_info) -> None:
        self.detach()


def attach(
    pipeline_or_model: DiffusionPipeline | nn.Module,
    processor: Callable,
    layers: str | Sequence[str] | None = None,
    *,
    grid: Grid | tuple[int, int] | None = None,
) -> Attachment:
    """Compute the self-attention of a diffusers model with `processor`.

    The processor is told the token grid of every call, whatever its size, batch and number of text tokens. Weights
    stay where they are, so LoRA, fused projections and offloading go on working. Fuse projections and compile a whole
    Flux (`torch.compile(model)`) before attaching; the other models, and blocks, may be compiled after it as well.

    Args:
        pipeline_or_model: A pipeline, its `transformer` or its `unet`, compiled or not: UNet2DConditionModel
            (self-attention layers), SD3Transformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel,
            DiTTransformer2DModel or HunyuanDiT2DModel.
        processor: A processor of this package, or any with a parameter `grid`. One that is a module, because it may
            hold weights, is copied for every layer. One that needs to know more of a call has a method
            `pre_hooks(model, layers)`, a list of modules and forward pre-hooks of arguments and keywords.
        layers: Names of the layers to change, or of modules that hold them ("down_blocks.0"), with shell wildcards
            ("transformer_blocks.1?.attn"); all self-attention by default.
        grid: (height, width) of the map of tokens in every call, instead of deriving it. In a single call of Flux
            `joint_attention_kwargs={"grid": (height, width)}` does the same.

    Returns:
        A handle with `detach()`, which is also a context manager.

    Raises:
        TypeError: The model or the processor is of the wrong type.
        ValueError: A layer is not there, has an IP-Adapter or a backend of its own, or was attached to before. The
            model is unchanged.
    """
    called = _find_model(pipeline_or_model)
    model = getattr(called, "_orig_mod", called)  # what torch.compile wrapped
    family = _find_family(model)
    if not callable(processor) or "grid" not in inspect.signature(processor.__call__).parameters:
        raise TypeError(
            f"processor must take the token grid as a parameter `grid`, as those of zoo.diffusion do, "
            f"got {type(processor).__name__}"
        )
    if any(isinstance(hook, _ModelHook) for hook in model._forward_pre_hooks.values()):
        raise ValueError(f"{type(model).__name__} is attached to already; detach that first")
    given = None if grid is None else as_grid(grid)
    names = _choose(_self_attention(model, family), layers)
    originals = {name: model.get_submodule(name).processor for name in names}
    for name, original in originals.items():
        _check_replaceable(name, original)

    processors = {name: _for_layer(processor, model.get_submodule(name)) for name in names}
    pre_hooks = [(model, _ModelHook(family, model, given))]
    for name, layer in model.named_modules():
        if isinstance(layer, (Attention, FluxAttention)):
            pre_hooks.append((layer, _LayerHook(name, family, processors.get(name))))
    if hasattr(processor, "pre_hooks"):
        pre_hooks += processor.pre_hooks(model, names)
    if called is not model:  # outside of what is compiled, where the values of tensors can be read
        pre_hooks += [(called, hook) for module, hook in pre_hooks if module is model]
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pre_hooks]
    for name, new in processors.items():
        model.get_submodule(name).set_processor(new)
    return Attachment(model, processors, originals, hooks)


class _Carried(NamedTuple):
    """A rotary embedding with the grid on its back, for the model that passes its layers nothing else."""

    image_rotary_emb: Any
    grid: tuple


def _patch_map(model: nn.Module, call: dict[str, Any]) -> tuple[int, int]:
    height, width = call["hidden_states"].shape[-2:]
    return height // model.config.patch_size, width // model.config.patch_size


def _unet_map(model: nn.Module, call: dict[str, Any]) -> tuple[int, int]:
    return tuple(call["sample"].shape[-2:])


def _flux_map(model: nn.Module, call: dict[str, Any]) -> tuple[int, int]:
    """Flux is given a packed sequence, whose shape only the values of `img_ids`, (0, row, column) each, tell."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "the grid of Flux lies in the values of img_ids, which cannot be read while the whole model is compiled: "
            "call torch.compile(model) before attach(), or give attach() grid=(height, width)"
        )
    ids = call["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    rows, columns = (ids[:, axis].double() - ids[0, axis] for axis in (1, 2))
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    counted = torch.arange(len(ids), device=ids.device, dtype=torch.float64)
    if height * width != len(ids) or not torch.equal(rows * width + columns, counted):
        raise ValueError(
            f"img_ids must count the rows and columns of one map of {len(ids)} tokens, row by row, for the grid to be "
            "derived from them; where they do not, give attach() grid=(height, width)"
        )
    return height, width


@dataclass(frozen=True)
class _Family:
    """How to find the grid of a model's calls, and which argument reaches all of its attention layers."""

    model: type[nn.Module]
    carrier: str
    find_map: Callable[[nn.Module, dict[str, Any]], tuple[int, int]] = _patch_map
    fit: Callable[[Grid, int, int], Grid] = Grid.resolve
    text_first: bool | None = None  # None where text is not in the image's sequence


_FAMILIES = (
    _Family(UNet2DConditionModel, "cross_attention_kwargs", _unet_map, Grid.level),
    _Family(SD3Transformer2DModel, "joint_attention_kwargs", text_first=False),
    _Family(FluxTransformer2DModel, "joint_attention_kwargs", _flux_map, text_first=True),
    _Family(PixArtTransformer2DModel, "cross_attention_kwargs"),
    _Family(DiTTransformer2DModel, "cross_attention_kwargs"),
    _Family(HunyuanDiT2DModel, "image_rotary_emb"),
)


class _ModelHook:
    """Before the model's forward: derives the grid and puts it into the argument that carries it.

    A grid may be there already, from the user or from this hook on the compiled wrapper of the model. It travels as a
    plain tuple, because torch 2.11 cannot trace a dict that holds a named one.
    """

    def __init__(self, family: _Family, model: nn.Module, grid: Grid | None) -> None:
        self.family = family
        self.model = model
        self.grid = grid
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if len(args) > len(self.names):
            return None  # forward itself will complain
        call = {**dict(zip(self.names, args)), **kwargs}
        carrier = self.family.carrier
        carried = call.get(carrier)
        if isinstance(carried, _Carried) or (isinstance(carried, dict) and "grid" in carried):
            given = carried.grid if isinstance(carried, _Carried) else carried["grid"]
        else:
            given = self.grid
        grid = self._complete(self.family.find_map(self.model, call) if given is None else given, call)
        if carrier == "image_rotary_emb":
            rotary = carried.image_rotary_emb if isinstance(carried, _Carried) else carried
            call[carrier] = _Carried(rotary, tuple(grid))
        else:
            call[carrier] = {**(carried or {}), "grid": tuple(grid)}
        return (), call

    def _complete(self, size, call: dict[str, Any]) -> Grid:
        """`size`, a `Grid` or (height, width), with the text tokens of this call."""
        carried = isinstance(size, tuple) and len(size) == len(Grid._fields)
        grid = Grid(*size) if carried else as_grid(size)
        if self.family.text_first is None:
            return grid
        return grid._replace(text=call["encoder_hidden_states"].shape[1], text_first=self.family.text_first)


class _LayerHook:
    """Before an attention layer's forward: hands the grid to our processor, and hides it from any other."""

    def __init__(self, name: str, family: _Family, processor: Callable | None) -> None:
        self.name = name
        self.family = family
        self.processor = processor

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        grid = kwargs.pop("grid", None)
        carried = kwargs.get("image_rotary_emb")
        if isinstance(carried, _Carried):
            kwargs["image_rotary_emb"], grid = carried
        if self.processor is None or grid is None:
            return args, kwargs
        if layer.processor is not self.processor:
            raise ValueError(
                f"{self.name} has another processor than was attached, {type(layer.processor).__name__}: "
                "fuse_qkv_projections(), IP-Adapters and set_attn_processor() replace it; call them before attach()"
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states")
        grid = self.family.fit(Grid(*grid), hidden_states.shape[1], 0 if text is None else text.shape[1])
        if hasattr(self.processor, "check"):
            self.processor.check(grid, self.name)
        return args, {**kwargs, "grid": grid}


def _find_model(pipeline_or_model) -> nn.Module:
    """The denoiser of a pipeline, or the model itself."""
    if isinstance(pipeline_or_model, DiffusionPipeline):
        for name in ("transformer", "unet"):
            if isinstance(getattr(pipeline_or_model, name, None), nn.Module):
                return getattr(pipeline_or_model, name)
    return pipeline_or_model


def _find_family(model) -> _Family:
    for family in _FAMILIES:
        if isinstance(model, family.model):
            return family
    supported = ", ".join(family.model.__name__ for family in _FAMILIES)
    raise TypeError(f"pipeline_or_model must be, or hold, one of {supported}; got {type(model).__name__}")


def _self_attention(model: nn.Module, family: _Family) -> list[str]:
    """Names of the layers that run over the map of image tokens."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (Attention, FluxAttention))}
    if family.text_first is not None:
        return list(layers)
    return [name for name, m in layers.items() if name.endswith("attn1") and not m.is_cross_attention]


def _choose(names: list[str], layers: str | Sequence[str] | None) -> list[str]:
    """Those of `names` that `layers` asks for."""
    if layers is None:
        return names
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers must be names of modules, got {pattern!r}")
        found = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
        if not found:
            some = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
            raise ValueError(f"layers: {pattern!r} is none of the model's {len(names)} self-attention layers: {some}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _check_replaceable(name: str, processor) -> None:
    kind = type(processor).__name__
    if "IPAdapter" in kind:
        raise ValueError(f"{name} has an IP-Adapter ({kind}), which would be lost; call unload_ip_adapter() first")
    if getattr(processor, "_attention_backend", None) is not None:
        raise ValueError(
            f"{name} has attention backend {processor._attention_backend!r}, which processors of zoo.diffusion cannot "
            "take; call reset_attention_backend() first"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"{name} runs under context parallelism, where windows would reach tokens that lie on other devices"
        )


def _for_layer(processor: Callable, layer: nn.Module) -> Callable:
    """The processor itself, or a copy for the layer if it may hold weights."""
    if not isinstance(processor, nn.Module):
        return processor
    like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    processor = copy.deepcopy(processor)
    return processor if like is None else processor.to(like.device, like.dtype)
