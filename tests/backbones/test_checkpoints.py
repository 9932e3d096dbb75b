"""The authors' checkpoint files through each of timm's roads, and files that do not fit."""

import copy
import logging
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import zoo  # noqa: F401  (registers the models)
from golden_cases import list_cases, load_case, max_error

CASES = [name for name in list_cases("nat") if "pad" not in name]


@pytest.fixture(scope="module", params=CASES)
def published(request, tmp_path_factory):
    """A golden case and its weights as a file like those published: a plain dict of tensors."""
    case = load_case("nat", request.param)
    path = tmp_path_factory.mktemp("checkpoints") / f"{request.param}.pth"
    torch.save(case.state_dict, path)
    return case, path


def by_url(name, path, monkeypatch):
    cfg = timm.get_pretrained_cfg(name)
    monkeypatch.setenv("TORCH_HOME", str(path.parent))
    cached = path.parent / "hub" / "checkpoints" / cfg.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(path.read_bytes())  # as if downloaded
    return timm.create_model(name, pretrained=True)


def by_overlay(name, path, monkeypatch):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def by_checkpoint_path(name, path, monkeypatch):
    return timm.create_model(name, checkpoint_path=str(path))


ROADS = [by_url, by_overlay, by_checkpoint_path]


@pytest.mark.parametrize("road", ROADS)
def test_published_file_loads(published, road, monkeypatch):
    case, path = published
    model = road(case.name, path, monkeypatch)
    state_dict = model.state_dict()
    assert state_dict.keys() == case.state_dict.keys()
    for key, tensor in state_dict.items():
        assert torch.equal(tensor, case.state_dict[key]), key


def test_loaded_model_is_the_authors(published, monkeypatch):
    case, path = published
    model = by_overlay(case.name, path, monkeypatch).eval()
    with torch.inference_mode():
        assert max_error(model(case.inputs["x"]), case.outputs["logits"]) < 1e-5


@pytest.mark.parametrize("road", ROADS)
def test_vitrpb_index_buffers_are_dropped(road, tmp_path, monkeypatch):
    model = timm.create_model("vitrpb_small")
    state_dict = model.state_dict()
    for i in range(12):
        state_dict[f"layers.{i}.attn.relative_position_index"] = torch.zeros(196, 196, dtype=torch.int64)
    path = tmp_path / "vitrpb_small.pth"
    torch.save(state_dict, path)
    loaded = road("vitrpb_small", path, monkeypatch)
    assert torch.equal(loaded.layers[11].attn.rpb, model.layers[11].attn.rpb)
    assert len(state_dict) == 164 + 12


