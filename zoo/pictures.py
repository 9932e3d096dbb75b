"""Pictures of a trained classifier (predictions, confusion matrix, learning curves, attention maps) and of samples."""

import csv
import textwrap
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor, nn

from zoo.files import write_whole
from zoo.kernels import neighborhood_attention_2d

INK, PAPER, GREY = "#1a1a1a", "white", "#767676"
BLUE, RED = "#2166ac", "#c4302b"
# Transparent to opaque red, to be painted over an image.
OVERLAY = ListedColormap([(0.77, 0.19, 0.17, 0.9 * i / 255) for i in range(256)])


def save_predictions(path: Path, images: Tensor, labels: Tensor, probabilities: Tensor, classes: list[str]) -> None:
    """Draw images with the predicted class and its probability: every mistake first, then the first of the others.

    Args:
        path: PNG file to write.
        images: [n, 1, height, width], any range of values; high is ink.
        labels: [n], the right classes.
        probabilities: [n, classes].
        classes: Class names.
    """
    rows, columns = 5, 10
    confidence, predicted = probabilities.max(-1)
    wrong = predicted != labels
    order = torch.cat([wrong.nonzero().flatten(), (~wrong).nonzero().flatten()])[: rows * columns].tolist()

    figure = _figure(columns * 1.05, rows * 1.3 + 0.7)
    right = len(labels) - int(wrong.sum())
    explanation = "; mistakes first, in red" if right < len(labels) else ""
    figure.suptitle(
        f"Held-out digits, each with the answer and its probability: {right} of {len(labels)} right{explanation}",
        fontsize=11,
    )
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, i in zip(grid, order + [None] * (rows * columns - len(order)), strict=True):
        _bare(axes)
        if i is None:
            axes.set_axis_off()
            continue
        axes.imshow(images[i, 0].numpy(), cmap="gray_r")
        title = f"{classes[predicted[i]]}   {_percent(confidence[i])}"
        if wrong[i]:
            axes.set_xlabel(f"is a {classes[labels[i]]}", fontsize=9, color=RED, labelpad=2)
        axes.set_title(
            title, fontsize=9, pad=3, color=RED if wrong[i] else INK, weight="bold" if wrong[i] else "normal"
        )
        for spine in axes.spines.values():
            spine.set(color=RED if wrong[i] else "#cccccc", linewidth=2 if wrong[i] else 0.8)
    _save(figure, path)


def save_confusion(path: Path, labels: Tensor, predicted: Tensor, classes: list[str]) -> None:
    """Draw the confusion matrix, with counts; mistakes are red.

    Args:
        path: PNG file to write.
        labels: [n], the right classes.
        predicted: [n], the predicted classes.
        classes: Class names.
    """
    n = len(classes)
    counts = torch.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)
    right = int(counts.diagonal().sum())

    figure = _figure(0.5 * n + 1, 0.5 * n + 1)
    axes = figure.subplots()
    axes.imshow(torch.diag(counts.diagonal()).numpy(), cmap="Blues", vmin=0, vmax=1.6 * max(1, int(counts.max())))
    for i in range(n):
        for j in range(n):
            if i != j and counts[i, j]:
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="#f8dcda", edgecolor=RED, linewidth=1))
            if counts[i, j]:
                axes.text(j, i, int(counts[i, j]), ha="center", va="center", color=INK if i == j else RED)
    axes.set_xticks(range(n), classes)
    axes.set_yticks(range(n), classes)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="written")
    axes.set_title(f"{right} of {len(labels)} held-out digits right ({right / len(labels):.1%})", fontsize=11)
    _save(figure, path)


