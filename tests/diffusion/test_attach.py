"""Attaching: outputs where windows cover the map, restoring, the grid of every call, and every refusal."""

import copy
import gc
import logging
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, UNet2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn
from torch.testing import assert_close

from golden_cases import max_error
from tiny_models import KINDS, image_ids, make_call, make_model, run
from zoo.diffusion import (
    ClearAttnProcessor,
    EntropyScaledAttnProcessor,
    Grid,
    GridAttnProcessor,
    NeighborhoodAttnProcessor,
    attach,
)

LAYERS = {"dit": 2, "flux": 4, "hunyuan": 4, "pixart": 2, "sd3": 4, "unet": 7}
LARGEST = ["down_blocks.0", "up_blocks.1"]  # the layers of the tiny UNet that see the whole sample


@pytest.fixture(scope="module")
def models():
    return {kind: make_model(kind) for kind in KINDS}


def size(kind):
    return (4, 4) if kind == "dit" else (4, 6)  # DiT makes square images only


class Recorder(GridAttnProcessor):
    """Dense attention that notes its grids."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def attend(self, query, key, value, grid, scale):
        assert query.shape[1] == grid.tokens
        self.seen.append(grid)
        return super().attend(query, key, value, grid, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_that_cover_the_map_change_nothing(models, kind):
    model, (height, width) = models[kind], size(kind)
    call = make_call(kind, height, width)
    expected = run(model, call)
    for processor, layers in (
        (NeighborhoodAttnProcessor((height, width)), LARGEST if kind == "unet" else None),
        (ClearAttnProcessor(height + width), None),
        (GridAttnProcessor(), None),
        (EntropyScaledAttnProcessor((height, width)), None),
    ):
        with attach(model, processor, layers):
            assert max_error(run(model, call), expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_small_windows_change_every_layer(models, kind):
    """Each layer alone makes a difference: none is passed by."""
    model, call = models[kind], make_call(kind, *size(kind))
    expected = run(model, call)
    with attach(model, ClearAttnProcessor(1)) as attachment:
        names = list(attachment.processors)
    assert len(names) == LAYERS[kind]
    for name in names:
        with attach(model, ClearAttnProcessor(1), name) as attachment:
            assert list(attachment.processors) == [name]
            assert max_error(run(model, call), expected) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_detach_restores_the_model(models, kind):
    model, call = models[kind], make_call(kind, *size(kind))
    expected, weights = run(model, call), copy.deepcopy(model.state_dict())
    originals = model.attn_processors if hasattr(model, "attn_processors") else None
    modules = [name for name, _ in model.named_modules()]
    attachment = attach(model, ClearAttnProcessor(2, down_factor=None if kind == "unet" else 2))
    assert max_error(run(model, call), expected) > 1e-4
    attachment.detach()
    attachment.detach()  # does nothing more
    assert torch.equal(run(model, call), expected)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert [name for name, _ in model.named_modules()] == modules
    assert originals is None or model.attn_processors == originals
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_context_manager_detaches_after_an_error(models):
    model, call = models["sd3"], make_call("sd3", 4, 6)
    expected = run(model, call)
    with pytest.raises(KeyError), attach(model, ClearAttnProcessor(1)):
        raise KeyError
    assert torch.equal(run(model, call), expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dit", {Grid(4, 4)}),
        ("flux", {Grid(4, 6, 5, True)}),
        ("hunyuan", {Grid(4, 6)}),
        ("pixart", {Grid(4, 6)}),
        ("sd3", {Grid(4, 6, 5), Grid(4, 6)}),  # with text, and the second attention of dual layers without
        ("unet", {Grid(4, 6), Grid(2, 3, stride=2)}),
    ],
)
def test_grid(models, kind, expected):
    recorder = Recorder()
    with attach(models[kind], recorder):
        run(models[kind], make_call(kind, *size(kind)))
        assert set(recorder.seen) == expected and len(recorder.seen) == LAYERS[kind]


def test_grid_follows_odd_sizes_text_and_positional_arguments(models):
    recorder = Recorder()
    unet, sd3, flux = (models[kind] for kind in ("unet", "sd3", "flux"))
    with attach(unet, recorder):
        call = make_call("unet", 7, 5)
        with torch.no_grad():
            unet(call["sample"], call["timestep"], call["encoder_hidden_states"])
    assert set(recorder.seen) == {Grid(7, 5), Grid(4, 3, stride=2)}
    recorder.seen.clear()
    with attach(sd3, recorder):
        run(sd3, make_call("sd3", 3, 5, text=11))
    assert recorder.seen[-1] == Grid(3, 5, 11)
    recorder.seen.clear()
    with attach(flux, recorder):
        run(flux, make_call("flux", 2, 12, text=1))  # as many tokens as 4 x 6
        run(flux, make_call("flux", 6, 4, text=0))
    assert recorder.seen[:4] == [Grid(2, 12, 1, True)] * 4
    assert {(g.height, g.width, g.text) for g in recorder.seen[4:]} == {(6, 4, 0)}


def test_grid_may_be_given(models):
    """For ids that do not count rows and columns: to attach, or in one call."""
    flux, recorder = models["flux"], Recorder()
    call = {**make_call("flux", 4, 6), "img_ids": 0.5 * image_ids(4, 6)}
    with attach(flux, recorder, grid=(4, 6)):
        run(flux, call)
    with attach(flux, recorder):
        run(flux, {**call, "joint_attention_kwargs": {"grid": (2, 12)}})
        with pytest.raises(ValueError, match=r"img_ids must count the rows and columns of one map of 24 tokens"):
            run(flux, call)
    assert recorder.seen == [Grid(4, 6, 5, True)] * 4 + [Grid(2, 12, 5, True)] * 4


def test_other_layers_never_see_the_grid(models, caplog):
    """diffusers warns of arguments that a processor does not expect."""
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)
    try:
        for kind in KINDS:
            with attach(
                models[kind], ClearAttnProcessor(2), "*blocks.0*" if kind != "flux" else "transformer_blocks.0"
            ):
                run(models[kind], make_call(kind, *size(kind)))
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if "not expected" in r.getMessage()]


@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_guidance_batches_are_independent(models, kind):
    """What a sample gets does not depend on what else is in the batch."""
    model, call = models[kind], make_call(kind, 4, 6, batch=2)
    with attach(model, ClearAttnProcessor(2, down_factor=None)):
        both = run(model, call)
        batched = {k for k, x in call.items() if isinstance(x, torch.Tensor) and k not in ("img_ids", "txt_ids")}
        for i in range(2):
            alone = run(model, {k: x[i : i + 1] if k in batched else x for k, x in call.items()})
            assert_close(alone, both[i : i + 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["flux", "sd3", "hunyuan", "unet"])
def test_threads_do_not_disturb_each_other(models, kind):
    """One model, one processor, many calls of different sizes at once."""
    model = models[kind]
    calls = [make_call(kind, h, w, text=t) for h, w, t in ((4, 6, 5), (6, 4, 3), (2, 12, 7), (8, 4, 1))]
    with attach(model, ClearAttnProcessor(2)):
        expected = [run(model, call) for call in calls]
        barrier, wrong = threading.Barrier(len(calls)), []

        def work(i):
            barrier.wait()
            for _ in range(5):
                if not torch.equal(run(model, calls[i]), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_gradient_checkpointing(models):
    """Blocks run again in the backward pass, outside the model's forward, and still know the grid."""
    model = copy.deepcopy(models["flux"]).train()
    call, grads = make_call("flux", 4, 6), []
    with attach(model, ClearAttnProcessor(2, down_factor=2)) as attachment:
        for checkpointing in (False, True):
            model.gradient_checkpointing = checkpointing
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.zero_grad()
            model(**call, return_dict=False)[0].square().mean().backward()
            pooled = [p.spatial_weight.grad.clone() for p in attachment.processors.values()]
            grads.append([model.transformer_blocks[0].attn.to_q.weight.grad.clone(), *pooled])
    for once, again in zip(*grads, strict=True):
        assert once.abs().max() > 0
        assert_close(once, again)


