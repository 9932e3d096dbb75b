"""Bi-level routing attention: the meaning, the backends against it, and every refusal."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad, scaled_dot_product_attention

from operators import assert_all_close, assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import routing_attention_2d
from zoo.kernels.routing import reference, tiled

BACKENDS = ["reference", "tiled"]
HEAD_DIMS = [1, 2, 3, 8, 20, 32, 64, 256]


def per_query_loop(query, key, value, region_size, topk, scale, soft):
    """Independent of the package: every region ranks all others, every query goes through the tokens of the best."""
    batch, height, width, heads, dim = query.shape
    area = region_size[0] * region_size[1]
    members = {}
    for y in range(height):
        for x in range(width):
            members.setdefault((y // region_size[0], x // region_size[1]), []).append((y, x))
    numbers = sorted(members)
    out = torch.zeros_like(query)
    for b in range(batch):
        means = {}
        for r in numbers:
            means[r] = [sum(t[b, y, x] for y, x in members[r]) / len(members[r]) for t in (query, key)]
        for r in numbers:
            affinity = [scale * (means[r][0] * means[s][1]).sum() for s in numbers]
            chosen = sorted(range(len(numbers)), key=lambda i: (-affinity[i].item(), i))[:topk]
            weights = torch.stack([affinity[i] for i in chosen]).softmax(0) if soft else torch.ones(topk)
            for y, x in members[r]:
                for h in range(heads):
                    logits, values = [], []
                    for i, weight in zip(chosen, weights, strict=True):
                        for yy, xx in members[numbers[i]]:
                            logits.append(scale * torch.dot(query[b, y, x, h], weight * key[b, yy, xx, h]))
                            values.append(weight * value[b, yy, xx, h])
                        filling = area - len(members[numbers[i]])
                        logits += [query.new_zeros(())] * filling
                        values += [query.new_zeros(dim)] * filling
                    out[b, y, x, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def make(shape, **kwargs):
    """Random query, key and value for a map of `shape` [batch, height, width, heads, head_dim]."""
    return random_inputs(shape, shape, shape, **kwargs)


def routing(*args, **kwargs):
    """The operator as a function of query, key and value alone."""
    return lambda *qkv: routing_attention_2d(*qkv, *args, **kwargs)


# The meaning


LOOP_CASES = [
    # map, region_size, topk
    ((1, 1), (1, 1), 1),
    ((4, 6), (2, 2), 2),
    ((4, 6), (2, 2), 6),
    ((5, 5), (1, 1), 3),
    ((6, 4), (3, 4), 1),
    ((5, 7), (2, 3), 3),
    ((7, 5), (4, 2), 4),
    ((3, 4), (8, 8), 1),
]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("case", LOOP_CASES, ids=str)
def test_matches_per_query_loop(case, soft):
    size, region_size, topk = case
    qkv = make((1, *size, 2, 3))
    expected = outputs_and_grads(lambda *qkv: per_query_loop(*qkv, region_size, topk, 0.7, soft), qkv)
    for backend in BACKENDS:
        call = routing(region_size, topk, soft=soft, scale=0.7, backend=backend)
        assert_all_close(outputs_and_grads(call, qkv), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True])
def test_ties_go_by_number(backend, soft):
    """Without queries all regions are alike: everyone attends to the first ones."""
    _, k, v = make((1, 4, 6, 2, 3), grad=False)
    q = torch.zeros_like(k)
    out = routing_attention_2d(q, k, v, 2, 2, soft=soft, backend=backend)
    expected = v[:, :2, :4].mean((1, 2), keepdim=True) * (0.5 if soft else 1)
    torch.testing.assert_close(out, expected.expand(out.shape), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_filling_is_zero_tokens_that_the_means_leave_out(backend):
    """Unlike on a map that was filled up beforehand, where all regions count their filling."""
    qkv = make((2, 5, 7, 2, 4), grad=False)
    filled = [pad(x, (0, 0, 0, 0, 0, 2, 0, 1)) for x in qkv]
    ragged = routing_attention_2d(*qkv, 3, 6, backend=backend)
    whole = routing_attention_2d(*filled, 3, 6, backend=backend)[:, :5, :7]
    torch.testing.assert_close(ragged, whole, rtol=0, atol=1e-14)  # with all regions chosen, means do not matter
    best = routing_attention_2d(*qkv, 3, 1, backend=backend)
    assert not torch.allclose(best, routing_attention_2d(*filled, 3, 1, backend=backend)[:, :5, :7])


# The backends against the meaning


@st.composite
def calls(draw):
    def axis():
        return draw(st.integers(1, 20)), draw(st.integers(1, 9))

    (height, rows), (width, cols) = axis(), axis()
    regions = -(-height // rows) * -(-width // cols)
    shape = draw(st.integers(0, 2)), height, width, draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_DIMS))
    return shape, (rows, cols), draw(st.integers(1, min(regions, 9))), draw(st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from([2**6, 2**10, 2**20]))
def test_tiled_matches_reference(call, chunk):
    shape, region_size, topk, soft = call
    tiled_call, reference_call = (routing(region_size, topk, soft=soft, backend=backend) for backend in BACKENDS[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CHUNK", chunk)
        assert_matches(tiled_call, reference_call, make(shape), 1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (5, 5)])
def test_gradcheck(size, soft):
    def call(*inputs):
        return torch.ops.zoo.routing_attention_2d(*inputs, (2, 3), 2, 0.6, soft)[0]

    assert torch.autograd.gradcheck(call, make((1, *size, 2, 2)))


@pytest.mark.parametrize("soft", [False, True])
def test_higher_gradients_of_the_reference(soft):
    qkv = make((1, 3, 4, 1, 2))
    assert torch.autograd.gradgradcheck(
        lambda *x: routing_attention_2d(*x, 2, 2, soft=soft, backend="reference"), qkv, atol=1e-6
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, soft):
    """The reference evaluates its second level in the dtype itself."""
    args = (2, 3), 4
    assert_error_at_most_twice(
        routing(*args, soft=soft, backend="tiled"),
        lambda *qkv: reference.routing_attention_2d(*qkv, *args, 32**-0.5, soft, dtype=dtype),
        routing(*args, soft=soft, backend="reference"),
        make((2, 14, 21, 2, 32), dtype=dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_choice(dtype):
    qkv = make((1, 16, 16, 2, 8), dtype=torch.float32)
    expected = outputs_and_grads(routing(4, 2), qkv)
    with torch.autocast("cpu", dtype=dtype):
        actual = outputs_and_grads(routing(4, 2), qkv)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region_size", [4, 5, 8])
def test_any_strides(region_size, backend):
    args = region_size, 1
    q, k, v = make((2, 8, 8, 3, 16), grad=False)
    expected = routing_attention_2d(q, k, v, *args, backend=backend)
    packed = torch.cat([q, k, v], -1)  # slices of one tensor, as of a fused projection
    before = packed.clone()
    q, k, v = packed[..., :16], packed[..., 16:32], packed[..., 32:]
    k = k.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)  # channels first
    v = torch.stack([v, -v], -1)[..., 0]  # a last axis of stride 2
    out = routing_attention_2d(q, k, v, *args, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    assert torch.equal(packed, before)

    one = q[:1, :1, :1].expand(q.shape)
    expected = routing_attention_2d(one.clone(), k, v, *args, backend=backend)
    torch.testing.assert_close(routing_attention_2d(one, k, v, *args, backend=backend), expected)


# Invariances


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region_size", [(1, 1), (5, 2), (5, 6)])
def test_choosing_all_regions_is_dense_attention(region_size, backend):
    q, k, v = make((2, 5, 6, 3, 8), grad=False)
    dense = scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    regions = 30 // math.prod(region_size)
    out = routing_attention_2d(q, k, v, region_size, regions, backend=backend)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_attends_to_the_one_that_it_matches(backend):
    """Regions of their own direction each: every query finds its region, wherever that is."""
    directions = torch.eye(9, dtype=torch.float64).view(3, 3, 9)
    order = torch.tensor([4, 7, 2, 0, 8, 5, 3, 1, 6])
    q, k = (x.repeat_interleave(2, 0).repeat_interleave(4, 1)[None, :, :, None] for x in (directions, directions))
    k = k.view(3, 2, 3, 4, 9).transpose(1, 2).flatten(0, 1)[order].unflatten(0, (3, 3)).transpose(1, 2)
    k = k.reshape(1, 6, 12, 1, 9)
    v = torch.arange(9.0, dtype=torch.float64).view(3, 3).repeat_interleave(2, 0).repeat_interleave(4, 1)
    v = v[None, :, :, None, None].expand(1, 6, 12, 1, 9)
    out = routing_attention_2d(q, k, v, (2, 4), 1, backend=backend)
    found = out[0, ::2, ::4, 0, 0].flatten()
    assert torch.equal(found.round().long(), order.argsort())


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_batch_and_heads(backend):
    qkv = make((4, 9, 10, 3, 4), grad=False)
    out = routing_attention_2d(*qkv, 3, 3, backend=backend)
    batch, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    permuted = routing_attention_2d(*(x[batch][:, :, :, heads] for x in qkv), 3, 3, backend=backend)
    torch.testing.assert_close(permuted, out[batch][:, :, :, heads], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_whole_regions_moves_the_result(backend):
    qkv = make((1, 12, 15, 1, 4), grad=False)
    out = routing_attention_2d(*qkv, (4, 3), 4, backend=backend)
    moved = routing_attention_2d(*(x.roll((4, 6), (1, 2)) for x in qkv), (4, 3), 4, backend=backend)
    torch.testing.assert_close(moved, out.roll((4, 6), (1, 2)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_sum_to_one(backend):
    q, k, v = make((1, 12, 12, 2, 4), grad=False)
    out = routing_attention_2d(30 * q, k, torch.ones_like(v), 4, 3, backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-13)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_through_a_hard_choice(backend, soft):
    """With equal values and equal tokens in a region, only the weights of regions can move the output."""
    q, k, v = (x.repeat_interleave(3, 1).repeat_interleave(3, 2) for x in make((1, 3, 3, 1, 4), grad=False))
    v = torch.ones_like(v)
    _, d_query, _, _ = outputs_and_grads(routing(3, 4, soft=soft, backend=backend), (q, k, v))
    assert (d_query.abs().max() > 1e-3) == soft


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("region_size", [2, 5])
def test_empty_batch(region_size, soft, backend):
    qkv = make((0, 5, 5, 2, 4))
    out, *grads = outputs_and_grads(routing(region_size, 1, soft=soft, backend=backend), qkv)
    assert out.shape == (0, 5, 5, 2, 4)
    assert [g.shape for g in grads] == [x.shape for x in qkv]


# Numbers that are not nice


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_no_region_chose_does_not_leak(backend, bad):
    q, k, v = make((1, 16, 16, 1, 4), dtype=torch.float32, grad=False)
    clean = routing_attention_2d(q, k, v, 4, 3, backend=backend)
    routes = torch.ops.zoo.routing_attention_2d(q, k, v, (4, 4), 3, 0.5)[2]
    v[0, 9, 9] = bad  # in region 10
    out = routing_attention_2d(q, k, v, 4, 3, backend=backend)
    sees = (routes[0] == 10).any(-1).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert 0 < sees.sum() < sees.numel()
    assert torch.equal(out[0, ~sees], clean[0, ~sees])
    assert not out[0, sees].isfinite().all(-1).any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extreme_logits(scale, soft):
    qkv = make((1, 9, 9, 1, 4), dtype=torch.float32)
    for x in outputs_and_grads(routing(3, 4, scale=scale, soft=soft, backend="tiled"), qkv):
        assert x.isfinite().all()
    out = routing_attention_2d(*qkv, 3, 4, scale=scale, soft=soft)
    expected = routing_attention_2d(*(x.double() for x in qkv), 3, 4, scale=scale, soft=soft, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3 if soft else 1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_bitwise_repeatable(soft):
    qkv = make((2, 20, 20, 3, 8), dtype=torch.float32)
    first, second = (outputs_and_grads(routing(3, 5, soft=soft, backend="tiled"), qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("region_size", [2, 48])
def test_no_copy_of_all_gathered_keys(region_size):
    """The largest tensor made for a 96 x 96 map stays near the size of the inputs and the chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    qkv = make((1, 96, 96, 1, 32), dtype=torch.float32, grad=False)
    topk = 32 if region_size == 2 else 4
    routes = torch.ops.zoo.routing_attention_2d(*qkv, (region_size, region_size), topk, 0.5)[2]
    with Watch():
        args = routes, None, (region_size, region_size), 0.5
        out, lse = tiled.forward(*qkv, *args)
        tiled.backward(out, *qkv, *args[:2], out, lse, *args[2:])
    assert qkv[0].numel() <= largest <= tiled.CHUNK < topk * qkv[0].numel()


