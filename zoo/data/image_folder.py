"""Images in folders, one folder per class, as ImageNet is usually unpacked."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from zoo.data.train_loader import TrainLoader
from zoo.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MAX_UNREADABLE_IN_A_ROW = 100


class ImageFolder(LightningDataModule):
    """``root/train/<class>/*`` and ``root/val/<class>/*``, with timm's transforms.

    Input size, normalisation, crop and interpolation are those that the model's task reports as ``data_config``.
    Unreadable images do not end a run: in training another image takes their place, in evaluation they are left out.
    Each is named in a warning, and :class:`ReportSkipped` counts them at the end of every epoch.

    Args:
        root: The folder that holds ``train`` and ``val``; only evaluating needs no ``train``.
        batch_size: Images per batch and device.
        num_workers: Worker processes for loading; by default one per CPU core, at most 8.
        image_size: Side length, where it should differ from the model's.
        auto_augment: timm's name of an augmentation policy for training, or null for none.
        random_erasing: Share of training images from which a random rectangle is erased.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int | None = None,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.image_size = image_size
        self.auto_augment = auto_augment
        self.random_erasing = random_erasing
        self.classes = find_classes(self.root)  # now, because the model's head is built from it
        self.datasets: dict[str, ImageFiles] = {}

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def setup(self, stage: str) -> None:
        model = self.trainer.lightning_module if self.trainer else None
        config = dict(getattr(model, "data_config", {}))
        if self.image_size is not None:
            config["input_size"] = (3, self.image_size, self.image_size)
        config.setdefault("input_size", (3, 224, 224))
        if stage == "fit":
            transform = create_transform(
                **config, is_training=True, auto_augment=self.auto_augment, re_prob=self.random_erasing
            )
            self.datasets["train"] = ImageFiles(self.root / "train", self.classes, transform, replace_unreadable=True)
        self.datasets["val"] = ImageFiles(self.root / "val", self.classes, create_transform(**config))

    def _loader(self, dataset: Dataset, loader: type[DataLoader] = DataLoader, **kwargs: Any) -> DataLoader:
        return loader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def train_dataloader(self) -> DataLoader:
        dataset = self.datasets["train"]
        return self._loader(dataset, TrainLoader, drop_last=len(dataset) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.datasets["val"], collate_fn=collate_readable)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        return self._loader(NamedImageFiles(self.datasets["val"]), collate_fn=collate_readable)


class ImageFiles(Dataset):
    """``(image, label)`` for every image file in ``folder/<class>/``.

    Args:
        folder: Holds one folder per class.
        classes: The class names, in the order of their labels.
        transform: From a PIL image to a tensor.
        replace_unreadable: What to give for a file that cannot be read: the next one that can, or None.
    """

    def __init__(
        self,
        folder: Path,
        classes: list[str],
        transform: Callable[[Image.Image], Tensor],
        replace_unreadable: bool = False,
    ) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; expected one folder per class in it")
        self.folder = folder
        self.transform = transform
        self.replace_unreadable = replace_unreadable
        self.samples = [
            (entry.path, label)
            for label, name in enumerate(classes)
            for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name)
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")
        ]
        if not self.samples:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"there are no images in the class folders of {folder}; expected files in {suffixes}")
        # One flag per file, in memory that the worker processes share.
        self.unreadable = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        for step in range(MAX_UNREADABLE_IN_A_ROW):
            path, label = self.samples[(index + step) % len(self)]
            image = self._read((index + step) % len(self))
            if image is not None:
                return self.transform(image), label
            if not self.replace_unreadable:
                return None
        raise UserError(f"{MAX_UNREADABLE_IN_A_ROW} images in a row could not be read, the last of them {path}")

    def _read(self, index: int) -> Image.Image | None:
        path = self.samples[index][0]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # image decoders raise nearly anything on damaged bytes
            if not self.unreadable[index]:
                self.unreadable[index] = True
                warnings.warn(f"skipping {path}: not a readable image ({error})", stacklevel=2)
            return None


class NamedImageFiles(Dataset):
    """``(image, path)`` for the files of another dataset."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str] | None:
        sample = self.files[index]
        return None if sample is None else (sample[0], self.files.samples[index][0])


class ReportSkipped(Callback):
    """Say at the end of each epoch how many images were unreadable, and log the number."""

    def __init__(self) -> None:
        self.reported: dict[str, int] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "val")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, None, "val")

    def _report(self, trainer: Trainer, pl_module: LightningModule | None, split: str) -> None:
        files = getattr(trainer.datamodule, "datasets", {}).get(split)
        if not isinstance(files, ImageFiles):
            return
        skipped = int(files.unreadable.sum())
        if pl_module is not None:
            pl_module.log(f"{split}_skipped_images", float(skipped), reduce_fx="sum", sync_dist=True)
        if skipped > self.reported.get(split, 0):
            rank_zero_warn(f"{skipped} of the {len(files)} images in {files.folder} could not be read and were skipped")
            self.reported[split] = skipped


def find_classes(root: Path) -> list[str]:
    """Return the class names below ``root/train`` and ``root/val``, which must agree."""
    layout = f"expected {root}/train/<class>/<image> and {root}/val/<class>/<image>"
    if not root.is_dir():
        raise UserError(f"there is no data folder {root}; {layout}")
    found = {
        split: sorted(entry.name for entry in os.scandir(root / split) if entry.is_dir() and entry.name[0] != ".")
        for split in ("train", "val")
        if (root / split).is_dir()
    }
    if not found:
        raise UserError(f"the data folder {root} has neither train nor val in it; {layout}")
    for split, classes in found.items():
        if not classes:
            raise UserError(f"the folder {root / split} has no class folders in it; {layout}")
    if len(found) == 2 and found["train"] != found["val"]:
        train, val = set(found["train"]), set(found["val"])
        differences = [
            f"{len(names)} only in {split} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for split, names in (("train", train - val), ("val", val - train))
            if names
        ]
        raise UserError(f"the class folders of {root}/train and {root}/val differ: {'; '.join(differences)}")
    return next(iter(found.values()))


def collate_readable(samples: list[Any | None]) -> Any:
    """Make a batch of the samples that could be read; it may be empty."""
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else (torch.empty(0), torch.empty(0, dtype=torch.long))
