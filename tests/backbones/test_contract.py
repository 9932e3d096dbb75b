"""What timm expects of a model, for every name that we register; beyond timm's own tests also odd sizes and compilers.

Metadata are checked at full width on the meta device, for every name. Numbers are checked on variants with few narrow
blocks; where that takes long, on one variant of each structure. `families` says what is particular to a family.
"""

import copy
import fnmatch
import io

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, FeatureHookNet, GraphExtractNet, group_parameters
from timm.models._features import FeatureGetterNet
from torch import nn

from families import FAMILIES, NAMES, STRUCTURES, family_of, images, module_of, small

SCRIPTED = [name for name in STRUCTURES if family_of(name).torchscript]


def assert_same(actual, expected):
    """Equal but for rounding: matrix products of a copy may differ by the alignment of its memory."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def layout(model, height, width, batch=1):
    """Shape of the final map of that size."""
    if model.output_fmt == "NLC":
        return batch, model.num_prefix_tokens + height * width, model.num_features
    return (batch, height, width, model.num_features) if model.output_fmt == "NHWC" else (
        batch, model.num_features, height, width
    )  # fmt: skip


def like_taps(y, model, tap):
    """The final map `y` laid out as `tap`, a map on the way: channels first, without prefix tokens."""
    if model.output_fmt == "NLC":
        return y[:, model.num_prefix_tokens :].mT.reshape(tap.shape)
    return y.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else y


def test_families():
    assert {module_of(name) for name in NAMES} == {f"zoo.backbones.{family}" for family in FAMILIES}
    for key, family in FAMILIES.items():
        names = [name for name in NAMES if module_of(name) == f"zoo.backbones.{key}"]
        assert len(names) == family.count and set(family.structures) <= set(names), key


# Full width and resolution, on the meta device


def wide(name, **kwargs):
    """The variant with few blocks: what is checked here does not hang on how often a stage repeats them."""
    few = {key: value for key, value in family_of(name).size.items() if key in ("depth", "depths")}
    return timm.create_model(name, device="meta", **few, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = wide(name)
    cfg = model.default_cfg
    state_dict = model.state_dict()
    assert model.num_classes == cfg["num_classes"] == state_dict[f"{cfg['classifier']}.weight"].shape[0]
    assert model.in_chans == cfg["input_size"][0] == state_dict[f"{cfg['first_conv']}.weight"].shape[1]
    assert cfg["fixed_input_size"] == family_of(name).fixed_input_size
    assert cfg["license"] == family_of(name).license
    assert cfg["origin_url"] and cfg["paper_name"] and cfg["paper_ids"].startswith("arXiv:")

    features = model.forward_features(torch.randn(1, *cfg["input_size"], device="meta"))
    assert model.output_fmt == family_of(name).output_fmt
    assert features.shape == layout(model, *cfg["pool_size"])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    assert model.forward_head(features).shape == (1, model.num_classes)


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_reach_every_tensor_and_a_new_classifier(name):
    """It also keeps the mode, and what is frozen."""
    model = wide(name, dtype=torch.float64).eval().requires_grad_(False)
    for key, tensor in model.state_dict().items():
        assert tensor.device.type == "meta", key
        assert tensor.dtype == torch.float64 or not tensor.is_floating_point(), key
    model.reset_classifier(0)
    assert not any(param.requires_grad for param in model.parameters())
    model.reset_classifier(2)
    assert model.num_classes == 2
    for param in model.get_classifier().parameters():
        assert param.device.type == "meta" and param.dtype == torch.float64
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        wide(name, not_an_argument=1)


# Few and narrow blocks, with numbers


@pytest.mark.parametrize("name", NAMES)
def test_without_classifier(name):
    model = small(name, num_classes=0)
    x = images(name)
    assert model(x).shape == (2, model.num_features)
    model = small(name, num_classes=0, global_pool="")
    features = model.forward_features(x)
    assert model(x).shape == features.shape
    model.reset_classifier(5)
    axis = 1 if model.output_fmt == "NCHW" else -1
    assert features.shape[axis] == model.num_features
    if model.output_fmt != "NCHW":  # torch's linear layers take channels last
        assert model(x).shape == (*features.shape[:-1], 5)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def parameters_in_order_of_use(model, x):
    """Names of the parameters, but those of the model itself, in the order in which a pass reaches their modules.

    Modules that only hold parameters, and are not called, count as part of the one that they are in.
    """
    called = []
    for module_name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=module_name: called.append(name))
    model(x)
    owned = {}
    for param_name, _ in model.named_parameters():
        owner = param_name.rpartition(".")[0]
        while owner not in called:
            owner = owner.rpartition(".")[0]
        owned.setdefault(owner, []).append(param_name)
    return [param_name for module_name in called[1:] for param_name in owned.get(module_name, [])]


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model, family = small(name), family_of(name)
    names = {param_name for param_name, _ in model.named_parameters()}
    no_decay = {n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in family.no_decay)}
    assert model.no_weight_decay() == no_decay and bool(no_decay) == bool(family.no_decay)

    layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layer_of.keys() == names
    blocks = sum(isinstance(m, family.block) for m in model.modules())
    assert max(layer_of.values()) == 1 + blocks  # stem, blocks (the last of a stage with what follows it), head
    # From the image to the classifier, no parameter is in an earlier layer than one used before it.
    used = parameters_in_order_of_use(model, images(name))
    assert sorted(used) == sorted(n for n in names if "." in n)
    order = [layer_of[param_name] for param_name in used]
    assert order == sorted(order)

    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    stages = blocks if family.reductions is None else len(family.reductions)
    assert len(set(coarse.values())) == 1 + stages + 1


@pytest.mark.parametrize("name", NAMES)
def test_feature_info(name):
    model, reductions = small(name, features_only=True), family_of(name).reductions
    x = images(name)
    maps = model(x)
    if reductions is None:
        reductions = 3 * [model.feature_info.reduction()[0]]
    assert model.feature_info.reduction() == list(reductions)
    for y, channels, reduction in zip(maps, model.feature_info.channels(), reductions, strict=True):
        assert y.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter_and_checkpointing_changes_nothing(name):
    x = images(name)
    gradients = []
    for enable in (False, True):
        model = small(name).train()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing == enable
        features = model.forward_features(x)
        out = model.forward_head(features)
        assert out.shape == (2, 10)
        # Every token counts: where a class token is pooled, no other enters the logits behind the last attention.
        weights = torch.linspace(-1, 1, features.numel()).view(features.shape)
        (out.square().mean() + (weights * features).mean()).backward()
        gradients.append((out, *(param.grad for param in model.parameters())))
    for (param_name, _), without, with_checkpoints in zip(
        [("output", None), *model.named_parameters()], *gradients, strict=True
    ):
        assert without is not None, param_name
        assert torch.isfinite(without).all() and without.abs().max() > 0, param_name
        torch.testing.assert_close(with_checkpoints, without, rtol=1e-5, atol=1e-7, msg=param_name)


@pytest.mark.parametrize("name", STRUCTURES)
def test_checkpointing_recomputes_the_blocks(name):
    model = small(name).train()
    calls = []
    block = next(module for module in model.modules() if isinstance(module, family_of(name).block))
    next(block.children()).register_forward_hook(lambda *args: calls.append(1))
    model(images(name)).mean().backward()
    assert len(calls) == 1
    model.set_grad_checkpointing()
    model(images(name)).mean().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("name", STRUCTURES)
def test_intermediates(name):
    model = small(name)
    x = images(name)
    last = len(model.feature_info) - 1
    with torch.inference_mode():
        features = model.forward_features(x)
        final, taps = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert len(taps) == last + 1
        for tap, info in zip(taps, model.feature_info, strict=True):
            side = family_of(name).side // info["reduction"]
            assert tap.shape == (2, info["num_chs"], side, side)

        final, normed = model.forward_intermediates(x, indices=[last], norm=True)
        assert torch.equal(normed[0], like_taps(features, model, normed[0])) and torch.equal(final, features)
        for i in range(last + 1):
            for stop_early in (False, True):
                only = model.forward_intermediates(x, indices=[i], stop_early=stop_early, intermediates_only=True)
                assert len(only) == 1 and torch.equal(only[0], taps[i])
        by_count = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(by_count, taps[-2:], strict=True)] == [True, True]
        by_negative = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
        assert torch.equal(by_negative[0], taps[last])


@pytest.mark.parametrize("name", STRUCTURES)
def test_stopping_early_runs_nothing_further(name):
    def blocks(model):
        return [module for module in model.modules() if isinstance(module, family_of(name).block)]

    model = small(name)
    calls = []
    for block in blocks(model):
        block.register_forward_hook(lambda *args: calls.append(1))
    model.forward_intermediates(images(name), indices=[0, 1], intermediates_only=True)
    assert len(calls) == len(blocks(model))
    calls.clear()
    model.forward_intermediates(images(name), indices=[0, 1], stop_early=True, intermediates_only=True)
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([0, 1])
    assert 0 < len(calls) == len(blocks(pruned)) < len(blocks(model))


@pytest.mark.parametrize("name", STRUCTURES)
def test_unknown_output_format(name):
    with pytest.raises(ValueError, match=r"output_fmt must be NCHW or .*, got NCL"):
        small(name).forward_intermediates(images(name), output_fmt="NCL")


@pytest.mark.parametrize("name", STRUCTURES)
def test_prune(name):
    model = small(name, drop_rate=0.5)
    x = images(name)
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
            assert pruned.head_hidden_size == pruned.num_features
            assert isinstance(pruned.norm, nn.Identity) or not prune_norm
            if isinstance(pruned.norm, nn.Identity):
                assert pruned.num_features == model.feature_info[i]["num_chs"]
                assert_same(selected[0], taps[i])
                assert_same(like_taps(final, model, taps[i]), taps[i])
            selected[0].sum().backward()
            assert [n for n, p in pruned.named_parameters() if p.grad is None] == []  # nothing unused is left
            pruned.reset_classifier(7, "avg")
            assert pruned(x).shape == (2, 7)


@pytest.mark.parametrize("name", STRUCTURES)
def test_features_only(name):
    model = small(name)
    x = images(name)
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
    x = images(name)
    with torch.inference_mode():
        fmt = model.output_fmt
        expected = model.forward_intermediates(x, indices=[0, 1], output_fmt=fmt, intermediates_only=True)
        graph = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, 1), output_fmt=fmt)
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1), output_fmt=fmt)
        traced = graph(x)  # what the modules return, with prefix tokens
        assert_same(getter(x), expected)
        assert_same([y[:, model.num_prefix_tokens :] if fmt == "NLC" else y for y in traced], expected)

    hooks = small(name, features_only=True, feature_cls="hook", out_indices=(0, 1))
    hooks.set_grad_checkpointing(True)
    maps = hooks.train()(x)
    assert [y.shape for y in maps] == [y.shape for y in traced]
    assert isinstance(hooks, FeatureHookNet)


@pytest.mark.parametrize("name", NAMES)
def test_fx_is_bitwise_equal(name):
    model = small(name, **family_of(name).short)
    x = images(name)
    with torch.inference_mode():
        assert torch.equal(GraphExtractNet(model, [model.default_cfg["classifier"]])(x), model(x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_fx_backward(name):
    model = small(name)
    graph = GraphExtractNet(model, [model.default_cfg["classifier"]])
    graph(images(name)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", SCRIPTED)
def test_torchscript(name):
    model = small(name, **family_of(name).short)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in ((None, None), *family_of(name).sizes[:1]):
        x = images(name, *size)
        with torch.inference_mode():
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", SCRIPTED)
def test_torchscript_of_features(name):
    getter = small(name, features_only=True, out_indices=(0, 2))
    x = images(name)
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(getter)(x), getter(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in STRUCTURES for size in family_of(name).sizes])
def test_any_input_size(name, size):
    model = small(name)
    x = images(name, *size)
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
        exact = copy.deepcopy(model).double()(images(name, dtype=torch.float64))
        cast = copy.deepcopy(model).to(dtype)(images(name, dtype=dtype))
        with torch.autocast("cpu", dtype=dtype):
            autocast = model(images(name))
    tolerance = 0.05 * exact.abs().max().item()
    for out in (cast, autocast):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", STRUCTURES)
def test_input_channels(name, in_chans):
    model = small(name, in_chans=in_chans)
    with torch.inference_mode():
        x = images(name)[:, :1].expand(-1, in_chans, -1, -1)
        assert model(x).shape == (2, 10)


@pytest.mark.parametrize(("name", "pool"), [(name, pool) for name in STRUCTURES for pool in family_of(name).pools])
def test_pooling(name, pool):
    model = small(name, global_pool=pool)
    x = images(name)
    with torch.inference_mode():
        features = model.forward_features(x)
        if pool == "token":
            expected = features[:, 0]
        else:
            flat = like_taps(features, model, model.forward_intermediates(x, 1, intermediates_only=True)[0]).flatten(2)
            avg, largest = flat.mean(2), flat.amax(2)
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
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), key
    with torch.inference_mode():
        assert torch.isfinite(model(images(name))).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_compile_without_graph_breaks(name):
    torch.compiler.reset()
    model = small(name, **family_of(name).short)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(name)
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected_grads = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    actual_grads = torch.autograd.grad(actual.square().mean(), list(model.parameters()))
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-3, atol=1e-6)


ONE_BLOCK = dict(depths=(1,), num_heads=(2,), dilations=((8,),))  # of test_dinat


def test_compile_with_inductor():
    torch.compiler.reset()
    model = small("test_dinat", **ONE_BLOCK)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images("test_dinat")), model(images("test_dinat")), rtol=1e-4, atol=1e-5)


def test_compile_under_checkpointing():
    torch.compiler.reset()
    model = small("test_dinat", **ONE_BLOCK).train()
    expected = model(images("test_dinat"))
    model.set_grad_checkpointing()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(images("test_dinat"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_export_with_any_batch_size(name):
    model = small(name, **family_of(name).short)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(name),), dynamic_shapes=({0: batch},))
    x = images(name, batch=3)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_deepcopy_and_pickle(name):
    model = small(name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = images(name)
    with torch.inference_mode():
        assert_same(loaded(x), model(x))
        assert_same(copy.deepcopy(model)(x), model(x))
