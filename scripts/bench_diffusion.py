"""Diffusion models of real size on one GPU, in bfloat16: local and agent attention beside dense, per forward pass.

    python scripts/bench_diffusion.py [--only flux unet] [--flux-sizes 1024 2048] [--unet-sizes 512] [--whole 4096]
                                      [--budget 3] [--seconds 560] [--output FOLDER]
    python scripts/bench_diffusion.py --tiny --output FOLDER     # toy models on the CPU, in seconds, to try the script

Flux with the configuration of FLUX.1-dev and CLEAR's circular windows or neighborhoods; the UNets of SD 1.5 and SDXL
with agent attention. Weights are random. Every attention is first checked inside the model at the size that is timed,
by FlashAttention's rule: some queries of two heads in every kind of layer against float64; one that fails is not timed.
Dense attention runs on the backend of scaled_dot_product_attention that is fastest for the size.

Beyond `--whole` pixels a forward of Flux is not run as a whole: blocks of both kinds are timed, two of each, in the
model with all of its weights in place, and the time is their sum over all blocks plus that of the rest. The same sum
at the largest size that is run as a whole says how far to trust it.

Figures are kept in a .json beside the table, so that several runs can share the work: a run replaces those it measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from measure import NAMES, Window, first_line, flash_rule, gpu_slug, markdown_table, versions
from zoo.diffusion import AgentAttnProcessor, ClearAttnProcessor, Grid, GridAttnProcessor, attach
from zoo.diffusion import NeighborhoodAttnProcessor as Neighborhood
from zoo.diffusion.agent import agent_attention, dense_attention

DTYPE = torch.bfloat16
DENSE = "dense"
FLUX_ATTENTION = {
    "CLEAR, radius 8": (ClearAttnProcessor(8), Window(radius=8)),
    "CLEAR, radius 16": (ClearAttnProcessor(16), Window(radius=16)),
    "CLEAR, radius 32": (ClearAttnProcessor(32), Window(radius=32)),
    "neighborhood 16": (Neighborhood(16), Window((16, 16))),
    "neighborhood 32": (Neighborhood(32), Window((32, 32))),
}
BLOCKS = "transformer_blocks", "single_transformer_blocks"
AGENT_STEPS, STEPS = 20, 50  # AgentSD's: agents in the first steps, merging alone in the others
BACKENDS = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


class Scale(NamedTuple):
    """Which models, at which sizes in pixels, and how far Flux is run as a whole."""

    device: str
    flux: dict
    unets: dict[str, dict]
    flux_sizes: tuple[int, ...]
    unet_sizes: tuple[int, ...]
    whole: int
    text: int  # tokens of Flux's prompt


REAL = Scale(
    device="cuda",
    flux={"guidance_embeds": True},  # all else of FLUX.1-dev is the default
    unets={
        "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768},
        "SDXL": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
    flux_sizes=(1024, 2048, 4096, 8192),
    unet_sizes=(512, 1024, 2048),
    whole=4096,
    text=512,
)
TINY = Scale(
    device="cpu",
    flux={
        "in_channels": 4,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 6,
        "axes_dims_rope": (4, 6, 6),
    },
    unets={
        "tiny": {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "cross_attention_dim": 6,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        }
    },
    flux_sizes=(256, 288),
    unet_sizes=(64,),
    whole=256,
    text=5,
)


# Models


def create(kind: type[nn.Module], config: dict, device: str) -> nn.Module:
    """With random weights, made where they stay."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            return kind(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def flux_call(model: nn.Module, size: int, text: int) -> dict[str, Tensor]:
    """Arguments for one image of `size` pixels a side; a token is 16 x 16 of them."""
    config, side, device = model.config, size // 16, model.device
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)
    call = {
        "hidden_states": randn(1, side * side, config.in_channels),
        "encoder_hidden_states": randn(1, text, config.joint_attention_dim),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=device, dtype=DTYPE),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    if config.guidance_embeds:
        call["guidance"] = torch.full((1,), 3.5, device=device)
    return call


