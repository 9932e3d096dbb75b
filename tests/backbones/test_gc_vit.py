"""GC ViT against the authors' outputs and timm's models, its published files, and what lifts the limits of its size."""

from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

import zoo  # noqa: F401  (registers the models)
from golden_cases import list_cases, load_case, max_error
from zoo.backbones.gc_vit import (
    ConvEmbed,
    GcVit,
    GlobalContextBlock,
    GlobalQuery,
    WindowAttention,
    stack_windows,
    unstack_windows,
)
from zoo.models import published_top1

DEPTHS = (3, 4, 19, 5)
WINDOWS = (7, 7, 14, 7)
TINY_HEADS, SMALL_HEADS, BASE_HEADS, LARGE_HEADS = (2, 4, 8, 16), (3, 6, 12, 24), (4, 8, 16, 32), (6, 12, 24, 48)
VARIANTS = {  # width, depths, heads, windows, MLP ratio, layer scale, drop path, parameters, crop
    "gc_vit_xxtiny": (64, (2, 2, 6, 2), TINY_HEADS, WINDOWS, 3, None, 0.2, 11_995_428, 1.0),
    "gc_vit_xtiny": (64, (3, 4, 6, 5), TINY_HEADS, WINDOWS, 3, None, 0.2, 19_981_294, 0.875),
    "gc_vit_tiny": (64, DEPTHS, TINY_HEADS, WINDOWS, 3, None, 0.2, 28_221_974, 1.0),
    "gc_vit_tiny2": (64, (3, 4, 29, 5), TINY_HEADS, WINDOWS, 3, None, 0.25, 34_535_654, 0.875),
    "gc_vit_small": (96, DEPTHS, SMALL_HEADS, WINDOWS, 2, 1e-5, 0.3, 51_092_173, 0.875),
    "gc_vit_small2": (96, (3, 4, 23, 5), SMALL_HEADS, WINDOWS, 3, 1e-5, 0.35, 68_615_197, 0.875),
    "gc_vit_base": (128, DEPTHS, BASE_HEADS, WINDOWS, 2, 1e-5, 0.5, 90_320_836, 1.0),
    "gc_vit_large": (192, DEPTHS, LARGE_HEADS, WINDOWS, 2, 1e-5, 0.5, 202_075_570, 1.0),
    "gc_vit_large_224_21k": (192, DEPTHS, LARGE_HEADS, WINDOWS, 2, 1e-5, 0.5, 202_075_570, 1.0),
    "gc_vit_large_384_21k": (192, DEPTHS, LARGE_HEADS, (12, 12, 24, 12), 2, 1e-5, 0.1, 202_860_610, 1.0),
    "gc_vit_large_512_21k": (192, DEPTHS, LARGE_HEADS, (16, 16, 32, 16), 2, 1e-5, 0.1, 203_795_362, 1.0),
}
HUB = "https://huggingface.co/nvidia/GCViT/resolve/main"
URLS = {
    "gc_vit_xxtiny.in1k": f"{HUB}/gcvit_1k_xxtiny.pth.tar",
    "gc_vit_xtiny.in1k": f"{HUB}/gcvit_1k_xtiny.pth.tar",
    "gc_vit_tiny.in1k": f"{HUB}/gcvit_1k_tiny.pth.tar",
    "gc_vit_tiny2.in1k": f"{HUB}/gcvit_1k_tiny2.pth.tar",
    "gc_vit_small.in1k": f"{HUB}/gcvit_1k_small.pth.tar",
    "gc_vit_small2.in1k": f"{HUB}/gcvit_1k_small2.pth.tar",
    "gc_vit_base.in1k": f"{HUB}/gcvit_1k_base.pth.tar",
    "gc_vit_large.in1k": f"{HUB}/gcvit_1k_large.pth.tar",
    "gc_vit_large_224_21k.in21k_ft_in1k": "https://drive.google.com/uc?export=download&confirm=t"
    "&id=1maGDr6mJkLyRTUkspMzCgSlhDzNRFGEf",
    "gc_vit_large_384_21k.in21k_ft_in1k": f"{HUB}/gcvit_21k_large_384.pth.tar",
    "gc_vit_large_512_21k.in21k_ft_in1k": f"{HUB}/gcvit_21k_large_512.pth.tar",
}


def tables(model):
    return {k: v for k, v in model.state_dict().items() if k.endswith("relative_position_bias_table")}


