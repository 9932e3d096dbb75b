"""Agent attention: the meaning, the fused path against it, torch's machinery, and every refusal."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from operators import assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import agent_attention, pool_agents
from zoo.kernels.agent import reference, sdpa

BACKENDS = ["reference", "sdpa"]


def per_query_loop(query, key, value, agent, agent_bias, query_bias, scale, query_scale):
    """Independent of the package: one logit at a time."""
    batch, queries, heads, _ = query.shape
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            gathered = []
            for a in range(agent.shape[1]):
                logits = [scale * torch.dot(agent[b, a, h], key[b, j, h]) for j in range(key.shape[1])]
                if agent_bias is not None:
                    logits = [logit + agent_bias[h, a, j] for j, logit in enumerate(logits)]
                weights = torch.stack(logits).softmax(0)
                gathered.append(sum(w * value[b, j, h] for j, w in enumerate(weights)))
            for i in range(queries):
                logits = [query_scale * torch.dot(query[b, i, h], agent[b, a, h]) for a in range(agent.shape[1])]
                if query_bias is not None:
                    logits = [logit + query_bias[h, i, a] for a, logit in enumerate(logits)]
                weights = torch.stack(logits).softmax(0)
                out[b, i, h] = sum(w * gathered[a] for a, w in enumerate(weights))
    return out


def make(batch=2, queries=7, keys=7, agents=3, heads=2, dim=4, value_dim=4, *, bias=True, **options):
    """Random inputs of one call, in the order of `attend`."""
    return random_inputs(
        (batch, queries, heads, dim),
        (batch, keys, heads, dim),
        (batch, keys, heads, value_dim),
        (batch, agents, heads, dim),
        (heads, agents, keys) if bias else None,
        (heads, queries, agents) if bias else None,
        **options,
    )


def attend(query, key, value, agent, agent_bias, query_bias, **options):
    return agent_attention(query, key, value, agent, agent_bias=agent_bias, query_bias=query_bias, **options)


# The meaning


SHAPES = [
    dict(),
    dict(queries=5, keys=8),
    dict(queries=1, keys=1, agents=1),
    dict(queries=2, agents=6, heads=1, dim=3, value_dim=5),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_per_query_loop(backend, shape, bias):
    call = partial(attend, scale=0.7, query_scale=1.3, backend=backend)
    loop = partial(per_query_loop, scale=0.7, query_scale=1.3)
    assert_matches(call, loop, make(**shape, bias=bias), 1e-12)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_scales(backend):
    call = partial(attend, *make(), backend=backend)
    torch.testing.assert_close(call(scale=0.5), call())  # 4 ** -0.5
    torch.testing.assert_close(call(scale=0.3), call(scale=0.3, query_scale=0.3))
    assert not torch.allclose(call(query_scale=0.3), call())


@pytest.mark.parametrize("backend", BACKENDS)
def test_agents_that_are_the_keys_of_a_sharp_softmax_give_plain_attention(backend):
    """Orthogonal keys, each its own agent, make the first softmax the identity."""
    query, _, value, *_ = make(queries=5, keys=4)
    key = torch.eye(4, dtype=torch.float64)[None, :, None].expand(2, 4, 2, 4)
    out = agent_attention(query, key, value, key, scale=1e4, query_scale=0.8, backend=backend)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.8).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    assert torch.autograd.gradcheck(attend, make(1, 4, 3, 2, 2, 3, 2, bias=bias))


@pytest.mark.parametrize("shape", [dict(queries=196, keys=196, agents=49), dict(queries=784, keys=784, agents=16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, shape):
    def plain(*inputs):
        return reference.agent_attention(*inputs, 32**-0.5, 32**-0.5, dtype=dtype)

    inputs = make(**shape, dim=32, value_dim=32, dtype=dtype)
    assert_error_at_most_twice(attend, plain, partial(attend, backend="reference"), inputs)


def test_biases_keep_their_dtype():
    *tokens, agent_bias, query_bias = make(dtype=torch.float32)
    out = attend(*(x.bfloat16() for x in tokens), agent_bias, query_bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert agent_bias.grad.dtype == query_bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    inputs = make(grad=False)
    expected = attend(*inputs, backend=backend)
    strided = [torch.stack([x, -x], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    torch.testing.assert_close(attend(*strided, backend=backend), expected, rtol=0, atol=1e-14)
    strided = [torch.stack([x, -x], -1)[..., 0] for x in inputs]  # a last axis of stride 2
    torch.testing.assert_close(attend(*strided, backend=backend), expected, rtol=0, atol=1e-14)

    inputs[3] = inputs[3][:1, :1].expand(inputs[3].shape)
    expected = attend(*(x.clone() for x in inputs), backend=backend)
    torch.testing.assert_close(attend(*inputs, backend=backend), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", [dict(batch=0), dict(queries=0)], ids=str)
def test_empty(shape, backend):
    inputs = make(**shape)
    out, *grads = outputs_and_grads(partial(attend, backend=backend), inputs)
    assert out.shape == inputs[0].shape
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend, scale):
    # Whole numbers, whose logits are exact: a rounding error times 1e4 would decide between agents.
    inputs = [x.detach().round() for x in make(dtype=torch.float32)]
    out, *grads = outputs_and_grads(partial(attend, scale=scale, backend=backend), inputs)
    assert all(x.isfinite().all() for x in (out, *grads))
    expected = attend(*(x.double() for x in inputs), scale=scale, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_many_keys_are_gathered_in_parts(bias):
    """What GPUs do with large maps."""
    _, key, value, agent, agent_bias, _ = make(keys=24, dim=8, bias=bias, dtype=torch.float64, grad=False)
    tensors = [x.transpose(1, 2) for x in (agent, key, value)]
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=agent_bias, scale=0.7)
    assert torch.allclose(torch.jit.script(sdpa.gather_in_parts)(*tensors, agent_bias, 0.7, 8), expected, atol=1e-12)


def test_nothing_of_queries_by_keys():
    """The largest tensor of a forward and backward pass on a 48 x 48 map, with nine agents."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    inputs = make(1, 2304, 2304, 9, 1, dtype=torch.float32)
    with Watch():
        outputs_and_grads(attend, inputs)
    assert 2304 * 4 <= largest <= 2304 * 9


