"""torch's `scaled_dot_product_attention` with a bias that all images share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # rows of a bias start at multiples of it in memory, or torch would copy them there


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`scaled_dot_product_attention` of [batch, heads, tokens, dim] with a bias [heads, queries, keys], or None.

    On a GPU, the last axis of the bias has to be contiguous for torch to take a fused kernel.
    """
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    bias = bias.to(query.dtype)
    if not torch.jit.is_scripting():
        # Inductor may store the columns of a bias it makes one after another, which the kernel of the gradient refuses.
        if bias.is_cuda and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            bias = torch.ops.zoo.aligned_rows(bias)
    # Of four axes, or torch would not take a fused kernel on the CPU.
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0), scale=scale)


torch.library.define("zoo::aligned_rows", "(Tensor x) -> Tensor")


@torch.library.impl("zoo::aligned_rows", "CompositeExplicitAutograd")
def _aligned_rows(x: Tensor) -> Tensor:
    return _like_aligned_rows(x).copy_(x)


@torch.library.register_fake("zoo::aligned_rows")
def _like_aligned_rows(x: Tensor) -> Tensor:
    """Memory of the shape of `x`, of contiguous rows that start at multiples of `ALIGNMENT`."""
    columns = x.shape[-1]
    row = (columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return x.new_empty(*x.shape[:-1], row).narrow(-1, 0, columns)


torch.library.register_autograd("zoo::aligned_rows", lambda ctx, grad: grad)