def drawn(name="test_gc_vit", **kwargs):
    """A model whose bias tables show in its output."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for table in tables(model).values():
        torch.nn.init.normal_(table)
    return model


# The authors' outputs


@pytest.mark.parametrize("name", [n for n in list_cases("gcvit") if n.startswith("gc_vit")])
def test_golden_models(name):
    case = load_case("gcvit", name)
    model = timm.create_model(case.call.partition("(")[0]).eval()
    model.load_state_dict(case.state_dict)
    outputs = {}
    for i, level in enumerate(model.levels):
        level.register_forward_hook(lambda m, args, out, i=i: outputs.update({f"stage{i}": out[1].mean((1, 2))}))
    with torch.inference_mode():
        outputs["logits"] = model(case.inputs["x"])
    assert outputs.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected) < 1e-5, key


def as_queries(q_global, side=7):
    """The authors' layout of a global query, [batch, 1, heads, window, head_dim], to ours."""
    return q_global.squeeze(1).transpose(1, 2).unflatten(1, (side, side))


def as_authors(q_global):
    return q_global.flatten(1, 2).transpose(1, 2).unsqueeze(1)


MODULES = {
    "gc_block_global": (
        lambda: GlobalContextBlock(32, 4, 7, use_global=True, mlp_ratio=2, init_values=1e-5),
        lambda block, x, q_global: block(x, as_queries(q_global)),
    ),
    "gc_block_local": (
        lambda: GlobalContextBlock(32, 4, 7, mlp_ratio=3),
        lambda block, x, q_global: block(x, as_queries(q_global)),
    ),
    "gc_patch_embed": (lambda: ConvEmbed(3, 16), lambda embed, x: embed(x)),
    "gc_query_gen": (
        lambda: GlobalQuery(16, 2, 7, num_pools=2),
        lambda gen, x: as_authors(gen(x.permute(0, 2, 3, 1))),
    ),
}


@pytest.mark.parametrize("name", [n for n in list_cases("gcvit") if not n.startswith("gc_vit")])
def test_golden_modules(name):
    case = load_case("gcvit", name)
    make, call = MODULES[name]
    module = make()
    module.load_state_dict(case.state_dict)
    inputs = {key: x.requires_grad_() for key, x in case.inputs.items() if key != "g"}
    y = call(module, *inputs.values())
    y.backward(case.inputs["g"])
    actual = {"y": y.detach()}
    actual |= {f"grad_{key}": x.grad for key, x in (*inputs.items(), *module.named_parameters()) if x.grad is not None}
    assert actual.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(actual[key], expected) < 1e-5, key


# The variants


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    width, depths, heads, windows, mlp_ratio, init_values, drop_path, parameters, crop_pct = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())
    assert tuple(len(level.blocks) for level in model.levels) == depths
    for i, level in enumerate(model.levels):
        pools = [isinstance(step.pool, torch.nn.MaxPool2d) for step in level.q_global_gen.to_q_global]
        assert pools == [[True] * 3, [True] * 2, [False], [False]][i]
        assert level.q_global_gen.window_size == (windows[i], windows[i])
        for j, block in enumerate(level.blocks):
            assert block.attn.use_global == (j % 2 == 1)
            assert block.attn.qkv.in_features == width * 2**i
            assert block.attn.num_heads == heads[i]
            assert block.attn.window_size == (windows[i], windows[i])
            assert block.mlp.fc1.out_features == mlp_ratio * width * 2**i
            assert block.init_values == init_values
            assert block.norm1.eps == 1e-5
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([drop_path * i / (len(rates) - 1) for i in range(len(rates))], abs=1e-6)

    side = 32 * windows[0]
    cfg = model.default_cfg
    assert cfg["input_size"] == (3, side, side) and cfg["pool_size"] == (windows[3], windows[3])
    assert cfg["crop_pct"] == crop_pct and cfg.get("crop_mode", "center") == ("squash" if side > 224 else "center")
    assert cfg["interpolation"] == "bicubic"


def test_published_weights():
    assert {name.partition(".")[0] for name in URLS} == set(VARIANTS)
    for name, url in URLS.items():
        assert get_pretrained_cfg(name).url == url
        assert list(get_arch_pretrained_cfgs(name.partition(".")[0])) == [name]
    assert {name for name in published_top1() if name.startswith("gc_vit")} == URLS.keys()


