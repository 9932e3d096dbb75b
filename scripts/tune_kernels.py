"""Find the fastest tile sizes of the fused kernels on this GPU and write them to the committed table.

    python scripts/tune_kernels.py [--output kernels/neighborhood/triton/tuning.json]

Every candidate is compiled beforehand on all processor cores, compared with the default's result, and timed alone
(median; that of the bias includes what its kernel makes on the way). Only entries for this GPU's compute capability and
for the problems that were run are replaced. bfloat16.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from zoo.kernels.neighborhood import triton as fused
from zoo.kernels.neighborhood.triton import tuning
from zoo.kernels.neighborhood.triton.tuning import Config

# batch, height, width, heads, head_dim, kernel_size, dilation, with bias as well
PROBLEMS = [
    (128, 56, 56, 2, 32, 7, 1, True),
    (128, 56, 56, 2, 32, 7, 8, True),
    (16, 96, 96, 6, 32, 11, 1, True),
    (8, 256, 256, 4, 64, 7, 1, True),
    (4, 128, 128, 8, 64, 13, 1, True),
    (1, 128, 128, 24, 128, 16, 4, False),
    (1, 128, 128, 24, 128, 32, 1, False),
    (1, 256, 256, 24, 128, 80, 1, False),
    (128, 14, 14, 8, 32, 14, 1, True),
]
KEYS = ("kernel", "bias", "dim", "span")  # what an entry of the table is for
KERNELS = ("forward", "query", "key_value", "bias")
DEFAULT = Config(4, 8, 2, 16, 2, 1)


def span(problem) -> int:
    """What `tuning.config` goes by."""
    return tuning.span(problem[1:3], (problem[5],) * 2, (problem[6],) * 2)


def candidates(kernel: str, dim: int, span: int) -> list[Config]:
    """Tile sizes worth trying."""
    if span <= tuning.SMALL:  # a tile of 8 x 8 holds a whole class, which the kernel "bias" makes use of
        tiles = [(8, 8), (4, 8), (2, 8)] if kernel == "forward" else [(8, 8)]
        blocks = [(8, 8)]
    elif dim <= 64:
        tiles = [(8, 8), (4, 8), (2, 8)] if span <= 16 else [(16, 4), (8, 4), (4, 8), (4, 4)]
        blocks = [(2, 16), (4, 16), (8, 16), (16, 16)]
    else:
        tiles = [(8, 8), (8, 16), (16, 8), (16, 16)] if kernel != "key_value" else [(8, 8), (8, 16), (16, 8)]
        blocks = [(2, 16), (4, 16), (8, 16)] if kernel == "forward" else [(2, 16), (4, 16)]
    found = []
    for tile, block, stages in itertools.product(tiles, blocks, (1, 2, 3)):
        rows, keys = tile[0] * tile[1], block[0] * block[1]
        if ((rows == 16 and keys == 64) or (rows > 16 and keys > 64)) and span > tuning.SMALL and dim <= 64:
            continue  # never among the best
        if stages == 1 and keys < 128 and span > tuning.SMALL:
            continue  # several blocks a tile: nothing would overlap
        few = {16: (1, 2, 4) if keys > 128 else (1, 2), 32: (1, 2), 64: (2, 4, 8) if span <= tuning.SMALL else (4,)}
        for warps in few.get(rows, (4, 8) if dim <= 64 else (8,)):
            found.append(Config(*tile, *block, warps, stages))
    return found


def calls(problem, has_bias: bool) -> dict:
    """Kernel -> (function that launches it, tensors it fills)."""
    batch, height, width, heads, dim, k, d, _ = problem
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)

    q, key, v, grad_out = (randn(batch, height, width, heads, dim) for _ in range(4))
    bias = randn(heads, 2 * k - 1, 2 * k - 1, dtype=torch.float32) if has_bias else None
    geometry = (k, k), (d, d), (1, 1), (False, False), 0
    arguments = q, key, v, bias, None, None, geometry, dim**-0.5
    out, lse = fused.forward(*arguments)
    p = fused._Problem(*arguments)
    shift, grads = torch.empty_like(lse), [torch.empty_like(q) for _ in range(3)]
    fused._query_gradient(p, out, lse, grad_out, None, shift, grads[0])

    def query():
        fused._query_gradient(p, out, lse, grad_out, None, shift, grads[0])
        return grads[:1]

    def key_value():
        fused._key_value_gradients(p, lse, grad_out, shift, *grads[1:])
        return grads[1:]

    def rest():
        """Of the bias; with it of the queries, and of keys and values where one kernel makes them all."""
        d_bias, has_keys = fused._query_and_bias_gradients(p, out, lse, grad_out, None, shift, *grads)
        return [x for x in (d_bias, *grads[: 3 if has_keys else 1]) if x is not None]

    found = {"forward": lambda: fused.forward(*arguments)[:1], "query": query, "key_value": key_value}
    if has_bias or span(problem) <= tuning.SMALL:
        found["bias"] = rest
    return found


BEST = {}  # kernel -> config


def use(kernel: str, config: Config) -> None:
    """Make every launch of `kernel` take `config`, and those of others the best found so far."""
    tuning.config = lambda name, *_: config if name == kernel else BEST.get(name, DEFAULT)
    fused._walk.cache_clear()
    fused._sums.cache_clear()


def compile_one(job) -> str | None:
    """In a worker: compile one candidate into the disk cache. Returns what is wrong with it."""
    problem, has_bias, kernel, config = job
    small = (min(problem[0], 16), *problem[1:])  # the batch is not compiled in
    use(kernel, DEFAULT)
    try:
        call = calls(small, has_bias)[kernel]
        use(kernel, config)
        call()
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory or registers: a candidate that does not exist here
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = Path(tuning.__file__).with_name("tuning.json")
    parser.add_argument("--output", type=Path, default=table)
    parser.add_argument("--problems", type=int, nargs="*", help="only these rows of PROBLEMS")
    args = parser.parse_args()
    problems = PROBLEMS if args.problems is None else [PROBLEMS[i] for i in args.problems]
    start = time.time()
    jobs = [
        (problem, has_bias, kernel, config)
        for problem in problems
        for has_bias in ((False, True) if problem[7] else (False,))
        for kernel in KERNELS
        if kernel == "forward" or (has_bias or kernel != "bias" if span(problem) > tuning.SMALL else kernel == "bias")
        for config in candidates(kernel, problem[4], span(problem))
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        wrong = dict(zip(jobs, pool.map(compile_one, jobs, chunksize=4)))
    print(
        f"{len(jobs)} candidates compiled in {time.time() - start:.0f} s; {sum(map(bool, wrong.values()))} do not fit"
    )

    entries = []
    for (problem, has_bias, kernel), group in itertools.groupby(jobs, key=lambda job: job[:3]):
        use(kernel, DEFAULT)
        call = calls(problem, has_bias)[kernel]
        expected = [x.float().clone() for x in call()]
        default = triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median")
        timed = []
        for job in group:
            if wrong[job]:
                continue
            use(kernel, job[3])
            same = all((x.float() - y).abs().max() <= 0.02 * y.abs().max() for x, y in zip(call(), expected))
            if not same:
                print("WRONG", *job)
                continue
            timed.append((triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median"), job[3]))
        timed.sort()
        best, config = timed[0]
        BEST[kernel] = config
        print(problem, "bias" if has_bias else "no bias", kernel, f"default {default:.3f}", end=" ")
        print(*(f"{t:.3f} {tuple(c)}" for t, c in timed[:4]), sep="; ", flush=True)
        entries.append({"kernel": kernel, "bias": has_bias, "dim": problem[4], "span": span(problem)})
        entries[-1] |= {"config": list(config), "ms": round(best, 4)}

    known = json.loads(table.read_text())
    part = ".".join(map(str, torch.cuda.get_device_capability()))
    measured = {tuple(entry[k] for k in KEYS) for entry in entries}
    known[part] = [e for e in known.get(part, []) if tuple(e[k] for k in KEYS) not in measured] + entries
    lines = (
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(e)}" for e in part) + "\n ]" for name, part in known.items()
    )
    args.output.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written to {args.output} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
