"""NAT and DiNAT against the authors' outputs, and the attention module against its definition."""

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the models)
from golden_cases import list_cases, load_case, max_error
from zoo.backbones.nat import Nat, NeighborhoodAttention, NeighborhoodBlock

A = ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)
A_MINI = ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5)
B = ((1, 13, 1), (1, 6, 1, 6), (1, 3) * 9, (1,) * 5)
NONE = ((1,) * 3, (1,) * 4, (1,) * 18, (1,) * 5)
NONE_MINI = ((1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5)
VARIANTS = {  # width, heads of the first stage, MLP ratio, kernel, dilations, layer scale, drop path
    "nat_mini": (64, 2, 3, 7, NONE_MINI, None, 0.2),
    "nat_tiny": (64, 2, 3, 7, NONE, None, 0.2),
    "nat_small": (96, 3, 2, 7, NONE, 1e-5, 0.3),
    "nat_base": (128, 4, 2, 7, NONE, 1e-5, 0.5),
    "dinat_mini": (64, 2, 3, 7, A_MINI, None, 0.2),
    "dinat_tiny": (64, 2, 3, 7, A, None, 0.2),
    "dinat_small": (96, 3, 2, 7, A, None, 0.3),
    "dinat_base": (128, 4, 2, 7, A, 1e-5, 0.5),
    "dinat_large": (192, 6, 2, 7, A, None, 0.35),
    "dinat_large_384": (192, 6, 2, 7, B, None, 0.35),
    "dinat_large_384_11x11": (192, 6, 2, 11, A, None, 0.35),
    "dinat_large_21k": (192, 6, 2, 7, A, None, 0.2),
    "dinat_large_21k_11x11": (192, 6, 2, 11, A, None, 0.2),
}


@pytest.mark.parametrize("name", [n for n in list_cases("nat") if "isotropic" not in n and "dinat_s" not in n])
def test_golden(name):
    case = load_case("nat", name)
    model = timm.create_model(case.call.partition("(")[0]).eval()
    model.load_state_dict(case.state_dict)
    outputs = {}
    for i, stage in enumerate(model.levels):
        stage.register_forward_hook(lambda m, args, out, i=i: outputs.update({f"stage{i}": out[1].mean((1, 2))}))
    with torch.inference_mode():
        outputs["logits"] = model(case.inputs["x"])
    assert outputs.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected) < 1e-5, key


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    width, heads, mlp_ratio, kernel, dilations, init_values, drop_path = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    for i, level in enumerate(model.levels):
        assert tuple(block.attn.dilation for block in level.blocks) == tuple((d, d) for d in dilations[i])
        for block in level.blocks:
            assert block.attn.qkv.in_features == width * 2**i
            assert block.attn.num_heads == heads * 2**i
            assert block.attn.kernel_size == (kernel, kernel)
            assert block.mlp.fc1.out_features == mlp_ratio * width * 2**i
            assert block.init_values == init_values
            assert (block.gamma1 is None) == (init_values is None)
            assert block.norm1.eps == 1e-5
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for level in model.levels for block in level.blocks]
    expected = [drop_path * i / (len(rates) - 1) for i in range(len(rates))]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_test_dinat_windows_span_the_maps():
    model = timm.create_model("test_dinat")
    assert sum(p.numel() for p in model.parameters()) < 300_000
    sizes = [96 // 4, 96 // 8, 96 // 16, 96 // 32]
    for level, size in zip(model.levels, sizes, strict=True):
        assert max(block.attn.kernel_size[0] * block.attn.dilation[0] for block in level.blocks) == size
    assert model.default_cfg["input_size"] == (3, 96, 96)


def attention_by_definition(attn, x):
    """One query and one head at a time, in float64, from the definition in the paper."""
    batch, height, width, dim = x.shape
    (kh, kw), (dh, dw) = attn.kernel_size, attn.dilation
    padded = torch.zeros(batch, max(height, kh * dh), max(width, kw * dw), dim, dtype=x.dtype)
    padded[:, :height, :width] = x
    query, key, value = attn.qkv(padded).reshape(*padded.shape[:3], 3, attn.num_heads, -1).unbind(3)

    def window(i, length, k, d):
        group = list(range(i % d, length, d))
        start = min(max(group.index(i) - k // 2, 0), len(group) - k)
        return group[start : start + k]

    out = torch.empty_like(query[:, :height, :width])
    for i in range(height):
        for j in range(width):
            rows, cols = window(i, padded.shape[1], kh, dh), window(j, padded.shape[2], kw, dw)
            for head in range(attn.num_heads):
                logits = torch.stack(
                    [
                        (query[:, i, j, head] * key[:, y, z, head]).sum(-1) / query.shape[-1] ** 0.5
                        + attn.rpb[head, (y - i) // dh + kh - 1, (z - j) // dw + kw - 1]
                        for y in rows
                        for z in cols
                    ],
                    -1,
                )
                values = torch.stack([value[:, y, z, head] for y in rows for z in cols], 1)
                out[:, i, j, head] = (logits.softmax(-1)[..., None] * values).sum(1)
    return attn.proj(out.flatten(3))


@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "dilation"),
    [
        pytest.param(6, 7, 3, 1, id="plain"),
        pytest.param(7, 6, 3, 2, id="dilated"),
        pytest.param(5, 8, (3, 5), (1, 1), id="rectangular"),
        pytest.param(4, 9, 3, 2, id="padded-height"),
        pytest.param(3, 2, 5, 1, id="padded-both"),
        pytest.param(1, 1, 3, 1, id="one-token"),
    ],
)
def test_attention_is_its_definition(height, width, kernel_size, dilation):
    torch.manual_seed(0)
    attn = NeighborhoodAttention(8, 2, kernel_size, dilation, dtype=torch.float64)
    torch.nn.init.normal_(attn.rpb)
    torch.nn.init.normal_(attn.qkv.bias)  # padding carries it
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), attention_by_definition(attn, x), rtol=1e-10, atol=1e-10)


