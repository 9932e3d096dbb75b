"""Whole pipelines of diffusers: attaching, calling and detaching, with adapters, fused projections and offloading."""

import threading

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import nn

from tiny_models import make_model
from zoo.diffusion import AgentAttnProcessor, ClearAttnProcessor, NeighborhoodAttnProcessor, attach

# Class, its parts that make prompts, which are left out, and the widths of what they would make.
CLIP = ("text_encoder", "tokenizer")
TWO = (*CLIP, "text_encoder_2", "tokenizer_2")
CHECKER = ("safety_checker", "feature_extractor")
PIPELINES = {
    "flux": ("FluxPipeline", TWO, {"prompt_embeds": 8, "pooled_prompt_embeds": 6}),
    "hunyuan": ("HunyuanDiTPipeline", (*TWO, *CHECKER), {"prompt_embeds": 8, "prompt_embeds_2": 8}),
    "pixart": ("PixArtAlphaPipeline", CLIP, {"prompt_embeds": 6}),
    "sd3": (
        "StableDiffusion3Pipeline",
        (*TWO, "text_encoder_3", "tokenizer_3"),
        {"prompt_embeds": 10, "pooled_prompt_embeds": 6},
    ),
    "unet": ("StableDiffusionPipeline", (*CLIP, *CHECKER), {"prompt_embeds": 6}),
}
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            kind == "hunyuan" and diffusers.__version__.startswith("0.36."),
            reason="diffusers 0.36 cannot import this pipeline beside transformers 5",
        ),
    )
    for kind in PIPELINES
]


def make_pipeline(kind, model=None):
    """With tiny random models and no text encoder."""
    name, absent, _ = PIPELINES[kind]
    flow = kind in ("flux", "sd3")
    torch.manual_seed(0)
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(4,),
            norm_num_groups=2,
            latent_channels=1 if kind == "flux" else 3,
            layers_per_block=1,
            shift_factor=0.0,
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler()
        if flow
        else DDIMScheduler(num_train_timesteps=10, clip_sample=False, steps_offset=1),
        "unet" if kind == "unet" else "transformer": make_model(kind) if model is None else model,
    }
    if "safety_checker" in absent:
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, name)(**parts, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_call(kind, height=8, width=16, text=5):
    """Arguments of a pipeline's call, with guidance where the model has to be called twice for that."""
    generator = torch.Generator().manual_seed(1)
    call = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "np"}
    if kind == "hunyuan":
        call |= {"height": 16, "width": 16}  # it takes no smaller ones
    for prefix in ("",) if kind == "flux" else ("", "negative_"):
        for name, channels in PIPELINES[kind][2].items():
            length = {"hunyuan": 4 if name.endswith("2") else 3}.get(kind, text)
            shape = (1, channels) if name.startswith("pooled") else (1, length, channels)
            call[prefix + name] = torch.randn(shape, generator=generator)
            if kind in ("hunyuan", "pixart"):
                call[prefix + name.replace("embeds", "attention_mask")] = torch.ones(1, length)
    if kind in ("hunyuan", "pixart"):
        call["use_resolution_binning"] = False
    return call | ({"negative_prompt": None} if kind == "pixart" else {})


def draw(pipeline, call):
    return torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)


def model_of(pipeline):
    return getattr(pipeline, "transformer", None) or pipeline.unet


@pytest.mark.parametrize("kind", KINDS)
def test_attach_call_detach(kind):
    """What covers the map draws the same picture, what does not another, and detaching brings back the first."""
    pipeline, call = make_pipeline(kind), make_call(kind)
    dense = draw(pipeline, call)
    assert dense.shape == (1, call["height"], call["width"], 3) and dense.std() > 0.01
    with attach(pipeline, ClearAttnProcessor(99)) as attachment:
        assert attachment.model is model_of(pipeline)
        assert (draw(pipeline, call) - dense).abs().max() < 1e-5
    with attach(pipeline, ClearAttnProcessor(1)):
        assert (draw(pipeline, call) - dense).abs().max() > 1e-3
    assert torch.equal(draw(pipeline, call), dense)


@pytest.mark.parametrize("kind", ["flux", "sd3", "unet"])
def test_lora(kind):
    """PEFT's layers beside the projections: used, fused into the weights, switched off and unloaded."""
    pipeline, call = make_pipeline(kind), make_call(kind)
    model = model_of(pipeline)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with attach(pipeline, ClearAttnProcessor(2)):
        plain = draw(pipeline, call)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        adapted = draw(pipeline, call)
        assert (adapted - plain).abs().max() > 1e-3
        model.fuse_lora()
        assert (draw(pipeline, call) - adapted).abs().max() < 1e-4
        model.unfuse_lora()
        model.disable_adapters()
        assert (draw(pipeline, call) - plain).abs().max() < 1e-4
        model.unload_lora()
        assert (draw(pipeline, call) - plain).abs().max() < 1e-4
    assert list(model.state_dict()) == list(weights)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, weights[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_fused_projections(kind):
    pipeline, call = make_pipeline(kind), make_call(kind)
    with attach(pipeline, ClearAttnProcessor(2)):
        expected = draw(pipeline, call)
    (pipeline if kind == "unet" else pipeline.transformer).fuse_qkv_projections()
    dense = draw(pipeline, call)
    with attach(pipeline, ClearAttnProcessor(2)):
        assert (draw(pipeline, call) - expected).abs().max() < 1e-5
    assert torch.equal(draw(pipeline, call), dense)


@pytest.mark.parametrize("first", ["attach", "offload"])
def test_offloading(first):
    """Models that come and go between calls, with the weights of processors; here from the CPU to the CPU."""
    pipeline, call = make_pipeline("flux"), make_call("flux")
    processor = ClearAttnProcessor(2, down_factor=2)
    with attach(pipeline, processor):
        expected = draw(pipeline, call)
    dense = draw(pipeline, call)
    if first == "offload":
        pipeline.enable_model_cpu_offload(device="cpu")
    with attach(pipeline, processor):
        if first == "attach":
            pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(draw(pipeline, call), expected)
    assert torch.equal(draw(pipeline, call), dense)


def test_threads():
    """Two pipelines of one model and two of others, of different sizes and texts, at the same time."""
    shared = make_model("flux")
    jobs = [
        (make_pipeline("flux", shared), make_call("flux", 8, 16, text=5)),
        (make_pipeline("flux", shared), make_call("flux", 12, 8, text=7)),
        (make_pipeline("sd3"), make_call("sd3", 8, 12)),
        (make_pipeline("unet"), make_call("unet", 16, 8)),
    ]
    attach(shared, ClearAttnProcessor(2))
    attach(jobs[2][0], NeighborhoodAttnProcessor(3))
    attach(jobs[3][0], AgentAttnProcessor())
    expected = [draw(*job) for job in jobs]
    barrier, wrong = threading.Barrier(len(jobs)), []

    def work(i):
        barrier.wait()
        for _ in range(3):
            if not torch.equal(draw(*jobs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
