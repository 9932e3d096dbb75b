"""Local attention on one GPU, in bfloat16: ours beside FlexAttention, NATTEN, dense attention and the memory's floor.

    python scripts/bench_gpu.py [--rows 1 2 10-14] [--operators neighborhood circular] [--skip-flex] [--seconds 560]

Every call is first checked at its full size by FlashAttention's rule (two heads of the first and the last image against
float64, output and every gradient); one that fails is not timed. Two medians for each: the call as a user makes it,
between two events, the cache flushed before; and in parentheses the GPU's own time, from a CUDA graph of calls on
several inputs. FlexAttention is compiled with the same mask, timed in the same process, and likewise not timed where
its output differs. NATTEN's times come from a file (--peers).

Rows are kept in a .json beside the table, so that several runs can share the work: a run replaces the rows it measured.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from measure import (
    Window,
    attend,
    attend_and_differentiate,
    call_ms,
    copies_for,
    copy_bandwidth,
    first_line,
    flash_rule,
    gpu_slug,
    graph_ms,
    markdown_table,
    mean_window,
    plain_attention,
    product_rate,
    query_flops,
    token_bytes,
    versions,
)
from zoo.bench import block_mask, by_class, neighborhood_mask

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16


class Row(NamedTuple):
    """One problem, and what we aim at in milliseconds: forward without and with bias, forward and backward."""

    shape: tuple[int, int, int, int, int]
    window: Window
    bias: bool = False
    text: int = 0
    aims: tuple[float | None, float | None, float | None] = (None, None, None)

    @property
    def label(self) -> str:
        """Shape, heads and window in words."""
        batch, height, width, heads, dim = self.shape
        shape = f"{batch} x {height} x {width}, {heads} x {dim}"
        if self.window.radius:
            return f"{shape}, radius {self.window.radius}"
        return f"{shape}, {self.window.kernel_size[0]}, {self.window.dilation[0]}"


def neighborhood(batch, size, heads, dim, kernel_size, dilation, bias, *aims) -> Row:
    """A row of the first table, on a square map."""
    window = Window((kernel_size, kernel_size), (dilation, dilation))
    return Row((batch, size, size, heads, dim), window, bias, aims=aims)


NEIGHBORHOOD = [
    neighborhood(128, 56, 2, 32, 7, 1, True, 0.17, 0.24, 1.0),
    neighborhood(128, 56, 2, 32, 7, 8, True, 0.13, 0.18, 0.70),
    neighborhood(128, 28, 4, 32, 7, 4, True, 0.07, 0.10, 0.35),
    neighborhood(128, 14, 8, 32, 7, 1, True, 0.055, 0.08, 0.33),
    neighborhood(128, 7, 16, 32, 7, 1, True, 0.024, 0.03, 0.15),
    neighborhood(16, 96, 6, 32, 11, 1, True, 0.33, 0.50, 1.6),
    neighborhood(8, 128, 4, 32, 7, 1, True, 0.12, 0.17, 0.70),
    neighborhood(4, 128, 8, 64, 13, 1, True, 0.32, 0.48, 1.5),
    neighborhood(8, 256, 4, 64, 7, 1, True, 0.58, 0.85, 3.0),
    neighborhood(1, 64, 24, 128, 32, 1, False, 0.30, None, 1.5),
    neighborhood(1, 128, 24, 128, 32, 1, False, 1.0, None, 4.5),
    neighborhood(1, 256, 24, 128, 32, 1, False, 3.8, None, 18.0),
    neighborhood(1, 128, 24, 128, 16, 4, False, 0.45, None, 2.0),
    neighborhood(1, 256, 24, 128, 80, 1, False, 16.5, None, 72.0),
]
CIRCULAR = [
    Row((1, size, size, 24, 128), Window(radius=radius), text=512) for size in (64, 128, 256) for radius in (8, 16, 32)
]
OPERATORS = {"neighborhood": NEIGHBORHOOD, "circular": CIRCULAR}
# What holds a row back, by its label: for rows that miss their aim. By the machine code and the times of the kernels.
_ISSUE = (
    "instructions rather than memory or products: masks, bias and exponentials; backward, logits are made twice, for "
    "queries and bias, and for keys"
)
_HOST = "the host: launches and autograd take longer than the kernels, see the times in parentheses"
_KEYS = "backward, registers: those of keys and values take all that a thread can have, so few warps run at once"
_TEXT = "backward, the text: a kernel of its own makes its gradients, and the products once more"
LIMITS: dict[str, str] = {
    "128 x 28 x 28, 4 x 32, 7, 4": _HOST,
    "128 x 14 x 14, 8 x 32, 7, 1": _HOST,
    "128 x 7 x 7, 16 x 32, 7, 1": _HOST,
    "4 x 128 x 128, 8 x 64, 13, 1": _ISSUE,
    "8 x 256 x 256, 4 x 64, 7, 1": _ISSUE,
    "1 x 256 x 256, 24 x 128, 32, 1": f"forward takes 4.3 times as long as on a quarter of the map; {_KEYS}",
    "1 x 256 x 256, 24 x 128, 80, 1": _KEYS,
    **{f"1 x 64 x 64, 24 x 128, radius {radius}": _TEXT for radius in (8, 16, 32)},
}


# Problems


def make_inputs(row: Row, bias: bool, seed: int = 0) -> list[Tensor | None]:
    """Query, key, value, bias and text on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, _, _, heads, dim = row.shape

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=DTYPE)

    table = randn(heads, *(2 * k - 1 for k in row.window.kernel_size)).float() if bias else None
    text = [randn(batch, row.text, heads, dim) if row.text else None for _ in range(2)]
    return [*(randn(*row.shape) for _ in range(3)), table, *text]


