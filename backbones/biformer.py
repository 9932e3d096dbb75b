"""BiFormer: hierarchical transformers of bi-level routing attention.

Paper: `BiFormer: Vision Transformer with Bi-Level Routing Attention` - https://arxiv.org/abs/2303.08810

The names of the weights are those of the published checkpoints (https://github.com/rayleizhu/BiFormer). The links to
them are dead; who has such a file passes its path, and it loads as it was published.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerType, calculate_drop_path_rates, get_act_layer
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones._backbone import (
    Backbone,
    CheckpointedBlock,
    DepthwiseConv,
    LayerNorm,
    any_padding,
    before_product,
    check_heads,
)
from zoo.backbones._checkpoint import build_model, checkpoint_filter_fn  # noqa: F401
from zoo.kernels import routing_attention_2d
from zoo.kernels._symbols import ceil_div, crop

__all__ = ["BiFormer", "BiFormerBlock", "BiFormerStl", "RoutingAttention", "RoutingAttention2d"]


_Local = partial(DepthwiseConv, kernel_size=5)  # beside every attention (LePE)


def _route(qkv: Tensor, region_size: tuple[int, int], topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """[batch, height, width, 3, heads, head_dim] -> output and values, [batch, height, width, heads * head_dim]"""
    query, key, value = qkv.unbind(3)
    if torch.jit.is_scripting():
        out = torch.ops.zoo.routing_attention_2d(query, key, value, region_size, topk, scale)[0]
    else:
        out = routing_attention_2d(query, key, value, region_size, topk, scale=scale)
    return out.flatten(3), value.flatten(3)


@register_notrace_module  # pads by the size of the map, which fx cannot follow
class RoutingAttention(nn.Module):
    """Bi-level routing attention (https://arxiv.org/abs/2303.08810) over `n_win * n_win` regions of any map.

    The map is zero-padded at the bottom and the right to a multiple of `n_win`, before `qkv`, and its padding takes
    part like any token: what the authors' code does for dense prediction (`auto_pad`).
    """

    def __init__(self, dim: int, num_heads: int, n_win: int = 7, topk: int = 4, device=None, dtype=None):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            n_win: Number of regions on each side of the map.
            topk: Number of regions that each region attends to; all of them if there are fewer.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = min(topk, n_win**2)
        self.scale = dim**-0.5  # of the whole width

        self.qkv = nn.Sequential(OrderedDict(qkv=nn.Linear(dim, 3 * dim, **dd)))
        self.lepe = _Local(dim, **dd)
        self.wo = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, height, width, dim]"""
        height, width = x.shape[1], x.shape[2]
        region_size = (ceil_div(height, self.n_win), ceil_div(width, self.n_win))
        pad_h, pad_w = region_size[0] * self.n_win - height, region_size[1] * self.n_win - width
        if any_padding(pad_h, pad_w):
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))

        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        x, value = _route(qkv, region_size, self.topk, self.scale)
        x = self.lepe(x, value)

        if any_padding(pad_h, pad_w):
            x = crop(x, height, width)
        return self.wo(x)


