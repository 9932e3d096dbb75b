"""Check the fused kernels on this GPU: random problems against float64, and checks of what torch and users ask of them.

    python scripts/check_kernels.py [--problems 2000] [--checks NAME ...] [--operators neighborhood circular]
                                    [--seconds 540] [--output scripts/results/check_<gpu>.txt]

FlashAttention's rule: the error of the output and of every gradient against float64 is at most twice that of plain
torch in the same dtype. Every random problem runs twice and has to repeat bit by bit, on memory filled with nan. One
outside the rule is drawn seven times more, with other values, and judged by the largest errors of all draws: of
gradients that hold a few numbers, which most problems here have, one draw says little. The log names those and their
first errors, and counts beside them how often plain torch that sums in another order, the tiled backend, is outside
the rule on the same draws. The exit status is 1 if anything failed or was not reached.

Compiling takes most of the time, so problems come in families: what is compiled in is drawn once a family, sizes and
values for every problem. Families run on all processor cores and GPUs, and share Triton's cache on disk.

Under the sanitizer, after one plain run that fills Triton's cache:

    python scripts/check_kernels.py --sanitizer
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes application-only --error-exitcode 1 \\
        --tool memcheck python scripts/check_kernels.py --sanitizer     # and --tool racecheck
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # plain torch is to be deterministic, too

import torch
from torch import Tensor

from measure import (
    NAMES,
    Window,
    attend,
    attend_and_differentiate,
    first_line,
    flash_rule,
    gpu_slug,
    plain_attention,
    versions,
)

DEVICE, BACKEND = "cuda", "triton"
OPERATORS = ("neighborhood", "circular")
CHOSEN = list(OPERATORS)  # those that named checks cover; --operators sets it
FAMILY = 25  # problems in a family
DRAWS = 8  # of the values of a problem that is outside the rule


# Random problems


def family(number: int, operator: str) -> dict:
    """What is compiled in, and what decides on it: windows, head dimension, dtype, and which inputs there are."""
    rng = random.Random(number)

    def axis():
        kernel_size = rng.choice([1, 2, 3, 3, 5, 7, 7, 8, 11, 13, 20])
        stride = rng.choice([1, 1, 1, rng.randint(1, kernel_size)])
        dilation = rng.choice([1, 1, 1, *(d for d in (2, 3, 8) if kernel_size * d <= 40)])
        return kernel_size, dilation, stride, rng.random() < 0.15

    circular = operator == "circular"
    window = Window(radius=rng.choice([1, 2, 3, 5, 8, 12])) if circular else Window(*zip(axis(), axis()))
    return {
        "window": window,
        "heads": rng.randint(1, 4),
        "dim": rng.choice([8, 16, 20, 32, 32, 64, 80, 128, 256]),
        "bias": not circular and rng.random() < 0.5,
        "extra": rng.choice([0, 0, 0, 1, 7, 40]),
        "dtype": rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        "layout": rng.choice(["packed", "heads first"]),
        "lse": rng.random() < 0.3,
    }


def shape_of(kind: dict, seed: int) -> tuple[int, int, int, int, int]:
    """A map from one token to a few tiles."""
    rng = random.Random(seed)
    window = kind["window"]
    least = (1, 1) if window.radius else (k * d for k, d in zip(window.kernel_size, window.dilation))
    height, width = (n + rng.choice([0, 0, 1, 3, 8, 17, 30]) for n in least)
    return rng.randint(1, 3), height, width, kind["heads"], kind["dim"]


def make_inputs(shape, kind: dict, seed: int = 0) -> list[Tensor | None]:
    """Query to extra value; strided as of a fused projection, or heads first."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, device=DEVICE, dtype=torch.float32).to(kind["dtype"])

    batch, height, width, heads, dim = shape
    if kind["layout"] == "packed":
        qkv = list(randn(batch, height, width, 3, heads, dim).unbind(3))
    else:
        qkv = [randn(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4) for _ in range(3)]
    table = randn(heads, *(2 * k - 1 for k in kind["window"].kernel_size)) if kind["bias"] else None
    return [*qkv, table, *(randn(batch, kind["extra"], heads, dim) if kind["extra"] else None for _ in range(2))]


