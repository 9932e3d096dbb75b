"""NAT and DiNAT: hierarchical transformers of plain and dilated neighborhood attention.

Papers:
* `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143
* `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001

The names of the weights are those of the published checkpoints
(https://github.com/SHI-Labs/Neighborhood-Attention-Transformer), which load as downloaded.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones._backbone import (
    Backbone,
    Stage,
    Stages,
    TransformerBlock,
    any_padding,
    check_heads,
    check_positive,
    get_norm_layer,
)
from zoo.backbones._checkpoint import AdaptedLoading, build_model, checkpoint_filter_fn  # noqa: F401
from zoo.kernels import neighborhood_attention_2d_qkvpacked
from zoo.kernels._symbols import crop

__all__ = ["Nat", "NeighborhoodAttention", "NeighborhoodBlock"]

_logger = logging.getLogger(__name__)


@register_notrace_module  # pads by the size of the map, which fx cannot follow
class NeighborhoodAttention(AdaptedLoading, nn.Module):
    """Multi-head attention of every token to a window around it, with a learnt relative position bias.

    Papers: Neighborhood Attention (https://arxiv.org/abs/2204.07143), dilation (https://arxiv.org/abs/2209.15001).

    A map smaller than the dilated window is zero-padded at the bottom and the right to the window's size, before
    `qkv`, and its padding attended to like any token: what NATTEN did when the published weights were trained.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            kernel_size: Side of the window, or (height, width).
            dilation: Distance between neighbours, or (vertical, horizontal).
            qkv_bias: Whether queries, keys and values have a bias.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: `num_heads` does not divide `dim`, or `kernel_size` or `dilation` is below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        check_positive(kernel_size=kernel_size, dilation=dilation)
        self.num_heads = num_heads
        self.kernel_size = to_2tuple(kernel_size)
        self.dilation = to_2tuple(dilation)
        self.scale = (dim // num_heads) ** -0.5

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size), **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: [batch, height, width, dim], any height and width.

        Returns:
            [batch, height, width, dim].
        """
        height, width = x.shape[1], x.shape[2]
        pad_h = max(height, self.kernel_size[0] * self.dilation[0]) - height
        pad_w = max(width, self.kernel_size[1] * self.dilation[1]) - width
        if any_padding(pad_h, pad_w):
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))

        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if torch.jit.is_scripting():
            x = torch.ops.zoo.neighborhood_attention_2d(
                qkv, None, None, self.rpb, None, None,
                self.kernel_size, self.dilation, (1, 1), (False, False), self.scale,
            )[0]  # fmt: skip
        else:
            x = neighborhood_attention_2d_qkvpacked(
                qkv, self.kernel_size, self.dilation, rel_pos_bias=self.rpb, scale=self.scale
            )
        x = x.flatten(3)

        if any_padding(pad_h, pad_w):
            x = crop(x, height, width)
        return self.proj_drop(self.proj(x))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Edit `state_dict` to fit: resize the bias table of another kernel size, drop published index buffers."""
        state_dict.pop(f"{prefix}relative_position_index", None)
        table = state_dict.get(f"{prefix}rpb")
        size = self.rpb.shape[1:]
        if not isinstance(table, Tensor) or table.ndim != 3 or table.shape[1:] == size:
            return
        _logger.info("%srpb: resizing the bias table from %s to %s", prefix, tuple(table.shape[1:]), tuple(size))
        resized = F.interpolate(table[None].float(), size=tuple(size), mode="bicubic", align_corners=False)[0]
        state_dict[f"{prefix}rpb"] = resized.to(table.dtype)


class NeighborhoodBlock(TransformerBlock):
    """`TransformerBlock` of neighborhood attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of attention heads.
            kernel_size: Side of the attention window.
            dilation: Distance between neighbours in the window.
            proj_drop: Dropout rate of the attention's output and in the MLP.
            kwargs: Other options of `TransformerBlock`.
        """
        dd = {"device": device, "dtype": dtype}
        attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, proj_drop=proj_drop, **dd)
        super().__init__(dim, attn, proj_drop=proj_drop, **dd, **kwargs)