def unet_call(model: nn.Module, size: int) -> dict:
    """Arguments for one image of `size` pixels a side under guidance, which is a batch of two."""
    config, device = model.config, model.device
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    call = {
        "sample": randn(2, config.in_channels, size // 8, size // 8),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": randn(2, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        times = torch.tensor([[size, size, 0, 0, size, size]] * 2, device=device, dtype=DTYPE)
        call["added_cond_kwargs"] = {"text_embeds": randn(2, pooled), "time_ids": times}
    return call


@contextmanager
def few_blocks(model: nn.Module, count: int) -> Iterator[None]:
    """Run only the first `count` blocks of each kind; the others stay in memory."""
    kept = [getattr(model, name) for name in BLOCKS]
    for name, blocks in zip(BLOCKS, kept):
        setattr(model, name, blocks[:count])
    try:
        yield
    finally:
        for name, blocks in zip(BLOCKS, kept):
            setattr(model, name, blocks)


# Checks


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, dtype: torch.dtype, seen=None) -> Tensor:
    """[batch, queries, heads, dim], every step in `dtype`; `seen` [queries, keys] says who sees whom."""
    query, key, value = (x.to(dtype) for x in (query, key, value))
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


def sees(window: Window, tokens: Tensor, side: int, text: int) -> Tensor:
    """[queries, text + side * side]: what `tokens`, counted with text first, see of all; text sees and is seen."""
    image = torch.arange(side * side, device=tokens.device)
    query, seen = (tokens - text)[:, None], None
    for q, k, size in zip((query // side, query % side), (image // side, image % side), window.kernel_size):
        if window.radius:
            axis = (q - k) ** 2
            seen = axis if seen is None else seen + axis < window.radius**2
        else:
            start = (q - size // 2).clamp(0, side - size)
            axis = (k >= start) & (k < start + size)
            seen = axis if seen is None else seen & axis
    return torch.cat([seen.new_ones(len(tokens), text), seen | (query < 0)], 1)


def some(tokens: int, device: torch.device) -> Tensor:
    """Queries to compare: spread evenly, and the first and the last ones."""
    spread = torch.linspace(0, tokens - 1, min(tokens, 256), device=device, dtype=torch.float64).long()
    ends = torch.arange(min(tokens, 64), device=device)
    return torch.cat([spread, ends, tokens - 1 - ends]).unique()


class Verdict:
    """What checks found: the largest share of the allowed error, and what is wrong in words."""

    def __init__(self) -> None:
        self.compared, self.share, self.wrong = 0, 0.0, []

    def compare(self, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        none = [None] * (1 + len(NAMES))
        shares, wrong = flash_rule([ours, *none], [plain, *none], [exact, *none])
        self.compared += 1
        self.share = max(self.share, *shares.values())
        self.wrong += wrong if ours.isfinite().all() else ["not everything is finite"]

    def raise_if_wrong(self) -> None:
        if not self.compared:
            self.wrong.append("nothing was compared")
        if self.wrong:
            raise ValueError("wrong: " + "; ".join(self.wrong))


class Checked(GridAttnProcessor):
    """A processor of Flux whose every result is compared."""

    def __init__(self, processor: GridAttnProcessor, window: Window, side: int, text: int, verdict: Verdict) -> None:
        super().__init__()
        self.processor, self.window, self.verdict = processor, window, verdict
        self.expected = Grid(side, side, text, True)

    def check(self, grid: Grid, layer: str) -> None:
        self.processor.check(grid, layer)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float):
        image, words = self.processor.attend(query, key, value, grid, scale)
        if grid != self.expected:
            self.verdict.wrong.append(f"{grid} is not {self.expected}")
        picked, heads = some(grid.tokens, query.device), [0, query.shape[2] - 1]
        ours = torch.cat([words, image.flatten(1, 2)], 1)[:, picked][:, :, heads]
        part = query[:, picked][:, :, heads], key[:, :, heads], value[:, :, heads]
        seen = sees(self.window, picked, grid.height, grid.text)
        self.verdict.compare(ours, *(plain_attention(*part, scale, dtype, seen) for dtype in (DTYPE, torch.double)))
        return image, words


@contextmanager
def checked_agents(verdict: Verdict) -> Iterator[None]:
    """Compare what `AgentAttnProcessor` computes: agent attention, and dense attention of merged tokens."""

    def picked(x: Tensor, *others: Tensor):
        heads = [0, x.shape[2] - 1]
        return x[:, some(x.shape[1], x.device)][:, :, heads], *(y[:, :, heads] for y in others)

    def agents(query, key, value, agent, *, scale, query_scale):
        out = agent_attention(query, key, value, agent, scale=scale, query_scale=query_scale)
        q, k, v, a = picked(query, key, value, agent)
        results = []
        for dtype in (DTYPE, torch.double):
            gathered = plain_attention(a, k, v, scale, dtype)
            results.append(plain_attention(q, a, gathered, query_scale, dtype))
        verdict.compare(*picked(out), *results)
        return out

    def dense(query, key, value, scale):
        out = dense_attention(query, key, value, scale)
        part = picked(query, key, value)
        verdict.compare(*picked(out), *(plain_attention(*part, scale, dtype) for dtype in (DTYPE, torch.double)))
        return out

    with mock.patch.multiple("zoo.diffusion.agent", agent_attention=agents, dense_attention=dense):
        yield


# Clocks


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable) -> float:
    """Of one call, with everything that it started on the GPU."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def repeated(call: Callable, budget: float) -> list[float]:
    """Seconds of 1 to 10 calls, as many as fit into `budget` seconds, after one that is not counted."""
    call()
    times = [seconds_of(call)]
    while len(times) < 10 and sum(times) + times[-1] <= budget:
        times.append(seconds_of(call))
    return times


def whole_times(call: Callable, budget: float) -> dict:
    """Milliseconds of a forward."""
    times = [1e3 * t for t in repeated(call, budget)]
    return {"ms": statistics.median(times), "range": [min(times), max(times)], "repeats": len(times)}


def summed_times(model: nn.Module, call: Callable, budget: float) -> dict:
    """Milliseconds of a forward of Flux, by the blocks of each kind and what is left."""
    depths = [len(getattr(model, name)) for name in BLOCKS]
    durations, began = [[], []], []

    def start(module, args):
        synchronize()
        began.append(time.perf_counter())

    with few_blocks(model, 2):
        call()
        hooks = []
        for name, kind in zip(BLOCKS, durations):

            def end(module, args, output, kind=kind):
                synchronize()
                kind.append(time.perf_counter() - began.pop())

            for block in getattr(model, name):
                hooks += [block.register_forward_pre_hook(start), block.register_forward_hook(end)]
        try:
            wholes = [seconds_of(call)]
            while len(wholes) < 5 and sum(wholes) + wholes[-1] <= budget:
                wholes.append(seconds_of(call))
        finally:
            for hook in hooks:
                hook.remove()
    rest = sum(wholes) - sum(map(sum, durations))
    blocks = [statistics.median(kind) for kind in durations]
    seconds = rest / len(wholes) + sum(n * block for n, block in zip(depths, blocks))
    parts = {"double": 1e3 * blocks[0], "single": 1e3 * blocks[1], "rest": 1e3 * rest / len(wholes)}
    return {"ms": 1e3 * seconds, "repeats": len(wholes), "summed": parts}


@contextmanager
def preferred(backend: SDPBackend | None) -> Iterator[None]:
    """Dense attention on `backend` wherever it can, on another where it cannot."""
    order = [backend, *(other for other in BACKENDS if other != backend), SDPBackend.MATH]
    with nullcontext() if backend is None else sdpa_kernel(order, set_priority=True):
        yield


def best_backend(tokens: int, heads: int, dim: int, batch: int, device: str) -> SDPBackend | None:
    """The fastest one for dense attention; with no more than 4096 of the queries, to be quick. None on the CPU."""
    if device == "cpu":
        return None
    key, value = torch.randn(2, batch, heads, tokens, dim, device=device, dtype=DTYPE)
    query, times = key[:, :, :4096].contiguous(), {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                times[backend] = min(repeated(lambda: scaled_dot_product_attention(query, key, value), 0.3))
        except RuntimeError:  # not every backend is there, or takes every shape
            continue
    return min(times, key=times.get)


def figures(measure: Callable[[], dict]) -> dict | str:
    """What `measure` finds, and the peak memory in GiB; or why there is nothing."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        result = measure()
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except (RuntimeError, ValueError, TypeError) as error:
        return first_line(error)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return result | {"memory": memory}


# Figures


@torch.no_grad()
def flux_figures(model: nn.Module, name: str, call: dict, size: int, scale: Scale, budget: float) -> dict | str:
    """Of one attention at one size."""

    def run():
        return model(**call, return_dict=False)[0]

    def measure() -> dict:
        result = {}
        if size <= scale.whole:
            result |= whole_times(run, budget)
        if size >= scale.whole:
            summed = summed_times(model, run, budget)
            result = result | {"from blocks": summed["ms"]} if result else summed
        return result

    if name == DENSE:
        return figures(measure)
    processor, window = FLUX_ATTENTION[name]
    verdict = Verdict()

    def check() -> dict:
        checked = Checked(processor, window, size // 16, scale.text, verdict)
        with few_blocks(model, 1), attach(model, checked):
            run()
        verdict.raise_if_wrong()
        return {}

    checked = figures(check)
    if isinstance(checked, str):
        return checked
    with attach(model, processor):
        result = figures(measure)
    return result | {"error": verdict.share} if isinstance(result, dict) else result


def measure_flux(scale: Scale, sizes: list[int], budget: float, late: Callable[[], bool], keep: Callable) -> None:
    """All attentions at all sizes; `keep(size, name, result)` is told each."""
    model = create(FluxTransformer2DModel, scale.flux, scale.device)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    for size in sizes:
        call = flux_call(model, size, scale.text)
        backend = best_backend((size // 16) ** 2 + scale.text, heads, dim, 1, scale.device)
        with preferred(backend):
            for name in (DENSE, *FLUX_ATTENTION):
                if late():
                    print(f"no time for {name} at {size}", flush=True)
                    continue
                result = flux_figures(model, name, call, size, scale, budget)
                if isinstance(result, dict) and name == DENSE:
                    result["backend"] = "default" if backend is None else backend.name.removesuffix("_ATTENTION")
                keep(str(size), name, result)


@torch.no_grad()
def unet_figures(model: nn.Module, call: dict, step: int | None, max_downsample: int, budget: float) -> dict | str:
    """Of dense attention, or of AgentSD's settings at a step."""

    def run():
        return model(**call, return_dict=False)[0]

    if step is None:
        return figures(lambda: whole_times(run, budget))
    processor, verdict = AgentAttnProcessor(max_downsample=max_downsample), Verdict()
    processor.step = step

    def check() -> dict:
        with checked_agents(verdict):
            run()
        verdict.raise_if_wrong()
        return {}

    with attach(model, processor):
        checked = figures(check)
        if isinstance(checked, str):
            return checked
        result = figures(lambda: whole_times(run, budget))
    return result | {"error": verdict.share} if isinstance(result, dict) else result


def measure_unets(scale: Scale, sizes: list[int], budget: float, late: Callable[[], bool], keep: Callable) -> None:
    """Dense and agent attention in every UNet at all sizes; `keep(row, name, result)` is told each."""
    for label, config in scale.unets.items():
        model = create(UNet2DConditionModel, config, scale.device)
        stride = 2 if model.config.down_block_types[0] == "DownBlock2D" else 1  # of its first level with attention
        level = stride.bit_length() - 1
        channels, heads = model.config.block_out_channels[level], model.config.attention_head_dim
        heads = heads if isinstance(heads, int) else heads[level]
        for size in sizes:
            call = unet_call(model, size)
            tokens = (size // 8 // stride) ** 2
            backend = best_backend(tokens, heads, channels // heads, 2, scale.device)
            with preferred(backend):
                for name, step in ((DENSE, None), ("agents", 0), ("merging", AGENT_STEPS)):
                    if late():
                        print(f"no time for {name} in {label} at {size}", flush=True)
                        continue
                    result = unet_figures(model, call, step, stride, budget)
                    if isinstance(result, dict) and name == DENSE:
                        result["backend"] = "default" if backend is None else backend.name.removesuffix("_ATTENTION")
                    keep(f"{label}, {size}", name, result)
        del model


# Tables


def milliseconds(result: dict | str | None, dense: dict | str | None = None) -> str:
    """Milliseconds, how many times faster than dense, or why there are none; sums of blocks with a star."""
    if not isinstance(result, dict):
        return result or "-"
    text = f"{result['ms']:,.0f}" if result["ms"] >= 100 else f"{result['ms']:.1f}"
    text += " *" if "summed" in result else ""
    return text + (f" ({dense['ms'] / result['ms']:.2f}x)" if isinstance(dense, dict) else "")


def memory(result: dict | str | None) -> str:
    return f"{result['memory']:.1f}" if isinstance(result, dict) else "-"


def largest_error(results: list) -> str:
    errors = [result["error"] for result in results if isinstance(result, dict) and "error" in result]
    return f"{max(errors):.2f}" if errors else "-"


def flux_report(rows: dict[str, dict]) -> list[str]:
    """Flux's tables: attentions by sizes."""
    sizes = sorted(rows, key=int)
    names = [name for name in (DENSE, *FLUX_ATTENTION) if any(name in rows[size] for size in sizes)]
    times, memories = [], []
    for name in names:
        results = [rows[size].get(name) for size in sizes]
        denses = [None if name == DENSE else rows[size].get(DENSE) for size in sizes]
        times.append([name, *map(milliseconds, results, denses), largest_error(results)])
        memories.append([name, *map(memory, results)])
    header = ["attention", *(f"{size} x {size}" for size in sizes)]
    denses = {size: rows[size][DENSE] for size in sizes if isinstance(rows[size].get(DENSE), dict)}
    notes = ["Dense attention by " + ", ".join(f"{d['backend'].lower()} at {size}" for size, d in denses.items()) + "."]
    both = [r for results in rows.values() for r in results.values() if isinstance(r, dict) and "from blocks" in r]
    if both:
        off = max(abs(r["from blocks"] / r["ms"] - 1) for r in both)
        notes.append(
            f"Where both were measured, sums of blocks differ from whole forwards by at most {100 * off:.1f} %."
        )
    return [
        "## Flux: milliseconds per forward, and how many times faster than dense\n",
        markdown_table([*header, "error / allowed"], times),
        " ".join(notes) + "\n",
        "## Flux: peak memory in GiB, weights included\n",
        markdown_table(header, memories),
    ]


def unet_report(rows: dict[str, dict]) -> list[str]:
    """The UNets' table."""
    lines = []
    for label, results in rows.items():
        dense, early, later = (results.get(name) for name in (DENSE, "agents", "merging"))
        known = all(isinstance(result, dict) for result in (dense, early, later))
        total = AGENT_STEPS * early["ms"] + (STEPS - AGENT_STEPS) * later["ms"] if known else 0
        lines.append(
            [
                f"{label} x {label.split()[-1]}",
                milliseconds(dense),
                milliseconds(early, dense),
                milliseconds(later, dense),
                f"{STEPS * dense['ms'] / total:.2f}x" if known else "-",
                ", ".join(memory(result) for result in (dense, early, later)),
                dense["backend"].lower() if isinstance(dense, dict) else "-",
                largest_error([early, later]),
            ]
        )
    header = ["UNet", "dense", f"agents, first {AGENT_STEPS} steps", "merging, other steps", f"{STEPS} steps"]
    header += ["GiB: dense, agents, merging", "dense by", "error / allowed"]
    return [
        "## UNets with AgentSD: milliseconds per forward, and how many times faster than dense\n",
        markdown_table(header, lines),
    ]


def report(results: dict[str, dict], about: str, tiny: bool) -> str:
    """All tables, as Markdown."""
    parts = [
        "# Diffusion models on one GPU\n" if not tiny else "# Diffusion models: a trial with toy models\n",
        f"{about}. bfloat16, random weights, eager, one image: a batch of 1 for Flux (configuration of FLUX.1-dev, 512 "
        "text tokens), of 2 for the UNets, which need guidance. Medians as called, launches included. A star: the sum "
        "of 19 double and 38 single blocks, each kind timed by two of them with all weights in place, and the rest. "
        "Errors are the largest share of what FlashAttention's rule allows, of some queries in every kind of layer at "
        "that size.\n",
    ]
    if results.get("flux"):
        parts += flux_report(results["flux"])
    if results.get("unet"):
        parts += unet_report(results["unet"])
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("flux", "unet"), default=["flux", "unet"])
    parser.add_argument("--flux-sizes", nargs="+", type=int, help="pixels a side, multiples of 16")
    parser.add_argument("--unet-sizes", nargs="+", type=int, help="pixels a side, multiples of 64")
    parser.add_argument("--whole", type=int, help="largest size at which Flux is run as a whole; 4096 by default")
    parser.add_argument("--budget", type=float, default=3, help="seconds to repeat each figure for")
    parser.add_argument("--seconds", type=float, default=560, help="start no further figure after this time")
    parser.add_argument("--tiny", action="store_true", help="toy models on the CPU, to try the script")
    parser.add_argument("--output", type=Path, help="folder of the table; scripts/results by default")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU; --tiny tries the script without one")
    start = time.time()
    warnings.filterwarnings("ignore", module="torch|diffusers")
    scale = TINY if args.tiny else REAL
    scale = scale if args.whole is None else scale._replace(whole=args.whole)
    about = f"CPU, torch {torch.__version__}, Python {platform.python_version()}" if args.tiny else versions()
    about += f", diffusers {version('diffusers')}"
    folder = args.output or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"diffusion_{'tiny' if args.tiny else gpu_slug()}.md"
    store = output.with_suffix(".json")
    saved = json.loads(store.read_text()) if store.is_file() else {}
    # Figures of other versions are not to be compared with these.
    results = saved["results"] if saved.get("about") == about else {}

    def late() -> bool:
        return time.time() - start > args.seconds

    for kind, measure, sizes in (
        ("flux", measure_flux, args.flux_sizes or scale.flux_sizes),
        ("unet", measure_unets, args.unet_sizes or scale.unet_sizes),
    ):
        if kind not in args.only:
            continue

        def keep(row: str, name: str, result: dict | str, kind: str = kind) -> None:
            results.setdefault(kind, {}).setdefault(row, {})[name] = result
            store.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
            output.write_text(report(results, about, args.tiny))
            print(f"{time.time() - start:4.0f} s: {kind} {row}, {name}: {result}", flush=True)

        measure(scale, sizes, args.budget, late, keep)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(report(results, about, args.tiny) + f"\nwritten to {output} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
