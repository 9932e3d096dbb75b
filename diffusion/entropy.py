"""Attention whose entropy stays that of training at other sizes, without training (arXiv:2306.08645)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from zoo.diffusion.grid import Grid
from zoo.diffusion.processor import GridAttnProcessor
from zoo.kernels._checks import positive_pair


class EntropyScaledAttnProcessor(GridAttnProcessor, nn.Module):
    """Scales the logits by sqrt(log tokens / log tokens in training), so that more tokens do not blur attention.

    Args:
        training_size: The map that the model was trained on, in tokens, (height, width) or one for both; in a UNet
            that of its largest level, the latent. A size that varies between calls changes the scale with it.
        processor: What computes attention under that scale, a `GridAttnProcessor`; dense attention by default.
        grid: See `GridAttnProcessor`.

    Raises:
        TypeError: `processor` is no `GridAttnProcessor`, or does not compute by `attend`, or a size is no int.
        ValueError: A size is below 1, or the map has one token; or `processor` scales logits by the size itself.
    """

    def __init__(
        self,
        training_size: int | tuple[int, int],
        processor: GridAttnProcessor | None = None,
        grid: Grid | tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        GridAttnProcessor.__init__(self, grid)
        self.training_size = positive_pair("training_size", training_size)
        if math.prod(self.training_size) == 1:
            raise ValueError("training_size must be of more than one token")
        if processor is None:
            processor = GridAttnProcessor()
        if not isinstance(processor, GridAttnProcessor):
            raise TypeError(f"processor must be a GridAttnProcessor, got {type(processor).__name__}")
        if type(processor).__call__ is not GridAttnProcessor.__call__:
            raise TypeError(f"processor must be told the scale by `attend`, which {type(processor).__name__} is not")
        if isinstance(processor, EntropyScaledAttnProcessor) or getattr(processor, "proportional", False):
            raise ValueError(f"processor scales logits by the number of tokens itself: {type(processor).__name__}")
        self.processor = processor

    def check(self, grid: Grid, layer: str) -> None:
        self.processor.check(grid, layer)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float):
        # A level of a UNet had its share of the training map, rounded up as its downsampling does.
        height, width = (-(-side // grid.stride) for side in self.training_size)
        trained = max(height * width + grid.text, 2)
        return self.processor.attend(
            query, key, value, grid, scale * math.sqrt(math.log(grid.tokens) / math.log(trained))
        )
