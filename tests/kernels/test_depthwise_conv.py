"""Depthwise convolution's kernels against torch's: on a GPU, or their mathematics in Triton's interpreter."""

import pytest
import torch
from torch import nn

from zoo.backbones._backbone import DepthwiseConv
from zoo.kernels.depthwise_conv import add_depthwise_conv, api, ops, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(shape, size, dtype=torch.float32, prefix=0):
    """Base, map, weight and bias; the map is a part of a wider one, as values are of `qkv`."""
    batch, height, width, dim = shape
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, prefix + height * width, dim, generator=generator)
    x = torch.randn(batch, height, width, 3 * dim, generator=generator)[..., dim : 2 * dim]
    weight, bias = torch.randn(dim, 1, size, size, generator=generator), torch.randn(dim, generator=generator)
    return [t.to(DEVICE, dtype).requires_grad_() for t in (base, x, weight, bias)]


def in_float64(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


def ours(base, x, weight, bias):
    return torch.ops.zoo.depthwise_conv_2d(x, weight, bias, base, torch.float32)


def ours_eager(base, x, weight, bias):
    return ops.Convolution.apply(x, weight, bias, base, torch.float32)


# Several images in a tile, tiles within an image, a map smaller than the convolution, widths that are no power of two,
# two blocks of channels; tokens before the map.
@pytest.mark.parametrize(
    ("shape", "size", "prefix"),
    [
        ((3, 5, 7, 8), 3, 0),
        ((2, 9, 30, 12), 5, 0),
        ((1, 2, 1, 64), 7, 2),
        ((2, 3, 4, 40), 3, 1),
        ((1, 6, 5, 128), 1, 1),
    ],
)
@pytest.mark.parametrize("run", [ours, ours_eager])
def test_matches_torch(run, shape, size, prefix, monkeypatch):
    monkeypatch.setattr(triton, "TILE", 512)
    inputs = make(shape, size, prefix=prefix)
    exact = in_float64(inputs)
    out, expected = run(*inputs), api.in_torch(*exact)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = [out, *torch.autograd.grad(out, inputs, grad)]
    for a, b in zip(results, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 3e-6 * max(1.0, b.abs().max())


def test_alone():
    """Without a base and a bias, of a map whose channels are apart."""
    _, x, weight, _ = make((2, 4, 5, 8), 3)
    x = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    out = ours(None, x, weight, None)
    assert torch.allclose(out, api.in_torch(torch.zeros_like(out), x, weight, None), atol=1e-5)


def test_narrow_and_wide():
    """As autocast has it: values in half precision, weights and perhaps a base in float32."""
    base, x, weight, bias = make((2, 4, 5, 8), 3)
    half = x.detach().bfloat16().requires_grad_()
    for run in (ours, ours_eager):
        out = run(base, half, weight, bias)
        grads = torch.autograd.grad(out, (half, weight, bias, base), torch.ones_like(out))
        assert [t.dtype for t in (out, *grads)] == [torch.float32, torch.bfloat16, *[torch.float32] * 3]
        assert torch.allclose(out, api.in_torch(base, half.float(), weight, bias), atol=1e-5)


@pytest.mark.parametrize("run", [ours, ours_eager])
def test_second_order(run):
    """Gradients are made of the same operator, so they have gradients."""
    inputs = make((2, 3, 4, 8), 3, prefix=1)
    exact = in_float64(inputs)

    def penalty(convolve, base, x, weight, bias):
        out = convolve(base, x, weight, bias).sin().sum()
        return sum(g.square().sum() for g in torch.autograd.grad(out, (x, weight), create_graph=True))

    grads, expected = (torch.autograd.grad(penalty(f, *y), y) for f, y in ((run, inputs), (api.in_torch, exact)))
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


def test_registered():
    base, x, weight, bias = make((1, 3, 4, 8), 3, prefix=1)
    torch.library.opcheck(torch.ops.zoo.depthwise_conv_2d, (x, weight, bias, base, torch.float32))
    torch.library.opcheck(torch.ops.zoo.depthwise_conv_2d, (x, weight, None, None, torch.float32))


def test_other_calls_are_torchs():
    inputs = make((1, 3, 4, 8), 3, torch.float64, prefix=1)
    assert add_depthwise_conv(*inputs).equal(api.in_torch(*inputs))
    base, x, weight, bias = inputs
    with pytest.raises(RuntimeError):
        add_depthwise_conv(base, x, weight[:4], bias)


def test_module():
    """Its weights are those of torch's convolution, and so is its result, scripted too."""
    module = DepthwiseConv(8, 5).to(DEVICE)
    plain = nn.Conv2d(8, 8, 5, padding=2, groups=8).to(DEVICE)
    plain.load_state_dict(module.state_dict())
    scripted = torch.jit.script(module)
    base, x, _, _ = make((2, 3, 4, 8), 5, prefix=1)
    local = plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    on_map = base[:, 1:].unflatten(1, (3, 4))
    for run in (module, scripted):
        assert torch.allclose(run(on_map, x), on_map + local, atol=1e-6)
        tokens = run(base, x)
        assert tokens[:, 0].equal(base[:, 0])
        assert torch.allclose(tokens[:, 1:], (on_map + local).flatten(1, 2), atol=1e-6)
