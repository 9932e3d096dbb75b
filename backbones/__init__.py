"""Backbones registered with timm, one family per file."""

from zoo.backbones import dinat_s, halonet, nat, nat_isotropic

__all__ = ["dinat_s", "halonet", "nat", "nat_isotropic"]
