"""Picks the backend of a checked call."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.neighborhood import dense, ops, reference


def attend(inputs, geometry, scale: float, return_lse: bool, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    """What the public functions return.

    Args:
        inputs: query, key, value, rel_pos_bias, extra_key and extra_value, None where absent.
        geometry: kernel_size, dilation, stride and is_causal, each per axis; and the radius of the circle, 0 for none.
        scale: Factor of the logits.
        return_lse: Whether to return the log-sum-exp too.
        backend: "auto", "reference", "tiled" or "triton".
    """
    query = inputs[0]
    if backend == "reference":
        out, lse = reference.neighborhood_attention_2d(*inputs[:3], *geometry, *inputs[3:], scale)
        return (out, lse) if return_lse else out

    if backend == "triton" and (obstacle := ops.why_not_triton(query)) is not None:
        raise ValueError(f"backend='triton' {obstacle}")
    fused = ops.takes_triton(query, backend)
    covers_map = dense.covers_map(*query.shape[1:3], *geometry)
    # On an empty batch scaled_dot_product_attention drops its mask from the graph, and the bias its gradient.
    if covers_map and not fused and not return_lse and query.shape[0] > 0:
        return dense.neighborhood_attention_2d(*inputs[:3], geometry[1], *inputs[3:], scale)
    *geometry, radius = geometry
    out, lse = torch.ops.zoo.neighborhood_attention_2d(
        *inputs, *geometry, scale, radius, "triton" if fused else "tiled"
    )
    return (out, lse) if return_lse else out
