"""The classification task: training steps, schedules, checkpoints, weights files."""

import math

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from zoo.checkpoints import check_fits, read_checkpoint, read_lightning_checkpoint
from zoo.errors import UserError
from zoo.task import Classification, create_model, warmup_cosine

SMALL = dict(model_name="test_vit", num_classes=4, model_args={"img_size": 32, "in_chans": 1})


def loader(count=16, classes=4, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % classes), batch_size=batch_size)


def trainer(tmp_path, **kwargs):
    options = dict(max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(default_root_dir=tmp_path, accelerator="cpu", **{**options, **kwargs})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A task trained for one epoch, its trainer, and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    task = Classification(**SMALL, lr=3e-3, warmup_epochs=0.5)
    runner = trainer(folder)
    runner.fit(task, loader(), loader())
    path = folder / "task.ckpt"
    runner.save_checkpoint(path)
    return task.eval(), runner, path


def test_metrics(trained):
    _, runner, _ = trained
    metrics = runner.callback_metrics
    assert {"train_loss", "train_top1", "val_loss", "val_top1"} <= set(metrics)
    assert "val_top5" not in metrics  # of four classes it would always be 1
    assert 0 < metrics["val_loss"] < 3
    assert metrics["val_top1"] in (torch.arange(17) / 16)


def test_top1_is_the_share_of_right_answers(trained, tmp_path):
    task, _, _ = trained
    images, labels = loader().dataset.tensors
    with torch.inference_mode():
        right = (task(images).argmax(-1) == labels).float().mean()
    [result] = trainer(tmp_path).validate(task, loader(batch_size=5), verbose=False)
    assert result["val_top1"] == pytest.approx(right.item())


def test_training_learns(tmp_path):
    torch.manual_seed(0)
    task = Classification(**SMALL, lr=3e-3, label_smoothing=0.0)
    runner = trainer(tmp_path, max_epochs=25, enable_checkpointing=False)
    runner.fit(task, loader())
    assert runner.callback_metrics["train_top1"] == 1  # sixteen images by heart


def test_round_trip(trained):
    task, _, path = trained
    for weights_only in (None, True):
        copy = Classification.load_from_checkpoint(path, weights_only=weights_only).eval()
        assert copy.hparams == task.hparams
        images, _ = next(iter(loader()))
        with torch.inference_mode():
            assert torch.equal(copy(images), task(images))


def test_checkpoint_does_not_need_the_first_weights(tmp_path):
    weights = tmp_path / "first.safetensors"
    save_file(create_model(**SMALL).state_dict(), weights)
    task = Classification(**SMALL, checkpoint=str(weights))
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(task, loader())
    runner.save_checkpoint(tmp_path / "task.ckpt")
    weights.unlink()
    assert Classification.load_from_checkpoint(tmp_path / "task.ckpt").hparams.model_name == "test_vit"


def test_predictions(trained, tmp_path):
    task, _, _ = trained
    [first, second] = trainer(tmp_path).predict(task, loader())
    assert first["probabilities"].shape == (8, 4)
    torch.testing.assert_close(second["probabilities"].sum(-1), torch.ones(8))
    assert torch.equal(first["label"], first["probabilities"].argmax(-1))
    assert torch.equal(first["probability"], first["probabilities"].amax(-1))


def test_flags_of_speed_and_memory_change_no_result(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compiled.append((self, mode)))
    colour = dict(model_name="test_vit", num_classes=4, model_args={"img_size": 32})
    plain = Classification(**colour)
    task = Classification(**colour, compile=True, channels_last=True, grad_checkpointing=True)
    again = Classification(**colour, compile="reduce-overhead")
    assert compiled == [(task.model, None), (again.model, "reduce-overhead")]
    assert task.hparams == plain.hparams  # a checkpoint does not say how it was run
    task.load_state_dict(plain.state_dict())
    seen = []
    task.model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for module in (plain, task):
        module.log = module.log_dict = lambda *args, **kwargs: None
        module.training_step((images, torch.tensor([0, 1])), 0).backward()
    for x in (*seen, task.model.patch_embed.proj.weight):
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    for (name, value), same in zip(task.named_parameters(), plain.parameters()):
        torch.testing.assert_close(value.grad, same.grad, msg=name)


@pytest.mark.parametrize("mode", [False, True, "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"])
def test_gradients_outlive_the_replay_of_a_cuda_graph(monkeypatch, tmp_path, mode):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: None)
    memory = {}

    def overwrite(*_):
        for x in memory.values():
            x.fill_(math.nan)

    def train(replayed):
        torch.manual_seed(0)
        task = Classification(**SMALL, lr=3e-3, compile=mode)
        task.model.norm.requires_grad_(False)
        if replayed:  # as by a graph, gradients come in the same memory each time, which a forward pass overwrites
            for name, x in task.model.named_parameters():
                if x.requires_grad:
                    memory[name] = torch.empty_like(x)
                    x.register_hook(lambda grad, at=memory[name]: torch.empty(0).set_(at.copy_(grad)))
            task.model.register_forward_pre_hook(overwrite)
        trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, enable_checkpointing=False).fit(task, loader(32))
        return task.model

    plain, model = train(False), train(True)
    graphs = mode in ("reduce-overhead", "max-autotune")
    for (name, x), same in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(x, same) == (graphs or not x.requires_grad), name
        if x.requires_grad:  # where there are no graphs, nothing is copied
            assert (x.grad.data_ptr() == memory[name].data_ptr()) != graphs, name
            assert x.grad.stride() == x.stride(), name
        else:
            assert x.grad is None, name


