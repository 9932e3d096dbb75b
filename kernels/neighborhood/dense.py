"""Windows or circles that cover the map: `scaled_dot_product_attention` within each residue class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._sdpa import biased_attention
from zoo.kernels._symbols import is_symbol


def covers_map(height: int, width: int, kernel_size, dilation, stride, is_causal, radius) -> bool:
    """Whether every query sees its whole residue class, and all classes are of one size. Not known of symbols.

    With `radius` > 0: whether the circle about one corner holds the opposite one.
    """
    if radius > 0:
        return (height - 1) ** 2 + (width - 1) ** 2 < radius**2
    if is_symbol(height) or is_symbol(width):
        return False
    return (
        height == kernel_size[0] * dilation[0]
        and width == kernel_size[1] * dilation[1]
        and not is_causal[0]
        and not is_causal[1]
    )


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    scale: float,
) -> Tensor:
    """See `zoo.kernels.neighborhood_attention_2d`; windows must cover the map, as `covers_map` tells."""
    batch, height, width, heads, dim = query.shape
    d_rows, d_cols = dilation
    rows, cols = height // d_rows, width // d_cols

    def classes(x: Tensor) -> Tensor:
        """[batch, height, width, heads, dim] -> [batch * classes, heads, tokens of a class, dim]."""
        x = x.reshape(batch, rows, d_rows, cols, d_cols, heads, dim).permute(0, 2, 4, 5, 1, 3, 6)
        return x.reshape(batch * d_rows * d_cols, heads, rows * cols, dim)

    def repeated(x: Tensor) -> Tensor:
        """[batch, extra, heads, dim] -> [batch * classes, heads, extra, dim]."""
        return x.transpose(1, 2).repeat_interleave(d_rows * d_cols, dim=0)

    q, k, v = classes(query), classes(key), classes(value)
    bias = None
    if rel_pos_bias is not None:
        bias = dense_bias(rel_pos_bias, rows, cols, query.dtype)
    if extra_key is not None:
        k, v = torch.cat([k, repeated(extra_key)], dim=2), torch.cat([v, repeated(extra_value)], dim=2)
        if bias is not None:
            bias = F.pad(bias, (0, extra_key.shape[1]))
    out = biased_attention(q, k, v, bias, scale)
    out = out.reshape(batch, d_rows, d_cols, heads, rows, cols, dim).permute(0, 4, 1, 5, 2, 3, 6)
    return out.reshape(query.shape)


def dense_bias(rel_pos_bias: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Bias table [heads, 2 * rows - 1, 2 * cols - 1] -> [heads, rows * cols, rows * cols], query by key, of `dtype`."""
    table = rel_pos_bias.to(torch.promote_types(dtype, torch.float32))  # in which its gradient is summed
    if is_symbol(rows) or is_symbol(cols):
        offsets = []
        for size in (rows, cols):
            place = torch.arange(size, device=table.device)
            offsets.append((place - place[:, None] + size - 1).flatten())
        bias = table.index_select(1, offsets[0]).index_select(2, offsets[1])
        bias = bias.reshape(-1, rows, rows, cols, cols).transpose(2, 3)
        return bias.reshape(-1, rows * cols, rows * cols).to(dtype)
    # A query's biases are a window of the table; the first query has the last window.
    bias = table.unfold(1, rows, 1).unfold(2, cols, 1).flip((1, 2))
    return bias.reshape(-1, rows * cols, rows * cols).to(dtype)