@register_notrace_module  # the size of the regions follows that of the map
class RoutingAttention2d(nn.Module):
    """`RoutingAttention` as the authors rewrote it, for maps of [batch, dim, height, width].

    Regions have the whole part of `height / n_win` by `width / n_win` tokens, one at least. There are more than `n_win`
    on a side where that leaves a remainder; the last ones are filled up with zero queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, n_win: int = 7, topk: int = 4, device=None, dtype=None):
        """See `RoutingAttention`."""
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.scale = dim**-0.5

        self.qkv_linear = nn.Conv2d(dim, 3 * dim, kernel_size=1, **dd)
        self.lepe = _Local(dim, **dd)
        self.output_linear = nn.Conv2d(dim, dim, kernel_size=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, height, width] -> [batch, dim, height, width]"""
        height, width = x.shape[2], x.shape[3]
        rows, cols = max(1, height // self.n_win), max(1, width // self.n_win)
        regions = ((height + rows - 1) // rows) * ((width + cols - 1) // cols)

        qkv = self.qkv_linear(x).permute(0, 2, 3, 1).unflatten(-1, (3, self.num_heads, -1))
        x, value = _route(qkv, (rows, cols), min(self.topk, regions), self.scale)
        return self.output_linear(self.lepe(x, value).permute(0, 3, 1, 2))


class FullAttention(nn.Module):
    """Attention of every token to all. Its depthwise convolution is of the input."""

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = _Local(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, height, width, dim]"""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        return self.proj(self.lepe(out, x))


class FullAttention2d(nn.Module):
    """Attention of every token to all, for maps of [batch, dim, height, width]. Its convolution is of the values."""

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None):
        """See `FullAttention`."""
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        self.num_heads = num_heads
        self.qkv = nn.Conv2d(dim, 3 * dim, kernel_size=1, bias=False, **dd)
        self.proj = nn.Conv2d(dim, dim, kernel_size=1, **dd)
        self.lepe = _Local(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, height, width] -> [batch, dim, height, width]"""
        query, key, value = self.qkv(x).chunk(3, 1)
        tokens = [y.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3) for y in (query, key, value)]
        out = F.scaled_dot_product_attention(tokens[0], tokens[1], tokens[2]).transpose(2, 3).reshape(x.shape)
        out, value = [y.permute(0, 2, 3, 1) for y in (out, value)]
        return self.proj(self.lepe(out, value).permute(0, 3, 1, 2))


class BiFormerBlock(CheckpointedBlock):
    """Pre-norm transformer block of routed or full attention and an MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int | None = 4,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        conv_position: bool = True,
        channels_first: bool = False,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of attention heads.
            n_win: Number of regions on each side of the map.
            topk: Number of regions that each region attends to; None for full attention.
            mlp_ratio: Hidden width of the MLP, in units of `dim`.
            drop_path: Stochastic depth rate.
            act_layer: Activation of the MLP.
            conv_position: Whether the block begins with a depthwise convolution that marks positions.
            channels_first: Whether the inside is laid out as the outside is.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.channels_first = channels_first
        if channels_first:
            norm_layer, linear = partial(LayerNorm2d, eps=1e-6), partial(nn.Conv2d, kernel_size=1)
            routing, full = RoutingAttention2d, FullAttention2d
        else:
            norm_layer, linear = partial(LayerNorm, eps=1e-6), nn.Linear
            routing, full = RoutingAttention, FullAttention
        hidden = int(mlp_ratio * dim)

        self.pos_embed = DepthwiseConv(dim, **dd) if conv_position else None
        self.norm1 = before_product(norm_layer(dim, **dd))
        if topk is None:
            self.attn = full(dim, num_heads, **dd)
        else:
            self.attn = routing(dim, num_heads, n_win=n_win, topk=topk, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm2 = before_product(norm_layer(dim, **dd))
        # The authors' blocks that mark positions have room for a convolution, which no published model has.
        room = [nn.Identity()] if conv_position else []
        self.mlp = nn.Sequential(linear(dim, hidden, **dd), *room, act_layer(), linear(hidden, dim, **dd))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            y = x.permute(0, 2, 3, 1)
            x = self.pos_embed(y, y).permute(0, 3, 1, 2)
        if not self.channels_first:
            x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x if self.channels_first else x.permute(0, 3, 1, 2)


class StlStage(nn.Module):
    """Blocks at one resolution, under the name that their published weights have."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, height, width] -> [batch, dim, height, width]"""
        return self.blocks(x)


@register_notrace_module  # pads by the size of the map
class Patches(nn.Conv2d):
    """Convolution of patches side by side, one at least; what is left at the bottom and the right is left out."""

    def __init__(self, in_dim: int, dim: int, size: int, device=None, dtype=None):
        super().__init__(in_dim, dim, kernel_size=size, stride=size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_dim, height, width] -> [batch, dim, height // size or 1, width // size or 1]"""
        if x.shape[2] == 0 or x.shape[3] == 0:  # padded, it would be an image of zeros
            raise ValueError(f"x must have a height and a width of at least 1, got shape {list(x.shape)}")
        pad_h, pad_w = max(0, self.kernel_size[0] - x.shape[2]), max(0, self.kernel_size[1] - x.shape[3])
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class BiFormer(Backbone):
    """BiFormer (https://arxiv.org/abs/2303.08810), for any input size."""

    trunk_name = "stages"
    conv_position = True
    stage_layer: type[nn.Module] = nn.Sequential

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        n_win: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = nn.GELU,
        channels_first: bool = False,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            embed_dim: Width of the first stage; it doubles from stage to stage.
            depths: Number of blocks per stage.
            num_heads: Number of attention heads per stage.
            n_win: Number of regions on each side of a map. No weight depends on it: the authors take 7 for
                classification, 8 for segmentation and 16 for detection.
            topks: Per stage, the number of regions that each region attends to; None for full attention.
            mlp_ratio: Hidden width of the MLPs, in units of the stage's width.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            act_layer: Activation of the MLPs and the stem.
            channels_first: Whether blocks are those of the authors' rewritten code; see `RoutingAttention2d`.

        Raises:
            ValueError: `depths`, `num_heads` and `topks` differ in length, or `n_win` or one of `topks` is below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if not len(depths) == len(num_heads) == len(topks):
            raise ValueError(
                f"depths, num_heads and topks must have one entry per stage, got {depths}, {num_heads} and {topks}"
            )
        if not isinstance(n_win, int) or n_win < 1:
            raise ValueError(f"n_win must be an int of at least 1, got {n_win!r}")
        if any(topk is not None and topk < 1 for topk in topks):
            raise ValueError(f"topks must be at least 1, or None for full attention, got {topks}")
        act_layer = get_act_layer(act_layer)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        self.downsample_layers = nn.ModuleList([self._stem(in_chans, embed_dim, act_layer, **dd)])
        self.downsample_layers.extend(self._downsample(dim, **dd) for dim in dims[:-1])
        self.stages = nn.ModuleList(
            self.stage_layer(
                *(
                    BiFormerBlock(
                        dim,
                        num_heads=num_heads[i],
                        n_win=n_win,
                        topk=topks[i],
                        mlp_ratio=mlp_ratio,
                        drop_path=drop_path,
                        act_layer=act_layer,
                        conv_position=self.conv_position,
                        channels_first=channels_first,
                        **dd,
                    )
                    for drop_path in drop_paths[i]
                )
            )
            for i, dim in enumerate(dims)
        )
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)]
        self._init_head(
            dims[-1], in_chans, num_classes, global_pool, drop_rate, nn.BatchNorm2d, output_fmt="NCHW", **dd
        )

    @staticmethod
    def _stem(in_chans: int, dim: int, act_layer: Callable[..., nn.Module], **dd) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            act_layer(),
            nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    @staticmethod
    def _downsample(dim: int, **dd) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, **dd), nn.BatchNorm2d(2 * dim, **dd)
        )

    def _embed(self, x: Tensor) -> Tensor:
        return x  # the stem is one of the downsamplers

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        taken: list[Tensor] = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            if i <= max_index:
                x = stage(downsample(x))
                if i in take_indices:
                    taken.append(x)
        return x, taken

    def _prune_trunk(self, max_index: int) -> None:
        del self.downsample_layers[max_index + 1 :]
        del self.stages[max_index + 1 :]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        downsample = r"^downsample_layers\.(\d+)"
        blocks = [
            (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)(?:\.blocks)?\.(\d+)", None),
            (downsample, None if coarse else (0,)),  # with the block after it
            (r"^norm", (99999,)),  # with the group before it
        ]
        return dict(stem=r"^downsample_layers\.0", blocks=blocks)


