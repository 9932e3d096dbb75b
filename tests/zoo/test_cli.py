"""The command line: help, recipes by name, the table of models, and errors without stack traces."""

import csv
import functools
import operator
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from timm.models import get_pretrained_cfg
from torch._utils import ExceptionWrapper

import zoo
from zoo.cli import main
from zoo.errors import UserError
from zoo.lightning_cli import RecipeCLI
from zoo.models import describe, format_count, our_models, print_models, published_top1
from zoo.recipes import list_recipes, resolve_recipe, resolve_recipes
from zoo.task import create_model

LIGHTNING = {"pytorch-lightning_version": "2.6.6", "state_dict": {}}


class RunsCode:
    """When it is unpickled without care."""

    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_fits_a_screen_and_names_every_command(capsys, args):
    assert main(args) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "sample",
        "eval-diffusion",
        "explain",
        "bench",
        "models",
        "demo",
        "doctor",
    ):
        assert any(line.startswith(f"  {command} ") for line in lines), command
    for recipe in list_recipes():
        assert recipe in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zoo {zoo.__version__}\n"


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian'; `zoo --help`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "eval-diffusion", "explain", "bench", "models", "demo", "doctor"])
def test_command_help(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: zoo {command} ")


def on_meta(model_name, num_classes, model_args, *weights):
    with torch.device("meta"):
        return create_model(model_name, num_classes, model_args)


def scalars(tree, keys=()):
    """The values of a recipe that are no lists, and under which keys they are."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from scalars(value, (*keys, key))
        elif not isinstance(value, list):
            yield (*keys, key), value


class TestRecipes:
    def test_packaged(self):
        assert {"digits/dinat", "digits/flow", "imagenet/dinat_tiny", "imagenet/eval"} <= set(list_recipes())

    def test_found_by_name_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert resolve_recipe("digits/dinat").endswith("configs/digits/dinat.yaml")
        assert resolve_recipe("digits/dinat.yaml") == resolve_recipe("digits/dinat")

    def test_a_file_wins(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "digits").mkdir()
        (tmp_path / "digits" / "dinat.yaml").touch()
        assert resolve_recipe("digits/dinat.yaml") == "digits/dinat.yaml"

    @pytest.mark.parametrize("form", [["--config", "digits/dinat"], ["-c", "digits/dinat"], ["--config=digits/dinat"]])
    def test_all_ways_to_name_one(self, form):
        resolved = resolve_recipes(["fit", *form, "--model.lr", "1"])
        assert resolved[0] == "fit"
        assert resolved[-2:] == ["--model.lr", "1"]
        assert resolved[-3].endswith("dinat.yaml")

    def test_builds_on_another(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own.yaml").write_text("base: imagenet/nat_tiny\ntrainer: {max_epochs: 3}")
        *options, own = resolve_recipes(["fit", "--config", "own.yaml"])[2::2]
        assert [Path(option).name for option in options] == ["train.yaml", "nat_tiny.yaml"]
        assert own == "own.yaml"

    @pytest.mark.parametrize(
        ("base", "message"),
        [("imagenet/nat_tinny", "neither a file nor a recipe"), ("own.yaml", "'own.yaml' builds on itself")],
    )
    def test_bad_base(self, capsys, tmp_path, monkeypatch, base, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own.yaml").write_text(f"base: {base}")
        assert main(["fit", "--config", "own.yaml"]) == 2
        assert message in capsys.readouterr().err

    def test_published_top1_and_crop(self):
        """The comment of the recipe for evaluation, which is all that says how a figure was measured."""
        stated, crop = {}, None
        for line in Path(resolve_recipe("imagenet/eval")).read_text().splitlines():
            if match := re.match(r"# (squash, )?crop (1.0|0.875):", line):
                crop = "squash" if match[1] else "center", float(match[2])
            stated |= {name: (float(top1), *crop) for name, top1 in re.findall(r"(\w+) (\d\d\.\d)\b", line) if crop}
        published = {name.partition(".")[0]: (name, top1) for name, top1 in published_top1().items()}
        assert stated.keys() == published.keys()
        for short, (name, top1) in published.items():
            cfg = get_pretrained_cfg(name)
            assert stated[short] == (top1, cfg.crop_mode, cfg.crop_pct), name

    def test_unknown(self, capsys):
        assert main(["fit", "--config", "digits/dinta"]) == 2
        error = capsys.readouterr().err
        assert "'digits/dinta' is neither a file nor a recipe" in error
        assert "imagenet/eval" in error

    @pytest.mark.parametrize("recipe", [name for name in list_recipes() if not name.startswith("digits/")])
    def test_builds_what_it_says(self, tmp_path, monkeypatch, recipe):
        """All but the training: of a model for 224 pixels without its weights, of Flux not even that."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
        monkeypatch.setattr(zoo.task, "create_model", on_meta)
        if recipe.startswith("clear/"):
            monkeypatch.setattr(
                RecipeCLI, "instantiate_classes", lambda self: setattr(self, "config_init", self.config)
            )
        for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
            (tmp_path / "data" / "imagenet" / folder).mkdir(parents=True)
        (tmp_path / "photos").symlink_to("data/imagenet")
        command = "validate" if recipe.endswith("eval") else "fit"
        cli = RecipeCLI([command, "--config", recipe, "--trainer.accelerator", "cpu"])
        config = cli.config[command].as_dict()
        text = Path(resolve_recipe(recipe)).read_text()
        for keys, value in scalars({**yaml.safe_load(text), "base": None}):
            assert functools.reduce(operator.getitem, keys, config) == value, keys
        assert config["trainer"]["default_root_dir"] == "runs"
        assert config["seed_everything"] == 0
        if recipe.startswith("clear/"):
            return
        assert cli.model.hparams.num_classes == 2
        assert cli.model.model.num_features > 0
        averaging = [type(callback).__name__ for callback in cli.trainer.callbacks].count("EMAWeightAveraging")
        assert averaging == ("EMAWeightAveraging" in text)

    @pytest.mark.parametrize(
        "recipe", [name for name in list_recipes() if name.startswith("digits/") and name != "digits/flow"]
    )
    def test_digits_train_every_weight(self, tmp_path, monkeypatch, recipe):
        monkeypatch.chdir(tmp_path)
        cli = RecipeCLI(["fit", "--config", recipe, "--trainer.fast_dev_run", "2", "--data.batch_size", "4"])
        assert cli.trainer.global_step == 2
        assert {"train_loss", "val_top1"} <= set(cli.trainer.callback_metrics)
        [optimizer] = cli.trainer.optimizers
        for name, parameter in cli.model.named_parameters():
            assert parameter.isfinite().all(), name
            assert optimizer.state[parameter], name  # AdamW has none for weights that got no gradient
        assert cli.model.model.num_classes == 10

    def test_later_configurations_win(self, capsys, tmp_path):
        own = tmp_path / "own.yaml"
        own.write_text("trainer: {max_epochs: 3}")
        with pytest.raises(SystemExit):
            main(["fit", "--config", "digits/dinat", "--config", str(own), "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 3

    @pytest.mark.parametrize(("limit", "kind"), [("1", int), ("1.0", float)])
    def test_one_batch_is_not_all(self, capsys, limit, kind):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "digits/dinat", "--trainer.limit_train_batches", limit, "--print_config"])
        assert type(yaml.safe_load(capsys.readouterr().out)["trainer"]["limit_train_batches"]) is kind

    def test_unknown_key(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", "digits/dinat", "--model.learning_rate", "1"])
        assert exit_.value.code == 2
        assert "learning_rate" in capsys.readouterr().err


class TestModels:
    def test_are_ours_only(self):
        names = our_models()
        assert "dinat_tiny.in1k" in names
        assert not [name for name in names if name.startswith(("vit_", "resnet", "swin"))]
        assert len(names) == len(set(names))

    def test_described_as_built(self):
        row = describe("test_dinat.untrained", {"test_dinat.untrained": 12.5})
        model = timm.create_model("test_dinat")
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert row.input_size == (3, 96, 96)
        assert row.top1 == 12.5
        assert not row.has_weights
        assert describe("nat_mini.in1k", {}).has_weights

    def test_published_figures_are_of_known_models(self):
        top1 = published_top1()
        assert set(top1) <= set(our_models())
        assert all(50 < value < 95 for value in top1.values())

    @pytest.mark.parametrize(
        ("pattern", "count"), [("test_dinat", 1), ("nat_mini.in1k", 2), ("nat_min?", 1), ("*_mini", 2)]
    )
    def test_pattern(self, capsys, pattern, count):
        print_models(pattern)
        out = capsys.readouterr().out
        assert f"{count} model" in out
        assert len([line for line in out.splitlines() if "│" in line]) == count

    def test_table(self, capsys):
        assert main(["models", "nat_mini"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "dinat_mini.in1k" in line)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        top1 = published_top1().get("dinat_mini.in1k")
        assert cells == ["dinat_mini.in1k", "20.0 M", "224 x 224", "" if top1 is None else f"{top1:.1f}", "published"]

    def test_no_match(self, capsys):
        assert main(["models", "resnet50"]) == 2
        assert "none of our models matches 'resnet50'" in capsys.readouterr().err

    def test_format_count(self):
        assert [format_count(n) for n in (181_240, 999_499, 27_900_000)] == ["181 k", "999 k", "27.9 M"]


class TestErrors:
    """What users get wrong is answered in one line that names it."""

    BASE = ("--config", "digits/dinat", "--model.model_name", "test_vit", "--data.image_size", "160")

    def run(self, capsys, monkeypatch, tmp_path, *args):
        monkeypatch.chdir(tmp_path)
        assert main(list(args)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("zoo: error: ")
        return error

    def test_unknown_model(self, capsys, monkeypatch, tmp_path):
        args = ["fit", *self.BASE, "--model.model_name", "dinat_tinny"]
        assert "did you mean dinat_tiny" in self.run(capsys, monkeypatch, tmp_path, *args)

    def test_missing_data(self, capsys, monkeypatch, tmp_path):
        args = ["fit", "--config", "imagenet/dinat_tiny", "--data.root", "nowhere"]
        assert "no data folder nowhere" in self.run(capsys, monkeypatch, tmp_path, *args)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "does not exist"),
            (b"", "truncated or damaged"),
            (b"<html>404</html>", "truncated or damaged"),
            ("cut", "truncated or damaged"),
            ({"weight": torch.ones(2)}, "not a checkpoint of `zoo fit`: it holds 'weight'"),
            ({"x": UserError}, "Python objects besides weights (zoo.errors.UserError)"),
            ({"x": RunsCode()}, f"Python objects besides weights ({os.system.__module__}.system)"),
            ({**LIGHTNING, "hyper_parameters": None}, "its hyper_parameters are a NoneType"),
            ({**LIGHTNING, "hyper_parameters": torch.ones(2)}, "its hyper_parameters are a Tensor"),
            ({**LIGHTNING, "state_dict": None}, "its state_dict are a NoneType"),
        ],
    )
    def test_bad_checkpoint(self, capsys, monkeypatch, tmp_path, content, message):
        path = tmp_path / "bad.ckpt"
        if content == "cut":
            torch.save({"state_dict": {"x": torch.ones(10_000)}}, path)
            path.write_bytes(path.read_bytes()[:20_000])
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        error = self.run(capsys, monkeypatch, tmp_path, "validate", *self.BASE, "--ckpt_path", str(path))
        assert message in error
        assert "bad.ckpt" in error
        assert not (tmp_path / "runs").exists()  # before any work

    @pytest.mark.parametrize("command", ["validate", "test", "predict"])
    def test_no_last_checkpoint(self, capsys, monkeypatch, tmp_path, command):
        error = self.run(capsys, monkeypatch, tmp_path, command, *self.BASE, "--ckpt_path", "last")
        assert "--ckpt_path last: there is no checkpoint in runs/digits-dinat yet" in error

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--data.batch_size", "0", "batch_size: expected 1 or more, got 0"),
            ("--data.image_size", "-8", "image_size: expected 1 or more, got -8"),
            ("--model.label_smoothing", "2", "label_smoothing: expected 0 to 1, got 2"),
            ("--model.mixup", "-1", "mixup: expected 0 or more, got -1"),
            ("--model.model_args", "{bogus: 3}", "unexpected keyword argument 'bogus'"),
            ("--model.model_name", "resnet18.nope", "timm knows no weights 'resnet18.nope', only resnet18.a1_in1k"),
            ("--model.model_name", "foo:bar", "source 'foo'"),
            ("--seed_everything", "-1", "--seed_everything: expected 0 to 4294967295, got -1"),
            ("--trainer.devices", "0", "`Trainer(devices='0')` value is not a valid input"),
            ("--trainer.accelerator", "warp", "invalid accelerator name: `accelerator='warp'`"),
        ],
    )
    def test_wrong_value(self, capsys, monkeypatch, tmp_path, option, value, message):
        base = self.BASE if "model_args" in option else (*self.BASE, "--model.model_args", "{}")
        error = self.run(capsys, monkeypatch, tmp_path, "fit", *base, "--trainer.accelerator", "cpu", option, value)
        assert message in error

    def test_of_a_loaders_worker(self, capsys, monkeypatch):
        def fail_as_a_worker(*_):
            try:
                raise UserError("there is nothing in x.tar")
            except UserError:
                failure = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 0")
            failure.reraise()

        monkeypatch.setattr(zoo.cli, "run", fail_as_a_worker)
        assert main(["validate"]) == 2
        assert capsys.readouterr().err == "zoo: error: there is nothing in x.tar\n"


