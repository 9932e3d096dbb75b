"""Isotropic NAT and DiNAT, and ViT with relative position bias: the three attentions in one plain ViT layout.

Paper: `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001

Published weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle

import torch
from timm.layers import LayerType, calculate_drop_path_rates, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones._backbone import Backbone, Blocks, PaddedPatchEmbed, check_positive, get_norm_layer
from zoo.backbones._checkpoint import build_model, checkpoint_filter_fn  # noqa: F401
from zoo.backbones.nat import DINAT_PAPER, NeighborhoodBlock, _cfg

__all__ = ["NatIsotropic"]


class NatIsotropic(Backbone):
    """Isotropic NAT, DiNAT and ViT-RPB (https://arxiv.org/abs/2209.15001), for any input size.

    ViT-RPB is neighborhood attention whose window is the 14x14 map of a 224x224 image. On larger maps its window stays
    14x14; smaller ones are padded to it. An image is zero-padded at the bottom and the right to whole patches.
    """

    trunk_name = "layers"
    no_decay_suffixes = (".rpb",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int = 7,
        dilations: Sequence[int] = (1,),
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
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
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            patch_size: Side of a patch.
            embed_dim: Width of the tokens.
            depth: Number of blocks.
            num_heads: Number of attention heads.
            kernel_size: Side of the attention window.
            dilations: Dilations that the blocks cycle through.
            mlp_ratio: Hidden width of the MLPs, in units of `embed_dim`.
            init_values: Initial layer scale; None for no layer scale.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLPs.

        Raises:
            ValueError: `num_heads` does not divide `embed_dim`, there are no dilations, or one of them, `patch_size` or
                `kernel_size` is below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(patch_size=patch_size, dilations=dilations)
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)

        self.patch_embed = PaddedPatchEmbed(
            patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, norm_layer=norm_layer, **dd
        )
        self.layers = Blocks(
            NeighborhoodBlock(
                embed_dim,
                num_heads=num_heads,
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
            for dilation, drop_path in zip(
                cycle(dilations), calculate_drop_path_rates(drop_path_rate, depth), strict=False
            )
        )
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"layers.{i}") for i in range(depth)]
        self._init_head(embed_dim, in_chans, num_classes, global_pool, drop_rate, norm_layer, **dd)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.layers(x, take_indices, max_index)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^patch_embed", blocks=[(r"^layers\.(\d+)", None), (r"^norm", (99999,))])


_isotropic_cfg = partial(_cfg, pool_size=(14, 14), **DINAT_PAPER)

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": _isotropic_cfg(f"dinat/checkpoints/isotropic/{name}_in1k_224.pth")
        for name in (
            "nat_isotropic_small",
            "nat_isotropic_base",
            "dinat_isotropic_small",
            "dinat_isotropic_base",
            "vitrpb_small",
            "vitrpb_base",
        )
    }
)


def _create_nat_isotropic(variant: str, pretrained: bool = False, out_indices=3, **kwargs) -> NatIsotropic:
    return build_model(NatIsotropic, variant, pretrained, out_indices=out_indices, **kwargs)


_SMALL = dict(embed_dim=384, num_heads=12, drop_path_rate=0.1)
_BASE = dict(embed_dim=768, num_heads=24, drop_path_rate=0.4)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NatIsotropic:
    return _create_nat_isotropic("nat_isotropic_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NatIsotropic:
    return _create_nat_isotropic("nat_isotropic_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NatIsotropic:
    model_args = dict(_SMALL, dilations=(1, 2))
    return _create_nat_isotropic("dinat_isotropic_small", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NatIsotropic:
    model_args = dict(_BASE, dilations=(1, 2))
    return _create_nat_isotropic("dinat_isotropic_base", pretrained, **{**model_args, **kwargs})


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> NatIsotropic:
    model_args = dict(_SMALL, kernel_size=14)
    return _create_nat_isotropic("vitrpb_small", pretrained, **{**model_args, **kwargs})


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> NatIsotropic:
    model_args = dict(_BASE, kernel_size=14)
    return _create_nat_isotropic("vitrpb_base", pretrained, **{**model_args, **kwargs})
