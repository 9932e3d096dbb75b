"""The fused kernels against the reference in float64: on a GPU, or their mathematics in Triton's interpreter."""

import pytest
import torch

from operators import random_inputs
from zoo.kernels import neighborhood_attention_2d
from zoo.kernels.neighborhood import reference, triton
from zoo.kernels.neighborhood.triton import tuning
from zoo.kernels.neighborhood.triton.tuning import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = "query", "key", "value", "rel_pos_bias", "extra_key", "extra_value"

# shape, kernel_size, dilation, stride, is_causal, bias, extra tokens
# With a bias, the interpreter takes long for kernels that are high: wide ones are folded by fewer programs.
CASES = {
    "smaller than a tile": ((2, 3, 3, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 0),
    "one past a tile": ((1, 5, 3, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 0),
    "several tiles": ((1, 10, 5, 1, 8), (3, 3), (1, 1), (1, 1), (False, False), False, 0),
    "an interior": ((1, 13, 3, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 0),
    "one block, several images": ((5, 3, 3, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 0),
    "heads and padded head_dim": ((1, 3, 5, 2, 12), (2, 3), (1, 1), (1, 1), (False, False), True, 0),
    "window over several blocks": ((1, 9, 6, 1, 16), (7, 5), (1, 1), (1, 1), (False, False), False, 0),
    "even": ((1, 4, 5, 1, 16), (2, 4), (1, 1), (1, 1), (False, False), True, 0),
    "dilated, classes of two lengths": ((1, 5, 7, 1, 16), (2, 3), (2, 2), (1, 1), (False, False), True, 0),
    "strided": ((1, 4, 6, 1, 16), (3, 4), (1, 1), (2, 3), (False, False), True, 0),
    "causal": ((1, 5, 4, 1, 16), (3, 4), (1, 1), (1, 1), (True, False), True, 0),
    "causal and strided": ((1, 7, 4, 1, 16), (3, 4), (1, 1), (2, 1), (False, True), False, 0),
    "extra tokens": ((1, 3, 4, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 3),
    "extra tokens beyond a block": ((1, 3, 3, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), False, 35),
}


def make(case, dtype=torch.float32):
    """Query to extra_value (None where absent), and the geometry."""
    (batch, height, width, heads, dim), kernel_size, dilation, stride, is_causal, bias, extra = case
    shapes = [(batch, height, width, heads, dim)] * 3
    shapes.append((heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1) if bias else None)
    shapes += [(batch, extra, heads, dim) if extra else None] * 2
    inputs = random_inputs(*shapes, dtype=dtype, device=DEVICE, grad=False)
    return inputs, (kernel_size, dilation, stride, is_causal, 0)


def expect(inputs, geometry, grad_out, grad_lse, scale):
    """Output, log-sum-exp and gradients of the reference in float64."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    out, lse = reference.neighborhood_attention_2d(*exact[:3], *geometry, *exact[3:], scale)
    present = [x for x in exact if x is not None]
    grads = torch.autograd.grad((out, lse), present, (grad_out.double(), grad_lse.double()))
    return out, lse, dict(zip([n for n, x in zip(NAMES, inputs) if x is not None], grads))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles and blocks that small maps fill, and that the interpreter walks in little time."""
    triton._walk.cache_clear()
    triton._sums.cache_clear()
    monkeypatch.setattr(tuning, "config", lambda *_: Config(4, 4, 4, 4, 4, 1))
    monkeypatch.setattr(triton, "BIAS_PROGRAMS", 8)


def check(inputs, geometry):
    """Output, log-sum-exp and every gradient against the reference."""
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.randn_like(inputs[0][..., 0])
    out, lse = triton.forward(*inputs, geometry, 0.3)
    grads = triton.backward(grad_out, grad_lse, *inputs, out, lse, geometry, 0.3)
    exact_out, exact_lse, exact_grads = expect(inputs, geometry, grad_out, grad_lse, 0.3)
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=4e-6)
    for name, x, grad in zip(NAMES, inputs, grads):
        assert (grad is None) == (x is None)
        if x is not None:
            exact = exact_grads[name]
            assert (grad - exact).abs().max() <= 2e-6 * max(1, exact.abs().max()), name


@pytest.mark.parametrize(("name", "unroll"), [(name, u) for name in CASES for u in (False, True)[: 1 + CASES[name][5]]])
def test_matches_reference(name, unroll, monkeypatch):
    monkeypatch.setattr(triton, "UNROLL_REUSE", 0 if unroll else 10**9)
    monkeypatch.setattr(triton, "PROGRAMS", 1)
    check(*make(CASES[name]))


@pytest.mark.parametrize(
    ("size", "radius", "extra"), [((3, 3), 2, 0), ((9, 6), 3, 2), ((5, 9), 5, 0), ((4, 5), 9, 0), ((6, 3), 1, 0)]
)
def test_circle(size, radius, extra):
    inputs, _ = make(((1, *size, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), False, extra))
    check(inputs, ((2 * radius - 1, 2 * radius - 1), (1, 1), (1, 1), (False, False), radius))


@pytest.mark.parametrize("name", ["an interior", "one block, several images", "window over several blocks", "even"])
def test_packed_gradients_are_the_same_numbers(name):
    """One tensor of three parts, which each kernel writes with the strides of its part."""
    inputs, geometry = make(CASES[name])
    out, lse = triton.forward(*inputs, geometry, 0.3)
    grads = triton.backward(out, None, *inputs, out, lse, geometry, 0.3)
    packed, *others = triton.backward(out, None, *inputs, out, lse, geometry, 0.3, packed=True)
    assert packed.is_contiguous()
    assert torch.equal(packed, torch.stack(grads[:3], 3))
    assert others[:2] == [None, None]
    assert (others[2] is None and grads[3] is None) or torch.equal(others[2], grads[3])


def test_through_the_public_function():
    """Any strides, in and out of autograd, and a gradient that is expanded."""
    inputs, _ = make(CASES["even"])
    q, k, v = (x.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4).requires_grad_() for x in inputs[:3])
    bias = inputs[3].requires_grad_()

    def call(backend, *inputs):
        out = neighborhood_attention_2d(*inputs[:3], (2, 4), rel_pos_bias=inputs[3], backend=backend)
        return out, *torch.autograd.grad(out.sum(), inputs)

    fused = call("triton", q, k, v, bias)
    exact = call("reference", *(x.detach().double().requires_grad_() for x in (q, k, v, bias)))
    for a, e in zip(fused, exact):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=4e-6)


# Triton's interpreter takes bfloat16 for integers in products.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_low_precision(dtype):
    """FlashAttention's rule: at most twice the error of plain torch in the same dtype, for output and gradients."""
    inputs, geometry = make(CASES["one past a tile"], dtype)
    grad_out, no_grad = torch.randn_like(inputs[0]), torch.zeros_like(inputs[0][..., 0])
    out, lse = triton.forward(*inputs, geometry, 0.3)
    grads = triton.backward(grad_out, None, *inputs, out, lse, geometry, 0.3)
    exact_out, _, exact_grads = expect(inputs, geometry, grad_out, no_grad, 0.3)

    plain = [None if x is None else x.detach().requires_grad_() for x in inputs]
    plain_out, _ = reference.neighborhood_attention_2d(*plain[:3], *geometry, *plain[3:], 0.3, dtype=dtype)
    plain_grads = torch.autograd.grad(plain_out, plain[:4], grad_out)
    pairs = [(out, plain_out, exact_out), *zip(grads, plain_grads, exact_grads.values())]
    for ours, theirs, exact in pairs:
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_that_no_query_sees_does_not_leak(bad):
    inputs, geometry = make(((1, 8, 8, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), False, 0))
    clean, _ = triton.forward(*inputs, geometry, 0.3)
    inputs[1][0, 6, 6] = bad
    out, _ = triton.forward(*inputs, geometry, 0.3)
    sees = torch.zeros(8, 8, dtype=torch.bool, device=DEVICE)
    sees[5:8, 5:8] = True
    assert torch.equal(out[0, ~sees], clean[0, ~sees])
    assert out[0, sees].isnan().any()


def test_extreme_logits_and_every_element_written(monkeypatch):
    inputs, geometry = make(CASES["smaller than a tile"])

    def poisoned(empty):
        def call(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

        return call

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for scale in (1e4, -1e4):
        out, lse = triton.forward(*inputs, geometry, scale)
        exact, _, _ = expect(inputs, geometry, out, lse, scale)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-3)
        grads = triton.backward(torch.ones_like(out), None, *inputs, out, lse, geometry, scale)
        assert all(g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("name", ["smaller than a tile", "one past a tile", "extra tokens"])
def test_weights_of_the_backward_pass_sum_to_one(name):
    """In float32 they do, however large the log-sum-exp that they are made of, and with it its rounding error."""
    inputs, geometry = make(CASES[name])
    inputs[0][..., 0], inputs[1][..., 0] = 1, 700
    if inputs[4] is not None:
        inputs[4][..., 0] = 700
    out, lse = triton.forward(*inputs, geometry, 0.3)
    assert lse.min() > 200
    height, width, dim = out.shape[1], out.shape[2], out.shape[-1]
    grad_out = torch.eye(dim, device=DEVICE)[torch.arange(height * width, device=DEVICE) % dim]
    grad_out = grad_out.view(1, height, width, 1, dim).expand(out.shape).contiguous()
    _, _, d_value, _, _, d_extra_value = triton.backward(grad_out, None, *inputs, out, lse, geometry, 0.3)
    weights = d_value.double().sum((1, 2)) + (0 if d_extra_value is None else d_extra_value.double().sum(1))
    queries = grad_out.double().sum((1, 2))
    assert (weights - queries).abs().max() <= 1e-6 * queries.max()


def test_empty_batch():
    inputs, geometry = make(((0, 5, 5, 2, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 2))
    out, lse = triton.forward(*inputs, geometry, 0.3)
    grads = triton.backward(out, None, *inputs, out, lse, geometry, 0.3)
    assert out.shape == (0, 5, 5, 2, 16)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not grads[3].any()


def test_refusals():
    x = torch.zeros(1, 4, 4, 1, 512, device=DEVICE)
    with pytest.raises(ValueError, match="needs a head_dim of at most 256, got 512"):
        neighborhood_attention_2d(x, x, x, 3, backend="triton")
    x = torch.zeros(1, 4, 4, 1, 16, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs float16, bfloat16 or float32, got torch\.float64"):
        neighborhood_attention_2d(x, x, x, 3, backend="triton")


def test_gradients_of_bias_and_queries_together(monkeypatch):
    """In half precision one program goes through all blocks of a tile's keys, here two of them."""
    monkeypatch.setattr(triton, "UNROLL_REUSE", 0)
    monkeypatch.setattr(triton, "_query_gradient", None)  # not called
    inputs, geometry = make(((1, 4, 5, 1, 16), (3, 3), (1, 1), (1, 1), (False, False), True, 0), torch.float16)
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.randn_like(inputs[0][..., 0]).float()
    out, lse = triton.forward(*inputs, geometry, 0.3)
    grads = triton.backward(grad_out, grad_lse, *inputs, out, lse, geometry, 0.3)
    _, _, exact = expect(inputs, geometry, grad_out, grad_lse, 0.3)
    for ours, expected in zip(grads, exact.values()):
        assert (ours - expected).abs().max() <= 2e-3 * expected.abs().max()