class ConvEmbed(nn.Module):
    """Overlapping patches: two 3x3 convolutions of stride 2, with nothing between them, and a norm."""

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 64,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1, **dd),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1, **dd),
        )
        self.norm = norm_layer(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_chans, height, width] -> [batch, ceil(height / 4), ceil(width / 4), embed_dim]"""
        return self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())  # under autocast it would copy in float32


class ConvDownsample(nn.Module):
    """Halve a map and double its width: a 3x3 convolution of stride 2, and a norm."""

    def __init__(self, dim: int, norm_layer: Callable[..., nn.Module] = nn.LayerNorm, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, ceil(height / 2), ceil(width / 2), 2 * dim]"""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Nat(Backbone):
    """NAT (https://arxiv.org/abs/2204.07143) and DiNAT (https://arxiv.org/abs/2209.15001), for any input size."""

    trunk_name = "levels"
    # As for timm's Swin. The authors list the bias tables too, though their trainer most likely decayed them.
    no_decay_suffixes = (".rpb",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_layer: Callable[..., nn.Module] = ConvEmbed,
        downsample_layer: Callable[..., nn.Module] = ConvDownsample,
        norm_layer: LayerType = nn.LayerNorm,
        act_layer: LayerType = nn.GELU,
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
            kernel_size: Side of the attention window.
            dilations: Per stage, the dilations that its blocks cycle through; None for no dilation.
            mlp_ratio: Hidden width of the MLPs, in units of the stage's width.
            init_values: Initial layer scale; None for no layer scale.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            embed_layer: Class of the patch embedding.
            downsample_layer: Class of the downsamplers between stages.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLPs.

        Raises:
            ValueError: `depths`, `num_heads` and `dilations` differ in length, `num_heads` does not divide the widths,
                a stage has no dilation, or `kernel_size` or a dilation is below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        num_stages = len(depths)
        dilations = [(1,)] * num_stages if dilations is None else dilations
        if not len(num_heads) == len(dilations) == num_stages:
            raise ValueError(
                "depths, num_heads and dilations must have one entry per stage, "
                f"got {depths}, {num_heads} and {dilations}"
            )
        check_positive(dilations=dilations)  # no block would have one of none
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        dims = [embed_dim * 2**i for i in range(num_stages)]
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        self.patch_embed = embed_layer(in_chans=in_chans, embed_dim=embed_dim, norm_layer=norm_layer, **dd)
        stages = Stages()
        for i, dim in enumerate(dims):
            blocks = [
                NeighborhoodBlock(
                    dim,
                    num_heads=num_heads[i],
                    kernel_size=kernel_size,
                    dilation=dilation,
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for dilation, drop_path in zip(cycle(dilations[i]), drop_paths[i], strict=False)
            ]
            last = i == num_stages - 1
            stages.append(Stage(blocks, None if last else downsample_layer(dim, norm_layer=norm_layer, **dd)))
        setattr(self, self.trunk_name, stages)
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"{self.trunk_name}.{i}.blocks") for i, dim in enumerate(dims)
        ]
        self._init_head(dims[-1], in_chans, num_classes, global_pool, drop_rate, norm_layer, **dd)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.levels(x, take_indices, max_index)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        stage = rf"^{self.trunk_name}\.(\d+)"
        blocks = [
            (rf"{stage}\.blocks\.(\d+)", None),
            (rf"{stage}\.downsample", (99999,)),  # 99999: with the group before it
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=stage if coarse else blocks)


def _cfg(url: str = "", **kwargs) -> dict:
    return {
        "url": f"https://shi-labs.com/projects/{url}" if url else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    }


