"""Picks the backend of a checked call."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.neighborhood import dense, ops, reference


def attend(inputs, geometry, scale: float, return_lse: bool, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    """What the public functions return.

    Args:
        inputs: query, key, value, rel_pos_bias, extra_key and extra_value, None where absent. Without key and value,
            the query holds all three, [batch, height, width, 3, heads, head_dim].
        geometry: kernel_size, dilation, stride and is_causal, each per axis; and the radius of the circle, 0 for none.
        scale: Factor of the logits.
        return_lse: Whether to return the log-sum-exp too.
        backend: "auto", "reference", "tiled" or "triton".
    """
    qkv = ops.unpacked(*inputs[:3])
    query = qkv[0]
    backend, _ = ops.choose_backend(query, backend, dense.covers_map(*query.shape[1:3], *geometry), return_lse)
    if backend == "dense":
        return dense.neighborhood_attention_2d(*qkv, geometry[1], *inputs[3:], scale)
    if backend == "reference":
        out, lse = reference.neighborhood_attention_2d(*qkv, *geometry, *inputs[3:], scale)
    else:
        *geometry, radius = geometry
        out, lse = ops.neighborhood_attention_2d(*inputs, *geometry, scale, radius, backend)
    return (out, lse) if return_lse else out
