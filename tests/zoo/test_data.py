"""Data modules: fixed and disjoint splits, clear errors, and images that cannot be read."""

import csv
import hashlib
import os

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageOps
from torch import nn

from hostile import make_hostile_folder
from zoo.data import Digits, ImageFolder, PlainFolder, ReportSkipped, read_image
from zoo.data.loading import IGNORE, WholeBatches
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
        for name in ("cat", "dog"):
            (tmp_path / "val" / name).mkdir()
        with pytest.raises(UserError, match=r"no images in .*val; expected files in"):
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
        data = tiny_folder(root, max_unreadable=1)
        data.setup("fit")
        with pytest.warns(
            UserWarning, match=r"skipping .*2\.jpg: not a readable image \(the file is empty\)"
        ) as caught:
            batches = [batch for _ in range(2) for batch in data.train_dataloader()]
        assert len(caught) == 1
        assert [len(images) for images, _ in batches] == [4] * 6
        image, label = data.datasets["train"][2]
        assert image.shape == (3, 32, 32)
        assert label == 0
        assert list(data.datasets["train"].unreadable) == [str(broken)]

    def test_broken_validation_images_are_dropped(self, root):
        break_images(root / "val" / "cat" / "0.jpg", root / "val" / "dog" / "3.jpg")
        data = tiny_folder(root, max_unreadable=2)
        data.setup("validate")
        with pytest.warns(UserWarning, match="skipping"):
            batches = list(data.val_dataloader())
        assert [labels.tolist() for _, labels in batches] == [[0, 0, 0], [1, 1, 1]]
        data.setup("predict")
        names = [name for _, names in data.predict_dataloader() for name in names]
        assert names[0].endswith("1.jpg")
        assert len(names) == 6

    @pytest.mark.parametrize(("budget", "allowed"), [(1, 1), (0.3, 3), (0, 0), (1.0, 7)])
    def test_too_many_broken_images_end_the_run(self, root, budget, allowed):
        break_images(*(root / "val").rglob("*.jpg"))
        data = tiny_folder(root, max_unreadable=budget)
        data.batch_size = 1
        data.setup("validate")
        message = rf"{allowed + 1} of the 8 images in .*val could not be read, and max_unreadable allows {allowed}; the"
        with pytest.warns(UserWarning, match="skipping"), pytest.raises(UserError, match=message):
            list(data.val_dataloader())

    def test_nothing_readable_ends_training(self, root):
        break_images(*(root / "train").rglob("*.jpg"))
        data = tiny_folder(root, max_unreadable=1.0, num_workers=1)
        data.setup("fit")
        with pytest.warns(UserWarning, match="skipping"), pytest.raises(UserError, match="12 of the 12 images"):
            next(iter(data.train_dataloader()))

    @pytest.mark.parametrize("policy", ["rand-m10-inc1", "original"])
    def test_augmentation_may_leave_no_bits(self, root, policy):
        """Pillow 13 refuses what timm's posterize asks at its strongest."""
        transform = tiny_folder(root, auto_augment=policy).make_transform(training=True)
        [step] = [step for step in transform.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
        ops = step.ops if hasattr(step, "ops") else [op for group in step.policy for op in group]
        ops = [op for op in ops if op.name.startswith("Posterize")]
        assert ops
        for op in ops:
            op.prob, op.magnitude, op.magnitude_std, op.level_fn = 1.0, 10, 0, lambda *_: (0,)
            assert op(Image.new("RGB", (2, 2), "white")).getpixel((0, 0)) == (0, 0, 0)

    @pytest.mark.parametrize("budget", [-1, 1.5])
    def test_bad_budget(self, root, budget):
        with pytest.raises(UserError, match=f"max_unreadable: expected .*, got {budget}"):
            tiny_folder(root, max_unreadable=budget)

    @pytest.mark.parametrize(
        ("option", "value"), [("batch_size", -2), ("num_workers", -1), ("image_size", 0), ("auto_augment", "nonsense")]
    )
    def test_bad_values(self, root, option, value):
        with pytest.raises(UserError, match=f"{option}: .*{value}"):
            ImageFolder(str(root), **{option: value})

    def test_one_class(self, tmp_path):
        (tmp_path / "val" / "cat").mkdir(parents=True)
        with pytest.raises(UserError, match=f"{tmp_path}: 1 class; expected 2 or more"):
            tiny_folder(tmp_path)

    def test_classes_of_numbers_are_in_their_order(self, tmp_path):
        """ImageNet-V2: its folders are 0 to 999, in the root itself."""
        for label in range(12):
            (tmp_path / str(label)).mkdir()
            Image.new("RGB", (8, 8), (20 * label, 0, 0)).save(tmp_path / str(label) / "x.png")
        data = tiny_folder(tmp_path, val=".")
        assert data.classes == [str(label) for label in range(12)]
        data.setup("validate")
        assert [label for _, label in data.datasets["val"]] == list(range(12))
        reds = [image[0].mean() for image, _ in data.datasets["val"]]
        assert reds == sorted(reds)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_training_survives_and_reports(self, root, tmp_path, num_workers):
        break_images(*[root / "val" / "cat" / f"{i}.jpg" for i in range(4)], root / "train" / "dog" / "1.jpg")
        trainer = tiny_trainer(tmp_path)
        data = tiny_folder(root, auto_augment=None, random_erasing=0.0, num_workers=num_workers, max_unreadable=0.5)
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


class TestWholeBatches:
    @pytest.mark.parametrize("length", [1, 3, 4, 11, 12, 13, 25])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_each_image_once_in_the_same_batches(self, length, world_size):
        dealt = [list(WholeBatches(length, 4, rank, world_size)) for rank in range(world_size)]
        batches = [[part[i : i + 4] for i in range(0, len(part), 4)] for part in dealt]
        assert len({len(part) for part in batches}) == 1  # the model runs equally often everywhere
        whole = [batch for turn in zip(*batches, strict=True) for batch in turn if batch != [-1]]
        assert whole == [list(range(i, min(i + 4, length))) for i in range(0, length, 4)]


class TestReading:
    """Pixels of unusual images, as colours of 8 bits."""

    def read(self, tmp_path, image, name="x.png", **kwargs):
        image.save(tmp_path / name, **kwargs)
        return read_image(tmp_path / name)

    def pixel(self, *args, **kwargs):
        image = self.read(*args, **kwargs)
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_16_bits_are_scaled(self, tmp_path, suffix):
        values = np.array([[0, 128 * 257, 65535]], np.uint16)
        image = self.read(tmp_path, Image.fromarray(values), f"x.{suffix}")
        assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]

    @pytest.mark.parametrize(("white", "dtype"), [(1.0, "f4"), (255.0, "f4"), (65535, "i4"), (10**6, "i4")])
    def test_white_of_32_bits(self, tmp_path, white, dtype):
        values = np.array([[0, white / 5, white]]).astype(dtype)
        image = self.read(tmp_path, Image.fromarray(values), "x.tif")
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 51, 255]

    def test_transparent_is_white(self, tmp_path):
        assert self.pixel(tmp_path, Image.new("RGBA", (2, 2), (9, 9, 9, 0))) == (255, 255, 255)
        assert self.pixel(tmp_path, Image.new("LA", (2, 2), (0, 51))) == (204, 204, 204)
        palette = Image.new("P", (2, 2), 1)
        palette.putpalette([9, 9, 9, 7, 8, 9])
        assert self.pixel(tmp_path, palette) == (7, 8, 9)
        assert self.pixel(tmp_path, palette, transparency=1) == (255, 255, 255)

    def test_animation_begins(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        assert self.pixel(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:]) == (255, 0, 0)

    def test_cmyk(self, tmp_path):
        assert self.pixel(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.tif") == (255, 0, 0)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_upright(self, tmp_path, orientation):
        image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened))
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png")), expected)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png", upright=False)), np.asarray(image))

    def test_long_image_is_cut_to_the_middle(self, tmp_path):
        image = Image.new("L", (20_000, 2))
        image.putpixel((10_000, 0), 255)
        image = self.read(tmp_path, image)
        assert image.size == (64, 2)
        assert image.getpixel((32, 0)) == (255, 255, 255)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    return root, make_hostile_folder(root / "val" / "all sorts")


