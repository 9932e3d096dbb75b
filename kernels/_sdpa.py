"""torch's `scaled_dot_product_attention` with a bias that all images share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # rows of a bias start at multiples of it in memory, or torch would copy them there


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`scaled_dot_product_attention` of [batch, heads, tokens, dim] with a bias [heads, queries, keys], or None.

    The bias has the dtype of the query, and so has the output, also under autocast. On a GPU, the last axis of the bias
    has to be contiguous for torch to take a fused kernel.
    """
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale).to(query.dtype)
    if not torch.jit.is_scripting():
        if bias.is_cuda and torch.compiler.is_dynamo_compiling():
            bias = aligned_rows(bias)
    # Of four axes, or torch would not take a fused kernel on the CPU.
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0), scale=scale)
    return out.to(query.dtype)


def aligned_rows(bias: Tensor) -> Tensor:
    """The same with aligned rows, and some memory between them.

    In models with convolutions, Inductor stores whatever is dense and has four axes channels last, also what torch pads
    a bias to; the kernel of the gradient refuses that.
    """
    columns = bias.shape[-1]
    return F.pad(bias, (0, ALIGNMENT - columns % ALIGNMENT))[..., :columns]
