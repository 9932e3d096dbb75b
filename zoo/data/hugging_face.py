"""Labelled images in the format of Hugging Face's datasets."""

from typing import Any

from zoo.data.loading import ImageData, Images, expect_classes, import_extra
from zoo.errors import UserError


class HuggingFace(ImageData):
    """A data set of the Hugging Face hub, or one from local files; needs ``pip install 'attn-zoo[datasets]'``.

    The column of labels must be of the type ``ClassLabel``, which names the classes.

    Args:
        path: What ``datasets.load_dataset`` takes: a name on the hub, "imagefolder" or "parquet" (with
            ``load_args``), or else a folder that ``save_to_disk`` wrote.
        train: The split to train on.
        val: The split for validation.
        test: The split for ``zoo test``; by default that for validation.
        image: The column of images.
        label: The column of labels.
        load_args: Further arguments of ``datasets.load_dataset``, such as ``name``, ``data_dir`` or ``data_files``.
        kwargs: See :class:`ImageData`.
    """

    def __init__(
        self,
        path: str,
        train: str = "train",
        val: str = "validation",
        test: str | None = None,
        image: str = "image",
        label: str = "label",
        load_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.splits = {"train": train, "val": val, "test": val if test is None else test, "predict": val}
        self.image = image
        self.label = label
        self.load_args = load_args or {}
        # Now, because the model's head is built from it.
        self.classes = expect_classes(self._open("val").features[label].names, path)

    def _open(self, split: str) -> Any:
        datasets = import_extra("datasets", "datasets")
        try:
            try:
                data = datasets.load_from_disk(self.path)
            except FileNotFoundError:
                data = datasets.load_dataset(self.path, **self.load_args)
        except (OSError, ValueError, ConnectionError) as error:
            raise UserError(f"path: cannot load the data set {self.path!r}: {error}") from None
        name = self.splits[split]
        if name not in data:
            raise UserError(f"{self.path} has no split {name!r}; it has {', '.join(map(repr, data))}")
        data = data[name]
        for argument, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
            column = getattr(self, argument)
            if not isinstance(data.features.get(column), kind):
                columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in data.features.items())
                raise UserError(
                    f"{argument}: {self.path} has no column {column!r} of type {kind.__name__}; it has {columns}"
                )
        return data.cast_column(self.image, datasets.Image(decode=False))

    def make_images(self, split: str, **kwargs: Any) -> "Rows":
        rows = Rows(self._open(split), self.image, self.label, f"{self.path} ({self.splits[split]})", **kwargs)
        unlabelled = sum(label < 0 for label in rows.labels)  # as hidden answers are published
        if unlabelled and split != "predict":
            raise UserError(
                f"{split}: {unlabelled} of the {len(rows.labels)} rows of {rows.where} have no label (null or -1); "
                "take another split"
            )
        return rows


class Rows(Images):
    """The rows of a data set, whose images are files or the bytes of such."""

    def __init__(self, data: Any, image: str, label: str, where: str, **kwargs: Any) -> None:
        super().__init__([-1 if x is None else x for x in data[label][:]], where, **kwargs)
        self.images = data.select_columns([image])
        self.column = image

    def source(self, index: int) -> str | bytes:
        held = self.images[index][self.column]
        return held["path"] if held["bytes"] is None else held["bytes"]

    def name(self, index: int) -> str:
        return f"row {index}"
