"""Check local attention inside every supported diffusion model on this GPU, in bfloat16 with the fused kernels.

    python scripts/check_diffusion.py [--kinds flux unet] [--output scripts/results/check_diffusion_<gpu>.txt]
    python scripts/check_diffusion.py --cpu     # the same with the kernels for CPUs

Models are the tiny ones of the tests. FlashAttention's rule: the error of a model's output against float64 is at most
twice that of the same model in bfloat16 with attention in plain torch, or of the model's own attention where a window
covers the map. Besides, detaching restores outputs bit by bit, and threads do not disturb each other. The exit status
is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from measure import NAMES, first_line, flash_rule, gpu_slug, versions
from tiny_models import KINDS, make_call, make_model, run
from zoo import kernels
from zoo.diffusion import ClearAttnProcessor, EntropyScaledAttnProcessor, NeighborhoodAttnProcessor, attach

SIDE = 8  # of the map, in tokens
LAYERS = {"unet": ["down_blocks.0", "up_blocks.1"]}  # those of the UNet that see all of the map; all of other models
COVERING = {"covering neighborhood": NeighborhoodAttnProcessor(SIDE), "covering circle": ClearAttnProcessor(2 * SIDE)}
LOCAL = {
    "neighborhood": NeighborhoodAttnProcessor(3),
    "dilated neighborhood": NeighborhoodAttnProcessor(3, dilation=2),
    "circle": ClearAttnProcessor(3),
    "circle and pooled tokens": ClearAttnProcessor(2, down_factor=2),
    "circle at another size": EntropyScaledAttnProcessor(4, ClearAttnProcessor(3)),
}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Processors compute with this backend and no other."""
    with ExitStack() as stack:
        for module, function in (("clear", "circular_attention_2d"), ("neighborhood", "neighborhood_attention_2d")):
            bound = partial(getattr(kernels, function), backend=name)
            stack.enter_context(mock.patch(f"zoo.diffusion.{module}.{function}", bound))
        yield


def cast(call: dict, device: str, dtype: torch.dtype) -> dict:
    """Arguments on the device, and in `dtype` but for integers."""

    def move(x):
        if isinstance(x, tuple):
            return tuple(map(move, x))
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: move(x) for name, x in call.items()}


def compare(model: nn.Module, call: dict, device: str, fused: str, processor, layers) -> tuple[float, list[str]]:
    """The share of the allowed error that a processor takes, and what is wrong; `fused` is the kernels' backend."""
    low, high = copy.deepcopy(model).to(device, torch.bfloat16), copy.deepcopy(model).to(device, torch.double)
    low_call, high_call = cast(call, device, torch.bfloat16), cast(call, device, torch.double)
    covering = processor in COVERING.values()
    before = run(low, low_call)

    def local(model, call, name):
        with backend(name), attach(model, processor, layers):
            return run(model, call)

    ours = local(low, low_call, "auto" if covering else fused)
    plain = before if covering else local(low, low_call, "reference")
    dense = run(high, high_call)
    exact = dense if covering else local(high, high_call, "reference")
    none = [None] * (1 + len(NAMES))
    shares, wrong = flash_rule([ours, *none], [plain, *none], [exact, *none])
    if not covering and torch.allclose(exact, dense):
        wrong.append("the window makes no difference")
    if not torch.equal(run(low, low_call), before):
        wrong.append("detaching does not restore the model")
    return max(shares.values()), wrong


def disturbed(model: nn.Module, calls: list[dict], fused: str) -> list[str]:
    """Which of several calls gives another result beside the others, each in a thread and on a stream of its own."""
    wrong = []

    def work(i: int, expected: Tensor) -> None:
        stream = torch.cuda.Stream() if expected.is_cuda else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            for _ in range(5):
                if not torch.equal(run(model, calls[i]), expected):
                    wrong.append(f"call {i} is disturbed")

    with backend(fused), attach(model, ClearAttnProcessor(3)):
        expected = [run(model, call) for call in calls]
        if expected[0].is_cuda:
            torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(i, x)) for i, x in enumerate(expected)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return wrong


def check(kind: str, device: str, fused: str) -> Iterator[tuple[str, float, list[str]]]:
    """The name of each check of a kind of model, the share of the allowed error, and what is wrong."""
    model, call = make_model(kind), make_call(kind, SIDE, SIDE)
    for name, processor in {**COVERING, **LOCAL}.items():
        try:
            yield name, *compare(model, call, device, fused, processor, LAYERS.get(kind))
        except Exception as error:  # whatever breaks is a failed check, and the others still run
            yield name, 0.0, [first_line(error)]
    if kind in ("flux", "sd3"):
        calls = [make_call(kind, *size) for size in ((8, 8, 5), (4, 12, 3), (10, 6, 9))]
        calls = [cast(call, device, torch.bfloat16) for call in calls]
        yield "threads", 0.0, disturbed(model.to(device, torch.bfloat16), calls, fused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of models")
    parser.add_argument("--cpu", action="store_true", help="check the CPU's kernels, to try the script")
    parser.add_argument("--output", type=Path, help="the log; scripts/results/check_diffusion_<gpu>.txt by default")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU; --cpu tries the script without one")
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()  # it warns of models that are cast
    device, fused = ("cpu", "tiled") if args.cpu else ("cuda", "triton")
    lines = [f"CPU, torch {torch.__version__}, Python {platform.python_version()}" if args.cpu else versions()]
    failed = 0
    for kind in args.kinds:
        start = time.time()
        for name, share, wrong in check(kind, device, fused):
            failed += bool(wrong)
            found = f"FAIL  {kind}, {name}: {'; '.join(wrong)}" if wrong else f"ok    {kind}, {name}: {share:.2f}"
            lines.append(found)
            print(found, flush=True)
        print(f"{kind} in {time.time() - start:.0f} s", flush=True)
    lines.append(f"{failed} failed; figures are errors / allowed")
    name = "cpu" if args.cpu else gpu_slug()
    output = args.output or Path(__file__).parent / "results" / f"check_diffusion_{name}.txt"
    output.write_text("\n".join(lines) + "\n")
    print(lines[-1])
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
