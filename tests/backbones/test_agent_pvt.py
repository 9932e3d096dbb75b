"""Agent-PVT: widths, norms and the reduction of keys."""

import timm
import torch

from families import small
from zoo.backbones.agent_pvt import AgentReducedAttention


def test_norms_and_widths():
    model = timm.create_model("agent_pvt_large", device="meta")
    for stage, dim, depth, heads, hidden in zip(
        range(1, 5), (64, 128, 320, 512), (3, 8, 27, 3), (1, 2, 5, 8), (512, 1024, 1280, 2048), strict=True
    ):
        blocks = getattr(model, f"block{stage}")
        assert len(blocks) == depth
        assert getattr(model, f"patch_embed{stage}").norm.eps == 1e-5
        for block in blocks:
            assert block.norm1.eps == block.norm2.eps == 1e-6
            assert block.attn.num_heads == heads
            assert block.mlp.fc1.weight.shape == (hidden, dim)
            assert block.attn.sr is None and block.attn.norm is None
    assert isinstance(model.norm, torch.nn.Identity)


def test_reduction_pads_to_whole_patches():
    torch.manual_seed(0)
    attn = AgentReducedAttention(8, 2, 4, (6, 6), sr_ratio=4)
    assert attn.ah_bias.shape[3] == attn.aw_bias.shape[4] == 2
    x = torch.randn(1, 6, 5, 8)
    padded = torch.zeros(1, 8, 8, 8)
    padded[:, :6, :5] = x
    keys = attn.norm(attn.sr(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert keys.shape == (1, 2, 2, 8)
    key, value = attn.kv(keys).chunk(2, -1)
    local = torch.nn.functional.interpolate(value.permute(0, 3, 1, 2), size=(6, 5), mode="bilinear")
    expected = attn.dwc(attn.attend_map(attn.q(x), key, value), local.permute(0, 2, 3, 1))
    torch.testing.assert_close(attn(x), attn.proj(expected))


def test_reduced_model():
    model = small("agent_pvt_tiny", sr_ratios=(8, 4, 2, 1))
    assert model(torch.randn(2, 3, 40, 72)).shape == (2, 10)
