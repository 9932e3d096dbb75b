"""Backbones registered with timm, one family per file."""

from zoo.backbones import dinat_s, gc_vit, nat, nat_isotropic

__all__ = ["dinat_s", "gc_vit", "nat", "nat_isotropic"]
