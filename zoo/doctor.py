"""What ``zoo doctor`` prints: what is installed, whether the fused kernels run, and which backend calls would use."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import zoo
from zoo.errors import UserError
from zoo.kernels import explain_backend, neighborhood_attention_2d
from zoo.kernels.neighborhood.ops import why_not_triton

PACKAGES = ("torch", "triton", "natten", "timm", "diffusers", "lightning")
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# Calls that are typical of models: shape, kernel size, dilation.
CALLS = (((1, 56, 56, 2, 32), 7, 1), ((1, 7, 7, 16, 32), 7, 1))
PLACES = (("cpu", "float32"), ("cuda", "bfloat16"), ("cuda", "float64"))


def run_doctor(
    shape: list[int] | None = None, kernel_size: int = 7, dilation: int = 1, dtype: str = "float32", device: str = "cpu"
) -> None:
    """Print what is installed, and which backend typical calls would use, or the one call whose ``shape`` is given."""
    calls = CALLS if shape is None else ((tuple(shape), kernel_size, dilation),)
    places = PLACES if shape is None else ((device, dtype),)
    choices = Table("call", "device", "dtype", "backend", "why", title='neighborhood_attention_2d(backend="auto")')
    choices.title_justify = "left"
    for where, kind in places:
        for size, kernel, spread in calls:
            choice = explain(size, kernel, spread, kind, where)
            call = f"{' x '.join(map(str, size))}, kernel {kernel}, dilation {spread}"
            choices.add_row(call, where, kind, choice.backend, escape(choice.reason))

    found = Table.grid(padding=(0, 2))
    for name, text in (*environment(), *devices()):
        found.add_row(name, escape(text))
    console = Console()
    console.print(found)
    console.print()
    console.print(choices)
    if not torch.cuda.is_available() and any(where.startswith("cuda") for where, _ in places):
        console.print("This torch sees no CUDA device: what is said of cuda is what one would do.")


def explain(shape: tuple[int, ...], kernel_size: int, dilation: int, dtype: str, device: str):
    """The choice for one call; what the operator refuses is the user's mistake."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"there is no device {device!r}") from error
    try:
        return explain_backend(shape, kernel_size, dilation, dtype=DTYPES[dtype], device=where)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def environment() -> list[tuple[str, str]]:
    """Versions of what matters."""
    found = [("attn-zoo", zoo.__version__), ("Python", f"{platform.python_version()}, {platform.platform()}")]
    for package in PACKAGES:
        try:
            text = version(package)
        except PackageNotFoundError:
            text = "not installed"
        if package == "torch":
            text += f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ", built without CUDA"
        found.append((package, text))
    return found


def devices() -> list[tuple[str, str]]:
    """Each GPU, and whether the fused kernels run on it."""
    found = []
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append(("TRITON_INTERPRET", "set: Triton's kernels run in its interpreter, slowly"))
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        text = f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        found += [(f"cuda:{number}", text), ("fused kernels", try_fused(f"cuda:{number}"))]
    return found or [("GPU", "none that this torch sees: the fused kernels need one")]


def try_fused(device: str) -> str:
    """Run a small call with the fused kernels, forward and backward, and compare it with float64."""
    query, key, value = torch.randn(3, 1, 5, 6, 1, 16, device=device).unbind(0)
    if (obstacle := why_not_triton(query)) is not None:
        return f"not used: {obstacle}"
    try:
        inputs = [x.requires_grad_() for x in (query, key, value)]
        out = neighborhood_attention_2d(*inputs, 3, backend="triton")
        results = out, *torch.autograd.grad(out.sum(), inputs)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out = neighborhood_attention_2d(*exact, 3, backend="reference")
        expected = out, *torch.autograd.grad(out.sum(), exact)
        error = max((a - b).abs().max().item() for a, b in zip(results, expected))
    except Exception as error:  # a compiler that is missing, a device that is too old: whatever it is, say so
        return f"do not run: {type(error).__name__}: {error}".splitlines()[0]
    return f"run; largest difference from float64 in float32, gradients included: {error:.0e}"
