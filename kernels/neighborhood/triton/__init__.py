"""Fused neighborhood attention for GPUs: launches the kernels of `forward`, `backward` and `bias`."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels._launch import launch
from zoo.kernels.neighborhood import window
from zoo.kernels.neighborhood.triton import backward as _backward
from zoo.kernels.neighborhood.triton import bias as _bias
from zoo.kernels.neighborhood.triton import forward as _forward
from zoo.kernels.neighborhood.triton import tuning
from zoo.kernels.neighborhood.triton.common import HELD, NO_BIAS, TABLE, UNROLLED

# Programs among which the sums over the whole batch are split: enough to fill a large GPU.
BIAS_PROGRAMS = 1024
EXTRA_PROGRAMS = 512
# A program takes so many images in turn at most, as long as so many programs are left.
IMAGES = 8
PROGRAMS = 512
# Bias is unrolled where at least so many tiles share each pattern and it stays small; its gradient is summed for as
# many heads at a time as stay within these bytes, and for one at least.
UNROLL_REUSE = 4
UNROLL_BYTES = 2**26
# A program sums up the gradient of the bias for all keys of a tile at once where that takes so many registers of a
# thread, and so much shared memory, at most.
SUM_REGISTERS = 80
SUM_BYTES = 2**17


@lru_cache(maxsize=256)
def _axis(length, kernel_size, dilation, stride, border, tile, plain, of_keys) -> tuple[int, int, int, int, int]:
    """Of one axis: most members of a class, kinds of classes, tiles, patterns, and most members a tile meets."""
    most = window.class_length(length, dilation, 0)
    kinds = 1 if length % dilation == 0 else 2
    head, tail = (kernel_size, kernel_size) if of_keys else (kernel_size // 2, kernel_size - kernel_size // 2 - 1)
    patterns = reach = 0
    for members in range(most - kinds + 1, most + 1):
        geometry = members, kernel_size, stride, border
        for number, first in enumerate(range(0, members, tile)):
            last = min(first + tile, members) - 1
            if of_keys:
                span = window.last_query(last, *geometry) + 1 - window.first_query(first, *geometry)
            else:
                span = window.window_end(last, *geometry) - window.window_start(first, *geometry)
            reach = max(reach, span)
            pattern = window.tile_pattern(number, tile, members, head, tail) if plain else number
            patterns = max(patterns, pattern + 1)
    return most, kinds, -(-most // tile), patterns, reach


class _Signature(NamedTuple):
    """All of a call but its tensors: what decides how the kernels are launched."""

    shape: tuple[int, int, int, int, int]
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    stride: tuple[int, int]
    is_causal: tuple[bool, bool]
    radius: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    tf32: bool
    packed: int  # 3 if the gradients of query, key and value are to be one tensor, else 1

    @property
    def exact(self) -> bool:
        """Whether the kernels keep to the precision of float32 rather than to the GPU's fastest instructions."""
        return self.dtype == torch.float32

    @property
    def of_sums(self) -> torch.dtype:
        """In which what programs leave is summed up."""
        return torch.float64 if self.exact else torch.float32

    @property
    def block_e(self) -> int:
        """Extra tokens taken at a time."""
        return 64 if self.shape[-1] * self.dtype.itemsize <= 256 else 32

    @property
    def span(self) -> int:
        """What the best tile sizes depend on."""
        return tuning.span(self.shape[1:3], self.kernel_size, self.dilation)


class _Walk(NamedTuple):
    """How one kernel goes over the map."""

    programs: int
    tiles: tuple[int, int]
    layout: tuple[int, ...]  # of unrolled bias, see `tile_bias`
    rows: tuple[int, ...]  # of unrolled bias, for one head: how many tiles share each (kernel "bias" only)
    unrolled: tuple[int, ...] | None  # its shape, where the kernel reads the bias so
    options: dict  # compile-time arguments
    unroll_options: dict


def _tiles_of_rows(length, kernel_size, dilation, most, patterns, tile, plain) -> list[int]:
    """Along one axis: how many tiles share each pattern in each kind of class."""
    counts = []
    for kind in range(1 if length % dilation == 0 else 2):
        _, classes = window.classes_of_kind(kind, length, dilation)
        for pattern in range(patterns):
            if plain:
                head, tail = kernel_size // 2, kernel_size - kernel_size // 2 - 1
                _, tiles = window.pattern_tiles(pattern, tile, most - kind, head, tail)
            else:
                tiles = int(pattern * tile < most - kind)
            counts.append(classes * tiles)
    return counts


