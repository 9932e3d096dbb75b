"""Circular attention: the meaning, the backends against it, the authors' golden cases, and every refusal."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from golden_cases import list_cases, load_case, max_error
from zoo.kernels import circular_attention_2d
from zoo.kernels.neighborhood import tiled

BACKENDS = ["reference", "tiled"]


def per_query_loop(query, key, value, radius, extra_key, extra_value, scale):
    """Independent of the package: every query looks at every token of the map, and takes those near enough."""
    batch, height, width, heads, _ = query.shape
    tokens = [(y, x) for y in range(height) for x in range(width)]
    out, lse = torch.zeros_like(query), torch.zeros_like(query[..., 0])
    for b in range(batch):
        for h in range(heads):
            for y, x in tokens:
                near = [(yy, xx) for yy, xx in tokens if math.dist((y, x), (yy, xx)) < radius - 1e-9]
                keys = [key[b, yy, xx, h] for yy, xx in near]
                values = [value[b, yy, xx, h] for yy, xx in near]
                if extra_key is not None:
                    keys += extra_key[b, :, h].unbind()
                    values += extra_value[b, :, h].unbind()
                logits = scale * torch.stack(keys) @ query[b, y, x, h]
                out[b, y, x, h] = logits.softmax(0) @ torch.stack(values)
                lse[b, y, x, h] = logits.logsumexp(0)
    return out, lse


def make(shape, *, extra=0, dtype=torch.float64, grad=True):
    """Random query, key, value, and extra tokens by name, for a map of `shape` [batch, height, width, heads, dim]."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    qkv = [randn(*shape) for _ in range(3)]
    names = ("extra_key", "extra_value") if extra else ()
    return qkv, {name: randn(shape[0], extra, *shape[3:]) for name in names}


def everything(qkv, tokens, radius, backend):
    """Output, log-sum-exp, and the gradient of every input, for fixed incoming gradients of both."""
    inputs = (*qkv, *tokens.values())
    results = circular_attention_2d(*qkv, radius, **tokens, return_lse=True, backend=backend)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in results]
    return *results, *torch.autograd.grad(results, inputs, weights)


def assert_all_close(actual, expected, atol):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=atol * max(1.0, e.abs().max().item() if e.numel() else 0))


# The meaning


LOOP_CASES = [
    # map, radius, extra tokens
    ((1, 1), 1, 0),
    ((1, 1), 7, 2),
    ((4, 5), 1, 0),
    ((5, 7), 2, 0),
    ((9, 8), 5, 1),  # 3 * 3 + 4 * 4 is not less than 5 * 5
    ((1, 13), 4, 0),
    ((12, 2), 6, 3),
    ((7, 7), 8, 0),  # all but the far corners
    ((6, 5), 40, 2),
]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("case", LOOP_CASES, ids=str)
def test_matches_per_query_loop(case, backend):
    size, radius, extra = case
    qkv, tokens = make((2, *size, 2, 3), extra=extra, grad=False)
    expected = per_query_loop(*qkv, radius, tokens.get("extra_key"), tokens.get("extra_value"), 0.7)
    out = circular_attention_2d(*qkv, radius, **tokens, scale=0.7, backend=backend)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
    both = circular_attention_2d(*qkv, radius, **tokens, scale=0.7, return_lse=True, backend=backend)
    assert_all_close(both, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [8, 16])
def test_tokens_in_the_circle(radius, backend):
    """A query far from the borders sees as many tokens as the authors' mask shows: equal weights tell their number."""
    size = 2 * radius + 3
    zeros = torch.zeros(1, size, size, 1, 1)
    values = torch.zeros_like(zeros)
    values[0, radius + 1, radius + 1] = 1
    out = circular_attention_2d(zeros, zeros, values, radius, backend=backend)
    assert round(1 / out[0, radius + 1, radius + 1].item()) == {8: 193, 16: 793}[radius]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in list_cases("clear") if name.startswith("op_")])
