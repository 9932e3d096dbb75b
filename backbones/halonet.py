"""HaloNet H0 to H7: bottleneck networks whose 3x3 convolutions are attention of blocks to themselves and a halo.

Paper: `Scaling Local Self-Attention for Parameter Efficient Visual Backbones` - https://arxiv.org/abs/2103.12731

The authors published neither code nor weights. Block and halo size, the value and output ratios, the depths and the
width of the last convolution are those on which two independent transcriptions of the paper's table agree. From only
one of them come the image sizes and the heads (4, 8, 8, 8). The activation, the shortcuts, no bias in the projections
and the stride taken by the queries are timm's reading of the paper, of which `halonet_h1` in timm is an example; its
weights would load here with num_heads=(8, 8, 8, 8). At 600 pixels blocks do not divide the maps of H7; like any other
size that does not fit, the maps are then padded.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_act_layer,
)
from timm.layers.halo_attn import HaloAttn
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones._backbone import Backbone, Blocks, CheckpointedBlock, any_padding, check_heads, check_positive
from zoo.backbones._checkpoint import build_model, checkpoint_filter_fn  # noqa: F401
from zoo.kernels import halo_attention_2d
from zoo.kernels._symbols import ceil_div, crop

__all__ = ["HaloAttention", "HaloBlock", "HaloNet"]


@register_notrace_module  # pads by the size of the map, which fx cannot follow
class HaloAttention(HaloAttn):
    """timm's halo attention, with its weights and options, by `zoo.kernels.halo_attention_2d` and for maps of any size.

    A map that blocks do not divide is continued at the bottom and the right by what is beyond the border of every map:
    keys and values of zero.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        dim_head: int,
        block_size: int,
        halo_size: int,
        stride: int = 1,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the input.
            dim_out: Width of the output and of the values.
            num_heads: Number of heads, a divisor of `dim_out`.
            dim_head: Width of a head's queries and keys.
            block_size: Side of a block of queries, in tokens of the input.
            halo_size: Width of the halo around a block.
            stride: 1, or 2 for a map of half the size.

        Raises:
            ValueError: `num_heads` does not divide `dim_out`, `block_size` is below 1, or `stride` is neither 1 nor 2.
        """
        check_heads(num_heads, dim_out=dim_out)
        check_positive(block_size=block_size)
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        super().__init__(
            dim,
            dim_out,
            stride=stride,
            num_heads=num_heads,
            dim_head=dim_head,
            block_size=block_size,
            halo_size=halo_size,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, height, width] -> [batch, dim_out, ceil(height / stride), ceil(width / stride)]

        With an odd `block_size` and a stride of 2 it is rounded down: the output is pooled then, not the queries.
        """
        # The projections are laid out head by head, the keys of a head before its values.
        query = self.q(x).unflatten(1, (self.num_heads, self.dim_head_qk)).permute(0, 3, 4, 1, 2)
        dim_head = self.dim_head_qk + self.dim_head_v
        key_value = self.kv(x).unflatten(1, (self.num_heads, dim_head)).permute(0, 3, 4, 1, 2)
        height, width = query.shape[1], query.shape[2]
        blocks_h, blocks_w = ceil_div(x.shape[2], self.block_size), ceil_div(x.shape[3], self.block_size)
        pad_h, pad_w = blocks_h * self.block_size - x.shape[2], blocks_w * self.block_size - x.shape[3]
        if any_padding(pad_h, pad_w):
            key_value = F.pad(key_value, (0, 0, 0, 0, 0, pad_w, 0, pad_h))
            pad_h = blocks_h * (self.block_size // self.block_stride) - height
            pad_w = blocks_w * (self.block_size // self.block_stride) - width
            query = F.pad(query, (0, 0, 0, 0, 0, pad_w, 0, pad_h))

        # Tokens in a row, where a convolution leaves channels so: once, for the kernels of both directions.
        query, key_value = query.contiguous(), key_value.contiguous()
        key, value = key_value.split([self.dim_head_qk, self.dim_head_v], dim=-1)
        rel_height, rel_width = self.pos_embed.height_rel, self.pos_embed.width_rel
        if self.scale_pos_embed:
            rel_height, rel_width = self.scale * rel_height, self.scale * rel_width
        if torch.jit.is_scripting():
            x = torch.ops.zoo.halo_attention_2d(
                query, key, value, rel_height, rel_width,
                self.block_size, self.halo_size, self.block_stride, self.scale,
            )[0]  # fmt: skip
        else:
            x = halo_attention_2d(
                query,
                key,
                value,
                self.block_size,
                self.halo_size,
                rel_height=rel_height,
                rel_width=rel_width,
                stride=self.block_stride,
                scale=self.scale,
            )
        return self.pool(crop(x, height, width).flatten(3).permute(0, 3, 1, 2))


class HaloBlock(CheckpointedBlock):
    """Residual bottleneck: 1x1 convolution, halo attention, 1x1 convolution, each with a norm."""

    def __init__(
        self,
        in_chs: int,
        dim: int,
        value_dim: int,
        out_chs: int,
        num_heads: int,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        drop_path: float = 0.0,
        norm_layer: LayerType = nn.BatchNorm2d,
        act_layer: LayerType = nn.ReLU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chs: Width of the input.
            dim: Width of the bottleneck, its queries and its keys.
            value_dim: Width of the values.
            out_chs: Width of the output.
            num_heads: Number of attention heads, a divisor of `dim` and `value_dim`.
            block_size: Side of a block of queries.
            halo_size: Width of the halo around a block.
            stride: 1, or 2 for a map of half the size.
            drop_path: Stochastic depth rate.
            norm_layer: Normalisation over channels.
            act_layer: Activation.

        Raises:
            ValueError: `num_heads` does not divide `dim` and `value_dim`, `block_size` is below 1, or `stride` is
                neither 1 nor 2.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        conv = partial(ConvNormAct, norm_layer=norm_layer, act_layer=act_layer, **dd)
        self.shortcut = nn.Identity()
        if stride > 1 or in_chs != out_chs:
            self.shortcut = conv(in_chs, out_chs, stride=stride, apply_act=False)
        self.conv1_1x1 = conv(in_chs, dim)
        self.self_attn = HaloAttention(
            dim, value_dim, num_heads, dim // num_heads, block_size, halo_size, stride=stride, **dd
        )
        self.post_attn = get_norm_act_layer(norm_layer, act_layer)(value_dim, **dd)
        self.conv3_1x1 = conv(value_dim, out_chs, apply_act=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = get_act_layer(act_layer)()

    def _forward(self, x: Tensor) -> Tensor:
        """[batch, in_chs, height, width] -> [batch, out_chs, ceil(height / stride), ceil(width / stride)]"""
        y = self.conv3_1x1(self.post_attn(self.self_attn(self.conv1_1x1(x))))
        return self.act(self.shortcut(x) + self.drop_path(y))


class HaloNet(Backbone):
    """HaloNet (https://arxiv.org/abs/2103.12731), for any input size. Weights are named as in timm's HaloNets."""

    trunk_name = "stages"
    no_decay_suffixes = (".height_rel", ".width_rel")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        out_ratio: float = 1.0,
        num_features: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType = nn.BatchNorm2d,
        act_layer: LayerType = nn.ReLU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            embed_dim: Width of the first stage's bottlenecks; it doubles from stage to stage.
            depths: Number of blocks per stage.
            num_heads: Number of attention heads per stage.
            block_size: Side of a block of queries, even.
            halo_size: Width of the halo around a block.
            value_ratio: Width of the values, in units of the bottleneck's.
            out_ratio: Width of the blocks' outputs, in units of the bottleneck's.
            num_features: Width of a last 1x1 convolution before the pooling; None for no such.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over channels.
            act_layer: Activation.

        Raises:
            ValueError: `depths` and `num_heads` differ in length, `num_heads` does not divide the widths, or
                `block_size` is odd or below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if len(num_heads) != len(depths):
            raise ValueError(f"depths and num_heads must have one entry per stage, got {depths} and {num_heads}")
        if block_size % 2:
            raise ValueError(f"block_size must be even, for the stride of 2 between stages, got {block_size}")
        layers = {"norm_layer": norm_layer, "act_layer": act_layer}
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvNormAct(in_chans, embed_dim, 7, stride=2, **layers, **dd),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        chs = embed_dim
        stages = []
        self.feature_info = []
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            out_chs = int(dim * out_ratio)
            blocks = [
                HaloBlock(
                    chs if j == 0 else out_chs,
                    dim,
                    int(dim * value_ratio),
                    out_chs,
                    heads,
                    block_size,
                    halo_size,
                    stride=2 if i > 0 and j == 0 else 1,
                    drop_path=drop_path,
                    **layers,
                    **dd,
                )
                for j, drop_path in enumerate(drop_paths[i])
            ]
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=out_chs, reduction=4 * 2**i, module=f"stages.{i}"))
            chs = out_chs
        self.stages = Blocks(stages)
        final_conv = None if num_features is None else partial(ConvNormAct, chs, **layers)
        self._init_head(
            num_features or chs, in_chans, num_classes, global_pool, drop_rate, final_conv, output_fmt="NCHW", **dd
        )

    def _embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.stages(x, take_indices, max_index)

    @staticmethod
    def _init_weights(module: nn.Module, name: str = "", needs_reset: bool = True) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, HaloAttention):  # after its convolutions
            module.reset_parameters()
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def adapt_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Edit `state_dict` to fit: timm's names for the last convolution and the classifier."""
        for theirs, ours in (("final_conv.", "norm."), ("head.fc.", "head.")):
            for key in [key for key in state_dict if key.startswith(prefix + theirs)]:
                state_dict[prefix + ours + key.removeprefix(prefix + theirs)] = state_dict.pop(key)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Reached on every road, also where the model is inside another one.
        self.adapt_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        stage = r"^stages\.(\d+)"
        blocks = [(rf"{stage}\.(\d+)", None), (r"^norm", (99999,))]  # 99999: with the group before it
        return dict(stem=r"^stem", blocks=stage if coarse else blocks)


def _cfg(image_size: int = 256, **kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
        "pool_size": (-(-image_size // 32), -(-image_size // 32)),
        "fixed_input_size": False,
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://arxiv.org/abs/2103.12731",
        "paper_ids": "arXiv:2103.12731",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "halonet_h0_256.untrained": _cfg(),
        "halonet_h1_256.untrained": _cfg(),
        "halonet_h2_256.untrained": _cfg(),
        "halonet_h3_320.untrained": _cfg(320),
        "halonet_h4_384.untrained": _cfg(384),
        "halonet_h5_448.untrained": _cfg(448),
        "halonet_h6_512.untrained": _cfg(512),
        "halonet_h7_600.untrained": _cfg(600),
        "test_halonet.untrained": _cfg(128),
    }
)


def _create_halonet(variant: str, pretrained: bool = False, **kwargs) -> HaloNet:
    return build_model(HaloNet, variant, pretrained, **kwargs)


@register_model
def halonet_h0_256(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(depths=(3, 3, 7, 3), out_ratio=0.5)
    return _create_halonet("halonet_h0_256", pretrained, **{**model_args, **kwargs})


@register_model
def halonet_h1_256(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create_halonet("halonet_h1_256", pretrained, **kwargs)


@register_model
def halonet_h2_256(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(depths=(3, 3, 11, 3), out_ratio=1.25)
    return _create_halonet("halonet_h2_256", pretrained, **{**model_args, **kwargs})


@register_model
def halonet_h3_320(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(depths=(3, 3, 12, 3), block_size=10, out_ratio=1.5, num_features=1024)
    return _create_halonet("halonet_h3_320", pretrained, **{**model_args, **kwargs})


@register_model
def halonet_h4_384(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(depths=(3, 3, 12, 3), block_size=12, halo_size=2, out_ratio=3.0, num_features=1280)
    return _create_halonet("halonet_h4_384", pretrained, **{**model_args, **kwargs})


@register_model
def halonet_h5_448(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(
        depths=(3, 3, 23, 3), block_size=14, halo_size=2, value_ratio=2.5, out_ratio=2.0, num_features=1536
    )
    return _create_halonet("halonet_h5_448", pretrained, **{**model_args, **kwargs})


@register_model
def halonet_h6_512(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(depths=(3, 3, 24, 3), halo_size=4, value_ratio=3.0, out_ratio=2.75, num_features=1536)
    return _create_halonet("halonet_h6_512", pretrained, **{**model_args, **kwargs})


@register_model
def halonet_h7_600(pretrained: bool = False, **kwargs) -> HaloNet:
    model_args = dict(depths=(3, 3, 26, 3), block_size=10, value_ratio=4.0, out_ratio=3.5, num_features=2048)
    return _create_halonet("halonet_h7_600", pretrained, **{**model_args, **kwargs})


@register_model
def test_halonet(pretrained: bool = False, **kwargs) -> HaloNet:  # noqa: PT028 (a model, not a test)
    """The smallest HaloNet, for tests: at 128x128 its blocks divide the maps."""
    model_args = dict(
        embed_dim=16,
        depths=(1, 2, 2, 1),
        num_heads=(1, 2, 4, 8),
        block_size=4,
        halo_size=1,
        value_ratio=2.0,
        out_ratio=1.5,
        num_features=96,
    )
    return _create_halonet("test_halonet", pretrained, **{**model_args, **kwargs})
