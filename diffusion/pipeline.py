"""Sampling of class-conditional rectified flow as a standard diffusers pipeline."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from zoo.diffusion.denoiser import NeighborhoodDenoiser

__all__ = ["FlowPipeline"]


class FlowPipeline(DiffusionPipeline):
    """Images of chosen classes from noise, by integrating the velocity that a denoiser predicts.

    `save_pretrained` writes a standard folder, and `FlowPipeline.from_pretrained` reads it. diffusers' own
    `DiffusionPipeline.from_pretrained` knows the pipelines of other packages only by the file that holds them, which it
    runs: `custom_pipeline=zoo.diffusion.__path__[0]`, and `trust_remote_code=True` for newer versions of diffusers.

    Papers: rectified flow (https://arxiv.org/abs/2209.03003), classifier-free guidance
    (https://arxiv.org/abs/2207.12598).

    Args:
        denoiser: Predicts the velocity.
        scheduler: A flow-matching scheduler of diffusers, such as `FlowMatchEulerDiscreteScheduler`,
            `FlowMatchHeunDiscreteScheduler`, or `DPMSolverMultistepScheduler` with `use_flow_sigmas=True` and
            `prediction_type="flow_prediction"`.

    Raises:
        ValueError: `scheduler` is not for flow matching.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: NeighborhoodDenoiser, scheduler: SchedulerMixin):
        super().__init__()
        prediction = scheduler.config.get("prediction_type", "flow_prediction")
        if prediction != "flow_prediction":
            raise ValueError(
                f"scheduler: expected one for flow matching, such as FlowMatchEulerDiscreteScheduler, got a "
                f"{type(scheduler).__name__} with prediction_type={prediction!r}"
            )
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            class_labels: The class of each image; the number of classes itself stands for no class.
            num_inference_steps: Number of steps from noise to image.
            guidance_scale: How far the velocity is extrapolated from that without a class (0) to that of the class (1)
                and beyond. Every value but 0 and 1 doubles the work.
            generator: Source of the noise, or one for each image.
            output_type: "pil", "np" ([batch, height, width, channels]) or "pt" ([batch, channels, height, width]),
                both float from 0 to 1.
            return_dict: Whether to return the images as `.images`, or in a tuple.

        Raises:
            ValueError: An argument is out of range.
        """
        config = self.denoiser.config
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        for label in labels:
            if not 0 <= label <= config.num_classes:
                raise ValueError(f"class_labels: expected 0 to {config.num_classes}, got {label}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected 1 or more, got {num_inference_steps}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: expected 'pil', 'np' or 'pt', got {output_type!r}")

        device = self._execution_device
        shape = len(labels), config.in_channels, config.sample_size, config.sample_size
        sample = randn_tensor(shape, generator=generator, device=device, dtype=self.denoiser.dtype)
        labels = torch.tensor(labels, dtype=torch.long, device=device)
        # One pass for the velocities of the class, of no class, or of both.
        labels = {0: (self._no_class(labels),), 1: (labels,)}.get(guidance_scale, (self._no_class(labels), labels))
        passes, labels = len(labels), torch.cat(labels)

        self._set_timesteps(num_inference_steps, device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noise_level = (timestep / self.scheduler.config.num_train_timesteps).expand(len(labels))
            velocity = self.denoiser(sample.repeat(passes, 1, 1, 1), noise_level, labels).sample
            if passes == 2:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            sample = self.scheduler.step(velocity, timestep, sample).prev_sample

        images = (sample.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _no_class(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.full_like(labels, self.denoiser.config.num_classes)

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Equal steps; the scheduler's own would spend the last one between the noise levels 0.001 and 0.
            self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
