"""Agent-DeiT: which blocks have agents, and plain attention against timm's."""

import timm
import torch
from timm.layers import Attention

from families import images, small
from zoo.backbones.agent_deit import AgentTokenAttention, TokenAttention


def test_blocks():
    for name, agents, blocks in (("tiny", 49, 12), ("small", 49, 12), ("small_448", 49, 12), ("base", 81, 4)):
        model = timm.create_model(f"agent_deit_{name}", device="meta")
        with_agents = [isinstance(block.attn, AgentTokenAttention) for block in model.blocks]
        assert with_agents == [i < blocks for i in range(12)]
        assert model.blocks[0].attn.an_bias.shape[1] == agents
        assert {norm.eps for norm in (model.blocks[0].norm1, model.blocks[-1].norm2, model.norm)} == {1e-6}


def test_plain_attention_is_timms():
    torch.manual_seed(0)
    ours, theirs = TokenAttention(12, 3), Attention(12, 3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 10, 12)
    torch.testing.assert_close(ours(x, 3, 3), theirs(x))


def test_plain_models_are_timms():
    """Without agents the model is a plain ViT."""
    ours = small("agent_deit_tiny", agent_depth=0, num_classes=10)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=5, num_heads=2, num_classes=10
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images("agent_deit_tiny")
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_maps_of_no_image():
    _, maps = small("agent_deit_tiny").forward_intermediates(torch.zeros(0, 3, 64, 32))
    assert [y.shape for y in maps] == [(0, 32, 4, 2)] * 5


def test_the_class_token_does_not_enter_the_agents(monkeypatch):
    attn = AgentTokenAttention(8, 2, 4, (4, 4))
    pooled = []
    monkeypatch.setattr(attn, "pool", lambda query: pooled.append(query) or AgentTokenAttention.pool(attn, query))
    x = torch.randn(1, 17, 8)
    attn(x, 4, 4)
    torch.testing.assert_close(pooled[0].flatten(1, 2), attn.qkv(x[:, 1:])[..., :8])