def save_test_dinat(tmp_path, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model("test_dinat", **kwargs)
    path = tmp_path / "test_dinat.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("road", [by_overlay, by_checkpoint_path])
def test_bias_tables_of_another_kernel_size_are_resized(road, tmp_path, monkeypatch, caplog):
    seven, path = save_test_dinat(tmp_path, kernel_size=7)
    caplog.set_level(logging.INFO)
    three = road("test_dinat", path, monkeypatch)
    assert "resizing the bias table from (13, 13) to (5, 5)" in caplog.text
    for a, b in zip(seven.named_parameters(), three.named_parameters(), strict=True):
        if a[0].endswith(".rpb"):
            expected = F.interpolate(a[1][None], (5, 5), mode="bicubic")[0]
            torch.testing.assert_close(b[1], expected)
        else:
            assert torch.equal(a[1], b[1])


def test_resizing_keeps_the_centre_and_the_sides_of_a_table():
    model = timm.create_model("test_dinat", kernel_size=5)
    state_dict = timm.create_model("test_dinat", kernel_size=3).state_dict()
    ramp = torch.arange(-2.0, 3.0).expand(5, 5)  # offset along the width, in tokens
    for key in state_dict:
        if key.endswith(".rpb"):
            state_dict[key] = ramp.expand_as(state_dict[key]).clone()
    model.load_state_dict(state_dict)
    table = model.levels[0].blocks[0].attn.rpb[0]
    torch.testing.assert_close(table, -table.flip(1))
    assert torch.all(table[:, 1:] > table[:, :-1])
    torch.testing.assert_close(table, table[:1].expand_as(table))


def test_the_state_dict_is_not_changed():
    state_dict = timm.create_model("test_dinat", kernel_size=5).state_dict()
    state_dict["levels.0.blocks.0.attn.relative_position_index"] = torch.zeros(1, dtype=torch.int64)
    before = OrderedDict(state_dict)
    timm.create_model("test_dinat").load_state_dict(state_dict)
    timm.create_model(
        "test_dinat", pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay=dict(state_dict=state_dict)
    )
    assert list(state_dict) == list(before)
    assert all(state_dict[key] is before[key] for key in before)


@pytest.mark.parametrize("kwargs", [dict(num_classes=5), dict(num_classes=0), dict(in_chans=1)], ids=str)
def test_fine_tuning_adapts_head_and_stem(kwargs, tmp_path):
    source, path = save_test_dinat(tmp_path)
    model = timm.create_model(
        "test_dinat", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs
    ).eval()
    assert torch.equal(model.levels[3].blocks[0].attn.qkv.weight, source.levels[3].blocks[0].attn.qkv.weight)
    if "in_chans" in kwargs:
        weight = source.patch_embed.proj[0].weight
        torch.testing.assert_close(model.patch_embed.proj[0].weight, weight.sum(1, keepdim=True))
    assert model(torch.randn(1, kwargs.get("in_chans", 3), 32, 32)).shape == (1, kwargs.get("num_classes", 1000) or 96)


@pytest.mark.parametrize("kwargs", [dict(), dict(num_classes=5, in_chans=1)], ids=str)
def test_a_prefix_to_all_names_in_a_file_is_dropped(kwargs, tmp_path):
    source = timm.create_model("test_dinat")
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()}}, path)
    model = timm.create_model("test_dinat", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)
    assert torch.equal(model.levels[3].blocks[0].attn.qkv.weight, source.levels[3].blocks[0].attn.qkv.weight)


