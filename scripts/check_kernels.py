"""Check the fused kernels on this GPU against float64, on random problems.

    python scripts/check_kernels.py [--problems 2000] [--output scripts/results/check.txt]

FlashAttention's rule: the error of the output and of every gradient against float64 is at most twice that of plain
torch in the same dtype. Every problem runs twice and has to repeat bit by bit; outputs are poisoned with nan before.
"""

import argparse
import multiprocessing
import os
import platform
import random
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton as triton_package

from zoo.kernels.neighborhood import reference, tiled, triton

NAMES = "out", "query", "key", "value", "rel_pos_bias", "extra_key", "extra_value"


def problem(seed: int) -> dict:
    """A random call; maps from one token to a few tiles."""
    rng = random.Random(seed)

    def axis():
        kernel_size = rng.choice([1, 2, 3, 3, 5, 7, 7, 8, 11, 13, 20])
        dilation = rng.choice([1, 1, 1, 2, 3, 8])
        length = kernel_size * dilation + rng.choice([0, 0, 1, 3, 8, 17, 30])
        stride = rng.choice([1, 1, 1, rng.randint(1, kernel_size)])
        return length, kernel_size, dilation, stride, rng.random() < 0.15

    (height, *rows), (width, *cols) = axis(), axis()
    return {
        "shape": (
            rng.randint(1, 3),
            height,
            width,
            rng.randint(1, 4),
            rng.choice([8, 16, 20, 32, 32, 64, 80, 128, 256]),
        ),
        "geometry": (*zip(rows, cols), 0),
        "bias": rng.random() < 0.5,
        "extra": rng.choice([0, 0, 0, 1, 7, 40]),
        "dtype": rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        "layout": rng.choice(["packed", "heads first"]),
    }


def tensors(seed: int, shape, geometry, bias, extra, dtype, layout):
    """Query to extra_value and the incoming gradient; strided as of a fused projection, or heads first."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    batch, height, width, heads, dim = shape
    if layout == "packed":
        qkv = list(randn(batch, height, width, 3, heads, dim).unbind(3))
    else:
        qkv = [randn(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4) for _ in range(3)]
    table = randn(heads, *(2 * k - 1 for k in geometry[0])) if bias else None
    tokens = [randn(batch, extra, heads, dim) if extra else None for _ in range(2)]
    return [*qkv, table, *tokens], randn(*shape)


def check(seed: int) -> tuple[int, str, dict, str]:
    """Seed, its problem, the ratio of errors per tensor, and what is wrong, if anything."""
    torch.cuda.set_device(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with nan
    case = problem(seed)
    inputs, grad_out = tensors(seed, **case)
    geometry, scale = case["geometry"], case["shape"][-1] ** -0.5

    def fused():
        out, lse = triton.forward(*inputs, geometry, scale)
        return out, *triton.backward(grad_out, None, *inputs, out, lse, geometry, scale)

    ours, again = fused(), fused()
    wrong = "" if all(a is None or torch.equal(a, b) for a, b in zip(ours, again)) else "does not repeat"
    exact_inputs = [None if x is None else x.double() for x in inputs]
    out, lse = tiled.forward(*exact_inputs, geometry, scale)
    exact = out, *tiled.backward(grad_out.double(), None, *exact_inputs, out, lse, geometry, scale)
    plain_inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    present = [x for x in plain_inputs if x is not None]
    out, _ = reference.neighborhood_attention_2d(
        *plain_inputs[:3], *geometry, *plain_inputs[3:], scale, dtype=case["dtype"]
    )
    grads = iter(torch.autograd.grad(out, present, grad_out))
    plain = out, *(None if x is None else next(grads) for x in plain_inputs)
    ratios = {}
    for name, a, p, e in zip(NAMES, ours, plain, exact):
        if a is None:
            continue
        error, allowed = ((x.double() - e).abs().max().item() for x in (a, p))
        # Where plain torch happens to be exact: one rounding of the dtype.
        allowed = 2 * allowed + torch.finfo(case["dtype"]).eps * e.abs().max().item()
        ratios[name] = error / max(allowed, 1e-30)
        if not error <= allowed:
            wrong += f" {name}: {error:.2e} > {allowed:.2e}"
    return seed, str(case), ratios, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--seconds", type=float, default=540, help="stop after this time and report what was done")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "check.txt")
    args = parser.parse_args()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    start, done, failures, worst = time.time(), 0, [], {}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for seed, case, ratios, wrong in pool.map(check, range(args.first, args.first + args.problems)):
            done += 1
            for name, ratio in ratios.items():
                worst[name] = max(worst.get(name, 0), ratio)
            if wrong:
                failures.append(f"seed {seed} {case}: {wrong}")
                print(failures[-1], flush=True)
            if time.time() - start > args.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_package.__version__}, "
        f"Python {platform.python_version()}, driver {driver}",
        f"{done} of {args.problems} random problems in {time.time() - start:.0f} s, {len(failures)} failed",
        "largest error as a share of what is allowed: " + ", ".join(f"{k} {v:.2f}" for k, v in worst.items()),
        *failures,
    ]
    args.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:3]))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