def test_golden(name, backend):
    """Text sees text and image; the image sees text, its circle, and pooled tokens where there are any."""
    case = load_case("clear", name)
    height, width, text, radius, *factor = map(int, re.findall(r"\d+", case.call.partition(";")[0].split("(")[1]))
    q, k, v = (x.double() for x in case.inputs.values())
    tokens = text + height * width
    scales = {"out": q.shape[-1] ** -0.5}
    scales["out_proportional"] = (math.log((10 if factor else 1) * tokens, 4608) / q.shape[-1]) ** 0.5
    if factor:
        scales["out_mean"] = scales["out"]

    def maps(x):
        return x[:, :, text:].transpose(1, 2).unflatten(1, (height, width))

    def pooled(x, weight):
        f = weight.shape[3]
        blocks = maps(x).unflatten(2, (-1, f)).unflatten(1, (-1, f))  # [batch, rows, f, columns, f, heads, dim]
        return torch.einsum("byixjhd,ij->byxhd", blocks, weight.view(f, f)).flatten(1, 2)

    for output, scale in scales.items():
        extra = [x[:, :, :text].transpose(1, 2) for x in (k, v)]
        if factor:
            weight = case.state_dict["spatial_weight"].double()
            if output == "out_mean":
                weight = torch.full_like(weight, factor[0] ** -2)
            few = [pooled(x, weight) for x in (k, v)]
            if output == "out":
                assert max_error(few[0].transpose(1, 2), case.outputs["k_down"].double()) <= 1e-6
            extra = [torch.cat(pair, dim=1) for pair in zip(extra, few)]
        image = circular_attention_2d(
            *map(maps, (q, k, v)), radius, extra_key=extra[0], extra_value=extra[1], scale=scale, backend=backend
        )
        words = scaled_dot_product_attention(q[:, :, :text], k, v, scale=scale)
        actual = torch.cat([words, image.flatten(1, 2).transpose(1, 2)], dim=2)
        assert max_error(actual, case.outputs[output].double()) <= 1e-6, output


# The backends against the meaning


