"""What the data modules of images share: transforms, loaders, exact evaluation, and images that cannot be read."""

import csv
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision.transforms import Compose, Grayscale

from zoo.data.decode import read_image
from zoo.data.train_loader import TrainLoader
from zoo.errors import UserError, expect_at_least
from zoo.files import write_whole

IGNORE = -100  # label of what stands for no image; PyTorch's losses leave it out as well
NOTHING = -1  # index of no image
NAMED_ALOUD = 100  # unreadable images with a warning of their own; all are in unreadable.csv

Failure = tuple[str, str]  # the name of an image and what is wrong with it


class ImageData(LightningDataModule):
    """Images with timm's transforms; the base of the data modules that read image files.

    Input size, normalisation, crop and interpolation are those that the model's task reports as ``data_config``.
    Images that cannot be read do not end a run before they are too many: in training the next one takes their place,
    in evaluation they are left out. Each is named in a warning and in ``unreadable.csv`` in the run's folder.

    Evaluation is exact under any number of processes: each image counts once, in the same batch as with one process.

    Args:
        batch_size: Images per batch and device.
        num_workers: Worker processes for loading; by default one per CPU core, at most 8.
        image_size: Side length, where it should differ from the model's.
        auto_augment: timm's name of an augmentation policy for training, or null for none.
        random_erasing: Share of training images from which a random rectangle is erased.
        max_unreadable: How many images of a split may turn out unreadable before the run ends, in each process: a
            number (3), or a share of them (0.05, rounded up; 1.0 for all).
        upright: Turn images as their EXIF orientation says. timm and torchvision do not, nor do published figures.
    """

    classes: Sequence[str]

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int | None = None,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        max_unreadable: int | float = 0.05,
        upright: bool = True,
    ) -> None:
        super().__init__()
        expect_at_least(1, batch_size=batch_size, image_size=image_size)
        expect_at_least(0, num_workers=num_workers)
        check_augmentation(auto_augment)
        if max_unreadable < 0 or (isinstance(max_unreadable, float) and max_unreadable > 1):
            raise UserError(
                f"max_unreadable: expected a number of images, or a share of 0.0 to 1.0, got {max_unreadable}"
            )
        self.batch_size = batch_size
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.image_size = image_size
        self.auto_augment = auto_augment
        self.random_erasing = random_erasing
        self.max_unreadable = max_unreadable
        self.upright = upright
        self.datasets: dict[str, Images] = {}

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def make_images(self, split: str, **kwargs: Any) -> "Images":
        """Return the images of "train", "val", "test" or "predict"; ``kwargs`` are further arguments of theirs."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        for split in splits:
            self.datasets[split] = self.make_images(
                split,
                transform=self.make_transform(training=split == "train"),
                upright=self.upright,
                max_unreadable=self.max_unreadable,
                replace_unreadable=split == "train",
                named=split == "predict",
            )

    @property
    def data_config(self) -> dict[str, Any]:
        """Input size, mean, standard deviation, crop and interpolation of the images given, in timm's terms."""
        config = dict(getattr(self.trainer.lightning_module if self.trainer else None, "data_config", {}))
        if self.image_size is not None:
            config["input_size"] = (3, self.image_size, self.image_size)
        config.setdefault("input_size", (3, 224, 224))
        return config

    def make_transform(self, training: bool = False) -> Callable[[Image.Image], Tensor]:
        """timm's transform for training or evaluating the model at hand."""
        config = self.data_config
        if training:
            config |= {"is_training": True, "auto_augment": self.auto_augment, "re_prob": self.random_erasing}
        transform = create_transform(**config)
        mend_posterize(transform)
        if config["input_size"][0] == 1:
            transform = Compose([Grayscale(), transform])
        return transform

    def train_dataloader(self) -> DataLoader:
        images = self.datasets["train"]
        options = dict(batch_size=self.batch_size, drop_last=len(images) >= self.batch_size)
        return self._loader(images, TrainImageLoader, **options)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader:
        images = self.datasets[split]
        return self._loader(images, ImageLoader, **whole_batches(images, self.batch_size, self.trainer))

    def _loader(self, images: "Images", loader: type[DataLoader], **kwargs: Any) -> DataLoader:
        return loader(
            images,
            collate_fn=images.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )


