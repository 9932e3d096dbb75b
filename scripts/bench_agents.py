"""Agent attention and the convolution beside it on one GPU, at the sizes of models: our kernels and torch's.

    python scripts/bench_agents.py [--output FILE]

bfloat16. Each is first compared with float64: the output and every gradient may err twice as much as by torch's
operators. Times are the GPU's own, of all kernels of a call, as the profiler has them; the host's are not in them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from measure import gpu_slug, markdown_table, versions
from zoo.kernels import agent_attention
from zoo.kernels.depthwise_conv import add_depthwise_conv
from zoo.kernels.depthwise_conv.api import in_torch

DTYPE = torch.bfloat16
CALLS = 5
# images, tokens, heads, head_dim, agents
AGENTS = {
    "Agent-DeiT-S, 224 pixels": (128, 197, 6, 64, 49),
    "Agent-DeiT-S, 512 pixels": (48, 1025, 6, 64, 49),
    "Agent-DeiT-S, 1024 pixels": (12, 4097, 6, 64, 49),
    "Agent-Swin-T, stage 1, 224 pixels": (128, 3136, 3, 32, 9),
    "Agent-Swin-T, stage 2, 224 pixels": (128, 784, 6, 32, 16),
    "Agent-Swin-T, stage 3, 224 pixels": (128, 196, 12, 32, 49),
    "Agent-Swin-T, stage 1, 1024 pixels": (12, 65536, 3, 32, 9),
    "Agent-Swin-T, stage 3, 1024 pixels": (12, 4096, 12, 32, 49),
    "Agent-PVT, stage 1, 224 pixels": (128, 3136, 1, 64, 9),
}
# images, side of the map, channels, side of the convolution
CONVOLUTIONS = {
    "Agent-DeiT-S, 224 pixels": (128, 14, 384, 3),
    "Agent-Swin-T, stage 1, 224 pixels": (128, 56, 96, 3),
    "Agent-Swin-T, stage 2, 224 pixels": (128, 28, 192, 3),
    "Agent-Swin-T, stage 1, 1024 pixels": (12, 256, 96, 3),
    "BiFormer-T, positions, stage 1, 512 pixels": (48, 128, 64, 3),
    "BiFormer-T, stage 1, 512 pixels": (48, 128, 64, 5),
    "BiFormer-T, stage 3, 224 pixels": (128, 14, 256, 5),
}


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def agents(sizes: tuple[int, ...]) -> tuple[list[Tensor], Callable, Callable]:
    """Inputs, our function of them and torch's."""
    batch, tokens, heads, dim, count = sizes
    qkv, agent = randn(batch, tokens, 3, heads, dim), randn(batch, count, heads, dim)
    biases = randn(heads, count, tokens, dtype=torch.float32), randn(heads, tokens, count, dtype=torch.float32)

    def attend(backend: str) -> Callable:
        def run(qkv, agent, agent_bias, query_bias):
            options = {"agent_bias": agent_bias, "query_bias": query_bias, "backend": backend}
            return agent_attention(*qkv.unbind(2), agent, **options)

        return run

    return [qkv, agent, *biases], attend("triton"), attend("sdpa")


def convolution(sizes: tuple[int, ...]) -> tuple[list[Tensor], Callable, Callable]:
    """The same of the convolution, whose map is a part of a wider one."""
    batch, side, channels, size = sizes
    qkv, base = randn(batch, side, side, 3 * channels), randn(batch, side, side, channels)
    weight, bias = randn(channels, 1, size, size, dtype=torch.float32), randn(channels, dtype=torch.float32)

    def run(function: Callable) -> Callable:
        def call(base, qkv, weight, bias):
            with torch.autocast("cuda", DTYPE, enabled=qkv.dtype == DTYPE):
                return function(base, qkv[..., 2 * channels :], weight, bias)

        return call

    return [base, qkv, weight, bias], run(add_depthwise_conv), run(in_torch)


def results(function: Callable, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def gpu_ms(call: Callable) -> float:
    """Milliseconds that a GPU's kernels run in a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / CALLS / 1e3


def measure(make: Callable, sizes: tuple[int, ...]) -> list[str]:
    """A row: forward ours and torch's, with gradients ours and torch's, the worst of our errors in units of torch's."""
    torch.manual_seed(0)
    inputs, ours, torchs = make(sizes)
    with torch.no_grad():
        grad = torch.randn_like(ours(*inputs))
    exact = results(torchs, [x.double() for x in inputs], grad)
    found = [results(f, inputs, grad) for f in (ours, torchs)]
    errors = [[((a.double() - e).norm() / e.norm()).item() for a, e in zip(f, exact, strict=True)] for f in found]
    worst = max(a / max(b, 1e-12) if a > 0 else 0.0 for a, b in zip(*errors, strict=True))
    if not worst <= 2:
        return ["-"] * 4 + [f"{worst:.2f}, more than 2: not timed"]

    def infer(function: Callable) -> None:
        with torch.no_grad():
            function(*inputs)

    calls = [(infer, (f,)) for f in (ours, torchs)] + [(results, (f, inputs, grad)) for f in (ours, torchs)]
    return [*(f"{gpu_ms(lambda f=f, a=a: f(*a)):.3f}" for f, a in calls), f"{worst:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the tables; scripts/results/agents_<gpu>.md by default")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    began = time.time()
    header = ["", "forward, ours", "torch's", "with gradients, ours", "torch's", "largest error, in units of torch's"]
    parts = [
        f"# Agent attention and the convolution beside it\n\n{versions()}. bfloat16; milliseconds of the GPU's time.\n"
    ]
    for title, make, cases, names in (
        ("Agent attention", agents, AGENTS, "images, tokens, heads, head_dim, agents"),
        ("Depthwise convolution, added", convolution, CONVOLUTIONS, "images, side, channels, side of the convolution"),
    ):
        rows = []
        for name, sizes in cases.items():
            rows.append([f"{name}: {' x '.join(map(str, sizes))}", *measure(make, sizes)])
            print(*rows[-1], sep=" | ", flush=True)
        parts.append(f"## {title}\n\nSizes: {names}.\n\n{markdown_table(header, rows)}")
    output = args.output or Path(__file__).parent / "results" / f"agents_{gpu_slug()}.md"
    output.write_text("\n".join(parts))
    print(f"written to {output} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