def test_weights_that_were_given_are_not_blamed_on_an_address():
    given = dict(state_dict={"head.weight": torch.zeros(1000, 3), "head.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match="the weights of nat_mini from the given state_dict: weights do not fit"):
        timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=given)


def test_features_only_loads_pretrained_weights(tmp_path):
    source, path = save_test_dinat(tmp_path)
    overlay = dict(file=str(path))
    features = timm.create_model("test_dinat", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(features.model.levels[3].blocks[0].attn.rpb, source.levels[3].blocks[0].attn.rpb)


def test_loads_inside_another_module(tmp_path):
    wrapped = nn.ModuleDict({"model": timm.create_model("test_dinat", kernel_size=5)})
    source = timm.create_model("test_dinat")
    result = wrapped.load_state_dict({f"model.{key}": value for key, value in source.state_dict().items()})
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(wrapped["model"].head.weight, source.head.weight)


def wrong_shape(state_dict):
    state_dict["levels.1.blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    return state_dict, [r"levels\.1\.blocks\.0\.mlp\.fc1\.weight is \[3, 3\], the model's \[48, 24\]"]


def wrong_heads(state_dict):
    state_dict["levels.3.blocks.0.attn.rpb"] = torch.zeros(9, 7, 7)
    return state_dict, [r"levels\.3\.blocks\.0\.attn\.rpb is \[9, 5, 5\], the model's \[8, 5, 5\]"]


def wrong_classes(state_dict):
    state_dict["head.weight"] = torch.zeros(21841, 96)
    state_dict["head.bias"] = torch.zeros(21841)
    return state_dict, [r"head\.weight is \[21841, 96\]", "num_classes=21841 would fit"]


def wrong_channels(state_dict):
    state_dict["patch_embed.proj.0.weight"] = torch.zeros(6, 1, 3, 3)
    return state_dict, ["in_chans=1 would fit"]


def missing(state_dict):
    del state_dict["norm.weight"]
    return state_dict, [r"missing: norm\.weight"]


def unexpected(state_dict):
    state_dict["norm.scale"] = torch.zeros(96)
    return state_dict, [r"unexpected: norm\.scale"]


def not_a_tensor(state_dict):
    state_dict["norm.weight"] = [1.0] * 96
    return state_dict, [r"not tensors: norm\.weight \(list\)"]


def many(state_dict):
    return {key.replace("levels", "stages"): value for key, value in state_dict.items() if "levels" in key}, [
        r"missing: patch_embed.*; and \d+ more",
        "no name in common",
    ]


def prefixed(state_dict):
    return {f"backbone.{key}": value for key, value in state_dict.items()}, [
        r"every name has 'backbone\.' before it: load the weights without that$"
    ]


def nested(state_dict):
    return {"weights": state_dict, "epoch": 3}, [r"may be under \['weights'\]"]


BREAKAGES = [
    wrong_shape,
    wrong_heads,
    wrong_classes,
    wrong_channels,
    missing,
    unexpected,
    not_a_tensor,
    many,
    prefixed,
    nested,
]


def assert_refused(model, state_dict, patterns, strict=True):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="nothing loaded") as error:
        model.load_state_dict(state_dict, strict=strict)
    for pattern in patterns:
        error.match(pattern)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_wrong_weights_are_refused_before_anything_is_copied(breakage):
    state_dict, patterns = breakage({k: v + 1 for k, v in timm.create_model("test_dinat").state_dict().items()})
    assert_refused(timm.create_model("test_dinat"), state_dict, patterns)


@pytest.mark.parametrize("breakage", [wrong_shape, wrong_heads, wrong_classes, wrong_channels, not_a_tensor])
def test_not_strict_still_refuses_what_does_not_fit(breakage):
    state_dict, patterns = breakage({k: v + 1 for k, v in timm.create_model("test_dinat").state_dict().items()})
    assert_refused(timm.create_model("test_dinat"), state_dict, patterns, strict=False)


@pytest.mark.parametrize(("breakage", "kind"), [(missing, "missing_keys"), (unexpected, "unexpected_keys")])
def test_not_strict_loads_the_rest(breakage, kind):
    source = timm.create_model("test_dinat")
    model = timm.create_model("test_dinat")
    result = model.load_state_dict(breakage(source.state_dict())[0], strict=False)
    assert len(getattr(result, kind)) == 1
    assert torch.equal(model.head.weight, source.head.weight)


def test_not_a_mapping():
    with pytest.raises(TypeError, match="got list"):
        timm.create_model("test_dinat").load_state_dict([])


def test_assign_replaces_the_parameters():
    state_dict = timm.create_model("test_dinat").state_dict()
    model = timm.create_model("test_dinat", device="meta")
    model.load_state_dict(state_dict, assign=True)
    assert model.head.weight.data_ptr() == state_dict["head.weight"].data_ptr()


@pytest.mark.parametrize("road", [by_overlay, by_checkpoint_path])
def test_weights_of_another_architecture(road, tmp_path, monkeypatch):
    _, path = save_test_dinat(tmp_path)
    with pytest.raises(RuntimeError, match="do not fit DinatS, nothing loaded") as error:
        road("dinat_s_tiny", path, monkeypatch)
    error.match("missing: ")
    error.match("unexpected: ")


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def truncate_legacy(path):
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    truncate(path)


def truncate_tensors(path):
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def make_unsafe(path):
    torch.save(timm.create_model("test_dinat"), path)  # unpickling it could run any code


def not_weights(path):
    torch.save(torch.zeros(3), path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, truncate_legacy, truncate_tensors, empty, make_unsafe, not_weights, remove]
)
def test_a_file_that_cannot_be_read_is_named(damage, tmp_path):
    _, path = save_test_dinat(tmp_path)
    damage(path)
    with pytest.raises((RuntimeError, FileNotFoundError)) as error:
        timm.create_model("test_dinat", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    error.match("could not load the weights of test_dinat from")
    error.match(str(path))
    assert isinstance(error.value, FileNotFoundError) == (damage is remove)
    assert ("weights_only" in str(error.value)) == (damage is make_unsafe)


def test_an_error_without_weights_is_not_blamed_on_them():
    with pytest.raises(ValueError, match="one entry per stage"):
        timm.create_model("nat_mini", pretrained=True, num_heads=(1, 1))
    with pytest.raises(KeyError, match="nonorm"):
        timm.create_model("nat_mini", pretrained=True, norm_layer="no_norm")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_dinat"):
        timm.create_model("test_dinat", pretrained=True)
