"""Tiny random models of every supported kind, and calls of them, without a network."""

from functools import partial

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed

KINDS = ("dit", "flux", "hunyuan", "pixart", "sd3", "unet")


def make_model(kind: str, seed: int = 0, small: bool = False):
    """A model with weights by which every part counts, `small` with as few layers as there can be.

    As they are made, models have gates and outputs of zero, which would hide attention.
    """
    torch.manual_seed(seed)
    model = _MODELS[kind](**(_SMALL[kind] if small else {})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    return model


def make_call(kind: str, height: int, width: int, text: int = 5, batch: int = 2, seed: int = 1) -> dict:
    """Arguments of `forward` for a map of `height` x `width` tokens (DiT's must be square)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return _CALLS[kind](randn, height, width, text, batch)


def run(model, call):
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


_MODELS = {
    "dit": partial(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    ),
    "flux": partial(
        FluxTransformer2DModel,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 6, 6),
    ),
    "hunyuan": partial(
        HunyuanDiT2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,  # fewer have no skip connection, or one too many
        mlp_ratio=2.0,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=3,
        text_len_t5=4,
        use_style_cond_and_image_meta_size=False,
    ),
    "pixart": partial(
        PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=8,
        caption_channels=6,
        use_additional_conditions=False,
    ),
    "sd3": partial(
        SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "unet": partial(
        UNet2DConditionModel,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    ),
}

_SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1},
    "hunyuan": {"num_layers": 2},
    "unet": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",) * 2,
    },
}

_CALLS = {
    "dit": lambda randn, h, w, text, batch: dict(
        hidden_states=randn(batch, 3, 2 * h, 2 * w),
        timestep=torch.arange(batch),
        class_labels=torch.arange(batch),
    ),
    "flux": lambda randn, h, w, text, batch: dict(
        hidden_states=randn(batch, h * w, 4),
        encoder_hidden_states=randn(batch, text, 8),
        pooled_projections=randn(batch, 6),
        timestep=torch.linspace(0.2, 0.8, batch),
        img_ids=image_ids(h, w),
        txt_ids=torch.zeros(text, 3),
    ),
    "hunyuan": lambda randn, h, w, text, batch: dict(
        hidden_states=randn(batch, 3, 2 * h, 2 * w),
        timestep=torch.full((batch,), 3.0),
        encoder_hidden_states=randn(batch, 3, 8),
        text_embedding_mask=torch.ones(batch, 3),
        encoder_hidden_states_t5=randn(batch, 4, 8),
        text_embedding_mask_t5=torch.ones(batch, 4),
        image_rotary_emb=get_2d_rotary_pos_embed(8, ((0, 0), (h, w)), (h, w), output_type="pt"),
    ),
    "pixart": lambda randn, h, w, text, batch: dict(
        hidden_states=randn(batch, 3, 2 * h, 2 * w),
        encoder_hidden_states=randn(batch, text, 6),
        timestep=torch.arange(batch),
    ),
    "sd3": lambda randn, h, w, text, batch: dict(
        hidden_states=randn(batch, 3, 2 * h, 2 * w),
        encoder_hidden_states=randn(batch, text, 10),
        pooled_projections=randn(batch, 6),
        timestep=torch.arange(batch),
    ),
    "unet": lambda randn, h, w, text, batch: dict(
        sample=randn(batch, 3, h, w),
        timestep=3,
        encoder_hidden_states=randn(batch, text, 6),
    ),
}


def image_ids(height: int, width: int) -> torch.Tensor:
    """Flux's ids of the tokens of a map: (0, row, column)."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.view(-1, 3)
