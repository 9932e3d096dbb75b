"""Evaluation: figures against torchmetrics' own, exactness under several processes, and agreement with timm."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torchmetrics.functional.classification import multiclass_calibration_error

from golden_cases import fill_state_dict
from zoo.cli import main
from zoo.data import ImageFolder, ReportSkipped
from zoo.data.image_folder import read_real_labels
from zoo.errors import UserError
from zoo.evaluation import CalibrationError, CrossEntropy, Evaluation, Mean, WritePredictions
from zoo.task import Classification

CLASSES = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An ImageNet-style validation folder of 23 images in 7 classes, of all sorts of sizes, modes and formats."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for i in range(23):
        folder = root / "val" / f"n{i % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(30, 200, 2)
        image = Image.fromarray(generator.integers(0, 255, (6, 7, 3), dtype=np.uint8)).resize((width, height))
        image = image.convert(("RGB", "RGB", "L", "CMYK")[i % 4])
        image.save(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG", quality=85)
    return root


@pytest.fixture(scope="module")
def task():
    """A small DiNAT with the weights of the golden cases."""
    task = Classification("test_dinat", num_classes=CLASSES)
    state = task.model.state_dict()
    entries = {k: {"shape": v.shape, "dtype": str(v.dtype).removeprefix("torch.")} for k, v in state.items()}
    task.model.load_state_dict(fill_state_dict(entries), strict=False)
    return task.eval()


def make_trainer(folder, **kwargs):
    options = dict(accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(logger=CSVLogger(folder, name=None, version="run"), **{**options, **kwargs})


def validate(task, root, folder, **kwargs):
    data = ImageFolder(str(root), batch_size=4, num_workers=0, **kwargs)
    trainer = make_trainer(folder)
    [metrics] = trainer.validate(task, data, verbose=False)
    return metrics, folder / "run", trainer, data


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_equal_those_of_timms_loaders(task, root, tmp_path):
    metrics, _, trainer, data = validate(task, root, tmp_path)
    batches = trainer.predict(task, data)
    names = [name for batch in batches for name in batch["name"]]

    dataset = create_dataset("", str(root / "val"))
    config = resolve_data_config({}, model=task.model)
    loader = create_loader(
        dataset, **{k: config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
        batch_size=4, use_prefetcher=False, num_workers=0, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    with torch.inference_mode():
        logits, labels = zip(*[(task.model(images), labels) for images, labels in loader])
    logits, labels = torch.cat(logits), torch.cat(labels)
    assert names == dataset.filenames(absolute=True)
    torch.testing.assert_close(torch.cat([b["probabilities"] for b in batches]), logits.softmax(-1), rtol=0, atol=0)
    assert metrics["val_top1"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item(), abs=1e-7)
    top5 = timm.utils.accuracy(logits, labels, topk=(1, 5))[1].item() / 100
    assert metrics["val_top5"] == pytest.approx(top5, abs=1e-7)
    assert metrics["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)
    ece = multiclass_calibration_error(logits, labels, CLASSES, n_bins=15)
    assert metrics["val_ece"] == pytest.approx(ece.item(), abs=1e-6)


def test_tables(task, root, tmp_path):
    metrics, folder, trainer, data = validate(task, root, tmp_path)
    answers = torch.cat([batch["label"] for batch in trainer.predict(task, data)]).tolist()
    labels = data.datasets["val"].labels
    confusion = read(folder / "val_confusion.csv")
    assert [row["class"] for row in confusion] == data.classes
    for label, row in enumerate(confusion):
        for answer, name in enumerate(data.classes):
            assert int(row[name]) == sum(pair == (label, answer) for pair in zip(labels, answers))
    table = read(folder / "val_classes.csv")
    assert sum(int(row["right"]) for row in table) == round(metrics["val_top1"] * 23)
    for label, row in enumerate(table):
        mine = [answer for answer, true in zip(answers, labels) if true == label]
        assert (int(row["label"]), row["class"], int(row["images"])) == (label, data.classes[label], len(mine))
        assert float(row["accuracy"]) == pytest.approx(mine.count(label) / len(mine), abs=1e-4)
        wrong = [answer for answer in mine if answer != label]
        assert int(row["times"]) == max((wrong.count(answer) for answer in wrong), default=0)
        assert row["taken_for"] in [data.classes[answer] for answer in wrong] + [""] * (not wrong)
        if label in answers:
            assert float(row["precision"]) == pytest.approx(mine.count(label) / answers.count(label), abs=1e-4)


def test_real_labels(task, root, tmp_path):
    """Lists are in the order of the files' numbers, which is not that of the classes; empty lists do not count."""
    _, _, trainer, data = validate(task, root, tmp_path)
    batches = trainer.predict(task, data)
    numbers = [int(name[-13:-5]) - 1 for batch in batches for name in batch["name"]]
    ranked = torch.cat([b["probabilities"] for b in batches]).topk(5).indices.tolist()
    right = [[] for _ in range(23)]
    for number, answers in list(zip(numbers, ranked))[:10]:
        right[number] = [answers[0], 6] if number % 2 else [answers[3]]
    odd = sum(number % 2 for number in numbers[:10])
    assert 0 < odd < 10
    path = tmp_path / "real.json"
    path.write_text(json.dumps(right))
    metrics, _, _, _ = validate(task, root, tmp_path, real_labels=str(path))
    assert metrics["val_real_top1"] == pytest.approx(odd / 10)
    assert metrics["val_real_top5"] == 1
    assert 0 < metrics["val_top5"] < 1

    assert read_real_labels(str(path), ["b/2.png", "a/3.png", *map(str, range(4, 25))], 7)[0] == right[10]
    for content, message in (("[1]", "a list of lists"), ("[[7]]", "the label 7; expected"), ("{", "cannot read"),
                             ("[[]]", "labels of 1 images")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=f"real_labels: .*{message}"):
            read_real_labels(str(path), ["x/1.png", "y/2.png"], 7)


