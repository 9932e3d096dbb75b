"""Inputs that are unusual, for all operators: right, or an error that says what is wrong."""

from functools import partial

import pytest
import torch

from operators import ASKED, CALLS, MAP, OURS, random_inputs
from zoo.kernels import explain_backend, halo_attention_2d, neighborhood_attention_2d, pool_agents
from zoo.kernels.depthwise_conv import ops as depthwise_conv
from zoo.kernels.layer_norm import triton as layer_norm
from zoo.kernels.window import triton as window_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("name", "backend"), ASKED)
def test_negative_views(name, backend):
    """The sign of an imaginary part of a conjugate is a bit beside the numbers, which kernels do not read."""
    inputs = [x.to(DEVICE, torch.float32) for x in random_inputs(MAP, MAP, MAP, grad=False)]
    call = partial(CALLS[name], backend=backend)

    def results(inputs, weights):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weights)]

    weights = torch.ones_like(call(*inputs))
    expected = results(inputs, weights)
    for which in range(3):
        views = [torch.complex(x, -x).conj().imag if i == which else x for i, x in enumerate(inputs)]
        assert views[which].is_neg()
        for a, b in zip(results(views, torch._neg_view(-weights)), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_negative_gradient_of_the_log_sum_exp():
    query, key, value = (x.to(DEVICE, torch.float32) for x in random_inputs(MAP, MAP, MAP))
    outputs = neighborhood_attention_2d(query, key, value, 3, return_lse=True, backend="triton")
    weights = [torch.randn_like(x) for x in outputs]
    for negated in (0, 1):
        views = [torch._neg_view(-w) if i == negated else w for i, w in enumerate(weights)]
        grads = [torch.autograd.grad(outputs, query, w, retain_graph=True) for w in (views, weights)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", OURS)
def test_several_gradients_at_once(name):
    query, key, value = (x.to(DEVICE) for x in random_inputs(MAP, MAP, MAP))
    out = OURS[name](query, key, value)
    weights = torch.randn(2, *out.shape, dtype=out.dtype, device=DEVICE)
    both = torch.autograd.grad(out, (query, key, value), weights, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        one = torch.autograd.grad(out, (query, key, value), weights[i], retain_graph=True)
        torch.testing.assert_close([x[i] for x in both], list(one))


SMALL = {  # kernels beside the operators, with the shapes of their inputs
    "convolution": (
        lambda x, *others: depthwise_conv.Convolution.apply(x, *others, torch.float32),
        [(2, 3, 4, 8), (8, 1, 3, 3), (8,), (2, 13, 8)],
    ),
    "registered convolution": (
        lambda x, *others: torch.ops.zoo.depthwise_conv_2d(x, *others, torch.float32),
        [(2, 3, 4, 8), (8, 1, 3, 3), (8,), (2, 12, 8)],
    ),
    "pooling": (lambda x: torch.ops.zoo.pool_agents(x, 2), [(2, 3, 4, 8)]),
    "layer norm": (lambda *inputs: layer_norm.LayerNorm.apply(*inputs, 1e-5, torch.float32), [(5, 8), (8,), (8,)]),
    "bias of windows": (lambda table: window_bias.DenseBias.apply(table, 3, 4, torch.float32), [(2, 5, 7)]),
}


@pytest.mark.parametrize("name", SMALL)
def test_several_gradients_of_small_kernels(name):
    call, shapes = SMALL[name]
    inputs = random_inputs(*shapes, dtype=torch.float32, device=DEVICE)
    out = call(*inputs)
    weights = torch.randn(2, *out.shape, device=DEVICE)
    both = torch.autograd.grad(out, inputs, weights, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        one = torch.autograd.grad(out, inputs, weights[i], retain_graph=True)
        torch.testing.assert_close([x[i] for x in both], list(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_keeps_the_dtype(name):
    """Also where torch's attention runs, which autocast would turn to half precision."""
    inputs = [x.to(DEVICE, torch.float32) for x in random_inputs(MAP, MAP, MAP)]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert CALLS[name](*inputs).dtype == torch.float32
        assert neighborhood_attention_2d(*(x[:, :, :4] for x in inputs), 4).dtype == torch.float32  # covers the map


@pytest.mark.parametrize("name", CALLS)
def test_default_device(name):
    """Tables of our own are not where a caller lets tensors begin."""
    inputs = [x.to(DEVICE) for x in random_inputs(MAP, MAP, MAP)]
    with torch.device("meta"):
        out = CALLS[name](*inputs)
    assert out.equal(CALLS[name](*inputs))


@pytest.mark.parametrize("axis", [3, 4])
@pytest.mark.parametrize("name", [*OURS, "window"])
def test_no_heads(name, axis):
    inputs = [torch.zeros([0 if i == axis else n for i, n in enumerate(MAP)]) for _ in range(3)]
    with pytest.raises(ValueError, match=r"(query|key) must have heads, and a head_dim of at least 1, got shape"):
        CALLS[name](*inputs)
    with pytest.raises(ValueError, match="query must have heads"):
        pool_agents(inputs[0], 2)


def test_maps_without_tokens():
    inputs = [torch.zeros(1, 0, 6, 2, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="the map must be a multiple of block_size=2 on both axes, got 0 x 6"):
        halo_attention_2d(*inputs, 2, 1)
    with pytest.raises(ValueError, match="query must be a map of at least 1 x 1"):
        pool_agents(inputs[0], 2)


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_without_arithmetic(name):
    inputs = [torch.zeros(MAP).to(torch.float8_e4m3fn) for _ in range(3)]
    with pytest.raises(TypeError, match=r"floating dtype, got torch\.float8_e4m3fn; cast it to float16"):
        CALLS[name](*inputs)


def test_a_backend_that_is_asked_for_runs():
    """Not torch's attention, which is taken where a window covers the map and the choice is left to us."""
    assert explain_backend(MAP, (4, 6), backend="tiled").backend == "tiled"
    assert explain_backend(MAP, (4, 6)).backend == "dense"
