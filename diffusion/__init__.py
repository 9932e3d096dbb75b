"""Attention processors and denoisers for diffusers."""