def is_packed(kind: dict) -> bool:
    """Whether query, key and value go to the function that takes them as one."""
    return kind["layout"] == "packed" and not kind["window"].radius


def compare(
    window: Window, inputs, grad_out, grad_lse=None, ours=None, **options
) -> tuple[dict[str, float], list[str]]:
    """FlashAttention's rule on the output and every gradient of one call."""
    ours = ours or attend_and_differentiate(window, inputs, grad_out, grad_lse, backend=BACKEND, **options)
    return flash_rule(ours, *in_plain_torch(window, inputs, grad_out, grad_lse, **options))


def in_plain_torch(window: Window, inputs, grad_out, grad_lse=None, **options) -> list[list[Tensor | None]]:
    """What one call gives in plain torch, in the dtype of the inputs and in float64."""
    return [
        plain_attention(window, inputs, grad_out, grad_lse, dtype=dtype, most=2**24, **options)
        for dtype in (inputs[0].dtype, torch.double)
    ]


@contextmanager
def poisoned_memory(warn_only: bool = True) -> Iterator[None]:
    """New tensors hold nan, and torch keeps to what is deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        if not torch.empty(8, device=DEVICE).new_empty(8).isnan().all():
            raise Failure("new_empty does not fill memory with nan")
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Found(NamedTuple):
    """Of one random problem: shares of the allowed error, and what is wrong in words."""

    shares: dict[str, float]
    wrong: list[str]
    at_first: Sequence[str] = ()  # by the first draw alone, where others followed
    in_tiled: Sequence[str] = ()  # of the tiled backend by that draw


def draw_problem(shape, kind: dict, seed: int) -> tuple[tuple[list[Tensor | None], ...], bool, list[Tensor | None]]:
    """Results of the fused kernels, of plain torch and of float64 on one draw of values; whether the first repeat.

    And what the tiled backend gives.
    """
    inputs = make_inputs(shape, kind, seed)
    generator = torch.Generator(DEVICE).manual_seed(seed + 1)
    grad_out = torch.randn(shape, generator=generator, device=DEVICE).to(kind["dtype"])
    grad_lse = torch.randn(shape[:-1], generator=generator, device=DEVICE) if kind["lse"] else None
    problem = kind["window"], inputs, grad_out, grad_lse
    ours, again = (attend_and_differentiate(*problem, packed=is_packed(kind), backend=BACKEND) for _ in range(2))
    repeats = all(a is None or torch.equal(a, b) for a, b in zip(ours, again))
    return (ours, *in_plain_torch(*problem)), repeats, attend_and_differentiate(*problem, backend="tiled")


def check_problem(shape, kind: dict, seed: int) -> Found:
    """The rule on one random problem: see above."""
    draws = [draw_problem(shape, kind, seed)]
    results, _, tiled = draws[0]
    in_tiled = flash_rule(tiled, *results[1:])[1]
    shares, wrong = flash_rule(*results)
    at_first = wrong
    if wrong:  # all others, and then one verdict: going on until it fits would fit by chance
        draws += [draw_problem(shape, kind, seed + 2**32 * draw) for draw in range(1, DRAWS)]
        results = zip(*(draw[0] for draw in draws))
        shares, wrong = flash_rule(*([None if x[0] is None else torch.stack(x) for x in zip(*r)] for r in results))
    if not all(repeats for _, repeats, _ in draws):
        wrong = [*wrong, "does not repeat"]
    return Found(shares, wrong, at_first, in_tiled)


def check_family(number: int, operator: str, problems: range) -> list[tuple[str, str, Found]]:
    """In a worker: each problem, its dtype, and what `check_problem` found."""
    torch.cuda.set_device(number % torch.cuda.device_count())
    warnings.filterwarnings("ignore")
    kind, found = family(number, operator), []
    with poisoned_memory():
        for seed in problems:
            shape = shape_of(kind, seed)
            case = f"{operator} {seed}: {shape} {kind}"
            try:
                result = check_problem(shape, kind, seed)
            except Exception as error:  # compilers raise many kinds; the other problems still run
                result = Found({}, [first_line(error)])
            found.append((case, str(kind["dtype"]).removeprefix("torch."), result))
    return found


def compile_time(kind: dict) -> int:
    """Of a family's kernels, very roughly, in no unit."""
    return kind["dim"] * (3 if kind["dtype"] == torch.float32 else 1)


