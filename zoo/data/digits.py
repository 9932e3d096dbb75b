"""Handwritten digits that come with scikit-learn: real scans, no download."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from zoo.data.loading import IGNORE, NOTHING, whole_batches
from zoo.data.train_loader import TrainLoader
from zoo.errors import UserError, expect_at_least


class Digits(LightningDataModule):
    """The 1,797 scans of 8 x 8 pixels, enlarged; a fifth of them, the same on every run, is held out.

    The held-out fifth serves ``validate``, ``test`` and ``predict``: the set is too small to divide further.

    Args:
        image_size: Side length to which the scans are enlarged, bilinearly.
        channels: 1, or 3 for models of colour images (the same image three times).
        batch_size: Images per batch.
        augment: Turn, shift and scale the training images a little, differently every time.
    """

    num_classes = 10
    classes = tuple("0123456789")

    def __init__(self, image_size: int = 96, channels: int = 3, batch_size: int = 64, augment: bool = True) -> None:
        super().__init__()
        expect_at_least(1, image_size=image_size, batch_size=batch_size)
        if channels not in (1, 3):
            raise UserError(f"channels: expected 1 or 3, got {channels}")
        self.batch_size = batch_size
        bunch = load_digits()
        scans = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # the scanner's values are 0..16
        images = F.interpolate(scans, size=(image_size, image_size), mode="bilinear", align_corners=False)
        images = images.expand(-1, channels, -1, -1)
        labels = torch.from_numpy(bunch.target).long()
        transform = v2.RandomAffine(degrees=8, translate=(0.06, 0.06), scale=(0.9, 1.1)) if augment else None
        train, val = split_indices(bunch.target)
        self.train_set = LabelledImages(images, labels, train, transform)
        self.val_set = LabelledImages(images, labels, val)
        self.predict_set = NamedImages(images, val)

    @property
    def data_config(self) -> dict[str, Any]:
        """What the images are like, in timm's terms."""
        channels, *size = self.val_set.images.shape[1:]
        normal = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
        return {"input_size": (channels, *size), **normal, "interpolation": "bilinear", "crop_pct": 1.0}

    def train_dataloader(self) -> DataLoader:
        return TrainLoader(self.train_set, self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, **whole_batches(self.val_set, self.batch_size, self.trainer))

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.predict_set, **whole_batches(self.predict_set, self.batch_size, self.trainer))


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the scans into four fifths and one fifth, each digit in proportion, the same on every run."""
    return train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)


class LabelledImages(Dataset):
    """``(image, label)`` for the scans numbered ``indices``, normalised to -1..1."""

    def __init__(self, images: Tensor, labels: Tensor, indices: np.ndarray, transform: v2.Transform | None = None):
        self.images, self.labels, self.indices, self.transform = images, labels, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        if item == NOTHING:
            return torch.zeros_like(self.images[0]), torch.tensor(IGNORE)
        index = self.indices[item]
        image = self.images[index]
        if self.transform is not None:  # before normalising: the transform fills with 0, which is blank paper
            image = self.transform(image)
        return 2 * image - 1, self.labels[index]


class NamedImages(LabelledImages):
    """``(image, name)`` for the scans numbered ``indices``."""

    def __init__(self, images: Tensor, indices: np.ndarray):
        super().__init__(images, torch.arange(len(images)), indices)

    def __getitem__(self, item: int) -> tuple[Tensor, str]:
        image, index = super().__getitem__(item)
        return image, "" if item == NOTHING else f"scan {index:04d}"