# torch's own machinery


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_opcheck(size, soft):
    qkv = make((1, *size, 2, 4), dtype=torch.float32)
    options = (2, 2), 3, 0.5, soft
    torch.library.opcheck(torch.ops.zoo.routing_attention_2d.default, (*qkv, *options))
    out, lse, routes = torch.ops.zoo.routing_attention_2d(*qkv, *options)
    tensors = [x.detach() for x in (torch.ones_like(out), *qkv, out, lse)]
    torch.library.opcheck(torch.ops.zoo.routing_attention_2d_backward.default, (*tensors, routes, *options))


@pytest.mark.parametrize("soft", [False, True])
def test_compile_fullgraph(soft):
    torch._dynamo.reset()
    qkv = make((1, 9, 8, 2, 4), dtype=torch.float32)
    compiled = torch.compile(routing_attention_2d, fullgraph=True, backend="aot_eager")
    out, expected = (f(*qkv, 2, 4, soft=soft) for f in (compiled, routing_attention_2d))
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected))
    assert_all_close(*grads, 1e-6)


def test_compile_dynamic_shapes_compiles_twice_at_most():
    """With a region size that follows the map, as of a fixed number of regions."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def call(q, k, v):
        return routing_attention_2d(q, k, v, (q.shape[1] // 3, q.shape[2] // 3), 2)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for size in [(9, 12), (10, 15), (16, 11), (21, 20), (32, 17)]:
        qkv = make((2, *size, 2, 4), dtype=torch.float32, grad=False)
        torch.testing.assert_close(compiled(*qkv), call(*qkv))
    assert counter.frame_count == 2


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return routing_attention_2d(q, k, v, 3, 2)

    qkv = make((2, 8, 9, 2, 4), dtype=torch.float32, grad=False)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Module(), tuple(qkv), dynamic_shapes=[{0: batch}] * 3)
    qkv = make((3, 8, 9, 2, 4), dtype=torch.float32, grad=False)
    torch.testing.assert_close(exported.module()(*qkv), routing_attention_2d(*qkv, 3, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript():
    @torch.jit.script
    def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return torch.ops.zoo.routing_attention_2d(q, k, v, [3, q.size(2) // 3], 2, 0.5)[0]

    qkv = make((1, 9, 9, 2, 4), dtype=torch.float32, grad=False)
    assert torch.equal(scripted(*qkv), routing_attention_2d(*qkv, 3, 2))


def test_meta_device():
    qkv = [torch.empty(2, 9, 9, 2, 4, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    out = routing_attention_2d(*qkv, 2, 3)
    assert (out.shape, out.dtype, out.device.type) == ((2, 9, 9, 2, 4), torch.bfloat16, "meta")


# Bad input


X = torch.zeros(2, 8, 9, 3, 4)
REFUSALS = {
    "query type": (dict(query=[1]), TypeError, "query must be a torch.Tensor, got list"),
    "query rank": (
        dict(query=X[0], key=X[0], value=X[0]),
        ValueError,
        r"query must be \[batch, height.*got shape \(8,",
    ),
    "query dtype": (dict(query=X.int()), TypeError, "query must be of a floating dtype, got torch.int32"),
    "key dtype": (dict(key=X.half()), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
    "value device": (dict(value=X.to("meta")), ValueError, "value must be on the device of query, cpu, got meta"),
    "key shape": (dict(key=X[:, 1:]), ValueError, r"key must have the shape of query, \(2, 8, 9, 3, 4\), got \(2, 7"),
    "value shape": (dict(value=X[..., :2]), ValueError, "value must have the shape of query"),
    "region type": (dict(region_size=3.0), TypeError, r"region_size must be one int or a .* pair of them, got 3.0"),
    "region triple": (dict(region_size=(3, 3, 3)), TypeError, r"region_size must be .*got \(3, 3, 3\)"),
    "region zero": (dict(region_size=(3, 0)), ValueError, r"region_size must be at least 1 on both axes, got \(3, 0\)"),
    "topk type": (dict(topk=2.0), TypeError, r"topk must be an int, got 2\.0"),
    "topk bool": (dict(topk=True), TypeError, "topk must be an int, got True"),
    "topk zero": (dict(topk=0), ValueError, r"topk must be from 1 to the number of regions, 3 \* 3 = 9, got 0"),
    "topk too large": (dict(topk=10), ValueError, r"topk must be from 1 .* 3 \* 3 = 9, got 10"),
    "no regions": (dict(query=X[:, :0], key=X[:, :0], value=X[:, :0]), ValueError, r"0 \* 3 = 0, got 2"),
    "soft type": (dict(soft=1), TypeError, "soft must be a bool, got 1"),
    "triton device": (dict(backend="triton"), ValueError, "backend='triton' needs CUDA tensors, got cpu"),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number or None, got str"),
    "backend": (
        dict(backend="natten"),
        ValueError,
        "backend must be one of auto, reference, tiled, triton, got 'natten'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong, error, message = REFUSALS[name]
    arguments = dict(query=X, key=X, value=X, region_size=3, topk=2) | wrong
    with pytest.raises(error, match=message):
        routing_attention_2d(**arguments)
