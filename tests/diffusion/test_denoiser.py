"""The denoiser and its pipeline: shapes, conditions, seeds, guidance, schedulers, saving and loading."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

import zoo.diffusion
from zoo.diffusion import FlowPipeline, NeighborhoodDenoiser

SMALL = dict(sample_size=8, in_channels=1, num_classes=3, dim=16, depth=2, num_heads=2)


def make_denoiser(**kwargs):
    """A small denoiser whose every weight counts."""
    torch.manual_seed(0)
    denoiser = NeighborhoodDenoiser(**{**SMALL, **kwargs}).eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return denoiser


def make_pipeline(denoiser=None, scheduler=None):
    pipeline = FlowPipeline(
        make_denoiser() if denoiser is None else denoiser, scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, labels=(0, 1, 2), seed=0, **kwargs):
    kwargs = {"num_inference_steps": 4, "output_type": "pt", **kwargs}
    return pipeline(list(labels), generator=torch.Generator().manual_seed(seed), **kwargs).images


def constant_velocity(sample, noise_level, class_labels):
    """Stands for a denoiser whose velocity is the class."""
    return Transformer2DModelOutput(sample=class_labels.to(sample).view(-1, 1, 1, 1).expand_as(sample))


class TestDenoiser:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"patch_size": 2, "dilations": [1]},
            {"in_channels": 3, "sample_size": 6, "kernel_size": 2, "dilations": [1, 3]},
        ],
    )
    def test_velocity_has_the_shape_of_the_sample(self, kwargs):
        denoiser = make_denoiser(**kwargs)
        sample = torch.randn(2, denoiser.config.in_channels, *[denoiser.config.sample_size] * 2)
        level, labels = torch.rand(2), torch.tensor([0, 3])
        velocity = denoiser(sample, level, labels).sample
        assert velocity.shape == sample.shape
        assert torch.equal(denoiser(sample, level, labels, return_dict=False)[0], velocity)

    def test_every_input_and_parameter_counts(self):
        denoiser = make_denoiser()
        sample, level, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7]), torch.tensor([0, 1])
        velocity = denoiser(sample, level, labels).sample
        assert not torch.allclose(denoiser(sample + 0.1, level, labels).sample, velocity)
        assert not torch.allclose(denoiser(sample, level / 2, labels).sample, velocity)
        assert not torch.allclose(denoiser(sample, level, labels + 1).sample, velocity)
        velocity.square().mean().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in denoiser.parameters())

    def test_images_of_a_batch_do_not_mix(self):
        denoiser = make_denoiser()
        sample, level, labels = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
        whole = denoiser(sample, level, labels).sample
        alone = torch.cat([denoiser(sample[i : i + 1], level[i : i + 1], labels[i : i + 1]).sample for i in range(3)])
        torch.testing.assert_close(alone, whole)

    def test_attention_is_local(self):
        denoiser = make_denoiser(depth=1, dilations=[1])
        sample, level, labels = torch.randn(1, 1, 8, 8), torch.tensor([0.5]), torch.tensor([0])
        changed = sample.clone()
        changed[..., 4, 4] += 1
        with torch.inference_mode():
            difference = denoiser(changed, level, labels).sample - denoiser(sample, level, labels).sample
        rows = difference[0, 0].abs().sum(1).nonzero().flatten()
        assert rows.tolist() == [3, 4, 5]

    def test_new_model_predicts_zero(self):
        denoiser = NeighborhoodDenoiser(**SMALL)
        assert not denoiser(torch.randn(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)).sample.any()

    def test_save_and_load(self, tmp_path):
        denoiser = make_denoiser()
        denoiser.save_pretrained(tmp_path)
        assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
        copy = NeighborhoodDenoiser.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        inputs = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])
        assert torch.equal(copy(*inputs).sample, denoiser(*inputs).sample)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"patch_size": 3}, "patch_size must divide sample_size, got 3 and 8"),
            ({"num_heads": 3}, "dim=16 and num_heads=3"),
            ({"dim": 9, "num_heads": 3}, "dim must be even"),
            ({"dilations": [1, 3]}, r"dilations: .* at most 2 for a window of 3 on a map of 8 x 8"),
            ({"dilations": []}, "one or more"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            NeighborhoodDenoiser(**{**SMALL, **kwargs})

    def test_bad_sample(self):
        with pytest.raises(ValueError, match=r"sample: expected \[batch, 1, 8, 8\], got \[1, 1, 9, 8\]"):
            make_denoiser()(torch.randn(1, 1, 9, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))


class TestPipeline:
    def test_output_types(self):
        pipeline = make_pipeline()
        tensor, array, pictures = (draw(pipeline, output_type=kind) for kind in ("pt", "np", "pil"))
        assert tensor.shape == (3, 1, 8, 8)
        assert 0 <= tensor.min() < tensor.max() <= 1
        np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert [picture.size for picture in pictures] == [(8, 8)] * 3
        np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1, ..., 0] * 255).round().astype("uint8"))

    def test_one_class(self):
        pipeline = make_pipeline()
        one = pipeline(2, 4, generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert torch.equal(one, draw(pipeline, [2]))

    def test_seeded(self):
        pipeline = make_pipeline()
        assert torch.equal(draw(pipeline), draw(pipeline))
        assert not torch.equal(draw(pipeline), draw(pipeline, seed=1))

    def test_one_generator_per_image(self):
        pipeline = make_pipeline()
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        both = pipeline([0, 1], 4, generator=generators, output_type="pt").images
        torch.testing.assert_close(both[1:], draw(pipeline, [1], seed=6))

    @pytest.mark.parametrize("steps", [1, 7])
    @pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
    def test_steps_and_guidance(self, steps, guidance):
        """Where the velocity is constant, any number of steps takes noise to noise - velocity."""
        pipeline = make_pipeline()
        pipeline.denoiser.forward = constant_velocity
        images = draw(pipeline, [0, 1, 2], num_inference_steps=steps, guidance_scale=guidance)
        noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        velocity = 3 + guidance * (torch.arange(3.0) - 3)  # no class is the label 3
        expected = ((noise - velocity.view(3, 1, 1, 1)) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize(("guidance", "batch"), [(0, 3), (1, 3), (1.5, 6)])
    def test_one_pass_where_one_suffices(self, guidance, batch):
        pipeline = make_pipeline()
        batches = []
        pipeline.denoiser.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
        draw(pipeline, guidance_scale=guidance, num_inference_steps=5)
        assert batches == [batch] * 5

    @pytest.mark.parametrize(
        "scheduler",
        [
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
            diffusers.FlowMatchHeunDiscreteScheduler(),
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        ],
        ids=["shift", "500", "heun", "dpm", "unipc"],
    )
    def test_schedulers_agree_over_many_steps(self, scheduler):
        torch.manual_seed(0)
        denoiser = make_denoiser()
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.03)
        expected = draw(make_pipeline(denoiser), num_inference_steps=50)
        images = draw(make_pipeline(denoiser, scheduler), num_inference_steps=50)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)

    def test_save_and_load(self, tmp_path):
        pipeline = make_pipeline()
        pipeline.save_pretrained(tmp_path)
        copy = FlowPipeline.from_pretrained(tmp_path)
        copy.set_progress_bar_config(disable=True)
        assert isinstance(copy.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
        assert torch.equal(draw(copy), draw(pipeline))

    def test_loading_by_the_base_class(self, tmp_path, monkeypatch):
        """diffusers copies the file of a pipeline that is not its own into a cache, and imports it from there."""
        monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
        pipeline = make_pipeline()
        pipeline.save_pretrained(tmp_path / "flow")
        copy = diffusers.DiffusionPipeline.from_pretrained(
            tmp_path / "flow", custom_pipeline=zoo.diffusion.__path__[0], trust_remote_code=True
        )
        copy.set_progress_bar_config(disable=True)
        assert isinstance(copy.denoiser, NeighborhoodDenoiser)
        assert torch.equal(draw(copy), draw(pipeline))

    def test_scheduler_for_another_prediction(self):
        with pytest.raises(ValueError, match=r"scheduler: .* got a DDIMScheduler with prediction_type='epsilon'"):
            make_pipeline(scheduler=diffusers.DDIMScheduler())

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"labels": [0, 4]}, "class_labels: expected 0 to 3, got 4"),
            ({"labels": [-1]}, "class_labels"),
            ({"num_inference_steps": 0}, "num_inference_steps: expected 1 or more, got 0"),
            ({"output_type": "latent"}, "output_type: expected 'pil', 'np' or 'pt', got 'latent'"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            draw(make_pipeline(), **kwargs)
