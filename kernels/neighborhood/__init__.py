"""Neighborhood attention (arXiv:2204.07143), dilated (arXiv:2209.15001), strided and causal (arXiv:2504.16922)."""

from zoo.kernels.neighborhood.api import neighborhood_attention_2d

__all__ = ["neighborhood_attention_2d"]