class TestSignals:
    """In the middle of Lightning's loop, which catches both."""

    @pytest.fixture
    def signalled(self, monkeypatch, tmp_path):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from jobs in the background

        class Signalled(LightningModule):
            def predict_step(self, batch):
                os.kill(os.getpid(), number)
                return batch

        def predict(*_):
            quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)
            Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet).predict(Signalled(), [torch.ones(1)])

        def send(which):
            nonlocal number
            number = which
            return main(["predict"])

        number = None
        monkeypatch.setattr(zoo.cli, "run", predict)
        yield send
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def test_sigterm(self, signalled):
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as exit_:
            signalled(signal.SIGTERM)
        assert exit_.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == before

    def test_interrupt(self, signalled, capsys):
        assert signalled(signal.SIGINT) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "zoo: interrupted"

    def test_interrupt_elsewhere(self, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(zoo.cli, "run", interrupt)
        assert main(["export"]) == 130
        assert capsys.readouterr().err == "zoo: interrupted\n"


def test_fit_validate_predict(capsys, monkeypatch, tmp_path):
    """The whole chain, as a user types it."""
    monkeypatch.chdir(tmp_path)
    base = ["--config", "digits/dinat", "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"]
    base += ["--model.lr", "0"]  # so that no epoch is better than the first
    fit = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    assert main(["fit", *base, *fit]) == 0
    run = tmp_path / "runs" / "digits-dinat" / "version_0"
    assert (run / "config.yaml").is_file()
    with (run / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"train_loss_epoch", "train_top1", "val_loss", "val_top1"} <= set(columns)
    assert list((tmp_path / "runs" / "tensorboard").rglob("events.out.*"))

    assert (run / "checkpoints" / "best.ckpt").is_file()
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4  # of the last epoch, not of the best
    published = ["--model.pretrained", "true"]  # of which there are none: a checkpoint needs no other weights
    assert main(["validate", *base, *published, "--ckpt_path", str(last), "--trainer.limit_val_batches", "1"]) == 0
    assert "val_top1" in capsys.readouterr().out

    assert main(["predict", *base, "--ckpt_path", "last", "--trainer.limit_predict_batches", "2"]) == 0
    with next((tmp_path / "runs").rglob("predictions.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert all(row["label"] == row["class"] and 0.1 <= float(row["probability"]) <= 1 for row in rows)

    assert main(["validate", *base, "--model.model_name", "test_vit", "--ckpt_path", "last"]) == 2
    assert "do not fit the model" in capsys.readouterr().err
    other = [*base, "--model.model_name", "test_vit", "--ckpt_path", str(last)]
    assert main(["validate", *base, *published]) == 2
    assert "No pretrained weights exist for test_dinat" in capsys.readouterr().err
    assert main(["validate", *other]) == 2
    assert "last.ckpt holds a test_dinat, but the configuration asks for test_vit" in capsys.readouterr().err

    shards = tmp_path / "shards.ckpt"
    shards.mkdir()
    (shards / ".metadata").touch()
    for command in (["validate", *base, "--ckpt_path"], ["export", "--format", "onnx", "--output", "x.onnx"]):
        assert main([*command, str(shards)]) == 2
        assert "shards.ckpt is a folder of shards" in capsys.readouterr().err


def test_images_are_prepared_as_in_the_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red" if name[-1] == "a" else "blue").save(tmp_path / "photos" / name / "1.png")
    base = ["--config", "finetune/image_folder", "--data.root", "photos", "--data.num_workers", "0"]
    base += [
        "--model.model_name",
        "test_dinat",
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
    ]
    options = ["--data.batch_size", "2", "--data.image_size", "32", "--model.pretrained", "false"]
    assert main(["fit", *base, *options, "--trainer.max_epochs", "1"]) == 0
    path = "runs/finetune/version_0/checkpoints/last.ckpt"
    assert RecipeCLI(["validate", *base, "--ckpt_path", path]).datamodule.data_config["input_size"] == (3, 32, 32)
    larger = RecipeCLI(["validate", *base, "--ckpt_path", path, "--data.image_size", "64"])
    assert larger.datamodule.data_config["input_size"] == (3, 64, 64)