def check(row: Row, bias: bool) -> tuple[float, list[str]]:
    """Largest share of the allowed error, and what is wrong, of a call of the size that is timed.

    The gradient comes in at the first head of the first image and the last of the last; there everything is compared.
    """
    batch, _, _, heads, _ = row.shape
    inputs = make_inputs(row, bias)
    everything = slice(None)
    corners = [(slice(i, i + 1), slice(h, h + 1)) for i, h in ((0, 0), (batch - 1, heads - 1))]
    grad_out = torch.zeros_like(inputs[0])
    for image, head in corners:
        grad_out[image, :, :, head].normal_()
    ours = attend_and_differentiate(row.window, inputs, grad_out)
    wrong = ["not everything is finite"] if not all(x.isfinite().all() for x in ours if x is not None) else []
    worst = 0.0
    for image, head in corners:
        maps, text = (image, everything, everything, head), (image, everything, head)
        places = [maps, maps, maps, head, text, text]
        part = [None if x is None else x[place] for x, place in zip(inputs, places)]
        mine = [None if x is None else x[place] for x, place in zip(ours, [maps, maps, *places])]
        low, exact = (plain_attention(row.window, part, grad_out[maps], dtype=t) for t in (DTYPE, torch.double))
        shares, found = flash_rule(mine, low, exact)
        worst, wrong = max(worst, *shares.values()), wrong + found
    return worst, wrong