@lru_cache(maxsize=1024)
def _walk(s: _Signature, kernel: str) -> _Walk:
    """How a kernel goes over the map, by the table of tile sizes."""
    batch, height, width, heads, dim = s.shape
    config = tuning.config(kernel, s.span, dim, s.dtype, s.has_bias, s.device)
    of_keys = kernel == "key_value"
    # Windows that move by one with the query and shift at both borders. Others differ from tile to tile.
    borders = window.borders(s.is_causal, s.radius)
    plain = s.stride == (1, 1) and not any(borders)
    axes = zip((height, width), s.kernel_size, s.dilation, s.stride, borders, (config.tile_y, config.tile_x))
    most, kinds, tiles, patterns, reach = zip(*(_axis(*axis, plain, of_keys) for axis in axes))
    blocks = tuple(-(-r // b) for r, b in zip(reach, (config.block_y, config.block_x)))
    programs = batch * heads * math.prod(tiles) * math.prod(s.dilation)  # every tile of every class, head and image
    shared = ()
    if kernel == "bias":
        axes = zip((height, width), s.kernel_size, s.dilation, most, patterns, (config.tile_y, config.tile_x))
        per_axis = [_tiles_of_rows(*axis, plain) for axis in axes]
        shared = tuple(batch * rows * cols for rows, cols in product(*per_axis))

    mode, images, unrolled = TABLE if s.has_bias else NO_BIAS, 1, None
    shape = (
        math.prod(kinds) * math.prod(patterns) * heads,
        *blocks,
        config.tile_y * config.tile_x,
        config.block_y * config.block_x,
    )
    if kernel == "forward" and blocks == (1, 1):  # what does not change with the image is made once for several
        mode = HELD if s.has_bias else NO_BIAS
        while images < IMAGES and programs > PROGRAMS * images:
            images *= 2
        programs = -(-batch // images) * (programs // batch)
    elif s.has_bias and programs >= UNROLL_REUSE * shape[0] and 4 * math.prod(shape) <= UNROLL_BYTES:
        mode, unrolled = UNROLLED, shape
    window_options = {
        "KERNEL_Y": s.kernel_size[0],
        "KERNEL_X": s.kernel_size[1],
        "STRIDE_Y": s.stride[0],
        "STRIDE_X": s.stride[1],
        "BORDER_Y": borders[0],
        "BORDER_X": borders[1],
        "PLAIN": plain,
    }
    block_d = max(16, triton.next_power_of_2(dim))
    options = window_options | config.options() | {"RADIUS": s.radius, "dim": dim, "BLOCK_D": block_d}
    options |= {"EVEN_D": block_d == dim, "PRECISION": "tf32" if s.tf32 else "ieee", "EXACT": s.exact}
    if kernel != "bias":
        # The last block may stick out by all but one of its members.
        bits = max(r + b for r, b in zip(reach, (config.block_y, config.block_x))) <= 32
        options |= {"BIAS": mode.value, "BITS": bits}
    if kernel in ("forward", "query"):
        options["BLOCK_E"] = s.block_e
    if kernel == "forward":
        options["IMAGES"] = images
    else:
        options["PACKED"] = s.packed
    unroll_options = window_options | config.tile_options() | {"OF_KEYS": of_keys, "EXACT": s.exact}
    layout = (*most, *patterns, kinds[1], *blocks)
    return _Walk(programs, tiles, layout, shared, unrolled, options, unroll_options)


class _Sums(NamedTuple):
    """How the gradient of the bias is summed up, and which gradients are made on the way."""

    of_query: bool
    of_key_value: bool
    heads: int  # so many at a time
    parts: int  # of the tiles, enough of them to fill the GPU
    part_tiles: int  # of one row of patterns, at most
    pairs: int  # of queries and keys in all blocks of a tile
    options: dict
    fold_options: dict


@lru_cache(maxsize=1024)
def _sums(s: _Signature, has_extra: bool) -> _Sums:
    walk = _walk(s, "bias")
    blocks, options, rows = math.prod(walk.layout[5:]), walk.options, len(walk.rows)
    keys, tile = blocks * options["BLOCK_Y"] * options["BLOCK_X"], options["TILE_Y"] * options["TILE_X"]
    # One program goes through all blocks of a tile where that is one block, or does not take too much of anything. In
    # float32 the sum over out * d_out, which several blocks need, is not exact enough.
    registers = keys * tile // (32 * options["num_warps"])
    size = (options["num_stages"] - 1) * keys * (2 * options["BLOCK_D"] * s.dtype.itemsize + 4 * tile)
    fits = registers <= SUM_REGISTERS and size <= SUM_BYTES and walk.unrolled is not None and not s.exact
    whole = blocks == 1 and not has_extra and walk.tiles == (1, 1)
    of_query = whole or (s.has_bias and not has_extra and (blocks == 1 or fits))

    # Without a bias a part is one tile.
    part_tiles = max(1, walk.programs * blocks // BIAS_PROGRAMS) if s.has_bias else 1
    parts = sum(max(1, -(-tiles // part_tiles)) for tiles in walk.rows)
    heads = s.shape[3]
    if s.has_bias:
        heads = max(1, min(heads, UNROLL_BYTES // (4 * keys * tile * parts)))
    of = {"BLOCKS": blocks if of_query else 1, "QUERY": of_query, "KEY_VALUE": whole}
    fold_options = {k: v for k, v in walk.unroll_options.items() if k not in ("OF_KEYS", "EXACT")}
    # Pairs that `fold_kernel` adds up at a time: as many as a row of patterns has for one offset, on average.
    block_p = min(max(triton.next_power_of_2(parts * options["TILE_X"] // rows), 16), 256)
    fold_options |= {"BLOCK_P": block_p, "BLOCK_O": triton.next_power_of_2(2 * s.kernel_size[1] - 1)}
    return _Sums(of_query, whole, heads, parts, part_tiles, keys * tile, of | options, fold_options)


class _Problem:
    """Arguments that every kernel takes."""

    def __init__(self, query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale, packed=1):
        self.query, self.key, self.value = query, key, value
        self.batch, self.height, self.width, self.heads, self.dim = query.shape
        self.dilation = geometry[1]
        self.scale = scale
        self.bias = None if rel_pos_bias is None else rel_pos_bias.contiguous()
        self.extra = 0 if extra_key is None else extra_key.shape[1]
        self.inputs = query, query.stride(), key, key.stride(), value, value.stride()
        self.extras = None, None, None, None
        if self.extra > 0:
            extra_key, extra_value = extra_key.unsqueeze(2), extra_value.unsqueeze(2)
            self.extras = extra_key, extra_key.stride(), extra_value, extra_value.stride()
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        has_bias = rel_pos_bias is not None
        self.signature = _Signature(query.shape, *geometry, query.dtype, query.device, has_bias, tf32, packed)

    @property
    def shape(self):
        """Height, width and heads."""
        return self.height, self.width, self.heads

    def walk(self, kernel: str) -> _Walk:
        """How one kernel goes over the map."""
        return _walk(self.signature, kernel)

    def bias_arguments(self, walk: _Walk) -> tuple:
        """The bias as a kernel reads it, and its layout."""
        if walk.unrolled is None:
            return self.bias, None
        unrolled = self.query.new_empty(walk.unrolled, dtype=torch.float32)
        kinds = walk.unrolled[0] // (self.heads * walk.layout[2] * walk.layout[3])
        launch(
            _bias.unroll_kernel,
            kinds * math.prod(walk.tiles) * self.heads,
            (self.bias, unrolled, walk.layout, self.heads, *walk.tiles),
            walk.unroll_options,
        )
        return unrolled, walk.layout


def forward(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale) -> tuple[Tensor, Tensor]:
    """Output like `query`, contiguous, and log-sum-exp [batch, height, width, heads] in float32."""
    p = _Problem(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    walk = p.walk("forward")
    launch(
        _forward.forward_kernel,
        walk.programs,
        (*p.inputs, *p.bias_arguments(walk), *p.extras, out, lse, p.batch, *p.shape, p.extra, *p.dilation, scale),
        walk.options,
    )
    return out, lse


def backward(
    grad_out, grad_lse, query, key, value, rel_pos_bias, extra_key, extra_value, out, lse, geometry, scale, packed=False
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rel_pos_bias, extra_key and extra_value (None where there is none).

    If packed, the first is that of all three, [batch, height, width, 3, heads, dim].
    """
    p = _Problem(query, key, value, rel_pos_bias, extra_key, extra_value, geometry, scale, 3 if packed else 1)
    if packed:
        d_qkv = query.new_empty(*query.shape[:3], 3, *query.shape[3:])
        parts, grads = d_qkv.unbind(3), (d_qkv, None, None)
    else:
        parts = grads = tuple(torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3))
    if query.numel() == 0:
        d_others = (None if x is None else torch.zeros_like(x) for x in (rel_pos_bias, extra_key, extra_value))
        return *grads, *d_others

    shift = lse.new_empty(*lse.shape, 2) if p.signature.exact else torch.empty_like(lse)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    incoming = out.contiguous(), lse, grad_out, grad_lse, shift
    d_bias, has_keys = _query_and_bias_gradients(p, *incoming, *parts)
    if not has_keys:
        _key_value_gradients(p, lse, grad_out, shift, *parts[1:])
    d_extra = (None, None) if extra_key is None else _extra_gradients(p, lse, grad_out, shift, extra_key)
    return *grads, d_bias, *d_extra


def _query_and_bias_gradients(
    p: _Problem, out, lse, grad_out, grad_lse, shift, d_query, d_key, d_value
) -> tuple[Tensor | None, bool]:
    """Fills `d_query` and `shift`; returns the gradient of the bias, and whether `d_key` and `d_value` were filled."""
    sums = _sums(p.signature, p.extra > 0)
    if not sums.of_query:
        _query_gradient(p, out, lse, grad_out, grad_lse, shift, d_query)
        if p.bias is None:
            return None, False
    d_bias = _bias_gradient(p, sums, out, lse, grad_out, grad_lse, shift, d_query, d_key, d_value)
    return d_bias, sums.of_key_value


def _query_gradient(p: _Problem, out, lse, grad_out, grad_lse, shift, d_query) -> None:
    """Fills `d_query`, and `shift` for the other kernels."""
    walk = p.walk("query")
    launch(
        _backward.query_kernel,
        walk.programs,
        (
            *p.inputs,
            *p.bias_arguments(walk),
            *p.extras,
            out,
            lse,
            grad_out,
            grad_out.stride(),
            grad_lse,
            shift,
            d_query,
            *p.shape,
            p.extra,
            *p.dilation,
            p.scale,
        ),
        walk.options,
    )


def _key_value_gradients(p: _Problem, lse, grad_out, shift, d_key, d_value) -> None:
    """Fills `d_key` and `d_value`."""
    walk = p.walk("key_value")
    launch(
        _backward.key_value_kernel,
        walk.programs,
        (
            *p.inputs,
            *p.bias_arguments(walk),
            lse,
            grad_out,
            grad_out.stride(),
            shift,
            d_key,
            d_value,
            *p.shape,
            *p.dilation,
            p.scale,
        ),
        walk.options,
    )


def _bias_gradient(
    p: _Problem, sums: _Sums, out, lse, grad_out, grad_lse, shift, d_query, d_key, d_value
) -> Tensor | None:
    """Gradient of the bias, if there is one. Also fills what else `sums` says."""
    walk = p.walk("bias")
    blocks, rows, has_bias = math.prod(walk.layout[5:]), len(walk.rows), p.bias is not None
    unrolled = p.bias_arguments(walk)[0] if sums.of_query and blocks > 1 else None
    d_unrolled = lse.new_empty(sums.parts if has_bias else 0, sums.heads, sums.pairs)
    starts = lse.new_empty(rows, dtype=torch.int32)
    if has_bias:
        folded = lse.new_empty(p.heads, rows, walk.options["TILE_Y"], *p.bias.shape[1:], dtype=p.signature.of_sums)
    for first in range(0, p.heads, sums.heads):
        some = min(sums.heads, p.heads - first)
        launch(
            _bias.gradient_kernel,
            some * sums.parts * (1 if sums.of_query else blocks),
            (
                *p.inputs,
                p.bias,
                unrolled,
                out,
                lse,
                grad_out,
                grad_out.stride(),
                grad_lse,
                shift,
                d_query,
                d_key,
                d_value,
                d_unrolled,
                starts,
                walk.layout,
                p.batch,
                *p.shape,
                *p.dilation,
                first,
                some,
                rows,
                sums.part_tiles,
                p.scale,
            ),
            sums.options,
        )
        if not has_bias:
            return None
        launch(
            _bias.fold_kernel,
            some * rows * walk.options["TILE_Y"] * p.bias.shape[1],
            (
                d_unrolled,
                starts,
                folded[first:],
                walk.layout,
                p.height,
                p.width,
                *p.dilation,
                some,
                rows,
                sums.parts,
            ),
            sums.fold_options,
        )
    return folded.sum((1, 2)).to(p.bias.dtype)


def _extra_gradients(p: _Problem, lse, grad_out, shift, extra_key) -> tuple[Tensor, Tensor]:
    if p.extra == 0:
        return torch.zeros_like(extra_key), torch.zeros_like(extra_key)
    options = p.walk("query").options
    tokens = p.height * p.width
    block_e, block_n = p.signature.block_e, 64 if p.query.element_size() < 4 else 32
    programs = p.batch * p.heads * -(-p.extra // block_e)
    parts = max(1, min(-(-EXTRA_PROGRAMS // programs), -(-tokens // (4 * block_n))))
    sums = lse.new_empty(2, parts, *extra_key.shape)
    launch(
        _backward.extra_kernel,
        programs * parts,
        (
            p.query,
            p.query.stride(),
            *p.extras,
            lse,
            grad_out,
            grad_out.stride(),
            shift,
            *sums,
            p.batch,
            tokens,
            p.width,
            p.heads,
            p.extra,
            -(-tokens // parts),
            p.scale,
        ),
        {"BLOCK_E": block_e, "BLOCK_N": block_n, "num_stages": 2}
        | {name: options[name] for name in ("dim", "BLOCK_D", "EVEN_D", "EXACT", "PRECISION")},
    )
    d_extra_key, d_extra_value = (part.sum(0, dtype=p.signature.of_sums).to(extra_key.dtype) for part in sums)
    return d_extra_key, d_extra_value
