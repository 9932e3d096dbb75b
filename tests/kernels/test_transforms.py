"""Derivatives that are not of first order, or not by backward passes: right, or an error that says what would do."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from operators import ASKED, CALLS, MAP, random_inputs
from zoo.kernels import neighborhood_attention_2d_qkvpacked
from zoo.kernels.layer_norm import triton as layer_norm
from zoo.kernels.neighborhood.dense import dense_bias
from zoo.kernels.window import triton as window_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(query, key, value, **options):
    return neighborhood_attention_2d_qkvpacked(torch.stack((query, key, value), 3), 3, **options)


def loss(call, *inputs):
    return call(*inputs).square().sum()


@pytest.mark.parametrize("name", [*CALLS, "packed"])
def test_transforms_of_functions(name):
    """torch.func and forward mode give what the reference has, where the backend is left to us."""
    call = packed if name == "packed" else CALLS[name]
    reference = partial(call, backend="reference")
    inputs = [x.to(DEVICE) for x in random_inputs(MAP, MAP, MAP, grad=False)]
    tangents = [x.to(DEVICE) for x in random_inputs(MAP, MAP, MAP, grad=False, seed=1)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradient = torch.autograd.grad(loss(reference, *leaves), leaves, create_graph=True)
    product = torch.autograd.grad(gradient, leaves, tangents)
    every = 0, 1, 2

    torch.testing.assert_close(torch.func.grad(partial(loss, call), every)(*inputs), gradient)
    of_one = torch.func.grad(partial(loss, call), every)
    by_sample = torch.func.vmap(of_one)(*(torch.stack((x, 2 * x)) for x in inputs))
    torch.testing.assert_close([x[0] for x in by_sample], list(gradient))
    out, tangent = torch.func.jvp(call, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(out, call(*inputs))
    step = 1e-6
    ahead, behind = (call(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        dual = call(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    torch.testing.assert_close(torch.func.jvp(of_one, tuple(inputs), tuple(tangents))[1], product)


@pytest.mark.parametrize(("name", "backend"), ASKED)
def test_backends_without_transforms(name, backend):
    """A backend that is asked for and cannot be differentiated so says what can."""
    call = partial(CALLS[name], backend=backend)
    inputs = tuple(x.to(DEVICE) for x in random_inputs(MAP, MAP, MAP, dtype=torch.float32, grad=False))
    with pytest.raises(NotImplementedError, match="needs backend='reference'"):
        torch.func.jvp(call, inputs, inputs)
    with pytest.raises(NotImplementedError, match="needs backend='reference'"):
        torch.func.grad(partial(loss, call))(*inputs)
    with pytest.raises(NotImplementedError, match="needs backend='reference'"), forward_ad.dual_level():
        call(*(forward_ad.make_dual(x, x) for x in inputs))


@pytest.mark.parametrize(("name", "backend"), ASKED)
def test_second_order_is_an_error(name, backend):
    """However it is asked for: a part of it may also come from operators around ours, and be wrong without a word."""
    inputs = random_inputs(MAP, MAP, MAP, dtype=torch.float32, device=DEVICE)
    ours = partial(CALLS[name], backend=backend)
    for call in (ours, lambda *x: ours(*x) + x[0].sum().square()):
        (gradient,) = torch.autograd.grad(loss(call, *inputs), inputs[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="first order; backend='reference'"):
            torch.autograd.grad(gradient.square().sum(), inputs[0], retain_graph=True)
        with pytest.raises(NotImplementedError, match="first order; backend='reference'"):
            gradient.square().sum().backward()


def test_second_order_of_small_kernels():
    """Layer norm and a window's bias, whose gradients are torch's where they shall be differentiated."""
    x, weight, bias, table = random_inputs((5, 8), (8,), (8,), (2, 5, 7), dtype=torch.float32, device=DEVICE)
    for ours, torchs, inputs in (
        (lambda *y: layer_norm.LayerNorm.apply(*y, 1e-5, torch.float32), lambda *y: F.layer_norm(y[0], (8,), *y[1:]),
         (x, weight, bias)),
        (lambda y: window_bias.DenseBias.apply(y, 3, 4, torch.float32), lambda y: dense_bias(y, 3, 4, torch.float32),
         (table,)),
    ):  # fmt: skip
        found = []
        for call in (ours, torchs):
            gradient = torch.autograd.grad(call(*inputs).sin().sum(), inputs, create_graph=True)
            found.append([*gradient, *torch.autograd.grad(sum(g.square().sum() for g in gradient), inputs)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
