"""One self-contained HTML page about a run: curves, confusion, the worst mistakes, and how it was made."""

import math
import os
import shlex
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from zoo.doctor import environment
from zoo.files import write_whole

LARGEST_MATRIX = 30  # classes; of more, only the pairs that are confused most are shown
THUMBNAIL = 128  # pixels
LINES = {"train": "training", "val": "validation"}


class Mistake(NamedTuple):
    """A wrong answer: its loss, the right class and the answer, the answer's probability, and a JPEG of the image."""

    loss: float
    label: int
    answer: int
    probability: float
    jpeg: bytes


class Report(Callback):
    """Write ``report.html`` into the run's folder when training ends, or is ended by an error.

    The page needs neither a network nor JavaScript. The confusion matrix and the mistakes are those of the last pass
    over the validation data; tasks that return no logits have none.

    Args:
        args: What followed ``zoo`` on the command line; by default what the process was started with.
        mistakes: Number of mistakes that are shown.
    """

    def __init__(self, args: Sequence[str] | None = None, mistakes: int = 24) -> None:
        self.command = shlex.join(["zoo", *(sys.argv[1:] if args is None else args)])
        self.most = mistakes
        self.history: dict[int, dict[str, float]] = {}  # of each epoch, its figures
        self.counts: Counter[tuple[int, int]] = Counter()  # of pairs of the right class and the answer
        self.mistakes: list[Mistake] = []
        self._logits: Tensor | None = None
        self._hook: Any = None
        self._started = time.time()
        self._folder: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]  # so that the curves of a resumed run are whole

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.time()
        # All processes have to ask for the folder, which at the end, after an error of one, they may not.
        self._folder = trainer.log_dir

    # The last pass over the validation data

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.counts, self.mistakes = Counter(), []
        self._hook = pl_module.register_forward_hook(self._watch)

    def _watch(self, module: LightningModule, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 2:
            self._logits = out.detach()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits, self._logits = self._logits, None
        if logits is None or not isinstance(batch, (list, tuple)):
            return
        images, labels = batch[:2]
        if len(images) and len(labels) == len(logits):
            config = getattr(trainer.datamodule, "data_config", None) or getattr(pl_module, "data_config", {})
            self._take(config, images, labels, logits.float())

    def _take(self, config: dict[str, Any], images: Tensor, labels: Tensor, logits: Tensor) -> None:
        logs = logits.log_softmax(-1)
        answers = logits.argmax(-1)
        losses = -logs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        pairs = list(zip(labels.tolist(), answers.tolist()))
        self.counts.update(pair for pair in pairs if pair[0] >= 0)  # negative labels stand for no image
        least = self.mistakes[-1].loss if len(self.mistakes) == self.most else -math.inf
        wrong = ((answers != labels) & (labels >= 0) & (losses > least)).nonzero()[:, 0].tolist()
        for i in sorted(wrong, key=lambda i: -losses[i])[: self.most]:
            probability = logs[i, answers[i]].exp().item()
            self.mistakes.append(Mistake(losses[i].item(), *pairs[i], probability, _jpeg(images[i], config)))
        self.mistakes = sorted(self.mistakes, key=lambda mistake: -mistake.loss)[: self.most]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (self.counts, self.mistakes))
            self.counts = sum((counts for counts, _ in parts), Counter())
            self.mistakes = sorted((m for _, part in parts for m in part), key=lambda mistake: -mistake.loss)
            self.mistakes = self.mistakes[: self.most]

    # The curves

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        ):  # what is said of the training so far is of one step only
            self._note(trainer, "val_")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def _note(self, trainer: Trainer, prefix: str = "") -> None:
        figures = {
            name.removesuffix("_epoch"): float(value)
            for name, value in sorted(trainer.callback_metrics.items())  # x_epoch comes after x, and counts
            # Lightning's monitor of learning rates, lr-AdamW, says the same as below.
            if value.numel() == 1 and name.startswith(prefix) and not name.endswith("_step") and name[:3] != "lr-"
        }
        if trainer.optimizers:
            figures["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.history.setdefault(trainer.current_epoch + 1, {}).update(figures)

    # The page

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        reason = f"{type(exception).__name__} {exception}".strip().splitlines()[0]
        self._write(trainer, pl_module, f"ended by {reason}")

    def _write(self, trainer: Trainer, pl_module: LightningModule, end: str) -> None:
        if trainer.fast_dev_run or self._folder is None or not trainer.is_global_zero or not self.history:
            return
        try:
            with write_whole(Path(self._folder) / "report.html") as file:
                file.write(self.page(trainer, pl_module, end))
        except Exception as error:  # the training is worth more than what is said of it
            rank_zero_warn(f"no report was written: {type(error).__name__}: {error}")

    def page(self, trainer: Trainer, pl_module: LightningModule, end: str) -> str:
        """The page as it stands; ``end`` says how the run ended."""
        data = trainer.datamodule
        name = getattr(pl_module, "hparams", {}).get("model_name") or type(pl_module).__name__
        of = type(data).__name__ if data is not None else "its data"
        if (root := getattr(data, "root", None)) is not None:
            of += f" in {root}"
        classes = getattr(data, "classes", None)
        sections = [_summary(self._facts(trainer, pl_module, end)), _curves(self.history)]
        if self.counts:
            sections += [_confusion(self.counts, classes), _mistakes(self.mistakes, self.counts, classes)]
        config = Path(self._folder or "") / "config.yaml"
        sections.append(_making(self.command, _about(trainer), config.read_text() if config.is_file() else None))
        return _PAGE.format(title=escape(f"{name} on {of}"), body="\n".join(sections), style=_STYLE)

    def _facts(self, trainer: Trainer, pl_module: LightningModule, end: str) -> list[tuple[str, str]]:
        facts = []
        for metric in ("val_top1", "val_top5", "val_loss"):
            values = {epoch: figures[metric] for epoch, figures in self.history.items() if metric in figures}
            if values:
                best = (min if metric.endswith("loss") else max)(values, key=values.get)
                text = f"{_figure(metric, values[max(values)])}, best {_figure(metric, values[best])} (epoch {best})"
                facts.append((_name(metric), text))
        parameters = sum(p.numel() for p in pl_module.parameters())
        seconds = time.time() - self._started
        facts += [
            ("Parameters", f"{parameters:,}"),
            ("Training", f"{max(self.history)} epochs, {trainer.global_step:,} steps, {end}"),
            ("Time", f"{_duration(seconds)}, from {time.strftime('%Y-%m-%d %H:%M', time.gmtime(self._started))} UTC"),
        ]
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        return [*facts, ("Checkpoint", best)] if best else facts


def _about(trainer: Trainer) -> list[tuple[str, str]]:
    """The environment: versions, devices, and how they were used."""
    device = trainer.strategy.root_device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [
        (
            "Devices",
            f"{trainer.world_size} x {where}, precision {trainer.precision}, {torch.get_num_threads()} threads",
        ),
        ("Seed", os.environ.get("PL_GLOBAL_SEED", "none")),
        *environment(),
    ]


# Parts of the page


def _summary(facts: list[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return f'<dl class="facts">{items}</dl>'


def _curves(history: dict[int, dict[str, float]]) -> str:
    """A chart for each quantity, with a line for training and one for validation."""
    lines: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for epoch, figures in sorted(history.items()):
        for metric, value in figures.items():
            split, _, quantity = metric.partition("_")
            split, quantity = (split, quantity) if split in LINES and quantity else ("", metric)
            if math.isfinite(value):
                lines[quantity][split][epoch] = value
    charts = "\n".join(_chart(quantity, lines[quantity]) for quantity in lines)
    names = sorted({name for figures in history.values() for name in figures})
    rows = [[str(epoch), *(_figure(n, figures.get(n)) for n in names)] for epoch, figures in sorted(history.items())]
    table = _table("Figures of each epoch", ["epoch", *map(_name, names)], rows)
    return (
        f'<section><h2>Curves</h2><div class="charts">{charts}</div>'
        f"<details><summary>The same in figures</summary>{table}</details></section>"
    )


def _chart(quantity: str, lines: dict[str, dict[int, float]]) -> str:
    """A line chart over epochs in SVG; its points say what they are when pointed at."""
    width, height, left, right, top, bottom = 340, 210, 52, 12, 14, 30
    epochs = [epoch for line in lines.values() for epoch in line]
    values = [value for line in lines.values() for value in line.values()]
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first, last = min(epochs), max(epochs)

    def x(epoch: float) -> float:
        return left + (width - left - right) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_figure(quantity, tick)}</text>')
    for epoch in sorted({first, last, *(round(t) for t in _ticks(first, last) if first <= t <= last)}):
        parts.append(f'<text x="{x(epoch):.1f}" y="{height - 10}" text-anchor="middle">{epoch}</text>')
    said = []
    for split, line in lines.items():
        points = [(x(epoch), y(value)) for epoch, value in line.items()]
        way = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="line {split}" points="{way}"/>')
        for (epoch, value), (px, py) in zip(line.items(), points):
            tip = f"{LINES.get(split, '')} epoch {epoch}: {_figure(quantity, value)}".strip()
            parts.append(f'<circle class="dot {split}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{tip}</title></circle>')
        ends = f"{_figure(quantity, line[min(line)])} to {_figure(quantity, line[max(line)])}"
        said.append(f"{LINES.get(split, 'it')} goes from {ends}")
    name = escape(_name(quantity))
    keys = "".join(
        f'<span class="key {split}">{LINES[split]}: {_figure(quantity, line[max(line)])}</span>'
        for split, line in lines.items()
        if split
    )
    label = escape(f"{_name(quantity)} over epochs {first} to {last}: {'; '.join(said)}", quote=True)
    return (
        f'<figure class="chart"><figcaption><strong>{name}</strong> {keys}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers that span `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10, 20) if unit * factor >= span / 4)
    start = math.floor(low / step + 1e-9)
    count = max(1, math.ceil(high / step - 1e-9) - start)
    return [round((start + i) * step, 12) for i in range(count + 1)]


def _confusion(counts: Counter[tuple[int, int]], classes: Sequence[str] | None) -> str:
    """The confusion matrix, or of many classes the pairs that are confused most."""
    totals: Counter[int] = Counter()
    for (label, _), count in counts.items():
        totals[label] += count
    right = sum(count for (label, answer), count in counts.items() if label == answer)
    everything = totals.total()
    head = f"<h2>Confusion</h2><p>{right:,} of {everything:,} right ({right / everything:.1%}).</p>"
    size = 1 + max(max(pair) for pair in counts)
    size = max(size, len(classes or ()))
    if size > LARGEST_MATRIX:
        pairs = [(count, *pair) for pair, count in counts.most_common() if pair[0] != pair[1]][:LARGEST_MATRIX]
        rows = [
            [_class(label, classes), _class(answer, classes), str(count), f"{count / totals[label]:.1%}"]
            for count, label, answer in pairs
        ]
        header = ["right class", "answer", "images", "share of the class"]
        return f"<section>{head}{_table('The pairs that are confused most', header, rows)}</section>"

    names = [escape(_class(i, classes)) for i in range(size)]
    cells = []
    for label in range(size):
        row = []
        for answer in range(size):
            count = counts[label, answer]
            shade = 0.12 + 0.58 * (count / totals[label]) ** 0.5 if count else 0
            kind = "right" if label == answer else "wrong"
            row.append(f'<td class="{kind}" style="--shade:{shade:.2f}">{count or ""}</td>')
        cells.append(f'<tr><th scope="row">{names[label]}</th>{"".join(row)}</tr>')
    columns = "".join(f'<th scope="col">{name}</th>' for name in names)
    caption = "A row for each right class, a column for each answer; mistakes are red, empty cells are zero"
    return (
        f'<section>{head}<div class="wide"><table class="confusion"><caption>{caption}</caption>'
        f"<thead><tr><td></td>{columns}</tr></thead><tbody>{''.join(cells)}</tbody></table></div></section>"
    )


def _mistakes(mistakes: list[Mistake], counts: Counter[tuple[int, int]], classes: Sequence[str] | None) -> str:
    """Images of the mistakes with the largest loss."""
    wrong = sum(count for (label, answer), count in counts.items() if label != answer)
    if not mistakes:
        return "<section><h2>Worst mistakes</h2><p>There are none.</p></section>"
    figures = []
    for mistake in mistakes:
        answer, label = escape(_class(mistake.answer, classes)), escape(_class(mistake.label, classes))
        said = f"{answer} ({_probability(mistake.probability)})"
        source = f"data:image/jpeg;base64,{b64encode(mistake.jpeg).decode()}"
        figures.append(
            f'<figure><img src="{source}" alt="A {label}, taken for {said}">'
            f"<figcaption>said <b>{said}</b><br>is {label}</figcaption></figure>"
        )
    text = f"{len(mistakes)} of {wrong:,}, those with the largest loss first."
    return f'<section><h2>Worst mistakes</h2><p>{text}</p><div class="mistakes">{"".join(figures)}</div></section>'


def _making(command: str, about: list[tuple[str, str]], config: str | None) -> str:
    """How to make the run again."""
    items = "".join(f'<tr><th scope="row">{escape(n)}</th><td>{escape(t)}</td></tr>' for n, t in about)
    whole = ""
    if config is not None:
        whole = f"<details><summary>The whole configuration</summary><pre>{escape(config)}</pre></details>"
    return (
        f"<section><h2>How it was made</h2><pre><code>{escape(command)}</code></pre>"
        f'<table class="about"><caption>Environment</caption><tbody>{items}</tbody></table>{whole}</section>'
    )


def _table(caption: str, header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column heads its rows."""
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _jpeg(image: Tensor, config: dict[str, Any]) -> bytes:
    """A small picture of an image as the model takes it, [channels, height, width], normalised as timm's terms say."""
    image = image.detach().float().cpu()
    mean, std = (torch.tensor(config.get(key, (math.nan,)))[:, None, None] for key in ("mean", "std"))
    pixels = image * std + mean if len(mean) == len(image) else image * math.nan
    if not (pixels > -0.1).logical_and(pixels < 1.1).all():  # it was normalised otherwise: use the whole range
        pixels = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
    pixels = (pixels.clamp(0, 1) * 255).round().byte()
    pixels = pixels[0] if len(pixels) != 3 else pixels.permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


# Words


def _name(metric: str) -> str:
    words = metric.replace("_", " ")
    for short, long in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy"), ("ece", "calibration error")):
        words = words.replace(short, long)
    if words.startswith("val "):
        words = f"validation {words[4:]}"
    elif words.startswith("train "):
        words = f"training {words[6:]}"
    return words[:1].upper() + words[1:]


def _figure(metric: str, value: float | None) -> str:
    """A figure as people read it: accuracies in percent."""
    if value is None:
        return ""
    if "top1" in metric or "top5" in metric:
        return f"{value:.1%}".replace(".0%", "%")
    return f"{value:.4g}"


def _probability(value: float) -> str:
    """In percent, never rounded up to certainty."""
    return ">99 %" if value > 0.99 else f"{value:.0%}".replace("%", " %")


def _class(i: int, classes: Sequence[str] | None) -> str:
    return str(classes[i]) if classes is not None and i < len(classes) else str(i)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.0f} s"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #ffffff; --card: #f6f7f9; --ink: #1a1c20; --soft: #5b6370; --rule: #d8dce2;
  --blue: #1f63b5; --grey: #7a7f88; --red: #b3261e; --blue-rgb: 33, 102, 172; --red-rgb: 196, 48, 43; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1d2026; --ink: #e8eaee; --soft: #a2a9b5;
  --rule: #363b44; --blue: #7db4f5; --grey: #9aa1ac; --red: #ff8a80;
  --blue-rgb: 90, 150, 230; --red-rgb: 235, 90, 80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: 0 0 .75rem; color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; margin: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .9rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
.chart { background: var(--card); border-radius: .5rem; padding: .75rem; }
.chart svg { width: 100%; height: auto; display: block; }
.key { font-size: .85rem; margin-left: .75rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 1.2rem; border-top: 2px dashed var(--grey);
  vertical-align: middle; margin-right: .35rem; }
.key.val::before { border-top: 3px solid var(--blue); }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--blue); stroke-width: 2; }
.line.train { stroke: var(--grey); stroke-dasharray: 5 3; }
.dot { fill: var(--blue); }
.dot.train { fill: var(--grey); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th[scope=row], .about td { text-align: left; font-weight: 500; }
.confusion th, .confusion td { padding: .3rem .5rem; min-width: 2.4rem; text-align: center;
  border: 1px solid var(--rule); }
.confusion .right { background: rgba(var(--blue-rgb), var(--shade)); }
.confusion .wrong { background: rgba(var(--red-rgb), var(--shade)); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .9rem; }
.mistakes img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--card); border-radius: .4rem; }
.mistakes figcaption { font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.mistakes b { color: var(--red); }
pre { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .75rem 0; }
"""
