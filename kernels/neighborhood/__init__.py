"""Neighborhood attention (arXiv:2204.07143), dilated (arXiv:2209.15001), strided and causal (arXiv:2504.16922)."""

from zoo.kernels.neighborhood.api import neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from zoo.kernels.neighborhood.explain import explain_backend

__all__ = ["explain_backend", "neighborhood_attention_2d", "neighborhood_attention_2d_qkvpacked"]
