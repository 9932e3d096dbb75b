"""The flow task, ``zoo sample`` and the judging of samples, on tiny models."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.cli import main
from zoo.data import Digits
from zoo.errors import UserError
from zoo.flow import RectifiedFlow
from zoo.judge import frechet_distance, judge_digits, nearest
from zoo.sample import load_pipeline, sample

TINY = dict(sample_size=8, in_channels=1, patch_size=2, dim=16, depth=1, num_heads=2, dilations=[1])


def make_task(**kwargs):
    torch.manual_seed(0)
    return RectifiedFlow(**{"num_classes": 3, "denoiser": TINY, "lr": 5e-3, **kwargs})


def blank_images(count):
    """`count` images of each of three classes, which differ in brightness alone, in one batch."""
    labels = torch.arange(3).repeat(count)
    images = (labels - 1.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    return DataLoader(TensorDataset(images, labels), batch_size=3 * count)


def make_trainer(**kwargs):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(accelerator="cpu", **quiet, **kwargs)


def fit(task, steps, **kwargs):
    make_trainer(max_steps=steps, **kwargs).fit(task, blank_images(8))


def validate(task):
    [metrics] = make_trainer().validate(task, blank_images(64), verbose=False)
    return metrics["val_loss"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of the packaged recipe, cut short."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["--config", "digits/flow", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]
        arguments += ["--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false"]
        arguments += ["--trainer.check_val_every_n_epoch", "1", f"--model.denoiser={json.dumps(TINY)}"]
        assert main(["fit", *arguments]) == 0
    return folder / "runs" / "digits-flow" / "version_0"


class TestTraining:
    def test_loss_falls_and_classes_are_learnt(self):
        task = make_task(ema_decay=0.9)
        before = validate(task)
        fit(task, 150)
        after = validate(task)
        assert before > 1.5
        assert after < 0.3 * before
        means = sample(task.pipeline(), [0, 1, 2], steps=10, guidance=1.0, seed=0).mean((1, 2, 3))
        torch.testing.assert_close(means, torch.tensor([0, 0.5, 1]), rtol=0, atol=0.2)

    def test_loss_of_the_true_velocity_is_zero(self):
        task = make_task()
        images, noise = torch.randn(2, 4, 1, 8, 8)
        level = torch.rand(4)

        def denoiser(x, noise_level, labels):
            assert torch.allclose(x, images + level.view(-1, 1, 1, 1) * (noise - images), atol=1e-6)
            return type("Output", (), {"sample": noise - images})

        assert task.flow_loss(denoiser, images, noise, level, torch.zeros(4)) == 0

    @pytest.mark.parametrize(("share", "expected"), [(0.0, {0, 1, 2}), (1.0, {3})])
    def test_label_dropout(self, share, expected):
        task = make_task(label_dropout=share)
        seen = []
        task.denoiser.register_forward_pre_hook(lambda module, args: seen.extend(args[2].tolist()))
        fit(task, 3)
        assert set(seen) == expected

    def test_average_follows_the_weights(self):
        task = make_task(ema_decay=0.5)
        weights = []
        torch.nn.init.normal_(task.denoiser.head.weight)
        step = task.optimizer_step

        def recorded(*args, **kwargs):
            step(*args, **kwargs)
            weights.append(task.denoiser.head.weight.detach().clone())

        task.optimizer_step = recorded
        fit(task, 3)
        expected = weights[0]
        for count, value in enumerate(weights[1:], 1):
            decay = min(0.5, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(task.ema.head.weight, expected)
        assert not torch.equal(task.ema.head.weight, weights[-1])
        assert not any(parameter.requires_grad for parameter in task.ema.parameters())

    def test_average_waits_for_accumulated_gradients(self):
        task = make_task()
        fit(task, 2, accumulate_grad_batches=3)
        assert task.average.n_averaged == 2

    def test_validation_repeats(self):
        task = make_task()
        fit(task, 3)
        losses = [validate(task) for _ in range(2)]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"label_dropout": 1.5}, "label_dropout: expected 0 to 1, got 1.5"),
            ({"ema_decay": 1.0}, "ema_decay: expected 0 up to but not 1, got 1.0"),
            ({"denoiser": {**TINY, "num_heads": 3}}, "denoiser: dim must be"),
            ({"denoiser": {"heads": 3}}, "denoiser: .*'heads'"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(UserError, match=message):
            make_task(**kwargs)


class TestRun:
    def test_leaves_a_pipeline_like_its_checkpoint(self, run):
        labels = list(range(10))
        images = [
            sample(load_pipeline(source), labels, steps=3, guidance=1.5, seed=0)
            for source in (run, run / "pipeline", run / "checkpoints" / "last.ckpt")
        ]
        assert images[0].shape == (10, 1, 8, 8)
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2])

    def test_logs_losses_and_samples(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"train_loss_epoch", "val_loss"} <= set(header)
        folder = next((run.parents[1] / "tensorboard").rglob("events.out.*")).parent
        events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images("samples")
        assert [event.step for event in events] == [2, 4]
        assert (events[0].width, events[0].height) == (10 * 9 + 1, 4 * 9 + 1)

    def test_validate_and_predict(self, run, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        arguments = ["--config", "digits/flow", f"--model.denoiser={json.dumps(TINY)}"]
        arguments += ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.enable_progress_bar", "false"]
        assert main(["validate", *arguments]) == 0
        assert "val_loss" in capsys.readouterr().out
        assert main(["predict", *arguments]) == 2
        assert "`zoo sample` draws from it" in capsys.readouterr().err


class TestSample:
    def test_writes_a_grid(self, run, capsys, tmp_path):
        output = tmp_path / "new" / "grid.png"
        arguments = ["--classes", "3", "7", "--grid", "4", "--steps", "2", "--scale", "3", "--seed", "1"]
        assert main(["sample", str(run), *arguments, "--output", str(output)]) == 0
        assert capsys.readouterr().out == f"8 samples, 2 steps, guidance 1, seed 1: {output}\n"
        pixels = np.asarray(Image.open(output))[..., 0]
        assert pixels.shape == (4 * 26 + 2, 2 * 26 + 2)
        expected = sample(load_pipeline(run), [3, 7] * 4, steps=2, guidance=1.0, seed=1)
        third = pixels[28:52:3, 2:26:3] / 255  # second row, first column
        np.testing.assert_allclose(third, expected[2, 0].numpy(), rtol=0, atol=0.5 / 255 + 1e-6)

    def test_a_full_disk_leaves_the_old_picture(self, run, tmp_path, monkeypatch, capsys):
        def fill_the_disk(_):
            raise OSError(28, "No space left on device")

        path = tmp_path / "x.png"
        path.write_text("old")
        monkeypatch.setattr(os, "fsync", fill_the_disk)
        assert main(["sample", str(run), "--steps", "1", "--grid", "1", "--output", str(path)]) == 2
        assert capsys.readouterr().err == f"zoo: error: cannot write {path}: No space left on device\n"
        assert path.read_text() == "old"

    def test_more_rows_keep_the_first(self, run):
        pipeline = load_pipeline(run)
        few, many = (sample(pipeline, [0, 1] * rows, 2, 1.0, 0, batch_size=4) for rows in (2, 4))
        assert torch.equal(few, many[:4])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--classes", "3", "10"], "--classes: expected 0 to 9, got 10"),
            (["--steps", "0"], "--steps: expected 1 or more, got 0"),
            (["--grid", "0"], "--grid: expected 1 or more, got 0"),
            (["--output", "grid.jpg"], "--output: expected a file name that ends in .png, got grid.jpg"),
        ],
    )
    def test_bad_options(self, run, capsys, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert main(["sample", str(run), *arguments]) == 2
        assert capsys.readouterr().err == f"zoo: error: {message}\n"
        assert not list(tmp_path.iterdir())

    def test_bad_sources(self, run, tmp_path):
        with pytest.raises(UserError, match="nowhere does not exist"):
            load_pipeline("nowhere")
        with pytest.raises(UserError, match="is not a pipeline folder"):
            load_pipeline(tmp_path)
        classifier = tmp_path / "classifier.ckpt"
        torch.save(
            {"state_dict": {}, "pytorch-lightning_version": "2", "hyper_parameters": {"model_name": "x"}}, classifier
        )
        with pytest.raises(UserError, match=r"holds a x, expected a checkpoint of zoo\.flow\.RectifiedFlow"):
            load_pipeline(classifier)

    def test_damaged_pipeline(self, run, tmp_path):
        load_pipeline(run).save_pretrained(tmp_path)
        weights = tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(UserError, match=r"cannot read checkpoint .*safetensors"):
            load_pipeline(tmp_path)
        index = tmp_path / "model_index.json"
        index.write_text(index.read_text().replace("FlowPipeline", "DiTPipeline"))
        with pytest.raises(UserError, match="holds a DiTPipeline, expected a FlowPipeline"):
            load_pipeline(tmp_path)

    def test_code_beside_the_weights_is_not_run(self, run, tmp_path):
        load_pipeline(run).save_pretrained(tmp_path)
        for component, module in (("denoiser", "zoo.diffusion.denoiser"), ("scheduler", "diffusers")):
            (tmp_path / component / f"{module}.py").write_text("raise SystemExit")
        load_pipeline(tmp_path)


class TestJudge:
    def test_frechet_distance_of_known_normals(self):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(1000, 3, generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(a.T.cov())
        a = torch.linalg.solve_triangular(root, (a - a.mean(0)).T, upper=False).T  # mean 0 and covariance 1 exactly
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
        b = a * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([2.0, 0.0, 0.0])
        assert frechet_distance(a, b) == pytest.approx(4 + 1 + 4)  # squared shift, squared differences of deviations
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
        assert frechet_distance(a @ turn, b @ turn) == pytest.approx(9)

    def test_nearest(self):
        others = torch.zeros(3, 1, 2, 2)
        others[1] = 1
        found = nearest(torch.full((1, 1, 2, 2), 0.75), others)
        assert (found.values.item(), found.indices.item()) == (pytest.approx(0.5), 1)

    def test_tells_copies_from_noise(self, run, monkeypatch):
        classifier = SimpleNamespace(model=Raw(), data_config={"input_size": (1, 8, 8)})
        pipeline = load_pipeline(run)
        noise = judge_digits(pipeline, classifier, steps=1, guidance=1.0)
        digits = Digits(image_size=8, channels=1, augment=False)
        copies = {int(label): (image + 1) / 2 for image, label in digits.train_set}
        monkeypatch.setattr("zoo.judge.sample", lambda _, labels, *rest: torch.stack([copies[x] for x in labels]))
        copied = judge_digits(pipeline, classifier, steps=1, guidance=1.0)
        assert (copied.samples, copied.nearest, copied.near) == (898, pytest.approx(0, abs=1e-6), 1)
        assert noise.nearest > 1.5 * noise.real_nearest
        assert noise.near == 0
        assert copied.real_frechet == noise.real_frechet > 0
        assert noise.frechet > 2 * noise.real_frechet
        assert 0 < noise.real_accuracy == copied.real_accuracy < 1
        rows = [[*column.cells] for column in copied.table().columns]
        assert rows[1][1:3] == ["0.00", "100.0%"]


class Raw(nn.Module):
    """Stands for a classifier: the features are the pixels, the answer always 3."""

    def forward_features(self, x):
        return x.flatten(1)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else F.one_hot(torch.full((len(x),), 3), 10)
