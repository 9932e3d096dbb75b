"""The same images from folders, Hugging Face datasets, WebDataset shards and CIFAR's files."""

import io
import pickle
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from zoo.data import CIFAR10, CIFAR100, HuggingFace, ImageFolder, WebDataset
from zoo.data.web_dataset import StreamLoader
from zoo.errors import UserError

SMALL = dict(batch_size=4, num_workers=0, image_size=32, auto_augment=None, random_erasing=0.0)


@pytest.fixture(scope="module")
def images():
    """Ten images as JPEG files, of which one is broken, and their labels."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(10):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(file, "JPEG")
        contents.append(file.getvalue())
    contents[5] = contents[5][:100]
    return contents, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    """What the folder gives of the nine."""
    root = tmp_path_factory.mktemp("folder")
    for i, (content, label) in enumerate(zip(*images)):
        folder = root / "val" / ("cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(content)
    return load(ImageFolder(str(root), max_unreadable=1, **SMALL))


def load(data, stage="validate"):
    data.setup(stage)
    with pytest.warns(UserWarning, match="skipping .*not a readable image"):
        batches = list(data.val_dataloader() if stage == "validate" else data.predict_dataloader())
    return torch.cat([images for images, _ in batches]), [int(label) for _, labels in batches for label in labels]


def same(found, expected):
    assert found[1] == expected[1] == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    return torch.equal(found[0], expected[0])


class TestHuggingFace:
    @pytest.fixture(scope="class")
    def saved(self, images, tmp_path_factory):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        contents, labels = images
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": labels}
        data = datasets.Dataset.from_dict(rows, features=features)
        folder = tmp_path_factory.mktemp("saved")
        datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(str(folder))
        return str(folder)

    def test_equals_the_folder(self, saved, expected):
        data = HuggingFace(saved, max_unreadable=1, **SMALL)
        assert data.classes == ["cat", "dog"]
        assert same(load(data), expected)
        assert data.datasets["val"].unreadable.keys() == {"row 5"}

    def test_trains(self, saved):
        data = HuggingFace(saved, max_unreadable=1, **SMALL)
        data.setup("fit")
        with pytest.warns(UserWarning, match="skipping row 5"):
            assert [len(labels) for _, labels in data.train_dataloader()] == [4, 4]

    @pytest.mark.parametrize("hidden", [-1, None])
    def test_hidden_labels(self, images, hidden, tmp_path):
        """Splits whose answers are kept back can be predicted, but measure nothing."""
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        rows = {"image": [{"bytes": x, "path": None} for x in images[0][:3]], "label": [0, hidden, hidden]}
        data = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict({"validation": data}).save_to_disk(str(tmp_path))
        data = HuggingFace(str(tmp_path), **SMALL)
        with pytest.raises(UserError, match=r"val: 2 of the 3 rows of .* \(validation\) have no label"):
            data.setup("validate")
        data.setup("predict")
        assert [len(images) for images, _ in data.predict_dataloader()] == [3]

    def test_errors(self, saved, monkeypatch, tmp_path):
        with pytest.raises(UserError, match="no split 'test'; it has 'train', 'validation'"):
            HuggingFace(saved, val="test")
        with pytest.raises(UserError, match="no column 'img' of type Image; it has image"):
            HuggingFace(saved, image="img")
        with pytest.raises(UserError, match="cannot load the data set"):
            HuggingFace(str(tmp_path / "nowhere"))
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"needs the package datasets: pip install 'attn-zoo\[datasets\]'"):
            HuggingFace(saved)


class TestWebDataset:
    @pytest.fixture(scope="class")
    def shards(self, images, tmp_path_factory):
        folder = tmp_path_factory.mktemp("shards")
        for shard in range(2):
            with tarfile.open(folder / f"val-{shard}.tar", "w") as tar:
                for i in range(5 * shard, 5 * shard + 5):
                    for name, content in ((f"{i}.jpg", images[0][i]), (f"{i}.cls", str(images[1][i]).encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        return folder

    def data(self, shards, **kwargs):
        pattern = f"{shards}/val-{{0..1}}.tar"
        options = dict(val=pattern, val_images=10, classes=2, train=pattern, train_images=20, max_unreadable=0.5)
        return WebDataset(**{**SMALL, **options, **kwargs})

    def test_equals_the_folder(self, shards, expected):
        data = self.data(shards)
        assert same(load(data), expected)
        assert [name.rpartition("/")[2] for name in data.datasets["val"].unreadable] == ["5"]

    @pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 1), (3, 0), (2, 2)])
    def test_each_image_once(self, shards, expected, world_size, workers):
        parts = []
        for rank in range(world_size):
            data = self.data(shards, batch_size=2)
            data.setup("validate")
            stream = data.datasets["val"]
            stream.rank, stream.world_size = rank, world_size
            loader = StreamLoader(stream, batch_size=None, collate_fn=stream.as_it_is, num_workers=workers)
            batches = [batch for batch, _ in DataLoader.__iter__(loader)]
            assert len(batches) == len(loader) == -(-5 // world_size)
            parts.append(batches)
        dealt = [(images, labels) for turn in zip(*parts) for images, labels in turn if labels[0] >= 0]
        assert torch.equal(torch.cat([images for images, _ in dealt]), expected[0])

    def test_trains_without_end(self, shards):
        data = self.data(shards, buffer=5)
        data.setup("fit")
        loader = data.train_dataloader()
        with pytest.warns(UserWarning, match=r"skipping .*val-1\.tar/5"):
            epochs = [torch.cat([images for images, _ in loader]) for _ in range(2)]
        assert [len(epoch) for epoch in epochs] == [20, 20]
        assert not torch.equal(*epochs)

    def test_truncated_shard(self, shards, tmp_path):
        for shard in range(2):
            content = (shards / f"val-{shard}.tar").read_bytes()
            (tmp_path / f"val-{shard}.tar").write_bytes(content[: len(content) // 2] if shard else content)
        data = self.data(tmp_path)
        data.setup("validate")
        with pytest.raises(UserError, match=r"holds \d images, but 10 were to be expected"):
            list(data.val_dataloader())
        data = self.data(tmp_path, buffer=3)
        data.setup("fit")
        with pytest.warns(UserWarning, match=r"skipping .*val-1\.tar: not a readable image \(ReadError"):
            assert sum(len(labels) for _, labels in data.train_dataloader()) == 20

    def test_errors(self, shards, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="classes: expected a number, or a text file"):
            self.data(shards, classes="nowhere.txt")
        with pytest.raises(UserError, match="classes 0: 0 classes; expected 2 or more"):
            self.data(shards, classes=0)
        names = tmp_path / "names.txt"
        names.write_text("cat\ndog\n")
        assert self.data(shards, classes=str(names)).classes == ["cat", "dog"]
        with pytest.raises(UserError, match=r"2 of the 2 shards .* are not there \(first: .*val-0\.tar\)"):
            self.data(tmp_path).setup("validate")
        with pytest.raises(UserError, match="training needs train, the shards"):
            self.data(shards, train_images=None).setup("fit")
        monkeypatch.setitem(sys.modules, "webdataset", None)
        with pytest.raises(UserError, match=r"needs the package webdataset: pip install 'attn-zoo\[webdataset\]'"):
            self.data(shards).setup("validate")


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
def test_cifar(source, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no CIFAR.* --data.download true fetches it"):
        source(str(tmp_path))
    folder = tmp_path / source.source.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3072), dtype=np.uint8)
    key = "labels" if source is CIFAR10 else "fine_labels"
    for name, _ in source.source.train_list + source.source.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [0, 1, 2, 3]}))
    meta = source.source.meta
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: list("abcd")}))
    monkeypatch.setattr(source.source, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = source(str(tmp_path), **SMALL)
    assert data.classes == list("abcd")
    data.setup("fit")
    assert len(data.datasets["train"]) == 4 * len(source.source.train_list)
    [(batch, labels)] = data.val_dataloader()
    assert batch.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]