def start_sweep(pool: ProcessPoolExecutor, problems: int, first: int, operators: list[str]) -> list[Future]:
    """Put all families to work; one in five is circular, if both operators are wanted."""
    jobs = []
    for start in range(first, first + problems, FAMILY):
        number = start // FAMILY
        operator = operators[-1] if number % 5 == 4 else operators[0]
        jobs.append((number, operator, range(start, min(start + FAMILY, first + problems))))
    jobs.sort(key=lambda job: compile_time(family(*job[:2])), reverse=True)  # or the longest would be left to the end
    return [pool.submit(check_family, *job) for job in jobs]


def finish_sweep(futures: list[Future], deadline: float) -> tuple[int, int, list[str]]:
    """Number of problems done and of those that failed, and the lines of the log that say what was found."""
    done, first, tiled, worst = Counter(), Counter(), Counter(), {}
    failures, again = [], []
    try:
        for future in as_completed(futures, timeout=max(1, deadline - time.time())):
            for case, dtype, found in future.result():
                done[dtype] += 1
                first[dtype] += bool(found.at_first)
                tiled[dtype] += bool(found.in_tiled)
                for name, share in found.shares.items():
                    worst[f"{dtype} {name}"] = max(worst.get(f"{dtype} {name}", 0), share)
                if found.at_first:
                    again.append(f"drawn again: {case}: by the first draw {'; '.join(found.at_first)}")
                if found.wrong:
                    failures.append(f"failed: {case}: {'; '.join(found.wrong)}")
                    print(failures[-1], flush=True)
    except (TimeoutError, FuturesTimeout):  # two types before Python 3.11
        print("the time is up", flush=True)
    except BrokenProcessPool as error:
        failures.append(first_line(error))
    counts = (f"{d} {first[d]} of {n}, tiled {tiled[d]}" for d, n in sorted(done.items()))
    lines = [
        f"{len(again)} drawn again, {len(failures)} failed",
        f"outside the rule by the first draw: {'; '.join(counts)}",
        "largest error / allowed: " + ", ".join(f"{name} {share:.2f}" for name, share in sorted(worst.items())),
    ]
    return done.total(), len(failures), [*lines, *again, *failures]


# Named checks


class Failure(Exception):
    """A check that does not hold, and why."""


CHECKS: dict[str, Callable[[], str]] = {}


def named(name: str):
    """Register a check: it returns a detail worth reading, or raises Failure."""

    def register(function):
        CHECKS[name] = function
        return function

    return register


def require(condition, message: str) -> None:
    if not condition:
        raise Failure(message)


def require_rule(found: tuple[dict[str, float], list[str]], where: str = "") -> float:
    """Largest share of the allowed error."""
    shares, wrong = found
    require(not wrong, f"{where} {'; '.join(wrong)}".strip())
    return max(shares.values())


def require_same(ours, expected, where: str) -> None:
    """Bitwise equality of all tensors."""
    names = ("out", "lse", *NAMES)
    different = [n for n, a, b in zip(names, ours, expected, strict=True) if a is not None and not torch.equal(a, b)]
    require(not different, f"{where}: {', '.join(different)} differ")


