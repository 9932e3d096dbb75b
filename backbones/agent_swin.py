"""Agent-Swin: Swin whose first stages, or their first blocks, have agent attention over the whole map.

Paper: `Agent Attention: On the Integration of Softmax and Linear Attention` - https://arxiv.org/abs/2312.08874

The names of the weights are those of the published checkpoints (https://github.com/LeapLabTHU/Agent-Attention), which
load as downloaded.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import (
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    to_2tuple,
)
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from zoo.backbones._agent import TABLES, AgentAttention, agent_cfg, check_stages, map_sizes
from zoo.backbones._backbone import (
    Backbone,
    DepthwiseConv,
    PaddedPatchEmbed,
    Stage,
    Stages,
    TransformerBlock,
    any_padding,
    get_norm_layer,
)
from zoo.backbones._checkpoint import AdaptedLoading, build_model, checkpoint_filter_fn  # noqa: F401
from zoo.backbones.gc_vit import WindowAttention
from zoo.kernels import window_attention_2d
from zoo.kernels._symbols import crop, is_symbol
from zoo.kernels.window.tiled import window_attention_2d as scripted_window_attention_2d

__all__ = ["AgentMapAttention", "AgentSwin", "ShiftedWindowAttention"]


@register_notrace_module  # resizes its tables to the map, which fx cannot follow
class AgentMapAttention(AgentAttention):
    """Agent attention over a map."""

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
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = DepthwiseConv(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, height, width, dim]"""
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj_drop(self.proj(self.dwc(self.attend_map(query, key, value), value)))


@register_notrace_module  # pads by the size of the map
class ShiftedWindowAttention(WindowAttention):
    """Swin's attention within windows, plain or shifted, with a learnt relative position bias.

    Paper: https://arxiv.org/abs/2103.14030

    A side of the map that is longer than the window is zero-padded at its end to whole windows, before `qkv`, and the
    padding attended to like any token. A side that is not longer is one window, and not shifted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        shift: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            window_size: Side of a window.
            shift: Tokens by which the windows are moved, less than `window_size`.
            qkv_bias: Whether queries, keys and values have a bias.
            proj_drop: Dropout rate of the output.
        """
        super().__init__(
            dim, num_heads, window_size, qkv_bias=qkv_bias, proj_drop=proj_drop, device=device, dtype=dtype
        )
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim], any height and width -> [batch, height, width, dim]"""
        height, width = x.shape[1], x.shape[2]
        window = (min(self.window_size[0], height), min(self.window_size[1], width))
        # 0 where the map is not longer than the window; said without a comparison, for exporters
        shift = (min(self.shift, self.shift * (height - window[0])), min(self.shift, self.shift * (width - window[1])))
        # Whole windows, of which an exporter sees that there is one at least
        down, across = (height - 1) // window[0] + 1, (width - 1) // window[1] + 1
        pad_h, pad_w = down * window[0] - height, across * window[1] - width
        if any_padding(pad_h, pad_w):
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)

        cut_h, cut_w = self.window_size[0] - window[0], self.window_size[1] - window[1]
        table = self._bias()  # of a smaller window, the middle
        bias = table[:, cut_h : table.shape[1] - cut_h, cut_w : table.shape[2] - cut_w]
        if torch.jit.is_scripting() or is_symbol(height) or is_symbol(width):
            x = scripted_window_attention_2d(query, key, value, window, shift, bias, self.scale)
        else:
            x = window_attention_2d(query, key, value, window, shift, rel_pos_bias=bias, scale=self.scale)
        return self.proj_drop(self.proj(crop(x, height, width).flatten(3)))


class AgentSwin(AdaptedLoading, Backbone):
    """Agent-Swin (https://arxiv.org/abs/2312.08874), for any input size.

    An image is zero-padded at the bottom and the right to whole patches, a map to even sides before it is merged and to
    whole windows where attention is plain. Agents' bias tables are stretched over maps of another size than those of
    `img_size`.
    """

    trunk_name = "layers"
    no_decay_suffixes = (*TABLES, ".relative_position_bias_table")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_depths: Sequence[int] = (2, 2, 6, 0),
        window_size: int = 7,
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
            agent_depths: Number of blocks with agents per stage, from its first; the others have window attention.
            window_size: Side of the windows, which every second block shifts by half.
            mlp_ratio: Hidden width of the MLPs, in units of the stage's width.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLPs.

        Raises:
            ValueError: `depths`, `num_heads`, `num_agents` and `agent_depths` differ in length.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_stages(depths=depths, num_heads=num_heads, num_agents=num_agents, agent_depths=agent_depths)
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        sizes = map_sizes(to_2tuple(img_size), len(depths))
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def attention(stage: int, i: int) -> nn.Module:
            common = dict(dim=dims[stage], num_heads=num_heads[stage], proj_drop=proj_drop_rate, **dd)
            if i < agent_depths[stage]:
                return AgentMapAttention(num_agents=num_agents[stage], size=sizes[stage], **common)
            return ShiftedWindowAttention(window_size=window_size, shift=window_size // 2 if i % 2 else 0, **common)

        self.patch_embed = PaddedPatchEmbed(
            patch_size=4, in_chans=in_chans, embed_dim=embed_dim, norm_layer=norm_layer, **dd
        )
        self.layers = Stages()
        for stage, dim in enumerate(dims):
            blocks = [
                TransformerBlock(
                    dim,
                    attention(stage, i),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for i, drop_path in enumerate(drop_paths[stage])
            ]
            last = stage == len(dims) - 1
            self.layers.append(Stage(blocks, None if last else PatchMerging(dim, norm_layer=norm_layer, **dd)))
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"layers.{i}.blocks") for i, dim in enumerate(dims)
        ]
        self._init_head(dims[-1], in_chans, num_classes, global_pool, drop_rate, norm_layer, **dd)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.layers(x, take_indices, max_index)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Edit `state_dict` to fit: drop the masks of shifted windows, which are made from the map."""
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(".attn_mask")]:
            del state_dict[key]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        stage = r"^layers\.(\d+)"
        blocks = [
            (rf"{stage}\.blocks\.(\d+)", None),
            (rf"{stage}\.downsample", (99999,)),  # 99999: with the group before it
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=stage if coarse else blocks)


