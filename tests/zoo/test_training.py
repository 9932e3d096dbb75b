"""Resuming, damaged checkpoints, full disks, losses that are not finite, and the global batch size."""

import csv
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from zoo.data import TrainLoader
from zoo.errors import UserError
from zoo.sharded import ShardedClassification
from zoo.task import Classification
from zoo.training import (
    AtomicCheckpointIO,
    GlobalBatchSize,
    SaveProgress,
    SkipNonFinite,
    find_last_checkpoint,
    random_states,
    set_random_states,
)

ROOT = Path(__file__).parents[2]


class Drawn(Dataset):
    """``(index, numbers)``, the numbers from all three generators."""

    samples = tuple((f"{i}.png", 0) for i in range(22))

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return index, torch.tensor([random.random(), np.random.rand()]), torch.rand(2)  # noqa: NPY002


class Data(LightningDataModule):
    def __init__(self, batch_size=4, **kwargs):
        super().__init__()
        self.batch_size = batch_size
        self.kwargs = kwargs

    def train_dataloader(self):
        return TrainLoader(Drawn(), self.batch_size, drop_last=True, **self.kwargs)


class Task(LightningModule):
    """A model with dropout and a batch norm; the loss of the batches in ``bad`` is not a number."""

    def __init__(self, bad=()):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.bad = bad
        self.seen = []

    def training_step(self, batch, batch_idx):
        index, first, second = batch
        x = torch.cat((first, second), 1)
        if (self.current_epoch, batch_idx) in self.bad:
            x = x * torch.nan
        loss = self.model(x).square().mean()
        self.seen.append((index.tolist(), loss.item()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(folder, *callbacks, task=None, data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(0)
    task = task or Task()
    options = dict(max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        **{**options, **kwargs},
    )
    trainer.fit(task, datamodule=data or Data(), ckpt_path=ckpt_path, weights_only=True)
    return task, trainer


class TestLoader:
    def batches(self, loader):
        return [[x.tolist() for x in batch] for batch in loader]

    def test_order_and_draws_are_of_the_epoch(self):
        loader = TrainLoader(Drawn(), 4)
        first, again = self.batches(loader), self.batches(loader)
        loader.sampler.set_epoch(1)
        other = self.batches(loader)
        assert first == again
        assert sorted(i for batch in first for i in batch[0]) == list(range(22))
        draws = [{i: draw for batch in epoch for i, draw in zip(batch[0], batch[2])}[3] for epoch in (first, other)]
        assert draws[0] != draws[1]

    def test_leaves_the_generators_alone(self):
        before = random_states()
        self.batches(TrainLoader(Drawn(), 4))
        assert str(random_states()) == str(before)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_begins_anywhere(self, workers):
        expected = self.batches(TrainLoader(Drawn(), 4))
        loader = TrainLoader(Drawn(), 4, num_workers=workers, persistent_workers=workers > 0)
        iterator = iter(loader)
        next(iterator), next(iterator)
        state = loader.state_dict()
        assert state["batches"] == 2
        loader = TrainLoader(Drawn(), 4, num_workers=workers, persistent_workers=workers > 0)
        loader.load_state_dict(state)
        assert self.batches(loader) == expected[2:]
        assert loader.state_dict()["batches"] == 0
        assert self.batches(loader) == expected
        assert len(loader) == 6

    def test_refuses_a_place_in_another_order(self):
        loader = TrainLoader(Drawn(), 4)
        next(iter(loader))
        state = loader.state_dict()
        with pytest.raises(UserError, match="1 batches into an epoch, where batch_size was 4 and is 2"):
            TrainLoader(Drawn(), 2).load_state_dict(state)
        TrainLoader(Drawn(), 2).load_state_dict({**state, "batches": 0})  # an epoch's end fits any

    def test_steps_of_several_processes_see_the_images_of_one(self, monkeypatch):
        whole = [sorted(batch[0]) for batch in self.batches(TrainLoader(Drawn(), 4))]
        parts = []
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            parts.append(self.batches(TrainLoader(Drawn(), 2)))
        assert [sorted(a[0] + b[0]) for a, b in zip(*parts)][:5] == whole[:5]

    def test_knows_which_images_a_batch_holds(self):
        loader = TrainLoader(Drawn(), 4)
        assert [loader.indices(i) for i in range(6)] == [batch[0] for batch in self.batches(loader)]


def test_random_states_survive_a_safe_file(tmp_path):
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    torch.save(random_states(), tmp_path / "states")
    draws = [(random.random(), np.random.rand(), torch.rand(3).tolist())]  # noqa: NPY002
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    draws += [(random.random(), np.random.rand(), torch.rand(3).tolist())]  # noqa: NPY002
    assert draws[0] == draws[1]


class TestSaveProgress:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_resumes_exactly_from_within_an_epoch(self, tmp_path, accumulate):
        def extras():
            return SaveProgress(every_n_steps=1), EMAWeightAveraging(decay=0.5)

        options = dict(accumulate_grad_batches=accumulate, enable_checkpointing=True)
        whole, _ = fit(tmp_path / "whole", *extras(), **options)
        task, _ = fit(tmp_path, *extras(), max_steps={1: 7, 2: 4}[accumulate], **options)  # two batches of the second
        assert task.seen == whole.seen[:7]
        path = tmp_path / "checkpoints" / "last-1.ckpt"  # for last.ckpt, the epoch ended with the last of the steps
        resumed, _ = fit(tmp_path, *extras(), ckpt_path=path, **options)
        assert resumed.seen == whole.seen[7:]
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name

    def test_the_newest_whole_checkpoint_is_used(self, tmp_path):
        _, trainer = fit(tmp_path, SaveProgress())
        last, before = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "last-1.ckpt"))
        assert [torch.load(path, weights_only=True)["global_step"] for path in (last, before)] == [10, 5]
        assert find_last_checkpoint(trainer) == last
        last.write_bytes(last.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=r"last.ckpt .*truncated.*; looking for the checkpoint before it"):
            assert find_last_checkpoint(trainer) == before
        before.write_bytes(b"")
        with pytest.raises(UserError, match="none of the 2 checkpoints"), pytest.warns(UserWarning, match="truncated"):
            find_last_checkpoint(trainer)

    def test_a_first_run_has_none(self, tmp_path):
        with pytest.warns(UserWarning, match="training starts from the beginning"):
            assert find_last_checkpoint(Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")) is None

    def test_bad_arguments(self):
        with pytest.raises(UserError, match="every_n_steps: expected more than 0"):
            SaveProgress(every_n_steps=0)


class TestAtomicCheckpoints:
    def test_a_full_disk_leaves_the_earlier_one(self, tmp_path):
        path = tmp_path / "x.ckpt"
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(10)}, path)
        whole = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(UserError, match=r"cannot save the checkpoint .*x.ckpt: File too large. Earlier"):
                AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(10_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == whole
        assert os.listdir(tmp_path) == ["x.ckpt"]

    def test_the_file_is_whole_before_it_has_its_name(self, tmp_path, monkeypatch):
        path = tmp_path / "x.ckpt"
        AtomicCheckpointIO().save_checkpoint({"x": 1}, path)
        monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().save_checkpoint({"x": 2}, path)
        assert torch.load(path, weights_only=True) == {"x": 1}
        assert torch.load(tmp_path / "x.ckpt.unfinished", weights_only=True) == {"x": 2}


class TestSkipNonFinite:
    def test_leaves_out_the_step(self, tmp_path):
        weights = []

        class Watched(Task):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                state = self.trainer.optimizers[0].state
                everything = [*self.state_dict().values(), *(x for s in state.values() for x in s.values())]
                weights.append([x.clone() for x in everything if x.is_floating_point()])

        with pytest.warns(UserWarning, match="the loss is nan in epoch 0, batch 2") as warned:
            task, trainer = fit(tmp_path, SkipNonFinite(), task=Watched(bad=[(0, 2)]), enable_checkpointing=False)
        assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2]))
        assert not all(torch.equal(a, b) for a, b in zip(weights[2], weights[3]))
        assert all(x.isfinite().all() for x in weights[-1])
        [message] = [str(w.message) for w in warned if "the loss is nan" in str(w.message)]
        names = [f"{i}.png" for i in task.seen[2][0]]
        assert f"({', '.join(names)}); step 2 is left out, number 1 of at most 10" in message

    def test_stops_after_too_many(self, tmp_path):
        callback = SkipNonFinite(max_skipped=2)
        with pytest.raises(UserError, match="not finite in 2 steps"), pytest.warns(UserWarning, match="loss is nan"):
            fit(tmp_path, callback, task=Task(bad=[(0, 1), (1, 0)]), enable_checkpointing=False)
        assert callback.state_dict() == {"skipped": 2}

    def test_one_batch_of_an_accumulated_step(self, tmp_path):
        with pytest.warns(UserWarning, match="batch 3 .*; step 1 is left out") as warned:
            task, _ = fit(
                tmp_path,
                SkipNonFinite(),
                task=Task(bad=[(0, 3)]),
                accumulate_grad_batches=2,
                max_epochs=1,
                enable_checkpointing=False,
            )
        assert len([w for w in warned if "the loss is" in str(w.message)]) == 1
        assert all(x.isfinite().all() for x in task.state_dict().values())


