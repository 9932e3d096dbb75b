"""Our operators written out in torch's own, for files that run where this package is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from zoo.kernels.agent import reference as agent
from zoo.kernels.agent.ops import pool_by_products
from zoo.kernels.depthwise_conv.api import in_torch
from zoo.kernels.halo import reference as halo
from zoo.kernels.neighborhood import symbolic as neighborhood
from zoo.kernels.neighborhood.ops import unpacked
from zoo.kernels.routing import reference as routing


@contextmanager
def written_out() -> Iterator[None]:
    """Within, the registered operators are not one node of a traced graph each, but the operators of torch they mean.

    They then take sizes that are symbols. What only gradients and merging need is left out.
    """
    functions = {
        "neighborhood_attention_2d": _neighborhood_attention_2d,
        "halo_attention_2d": _halo_attention_2d,
        "routing_attention_2d": _routing_attention_2d,
        "agent_attention": _agent_attention,
        "pool_agents": pool_by_products,
        "depthwise_conv_2d": _depthwise_conv_2d,
    }
    with patch.multiple(torch.ops.zoo, **functions):
        yield


def _neighborhood_attention_2d(
    query, key, value, rel_pos_bias, extra_key, extra_value, kernel_size, dilation, stride, is_causal, scale,
    radius=0, backend="auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if extra_key is not None or tuple(stride) != (1, 1) or any(is_causal) or radius > 0:
        raise NotImplementedError("neighborhood attention with extra tokens, strided, causal or circular")
    query, key, value = unpacked(query, key, value)
    return neighborhood.neighborhood_attention_2d(query, key, value, rel_pos_bias, kernel_size, dilation, scale)


def _halo_attention_2d(*arguments) -> tuple[Tensor, None]:
    *arguments, _ = arguments  # the backend
    return halo.halo_attention_2d(*arguments), None


def _routing_attention_2d(
    query, key, value, region_size, topk, scale, soft=False, backend="auto"
) -> tuple[Tensor, None, None]:
    return routing.routing_attention_2d(query, key, value, region_size, topk, scale, soft), None, None


def _agent_attention(*arguments) -> tuple[Tensor, None, None]:
    return agent.agent_attention(*arguments), None, None


def _depthwise_conv_2d(x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor, dtype: torch.dtype) -> Tensor:
    return in_torch(base, x, weight, bias).to(dtype)
