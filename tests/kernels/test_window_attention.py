"""Window attention: the meaning, the backends against it, Swin's form of the shift, and every refusal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from operators import (
    assert_all_close,
    assert_error_at_most_twice,
    assert_matches,
    outputs_and_grads,
    random_inputs,
)
from zoo.kernels import _sdpa, neighborhood_attention_2d, window_attention_2d
from zoo.kernels.neighborhood.dense import dense_bias
from zoo.kernels.window import api, fused, tiled, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "tiled"]


def per_query_loop(query, key, value, window_size, shift, bias, scale):
    """Independent of the package: every query picks the tokens between the lines of the grid around it."""

    def window(i, length, size, first):
        lines = sorted({0, length, *range(first, length, size)})
        start = max(line for line in lines if line <= i)
        return range(start, min(line for line in lines if line > i))

    batch, height, width, heads, _ = key.shape
    out = torch.zeros_like(value)
    for b, y, x, h in itertools.product(range(batch), range(height), range(width), range(heads)):
        q = query[b, y % query.shape[1], x % query.shape[2], h]
        logits, values = [], []
        for yy in window(y, height, window_size[0], shift[0]):
            for xx in window(x, width, window_size[1], shift[1]):
                logit = scale * torch.dot(q, key[b, yy, xx, h])
                if bias is not None:
                    logit = logit + bias[h, yy - y + window_size[0] - 1, xx - x + window_size[1] - 1]
                logits.append(logit)
                values.append(value[b, yy, xx, h])
        out[b, y, x, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def make(shape, window_size, *, shared=False, bias=True, value_dim=None, **options):
    """Random query, key, value and bias for a map of `shape` [batch, height, width, heads, head_dim]."""
    batch, _, _, heads, dim = shape
    query = (batch, *window_size, heads, dim) if shared else shape
    table = (heads, 2 * window_size[0] - 1, 2 * window_size[1] - 1)
    return random_inputs(query, shape, (*shape[:-1], value_dim or dim), table if bias else None, **options)


def attend(window_size, shift=0, function=window_attention_2d, **options):
    """The call as a function of query, key, value and bias."""
    return lambda q, k, v, bias: function(q, k, v, window_size, shift, rel_pos_bias=bias, **options)


class Like:
    """What the choice of a backend asks of a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.element_size = shape, dtype, lambda: dtype.itemsize


# The meaning


