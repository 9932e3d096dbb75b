"""Neighborhood attention: the meaning, the backends against it, the golden cases, and every refusal."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from golden_cases import list_cases, load_case, max_error
from operators import assert_all_close, assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from zoo.kernels.neighborhood import reference, symbolic, tiled

BACKENDS = ["reference", "tiled"]
HEAD_DIMS = [2, 3, 4, 8, 12, 16, 20, 32, 40, 64, 96, 128, 256]


def per_query_loop(query, key, value, kernel_size, dilation, stride, is_causal, bias, extra_key, extra_value, scale):
    """Independent of the package: every query picks its keys one by one, by the definition of the window."""

    def window(i, length, k, d, s, causal):
        members = [j for j in range(length) if j % d == i % d]
        p = members.index(i)
        group = [m for m in range(len(members)) if m // s == p // s]
        # A last group that is cut short takes the leader of a full one where that exists, else its last member.
        if causal:
            leader = min(group[0] + s - 1, len(members) - 1)
            return [(members[m], m - p) for m in range(len(members)) if leader - k < m <= p]
        leader = min(group[0] + s // 2, len(members) - 1)
        best = [m for m in range(len(members)) if leader - k // 2 <= m <= leader - k // 2 + k - 1]
        while len(best) < k:  # shift inwards
            best = [best[0] - 1, *best] if best[0] > 0 else [*best, best[-1] + 1]
        return [(members[m], m - p) for m in best]

    out = torch.zeros_like(query)
    batch, height, width, heads, _ = query.shape
    for b in range(batch):
        for y in range(height):
            rows = window(y, height, kernel_size[0], dilation[0], stride[0], is_causal[0])
            for x in range(width):
                cols = window(x, width, kernel_size[1], dilation[1], stride[1], is_causal[1])
                for h in range(heads):
                    logits, values = [], []
                    for yy, dy in rows:
                        for xx, dx in cols:
                            logit = scale * torch.dot(query[b, y, x, h], key[b, yy, xx, h])
                            if bias is not None:
                                logit = logit + bias[h, dy + kernel_size[0] - 1, dx + kernel_size[1] - 1]
                            logits.append(logit)
                            values.append(value[b, yy, xx, h])
                    for t in range(0 if extra_key is None else extra_key.shape[1]):
                        logits.append(scale * torch.dot(query[b, y, x, h], extra_key[b, t, h]))
                        values.append(extra_value[b, t, h])
                    out[b, y, x, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def make(shape, kernel_size, *, bias=True, extra=0, dtype=torch.float64, grad=True, seed=0):
    """Random query, key, value and keyword arguments for a map of `shape` [batch, height, width, heads, head_dim]."""
    batch, _, _, heads, dim = shape
    shapes = {}
    if bias:
        shapes["rel_pos_bias"] = heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1
    if extra:
        shapes |= dict.fromkeys(("extra_key", "extra_value"), (batch, extra, heads, dim))
    inputs = random_inputs(*[shape] * 3, *shapes.values(), dtype=dtype, grad=grad, seed=seed)
    return inputs[:3], dict(zip(shapes, inputs[3:], strict=True))


def attention(options, *args, backend):
    """The operator as a function of query, key, value and the tensors of `options`."""

    def call(query, key, value, *tensors):
        named = dict(zip(options, tensors, strict=True))
        return neighborhood_attention_2d(query, key, value, *args, **named, backend=backend)

    return call


def run(qkv, options, *args, backend):
    """Output of one call and the gradient of every input for one fixed incoming gradient."""
    return outputs_and_grads(attention(options, *args, backend=backend), [*qkv, *options.values()])


# The meaning


LOOP_CASES = [
    # map, kernel_size, dilation, stride, is_causal, extra tokens
    ((1, 1), (1, 1), (1, 1), (1, 1), (False, False), 0),
    ((5, 6), (3, 3), (1, 1), (1, 1), (False, False), 0),
    ((7, 9), (3, 2), (2, 3), (1, 1), (False, False), 2),
    ((9, 8), (4, 4), (2, 1), (1, 2), (False, False), 0),
    ((8, 7), (5, 4), (1, 1), (3, 4), (False, False), 1),
    ((9, 10), (3, 3), (2, 3), (2, 3), (True, False), 0),
    ((10, 7), (4, 5), (1, 1), (1, 2), (True, True), 3),
    ((6, 6), (6, 6), (1, 1), (1, 1), (False, False), 2),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LOOP_CASES, ids=str)
def test_matches_per_query_loop(case, backend):
    size, kernel_size, dilation, stride, is_causal, extra = case
    qkv, options = make((2, *size, 2, 3), kernel_size, extra=extra, grad=False)
    expected = per_query_loop(
        *qkv,
        kernel_size,
        dilation,
        stride,
        is_causal,
        options["rel_pos_bias"],
        options.get("extra_key"),
        options.get("extra_value"),
        0.7,
    )
    out = neighborhood_attention_2d(
        *qkv, kernel_size, dilation, stride, is_causal, **options, scale=0.7, backend=backend
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list_cases("natten_ops"))
def test_golden(name, backend):
    case = load_case("natten_ops", name)
    call = dict(re.findall(r"(kernel_size|dilation|stride|is_causal)=\((.*?)\)", case.call))
    args = [tuple(eval(v) for v in call[k].split(", ")) for k in ("kernel_size", "dilation", "stride", "is_causal")]
    x = {k: v.double().requires_grad_() for k, v in case.inputs.items()}
    out = neighborhood_attention_2d(x["q"], x["k"], x["v"], *args, rel_pos_bias=x.get("rpb"), backend=backend)
    out.backward(x["do"].detach())
    actual = {"out": out.detach()} | {f"d{k}": x[k].grad for k in ("q", "k", "v", "rpb") if k in x}
    assert actual.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(actual[key], expected.double()) <= 1e-6, key


# The backends against the meaning


@st.composite
def calls(draw):
    def axis():
        kernel_size = draw(st.integers(1, 9))
        dilation = draw(st.integers(1, 4))
        length = draw(st.integers(kernel_size * dilation, max(24, kernel_size * dilation)))
        return length, kernel_size, dilation, draw(st.integers(1, kernel_size)), draw(st.booleans())

    (height, *rows), (width, *cols) = axis(), axis()
    shape = draw(st.integers(0, 2)), height, width, draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_DIMS))
    return shape, tuple(zip(rows, cols, strict=True)), draw(st.booleans()), draw(st.integers(0, 3))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from([2**10, 2**20]))
def test_tiled_matches_reference(call, chunk):
    shape, args, bias, extra = call
    qkv, options = make(shape, args[0], bias=bias, extra=extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CHUNK", chunk)
        call, exact = (attention(options, *args, backend=backend) for backend in ("tiled", "reference"))
        assert_matches(call, exact, [*qkv, *options.values()], 1e-12)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"extra": 2}, {"extra": 1, "bias": False}], ids=str)
@pytest.mark.parametrize("args", [((3, 2), (2, 1), (1, 2), (True, False)), ((4, 3), (1, 2), (1, 1), (False, False))])
def test_gradcheck(args, options):
    qkv, options = make((1, 7, 3, 2, 2) if args[0] == (3, 2) else (1, 5, 6, 1, 2), args[0], **options)

    def call(*inputs):
        named = dict(zip(options, inputs[3:], strict=True))
        return torch.ops.zoo.neighborhood_attention_2d(
            *inputs[:3], *(named.get(k) for k in ("rel_pos_bias", "extra_key", "extra_value")), *args, 0.6
        )

    assert torch.autograd.gradcheck(call, (*qkv, *options.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("args", [(7, 1), (3, 2), (14, 1)])
def test_low_precision(args, dtype):
    """At most twice the error of the reference evaluated in the dtype itself."""
    kernel_size, dilation = args
    qkv, options = make((2, 14, 14, 2, 32), (kernel_size, kernel_size), dtype=dtype)
    geometry = (kernel_size, kernel_size), (dilation, dilation), (1, 1), (False, False), 0

    def plain(query, key, value, bias):
        return reference.neighborhood_attention_2d(
            query, key, value, *geometry, bias, None, None, 32**-0.5, dtype=dtype
        )[0]

    call, exact = (attention(options, *args, backend=backend) for backend in ("tiled", "reference"))
    assert_error_at_most_twice(call, plain, exact, [*qkv, *options.values()])


def test_bias_keeps_its_dtype():
    """Under autocast the bias table stays in float32 while the rest is low precision."""
    qkv, options = make((1, 9, 9, 2, 8), (3, 3))
    qkv = [x.detach().bfloat16().requires_grad_() for x in qkv]
    bias = options["rel_pos_bias"].detach().float().requires_grad_()
    out = neighborhood_attention_2d(*qkv, 3, rel_pos_bias=bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel_size", [3, 8])
def test_any_strides(kernel_size, backend):
    args = (kernel_size, kernel_size), (1, 1), (1, 1), (False, False)
    (q, k, v), options = make((2, 8, 8, 3, 16), args[0], grad=False)
    expected = neighborhood_attention_2d(q, k, v, *args, **options, backend=backend)
    packed = torch.cat([q, k, v], -1)  # slices of one tensor, as of a fused projection
    q, k, v = packed[..., :16], packed[..., 16:32], packed[..., 32:]
    k = k.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    v = torch.stack([v, -v], -1)[..., 0]  # a last axis of stride 2
    out = neighborhood_attention_2d(q, k, v, *args, **options, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)

    one = q[:1, :1, :1].expand(q.shape)
    expected = neighborhood_attention_2d(one.clone(), k, v, *args, **options, backend=backend)
    torch.testing.assert_close(neighborhood_attention_2d(one, k, v, *args, **options, backend=backend), expected)


# Invariances


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_over_the_map_is_dense_attention(backend, stride):
    (q, k, v), _ = make((2, 5, 6, 3, 8), (5, 6), bias=False, grad=False)
    dense = scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    out = neighborhood_attention_2d(q, k, v, (5, 6), stride=stride, backend=backend)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), dense, rtol=0, atol=1e-13)


def test_dense_and_tiled_code_agree():
    """The registered operator itself, which the public function passes over where the window covers the map."""
    for size, args in {(6, 8): ((3, 4), (2, 2)), (5, 7): ((5, 7), (1, 1))}.items():
        qkv, options = make((2, *size, 2, 8), args[0], extra=2)
        dense = neighborhood_attention_2d(*qkv, *args, **options)
        op, _ = torch.ops.zoo.neighborhood_attention_2d(*qkv, *options.values(), *args, (1, 1), (False, False), 8**-0.5)
        inputs = (*qkv, *options.values())
        assert_all_close([op], [dense], 1e-13)
        assert_all_close(
            torch.autograd.grad(op.square().sum(), inputs), torch.autograd.grad(dense.square().sum(), inputs), 1e-12
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_empty_batch(kernel_size, backend):
    qkv, options = make((0, 5, 5, 2, 4), (kernel_size, kernel_size), extra=2)
    out, *grads = run(qkv, options, kernel_size, backend=backend)
    assert out.shape == (0, 5, 5, 2, 4)
    assert [g.shape for g in grads] == [x.shape for x in (*qkv, *options.values())]
    assert not grads[3].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_no_extra_tokens(kernel_size, backend):
    """An empty text is as no text."""
    qkv, options = make((2, 5, 5, 2, 4), (kernel_size, kernel_size))
    empty = torch.zeros(2, 0, 2, 4, dtype=torch.float64)
    expected = run(qkv, options, kernel_size, backend=backend)
    results = run(qkv, options | {"extra_key": empty, "extra_value": empty}, kernel_size, backend=backend)
    assert [x.shape for x in results[5:]] == [empty.shape, empty.shape]
    assert_all_close(results[:5], expected, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(12, 9), (13, 11)])
def test_dilation_is_attention_within_each_residue_class(size, backend):
    (q, k, v), options = make((1, *size, 2, 4), (3, 3), grad=False)
    out = neighborhood_attention_2d(q, k, v, 3, (4, 2), **options, backend=backend)
    for i in range(4):
        for j in range(2):
            part = (x[:, i::4, j::2] for x in (q, k, v))
            expected = neighborhood_attention_2d(*part, 3, **options, backend=backend)
            torch.testing.assert_close(out[:, i::4, j::2], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_batch_and_heads(backend):
    qkv, options = make((4, 9, 10, 3, 4), (3, 3), grad=False)
    out = neighborhood_attention_2d(*qkv, 3, **options, backend=backend)
    batch, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    permuted = neighborhood_attention_2d(
        *(x[batch][:, :, :, heads] for x in qkv), 3, rel_pos_bias=options["rel_pos_bias"][heads], backend=backend
    )
    torch.testing.assert_close(permuted, out[batch][:, :, :, heads], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_translation_in_the_interior(backend):
    qkv, options = make((1, 24, 24, 1, 4), (5, 5), grad=False)
    out = neighborhood_attention_2d(*qkv, 5, **options, backend=backend)
    shifted = neighborhood_attention_2d(*(x.roll((3, 5), (1, 2)) for x in qkv), 5, **options, backend=backend)
    torch.testing.assert_close(shifted[:, 7:-4, 9:-4], out[:, 4:-7, 4:-9], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_sum_to_one(backend):
    (q, k, v), options = make((1, 11, 12, 2, 4), (5, 5), grad=False)
    out = neighborhood_attention_2d(30 * q, k, torch.ones_like(v), 5, 2, **options, backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel_size", [(3, 5), (9, 11)])
def test_log_sum_exp(kernel_size):
    qkv, options = make((2, 9, 11, 2, 8), kernel_size, extra=2)
    inputs = (*qkv, *options.values())
    results = [neighborhood_attention_2d(*qkv, kernel_size, **options, return_lse=True, backend=b)[1] for b in BACKENDS]
    grads = [torch.autograd.grad(lse.square().sum(), inputs, allow_unused=True) for lse in results]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert results[0].shape == (2, 9, 11, 2)
    assert not any(g.any() for g in (grads[1][2], grads[1][5]))  # values do not enter
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(grads[0][i], grads[1][i], rtol=0, atol=1e-10)


def test_merging_by_log_sum_exp():
    """Attention over window and extra tokens, put together from attention over either."""
    (q, k, v), options = make((1, 8, 9, 2, 4), (3, 3), bias=False, extra=5, grad=False)
    whole = neighborhood_attention_2d(q, k, v, 3, **options)
    window, window_lse = neighborhood_attention_2d(q, k, v, 3, return_lse=True)
    logits = torch.einsum("bhwnd,btnd->bhwnt", q, options["extra_key"]) * 4**-0.5
    tokens = torch.einsum("bhwnt,btnd->bhwnd", logits.softmax(-1), options["extra_value"])
    share = (window_lse - logits.logsumexp(-1)).sigmoid().unsqueeze(-1)
    torch.testing.assert_close(share * window + (1 - share) * tokens, whole, rtol=0, atol=1e-13)


# Numbers that are not nice


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_query_does_not_see_does_not_leak(backend, bad, what):
    (q, k, v), _ = make((1, 16, 16, 1, 4), (3, 3), bias=False, dtype=torch.float32, grad=False)
    clean = neighborhood_attention_2d(q, k, v, 3, backend=backend)
    (k if what == "key" else v)[0, 8, 8] = bad
    out = neighborhood_attention_2d(q, k, v, 3, backend=backend)
    sees = torch.zeros(16, 16, dtype=torch.bool)
    sees[7:10, 7:10] = True
    assert torch.equal(out[0, ~sees], clean[0, ~sees])
    if not (what == "key" and math.isinf(bad)):  # an infinite logit of either sign may be a legal mask
        assert not out[0, sees].isfinite().all(-1).any()


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extreme_logits(scale):
    qkv, options = make((1, 9, 9, 1, 4), (5, 5), dtype=torch.float32)
    for x in run(qkv, options, 5, backend="tiled"):
        assert x.isfinite().all()
    out = neighborhood_attention_2d(*qkv, 5, scale=scale)
    expected = neighborhood_attention_2d(*(x.double() for x in qkv), 5, scale=scale, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_bitwise_repeatable():
    qkv, options = make((2, 20, 20, 3, 8), (7, 7), extra=3, dtype=torch.float32)
    first = run(qkv, options, 7, backend="tiled")
    assert all(torch.equal(a, b) for a, b in zip(first, run(qkv, options, 7, backend="tiled"), strict=True))


def test_no_tensor_of_tokens_by_tokens():
    """The largest tensor made on a 96 x 96 map stays near the size of the inputs and the chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    qkv, options = make((1, 96, 96, 1, 4), (7, 7), dtype=torch.float32, grad=False)
    geometry = (7, 7), (1, 1), (1, 1), (False, False), 0
    with Watch():
        p = tiled._Problem(*qkv, options["rel_pos_bias"], None, None, geometry, 0.5)
        tiled.forward(*qkv, options["rel_pos_bias"], None, None, geometry, 0.5)
    assert p.tokens == 96 * 96
    assert p.tokens < largest <= 2 * tiled.CHUNK < p.tokens**2 // 16


