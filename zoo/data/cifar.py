"""CIFAR-10 and CIFAR-100, in torchvision's form."""

from pathlib import Path
from typing import Any

import torchvision
from PIL import Image

from zoo.data.loading import ImageData, Images
from zoo.errors import UserError


class CIFAR10(ImageData):
    """60,000 photographs of 32 x 32 pixels in 10 classes, of which 10,000 serve validation and test.

    Args:
        root: The folder that holds ``cifar-10-batches-py``, as torchvision unpacks it.
        download: Fetch it into ``root``, about 170 MB, unless it is there.
        kwargs: See :class:`ImageData`.
    """

    source = torchvision.datasets.CIFAR10

    def __init__(self, root: str, download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        if download:
            self.source(root, download=True)
        self.classes = self._open(train=False).classes  # now, because the model's head is built from it

    def _open(self, train: bool) -> torchvision.datasets.CIFAR10:
        try:
            return self.source(self.root, train=train)
        except RuntimeError:
            folder = Path(self.root) / self.source.base_folder
            raise UserError(
                f"there is no {self.source.__name__} in {folder}, or it is damaged; --data.download true fetches it"
            ) from None

    def make_images(self, split: str, **kwargs: Any) -> "ArrayImages":
        return ArrayImages(self._open(train=split == "train"), **kwargs)


class CIFAR100(CIFAR10):
    """60,000 photographs of 32 x 32 pixels in 100 classes, of which 10,000 serve validation and test.

    Args:
        root: The folder that holds ``cifar-100-python``, as torchvision unpacks it.
        download: Fetch it into ``root``, about 170 MB, unless it is there.
        kwargs: See :class:`ImageData`.
    """

    source = torchvision.datasets.CIFAR100


class ArrayImages(Images):
    """A data set of torchvision's that holds pixels."""

    def __init__(self, dataset: torchvision.datasets.CIFAR10, **kwargs: Any) -> None:
        super().__init__(dataset.targets, type(dataset).__name__, **kwargs)
        self.pixels = dataset.data

    def source(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"image {index:05d}"
