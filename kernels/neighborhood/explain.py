"""Which backend a call would use, and why, without the call."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from zoo.kernels.neighborhood import dense, ops
from zoo.kernels.neighborhood.api import neighborhood_attention_2d


class Choice(NamedTuple):
    """A backend, and why it is taken."""

    backend: str
    reason: str


class _Like(NamedTuple):
    """What the choice depends on of a tensor that does not exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def explain_backend(
    shape: tuple[int, int, int, int, int],
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    return_lse: bool = False,
    backend: str = "auto",
) -> Choice:
    """Which backend `neighborhood_attention_2d` would use for a call, and why.

    Nothing is computed, and the device need not be there: what a GPU would do can be asked anywhere.

    Args:
        shape: Shape of the query, [batch, height, width, heads, head_dim].
        kernel_size: As of the call, and so are `dilation`, `stride`, `is_causal`, `return_lse` and `backend`.
        dtype: Of the query.
        device: Of the query.

    Returns:
        The backend, "triton", "dense", "tiled", "reference" or "natten", and the reason. "dense" is
        `scaled_dot_product_attention`.

    Raises:
        TypeError: As of the call.
        ValueError: As of the call: what cannot be run cannot be explained.
    """
    geometry = kernel_size, dilation, stride, is_causal
    if len(shape) != 5 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape must be [batch, height, width, heads, head_dim], got {shape!r}")
    # The call's own checks, on tensors without data, which any backend but these two takes.
    on_meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
    anywhere = "auto" if backend in ("triton", "natten") else backend
    neighborhood_attention_2d(on_meta, on_meta, on_meta, *geometry, backend=anywhere)
    query = _Like(tuple(shape), dtype, torch.device(device))
    geometry = ((x, x) if isinstance(x, int) else tuple(x) for x in geometry)
    covers_map = dense.covers_map(*query.shape[1:3], *geometry, 0)
    name, reason = ops.choose_backend(query, backend, covers_map, return_lse)
    if name == "natten" and find_spec("natten") is None:
        reason += "; needs the natten package: `pip install natten`"
    if backend == "auto" and name != "triton" and ops.why_not_triton(query) is not None:
        reason += f"; triton {ops.why_not_triton(query)}"
    return Choice(name, reason)