def kind_of(
    kernel_size=7, dilation=1, *, heads=2, dim=32, bias=True, extra=0, dtype=torch.bfloat16, radius=0, layout="packed"
) -> dict:
    """A family given by hand; with a radius it is circular."""
    window = Window(radius=radius) if radius else Window((kernel_size,) * 2, (dilation,) * 2)
    bias = bias and not radius
    return {
        "window": window, "heads": heads, "dim": dim, "bias": bias, "extra": extra, "dtype": dtype, "layout": layout,
    }  # fmt: skip


def example(kind: dict, batch: int = 2, height: int = 37, width: int = 41, seed: int = 0):
    """Window, inputs and incoming gradient of one problem; by default with partial tiles on both axes."""
    inputs = make_inputs((batch, height, width, kind["heads"], kind["dim"]), kind, seed)
    generator = torch.Generator(DEVICE).manual_seed(seed + 1)
    grad_out = torch.randn(inputs[0].shape, device=DEVICE, generator=generator).to(kind["dtype"])
    return kind["window"], inputs, grad_out


def usual() -> list[dict]:
    """A few kinds that between them use every kernel."""
    kinds = [kind_of(), kind_of(5, 3, extra=5), kind_of(3, bias=False, dim=64), kind_of(dtype=torch.float32, dim=20)]
    return kinds + ([kind_of(radius=6, extra=5)] if "circular" in CHOSEN else [])


def fused(window, inputs, grad_out, grad_lse=None, **options):
    """One call of the fused kernels, forward and backward."""
    return attend_and_differentiate(window, inputs, grad_out, grad_lse, backend=BACKEND, **options)


@named("every output is written")
def check_poison() -> str:
    with poisoned_memory():
        for kind in usual():
            for size in ((1, 37, 41), (3, 21, 21)):
                results = fused(*example(kind, *size))
                require(all(x is None or x.isfinite().all() for x in results), f"nan left with {kind}")
    return "memory filled with nan before"


