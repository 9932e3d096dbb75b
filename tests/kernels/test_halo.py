"""Halo attention: the meaning, the backends against it, the golden cases, and every refusal."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from golden_cases import load_case, max_error
from operators import assert_all_close, assert_error_at_most_twice, assert_matches, outputs_and_grads, random_inputs
from zoo.kernels import halo_attention_2d
from zoo.kernels.halo import reference, tiled

BACKENDS = ["reference", "tiled"]


def per_query_loop(query, key, value, block, halo, stride, rel_height, rel_width, scale):
    """Independent of the package: every query meets the keys of its window one by one, by the definition."""
    batch, height, width, heads, _ = key.shape
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for b in range(batch):
        for y in range(height // stride):
            for x in range(width // stride):
                top, left = y * stride // block * block, x * stride // block * block
                in_row, in_col = y - top // stride, x - left // stride
                for h in range(heads):
                    logits, values = [], []
                    q = query[b, y, x, h]
                    for ky in range(top - halo, top + block + halo):
                        for kx in range(left - halo, left + block + halo):
                            on_map = 0 <= ky < height and 0 <= kx < width
                            logit = scale * torch.dot(q, key[b, ky, kx, h]) if on_map else 0 * q.sum()
                            if rel_height is not None:
                                win = block + 2 * halo
                                down, right = ky - (top - halo) - in_row, kx - (left - halo) - in_col
                                logit = logit + torch.dot(q, rel_height[win - 1 + down] + rel_width[win - 1 + right])
                            logits.append(logit)
                            values.append(value[b, ky, kx, h] if on_map else 0 * value[b, 0, 0, h])
                    out[b, y, x, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def make(shape, block, halo, stride=1, *, v_dim=None, rel=True, dtype=torch.float64, grad=True):
    """Random inputs for a map of `shape` [batch, height, width, heads, qk_dim]; without `rel` no tables but None."""
    batch, height, width, heads, dim = shape
    table = (2 * (block + 2 * halo) - 1, dim) if rel else None
    query, value = (batch, height // stride, width // stride, heads, dim), (*shape[:-1], v_dim or dim)
    return random_inputs(query, shape, value, table, table, dtype=dtype, grad=grad)


def attention(*args, **kwargs):
    """The operator as a function of its tensors."""

    def call(query, key, value, rel_height, rel_width):
        return halo_attention_2d(query, key, value, *args, rel_height=rel_height, rel_width=rel_width, **kwargs)

    return call


# The meaning


LOOP_CASES = [
    # map, block, halo, stride, v_dim, relative positions
    ((1, 1), 1, 0, 1, 3, True),
    ((4, 6), 2, 1, 1, 3, True),
    ((3, 6), 3, 2, 1, 4, False),
    ((4, 4), 2, 3, 1, 3, True),  # a halo wider than the block
    ((8, 4), 4, 1, 2, 2, True),
    ((6, 3), 3, 1, 3, 3, True),  # one query a block
    ((4, 8), 4, 0, 2, 3, False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LOOP_CASES, ids=str)
def test_matches_per_query_loop(case, backend):
    size, block, halo, stride, v_dim, rel = case
    inputs = make((2, *size, 2, 3), block, halo, stride, v_dim=v_dim, rel=rel)

    def loop(query, key, value, rel_height, rel_width):
        return per_query_loop(query, key, value, block, halo, stride, rel_height, rel_width, 0.7)

    assert_matches(attention(block, halo, stride=stride, scale=0.7, backend=backend), loop, inputs, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["halo_attn", "halo_attn_stride2"])
def test_golden(name, backend):
    """timm's module, put together from its weights and the operator."""
    case = load_case("halonet", name)
    options = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", case.call)}
    heads, stride = options["num_heads"], options.get("stride", 1)
    weights = {k: v.double().requires_grad_() for k, v in case.state_dict.items()}
    x = case.inputs["x"].double().requires_grad_()
    query = torch.nn.functional.conv2d(x, weights["q.weight"], stride=stride).unflatten(1, (heads, -1))
    key_value = torch.nn.functional.conv2d(x, weights["kv.weight"]).unflatten(1, (heads, -1))
    dims = query.shape[2], options["dim_out"] // heads
    out = halo_attention_2d(
        *(t.permute(0, 3, 4, 1, 2) for t in (query, *key_value.split(dims, dim=2))),
        options["block_size"],
        options["halo_size"],
        rel_height=weights["pos_embed.height_rel"],
        rel_width=weights["pos_embed.width_rel"],
        stride=stride,
        backend=backend,
    )
    out = out.flatten(3).permute(0, 3, 1, 2)
    (out * case.inputs["g"].double()).sum().backward()
    actual = {"y": out.detach(), "grad_x": x.grad} | {f"grad_{k}": v.grad for k, v in weights.items()}
    assert actual.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(actual[key], expected.double()) <= 2e-6, key  # the cases are float32; 1.7e-6 is their rounding


