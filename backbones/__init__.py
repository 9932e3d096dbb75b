"""Backbones registered with timm, one family per file."""

from zoo.backbones import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    dinat_s,
    gc_vit,
    halonet,
    nat,
    nat_isotropic,
)

__all__ = [
    "agent_cswin",
    "agent_deit",
    "agent_pvt",
    "agent_swin",
    "biformer",
    "dinat_s",
    "gc_vit",
    "halonet",
    "nat",
    "nat_isotropic",
]
