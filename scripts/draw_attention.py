"""Pictures of what one query attends to, one per operator, over a photograph.

    python scripts/draw_attention.py [--out docs/attention]

Nothing here knows which tokens an operator sees: sets and weights are read off the gradient of the operator itself.
"""

import argparse
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from zoo.explain import attention_of
from zoo.kernels import (
    agent_attention,
    circular_attention_2d,
    halo_attention_2d,
    neighborhood_attention_2d,
    pool_agents,
    routing_attention_2d,
    window_attention_2d,
)
from zoo.pictures import PAPER, paint

PATCH = 13  # pixels a side of a token; makes 32 x 48 tokens of the photograph
QUERY = 13, 17  # row and column of the token that asks: on the pagoda's second roof
SHARPNESS = 1.0  # how fast attention falls with the distance of two colours
COLORS = 192  # of a PNG file, to keep it small


def agent_attention_2d(query: Tensor, key: Tensor, value: Tensor, side: int) -> Tensor:
    """Agent attention on a map: the agents are means of the queries of a `side` x `side` grid."""
    tokens = (x.flatten(1, 2) for x in (query, key, value))
    return agent_attention(*tokens, pool_agents(query, side)).unflatten(1, query.shape[1:3])


# Picture: the operator and its options.
OPERATORS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "neighborhood": (neighborhood_attention_2d, {"kernel_size": 7}),
    "dilated": (neighborhood_attention_2d, {"kernel_size": 7, "dilation": 4}),
    "circular": (circular_attention_2d, {"radius": 8}),
    "halo": (halo_attention_2d, {"block_size": 8, "halo_size": 3}),
    "window": (window_attention_2d, {"window_size": 8}),
    "shifted_window": (window_attention_2d, {"window_size": 8, "shift": 4}),
    "routed": (routing_attention_2d, {"region_size": 4, "topk": 16}),
    "agent": (agent_attention_2d, {"side": 8}),
}


def load_photograph(patch: int) -> Tensor:
    """scikit-learn's photograph of a pagoda, cut to whole patches: [3, height, width], from 0 to 1."""
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).double() / 255
    height, width = (n // (8 * patch) * 8 * patch for n in photo.shape[1:])  # windows and blocks are 8 tokens wide
    return photo[:, :height, :width]


def query_and_key(photo: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Queries and keys, [1, rows, columns, 1, 4], with which tokens attend to tokens that look like them.

    A token is described by its mean colour: brightness, red against green, and yellow against blue. The fourth channel
    completes the square: up to a number that depends on the query alone, the logit is `-SHARPNESS / 2` times the
    squared distance of two colours. (Agent attention compares queries with queries, so by their product alone.)
    """
    red, green, blue = F.avg_pool2d(photo, patch)
    x = torch.stack([red + green + blue, red - green, (red + green) / 2 - blue])
    x = (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)
    x = x.permute(1, 2, 0)[None, :, :, None]
    query = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    key = torch.cat([x, -(x**2).sum(-1, keepdim=True) / 2], -1)
    return query * SHARPNESS * query.shape[-1] ** 0.5, key  # the operators divide by the root again


def save(path: Path, figure: Figure) -> None:
    """Write a figure with few colours."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def draw(folder: Path, operators: dict = OPERATORS, patch: int = PATCH, token: tuple[int, int] = QUERY) -> list[Path]:
    """Draw a picture per operator and `overview.png`, all of them side by side.

    Args:
        folder: Where to write; made if missing.
        operators: By name of the picture, the operator and its options.
        patch: Side of a token in pixels.
        token: Row and column of the query.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    photo = load_photograph(patch)
    query, key = query_and_key(photo, patch)
    maps = {
        name: attention_of(lambda value: operator(query, key, value, **options), key, token)  # noqa: B023
        for name, (operator, options) in operators.items()
    }
    aspect = photo.shape[2] / photo.shape[1]
    for name, weights in maps.items():
        figure = Figure(figsize=(3.2 * aspect, 3.2), dpi=125)
        paint(figure.add_axes((0, 0, 1, 1)), photo, weights, token, line=1.2)
        save(folder / f"{name}.png", figure)

    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(
        figsize=(2.3 * columns, (2.3 / aspect + 0.27) * rows), dpi=125, facecolor=PAPER, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, weights) in zip(panels, maps.items(), strict=False):
        paint(axes, photo, weights, token, line=0.8)
        axes.set_xlabel(name.replace("_", " "), fontsize=10)
    save(folder / "overview.png", figure)
    return [folder / f"{name}.png" for name in (*maps, "overview")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what one query attends to, per operator.")
    parser.add_argument("--out", type=Path, default=Path("docs/attention"), help="folder of the pictures")
    for path in draw(parser.parse_args().out):
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