_swin_cfg = partial(agent_cfg, first_conv="patch_embed.proj")

default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.in1k": _swin_cfg("a2ddc1190c224f768a41"),
        "agent_swin_small.in1k": _swin_cfg("f607172c9fea4d6e99bb"),
        "agent_swin_small_288.in1k": _swin_cfg("09760394e93b4046a25e", size=288, crop_pct=1.0),
        "agent_swin_base.in1k": _swin_cfg("4fcd2d0114bb490483c3"),
        "agent_swin_base_384.in1k": _swin_cfg("bb84ee9058954706a557", size=384, crop_pct=1.0),
    }
)


def _create_agent_swin(variant: str, pretrained: bool = False, **kwargs) -> AgentSwin:
    return build_model(AgentSwin, variant, pretrained, **kwargs)


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), agent_depths=(2, 2, 6, 0), drop_path_rate=0.2)
_SMALL = dict(
    embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), agent_depths=(2, 2, 0, 0), drop_path_rate=0.3
)
_BASE = dict(
    embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), agent_depths=(2, 2, 2, 0), drop_path_rate=0.5
)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    return _create_agent_swin("agent_swin_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    return _create_agent_swin("agent_swin_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs) -> AgentSwin:
    model_args = dict(_SMALL, img_size=288, window_size=9)
    return _create_agent_swin("agent_swin_small_288", pretrained, **{**model_args, **kwargs})


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    return _create_agent_swin("agent_swin_base", pretrained, **{**_BASE, **kwargs})


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs) -> AgentSwin:
    model_args = dict(_BASE, img_size=384, window_size=12)
    return _create_agent_swin("agent_swin_base_384", pretrained, **{**model_args, **kwargs})
