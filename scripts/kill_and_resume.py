"""Kill training at random moments, resume it, and compare every loss with a run that was left alone, bit by bit.

$ python scripts/kill_and_resume.py > scripts/results/kill_and_resume.txt

Each run is `zoo fit` in a process of its own, forked from this one so that nothing is imported anew. Once a random
number of losses has been written it is killed with SIGKILL, a random fraction of a step later; `--ckpt_path last` goes
on from what is left. Runs that were terminated, whose newest checkpoint was cut off, or that ran out of disk follow.
"""

import hashlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
import yaml
from sklearn.datasets import load_digits
from torchvision.utils import save_image

import zoo.lightning_cli  # noqa: F401  (before forking)
from zoo.cli import main as run_zoo
from zoo.task import Classification
from zoo.training import SIGTERM_STATUS

DIGITS = {"class_path": "zoo.data.Digits", "init_args": {"image_size": 32, "channels": 1, "batch_size": 16}}
FOLDER = {"class_path": "zoo.data.ImageFolder", "init_args": {"root": "images", "batch_size": 8, "num_workers": 2}}
EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
DINAT = {"model_name": "test_dinat", "model_args": {"in_chans": 1, "drop_path_rate": 0.2}, "warmup_epochs": 1}

SETTINGS = {
    "accumulated batches": {
        "model": DINAT,
        "data": DIGITS,
        "trainer": {"max_epochs": 3},
        "global_batch_size": 32,
        "save_progress": {"every_n_steps": 1},
    },
    "epochs, mixup, averaged weights": {
        "model": {**DINAT, "mixup": 0.8},
        "data": DIGITS,
        "trainer": {"max_epochs": 3, "callbacks": [EMA]},
        "save_progress": {"every_n_steps": 3},
    },
    "two workers, batch norm, augmentation": {
        "model": {"model_name": "test_resnet", "model_args": {"drop_rate": 0.1}},
        "data": {**FOLDER, "init_args": {**FOLDER["init_args"], "image_size": 64}},
        "trainer": {"max_epochs": 3, "callbacks": [EMA]},
        "save_progress": {"every_n_steps": 2},
    },
    "a number of steps, validation within epochs": {
        "model": {**DINAT, "mixup": 0.8},
        "data": DIGITS,
        "trainer": {"max_epochs": -1, "max_steps": 22, "val_check_interval": 3, "callbacks": [EMA]},
        "save_progress": {"every_n_steps": 2},
    },
}
TRAINER = {
    "accelerator": "cpu",
    "limit_train_batches": 8,
    "limit_val_batches": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "x"}},
}


def configuration(setting: dict) -> dict:
    """The setting as `zoo fit --config` takes it."""
    model = {"class_path": "zoo.task.Classification", "init_args": setting["model"]}
    return {**setting, "model": model, "trainer": {**TRAINER, **setting["trainer"]}}


def train(folder: Path, prepare: Callable[[], None] | None = None) -> int:
    """Start `zoo fit --ckpt_path last` in ``folder`` and return the process's number.

    It appends ``epoch batch loss`` to ``trace`` there for each batch, and what it prints to ``log``.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        trace = open("trace", "a", buffering=1)
        step, validated = Classification.training_step, Classification.on_validation_end

        def training_step(self: Classification, batch: tuple, batch_idx: int) -> torch.Tensor:
            loss = step(self, batch, batch_idx)
            trace.write(f"{self.current_epoch}.{batch_idx} {loss.item().hex()}\n")
            return loss

        def on_validation_end(self: Classification) -> None:
            validated(self)
            if not self.trainer.sanity_checking:
                loss = self.trainer.callback_metrics["val_loss"].item()
                trace.write(f"validation.{self.global_step} {loss.hex()}\n")

        Classification.training_step, Classification.on_validation_end = training_step, on_validation_end
        if prepare is not None:
            prepare()
        status = run_zoo(["fit", "--config", "config.yaml", "--ckpt_path", "last"])
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(process: int) -> int:
    """Wait for a process and return its exit status, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def interrupt(folder: Path, losses: int, delay: float, signal_: int, prepare: Callable | None = None) -> int:
    """Start training, send a signal ``delay`` seconds after so many losses, and return the exit status."""
    process = train(folder, prepare)
    while len(lines(folder)) < losses and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process, signal_)
    return finish(process)


def lines(folder: Path) -> list[str]:
    """The whole lines of a run's trace."""
    path = folder / "trace"
    return path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []


def trace(folder: Path) -> dict[str, set[str]]:
    """All losses that were computed for each batch, also by several processes."""
    found: dict[str, set[str]] = {}
    for line in lines(folder):
        key, _, loss = line.partition(" ")
        found.setdefault(key, set()).add(loss)
    return found


def checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = folder.glob("runs/x/version_*/checkpoints/last*.ckpt")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def digest(folder: Path) -> str:
    """Of the trained weights, their average and the optimizer's state."""
    hash_ = hashlib.sha256()
    checkpoint = torch.load(checkpoints(folder)[0], weights_only=True)
    kept = [checkpoint.get(key) for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers")]
    for leaf in torch.utils._pytree.tree_leaves(kept):
        hash_.update(leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return hash_.hexdigest()


class Trials:
    """Run trials, print a row for each, and count the differences."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.failures = 0
        self.rows = 0
        save_images(root / "images")
        print(f"{'trial':<45} {'ended':>12} {'at':>5} {'again':>6}  result")

    def folder(self, name: str, setting: dict) -> Path:
        folder = self.root / name.replace(" ", "-")
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration(setting)))
        (folder / "images").symlink_to(self.root / "images")
        return folder

    def reference(self, name: str, setting: dict) -> tuple[dict[str, set[str]], str]:
        """The losses and the digest of a run that was left alone."""
        folder = self.folder(f"{name} alone", setting)
        if finish(train(folder)):
            sys.exit((folder / "log").read_text())
        return trace(folder), digest(folder)

    def check(
        self, name: str, folder: Path, reference: tuple, ended: str, at: int, fault: str = "", says: str = ""
    ) -> None:
        """Resume, compare, and print the row; ``says`` is what one of the runs has to print."""
        status = finish(train(folder))
        losses, (expected, expected_digest) = trace(folder), reference
        differ = [key for key in expected.keys() | losses.keys() if losses.get(key) != expected.get(key)]
        found = [fault] if fault else []
        found += [] if says in (folder / "log").read_text() else [f"it did not say: {says}"]
        found += [f"resuming ended with status {status}"] if status else []
        found += [f"{len(differ)} losses differ, first {sorted(differ)[0]}"] if differ else []
        found += ["weights differ"] if not status and digest(folder) != expected_digest else []
        again = len(lines(folder)) - len(losses)
        print(f"{name:<45} {ended:>12} {at:>5} {again:>6}  {'; '.join(found) or 'equal'}", flush=True)
        self.failures += bool(found)
        self.rows += 1


def save_images(folder: Path) -> None:
    """Digits as files: 64 to train on, 16 to validate."""
    digits = load_digits()
    for split, numbers in (("train", range(64)), ("val", range(64, 80))):
        for i in numbers:
            path = folder / split / str(digits.target[i] % 2) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(torch.from_numpy(digits.images[i]) / 16, path)


def kill(trials: Trials, name: str, setting: dict, reference: tuple, kills: int, draw: random.Random) -> None:
    """Trials that end with SIGKILL."""
    for number in range(kills):
        status, attempt = 0, 0
        while status == 0:  # it was done before the signal came
            attempt += 1
            folder = trials.folder(f"{name} {number} {attempt}", setting)
            at = draw.randrange(1, len(reference[0]))
            status = interrupt(folder, at, draw.uniform(0, 0.2), signal.SIGKILL)
        trials.check(
            name, folder, reference, "SIGKILL", at, "" if status == -9 else f"it ended by itself, with {status}"
        )


def other_ends(trials: Trials, setting: dict, reference: tuple) -> None:
    """SIGTERM, a checkpoint that was cut off, and a full disk."""
    folder = trials.folder("terminated", setting)
    status = interrupt(folder, 5, 0, signal.SIGTERM)
    fault = "" if status == SIGTERM_STATUS else f"status {status}"
    fault = fault or ("" if len(lines(folder)) < len(reference[0]) else "it went on to the end")
    trials.check("SIGTERM inside a step", folder, reference, f"status {status}", len(lines(folder)), fault)

    folder = trials.folder("cut off", setting)
    interrupt(folder, 14, 0, signal.SIGKILL)
    newest = checkpoints(folder)[0]
    os.truncate(newest, newest.stat().st_size // 2)
    says = "looking for the checkpoint before it"
    trials.check("newest checkpoint cut off", folder, reference, "SIGKILL", 14, says=says)

    folder = trials.folder("disk full", setting)
    status = finish(train(folder, full_disk))
    fault, at = "" if status == 2 else f"status {status}", len(lines(folder))
    says = "cannot save the checkpoint"
    trials.check("disk full while saving the fourth time", folder, reference, f"status {status}", at, fault, says)


def full_disk() -> None:
    """Let this process write no more into a file once three checkpoints are saved."""
    save, saved = torch.save, []

    def save_then_fill(*args: object, **kwargs: object) -> None:
        saved.append(None)
        if len(saved) > 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(*args, **kwargs)

    torch.save = save_then_fill


def main() -> int:
    parser = ArgumentParser(description="Kill training at random moments, resume it, and compare every loss.")
    parser.add_argument("--kills", type=int, default=20, help="how many in all (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # also because a process with threads must not fork
    draw = random.Random(options.seed)
    started = time.monotonic()
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, Python {sys.version.split()[0]}, CPU")
    with tempfile.TemporaryDirectory() as root:
        trials = Trials(Path(root))
        names = list(SETTINGS)
        for i, name in enumerate(names):
            kills = len(range(i, options.kills, len(names)))
            accumulated = name == "accumulated batches"
            if kills or accumulated:
                reference = trials.reference(name, SETTINGS[name])
                kill(trials, name, SETTINGS[name], reference, kills, draw)
                if accumulated:
                    other_ends(trials, SETTINGS[name], reference)
    print(f"{trials.rows - trials.failures} of {trials.rows} equal, {time.monotonic() - started:.0f} s")
    return 1 if trials.failures else 0


if __name__ == "__main__":
    sys.exit(main())