def save_curves(path: Path, metrics_csv: Path) -> None:
    """Draw loss and accuracy per epoch, for training and validation.

    Args:
        path: PNG file to write.
        metrics_csv: What Lightning's ``CSVLogger`` wrote for a run of :class:`zoo.task.Classification`.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    with metrics_csv.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and row.get("epoch"):
                    curves[name][int(row["epoch"]) + 1] = float(value)

    figure = _figure(9, 3.6)
    panels = [  # the training loss is that of the recipe, so with its label smoothing
        ("cross-entropy loss", "train_loss_epoch", "val_loss", "training, distorted, smoothed labels"),
        ("accuracy", "train_top1", "val_top1", "training, distorted"),
    ]
    for axes, (title, train, val, training) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, label, color in ((train, training, GREY), (val, "held out", BLUE)):
            epochs = sorted(curves[name])
            values = [curves[name][epoch] for epoch in epochs]
            last = f"{values[-1]:.1%}" if title == "accuracy" else f"{values[-1]:.3f}"
            axes.plot(epochs, values, color=color, linewidth=2, marker="o", markersize=4, label=f"{label}: {last}")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch (in the legend: the last)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    loss, accuracy = figure.axes
    loss.set_ylim(bottom=0)
    accuracy.set_ylim(top=1.005)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _save(figure, path)


def save_samples(path: Path, images: Tensor, nearest: Tensor, classes: list[str], title: str) -> None:
    """Draw samples, a column per class, and under the last row the training image nearest to each of it.

    Args:
        path: PNG file to write.
        images: [rows * classes, 1, height, width], 0 to 1; high is ink.
        nearest: Shape of ``images``, the training image nearest to each.
        classes: Class names.
        title: Title of the figure.
    """
    columns = len(classes)
    rows = len(images) // columns
    figure = _figure(0.8 * columns + 0.4, 0.8 * (rows + 1) + 1.2)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows + 1, columns, squeeze=False)
    shown = torch.cat([images, nearest[-columns:]])
    for i, axes in enumerate(grid.flat):
        _bare(axes)
        axes.imshow(shown[i, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.spines[:].set(color="#cccccc", linewidth=0.8)
    for axes, name in zip(grid[0], classes, strict=True):
        axes.set_title(name, fontsize=10)
    for axes in grid[-1]:
        axes.spines[:].set(color=BLUE, linewidth=2)
    figure.supxlabel("framed in blue: the training digit nearest to the sample above it", fontsize=9, color=BLUE)
    _save(figure, path)


def save_bars(path: Path, labels: list[str], values: list[float | None], quantity: str, title: str) -> None:
    """Draw horizontal bars from the top down.

    Args:
        path: PNG file to write.
        labels: Names of the bars.
        values: Their lengths; None where nothing was measured.
        quantity: What is drawn, with its unit.
        title: Title of the figure.
    """
    lines = 1 + max(label.count("\n") for label in labels)
    figure = _figure(8, 0.9 + 0.24 * len(labels) * (0.6 + lines))
    axes = figure.subplots()
    most = max((value for value in values if value is not None), default=1)
    for i, value in enumerate(values):
        ours = labels[i].startswith("zoo ")
        axes.barh(i, value or 0, color=BLUE if ours or lines == 1 else GREY, height=0.6)
        text = "not measured" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        axes.text((value or 0) + 0.01 * most, i, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlim=(0, 1.12 * most), ylim=(len(labels) - 0.5, -0.5), xlabel=quantity)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=8, loc="left")
    _save(figure, path)


def save_attention(path: Path, model: nn.Module, image: Tensor, pixel: tuple[int, int], title: str) -> None:
    """Draw what one query attends to at each level, in the first plain and the first dilated block.

    Args:
        path: PNG file to write.
        model: A :class:`zoo.backbones.nat.Nat`.
        image: [1, height, width], as the model takes it.
        pixel: Row and column of the query; at each level it is the token that covers this pixel.
        title: Title of the figure.
    """
    maps = attention_maps(model, image)
    paper = 1 - (image - image.min()) / (image.max() - image.min())
    height, width = image.shape[-2:]
    figure = _figure(2.3 * len(model.levels) + 0.3, 5.6)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(2, len(model.levels), squeeze=False)
    for row, kind in enumerate(("neighborhood", "dilated")):
        for level, stage in enumerate(model.levels):
            axes = panels[row, level]
            _bare(axes)
            block = next(
                (i for i, b in enumerate(stage.blocks) if (max(b.attn.dilation) > 1) == (kind == "dilated")), None
            )
            if row == 0:
                axes.set_title(f"level {level + 1}", fontsize=10)
            if level == 0:
                axes.set_ylabel(kind, fontsize=10)
            if block is None:
                note = "no dilated block:\nthe window is\nthe whole map"
                axes.text(0.5, 0.5, note, ha="center", va="center", color=GREY, fontsize=9, transform=axes.transAxes)
                for spine in axes.spines.values():
                    spine.set_visible(False)
                continue
            weights = maps[level][block]
            rows, columns = weights.shape[:2]
            query = pixel[0] * rows // height, pixel[1] * columns // width
            paint(axes, paper, weights[query], query, line=0.8)
            attn = stage.blocks[block].attn
            spacing = "" if kind == "neighborhood" else f", {attn.dilation[0]} apart"
            axes.set_xlabel(
                f"{rows} x {columns} tokens, {attn.kernel_size[0]} x {attn.kernel_size[1]} seen{spacing}", fontsize=8
            )
    _save(figure, path)


def save_explanation(
    path: Path,
    pixels: Tensor,
    answers: list[tuple[str, float]],
    cam: Tensor,
    point: tuple[float, float],
    panels: list[tuple[str, Tensor, tuple[int, int]]],
    title: str,
) -> None:
    """Draw an image, where the evidence for a classifier's answer is, its answers, and what one token attends to.

    Args:
        path: PNG file to write.
        pixels: [3, height, width], 0 to 1, the image as the model sees it.
        answers: Names and probabilities, the most likely first.
        cam: [rows, columns], evidence for the most likely, 0 to 1.
        point: The token that asks: from the top and from the left, 0 to 1.
        panels: For each panel its caption, the weights [rows, columns] and the query's row and column.
        title: Title of the figure.
    """
    height, width = pixels.shape[1:]
    columns = 3
    rows = 1 + -(-len(panels) // columns)
    figure = _figure(9, 3.2 * rows * height / width + 0.5)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    photo, evidence, bars = grid[0]
    extent = (0, width, height, 0)
    for axes, caption in (
        (photo, "the image as the model sees it"),
        (evidence, f"Grad-CAM, {cam.shape[0]} x {cam.shape[1]}: evidence for the first answer"),
    ):
        _bare(axes)
        axes.spines[:].set_visible(False)
        axes.set_title(caption, fontsize=9)
    photo.imshow(pixels.permute(1, 2, 0).numpy(), extent=extent)
    evidence.imshow(pixels.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    evidence.imshow(
        cam.numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.6, extent=extent, interpolation="bilinear", clip_on=True
    )
    for axes in (photo, evidence):
        axes.plot(point[1] * width, point[0] * height, marker="s", markersize=8, color=BLUE, markeredgecolor=PAPER)
        axes.set(xlim=(0, width), ylim=(height, 0))

    positions = range(len(answers))
    bars.barh(positions, [p for _, p in answers], color=[BLUE] + [GREY] * (len(answers) - 1), height=0.3)
    for i, (name, probability) in enumerate(answers):
        bars.text(0, i - 0.22, f"{_shorten(name)}   {probability:.1%}", fontsize=9, va="bottom", color=INK)
    bars.set(xlim=(0, 1), ylim=(len(answers) - 0.5, -0.7), yticks=[], xticks=[])
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    bars.set_title(f"the {len(answers)} most likely answers", fontsize=9)

    for axes in list(grid[1:].flat)[len(panels) :]:
        axes.set_axis_off()
    for axes, (caption, weights, query) in zip(grid[1:].flat, panels):
        paint(axes, pixels, weights, query, line=0.8)
        axes.set_title(f"{weights.shape[0]} x {weights.shape[1]} tokens", fontsize=9)
        axes.set_xlabel("\n".join(textwrap.wrap(caption, 44)), fontsize=8)
    if panels:
        figure.supxlabel("attention of the token framed in blue, mean over heads (darker red: more)", fontsize=9)
    _save(figure, path)


def paint(axes: Axes, photo: Tensor, weights: Tensor, token: tuple[int, int], line: float) -> None:
    """Paint weights over a photograph in red, outline what is seen, fade what is not, and frame the query in blue.

    Args:
        axes: Where to paint.
        photo: [channels, height, width], 0 to 1; shown in grey.
        weights: [rows, columns], of tokens that are equal parts of the photograph; 0 where nothing is seen.
        token: Row and column of the query.
        line: Width of the outline.
    """
    rows, columns = weights.shape
    seen = weights > 0
    extent = (0, columns, rows, 0)
    grey = 0.25 + 0.75 * photo.mean(0)
    unseen = F.interpolate((~seen)[None, None].double(), size=grey.shape, mode="nearest-exact")[0, 0] > 0
    grey[unseen] = 0.5 + 0.5 * grey[unseen]
    axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto")
    axes.imshow(weights.numpy(), cmap=OVERLAY, vmin=0, vmax=float(weights.max()), extent=extent, aspect="auto")
    axes.set_box_aspect(photo.shape[1] / photo.shape[2])

    padded = F.pad(seen, (1, 1, 1, 1))
    above = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist()  # edges between a seen and an unseen token
    left = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist()
    edges = [((x, y), (x + 1, y)) for y, x in above] + [((x, y), (x, y + 1)) for y, x in left]
    axes.add_collection(LineCollection(edges, colors=RED, linewidths=line, capstyle="projecting"))
    for color, linewidth in ((PAPER, 4 * line), (BLUE, 2 * line)):
        axes.add_patch(Rectangle(token[::-1], 1, 1, fill=False, edgecolor=color, linewidth=linewidth, zorder=3))
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


@torch.inference_mode()
def attention_maps(model: nn.Module, image: Tensor) -> list[list[Tensor]]:
    """Return the attention of every block to one image, as [level][block] -> [rows, columns, rows, columns].

    The first two axes are the query, the last two the key; heads are averaged.
    """
    inputs: dict[nn.Module, Tensor] = {}
    attns = [[block.attn for block in stage.blocks] for stage in model.levels]
    hooks = [
        attn.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for level in attns
        for attn in level
    ]
    try:
        model(image.unsqueeze(0))
    finally:
        for hook in hooks:
            hook.remove()
    return [[attention_weights(attn, inputs[attn]) for attn in level] for level in attns]


def attention_weights(attn: nn.Module, x: Tensor) -> Tensor:
    """Return one block's attention weights for the map ``x``, [1, rows, columns, dim], averaged over heads.

    The kernels never form the weights. But attention returns the weighted mean of the values: where the value of each
    token is a one-hot code of its position, the mean is the weights themselves.
    """
    _, rows, columns, _ = x.shape
    query, key, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    tokens, head_dim = rows * columns, query.shape[-1]
    parts = -(-tokens // head_dim)  # a value holds head_dim numbers, so the code is spread over a batch
    code = torch.eye(tokens, parts * head_dim).reshape(rows, columns, 1, parts, head_dim)
    code = code.permute(3, 0, 1, 2, 4).expand(-1, -1, -1, attn.num_heads, -1)
    query, key = query.expand(parts, -1, -1, -1, -1), key.expand(parts, -1, -1, -1, -1)
    out = neighborhood_attention_2d(
        query, key, code.to(query), attn.kernel_size, attn.dilation, rel_pos_bias=attn.rpb, scale=attn.scale
    )
    weights = out.mean(3).permute(1, 2, 0, 3).flatten(2)[..., :tokens]
    return weights.unflatten(-1, (rows, columns))


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window, so that nothing global is touched."""
    return Figure(figsize=(width, height), dpi=150, facecolor=PAPER, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    """Write a figure whose words, which hold names of users' classes and files, are drawn as they are."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # else $ would begin a formula
        text.set_text(text.get_text().encode("utf-8", "replace").decode())  # names of files may be no UTF-8
    with write_whole(path, binary=True) as file:
        figure.savefig(file, format="png")


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _percent(probability: Tensor) -> str:
    """Write a probability in percent, never rounding up to certainty."""
    return ">99 %" if probability > 0.99 else f"{100 * float(probability):.0f} %"


def _shorten(name: str) -> str:
    return textwrap.shorten(name, 38, placeholder="…")