@st.composite
def calls(draw):
    height, width = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 20, 64]))
    shape = draw(st.integers(0, 2)), height, width, heads, dim
    return shape, draw(st.integers(1, height + width + 3)), draw(st.integers(0, 3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from([2**4, 2**10, 2**20]))
def test_tiled_matches_reference(call, chunk):
    shape, radius, extra = call
    qkv, tokens = make(shape, extra=extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CHUNK", chunk)
        actual = everything(qkv, tokens, radius, "tiled")
    assert_all_close(actual, everything(qkv, tokens, radius, "reference"), 1e-12)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("radius", [1, 3, 20])
def test_gradcheck(radius, extra):
    qkv, tokens = make((1, 4, 5, 1, 2), extra=extra)

    def call(*inputs):
        named = dict(zip(tokens, inputs[3:], strict=True))
        return circular_attention_2d(*inputs[:3], radius, **named, return_lse=True)

    assert torch.autograd.gradcheck(call, (*qkv, *tokens.values()))


@pytest.mark.parametrize("radius", [3, 50])
def test_low_precision(radius):
    """Against float64 on the same numbers: at most the rounding of the result, as sums are in float32."""
    qkv, tokens = make((1, 12, 13, 2, 32), extra=3, dtype=torch.bfloat16, grad=False)
    out = circular_attention_2d(*qkv, radius, **tokens)
    exact = circular_attention_2d(
        *(x.double() for x in qkv), radius, **{k: x.double() for k, x in tokens.items()}, backend="reference"
    )
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


# Invariances


def test_a_radius_over_the_map_is_dense_attention():
    """The public function passes over the operator there; the operator agrees."""
    qkv, tokens = make((2, 6, 5, 2, 8), extra=3)
    inputs = (*qkv, *tokens.values())
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in qkv)
    k, v = (torch.cat([x, y.transpose(1, 2)], dim=2) for x, y in zip((k, v), tokens.values()))
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (6, 5))
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    for radius in (7, 10**30):  # 5 * 5 + 4 * 4 < 7 * 7
        for return_lse in (False, True):
            out = circular_attention_2d(*qkv, radius, **tokens, return_lse=return_lse)
            out = out[0] if return_lse else out
            assert_all_close([out], [expected], 1e-13)
            assert_all_close(torch.autograd.grad(out.square().sum(), inputs), expected_grads, 1e-12)
    assert (circular_attention_2d(*qkv, 6, **tokens) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_radius_of_one_is_the_token_itself(backend):
    (q, k, v), _ = make((2, 5, 6, 2, 4), grad=False)
    torch.testing.assert_close(circular_attention_2d(q, k, v, 1, backend=backend), v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_and_mirroring_the_map(backend):
    qkv, tokens = make((1, 9, 11, 2, 4), extra=1, grad=False)
    out = circular_attention_2d(*qkv, 4, **tokens, backend=backend)
    for turn in (lambda x: x.flip(1), lambda x: x.flip(2), lambda x: x.transpose(1, 2)):
        turned = circular_attention_2d(*map(turn, qkv), 4, **tokens, backend=backend)
        torch.testing.assert_close(turned, turn(out), rtol=0, atol=1e-13)


def test_merging_by_log_sum_exp():
    """Attention over circle and extra tokens, put together from attention over either."""
    (q, k, v), tokens = make((1, 8, 9, 2, 4), extra=5, grad=False)
    whole = circular_attention_2d(q, k, v, 3, **tokens)
    circle, circle_lse = circular_attention_2d(q, k, v, 3, return_lse=True)
    logits = torch.einsum("bhwnd,btnd->bhwnt", q, tokens["extra_key"]) * 4**-0.5
    others = torch.einsum("bhwnt,btnd->bhwnd", logits.softmax(-1), tokens["extra_value"])
    share = (circle_lse - logits.logsumexp(-1)).sigmoid().unsqueeze(-1)
    torch.testing.assert_close(share * circle + (1 - share) * others, whole, rtol=0, atol=1e-13)


# Numbers that are not nice, and much memory


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_query_does_not_see_does_not_leak(backend, bad, what):
    (q, k, v), _ = make((1, 16, 16, 1, 4), dtype=torch.float32, grad=False)
    clean = circular_attention_2d(q, k, v, 4, backend=backend)
    (k if what == "key" else v)[0, 8, 8] = bad
    out = circular_attention_2d(q, k, v, 4, backend=backend)
    y, x = torch.meshgrid(torch.arange(16) - 8, torch.arange(16) - 8, indexing="ij")
    sees = y**2 + x**2 < 16
    assert torch.equal(out[0, ~sees], clean[0, ~sees])
    if not (what == "key" and math.isinf(bad)):  # an infinite logit of either sign may be a legal mask
        assert not out[0, sees].isfinite().all(-1).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [2, 30])
def test_empty_batch(radius, backend):
    qkv, tokens = make((0, 5, 6, 2, 4), extra=2)
    out, lse, *grads = everything(qkv, tokens, radius, backend)
    assert (out.shape, lse.shape) == ((0, 5, 6, 2, 4), (0, 5, 6, 2))
    assert [g.shape for g in grads] == [x.shape for x in (*qkv, *tokens.values())]


def test_memory_stays_bounded():
    """Neither a large map nor a wide circle makes a tensor far above the inputs or one tile's logits; nor many."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [
                x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)
            ]
            self.largest = max(self.largest, *sizes, 0)
            return out

    radius, tokens = 24, 96 * 96
    qkv, _ = make((1, 96, 96, 1, 4), dtype=torch.float32, grad=False)
    geometry = (2 * radius - 1,) * 2, (1, 1), (1, 1), (False, False), radius
    kept = tiled._kept_map_tiles.cache_info().currsize
    with Watch() as watch:
        tiled.forward(*qkv, None, None, None, geometry, 0.5)
    assert tokens < watch.largest <= tiled.CHUNK < tokens**2 // 100
    assert tiled._kept_map_tiles.cache_info().currsize == kept
    for group in tiled.map_tiles(96, 96, *geometry, torch.device("cpu")):
        assert max(x.numel() for x in group if x is not None) <= tiled.TILE**2 * (2 * radius + tiled.TILE - 2) ** 2


# torch's own machinery


@pytest.mark.parametrize("extra", [0, 2])
def test_opcheck(extra):
    qkv, tokens = make((1, 6, 7, 2, 4), extra=extra, dtype=torch.float32)
    optional = [None, tokens.get("extra_key"), tokens.get("extra_value")]
    args = (*qkv, *optional, (5, 5), (1, 1), (1, 1), (False, False), 0.5, 3)
    torch.library.opcheck(torch.ops.zoo.neighborhood_attention_2d.default, args)
    out, lse = torch.ops.zoo.neighborhood_attention_2d(*args)
    inputs = [x if x is None else x.detach() for x in args[:6]]
    torch.library.opcheck(
        torch.ops.zoo.neighborhood_attention_2d_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), *inputs, out.detach(), lse.detach(), *args[6:]),
    )


@pytest.mark.parametrize("radius", [3, 40])
def test_compile_fullgraph(radius):
    torch._dynamo.reset()
    qkv, tokens = make((1, 8, 9, 2, 4), extra=2, dtype=torch.float32)
    compiled = torch.compile(circular_attention_2d, fullgraph=True, backend="aot_eager")
    inputs = (*qkv, *tokens.values())
    out, expected = (f(*qkv, radius, **tokens) for f in (compiled, circular_attention_2d))
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    assert_all_close(*grads, 1e-6)


def test_compile_dynamic_shapes_compiles_twice_at_most():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q, k, v: circular_attention_2d(q, k, v, 4), fullgraph=True, backend=counter)
    for size in [(9, 12), (10, 15), (16, 11), (21, 20), (32, 17)]:
        qkv, _ = make((2, *size, 2, 4), dtype=torch.float32, grad=False)
        torch.testing.assert_close(compiled(*qkv), circular_attention_2d(*qkv, 4))
    assert counter.frame_count == 2


def test_meta_device():
    qkv = [torch.empty(2, 9, 9, 2, 4, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    out, lse = circular_attention_2d(*qkv, 3, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 9, 9, 2, 4), torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 9, 9, 2), torch.float32)


# Bad input


X = torch.zeros(2, 8, 9, 3, 4)
TOKENS = torch.zeros(2, 5, 3, 4)
REFUSALS = {
    "query type": (dict(query=[1]), TypeError, "query must be a torch.Tensor, got list"),
    "query size": (
        dict(query=X[:, :0], key=X[:, :0], value=X[:, :0]),
        ValueError,
        "query must be a map .*got height 0",
    ),
    "key shape": (dict(key=X[:, 1:]), ValueError, r"key must have the shape of query, \(2, 8, 9, 3, 4\), got \(2, 7"),
    "value dtype": (dict(value=X.half()), TypeError, "value must have the dtype of query, torch.float32, got"),
    "radius type": (dict(radius=3.0), TypeError, "radius must be an int, got 3.0"),
    "radius bool": (dict(radius=True), TypeError, "radius must be an int, got True"),
    "radius pair": (dict(radius=(3, 3)), TypeError, r"radius must be an int, got \(3, 3\)"),
    "radius zero": (dict(radius=0), ValueError, "radius must be at least 1, got 0"),
    "extra alone": (dict(extra_value=TOKENS), ValueError, "extra_value go together, but extra_key is None"),
    "extra shape": (dict(extra_key=TOKENS[:1], extra_value=TOKENS), ValueError, r"extra_key must be \[2, tokens, 3, 4"),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number or None, got str"),
    "triton device": (dict(backend="triton"), ValueError, "backend='triton' needs CUDA tensors, got cpu"),
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
    arguments = dict(query=X, key=X, value=X, radius=3) | wrong
    with pytest.raises(error, match=message):
        circular_attention_2d(**arguments)
