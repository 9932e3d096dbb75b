"""Agent-DeiT: DeiT with agent attention, in all blocks or in the first ones.

Paper: `Agent Attention: On the Integration of Softmax and Linear Attention` - https://arxiv.org/abs/2312.08874

The names of the weights are those of the published checkpoints (https://github.com/LeapLabTHU/Agent-Attention), which
load as downloaded.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import (
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones._agent import (
    TABLES,
    AddPosition,
    AgentAttention,
    adapt_pos_embed,
    agent_cfg,
)
from zoo.backbones._backbone import (
    Backbone,
    DepthwiseConv,
    PaddedPatchEmbed,
    TransformerBlock,
    check_heads,
    check_positive,
    get_norm_layer,
)
from zoo.backbones._checkpoint import AdaptedLoading, build_model, checkpoint_filter_fn  # noqa: F401

__all__ = ["AgentDeit", "AgentTokenAttention", "TokenAttention"]


_Norm = partial(nn.LayerNorm, eps=1e-6)


@register_notrace_module  # resizes its tables to the map, which fx cannot follow
class AgentTokenAttention(AgentAttention):
    """Agent attention of a map and a class token, which attends and is attended to but does not enter the agents."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int = 49,
        size: tuple[int, int] = (14, 14),
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
            qkv_bias: Whether queries, keys and values have a bias.
            proj_drop: Dropout rate of the output.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, num_agents, size, **dd)
        self.ac_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, **dd))
        self.ca_bias = nn.Parameter(torch.empty(1, num_heads, 1, num_agents, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = DepthwiseConv(dim, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """
        Args:
            x: [batch, 1 + height * width, dim], the class token first.
            height: Rows of the map.
            width: Columns of the map.

        Returns:
            The shape of `x`.
        """
        query, key, value = self.qkv(x).chunk(3, -1)
        agent = self.pool(query[:, 1:].unflatten(1, (height, width)))
        agent_bias = self.agent_bias(height, width, self.ac_bias[0, :, :, 0])
        query_bias = self.query_bias(height, width, self.ca_bias[0, :, 0])
        out = self.attend(query, key, value, agent, agent_bias, query_bias)
        return self.proj_drop(self.proj(self.dwc(out, value[:, 1:].unflatten(1, (height, width)))))


class TokenAttention(nn.Module):
    """Plain multi-head attention, called like `AgentTokenAttention`."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]"""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class TokenBlock(TransformerBlock):
    """`TransformerBlock` of a list of tokens, whose attention is told the size of the map."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[batch, 1 + height * width, dim] -> [batch, 1 + height * width, dim]"""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._forward, x, height, width)
        return self._forward(x, height, width)

    def _forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self._add(x, self.attn(self.norm1(x), height, width))


class AgentDeit(AdaptedLoading, Backbone):
    """Agent-DeiT (https://arxiv.org/abs/2312.08874), for any input size.

    An image is zero-padded at the bottom and the right to whole patches. Position embeddings and bias tables are
    stretched over maps of another size than that of `img_size`.
    """

    trunk_name = "blocks"
    no_decay_suffixes = ("cls_token", "pos_embed", *TABLES, ".ac_bias", ".ca_bias")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_agents: int = 49,
        agent_depth: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType = _Norm,
        act_layer: LayerType = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            img_size: Side of the images that position embeddings and bias tables are made for, or (height, width).
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: "token" for the class token, "avg", "max" or "avgmax" of the others, "" for none.
            patch_size: Side of a patch.
            embed_dim: Width of the tokens.
            depth: Number of blocks.
            num_heads: Number of attention heads.
            num_agents: Number of agents, a square.
            agent_depth: Number of blocks with agents, from the first; the others have plain attention.
            mlp_ratio: Hidden width of the MLPs, in units of `embed_dim`.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLPs.

        Raises:
            ValueError: `patch_size` is below 1, `num_heads` does not divide `embed_dim`, or `num_agents` is no square.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(patch_size=patch_size)
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        self.patch_size = patch_size
        img_height, img_width = to_2tuple(img_size)
        self.size = self._map_size(img_height, img_width)

        self.patch_embed = PaddedPatchEmbed(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.size[0] * self.size[1], embed_dim, **dd))
        self.add_position = AddPosition(self.size, "bicubic")
        self.reset_parameters()

        def attention(i: int) -> nn.Module:
            if i < agent_depth:
                return AgentTokenAttention(embed_dim, num_heads, num_agents, self.size, proj_drop=proj_drop_rate, **dd)
            return TokenAttention(embed_dim, num_heads, proj_drop=proj_drop_rate, **dd)

        self.blocks = nn.ModuleList(
            TokenBlock(
                embed_dim,
                attention(i),
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=drop_path,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **dd,
            )
            for i, drop_path in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self._init_head(
            embed_dim,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            norm_layer,
            output_fmt="NLC",
            num_prefix_tokens=1,
            **dd,
        )

    def reset_parameters(self) -> None:
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def _map_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def _forward_image(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        x = self.add_position(self.patch_embed(x), self.pos_embed[:, 1:])
        height, width = x.shape[1], x.shape[2]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        taken: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i <= max_index:
                x = block(x, height, width)
                if i in take_indices:
                    taken.append(x)
        return x, taken

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Edit `state_dict` to fit: resize the position embeddings of another map."""
        adapt_pos_embed(state_dict, f"{prefix}pos_embed", self.size, f"{prefix}blocks.0.attn.", num_prefix_tokens=1)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^cls_token|^pos_embed|^patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        )


_deit_cfg = partial(agent_cfg, pool_size=(14, 14), first_conv="patch_embed.proj")

default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _deit_cfg("57e0904221824ee7b7af"),
        "agent_deit_small.in1k": _deit_cfg("fdd43304372541db8ea7"),
        "agent_deit_small_448.in1k": _deit_cfg("a228f86241c445f1969b", size=448, pool_size=(28, 28)),
        "agent_deit_base.in1k": _deit_cfg("5115f15fdd7e4ab58fbc"),
    }
)


def _create_agent_deit(variant: str, pretrained: bool = False, out_indices=3, **kwargs) -> AgentDeit:
    return build_model(AgentDeit, variant, pretrained, out_indices=out_indices, **kwargs)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeit:
    model_args = dict(embed_dim=192, num_heads=3)
    return _create_agent_deit("agent_deit_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeit:
    model_args = dict(embed_dim=384, num_heads=6, drop_path_rate=0.1)
    return _create_agent_deit("agent_deit_small", pretrained, **{**model_args, **kwargs})


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs) -> AgentDeit:
    model_args = dict(img_size=448, embed_dim=384, num_heads=6, drop_path_rate=0.1)
    return _create_agent_deit("agent_deit_small_448", pretrained, **{**model_args, **kwargs})


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeit:
    model_args = dict(embed_dim=768, num_heads=12, num_agents=81, agent_depth=4, drop_path_rate=0.3)
    return _create_agent_deit("agent_deit_base", pretrained, **{**model_args, **kwargs})
