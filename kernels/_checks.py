"""Checks of arguments that the operators share. Each raises an error that names the argument and what it was."""

from __future__ import annotations

from torch import SymInt, Tensor, bfloat16, float16, float32, float64
from torch.compiler import is_compiling

from zoo.kernels._autograd import transformed

DTYPES = frozenset({float16, bfloat16, float32, float64})


def check_maps(query, key, value, extra_key=None, extra_value=None) -> None:
    """Maps of one shape, and lists of tokens for their batch and heads or None, all of one dtype and device."""
    if (extra_key is None) != (extra_value is None):
        missing = "extra_key" if extra_key is None else "extra_value"
        raise ValueError(f"extra_key and extra_value go together, but {missing} is None")
    extra = {} if extra_key is None else {"extra_key": extra_key, "extra_value": extra_value}
    check_tensors(query=query, key=key, value=value, **extra)
    check_map("query", query)
    check_same_shape("key", key, "query", query)
    check_same_shape("value", value, "query", query)
    batch, _, _, heads, dim = query.shape
    for name, x in extra.items():
        shape = tuple(x.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, heads, dim):
            raise ValueError(f"{name} must be [{batch}, tokens, {heads}, {dim}] to go with query, got shape {shape}")
    if extra:
        check_same_shape("extra_value", extra_value, "extra_key", extra_key)


def check_tensors(**named) -> None:
    """All are tensors, of the floating dtype and on the device of the first."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    first, like = next(iter(named.items()))
    if like.dtype not in DTYPES:
        names = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{first} must be of a floating dtype, got {like.dtype}; cast it to {names}")
    for name, x in named.items():
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {like.dtype}, got {x.dtype}")
        if x.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}, got {x.device}")


def check_map(name: str, x: Tensor) -> None:
    """`x` is laid out as a map."""
    if x.dim() != 5:
        raise ValueError(f"{name} must be [batch, height, width, heads, head_dim], got shape {tuple(x.shape)}")
    if 0 in x.shape[3:]:
        raise ValueError(f"{name} must have heads, and a head_dim of at least 1, got shape {tuple(x.shape)}")


def check_same_shape(name: str, x: Tensor, other: str, like: Tensor) -> None:
    """`x` has the shape of `like`, whose name is `other`."""
    if x.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {other}, {tuple(like.shape)}, got {tuple(x.shape)}")


def check_bias(name: str, bias, query: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """`bias` is a tensor of `shape`, which `layout` puts in words, of any floating dtype, on the device of `query`."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(bias).__name__}")
    if not bias.dtype.is_floating_point:
        raise TypeError(f"{name} must be of a floating dtype, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {bias.device}")
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name} must be {layout} = {shape}, got {tuple(bias.shape)}")


def pair(name: str, value, kind: type) -> tuple:
    """One value for both axes, or two, as a tuple. What a compiler knows as a symbol is an integer too."""
    if type(value) is kind:  # first what is usual: calls are hot
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is kind and type(value[1]) is kind:
        return value
    kinds = (int, SymInt) if kind is int else kind
    if isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)):
        return value, value
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(x, kinds) and (kind is bool or not isinstance(x, bool)) for x in value)
    ):
        return tuple(value)
    raise TypeError(f"{name} must be one {kind.__name__} or a (height, width) pair of them, got {value!r}")


def positive_pair(name: str, value) -> tuple[int, int]:
    """`pair` of integers that are at least 1."""
    values = pair(name, value, int)
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1 on both axes, got {values}")
    return values


def resolve_scale(scale, query: Tensor, name: str = "scale") -> float:
    """`scale` as a float, `head_dim ** -0.5` where it is None."""
    if scale is None:
        return query.shape[-1] ** -0.5
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {type(scale).__name__}")
    return float(scale)


def resolve_backend(backend, backends: tuple[str, ...]) -> str:
    """`backend`, which must be one of `backends`; for "auto" the reference where derivatives are torch's affair."""
    if backend not in backends:
        raise ValueError(f"backend must be one of {', '.join(backends)}, got {backend!r}")
    return "reference" if backend == "auto" and not is_compiling() and transformed() else backend
