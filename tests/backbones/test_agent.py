"""The Agent Transformers against the authors' outputs, their published files, and maps of any size."""

import datetime
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs

from families import NAMES, images, small
from golden_cases import list_cases, load_case, max_error
from zoo.backbones._agent import AddPosition, AgentAttention
from zoo.backbones.agent_cswin import AgentBranch
from zoo.backbones.agent_deit import AgentTokenAttention
from zoo.backbones.agent_pvt import AgentReducedAttention
from zoo.backbones.agent_swin import AgentMapAttention
from zoo.checkpoints import read_checkpoint
from zoo.errors import UserError
from zoo.kernels.agent.bias import resize_axis
from zoo.models import published_top1

VARIANTS = {  # image, parameters, drop path, resized to a larger square than the crop, link, top-1
    "agent_deit_tiny": (224, 6_015_640, 0.0, True, "57e0904221824ee7b7af", 74.9),
    "agent_deit_small": (224, 22_647_112, 0.1, True, "fdd43304372541db8ea7", 80.5),
    "agent_deit_small_448": (448, 23_070_472, 0.1, True, "a228f86241c445f1969b", 83.1),
    "agent_deit_base": (224, 87_204_904, 0.3, True, "5115f15fdd7e4ab58fbc", 82.0),
    "agent_pvt_tiny": (224, 11_570_352, 0.1, True, "13fdf0e0a7c5498c934f", 78.4),
    "agent_pvt_small": (224, 20_635_066, 0.1, True, "36b8be9a8863456685a3", 82.2),
    "agent_pvt_medium": (224, 35_921_746, 0.3, True, "4d00ecacf18b45f9b88c", 83.4),
    "agent_pvt_medium_256": (256, 36_083_682, 0.3, True, "654df734121643b19c52", 83.8),
    "agent_pvt_large": (224, 48_738_180, 0.3, True, "040cfe0cfbbe4762ad09", 83.7),
    "agent_swin_tiny": (224, 28_902_964, 0.2, True, "a2ddc1190c224f768a41", 82.6),
    "agent_swin_small": (224, 49_666_684, 0.3, True, "f607172c9fea4d6e99bb", 83.7),
    "agent_swin_small_288": (288, 49_707_964, 0.3, False, "09760394e93b4046a25e", 84.1),
    "agent_swin_base": (224, 88_095_096, 0.5, True, "4fcd2d0114bb490483c3", 84.0),
    "agent_swin_base_384": (384, 88_305_016, 0.5, False, "bb84ee9058954706a557", 84.9),
    "agent_cswin_tiny": (224, 20_458_672, 0.2, True, "8c562a74441e46d5902b", 83.1),
    "agent_cswin_small": (224, 32_814_100, 0.4, True, "30eb8af675bc4b7a8747", 83.9),
    "agent_cswin_base": (224, 73_249_696, 0.5, True, "c8035b0839b2410c8c9f", 84.7),
    "agent_cswin_base_384": (384, 73_328_416, 0.7, True, "1239be0df44b47719432", 85.8),
}
STRUCTURES = ["agent_deit_base", "agent_pvt_tiny", "agent_swin_base", "agent_cswin_tiny"]


# The authors' outputs


@pytest.mark.parametrize("name", [name for name in list_cases("agent") if not name.startswith("op_")])
def test_golden(name):
    case = load_case("agent", name)
    model = timm.create_model(name).eval()
    model.load_state_dict(case.state_dict)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(case.inputs["x"])
        outputs = {f"stage{i + 1}": y.mean((2, 3)) for i, y in enumerate(maps)}
        outputs["features"] = model.forward_head(features, pre_logits=True)
        outputs["logits"] = model.forward_head(features)
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected) < 1e-5, key


def by_stripes(module, x):
    """Vertical stripes, seven wide, of queries, keys and values over a 14 x 14 map; each is a map of its own."""
    stripes = [y.view(-1, 14, 2, 7, 64).transpose(1, 2).flatten(0, 1) for y in x]
    return module(*stripes).unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 3)


def on_map(module, x):
    side = round(x.shape[1] ** 0.5)
    return module(x.unflatten(1, (side, side))).flatten(1, 2)