def test_two_processes_give_the_numbers_of_one(task, root, tmp_path):
    """Five batches for two processes, the last not full, and a whole batch of unreadable images."""
    shutil.copytree(root, tmp_path / "data")
    folder = tmp_path / "data" / "val" / "n00000001"
    for path in folder.iterdir():
        path.write_bytes(b"")
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[i % CLASSES, (i + 3) % CLASSES] if i % 3 else [] for i in range(23)]))
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        data = ImageFolder(
            str(tmp_path / "data"), batch_size=5, num_workers=0, max_unreadable=1.0, real_labels=str(real)
        )
        to = tmp_path / f"{devices}"
        trainer = make_trainer(to, devices=devices, strategy=strategy, callbacks=[ReportSkipped()])
        [metrics] = trainer.validate(task, data, verbose=False)
        trainer = make_trainer(
            to, devices=devices, strategy=strategy, callbacks=[WritePredictions(to / "predictions.json")]
        )
        trainer.predict(task, data, return_predictions=False)
        found.append((metrics, {path.name: path.read_text() for path in to.rglob("*.*") if path.suffix != ".yaml"}))
    (one, files), (two, others) = found
    assert {"val_top1", "val_top5", "val_ece", "val_loss", "val_real_top1", "val_skipped_images"} <= set(one)
    assert one["val_skipped_images"] == 4
    assert one == two  # to the last bit
    assert {"unreadable.csv", "val_classes.csv", "val_confusion.csv", "predictions.json"} <= set(files)
    assert len(json.loads(files["predictions.json"])) == 19
    assert files == others


class TestPredict:
    """`zoo predict IMAGES`."""

    def test_writes_all_images(self, task, root, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        trainer = make_trainer(tmp_path)
        data = ImageFolder(str(root), batch_size=4, num_workers=0)
        trainer.validate(task, data, verbose=False)
        expected = [float(p) for batch in trainer.predict(task, data) for p in batch["probability"]]
        trainer.save_checkpoint("trained.ckpt")
        (tmp_path / "empty.jpg").write_bytes(b"")
        images = [str(root / "val"), "empty.jpg"]
        for output in ("out.csv", "deep/out.json"):
            arguments = ["predict", *images, "--checkpoint", "trained.ckpt", "--output", output, "--num-workers", "0"]
            with pytest.warns(UserWarning, match="skipping empty.jpg"):
                assert main([*arguments, "--batch-size", "4"]) == 0
            assert f"predictions: {output}" in capsys.readouterr().out
        rows = json.loads((tmp_path / "deep" / "out.json").read_text())
        assert [row["name"] for row in rows] == [path for path, _ in data.datasets["val"].samples]
        assert all(row["class"] == data.classes[row["label"]] for row in rows)
        assert [row["probability"] for row in rows] == pytest.approx(expected, abs=1e-4)
        assert [{k: str(v) for k, v in row.items()} for row in rows] == read(tmp_path / "out.csv")
        assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out.json"]  # nothing half written

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "there is no folder or image nowhere"),
            (["."], "there are no images in"),
            (["x.jpg", "--output", "x.txt"], "predictions go to a .csv or .json file, not to x.txt"),
            ([".", "--batch-size", "0"], "batch_size: expected 1 or more, got 0"),
            ([".", "--num-workers", "-1"], "num_workers: expected 0 or more, got -1"),
            ([".", "--model", "resnet18.nope"], "timm knows no weights 'resnet18.nope'"),
        ],
    )
    def test_errors(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert main(["predict", *arguments[:1], "--model", "test_dinat", *arguments[1:]]) == 2
        assert message in capsys.readouterr().err


class TestFigures:
    def test_calibration_error_equals_torchmetrics(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(1000, CLASSES, generator=generator) * 3
        labels = torch.randint(CLASSES, (1000,), generator=generator)
        logits[:50] = 20 * torch.nn.functional.one_hot(labels[:50], CLASSES)  # a confidence of 1
        metric = CalibrationError()
        for part in (slice(0, 7), slice(7, 400), slice(400, None)):
            metric.update(logits[part], labels[part])
        expected = multiclass_calibration_error(logits, labels, CLASSES, n_bins=15)
        assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-6)

    def test_sums_do_not_depend_on_order(self):
        values = torch.randn(999, generator=torch.Generator().manual_seed(0)) * 5
        results = []
        for order in (values, values.flip(0), values.sort().values):
            mean = Mean()
            for part in order.split(10):
                mean.update(part)
            results.append(mean.compute())
        assert len(set(map(float, results))) == 1
        assert float(results[0]) == pytest.approx(values.double().mean().item(), abs=1e-7)

    def test_nan_is_not_hidden(self):
        loss = CrossEntropy()
        loss.update(torch.tensor([[0.0, torch.nan], [1.0, 2.0]]), torch.tensor([0, 1]))
        assert loss.compute().isnan()

    def test_what_is_no_image_does_not_count(self):
        evaluation = Evaluation(3, "val_")
        logits = torch.eye(3)
        evaluation.update(logits, torch.tensor([0, -100, 0]))
        evaluation.update(logits[:1], torch.tensor([-100]))
        assert evaluation.figures.compute()["val_top1"] == 0.5
        assert evaluation.confusion.compute().sum() == 2
