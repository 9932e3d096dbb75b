"""The fused kernels against the reference in float64: on a GPU, or their mathematics in Triton's interpreter."""

import pytest
import torch

from operators import assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import halo_attention_2d
from zoo.kernels.halo import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# shape, block, halo, stride, v_dim, relative positions
CASES = {
    "one block": ((1, 4, 4, 1, 16), 4, 1, 1, 16, True),
    "no halo": ((1, 4, 8, 1, 16), 4, 0, 1, 16, True),
    "without relative positions": ((1, 8, 4, 1, 16), 4, 1, 1, 16, False),
    "batch, heads and padded dims": ((2, 4, 4, 2, 12), 4, 1, 1, 20, True),
    "odd": ((1, 5, 10, 1, 8), 5, 2, 1, 8, True),
    "stride": ((1, 8, 4, 1, 16), 4, 3, 2, 8, True),
    "one query a block": ((1, 6, 9, 1, 16), 3, 1, 3, 16, True),
    "halo wider than a block": ((1, 4, 6, 1, 8), 2, 3, 1, 8, True),
    "block of several tiles": ((1, 10, 10, 1, 8), 10, 1, 1, 8, True),
}


def make(case, dtype=torch.float32, grad=True):
    """Query to rel_width (None where absent), and the operator as a function of them and a backend."""
    shape, block, halo, stride, v_dim, rel = case
    batch, height, width, heads, dim = shape
    query, value = (batch, height // stride, width // stride, heads, dim), (*shape[:-1], v_dim)
    table = (2 * (block + 2 * halo) - 1, dim) if rel else None

    def attention(backend):
        def call(query, key, value, rel_height, rel_width):
            return halo_attention_2d(
                query, key, value, block, halo,
                rel_height=rel_height, rel_width=rel_width, stride=stride, scale=0.3, backend=backend,
            )  # fmt: skip

        return call

    return random_inputs(query, shape, value, table, table, dtype=dtype, device=DEVICE, grad=grad), attention


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    inputs, attention = make(CASES[name])
    assert_matches(attention("triton"), attention("reference"), inputs, 3e-6)


def test_one_image_at_a_time(monkeypatch):
    monkeypatch.setattr(triton, "SCRATCH_BYTES", 1)
    inputs, attention = make(CASES["batch, heads and padded dims"])
    assert_matches(attention("triton"), attention("reference"), inputs, 3e-6)


def test_any_strides():
    """Inputs as convolutions leave them, and a gradient that is expanded."""
    inputs, attention = make(CASES["stride"], grad=False)
    views = [x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in inputs[:3]]
    views += [x.T.contiguous().T for x in inputs[3:]]

    def call(backend):
        return lambda *inputs: attention(backend)(*inputs).sum()

    assert_matches(call("triton"), call("reference"), views, 3e-6)


# Triton's interpreter takes bfloat16 for integers in products.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_low_precision(dtype):
    # Where speed allows: so many numbers that plain torch is not exact by chance.
    case = ((2, 16, 16, 2, 16), 4, 3, 2, 8, True) if DEVICE == "cuda" else CASES["stride"]
    inputs, attention = make(case, dtype)

    def plain(*inputs):
        return reference.halo_attention_2d(*inputs, *case[1:4], 0.3, dtype=dtype)

    assert_error_at_most_twice(attention("triton"), plain, attention("reference"), inputs, slack=1e-5)


def test_tables_keep_their_dtype():
    """Under autocast the tables stay in float32 while the rest is low precision."""
    inputs, attention = make(CASES["one block"], grad=False)
    inputs[:3] = [x.half() for x in inputs[:3]]
    results = outputs_and_grads(attention("triton"), inputs)
    assert [x.dtype for x in results] == [torch.float16] * 4 + [torch.float32] * 2
    expected = outputs_and_grads(attention("reference"), [x.double() for x in inputs])
    for actual, exact in zip(results, expected, strict=True):
        assert (actual - exact).abs().max() <= 4e-3 * exact.abs().max()


def test_extreme_logits_and_every_element_written(monkeypatch):
    (*inputs, _, _), _ = make(CASES["halo wider than a block"], grad=False)
    tables = random_inputs((15, 8), (15, 8), dtype=torch.float32, device=DEVICE, grad=False)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for scale in (1e4, -1e4):
        options = 2, 3, 1, scale
        out, lse = triton.forward(*inputs, *tables, *options)
        exact = reference.halo_attention_2d(*(x.double() for x in (*inputs, *tables)), *options)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-3)
        grads = triton.backward(torch.ones_like(out), *inputs, *tables, out, lse, *options)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("what", [1, 2], ids=["key", "value"])
def test_what_a_block_does_not_see_does_not_leak(what):
    inputs, attention = make(((1, 12, 4, 1, 16), 4, 1, 1, 16, False), grad=False)
    clean = attention("triton")(*inputs)
    inputs[what][0, 3, 1] = float("nan")  # in the first block, and the halo of the second
    out = attention("triton")(*inputs)
    assert torch.equal(out[0, 8:], clean[0, 8:])
    assert out[0, :8].isnan().any(-1).all()


def test_repeats_bit_by_bit():
    inputs, attention = make(CASES["odd"])
    first, second = (outputs_and_grads(attention("triton"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch():
    inputs, attention = make(((0, 4, 4, 2, 16), 4, 1, 1, 8, True))
    out, *grads = outputs_and_grads(attention("triton"), inputs)
    assert out.shape == (0, 4, 4, 2, 8)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not grads[3].any() and not grads[4].any()


def test_refusals():
    x = torch.zeros(1, 4, 4, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="needs a head_dim of at most 256, got 512"):
        halo_attention_2d(x, x, x.repeat(1, 1, 1, 1, 32), 4, 1, backend="triton")
    x = x.double()
    with pytest.raises(ValueError, match=r"needs float16, bfloat16 or float32, got torch\.float64"):
        halo_attention_2d(x, x, x, 4, 1, backend="triton")