class Images(Dataset):
    """``(image, label)`` for every image of a split, or None for one that cannot be read.

    Subclasses say where the images are, by :meth:`source` and :meth:`name`.

    Args:
        labels: The label of each image.
        where: What to call all of them in messages, such as their folder.
        transform: From a PIL image to a tensor.
        upright: See :func:`zoo.data.read_image`.
        max_unreadable: See :class:`ImageData`.
        replace_unreadable: Give the next image that can be read for one that cannot.
        named: Give the images' names in the place of their labels.
        also_right: Of each image the labels that are right as well, as ImageNet-ReaL has them; they become a third
            entry of every sample, [num_classes], True where right.
        num_classes: Needed for ``also_right``.
    """

    def __init__(
        self,
        labels: Sequence[int],
        where: str,
        transform: Callable[[Image.Image], Tensor],
        upright: bool = True,
        max_unreadable: int | float = 1.0,
        replace_unreadable: bool = False,
        named: bool = False,
        also_right: Sequence[list[int]] | None = None,
        num_classes: int = 0,
    ) -> None:
        self.labels = labels
        self.where = where
        self.transform = transform
        self.upright = upright
        share = isinstance(max_unreadable, float)
        self.max_unreadable = math.ceil(max_unreadable * len(labels)) if share else max_unreadable
        self.replace_unreadable = replace_unreadable
        self.named = named
        self.also_right = also_right
        self.num_classes = num_classes
        self.unreadable: dict[str, str] = {}  # kept in the main process, by ImageLoader
        self._failures: list[Failure] = []  # of the batch at hand, in whichever process reads it

    def source(self, index: int) -> Any:
        """What :func:`zoo.data.read_image` is to read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def label(self, index: int) -> int:
        return self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...] | None:
        if index == NOTHING:
            return None
        if index >= len(self):  # ends loops over the data set
            raise IndexError(index)
        # More failures than are allowed end the run, so there is no need to look further than that.
        for step in range(min(self.max_unreadable + 1, len(self)) if self.replace_unreadable else 1):
            sample = self._sample((index + step) % len(self))
            if sample is not None:
                return sample
        return None

    def _sample(self, index: int) -> tuple[Any, ...] | None:
        try:
            image, answer = read_image(self.source(index), self.upright), self._answer(index)
        except Exception as error:  # image decoders raise nearly anything on damaged bytes
            self._failures.append((self.name(index), str(error) or type(error).__name__))
            return None
        return self.transform(image), *answer

    def _answer(self, index: int) -> tuple[Any, ...]:
        """What a sample holds besides the image; of :data:`NOTHING` that which evaluation leaves out."""
        if self.named:
            return ("" if index == NOTHING else self.name(index),)
        label = IGNORE if index == NOTHING else self.label(index)
        if self.also_right is None:
            return (label,)
        right = torch.zeros(self.num_classes, dtype=torch.bool)
        if index != NOTHING:
            right[self.also_right[index]] = True
        return label, right

    def collate(self, samples: list[tuple[Any, ...] | None]) -> tuple[list[Any], list[Failure]]:
        """Make a batch of the samples that could be read, and say what could not.

        Where none could, one black image without a label stands for them, because every process has to run the model.
        """
        failures, self._failures = self._failures, []
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            samples = [(self.transform(Image.new("RGB", (32, 32))), *self._answer(NOTHING))]
        return default_collate(samples), failures

    def report(self, failures: list[Failure]) -> None:
        """Name and count what could not be read.

        Raises:
            UserError: It is more than ``max_unreadable``, or everything.
        """
        for name, reason in failures:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                if len(self.unreadable) <= NAMED_ALOUD:
                    warnings.warn(f"skipping {printable(name)}: not a readable image ({reason})", stacklevel=2)
        count = len(self.unreadable)
        if count and (count > self.max_unreadable or count == len(self)):
            name, reason = next(reversed(self.unreadable.items()))
            raise UserError(
                f"{count} of the {len(self)} images in {self.where} could not be read, and max_unreadable allows "
                f"{min(self.max_unreadable, len(self) - 1)}; the last was {printable(name)} ({reason})"
            )


class Reporting:
    """For loaders of :class:`Images`: has them report in the main process what the workers could not read."""

    def __iter__(self) -> Iterator[list[Any]]:
        images = self.collate_fn.__self__
        for batch, failures in super().__iter__():
            if failures:
                images.report(failures)
            yield batch


class ImageLoader(Reporting, DataLoader):
    """Loads batches of :class:`Images`, whose method ``collate`` has to be its ``collate_fn``."""


class TrainImageLoader(Reporting, TrainLoader):
    """The same for training."""


class WholeBatches(DistributedSampler):
    """Deals whole batches to the processes in turn, so that each image is evaluated once, in the same company.

    PyTorch's own sampler repeats images until they can be dealt evenly, which alters the figures. Here a process that
    gets no batch in the last round gets :data:`NOTHING`, because all have to run the model equally often (FSDP, and
    DDP while fitting, wait for each other).

    Args:
        length: Number of images.
        batch_size: Images per batch; all batches but the last are full.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        # Not the parent's: being one keeps Lightning from putting its own in the place of this.
        self.rank, self.num_replicas, self.shuffle, self.epoch = rank, world_size, False, 0
        self.indices = [
            index
            for start in range(rank * batch_size, length, world_size * batch_size)
            for index in range(start, min(start + batch_size, length))
        ]
        rounds = math.ceil(math.ceil(length / batch_size) / world_size)
        if math.ceil(len(self.indices) / batch_size) < rounds:
            self.indices.append(NOTHING)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def whole_batches(dataset: Dataset, batch_size: int, trainer: Trainer | None) -> dict[str, Any]:
    """Arguments for a loader that divides a data set among the trainer's processes, see :class:`WholeBatches`."""
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    return {"batch_size": batch_size, "sampler": WholeBatches(len(dataset), batch_size, rank, world_size)}