class BiFormerStl(BiFormer):
    """BiFormer in the layout of Swin-T, from the paper's ablation, for any input size.

    Patches that an image or a map has only parts of are left out, as in the authors' code.
    """

    conv_position = False
    stage_layer = StlStage

    @staticmethod
    def _stem(in_chans: int, dim: int, act_layer: Callable[..., nn.Module], **dd) -> nn.Module:
        return nn.Sequential(Patches(in_chans, dim, size=4, **dd), nn.BatchNorm2d(dim, **dd))

    @staticmethod
    def _downsample(dim: int, **dd) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), Patches(dim, 2 * dim, size=2, **dd))


def _cfg(**kwargs) -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        "paper_ids": "arXiv:2303.08810",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        **kwargs,
    }


def _dead_cfg(file: str) -> dict:
    return _cfg(
        notes=(
            f"the authors' link to {file} is dead (https://github.com/rayleizhu/BiFormer/issues/53); "
            "who has the file passes its path: pretrained=True, pretrained_cfg_overlay=dict(file=PATH), "
            "or checkpoint_path=PATH",
        )
    )


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _dead_cfg("biformer_tiny_in1k.pth"),
        "biformer_small.in1k": _dead_cfg("biformer_small_in1k.pth"),
        "biformer_base.in1k": _dead_cfg("biformer_base_in1k.pth"),
        "biformer_stl.in1k": _dead_cfg("biformer_stl_in1k.pth"),
        "biformer_stl_nchw.in1k": _dead_cfg("biformer_stl_nchw_in1k.pth"),
        "test_biformer.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_biformer(
    variant: str, pretrained: bool = False, model_cls: type[BiFormer] = BiFormer, **kwargs
) -> BiFormer:
    return build_model(model_cls, variant, pretrained, **kwargs)


_STL = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 8), mlp_ratio=4.0, drop_path_rate=0.1)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dim=64, depths=(2, 2, 8, 2), num_heads=(2, 4, 8, 8), drop_path_rate=0.1)
    return _create_biformer("biformer_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dim=64, depths=(4, 4, 18, 4), num_heads=(2, 4, 8, 8), drop_path_rate=0.15)
    return _create_biformer("biformer_small", pretrained, **{**model_args, **kwargs})


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dim=96, depths=(4, 4, 18, 4), num_heads=(3, 6, 12, 8), drop_path_rate=0.4)
    return _create_biformer("biformer_base", pretrained, **{**model_args, **kwargs})


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormerStl:
    return _create_biformer("biformer_stl", pretrained, BiFormerStl, **{**_STL, **kwargs})


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormerStl:
    """`biformer_stl` in the authors' rewritten code: other shapes of weights, and regions of whole tokens."""
    model_args = dict(_STL, channels_first=True)
    return _create_biformer("biformer_stl_nchw", pretrained, BiFormerStl, **{**model_args, **kwargs})


@register_model
def test_biformer(pretrained: bool = False, **kwargs) -> BiFormer:  # noqa: PT028 (a model, not a test)
    """The smallest BiFormer, for tests: at 96x96 its maps are cut into regions without padding."""
    model_args = dict(
        embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), n_win=3, topks=(1, 2, 4, None), mlp_ratio=2.0
    )
    return _create_biformer("test_biformer", pretrained, **{**model_args, **kwargs})
