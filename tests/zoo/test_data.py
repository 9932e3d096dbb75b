"""Data modules: fixed and disjoint splits, clear errors, and images that cannot be read."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from zoo.data import Digits, ImageFolder, ReportSkipped
from zoo.data.image_folder import MAX_UNREADABLE_IN_A_ROW, ImageFiles, collate_readable
from zoo.errors import UserError
from zoo.task import Classification


class TestDigits:
    def test_split_is_fixed_and_disjoint(self):
        data = Digits(image_size=8)
        train, val = data.train_set.indices, data.val_set.indices
        assert len(val) == 360
        assert sorted([*train, *val]) == list(range(1797))
        digest = hashlib.sha256(np.sort(val).astype("<i8").tobytes()).hexdigest()
        assert digest[:16] == "2fbaae31b8c6aad1"

    def test_no_scan_is_on_both_sides(self):
        data = Digits(image_size=8, channels=1, augment=False)
        sides = [{image.numpy().tobytes() for image, _ in split} for split in (data.train_set, data.val_set)]
        assert not sides[0] & sides[1]

    def test_split_keeps_the_share_of_each_digit(self):
        data = Digits(image_size=8)
        counts = [np.bincount([int(label) for _, label in split]) for split in (data.train_set, data.val_set)]
        np.testing.assert_allclose(counts[1] / 360, counts[0] / 1437, atol=0.003)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_batches(self, channels):
        data = Digits(image_size=32, channels=channels, batch_size=16)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            images, labels = next(iter(loader))
            assert images.shape == (16, channels, 32, 32)
            assert labels.dtype == torch.long
            assert images.min() == -1  # paper
            assert 0.9 < images.max() <= 1  # ink
        images, names = next(iter(data.predict_dataloader()))
        assert names[0] == f"scan {data.val_set.indices[0]:04d}"

    def test_only_training_is_augmented(self):
        data = Digits(image_size=32)
        assert not torch.equal(data.train_set[0][0], data.train_set[0][0])
        assert torch.equal(data.val_set[0][0], data.val_set[0][0])

    def test_wrong_channels(self):
        with pytest.raises(UserError, match="channels: expected 1 or 3, got 2"):
            Digits(channels=2)


@pytest.fixture
def root(tmp_path):
    """A folder of two classes, with six training and four validation images each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path


def break_images(*paths):
    """Leave the first file empty and cut the others in half."""
    for i, path in enumerate(paths):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if i else 0])


def tiny_folder(root, **kwargs):
    return ImageFolder(str(root), batch_size=4, num_workers=kwargs.pop("num_workers", 0), image_size=32, **kwargs)


class Constant(Classification):
    """A classifier too small to take time; it needs no timm model of its own."""

    def __init__(self):
        super().__init__("test_vit", num_classes=2, model_args={"img_size": 32}, label_smoothing=0.0)
        self.model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

    data_config = {"input_size": (3, 32, 32)}  # noqa: RUF012


def tiny_trainer(tmp_path, **kwargs):
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ReportSkipped()], **kwargs,
    )  # fmt: skip


