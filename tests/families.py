"""What the tests of every family need to know of it: one entry per module of `zoo.backbones`."""

from dataclasses import dataclass

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

import zoo  # noqa: F401  (registers the models)
from zoo.backbones._backbone import TransformerBlock
from zoo.backbones.agent_cswin import CSwinBlock
from zoo.backbones.biformer import BiFormerBlock
from zoo.backbones.gc_vit import GlobalContextBlock
from zoo.backbones.halonet import HaloBlock
from zoo.backbones.nat import NeighborhoodBlock


@dataclass(frozen=True)
class Family:
    """Attributes of all models of a module."""

    count: int
    """How many names it registers."""
    structures: tuple[str, ...]
    """Names of which no two differ in numbers alone: for tests in which other variants cannot differ from them."""
    size: dict
    """Arguments with which any variant has a few narrow blocks. Kernels, dilations and options stay its own."""
    short: dict
    """Arguments with which the small model has as few blocks as show every part, to be traced and compiled."""
    block: type[nn.Module]
    """What gradient checkpointing recomputes, and a group of parameters for layer decay."""
    no_decay: tuple[str, ...] = ()
    """Patterns of the names of parameters without weight decay, besides biases and norms."""
    drawn: tuple[str, ...] = ()
    """Ends of the names of parameters that start at or near zero. The tests draw them, so that they show."""
    license: str = "mit"
    output_fmt: str = "NHWC"
    reductions: tuple[int, ...] | None = (4, 8, 16, 32)
    """Side of the image over that of each map; None for a model of one resolution, with a map per block."""
    fixed_input_size: bool = False
    side: int = 64
    """Side of the images that small models are given."""
    sizes: tuple[tuple[int, int], ...] = ((97, 61), (32, 80), (9, 5), (1, 1))
    """Heights and widths of odd images that must work, with maps of their size over the reductions, rounded up."""
    pools: tuple[str, ...] = ("avg", "max", "avgmax", "catavgmax")
    torchscript: bool = True


_NEIGHBORHOOD = dict(block=NeighborhoodBlock, no_decay=("*.attn.rpb",), drawn=(".rpb", ".gamma1", ".gamma2"))
_STAGES = dict(
    size=dict(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8)),
    short=dict(depths=(2, 1), num_heads=(1, 2), dilations=((1, 8), (1,))),
)

_AGENTS = dict(drawn=("_bias", "_bias_table"), license="unknown")
_TABLES = ("*.an_bias", "*.na_bias", "*.ah_bias", "*.aw_bias", "*.ha_bias", "*.wa_bias")

FAMILIES = {
    "agent_cswin": Family(
        4,
        ("agent_cswin_tiny",),
        size=dict(img_size=64, embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8)),
        short=dict(depths=(1, 1, 1, 1)),
        block=CSwinBlock,
        no_decay=_TABLES,
        **_AGENTS,
    ),
    "agent_deit": Family(
        4,
        ("agent_deit_base",),
        size=dict(img_size=64, embed_dim=32, depth=5, num_heads=2),
        short=dict(depth=2, agent_depth=1),
        block=TransformerBlock,
        no_decay=(*_TABLES, "*.ac_bias", "*.ca_bias", "cls_token", "pos_embed"),
        output_fmt="NLC",
        reductions=None,
        pools=("token", "avg", "max", "avgmax"),
        **_AGENTS,
    ),
    "agent_pvt": Family(
        5,
        ("agent_pvt_tiny",),
        size=dict(img_size=64, embed_dims=(16, 32, 40, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 5, 8)),
        short=dict(depths=(1, 1, 1, 1)),
        block=TransformerBlock,
        no_decay=(*_TABLES, "pos_embed?"),
        **_AGENTS,
    ),
    "agent_swin": Family(
        5,
        ("agent_swin_base",),
        size=dict(img_size=64, embed_dim=16, depths=(1, 2, 4, 2), num_heads=(1, 2, 4, 8)),
        short=dict(depths=(1, 2), num_heads=(1, 2), num_agents=(9, 16), agent_depths=(1, 0)),
        block=TransformerBlock,
        no_decay=(*_TABLES, "*.relative_position_bias_table"),
        **_AGENTS,
    ),
    "nat": Family(14, ("nat_small", "dinat_tiny"), **_STAGES, **_NEIGHBORHOOD),
    "dinat_s": Family(6, ("dinat_s_tiny",), **_STAGES, **_NEIGHBORHOOD),
    "nat_isotropic": Family(
        6,
        ("dinat_isotropic_small", "vitrpb_small"),
        size=dict(embed_dim=32, depth=4, num_heads=2),
        short=dict(depth=2),
        reductions=None,
        **_NEIGHBORHOOD,
    ),
    "gc_vit": Family(
        12,
        ("gc_vit_small",),
        size=_STAGES["size"],
        short=dict(depths=(2, 1), num_heads=(1, 2), window_ratio=(16, 16)),
        block=GlobalContextBlock,
        no_decay=("*.attn.relative_position_bias_table",),
        drawn=(".relative_position_bias_table", ".gamma1", ".gamma2"),
        license="cc-by-nc-sa-4.0",
    ),
    "biformer": Family(
        6,
        ("biformer_tiny", "biformer_stl", "biformer_stl_nchw"),
        # Large regions, whose choice does not hang on the rounding of a few numbers.
        size=dict(_STAGES["size"], n_win=2),
        short=dict(depths=(1, 1), num_heads=(1, 2), topks=(2, None)),
        block=BiFormerBlock,
        output_fmt="NCHW",
        sizes=((96, 160), (32, 64)),  # the authors' STL models leave out what is no whole patch
    ),
    "halonet": Family(
        9,
        ("halonet_h0_256", "halonet_h6_512"),  # without and with a last convolution
        size=_STAGES["size"],
        short=dict(depths=(1, 1), num_heads=(1, 2)),
        block=HaloBlock,
        no_decay=("*_rel",),
        license="apache-2.0",
        output_fmt="NCHW",
    ),
}


def module_of(name: str) -> str:
    return model_entrypoint(name).__module__


NAMES = [name for name in timm.list_models() if module_of(name).startswith("zoo.backbones.")]
STRUCTURES = [name for family in FAMILIES.values() for name in family.structures]


def family_of(name: str) -> Family:
    return FAMILIES[module_of(name).rpartition(".")[2]]


def small(name: str, **kwargs) -> nn.Module:
    """The variant with a few narrow blocks. It has no stochastic depth, so that training is deterministic."""
    family = family_of(name)
    torch.manual_seed(0)
    model = timm.create_model(name, **{**family.size, "num_classes": 10, "drop_path_rate": 0.0, **kwargs}).eval()
    if not kwargs.get("features_only"):
        with torch.no_grad():
            for param_name, param in model.named_parameters():
                if param_name.endswith(family.drawn):
                    param.normal_()
    return model


def images(name: str, height: int | None = None, width: int | None = None, batch: int = 2, dtype=None) -> torch.Tensor:
    """Images for the small variant."""
    side = family_of(name).side
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height or side, width or side, generator=generator).to(dtype)