# Agents from the queries


@pytest.fixture
def deterministic(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("deterministic", [False, True], indirect=True)
@pytest.mark.parametrize(("height", "width", "side"), [(6, 6, 3), (10, 7, 3), (2, 5, 4), (1, 1, 2)])
def test_pooling(height, width, side, deterministic):
    query = torch.randn(2, height, width, 3, 4, dtype=torch.float64)
    agents = pool_agents(query, side)
    assert agents.shape == (2, side * side, 3, 4)
    for p in range(side):
        rows = slice(p * height // side, math.ceil((p + 1) * height / side))
        for q in range(side):
            cols = slice(q * width // side, math.ceil((q + 1) * width / side))
            torch.testing.assert_close(agents[:, p * side + q], query[:, rows, cols].mean((1, 2)))


@pytest.mark.parametrize(
    ("query", "side", "error", "message"),
    [
        ([1], 3, TypeError, "query must be a torch.Tensor, got list"),
        (torch.zeros(2, 9, 3, 4), 3, ValueError, r"query must be \[batch, height, .*got shape \(2, 9, 3, 4\)"),
        (torch.zeros(2, 9, 9, 3, 4), 3.0, TypeError, "side must be an int, got 3.0"),
        (torch.zeros(2, 9, 9, 3, 4), 0, ValueError, "side must be at least 1, got 0"),
    ],
)
def test_pooling_refusals(query, side, error, message):
    with pytest.raises(error, match=message):
        pool_agents(query, side)


# torch's own machinery


class Module(torch.nn.Module):
    def forward(self, query, key, value, agent, agent_bias, query_bias):
        return attend(query, key, value, agent, agent_bias, query_bias, query_scale=0.6)


def test_compile_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_matches(compiled, attend, make(dtype=torch.float32), 1e-6)


def test_compile_dynamic_shapes_compiles_twice_at_most():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for batch, tokens in [(2, 7), (3, 9), (4, 12), (5, 11)]:
        inputs = make(batch, tokens, tokens, grad=False)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert counter.frame_count == 2


def test_export():
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = (*({0: batch} for _ in range(4)), None, None)
    program = torch.export.export(Module(), tuple(make(grad=False)), dynamic_shapes=dynamic)
    inputs = make(batch=5, grad=False)
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


def test_fx_records_one_call():
    def calls(traced):
        return [node.target for node in traced.graph.nodes if node.op == "call_function"]

    traced = torch.fx.symbolic_trace(Module())
    assert calls(traced) == [agent_attention]
    assert torch.equal(traced(*make()), Module()(*make()))
    assert calls(torch.fx.symbolic_trace(lambda query: pool_agents(query, 3))) == [pool_agents]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript():
    inputs = make()
    scripted = torch.jit.script(sdpa.agent_attention)
    assert torch.equal(scripted(*inputs, 0.5, 0.6), Module()(*inputs))
    assert torch.equal(scripted(*inputs[:4], None, None, 0.5, 0.6), agent_attention(*inputs[:4], query_scale=0.6))
    query = torch.randn(2, 6, 5, 3, 4)
    assert torch.equal(torch.jit.script(pool_agents)(query, 3), pool_agents(query, 3))


def test_meta_device():
    inputs = [x.to("meta", torch.bfloat16) for x in make(value_dim=3)]
    out = attend(*inputs)
    assert (out.shape, out.dtype, out.device.type) == ((2, 7, 2, 3), torch.bfloat16, "meta")


# Bad input


X = torch.zeros(2, 8, 3, 4)
A = torch.zeros(2, 5, 3, 4)
REFUSALS = {
    "query type": (dict(query=[1]), TypeError, "query must be a torch.Tensor, got list"),
    "query rank": (dict(query=X[0]), ValueError, r"query must be \[batch, queries.*got shape \(8, 3, 4\)"),
    "query dtype": (dict(query=X.int()), TypeError, "query must be of a floating dtype, got torch.int32"),
    "key dtype": (dict(key=X.half()), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
    "agent device": (dict(agent=A.to("meta")), ValueError, "agent must be on the device of query, cpu, got meta"),
    "key shape": (dict(key=X[..., :2]), ValueError, r"key must be \[2, keys, 3, 4\] .*got shape \(2, 8, 3, 2\)"),
    "key rank": (dict(key=X[0]), ValueError, r"key must be \[2, keys, 3, 4\] .*got shape \(8, 3, 4\)"),
    "no keys": (dict(key=X[:, :0], value=X[:, :0]), ValueError, r"key must hold .*one token, got shape \(2, 0, 3, 4\)"),
    "no agents": (dict(agent=A[:, :0]), ValueError, r"agent must hold at least one token, got shape \(2, 0, 3, 4\)"),
    "agent batch": (dict(agent=A[:1]), ValueError, r"agent must be \[2, agents, 3, 4\] .*got shape \(1, 5, 3, 4\)"),
    "value tokens": (dict(value=X[:, 1:]), ValueError, r"value must be \[2, 8, 3, value_dim\] .*got shape \(2, 7, 3"),
    "bias type": (dict(agent_bias=1.0), TypeError, "agent_bias must be a torch.Tensor or None, got float"),
    "bias dtype": (dict(query_bias=torch.zeros(3, 8, 5).int()), TypeError, "query_bias must be of a floating dtype"),
    "bias device": (
        dict(agent_bias=torch.zeros(3, 5, 8, device="meta")),
        ValueError,
        "agent_bias must be on the device of query, cpu, got meta",
    ),
    "agent bias shape": (
        dict(agent_bias=torch.zeros(3, 8, 5)),
        ValueError,
        r"agent_bias must be \[heads, agents, keys\] = \(3, 5, 8\), got \(3, 8, 5\)",
    ),
    "query bias shape": (
        dict(query_bias=torch.zeros(8, 5)),
        ValueError,
        r"query_bias must be \[heads, queries, agents\] = \(3, 8, 5\), got \(8, 5\)",
    ),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number or None, got str"),
    "query scale type": (dict(query_scale=[1]), TypeError, "query_scale must be a number or None, got list"),
    "backend": (dict(backend="fast"), ValueError, "backend must be one of auto, reference, sdpa, triton, got 'fast'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    wrong, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        agent_attention(**dict(query=X, key=X, value=X, agent=A) | wrong)
