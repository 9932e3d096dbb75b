"""The processors against the authors' code and against masks; CLEAR's files."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from golden_cases import list_cases, load_case, max_error
from tiny_models import make_call, make_model, run
from zoo.diffusion import (
    ClearAttnProcessor,
    EntropyScaledAttnProcessor,
    Grid,
    GridAttnProcessor,
    NeighborhoodAttnProcessor,
    attach,
    load_clear_weights,
    save_clear_weights,
)

GOLDEN = {  # what the calls of the cases say
    "op_local_r3_9x13": (Grid(9, 13, 3, True), dict(radius=3)),
    "op_local_r4_12x16": (Grid(12, 16, 5, True), dict(radius=4)),
    "op_local_r4_down2_12x16": (Grid(12, 16, 5, True), dict(radius=4, down_factor=2)),
    "op_local_r4_down4_12x16": (Grid(12, 16, 5, True), dict(radius=4, down_factor=4)),
    "op_local_r8_12x16": (Grid(12, 16, 5, True), dict(radius=8)),
    "op_local_r8_down4_12x16": (Grid(12, 16, 5, True), dict(radius=8, down_factor=4)),
    "proc_double_local_r4_8x12": (Grid(8, 12, 6, True), dict(radius=4)),
    "proc_double_r4_down4_8x12": (Grid(8, 12, 6, True), dict(radius=4, down_factor=4)),
    "proc_single_local_r4_8x12": (Grid(8, 12, 6, True), dict(radius=4)),
    "proc_single_r4_down4_8x12_prop": (Grid(8, 12, 6, True), dict(radius=4, down_factor=4, proportional=True)),
}


def test_every_golden_case_is_tried():
    assert sorted(GOLDEN) == list_cases("clear")


def attend(processor, query, key, value, grid):
    """`processor.attend` on [batch, tokens, heads, head_dim], joined again with text first."""
    image, words = processor.attend(query, key, value, grid, query.shape[-1] ** -0.5)
    return torch.cat((words, image.flatten(1, 2)), dim=1)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("op_")])
@pytest.mark.parametrize("output", ["out", "out_mean", "out_proportional"])
def test_clear_attention_is_the_authors(name, output):
    case, (grid, options) = load_case("clear", name), GOLDEN[name]
    if output not in case.outputs:
        return  # there is a mean only where tokens are pooled
    processor = ClearAttnProcessor(**options, proportional=output == "out_proportional")
    if output != "out_mean":  # which is that of the initial weight
        processor.load_state_dict(case.state_dict)
    query, key, value = (case.inputs[x].transpose(1, 2) for x in "qkv")
    with torch.no_grad():
        out = attend(processor, query, key, value, grid).transpose(1, 2)
    assert max_error(out, case.outputs[output]) < 1e-5


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("proc_")])
def test_clear_processor_is_the_authors(name):
    case, (grid, options) = load_case("clear", name), GOLDEN[name]
    double = name.startswith("proc_double")
    added = dict(added_kv_proj_dim=32, context_pre_only=False) if double else dict(pre_only=True)
    attn = FluxAttention(32, heads=2, dim_head=16, out_dim=32, bias=True, eps=1e-6, **added)
    attn.set_processor(ClearAttnProcessor(**options))
    attn.load_state_dict(case.state_dict)
    rotary = case.outputs["rope_cos"], case.outputs["rope_sin"]
    with torch.no_grad():
        out = attn(**case.inputs, image_rotary_emb=rotary, grid=grid)
    out, text = out if double else (out, None)
    assert max_error(out, case.outputs["out"]) < 1e-5
    assert text is None or max_error(text, case.outputs["out_text"]) < 1e-5


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("kernel_size", [3, (2, 4)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_neighborhoods_with_text(text_first, kernel_size, dilation):
    """Against dense attention under a mask: a window and all text for the image, everything for text."""
    grid = Grid(6, 5, 4, text_first)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, grid.tokens, 2, 4, dtype=torch.float64).unbind()
    (kh, kw), (dh, dw) = (x if isinstance(x, tuple) else (x, x) for x in (kernel_size, dilation))

    def window(i, length, k, d):
        members = list(range(i % d, length, d))
        start = min(max(members.index(i) - k // 2, 0), len(members) - k)
        return members[start : start + k]

    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    first = 4 if text_first else 0
    for y in range(6):
        for x in range(5):
            row = mask[first + y * 5 + x, first : first + 30]
            row[:] = False
            for yy in window(y, 6, kh, dh):
                for xx in window(x, 5, kw, dw):
                    row[yy * 5 + xx] = True
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)
    image, words = NeighborhoodAttnProcessor(kernel_size, dilation).attend(query, key, value, grid, 0.5)
    parts = (words, image.flatten(1, 2)) if text_first else (image.flatten(1, 2), words)
    assert_close(torch.cat(parts, dim=1).transpose(1, 2), expected)


def test_entropy_scale():
    """sqrt(log tokens / log tokens in training), text included, per level of a UNet; and around other processors."""
    torch.manual_seed(0)
    for grid, training, trained in (
        (Grid(4, 6), 3, 9),
        (Grid(4, 6, 5), (2, 4), 13),
        (Grid(4, 6, stride=2), (5, 8), 12),
        (Grid(4, 6, stride=8), 8, 2),  # one token has no entropy to keep
    ):
        query, key, value = torch.randn(3, 1, grid.tokens, 2, 4).unbind()
        factor = math.sqrt(math.log(grid.tokens) / math.log(trained))
        for inner in (GridAttnProcessor(), NeighborhoodAttnProcessor(3), ClearAttnProcessor(2, 2)):
            out = EntropyScaledAttnProcessor(training, inner).attend(query, key, value, grid, 0.5)
            expected = inner.attend(query, key, value, grid, 0.5 * factor)
            assert_close(out, expected)
    sd3, call = make_model("sd3"), make_call("sd3", 4, 6)
    dense = run(sd3, call)
    with attach(sd3, EntropyScaledAttnProcessor((4, 6))):
        assert max_error(run(sd3, call), dense) < 2e-6
    with attach(sd3, EntropyScaledAttnProcessor(2)):
        assert max_error(run(sd3, call), dense) > 1e-4


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, "kernel_size", lambda: NeighborhoodAttnProcessor(3.0)),
        (ValueError, "kernel_size", lambda: NeighborhoodAttnProcessor(0)),
        (ValueError, "dilation", lambda: NeighborhoodAttnProcessor(3, (1, 0))),
        (TypeError, "grid", lambda: NeighborhoodAttnProcessor(3, grid="4x6")),
        (TypeError, "radius must be an int, got True", lambda: ClearAttnProcessor(True)),
        (ValueError, "radius must be at least 1", lambda: ClearAttnProcessor(0)),
        (ValueError, "down_factor must be at least 2", lambda: ClearAttnProcessor(8, 1)),
        (TypeError, "down_factor must be an int", lambda: ClearAttnProcessor(8, 4.0)),
        (ValueError, "training_size must be of more", lambda: EntropyScaledAttnProcessor(1)),
        (TypeError, "processor must be a Grid", lambda: EntropyScaledAttnProcessor(8, nn.Identity())),
        (ValueError, "scales logits", lambda: EntropyScaledAttnProcessor(8, ClearAttnProcessor(8, proportional=True))),
        (ValueError, "scales logits", lambda: EntropyScaledAttnProcessor(8, EntropyScaledAttnProcessor(8))),
    ],
)
def test_bad_arguments_are_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_unsupported_attention_is_refused():
    attn = Attention(
        8, heads=2, dim_head=4, norm_num_groups=2, residual_connection=True, processor=ClearAttnProcessor(2)
    )
    with pytest.raises(ValueError, match="ClearAttnProcessor does not support attention with group_norm"):
        attn(torch.zeros(1, 16, 8))


def test_down_factor_must_divide_the_map():
    flux = make_model("flux")
    with (
        attach(flux, ClearAttnProcessor(2, 4)),
        pytest.raises(ValueError, match="4 does not divide 4 x 6, the map of tr"),
    ):
        run(flux, make_call("flux", 4, 6))


# Files

TRAINED = {f"{name}.{kind}" for name in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")}


def authors_names(pooled):
    """What a file for the tiny Flux holds, after the authors' saving code."""
    names = {f"transformer_blocks.{i}.attn.{name}" for i in range(2) for name in TRAINED}
    names |= {f"single_transformer_blocks.{i}.attn.{n}" for i in range(2) for n in TRAINED if "to_out" not in n}
    if pooled:
        blocks = [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in range(2)]
        names |= {f"{block}.attn.processor.spatial_weight" for block in blocks}
    return names


