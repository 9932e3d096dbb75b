"""What is measured of a classifier, and the files that say it; the same to the last bit under any number of processes.

All is summed up in whole numbers, whose sum does not depend on how the images were divided.
"""

import csv
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from zoo.errors import UserError
from zoo.files import check_output, write_whole

MAX_CONFUSION_CLASSES = 4096  # of more, the matrix takes gigabytes
_ONE = 2**24  # of the fixed-point numbers


class Mean(Metric):
    """The mean of numbers, to a precision of 1e-7; nan if any of them is not finite."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count", "not_finite"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take in ``values`` of any shape."""
        finite = values.isfinite()
        self.total = self.total + (values.where(finite, 0).float() * _ONE).round().long().sum()
        self.count = self.count + values.numel()
        self.not_finite = self.not_finite + (~finite).sum()

    def compute(self) -> Tensor:
        mean = (self.total / self.count / _ONE).float()
        return mean.where(self.not_finite == 0, torch.nan)


class CrossEntropy(Mean):
    """The mean cross-entropy loss, without label smoothing."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in logits [batch, classes] and labels [batch]."""
        super().update(F.cross_entropy(logits, labels, reduction="none"))


class CalibrationError(Metric):
    """Expected calibration error (arXiv:1706.04599): how far confidence is from accuracy, on average.

    The images are divided by the confidence in their most likely class into intervals of equal width; of each the
    mean confidence is compared with the share of right answers, and the differences weighted by the images in it.

    Args:
        bins: Number of intervals.
    """

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.register_buffer("edges", torch.linspace(0, 1, bins + 1)[1:-1], persistent=False)
        for name in ("count", "right", "confidence"):
            self.add_state(name, torch.zeros(bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in logits [batch, classes] and labels [batch]."""
        confidence, answer = logits.softmax(-1).max(-1)
        bin_ = F.one_hot(torch.bucketize(confidence, self.edges, right=True), len(self.count))  # [batch, bins]
        self.count = self.count + bin_.sum(0)
        self.right = self.right + (bin_ * (answer == labels)[:, None]).sum(0)
        self.confidence = self.confidence + (bin_ * (confidence.float() * _ONE).round().long()[:, None]).sum(0)

    def compute(self) -> Tensor:
        return ((self.confidence / _ONE - self.right).abs().sum() / self.count.sum()).float()


class AnyRight(Mean):
    """Share of images of which one of the ``top_k`` likeliest classes is among the right ones (ImageNet-ReaL)."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def update(self, logits: Tensor, right: Tensor) -> None:
        """Take in logits and right classes, [batch, classes] each; images without any are left out."""
        hits = right.gather(1, logits.topk(self.top_k).indices).any(1)
        super().update(hits[right.any(1)].float())


def accuracies(num_classes: int) -> dict[str, Metric]:
    """Top-1 accuracy, and top-5 where there are more than five classes."""
    return {f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (1, 5) if k < num_classes}


class Evaluation(torch.nn.Module):
    """All that is measured of one split.

    Args:
        num_classes: Number of classes.
        prefix: Of the names, such as "val_".
    """

    def __init__(self, num_classes: int, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        # Groups would share the states of metrics that happen to be equal in the first batch.
        options: dict[str, Any] = {"compute_groups": False}
        figures = {**accuracies(num_classes), "ece": CalibrationError(), "loss": CrossEntropy()}
        self.figures = MetricCollection(figures, prefix=prefix, **options)
        real = {f"top{k}": AnyRight(k) for k in (1, 5) if k < num_classes}
        self.real = MetricCollection(real, prefix=f"{prefix}real_", **options)
        self.confusion = MulticlassConfusionMatrix(num_classes) if num_classes <= MAX_CONFUSION_CLASSES else None

    def update(self, logits: Tensor, labels: Tensor, right: Tensor | None = None) -> list[MetricCollection]:
        """Take in a batch, and return what is to be logged.

        Args:
            logits: [batch, classes].
            labels: [batch]; negative where there is no image.
            right: All right classes, [batch, classes], where they are known.
        """
        known = labels >= 0
        logits, labels = logits.float()[known], labels[known]
        if len(labels):
            self.figures.update(logits, labels)
            if self.confusion is not None:
                self.confusion.update(logits, labels)
        if right is None:
            return [self.figures]
        if len(labels):
            self.real.update(logits, right[known])
        return [self.figures, self.real]

    def write(self, trainer: Trainer) -> None:
        """Write the confusion matrix and the table of classes into the run's folder, if it has one, and start anew."""
        if self.confusion is None:
            return
        folder = trainer.log_dir if trainer.loggers else None  # waits for the other processes, as the sum does
        if folder is not None and not trainer.sanity_checking:
            folder, matrix = Path(folder), self.confusion.compute()
            if trainer.is_global_zero:
                names = getattr(trainer.datamodule, "classes", None) or range(len(matrix))
                write_confusion(folder / f"{self.prefix}confusion.csv", matrix.cpu(), names)
                write_classes(folder / f"{self.prefix}classes.csv", matrix.cpu(), names)
        with torch.inference_mode(False):  # else only loops in that mode could update it again
            self.confusion.reset()


def write_confusion(path: Path, matrix: Tensor, names: Sequence[Any]) -> None:
    """Write the confusion matrix, [classes, classes]: a row for each true class, a column for each answer."""
    with write_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(["class", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))


def write_classes(path: Path, matrix: Tensor, names: Sequence[Any]) -> None:
    """Write a row for each class: its images, how many are recognised, and for what the others are taken most often.

    ``accuracy`` is the share of the class's images that are recognised, ``precision`` the share of the answers with
    this class that are right.
    """
    images, answers, right = matrix.sum(1).tolist(), matrix.sum(0).tolist(), matrix.diagonal().tolist()
    times, taken_for = (best.tolist() for best in matrix.clone().fill_diagonal_(0).max(1))
    with write_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(["label", "class", "images", "right", "accuracy", "precision", "taken_for", "times"])
        for i, name in enumerate(names):
            accuracy = f"{right[i] / images[i]:.4f}" if images[i] else ""
            precision = f"{right[i] / answers[i]:.4f}" if answers[i] else ""
            mistake = names[taken_for[i]] if times[i] else ""
            writer.writerow([i, name, images[i], right[i], accuracy, precision, mistake, times[i]])


class WritePredictions(Callback):
    """Write each image's likeliest class, as ``zoo predict`` does, into a CSV or JSON file.

    The file has ``name``, ``label``, ``class`` and ``probability`` of every image, in the order of the data, and is
    written when all are there.

    Args:
        path: A file that ends in .csv or .json; in the run's folder by default.
        classes: Names of the classes; by default those of the data.
    """

    def __init__(self, path: str | Path | None = None, classes: Sequence[str] | None = None) -> None:
        if path is not None and Path(path).suffix.lower() not in (".csv", ".json"):
            raise UserError(f"predictions go to a .csv or .json file, not to {path}")
        if path is not None:
            check_output(path)
        self.path = path
        self.classes = classes
        self.batches: list[list[tuple[str, int, float]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        labels, probabilities = outputs["label"].tolist(), outputs["probability"].tolist()
        names = outputs["name"] if outputs["name"] is not None else [""] * len(labels)
        self.batches.append(list(zip(names, labels, probabilities, strict=True)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dealt = [self.batches]
        if trainer.world_size > 1:
            dealt = [[]] * trainer.world_size
            torch.distributed.all_gather_object(dealt, self.batches)
        path = Path(self.path or Path(trainer.log_dir or ".") / "predictions.csv")
        if not trainer.is_global_zero:
            return
        classes = self.classes or getattr(trainer.datamodule, "classes", None)
        rows = [
            {
                "name": name,
                "label": label,
                "class": classes[label] if classes else label,
                "probability": round(probability, 4),
            }
            for turn in zip_longest(*dealt, fillvalue=[])  # batches were dealt to the processes in turn
            for batch in turn
            for name, label, probability in batch
        ]
        with write_whole(path) as file:
            if path.suffix.lower() == ".json":
                json.dump(rows, file, indent=1)
            else:
                writer = csv.DictWriter(file, ["name", "label", "class", "probability"])
                writer.writeheader()
                writer.writerows(rows)
        print(f"predictions: {path}")
