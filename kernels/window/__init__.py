"""Attention within windows (Swin, arXiv:2103.14030), also with one query for all windows (GC ViT, arXiv:2206.09959)."""

from zoo.kernels.window.api import window_attention_2d

__all__ = ["window_attention_2d"]
