"""Window attention by the fused kernels of neighborhood attention: a window is a map that one neighborhood covers.

One program holds a whole window, so that its backward pass makes the gradients of query, key, value and bias at once.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels._cells import cut, join
from zoo.kernels.neighborhood import ops
from zoo.kernels.window.tiled import is_shared


def why_not_triton(key: Tensor, value: Tensor, shift: tuple[int, int]) -> str | None:
    """What keeps the fused kernels from these tensors, or None."""
    if max(shift) > 0:
        return f"takes no shift, got {shift}"
    if value.shape[-1] != key.shape[-1]:
        return f"needs values as wide as keys, got {value.shape[-1]} and {key.shape[-1]}"
    return ops.why_not_triton(key)


def window_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `zoo.kernels.window_attention_2d`."""
    batch, height, width, heads, dim = key.shape
    rows, cols = window_size
    down, across = height // rows, width // cols

    def windows(x: Tensor) -> Tensor:
        """[batch, height, width, heads, dim] -> [batch * windows, rows, cols, heads, dim]

        Where windows are below each other, nothing is copied.
        """
        if across > 1:
            x = cut(x, (down, rows), (across, cols))
        return x.reshape(-1, rows, cols, heads, dim)

    if is_shared(query, key):
        query = query.unsqueeze(1).expand(-1, down * across, -1, -1, -1, -1).flatten(0, 1)
    else:
        query = windows(query)
    geometry = window_size, (1, 1), (1, 1), (False, False)  # no dilation, no stride, not causal
    out, _ = ops.neighborhood_attention_2d(
        query, windows(key), windows(value), rel_pos_bias, None, None, *geometry, scale, 0, "triton"
    )
    if across > 1:
        return join(out.view(batch, down, across, rows, cols, heads, dim))
    return out.reshape(batch, height, width, heads, dim)
