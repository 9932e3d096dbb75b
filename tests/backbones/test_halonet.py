"""HaloNet: the sizes of the paper's table, and timm's module and model as the reference."""

import copy

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn

from zoo.backbones.halonet import HaloAttention, HaloBlock, HaloNet

TABLE = {  # block, halo, value ratio, output ratio, blocks of stage 3, image side, last convolution, parameters
    "halonet_h0_256": (8, 3, 1.0, 0.5, 7, 256, None, 5_502_248),
    "halonet_h1_256": (8, 3, 1.0, 1.0, 10, 256, None, 8_101_352),
    "halonet_h2_256": (8, 3, 1.0, 1.25, 11, 256, None, 9_405_608),
    "halonet_h3_320": (10, 3, 1.0, 1.5, 12, 320, 1024, 11_842_792),
    "halonet_h4_384": (12, 2, 1.0, 3.0, 12, 384, 1280, 19_103_464),
    "halonet_h5_448": (14, 2, 2.5, 2.0, 23, 448, 1536, 30_718_952),
    "halonet_h6_512": (8, 4, 3.0, 2.75, 24, 512, 1536, 43_458_280),
    "halonet_h7_600": (10, 3, 4.0, 3.5, 26, 600, 2048, 67_434_728),
}


@pytest.mark.parametrize("name", TABLE)
def test_variant(name):
    block, halo, value_ratio, out_ratio, depth, side, num_features, parameters = TABLE[name]
    model = timm.create_model(name, device="meta")
    assert model.default_cfg["input_size"] == (3, side, side)
    assert [len(stage) for stage in model.stages] == [3, 3, depth, 3]
    for width, heads, stage in zip((64, 128, 256, 512), (4, 8, 8, 8), model.stages, strict=True):
        assert [b.self_attn.block_stride for b in stage] == [1 if width == 64 else 2] + [1] * (len(stage) - 1)
        for b in stage:
            attn = b.self_attn
            assert (attn.block_size, attn.halo_size, attn.num_heads) == (block, halo, heads)
            assert (attn.dim_out_qk, attn.dim_out_v) == (width, width * value_ratio)
            assert b.conv3_1x1.conv.out_channels == width * out_ratio
    assert model.num_features == (num_features or 512 * out_ratio)
    assert sum(param.numel() for param in model.parameters()) == parameters


def test_weights_of_timm_load():
    """timm's halonet_h1 is H1 but for the heads of the first stage."""
    torch.manual_seed(0)
    theirs = timm.create_model("halonet_h1").eval()
    with torch.no_grad():
        for param in theirs.parameters():  # timm's residual branches start at zero
            if param.ndim == 1:
                param.uniform_(0.2, 0.8)
    ours = timm.create_model("halonet_h1_256", num_heads=(8, 8, 8, 8)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_names_of_timm():
    """A last convolution and a classifier under timm's names, also where the model is inside another one."""
    model = timm.create_model("test_halonet", num_classes=3)
    renamed = {
        key.replace("norm.", "final_conv.") if key.startswith("norm.") else key.replace("head.", "head.fc."): value + 1
        for key, value in model.state_dict().items()
    }
    before = dict(renamed)
    for target, weights in [
        (copy.deepcopy(model), renamed),
        (torch.nn.Sequential(copy.deepcopy(model)), {f"0.{k}": v for k, v in renamed.items()}),
    ]:
        target.load_state_dict(weights)
        for actual, expected in zip(target.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(actual, expected + 1)
    assert renamed.keys() == before.keys()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (1, 1), (9, 4)])
def test_maps_that_blocks_do_not_divide(size, stride):
    """As timm on a map padded with zeros: without a bias they are keys and values of zero."""
    torch.manual_seed(0)
    options = dict(num_heads=2, dim_head=3, block_size=4, halo_size=1, stride=stride)
    theirs, ours = HaloAttn(6, 10, **options).double(), HaloAttention(6, 10, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    height, width = (-(-n // stride) for n in size)
    out = ours(x)
    assert out.shape == (2, 10, height, width)
    torch.testing.assert_close(out, theirs(padded)[:, :, :height, :width], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("block_size", "side"), [(3, 4), (4, 5)])
def test_an_odd_block_size_rounds_half_the_map_down(block_size, side):
    attn = HaloAttention(8, 8, 1, 8, block_size, 1, stride=2)
    assert attn(torch.zeros(1, 8, 9, 9)).shape == (1, 8, side, side)


def test_shortcut_has_weights_only_where_the_shape_changes():
    assert list(HaloBlock(8, 8, 8, 8, 2).shortcut.parameters()) == []
    assert len(list(HaloBlock(8, 8, 8, 16, 2).shortcut.parameters())) == 3
    assert len(list(HaloBlock(8, 8, 8, 8, 2, stride=2).shortcut.parameters())) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(num_heads=(4, 8)),
            r"depths and num_heads must have one entry per stage, got \(3, 3, 10, 3\) and \(4, 8\)",
        ),
        (dict(block_size=7), "block_size must be even, for the stride of 2 between stages, got 7"),
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (dict(num_heads=(0, 8, 8, 8)), "num_heads must divide dim, got num_heads=0 and dim=64"),
        (dict(num_heads=(3, 8, 8, 8)), "num_heads must divide dim, got num_heads=3 and dim=64"),
        (dict(value_ratio=1.03), "num_heads must divide dim_out, got num_heads=4 and dim_out=65"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        HaloNet(device="meta", **wrong)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 4"):
        HaloAttention(8, 8, 2, 4, 4, 1, stride=4)
