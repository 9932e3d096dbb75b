"""Labelled images in the shards of WebDataset: tar files of images and of labels, read in one go."""

import os
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zoo.data.image_folder import IMAGE_SUFFIXES
from zoo.data.loading import ImageData, Images, Reporting, expect_classes, import_extra
from zoo.errors import UserError

Record = dict[str, Any]  # the files of one image by their suffixes, and where they come from


class WebDataset(ImageData):
    """Shards as WebDataset writes them, ``<key>.jpg`` and ``<key>.cls``; needs ``pip install 'attn-zoo[webdataset]'``.

    For training, the processes and their workers share the shards out among themselves, in another order every time,
    and draw images from a buffer; an epoch is as many as ``train_images``. For evaluation every worker reads all shards
    and decodes its own batches only, so that the figures are exact however many there are.

    Args:
        val: The shards for validation: files or addresses, such as ``val-{000..049}.tar``.
        val_images: How many images are in them; any other number found ends the run.
        classes: The number of classes, or a text file with the name of one in each line.
        train: The shards to train on.
        train_images: How many images make an epoch.
        label: The suffix of the files of labels, which hold a number.
        buffer: Images to draw from in training, in each worker.
        kwargs: See :class:`ImageData`.
    """

    def __init__(
        self,
        val: str,
        val_images: int,
        classes: int | str,
        train: str | None = None,
        train_images: int | None = None,
        label: str = "cls",
        buffer: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shards = {"train": train, "val": val, "test": val, "predict": val}
        self.images = {"train": train_images, "val": val_images, "test": val_images, "predict": val_images}
        self.classes = expect_classes(read_classes(classes), f"classes {classes}")
        self.label = label
        self.buffer = buffer
        # Lightning's advice on counting, which is followed.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")

    def make_images(self, split: str, **kwargs: Any) -> "Stream":
        if self.shards[split] is None or self.images[split] is None:
            raise UserError("training needs train, the shards, and train_images, their number of images")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Stream(
            find_shards(self.shards[split]),
            self.images[split],
            batch_size=self.batch_size,
            num_classes=self.num_classes,
            suffix=self.label,
            buffer=self.buffer if split == "train" else None,
            rank=rank,
            world_size=world_size,
            where=self.shards[split],
            **kwargs,
        )

    def train_dataloader(self) -> DataLoader:
        return self._evaluation_loader("train")

    def _evaluation_loader(self, split: str) -> DataLoader:
        return StreamLoader(
            self.datasets[split],
            batch_size=None,
            collate_fn=self.datasets[split].as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class Stream(Images, IterableDataset):
    """Batches of images from shards.

    Args:
        shards: Files or addresses.
        images: How many images they hold; in training, how many make an epoch.
        batch_size: Images per batch.
        num_classes: Labels are below this number.
        suffix: Of the files of labels.
        buffer: In training, the number of images to draw from; None for evaluation.
        rank: Number of this process.
        world_size: Number of processes.
        kwargs: See :class:`Images`.
    """

    def __init__(
        self,
        shards: list[str],
        images: int,
        batch_size: int,
        num_classes: int,
        suffix: str,
        buffer: int | None,
        rank: int,
        world_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(range(images), num_classes=num_classes, **kwargs)
        self.read_shards = import_extra("webdataset", "webdataset").tariterators.tarfile_samples
        self.shards = shards
        self.batch_size = batch_size
        self.suffix = suffix
        self.buffer = buffer
        self.rank = rank
        self.world_size = world_size
        self.passes = 0

    @property
    def rounds(self) -> int:
        """Batches per process."""
        if self.buffer is not None:
            return max(1, len(self) // (self.batch_size * self.world_size))
        return -(-len(self) // (self.batch_size * self.world_size))

    def source(self, record: Record) -> bytes:
        for suffix, content in record.items():
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                return content
        raise OSError("there is no image of that name in the shard")

    def name(self, record: Record) -> str:
        return f"{record['__url__']}/{record['__key__']}"

    def label(self, record: Record) -> int:
        if self.suffix not in record:
            raise OSError(f"there is no file .{self.suffix} of that name in the shard")
        label = int(record[self.suffix])
        if not 0 <= label < self.num_classes:
            raise OSError(f"its label is {label}; expected 0 to {self.num_classes - 1}")
        return label

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._evaluate(number, workers) if self.buffer is None else self._train(number, workers)

    def _evaluate(self, number: int, workers: int) -> Iterator[Any]:
        """Batches are dealt to the processes in turn, and those of a process to its workers in turn."""
        due = range(self.rank + number * self.world_size, self.rounds * self.world_size, workers * self.world_size)
        samples, found = [], 0
        for found, record in enumerate(self._records(self.shards), 1):
            batch = (found - 1) // self.batch_size
            if batch in due:
                samples.append(self._sample(record))
            if batch in due and found % self.batch_size == 0:
                yield self.collate(samples)
                samples = []
        if found != len(self):
            raise UserError(f"{self.where} holds {found} images, but {len(self)} were to be expected")
        if samples:
            yield self.collate(samples)
        if due and due[-1] * self.batch_size >= found:  # of the last round there is nothing left for this process
            yield self.collate([])

    def _train(self, number: int, workers: int) -> Iterator[Any]:
        """Endless: who reads it decides how many batches make an epoch."""
        draw = random.Random(torch.initial_seed())
        held: list[Record] = []
        samples: list[Any] = []
        while True:
            shards = list(self.shards)
            random.Random(f"{os.environ.get('PL_GLOBAL_SEED', 0)} {self.passes}").shuffle(shards)
            self.passes += 1
            share = shards[self.rank * workers + number :: self.world_size * workers]
            found = 0
            for record in self._records(share or draw.sample(shards, len(shards))):
                found += 1
                held.append(record)
                if len(held) < self.buffer:
                    continue
                index = draw.randrange(len(held))
                held[index], held[-1] = held[-1], held[index]
                sample = self._sample(held.pop())
                if sample is not None:
                    samples.append(sample)
                if len(samples) == self.batch_size or len(self._failures) > self.max_unreadable:
                    yield self.collate(samples)
                    samples = []
            if not found:
                raise UserError(f"there are no images in {self.where}: {self._failures or 'the shards are empty'}")

    def _records(self, shards: list[str]) -> Iterator[Record]:
        return self.read_shards(({"url": shard} for shard in shards), handler=self._note)

    def _note(self, error: Exception) -> bool:
        """Go on with the next shard."""
        *problem, shard = map(str, error.args)
        self._failures.append((shard, f"{type(error).__name__}: {problem[0] if problem else ''}"))
        return True

    def as_it_is(self, batch: Any) -> Any:
        """Batches are made in :meth:`__iter__` already."""
        return batch


class StreamLoader(Reporting, DataLoader):
    """Loads the batches of one epoch of a :class:`Stream`."""

    def __len__(self) -> int:
        return self.dataset.rounds

    def __iter__(self) -> Iterator[list[Any]]:
        return islice(super().__iter__(), len(self))


def find_shards(pattern: str) -> list[str]:
    """Return the shards that a pattern with braces stands for; files must be there."""
    shards = import_extra("webdataset", "webdataset").shardlists.expand_urls(pattern)
    missing = [shard for shard in shards if ":" not in shard and not os.path.isfile(shard)]
    if missing:
        raise UserError(f"{len(missing)} of the {len(shards)} shards {pattern} are not there (first: {missing[0]})")
    return shards


def read_classes(classes: int | str) -> list[str]:
    """Return the names of classes: the lines of a text file, or just so many numbers."""
    if isinstance(classes, int):
        return [str(label) for label in range(classes)]
    try:
        return Path(classes).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"classes: expected a number, or a text file of names, got {classes!r}, which cannot be read ({error})"
        ) from None
