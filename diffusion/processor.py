"""What the attention processors share: projections of every supported attention module, text, and the grid.

diffusers gives weights to attention modules and computation to processors, which are called as

    processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, ...)

`zoo.diffusion.attach` adds a keyword `grid`, a `Grid` that fits this very call: its tokens are those of
`hidden_states`, joined with the text tokens of `encoder_hidden_states` where the layer joins them. A processor needs no
base class for that, only a parameter called `grid`; if it has a method `check(grid, layer)`, that is called first.
Those that want the projections too derive from `GridAttnProcessor` and write `attend`.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedHunyuanAttnProcessor2_0,
    HunyuanAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from zoo.diffusion.grid import Grid, as_grid, square_grid

# Parts of diffusers' attention modules that no self-attention of a supported model has.
_UNSUPPORTED = "group_norm", "spatial_norm", "residual_connection"


class GridAttnProcessor:
    """Attention over a token grid inside diffusers: dense here, local in its subclasses.

    It serves every supported model's self-attention and joint attention with text, with or without fused projections.
    Cross-attention, which it meets when it was installed by `model.set_attn_processor`, stays what it was.

    Args:
        grid: The grid of every call, a `Grid` or (height, width), for `model.set_attn_processor`. None takes the grid
            that `zoo.diffusion.attach` hands over, or without it a square map.
    """

    def __init__(self, grid: Grid | tuple[int, int] | None = None) -> None:
        self.grid = None if grid is None else as_grid(grid)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float):
        """Attention over one sequence, whose tokens lie as `grid` says.

        Args:
            query: [batch, tokens, heads, head_dim], text and image in the order of `grid`.
            key: Shape of `query`.
            value: Shape of `query`.
            grid: Where the tokens lie.
            scale: Factor of the logits.

        Returns:
            What the image tokens get, [batch, height, width, heads, head_dim], and what the text tokens get,
            [batch, text, heads, head_dim], or None where there are none.
        """
        return grid.split(dense_attention(query, key, value, scale))

    def check(self, grid: Grid, layer: str) -> None:
        """Raise a ValueError, which names `layer`, if the processor cannot serve a map of that size."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        temb: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What diffusers' own processor returns for `attn`.

        Raises:
            ValueError: The grid is unknown or does not match the number of tokens, the window does not fit it, or the
                attention is of a kind that is not supported.
        """
        joint = encoder_hidden_states is not None and getattr(attn, "add_q_proj", None) is not None
        if encoder_hidden_states is not None and not joint:
            return _cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        for name in _UNSUPPORTED:
            if getattr(attn, name, None):
                raise ValueError(f"{type(self).__name__} does not support attention with {name}")
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask must be None for {type(self).__name__}: its image tokens see a window, which a mask "
                "over all tokens cannot be applied to"
            )

        text = encoder_hidden_states.shape[1] if joint else 0
        if grid is None:
            grid = self._find_grid(attn, hidden_states.shape[1], text)
            self.check(grid, "the attention layer")
        query, key, value = _project(attn, hidden_states, "to_q", "to_k", "to_v", "to_qkv", ("norm_q", "norm_k"))
        if joint:
            names = "add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv", ("norm_added_q", "norm_added_k")
            added = _project(attn, encoder_hidden_states, *names)
            pairs = zip(added, (query, key, value)) if grid.text_first else zip((query, key, value), added)
            query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        image, words = self.attend(query, key, value, grid, query.shape[-1] ** -0.5)
        image = image.flatten(3).flatten(1, 2)
        words = image[:, :0] if words is None else words.flatten(2)
        if grid.text and not joint:
            image = torch.cat((words, image) if grid.text_first else (image, words), dim=1)
        if getattr(attn, "to_out", None) is not None:
            image = attn.to_out[1](attn.to_out[0](image))
            image = image / getattr(attn, "rescale_output_factor", 1.0)
        if not joint:
            return image
        if getattr(attn, "to_add_out", None) is not None:
            words = attn.to_add_out(words)
        return image, words

    def _find_grid(self, attn: nn.Module, tokens: int, text: int) -> Grid:
        """The grid of a call to which nobody handed one."""
        text_first = isinstance(attn, FluxAttention)
        if self.grid is not None:
            grid = self.grid._replace(text_first=text_first)
            return (grid._replace(text=text) if text else grid).resolve(tokens, text)
        if text_first and not text:
            raise ValueError(
                "grid is unknown: Flux's single-stream layers hold text and image in one sequence. Use "
                "zoo.diffusion.attach(), which derives the grid of every call, or give the processor "
                "grid=Grid(height, width, text)"
            )
        return square_grid(tokens, text, text_first)

    # diffusers sets these two on every processor that has them, and passes others by without a word.

    @property
    def _attention_backend(self) -> None:
        return None

    @_attention_backend.setter
    def _attention_backend(self, backend) -> None:
        if backend is not None:
            raise ValueError(
                f"{type(self).__name__} computes with zoo.kernels and cannot take attention backend {backend!r}: "
                "detach it first, or call reset_attention_backend()"
            )

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config) -> None:
        if config is not None:
            raise ValueError(
                f"{type(self).__name__} does not support context parallelism: a window reaches tokens that lie on "
                "other devices; detach it first"
            )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of every query to every key, [batch, tokens, heads, head_dim]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def _project(attn, x, to_q, to_k, to_v, fused, norms):
    """Queries, keys and values [batch, tokens, heads, head_dim] of `x` [batch, tokens, channels]."""
    # LoRA layers sit on the separate projections, and a fused one would pass them by.
    if getattr(attn, "fused_projections", False) and not hasattr(getattr(attn, to_q), "base_layer"):
        qkv = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        qkv = [getattr(attn, name)(x) for name in (to_q, to_k, to_v)]
    query, key, value = (y.unflatten(-1, (attn.heads, -1)) for y in qkv)
    norm_q, norm_k = (getattr(attn, name, None) for name in norms)
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
    """What diffusers does by default."""
    fused = getattr(attn, "fused_projections", False)
    if image_rotary_emb is None:
        processor = FusedAttnProcessor2_0() if fused else AttnProcessor2_0()
        return processor(attn, hidden_states, encoder_hidden_states, attention_mask)
    processor = FusedHunyuanAttnProcessor2_0() if fused else HunyuanAttnProcessor2_0()
    return processor(
        attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