@pytest.mark.parametrize("kind", ["flux", "sd3", "pixart", "hunyuan", "unet"])
def test_fused_projections(models, kind):
    model, call = copy.deepcopy(models[kind]), make_call(kind, 4, 6)
    with attach(model, ClearAttnProcessor(2)):
        expected = run(model, call)
    # Some of diffusers' fused processors cannot do what the tiny models need; what counts here is the fused weights.
    model.fuse_qkv_projections()
    with attach(model, ClearAttnProcessor(2)) as attachment:
        names = list(attachment.processors)
        for name in names:  # only the fused weights are read
            nn.init.zeros_(model.get_submodule(name).to_q.weight)
        assert max_error(run(model, call), expected) < 2e-6


class LoRA(nn.Module):
    """A low-rank layer around a projection, under PEFT's names."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("fused", [False, True])
def test_lora(models, fused):
    """Layers around the projections are used, also where projections were fused before."""
    torch.manual_seed(0)
    plain, merged, call = copy.deepcopy(models["flux"]), copy.deepcopy(models["flux"]), make_call("flux", 4, 6)
    if fused:
        plain.fuse_qkv_projections()
    for layer, target in zip(
        [*plain.transformer_blocks, *plain.single_transformer_blocks],
        [*merged.transformer_blocks, *merged.single_transformer_blocks],
    ):
        for name in ("to_q", "to_k", "to_v"):
            lora = LoRA(getattr(layer.attn, name))
            setattr(layer.attn, name, lora)
            getattr(target.attn, name).weight.data += lora.up.weight.data @ lora.down.weight.data
    with attach(plain, ClearAttnProcessor(2)), attach(merged, ClearAttnProcessor(2)):
        assert max_error(run(plain, call), run(merged, call)) < 1e-5
        assert max_error(run(plain, call), run(models["flux"], call)) > 1e-3


@pytest.mark.parametrize("kind", ["hunyuan", "unet"])
def test_compile(kind):
    """One graph: the hooks are part of it."""
    model, call = make_model(kind, small=True), make_call(kind, 4, 6)
    torch._dynamo.reset()
    with attach(model, ClearAttnProcessor(2)):
        expected = run(model, call)
        assert max_error(run(torch.compile(model, fullgraph=True, backend="eager"), call), expected) < 1e-6


def test_compile_before_attaching():
    """Any size, and the model's own attention again once detached."""
    model = make_model("flux", small=True)
    first, second = make_call("flux", 4, 6), make_call("flux", 6, 8, text=3)
    dense = run(model, first)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with attach(compiled, ClearAttnProcessor(2, down_factor=2)):
        for call in (first, second):
            assert max_error(run(compiled, call), run(model, call)) < 1e-6
    assert max_error(run(compiled, first), dense) < 1e-6


