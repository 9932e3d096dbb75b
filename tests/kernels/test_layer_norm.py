"""Layer norm's kernels against torch's function: on a GPU, or their mathematics in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.backbones._backbone import LayerNorm, before_product, get_norm_layer
from zoo.kernels.layer_norm import layer_norm, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(shape, dtype=torch.float32, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 3
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return [t.to(DEVICE, d).requires_grad_() for t, d in ((x, dtype), (weight, weight_dtype), (bias, weight_dtype))]


# More tokens than a program holds, one, and widths that are no power of two. Of one or two channels the variance may be
# so small that rounding errors grow a hundredfold, in torch as well.
@pytest.mark.parametrize("shape", [(3, 50, 64), (2, 3, 12), (1, 300), (70, 8)])
def test_matches_torch(shape, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", 2)  # several turns each
    inputs = make(shape)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = triton.LayerNorm.apply(*inputs, 1e-5, torch.float32)
    expected = F.layer_norm(exact[0], shape[-1:], *exact[1:])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = [out, *torch.autograd.grad(out, inputs, grad)]
    for a, b in zip(results, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 3e-6 * max(1.0, b.abs().max()) * shape[-1] ** 0.5


def test_narrow_in_and_wide_out():
    """As autocast has it: the residual of a convolution, float32 weights, a float32 output."""
    x, weight, bias = make((40, 16), torch.bfloat16)
    out = triton.LayerNorm.apply(x, weight, bias, 1e-5, torch.float32)
    d_x, d_weight, d_bias = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert [t.dtype for t in (out, d_x, d_weight, d_bias)] == [torch.float32, torch.bfloat16, *[torch.float32] * 2]
    assert torch.allclose(out, F.layer_norm(x.float(), (16,), weight, bias), atol=1e-5)


def test_autocast():
    """As torch has it: float32, but where only products read it their dtype."""
    x = torch.randn(2, 5, 8, device=DEVICE)
    norm = LayerNorm(8).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        wide, narrow = norm(x), before_product(norm)(x)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert narrow.equal(wide.to(torch.bfloat16))
    assert norm(x).dtype == torch.float32


def test_other_calls_are_torchs():
    x, weight, bias = make((5, 8), torch.float64, torch.float64)
    assert layer_norm(x, weight, bias).equal(F.layer_norm(x, (8,), weight, bias))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    with pytest.raises(RuntimeError):
        layer_norm(x, weight[:4], bias)


def test_module():
    """Norms that models ask of torch or by its class are ours, others what they were."""
    assert get_norm_layer(nn.LayerNorm) is LayerNorm
    norm = get_norm_layer(lambda dim: nn.BatchNorm2d(dim))(3)
    assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(2, 3, 4)
    for norm in (LayerNorm(4, eps=1e-3), LayerNorm(4, elementwise_affine=False), LayerNorm(4, bias=False)):
        expected = F.layer_norm(x, (4,), norm.weight, norm.bias, norm.eps)
        assert norm(x).equal(expected)
        assert torch.jit.script(norm)(x).equal(expected)