@named("infinities and nan in keys stay with the queries that see them")
def check_leaks() -> str:
    kinds = [kind_of(3, bias=False, heads=1), kind_of(7, heads=1), kind_of(5, 2, heads=1, extra=3)]
    if "circular" in CHOSEN:
        kinds.append(kind_of(radius=4, heads=1, extra=3))
    for kind in kinds:
        window, inputs, _ = example(kind, 1, 40, 40)
        dy, dx = torch.meshgrid(*(torch.arange(40) - 16,) * 2, indexing="ij")
        if window.radius:
            sees = dy**2 + dx**2 < window.radius**2
        else:
            k, d = window.kernel_size[0], window.dilation[0]
            sees = (dy.abs() <= k // 2 * d) & (dx.abs() <= k // 2 * d) & (dy % d == 0) & (dx % d == 0)
        sees = sees.to(DEVICE)
        clean = attend(window, inputs, return_lse=True, backend=BACKEND)
        for bad in (float("nan"), float("inf"), float("-inf")):
            dirty = list(inputs)
            dirty[1] = inputs[1].clone()
            dirty[1][0, 16, 16] = bad
            results = attend(window, dirty, return_lse=True, backend=BACKEND)
            same = all(torch.equal(a[0, ~sees], b[0, ~sees]) for a, b in zip(results, clean))
            require(same, f"{bad} in a key reaches others, {kind}")
            if bad != bad:  # an infinite logit may be a legal mask
                require(not results[0][0, sees].isfinite().any(), f"{bad} in a key is lost, {kind}")
    return "in values they may reach the rest of a tile, as documented"


@named("logits of 1e4 and more")
def check_extreme() -> str:
    for kind in usual():
        for scale in (1e4, -1e4):
            results = fused(*example(kind), scale=scale)
            require(all(x is None or x.isfinite().all() for x in results), f"not finite at scale {scale}, {kind}")
    # Logits that are multiples of 1e4 tie exactly or not at all, so the output has no large error to hide behind.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        window, inputs, grad_out = example(kind_of(5, bias=False, dtype=dtype))
        inputs[:2] = (x.round().clamp(-2, 2) for x in inputs[:2])
        for scale in (1e4, -1e4):
            out = fused(window, inputs, grad_out, scale=scale)[0].double()
            exact = plain_attention(window, inputs, grad_out, dtype=torch.double, scale=scale)[0]
            error, allowed = (out - exact).abs().max().item(), 4 * torch.finfo(dtype).eps * exact.abs().max().item()
            require(error <= allowed, f"out {error:.2e} > {allowed:.2e} at scale {scale}, {dtype}")
    return "finite; exact where keys tie"


@named("repeats bit by bit under deterministic algorithms")
def check_repeats() -> str:
    torch.use_deterministic_algorithms(True)
    try:
        for kind in usual():
            problem = example(kind, 8)
            first = fused(*problem)
            for _ in range(10):
                require_same(fused(*problem), first, str(kind))
    finally:
        torch.use_deterministic_algorithms(False)
    return "10 times each"


@named("float32 is exact unless torch allows TF32")
def check_tf32() -> str:
    kind, worst = kind_of(5, dim=64, dtype=torch.float32), []
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for torch.backends.cuda.matmul.allow_tf32 in (False, True):
            window, inputs, grad_out = example(kind)
            ours = fused(window, inputs, grad_out)[0]
            torch.backends.cuda.matmul.allow_tf32 = False
            exact = plain_attention(window, inputs, grad_out, dtype=torch.double)[0]
            worst.append((ours - exact).abs().max().item())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    require(worst[0] < 1e-5 and worst[1] < 1e-2, f"errors {worst[0]:.1e} without, {worst[1]:.1e} with TF32")
    return f"errors {worst[0]:.1e} without, {worst[1]:.1e} with TF32"


@named("past 2^31 elements in one call")
def check_large() -> str:
    """Gradients come in at a few patches; around each, a crop tells what to expect."""
    height, width, heads, dim, k = 4102, 4099, 2, 64, 7
    kind = kind_of(k, heads=heads, dim=dim)
    packed = torch.empty(1, height, width, 3, heads, dim, device=DEVICE, dtype=torch.bfloat16).normal_()
    table = torch.randn(heads, 2 * k - 1, 2 * k - 1, device=DEVICE)
    inputs = [*packed.unbind(3), table, None, None]
    numel = inputs[0].numel()
    require(numel > 2**31, "too small")
    crop, patch = 32, 8  # tokens a side; windows of the patch stay within the crop, and away from where it was cut
    past = 2**31 // (3 * heads * dim * width)  # the row where packed addresses pass 2^31

    def spans(length, *middles):
        """Start of a crop, and start of its patch."""
        return [(0, 0), (length - crop, length - patch), *((m - 12, m) for m in middles)]

    corners = [(y, x) for y in spans(height, past, height - 100) for x in spans(width, width // 2)]
    grad_out = torch.zeros(1, height, width, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    for (_, y), (_, x) in corners:
        grad_out[:, y : y + patch, x : x + patch].normal_()
    ours = fused(kind["window"], inputs, grad_out)
    torch.cuda.synchronize()
    del packed
    bias = [torch.zeros_like(table, dtype=torch.double) for _ in range(2)]
    worst = 0.0
    for (top, _), (left, _) in corners:
        place = (slice(None), slice(top, top + crop), slice(left, left + crop))
        part = [*(x[place] for x in inputs[:3]), table, None, None]
        grad = grad_out[place]
        expected = [plain_attention(kind["window"], part, grad, dtype=t) for t in (torch.bfloat16, torch.double)]
        for total, result in zip(bias, expected):
            total += result[5]
        # The output is to be compared where a gradient came in; elsewhere a crop's windows are others.
        inside = grad.abs().sum((-1, -2), keepdim=True) > 0
        mine = [ours[0][place] * inside, None, *(x[place] for x in ours[2:5]), None, None, None]
        low, exact = ([r[0] * inside, None, *r[2:5], None, None, None] for r in expected)
        worst = max(worst, require_rule(flash_rule(mine, low, exact), f"at {top}, {left}:"))
    mine, low, exact = ([None] * 5 + [x, None, None] for x in (ours[5], bias[0].bfloat16(), bias[1]))
    worst = max(worst, require_rule(flash_rule(mine, low, exact)))
    for x, name in zip(ours[2:5], ("query", "key", "value")):
        require(x.isfinite().all(), f"the gradient of {name} is not finite")
        for (top, _), (left, _) in corners:
            x[:, top : top + crop, left : left + crop] = 0
        require(x.count_nonzero() == 0, f"the gradient of {name} is not zero away from the patches")
    return f"{numel:,} elements in each of query, key and value; error / allowed {worst:.2f}"


@named("more images and heads than a grid's second axis holds")
def check_many() -> str:
    worst = 0.0
    for batch, heads in ((70_001, 1), (1, 70_001)):
        problem = example(kind_of(3, heads=heads, dim=8), batch, 4, 4)
        worst = max(worst, require_rule(compare(*problem), f"{batch} x {heads}:"))
    return f"70,001 of each; error / allowed {worst:.2f}"


@named("torch.compile(fullgraph=True)")
def check_compile() -> str:
    for kind in usual():
        torch._dynamo.reset()
        window, inputs, grad_out = example(kind)
        leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
        present = [x for x in leaves if x is not None]
        compiled = torch.compile(lambda *inputs, window=window: attend(window, inputs, backend=BACKEND), fullgraph=True)
        out = compiled(*leaves)
        grads = iter(torch.autograd.grad(out, present, grad_out))
        require_same(
            [out.detach(), None, *(None if x is None else next(grads) for x in leaves)],
            fused(window, inputs, grad_out),
            str(kind),
        )
    return "forward and backward equal eager"


@named("no recompilation after the second resolution")
def check_dynamic() -> str:
    torch._dynamo.reset()
    kinds = usual()
    for kind in (kinds[0], kinds[-1]):
        compiled = torch.compile(
            lambda *inputs, window=kind["window"]: attend(window, inputs, backend=BACKEND), fullgraph=True
        )
        sizes = [(2, 24, 28), (3, 33, 47), (5, 56, 40), (4, 19, 64), (7, 128, 128), (2, 24, 28)]
        for number, size in enumerate(sizes):
            window, inputs, grad_out = example(kind, *size)
            leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
            present = [x for x in leaves if x is not None]
            with torch._dynamo.config.patch(error_on_recompile=number >= 2):
                out = compiled(*leaves)
                grads = iter(torch.autograd.grad(out, present, grad_out))
            require_same(
                [out.detach(), None, *(None if x is None else next(grads) for x in leaves)],
                fused(window, inputs, grad_out),
                str(size),
            )
    return f"{len(sizes)} resolutions"


@named("torch.export with dynamic batch and resolution")
def check_export() -> str:
    kind = kind_of(5, extra=3)
    window = kind["window"]

    class Module(torch.nn.Module):
        def forward(self, query, key, value, bias, extra_key, extra_value):
            return attend(window, (query, key, value, bias, extra_key, extra_value), backend=BACKEND)

    batch, *sides = torch.export.Dim("batch"), *(torch.export.Dim(n, min=6, max=4096) for n in ("height", "width"))
    maps, text = dict(enumerate((batch, *sides))), {0: batch}
    _, inputs, _ = example(kind)
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=(maps, maps, maps, {}, text, text))
    for size in ((2, 37, 41), (5, 19, 64)):
        _, inputs, _ = example(kind, *size)
        require(torch.equal(program.module()(*inputs), attend(window, inputs, backend=BACKEND)), f"differs at {size}")
    return "runs at another resolution"


@named("autocast")
def check_autocast() -> str:
    torch.manual_seed(0)
    project = torch.nn.Linear(64, 3 * 64, device=DEVICE)
    table = torch.randn(2, 13, 13, device=DEVICE, requires_grad=True)
    x = torch.randn(2, 37, 41, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        qkv = project(x).unflatten(-1, (3, 2, 32)).unbind(3)
        out = attend(Window((7, 7)), (*qkv, table, None, None), backend=BACKEND)
    out.float().square().mean().backward()
    require(out.dtype == torch.bfloat16, f"the output is {out.dtype}")
    require(table.grad.dtype == torch.float32, f"the gradient of the bias is {table.grad.dtype}")
    inputs = [*(y.detach() for y in qkv), table, None, None]
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = fused(Window((7, 7)), inputs, torch.ones_like(out))
    require_same(inside, fused(Window((7, 7)), inputs, torch.ones_like(out)), "inside and outside")
    return "bfloat16 maps with a float32 bias"


@named("activation checkpointing")
def check_checkpointing() -> str:
    from torch.utils.checkpoint import checkpoint

    for kind in usual():
        window, inputs, grad_out = example(kind)
        expected = fused(window, inputs, grad_out)
        for use_reentrant in (False, True):
            leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
            out = checkpoint(
                lambda *x, window=window: attend(window, x, backend=BACKEND), *leaves, use_reentrant=use_reentrant
            )
            out.backward(grad_out)
            results = [out.detach(), None, *(None if x is None else x.grad for x in leaves)]
            require_same(results, expected, f"use_reentrant={use_reentrant}")
    return "gradients equal those without"


@named("CUDA graph")
def check_graph() -> str:
    for kind in usual():
        window, inputs, grad_out = example(kind)
        fused(window, inputs, grad_out)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fused(window, inputs, grad_out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = fused(window, inputs, grad_out)
        for seed in (5, 6):
            _, others, other_grad = example(kind, seed=seed)
            for x, other in zip((*inputs, grad_out), (*others, other_grad)):
                if x is not None:
                    x.copy_(other)
            graph.replay()
            torch.cuda.synchronize()
            require_same(results, fused(window, others, other_grad), f"replay with seed {seed}, {kind}")
    return "captured once, replayed on other values"


@named("several streams at once")
def check_streams() -> str:
    kind = kind_of(7, dim=64)
    problems = [example(kind, 4, 64, 64, seed) for seed in range(6)]
    expected = [fused(*problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for round_ in range(5):
        results = []
        for stream, problem in zip(streams, problems):
            with torch.cuda.stream(stream):
                results.append(fused(*problem))
        torch.cuda.synchronize()
        for result, other in zip(results, expected):
            require_same(result, other, f"round {round_}")
    return f"{len(streams)} streams"


@named("several devices")
def check_devices() -> str:
    count = torch.cuda.device_count()
    if count == 1:
        return "not run: there is one"
    kind = kind_of(7, extra=3)
    window, inputs, grad_out = example(kind)
    expected = [x if x is None else x.cpu() for x in fused(window, inputs, grad_out)]
    for number in range(1, count):
        there = [x if x is None else x.to(f"cuda:{number}") for x in (*inputs, grad_out)]
        results = fused(window, there[:6], there[6])  # the current device stays 0
        require(all(x is None or x.device.index == number for x in results), f"results are not on device {number}")
        require_same([x if x is None else x.cpu() for x in results], expected, f"device {number}")
    return f"{count} devices, the current one another"


@named("opcheck")
def check_opcheck() -> str:
    for bias, extra, dtype in ((True, 3, torch.float32), (False, 0, torch.bfloat16)):
        kind = kind_of(3, 2, bias=bias, extra=extra, dim=16, dtype=dtype)
        window, inputs, grad_out = example(kind, 1, 9, 11)
        leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
        options = (*window[:4], 0.25)
        torch.library.opcheck(torch.ops.zoo.neighborhood_attention_2d.default, (*leaves, *options))
        out, lse = torch.ops.zoo.neighborhood_attention_2d(*inputs, *options)
        torch.library.opcheck(
            torch.ops.zoo.neighborhood_attention_2d_backward.default,
            (grad_out, torch.ones_like(lse), *inputs, out, lse, *options),
        )
    return "forward and backward"


@named("empty batches and empty extra tokens")
def check_empty() -> str:
    problem = example(kind_of(5, extra=3), 0)
    shapes = [x.shape for x in fused(*problem) if x is not None]
    require(shapes == [problem[1][0].shape, *(x.shape for x in problem[1])], "wrong shapes on an empty batch")
    window, inputs, grad_out = example(kind_of(5))
    inputs[4] = inputs[5] = inputs[0].new_empty(2, 0, 2, 32)
    results = fused(window, inputs, grad_out)
    require_same([*results[:6], None, None], fused(window, [*inputs[:4], None, None], grad_out), "no extra tokens")
    return "as without them"


# The run


def run_checks(wanted: list[str] | None) -> tuple[list[str], int]:
    """A line for each named check, and how many failed."""
    lines, failed = [], 0
    for name, function in CHECKS.items():
        if wanted is not None and not any(word in name for word in wanted):
            continue
        start = time.time()
        try:
            line = f"ok    {name}: {function()}"
        except Failure as error:
            line = f"FAIL  {name}: {error}"
        except Exception as error:  # whatever breaks is a failed check, and the others still run
            line = f"FAIL  {name}: {first_line(error)}"
        failed += line.startswith("FAIL")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        lines.append(f"{line} ({time.time() - start:.0f} s)")
        print(lines[-1], flush=True)
    return lines, failed


def run_sanitizer() -> None:
    """A few small calls that between them use every kernel; compute-sanitizer watches."""
    kinds = [
        *usual(),
        kind_of(5, 2, bias=True, dtype=torch.float16, dim=16, layout="heads first"),
        {**kind_of(4, dim=40), "window": Window((4, 3), (1, 2), (2, 1), (False, True))},
    ]
    for kind in kinds:
        least = [k * d for k, d in zip(kind["window"].kernel_size, kind["window"].dilation)]
        results = fused(*example(kind, 2, max(13, least[0]), max(18, least[1])), packed=is_packed(kind))
        torch.cuda.synchronize()
        require(all(x is None or x.isfinite().all() for x in results), f"not finite with {kind}")
        print("ran", kind, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000, help="random problems; 0 for none")
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem, a multiple of 25")
    parser.add_argument(
        "--checks", nargs="*", metavar="NAME", help="only named checks with one of these words; or none"
    )
    parser.add_argument("--operators", nargs="*", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--seconds", type=float, default=540, help="stop the random problems after this time")
    parser.add_argument("--output", type=Path, help="the log; scripts/results/check_<gpu>.txt by default")
    parser.add_argument("--sanitizer", action="store_true", help="only a few small calls, for compute-sanitizer")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    start = time.time()
    warnings.filterwarnings("ignore")
    CHOSEN[:] = args.operators
    if args.sanitizer:
        run_sanitizer()
        return
    lines = [versions()]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = start_sweep(pool, args.problems, args.first, args.operators)
        checks, failed = run_checks(args.checks)  # meanwhile
        done, failures, found = finish_sweep(futures, start + args.seconds)
        pool.shutdown(wait=False, cancel_futures=True)
    failed += failures + (done < args.problems)
    seconds = time.time() - start
    lines += [
        *checks,
        f"{done} of {args.problems} random problems from seed {args.first} in {seconds:.0f} s, {found[0]}",
        *found[1:],
    ]
    output = args.output or Path(__file__).parent / "results" / f"check_{gpu_slug()}.txt"
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[: len(checks) + 3]))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
