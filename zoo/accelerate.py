"""timm's own halo and window attention by our kernels: ``zoo.accelerate(timm.create_model("halonet50ts"))``."""

from timm.layers.halo_attn import HaloAttn
from timm.models import register_notrace_module
from timm.models.gcvit import WindowAttentionGlobal
from torch import Tensor, nn

from zoo.backbones.halonet import HaloAttention
from zoo.kernels import window_attention_2d

__all__ = ["accelerate", "restore"]


@register_notrace_module
class AcceleratedHaloAttn(HaloAttention):
    """timm's `HaloAttn` after `accelerate`. It also takes maps that its blocks do not divide."""


@register_notrace_module
class AcceleratedWindowAttentionGlobal(WindowAttentionGlobal):
    """timm's `WindowAttentionGlobal` after `accelerate`."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [batch * windows, tokens, dim], those of an image one after the other.
            q_global: [batch, tokens, dim], the query of all windows of an image.

        Returns:
            [batch * windows, tokens, dim].
        """
        if self.training and self.attn_drop.p > 0:  # the kernels have no dropout
            return super().forward(x, q_global)
        height, width = self.window_size
        shared = self.use_global and q_global is not None
        batch = q_global.shape[0] if shared else x.shape[0]
        # As a map the windows of an image are below each other.
        qkv = self.qkv(x).view(batch, -1, width, 2 if shared else 3, self.num_heads, self.head_dim)
        key, value = qkv[:, :, :, -2], qkv[:, :, :, -1]
        query = q_global.view(batch, height, width, self.num_heads, self.head_dim) if shared else qkv[:, :, :, 0]
        # timm's table has one row per query minus key, ours key minus query.
        table = self.rel_pos.relative_position_bias_table.T.unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1, 2)
        out = window_attention_2d(query, key, value, (height, width), rel_pos_bias=table, scale=self.scale)
        return self.proj_drop(self.proj(out.reshape(x.shape)))


_ACCELERATED = {HaloAttn: AcceleratedHaloAttn, WindowAttentionGlobal: AcceleratedWindowAttentionGlobal}
_RESTORED = {accelerated: original for original, accelerated in _ACCELERATED.items()}


def accelerate(model: nn.Module) -> nn.Module:
    """Switch timm's halo attention (HaloNets) and windowed attention (GC ViTs) in `model` to our kernels, in place.

    Only the classes of those modules change, and with them `forward`. Parameters, buffers, names and hooks stay, so
    the weights load and save as before, and outputs and gradients are the same up to rounding. Submodules that the
    kernels replace (`pos_embed`, `rel_pos`, `attn_drop`) are no longer called. timm before 1.0.31 gave images of a
    batch each other's global queries in GC ViT; here each has its own. While there is dropout of attention weights,
    that is while training with `attn_drop_rate`, GC ViT's attention remains timm's. TorchScript takes an accelerated
    HaloNet, but no GC ViT.

    Args:
        model: Any module with timm's `HaloAttn` or `WindowAttentionGlobal` inside. Done twice, it stays as it is.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: There is nothing in it to switch.
    """
    found = _switch(model, _ACCELERATED)
    if not found and not any(type(module) in _RESTORED for module in model.modules()):
        names = " or ".join(f"{cls.__module__}.{cls.__name__}" for cls in _ACCELERATED)
        raise ValueError(f"model has nothing to accelerate: {type(model).__name__} has no {names} inside")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; what was not accelerated stays as it is.

    Args:
        model: Any module.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    _switch(model, _RESTORED)
    return model


def _switch(model: nn.Module, classes: dict[type, type]) -> bool:
    """Change the classes of modules; whether there was one to change. Subclasses are somebody's own, and stay."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if type(module) in classes]
    for module in found:
        module.__class__ = classes[type(module)]
    return bool(found)
