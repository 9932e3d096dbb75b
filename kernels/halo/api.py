"""The public function: checks its arguments and picks a backend."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels._checks import check_bias, check_map, check_tensors, resolve_backend, resolve_scale
from zoo.kernels.halo import ops, reference

BACKENDS = ("auto", "reference", "tiled", "triton")


def halo_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    *,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    stride: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the blocks of a 2-D map, each to itself and a halo around it.

    The map is cut into blocks of `block_size * block_size` tokens. The queries of one share a window of
    `win * win` keys, `win = block_size + 2 * halo_size`: the block and `halo_size` tokens on every side. Beyond the
    map, keys and values are zero; such keys are not masked, they take their share of the softmax. With `j` running
    over the window,

        out[i] = sum_j softmax_j(scale * query[i] . key[j] + query[i] . (rel_height[a] + rel_width[b])) * value[j]

    where a query in row `y` and column `x` of its block and a key in row `y'` and column `x'` of the window meet at
    `a = win - 1 + y' - y` and `b = win - 1 + x' - x`. With a stride there are fewer queries than keys, and
    `y` and `x` count the queries of the block, not its tokens.

    Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (arXiv:2103.12731).

    Args:
        query: [batch, height / stride, width / stride, heads, qk_dim], float16, bfloat16, float32 or float64, any
            strides in memory.
        key: [batch, height, width, heads, qk_dim], dtype and device of `query`.
        value: [batch, height, width, heads, v_dim], dtype and device of `query`.
        block_size: Side of a block in tokens of `key`. Height and width must be multiples of it.
        halo_size: Width of the halo in tokens, 0 for none.
        rel_height: [2 * win - 1, qk_dim], relative positions along the height, which the heads share; any floating
            dtype; with `rel_width`.
        rel_width: Shape of `rel_height`, along the width.
        stride: Tokens per query along either axis, a divisor of `block_size`.
        scale: Factor of query times key, `qk_dim ** -0.5` by default. The relative term is not scaled.
        backend: "auto" takes the fastest exact one; "reference", "tiled" or "triton" take that one or raise.

    Returns:
        [batch, height / stride, width / stride, heads, v_dim], dtype of `query`. Sums are accumulated in float32 or
        better. Gradients are of first order; backend="reference" also has higher ones.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or `backend` does not support the call.
    """
    _check_geometry(block_size, halo_size, stride)
    _check_tensors(query, key, value, block_size, stride)
    _check_tables(rel_height, rel_width, query, block_size + 2 * halo_size)
    scale = resolve_scale(scale, query)
    backend = resolve_backend(backend, BACKENDS)

    arguments = query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale
    if backend == "reference":
        return reference.halo_attention_2d(*arguments)
    if backend == "triton" and (obstacle := ops.why_not_triton(query, value)) is not None:
        raise ValueError(f"backend='triton' {obstacle}")
    return ops.halo_attention_2d(*arguments, backend)[0]


def _check_geometry(block_size, halo_size, stride) -> None:
    for name, size, least in (("block_size", block_size, 1), ("halo_size", halo_size, 0), ("stride", stride, 1)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if block_size % stride:
        raise ValueError(f"stride must divide block_size, got stride={stride} and block_size={block_size}")


def _check_tensors(query, key, value, block_size: int, stride: int) -> None:
    check_tensors(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_map(name, x)
    batch, height, width, heads, dim = key.shape
    if height % block_size or width % block_size or 0 in (height, width):
        raise ValueError(
            f"the map must be a multiple of block_size={block_size} on both axes, got {height} x {width}; "
            "pad it at the bottom and the right, or take another block_size"
        )
    expected = batch, height // stride, width // stride, heads, dim
    if tuple(query.shape) != expected:
        raise ValueError(f"query must be {expected} to go with key and stride, got shape {tuple(query.shape)}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have the shape of key but for the last axis, {tuple(key.shape[:-1])}, "
            f"got {tuple(value.shape[:-1])}"
        )


def _check_tables(rel_height, rel_width, query: Tensor, win: int) -> None:
    if (rel_height is None) != (rel_width is None):
        missing = "rel_height" if rel_height is None else "rel_width"
        raise ValueError(f"rel_height and rel_width go together, but {missing} is None")
    if rel_height is not None:
        shape = 2 * win - 1, query.shape[-1]
        for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
            check_bias(name, table, query, shape, "[2 * (block_size + 2 * halo_size) - 1, qk_dim]")