# torch's own machinery


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, extra):
    qkv, options = make((1, 6, 7, 2, 4), (3, 3), bias=bias, extra=extra, dtype=torch.float32)
    optional = [options.get(k) for k in ("rel_pos_bias", "extra_key", "extra_value")]
    args = (*qkv, *optional, (3, 3), (1, 2), (1, 1), (False, True), 0.5)
    torch.library.opcheck(torch.ops.zoo.neighborhood_attention_2d.default, args)
    out, lse = torch.ops.zoo.neighborhood_attention_2d(*args)
    inputs = [x if x is None else x.detach() for x in args[:6]]
    torch.library.opcheck(
        torch.ops.zoo.neighborhood_attention_2d_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), *inputs, out.detach(), lse.detach(), *args[6:]),
    )


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 2), ((6, 7), 1)])
def test_packed(kernel_size, dilation, backend):
    qkv, *others = random_inputs((2, 6, 7, 3, 2, 4), (2, 2, 4), (2, 2, 4), grad=False)
    bias = random_inputs((2, *(2 * k - 1 for k in ((3, 3) if kernel_size == 3 else kernel_size))), grad=False)
    extras = [x.unsqueeze(1) for x in others] if kernel_size == 3 else [None, None]
    options = {"scale": 0.3, "return_lse": kernel_size == 3, "backend": backend}

    def packed(qkv, bias, extra_key, extra_value):
        return neighborhood_attention_2d_qkvpacked(
            qkv, kernel_size, dilation, rel_pos_bias=bias, extra_key=extra_key, extra_value=extra_value, **options
        )

    def apart(qkv, bias, extra_key, extra_value):
        return neighborhood_attention_2d(
            *qkv.unbind(3), kernel_size, dilation,
            rel_pos_bias=bias, extra_key=extra_key, extra_value=extra_value, **options,
        )  # fmt: skip

    inputs = [qkv, *bias, *extras]
    for ours, expected in zip(outputs_and_grads(packed, inputs), outputs_and_grads(apart, inputs), strict=True):
        assert torch.equal(ours, expected)


