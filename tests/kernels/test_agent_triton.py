"""The fused kernels against the reference in float64: on a GPU, or their mathematics in Triton's interpreter."""

from functools import partial

import pytest
import torch

from operators import assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import agent_attention
from zoo.kernels.agent import ops, pool_agents, reference, triton
from zoo.kernels.agent.bias import map_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# batch, queries, keys, agents, heads, dim, value_dim, which biases
CASES = {
    "one of each": (1, 1, 1, 1, 1, 16, 16, "both"),
    "tiles, heads and padded dims": (3, 150, 140, 9, 2, 12, 20, "both"),
    "many agents": (2, 40, 70, 49, 1, 8, 8, "both"),
    "no bias": (2, 20, 37, 4, 2, 16, 16, ""),
    "bias of the agents": (2, 20, 37, 4, 2, 16, 16, "agent"),
    "bias of the queries": (2, 20, 37, 4, 2, 16, 16, "query"),
}


def make(case, dtype=torch.float32, grad=True):
    """Inputs in the order of `attend`."""
    batch, queries, keys, agents, heads, dim, v_dim, biases = case
    return random_inputs(
        (batch, queries, heads, dim),
        (batch, keys, heads, dim),
        (batch, keys, heads, v_dim),
        (batch, agents, heads, dim),
        (heads, agents, keys) if biases in ("both", "agent") else None,
        (heads, queries, agents) if biases in ("both", "query") else None,
        dtype=dtype, device=DEVICE, grad=grad,
    )  # fmt: skip


def attend(query, key, value, agent, agent_bias, query_bias, backend="triton"):
    return agent_attention(
        query, key, value, agent,
        agent_bias=agent_bias, query_bias=query_bias, scale=0.3, query_scale=0.7, backend=backend,
    )  # fmt: skip


expected = partial(attend, backend="reference")


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name, programs, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", programs)  # keys and images in one part, and in as many as can be
    assert_matches(attend, expected, make(CASES[name]), 3e-6)


def test_any_strides():
    """Values as a part of what they share with keys, axes swapped, a bias as it is made, an expanded gradient."""
    query, key, value, agent, agent_bias, query_bias = make(CASES["tiles, heads and padded dims"], grad=False)
    key, value = torch.cat([key, value], 3).split([12, 20], 3)
    query, agent = (x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for x in (query, agent))
    query_bias = query_bias.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [query, key, value, agent, agent_bias, query_bias]
    assert_matches(lambda *x: attend(*x).sum(), lambda *x: expected(*x).sum(), inputs, 3e-6)


# Triton's interpreter takes bfloat16 for integers in products.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_low_precision(dtype):
    def plain(*inputs):
        return reference.agent_attention(*inputs, 0.3, 0.7, dtype=dtype)

    assert_error_at_most_twice(attend, plain, expected, make(CASES["many agents"], dtype), slack=1e-5)


def test_biases_keep_their_dtype():
    *tokens, agent_bias, query_bias = make(CASES["one of each"], grad=False)
    inputs = [x.half() for x in tokens] + [agent_bias.requires_grad_(), query_bias.requires_grad_()]
    out = attend(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs[4:])
    assert [x.dtype for x in (out, *grads)] == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(scale):
    """Whole numbers, whose logits are exact: a rounding error times 1e4 would decide between agents."""
    inputs = [x.detach().round() for x in make(CASES["many agents"])]

    def call(backend):
        return lambda *x: agent_attention(
            *x[:4], agent_bias=x[4], query_bias=x[5], scale=scale, query_scale=scale / 2, backend=backend
        )

    results = outputs_and_grads(call("triton"), inputs)
    exact = outputs_and_grads(call("reference"), [x.double() for x in inputs])
    assert all(x.isfinite().all() for x in results)
    torch.testing.assert_close(results[0].double(), exact[0], rtol=0, atol=1e-6)


def test_repeats():
    inputs = make(CASES["tiles, heads and padded dims"])
    for a, b in zip(outputs_and_grads(attend, inputs), outputs_and_grads(attend, inputs), strict=True):
        assert a.equal(b)


def test_registered():
    inputs = make(CASES["no bias"])
    torch.library.opcheck(torch.ops.zoo.agent_attention, (*inputs, 0.3, 0.7))
    inputs = make(CASES["one of each"])
    torch.library.opcheck(torch.ops.zoo.agent_attention, (*inputs, 0.3, 0.7))


def test_compile():
    inputs = make(CASES["bias of the agents"])
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_matches(compiled, expected, inputs, 3e-6)


def test_empty():
    for case in ((0, 3, 4, 2, 1, 8, 8, "both"), (2, 0, 4, 2, 1, 8, 8, "both")):
        inputs = make(case)
        out, *grads = outputs_and_grads(attend, inputs)
        assert out.shape == inputs[0].shape
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (make((1, 2, 2, 129, 1, 8, 8, "")), "backend='triton' needs at most 128 agents, got 129"),
        (make((1, 2, 2, 2, 1, 136, 8, "")), "backend='triton' needs a head_dim of at most 128, got 136 and 8"),
        (make((1, 2, 2, 2, 1, 8, 8, ""), torch.float64), "backend='triton' needs float16, bfloat16 or float32, got"),
    ],
)
def test_refusals(inputs, message):
    assert ops.why_not_triton(inputs[0], inputs[2], inputs[3]) is not None
    with pytest.raises(ValueError, match=message):
        attend(*inputs)


@pytest.mark.parametrize(("height", "width", "side"), [(6, 6, 3), (10, 7, 3), (2, 5, 4), (1, 1, 2), (3, 70, 2)])
def test_pooling(height, width, side):
    x = torch.randn(2, height, width, 3, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, :, :, 1]

    def torchs(x):
        return pool_agents(x.unsqueeze(3), side).squeeze(2)

    assert_matches(lambda x: torch.ops.zoo.pool_agents(x, side), torchs, [x], 1e-6)
    torch.library.opcheck(torch.ops.zoo.pool_agents, (x.requires_grad_(), side))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("agents_last", [False, True])
@pytest.mark.parametrize(("height", "width"), [(7, 7), (3, 5), (20, 33), (1, 8)])
def test_map_bias(height, width, agents_last, prefix):
    """Tables that are stretched, shrunk and left as they are; without gradients, or on a CPU, torch's operators."""
    table, rows, cols, first = random_inputs(
        (2, 9, 7, 7), (2, 9, 6), (2, 8, 9), (2, 9), dtype=torch.float32, grad=False
    )
    tensors = [x.to(DEVICE) for x in (table, rows, cols.transpose(1, 2), first)]
    if not prefix:
        tensors[3] = None
    bias = triton.map_bias(*tensors, height, width, agents_last)
    expected = map_bias(*(None if x is None else x.double().cpu() for x in tensors), height, width, agents_last)
    assert bias.is_contiguous()
    # A place on an axis of 33 is rounded to 2e-6 of an entry, here as in torch.
    torch.testing.assert_close(bias.double().cpu(), expected, rtol=0, atol=1e-5)
