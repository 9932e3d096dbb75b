"""Neighborhood attention on the CPU beside NATTEN and dense attention, and its memory as the map grows.

    python scripts/bench_cpu.py [--output scripts/results/cpu.md]

Every backend is first checked against the float64 reference; one that fails is not timed. Times are medians of
interleaved runs in one process. Peak memory is the growth of the resident set during one call in a fresh process,
read from Linux's /proc.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from zoo.kernels import neighborhood_attention_2d

THREADS = 2
SHAPE, KERNEL_SIZE = (1, 56, 56, 3, 32), 7
MEMORY_SIZES = (56, 112, 224)


def inputs(size: int = SHAPE[1], grad: bool = False):
    """Query, key, value and bias of a square map, float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (SHAPE[0], size, size, *SHAPE[3:])
    qkv = [torch.randn(shape, generator=generator).requires_grad_(grad) for _ in range(3)]
    bias = torch.randn(shape[3], 2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE - 1, generator=generator).requires_grad_(grad)
    return qkv, bias


def dense(q, k, v):
    """Every token sees every token: what local attention has to beat."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(SHAPE)


def candidates():
    """Name -> (forward, forward and backward or None, largest error against float64)."""
    qkv, bias = inputs()
    grad_qkv, grad_bias = inputs(grad=True)

    def ours(backend, with_bias):
        def call(qkv, bias):
            return neighborhood_attention_2d(
                *qkv, KERNEL_SIZE, rel_pos_bias=bias if with_bias else None, backend=backend
            )

        exact = neighborhood_attention_2d(
            *(x.double() for x in qkv),
            KERNEL_SIZE,
            rel_pos_bias=bias.double() if with_bias else None,
            backend="reference",
        )
        error = (call(qkv, bias).double() - exact).abs().max().item()
        both = None if backend == "natten" else lambda: call(grad_qkv, grad_bias).sum().backward()
        return lambda: call(qkv, bias), both, error

    return {
        "zoo tiled, bias": ours("tiled", True),
        "zoo tiled, no bias": ours("tiled", False),
        "zoo reference, bias": ours("reference", True),
        "NATTEN (flex-fna), no bias": ours("natten", False),
        "dense attention (torch), no bias": (lambda: dense(*qkv), lambda: dense(*grad_qkv).sum().backward(), None),
    }


def medians(calls: dict, repeats: int) -> dict:
    """Median and spread in milliseconds of each call, run in turns."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()  # first calls build tables
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def peak_memory(size: int) -> float:
    """MiB that one forward and backward pass adds to the resident set at its peak (Linux)."""
    qkv, bias = inputs(8, grad=True)
    neighborhood_attention_2d(*qkv, KERNEL_SIZE, rel_pos_bias=bias).sum().backward()  # libraries load here
    qkv, bias = inputs(size, grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmHWM")
    neighborhood_attention_2d(*qkv, KERNEL_SIZE, rel_pos_bias=bias).sum().backward()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A field of this process's memory status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def report(repeats: int) -> str:
    """The tables, as Markdown."""
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", module="torch.nn.attention.flex_attention")
    results = candidates()
    wrong = [name for name, (_, _, error) in results.items() if error is not None and not error < 1e-5]
    if wrong:
        raise SystemExit(f"not timed, wrong against float64: {', '.join(wrong)}")
    forward = medians({name: f for name, (f, _, _) in results.items()}, repeats)
    both = medians({name: b for name, (_, b, _) in results.items() if b is not None}, repeats)
    natten = forward["NATTEN (flex-fna), no bias"][0]

    def cell(times):
        return "none" if times is None else f"{times[0]:.1f} ({times[1]:.1f} to {times[2]:.1f})"

    lines = [
        "# Neighborhood attention on the CPU",
        "",
        f"{SHAPE} [batch, height, width, heads, head_dim], kernel {KERNEL_SIZE}, float32, {THREADS} threads; "
        f"medians of {repeats} interleaved runs (least to most), milliseconds. {cpu_name()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, natten {version('natten')}.",
        "",
        "| backend | error against float64 | forward | forward + backward | forward, NATTEN / this |",
        "|---|---|---|---|---|",
    ]
    for name, (_, _, error) in results.items():
        error = "another function" if error is None else f"{error:.1e}"
        lines.append(
            f"| {name} | {error} | {cell(forward[name])} | {cell(both.get(name))} | {natten / forward[name][0]:.1f} |"
        )
    lines += [
        "",
        "Memory of one forward and backward pass with bias, inputs and gradients of the inputs included:",
        "",
        "| map | tokens | peak, MiB | KiB per token |",
        "|---|---|---|---|",
    ]
    for size in MEMORY_SIZES:
        command = [sys.executable, __file__, "--memory-of", str(size)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        lines.append(f"| {size} x {size} | {size**2} | {peak:.1f} | {peak * 1024 / size**2:.2f} |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu.md")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-of", type=int, metavar="SIZE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        torch.set_num_threads(THREADS)
        print(peak_memory(args.memory_of))
        return
    text = report(args.repeats)
    args.output.write_text(text)
    print(text + f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
