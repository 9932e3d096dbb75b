"""``zoo bench``: what models and operators take on this device, after their results were found right."""

from __future__ import annotations

import copy
import csv
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import zoo
from zoo.errors import UserError
from zoo.files import check_output, write_whole
from zoo.kernels import explain_backend, neighborhood_attention_2d

DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16)}
# Of the largest output, against float64. Convolutions of float32 run in TF32 on CUDA unless torch is told otherwise.
# In bfloat16 convnext_tiny, swin_tiny and halonet26t err by 0.004 to 0.007, a wrong sign of one bias table by 0.06.
ALLOWED = {"float32": 2e-3, "bfloat16": 0.02, "float16": 0.01}
# The attention of DiNAT-Tiny's levels, by the image's side over the map's: heads and dilation; 32 channels a head.
LEVELS = {4: (2, (1, 8)), 8: (4, (1, 4)), 16: (8, (1, 2)), 32: (16, (1,))}
KERNEL_SIZE, HEAD_DIM = 7, 32

KEYS = "call", "name", "image size"  # what a row is of
WIDTH = 160  # of a table in a file
NAMES = "query", "key", "value", "rel_pos_bias", "extra_key", "extra_value"
L2_BYTES = 2**26  # no GPU that we measured has more
FLEX_BLOCK = 128  # FlexAttention's default


class Settings(NamedTuple):
    """What is asked for all rows.

    Attributes:
        device: "cpu", "cuda", "cuda:1", ...; None for the first GPU, or the CPU where there is none.
        batch_size: Images at once, for throughput and memory.
        image_size: Side of the images in pixels; None for each model's own.
        dtype: "float32", "bfloat16" or "float16", the latter two by autocast for models.
        compile: Run models through ``torch.compile`` in this mode.
        seconds: Time spent on each figure.
    """

    device: str | None = None
    batch_size: int = 1
    image_size: int | None = None
    dtype: str = "float32"
    compile: str | None = None
    seconds: float = 2.0