CASES = [
    # map, window_size, shift, shared query
    ((1, 1), (1, 1), (0, 0), False),
    ((6, 8), (3, 4), (0, 0), False),
    ((6, 4), (2, 4), (1, 0), False),
    ((6, 8), (3, 4), (2, 1), False),
    ((4, 3), (4, 3), (3, 1), False),
    ((4, 3), (4, 3), (0, 0), True),
    ((6, 8), (3, 4), (0, 0), True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_per_query_loop(case, bias, backend):
    size, window_size, shift, shared = case
    *qkv, bias = make((2, *size, 2, 3), window_size, shared=shared, bias=bias, value_dim=4, grad=False)
    expected = per_query_loop(*qkv, window_size, shift, bias, 0.7)
    out = window_attention_2d(*qkv, window_size, shift, rel_pos_bias=bias, scale=0.7, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def swin(query, key, value, window_size, shift, rel_pos_bias):
    """Swin's own form: a rolled map, cut into windows, and a mask from the regions that a roll brings together."""
    height, width = key.shape[1:3]

    def regions(length, size, by):
        region = torch.zeros(length)
        region[-size:] = 1
        region[length - by :] = 2
        return region

    region = 3 * regions(height, window_size[0], shift[0])[:, None] + regions(width, window_size[1], shift[1])
    rolled = [x.roll((-shift[0], -shift[1]), (1, 2)) for x in (query, key, value)]
    out = torch.empty_like(rolled[2])
    for y in range(0, height, window_size[0]):
        for x in range(0, width, window_size[1]):
            window = slice(None), slice(y, y + window_size[0]), slice(x, x + window_size[1])
            q, k, v = (t[window].flatten(1, 2).transpose(1, 2) for t in rolled)
            r = region[window[1:]].flatten().to(key.device)
            index = torch.cartesian_prod(*map(torch.arange, window_size)).T
            dy, dx = index[:, None, :] - index[:, :, None]
            logits = q @ k.mT * q.shape[-1] ** -0.5 + rel_pos_bias[:, dy + window_size[0] - 1, dx + window_size[1] - 1]
            attended = logits.masked_fill(r[:, None] != r[None, :], float("-inf")).softmax(-1) @ v
            out[window] = attended.transpose(1, 2).unflatten(1, window_size)
    return out.roll(shift, (1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window_size", "shift"), [((4, 4), (2, 2)), ((4, 3), (1, 2)), ((8, 12), (4, 6))])
def test_shift_is_swins(window_size, shift, backend):
    call = attend(window_size, shift, backend=backend)
    assert_matches(call, attend(window_size, shift, swin), make((2, 8, 12, 3, 4), window_size), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_query_is_a_repeated_one(backend):
    call = attend((3, 4), backend=backend)
    inputs = make((2, 9, 8, 3, 4), (3, 4), shared=True)
    assert_matches(call, lambda q, *others: call(q.repeat(1, 3, 2, 1, 1), *others), inputs, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_over_the_map_is_neighborhood_attention(backend):
    """One convention for the bias tables of both operators."""
    *qkv, bias = make((2, 5, 6, 2, 4), (5, 6), grad=False)
    out = window_attention_2d(*qkv, (5, 6), rel_pos_bias=bias, backend=backend)
    expected = neighborhood_attention_2d(*qkv, (5, 6), rel_pos_bias=bias, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


# The backends against the meaning


@st.composite
def calls(draw):
    def axis():
        window = draw(st.integers(1, 7))
        return window * draw(st.integers(1, 3)), window, draw(st.integers(0, window - 1))

    (height, *rows), (width, *cols) = axis(), axis()
    window_size, shift = zip(rows, cols, strict=True)
    shared = draw(st.booleans())
    shape = draw(st.integers(0, 2)), height, width, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 8, 32]))
    value_dim = draw(st.sampled_from([None, 3, 16]))
    return shape, window_size, (0, 0) if shared else shift, shared, draw(st.booleans()), value_dim


@settings(max_examples=80, deadline=None)
@given(calls())
def test_tiled_matches_reference(call):
    shape, window_size, shift, shared, bias, value_dim = call
    inputs = make(shape, window_size, shared=shared, bias=bias, value_dim=value_dim)
    tiled, reference = (attend(window_size, shift, backend=backend) for backend in ("tiled", "reference"))
    assert_matches(tiled, reference, inputs, 1e-12)


@pytest.mark.parametrize(
    ("size", "shared", "bias"), [((4, 3), True, True), ((2, 6), True, False), ((4, 6), False, True)]
)
def test_triton_matches_reference(size, shared, bias):
    """Windows below each other, and beside each other."""
    inputs = make((2, *size, 1, 12), (2, 3), shared=shared, bias=bias, dtype=torch.float32, device=DEVICE)
    fused, reference = (attend((2, 3), scale=0.4, backend=backend) for backend in ("triton", "reference"))
    assert_matches(fused, reference, inputs, 3e-6)


@pytest.mark.parametrize("size", [(2, 3), (4, 4)])
def test_bias_of_pairs_by_kernels(size):
    """On memory as torch's attention wants it, and of the gradient that its padding leaves."""
    (table,) = make((1, *size, 2, 1), size, dtype=torch.float32, device=DEVICE)[3:]
    table = table.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()  # as models have it
    out = triton.DenseBias.apply(table, *size, torch.float32)
    assert all(stride % 8 == 0 for stride in out.stride()[:-1])
    tokens = size[0] * size[1]
    weights = torch.randn(2, tokens, tokens + 5, device=DEVICE)[..., :tokens]
    expected = dense_bias(table, *size, torch.float32)
    assert out.equal(expected)
    grads = [torch.autograd.grad(x, table, weights)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=2e-6)
    assert triton.DenseBias.apply(table, *size, torch.float16).equal(expected.half())


def test_windows_below_each_other_are_a_batch(monkeypatch):
    """As GC ViT has them: nothing of a fused projection is copied."""
    qkv, seen = torch.randn(2, 6, 3, 3, 1, 16, device=DEVICE), []
    function = fused.ops.neighborhood_attention_2d
    monkeypatch.setattr(fused.ops, "neighborhood_attention_2d", lambda *a: seen.extend(a[:3]) or function(*a))
    window_attention_2d(*qkv.unbind(3), (2, 3), backend="triton")
    assert [x.shape for x in seen] == [(6, 2, 3, 1, 16)] * 3
    assert {x.untyped_storage().data_ptr() for x in seen} == {qkv.untyped_storage().data_ptr()}


def test_who_takes_triton(monkeypatch):
    """Calls with small windows in half precision on a GPU."""

    def takes(window_size=7, dim=32, dtype=torch.bfloat16, shift=0, value_dim=32):
        key, value = (Like((2, 56, 56, 2, n), dtype) for n in (dim, value_dim))
        return api._takes_triton(key, value, (window_size, window_size), (shift, shift))

    assert takes()
    assert takes(8)
    assert takes(14)
    assert not takes(14, dim=64, value_dim=64)
    assert not takes(16)
    assert not takes(dtype=torch.float32)
    assert not takes(dim=256, value_dim=256)
    assert not takes(shift=3)
    assert not takes(value_dim=64)
    assert not api._takes_triton(*[torch.zeros(1, 7, 7, 1, 32).bfloat16()] * 2, (7, 7), (0, 0))
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not takes()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shift", "shared"), [(0, False), (1, False), (0, True)])
def test_gradcheck(shift, shared, bias):
    *inputs, table = make((1, 4, 6, 2, 2), (2, 3), shared=shared, bias=bias)
    call = attend((2, 3), shift, scale=0.6)
    assert torch.autograd.gradcheck(lambda q, k, v, table=None: call(q, k, v, table), (*inputs, table)[: 3 + bias])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shift", "shared"), [(0, False), (3, False), (0, True)])
def test_low_precision(shift, shared, dtype):
    """Against float64: at most twice the error of attention window by window in the dtype itself."""

    def plain(q, k, v, bias):
        repeats = 14 // q.shape[1]
        return swin(q.repeat(1, repeats, repeats, 1, 1), k, v, (7, 7), (shift, shift), bias)

    inputs = make((2, 14, 14, 2, 32), (7, 7), shared=shared, dtype=dtype, device=DEVICE)
    tiled, reference = (attend(7, shift, backend=backend) for backend in ("tiled", "reference"))
    assert_error_at_most_twice(tiled, plain, reference, inputs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_keeps_its_dtype(backend, shared):
    """Under autocast the bias table stays in float32 while the rest is low precision."""
    *qkv, bias = make((1, 9, 9, 2, 8), (3, 3), shared=shared, dtype=torch.bfloat16)
    bias = bias.detach().float().requires_grad_()
    out = window_attention_2d(*qkv, 3, rel_pos_bias=bias, backend=backend)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, shift):
    q, k, v, bias = make((2, 8, 12, 3, 16), (4, 4), grad=False)
    one = q[:, :4, :4].clone()
    expected = [
        window_attention_2d(x, k, v, 4, s, rel_pos_bias=bias, backend=backend) for x, s in ((q, shift), (one, 0))
    ]
    packed = torch.cat([q, k, v], -1)  # slices of one tensor, as of a fused projection
    q, k, v = packed[..., :16], packed[..., 16:32], packed[..., 32:]
    k = k.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    v = torch.stack([v, -v], -1)[..., 0]  # a last axis of stride 2
    one = one.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1)
    bias = bias.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for x, s, e in ((q, shift, expected[0]), (one, 0, expected[1])):
        out = window_attention_2d(x, k, v, 4, s, rel_pos_bias=bias, backend=backend)
        torch.testing.assert_close(out, e, rtol=0, atol=1e-14)

    first = k[:1, :1, :1].expand(k.shape)
    expected = window_attention_2d(q, first.clone(), v, 4, shift, rel_pos_bias=bias, backend=backend)
    torch.testing.assert_close(window_attention_2d(q, first, v, 4, shift, rel_pos_bias=bias, backend=backend), expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_empty_batch(backend, shared):
    *qkv, bias = make((0, 6, 6, 2, 4), (3, 3), shared=shared)
    out, *grads = outputs_and_grads(attend(3, backend=backend), (*qkv, bias))
    assert out.shape == (0, 6, 6, 2, 4)
    assert [g.shape for g in grads] == [x.shape for x in (*qkv, bias)]
    assert not grads[3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_key_stays_in_its_window(backend):
    q, k, v, bias = make((2, 6, 6, 1, 4), (3, 3), grad=False)
    clean = window_attention_2d(q, k, v, 3, rel_pos_bias=bias, backend=backend)
    k[0, 1, 4] = float("nan")
    out = window_attention_2d(q, k, v, 3, rel_pos_bias=bias, backend=backend)
    broken = torch.zeros(2, 6, 6, dtype=torch.bool)
    broken[0, :3, 3:] = True
    assert out[broken].isnan().all()
    torch.testing.assert_close(out[~broken], clean[~broken], rtol=0, atol=1e-14)


def test_windows_below_each_other_are_not_copied(monkeypatch):
    qkv = torch.randn(2, 12, 3, 3, 4, 8)
    copied = []

    def spy(*tensors, **kwargs):
        copied.extend(x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr() for x in tensors)
        return scaled_dot_product_attention(*tensors, **kwargs)

    monkeypatch.setattr(_sdpa.F, "scaled_dot_product_attention", spy)
    window_attention_2d(*qkv.unbind(3), 3)
    window_attention_2d(qkv[:, :3, :, 0], *qkv.unbind(3)[1:], 3)
    assert copied == [False, False, False, True, False, False]  # a shared query is repeated


@pytest.mark.parametrize("shared", [False, True])
def test_many_images_are_split(shared, monkeypatch):
    inputs = make((5, 6, 4, 2, 4), (3, 2), shared=shared)
    expected = outputs_and_grads(attend((3, 2)), inputs)
    monkeypatch.setattr(api, "_images_at_once", lambda key, window_size: 2)
    assert_all_close(outputs_and_grads(attend((3, 2)), inputs), expected, 1e-12)


# torch's own machinery


CONFIGURATIONS = [(0, False), (2, False), (0, True)]


@pytest.mark.parametrize(("shift", "shared"), CONFIGURATIONS)
def test_compile_fullgraph(shift, shared):
    torch._dynamo.reset()
    compiled = torch.compile(attend(4, shift), fullgraph=True, backend="aot_eager")
    assert_matches(compiled, attend(4, shift), make((2, 8, 8, 2, 4), (4, 4), shared=shared, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize(("shift", "shared"), CONFIGURATIONS)
def test_export_with_any_batch_size(shift, shared):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return window_attention_2d(q, k, v, 4, shift, rel_pos_bias=bias)

    *qkv, bias = make((2, 8, 8, 2, 4), (4, 4), shared=shared, dtype=torch.float32, grad=False)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(Module(), (*qkv, bias), dynamic_shapes=(batch, batch, batch, None)).module()
    *qkv, bias = make((5, 8, 8, 2, 4), (4, 4), shared=shared, dtype=torch.float32, grad=False)
    torch.testing.assert_close(exported(*qkv, bias), window_attention_2d(*qkv, 4, shift, rel_pos_bias=bias))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shift", "shared"), CONFIGURATIONS)
def test_torchscript(shift, shared, bias):
    *qkv, bias = make((2, 8, 8, 2, 4), (4, 4), shared=shared, bias=bias, dtype=torch.float32, grad=False)
    scripted = torch.jit.script(tiled.window_attention_2d)
    out = scripted(*qkv, (4, 4), (shift, shift), bias, 0.5)
    torch.testing.assert_close(out, window_attention_2d(*qkv, 4, shift, rel_pos_bias=bias, scale=0.5))


def test_meta_device():
    qkv = [torch.empty(2, 8, 8, 2, 4, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    for q, shift in ((qkv[0], 2), (qkv[0][:, :4, :4], 0)):
        out = window_attention_2d(q, *qkv[1:], 4, shift)
        assert (out.shape, out.dtype, out.device.type) == ((2, 8, 8, 2, 4), torch.bfloat16, "meta")


# Bad input


X = torch.zeros(2, 8, 9, 3, 4)
ONE = torch.zeros(2, 4, 3, 3, 4)
REFUSALS = {
    "query type": (dict(query=[1]), TypeError, "query must be a torch.Tensor, got list"),
    "value type": (dict(value=None), TypeError, "value must be a torch.Tensor, got NoneType"),
    "query rank": (dict(query=X[0]), ValueError, r"query must be \[batch, height.*got shape \(8, 9, 3, 4\)"),
    "key rank": (dict(key=X[0]), ValueError, r"key must be \[batch, height.*got shape \(8, 9, 3, 4\)"),
    "query dtype": (dict(query=X.int()), TypeError, "query must be of a floating dtype, got torch.int32"),
    "key dtype": (dict(key=X.half()), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
    "value device": (dict(value=X.to("meta")), ValueError, "value must be on the device of query, cpu, got meta"),
    "value shape": (
        dict(value=X[:1]),
        ValueError,
        r"value must have the shape of key but for head_dim, .* got \(1, 8, 9, 3, 4",
    ),
    "query shape": (
        dict(query=X[:, :4, :4]),
        ValueError,
        r"of key, \(2, 8, 9, 3, 4\), or of one window, \(2, 4, 3, 3, 4\), got \(2, 4, 4, 3, 4\)",
    ),
    "query batch": (dict(query=ONE[:1]), ValueError, r"or of one window, \(2, 4, 3, 3, 4\), got \(1, 4, 3, 3, 4\)"),
    "query width": (dict(query=X[..., :2]), ValueError, r"query must have the shape of key, \(2, 8, 9, 3, 4\)"),
    "window type": (dict(window_size=3.0), TypeError, r"window_size must be one int or a .* pair of them, got 3.0"),
    "window triple": (dict(window_size=(4, 3, 1)), TypeError, r"window_size must be .*got \(4, 3, 1\)"),
    "window zero": (dict(window_size=(4, 0)), ValueError, r"window_size must be at least 1 on both axes, got \(4, 0\)"),
    "map height": (dict(window_size=3), ValueError, "along the height 8 is none of 3; pad it to 9"),
    "map width": (dict(window_size=4), ValueError, "along the width 9 is none of 4; pad it to 12"),
    "shift type": (dict(shift=None), TypeError, "shift must be one int or a"),
    "shift negative": (dict(shift=(0, -1)), ValueError, r"shift must be at least 0 .*got \(0, -1\)"),
    "shift too large": (dict(shift=(1, 3)), ValueError, r"less than window_size \(4, 3\) on each axis, got \(1, 3\)"),
    "shift shared": (dict(query=ONE, shift=1), ValueError, r"shift must be 0 where .* share a query, got \(1, 1\)"),
    "bias type": (dict(rel_pos_bias=1.0), TypeError, "rel_pos_bias must be a torch.Tensor or None, got float"),
    "bias dtype": (dict(rel_pos_bias=torch.zeros(3, 7, 5).int()), TypeError, "rel_pos_bias must be of a floating"),
    "bias device": (dict(rel_pos_bias=torch.zeros(3, 7, 5, device="meta")), ValueError, "rel_pos_bias must be on the"),
    "bias shape": (dict(rel_pos_bias=torch.zeros(35, 3)), ValueError, r"= \(3, 7, 5\), got \(35, 3\)"),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number or None, got str"),
    "backend": (dict(backend="natten"), ValueError, "backend must be one of auto, .*, triton, got 'natten'"),
    "triton shift": (dict(backend="triton", shift=1), ValueError, r"backend='triton' takes no shift, got \(1, 1\)"),
    "triton value": (
        dict(backend="triton", value=X[..., :2]),
        ValueError,
        "backend='triton' needs values as wide as keys, got 2 and 4",
    ),
    "triton dtype": (
        {"backend": "triton"} | {name: X.double() for name in ("query", "key", "value")},
        ValueError,
        "backend='triton' needs float16, bfloat16 or float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    wrong, error, message = REFUSALS[name]
    arguments = dict(query=X, key=X, value=X, window_size=(4, 3)) | wrong
    with pytest.raises(error, match=message):
        window_attention_2d(**arguments)
