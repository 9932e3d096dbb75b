"""Images in folders: one folder per class, as ImageNet is usually unpacked, or any folder of photographs."""

import json
import os
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from zoo.data.loading import ImageData, Images, expect_classes, printable
from zoo.errors import UserError

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
}  # fmt: skip


class ImageFolder(ImageData):
    """``root/train/<class>/*`` and ``root/val/<class>/*``, subfolders included.

    Classes are numbered in the order of their names; names that are all numbers, as ImageNet-V2 has them, in the
    order of the numbers.

    Args:
        root: The folder that holds ``train`` and ``val``; only evaluating needs no ``train``.
        val: The folder in ``root`` of the validation images; "." if the class folders are in ``root`` itself.
        test: The folder in ``root`` for ``zoo test``; by default the validation images serve.
        real_labels: ImageNet-ReaL's ``real.json`` (arXiv:2006.07159): for each validation image, in the order of the
            file names, the list of all right labels. Adds ``val_real_top1`` and ``val_real_top5``; images with an
            empty list are left out of these.
        kwargs: See :class:`ImageData`.
    """

    def __init__(
        self,
        root: str,
        val: str = "val",
        test: str | None = None,
        real_labels: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.folders = {"train": "train", "val": val, "test": val if test is None else test}
        self.folders["predict"] = self.folders["val"]
        self.real_labels = real_labels
        # Now, because the model's head is built from it.
        self.classes = expect_classes(find_classes(self.root, self.folders), self.root)

    def make_images(self, split: str, **kwargs: Any) -> "ImageFiles":
        folder = self.root / self.folders[split]
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; expected one folder per class in it")
        files, others = [], []
        for label, name in enumerate(self.classes):
            found, ignored = find_images(folder / name)
            files += [(path, label) for path in found]
            others += ignored
        kwargs.update(ignored=others)
        if self.real_labels is not None and split in ("val", "test"):
            kwargs.update(
                also_right=read_real_labels(self.real_labels, [path for path, _ in files], self.num_classes),
                num_classes=self.num_classes,
            )
        return ImageFiles(files, str(folder), **kwargs)


class PlainFolder(ImageData):
    """Images without classes, for ``zoo predict``.

    Args:
        root: A folder, subfolders included, or a list of image files and folders.
        num_classes: Number of classes of the model that is to name them.
        kwargs: See :class:`ImageData`.
    """

    def __init__(self, root: str | list[str], num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.roots = [Path(path) for path in ([root] if isinstance(root, str) else root)]
        for path in self.roots:
            if not os.path.lexists(path):
                raise UserError(f"there is no folder or image {path}")
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def make_images(self, split: str, **kwargs: Any) -> "ImageFiles":
        if split != "predict":
            raise UserError("images without classes serve `zoo predict` only")
        files, others = [], []
        for path in self.roots:
            found, ignored = find_images(path) if path.is_dir() else ([str(path)], [])
            files += found
            others += ignored
        where = ", ".join(map(str, self.roots[:3])) + (", ..." if len(self.roots) > 3 else "")
        return ImageFiles([(path, 0) for path in files], where, ignored=others, **kwargs)


class ImageFiles(Images):
    """Image files and their labels.

    Args:
        samples: Pairs of a path and a label.
        where: The folder.
        ignored: Other files that lie there, to be mentioned.
        kwargs: See :class:`Images`.
    """

    def __init__(
        self, samples: list[tuple[str, int]], where: str, ignored: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not samples:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"there are no images in {where}; expected files in {suffixes}")
        if ignored:
            some = ", ".join(printable(path) for path in ignored[:3])
            rank_zero_warn(
                f"{len(ignored)} files in {where} are not taken for images, by their names: "
                f"{some}{', ...' if len(ignored) > 3 else ''}"
            )
        self.samples = samples
        super().__init__([label for _, label in samples], where, **kwargs)

    def source(self, index: int) -> str:
        return self.samples[index][0]

    name = source


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """Return the image files and the other files below a folder, by their suffixes, each in the order of the names.

    Links are followed, but not upwards, and no folder is entered twice; what begins with a dot is left alone.
    """
    images, others = [], []
    entered = {str(parent) for parent in folder.resolve().parents}
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                known = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                (images if known else others).append(os.path.join(path, name))
    return images, others


def find_classes(root: Path, folders: dict[str, str]) -> list[str]:
    """Return the class names below the folders in ``root``, those of "train" and "val", which must agree."""
    val = folders["val"]
    layout = f"expected {root}/train/<class>/<image> and {root / val}/<class>/<image>"
    if not root.is_dir():
        raise UserError(f"there is no data folder {root}; {layout}")
    found = {
        name: sort_classes(entry.name for entry in os.scandir(root / name) if entry.is_dir() and entry.name[0] != ".")
        for name in ("train", val)
        if (root / name).is_dir()
    }
    if val == ".":  # what else is there are classes
        found = {val: found[val]}
    if not found:
        raise UserError(f"the data folder {root} has neither train nor {val} in it; {layout}")
    for name, classes in found.items():
        if not classes:
            raise UserError(f"the folder {root / name} has no class folders in it; {layout}")
    if len(found) == 2 and found["train"] != found[val]:
        train, rest = set(found["train"]), set(found[val])
        differences = [
            f"{len(names)} only in {name} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for name, names in (("train", train - rest), (val, rest - train))
            if names
        ]
        raise UserError(f"the class folders of {root}/train and {root / val} differ: {'; '.join(differences)}")
    return next(iter(found.values()))


def sort_classes(names: Any) -> list[str]:
    """Sort class names; where all are numbers, by number: "10" comes after "9"."""
    names = list(names)
    numbers = all(re.fullmatch(r"[0-9]+", name) for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def read_real_labels(path: str, files: list[str], num_classes: int) -> list[list[int]]:
    """Read ImageNet-ReaL's lists of right labels, one for each of ``files``.

    The lists are in the order of the file names without their folders. Of files that are named as ImageNet's,
    ``ILSVRC2012_val_00000001.JPEG``, a part will do: they are numbered by their names.

    Raises:
        UserError: The file is no such list, or not of these images.
    """
    try:
        lists = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"real_labels: cannot read {path}: {error}") from None
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise UserError(f"real_labels: expected {path} to hold a list of lists of labels, one for each image")
    wrong = [x for labels in lists for x in labels if not isinstance(x, int) or not 0 <= x < num_classes]
    if wrong:
        raise UserError(f"real_labels: {path} has the label {wrong[0]!r}; expected whole numbers below {num_classes}")
    names = [os.path.basename(file) for file in files]
    numbers = [re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", name) for name in names]
    if all(numbers):
        positions = [int(number[1]) - 1 for number in numbers]
    elif len(files) == len(lists) == len(set(names)):
        order = {name: i for i, name in enumerate(sorted(names))}
        positions = [order[name] for name in names]
    else:
        raise UserError(f"real_labels: {path} has labels of {len(lists)} images, but there are {len(files)} images")
    if not all(0 <= position < len(lists) for position in positions):
        raise UserError(f"real_labels: {path} has labels of {len(lists)} images, but there are files of higher numbers")
    return [lists[position] for position in positions]
