"""A small diffusion transformer of neighborhood attention, conditioned on noise level and class.

Papers:
* `Scalable Diffusion Models with Transformers` (adaptive layer norm) - https://arxiv.org/abs/2212.09748
* `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143
* `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001
"""

from collections.abc import Sequence
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from zoo.kernels import neighborhood_attention_2d_qkvpacked

__all__ = ["NeighborhoodDenoiser"]


class NeighborhoodDenoiser(ModelMixin, ConfigMixin):
    """Predicts the velocity of a noisy image: how it changes with the noise level.

    The image is cut into patches, one token each. Every block is neighborhood attention with a learnt relative
    position bias and an MLP, each scaled, shifted and gated by the noise level and the class (adaptive layer norm).
    A new model predicts zero.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        patch_size: int = 1,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2),
        mlp_ratio: float = 4.0,
    ):
        """
        Args:
            sample_size: Side of the images in pixels, a multiple of `patch_size`.
            in_channels: Number of image channels.
            num_classes: Number of classes; the label `num_classes` itself stands for no class.
            patch_size: Side of a patch in pixels.
            dim: Width of the tokens, a multiple of `num_heads`, and even.
            depth: Number of blocks.
            num_heads: Number of attention heads.
            kernel_size: Side of the attention window in tokens.
            dilations: Distances between neighbours that the blocks cycle through; none times `kernel_size` may exceed
                the side of the token map.
            mlp_ratio: Hidden width of the MLPs, in units of `dim`.

        Raises:
            ValueError: Sizes do not fit each other as said above.
        """
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"patch_size must divide sample_size, got {patch_size} and {sample_size}")
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim must be even and a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        side = sample_size // patch_size
        if not dilations or kernel_size * max(dilations) > side:
            raise ValueError(
                f"dilations: expected one or more, at most {side // kernel_size} for a window of {kernel_size} on a "
                f"map of {side} x {side} tokens, got {tuple(dilations)}"
            )

        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, side, side, dim) * 0.02)
        self.noise_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(
            DenoiserBlock(dim, num_heads, kernel_size, dilation, mlp_ratio)
            for dilation in islice(cycle(dilations), depth)
        )
        self.norm = AdaptiveNorm(dim, gated=False)
        self.head = nn.Linear(dim, patch_size**2 * in_channels)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, sample: Tensor, noise_level: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            sample: [batch, in_channels, sample_size, sample_size], `(1 - noise_level) * image + noise_level * noise`.
            noise_level: [batch], 0 (an image) to 1 (noise).
            class_labels: [batch], integers; `num_classes` for no class.
            return_dict: Whether to return the velocity as `.sample`, or in a tuple.

        Returns:
            The velocity `noise - image`, of the shape of `sample`.

        Raises:
            ValueError: `sample` has another shape.
        """
        config = self.config
        if sample.ndim != 4 or sample.shape[1:] != (config.in_channels, config.sample_size, config.sample_size):
            raise ValueError(
                f"sample: expected [batch, {config.in_channels}, {config.sample_size}, {config.sample_size}], "
                f"got {list(sample.shape)}"
            )
        frequencies = get_timestep_embedding(1000 * noise_level, config.dim, flip_sin_to_cos=True)
        condition = F.silu(self.noise_embed(frequencies.to(sample.dtype)) + self.class_embed(class_labels))
        x = self.patch_embed(sample).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        [x] = self.norm(x, condition)
        velocity = F.pixel_shuffle(self.head(x).permute(0, 3, 1, 2), config.patch_size)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class DenoiserBlock(nn.Module):
    """Pre-norm transformer block of neighborhood attention and an MLP, both modulated by a condition."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation

        self.norm1 = AdaptiveNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)
        self.norm2 = AdaptiveNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[batch, height, width, dim] and [batch, dim] -> [batch, height, width, dim]"""
        y, gate = self.norm1(x, condition)
        qkv = self.qkv(y).unflatten(-1, (3, self.num_heads, -1))
        y = neighborhood_attention_2d_qkvpacked(qkv, self.kernel_size, self.dilation, rel_pos_bias=self.rpb)
        x = x + gate * self.proj(y.flatten(3))
        y, gate = self.norm2(x, condition)
        return x + gate * self.mlp(y)


class AdaptiveNorm(nn.Module):
    """Layer norm with scale and shift, and a gate for the branch it begins, linear in a condition and zero at first."""

    def __init__(self, dim: int, gated: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, (2 + gated) * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        """[batch, height, width, dim] and [batch, dim] -> the scaled and shifted norm of x, and the gate if any"""
        scale, shift, *gate = self.modulation(condition)[:, None, None].split(x.shape[-1], dim=-1)
        return [self.norm(x) * (1 + scale) + shift, *gate]
