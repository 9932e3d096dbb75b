"""BiFormer against the authors' outputs and gradients, its attention against the definition, and its files."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

import zoo  # noqa: F401  (registers the models)
from golden_cases import list_cases, load_case, max_error
from zoo.backbones.biformer import BiFormer, BiFormerBlock, FullAttention, RoutingAttention, RoutingAttention2d

VARIANTS = {  # parameters, width, depths, MLP ratio, drop path, top-1
    "biformer_tiny": (13_142_760, 64, (2, 2, 8, 2), 3, 0.1),
    "biformer_small": (25_536_232, 64, (4, 4, 18, 4), 3, 0.15),
    "biformer_base": (56_804_968, 96, (4, 4, 18, 4), 3, 0.4),
    "biformer_stl": (28_372_552, 96, (2, 2, 6, 2), 4, 0.1),
    "biformer_stl_nchw": (28_372_552, 96, (2, 2, 6, 2), 4, 0.1),
}
MODULES = {
    "bra_legacy": lambda: RoutingAttention(32, 4, n_win=7, topk=4),
    "bra_legacy_autopad": lambda: RoutingAttention(32, 4, n_win=7, topk=4),
    "bra_nchw": lambda: RoutingAttention2d(32, 4, n_win=7, topk=4),
    "block_bra": lambda: BiFormerBlock(64, 2, n_win=7, topk=4, mlp_ratio=3),
    "block_lepe": lambda: BiFormerBlock(64, 8, topk=None, mlp_ratio=3),
}
MODELS = [name for name in list_cases("biformer") if name not in MODULES]


def small(name, **kwargs):
    size = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=10, drop_path_rate=0.0)
    torch.manual_seed(0)
    return timm.create_model(name, **{**size, **kwargs}).eval()


# Against the authors


@pytest.mark.parametrize("name", MODELS)
def test_golden_model(name):
    case = load_case("biformer", name)
    model = timm.create_model(case.call.partition("(")[0]).eval()
    model.load_state_dict(case.state_dict)
    outputs = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda m, args, out, i=i: outputs.update({f"stage{i}": out.mean((2, 3))}))
    with torch.inference_mode():
        outputs["logits"] = model(case.inputs["x"])
    assert outputs.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected) < 1e-5, key


@pytest.mark.parametrize("name", MODULES)
def test_golden_module_and_its_gradients(name):
    case = load_case("biformer", name)
    module = MODULES[name]()
    module.load_state_dict(case.state_dict)
    x = case.inputs["x"].requires_grad_()
    outputs = {"y": module(x)}
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(outputs["y"], (x, *parameters.values()), case.inputs["g"])
    outputs |= dict(zip(("grad_x", *(f"grad_{key}" for key in parameters)), grads, strict=True))
    assert outputs.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(outputs[key], expected) < 1e-5, key


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    parameters, width, depths, mlp_ratio, drop_path = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    assert sum(param.numel() for param in model.parameters()) == parameters
    blocks = [[m for m in stage.modules() if isinstance(m, BiFormerBlock)] for stage in model.stages]
    assert tuple(map(len, blocks)) == depths
    for i, stage in enumerate(blocks):
        for block in stage:
            assert block.mlp[0].weight.shape[:2] == (mlp_ratio * width * 2**i, width * 2**i)
            if i == 3:
                assert block.attn.num_heads == 8
            else:
                assert block.attn.num_heads == width * 2**i // 32
                assert block.attn.topk == 4**i
                assert block.attn.n_win == 7
                assert block.attn.scale == (width * 2**i) ** -0.5
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in blocks for block in stage]
    assert rates == pytest.approx([drop_path * i / (len(rates) - 1) for i in range(len(rates))], abs=1e-6)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_the_number_of_regions_is_free(name):
    seven, eight = (timm.create_model(name, device="meta", n_win=n).state_dict() for n in (7, 8))
    assert {key: value.shape for key, value in seven.items()} == {key: value.shape for key, value in eight.items()}


# Sizes


def attention_by_definition(attn, x):
    """One region at a time, from the description in the paper and of the authors' padding. `x` is channels last."""
    if isinstance(attn, RoutingAttention):
        x = F.pad(x, (0, 0, 0, -x.shape[2] % attn.n_win, 0, -x.shape[1] % attn.n_win))
        weight, bias, out = attn.qkv.qkv.weight, attn.qkv.qkv.bias, attn.wo
        rows, cols = x.shape[1] // attn.n_win, x.shape[2] // attn.n_win
    else:
        weight, bias, out = attn.qkv_linear.weight[:, :, 0, 0], attn.qkv_linear.bias, attn.output_linear
        rows, cols = max(1, x.shape[1] // attn.n_win), max(1, x.shape[2] // attn.n_win)
    query, key, value = F.linear(x, weight, bias).chunk(3, -1)
    regions = [
        (slice(y, y + rows), slice(z, z + cols)) for y in range(0, x.shape[1], rows) for z in range(0, x.shape[2], cols)
    ]
    result = torch.zeros_like(query)
    for b in range(x.shape[0]):
        q_means, k_means = (torch.stack([y[b][r].mean((0, 1)) for r in regions]) for y in (query, key))
        best = (q_means @ k_means.mT).topk(min(attn.topk, len(regions))).indices
        for region, chosen in zip(regions, best, strict=True):
            q = query[b][region].flatten(0, 1)
            filling = (0, 0, 0, rows * cols)  # at most so many zeros, cut to fill the region
            k, v = (
                torch.cat([F.pad(y[b][regions[i]].flatten(0, 1), filling)[: rows * cols] for i in chosen])
                for y in (key, value)
            )
            q, k, v = (y.unflatten(1, (attn.num_heads, -1)).transpose(0, 1) for y in (q, k, v))
            tokens = (q @ k.mT * x.shape[-1] ** -0.5).softmax(-1) @ v
            result[b][region] = tokens.transpose(0, 1).reshape(result[b][region].shape)
    lepe = F.conv2d(value.permute(0, 3, 1, 2), attn.lepe.weight, attn.lepe.bias, padding=2, groups=x.shape[-1])
    result = result.permute(0, 3, 1, 2) + lepe
    return out(result.permute(0, 2, 3, 1)) if isinstance(attn, RoutingAttention) else out(result).permute(0, 2, 3, 1)


@pytest.mark.parametrize("n_win", [3, 4])
@pytest.mark.parametrize("size", [(12, 24), (13, 15), (3, 20), (2, 3), (1, 1)])
@pytest.mark.parametrize("attention", [RoutingAttention, RoutingAttention2d])
def test_attention_is_its_definition(attention, size, n_win):
    torch.manual_seed(0)
    attn = attention(8, 2, n_win=n_win, topk=5, dtype=torch.float64)
    torch.nn.init.normal_(attn.get_parameter("qkv.qkv.bias" if attention is RoutingAttention else "qkv_linear.bias"))
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    with torch.no_grad():
        if attention is RoutingAttention:
            actual, expected = attn(x), attention_by_definition(attn, x)[:, : size[0], : size[1]]
        else:
            actual, expected = attn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), attention_by_definition(attn, x)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_both_attentions_agree_where_nothing_is_padded():
    torch.manual_seed(0)
    last, first = RoutingAttention(16, 2, n_win=3, topk=2), RoutingAttention2d(16, 2, n_win=3, topk=2)
    entries = [value for _, value in sorted(last.state_dict().items())]  # lepe, qkv, wo
    names = ["lepe.bias", "lepe.weight", "qkv_linear.bias", "qkv_linear.weight", "output_linear.bias"]
    names.append("output_linear.weight")
    shapes = first.state_dict()
    first.load_state_dict({name: x.view(shapes[name].shape) for name, x in zip(names, entries, strict=True)})
    x = torch.randn(2, 12, 9, 16)
    with torch.inference_mode():
        torch.testing.assert_close(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), last(x))