class TestGlobalBatchSize:
    def test_accumulates(self, tmp_path):
        _, trainer = fit(tmp_path, GlobalBatchSize(8), max_epochs=1, enable_checkpointing=False)
        assert trainer.accumulate_grad_batches == 2
        assert trainer.global_step == 2  # of five batches, the last fills no global batch

    @pytest.mark.parametrize(("limit", "batches"), [(1, 1), (1.0, 4)])
    def test_one_batch_is_not_all(self, tmp_path, limit, batches):
        options = dict(max_epochs=1, enable_checkpointing=False, limit_train_batches=limit)
        _, trainer = fit(tmp_path, GlobalBatchSize(8), **options)
        assert trainer.num_training_batches == batches

    def test_has_to_divide(self, tmp_path):
        with pytest.raises(
            UserError, match="10 is not a multiple of 4, which is the data's batch_size of 4 on 1 device"
        ):
            fit(tmp_path, GlobalBatchSize(10), enable_checkpointing=False)


def run(*command, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_killed_terminated_cut_off_and_out_of_disk(tmp_path):
    """Real processes, and what they do on signals; the whole script has more trials."""
    result = run(str(ROOT / "scripts" / "kill_and_resume.py"), "--kills", "1", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 of 4 equal" in result.stdout


def test_two_processes_train_as_one(tmp_path):
    """At an equal global batch, the mean loss of every epoch agrees to 1e-5, relatively."""
    args = ["fit", "--config", "digits/dinat", "--data.image_size", "32", "--data.batch_size", "8"]
    args += ["--global_batch_size", "16", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    args += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    # Forked, which spares importing everything in every process.
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--trainer.limit_train_batches", "4"]
    one = ["--trainer.limit_train_batches", "8"]
    code = f"from zoo.cli import main; assert main({args + two}) == 0; assert main({args + one}) == 0"
    result = run("-c", code, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = []
    for version in range(2):
        with (tmp_path / "runs" / "digits-dinat" / f"version_{version}" / "metrics.csv").open() as file:
            losses.append([float(row["train_loss_epoch"]) for row in csv.DictReader(file) if row["train_loss_epoch"]])
    assert "MEMBER: 2/2" in result.stderr
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sharded_weights(tmp_path):
    """FSDP2, in one process: every weight is sharded, and the checkpoint is that of the task without shards."""
    sharded = []

    class Watched(ShardedClassification):
        def on_train_start(self):
            sharded.extend(isinstance(x, DTensor) for x in self.parameters())

    torch.manual_seed(0)
    options = dict(model_name="test_vit", num_classes=4, model_args={"img_size": 32, "in_chans": 1})
    images = [(torch.randn(1, 32, 32), i) for i in range(4)]
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        callbacks=[SaveProgress(), SkipNonFinite()],
        plugins=[AtomicCheckpointIO()],
        **quiet,
    )
    try:
        trainer.fit(Watched(**options), TrainLoader(images, 2))
    finally:
        torch.distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # other tests' processes would all meet there
            os.environ.pop(name, None)
    assert sharded and all(sharded)
    task = Classification.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(isinstance(x, DTensor) for x in task.parameters())

    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, **quiet)
    task = ShardedClassification.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert "val_top1" in trainer.validate(task, TrainLoader(images, 2), verbose=False)[0]
    with pytest.raises(UserError, match="is trained with the strategy ModelParallelStrategy only"):
        trainer.fit(task, TrainLoader(images, 2))
