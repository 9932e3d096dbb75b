"""Neighborhood attention in diffusers. Paper: Neighborhood Attention Transformer (arXiv:2204.07143)."""

from __future__ import annotations

from torch import Tensor

from zoo.diffusion.grid import Grid
from zoo.diffusion.processor import GridAttnProcessor, dense_attention
from zoo.kernels import neighborhood_attention_2d
from zoo.kernels._checks import positive_pair


class NeighborhoodAttnProcessor(GridAttnProcessor):
    """Every image token sees the window around it and all text; text sees everything.

    Args:
        kernel_size: Window size in tokens, per axis (height, width) or one for both. It may not exceed a map.
        dilation: Distance in tokens between neighbours in a window.
        grid: See `GridAttnProcessor`.

    Raises:
        TypeError: A size is no int.
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        dilation: int | tuple[int, int] = 1,
        grid: Grid | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(grid)
        self.kernel_size = positive_pair("kernel_size", kernel_size)
        self.dilation = positive_pair("dilation", dilation)

    def check(self, grid: Grid, layer: str) -> None:
        height, width = (k * d for k, d in zip(self.kernel_size, self.dilation))
        if height > grid.height or width > grid.width:
            raise ValueError(
                f"kernel_size * dilation may not exceed the map: {height} x {width} in {layer}, whose map is "
                f"{grid.height} x {grid.width}; take a smaller window, or leave out such layers with attach(layers=...)"
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float):
        (q, words), (k, text_k), (v, text_v) = (grid.split(x) for x in (query, key, value))
        image = neighborhood_attention_2d(
            q, k, v, self.kernel_size, self.dilation, extra_key=text_k, extra_value=text_v, scale=scale
        )
        return image, None if words is None else dense_attention(words, key, value, scale)