MODULES = {  # of the golden cases: how they are made and called
    "op_agent_attention_cswin_stripe": (lambda **dd: AgentBranch(64, 2, 9, (14, 7), **dd), by_stripes),
    "op_agent_attention_deit": (
        lambda **dd: AgentTokenAttention(64, 2, 9, (10, 10), **dd),
        lambda module, x: module(x, 10, 10),
    ),
    "op_agent_attention_pvt": (lambda **dd: AgentReducedAttention(64, 2, 16, (12, 12), **dd), on_map),
    "op_agent_attention_pvt_sr2": (lambda **dd: AgentReducedAttention(64, 2, 16, (12, 12), 2, **dd), on_map),
    "op_agent_attention_swin": (lambda **dd: AgentMapAttention(64, 2, 16, (14, 14), **dd), on_map),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
@pytest.mark.parametrize("name", MODULES)
def test_golden_attention(name, dtype, tolerance):
    make, call = MODULES[name]
    case = load_case("agent", name)
    module = make(dtype=dtype)
    module.load_state_dict(case.state_dict)
    x = case.inputs["x"].to(dtype).requires_grad_()
    out = call(module, x)
    out.backward(case.inputs["grad_out"].to(dtype))
    outputs = {"out": out.detach(), "grad_x": x.grad}
    outputs |= {f"grad.{key}": param.grad for key, param in module.named_parameters()}
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected.to(dtype)) < tolerance, key


def test_all_golden_attentions_are_tested():
    assert set(MODULES) == {name for name in list_cases("agent") if name.startswith("op_")}


# What is published


def test_all_variants_are_registered():
    assert {name for name in NAMES if name.startswith("agent_")} == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    size, parameters, drop_path, larger_square, link, top1 = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(param.numel() for param in model.parameters()) == parameters
    assert not list(model.buffers())
    rates = [m.drop_prob for key, m in model.named_modules() if key.endswith("drop_path1") and hasattr(m, "drop_prob")]
    assert max(rates, default=0.0) == pytest.approx(drop_path)
    cfg = model.default_cfg
    assert cfg["input_size"] == (3, size, size)
    assert cfg["url"] == f"https://cloud.tsinghua.edu.cn/f/{link}/?dl=1"
    assert list(get_arch_pretrained_cfgs(name)) == [f"{name}.in1k"]
    assert published_top1()[f"{name}.in1k"] == top1

    resize, crop = create_transform(**resolve_model_data_config(model)).transforms[:2]
    assert tuple(resize.size) == ((int(256 / 224 * size),) * 2 if larger_square else (size, size))
    assert tuple(crop.size) == (size, size)


