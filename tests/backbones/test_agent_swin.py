"""Agent-Swin: plain blocks against timm's Swin, which blocks have agents, and maps that are no whole windows."""

import pytest
import timm
import torch

from families import images, small
from zoo.backbones.agent_swin import AgentMapAttention, ShiftedWindowAttention

BLOCKS = {  # stage by stage: A with agents, W in windows, S in shifted windows
    "agent_swin_tiny": ("AA", "AA", "AAAAAA", "WS"),
    "agent_swin_small": ("AA", "AA", "WS" * 9, "WS"),
    "agent_swin_small_288": ("AA", "AA", "WS" * 9, "WS"),
    "agent_swin_base": ("AA", "AA", "AA" + "WS" * 8, "WS"),
    "agent_swin_base_384": ("AA", "AA", "AA" + "WS" * 8, "WS"),
}
WINDOWS = {"agent_swin_small_288": 9, "agent_swin_base_384": 12}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    model = timm.create_model(name, device="meta")
    window = WINDOWS.get(name, 7)
    for stage, expected, agents in zip(model.layers, BLOCKS[name], (9, 16, 49, 49), strict=True):
        letters = ""
        for block in stage.blocks:
            if isinstance(block.attn, AgentMapAttention):
                assert block.attn.an_bias.shape[1] == agents
                letters += "A"
            else:
                assert block.attn.window_size == (window, window)
                assert block.attn.shift in (0, window // 2)
                letters += "S" if block.attn.shift else "W"
        assert letters == expected


def test_without_agents_the_model_is_swin():
    """At 224 the windows of the first three stages are shifted, those of the last are the map."""
    torch.manual_seed(0)
    size = dict(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), num_classes=5)
    ours = timm.create_model("agent_swin_tiny", agent_depths=(0, 0, 0, 0), **size).eval()
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **size).eval()
    state_dict = ours.state_dict()
    for key, tensor in state_dict.items():
        if "bias_table" in key:
            tensor.normal_()
    published = {}
    for key, tensor in state_dict.items():  # timm counts a downsampler to the stage behind it
        if ".downsample." in key:
            key = f"layers.{int(key[7]) + 1}{key[8:]}"
        published[key.replace("head.", "head.fc.")] = tensor
    theirs.load_state_dict(published)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def attention_by_definition(attn, x, window, shift):
    """Every query against every key of its window, with the published table, whose offsets are of query from key."""
    _, height, width, _ = x.shape
    query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    side = 2 * attn.window_size[0] - 1
    out = torch.zeros_like(query)
    places = [(i, j) for i in range(height) for j in range(width)]
    for i, j in places:
        cell = (i - shift[0]) // window[0], (j - shift[1]) // window[1]
        seen = [(y, z) for y, z in places if ((y - shift[0]) // window[0], (z - shift[1]) // window[1]) == cell]
        rows = [(i - y + side // 2) * side + j - z + side // 2 for y, z in seen]
        ys, zs = zip(*seen, strict=True)
        logits = torch.einsum("bhd,bkhd->bhk", query[:, i, j], key[:, ys, zs]) * attn.scale
        weights = (logits + attn.relative_position_bias_table[rows].T).softmax(-1)
        out[:, i, j] = torch.einsum("bhk,bkhd->bhd", weights, value[:, ys, zs])
    return attn.proj(out.flatten(3))


@pytest.mark.parametrize(
    ("height", "width", "shift"),
    [
        pytest.param(8, 12, 0, id="plain"),
        pytest.param(8, 12, 2, id="shifted"),
        pytest.param(4, 8, 2, id="shifted-along-one-axis"),
        pytest.param(3, 2, 2, id="smaller-than-a-window"),
        pytest.param(4, 1, 0, id="one-column"),
    ],
)
def test_windows_are_their_definition(height, width, shift):
    torch.manual_seed(0)
    attn = ShiftedWindowAttention(8, 2, 4, shift, dtype=torch.float64)
    torch.nn.init.normal_(attn.relative_position_bias_table)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    window = min(height, 4), min(width, 4)
    shifts = shift if height > 4 else 0, shift if width > 4 else 0
    with torch.no_grad():
        torch.testing.assert_close(attn(x), attention_by_definition(attn, x, window, shifts))


def test_a_map_is_padded_to_whole_windows():
    torch.manual_seed(0)
    attn = ShiftedWindowAttention(8, 2, 4, 2)
    x = torch.randn(2, 6, 9, 8)
    padded = torch.zeros(2, 8, 12, 8)
    padded[:, :6, :9] = x
    torch.testing.assert_close(attn(x), attn(padded)[:, :6, :9])


def test_tables_of_another_window_are_resized():
    seven, nine = small("agent_swin_base"), small("agent_swin_base", window_size=9)
    nine.load_state_dict(seven.state_dict())
    old, new = (model.layers[3].blocks[0].attn.relative_position_bias_table for model in (seven, nine))
    old = old.T.unflatten(1, (13, 13))[None]
    expected = torch.nn.functional.interpolate(old, size=(17, 17), mode="bicubic")[0]
    torch.testing.assert_close(new.T.unflatten(1, (17, 17)), expected)
    assert nine(images("agent_swin_base")).shape == (2, 10)
