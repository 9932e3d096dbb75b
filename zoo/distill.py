"""Turning a dense diffusion transformer into a local one, as CLEAR (arXiv:2412.16112) does."""

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.diffusion import ClearAttnProcessor, attach, clear_parameters, save_clear_weights
from zoo.errors import UserError

COMPARED_EVERY = 4  # of all attention layers, double-stream ones counted too; only single-stream ones are compared


class ClearDistillation(LightningModule):
    """Train the attention of a Flux with circular windows to do what full attention did.

    Student and teacher share every weight but those of the student's attention: queries, keys and values of the image,
    its output projections, and the pooling weights. The loss is that of flow matching, plus the squared distance of the
    student's velocity from the teacher's, plus that of their attention outputs in some single-stream layers. A
    checkpoint, and `attn_weights.safetensors` beside the logs in the end, hold the trained weights alone; the latter is
    for `zoo.diffusion.load_clear_weights`.

    Args:
        pretrained: Folder or hub name of a Flux, whose `transformer` is the teacher; None for one with random weights.
        config: Arguments of `FluxTransformer2DModel` for a random one.
        radius: Of the student's windows, in tokens.
        down_factor: See `zoo.diffusion.ClearAttnProcessor`.
        flow_matching: Weight of that loss.
        prediction: Weight of the distance of velocities.
        attention: Weight of the distance of attention outputs.
        guidance: Guidance scale that the transformer is told, where it takes one.
        lr: Learning rate of AdamW, constant.
        weight_decay: Of AdamW.
        gradient_checkpointing: Compute blocks again in the backward pass instead of keeping their activations.
        dtype: Of a pretrained teacher's weights, such as "bfloat16".
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        radius: int = 16,
        down_factor: int | None = None,
        flow_matching: float = 1.0,
        prediction: float = 0.5,
        attention: float = 0.5,
        guidance: float = 3.5,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if (pretrained is None) == (config is None):
            raise UserError("give either pretrained, where a Flux lies, or config, for one with random weights")
        if pretrained is None:
            self.transformer = FluxTransformer2DModel(**config)
        else:
            self.transformer = FluxTransformer2DModel.from_pretrained(
                pretrained, subfolder="transformer", torch_dtype=getattr(torch, dtype)
            )
        if not len(self.transformer.single_transformer_blocks):
            raise UserError("config: attention outputs are compared in single-stream blocks, of which there are none")
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        trained = {id(p) for p in clear_parameters(self.transformer).values()}
        self.transformer.requires_grad_(False)
        # A copy that knows the other weights already takes them as they are.
        shared = {id(p): p for p in self.transformer.parameters() if id(p) not in trained}
        self.teacher = copy.deepcopy(self.transformer, shared)
        self.attachment = attach(self.transformer, ClearAttnProcessor(radius, down_factor))
        for parameter in clear_parameters(self.transformer).values():
            parameter.requires_grad_(True)
        self.weights = {"flow_matching": flow_matching, "prediction": prediction, "attention": attention}
        self.guidance = guidance
        self.lr = lr
        self.weight_decay = weight_decay
        self.strict_loading = False  # the frozen weights come from the teacher's files

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        latents = batch["latents"]
        noise = torch.randn_like(latents)
        time = torch.randint(1, 1001, (len(latents),), device=latents.device) / 1000
        share = time.view(-1, 1, 1, 1).to(latents.dtype)
        call = self._arguments((1 - share) * latents + share * noise, time, batch)
        with torch.no_grad():
            target, target_attention = self._run(self.teacher, call)
        velocity, attention = self._run(self.transformer, call)
        losses = {
            "flow_matching": F.mse_loss(velocity.float(), pack(noise - latents).float()),
            "prediction": F.mse_loss(velocity.float(), target.float()),
            "attention": sum(F.mse_loss(a.float(), b.float()) for a, b in zip(attention, target_attention))
            / len(attention),
        }
        loss = sum(self.weights[name] * value for name, value in losses.items())
        size = len(latents)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        self.log_dict(
            {f"train_{name}": x for name, x in losses.items()}, on_epoch=True, sync_dist=True, batch_size=size
        )
        return loss

    @torch.no_grad()
    def draw(self, noise: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, steps: int) -> Tensor:
        """Latents that the teacher makes of `noise` [batch, channels, height, width], by Euler's method."""
        latents = noise
        times = torch.linspace(1, 0, steps + 1).tolist()
        prompt = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        for time, following in itertools.pairwise(times):
            call = self._arguments(latents, torch.full((len(latents),), time), prompt)
            velocity = self.teacher(**call, return_dict=False)[0]
            latents = latents + (following - time) * unpack(velocity, *latents.shape[-2:])
        return latents

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = list(clear_parameters(self.transformer).values())
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trained weights alone."""
        return {f"transformer.{name}": p.detach() for name, p in clear_parameters(self.transformer).items()}

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_clear_weights(self.transformer, folder / "attn_weights.safetensors")

    def _arguments(self, latents: Tensor, time: Tensor, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
        """Arguments of the transformer's forward."""
        height, width = (side // 2 for side in latents.shape[-2:])
        ids = torch.zeros(height, width, 3, device=latents.device)
        ids[..., 1] = torch.arange(height, device=latents.device)[:, None]
        ids[..., 2] = torch.arange(width, device=latents.device)
        call = dict(
            hidden_states=pack(latents),
            encoder_hidden_states=prompt["prompt_embeds"],
            pooled_projections=prompt["pooled_prompt_embeds"],
            timestep=time.to(latents),
            img_ids=ids.view(-1, 3),
            txt_ids=torch.zeros(prompt["prompt_embeds"].shape[1], 3, device=latents.device),
        )
        if self.transformer.config.guidance_embeds:
            call["guidance"] = torch.full_like(call["timestep"], self.guidance)
        return call

    def _run(self, transformer: nn.Module, call: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The velocity, and the attention outputs of the layers that are compared."""
        outputs, first = [], len(transformer.transformer_blocks)
        blocks = transformer.single_transformer_blocks
        compared = [b for i, b in enumerate(blocks, first) if i % COMPARED_EVERY == 0] or [blocks[-1]]
        # Taken off again before the backward pass, in which checkpointed blocks run once more.
        hooks = [b.attn.register_forward_hook(lambda module, args, out: outputs.append(out)) for b in compared]
        try:
            velocity = transformer(**call, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return velocity, outputs


def pack(latents: Tensor) -> Tensor:
    """Flux's tokens [batch, height / 2 * width / 2, 4 * channels] of latents [batch, channels, height, width]."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    blocks = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
