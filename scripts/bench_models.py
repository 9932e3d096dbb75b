"""Whole models on one GPU: images per second and peak memory, inference and training, eager and compiled.

    python scripts/bench_models.py [NAME ...] [--accelerate NAME ...] [--modes inference training]
                                   [--ways eager compiled graphs] [--sizes 224 512] [--batch 256 128] [--warm 16]
                                   [--missing | --again] [--seconds 560] [--output FILE]

bfloat16 autocast on synthetic images; training is a forward and backward pass and a step of fused AdamW. What is timed
is first compared with the same model in float32 on the CPU: the outputs, and for training every gradient. Where they
differ the cell says so and has no figure. Both memory formats are tried eagerly, and the faster one is compiled: as
`torch.compile` does by default, and with `mode="reduce-overhead"`, which replays a step's kernels as CUDA graphs.

Some models make much of rounding in training: batch norm over two images, and choices such as routes and ReLUs that
rounding tips. So eager training is compared twice, as it is timed and in float32 on the GPU, where the limit is tight.
Beyond either limit the difference is held against what rounding does to the same model on the CPU. In bfloat16 that
may say little (HaloNets with batch norm lose most of their gradient); in float32 a wrong table still shows.

Eager figures come first, size by size, then the compiled ones, in the order of the names; all are measured alone. What
takes long is compiling: `--warm` does it beforehand in as many processes, which leave what they made in the caches.

Batches are those up to 256 pixels; at larger sizes they shrink so that the number of pixels stays that of 224. Cells
are kept in a .json beside the table, so that several runs can share the work: a run replaces the cells that it
measured, or with `--missing` only measures those that have no figure yet. What waits for the host differs from minute
to minute; with `--again` a cell becomes the median of its runs, and shows their range if that is more than 5 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.functional import cross_entropy

import zoo
from measure import first_line, gpu_slug, markdown_table, versions

NAMES = (
    "gc_vit_tiny",
    "gcvit_tiny",
    "dinat_tiny",
    "swin_tiny_patch4_window7_224",
    "biformer_tiny",
    "agent_swin_tiny",
    "nat_tiny",
    "convnext_tiny",
)
MODES, WAYS = ("inference", "training"), ("eager", "compiled", "graphs")
COMPILE_MODE = {"compiled": "default", "graphs": "reduce-overhead"}  # of torch.compile
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# Inference: of the largest output. Training: of the norm of all gradients, too. Tried on the CPU, bfloat16 autocast of
# convnext_tiny, swin_tiny and halonet26t errs by 0.004 to 0.007 in inference and 0.006 to 0.07 in training; one bias
# table of swin_tiny with its sign changed, by 0.06.
ALLOWED = {"inference": 0.02, "training": 0.12}
ALLOWED_EXACT = 0.001  # the same in float32, where swin_tiny errs by 0.000001
# Where that is too little, in units of the error by rounding on the CPU; in float32 algorithms of convolution differ.
# In training halonet_h1_256 errs there by 0.36 in bfloat16 and 0.002 in float32, by 0.37 with the sign of one table
# changed; biformer_tiny by 0.06 and 0.000001.
MOST_ROUNDING = {torch.bfloat16: 4, torch.float32: 16}
DEVICE = "cuda"


class Job(NamedTuple):
    """One figure."""

    name: str
    size: int
    batch: int
    mode: str
    way: str
    accelerate: bool = False

    @property
    def row(self) -> str:
        """The table's row that it belongs to."""
        return f"{self.name}, accelerated" if self.accelerate else self.name

    @property
    def plain(self) -> Job:
        """What it is compared with: jobs that differ in nothing else share it."""
        return self._replace(batch=2, way="eager", accelerate=False)


def create(job: Job) -> nn.Module:
    """The model with fixed random weights, on the CPU. Without stochastic depth: its outputs are to be compared.

    As models are initialised, the head sees little but the stem: weights are small, and layer scale is, and timm's
    HaloNets end their branches with gains of 0. Here every part counts, or comparing outputs would say nothing of the
    attention; but with gains of 1 rounding would grow from block to block.
    """
    torch.manual_seed(0)
    try:
        model = timm.create_model(job.name, img_size=job.size, drop_path_rate=0.0)
    except TypeError:  # most models take any size
        model = timm.create_model(job.name, drop_path_rate=0.0)
    products = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x in products or name.endswith("_rel"):  # HaloNets multiply these with queries
                x.normal_(std=x[0].numel() ** -0.5)
            elif name.endswith("conv3_1x1.bn.weight"):
                x.fill_(0.2)
            elif x.dim() > 1:  # tables of positions
                x.normal_()
            elif 0 < x.abs().max() < 0.1:  # layer scale
                x.fill_(0.5)
    return model.train(job.mode == "training")