@pytest.mark.parametrize("down_factor", [None, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_clear_weights_round_trip(tmp_path, down_factor, scaled):
    def processor():
        clear = ClearAttnProcessor(2, down_factor)
        return EntropyScaledAttnProcessor(8, clear) if scaled else clear

    call, path = make_call("flux", 4, 6), tmp_path / "attn_weights.safetensors"
    trained, other = make_model("flux", seed=0), make_model("flux", seed=1)
    with attach(trained, processor()):
        for name, parameter in trained.named_parameters():
            if "spatial_weight" in name:
                nn.init.normal_(parameter)
        save_clear_weights(trained, path)
        expected = run(trained, call)
        rest = {k: v for k, v in trained.state_dict().items() if k not in authors_names(False)}
    assert load_file(path).keys() == authors_names(down_factor is not None)

    other.load_state_dict({k: v for k, v in rest.items() if "processor" not in k}, strict=False)
    with attach(other, processor()):
        assert max_error(run(other, call), expected) > 1e-3
        load_clear_weights(other, path)
        assert torch.equal(run(other, call), expected)


def test_clear_weights_that_do_not_fit_are_refused(tmp_path):
    flux = make_model("flux")
    plain = tmp_path / "clear_local_8.safetensors"
    with attach(flux, ClearAttnProcessor(8)):
        save_clear_weights(flux, tmp_path / "ours.safetensors")
    weights = load_file(tmp_path / "ours.safetensors")
    save_file(weights, plain)
    before = {name: x.clone() for name, x in flux.state_dict().items()}

    def refused(processor, path, error, match):
        with attach(flux, processor):
            with pytest.raises(error, match=match):
                load_clear_weights(flux, path)
        assert all(torch.equal(x, before[name]) for name, x in flux.state_dict().items())

    def written(name, **changes):
        changed = {**weights, **changes}
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / name)
        return tmp_path / name

    first, clear = "transformer_blocks.0.attn.to_q.weight", ClearAttnProcessor(8)
    with attach(flux, clear):
        load_clear_weights(flux, plain)  # as the authors name it
    refused(
        ClearAttnProcessor(16), plain, ValueError, "is for radius=8, down_factor=None, but radius=16, down_factor=None"
    )
    refused(ClearAttnProcessor(8, 4), plain, ValueError, "down_factor=None, but radius=8, down_factor=4 is attached")
    refused(ClearAttnProcessor(4), tmp_path / "ours.safetensors", ValueError, "is for radius=8")
    refused(clear, written("a.safetensors", **{first: None}), ValueError, f"lacks 1 weights: {first}")
    refused(
        clear, written("b.safetensors", x=torch.zeros(1)), ValueError, "has, which the model does not, 1 weights: x"
    )
    wide = written("c.safetensors", **{first: torch.zeros(64, 64)})
    refused(clear, wide, ValueError, r"other shapes for 1 weights: .*\(64, 64\), the model has \(32, 32\)")
    refused(clear, tmp_path / "none.safetensors", FileNotFoundError, "no file")
    (tmp_path / "clear_local_8_bad.safetensors").write_bytes(b"<html>")
    refused(clear, tmp_path / "clear_local_8_bad.safetensors", ValueError, "cannot be read as safetensors")
    refused(NeighborhoodAttnProcessor(3), plain, TypeError, "must have a ClearAttnProcessor attached")
