"""Agent-CSwin: CSwin whose first two stages have agent attention over the whole map.

Papers:
* `Agent Attention: On the Integration of Softmax and Linear Attention` - https://arxiv.org/abs/2312.08874
* `CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows` - https://arxiv.org/abs/2107.00652

The names of the weights are those of the published checkpoints (https://github.com/LeapLabTHU/Agent-Attention), which
load as downloaded. A file may hold a moving average of the weights besides; the published accuracies are not of that.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerType, Mlp, calculate_drop_path_rates, get_act_layer, to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones._agent import TABLES, AgentAttention, agent_cfg, check_stages, map_sizes
from zoo.backbones._backbone import (
    Backbone,
    CheckpointedBlock,
    DepthwiseConv,
    any_padding,
    before_product,
    check_heads,
    get_norm_layer,
)
from zoo.backbones._checkpoint import build_model, checkpoint_filter_fn  # noqa: F401
from zoo.kernels._cells import cut, join
from zoo.kernels._symbols import ceil_div, crop

__all__ = ["AgentBranch", "AgentCswin", "StripeBranch"]


@register_notrace_module  # resizes its tables to the map, which fx cannot follow
class AgentBranch(AgentAttention):
    """Agent attention over a map, of queries, keys and values that are projected elsewhere."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int = 49,
        size: tuple[int, int] = (14, 14),
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            num_agents: Number of agents, a square.
            size: Height and width of the map that the bias tables are made for.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, num_agents, size, **dd)
        self.get_v = DepthwiseConv(dim, **dd)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three times [batch, height, width, dim] -> [batch, height, width, dim]"""
        return self.get_v(self.attend_map(query, key, value), value)


@register_notrace_module  # pads by the size of the map
class StripeBranch(nn.Module):
    """CSwin's attention within stripes that cross the map, plus a 3x3 convolution of the values within the stripe.

    Paper: https://arxiv.org/abs/2107.00652

    A map that is no whole number of stripes is cut after queries, keys and values are zero-padded at its end. Stripes
    wider than the map are as wide as the map.
    """

    def __init__(self, dim: int, num_heads: int, rows: int = 0, cols: int = 0, device=None, dtype=None):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            rows: Height of a stripe, 0 for that of the map.
            cols: Width of a stripe, 0 for that of the map.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        super().__init__()
        check_heads(num_heads, dim=dim)
        self.num_heads = num_heads
        self.rows = rows
        self.cols = cols
        self.get_v = DepthwiseConv(dim, device=device, dtype=dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three times [batch, height, width, dim], any height and width -> [batch, height, width, dim]"""
        batch, height, width = query.shape[0], query.shape[1], query.shape[2]
        rows = min(self.rows, height) if self.rows > 0 else height
        cols = min(self.cols, width) if self.cols > 0 else width
        down, across = ceil_div(height, rows), ceil_div(width, cols)
        pad_h, pad_w = down * rows - height, across * cols - width

        stripes: list[Tensor] = []
        for x in (query, key, value):
            if any_padding(pad_h, pad_w):
                x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
            stripes.append(cut(x, (down, rows), (across, cols)).flatten(0, 2))  # [batch * stripes, rows, cols, dim]
        query, key, value = [x.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in stripes]
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.get_v(x.unflatten(1, (rows, cols)), stripes[2])

        return crop(join(x.unflatten(0, (batch, down, across))), height, width)


