"""What the tests of every operator do: random inputs, gradients of a call, and comparison with a reference.

Inputs are lists in the order of the operator's arguments, with None for a tensor that is left out.
"""

from functools import partial

import torch
from torch import Tensor

from zoo.kernels import (
    agent_attention,
    circular_attention_2d,
    halo_attention_2d,
    neighborhood_attention_2d,
    routing_attention_2d,
    window_attention_2d,
)

MAP = 1, 4, 6, 2, 4  # a query, key or value that all of the calls below take


def _agents(query, key, value, **options):
    tokens = (x.flatten(1, 2) for x in (query, key, value))
    return agent_attention(*tokens, query[:, 0, :3], **options)


OURS = {  # operators with gradients of their own
    "neighborhood": partial(neighborhood_attention_2d, kernel_size=3),
    "circular": partial(circular_attention_2d, radius=2),
    "halo": partial(halo_attention_2d, block_size=2, halo_size=1),
    "routing": partial(routing_attention_2d, region_size=2, topk=2),
}
ASKED = [*((name, backend) for name in OURS for backend in ("tiled", "triton")), ("agent", "triton")]
CALLS = OURS | {"window": partial(window_attention_2d, window_size=2), "agent": _agents}


def random_inputs(*shapes, dtype=torch.float64, device="cpu", grad=True, seed=0) -> list[Tensor | None]:
    """Standard normal tensors of these shapes, None for None: the same numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return [
        None
        if shape is None
        else torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_(grad)
        for shape in shapes
    ]


def outputs_and_grads(call, inputs, weights=None) -> list[Tensor]:
    """Outputs of `call(*inputs)`, a tensor or several, then the gradient of every input that is not None.

    Args:
        call: Function of the inputs.
        inputs: Tensors or None. They are left alone: their values are copied into leaves.
        weights: Incoming gradient of each output, cast to its dtype; by default fixed numbers between -1 and 1 that are
            exact in every dtype.
    """
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = call(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if weights is None:
        weights = [(torch.arange(y.numel(), device=y.device) % 31 - 15).view(y.shape) / 16 for y in outputs]
    weights = [w.to(y.dtype) for w, y in zip(weights, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, [x for x in inputs if x is not None], weights)
    return [*(y.detach() for y in outputs), *grads]


def assert_all_close(actual, expected, atol):
    """Each within `atol`, or `atol` times the largest expected value where that is above 1, in the actual dtype."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a, e.to(a.dtype), rtol=0, atol=atol * max(1.0, e.abs().max().item() if e.numel() else 0)
        )


def assert_matches(call, reference, inputs, atol, weights=None):
    """Outputs and gradients of `call` are those that `reference`, of the same arguments, has in float64."""
    exact = [None if x is None else x.double() for x in inputs]
    assert_all_close(outputs_and_grads(call, inputs, weights), outputs_and_grads(reference, exact, weights), atol)


def assert_error_at_most_twice(call, plain, reference, inputs, slack=1e-6):
    """FlashAttention's rule for low precision: at most twice the error of plain torch, for outputs and gradients.

    Args:
        call: What is judged.
        plain: The same in plain torch, with all its arithmetic in the dtype of the inputs.
        reference: The same, given the inputs in float64.
        inputs: Tensors of one low-precision dtype, or None.
        slack: Absolute error that is always allowed.
    """
    exact = outputs_and_grads(reference, [None if x is None else x.double() for x in inputs])
    results = zip(outputs_and_grads(call, inputs), outputs_and_grads(plain, inputs), exact, strict=True)
    for i, (a, p, e) in enumerate(results):
        assert a.dtype == p.dtype, i
        assert (a.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + slack, i