def test_packed_is_one_node():
    qkv, bias = random_inputs((1, 5, 6, 3, 2, 4), (2, 5, 5))
    torch.library.opcheck(
        torch.ops.zoo.neighborhood_attention_2d.default,
        (qkv, None, None, bias, None, None, (3, 3), (1, 1), (1, 1), (False, False), 0.5),
    )
    compiled = torch.compile(neighborhood_attention_2d_qkvpacked, fullgraph=True)
    expected = outputs_and_grads(lambda x, b: neighborhood_attention_2d_qkvpacked(x, 3, rel_pos_bias=b), [qkv, bias])
    assert_all_close(outputs_and_grads(lambda x, b: compiled(x, 3, rel_pos_bias=b), [qkv, bias]), expected, 1e-12)


@pytest.mark.parametrize("shape", [(2, 6, 7, 2, 4), (2, 6, 7, 2, 2, 4)])
def test_packed_refuses_other_shapes(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"qkv must be [batch, height, width, 3, heads, head_dim], got shape {shape}")
    ):
        neighborhood_attention_2d_qkvpacked(torch.zeros(shape), 3)
    with pytest.raises(TypeError, match=r"qkv must be a torch\.Tensor, got str"):
        neighborhood_attention_2d_qkvpacked("qkv", 3)