def batch_at(size: int, batch: int) -> int:
    """`batch`; of larger images as many as have the pixels of `batch` images of 224 pixels a side, and even."""
    return batch if size <= 256 else max(2, 2 * round(batch * (224 / size) ** 2 / 2))


def outputs_and_gradients(
    model: nn.Module, call: Callable, images: Tensor, labels: Tensor, amp: bool
) -> tuple[Tensor, list[Tensor]]:
    """Of one batch, on the CPU; gradients only in training, of the mean loss."""
    with torch.set_grad_enabled(model.training):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            out = call(images)
        if not model.training:
            return out.float().cpu(), []
        grads = torch.autograd.grad(cross_entropy(out.float(), labels), list(model.parameters()), allow_unused=True)
    return out.detach().float().cpu(), [g.float().cpu() for g in grads if g is not None]


@cache
def on_cpu(job: Job, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Two images through a plain job's model on the CPU in this dtype, bfloat16 by autocast."""
    model = create(job)
    images, labels = two_images(job.size)
    if dtype == torch.float64:
        model, images = model.double(), images.double()
    return outputs_and_gradients(model, model, images, labels, amp=dtype == torch.bfloat16)


def two_images(size: int) -> tuple[Tensor, Tensor]:
    """Two images and their labels, on the CPU."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 7])


def difference(results: tuple[Tensor, list[Tensor]], exact: tuple[Tensor, list[Tensor]]) -> float:
    """Of the outputs relative to the largest, or of all gradients relative to their norm: the larger one."""
    (out, grads), (exact_out, exact_grads) = results, exact
    error = ((out - exact_out).abs().max() / exact_out.abs().max()).item()
    if grads:
        differences = [g - e for g, e in zip(grads, exact_grads, strict=True)]
        distance, norm = (torch.stack([x.norm() for x in xs]).norm() for xs in (differences, exact_grads))
        error = max(error, (distance / norm).item())
    return error


def error_of(model: nn.Module, call: Callable, job: Job, layout: torch.memory_format, amp: bool = True) -> float:
    """Difference from float32 on the CPU.

    The two images are repeated to the batch that is timed, so that nothing is compiled for another; means over the
    batch, of the loss or in batch norm, stay the same.
    """
    images, labels = (x.repeat(job.batch // 2, *[1] * (x.dim() - 1)).to(DEVICE) for x in two_images(job.size))
    images = images.contiguous(memory_format=layout)
    out, grads = outputs_and_gradients(model, call, images, labels, amp)
    return difference((out[:2], grads), on_cpu(job.plain, torch.float32))


def checked_error(model: nn.Module, call: Callable, job: Job, layout: torch.memory_format, amp: bool = True) -> float:
    """`error_of`, found small enough.

    Raises:
        ValueError: It is too large.
    """
    error = error_of(model, call, job, layout, amp)
    allowed = ALLOWED[job.mode] if amp else ALLOWED_EXACT
    if not error <= allowed and job.mode == "training":
        coarse, fine = (torch.bfloat16, torch.float32) if amp else (torch.float32, torch.float64)
        rounding = difference(on_cpu(job.plain, coarse), on_cpu(job.plain, fine))
        allowed = max(allowed, MOST_ROUNDING[coarse] * rounding)
    if not error <= allowed:
        dtype = "bfloat16" if amp else "float32"
        raise ValueError(f"differs from float32 on the CPU by {error:.2g} in {dtype}; {allowed:.2g} is allowed")
    return error


def ready(job: Job, layout: str) -> tuple[nn.Module, Callable]:
    """The model on the GPU, and what to call."""
    model = create(job)
    if job.accelerate:
        zoo.accelerate(model)
    model = model.to(DEVICE, memory_format=LAYOUTS[layout])
    return model, torch.compile(model, mode=COMPILE_MODE[job.way]) if job.way in COMPILE_MODE else model


def measure(job: Job, layout: str) -> dict:
    """Images per second, peak memory in GiB, and the error, after it was found small enough."""
    model, call = ready(job, layout)
    errors = {"error": checked_error(model, call, job, LAYOUTS[layout])}
    if model.training and job.way == "eager":
        errors["exact"] = checked_error(model, call, job.plain, LAYOUTS[layout], amp=False)
    images = torch.randn(job.batch, 3, job.size, job.size, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, (job.batch,), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def infer():
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            call(images)

    def train():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step = train if model.training else infer
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for mark in marks[:-1]:
        mark.record()
        step()
    marks[-1].record()
    torch.cuda.synchronize()
    # From mark to mark, so that what the host does between steps counts, too.
    median = statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))
    memory = torch.cuda.max_memory_allocated()
    if job.way == "graphs":  # they have theirs from before, and keep it
        torch.cuda.empty_cache()
        memory = torch.cuda.memory_reserved()
    return {"images": job.batch / median * 1e3, "memory": memory / 2**30, "layout": layout, **errors}


def tidy() -> None:
    """Free what the last model held."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def best_of(job: Job, layouts: list[str]) -> dict | str:
    """The fastest memory format's figures, or why there are none."""
    found, reason = [], ""
    for layout in layouts:
        try:
            found.append(measure(job, layout))
        except torch.cuda.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # compilers raise many kinds, and one model's failure is its own row's
            reason = first_line(error)
        tidy()
    return max(found, key=lambda result: result["images"], default=reason)


def settle() -> None:
    """How this process runs models."""
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # what is compared in float32 is to be float32
    inductor.autotune_local_cache = False  # what was fastest among other processes is not known


def settle_worker(cores: int) -> None:
    """The same in one of many processes, which has so many cores to itself."""
    settle()
    inductor.compile_threads = cores
    torch.set_num_threads(cores)


def compile_one(work: tuple[Job, str]) -> str:
    """In a worker: leave in the caches what `measure` compiles. Says what came of it; nothing depends on that."""
    job, layout = work
    began = time.time()
    for _ in range(10):
        try:
            model, call = ready(job, layout)
            images, labels = (x.repeat(job.batch // 2, *[1] * (x.dim() - 1)).to(DEVICE) for x in two_images(job.size))
            outputs_and_gradients(model, call, images.contiguous(memory_format=LAYOUTS[layout]), labels, amp=True)
            return f"{job.row} {job.mode} compiled in {time.time() - began:.0f} s"
        except torch.cuda.OutOfMemoryError:  # the others have it
            reason = "out of memory"
        except Exception as error:  # it will come up again where it is measured
            reason = first_line(error)
            break
        finally:
            model = call = images = None
            tidy()
        time.sleep(5)
    return f"{job.row} {job.mode} not compiled beforehand: {reason}"


def compile_all(work: list[tuple[Job, str]], workers: int, seconds: float) -> None:
    """`compile_one` in many processes; what is not done in time is given up."""
    end = time.time() + seconds
    # Training takes longest: first.
    work = sorted(work, key=lambda item: item[0].mode != "training")
    cores = max(1, (os.cpu_count() or 1) // workers)
    with multiprocessing.get_context("spawn").Pool(min(workers, len(work)), settle_worker, (cores,)) as pool:
        results = pool.imap_unordered(compile_one, work)
        for done in range(len(work)):
            try:
                print(results.next(max(0.0, end - time.time())), flush=True)
            except multiprocessing.TimeoutError:
                print(f"{len(work) - done} of {len(work)} not compiled in {seconds:.0f} s", flush=True)
                break


def with_earlier(result: dict | str, earlier: dict | str | None) -> dict | str:
    """A result as the median of itself and the runs before it."""
    if not isinstance(result, dict) or not isinstance(earlier, dict):
        return result
    runs = [*earlier.get("runs", [earlier["images"]]), result["images"]]
    return result | {"images": statistics.median(runs), "runs": runs}


def cell(result: dict | str | None) -> str:
    """Images per second, from where to where if runs differ, and peak memory; or why there are none."""
    if not isinstance(result, dict):
        return result or "-"
    runs = result.get("runs", [result["images"]])
    spread = f" [{min(runs):,.0f} to {max(runs):,.0f}]" if max(runs) > 1.05 * min(runs) else ""
    return f"{result['images']:,.0f}{spread} ({result['memory']:.1f})"


def report(sizes: dict[str, dict], about: str) -> str:
    """A table for each size, as Markdown."""
    parts = [
        "# Models on one GPU\n",
        f"{about}. bfloat16 autocast, synthetic images, AdamW (fused); images per second, medians of 30 steps, and in "
        "parentheses the peak memory in GiB. Brackets: runs differ, and the figure is their median. The memory format "
        "is the faster one, eager; the error is the largest difference from float32 on the CPU, of outputs relative to "
        "the largest, or of all gradients relative to their norm; beside it, that of eager training when it is in "
        'float32, too. Graphs: compiled with `mode="reduce-overhead"`.\n',
    ]
    for size, table in sorted(sizes.items(), key=lambda item: int(item[0])):
        batches = ", ".join(f"{mode} at batch {table['batch'][mode]}" for mode in MODES if mode in table["batch"])
        columns = [f"{mode} {way}" for mode in MODES for way in WAYS]
        columns = [c for c in columns if any(c in results for results in table["rows"].values())]
        header = ["model", *(", ".join(c.split()) for c in columns), "memory format", "error", "in float32"]
        lines = []
        for name, results in table["rows"].items():
            known = [r for r in results.values() if isinstance(r, dict)]
            exact = [r["exact"] for r in known if "exact" in r]
            layouts = {mode: results.get(f"{mode} eager") for mode in MODES}
            lines.append(
                [
                    name,
                    *(cell(results.get(column)) for column in columns),
                    "; ".join(f"{mode} {r['layout']}" for mode, r in layouts.items() if isinstance(r, dict)),
                    f"{max(r['error'] for r in known):.3f}" if known else "-",
                    f"{max(exact):.1e}" if exact else "-",
                ]
            )
        parts += [f"## {size} x {size} pixels, {batches}\n", markdown_table(header, lines)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(NAMES), help="models, ours or timm's")
    parser.add_argument("--accelerate", nargs="*", default=[], metavar="NAME", help="models of timm's with our kernels")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="pixels a side")
    parser.add_argument("--batch", nargs=2, type=int, default=(256, 128), metavar=("INFERENCE", "TRAINING"))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="memory formats to try")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="compile in N processes beforehand")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--missing", action="store_true", help="only what the table has no figure of")
    which.add_argument("--again", action="store_true", help="add to what the table has, instead of replacing it")
    parser.add_argument("--seconds", type=float, default=560, help="start no further figure after this time")
    parser.add_argument("--output", type=Path, help="the table; scripts/results/models_<gpu>.md by default")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    start = time.time()
    settle()
    output = args.output or Path(__file__).parent / "results" / f"models_{gpu_slug()}.md"
    store, about = output.with_suffix(".json"), versions()
    saved = json.loads(store.read_text()) if store.is_file() else {}
    # Figures of other versions are not to be compared with these.
    sizes = saved["sizes"] if saved.get("about") == about else {}

    def results_of(job: Job) -> dict:
        return sizes.setdefault(str(job.size), {"batch": {}, "rows": {}})["rows"].setdefault(job.row, {})

    def layouts_of(job: Job) -> list[str]:
        eager = results_of(job).get(f"{job.mode} eager")
        return [eager["layout"]] if job.way in COMPILE_MODE and isinstance(eager, dict) else args.layouts

    jobs = [
        Job(name, size, batch_at(size, args.batch[MODES.index(mode)]), mode, way, accelerate)
        for way in WAYS
        if way in args.ways
        for size in args.sizes
        for accelerate, names in ((False, args.names), (True, args.accelerate))
        for name in names
        for mode in args.modes
    ]
    if args.missing:
        jobs = [job for job in jobs if not isinstance(results_of(job).get(f"{job.mode} {job.way}"), dict)]
    for job in jobs:
        if args.warm and job.way in COMPILE_MODE:
            left = args.seconds - (time.time() - start)
            work = [(j, layout) for j in jobs if j.way in COMPILE_MODE for layout in layouts_of(j)]
            compile_all(work, args.warm, 0.6 * left)
            args.warm = 0
        if time.time() - start > args.seconds:
            print(f"no time for {job}", flush=True)
            continue
        began = time.time()
        result = best_of(job, layouts_of(job))
        if args.again:
            result = with_earlier(result, results_of(job).get(f"{job.mode} {job.way}"))
        results_of(job)[f"{job.mode} {job.way}"] = result
        sizes[str(job.size)]["batch"][job.mode] = job.batch
        store.write_text(json.dumps({"about": about, "sizes": sizes}, indent=1) + "\n")
        output.write_text(report(sizes, about))
        print(f"{job.size} {job.row} {job.mode} {job.way}: {cell(result)}, {time.time() - began:.0f} s", flush=True)
    print(report(sizes, about) + f"\nwritten to {output} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