@pytest.mark.parametrize("size", [(97, 61), (200, 176), (9, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_any_input_size(name, size):
    """Convolutions of 3x3 round sides up, patches round down but to nothing."""
    model = small(name)
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        out = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert out.shape == (2, 10) and torch.isfinite(out).all()
    for i, y in enumerate(maps):
        reduction = 4 * 2**i
        up, down = ([-(-side // reduction) for side in size], [max(1, side // reduction) for side in size])
        assert y.shape == (2, 32 * 2**i, *(up if name == "biformer_tiny" else down))


def test_more_regions_than_published():
    """Segmentation takes 8 and detection 16 regions a side, and maps that they do not divide."""
    x = torch.randn(1, 3, 160, 224)
    outputs = []
    for n_win in (7, 8, 16):
        with torch.inference_mode():
            outputs.append(small("biformer_tiny", n_win=n_win)(x))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


# Files


def published(name, tmp_path):
    model = small(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    path = tmp_path / f"{name}_in1k.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, path


def by_overlay(name, path, **kwargs):
    return small(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10), **kwargs)


def by_state_dict(name, path, **kwargs):
    overlay = dict(state_dict=torch.load(path), num_classes=10)
    return small(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def by_checkpoint_path(name, path, **kwargs):
    return small(name, checkpoint_path=str(path), **kwargs)


@pytest.mark.parametrize("road", [by_overlay, by_state_dict, by_checkpoint_path])
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_published_file_loads(name, road, tmp_path):
    model, path = published(name, tmp_path)
    loaded = road(name, path, n_win=8)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_fine_tuning_and_features_load_a_published_file(tmp_path):
    model, path = published("biformer_tiny", tmp_path)
    tuned = by_overlay("biformer_tiny", path, num_classes=3, in_chans=1)
    assert tuned(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    weight = model.downsample_layers[0][0].weight
    torch.testing.assert_close(tuned.downsample_layers[0][0].weight, weight.sum(1, keepdim=True))
    features = by_overlay("biformer_tiny", path, features_only=True)
    assert torch.equal(features.model.stages[3][0].attn.qkv.weight, model.stages[3][0].attn.qkv.weight)


def test_files_without_batch_counters_load():
    model = small("biformer_tiny")
    state_dict = {key: value + 1 for key, value in model.state_dict().items() if value.is_floating_point()}
    other = small("biformer_tiny")
    other.load_state_dict(state_dict)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in state_dict.items())
    del state_dict["norm.running_mean"]
    with pytest.raises(RuntimeError, match=r"missing: norm\.running_mean"):
        copy.deepcopy(other).load_state_dict(state_dict)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_dead_links(name):
    cfg = get_pretrained_cfg(name)
    assert list(get_arch_pretrained_cfgs(name)) == [f"{name}.in1k"]
    assert not cfg.has_weights
    with pytest.raises(RuntimeError, match=rf"no weights to load for {name}: .*{name}_in1k\.pth is dead") as error:
        small(name, pretrained=True)
    error.match(r"pretrained_cfg_overlay=dict\(file=PATH\), or checkpoint_path=PATH")


@pytest.mark.parametrize("wrap", [lambda sd: {"model": sd}, lambda sd: {"state_dict_ema": sd}], ids=["model", "ema"])
def test_weights_are_found_in_what_trainers_save(wrap):
    source = small("biformer_tiny")
    content = wrap({f"module.{key}": value for key, value in source.state_dict().items()})
    overlay = dict(state_dict=content, num_classes=10)
    model = small("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


# Arguments


@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(0, 64), (64, 0)])
def test_images_without_a_side(name, size):
    with pytest.raises(ValueError, match=r"x must have a height and a width of at least 1, got shape \[2, 3, "):
        small(name)(torch.zeros(2, 3, *size))


REFUSALS = {
    "entries": (dict(num_heads=(1, 2)), "one entry per stage"),
    "regions": (dict(n_win=0), "n_win must be an int of at least 1, got 0"),
    "regions by axis": (dict(n_win=(7, 7)), r"n_win must be an int of at least 1, got \(7, 7\)"),
    "topk": (dict(topks=(1, 4, 0, None)), r"topks must be at least 1, or None for full attention, got \(1, 4, 0"),
    "heads": (dict(num_heads=(3, 2, 4, 8)), "num_heads must divide dim, got num_heads=3 and dim=64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    kwargs, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        BiFormer(device="meta", **kwargs)
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        FullAttention(8, 3)


def test_a_zero_map_stays_finite_and_images_do_not_mix():
    torch.manual_seed(0)
    model = timm.create_model("test_biformer").eval()
    x = torch.randn(3, 3, 64, 80)
    x[1] = 0
    with torch.inference_mode():
        together = model(x)
        apart = torch.cat([model(image[None]) for image in x])
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_test_biformer_is_small_and_divides_its_maps():
    model = timm.create_model("test_biformer")
    assert sum(p.numel() for p in model.parameters()) < 500_000
    sizes = [96 // 4, 96 // 8, 96 // 16]
    assert all(size % stage[0].attn.n_win == 0 for size, stage in zip(sizes, model.stages))
    assert model.default_cfg["input_size"] == (3, 96, 96)
