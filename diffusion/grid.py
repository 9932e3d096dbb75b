"""The token grid: how a sequence of tokens, which is all that an attention layer sees, lies on the image."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from zoo.kernels._checks import positive_pair


class Grid(NamedTuple):
    """A map of image tokens, row by row, and the text tokens that are joined to it in one sequence.

    It is a tuple of plain numbers, so that it goes through `torch.compile`, gradient checkpointing and offloading.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        text: Number of text tokens in the sequence, 0 where attention runs over the image alone.
        text_first: Whether text comes before the image (Flux) or after it (SD3).
        stride: Tokens of the model's largest map per token of this one, along each axis: 2 ** level in a UNet.
    """

    height: int
    width: int
    text: int = 0
    text_first: bool = False
    stride: int = 1

    @property
    def tokens(self) -> int:
        """Length of the sequence, text included."""
        return self.height * self.width + self.text

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map [batch, height, width, ...] and the text [batch, text, ...] or None of `x` [batch, tokens, ...]."""
        if self.text == 0:
            return x.unflatten(1, (self.height, self.width)), None
        if self.text_first:
            text, image = x[:, : self.text], x[:, self.text :]
        else:
            image, text = x[:, : -self.text], x[:, -self.text :]
        return image.unflatten(1, (self.height, self.width)), text

    def resolve(self, tokens: int, joined: int = 0) -> Grid:
        """The grid of a layer that is given `tokens` tokens, and `joined` text tokens beside them.

        `self` describes the model's call: a layer may have all of the text in its sequence, beside it, or none.

        Raises:
            ValueError: The numbers do not go together.
        """
        size = self.height * self.width
        if tokens == size and joined in (0, self.text):
            return self._replace(text=joined)
        if tokens == size + self.text and joined == 0:
            return self
        beside = f" and {joined} text tokens beside them" if joined else ""
        raise ValueError(
            f"grid {self.height} x {self.width} with {self.text} text tokens does not match the {tokens} tokens"
            f"{beside} that attention was given"
        )

    def level(self, tokens: int, joined: int = 0) -> Grid:
        """The level of a UNet that has `tokens` tokens: every one halves the sides of that before it, rounded up.

        Raises:
            ValueError: There is none.
        """
        level = self
        while 0 < tokens < level.tokens:
            level = level._replace(height=-(-level.height // 2), width=-(-level.width // 2), stride=2 * level.stride)
        return (level if level.tokens == tokens else self).resolve(tokens, joined)


def as_grid(grid) -> Grid:
    """`grid` given by the user, a `Grid` or (height, width), as a `Grid`.

    Raises:
        TypeError: It is neither.
        ValueError: A side is below 1.
    """
    if isinstance(grid, Grid):
        return grid
    return Grid(*positive_pair("grid", grid))


def square_grid(tokens: int, text: int = 0, text_first: bool = False) -> Grid:
    """The square map of `tokens` image tokens.

    Raises:
        ValueError: `tokens` is not a square.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"grid is unknown, and {tokens} tokens are no square map: use zoo.diffusion.attach(), which derives the "
            "grid of every call, or give the processor grid=(height, width)"
        )
    return Grid(side, side, text, text_first)
