"""Agent-PVT: the first Pyramid Vision Transformer with agent attention in all blocks.

Paper: `Agent Attention: On the Integration of Softmax and Linear Attention` - https://arxiv.org/abs/2312.08874

The names of the weights are those of the published checkpoints (https://github.com/LeapLabTHU/Agent-Attention), which
load as downloaded.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import (
    LayerNorm,
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones._agent import (
    TABLES,
    AddPosition,
    AgentAttention,
    adapt_pos_embed,
    agent_cfg,
    check_stages,
    map_sizes,
)
from zoo.backbones._backbone import (
    Backbone,
    DepthwiseConv,
    PaddedPatchEmbed,
    TransformerBlock,
    any_padding,
    check_positive,
    get_norm_layer,
)
from zoo.backbones._checkpoint import AdaptedLoading, build_model, checkpoint_filter_fn  # noqa: F401
from zoo.kernels._symbols import ceil_div

__all__ = ["AgentPvt", "AgentReducedAttention"]


@register_notrace_module  # resizes its tables to the map, which fx cannot follow
class AgentReducedAttention(AgentAttention):
    """Agent attention over a map, whose keys and values may come from a smaller one."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int = 49,
        size: tuple[int, int] = (14, 14),
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            num_agents: Number of agents, a square.
            size: Height and width of the map that the bias tables are made for.
            sr_ratio: Side of the patches that are one key each. The map is zero-padded to whole patches.
            qkv_bias: Whether queries, keys and values have a bias.
            proj_drop: Dropout rate of the output.
        """
        dd = {"device": device, "dtype": dtype}
        check_positive(sr_ratio=sr_ratio)
        super().__init__(dim, num_heads, num_agents, size, (-(-size[0] // sr_ratio), -(-size[1] // sr_ratio)), **dd)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else None
        self.dwc = DepthwiseConv(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, height, width, dim]"""
        height, width = x.shape[1], x.shape[2]
        source = x
        if self.sr is not None and self.norm is not None:
            rows, cols = ceil_div(height, self.sr_ratio), ceil_div(width, self.sr_ratio)
            pad_h, pad_w = rows * self.sr_ratio - height, cols * self.sr_ratio - width
            if any_padding(pad_h, pad_w):
                source = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
            source = self.norm(self.sr(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        key, value = self.kv(source).chunk(2, -1)
        x = self.attend_map(self.q(x), key, value)
        if self.sr is not None:
            value = F.interpolate(value.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False)
            value = value.permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(self.dwc(x, value)))


class AgentPvt(AdaptedLoading, Backbone):
    """Agent-PVT (https://arxiv.org/abs/2312.08874), for any input size.

    An image is zero-padded at the bottom and the right to whole patches, and so is a map before the next stage.
    Position embeddings and bias tables are stretched over maps of another size than those of `img_size`.
    """

    no_decay_suffixes = ("pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4", *TABLES)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        sr_ratios: Sequence[int] = (1, 1, 1, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType = LayerNorm,  # timm's, with an eps of 1e-6
        embed_norm_layer: LayerType = nn.LayerNorm,
        act_layer: LayerType = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            img_size: Side of the images that position embeddings and bias tables are made for, or (height, width).
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            embed_dims: Width per stage.
            depths: Number of blocks per stage.
            num_heads: Number of attention heads per stage.
            num_agents: Number of agents per stage, squares.
            sr_ratios: Side of the patches that are one key each, per stage.
            mlp_ratios: Hidden width of the MLPs per stage, in units of the stage's width.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over the last axis, in the blocks.
            embed_norm_layer: Normalisation over the last axis, behind the patch embeddings.
            act_layer: Activation of the MLPs.

        Raises:
            ValueError: What is per stage is not of four stages.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_stages(
            4,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            num_agents=num_agents,
            sr_ratios=sr_ratios,
            mlp_ratios=mlp_ratios,
        )
        norm_layer = get_norm_layer(norm_layer)
        embed_norm_layer = get_norm_layer(embed_norm_layer)
        act_layer = get_act_layer(act_layer)
        self.sizes = map_sizes(to_2tuple(img_size), 4)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        for i, dim in enumerate(embed_dims):
            patch_embed = PaddedPatchEmbed(
                patch_size=4 if i == 0 else 2,
                in_chans=in_chans if i == 0 else embed_dims[i - 1],
                embed_dim=dim,
                norm_layer=embed_norm_layer,
                **dd,
            )
            blocks = [
                TransformerBlock(
                    dim,
                    AgentReducedAttention(
                        dim, num_heads[i], num_agents[i], self.sizes[i], sr_ratios[i], proj_drop=proj_drop_rate, **dd
                    ),
                    mlp_ratio=mlp_ratios[i],
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            pos_embed = nn.Parameter(torch.empty(1, self.sizes[i][0] * self.sizes[i][1], dim, **dd))
            setattr(self, f"patch_embed{i + 1}", patch_embed)
            setattr(self, f"pos_embed{i + 1}", pos_embed)
            setattr(self, f"add_position{i + 1}", AddPosition(self.sizes[i], "bilinear"))
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
        self.reset_parameters()
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"block{i + 1}") for i, dim in enumerate(embed_dims)
        ]
        self._init_head(embed_dims[-1], in_chans, num_classes, global_pool, drop_rate, None, **dd)

    def reset_parameters(self) -> None:
        for pos_embed in self.parameters(recurse=False):
            trunc_normal_(pos_embed, std=0.02)

    def _embed(self, x: Tensor) -> Tensor:
        return self.add_position1(self.patch_embed1(x), self.pos_embed1)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        taken: list[Tensor] = []
        x = self.block1(x)
        if 0 in take_indices:
            taken.append(x)
        if max_index >= 1:
            x = self.block2(self.add_position2(self.patch_embed2(x.permute(0, 3, 1, 2)), self.pos_embed2))
            if 1 in take_indices:
                taken.append(x)
        if max_index >= 2:
            x = self.block3(self.add_position3(self.patch_embed3(x.permute(0, 3, 1, 2)), self.pos_embed3))
            if 2 in take_indices:
                taken.append(x)
        if max_index >= 3:
            x = self.block4(self.add_position4(self.patch_embed4(x.permute(0, 3, 1, 2)), self.pos_embed4))
            if 3 in take_indices:
                taken.append(x)
        return x, taken

    def _prune_trunk(self, max_index: int) -> None:
        for i in range(max_index + 2, 5):
            setattr(self, f"patch_embed{i}", nn.Identity())
            setattr(self, f"pos_embed{i}", None)
            setattr(self, f"block{i}", nn.Identity())

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Edit `state_dict` to fit: resize the position embeddings of other maps."""
        for i, size in enumerate(self.sizes):
            adapt_pos_embed(state_dict, f"{prefix}pos_embed{i + 1}", size, f"{prefix}block{i + 1}.0.attn.")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        between = [(rf"^(?:patch|pos)_embed{i + 1}", (i, 99999)) for i in (1, 2, 3)]  # 99999: with the group before it
        return dict(
            stem=r"^(?:patch|pos)_embed1", blocks=[(r"^block(\d+)" + ("" if coarse else r"\.(\d+)"), None), *between]
        )


_pvt_cfg = partial(agent_cfg, first_conv="patch_embed1.proj")

default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny.in1k": _pvt_cfg("13fdf0e0a7c5498c934f"),
        "agent_pvt_small.in1k": _pvt_cfg("36b8be9a8863456685a3"),
        "agent_pvt_medium.in1k": _pvt_cfg("4d00ecacf18b45f9b88c"),
        "agent_pvt_medium_256.in1k": _pvt_cfg("654df734121643b19c52", size=256),
        "agent_pvt_large.in1k": _pvt_cfg("040cfe0cfbbe4762ad09"),
    }
)


def _create_agent_pvt(variant: str, pretrained: bool = False, **kwargs) -> AgentPvt:
    return build_model(AgentPvt, variant, pretrained, **kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPvt:
    model_args = dict(depths=(2, 2, 2, 2), drop_path_rate=0.1)
    return _create_agent_pvt("agent_pvt_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPvt:
    model_args = dict(depths=(3, 4, 6, 3), drop_path_rate=0.1)
    return _create_agent_pvt("agent_pvt_small", pretrained, **{**model_args, **kwargs})


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPvt:
    model_args = dict(depths=(3, 4, 18, 3), drop_path_rate=0.3)
    return _create_agent_pvt("agent_pvt_medium", pretrained, **{**model_args, **kwargs})


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs) -> AgentPvt:
    model_args = dict(img_size=256, depths=(3, 4, 18, 3), drop_path_rate=0.3)
    return _create_agent_pvt("agent_pvt_medium_256", pretrained, **{**model_args, **kwargs})


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPvt:
    model_args = dict(depths=(3, 8, 27, 3), drop_path_rate=0.3)
    return _create_agent_pvt("agent_pvt_large", pretrained, **{**model_args, **kwargs})