DINAT_PAPER = dict(paper_ids="arXiv:2209.15001", paper_name="Dilated Neighborhood Attention Transformer")
NAT_PAPER = dict(paper_ids="arXiv:2204.07143", paper_name="Neighborhood Attention Transformer")
CFG_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

_nat_cfg = partial(_cfg, first_conv="patch_embed.proj.0", **NAT_PAPER)
_dinat_cfg = partial(_cfg, first_conv="patch_embed.proj.0", **DINAT_PAPER)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _nat_cfg("nat/checkpoints/CLS/nat_mini.pth"),
        "nat_tiny.in1k": _nat_cfg("nat/checkpoints/CLS/nat_tiny.pth"),
        "nat_small.in1k": _nat_cfg("nat/checkpoints/CLS/nat_small.pth"),
        "nat_base.in1k": _nat_cfg("nat/checkpoints/CLS/nat_base.pth"),
        "dinat_mini.in1k": _dinat_cfg("dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _dinat_cfg("dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _dinat_cfg("dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _dinat_cfg("dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _dinat_cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": _dinat_cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth", **CFG_384
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": _dinat_cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **CFG_384
        ),
        "dinat_large_21k.in22k": _dinat_cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", num_classes=21841
        ),
        "dinat_large_21k_11x11.in22k": _dinat_cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841
        ),
        "test_dinat.untrained": _dinat_cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_nat(variant: str, pretrained: bool = False, **kwargs) -> Nat:
    return build_model(Nat, variant, pretrained, **kwargs)


# The dilated window of every second block spans the whole map at the nominal size: 7 * 8 = 56 = 224 / 4, and so on.
DILATIONS_224 = ((1, 8), (1, 4), (1, 2), (1,))
DILATIONS_384 = ((1, 13), (1, 6), (1, 3), (1,))

_MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
_TINY = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3)
_BASE = dict(
    embed_dim=128,
    depths=(3, 4, 18, 5),
    num_heads=(4, 8, 16, 32),
    mlp_ratio=2.0,
    init_values=1e-5,
    drop_path_rate=0.5,
)
_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0, drop_path_rate=0.35)


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> Nat:
    return _create_nat("nat_mini", pretrained, **{**_MINI, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> Nat:
    return _create_nat("nat_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_SMALL, init_values=1e-5)  # dinat_small has no layer scale
    return _create_nat("nat_small", pretrained, **{**model_args, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> Nat:
    return _create_nat("nat_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_MINI, dilations=DILATIONS_224)
    return _create_nat("dinat_mini", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_TINY, dilations=DILATIONS_224)
    return _create_nat("dinat_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_SMALL, dilations=DILATIONS_224)
    return _create_nat("dinat_small", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_BASE, dilations=DILATIONS_224)
    return _create_nat("dinat_base", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_LARGE, dilations=DILATIONS_224)
    return _create_nat("dinat_large", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_LARGE, dilations=DILATIONS_384)
    return _create_nat("dinat_large_384", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_LARGE, kernel_size=11, dilations=DILATIONS_224)
    return _create_nat("dinat_large_384_11x11", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs) -> Nat:
    model_args = dict(_LARGE, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_nat("dinat_large_21k", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs) -> Nat:
    """`dinat_large_21k` with its bias tables interpolated to an 11x11 window, to be fine-tuned at 384."""
    model_args = dict(_LARGE, kernel_size=11, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_nat("dinat_large_21k_11x11", pretrained, **{**model_args, **kwargs})


@register_model
def test_dinat(pretrained: bool = False, **kwargs) -> Nat:  # noqa: PT028 (a model, not a test)
    """The smallest DiNAT, for tests: at 96x96 its dilated windows span the maps exactly."""
    model_args = dict(
        embed_dim=12,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 4, 8),
        kernel_size=3,
        dilations=DILATIONS_224,
        mlp_ratio=2.0,
    )
    return _create_nat("test_dinat", pretrained, **{**model_args, **kwargs})