def run_bench(models: list[str], operators: bool, output: str | None, settings: Settings) -> None:
    """Measure row by row, print each to stderr, then a table, and write it as CSV and picture into ``output``."""
    if not models and not operators:
        raise UserError("nothing to measure: give names of models, or --kernels")
    for name in ("batch_size", "image_size", "seconds"):
        if (value := getattr(settings, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if settings.device is None:
        settings = settings._replace(device="cuda" if torch.cuda.is_available() else "cpu")
    check_device(settings.device)
    if output is not None:
        check_output(output, folder=True)
    if models:
        from zoo.task import check_model_name  # only here: scripts share the rest, and need no Lightning

        for model in models:
            check_model_name(model)
    warnings.filterwarnings("ignore", module="torch")  # of compilers and peers, of no use to the reader
    torch.backends.cudnn.benchmark = True
    print(about(settings), flush=True)
    for name, measured, figures in (
        ("models", (bench_model(model, settings) for model in models), MODEL_FIGURES),
        ("kernels", bench_kernels(settings) if operators else (), KERNEL_FIGURES),
    ):
        rows = []
        for row in measured:
            rows.append(row)
            words = [row[key] for key in KEYS if key in row]
            words += [f"{figure} {form.format(row[figure])}" for figure, form in figures.items() if figure in row]
            print("  ".join([*words, row.get("note", "")]).rstrip(), file=sys.stderr, flush=True)
        if rows:
            report(name, rows, figures, settings, None if output is None else Path(output))


def check_device(device: str) -> None:
    """Raise a UserError where torch cannot use ``device``."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: torch cannot use {device!r} here ({first_line(error)})") from None


def about(settings: Settings) -> str:
    """What is measured on what, in a line."""
    if settings.device.startswith("cuda"):
        device = torch.cuda.get_device_name(settings.device)
    else:
        device = f"{settings.device} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    return (
        f"attn-zoo {zoo.__version__}, torch {torch.__version__}, {device}, {settings.dtype}, "
        f"batch {settings.batch_size}{f', models compiled ({settings.compile})' if settings.compile else ''}"
    )


# Models

MODEL_FIGURES = {
    "images/s": "{:,.1f}",
    "latency ms": "{:,.2f}",
    "MiB": "{:,.0f}",
    "parameters": "{:,}",
    "error": "{:.1e}",
}


def bench_model(name: str, settings: Settings) -> dict[str, Any]:
    """Figures of one model's inference, or a note that says why there are none.

    Throughput and peak memory (weights included) are those of a batch, latency that of a single image; medians, of
    calls as a user makes them. The error is the largest difference of the outputs of two images from those of the same
    weights in float64, relative to the largest output.

    Args:
        name: Any name that ``timm.create_model`` takes.
        settings: Device, batch, dtype, ...
    """
    from zoo.task import create_model

    size = settings.image_size
    try:
        model = create_model(name, 1000, {} if size is None else {"img_size": size})
    except TypeError:  # most models take any size
        model = create_model(name, 1000)
    model = scatter_weights(model).eval()
    channels, *sides = timm.data.resolve_model_data_config(model)["input_size"]
    sides = sides if size is None else [size, size]
    row: dict[str, Any] = {"name": name, "image size": "x".join(map(str, sides))}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    two = torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(1))
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    try:
        with torch.inference_mode():
            exact = copy.deepcopy(model).double()(two.double())
        model = model.to(device)
        call = model
        if settings.compile:
            torch.compiler.reset()  # after other models torch makes shapes dynamic, and in the end does not compile
            call = torch.compile(model, mode=settings.compile)

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return call(images)

        # The batch that is timed holds the two images, so that nothing is compiled for another.
        batch = two.repeat(-(-settings.batch_size // 2), 1, 1, 1)[: settings.batch_size].to(device)
        row["error"] = relative_error(run(batch)[:2], exact[: settings.batch_size])
        if not row["error"] <= ALLOWED[settings.dtype]:
            return row | {"note": f"not timed: differs from float64 by more than {ALLOWED[settings.dtype]:g}"}
        row["images/s"] = settings.batch_size / median_ms(lambda: run(batch), device, settings.seconds) * 1e3
        weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
        row["MiB"] = (peak_bytes(lambda: run(batch), device) + weights) / 2**20
        row["latency ms"] = median_ms(lambda: run(batch[:1]), device, settings.seconds)
    except Exception as error:  # compilers raise many kinds, and one model's failure is its own row's
        row["note"] = f"not timed: {first_line(error)}"
    return row


@torch.no_grad()
def scatter_weights(model: nn.Module) -> nn.Module:
    """Give ``model`` fixed random weights by which every part of it counts; as initialised, many hardly do."""
    generator = torch.Generator().manual_seed(0)
    products = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for x in model.parameters():
        if x in products:
            x.normal_(std=x[0].numel() ** -0.5, generator=generator)
        elif x.dim() > 1:  # tables of positions
            x.normal_(generator=generator)
        elif 0 < x.abs().max() < 0.1:  # layer scale
            x.fill_(0.5)
    return model


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest of ``exact``; nan where anything is not finite."""
    difference = (out.double().cpu() - exact).abs().max()
    return (difference / exact.abs().max()).item() if out.isfinite().all() else math.nan


# Operators

KERNEL_FIGURES = {"forward ms": "{:.3f}", "with gradients ms": "{:.3f}", "MiB": "{:,.1f}", "error / allowed": "{:.2f}"}


def bench_kernels(settings: Settings) -> Iterator[dict[str, Any]]:
    """Neighborhood attention of DiNAT-Tiny's levels by every backend that runs here, beside its peers."""
    side = settings.image_size or 224
    if side % 32:
        raise UserError(f"--image-size: expected a multiple of 32 for the operators, got {side}")
    for stride, (heads, dilations) in LEVELS.items():
        shape = settings.batch_size, side // stride, side // stride, heads, HEAD_DIM
        for dilation in dilations:
            if KERNEL_SIZE * dilation <= side // stride:
                yield from bench_call(shape, dilation, settings)


def bench_call(shape: tuple[int, ...], dilation: int, settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each way to compute one call. Dense attention is another function unless the window covers the map.

    Ours and NATTEN are compared with the float64 reference, output and gradients, at the size that is timed; only the
    first image has an incoming gradient.
    """
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    bias = torch.randn(shape[3], *[2 * KERNEL_SIZE - 1] * 2, generator=generator).to(device).requires_grad_()
    grad_out = torch.zeros(shape).to(device, dtype)
    grad_out[:1] = torch.randn(grad_out[:1].shape, generator=generator)
    auto = explain_backend(shape, KERNEL_SIZE, dilation, dtype=dtype, device=device).backend

    def ours(backend: str) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None = None) -> Tensor:
            return neighborhood_attention_2d(
                query, key, value, KERNEL_SIZE, dilation, rel_pos_bias=table, backend=backend
            )

        return call

    call = f"{' x '.join(map(str, shape))}, dilation {dilation}"
    other = ["tiled"] if auto != "tiled" else []
    other += ["triton"] if device.type == "cuda" and auto != "triton" else []
    ways: list[tuple[str, str, list[Tensor]]] = [
        *(
            (f"zoo {backend}{way}", backend, [*qkv, *tables])
            for backend in (auto, *other)
            for way, tables in (("", []), (", bias", [bias]))
        ),
        # NATTEN has no gradients on the CPU.
        ("NATTEN", "natten", qkv if device.type == "cuda" else [x.detach() for x in qkv]),
    ]
    for name, backend, inputs in ways:
        row: dict[str, Any] = {"call": call, "name": name}
        forward = ours("auto" if backend == auto else backend)
        try:
            shares, wrong, differentiable = check_call(forward, inputs, grad_out, dilation)
            row["error / allowed"] = max(shares.values())
            if wrong:
                row["note"] = f"not timed: {'; '.join(wrong)}"
            else:
                row |= time_call(forward, inputs, grad_out if differentiable else None, device, settings.seconds)
        except Exception as error:  # a peer's failure is a result: it may come from its compiler, too
            row["note"] = f"not timed: {first_line(error)}"
        yield row
    tokens = [x.detach().flatten(1, 2).transpose(1, 2).requires_grad_() for x in qkv]
    row = {"call": call, "name": "dense (torch)", "note": "sees the whole map: another function"}
    grad = grad_out.flatten(1, 2).transpose(1, 2)
    yield row | time_call(scaled_dot_product_attention, tokens, grad, device, settings.seconds)
    if device.type == "cuda":
        yield {"call": call, "name": "FlexAttention"} | time_flex(qkv, dilation, grad_out, settings)


def check_call(
    forward: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, dilation: int
) -> tuple[dict[str, float], list[str], bool]:
    """What :func:`flash_rule` or :func:`float32_rule` says of a call, and whether it has gradients."""

    def results(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        out = function(*tensors)
        grads = torch.autograd.grad(out, tensors, grad) if out.requires_grad else [None] * len(tensors)
        return [out.detach(), None, *grads, *[None] * (len(NAMES) - len(tensors))]

    def reference(query, key, value, table=None):
        return neighborhood_attention_2d(
            query, key, value, KERNEL_SIZE, dilation, rel_pos_bias=table, backend="reference"
        )

    mine = results(forward, inputs, grad_out)
    mine = [None if x is None else x if x.ndim == 3 else x[:1] for x in mine]  # the table is all images'
    first = [x.detach() if x.ndim == 3 else x.detach()[:1] for x in inputs]
    plain = results(reference, [x.clone().requires_grad_() for x in first], grad_out[:1])
    exact = results(reference, [x.double().requires_grad_() for x in first], grad_out[:1].double())
    rule = float32_rule(mine, exact) if inputs[0].dtype == torch.float32 else flash_rule(mine, plain, exact)
    return *rule, mine[2] is not None


def time_call(
    forward: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor | None, device: torch.device, seconds: float
) -> dict[str, float]:
    """Milliseconds of a call without and with gradients (unless ``grad_out`` is None), and its peak memory."""
    plain = [x.detach() for x in inputs]
    figures = {"forward ms": median_ms(lambda: forward(*plain), device, seconds)}
    run = lambda: forward(*plain)  # noqa: E731
    if grad_out is not None:
        run = lambda: torch.autograd.grad(forward(*inputs), inputs, grad_out)  # noqa: E731
        figures["with gradients ms"] = median_ms(run, device, seconds)
    return figures | {"MiB": peak_bytes(run, device) / 2**20}


def time_flex(qkv: list[Tensor], dilation: int, grad_out: Tensor, settings: Settings) -> dict[str, Any]:
    """FlexAttention, compiled, with the same mask; its tokens are put in order of residue class beforehand, untimed."""
    height, width = (n // dilation for n in qkv[0].shape[1:3])
    if any(n % dilation for n in qkv[0].shape[1:3]):
        return {"note": "not timed: the dilation does not divide the map"}
    try:
        mask = neighborhood_mask(height, width, (KERNEL_SIZE, KERNEL_SIZE))
        blocks = block_mask(mask, height * width, height * width, settings.device)
        torch.compiler.reset()  # after a few problems torch would run the next ones uncompiled
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)  # or an error
        inputs = [by_class(x.detach(), (dilation, dilation)).requires_grad_() for x in qkv]
        forward = lambda *x: compiled(*x, block_mask=blocks)  # noqa: E731
        expected = neighborhood_attention_2d(*(x.detach() for x in qkv), KERNEL_SIZE, dilation)
        error = relative_error(forward(*inputs).detach(), by_class(expected, (dilation, dilation)).double().cpu())
        if not error <= ALLOWED[settings.dtype]:
            return {"note": f"not timed: differs from ours by {error:.2g} of the largest output"}
        grad = by_class(grad_out, (dilation, dilation))
        return time_call(forward, inputs, grad, torch.device(settings.device), settings.seconds)
    except Exception as error:  # its compiler raises many kinds
        return {"note": f"not timed: {first_line(error)}"}


def neighborhood_mask(height: int, width: int, kernel_size: tuple[int, int]) -> Callable:
    """FlexAttention's mask function of neighborhood attention without dilation."""

    def mask(b, h, query, key):
        seen = None
        for q, k, length, size in (
            (query // width, key // width, height, kernel_size[0]),
            (query % width, key % width, width, kernel_size[1]),
        ):
            start = (q - size // 2).clamp(0, length - size)
            axis = (k >= start) & (k < start + size)
            seen = axis if seen is None else seen & axis
        return seen

    return mask


def by_class(x: Tensor, dilation: tuple[int, int]) -> Tensor:
    """[batch, height, width, heads, dim] -> [batch * classes, heads, members, dim], for maps that divide evenly."""
    (batch, height, width, heads, dim), (dy, dx) = x.shape, dilation
    x = x.reshape(batch, height // dy, dy, width // dx, dx, heads, dim).permute(0, 2, 4, 5, 1, 3, 6)
    return x.reshape(batch * dy * dx, heads, -1, dim).contiguous()


def block_mask(mask: Callable, queries: int, keys: int, device: str) -> BlockMask:
    """What `create_block_mask` gives, without holding queries x keys at once or being compiled."""
    columns = -(-keys // FLEX_BLOCK)
    key = torch.arange(columns * FLEX_BLOCK, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    some, every = [], []
    for first in range(0, queries, FLEX_BLOCK):
        query = torch.arange(first, first + FLEX_BLOCK, device=device)
        inside = (query < queries)[:, None] & (key < keys)[None, :]
        seen = (mask(zero, zero, query[:, None], key[None, :]) & inside).view(FLEX_BLOCK, columns, FLEX_BLOCK)
        some.append(seen.any(2).any(0))
        every.append(seen.all(2).all(0))
    full = torch.stack(every)
    partial = torch.stack(some) & ~full

    def ordered(blocks):
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return blocks.sum(-1).int()[None, None], order[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=(queries, keys)
    )


# Clocks


def median_ms(call: Callable, device: torch.device, seconds: float) -> float:
    """Median milliseconds of 5 to 50 calls, as many as fit the time."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return call_ms(call, seconds)
    call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def peak_bytes(call: Callable, device: torch.device) -> int:
    """Most bytes of tensors that a call holds at a time, beyond those that were there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log goes past Python's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    # Every allocation and release by torch, in order of time.
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def cuda_median(pairs: Iterable[tuple], calls: int) -> float:
    """Median milliseconds between pairs of events, per call."""
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / calls


def cuda_events(call: Callable, seconds: float) -> list[tuple]:
    """Pairs of events for as many repeats as fit the time, 5 to 50."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = min(50, max(5, int(seconds / (time.perf_counter() - start))))
    return [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]


def call_ms(call: Callable, seconds: float = 0.5) -> float:
    """Median milliseconds of a call as a user makes it, launches included, with nothing of it in the cache."""
    call()
    flush = torch.empty(4 * L2_BYTES, dtype=torch.int8, device="cuda")
    events = cuda_events(call, seconds)
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    return cuda_median(events, 1)


# Rules


def flash_rule(ours, plain, exact) -> tuple[dict[str, float], list[str]]:
    """FlashAttention's rule: errors against float64 at most twice those of plain torch in the same dtype.

    Like its tests we grant besides twice the rounding of adding 0.3 to the result and taking it away again: plain torch
    may happen to be exact.

    Returns the share of the allowed error that each of our tensors takes, and what is wrong in words.
    """
    shares, wrong = {}, []
    for name, a, p, e in zip(("out", "lse", *NAMES), ours, plain, exact, strict=True):
        if a is None:
            continue
        rounded = e.to(p.dtype)
        errors = (x.double() - y.double() for x, y in ((a, e), (p, e), (rounded + 0.3 - 0.3, rounded)))
        error, of_plain, rounding = (x.abs().max().item() if x.numel() else 0.0 for x in errors)
        allowed = 2 * of_plain + 2 * rounding
        shares[name] = error / max(allowed, 1e-30)
        if not error <= allowed:
            wrong.append(f"{name}: {error:.2e} > {allowed:.2e}")
    return shares, wrong


def float32_rule(ours, exact) -> tuple[dict[str, float], list[str]]:
    """The same for float32, where sums in another order may well err more than plain torch: 1e-5 of the largest."""
    shares, wrong = {}, []
    for name, a, e in zip(("out", "lse", *NAMES), ours, exact, strict=True):
        if a is None:
            continue
        error, allowed = (a.double() - e).abs().max().item(), 1e-5 * e.abs().max().item()
        shares[name] = error / max(allowed, 1e-30)
        if not error <= allowed:
            wrong.append(f"{name}: {error:.2e} > {allowed:.2e}")
    return shares, wrong


# Words


def report(
    name: str, rows: list[dict[str, Any]], figures: dict[str, str], settings: Settings, folder: Path | None
) -> None:
    """Print a table of the rows, and write it to ``folder`` as a CSV file and a picture."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    keys = [key for key in KEYS if any(key in row for row in rows)]
    table = Table(*keys, *figures, "note", title=name, title_justify="left")
    for column in table.columns[len(keys) : -1]:
        column.justify = "right"
    for row in rows:
        cells = [form.format(row[figure]) if figure in row else "" for figure, form in figures.items()]
        table.add_row(*(row.get(key, "") for key in keys), *cells, escape(row.get("note", "")))
    console = Console()
    if not console.is_terminal:  # a file is as wide as need be
        console.width = WIDTH
    console.print(table)
    if folder is None:
        return
    with write_whole(folder / f"{name}.csv") as file:
        writer = csv.DictWriter(file, [*keys, *figures, "note", *Settings._fields, "about"])
        writer.writeheader()
        writer.writerows(row | settings._asdict() | {"about": about(settings)} for row in rows)
    draw(folder / f"{name}.png", rows, next(iter(figures)), about(settings))
    print(f"written to {folder / name}.csv and {folder / name}.png")


def draw(path: Path, rows: list[dict[str, Any]], figure: str, title: str) -> None:
    """Draw one figure of each row as a bar; a row without it says so."""
    from zoo.pictures import save_bars

    labels = [f"{row['name']}\n{row['call']}" if "call" in row else row["name"] for row in rows]
    save_bars(path, labels, [row.get(figure) for row in rows], figure, title)


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a cell."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:120].replace("|", "/")
