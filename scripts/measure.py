"""What the GPU scripts share: versions, clocks, tables, and attention in plain torch to compare with."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from zoo import kernels
from zoo.bench import (  # noqa: F401  (some for the scripts alone)
    L2_BYTES,
    NAMES,
    call_ms,
    cuda_events,
    cuda_median,
    first_line,
    flash_rule,
)
from zoo.kernels.neighborhood.window import window_end, window_start

# Attention


class Window(NamedTuple):
    """Which keys a query sees: those of `neighborhood_attention_2d`, or with `radius` of `circular_attention_2d`."""

    kernel_size: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    is_causal: tuple[bool, bool] = (False, False)
    radius: int = 0


def attend(window: Window, inputs: Sequence[Tensor | None], **options):
    """The public function on query, key, value, bias and extra tokens (None where there are none).

    Without key and value, the query holds all three.
    """
    query, key, value, bias, extra_key, extra_value = inputs
    options |= {"extra_key": extra_key, "extra_value": extra_value}
    if window.radius:
        return kernels.circular_attention_2d(query, key, value, window.radius, **options)
    if key is None:
        return kernels.neighborhood_attention_2d_qkvpacked(query, *window[:4], rel_pos_bias=bias, **options)
    return kernels.neighborhood_attention_2d(query, key, value, *window[:4], rel_pos_bias=bias, **options)


def attend_and_differentiate(
    window: Window, inputs, grad_out: Tensor, grad_lse: Tensor | None = None, packed: bool = False, **options
):
    """Output, log-sum-exp (None unless it has a gradient), and the gradient of every input.

    If packed, query, key and value go in as one tensor, and their gradients come out of one.
    """
    if packed:
        inputs = torch.stack(inputs[:3], 3), None, None, *inputs[3:]
        out, lse, d_qkv, _, _, *others = attend_and_differentiate(window, inputs, grad_out, grad_lse, **options)
        return [out, lse, *d_qkv.unbind(3), *others]
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    present = [x for x in leaves if x is not None]
    if grad_lse is None:
        out, lse = attend(window, leaves, **options), None
        grads = iter(torch.autograd.grad(out, present, grad_out))
    else:
        out, lse = attend(window, leaves, return_lse=True, **options)
        grads = iter(torch.autograd.grad((out, lse), present, (grad_out, grad_lse)))
    return [out.detach(), None if lse is None else lse.detach(), *(None if x is None else next(grads) for x in leaves)]


def axis_sees(length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool) -> Tensor:
    """[length, length]: whether a query sees a key, along one axis."""
    sees = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        residue = query % dilation
        of_class = len(range(residue, length, dilation)), kernel_size, stride, is_causal
        first, end = (f(query // dilation, *of_class) for f in (window_start, window_end))
        sees[query, [residue + dilation * member for member in range(first, end)]] = True
    return sees


def plain_attention(
    window: Window,
    inputs: Sequence[Tensor | None],
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    dtype: torch.dtype,
    scale: float | None = None,
    most: int = 2**27,
) -> list[Tensor | None]:
    """The same as `attend_and_differentiate`, written out in plain torch, every step in `dtype`.

    Dense masked attention, a band of rows at a time so that no more than about `most` logits are held. Gradients are
    summed over bands in float32 or better, and then rounded to `dtype`.
    """
    query = inputs[0]
    batch, height, width, heads, dim = query.shape
    device, scale = query.device, dim**-0.5 if scale is None else scale
    inputs = [None if x is None else x.detach().to(dtype) for x in inputs]
    if window.radius:
        offsets = [torch.arange(n, device=device) for n in (height, width)]
        offsets = [(i[None, :] - i[:, None]) for i in offsets]
        rows, cols = (o.abs() < window.radius for o in offsets)
    else:
        axes = zip((height, width), *window[:4])
        rows, cols = (axis_sees(*axis).to(device) for axis in axes)
    if inputs[3] is not None:
        row_bias, col_bias = (
            ((i[None, :] - i[:, None]).div(d, rounding_mode="floor") + k - 1).clamp(0, 2 * k - 2)
            for i, d, k in zip(
                (torch.arange(height, device=device), torch.arange(width, device=device)),
                window.dilation,
                window.kernel_size,
            )
        )

    # A band of n rows meets keys of n + extent rows at most.
    seen = [row.nonzero() for row in rows]
    extent = max(int(s[-1] - s[0]) for s in seen)
    per_pair = max(1, most // (batch * heads * width * width))
    band_rows = max(1, int((math.sqrt(extent**2 + 4 * per_pair) - extent) / 2))
    wide = torch.promote_types(dtype, torch.float32)
    sums = [None if x is None else torch.zeros(x.shape, dtype=wide, device=device) for x in inputs]
    outs, lses = [], []
    for top in range(0, height, band_rows):
        band = slice(top, min(top + band_rows, height))
        reach = rows[band].any(0).nonzero()
        keys = slice(int(reach[0]), int(reach[-1]) + 1)
        places = (slice(None), band), *((slice(None), keys),) * 2, *((...,),) * 3
        leaves = [None if x is None else x[place].detach().requires_grad_() for x, place in zip(inputs, places)]
        q, k, v, bias, extra_key, extra_value = leaves
        visible = rows[band, None, keys, None] & cols[None, :, None, :]
        if window.radius:
            dy, dx = offsets
            visible &= dy[band, None, keys, None] ** 2 + dx[None, :, None, :] ** 2 < window.radius**2
        logits = scale * torch.einsum("byxhd,bYXhd->bhyxYX", q, k)
        if bias is not None:
            logits = logits + bias[:, row_bias[band, None, keys, None], col_bias[None, :, None, :]]
        logits = logits.masked_fill(~visible, float("-inf")).flatten(-2)
        v = v.flatten(1, 2)
        if extra_key is not None:
            logits = torch.cat([logits, scale * torch.einsum("byxhd,bthd->bhyxt", q, extra_key)], -1)
            v = torch.cat([v, extra_value], 1)
        out = torch.einsum("bhyxk,bkhd->byxhd", logits.softmax(-1), v)
        lse = logits.logsumexp(-1).permute(0, 2, 3, 1)
        outs.append(out.detach())
        lses.append(lse.detach())
        results, weights = (out,), (grad_out[:, band].to(dtype),)
        if grad_lse is not None:
            results, weights = (out, lse), (*weights, grad_lse[:, band].to(dtype))
        grads = iter(torch.autograd.grad(results, [x for x in leaves if x is not None], weights))
        for x, total, place in zip(leaves, sums, places):
            if x is not None:
                total[place] += next(grads)
    lse = None if grad_lse is None else torch.cat(lses, 1)
    return [torch.cat(outs, 1), lse, *(None if x is None else x.to(dtype) for x in sums)]


# Floors


def token_bytes(heads: int, dim: int, element: int, backward: bool) -> int:
    """Fewest bytes that move per token: inputs read once, outputs written once, in each pass.

    Forward: query, key, value, output, and the log-sum-exp in float32. Backward: those read, the incoming gradient,
    and three gradients written.
    """
    tensors, scalars = (4 + 8, 2) if backward else (4, 1)
    return heads * (tensors * dim * element + scalars * 4)


def mean_window(window: Window, height: int, width: int) -> float:
    """Keys that a query sees on average, extra tokens aside."""
    if not window.radius:
        return math.prod(window.kernel_size)
    reach = range(1 - window.radius, window.radius)
    pairs = sum(
        max(0, height - abs(dy)) * max(0, width - abs(dx))
        for dy in reach
        for dx in reach
        if dy**2 + dx**2 < window.radius**2
    )
    return pairs / (height * width)


def query_flops(keys: float, dim: int, backward: bool) -> float:
    """Floating-point operations of one query's products with its keys; the backward pass repeats one of them."""
    return 2 * keys * dim * (2 + 5 if backward else 2)


# Clocks


def graph_ms(calls: Sequence[Callable], seconds: float = 0.5) -> float:
    """Median milliseconds of one of `calls` inside a CUDA graph of all of them: the GPU's time, without the host's.

    The calls should work on so many different inputs that the cache keeps none of them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    events = cuda_events(graph.replay, seconds)
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    return cuda_median(events, len(calls))


def copies_for(size: int) -> int:
    """How many inputs of `size` bytes the cache cannot keep until they come round again, 1 to 8."""
    return min(8, max(1, math.ceil(3 * L2_BYTES / size)))


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the GPU, read and written."""
    source = torch.empty(2**32, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (call_ms(lambda: target.copy_(source)) * 1e-3)


def product_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations per second of a large matrix product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    return 2 * 8192**3 / (call_ms(lambda: a @ b) * 1e-3)


# Words


def versions() -> str:
    """The GPU and what drives it, in a line."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}, "
        f"triton {version('triton')}, Python {platform.python_version()}"
    )


def gpu_slug() -> str:
    """The GPU's name as part of a file name: "NVIDIA H200" -> "h200"."""
    return torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "_")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
