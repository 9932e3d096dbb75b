"""What the Agent Transformers share: agents with their bias tables, and resizing of what depends on the map.

Paper: `Agent Attention: On the Integration of Softmax and Linear Attention` - https://arxiv.org/abs/2312.08874
"""

import logging
import math
from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones._backbone import check_heads
from zoo.backbones._checkpoint import AdaptedLoading
from zoo.kernels import agent_attention, pool_agents
from zoo.kernels.agent import sdpa
from zoo.kernels.agent.bias import map_bias, resize_axis, resize_map

__all__ = [
    "TABLES",
    "AddPosition",
    "AgentAttention",
    "adapt_pos_embed",
    "agent_cfg",
    "check_stages",
    "map_sizes",
]

_logger = logging.getLogger(__name__)

_TABLE_SIDE = 7  # of the tables that are stretched over the map, whatever its size

# Ends of the names of an attention's tables, which do not decay.
TABLES = (".an_bias", ".na_bias", ".ah_bias", ".aw_bias", ".ha_bias", ".wa_bias")


class AgentAttention(AdaptedLoading, nn.Module):
    """Attention through agents pooled from the queries, with a bias for every pair of an agent and a place on the map.

    Paper: https://arxiv.org/abs/2312.08874

    A bias is the sum of a 7x7 table that is stretched over the map, one value per row and one per column: `an`, `ah`
    and `aw` where agents look at keys, `na`, `ha` and `wa` where queries look at agents. Those per row and column are
    stretched too where a map is not of the size they were made for. Subclasses have the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int,
        query_size: tuple[int, int],
        key_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            num_agents: Number of agents, a square.
            query_size: Height and width of the map that the tables are made for.
            key_size: Height and width of the map of keys and values, that of the queries by default.

        Raises:
            ValueError: `num_heads` does not divide `dim`, or `num_agents` is no square.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        if num_agents < 1 or math.isqrt(num_agents) ** 2 != num_agents:
            raise ValueError(f"num_agents must be the square of a positive number, got {num_agents}")
        self.agent_side = math.isqrt(num_agents)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5

        height, width = query_size
        key_height, key_width = key_size or query_size
        self.an_bias = nn.Parameter(torch.empty(num_heads, num_agents, _TABLE_SIDE, _TABLE_SIDE, **dd))
        self.na_bias = nn.Parameter(torch.empty(num_heads, num_agents, _TABLE_SIDE, _TABLE_SIDE, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, key_height, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, key_width, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, num_heads, height, 1, num_agents, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, num_heads, 1, width, num_agents, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.parameters(recurse=False):
            trunc_normal_(table, std=0.02)

    def agent_bias(self, height: int, width: int, first: Tensor | None = None) -> Tensor:
        """[heads, agents, keys] for a map of keys of this size, after a key of bias `first` [heads, agents]."""
        rows, cols = self.ah_bias[0, :, :, :, 0], self.aw_bias[0, :, :, 0]
        return map_bias(self.an_bias, rows, cols, first, height, width)

    def query_bias(self, height: int, width: int, first: Tensor | None = None) -> Tensor:
        """[heads, queries, agents] for a map of queries of this size, after a query of bias `first` [heads, agents]."""
        rows, cols = self.ha_bias[0, :, :, 0].transpose(1, 2), self.wa_bias[0, :, 0].transpose(1, 2)
        return map_bias(self.na_bias, rows, cols, first, height, width, agents_last=True)

    def pool(self, query: Tensor) -> Tensor:
        """[batch, height, width, dim] -> agents [batch, agents, heads, head_dim]"""
        return pool_agents(query.unflatten(3, (self.num_heads, -1)), self.agent_side)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, agent: Tensor, agent_bias: Tensor, query_bias: Tensor
    ) -> Tensor:
        """[batch, queries, dim] and twice [batch, keys, dim] -> [batch, queries, dim]"""
        query, key, value = [x.unflatten(2, (self.num_heads, -1)) for x in (query, key, value)]
        if torch.jit.is_scripting():
            out = sdpa.agent_attention(query, key, value, agent, agent_bias, query_bias, self.scale, self.scale)
        else:
            out = agent_attention(
                query, key, value, agent, agent_bias=agent_bias, query_bias=query_bias, scale=self.scale
            )
        return out.flatten(2)

    def attend_map(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, height, width, dim], keys and values also of another height and width -> the shape of `query`"""
        height, width = query.shape[1], query.shape[2]
        out = self.attend(
            query.flatten(1, 2),
            key.flatten(1, 2),
            value.flatten(1, 2),
            self.pool(query),
            self.agent_bias(key.shape[1], key.shape[2]),
            self.query_bias(height, width),
        )
        return out.unflatten(1, (height, width))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Edit `state_dict` to fit: resize the tables per row and column of another map."""
        for name, axis in (("ah_bias", 3), ("aw_bias", 4), ("ha_bias", 2), ("wa_bias", 3)):
            table, size = state_dict.get(prefix + name), getattr(self, name).shape[axis]
            if isinstance(table, Tensor) and table.ndim == 5 and table.shape[axis] not in (0, size):
                _logger.info("%s%s: resizing from %d to %d", prefix, name, table.shape[axis], size)
                state_dict[prefix + name] = resize_axis(table.float(), axis, size).to(table.dtype)


@register_notrace_module  # whether it resizes depends on the map, which fx cannot follow
class AddPosition(nn.Module):
    """Add position embeddings to a map, stretched over it where it is not of the size they were made for."""

    def __init__(self, size: tuple[int, int], mode: str):
        """
        Args:
            size: Height and width of the map that the position embeddings are made for.
            mode: How they are stretched, "bilinear" or "bicubic".
        """
        super().__init__()
        self.size = size
        self.mode = mode

    def forward(self, x: Tensor, pos_embed: Tensor | None) -> Tensor:
        """[batch, height, width, dim] and [1, tokens of `size`, dim] -> [batch, height, width, dim]"""
        if pos_embed is None:  # of a stage that was pruned
            return x
        table = pos_embed.unflatten(1, (self.size[0], self.size[1])).permute(0, 3, 1, 2)
        return x + resize_map(table, x.shape[1], x.shape[2], self.mode).permute(0, 2, 3, 1)


def adapt_pos_embed(
    state_dict: dict[str, Tensor], key: str, size: tuple[int, int], attn: str, num_prefix_tokens: int = 0
) -> None:
    """Edit `state_dict` to fit: resize the position embeddings of another map.

    Of which map they are is in the tables of the attention named `attn`, before that adapts them. Without such tables
    they are of a square map, unless their number is that of `size`.
    """
    table = state_dict.get(key)
    if not isinstance(table, Tensor) or table.ndim != 3:
        return
    prefix, table = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    tokens, source = table.shape[1], _map_of_tables(state_dict, attn)
    if source[0] * source[1] != tokens:
        source = size if tokens == size[0] * size[1] else (math.isqrt(tokens), math.isqrt(tokens))
    if source == size or source[0] * source[1] != tokens or tokens == 0:
        return
    _logger.info("%s: resizing from %s to %s", key, source, size)
    table = table.unflatten(1, source).permute(0, 3, 1, 2).float()
    table = resize_map(table, size[0], size[1], "bicubic").flatten(2).transpose(1, 2)
    state_dict[key] = torch.cat([prefix, table.to(prefix.dtype)], 1)


def _map_of_tables(state_dict: dict[str, Tensor], attn: str) -> tuple[int, int]:
    """Height and width of the map of queries that the tables in `state_dict` are made for, (0, 0) without them."""
    rows, cols = state_dict.get(f"{attn}ha_bias"), state_dict.get(f"{attn}wa_bias")
    if not all(isinstance(table, Tensor) and table.ndim == 5 for table in (rows, cols)):
        return 0, 0
    return rows.shape[2], cols.shape[3]


def check_stages(num_stages: int | None = None, **per_stage: Sequence) -> None:
    """Check that all have one entry per stage, as many as the first if `num_stages` is None.

    Raises:
        ValueError: One has not.
    """
    num_stages = len(next(iter(per_stage.values()))) if num_stages is None else num_stages
    for name, values in per_stage.items():
        if len(values) != num_stages:
            raise ValueError(f"{', '.join(per_stage)} must have one entry per stage, {num_stages}; {name} is {values}")


def map_sizes(img_size: tuple[int, int], num_stages: int) -> list[tuple[int, int]]:
    """Height and width of the map of each stage: the first a quarter of the image, each next half, rounded up."""
    return [(-(-img_size[0] // (4 * 2**i)), -(-img_size[1] // (4 * 2**i))) for i in range(num_stages)]


def agent_cfg(share: str = "", size: int = 224, **kwargs) -> dict:
    """Configuration of a model of `size` x `size` images, with the weights at that link of the authors' cloud drive."""
    return {
        "url": f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1" if share else "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "fixed_input_size": False,
        # The authors resize to a square of int(256 / 224 * size), whatever the picture's shape, then crop the centre.
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "unknown",  # the authors' repository names none
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        **kwargs,
    }
