"""What timm expects of a model, for every name that we register; beyond timm's own tests also odd sizes and compilers.

Shapes and metadata are checked at full size on the meta device. Numbers are checked on the same variants with few and
narrow blocks: kernels, dilations and options stay those of the variant.
"""

import copy
import fnmatch
import io

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, FeatureHookNet, GraphExtractNet, group_parameters, model_entrypoint
from timm.models._features import FeatureGetterNet

from zoo.backbones.nat import NeighborhoodBlock

NAMES = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("zoo.backbones.")]
HIERARCHICAL = [name for name in NAMES if "isotropic" not in name and "vitrpb" not in name]
# One of each structure, where a test is slow and the variants of a structure cannot differ in its outcome.
STRUCTURES = ["nat_small", "dinat_tiny", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"]


def small(name, **kwargs):
    """The variant with a few narrow blocks. It has no stochastic depth, so that training is deterministic."""
    if name in HIERARCHICAL:
        size = dict(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8))
    else:
        size = dict(embed_dim=32, depth=4, num_heads=2)
    torch.manual_seed(0)
    model = timm.create_model(name, **{**size, "num_classes": 10, "drop_path_rate": 0.0, **kwargs}).eval()
    if not kwargs.get("features_only"):
        with torch.no_grad():
            for param_name, param in model.named_parameters():
                if param_name.endswith((".rpb", ".gamma1", ".gamma2")):  # visible in the output
                    param.normal_()
    return model


