"""The generative task: class-conditional rectified flow, trained by Lightning and saved as a diffusers pipeline."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import make_grid

from zoo.diffusion import FlowPipeline, NeighborhoodDenoiser
from zoo.errors import UserError
from zoo.task import cosine_schedule


class RectifiedFlow(LightningModule):
    """Train a denoiser to predict the velocity of a straight line from image to noise.

    Validation, samples and the saved pipeline use the moving average of the weights. With a logger, a grid of samples
    (a column per class) is logged as training goes, and the run's folder ends with a ``pipeline`` for ``zoo sample``.

    Papers: rectified flow (https://arxiv.org/abs/2209.03003), logit-normal noise levels
    (https://arxiv.org/abs/2403.03206), classifier-free guidance (https://arxiv.org/abs/2207.12598).

    Args:
        num_classes: Number of classes; the command line takes it from the data.
        denoiser: Further arguments of :class:`zoo.diffusion.NeighborhoodDenoiser`, such as ``sample_size``.
        lr: Peak learning rate, for the whole batch.
        weight_decay: Applied to matrices and kernels, not to biases.
        warmup_epochs: Epochs (or part of one) over which the learning rate rises from zero.
        label_dropout: Share of the images trained without their class, which guidance needs.
        ema_decay: Decay per step of the moving average, reached gradually.
        guidance_scale: Of the logged samples.
        sample_steps: Of the logged samples.
    """

    def __init__(
        self,
        num_classes: int = 10,
        denoiser: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_epochs: float = 0.0,
        label_dropout: float = 0.1,
        ema_decay: float = 0.999,
        guidance_scale: float = 1.0,
        sample_steps: int = 20,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise UserError(f"label_dropout: expected 0 to 1, got {label_dropout}")
        if not 0 <= ema_decay < 1:
            raise UserError(f"ema_decay: expected 0 up to but not 1, got {ema_decay}")
        self.save_hyperparameters()
        try:
            self.denoiser = NeighborhoodDenoiser(num_classes=num_classes, **(denoiser or {}))
        except (TypeError, ValueError) as error:
            raise UserError(f"denoiser: {error}") from error
        self.average = AveragedModel(self.denoiser, avg_fn=self._average).requires_grad_(False)
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.label_dropout = label_dropout
        self.ema_decay = ema_decay
        self.guidance_scale = guidance_scale
        self.sample_steps = sample_steps

    def _average(self, average: Tensor, value: Tensor, steps: Tensor | int) -> Tensor:
        # A young average forgets faster: the first weights are not worth keeping.
        decay = min(self.ema_decay, (1 + int(steps)) / (10 + int(steps)))
        return torch.lerp(value, average, decay)

    @property
    def ema(self) -> NeighborhoodDenoiser:
        """The denoiser with averaged weights."""
        return self.average.module

    def pipeline(self) -> FlowPipeline:
        """The averaged denoiser (not a copy) as a diffusers pipeline, without progress bar."""
        pipeline = FlowPipeline(self.ema, FlowMatchEulerDiscreteScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def flow_loss(
        self, denoiser: NeighborhoodDenoiser, images: Tensor, noise: Tensor, noise_level: Tensor, labels: Tensor
    ) -> Tensor:
        """Mean squared error of the velocity at one noise level per image."""
        level = noise_level.view(-1, 1, 1, 1)
        velocity = denoiser((1 - level) * images + level * noise, noise_level, labels).sample
        return F.mse_loss(velocity, noise - images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
        labels = labels.masked_fill(dropped, self.denoiser.config.num_classes)
        noise_level = torch.randn(len(images), device=images.device).sigmoid()
        loss = self.flow_loss(self.denoiser, images, torch.randn_like(images), noise_level, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(labels))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.denoiser)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val_loss")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test_loss")

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, name: str) -> None:
        images, labels = batch
        # The same noise every time, and noise levels spread evenly, so that losses differ by the weights alone.
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(images.shape, generator=generator).to(images)
        noise_level = (torch.randperm(len(images), generator=generator).to(images) + 0.5) / len(images)
        real = int((labels >= 0).sum())  # a process without images of its own gets one that does not count
        loss = self.flow_loss(self.ema, images, noise, noise_level, labels.clamp(min=0))
        self.log(name, loss, prog_bar=True, sync_dist=True, batch_size=real)

    def on_validation_epoch_end(self) -> None:
        writers = [logger for logger in self.loggers if hasattr(logger.experiment, "add_image")]
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if not (writers and training and self.trainer.is_global_zero):
            return
        classes = range(self.denoiser.config.num_classes)
        images = self.pipeline()(
            [*classes] * 4,
            num_inference_steps=self.sample_steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for logger in writers:
            logger.experiment.add_image("samples", make_grid(images, nrow=len(classes), padding=1), self.global_step)

    def predict_step(self, *args: Any) -> None:
        raise UserError("a generative model has nothing to predict; `zoo sample` draws from it")

    def on_train_end(self) -> None:
        # Without a logger the folder is not the run's; a trial run has none.
        if self.trainer.is_global_zero and self.trainer.logger is not None and self.trainer.log_dir is not None:
            self.pipeline().save_pretrained(Path(self.trainer.log_dir) / "pipeline")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = create_optimizer_v2(self.denoiser, opt="adamw", lr=self.lr, weight_decay=self.weight_decay)
        return cosine_schedule(self.trainer, optimizer, self.warmup_epochs)