class TestImageFolder:
    def test_classes_and_sizes(self, root):
        data = tiny_folder(root)
        data.setup("fit")
        assert data.classes == ["cat", "dog"]
        assert data.num_classes == 2
        assert [len(data.datasets[split]) for split in ("train", "val")] == [12, 8]
        images, labels = next(iter(data.val_dataloader()))
        assert images.shape == (4, 3, 32, 32)
        assert labels.tolist() == [0, 0, 0, 0]

    def test_validating_needs_no_training_images(self, root):
        for path in (root / "train").rglob("*.jpg"):
            path.unlink()
        data = tiny_folder(root)
        data.setup("validate")
        assert len(data.datasets["val"]) == 8

    def test_transforms_follow_the_model(self, root, tmp_path):
        data = ImageFolder(str(root), batch_size=4, num_workers=0)
        task = Classification("test_vit", num_classes=2)  # its pretrained configuration says 160 x 160
        data.trainer = tiny_trainer(tmp_path)
        data.trainer.strategy._lightning_module = task
        data.setup("validate")
        images, _ = next(iter(data.val_dataloader()))
        assert images.shape[-2:] == (160, 160)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"no data folder .*nowhere; expected .*nowhere/train/<class>/<image>"):
            ImageFolder(str(tmp_path / "nowhere"))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="neither train nor val"):
            ImageFolder(str(tmp_path))
        (tmp_path / "val").mkdir()
        with pytest.raises(UserError, match="val has no class folders"):
            ImageFolder(str(tmp_path))
        (tmp_path / "val" / "cat").mkdir()
        with pytest.raises(UserError, match=r"no images in the class folders of .*val"):
            ImageFolder(str(tmp_path)).setup("validate")

    def test_fit_without_train(self, root):
        for path in sorted((root / "train").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (root / "train").rmdir()
        with pytest.raises(UserError, match=r"no folder .*train"):
            tiny_folder(root).setup("fit")

    def test_classes_differ(self, root):
        (root / "val" / "dog").rename(root / "val" / "emu")
        with pytest.raises(UserError, match=r"differ: 1 only in train \(dog\); 1 only in val \(emu\)"):
            tiny_folder(root)

    def test_broken_training_image_is_replaced_and_named_once(self, root):
        broken = root / "train" / "cat" / "2.jpg"
        break_images(broken)
        data = tiny_folder(root)
        data.setup("fit")
        with pytest.warns(UserWarning, match=r"skipping .*2\.jpg: not a readable image") as caught:
            (image, label), _ = [data.datasets["train"][2] for _ in range(2)]
        assert len(caught) == 1
        assert image.shape == (3, 32, 32)
        assert label == 0
        assert data.datasets["train"].unreadable.tolist() == [i == 2 for i in range(12)]

    def test_broken_validation_images_are_dropped(self, root):
        break_images(root / "val" / "cat" / "0.jpg", root / "val" / "dog" / "3.jpg")
        data = tiny_folder(root)
        data.setup("validate")
        with pytest.warns(UserWarning, match="skipping"):
            batches = list(data.val_dataloader())
        assert [labels.tolist() for _, labels in batches] == [[0, 0, 0], [1, 1, 1]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # each is named once only
            names = [name for _, names in data.predict_dataloader() for name in names]
        assert names[0].endswith("1.jpg")
        assert len(names) == 6

    def test_a_batch_may_be_left_empty(self):
        images, labels = collate_readable([None, None])
        assert len(images) == len(labels) == 0

    def test_nothing_readable_is_an_error(self, root):
        break_images(*(root / "train").rglob("*.jpg"))
        files = ImageFiles(root / "train", ["cat", "dog"], lambda image: image, replace_unreadable=True)
        with (
            pytest.warns(UserWarning, match="skipping"),
            pytest.raises(UserError, match=f"{MAX_UNREADABLE_IN_A_ROW} images in a row"),
        ):
            files[0]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_training_survives_and_reports(self, root, tmp_path, num_workers):
        break_images(*[root / "val" / "cat" / f"{i}.jpg" for i in range(4)], root / "train" / "dog" / "1.jpg")
        trainer = tiny_trainer(tmp_path)
        data = tiny_folder(root, auto_augment=None, random_erasing=0.0, num_workers=num_workers)
        with pytest.warns(UserWarning, match="skipped") as caught:
            trainer.fit(Constant(), data)
        reports = [str(w.message) for w in caught if "could not be read and were skipped" in str(w.message)]
        assert reports == [
            f"4 of the 8 images in {root}/val could not be read and were skipped",  # the whole first batch
            f"1 of the 12 images in {root}/train could not be read and were skipped",
        ]
        assert trainer.callback_metrics["val_skipped_images"] == 4
        assert trainer.callback_metrics["train_skipped_images"] == 1
        assert torch.isfinite(trainer.callback_metrics["val_loss"])
