"""Loading weights: a file that does not fit is refused before it changes the model, and the error says why."""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from timm.models import PretrainedCfg, clean_state_dict, load_state_dict
from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import download_cached_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["AdaptedLoading", "CheckedLoading", "build_model", "checkpoint_filter_fn", "mismatches"]

# The authors' trainers may leave their configuration in a file: a dict by another name, and read as one.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

_MAX_LISTED = 3  # offenders of each kind that an error names

# What reading weights raises where they are missing, truncated, or not weights at all.
_UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
    pickle.UnpicklingError,
    struct.error,
)


class CheckedLoading:
    """Mixin before `nn.Module`: `load_state_dict` copies everything or nothing.

    torch copies the entries that fit and then raises over the others, which leaves a mixture. A submodule that
    understands other layouts of its entries has a method `adapt_state_dict(state_dict, prefix)`, which edits
    `state_dict` in place; it is given a copy.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load `state_dict`, which is not modified; see `torch.nn.Module.load_state_dict`.

        Raises:
            RuntimeError: A shape differs or, if `strict`, a key is missing or unexpected. The model is unchanged.
            TypeError: `state_dict` is not a mapping.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
        adapted = OrderedDict(state_dict)
        metadata = getattr(state_dict, "_metadata", None)
        if metadata is not None:
            adapted._metadata = metadata  # versions of the modules' layouts, which torch reads from this attribute
        for name, module in self.named_modules():
            if hasattr(module, "adapt_state_dict"):
                module.adapt_state_dict(adapted, f"{name}." if name else "")
        _add_counters(self, adapted)
        problems = mismatches(self, adapted, strict)
        if problems:
            raise RuntimeError("\n  ".join([f"weights do not fit {type(self).__name__}, nothing loaded:", *problems]))
        return super().load_state_dict(adapted, strict=strict, assign=assign)


class AdaptedLoading:
    """Mixin before `nn.Module`, for a module with `adapt_state_dict` (see `CheckedLoading`).

    It is then adapted to on every road, also where the model is inside another one.
    """

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.adapt_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _add_counters(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Add the batch counters of norms to files without them, as torch does to those of its first versions."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, _BatchNorm) and f"{prefix}running_mean" in state_dict:
            state_dict.setdefault(f"{prefix}num_batches_tracked", torch.tensor(0))


def mismatches(model: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> list[str]:
    """What in `state_dict` does not fit `model`, and what would help; one line each."""
    expected = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    common = [k for k in expected if k in state_dict]
    problems = []

    not_tensors = [f"{k} ({type(state_dict[k]).__name__})" for k in common if not _is_tensor(state_dict[k])]
    if not_tensors:
        problems.append(f"not tensors: {_listed(not_tensors)}")

    reshaped = [k for k in common if _is_tensor(state_dict[k]) and state_dict[k].shape != expected[k].shape]
    if reshaped:
        shapes = [f"{k} is {list(state_dict[k].shape)}, the model's {list(expected[k].shape)}" for k in reshaped]
        problems.append(f"other shapes: {_listed(shapes)}")
        problems += _shape_hints(model, state_dict, reshaped)

    if strict:
        missing = [k for k in expected if k not in state_dict]
        unexpected = [k for k in state_dict if k not in expected and not k.endswith("_extra_state")]
        if missing:
            problems.append(f"missing: {_listed(missing)}")
        if unexpected:
            problems.append(f"unexpected: {_listed(unexpected)}")
        nested = [k for k in unexpected if isinstance(state_dict[k], Mapping)]
        if nested:
            problems.append(f"the weights may be under [{nested[0]!r}]")
        elif not common and expected:
            prefix = _find_prefix(state_dict, missing)
            problems.append(
                f"every name has {prefix!r} before it: load the weights without that"
                if prefix
                else "no name in common: the weights are of another architecture"
            )
    return problems


def _find_prefix(state_dict: Mapping[str, Any], names: Sequence[str]) -> str:
    """What stands in `state_dict` before all of `names`, "" if nothing does."""
    found = (key.removesuffix(names[0]) for key in state_dict if key.endswith(f".{names[0]}"))
    return next((prefix for prefix in found if all(f"{prefix}{name}" in state_dict for name in names)), "")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _listed(items: list[str]) -> str:
    more = len(items) - _MAX_LISTED
    return "; ".join(items[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _shape_hints(model: nn.Module, state_dict: Mapping[str, Any], reshaped: list[str]) -> list[str]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    classifier = f"{cfg.get('classifier', 'head')}.weight"
    stem = f"{cfg.get('first_conv')}.weight"
    hints = []
    if classifier in reshaped:
        hints.append(f"num_classes={state_dict[classifier].shape[0]} would fit {classifier}")
    if stem in reshaped and state_dict[stem].ndim == 4:
        hints.append(f"in_chans={state_dict[stem].shape[1]} would fit {stem}")
    return hints


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The weights in what a trainer saved, under the names that they have in the model, without a prefix to all.

    Weights averaged over the training are taken only where there are no others: published figures are of the latter.
    The result is a copy, since timm edits what it loads (stem, classifier).
    """
    for key in ("state_dict", "model", "state_dict_ema", "model_ema"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    state_dict = clean_state_dict(state_dict)
    prefix = _find_prefix(state_dict, list(model.state_dict()))
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    pretrained_filter_fn: Callable[[Mapping[str, Any], nn.Module], Mapping[str, Any]] = checkpoint_filter_fn,
    **kwargs,
) -> nn.Module:
    """`timm.models.build_model_with_cfg`, which reads files and downloads alike, as `checkpoint_filter_fn` says.

    A download may hold more than weights, and its address need not carry a file name. Errors about weights name where
    the weights came from.

    Args:
        model_cls: Class to build.
        variant: Name of the model, without a tag.
        pretrained: Whether to load weights.
        out_indices: Maps that `features_only` returns: the last n, or these.
        pretrained_filter_fn: Turns a file's content into a state dict of the model, without changing it. What a file
            given as `checkpoint_path` needs too belongs into `adapt_state_dict` of the model (`CheckedLoading`). Of
            averaged weights beside others, timm takes there the averaged ones.
        **kwargs: See `timm.models.build_model_with_cfg`.

    Raises:
        FileNotFoundError: The file of the weights does not exist.
        RuntimeError: There are no weights, for which `notes` of the configuration may have a reason; or they could not
            be fetched, are truncated, hold more than tensors, or do not fit.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    source = "the given state_dict" if cfg.state_dict else cfg.file or cfg.hf_hub_id or cfg.url
    is_file = bool(cfg.file or (cfg.url and not cfg.hf_hub_id))
    reads = pretrained and is_file and not cfg.state_dict and cfg.source not in ("hf-hub", "local-dir")
    built = []

    def construct(**model_args):
        built.append(model_cls(**model_args))
        return built[-1]

    def read(_: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
        nonlocal source
        path = cfg.file
        if path is None:
            path = _download(cfg, variant, kwargs.get("cache_dir"))
            source = f"{cfg.url}, kept in {path}"
        return pretrained_filter_fn(load_state_dict(path, use_ema=False), model)

    if reads:
        # To timm, which copies what is here, a mere sign that it need not look for a file: `read` does.
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": {"": None}}
    try:
        model = build_model_with_cfg(
            construct,
            variant,
            pretrained,
            feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
            pretrained_filter_fn=read if reads else pretrained_filter_fn,
            **kwargs,
        )
    except _UNREADABLE as error:
        if pretrained and built and cfg.notes and not source:
            raise RuntimeError(f"no weights to load for {variant}: {'; '.join(cfg.notes)}") from error
        if not (pretrained and source and built):  # an error of the constructor
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else RuntimeError
        detail = str(error) or "no such file"  # timm raises a bare FileNotFoundError
        raise kind(f"could not load the weights of {variant} from {source}: {detail}") from error
    if reads:
        for part in (model, *built):
            part.pretrained_cfg.pop("state_dict", None)
    return model


def _download(cfg: PretrainedCfg, variant: str, cache_dir: str | None) -> str:
    """Path of the file at the address in `cfg`, which is fetched unless it is there."""
    url = urlsplit(cfg.url)
    name = PurePosixPath(url.path).name
    if "." not in name:  # the link of a cloud drive, told apart by an identifier
        name = f"{variant}.{parse_qs(url.query).get('id', [name])[0]}.pth"
    return download_cached_file((cfg.url, name), check_hash=False, cache_dir=cache_dir)