@pytest.fixture
def config():
    """A training configuration: a dict by another name, from a package that is not there when it is read."""

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    sys.modules["yacs"], sys.modules["yacs.config"] = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    sys.modules["yacs.config"].CfgNode = CfgNode
    model = CfgNode(TYPE="agent_swin", DEPTHS=[2, 2, 18, 2])
    config = CfgNode(MODEL=model, BASE_LR=5e-4, TAG=None, AMP=True)
    for node in (model, config):
        node.__dict__.update(
            {"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}, "__new_allowed__": False}
        )
    yield config
    sys.modules.pop("yacs.config", None), sys.modules.pop("yacs", None)


def publish(path, model, config, **extra):
    """A file as the authors' trainer saves it."""
    state_dict = dict(model.state_dict())
    for key in list(state_dict):  # buffers that are made anew from the sizes
        if key.endswith("relative_position_bias_table"):
            state_dict[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
            state_dict[key.replace("attn.relative_position_bias_table", "attn_mask")] = torch.full((4, 49, 49), -100.0)
    optimizer = torch.optim.AdamW(model.parameters())
    content = dict(
        model=state_dict, optimizer=optimizer.state_dict(), lr_scheduler={"base_values": [1e-3]}, max_accuracy=83.7
    )
    torch.save({**content, "epoch": 299, "config": config, **extra}, path)
    sys.modules.pop("yacs.config"), sys.modules.pop("yacs")


def by_url(name, path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(path.parent))
    cached = path.parent / "hub" / "checkpoints" / f"{name}.{VARIANTS[name][4]}.pth"
    cached.parent.mkdir(parents=True)
    path.rename(cached)  # as if downloaded
    return small(name, pretrained=True, num_classes=1000)


def by_overlay(name, path, monkeypatch):
    return small(name, pretrained=True, num_classes=1000, pretrained_cfg_overlay=dict(file=str(path)))


def by_checkpoint_path(name, path, monkeypatch):
    return small(name, num_classes=1000, checkpoint_path=str(path))


def by_state_dict(name, path, monkeypatch):
    model = small(name, num_classes=1000)
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


ROADS = [by_url, by_overlay, by_checkpoint_path, by_state_dict]


@pytest.fixture
def undrawn(monkeypatch):
    """`small` without drawing weights anew after it has loaded them."""
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor: tensor)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_published_file_loads(name, road, config, tmp_path, monkeypatch, undrawn):
    torch.manual_seed(1)
    source = small(name, num_classes=1000)
    publish(tmp_path / "max_acc.pth", source, config)
    model = road(name, tmp_path / "max_acc.pth", monkeypatch)
    expected = source.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert "state_dict" not in model.pretrained_cfg
    assert "yacs" not in sys.modules


def test_weights_are_not_their_moving_average(config, tmp_path, undrawn):
    source = small("agent_cswin_tiny", num_classes=1000)
    path = tmp_path / "max_ema_acc.pth"
    averaged = {key: tensor + 1 for key, tensor in source.state_dict().items()}
    publish(path, source, config, state_dict_ema=averaged, max_accuracy_e=83.8)
    model = by_overlay("agent_cswin_tiny", path, None)
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("road", ROADS)
def test_other_objects_in_a_file_are_refused_and_named(road, config, tmp_path, monkeypatch):
    path = tmp_path / "max_acc.pth"
    publish(path, small("agent_deit_tiny", num_classes=1000), config, elapsed=datetime.timedelta(1))
    with pytest.raises(Exception, match=r"datetime\.timedelta") as error:
        road("agent_deit_tiny", path, monkeypatch)
    if road in (by_url, by_overlay):
        error.match("could not load the weights of agent_deit_tiny from")
        error.match(r"agent_deit_tiny\.57e0904221824ee7b7af\.pth" if road is by_url else str(path))
    if road is not by_url:
        with pytest.raises(UserError, match=r"objects besides weights \(datetime\.timedelta\)"):
            read_checkpoint(path)


def test_a_published_file_is_a_checkpoint_of_the_command_line(config, tmp_path):
    path = tmp_path / "max_acc.pth"
    publish(path, small("agent_deit_tiny"), config)
    checkpoint = read_checkpoint(path)
    expected = dict(MODEL=dict(TYPE="agent_swin", DEPTHS=[2, 2, 18, 2]), BASE_LR=5e-4, TAG=None, AMP=True)
    assert checkpoint["config"] == expected and checkpoint["epoch"] == 299


@pytest.mark.parametrize("kwargs", [dict(num_classes=5), dict(num_classes=0), dict(in_chans=1)], ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_fine_tuning_adapts_head_and_stem(name, kwargs, config, tmp_path, undrawn):
    source = small(name, num_classes=1000)
    path = tmp_path / "max_acc.pth"
    publish(path, source, config)
    overlay = dict(file=str(path))
    model = small(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})
    stem = f"{model.default_cfg['first_conv']}.weight"
    for key, tensor in model.state_dict().items():
        expected = source.state_dict()[key]
        if key == stem and "in_chans" in kwargs:
            torch.testing.assert_close(tensor, expected.sum(1, keepdim=True))
        elif not key.startswith("head."):
            assert torch.equal(tensor, expected), key


# Maps of another size


def stretched(line, size):
    """`line` at `size` points, whose ends are half a step from the borders, as its own points are."""
    out = []
    for i in range(size):
        x = min(max((i + 0.5) * len(line) / size - 0.5, 0.0), len(line) - 1.0)
        low = min(int(x), len(line) - 1)
        high = min(low + 1, len(line) - 1)
        out.append(line[low] * (low + 1 - x) + line[high] * (x - low))
    return torch.stack(out)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (14, 14), (9, 5), (1, 23)])
