"""The fused kernels against the reference in float64: on a GPU, or their mathematics in Triton's interpreter."""

import pytest
import torch

from operators import assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import routing_attention_2d
from zoo.kernels.routing import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# shape, region_size, topk
CASES = {
    "one region smaller than a tile": ((2, 3, 3, 1, 16), (3, 3), 1),
    "several regions in a block": ((1, 4, 6, 1, 16), (2, 2), 3),
    "regions of one token": ((1, 3, 4, 1, 8), (1, 1), 5),
    "tiles and blocks beyond 16": ((1, 5, 10, 1, 16), (5, 5), 2),
    "filled up": ((1, 5, 7, 1, 16), (3, 2), 4),
    "heads, batch and padded head_dim": ((2, 4, 4, 2, 12), (2, 2), 2),
    "all regions": ((1, 4, 4, 1, 16), (2, 2), 4),
}


def inputs(case, **kwargs):
    return random_inputs(*[case[0]] * 3, device=DEVICE, **kwargs)


def calls(case, *backends, **kwargs):
    """The operator on each backend, as a function of query, key and value alone."""
    return [
        lambda *qkv, backend=backend: routing_attention_2d(*qkv, *case[1:], **kwargs, backend=backend)
        for backend in backends
    ]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles and blocks that small regions fill, and that the interpreter walks in little time."""
    monkeypatch.setattr(triton, "config", lambda *_: triton.Config(16, 16, 4, 1))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name, soft):
    fused, exact = calls(CASES[name], "triton", "reference", soft=soft, scale=0.3)
    assert_matches(fused, exact, inputs(CASES[name], dtype=torch.float32), 2e-6)


def test_agrees_with_the_tiled_backend_on_the_log_sum_exp():
    case = CASES["filled up"]
    qkv = inputs(case, dtype=torch.float32, grad=False)
    fused, tiled = (torch.ops.zoo.routing_attention_2d(*qkv, *case[1:], 0.3, True, b) for b in ("triton", "tiled"))
    torch.testing.assert_close(fused, tiled, rtol=0, atol=2e-6)


def test_any_strides():
    """In and out of autograd, with a gradient that is expanded."""
    case = CASES["several regions in a block"]
    qkv = [x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in inputs(case, dtype=torch.float32)]
    qkv[1] = torch.stack([qkv[1], -qkv[1]], -1)[..., 0]  # a last axis of stride 2
    fused, exact = calls(case, "triton", "reference")
    assert_matches(fused, exact, qkv, 4e-6, weights=[torch.ones((), device=DEVICE).expand(case[0])])


# Triton's interpreter takes bfloat16 for integers in products.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
@pytest.mark.parametrize("soft", [False, True])
def test_low_precision(dtype, soft):
    case = CASES["tiles and blocks beyond 16"]
    fused, exact = calls(case, "triton", "reference", soft=soft, scale=0.3)
    assert_error_at_most_twice(
        fused,
        lambda *qkv: reference.routing_attention_2d(*qkv, *case[1:], 0.3, soft, dtype=dtype),
        exact,
        inputs(case, dtype=dtype),
        slack=1e-5,
    )


def test_bitwise_repeatable():
    case = CASES["filled up"]
    (fused,) = calls(case, "triton", soft=True)
    qkv = inputs(case, dtype=torch.float32)
    first, second = outputs_and_grads(fused, qkv), outputs_and_grads(fused, qkv)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_region_that_nobody_chose_and_a_value_that_does_not_leak():
    """All queries alike, so all choose alike: the other keys and values have no gradient, and are not read."""
    q, k, v = inputs(((1, 4, 8, 1, 16), (4, 4), 1), dtype=torch.float32, grad=False)
    q[:] = 1
    k[:, :, :4] += 1
    v[:, :, 4:] = float("nan")
    (fused,) = calls((None, (4, 4), 1), "triton")
    out, d_query, d_key, d_value = outputs_and_grads(fused, (q, k, v))
    assert all(x.isfinite().all() for x in (out, d_query, d_key, d_value))
    assert d_value[:, :, :4].any() and not d_value[:, :, 4:].any() and not d_key[:, :, 4:].any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_and_every_element_written(scale, monkeypatch):
    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(empty(*a, **k)))
    case = CASES["filled up"]
    fused, exact = calls(case, "triton", "reference", scale=scale)
    qkv = inputs(case, dtype=torch.float32)
    out, *grads = outputs_and_grads(fused, qkv)
    torch.testing.assert_close(out.double(), exact(*(x.double() for x in qkv)), rtol=0, atol=1e-3)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("soft", [False, True])
def test_empty_batch(soft):
    qkv = inputs(((0, 4, 5, 2, 16),), dtype=torch.float32)
    out, *grads = outputs_and_grads(calls((None, 3, 2), "triton", soft=soft)[0], qkv)
    assert out.shape == (0, 4, 5, 2, 16)
    assert [g.shape for g in grads] == [x.shape for x in qkv]


def test_refusals():
    x = torch.zeros(1, 4, 4, 1, 512, device=DEVICE)
    with pytest.raises(ValueError, match="needs a head_dim of at most 256, got 512"):
        routing_attention_2d(x, x, x, 2, 1, backend="triton")
    x = torch.zeros(1, 4, 4, 1, 16, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs float16, bfloat16 or float32, got torch\.float64"):
        routing_attention_2d(x, x, x, 2, 1, backend="triton")
