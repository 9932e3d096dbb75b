"""Isotropic NAT and DiNAT against the authors' outputs, ViT-RPB against full attention."""

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the models)
from golden_cases import list_cases, load_case, max_error

VARIANTS = {  # width, heads, kernel, dilations of the first two blocks, drop path
    "nat_isotropic_small": (384, 12, 7, (1, 1), 0.1),
    "nat_isotropic_base": (768, 24, 7, (1, 1), 0.4),
    "dinat_isotropic_small": (384, 12, 7, (1, 2), 0.1),
    "dinat_isotropic_base": (768, 24, 7, (1, 2), 0.4),
    "vitrpb_small": (384, 12, 14, (1, 1), 0.1),
    "vitrpb_base": (768, 24, 14, (1, 1), 0.4),
}


@pytest.mark.parametrize("name", [n for n in list_cases("nat") if "isotropic" in n])
def test_golden(name):
    case = load_case("nat", name)
    model = timm.create_model(name).eval()
    model.load_state_dict(case.state_dict)
    with torch.inference_mode():
        assert max_error(model(case.inputs["x"]), case.outputs["logits"]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    width, heads, kernel, dilations, drop_path = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert [block.attn.dilation for block in model.layers] == [(d, d) for d in dilations] * 6
    for block in model.layers:
        assert block.attn.qkv.in_features == width
        assert block.attn.num_heads == heads
        assert block.attn.kernel_size == (kernel, kernel)
        assert block.mlp.fc1.out_features == 4 * width
    assert model.layers[-1].drop_path1.drop_prob == pytest.approx(drop_path)


def full_attention(attn, x):
    """ViT-RPB's attention as published: over the whole grid, bias gathered by a flipped query-minus-key index."""
    batch, side, _, dim = x.shape
    query, key, value = attn.qkv(x).reshape(batch, side * side, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    position = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offset = position[:, None] - position[None] + side - 1
    index = (offset[..., 0] * (2 * side - 1) + offset[..., 1]).flip(0, 1)
    bias = attn.rpb.flatten(1)[:, index]
    logits = query @ key.mT * query.shape[-1] ** -0.5 + bias
    return attn.proj((logits.softmax(-1) @ value).transpose(1, 2).reshape(batch, side, side, dim))


def test_vitrpb_attends_to_the_whole_map():
    torch.manual_seed(0)
    model = timm.create_model("vitrpb_small", embed_dim=32, depth=1, num_heads=2, dtype=torch.float64)
    attn = model.layers[0].attn
    torch.nn.init.normal_(attn.rpb)
    x = torch.randn(2, 14, 14, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), full_attention(attn, x), rtol=1e-10, atol=1e-10)


def test_vitrpb_sees_a_window_of_a_larger_map():
    torch.manual_seed(0)
    attn = timm.create_model("vitrpb_small", embed_dim=32, depth=1, num_heads=2).layers[0].attn
    x = torch.randn(1, 16, 20, 32)
    changed = x.clone()
    changed[:, :, 19] += 1
    with torch.no_grad():
        difference = (attn(changed) - attn(x)).abs().amax((0, 1, 3))
    # A window of 14 around column j starts at j - 7, at least 0 and at most 6: column 19 is seen from column 13 on.
    assert torch.all(difference[:13] == 0)
    assert torch.all(difference[13:] > 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dilations=()), r"dilations must have entries, all of at least 1, got \(\)"),
        (dict(patch_size=0), "patch_size must be at least 1, got 0"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_isotropic_small", device="meta", **kwargs)


def test_an_image_is_padded_to_whole_patches():
    torch.manual_seed(0)
    model = timm.create_model("dinat_isotropic_small", embed_dim=32, depth=2, num_heads=2).eval()
    x = torch.randn(1, 3, 50, 79)
    padded = torch.zeros(1, 3, 64, 80)
    padded[:, :, :50, :79] = x
    with torch.inference_mode():
        assert torch.equal(model(x), model(padded))
