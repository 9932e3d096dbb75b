"""Agent-CSwin: stripes against their definition, and which stages have agents."""

import pytest
import timm
import torch
import torch.nn.functional as F

from zoo.backbones.agent_cswin import AgentBranch, StripeBranch


@pytest.mark.parametrize("name", ["tiny", "small", "base", "base_384"])
def test_branches(name):
    model = timm.create_model(f"agent_cswin_{name}", device="meta")
    dim, heads = (96, 4) if "base" in name else (64, 2)
    width = 12 if "384" in name else 7
    stages = [model.stage1, model.stage2, model.stage3, model.stage4]
    for i, stage in enumerate(stages):
        for block in stage:
            branches = [(type(a), a.get_v.in_channels, a.num_heads) for a in block.attns]
            share = 2 if i == 2 else 1
            kind = AgentBranch if i < 2 else StripeBranch
            assert branches == [(kind, dim * 2**i // share, heads * 2**i // share)] * share
    assert [(a.rows, a.cols) for a in model.stage3[0].attns] == [(0, width), (width, 0)]
    assert [(a.rows, a.cols) for a in model.stage4[0].attns] == [(0, 0)]
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def attention_in_stripe(branch, query, key, value):
    """Attention over a whole map, one head at a time, and the zero-padded convolution of the values."""
    heads = []
    for q, k, v in zip(*(x.flatten(1, 2).chunk(branch.num_heads, -1) for x in (query, key, value)), strict=True):
        heads.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)
    conv = F.conv2d(value.permute(0, 3, 1, 2), branch.get_v.weight, branch.get_v.bias, padding=1, groups=8)
    return torch.cat(heads, -1).view(query.shape) + conv.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("height", "width", "rows", "cols"),
    [(6, 6, 0, 3), (6, 6, 3, 0), (5, 7, 0, 3), (5, 7, 3, 0), (4, 2, 0, 3), (4, 5, 0, 0), (1, 1, 3, 0)],
)
def test_stripes_are_their_definition(height, width, rows, cols):
    torch.manual_seed(0)
    branch = StripeBranch(8, 2, rows, cols, dtype=torch.float64)
    query, key, value = torch.randn(3, 2, height, width, 8, dtype=torch.float64)
    # Queries, keys and values of what lies beyond the map are zero, where it is not a whole number of stripes.
    step_h, step_w = min(rows or height, height), min(cols or width, width)
    padded = [F.pad(x, (0, 0, 0, -width % step_w, 0, -height % step_h)) for x in (query, key, value)]
    expected = torch.zeros_like(padded[0])
    for top in range(0, height, step_h):
        for left in range(0, width, step_w):
            stripe = slice(None), slice(top, top + step_h), slice(left, left + step_w)
            expected[stripe] = attention_in_stripe(branch, *(x[stripe] for x in padded))
    with torch.no_grad():
        torch.testing.assert_close(branch(query, key, value), expected[:, :height, :width])


def test_branches_share_the_channels_in_order():
    torch.manual_seed(0)
    block = timm.create_model(
        "agent_cswin_tiny", embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=0
    ).stage3[0]
    seen = []
    for attn in block.attns:
        attn.register_forward_pre_hook(lambda module, args: seen.append(args))
    x = torch.randn(1, 14, 14, 16)
    block(x)
    query, key, value = block.qkv(block.norm1(x)).chunk(3, -1)
    for i, args in enumerate(seen):
        for actual, whole in zip(args, (query, key, value), strict=True):
            torch.testing.assert_close(actual, whole[..., 8 * i : 8 * i + 8])
    assert len(seen) == 2


def test_an_image_is_padded_to_a_multiple_of_four():
    torch.manual_seed(0)
    model = timm.create_model("agent_cswin_tiny", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)).eval()
    x = torch.randn(1, 3, 61, 66)
    padded = torch.zeros(1, 3, 64, 68)
    padded[:, :, :61, :66] = x
    with torch.inference_mode():
        assert torch.equal(model(x), model(padded))
