"""Several GPUs: whether they compute what one computes, and how many images per second they train.

    python scripts/bench_scaling.py [--only check time] [--devices 1 2 4] [--models dinat_tiny dinat_large]
                                    [--batch 128 64] [--strategies single ddp fsdp] [--compile] [--seconds 500]
                                    [--accelerator cpu] [--output FILE]

Everything runs as users run it: Lightning's trainer, the tasks and data of `zoo fit`, one process for each GPU (NCCL;
gloo on the CPU). Each figure has its own processes, and a failure is written in its place.

Evaluation has to give the same numbers to the last bit: top-1, top-5, calibration error, loss, and the confusion
matrix, of a number of images and of batches that 2 and 4 do not divide. Training losses at an equal global batch are
compared step by step, with augmentation, gradient clipping and AdamW, but without what each process draws for itself
(drop path, mixup). They differ by the order of summation, so in float64 hardly at all. Once more, one process meets a
loss that is NaN, and all have to leave out that step.

Speed is that of `Classification` as `imagenet/train` has it, with the callbacks of `zoo fit` that act in every step,
on images that are on the GPU already: data loading is another matter. Medians are of the time from step to step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from measure import first_line, gpu_slug, markdown_table, versions
from zoo.bench import scatter_weights
from zoo.data import ImageFolder
from zoo.sharded import ShardedClassification
from zoo.task import Classification
from zoo.training import SaveProgress, SkipNonFinite

STRATEGIES = ("single", "ddp", "fsdp", "ddp, bucket views")
CLASSES, TRAINING, EVALUATION = 10, 134, 203  # images
EVALUATION_BATCH, GLOBAL_BATCH = 16, 32
EPOCHS, STEPS = 2, 4  # steps of each epoch
# Of training losses, relative. In float64 nothing but a fault would show; float32 rounds at 6e-8, which AdamW enlarges
# where a gradient is hardly more than its rounding. Accumulating batches on one device shows how much that is.
ALLOWED = {"float32": 1e-4, "float64": 1e-9}
PRECISIONS = {"float32": "32-true", "float64": "64-true", "bfloat16": "bf16-mixed"}  # as Lightning has them
WARM_UP, TIMED = 6, 20  # steps


class Job(NamedTuple):
    """What one group of processes does."""

    kind: str
    strategy: str
    devices: int
    model: str
    size: int | None = None
    batch: int = 0
    compile: bool = False
    accelerator: str = "gpu"
    images: str = ""

    @property
    def cell(self) -> str:
        """Its place in the tables."""
        return f"{self.strategy} {self.devices}"


# Processes


def run_group(job: Job, method: str, seconds: float) -> Any:
    """The result of the first of `job.devices` processes, or a line that says what failed."""
    context = multiprocessing.get_context(method)
    # Importing takes as long as measuring does: one process imports, and each of the group is a fork of it.
    context.set_forkserver_preload(["zoo.bench", "zoo.data", "zoo.sharded", "zoo.training", "torchvision.transforms"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, end = Path(name), time.monotonic() + seconds
        group = [context.Process(target=work, args=(job, rank, port, folder)) for rank in range(job.devices)]
        for process in group:
            process.start()
        while any(process.is_alive() for process in group) and time.monotonic() < end:
            if any(process.exitcode for process in group):  # the others would wait for it
                end = min(end, time.monotonic() + 2)
            time.sleep(0.02)
        failed = [process.exitcode for process in group if process.exitcode]
        for process in group:
            process.kill()
            process.join()
        errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            return errors[0].read_text()
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text())
        return f"ended with status {failed[0]}" if failed else f"not done in {seconds:.0f} s"


def work(job: Job, rank: int, port: int, folder: Path) -> None:
    """One process of a group: Lightning takes it from the environment that others run."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.accelerator == "cpu":
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    # On the CPU as many in every group, because sums of matrix products depend on it.
    torch.set_num_threads(1 if job.accelerator == "cpu" else max(1, (os.cpu_count() or 1) // job.devices))
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        result = {"probe": probe, "check": check, "time": measure_steps}[job.kind](job, folder)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException as error:
        traceback.print_exc()
        (folder / f"error-{rank}").write_text(first_line(error))
        raise SystemExit(1) from None


def probe(job: Job, folder: Path) -> dict[str, str]:
    """What the device is, if it can be used at all."""
    if job.accelerator == "cpu":
        return {"slug": "cpu", "about": f"CPU, gloo, torch {torch.__version__}, Python {platform.python_version()}"}
    torch.zeros(1, device="cuda")
    return {"slug": gpu_slug(), "about": f"{versions()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"}


def make_task(job: Job, **options: Any) -> Classification:
    task = ShardedClassification if job.strategy == "fsdp" else Classification
    return task(job.model, compile=job.compile, **options)


def make_trainer(job: Job, folder: Path, **options: Any) -> Trainer:
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(job.strategy)
    if job.strategy == "ddp, bucket views":
        strategy = DDPStrategy(gradient_as_bucket_view=True, static_graph=True)
    elif job.strategy == "fsdp":
        # Only for the figures: it saves nothing here.
        strategy = ModelParallelStrategy(job.devices, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return Trainer(
        accelerator=job.accelerator,
        devices=job.devices,
        strategy=strategy,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


# The same results


def save_images(folder: Path) -> None:
    """A data set in folders: noise of many sizes around a colour of each class, as a few hundred small files."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(CLASSES, 3, 1, 1, generator=generator)
    for split, count in (("train", TRAINING), ("val", EVALUATION)):
        for i in range(count):
            label = i % CLASSES
            path = folder / split / f"class{label}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = torch.rand(3, 40 + i % 7, 40 + i % 11, generator=generator)
            to_pil_image(0.7 * noise + 0.3 * colours[label]).save(path)


def image_data(job: Job, batch_size: int) -> ImageFolder:
    return ImageFolder(job.images, batch_size=batch_size, num_workers=0, image_size=job.size)


def check(job: Job, folder: Path) -> dict:
    """What is measured in evaluation, by precision, and the losses of every training step."""
    half = ["bfloat16"] if job.accelerator == "gpu" else []
    found: dict[str, Any] = {f"evaluation {p}": evaluate(job, folder, p) for p in ("float32", *half)}
    # Lightning takes no float64 for sharded weights.
    precisions = [p for p in ALLOWED if (job.strategy, p) != ("fsdp", "float64")]
    found |= {f"training {p}": losses(job, folder, p) for p in precisions}
    found["skipping float32"] = losses(job, folder, "float32", fault=True)
    if job.strategy == "single":
        found |= {f"accumulated {p}": losses(job, folder, p, accumulated=4) for p in ALLOWED}
    return found


def evaluate(job: Job, folder: Path, precision: str) -> dict[str, Any]:
    """All figures and the files beside them, of fixed random weights that tell the images apart."""
    seed_everything(0, verbose=False)
    task = make_task(job, num_classes=CLASSES)
    scatter_weights(task.model)
    logger = CSVLogger(folder, name="evaluation", version=precision)
    options = {"logger": logger, "enable_checkpointing": False}
    trainer = make_trainer(job, folder, precision=PRECISIONS[precision], **options)
    [figures] = trainer.validate(task, image_data(job, EVALUATION_BATCH), verbose=False)
    if not trainer.is_global_zero:
        return {}
    files = sorted(Path(logger.log_dir).glob("val_*.csv"))
    return figures | {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(job: Job, folder: Path, precision: str, accumulated: int = 1, fault: bool = False) -> list[float]:
    """Of the steps of two short epochs: means over the global batch; with a fault, one of them is left out."""
    torch.backends.cudnn.allow_tf32 = False  # would round by how a batch is divided, a thousand times more
    seed_everything(0, verbose=False)
    task = make_task(job, num_classes=CLASSES, model_args={"drop_path_rate": 0.0}, lr=5e-4)
    record, skip = Losses(), SkipNonFinite()
    trainer = make_trainer(
        job,
        folder,
        precision=PRECISIONS[precision],
        logger=False,
        enable_checkpointing=False,
        callbacks=[*[Fault()] * fault, record, skip],
        max_epochs=EPOCHS,
        limit_train_batches=STEPS * accumulated,
        limit_val_batches=0,
        accumulate_grad_batches=accumulated,
        gradient_clip_val=5.0,
    )
    trainer.fit(task, image_data(job, GLOBAL_BATCH // (job.devices * accumulated)))
    if skip.skipped != fault:
        raise RuntimeError(f"{skip.skipped} steps were left out, not {fault:d}")
    return [sum(record.values[i : i + accumulated]) for i in range(0, len(record.values), accumulated)]


class Losses(Callback):
    """Keeps every batch's loss, the mean over the processes; Lightning has divided it by the batches of a step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(trainer.strategy.reduce(outputs["loss"].clone(), reduce_op="mean").item())


class Fault(Callback):
    """Makes the loss of one step NaN, in the last process only. Its gradients are as they were, but must not count."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            loss.detach().fill_(torch.nan)


def deviation(trace: list[float], exact: list[float]) -> float:
    """The largest relative difference of two traces."""
    if len(trace) != len(exact):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(trace, exact, strict=True))


# Speed


class ResidentImages(LightningDataModule):
    """One random batch, again and again, where the model is."""

    def __init__(self, batch_size: int, size: int | None) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, size

    def train_dataloader(self) -> ResidentImages:
        device = self.trainer.strategy.root_device
        size = self.size or self.trainer.lightning_module.data_config["input_size"][-1]
        self.batch = (
            torch.randn(self.batch_size, 3, size, size, device=device),
            torch.randint(1000, (self.batch_size,), device=device),
        )
        return self

    def __len__(self) -> int:
        return WARM_UP + TIMED + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(len(self)):
            yield self.batch


class Progress(SaveProgress):
    """What it does in each step, without the files."""

    def save(self, trainer: Trainer) -> None:
        pass


class Clock(Callback):
    """Marks the start of every step in the device's own time."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        if batch_idx == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def step_seconds(self) -> list[float]:
        """Of the steps after the first few."""
        marks = self.marks[WARM_UP:]
        if not self.cuda:
            return [b - a for a, b in pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def measure_steps(job: Job, folder: Path) -> dict[str, float]:
    """Images per second of all processes, seconds of a step, and one process's peak memory in GiB."""
    cuda = job.accelerator == "gpu"
    task = make_task(job, lr=1e-3, min_lr=5e-6, mixup=0.8, cutmix=1.0)
    clock = Clock(cuda)
    trainer = make_trainer(
        job,
        folder,
        precision="bf16-mixed",
        logger=CSVLogger(folder),
        callbacks=[SkipNonFinite(), Progress(), clock],
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=5.0,
    )
    trainer.fit(task, ResidentImages(job.batch, job.size))
    seconds = clock.step_seconds()
    median = statistics.median(seconds)
    return {
        "images": job.devices * job.batch / median,
        "step": median,
        "slowest": max(seconds),
        "memory": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


# Tables


def compare(kind: str, found: Any, single: dict[str, Any]) -> tuple[str, bool]:
    """How one kind of results of a group of processes relates to those of one, in a word, and whether it may."""
    if not isinstance(found, dict):
        return found, False
    if kind not in found:
        return "", True
    if kind.startswith("evaluation"):
        differ = [name for name in single[kind] if found[kind].get(name) != single[kind][name]]
        return f"{', '.join(differ)} differ" if differ else "equal", not differ
    off = deviation(found[kind], single[kind.replace("accumulated", "training")])
    return f"{off:.1e}", off <= ALLOWED[kind.split()[1]]


def check_table(cells: dict[str, Any]) -> tuple[str, bool]:
    """Markdown, a row for each group of processes that is compared with the single one; and whether all may be so."""
    single = cells.get("single 1")
    if not isinstance(single, dict):
        return f"One process: {single}\n", False
    kinds = [kind for kind in single if not kind.startswith("accumulated")]
    groups = {cell: {kind: compare(kind, found, single) for kind in kinds} for cell, found in cells.items()}
    training = [kind for kind in kinds if kind.startswith("training")]
    accumulated = {kind: compare(kind.replace("training", "accumulated"), single, single) for kind in training}
    groups = {"single 1": groups.pop("single 1"), "single 1, accumulating 4 batches": accumulated, **groups}
    rows = [
        [name, *(("" if fine else "WRONG: ") + words for words, fine in (row.get(kind, ("", True)) for kind in kinds))]
        for name, row in groups.items()
    ]
    figures = single["evaluation float32"]
    numbers = ", ".join(f"{name} {figures[f'val_{name}']:.7f}" for name in ("top1", "top5", "ece", "loss"))
    first, *_, last = trace = single["training float64"]
    skipping = "Skipping: the loss of the third step is NaN in the last process, and all leave that step out."
    text = (
        f"{EVALUATION} images in batches of {EVALUATION_BATCH}; one process, float32: {numbers}. Equal is to the last "
        "bit of these, and in every entry of the confusion matrix and the table of classes.\n\n"
        f"Training losses of {len(trace)} steps of {GLOBAL_BATCH} images, from {first:.4f} to {last:.4f} for one "
        f"process: the largest relative difference from it, of which {ALLOWED['float32']:g} is allowed in float32 and "
        f"{ALLOWED['float64']:g} in float64. {skipping if 'skipping float32' in kinds else ''}\n\n"
    )
    fine = all(fine for row in groups.values() for _, fine in row.values())
    return text + markdown_table(["strategy and processes", *kinds], rows), fine


def time_table(cells: dict[str, Any], devices: list[int]) -> str:
    """Markdown: a row for each strategy, images per second by number of devices, and how well they scale."""
    single = cells.get("single 1")
    rows = []
    for strategy in dict.fromkeys(cell.rpartition(" ")[0] for cell in cells):
        found = {n: cells.get(f"{strategy} {n}") for n in devices}
        row = [strategy]
        for n in devices:
            result = found[n]
            is_figure = isinstance(result, dict)
            row.append(f"{result['images']:,.0f} ({result['memory']:.1f})" if is_figure else result or "")
        for n in devices[1:]:
            for base in (found[devices[0]], single):
                both = isinstance(base, dict) and isinstance(found[n], dict)
                row.append(f"{found[n]['images'] / base['images'] / n * devices[0]:.1%}" if both else "")
        rows.append(row)
    header = ["strategy", *(f"{n} device{'s' if n > 1 else ''}" for n in devices)]
    header += [f"{n} against {m}" for n in devices[1:] for m in (devices[0], "single")]
    return markdown_table(header, rows)


def report(saved: dict[str, Any], devices: list[int]) -> str:
    """All tables, as Markdown."""
    parts = [f"# Several devices\n\n{saved['about']}.\n"]
    for model, cells in saved["check"].items():
        parts.append(f"## The same results: {model}\n\n{check_table(cells)[0]}")
    for title, cells in saved["time"].items():
        parts.append(
            f"## Training {title}\n\nImages per second of all devices together, medians of {TIMED} steps, and in "
            "parentheses the peak memory of one in GiB; then the share of n times the speed of one, with the same "
            f"strategy and without any.\n\n{time_table(cells, devices)}"
        )
    return "\n".join(parts)


def check_jobs(options: argparse.Namespace) -> list[Job]:
    """One process first, which also compiles the kernels for all."""
    model = options.check_model or ("dinat_tiny" if options.accelerator == "gpu" else "test_dinat")
    size = options.size or (None if options.accelerator == "gpu" else 32)
    several = [(s, n) for s in ("ddp", "fsdp") for n in options.devices if n > 1 and s in options.strategies]
    groups = [("single", 1), *sorted(several, key=lambda group: -group[1])]
    return [Job("check", s, n, model, size, accelerator=options.accelerator) for s, n in groups]


def time_jobs(options: argparse.Namespace) -> list[Job]:
    """What tells most comes first: of each strategy the most devices, then one, then those between."""
    most = max(options.devices)
    devices = sorted(options.devices, key=lambda n: (n != most, n))
    batches = dict(zip(options.models, options.batch * len(options.models)))
    ranks = [strategies for strategies in (("single", "ddp"), ("fsdp",), ("ddp, bucket views",))]
    return [
        Job("time", strategy, n, model, options.size, batches[model], options.compile, options.accelerator)
        for strategies in ranks
        for model in options.models
        for strategy in strategies
        if strategy in options.strategies
        for n in ([1] if strategy == "single" else devices)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("check", "time"), default=("check", "time"))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--models", nargs="+", default=["dinat_tiny", "dinat_large"], help="to time")
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 64], help="per device, for each model or for all")
    parser.add_argument("--size", type=int, help="pixels a side; the model's own by default")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models that are timed")
    parser.add_argument("--check-model", help="to check; dinat_tiny, on the CPU test_dinat")
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing further after this time")
    parser.add_argument("--output", type=Path, help="the tables; scripts/results/scaling_<gpu>.md by default")
    options = parser.parse_args()
    started = time.monotonic()
    for method in ("forkserver", "spawn"):  # no fork can use the GPU if something that was imported has
        found = run_group(Job("probe", "single", 1, "", accelerator=options.accelerator), method, 120)
        if isinstance(found, dict):
            break
        print(f"{method}: {found}", flush=True)
    else:
        raise SystemExit("needs CUDA GPUs, or --accelerator cpu")
    about = found["about"]
    print(f"{about}\n{method}, ready after {time.monotonic() - started:.0f} s", flush=True)
    output = options.output or Path(__file__).parent / "results" / f"scaling_{found['slug']}.md"
    store = output.with_suffix(".json")
    saved = json.loads(store.read_text()) if store.is_file() else {}
    if saved.get("about") != about:  # figures of other versions are not to be compared with these
        saved = {"about": about, "check": {}, "time": {}}

    jobs = {"check": check_jobs, "time": time_jobs}
    with tempfile.TemporaryDirectory() as images:
        save_images(Path(images))
        for job in [job for kind in jobs if kind in options.only for job in jobs[kind](options)]:
            left = options.seconds - (time.monotonic() - started)
            if left < 0:
                print(f"no time for {job.kind} {job.model} {job.cell}", flush=True)
                continue
            began = time.monotonic()
            title = job.model
            if job.kind == "time":
                title += f", batch {job.batch} per device, {'compiled' if job.compile else 'eager'}"
            result = run_group(job._replace(images=images), method, max(60, min(300, left)))
            saved[job.kind].setdefault(title, {})[job.cell] = result
            store.write_text(json.dumps(saved, indent=1) + "\n")
            output.write_text(report(saved, options.devices))
            words = result if isinstance(result, str) else "done"
            if job.kind == "time" and isinstance(result, dict):
                words = f"{result['images']:,.0f} images/s, {result['memory']:.1f} GiB"
            print(f"{job.kind} {title}, {job.cell}: {words}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{report(saved, options.devices)}\nwritten to {output} after {time.monotonic() - started:.0f} s")
    return 0 if all(check_table(cells)[1] for cells in saved["check"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