def test_layer_scale_scales_each_branch():
    torch.manual_seed(0)
    block = GlobalContextBlock(8, 2, 3, use_global=True, init_values=1e-5, dtype=torch.float64)
    assert torch.all(block.gamma1 == 1e-5) and torch.all(block.gamma2 == 1e-5)
    torch.nn.init.normal_(block.gamma1)
    torch.nn.init.normal_(block.gamma2)
    x, q_global = torch.randn(1, 6, 6, 8, dtype=torch.float64), torch.randn(1, 3, 3, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        y = x + block.gamma1 * block.attn(block.norm1(x), q_global)
        torch.testing.assert_close(block(x, q_global), y + block.gamma2 * block.mlp(block.norm2(y)))


# timm's own models of the same paper


def to_timm(state_dict):
    """Our names, the authors', to those of `timm.models.gcvit`."""

    def branch(key):
        names = {".conv.0.": ".conv_dw.", ".conv.2.fc.0.": ".se.fc1.", ".conv.2.fc.2.": ".se.fc2."}
        for ours, theirs in {**names, ".conv.3.": ".conv_pw."}.items():
            key = key.replace(ours, f".conv_block{theirs}" if "down" in key else theirs)
        return key

    mapped = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        if ".se." in branch(key):
            value = value[:, :, None, None]
        if parts[0] == "patch_embed":
            new = branch(key).replace("patch_embed.proj", "stem.conv1").replace("patch_embed.conv_down", "stem.down")
        elif parts[0] == "levels" and parts[2] == "downsample":
            new = branch(key).replace(f"levels.{parts[1]}", f"stages.{int(parts[1]) + 1}")
        elif parts[0] == "levels" and parts[2] == "q_global_gen":
            step = f"stages.{parts[1]}.global_block.blocks.conv{int(parts[4]) + 1}"
            new = step + branch(key)[len(".".join(parts[:5])) :]
        elif parts[0] == "levels":
            new = key.replace("levels", "stages").replace("attn.relative", "attn.rel_pos.relative")
            new = new.replace("gamma1", "ls1.gamma").replace("gamma2", "ls2.gamma")
        else:
            new = f"stages.3.{key}" if parts[0] == "norm" else key.replace("head", "head.fc")
        mapped[new] = value
    return mapped


@pytest.mark.parametrize(("name", "side"), [("xxtiny", 224), ("xxtiny", 256), ("small", 64)])
def test_agrees_with_timm(name, side):
    size = dict(img_size=side, num_classes=10, depths=(2, 2, 2, 2))
    ours, timms = drawn(f"gc_vit_{name}", **size), timm.models.gcvit.GlobalContextVit
    heads = dict(num_heads=TINY_HEADS) if name == "xxtiny" else dict(num_heads=SMALL_HEADS, embed_dim=96, mlp_ratio=2)
    timms = timms(**size, **heads, layer_scale=None if name == "xxtiny" else 1e-5).eval()
    for param_name, param in ours.named_parameters():
        if "gamma" in param_name:
            torch.nn.init.normal_(param)
    timms.load_state_dict(to_timm(ours.state_dict()))
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():  # image by image: timm before 1.0.31 mixes the global queries of a batch
        assert max_error(ours(x), torch.cat([timms(image[None]) for image in x])) < 1e-5


# Published files


@pytest.fixture
def published(tmp_path):
    """A file as timm's trainer writes them, which the authors used: averaged weights beside those of the scores."""
    model = drawn()
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    for key, table in tables(model).items():
        side = int((table.shape[0] ** 0.5 + 1) / 2) ** 2
        index = f"module.{key.replace('bias_table', 'index')}"
        weights[index] = torch.zeros(side, side, dtype=torch.int64)
    averaged = {k: v + 1 for k, v in weights.items()}
    path = tmp_path / "gcvit.pth.tar"
    content = dict(epoch=299, arch="gc_vit", state_dict=weights, state_dict_ema=averaged, version=2, metric=79.9)
    torch.save({**content, "args": Namespace(model="gc_vit", lr=1e-3)}, path)
    return model, averaged, path


def by_url(path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(path.parent))
    cached = path.parent / "hub" / "checkpoints" / path.name
    cached.parent.mkdir(parents=True, exist_ok=True)
    path.rename(cached)  # as if downloaded
    overlay = dict(url=f"https://huggingface.co/nvidia/GCViT/resolve/main/{path.name}")
    return timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay)


def by_drive(path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(path.parent))
    cached = path.parent / "hub" / "checkpoints" / "test_gc_vit.1maGDr.pth"
    cached.parent.mkdir(parents=True)
    path.rename(cached)
    overlay = dict(url="https://drive.google.com/uc?export=download&id=1maGDr")
    return timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay)