# The backends against the meaning


@st.composite
def calls(draw):
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    block = stride * draw(st.integers(1, 12 // stride))
    halo = draw(st.integers(0, 8))
    height, width = (block * draw(st.integers(1, max(1, 20 // block))) for _ in range(2))
    shape = draw(st.integers(0, 2)), height, width, draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 16, 20]))
    return shape, (block, halo), stride, draw(st.sampled_from([None, 1, 5, 24])), draw(st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from([2**10, 2**20]))
def test_tiled_matches_reference(call, chunk):
    shape, args, stride, v_dim, rel = call
    inputs = make(shape, *args, stride, v_dim=v_dim, rel=rel)
    call, exact = (attention(*args, stride=stride, backend=backend) for backend in ("tiled", "reference"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CHUNK", chunk)
        assert_matches(call, exact, inputs, 1e-12)


@pytest.mark.parametrize("rel", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride, rel):
    inputs = make((1, 4, 2, 2, 2), 2, 1, stride, v_dim=3, rel=rel)
    assert torch.autograd.gradcheck(attention(2, 1, stride=stride, scale=0.6), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_low_precision(stride, dtype):
    """At most twice the error of the reference evaluated in the dtype itself."""
    inputs = make((2, 16, 16, 2, 16), 8, 3, stride, v_dim=24, dtype=dtype)

    def plain(*inputs):
        return reference.halo_attention_2d(*inputs, 8, 3, stride, 0.25, dtype=dtype)

    call, exact = (attention(8, 3, stride=stride, backend=backend) for backend in ("tiled", "reference"))
    assert_error_at_most_twice(call, plain, exact, inputs)


def test_tables_keep_their_dtype():
    """Under autocast the tables stay in float32 while the rest is low precision."""
    *qkv, rel_height, rel_width = make((1, 8, 8, 2, 8), 4, 1, dtype=torch.float32, grad=False)
    inputs = [*(x.bfloat16() for x in qkv), rel_height, rel_width]
    results = outputs_and_grads(attention(4, 1), inputs)
    assert [x.dtype for x in results] == [torch.bfloat16] * 4 + [torch.float32] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    q, k, v, *tables = make((2, 8, 12, 3, 8), 4, 2, grad=False)

    def call(q, k, v):
        out = attention(4, 2, backend=backend)(q, k, v, *tables)
        assert out.is_contiguous()
        return out

    expected = call(q, k, v)
    packed = torch.cat([k, v], -1)  # slices of one tensor, as of a fused projection
    k, v = packed[..., :8], packed[..., 8:]
    q = q.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)  # as a convolution leaves it
    k = torch.stack([k, -k], -1)[..., 0]  # a last axis of stride 2
    torch.testing.assert_close(call(q, k, v), expected, rtol=0, atol=1e-14)

    one = q[:1, :1, :1].expand(q.shape)
    torch.testing.assert_close(call(one, k, v), call(one.clone(), k, v))


# Invariances


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_without_halo_is_dense_attention(backend):
    q, k, v, _, _ = make((2, 6, 6, 3, 8), 6, 0, rel=False, grad=False)
    dense = scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    out = halo_attention_2d(q, k, v, 6, 0, backend=backend)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halo_is_made_of_zero_keys_and_values_beyond_the_map(backend):
    """The same as attention of the middle of a map that has zeros around."""
    *qkv, rel_height, rel_width = make((1, 4, 4, 2, 4), 4, 3, grad=False)
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 0, 4, 4, 4, 4)) for x in qkv]
    out, whole = (attention(4, 3, backend=backend)(*x, rel_height, rel_width) for x in (qkv, wide))
    torch.testing.assert_close(out, whole[:, 4:8, 4:8], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_sum_to_the_share_of_the_map(backend):
    """With equal logits a corner block of 2 x 2 blocks gives the map its (block + halo)**2 of the win**2 weights."""
    q, k, v, _, _ = make((1, 8, 8, 1, 4), 4, 1, rel=False, grad=False)
    out = halo_attention_2d(0 * q, k, torch.ones_like(v), 4, 1, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 25 / 36), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_batch_and_heads(backend):
    *qkv, rel_height, rel_width = make((4, 4, 8, 3, 4), 4, 1, grad=False)
    call = attention(4, 1, backend=backend)
    out = call(*qkv, rel_height, rel_width)
    batch, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    permuted = call(*(x[batch][:, :, :, heads] for x in qkv), rel_height, rel_width)
    torch.testing.assert_close(permuted, out[batch][:, :, :, heads], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exchanging_the_axes_exchanges_the_tables(backend):
    *qkv, rel_height, rel_width = make((1, 4, 8, 1, 4), 4, 1, grad=False)
    call = attention(4, 1, backend=backend)
    out = call(*qkv, rel_height, rel_width)
    exchanged = call(*(x.transpose(1, 2) for x in qkv), rel_width, rel_height)
    torch.testing.assert_close(exchanged.transpose(1, 2), out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs = make((0, 4, 4, 2, 4), 4, 1, v_dim=6)
    out, *grads = outputs_and_grads(attention(4, 1, backend=backend), inputs)
    assert out.shape == (0, 4, 4, 2, 6)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not grads[3].any() and not grads[4].any()


# Numbers that are not nice


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_block_does_not_see_does_not_leak(backend, bad, what):
    q, k, v, _, _ = make((1, 12, 12, 1, 4), 4, 1, rel=False, dtype=torch.float32, grad=False)
    clean = halo_attention_2d(q, k, v, 4, 1, backend=backend)
    (k if what == "key" else v)[0, 3, 1] = bad  # in the first block, and the halo of the one below
    out = halo_attention_2d(q, k, v, 4, 1, backend=backend)
    sees = torch.zeros(12, 12, dtype=torch.bool)
    sees[:8, :4] = True
    assert torch.equal(out[0, ~sees], clean[0, ~sees])
    if not (what == "key" and math.isinf(bad)):  # an infinite logit of either sign may be a legal mask
        assert not out[0, sees].isfinite().all(-1).any()


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extreme_logits(scale):
    inputs = make((1, 8, 8, 1, 4), 4, 2, dtype=torch.float32)
    out, *grads = outputs_and_grads(attention(4, 2, scale=scale, backend="tiled"), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    expected = attention(4, 2, scale=scale, backend="reference")(*(x.double() for x in inputs))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3)


def test_bitwise_repeatable():
    inputs = make((2, 16, 16, 3, 8), 8, 3, dtype=torch.float32)
    first, second = (outputs_and_grads(attention(8, 3, backend="tiled"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_bounded():
    """The largest tensor made on a 128 x 128 map stays near the size of the inputs and the chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    arguments = *make((1, 128, 128, 1, 4), 8, 3, dtype=torch.float32, grad=False), 8, 3, 1, 0.5
    with Watch():
        out, lse = tiled.forward(*arguments)
        tiled.backward(out, *arguments[:5], out, lse, *arguments[5:])
    logits = 128 * 128 * 14 * 14
    assert out.numel() < largest <= tiled.CHUNK < logits // 4


# torch's own machinery


@pytest.mark.parametrize("rel", [False, True])
def test_opcheck(rel):
    args = *make((1, 8, 4, 2, 4), 4, 1, 2, v_dim=6, rel=rel, dtype=torch.float32), 4, 1, 2, 0.5
    torch.library.opcheck(torch.ops.zoo.halo_attention_2d.default, args)
    out, lse = torch.ops.zoo.halo_attention_2d(*args)
    inputs = [x if x is None else x.detach() for x in args[:5]]
    torch.library.opcheck(
        torch.ops.zoo.halo_attention_2d_backward.default,
        (torch.ones_like(out), *inputs, out.detach(), lse.detach(), *args[5:]),
    )


def test_compile_fullgraph():
    torch._dynamo.reset()
    inputs = make((1, 8, 8, 2, 4), 4, 1, v_dim=6, dtype=torch.float32)
    compiled = torch.compile(attention(4, 1), fullgraph=True, backend="aot_eager")
    assert_all_close(*(outputs_and_grads(call, inputs) for call in (compiled, attention(4, 1))), 1e-6)


def test_compile_dynamic_shapes_compiles_twice_at_most():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q, k, v: halo_attention_2d(q, k, v, 4, 1), fullgraph=True, backend=counter)
    for size in [(8, 12), (12, 16), (16, 8), (20, 24)]:
        qkv = make((2, *size, 2, 4), 4, 1, rel=False, dtype=torch.float32, grad=False)[:3]
        torch.testing.assert_close(compiled(*qkv), halo_attention_2d(*qkv, 4, 1))
    assert counter.frame_count == 2


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return halo_attention_2d(q, k, v, 4, 1)

    qkv = make((1, 8, 8, 2, 4), 4, 1, rel=False, dtype=torch.float32, grad=False)[:3]
    exported = torch.export.export(Module(), tuple(qkv))
    torch.testing.assert_close(exported.module()(*qkv), halo_attention_2d(*qkv, 4, 1))


def test_torchscript():
    @torch.jit.script
    def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return torch.ops.zoo.halo_attention_2d(q, k, v, None, None, 4, 1, 1, 0.5)[0]

    qkv = make((1, 8, 8, 2, 4), 4, 1, rel=False, dtype=torch.float32, grad=False)[:3]
    assert torch.equal(scripted(*qkv), halo_attention_2d(*qkv, 4, 1, scale=0.5))


def test_meta_device():
    key = torch.empty(2, 8, 8, 2, 4, device="meta", dtype=torch.bfloat16)
    out = halo_attention_2d(key[:, ::2, ::2], key, key[..., :3], 4, 1, stride=2)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 4, 2, 3), torch.bfloat16, "meta")


# Bad input


X = torch.zeros(2, 8, 12, 3, 4)
TABLE = torch.zeros(11, 4)  # of windows of 6
REFUSALS = {
    "query type": (dict(query=[1]), TypeError, "query must be a torch.Tensor, got list"),
    "query dtype": (dict(query=X.int()), TypeError, "query must be of a floating dtype, got torch.int32"),
    "key rank": (dict(key=X[0]), ValueError, r"key must be \[batch, height.*got shape \(8, 12, 3, 4\)"),
    "key dtype": (dict(key=X.half()), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
    "value device": (dict(value=X.to("meta")), ValueError, "value must be on the device of query, cpu, got meta"),
    "map": (
        dict(key=X[:, :6], query=X[:, :6], value=X[:, :6]),
        ValueError,
        "the map must be a multiple of block_size=4 on both axes, got 6 x 12; pad it at the bottom and the right",
    ),
    "query shape": (dict(query=X[:, :4]), ValueError, r"query must be \(2, 8, 12, 3, 4\) to go .*got shape \(2, 4,"),
    "query of a stride": (dict(stride=2), ValueError, r"query must be \(2, 4, 6, 3, 4\) to go with key and stride"),
    "value shape": (dict(value=X[:, :4]), ValueError, r"value must have the shape of key but for the last axis"),
    "block type": (dict(block_size=4.0), TypeError, "block_size must be an int, got 4.0"),
    "block bool": (dict(block_size=True), TypeError, "block_size must be an int, got True"),
    "block zero": (dict(block_size=0), ValueError, "block_size must be at least 1, got 0"),
    "halo type": (dict(halo_size=(1, 1)), TypeError, r"halo_size must be an int, got \(1, 1\)"),
    "halo negative": (dict(halo_size=-1), ValueError, "halo_size must be at least 0, got -1"),
    "stride zero": (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    "stride": (dict(stride=3), ValueError, "stride must divide block_size, got stride=3 and block_size=4"),
    "table alone": (dict(rel_width=TABLE), ValueError, "rel_height and rel_width go together, but rel_height is None"),
    "table type": (dict(rel_height=1.0, rel_width=TABLE), TypeError, "rel_height must be a torch.Tensor or None"),
    "table dtype": (
        dict(rel_height=TABLE, rel_width=TABLE.int()),
        TypeError,
        "rel_width must be of a floating dtype, got torch.int32",
    ),
    "table device": (
        dict(rel_height=TABLE, rel_width=TABLE.to("meta")),
        ValueError,
        "rel_width must be on the device of query, cpu, got meta",
    ),
    "table shape": (
        dict(rel_height=TABLE[1:], rel_width=TABLE),
        ValueError,
        r"rel_height must be .* = \(11, 4\), got \(10, 4\)",
    ),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number or None, got str"),
    "triton device": (dict(backend="triton"), ValueError, "backend='triton' needs CUDA tensors, got cpu"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of auto, reference, tiled, triton, got 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong, error, message = REFUSALS[name]
    arguments = dict(query=X, key=X, value=X, block_size=4, halo_size=1) | wrong
    with pytest.raises(error, match=message):
        halo_attention_2d(**arguments)