def test_bias_of_a_map(height, width):
    """A 7x7 table, a line per row and one per column, stretched and summed."""
    torch.manual_seed(0)
    attn = AgentAttention(8, 2, 4, (14, 10), (7, 5), dtype=torch.float64)
    for table in attn.parameters():
        torch.nn.init.normal_(table)
    with torch.no_grad():
        agent_bias = attn.agent_bias(height, width).unflatten(2, (height, width))
        query_bias = attn.query_bias(height, width).unflatten(1, (height, width))
        for head in range(2):
            for agent in range(4):
                rows = torch.stack([stretched(row, width) for row in attn.an_bias[head, agent]])
                expected = torch.stack([stretched(col, height) for col in rows.T], 1)
                expected += stretched(attn.ah_bias[0, head, agent, :, 0], height)[:, None]
                expected += stretched(attn.aw_bias[0, head, agent, 0], width)
                torch.testing.assert_close(agent_bias[head, agent], expected)

                rows = torch.stack([stretched(row, width) for row in attn.na_bias[head, agent]])
                expected = torch.stack([stretched(col, height) for col in rows.T], 1)
                expected += stretched(attn.ha_bias[0, head, :, 0, agent], height)[:, None]
                expected += stretched(attn.wa_bias[0, head, 0, :, agent], width)
                torch.testing.assert_close(query_bias[head, :, :, agent], expected)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (40, 33)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_resizing_weights_and_resizing_as_they_are_used_agree(name, size):
    source = small(name)
    with torch.no_grad():
        for key, param in source.named_parameters():
            if name == "agent_pvt_tiny" and "pos_embed" in key:  # bilinear as they are used, bicubic in a file
                param.zero_()
    model = small(name, img_size=size)
    model.load_state_dict(source.state_dict())
    x = images(name, *size)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("axis", "shape"), [(2, (1, 2, 5, 1, 3)), (3, (1, 2, 3, 5, 1)), (4, (1, 2, 3, 1, 5))])