def timings(forward: Callable, sets: list) -> dict[str, list[float]]:
    """Milliseconds of `forward(*inputs)` and of it with its gradients: as called, and in a graph."""
    leaves = [[x.detach().requires_grad_() for x in inputs] for inputs in sets]
    grad_out = torch.randn_like(forward(*sets[0]))

    def both(inputs):
        return torch.autograd.grad(forward(*inputs), inputs, grad_out)

    forwards = [lambda inputs=inputs: forward(*inputs) for inputs in sets]
    boths = [lambda inputs=inputs: both(inputs) for inputs in leaves]
    times = {}
    for name, calls in (("forward", forwards), ("both", boths)):
        times[name] = [call_ms(calls[0])]
        calls = calls * -(-8 // len(calls)) if times[name][0] < 1 else calls
        try:
            times[name].append(graph_ms(calls))
        except RuntimeError:  # not every peer can be captured
            torch.cuda.synchronize()
    return times


# Peers


def mask_of(row: Row) -> tuple[Callable, int, int]:
    """FlexAttention's mask function over one residue class, its queries and its keys; text comes before the map."""
    window, text = row.window, row.text
    height, width = (n // d for n, d in zip(row.shape[1:3], window.dilation))

    def circular_mask(b, h, query, key):
        key = key - text
        dy, dx = key // width - query // width, key % width - query % width
        return (key < 0) | (dy * dy + dx * dx < window.radius * window.radius)

    mask = circular_mask if window.radius else neighborhood_mask(height, width, window.kernel_size)
    return mask, height * width, text + height * width


def flex_inputs(row: Row, inputs: list[Tensor | None]) -> list[Tensor]:
    """Query, key and value as FlexAttention and dense attention take them, text before the map."""
    query, key, value = (by_class(x, row.window.dilation) for x in inputs[:3])
    if row.text:
        key, value = (torch.cat([x.transpose(1, 2), y], 2) for x, y in ((inputs[4], key), (inputs[5], value)))
    return [query, key, value]


def peer_sets(row: Row) -> list[list[Tensor]]:
    """`flex_inputs` so many times over that the cache cannot keep them."""
    return [flex_inputs(row, make_inputs(row, False, seed)) for seed in range(copies_for(row_bytes(row, False)))]


def time_flex(row: Row) -> dict[str, list[float]] | str:
    """FlexAttention's times, or why there are none. Tokens are put in order of residue class beforehand, untimed."""
    torch._dynamo.reset()
    mask, queries, keys = mask_of(row)
    covered = not row.window.radius and queries == math.prod(row.window.kernel_size)
    blocks = None if covered else block_mask(mask, queries, keys, "cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)  # or an error

    def forward(query, key, value):
        return compiled(query, key, value, block_mask=blocks)

    inputs = make_inputs(row, False)
    expected = by_class(attend(row.window, inputs), row.window.dilation)
    error = (forward(*flex_inputs(row, inputs)).float() - expected.float()).abs().max() / expected.float().abs().max()
    if not error < 0.02:
        return f"differs from ours by {error:.2g} of the largest output"
    return timings(forward, peer_sets(row))


def time_dense(row: Row) -> dict[str, list[float]]:
    """Dense attention over the whole map: another function, unless the window covers the map."""
    row = row._replace(window=row.window._replace(dilation=(1, 1)))
    return timings(scaled_dot_product_attention, peer_sets(row))


def natten_best(entries: list[dict], row: Row) -> list[float] | None:
    """NATTEN's best forward, and forward and backward, in milliseconds, if it was measured on this problem."""
    if row.window.radius:
        return None
    problem = [*row.shape, row.window.kernel_size[0], row.window.dilation[0]]
    for entry in entries:
        if entry["shape"] == problem:
            kernels = [entry[name] for name in ("cutlass-fna", "hopper-fna") if name in entry]
            forward = min(*(times[0] for times in kernels), *(times[0] for times in entry["tuned_fwd"].values()))
            return [forward, min(times[1] for times in kernels)]
    return None


# Rows


def row_bytes(row: Row, backward: bool) -> int:
    """Fewest bytes that a call moves, extra tokens included."""
    batch, height, width, heads, dim = row.shape
    size = batch * height * width * token_bytes(heads, dim, DTYPE.itemsize, backward)
    # Text: two tensors read; backward, read again and two gradients written.
    return size + batch * row.text * heads * dim * DTYPE.itemsize * (6 if backward else 2)


def floors(row: Row, bandwidth: float, rate: float) -> dict[str, list[float]]:
    """Milliseconds that memory alone, and matrix products alone, would take."""
    batch, height, width, heads, dim = row.shape
    keys = mean_window(row.window, height, width) + row.text
    queries = batch * height * width * heads
    return {
        name: [row_bytes(row, backward) / bandwidth * 1e3, queries * query_flops(keys, dim, backward) / rate * 1e3]
        for name, backward in (("forward", False), ("both", True))
    }


def measure(row: Row, bandwidth: float, rate: float, flex: bool, deadline: float) -> dict:
    """Everything there is to say of one row."""
    result = {"floors": floors(row, bandwidth, rate)}
    for name, bias in (("no bias", False), ("bias", True))[: 1 + row.bias]:
        try:
            worst, wrong = check(row, bias)
            torch.cuda.empty_cache()
            if wrong:
                result[name] = "wrong: " + "; ".join(wrong)
                continue
            present = [x is not None for x in make_inputs(row, bias)]

            def forward(*tensors, present=present):
                tensors = iter(tensors)
                return attend(row.window, [next(tensors) if there else None for there in present])

            sets = [make_inputs(row, bias, seed) for seed in range(copies_for(row_bytes(row, False)))]
            sets = [[x for x in inputs if x is not None] for inputs in sets]
            result[name] = timings(forward, sets) | {"error": worst}
        except (RuntimeError, ValueError, TypeError) as error:
            result[name] = first_line(error)
        torch.cuda.empty_cache()
    for name, function in (("dense", time_dense), ("flex", time_flex))[: 1 + flex]:
        if time.time() > deadline:
            result[name] = "no time was left"
            continue
        try:
            result[name] = function(row)
        except Exception as error:  # a peer's failure is a result: it may come from its compiler, too
            result[name] = first_line(error)
        torch.cuda.empty_cache()
    return result


# Tables


def cell(times, which: str) -> str:
    """A pair of medians, or why there is none."""
    if isinstance(times, str):
        return times
    if times is None or which not in times:
        return "-"
    called, *captured = times[which]
    return f"{called:.3f}" + (f" ({captured[0]:.3f})" if captured else "")


def factor(theirs, ours, which: str) -> str:
    """How many times longer they take than ours, as called."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return f"{theirs[which][0] / ours[which][0]:.2f}"
    return "-"


def table(rows: list[Row], results: dict[str, dict], natten: list[dict], which: str) -> str:
    """Forward, or forward and backward, of one operator."""
    forward, biased = which == "forward", any(row.bias for row in rows)
    header = ["shape", "floor: memory, products", "FlexAttention", "dense, whole map"]
    if biased:
        header += ["NATTEN"]
        header += ["aim, no bias", "ours, no bias", "aim, bias", "ours, bias"] if forward else []
        header += [] if forward else ["ours, no bias", "aim", "ours, bias"]
        header += ["NATTEN / ours"]
    else:
        header += ["ours"]
    header += ["FlexAttention / ours", "error / allowed", "what limits it"]
    lines = []
    for row in rows:
        result = results.get(row.label)
        if result is None:
            continue
        plain, bias = result.get("no bias"), result.get("bias")
        peer = natten_best(natten, row)
        peer = None if peer is None else {"forward": peer[:1], "both": peer[1:]}
        line = [row.label, ", ".join(f"{x:.3f}" for x in result["floors"][which])]
        line += [cell(result.get("flex"), which), cell(result.get("dense"), which)]
        aims = ["-" if aim is None else f"{aim:g}" for aim in row.aims]
        if biased:
            line += [cell(peer, which)]
            if forward:
                line += [aims[0], cell(plain, which), aims[1], cell(bias, which)]
            else:
                line += [cell(plain, which), aims[2], cell(bias, which)]
            line += [factor(peer, plain if forward or not row.bias else bias, which)]
        else:
            line += [cell(plain, which)]
        line += [factor(result.get("flex"), plain, which)]
        errors = [x["error"] for x in (plain, bias) if isinstance(x, dict)]
        line += [f"{max(errors):.2f}" if errors else "-", LIMITS.get(row.label, "")]
        lines.append(line)
    return markdown_table(header, lines)


def report(results: dict[str, dict], natten: list[dict], head: str) -> str:
    """All tables, as Markdown."""
    parts = ["# Local attention on one GPU\n", head]
    for name, rows in OPERATORS.items():
        if any(row.label in results for row in rows):
            what = {
                "neighborhood": "Neighborhood attention: batch x height x width, heads x dim, kernel, dilation",
                "circular": "Circular attention: batch x height x width, heads x dim, radius; 512 text tokens",
            }[name]
            for which, title in (("forward", "forward"), ("both", "forward and backward")):
                parts += [f"## {what}: {title}\n", table(rows, results, natten, which)]
    return "\n".join(parts)


def headline(about: dict) -> str:
    """What was measured on what, and how to read it."""
    return (
        f"{about['versions']}. bfloat16 (bias in float32), medians in milliseconds. Copies move "
        f"{about['bandwidth'] / 1e12:.2f} TB/s and a matrix product of 8192 a side runs at {about['rate'] / 1e12:.0f} "
        "TFLOP/s: the floors are each input read once and each output written once at that bandwidth, and the products "
        "within the windows at that rate. Times are of calls as a user makes them, with a cold cache; in parentheses "
        "the GPU's own time in a CUDA graph. FlexAttention is compiled with the same mask, without bias, and gets its "
        "tokens in order of residue class, untimed. Dense attention sees the whole map: another function where the "
        "window does not cover it. NATTEN 0.21.7 has no bias; its times (the best of its CUTLASS and Hopper kernels) "
        "were measured on an H200 on another day. Ratios are of calls; forward and backward compares NATTEN without "
        "bias to ours with it where there is one. Errors are the largest share of what FlashAttention's rule allows.\n"
    )


def row_numbers(words: list[str]) -> list[int]:
    """["1", "10-12"] -> [1, 10, 11, 12]."""
    numbers = []
    for word in words:
        first, _, last = word.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", metavar="N", help="only these rows of each table, from 1, such as 1 10-14")
    parser.add_argument("--operators", nargs="*", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--skip-flex", action="store_true", help="do without FlexAttention, which has to be compiled")
    parser.add_argument("--seconds", type=float, default=560, help="start no further row after this time")
    parser.add_argument("--peers", type=Path, default=RESULTS / "natten-0.21.7-h200.json", help="NATTEN's times")
    parser.add_argument("--output", type=Path, help="the table; scripts/results/attention_<gpu>.md by default")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    start = time.time()
    warnings.filterwarnings("ignore", module="torch")
    output = args.output or RESULTS / f"attention_{gpu_slug()}.md"
    store = output.with_suffix(".json")
    natten = json.loads(args.peers.read_text()) if args.peers.is_file() else []
    about = {"versions": versions(), "bandwidth": copy_bandwidth(), "rate": product_rate()}
    torch.cuda.empty_cache()
    saved = json.loads(store.read_text()) if store.is_file() else {}
    # Rows of other versions are not to be compared with these.
    results = saved["rows"] if saved.get("about", {}).get("versions") == about["versions"] else {}
    wanted = None if args.rows is None else row_numbers(args.rows)
    for name in args.operators:
        for number, row in enumerate(OPERATORS[name], 1):
            if wanted is not None and number not in wanted:
                continue
            if time.time() - start > args.seconds:
                print(f"no time for {row.label}", flush=True)
                continue
            began = time.time()
            found = measure(row, about["bandwidth"], about["rate"], not args.skip_flex, start + args.seconds)
            results[row.label] = results.get(row.label, {}) | found
            store.write_text(json.dumps({"about": about, "rows": results}, indent=1) + "\n")
            output.write_text(report(results, natten, headline(about)))
            print(f"{row.label} in {time.time() - began:.0f} s: {results[row.label]}", flush=True)
    print(report(results, natten, headline(about)) + f"\nwritten to {output} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
