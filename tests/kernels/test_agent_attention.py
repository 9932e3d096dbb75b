"""Agent attention: the meaning, the fused path against it, torch's machinery, and every refusal."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import agent_attention, pool_agents
from zoo.kernels.agent import reference, sdpa

BACKENDS = ["reference", "sdpa"]
NAMES = ("query", "key", "value", "agent", "agent_bias", "query_bias")


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


def make(batch=2, queries=7, keys=7, agents=3, heads=2, dim=4, value_dim=4, *, bias=True, dtype=torch.float64):
    """Random arguments that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (batch, queries, heads, dim),
        "key": (batch, keys, heads, dim),
        "value": (batch, keys, heads, value_dim),
        "agent": (batch, agents, heads, dim),
    }
    if bias:
        shapes |= {"agent_bias": (heads, agents, keys), "query_bias": (heads, queries, agents)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def outputs_and_grads(x, call=agent_attention, **options):
    """Output of one call and the gradient of every input for one fixed incoming gradient."""
    out = call(**x, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(x.values()), weight)]


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
    x = make(**shape, bias=bias)

    def loop(**x):
        return per_query_loop(*(x.get(name) for name in NAMES), 0.7, 1.3)

    actual = outputs_and_grads(x, scale=0.7, query_scale=1.3, backend=backend)
    for a, e in zip(actual, outputs_and_grads(x, loop), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_scales(backend):
    x = make()
    default = agent_attention(**x, backend=backend)
    torch.testing.assert_close(agent_attention(**x, scale=0.5, backend=backend), default)  # 4 ** -0.5
    both = agent_attention(**x, scale=0.3, query_scale=0.3, backend=backend)
    torch.testing.assert_close(agent_attention(**x, scale=0.3, backend=backend), both)
    assert not torch.allclose(agent_attention(**x, query_scale=0.3, backend=backend), default)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agents_that_are_the_keys_of_a_sharp_softmax_give_plain_attention(backend):
    """Orthogonal keys, each its own agent, make the first softmax the identity."""
    x = make(queries=5, keys=4, agents=4, bias=False)
    x["key"] = x["agent"] = torch.eye(4, dtype=torch.float64)[None, :, None].expand(2, 4, 2, 4)
    out = agent_attention(**x, scale=1e4, query_scale=0.8, backend=backend)
    q, k, v = (x[name].transpose(1, 2) for name in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.8).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    x = make(1, 4, 3, 2, 2, 3, 2, bias=bias)

    def call(*inputs):
        return agent_attention(**dict(zip(x, inputs, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.parametrize("shape", [dict(queries=196, keys=196, agents=49), dict(queries=784, keys=784, agents=16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, shape):
    """Against float64: at most twice the error of the reference evaluated in the dtype itself."""
    x = make(**shape, dim=32, value_dim=32, dtype=dtype)
    wide = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    exact = outputs_and_grads(wide, backend="reference")

    def plain(**x):
        return reference.agent_attention(*x.values(), 32**-0.5, 32**-0.5, dtype=dtype)

    for a, p, e in zip(outputs_and_grads(x), outputs_and_grads(x, plain), exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + 1e-6


def test_biases_keep_their_dtype():
    x = make()
    x = {k: v.detach().to(torch.float32 if "bias" in k else torch.bfloat16).requires_grad_() for k, v in x.items()}
    out = agent_attention(**x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x["agent_bias"].grad.dtype == x["query_bias"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    x = make()
    expected = agent_attention(**x, backend=backend)
    strided = {}
    for name, t in x.items():
        t = torch.stack([t, -t], -1)[..., 0]  # a last axis of stride 2
        strided[name] = t.transpose(0, 1).contiguous().transpose(0, 1) if "bias" in name else t
    torch.testing.assert_close(agent_attention(**strided, backend=backend), expected, rtol=0, atol=1e-14)

    one = x["agent"][:1, :1].expand(x["agent"].shape)
    expected = agent_attention(**x | {"agent": one.clone()}, backend=backend)
    torch.testing.assert_close(agent_attention(**x | {"agent": one}, backend=backend), expected)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", [dict(batch=0), dict(queries=0)], ids=str)
def test_empty(shape, backend):
    x = make(**shape)
    out, *grads = outputs_and_grads(x, backend=backend)
    assert out.shape == x["query"].shape
    for grad, t in zip(grads, x.values(), strict=True):
        assert grad.shape == t.shape and not grad.any()


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend, scale):
    # Whole numbers, whose logits are exact: a rounding error times 1e4 would decide between agents.
    x = {name: t.detach().round().requires_grad_() for name, t in make(dtype=torch.float32).items()}
    actual = outputs_and_grads(x, scale=scale, backend=backend)
    assert all(t.isfinite().all() for t in actual)
    wide = {name: t.double() for name, t in x.items()}
    expected = agent_attention(**wide, scale=scale, backend="reference")
    torch.testing.assert_close(actual[0].double(), expected, rtol=0, atol=1e-6)


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

    x = make(1, 2304, 2304, 9, 1, dtype=torch.float32)
    with Watch():
        outputs_and_grads(x)
    assert 2304 * 4 <= largest <= 2304 * 9


# Agents from the queries


@pytest.mark.parametrize(("height", "width", "side"), [(6, 6, 3), (10, 7, 3), (2, 5, 4), (1, 1, 2)])
def test_pooling(height, width, side):
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
        return agent_attention(query, key, value, agent, agent_bias=agent_bias, query_bias=query_bias, query_scale=0.6)


def test_compile_fullgraph():
    torch._dynamo.reset()
    x = make(dtype=torch.float32)
    compiled = torch.compile(agent_attention, fullgraph=True, backend="aot_eager")
    for a, e in zip(outputs_and_grads(x, compiled), outputs_and_grads(x), strict=True):
        torch.testing.assert_close(a, e)


def test_compile_dynamic_shapes_compiles_twice_at_most():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(agent_attention, fullgraph=True, backend=counter)
    for batch, tokens in [(2, 7), (3, 9), (4, 12), (5, 11)]:
        x = make(batch, tokens, tokens, dtype=torch.float32)
        torch.testing.assert_close(compiled(**x), agent_attention(**x))
    assert counter.frame_count == 2


def test_export():
    x = tuple(make(dtype=torch.float32).values())
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = (*({0: batch} for _ in range(4)), None, None)
    program = torch.export.export(Module(), x, dynamic_shapes=dynamic)
    x = tuple(make(batch=5, dtype=torch.float32).values())
    torch.testing.assert_close(program.module()(*x), Module()(*x))


def test_fx_records_one_call():
    traced = torch.fx.symbolic_trace(Module())
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [agent_attention]
    x = tuple(make().values())
    assert torch.equal(traced(*x), Module()(*x))
    traced = torch.fx.symbolic_trace(lambda query: pool_agents(query, 3))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [pool_agents]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript():
    x = tuple(make().values())
    scripted = torch.jit.script(sdpa.agent_attention)
    assert torch.equal(scripted(*x, 0.5, 0.6), Module()(*x))
    assert torch.equal(scripted(*x[:4], None, None, 0.5, 0.6), agent_attention(*x[:4], query_scale=0.6))
    query = torch.randn(2, 6, 5, 3, 4)
    assert torch.equal(torch.jit.script(pool_agents)(query, 3), pool_agents(query, 3))


def test_meta_device():
    x = {name: torch.empty(t.shape, device="meta", dtype=torch.bfloat16) for name, t in make(value_dim=3).items()}
    out = agent_attention(**x)
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
    "backend": (dict(backend="triton"), ValueError, "backend must be one of auto, reference, sdpa, got 'triton'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    wrong, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        agent_attention(**dict(query=X, key=X, value=X, agent=A) | wrong)