@pytest.mark.parametrize("kernel_size", [3, 8])
def test_compile_fullgraph(kernel_size):
    torch._dynamo.reset()
    qkv, options = make((1, 8, 8, 2, 4), (kernel_size, kernel_size), dtype=torch.float32)
    compiled = torch.compile(neighborhood_attention_2d, fullgraph=True, backend="aot_eager")
    inputs = (*qkv, *options.values())
    out, expected = (f(*qkv, kernel_size, **options) for f in (compiled, neighborhood_attention_2d))
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    assert_all_close(*grads, 1e-6)


def test_compile_dynamic_shapes_compiles_twice_at_most():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q, k, v: neighborhood_attention_2d(q, k, v, 3, 2), fullgraph=True, backend=counter)
    for size in [(9, 12), (10, 15), (16, 11), (21, 20), (32, 17)]:
        qkv, _ = make((2, *size, 2, 4), (3, 3), bias=False, dtype=torch.float32, grad=False)
        torch.testing.assert_close(compiled(*qkv), neighborhood_attention_2d(*qkv, 3, 2))
    assert counter.frame_count == 2


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return neighborhood_attention_2d(q, k, v, 3)

    qkv, _ = make((1, 9, 9, 2, 4), (3, 3), bias=False, dtype=torch.float32, grad=False)
    exported = torch.export.export(Module(), tuple(qkv))
    torch.testing.assert_close(exported.module()(*qkv), neighborhood_attention_2d(*qkv, 3))