def test_block_applies_layer_scale_to_each_branch():
    torch.manual_seed(0)
    block = NeighborhoodBlock(8, 2, kernel_size=3, init_values=1e-5, dtype=torch.float64)
    assert torch.all(block.gamma1 == 1e-5) and torch.all(block.gamma2 == 1e-5)
    torch.nn.init.normal_(block.gamma1)
    torch.nn.init.normal_(block.gamma2)
    x = torch.randn(1, 5, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        y = x + block.gamma1 * block.attn(block.norm1(x))
        torch.testing.assert_close(block(x), y + block.gamma2 * block.mlp(block.norm2(y)))


@pytest.mark.parametrize("num_heads", [3, 0])
def test_head_count_must_divide_width(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads} and dim=8"):
        NeighborhoodAttention(8, num_heads)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(kernel_size=0), "kernel_size must be at least 1, got 0"),
        (dict(dilations=((1,), ())), r"dilations must have entries, all of at least 1, got \(\(1,\), \(\)\)"),
        (dict(dilations=((1,), (0,))), r"dilations must have entries, all of at least 1, got \(\(1,\), \(0,\)\)"),
    ],
)
def test_windows_of_nothing(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Nat(depths=(1, 1), num_heads=(1, 1), device="meta", **kwargs)


@pytest.mark.parametrize(
    "kwargs", [dict(num_heads=(1, 2)), dict(dilations=((1,), (1,)), depths=(1, 1, 1), num_heads=(1, 1, 1))]
)
def test_one_entry_per_stage(kwargs):
    with pytest.raises(ValueError, match="one entry per stage"):
        Nat(embed_dim=8, **kwargs)


def test_attention_dropout_is_refused():
    with pytest.raises(TypeError, match="attn_drop_rate"):
        timm.create_model("test_dinat", attn_drop_rate=0.1)


def test_dropout_rates_reach_the_layers():
    model = timm.create_model("test_dinat", drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3)
    block = model.levels[-1].blocks[-1]
    assert model.head_drop.p == 0.1
    assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.2
    assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == pytest.approx(0.3)


def test_norm_and_activation_by_name_or_class():
    by_name = timm.create_model("test_dinat", norm_layer="rmsnorm", act_layer="silu")
    assert type(by_name.norm).__name__ == "RmsNorm"
    assert isinstance(by_name.levels[0].blocks[0].mlp.act, torch.nn.SiLU)
    by_class = timm.create_model("test_dinat", norm_layer=torch.nn.RMSNorm, act_layer=torch.nn.ReLU)
    assert isinstance(by_class.levels[0].downsample.norm, torch.nn.RMSNorm)
    assert isinstance(by_class.levels[0].blocks[0].mlp.act, torch.nn.ReLU)


def test_a_zero_map_stays_finite_and_images_do_not_mix():
    torch.manual_seed(0)
    model = timm.create_model("test_dinat").eval()
    x = torch.randn(3, 3, 64, 80)
    x[1] = 0
    with torch.inference_mode():
        together = model(x)
        apart = torch.cat([model(image[None]) for image in x])
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
