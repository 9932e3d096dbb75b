"""Backbones registered with timm, one family per file."""

from zoo.backbones import biformer, dinat_s, nat, nat_isotropic

__all__ = ["biformer", "dinat_s", "nat", "nat_isotropic"]