def image(height=64, width=64, batch=2, dtype=None):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_same(actual, expected):
    """Equal but for rounding: matrix products of a copy may differ by the alignment of its memory."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_names():
    assert len(NAMES) == 26
    assert len(HIERARCHICAL) == 20
    assert set(STRUCTURES) <= set(NAMES)


# Full size, on the meta device


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    state_dict = model.state_dict()
    assert model.num_classes == cfg["num_classes"] == state_dict[f"{cfg['classifier']}.weight"].shape[0]
    assert model.in_chans == cfg["input_size"][0] == state_dict[f"{cfg['first_conv']}.weight"].shape[1]
    assert not cfg["fixed_input_size"]
    assert cfg["license"] == "mit" and cfg["origin_url"] and cfg["paper_name"] and cfg["paper_ids"].startswith("arXiv:")
    assert cfg["crop_pct"] == (1.0 if "384" in name else 0.875)

    x = torch.randn(1, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    assert model.output_fmt == "NHWC"
    assert features.shape == (1, *cfg["pool_size"], model.num_features)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    assert model(x).shape == (1, model.num_classes)


@pytest.mark.parametrize("name", NAMES)
def test_without_classifier(name):
    cfg = timm.get_pretrained_cfg(name)
    x = torch.randn(1, *cfg.input_size, device="meta")
    unpooled = (1, *cfg.pool_size)
    model = timm.create_model(name, num_classes=0, device="meta")
    assert model(x).shape == (1, model.num_features)
    model = timm.create_model(name, num_classes=0, global_pool="", device="meta")
    assert model(x).shape == (*unpooled, model.num_features)
    model.reset_classifier(5)
    assert model(x).shape == (*unpooled, 5)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier_keeps_device_dtype_mode_and_frozen_weights(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64).eval().requires_grad_(False)
    model.reset_classifier(0)
    assert not any(param.requires_grad for param in model.parameters())
    model.reset_classifier(2)
    assert model.num_classes == 2
    for param in model.get_classifier().parameters():
        assert param.device.type == "meta" and param.dtype == torch.float64
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_reach_every_tensor(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    for key, tensor in model.state_dict().items():
        assert tensor.device.type == "meta" and tensor.dtype == torch.bfloat16, key


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = timm.create_model(name, device="meta")
    names = {param_name for param_name, _ in model.named_parameters()}
    assert model.no_weight_decay() == {n for n in names if fnmatch.fnmatch(n, "*.attn.rpb")} != set()

    layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layer_of.keys() == names
    # From the image to the classifier, no parameter is in an earlier layer than one used before it.
    order = [layer_of[param_name] for param_name, _ in model.named_parameters()]
    assert order == sorted(order)
    blocks = sum(isinstance(m, NeighborhoodBlock) for m in model.modules())
    assert max(order) == 1 + blocks  # stem, blocks (the last of a stage with what follows it), head

    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    stages = 4 if name in HIERARCHICAL else blocks
    assert len(set(coarse.values())) == 1 + stages + 1


@pytest.mark.parametrize("name", NAMES)
def test_feature_info(name):
    model = timm.create_model(name, features_only=True, device="meta")
    x = torch.randn(1, *model.default_cfg["input_size"], device="meta")
    maps = model(x)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(maps) == len(channels) == (4 if name in HIERARCHICAL else 3)
    if name in HIERARCHICAL:
        assert reductions == [4, 8, 16, 32]
    for y, channel, reduction in zip(maps, channels, reductions, strict=True):
        assert y.shape == (1, channel, x.shape[2] // reduction, x.shape[3] // reduction)


# Few and narrow blocks, with numbers


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter_and_checkpointing_changes_nothing(name):
    x = image()
    gradients = []
    for enable in (False, True):
        model = small(name).train()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing == enable
        out = model(x)
        assert out.shape == (2, 10)
        out.square().mean().backward()
        gradients.append((out, *(param.grad for param in model.parameters())))
    for (param_name, _), without, with_checkpoints in zip(
        [("output", None), *model.named_parameters()], *gradients, strict=True
    ):
        assert without is not None, param_name
        assert torch.isfinite(without).all() and without.abs().max() > 0, param_name
        torch.testing.assert_close(with_checkpoints, without, rtol=1e-5, atol=1e-7, msg=param_name)


def test_checkpointing_recomputes_the_blocks():
    model = small("test_dinat").train()
    calls = []
    model.levels[0].blocks[0].attn.register_forward_hook(lambda *args: calls.append(1))
    model(image()).mean().backward()
    assert len(calls) == 1
    model.set_grad_checkpointing()
    model(image()).mean().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("name", NAMES)
def test_intermediates(name):
    model = small(name)
    x = image()
    last = len(model.feature_info) - 1
    with torch.inference_mode():
        features = model.forward_features(x)
        final, taps = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert len(taps) == last + 1
        for tap, info in zip(taps, model.feature_info, strict=True):
            side = 64 // info["reduction"]
            assert tap.shape == (2, info["num_chs"], side, side)

        final, normed = model.forward_intermediates(x, indices=[last], norm=True, output_fmt="NHWC")
        assert torch.equal(normed[0], features) and torch.equal(final, features)
        for i in range(last + 1):
            for stop_early in (False, True):
                only = model.forward_intermediates(x, indices=[i], stop_early=stop_early, intermediates_only=True)
                assert len(only) == 1 and torch.equal(only[0], taps[i])
        by_count = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(by_count, taps[-2:], strict=True)] == [True, True]
        by_negative = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
        assert torch.equal(by_negative[0], taps[last])


def test_stopping_early_runs_nothing_further():
    model = small("test_dinat")
    model.levels[2] = None  # running it would raise
    assert len(model.forward_intermediates(image(), indices=[0, 1], stop_early=True, intermediates_only=True)) == 2
    with pytest.raises(TypeError):
        model.forward_intermediates(image(), indices=[0, 1], intermediates_only=True)


def test_unknown_output_format():
    with pytest.raises(ValueError, match="NLC"):
        small("test_dinat").forward_intermediates(image(), output_fmt="NLC")


@pytest.mark.parametrize("name", NAMES)
def test_prune(name):
    model = small(name, drop_rate=0.5)
    x = image()
    last = len(model.feature_info) - 1
    with torch.inference_mode():
        taps = model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        assert whole.prune_intermediate_layers([last], prune_head=False) == [last]
        assert_same(whole(x), model(x))
    for i in range(last + 1):
        for prune_norm in (False, True):
            pruned = copy.deepcopy(model)
            take = pruned.prune_intermediate_layers([i], prune_norm=prune_norm)
            assert take == [i]
            final, selected = pruned.forward_intermediates(x, indices=take, norm=not prune_norm)
            assert_same(pruned.forward_features(x), final)
            assert pruned.head_hidden_size == pruned.num_features == model.feature_info[i]["num_chs"]
            if prune_norm or pruned.num_features != model.num_features:
                assert_same(selected[0], taps[i])
                assert_same(final.permute(0, 3, 1, 2), taps[i])
            selected[0].sum().backward()
            assert [n for n, p in pruned.named_parameters() if p.grad is None] == []  # nothing unused is left
            pruned.reset_classifier(7, "avg")
            assert pruned(x).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = small(name)
    x = image()
    with torch.inference_mode():
        taps = model.forward_intermediates(x, intermediates_only=True)
        for out_indices in ((0, 2), (3,), (-1,)):
            features = small(name, features_only=True, out_indices=out_indices)
            missing, _ = features.model.load_state_dict(
                {k: v for k, v in model.state_dict().items() if k in features.model.state_dict()}
            )
            assert not missing
            maps = features(x)
            assert_same(maps, [taps[i] for i in out_indices])
            assert features.feature_info.channels() == [y.shape[1] for y in maps]


@pytest.mark.parametrize("name", STRUCTURES)
def test_feature_extractors_agree(name):
    model = small(name)
    x = image()
    with torch.inference_mode():
        expected = model.forward_intermediates(x, indices=[0, 1], output_fmt="NHWC", intermediates_only=True)
        graph = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, 1), output_fmt="NHWC")
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1), output_fmt="NHWC")
        for extractor in (graph, getter):
            assert_same(extractor(x), expected)

    hooks = small(name, features_only=True, feature_cls="hook", out_indices=(0, 1))
    hooks.set_grad_checkpointing(True)
    maps = hooks.train()(x)
    assert [y.shape for y in maps] == [y.shape for y in expected]
    assert isinstance(hooks, FeatureHookNet)


@pytest.mark.parametrize("name", NAMES)
def test_fx_is_bitwise_equal(name):
    model = small(name)
    x = image()
    node = timm.models.get_graph_node_names(model)[1][-1]
    with torch.inference_mode():
        assert torch.equal(GraphExtractNet(model, [node])(x), model(x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_fx_backward(name):
    model = small(name)
    graph = GraphExtractNet(model, [timm.models.get_graph_node_names(model)[1][-1]])
    graph(image()).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", STRUCTURES)
def test_torchscript(name):
    model = small(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in ((64, 64), (50, 70)):
        x = image(*size)
        with torch.inference_mode():
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", STRUCTURES)
def test_torchscript_of_features(name):
    getter = small(name, features_only=True, out_indices=(0, 2))
    x = image()
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(getter)(x), getter(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(97, 61), (32, 80), (9, 5), (1, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_input_size(name, size):
    model = small(name)
    x = image(*size)
    with torch.inference_mode():
        out = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert out.shape == (2, 10) and torch.isfinite(out).all()
    for y, info in zip(maps, model.feature_info, strict=True):
        assert y.shape[2:] == (-(-size[0] // info["reduction"]), -(-size[1] // info["reduction"]))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    model = small(name)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(image(dtype=torch.float64))
        cast = copy.deepcopy(model).to(dtype)(image(dtype=dtype))
        with torch.autocast("cpu", dtype=dtype):
            autocast = model(image())
    tolerance = 0.05 * exact.abs().max().item()
    for out in (cast, autocast):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", STRUCTURES)
def test_input_channels(name, in_chans):
    model = small(name, in_chans=in_chans)
    with torch.inference_mode():
        assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_pooling(pool):
    model = small("test_dinat", global_pool=pool)
    x = image()
    with torch.inference_mode():
        features = model.forward_features(x)
        avg, largest = features.mean((1, 2)), features.amax((1, 2))
        expected = dict(
            avg=avg, max=largest, avgmax=(avg + largest) / 2, catavgmax=torch.cat([avg, largest], 1)
        )[pool]  # fmt: skip
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        assert model.head_hidden_size == expected.shape[1]
        model.reset_classifier(3)  # keeps the pooling
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", STRUCTURES)
def test_init_weights_fills_a_model_made_on_the_meta_device(name):
    model = small(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), key
    with torch.inference_mode():
        assert torch.isfinite(model(image())).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_compile_without_graph_breaks(name):
    torch.compiler.reset()
    model = small(name, **(dict(depths=(2, 1, 1, 1)) if name in HIERARCHICAL else dict(depth=2)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image()
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected_grads = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    actual_grads = torch.autograd.grad(actual.square().mean(), list(model.parameters()))
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-3, atol=1e-6)


def test_compile_with_inductor():
    torch.compiler.reset()
    model = small("test_dinat", depths=(2,), num_heads=(2,), dilations=((1, 8),))
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(image()), model(image()), rtol=1e-4, atol=1e-5)


def test_compile_under_checkpointing():
    torch.compiler.reset()
    model = small("test_dinat").train()
    expected = model(image())
    model.set_grad_checkpointing()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(image())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_export_with_any_batch_size(name):
    model = small(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
    x = image(batch=3)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_deepcopy_and_pickle():
    model = small("test_dinat")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = image()
    with torch.inference_mode():
        assert_same(loaded(x), model(x))
        assert_same(copy.deepcopy(model)(x), model(x))