def by_overlay(path, monkeypatch):
    return timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def by_state_dict(path, monkeypatch):
    overlay = dict(state_dict=torch.load(path, weights_only=False))
    return timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("road", [by_url, by_drive, by_overlay, by_state_dict])
def test_published_file_loads(published, road, monkeypatch):
    source, _, path = published
    state_dict = road(path, monkeypatch).state_dict()
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, state_dict[key]), key


def test_checkpoint_path_takes_averaged_weights_as_everywhere_in_timm(published):
    _, averaged, path = published
    state_dict = timm.create_model("test_gc_vit", checkpoint_path=str(path)).state_dict()
    for key, tensor in state_dict.items():
        assert torch.equal(tensor, averaged[f"module.{key}"]), key


def test_averaged_weights_alone(published):
    _, averaged, path = published
    torch.save({"state_dict_ema": averaged}, path)
    model = by_overlay(path, None)
    assert torch.equal(model.head.weight, averaged["module.head.weight"])


@pytest.mark.parametrize("kwargs", [dict(num_classes=5), dict(num_classes=0), dict(in_chans=1)], ids=str)
def test_fine_tuning_adapts_head_and_stem(kwargs, published):
    source, _, path = published
    overlay = dict(file=str(path))
    model = timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    assert torch.equal(model.levels[3].blocks[0].attn.qkv.weight, source.levels[3].blocks[0].attn.qkv.weight)
    weight = source.patch_embed.proj.weight
    expected = weight.sum(1, keepdim=True) if "in_chans" in kwargs else weight
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert model(torch.randn(1, kwargs.get("in_chans", 3), 32, 32)).shape == (1, kwargs.get("num_classes", 1000) or 64)


# Sizes


@pytest.mark.parametrize("img_size", [64, 160, (96, 128)])
def test_bias_tables_of_other_windows_are_resized(img_size, published):
    source, _, path = published
    overlay = dict(file=str(path))
    model = timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=img_size)
    for (key, table), old in zip(tables(model).items(), tables(source).values(), strict=True):
        window = model.get_submodule(key.rpartition(".")[0]).window_size
        side = int(old.shape[0] ** 0.5)
        size = 2 * window[0] - 1, 2 * window[1] - 1
        expected = F.interpolate(old.T.reshape(1, -1, side, side), size, mode="bicubic").flatten(2)[0].T
        torch.testing.assert_close(table, expected)


def test_tables_of_a_rectangular_window_load_where_they_fit():
    wide = drawn(img_size=(96, 128))
    loaded = timm.create_model("test_gc_vit", img_size=(96, 128))
    loaded.load_state_dict(wide.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tables(wide).values(), tables(loaded).values(), strict=True))
    with pytest.raises(RuntimeError, match=r"other shapes: levels.*relative_position_bias_table is"):
        timm.create_model("test_gc_vit").load_state_dict(wide.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "windows"),
    [
        (dict(), [(3, 3), (3, 3), (6, 6), (3, 3)]),
        (dict(img_size=240), [(7, 7), (7, 7), (15, 15), (7, 7)]),
        (dict(img_size=(64, 160)), [(2, 5), (2, 5), (4, 10), (2, 5)]),
        (dict(img_size=8), [(1, 1)] * 4),
        (dict(window_ratio=(16, 16, 16, 32)), [(6, 6), (6, 6), (6, 6), (3, 3)]),
        (dict(window_size=(7, (3, 5), 4, 7)), [(7, 7), (3, 5), (4, 4), (7, 7)]),
    ],
    ids=str,
)
def test_windows(kwargs, windows):
    model = drawn(**kwargs)
    assert [level.blocks[1].attn.window_size for level in model.levels] == windows
    assert [level.q_global_gen.window_size for level in model.levels] == windows
    assert model(torch.randn(1, 3, 50, 70)).isfinite().all()


def test_a_map_is_padded_after_the_norm_and_its_padding_attended_to():
    torch.manual_seed(0)
    attn = WindowAttention(8, 2, (3, 4), dtype=torch.float64)
    torch.nn.init.normal_(attn.qkv.bias)  # padding carries it
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    padded = torch.zeros(2, 6, 12, 8, dtype=torch.float64)
    padded[:, :4, :9] = x
    with torch.no_grad():
        out = attn(padded)
        torch.testing.assert_close(attn(x), out[:, :4, :9])
        corner = attn(padded[:, 3:, 8:])  # a window by itself
        torch.testing.assert_close(out[:, 3:, 8:], corner)


