"""Fused halo attention for GPUs: launches the kernels of `forward` and `backward`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from zoo.kernels._launch import launch
from zoo.kernels.halo.triton import backward as _backward
from zoo.kernels.halo.triton import forward as _forward

# Memory for what windows and programs add to gradients, where an image's share is not larger.
SCRATCH_BYTES = 2**28
SUM_SIZE = 1024  # sums that one program makes


def _contiguous_dims(x: Tensor) -> Tensor:
    """`x`, or a copy where its last axis is strided, as in the output of a convolution: reads would be scattered."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Problem:
    """Arguments that every kernel takes."""

    def __init__(self, query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale):
        self.query, self.key, self.value = (_contiguous_dims(x) for x in (query, key, value))
        # Tables that are absent are never read; any tensor does.
        self.has_rel = rel_height is not None
        self.tables = [x.contiguous() for x in (rel_height, rel_width)] if self.has_rel else [self.query] * 2
        self.batch, height, width, self.heads, self.dim = key.shape
        self.v_dim = value.shape[-1]
        self.blocks = height // block_size, width // block_size
        self.win = block_size + 2 * halo_size
        side = block_size // stride
        d, v = (max(16, triton.next_power_of_2(x)) for x in (self.dim, self.v_dim))
        # Small enough for 99 KiB of shared memory, what the smaller GPUs have.
        most = min(64, 2**13 // max(d, v)) // (query.element_size() // 2)
        m = min(most, max(16, triton.next_power_of_2(side**2)))
        n = max(16, most)
        self.query_parts, self.key_parts = -(-(side**2) // m), -(-(self.win**2) // n)
        self.window = {"BLOCK": block_size, "HALO": halo_size}
        self.sizes = *self.blocks, self.heads, self.dim, self.v_dim, scale
        self.options = self.window | {
            "SIDE": side,
            "M": m,
            "N": n,
            "W": max(16, triton.next_power_of_2(self.win)),
            "R": max(16, triton.next_power_of_2(2 * self.win - 1)),
            "D": d,
            "V": v,
            "EVEN_D": d == self.dim,
            "EVEN_V": v == self.v_dim,
            "HAS_REL": self.has_rel,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "num_warps": 8 if max(d, v) > 128 or query.element_size() == 4 else 4,
            "num_stages": 2,
        }

    def inputs(self, images: slice) -> list:
        """Query, key and value of some images, each followed by its strides, and the tables."""
        tensors = (self.query, self.key, self.value)
        return [y for x in tensors for y in (x[images], x.stride())] + self.tables

    def programs(self, parts: int, images: int) -> int:
        """Programs for some images, with `parts` for every block of every head."""
        return images * self.heads * self.blocks[0] * self.blocks[1] * parts


def forward(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale) -> tuple[Tensor, Tensor]:
    """Output [batch, height, width, heads, v_dim], contiguous, and log-sum-exp [batch, height, width, heads]."""
    p = _Problem(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale)
    out = query.new_empty(*query.shape[:-1], p.v_dim)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() > 0:
        launch(
            _forward.forward_kernel,
            p.programs(p.query_parts, p.batch),
            (*p.inputs(slice(None)), out, out.stride(), lse, *p.sizes),
            p.options,
        )
    return out, lse


def backward(
    grad_out, query, key, value, rel_height, rel_width, out, lse, block_size, halo_size, stride, scale
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rel_height and rel_width (None where there is none)."""
    p = _Problem(query, key, value, rel_height, rel_width, block_size, halo_size, stride, scale)
    d_out = _contiguous_dims(grad_out)
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    d_tables = lse.new_zeros(2, 2 * p.win - 1, p.dim)
    # A few images at a time, so that memory does not grow with the batch.
    windows = p.programs(p.win**2, 1) * (p.dim + p.v_dim)
    shares = p.programs(p.query_parts, 1) * d_tables.numel() if p.has_rel else 0
    step = max(1, SCRATCH_BYTES // (4 * max(1, windows + shares)))
    for first in range(0, p.batch if out.numel() > 0 else 0, step):
        images = slice(first, min(first + step, p.batch))
        d_tables += _backward_images(p, images, out, lse, d_out, d_query, d_key, d_value)
    if not p.has_rel:
        return d_query, d_key, d_value, None, None
    return d_query, d_key, d_value, *(d.to(x.dtype) for d, x in zip(d_tables, (rel_height, rel_width)))


def _backward_images(p: _Problem, images: slice, out, lse, d_out, d_query, d_key, d_value) -> Tensor:
    """Fill the gradients of query, key and value of some images, and return what they add to those of the tables."""
    inputs, count = p.inputs(images), images.stop - images.start
    out, lse, d_out, d_query, d_key, d_value = (x[images] for x in (out, lse, d_out, d_query, d_key, d_value))
    shift = torch.empty_like(lse)
    programs = p.programs(p.query_parts, count)
    d_tables = lse.new_empty(programs if p.has_rel else 0, 2, 2 * p.win - 1, p.dim)
    launch(
        _backward.query_kernel,
        programs,
        (
            *inputs,
            out,
            out.stride(),
            lse,
            d_out,
            d_out.stride(),
            shift,
            d_query,
            d_query.stride(),
            d_tables,
            *p.sizes,
        ),
        p.options,
    )
    d_keys, d_values = (lse.new_empty(count, *p.blocks, p.win**2, p.heads, dim) for dim in (p.dim, p.v_dim))
    launch(
        _backward.window_kernel,
        p.programs(p.key_parts, count),
        (*inputs, lse, d_out, d_out.stride(), shift, d_keys, d_values, *p.sizes),
        p.options,
    )
    for windows, sums in ((d_keys, d_key), (d_values, d_value)):
        rows, channels = sums.shape[0] * sums.shape[1], p.heads * sums.shape[-1]
        parts = triton.cdiv(sums.shape[2] * channels, SUM_SIZE)
        launch(_backward.sum_kernel, rows * parts, (windows, sums, *p.blocks, channels), p.window | {"N": SUM_SIZE})
    return d_tables.sum(0)