@pytest.mark.parametrize("grad", [False, True])
def test_what_watches_sees_the_operator(grad):
    """Calls go around the dispatcher only where nobody would notice."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    seen, inputs = [], random_inputs((1, 5, 5, 1, 4), (1, 5, 5, 1, 4), (1, 5, 5, 1, 4), grad=grad)
    expected = neighborhood_attention_2d(*inputs, 3)
    with Watch():
        assert neighborhood_attention_2d(*inputs, 3).equal(expected)
    assert "zoo::neighborhood_attention_2d" in seen
    assert neighborhood_attention_2d(*(torch._neg_view(-x) for x in inputs), 3).equal(expected)  # negated when read
    vmapped = torch.func.vmap(lambda *x: neighborhood_attention_2d(*x, 3))(*(x[None] for x in inputs))
    assert vmapped[0].equal(expected)


def test_torchscript():
    @torch.jit.script
    def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return torch.ops.zoo.neighborhood_attention_2d(
            q, k, v, None, None, None, [3, 3], [1, 1], [1, 1], [False, False], 0.5
        )[0]

    qkv, _ = make((1, 9, 9, 2, 4), (3, 3), bias=False, dtype=torch.float32, grad=False)
    assert torch.equal(scripted(*qkv), neighborhood_attention_2d(*qkv, 3, scale=0.5))


def test_meta_device():
    qkv = [torch.empty(2, 9, 9, 2, 4, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    out = neighborhood_attention_2d(*qkv, 3)
    assert (out.shape, out.dtype, out.device.type) == ((2, 9, 9, 2, 4), torch.bfloat16, "meta")


# NATTEN


@pytest.mark.parametrize(
    "args",
    [((5, 5), (1, 1), (1, 1), (False, False)), ((3, 4), (2, 3), (2, 1), (False, True))],
)
def test_natten_agrees(args):
    qkv, _ = make((1, 12, 13, 2, 16), args[0], bias=False, dtype=torch.float32, grad=False)
    ours, natten = (neighborhood_attention_2d(*qkv, *args, backend=b) for b in ("tiled", "natten"))
    torch.testing.assert_close(ours, natten, rtol=0, atol=1e-5)


def test_natten_refusals(monkeypatch):
    qkv, options = make((1, 9, 9, 2, 16), (3, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match="no rel_pos_bias"):
        neighborhood_attention_2d(*qkv, 3, **options, backend="natten")
    with pytest.raises(ValueError, match="no backward pass on the CPU"):
        neighborhood_attention_2d(*qkv, 3, backend="natten")
    monkeypatch.setitem(__import__("sys").modules, "natten.functional", None)
    with pytest.raises(ImportError, match="pip install natten"):
        neighborhood_attention_2d(*qkv, 3, backend="natten")


# Bad input


X = torch.zeros(2, 8, 9, 3, 4)
TOKENS = torch.zeros(2, 5, 3, 4)
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
    "kernel type": (dict(kernel_size=3.0), TypeError, r"kernel_size must be one int or a .* pair of them, got 3.0"),
    "kernel triple": (dict(kernel_size=(3, 3, 3)), TypeError, r"kernel_size must be .*got \(3, 3, 3\)"),
    "kernel bool": (dict(kernel_size=True), TypeError, "kernel_size must be one int"),
    "kernel zero": (dict(kernel_size=(3, 0)), ValueError, r"kernel_size must be at least 1 on both axes, got \(3, 0\)"),
    "kernel too large": (dict(kernel_size=9), ValueError, r"along the height 9 \* 1 = 9 > 8; pad the map or take"),
    "dilation too large": (dict(dilation=(1, 4)), ValueError, r"along the width 3 \* 4 = 12 > 9"),
    "dilation zero": (dict(dilation=0), ValueError, r"dilation must be at least 1 on both axes, got \(0, 0\)"),
    "stride zero": (dict(stride=0), ValueError, "stride must be at least 1"),
    "stride too large": (dict(stride=(1, 4)), ValueError, "stride may not exceed kernel_size: along the width 4 > 3"),
    "causal type": (dict(is_causal=1), TypeError, "is_causal must be one bool or a"),
    "bias type": (dict(rel_pos_bias=1.0), TypeError, "rel_pos_bias must be a torch.Tensor or None, got float"),
    "bias dtype": (
        dict(rel_pos_bias=torch.zeros(3, 5, 5).int()),
        TypeError,
        "rel_pos_bias must be of a floating dtype",
    ),
    "bias device": (dict(rel_pos_bias=torch.zeros(3, 5, 5, device="meta")), ValueError, "rel_pos_bias must be on the"),
    "bias shape": (dict(rel_pos_bias=torch.zeros(3, 3, 3)), ValueError, r"= \(3, 5, 5\), got \(3, 3, 3\)"),
    "extra alone": (dict(extra_key=TOKENS), ValueError, "extra_value go together, but extra_value is None"),
    "extra shape": (
        dict(extra_key=TOKENS[:1], extra_value=TOKENS),
        ValueError,
        r"extra_key must be \[2, tokens, 3, 4\]",
    ),
    "extra lengths": (dict(extra_key=TOKENS, extra_value=TOKENS[:, 1:]), ValueError, "extra_value must have the shape"),
    "extra dtype": (dict(extra_key=TOKENS, extra_value=TOKENS.half()), TypeError, "extra_value must have the dtype"),
    "triton device": (dict(backend="triton"), ValueError, "backend='triton' needs CUDA tensors, got cpu"),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number or None, got str"),
    "backend": (
        dict(backend="cuda"),
        ValueError,
        "backend must be one of auto, reference, tiled, triton, natten, got 'cuda'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong, error, message = REFUSALS[name]
    arguments = dict(query=X, key=X, value=X, kernel_size=3) | wrong
    with pytest.raises(error, match=message):
        neighborhood_attention_2d(**arguments)


@pytest.mark.parametrize(("kernel_size", "dilation"), [((7, 7), (1, 1)), ((3, 4), (2, 1)), ((2, 5), (3, 4))])
@pytest.mark.parametrize("size", [(7, 20), (21, 23)])
def test_symbolic(size, kernel_size, dilation):
    """What exporters write out, on sizes that are numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, *size, 2, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, *(2 * k - 1 for k in kernel_size), generator=generator, dtype=torch.float64)
    actual = symbolic.neighborhood_attention_2d(query, key, value, bias, kernel_size, dilation, 0.3)
    expected = neighborhood_attention_2d(
        query, key, value, kernel_size, dilation, rel_pos_bias=bias, scale=0.3, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(actual, expected)
