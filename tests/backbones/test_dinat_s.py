"""DiNAT_s against the authors' outputs, and its padding."""

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the models)
from golden_cases import load_case, max_error

C = ((1, 8), (1, 4), (1, 2) * 9, (1, 1))
C_TINY = ((1, 8), (1, 4), (1, 2) * 3, (1, 1))
D = ((1, 13), (1, 6), (1, 3) * 9, (1, 1))
VARIANTS = {  # width, heads of the first stage, dilations, drop path
    "dinat_s_tiny": (96, 3, C_TINY, 0.2),
    "dinat_s_small": (96, 3, C, 0.3),
    "dinat_s_base": (128, 4, C, 0.5),
    "dinat_s_large": (192, 6, C, 0.35),
    "dinat_s_large_384": (192, 6, D, 0.35),
    "dinat_s_large_21k": (192, 6, C, 0.2),
}


def test_golden():
    case = load_case("nat", "dinat_s_tiny")
    model = timm.create_model("dinat_s_tiny").eval()
    model.load_state_dict(case.state_dict)
    outputs = {}
    for i, stage in enumerate(model.layers):
        stage.register_forward_hook(lambda m, args, out, i=i: outputs.update({f"stage{i}": out[1].mean((1, 2))}))
    with torch.inference_mode():
        outputs["logits"] = model(case.inputs["x"])
    assert outputs.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected) < 1e-5, key


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    width, heads, dilations, drop_path = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    for i, layer in enumerate(model.layers):
        assert tuple(block.attn.dilation for block in layer.blocks) == tuple((d, d) for d in dilations[i])
        for block in layer.blocks:
            assert block.attn.qkv.in_features == width * 2**i
            assert block.attn.num_heads == heads * 2**i
            assert block.attn.kernel_size == (7, 7)
            assert block.mlp.fc1.out_features == 4 * width * 2**i
            assert block.gamma1 is None and block.gamma2 is None
    assert model.layers[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(drop_path)


def test_merging_concatenates_the_neighbours_column_by_column():
    downsample = timm.create_model("dinat_s_tiny", embed_dim=8, depths=(1, 1), num_heads=(1, 1), dilations=((1,),) * 2)
    merge = downsample.layers[0].downsample
    x = torch.randn(1, 5, 6, 8)  # the odd height is padded with a row of zeros
    padded = torch.cat([x, torch.zeros(1, 1, 6, 8)], 1)
    corners = [padded[:, row::2, col::2] for row, col in ((0, 0), (1, 0), (0, 1), (1, 1))]
    torch.testing.assert_close(merge(x), merge.reduction(merge.norm(torch.cat(corners, -1))))


def test_an_image_is_padded_to_whole_patches():
    torch.manual_seed(0)
    model = timm.create_model("dinat_s_tiny", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)).eval()
    x = torch.randn(1, 3, 61, 66)
    padded = torch.zeros(1, 3, 64, 68)
    padded[:, :, :61, :66] = x
    with torch.inference_mode():
        assert torch.equal(model(x), model(padded))