class TestHostileFolder:
    """Over 40 kinds of broken and odd files: none ends a run, each broken one is named."""

    def test_validating(self, hostile, tmp_path):
        root, kinds = hostile
        assert len(kinds) >= 40
        broken = {path for path, is_broken in kinds.items() if is_broken}
        assert len(broken) >= 20
        (root / "val" / "dogs").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(root / "val" / "dogs" / "dog.png")
        data = tiny_folder(root, num_workers=1, max_unreadable=1.0)
        trainer = Trainer(
            accelerator="cpu", logger=CSVLogger(tmp_path), enable_progress_bar=False, callbacks=[ReportSkipped()]
        )
        with pytest.warns(UserWarning, match="skipping") as caught:
            [metrics] = trainer.validate(Constant(), data, verbose=False)
        assert metrics["val_skipped_images"] == len(broken)
        assert torch.isfinite(torch.tensor(metrics["val_loss"]))
        with open(f"{trainer.log_dir}/val_classes.csv") as file:
            assert int(next(csv.DictReader(file))["images"]) == len(kinds) - len(broken)

        with open(f"{trainer.log_dir}/unreadable.csv", newline="", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        assert {os.path.basename(row["name"]) for row in rows} == broken
        assert all(row["problem"] for row in rows)
        named = "\n".join(str(w.message) for w in caught)
        for path in broken:
            assert (path if path.isprintable() else repr(path)[1:-1]) in named

    def test_training(self, hostile):
        root, kinds = hostile
        data = ImageFolder(str(root), batch_size=8, num_workers=0, image_size=32, max_unreadable=1.0)
        data.folders["train"] = "val"
        data.setup("fit")
        with pytest.warns(UserWarning, match="skipping"):
            batches = list(data.train_dataloader())
        assert len(batches) == len(data.datasets["train"]) // 8
        assert all(images.isfinite().all() for images, _ in batches)

    def test_plain_folder_names_all(self, hostile):
        root, kinds = hostile
        data = PlainFolder(str(root), batch_size=16, num_workers=0, image_size=32, max_unreadable=1.0)
        data.setup("predict")
        with pytest.warns(UserWarning, match="skipping"):
            names = [os.path.basename(name) for _, names in data.predict_dataloader() for name in names]
        assert set(names) - {"dog.png"} == {path for path, is_broken in kinds.items() if not is_broken}

    def test_a_batch_of_nothing(self, root):
        break_images(*sorted((root / "val").rglob("*.jpg"))[:4])
        data = tiny_folder(root, max_unreadable=0.9)
        data.setup("validate")
        with pytest.warns(UserWarning, match="skipping"):
            labels = [labels.tolist() for _, labels in data.val_dataloader()]
        assert labels == [[IGNORE], [1, 1, 1, 1]]