def test_tables_per_row_and_column_are_resized_linearly(axis, shape):
    table = torch.randn(shape)
    resized = resize_axis(table, axis, 8)
    lines, expected = resized.movedim(axis, -1).reshape(-1, 8), table.movedim(axis, -1).reshape(-1, 5)
    for actual, line in zip(lines, expected, strict=True):
        torch.testing.assert_close(actual, stretched(line, 8))


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny"])
def test_position_embeddings_in_a_file_are_resized_bicubically(name):
    source, model = small(name), small(name, img_size=(96, 64))
    state_dict = source.state_dict()
    model.load_state_dict(state_dict)
    prefix, sizes = (
        (1, {"pos_embed": (4, 4)}) if "deit" in name else (0, {"pos_embed1": (16, 16), "pos_embed4": (2, 2)})
    )
    for key, (height, width) in sizes.items():
        old, new = state_dict[key], getattr(model, key).detach()
        assert torch.equal(new[:, :prefix], old[:, :prefix])
        table = old[:, prefix:].mT.unflatten(2, (height, width))
        expected = F.interpolate(table, size=(height * 3 // 2, width), mode="bicubic").flatten(2).mT
        torch.testing.assert_close(new[:, prefix:], expected)


@pytest.mark.parametrize(
    ("old", "new"), [((64, 64), (32, 128)), ((32, 128), (64, 64)), ((32, 64), (64, 64)), ((32, 128), (128, 32))]
)
@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny"])
def test_position_embeddings_follow_the_map_that_the_tables_are_made_for(name, old, new):
    """Not their number, which is that of other maps too; keys may be of a smaller map."""
    kwargs = dict(depth=1) if "deit" in name else dict(sr_ratios=(8, 4, 2, 1))
    source, model = small(name, img_size=old, **kwargs), small(name, img_size=new, **kwargs)
    stride, prefix, key = (16, 1, "pos_embed") if "deit" in name else (8, 0, "pos_embed2")
    table = getattr(source, key).detach()
    maps = table[:, prefix:].mT.unflatten(2, (old[0] // stride, old[1] // stride))
    expected = F.interpolate(maps, size=(new[0] // stride, new[1] // stride), mode="bicubic").flatten(2).mT
    wrapped = torch.nn.ModuleDict({"model": small(name, img_size=new, **kwargs)})
    model.load_state_dict(source.state_dict())
    wrapped.load_state_dict({f"model.{key}": value for key, value in source.state_dict().items()})
    for loaded in (model, wrapped["model"]):
        torch.testing.assert_close(getattr(loaded, key)[:, prefix:].detach(), expected)
        assert torch.equal(getattr(loaded, key)[:, :prefix], table[:, :prefix])
    again = small(name, img_size=old, **kwargs)
    again.load_state_dict(source.state_dict())
    assert torch.equal(getattr(again, key), table)


def test_position_embeddings_without_tables_are_of_a_square_map():
    source = small("agent_deit_tiny", agent_depth=0)
    model = small("agent_deit_tiny", agent_depth=0, img_size=(96, 64))
    model.load_state_dict(source.state_dict())
    table = source.pos_embed.detach()[:, 1:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(table, size=(6, 4), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), expected)
    wide = small("agent_deit_tiny", agent_depth=0, img_size=(32, 128))
    state_dict = wide.state_dict()
    wide.load_state_dict(state_dict)
    assert torch.equal(wide.pos_embed, state_dict["pos_embed"])


def test_position_embeddings_of_no_square_map_are_refused():
    model = small("agent_deit_tiny")
    state_dict = model.state_dict()
    state_dict["pos_embed"] = torch.zeros(1, 1 + 15, 32)
    with pytest.raises(RuntimeError, match=r"pos_embed is \[1, 16, 32\], the model's \[1, 17, 32\]"):
        model.load_state_dict(state_dict)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_positions_are_added_to_any_map(mode):
    add = AddPosition((3, 5), mode)
    x, table = torch.randn(2, 6, 4, 8), torch.randn(1, 15, 8)
    resized = F.interpolate(table.mT.unflatten(2, (3, 5)), size=(6, 4), mode=mode)
    torch.testing.assert_close(add(x, table), x + resized.permute(0, 2, 3, 1))
    assert torch.equal(add(x[:, :3].repeat(1, 1, 2, 1)[:, :, :5], table)[0, 1, 2], x[0, 1, 2] + table[0, 7])


@pytest.mark.parametrize("name", ["other_agents", "other_heads"])
def test_tables_of_other_agents_or_heads_are_refused(name):
    model = small("agent_swin_tiny")
    state_dict = model.state_dict()
    key = "layers.0.blocks.0.attn.ah_bias"
    table = state_dict[key]
    state_dict[key] = table[:, :, :4] if name == "other_agents" else table.repeat(1, 2, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"layers\.0\.blocks\.0\.attn\.ah_bias is \[1, .*, the model's \[1, 1, 9, "):
        model.load_state_dict(state_dict)


def test_weights_of_another_size_load_inside_another_module():
    source = small("agent_swin_base")
    wrapped = torch.nn.ModuleDict({"model": small("agent_swin_base", img_size=96, window_size=5)})
    state_dict = source.state_dict()
    state_dict["layers.2.blocks.3.attn_mask"] = torch.zeros(4, 49, 49)
    state_dict["layers.2.blocks.3.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    result = wrapped.load_state_dict({f"model.{key}": value for key, value in state_dict.items()})
    assert not result.missing_keys and not result.unexpected_keys


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dim=8, num_heads=3, num_agents=9), "num_heads must divide dim, got num_heads=3 and dim=8"),
        (dict(dim=8, num_heads=0, num_agents=9), "num_heads must divide dim, got num_heads=0 and dim=8"),
        (dict(dim=8, num_heads=2, num_agents=10), "num_agents must be the square of a positive number, got 10"),
        (dict(dim=8, num_heads=2, num_agents=0), "num_agents must be the square of a positive number, got 0"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(**kwargs, query_size=(4, 4))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("agent_swin_tiny", dict(agent_depths=(2, 2)), "must have one entry per stage, 4; agent_depths is"),
        ("agent_pvt_tiny", dict(num_heads=(1, 2, 5)), "must have one entry per stage, 4; num_heads is"),
        ("agent_cswin_tiny", dict(depths=(1, 1, 1)), "must have one entry per stage, 4; depths is"),
        ("agent_cswin_tiny", dict(num_heads=(2, 4, 7, 16)), r"even in stages of stripes, .*, got 7 in \(2, 4, 7, 16\)"),
        ("agent_cswin_tiny", dict(num_heads=(1, 1, 1, 1)), r"even in stages of stripes, .*, got 1 in \(1, 1, 1, 1\)"),
        ("agent_deit_tiny", dict(num_agents=50), "num_agents must be the square of a positive number, got 50"),
        ("agent_deit_tiny", dict(patch_size=0), "patch_size must be at least 1, got 0"),
        ("agent_deit_tiny", dict(num_heads=0, agent_depth=0), "num_heads must divide dim, got num_heads=0 and dim=192"),
        ("agent_pvt_tiny", dict(sr_ratios=(8, 4, 0, 1)), "sr_ratio must be at least 1, got 0"),
        ("agent_swin_tiny", dict(window_size=0), "window_size must be at least 1, got 0"),
    ],
)
def test_refusals_of_models(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device="meta", **kwargs)