def test_compile_with_inductor():
    """To machine code; the graph of one block, as diffusers' `compile_repeated_blocks` makes it."""
    model, call = make_model("flux", small=True), make_call("flux", 4, 6)
    torch._dynamo.reset()
    with attach(model, ClearAttnProcessor(2)):
        expected = run(model, call)
        model.single_transformer_blocks[0].compile(fullgraph=True)
        assert max_error(run(model, call), expected) < 1e-5


def test_compile_after_attaching():
    """The values of Flux's ids cannot be read in a graph: an error says what to do, and a given grid will do."""
    model, call = make_model("flux", small=True), make_call("flux", 4, 6)
    torch._dynamo.reset()
    with attach(model, ClearAttnProcessor(2), grid=(4, 6)):
        expected = run(model, call)
        assert max_error(run(torch.compile(model, fullgraph=True, backend="eager"), call), expected) < 1e-6
    torch._dynamo.reset()
    with attach(model, ClearAttnProcessor(2)):
        with pytest.raises(Exception, match=r"call torch.compile\(model\) before attach"):
            run(torch.compile(model, fullgraph=True, backend="eager"), call)
        assert torch.equal(run(model, call), expected)


def test_pipeline_with_guidance(models):
    """A pipeline end to end: its denoiser is found, and a covering circle draws the same image."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=3, sample_size=8, layers_per_block=1
    ).eval()
    transformer = copy.deepcopy(models["dit"])
    transformer.register_to_config(out_channels=3)
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2], num_inference_steps=2, generator=generator, output_type="np", guidance_scale=3.0).images

    dense = draw()
    with attach(pipeline, ClearAttnProcessor(99)) as attachment:
        assert attachment.model is transformer
        covering = draw()
    with attach(pipeline, ClearAttnProcessor(1)):
        local = draw()
    assert abs(covering - dense).max() < 1e-5 < abs(local - dense).max()
    assert (draw() == dense).all()


@pytest.mark.parametrize("kind", ["dit", "hunyuan", "pixart", "sd3", "unet"])
def test_set_attn_processor(models, kind):
    """Without attaching: square maps, or a grid that is given. Cross-attention stays as it was."""
    model, call = copy.deepcopy(models[kind]), make_call(kind, 4, 4)
    with attach(model, ClearAttnProcessor(2)):
        expected = run(model, call)
    if kind == "dit" and not hasattr(model, "set_attn_processor"):
        for block in model.transformer_blocks:
            block.attn1.set_processor(ClearAttnProcessor(2))
    else:
        model.set_attn_processor(ClearAttnProcessor(2))
    assert max_error(run(model, call), expected) < 2e-6


def test_set_attn_processor_with_a_grid(models):
    model, call = copy.deepcopy(models["flux"]), make_call("flux", 4, 6)
    with attach(model, NeighborhoodAttnProcessor(3)):
        expected = run(model, call)
    model.set_attn_processor(NeighborhoodAttnProcessor(3, grid=Grid(4, 6, text=5)))
    assert max_error(run(model, call), expected) < 2e-6
    model.set_attn_processor(NeighborhoodAttnProcessor(3))
    with pytest.raises(ValueError, match=r"24 tokens are no square map"):
        run(model, call)
    with pytest.raises(ValueError, match="single-stream"):
        run(model, make_call("flux", 4, 4))
    model.set_attn_processor(NeighborhoodAttnProcessor(3, grid=(5, 5)))
    with pytest.raises(ValueError, match=r"grid 5 x 5 with 5 text tokens does not match the 24 tokens"):
        run(model, call)


def test_handles_do_not_keep_models_alive():
    model = make_model("dit")
    attachment = attach(model, ClearAttnProcessor(2))
    attachment.detach()
    processors = list(attachment.processors.values())
    del attachment
    gc.collect()
    assert all(p not in [m for m in model.modules()] for p in processors)


def test_copies_of_an_attached_model_work(models):
    model, call = copy.deepcopy(models["unet"]), make_call("unet", 4, 6)
    with attach(model, ClearAttnProcessor(2)):
        twin = copy.deepcopy(model)
        expected = run(model, call)
    assert torch.equal(run(twin, call), expected)


# What is refused


@pytest.mark.parametrize(
    "thing",
    [
        UNet2DModel(
            sample_size=8,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        nn.Linear(2, 2),
        None,
        "flux",
    ],
)
def test_other_models_are_refused(thing):
    supported = "UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel"
    with pytest.raises(TypeError, match=f"must be, or hold, one of {supported}.*got {type(thing).__name__}"):
        attach(thing, ClearAttnProcessor(2))


def refused(model, error, match, *args, **kwargs):
    processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")}
    with pytest.raises(error, match=match):
        attach(model, *args, **kwargs)
    assert {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")} == processors
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_arguments_are_refused(models):
    flux = models["flux"]
    refused(flux, TypeError, "processor must take the token grid", None)
    refused(flux, TypeError, "processor must take the token grid", flux.transformer_blocks[0].attn.processor)
    refused(
        flux,
        ValueError,
        "'mid_block' is none of the model's 4 self-attention layers",
        ClearAttnProcessor(2),
        "mid_block",
    )
    refused(flux, ValueError, "'tr' is none", ClearAttnProcessor(2), ["transformer_blocks.0", "tr"])
    refused(flux, TypeError, "layers must be names", ClearAttnProcessor(2), [0])
    refused(flux, TypeError, "grid must be one int or a", ClearAttnProcessor(2), grid=(4, 6.0))
    refused(flux, ValueError, "grid must be positive|grid", ClearAttnProcessor(2), grid=(4, 0))
    refused(
        models["unet"],
        ValueError,
        "is none of",
        ClearAttnProcessor(2),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    )


def test_attaching_twice_is_refused(models):
    with attach(models["dit"], ClearAttnProcessor(2)), pytest.raises(ValueError, match="attached to already"):
        attach(models["dit"], ClearAttnProcessor(2))


def test_ip_adapters_and_backends_are_refused(models):
    unet = copy.deepcopy(models["unet"])
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    layer.attn2.set_processor(IPAdapterAttnProcessor2_0(8, 6))  # on cross-attention it does no harm
    attach(unet, ClearAttnProcessor(2)).detach()
    layer.attn1.set_processor(IPAdapterAttnProcessor2_0(8, 6))
    refused(unet, ValueError, "attn1 has an IP-Adapter", ClearAttnProcessor(2))

    flux = copy.deepcopy(models["flux"])
    flux.transformer_blocks[1].attn.processor._attention_backend = AttentionBackendName.FLASH
    refused(flux, ValueError, r"transformer_blocks.1.attn has attention backend .*FLASH", ClearAttnProcessor(2))
    flux.transformer_blocks[1].attn.processor._attention_backend = None
    flux.transformer_blocks[1].attn.processor._parallel_config = object()
    refused(flux, ValueError, "transformer_blocks.1.attn runs under context parallelism", ClearAttnProcessor(2))


def test_backends_set_later_are_refused(models):
    with attach(models["flux"], ClearAttnProcessor(2)) as attachment:
        with pytest.raises(ValueError, match=r"ClearAttnProcessor computes with zoo\.kernels"):
            models["flux"].set_attention_backend("_native_math")
        models["flux"].reset_attention_backend()
        processor = next(iter(attachment.processors.values()))
        with pytest.raises(ValueError, match="does not support context parallelism"):
            processor._parallel_config = object()


def test_replaced_processors_are_noticed(models):
    """Otherwise attention would quietly be dense again."""
    model, call = copy.deepcopy(models["sd3"]), make_call("sd3", 4, 6)
    with attach(model, ClearAttnProcessor(2)):
        model.fuse_qkv_projections()
        with pytest.raises(ValueError, match=r"transformer_blocks.0.attn has another processor .*FusedJointAttn"):
            run(model, call)


def test_windows_larger_than_the_map_are_refused(models):
    for kind, height, width in (("flux", 4, 6), ("pixart", 4, 6), ("unet", 4, 6)):
        model, call = models[kind], make_call(kind, height, width)
        expected = run(model, call)
        with attach(model, NeighborhoodAttnProcessor((5, 3))):
            with pytest.raises(ValueError, match=r"5 x 3 in \S+attn1?, whose map is 4 x 6"):
                run(model, call)
        with attach(model, NeighborhoodAttnProcessor(2, dilation=(1, 4))):
            with pytest.raises(ValueError, match=r"2 x 8 in"):
                run(model, call)
        assert torch.equal(run(model, call), expected)


def test_masks_are_refused(models):
    model, call = models["pixart"], make_call("pixart", 4, 6)
    with attach(model, ClearAttnProcessor(2)), pytest.raises(ValueError, match="attention_mask must be None"):
        run(model, {**call, "attention_mask": torch.ones(2, 24)})