class ReportSkipped(Callback):
    """Say at the end of each epoch how many images were unreadable, log the number, and list them in a file.

    ``unreadable.csv`` in the run's folder has a row for each: the split, its name, and what is wrong with it.
    """

    def __init__(self) -> None:
        self.reported: dict[str, dict[str, str]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, None, "predict")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        datasets = getattr(trainer.datamodule, "datasets", {})
        if trainer.world_size == 1:  # others may be waiting for something else
            self._list(trainer, {split: files.unreadable for split, files in datasets.items()})

    def _report(self, trainer: Trainer, pl_module: LightningModule | None, split: str) -> None:
        images = getattr(trainer.datamodule, "datasets", {}).get(split)
        if images is None:
            return
        unreadable = merge(trainer, images.unreadable)
        if pl_module is not None:
            # The same number in every process; Lightning warns unless it may take the mean.
            pl_module.log(f"{split}_skipped_images", float(len(unreadable)), sync_dist=True)
        if len(unreadable) > len(self.reported.get(split, {})):
            rank_zero_warn(
                f"{len(unreadable)} of the {len(images)} images in {images.where} could not be read and were skipped"
            )
            self._list(trainer, {**self.reported, split: unreadable})

    def _list(self, trainer: Trainer, unreadable: dict[str, dict[str, str]]) -> None:
        self.reported = unreadable
        folder = trainer.log_dir if trainer.loggers else None
        if folder is None or not trainer.is_global_zero or not any(unreadable.values()):
            return
        with write_whole(Path(folder) / "unreadable.csv") as file:
            writer = csv.writer(file)
            writer.writerow(["split", "name", "problem"])
            writer.writerows(
                (split, name, reason) for split in unreadable for name, reason in unreadable[split].items()
            )


def check_augmentation(policy: str | None) -> None:
    """Raise a :class:`UserError` unless timm knows a policy of this name; else it would end the run later on."""
    try:
        create_transform((3, 32, 32), is_training=True, auto_augment=policy)
    except Exception as error:  # of many kinds, assertions included
        reason = str(error) or type(error).__name__
        raise UserError(f"auto_augment: timm knows no policy {policy!r} ({reason})") from None


def expect_classes(classes: list[str], where: Any) -> list[str]:
    """Return ``classes`` if there is something to tell apart, else raise a :class:`UserError`."""
    if len(classes) < 2:
        raise UserError(f"{where}: {len(classes)} class{'' if len(classes) == 1 else 'es'}; expected 2 or more")
    return classes


def mend_posterize(transform: Any) -> None:
    """Let timm's augmentation leave no bits of a colour, as it does at its strongest: Pillow 13 refuses that."""
    for step in getattr(transform, "transforms", []):
        policy = [op for group in getattr(step, "policy", []) for op in group]
        for op in [*getattr(step, "ops", []), *policy]:
            if getattr(op, "aug_fn", None) is auto_augment.posterize:
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits else Image.new(image.mode, image.size)


def merge(trainer: Trainer, entries: dict[str, str]) -> dict[str, str]:
    """Join the dictionaries of all processes."""
    if trainer.world_size == 1:
        return dict(entries)
    gathered: list[dict[str, str]] = [{}] * trainer.world_size
    torch.distributed.all_gather_object(gathered, entries)
    return {name: reason for part in gathered for name, reason in part.items()}


def printable(name: str) -> str:
    """The name as it can be printed anywhere: line breaks and bytes that are no text are written as escapes."""
    return name if name.isprintable() else repr(name)[1:-1]


def import_extra(module: str, extra: str) -> Any:
    """Import a package that comes with an optional extra of this one."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"this needs the package {module}: pip install 'attn-zoo[{extra}]' ({error})") from None
