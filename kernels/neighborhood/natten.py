"""Adapter to the NATTEN library, for the calls it supports: no bias, and on the CPU no gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
    rel_pos_bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.neighborhood_attention_2d`; also returns the log-sum-exp [batch, height, width, heads]."""
    try:
        from natten.functional import na2d
    except ImportError as error:
        raise ImportError("backend='natten' needs the natten package: `pip install natten`") from error

    if rel_pos_bias is not None:
        raise ValueError("backend='natten' has no rel_pos_bias (NATTEN dropped it in 0.20); use backend='auto'")
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, extra_key, extra_value)
    )
    if query.device.type == "cpu" and needs_grad:
        raise ValueError("backend='natten' has no backward pass on the CPU; use backend='auto' or torch.no_grad()")
    # NATTEN's CUTLASS kernels silently misread tensors that are not contiguous.
    return na2d(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        is_causal=is_causal,
        scale=scale,
        additional_keys=None if extra_key is None else extra_key.contiguous(),
        additional_values=None if extra_value is None else extra_value.contiguous(),
        return_lse=True,
    )