class CSwinBlock(CheckpointedBlock):
    """Pre-norm transformer block of attention branches, which share the width and the heads, and an MLP."""

    def __init__(
        self,
        dim: int,
        attns: Sequence[nn.Module],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            attns: The branches, each of an equal share of `dim`.
            mlp_ratio: Hidden width of the MLP, in units of `dim`.
            qkv_bias: Whether queries, keys and values have a bias.
            proj_drop: Dropout rate of the attention's output and in the MLP.
            drop_path: Stochastic depth rate.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLP.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = before_product(norm_layer(dim, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attns = nn.ModuleList(attns)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm2 = before_product(norm_layer(dim, **dd))
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        # [batch, height, width, query | key | value, branch, width of a branch]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, len(self.attns), -1))
        branches: list[Tensor] = []
        for i, attn in enumerate(self.attns):
            query, key, value = qkv[..., i, :].unbind(3)
            branches.append(attn(query, key, value))
        x = x + self.drop_path1(self.proj_drop(self.proj(torch.cat(branches, -1))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, height, width, channels]"""
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """Halve a map and change its width: a 3x3 convolution of stride 2, and a norm."""

    def __init__(
        self, dim: int, out_dim: int, norm_layer: Callable[..., nn.Module] = nn.LayerNorm, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm = norm_layer(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, ceil(height / 2), ceil(width / 2), out_dim]"""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class AgentCswin(Backbone):
    """Agent-CSwin (https://arxiv.org/abs/2312.08874), for any input size.

    An image is zero-padded at the bottom and the right to a multiple of 4, a map to whole stripes where attention is
    plain. Agents' bias tables are stretched over maps of another size than those of `img_size`.
    """

    no_decay_suffixes = TABLES

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_stages: int = 2,
        stripe_width: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType = nn.LayerNorm,
        act_layer: LayerType = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            img_size: Side of the images that the agents' bias tables are made for, or (height, width).
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            embed_dim: Width of the first stage; it doubles from stage to stage.
            depths: Number of blocks per stage.
            num_heads: Number of attention heads per stage.
            num_agents: Number of agents per stage, squares.
            agent_stages: Number of stages with agents, from the first. Of the others, the last attends over the whole
                map and those before it within vertical and horizontal stripes, with half of the heads each.
            stripe_width: Width of the vertical stripes and height of the horizontal ones.
            mlp_ratio: Hidden width of the MLPs, in units of the stage's width.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLPs.

        Raises:
            ValueError: What is per stage is not of four stages, `num_heads` does not divide the widths, or is odd in
                a stage of stripes.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_stages(4, depths=depths, num_heads=num_heads, num_agents=num_agents)
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        dims = [embed_dim * 2**i for i in range(4)]
        sizes = map_sizes(to_2tuple(img_size), 4)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def branches(stage: int) -> list[nn.Module]:
            dim, heads = dims[stage], num_heads[stage]
            if stage < agent_stages:
                return [AgentBranch(dim, heads, num_agents[stage], sizes[stage], **dd)]
            if stage == 3:
                return [StripeBranch(dim, heads, **dd)]
            if heads % 2:
                raise ValueError(
                    f"num_heads must be even in stages of stripes, which halve them, got {heads} in {num_heads}"
                )
            return [
                StripeBranch(dim // 2, heads // 2, cols=stripe_width, **dd),
                StripeBranch(dim // 2, heads // 2, rows=stripe_width, **dd),
            ]

        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, kernel_size=7, stride=4, padding=2, **dd),
            ChannelsLast(),
            norm_layer(embed_dim, **dd),
        )
        for i, dim in enumerate(dims):
            blocks = [
                CSwinBlock(
                    dim,
                    branches(i),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            setattr(self, f"stage{i + 1}", nn.Sequential(*blocks))
            if i < 3:
                setattr(self, f"merge{i + 1}", Merge(dim, 2 * dim, norm_layer, **dd))
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"stage{i + 1}") for i, dim in enumerate(dims)
        ]
        self._init_head(dims[-1], in_chans, num_classes, global_pool, drop_rate, norm_layer, **dd)

    def _embed(self, x: Tensor) -> Tensor:
        return self.stage1_conv_embed(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        taken: list[Tensor] = []
        x = self.stage1(x)
        if 0 in take_indices:
            taken.append(x)
        if max_index >= 1:
            x = self.stage2(self.merge1(x))
            if 1 in take_indices:
                taken.append(x)
        if max_index >= 2:
            x = self.stage3(self.merge2(x))
            if 2 in take_indices:
                taken.append(x)
        if max_index >= 3:
            x = self.stage4(self.merge3(x))
            if 3 in take_indices:
                taken.append(x)
        return x, taken

    def _prune_trunk(self, max_index: int) -> None:
        for i in range(max_index + 1, 4):
            setattr(self, f"merge{i}", nn.Identity())
            setattr(self, f"stage{i + 1}", nn.Identity())

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [
            (r"^stage(\d+)\." + ("" if coarse else r"(\d+)"), None),
            (r"^merge(\d+)", (99999,)),  # 99999: with the group before it
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^stage1_conv_embed", blocks=blocks)


_cswin_cfg = partial(agent_cfg, first_conv="stage1_conv_embed.0")

default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.in1k": _cswin_cfg("8c562a74441e46d5902b"),
        "agent_cswin_small.in1k": _cswin_cfg("30eb8af675bc4b7a8747"),
        "agent_cswin_base.in1k": _cswin_cfg("c8035b0839b2410c8c9f"),
        "agent_cswin_base_384.in1k": _cswin_cfg("1239be0df44b47719432", size=384),
    }
)


def _create_agent_cswin(variant: str, pretrained: bool = False, **kwargs) -> AgentCswin:
    return build_model(AgentCswin, variant, pretrained, **kwargs)


_BASE = dict(embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32))


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCswin:
    model_args = dict(embed_dim=64, depths=(2, 4, 18, 1), num_heads=(2, 4, 8, 16), drop_path_rate=0.2)
    return _create_agent_cswin("agent_cswin_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCswin:
    model_args = dict(embed_dim=64, depths=(3, 6, 29, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.4)
    return _create_agent_cswin("agent_cswin_small", pretrained, **{**model_args, **kwargs})


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCswin:
    model_args = dict(_BASE, drop_path_rate=0.5)
    return _create_agent_cswin("agent_cswin_base", pretrained, **{**model_args, **kwargs})


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs) -> AgentCswin:
    model_args = dict(_BASE, img_size=384, stripe_width=12, drop_path_rate=0.7)
    return _create_agent_cswin("agent_cswin_base_384", pretrained, **{**model_args, **kwargs})
