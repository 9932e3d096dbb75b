"""Backbones registered with timm, one family per file."""

from zoo.backbones import agent_cswin, agent_deit, agent_pvt, agent_swin, dinat_s, gc_vit, nat, nat_isotropic

__all__ = ["agent_cswin", "agent_deit", "agent_pvt", "agent_swin", "dinat_s", "gc_vit", "nat", "nat_isotropic"]
from zoo.backbones import biformer

__all__ = ["biformer", "dinat_s", "nat", "nat_isotropic"]
from zoo.backbones import halonet

__all__ = ["dinat_s", "halonet", "nat", "nat_isotropic"]