def test_mixing(tmp_path):
    torch.manual_seed(0)
    task = Classification(**SMALL, mixup=0.8, cutmix=1.0)
    runner = trainer(tmp_path, enable_checkpointing=False)
    runner.fit(task, loader(), loader())
    assert "train_top1" not in runner.callback_metrics
    assert torch.isfinite(runner.callback_metrics["train_loss"])


def test_weight_decay_spares_what_the_model_exempts(tmp_path):
    task = Classification("test_dinat", num_classes=4, model_args={"in_chans": 1}, weight_decay=0.1)
    task.trainer = trainer(tmp_path)
    task.trainer.strategy.connect(task)
    task.trainer.fit_loop._data_source.instance = loader()
    optimizer = task.configure_optimizers()["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    exempt = task.model.no_weight_decay()
    assert exempt
    for name, parameter in task.model.named_parameters():
        spared = name in exempt or parameter.ndim <= 1
        assert decay[id(parameter)] == (0 if spared else 0.1), name


class TestSchedule:
    def test_shape(self):
        factors = [warmup_cosine(step, warmup=4, total=20) for step in range(21)]
        assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
        assert factors[4] == 1
        assert factors[12] == pytest.approx(0.5)
        assert factors[20] == pytest.approx(0)
        assert factors[4:] == sorted(factors[4:], reverse=True)

    def test_end(self):
        factors = [warmup_cosine(step, warmup=4, total=20, end=0.2) for step in range(21)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert factors[12] == pytest.approx(0.6)
        assert factors[20] == pytest.approx(0.2)

    def test_optimizer_and_lowest_rate(self, tmp_path):
        task = Classification(**SMALL, lr=1e-2, min_lr=1e-3, optimizer="sgd")
        runner = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
        runner.fit(task, loader())
        assert isinstance(runner.optimizers[0], torch.optim.SGD)
        assert runner.optimizers[0].defaults["nesterov"]
        assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(lr=1e-4, min_lr=1e-3), "min_lr: expected 0 to lr"),
            (dict(optimizer="adamww"), "timm knows no 'adamww'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(UserError, match=message):
            Classification(**SMALL, **options)

    def test_no_warmup(self):
        assert warmup_cosine(0, warmup=0, total=10) == 1

    def test_counts_optimizer_steps(self, tmp_path):
        rates = []
        task = Classification(**SMALL, lr=1.0, warmup_epochs=1)
        task.on_train_batch_start = lambda batch, i: rates.append(task.optimizers().param_groups[0]["lr"])
        runner = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=False)
        runner.fit(task, loader(count=32))  # two steps of two batches in each epoch, the first epoch to warm up
        assert rates == pytest.approx([0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5])

    def test_endless_training(self, tmp_path):
        with pytest.raises(UserError, match="max_epochs"):
            trainer(tmp_path, max_epochs=-1, enable_checkpointing=False).fit(Classification(**SMALL), loader())


class TestCreateModel:
    def test_unknown_name(self):
        with pytest.raises(UserError, match="no model 'dinat_tinny'; did you mean dinat_tiny"):
            create_model("dinat_tinny", 10)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_weights_from_a_file(self, tmp_path, suffix):
        model = timm.create_model("test_dinat", num_classes=1000)
        path = tmp_path / f"weights{suffix}"
        save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
        copy = create_model("test_dinat", 1000, checkpoint=str(path))
        for name, value in model.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value), name

    def test_weights_for_another_number_of_classes(self, tmp_path):
        model = timm.create_model("test_dinat", num_classes=1000)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        copy = create_model("test_dinat", 7, checkpoint=str(tmp_path / "weights.pth"))
        assert copy.get_classifier().out_features == 7
        stem = "patch_embed.proj.0.weight"
        assert torch.equal(copy.state_dict()[stem], model.state_dict()[stem])

    def test_missing_file(self):
        with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
            create_model("test_dinat", 10, checkpoint="nowhere.pth")


class TestCheckpoints:
    def test_every_truncation_is_caught(self, trained, tmp_path):
        whole = trained[2].read_bytes()
        for share in (0.0, 0.01, 0.5, 0.99):
            path = tmp_path / "cut.ckpt"
            path.write_bytes(whole[: math.floor(share * len(whole))])
            with pytest.raises(UserError, match=r"cannot read checkpoint .*cut.ckpt") as error:
                read_lightning_checkpoint(path)
            assert "\n" not in str(error.value)

    def test_truncated_safetensors(self, tmp_path):
        path = tmp_path / "cut.safetensors"
        save_file({"x": torch.ones(1000)}, path)
        assert read_checkpoint(path)["x"].sum() == 1000
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"cut.safetensors"):
            read_checkpoint(path)

    def test_code_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (tmp_path.joinpath("exploded").touch, ())

        torch.save({"state_dict": {}, "x": Bomb()}, tmp_path / "bomb.ckpt")
        with pytest.raises(UserError, match=r"bomb.ckpt"):
            read_checkpoint(tmp_path / "bomb.ckpt")
        assert not (tmp_path / "exploded").exists()

    def test_not_a_dictionary(self, tmp_path):
        torch.save(torch.ones(3), tmp_path / "tensor.pth")
        with pytest.raises(UserError, match="holds a Tensor"):
            read_checkpoint(tmp_path / "tensor.pth")

    def test_fit_names_what_differs(self, trained):
        task, _, path = trained
        checkpoint = read_lightning_checkpoint(path)
        check_fits(checkpoint, task, path)
        other = Classification("test_vit", num_classes=7, model_args={"img_size": 32, "in_chans": 1})
        with pytest.raises(UserError, match=r"task.ckpt do not fit the model: other shapes: model.head.weight is "):
            check_fits(checkpoint, other, path)