def test_global_query_is_resized_to_the_window():
    torch.manual_seed(0)
    gen = GlobalQuery(8, 2, (3, 5), num_pools=1, dtype=torch.float64)
    x = torch.randn(2, 14, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = F.interpolate(gen.to_q_global(x.permute(0, 3, 1, 2)), (3, 5), mode="bicubic")
        torch.testing.assert_close(gen(x), expected.permute(0, 2, 3, 1).reshape(2, 3, 5, 2, 4))


@pytest.mark.parametrize("size", [(96, 96), (64, 80)])
def test_images_do_not_mix_and_a_zero_image_stays_finite(size):
    model = drawn()
    x = torch.randn(3, 3, *size)
    x[1] = 0
    with torch.inference_mode():
        together = model(x)
        apart = torch.cat([model(image[None]) for image in x])
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_every_window_sees_the_whole_image():
    """What a corner says reaches the far corner within one level: through the global query."""
    model = drawn(depths=(2,), num_heads=(1,), window_ratio=(32,))
    x = torch.randn(1, 3, 96, 96, requires_grad=True)
    model.forward_features(x)[0, -1, -1].square().sum().backward()
    assert x.grad[0, :, 0, 0].abs().max() > 0


def test_a_level_of_one_block_has_no_global_query():
    model = drawn(depths=(2, 1), num_heads=(1, 2), window_ratio=(32, 32))
    assert model.levels[0].q_global_gen is not None and model.levels[1].q_global_gen is None
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


# Refusals


def test_head_count_must_divide_width():
    with pytest.raises(ValueError, match="num_heads=3 and dim=8"):
        WindowAttention(8, 3)


@pytest.mark.parametrize(
    "kwargs", [dict(num_heads=(1, 2)), dict(window_ratio=(32, 32)), dict(depths=(2, 2)), dict(window_size=(7, 7))]
)
def test_one_entry_per_level(kwargs):
    with pytest.raises(ValueError, match="one entry per level"):
        GcVit(embed_dim=8, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=(2, 0)), r"depths must have entries, all of at least 1, got \(2, 0\)"),
        (dict(window_ratio=(0, 32)), r"window_ratio must have entries, all of at least 1, got \(0, 32\)"),
        (dict(window_size=(7, 0)), "window_size must be at least 1, got 0"),
    ],
)
def test_levels_of_nothing(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GcVit(device="meta", **{**dict(depths=(1, 1), num_heads=(1, 1), window_ratio=(32, 32)), **kwargs})


def test_global_attention_needs_a_query():
    with pytest.raises(ValueError, match="q_global must be given"):
        WindowAttention(8, 2, 3, use_global=True)(torch.zeros(1, 3, 3, 8))


def test_attention_dropout_is_refused():
    with pytest.raises(TypeError, match="attn_drop_rate"):
        timm.create_model("test_gc_vit", attn_drop_rate=0.1)


def test_dropout_rates_and_layers_reach_the_blocks():
    model = timm.create_model(
        "test_gc_vit",
        drop_rate=0.1,
        proj_drop_rate=0.2,
        drop_path_rate=0.3,
        norm_layer="rmsnorm",
        act_layer=torch.nn.ReLU,
    )
    block = model.levels[-1].blocks[-1]
    assert model.head_drop.p == 0.1
    assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.2
    assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == pytest.approx(0.3)
    assert type(model.norm).__name__ == type(model.levels[0].downsample.norm1).__name__ == "RmsNorm"
    assert isinstance(block.mlp.act, torch.nn.ReLU)
    assert isinstance(model.levels[0].q_global_gen.to_q_global[0].conv[1], torch.nn.ReLU)


@pytest.mark.parametrize("size", [(6, 8), (3, 8), (6, 2), (5, 8)])
def test_windows_are_stacked_and_unstacked(size):
    x = torch.arange(2 * size[0] * size[1] * 3).view(2, *size, 3)
    stacked = stack_windows(x, (3, 2))
    if size == (5, 8):  # left as it is
        assert stacked is x
    else:
        assert stacked.shape == (2, x[0, :, :, 0].numel() // 2, 2, 3)
        assert stacked[:, -3:].equal(x[:, -3:, -2:])
    assert unstack_windows(stacked, *size, (3, 2)).equal(x)


def test_meta_device():
    model = timm.create_model("test_gc_vit", device="meta").eval()
    assert model(torch.zeros(2, 3, 96, 96, device="meta")).shape == (2, 1000)
