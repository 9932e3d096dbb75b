"""What keeps a long training run whole: atomic checkpoints, exact resuming, no step from a loss that is not finite.

``zoo fit`` uses all of it; elsewhere, give the callbacks and the plugin to Lightning's trainer.
"""

import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.checkpoints import is_sharded, read_lightning_checkpoint
from zoo.data import TrainLoader
from zoo.errors import UserError, expect_at_least

SIGTERM_STATUS = 128 + 15  # as a shell reports a process that the signal ended
MAX_NAMES = 16


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole and on the disk.

    However the process ends, the file is the earlier checkpoint or the new one, never a part of one. Addresses such as
    ``s3://`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save, or leave everything as it was.

        Raises:
            UserError: The file cannot be written, for instance because the disk is full.
        """
        if "://" in str(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError over a failed write
            unfinished.unlink(missing_ok=True)
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise UserError(
                f"cannot save the checkpoint {path}: {reason.strerror}. Earlier checkpoints are as they were; once "
                "there is room, go on with --ckpt_path last"
            ) from error


def sync_folder(folder: Path) -> None:
    """Make sure that a file moved into ``folder`` is still there after a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class SaveProgress(Checkpoint):
    """Save ``last.ckpt`` in the run's folder, from which training goes on as if it had not been interrupted.

    It is saved at the end of every epoch, between steps at the times given, and when SIGTERM asks the run to end: the
    step, or the validation, is finished first. The one before stays as ``last-1.ckpt``. All checkpoints of the run,
    those of other callbacks too, carry the states of every process's random number generators.

    Args:
        every_n_steps: Save after so many optimizer steps.
        every_n_minutes: Save when so much time has passed; the clock is read every ten steps.
    """

    best_model_path = ""  # so that Lightning says what --ckpt_path best would need

    def __init__(self, every_n_steps: int | None = None, every_n_minutes: float | None = 15.0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"{name}: expected more than 0, or null for never, got {value}")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.folder = Path()
        self.saved_step = 0
        self.saved_time = monotonic()
        self.terminated = False
        self.asked: Callable[[], bool] | None = None  # whether any of several processes was
        self.restored: list[dict[str, Any]] = []
        self.kept: dict[str, Any] | None = None  # the random states before a validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(run_folder(trainer) / "checkpoints")))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = gather(self.kept or random_states())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint.get("random_states", [])
        self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_time = monotonic()
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler, which it puts back afterwards, makes several processes wait for one another.
            signal.signal(signal.SIGTERM, self._terminate)
        if not self.restored:
            return
        # Lightning does so itself unless the loader was made before the checkpoint was read, as a schedule that counts
        # its steps needs.
        trainer.fit_loop._load_combined_loader_states()
        if len(self.restored) == trainer.world_size:
            set_random_states(self.restored[trainer.global_rank])
        else:
            rank_zero_warn(
                f"{len(self.restored)} processes saved the checkpoint and {trainer.world_size} go on from it, so their "
                "random number generators start anew"
            )
        self.restored = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.world_size > 1:
            self.asked = ask_all(torch.full((), self.terminated, device=trainer.strategy.root_device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.kept = None
        if validation_follows(trainer):  # resuming from here would leave it out
            self.kept = random_states()
        elif not inside_step(trainer):
            terminated = self.asked() if self.asked else self.terminated
            if terminated or self._due(trainer):
                self.save(trainer)
            if terminated:
                self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first iteration over a loader draws from the generators, and after resuming that is a later one.
        if self.kept is not None:
            set_random_states(self.kept)
            self.kept = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = None
        # Where steps are counted instead of epochs, Lightning does not resume well from an epoch's end, so it is the
        # next step that counts there, unless there is none.
        if trainer.max_steps == -1 or trainer.global_step >= trainer.max_steps:
            self.save(trainer)
            if self._agreed(trainer, self.terminated):
                self._stop(trainer)

    def _terminate(self, signal_number: int, frame: Any) -> None:
        self.terminated = True

    def _agreed(self, trainer: Trainer, decision: bool) -> bool:
        """Whether any of the processes says so."""
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step - self.saved_step >= self.every_n_steps:
            return True
        if self.every_n_minutes is None or step % 10:
            return False
        return self._agreed(trainer, monotonic() - self.saved_time >= 60 * self.every_n_minutes)

    def _stop(self, trainer: Trainer) -> None:
        rank_zero_warn(f"SIGTERM: saved and stopped after step {trainer.global_step}; go on with --ckpt_path last")
        raise SIGTERMException

    def save(self, trainer: Trainer) -> None:
        """Save ``last.ckpt``. At every moment there is a whole checkpoint under one of the names."""
        if trainer.fast_dev_run:
            return
        new, last, before = (self.folder / f"last{suffix}.ckpt" for suffix in ("-new", "", "-1"))
        trainer.save_checkpoint(new, weights_only=False)
        if trainer.is_global_zero:
            if last.exists():
                trainer.strategy.remove_checkpoint(before)  # a folder, which sharded strategies write, has to go first
                last.replace(before)
            new.replace(last)
        trainer.strategy.barrier()
        self.saved_step, self.saved_time = trainer.global_step, monotonic()


def inside_step(trainer: Trainer) -> bool:
    """Whether gradients of some batches are waiting for those of others."""
    return (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch


def validation_follows(trainer: Trainer) -> bool:
    """Whether there may be a validation before the next step."""
    every = trainer.val_check_batch
    loop = trainer.fit_loop
    batch = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return trainer.is_last_batch or (isinstance(every, int) and (batch + 1) % every == 0)


def run_folder(trainer: Trainer) -> Path:
    """Where Lightning's loggers and checkpoints of this run are."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def find_last_checkpoint(trainer: Trainer, needed: bool = False) -> Path | None:
    """The newest whole checkpoint of the last runs with the same name, or None where there is none and none needed.

    Those that cannot be read, for instance because they were cut off, are named in a warning.

    Raises:
        UserError: None of them can be read, or there is none and one is ``needed``.
    """
    folder = run_folder(trainer)
    names = "*/checkpoints/last*.ckpt" if trainer.loggers else "checkpoints/last*.ckpt"
    found = {path: path.stat().st_mtime_ns for path in (folder.parent if trainer.loggers else folder).glob(names)}
    for path in sorted(found, key=found.__getitem__, reverse=True):
        if is_sharded(path):
            return path
        try:
            read_lightning_checkpoint(path)
            return path
        except UserError as error:
            rank_zero_warn(f"{error}; looking for the checkpoint before it")
    if found:
        raise UserError(f"--ckpt_path last: none of the {len(found)} checkpoints in {folder.parent} can be read")
    nothing = f"--ckpt_path last: there is no checkpoint in {folder.parent} yet"
    if needed:
        raise UserError(f"{nothing}; expected one of `zoo fit`, or the path of another")
    rank_zero_warn(f"{nothing}, so training starts from the beginning")
    return None


def gather(value: Any) -> list[Any]:
    """The values of all processes, on each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def random_states() -> dict[str, Any]:
    """The states of this process's generators, in plain values and tensors, which loading without code can read."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (the generator that mixup and others draw from)
    states = {"python": [version, list(internal), gauss], "numpy": [name, keys.tolist(), *rest]}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put this process's generators into the states that :func:`random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class SkipNonFinite(Callback):
    """Leave out each step whose loss is not finite, name its images, and stop the run after too many.

    The weights, their average, the optimizer's state and the statistics of batch norms stay as they were; the schedule
    goes on. With several processes, a loss of one skips the step of all.

    Args:
        max_skipped: Stop when this many steps of the run have been left out.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        expect_at_least(1, max_skipped=max_skipped)
        self.max_skipped = max_skipped
        self.skipped = 0
        self.losses: list[tuple[int, Tensor]] = []  # of the batches of this step
        self.asked: Callable[[], bool] | None = None  # whether one of them is not finite, in any process
        self.statistics: list[Tensor] = []
        self.kept: list[Tensor] = []

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        norms = [module for module in pl_module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
        self.kept = [buffer.clone() for buffer in self.statistics]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.statistics and not self.losses:
            torch._foreach_copy_(self.kept, self.statistics)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.losses.append((trainer.fit_loop.batch_idx, loss.detach()))
        if not inside_step(trainer):
            self.asked = ask_all(~torch.stack([loss.isfinite().all() for _, loss in self.losses]).all())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self.losses = self.losses, []
        asked, self.asked = self.asked, None
        if asked is None or not asked():
            return
        self.skipped += 1
        optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without gradients
        if self.statistics:
            torch._foreach_copy_(self.statistics, self.kept)
        for batch, loss in losses:
            if not loss.isfinite().all():
                warnings.warn(
                    f"the loss is {loss.item()} in epoch {trainer.current_epoch}, batch {batch}"
                    f"{image_names(trainer, batch)}; step {trainer.global_step} is left out, number {self.skipped} of "
                    f"at most {self.max_skipped}",
                    stacklevel=2,
                )
        if self.skipped >= self.max_skipped:
            raise UserError(
                f"stopped, because the loss was not finite in {self.skipped} steps; the warnings above name the "
                "batches. A lower learning rate, longer warm-up or gradient clipping may help"
            )


def ask_all(flag: Tensor) -> Callable[[], bool]:
    """Ask whether ``flag``, one boolean, is true in any process. The answer comes from what is returned.

    Between the two the CPU can give the GPU more to do: the answer waits for what was queued before the question only.
    """
    flag, work = flag.to(torch.uint8), None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
    if flag.device.type != "cuda":

        def answer() -> bool:
            if work is not None:
                work.wait()
            return bool(flag)

        return answer
    stream = torch.cuda.Stream(flag.device)
    stream.wait_stream(torch.cuda.current_stream(flag.device))
    with torch.cuda.stream(stream):
        if work is not None:
            work.wait()  # makes this stream wait, and nothing else
        copy = flag.to("cpu", non_blocking=True)
        done = stream.record_event()
    flag.record_stream(stream)

    def answer_of_gpu() -> bool:
        done.synchronize()
        return bool(copy)

    return answer_of_gpu


def image_names(trainer: Trainer, batch: int) -> str:
    """Which images a batch of this epoch holds, as far as the loader and the dataset can say."""
    loader = trainer.train_dataloader
    if not isinstance(loader, TrainLoader):
        return ""
    indices = loader.indices(batch)
    samples = getattr(loader.dataset.dataset, "samples", None)
    # As in torchvision's folders, the file comes first.
    names = (
        [samples[i][0] for i in indices]
        if samples and isinstance(samples[0], tuple)
        else [f"image {i}" for i in indices]
    )
    return f" ({', '.join(map(str, names[:MAX_NAMES]))}{', ...' if len(names) > MAX_NAMES else ''})"


class GlobalBatchSize(Callback):
    """Accumulate as many batches per step as make up one global batch, whatever the number of devices.

    The data module's ``batch_size`` is that of one device. Batches at the end of an epoch that do not fill a global one
    are left out, so that the number of steps does not depend on the number of devices either. Learning rates are for
    the global batch and need no change while it stays the same.

    Args:
        size: Images per optimizer step.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        per_device, devices = getattr(trainer.datamodule, "batch_size", None), trainer.world_size
        if per_device is None:
            raise UserError("global_batch_size: the data module has no batch_size to reckon with")
        if self.size < 1 or self.size % (per_device * devices):
            raise UserError(
                f"global_batch_size: {self.size} is not a multiple of {per_device * devices}, which is the data's "
                f"batch_size of {per_device} on {devices} device{'s' if devices > 1 else ''}"
            )
        trainer.accumulate_grad_batches = self.size // (per_device * devices)
        limit = trainer.limit_train_batches
        if trainer.accumulate_grad_batches > 1 and isinstance(limit, float) and limit == 1:  # a whole 1 is a batch
            batches = len(trainer.datamodule.train_dataloader())
            trainer.limit_train_batches = batches - batches % trainer.accumulate_grad_batches or batches
