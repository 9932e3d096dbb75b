"""DiNAT_s: dilated neighborhood attention in the layout of Swin.

Paper: `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001

Published weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
"""

from functools import partial

from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor

from zoo.backbones._backbone import PaddedPatchEmbed
from zoo.backbones._checkpoint import build_model, checkpoint_filter_fn  # noqa: F401
from zoo.backbones.nat import CFG_384, DILATIONS_224, DILATIONS_384, DINAT_PAPER, Nat, _cfg

__all__ = ["DinatS"]


class DinatS(Nat):
    """DiNAT_s (https://arxiv.org/abs/2209.15001): DiNAT with Swin's patches and patch merging, for any input size.

    An image is zero-padded at the bottom and the right to whole patches, a map to even sides before it is merged.
    """

    trunk_name = "layers"

    def __init__(self, **kwargs):
        """
        Args:
            **kwargs: Those of `Nat`.
        """
        super().__init__(embed_layer=partial(PaddedPatchEmbed, patch_size=4), downsample_layer=PatchMerging, **kwargs)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.layers(x, take_indices, max_index)


_dinat_s_cfg = partial(_cfg, **DINAT_PAPER)

default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _dinat_s_cfg("dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _dinat_s_cfg("dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _dinat_s_cfg("dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": _dinat_s_cfg("dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": _dinat_s_cfg(
            "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth", **CFG_384
        ),
        "dinat_s_large_21k.in22k": _dinat_s_cfg(
            "dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841
        ),
    }
)


def _create_dinat_s(variant: str, pretrained: bool = False, **kwargs) -> DinatS:
    return build_model(DinatS, variant, pretrained, **kwargs)


_COMMON = dict(mlp_ratio=4.0, dilations=DILATIONS_224)
_TINY = dict(_COMMON, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_SMALL = dict(_COMMON, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
_BASE = dict(_COMMON, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_LARGE = dict(_COMMON, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.35)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> DinatS:
    return _create_dinat_s("dinat_s_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> DinatS:
    return _create_dinat_s("dinat_s_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> DinatS:
    return _create_dinat_s("dinat_s_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> DinatS:
    return _create_dinat_s("dinat_s_large", pretrained, **{**_LARGE, **kwargs})


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> DinatS:
    model_args = dict(_LARGE, dilations=DILATIONS_384)
    return _create_dinat_s("dinat_s_large_384", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs) -> DinatS:
    model_args = dict(_LARGE, drop_path_rate=0.2)
    return _create_dinat_s("dinat_s_large_21k", pretrained, **{**model_args, **kwargs})
