"""GC ViT: transformers of window attention whose queries are, in every second block, global to the image.

Paper: `Global Context Vision Transformers` - https://arxiv.org/abs/2206.09959

The names of the weights are those of the published checkpoints (https://github.com/NVlabs/GCVit), which load as
downloaded. Their licence, CC BY-NC-SA 4.0, is not that of this code.
"""

import logging
from collections.abc import Callable, Sequence
from math import isqrt, log2

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    resize_rel_pos_bias_table_simple,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from zoo.backbones._backbone import (
    Backbone,
    Stages,
    TransformerBlock,
    any_padding,
    autocast_dtype,
    check_heads,
    check_positive,
    get_norm_layer,
)
from zoo.backbones._checkpoint import AdaptedLoading, build_model, checkpoint_filter_fn  # noqa: F401
from zoo.kernels import window_attention_2d
from zoo.kernels._cells import cut, join
from zoo.kernels._symbols import ceil_div, crop, is_symbol
from zoo.kernels.window.tiled import window_attention_2d as scripted_window_attention_2d

__all__ = ["GcVit", "GlobalContextBlock", "GlobalQuery", "WindowAttention"]

_logger = logging.getLogger(__name__)


@register_notrace_module  # pads by the size of the map, which fx cannot follow
class WindowAttention(AdaptedLoading, nn.Module):
    """Multi-head attention within windows, with a learnt relative position bias, by its own or by global queries.

    Papers: Swin (https://arxiv.org/abs/2103.14030), global queries: GC ViT (https://arxiv.org/abs/2206.09959).

    A map is zero-padded at the bottom and the right to whole windows, before `qkv`, and its padding attended to like
    any token: what the authors' detection backbone does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        use_global: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of heads, a divisor of `dim`.
            window_size: Side of the window, or (height, width).
            use_global: Whether the queries are given. `qkv` then makes keys and values only.
            qkv_bias: Whether queries, keys and values have a bias.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: `num_heads` does not divide `dim`, or `window_size` is below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(num_heads, dim=dim)
        check_positive(window_size=window_size)
        self.num_heads = num_heads
        self.window_size = to_2tuple(window_size)
        self.use_global = use_global
        self.scale = (dim // num_heads) ** -0.5

        offsets = (2 * self.window_size[0] - 1) * (2 * self.window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads, **dd))
        self.qkv = nn.Linear(dim, (2 if use_global else 3) * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [batch, height, width, dim], any height and width.
            q_global: [batch, *window_size, num_heads, dim // num_heads], the queries of every window; not used by
                attention with queries of its own.

        Returns:
            [batch, height, width, dim].

        Raises:
            ValueError: `q_global` is missing.
        """
        height, width = x.shape[1], x.shape[2]
        pad_h = ceil_div(height, self.window_size[0]) * self.window_size[0] - height
        pad_w = ceil_div(width, self.window_size[1]) * self.window_size[1] - width
        if any_padding(pad_h, pad_w):
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))

        if self.use_global:
            key, value = self.qkv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(3)
            if q_global is None:
                raise ValueError("q_global must be given to attention with global queries, got None")
            query = q_global.to(key.dtype)  # under autocast the two may differ
        else:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        bias = self._bias()
        if torch.jit.is_scripting():
            x = scripted_window_attention_2d(query, key, value, self.window_size, (0, 0), bias, self.scale)
        else:
            x = window_attention_2d(query, key, value, self.window_size, rel_pos_bias=bias, scale=self.scale)
        x = x.flatten(3)

        if any_padding(pad_h, pad_w):
            x = crop(x, height, width)
        return self.proj_drop(self.proj(x))

    def _bias(self) -> Tensor:
        """The table as [num_heads, *offsets]. Its rows are Swin's: offsets of the query from the key."""
        height, width = 2 * self.window_size[0] - 1, 2 * self.window_size[1] - 1
        return self.relative_position_bias_table.view(height, width, self.num_heads).permute(2, 0, 1).flip((1, 2))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Edit `state_dict` to fit: resize the table of another, square window, drop published index buffers."""
        state_dict.pop(f"{prefix}relative_position_index", None)
        name = f"{prefix}relative_position_bias_table"
        table, shape = state_dict.get(name), self.relative_position_bias_table.shape
        if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[0] == shape[0]:
            return
        side = isqrt(table.shape[0])
        if side**2 != table.shape[0]:
            return
        window = (side + 1) // 2
        _logger.info(
            "%s: resizing the bias table from a %dx%d window to %dx%d", name, window, window, *self.window_size
        )
        resized = resize_rel_pos_bias_table_simple(table.float(), self.window_size, shape)
        state_dict[name] = resized.to(table.dtype)


class GlobalContextBlock(TransformerBlock):
    """`TransformerBlock` of window attention, perhaps with global queries."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        use_global: bool = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        """
        Args:
            dim: Width of the tokens.
            num_heads: Number of attention heads.
            window_size: Side of the attention window.
            use_global: Whether attention takes the global query.
            proj_drop: Dropout rate of the attention's output and in the MLP.
            kwargs: Other options of `TransformerBlock`.
        """
        dd = {"device": device, "dtype": dtype}
        attn = WindowAttention(dim, num_heads, window_size, use_global, proj_drop=proj_drop, **dd)
        super().__init__(dim, attn, proj_drop=proj_drop, **dd, **kwargs)

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """[batch, height, width, dim] -> [batch, height, width, dim]; for `q_global` see `WindowAttention`"""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._forward, x, q_global)
        return self._forward(x, q_global)

    def _forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        return self._add(x, self.attn(self.norm1(x), q_global))


@register_notrace_function  # whether it cuts depends on the map
def stack_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """[batch, height, width, dim] -> [batch, windows * height of one, width of one, dim], windows row by row

    The map is left as it is where windows do not divide it.
    """
    height, width = x.shape[1], x.shape[2]
    rows, cols = window_size
    if is_symbol(height) or is_symbol(width) or height % rows > 0 or width % cols > 0:
        return x
    return cut(x, (-1, rows), (-1, cols)).flatten(1, 3)


@register_notrace_function
def unstack_windows(x: Tensor, height: int, width: int, window_size: tuple[int, int]) -> Tensor:
    """Inverse of `stack_windows`, for a map of this height and width."""
    rows, cols = window_size
    if x.shape[1] == height:  # not stacked, or of one column
        return x
    return join(x.unflatten(1, (height // rows, width // cols, rows)))


class GlobalContextBlocks(nn.ModuleList):
    """Blocks in a row, all with the same windows and the same global query.

    No block sees beyond a window. So the map is cut once for all: the blocks have a map of windows below each other.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__(blocks)
        self.window_size = self[0].attn.window_size

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = stack_windows(x, self.window_size)
        for block in self:
            x = block(x, q_global)
        return unstack_windows(x, height, width, self.window_size)


@register_notrace_function
def as_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast, if that is on: what convolves it takes it so, and what is added to it is so."""
    if not torch.jit.is_scripting():
        dtype = autocast_dtype(x)
        if dtype is not None and x.dtype == torch.float32:
            return x.to(dtype)
    return x


class SqueezeExcite(nn.Module):
    """Scale of every channel by what the means of all channels say."""

    def __init__(
        self, dim: int, reduction: int = 4, act_layer: Callable[..., nn.Module] = nn.GELU, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False, **dd),
            act_layer(),
            nn.Linear(dim // reduction, dim, bias=False, **dd),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, height, width] -> [batch, dim, height, width]"""
        return x * self.fc(x.mean((2, 3))).unsqueeze(-1).unsqueeze(-1)


def conv_branch(dim: int, act_layer: Callable[..., nn.Module] = nn.GELU, device=None, dtype=None) -> nn.Sequential:
    """What is added to a map of [batch, dim, height, width] before it is reduced."""
    dd = {"device": device, "dtype": dtype}
    return nn.Sequential(
        nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False, **dd),
        act_layer(),
        SqueezeExcite(dim, act_layer=act_layer, **dd),
        nn.Conv2d(dim, dim, kernel_size=1, bias=False, **dd),
    )


class ConvReduction(nn.Module):
    """Halve a map: a residual convolution and a 3x3 convolution of stride 2, between two norms."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.conv = conv_branch(dim, act_layer, **dd)
        self.reduction = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm2 = norm_layer(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, ceil(height / 2), ceil(width / 2), out_dim]"""
        x = as_autocast(self.norm1(x).permute(0, 3, 1, 2))
        x = self.reduction(x + self.conv(x))
        return self.norm2(x.permute(0, 2, 3, 1))


class ConvEmbed(nn.Module):
    """Overlapping patches: a 3x3 convolution of stride 2 and a reduction."""

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 64,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=3, stride=2, padding=1, **dd)
        self.conv_down = ConvReduction(embed_dim, embed_dim, norm_layer, act_layer, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_chans, height, width] -> [batch, ceil(height / 4), ceil(width / 4), embed_dim]"""
        return self.conv_down(self.proj(x).permute(0, 2, 3, 1).contiguous())  # the norm would copy in float32


class ResidualConv(nn.Module):
    """One step towards the global query: a residual convolution, and if `pool` a maximum over 3x3 with stride 2."""

    def __init__(self, dim: int, pool: bool, act_layer: Callable[..., nn.Module] = nn.GELU, device=None, dtype=None):
        super().__init__()
        self.conv = conv_branch(dim, act_layer, device=device, dtype=dtype)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x + self.conv(x))


@register_notrace_module  # resizes by the size of the map, which fx cannot follow
class GlobalQuery(nn.Module):
    """The query that all windows of an image share: its whole map, reduced to the size of one window.

    Where the steps do not end at that size, bicubic interpolation does, as in the authors' detection backbone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        num_pools: int = 0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the map.
            num_heads: Number of attention heads.
            window_size: Side of the window, or (height, width).
            num_pools: Number of steps that halve the map; if 0 there is one that does not.
            act_layer: Activation.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.window_size = to_2tuple(window_size)
        self.to_q_global = nn.Sequential(
            *(ResidualConv(dim, pool=num_pools > 0, act_layer=act_layer, **dd) for _ in range(max(1, num_pools)))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, height, width, dim] -> [batch, *window_size, num_heads, dim // num_heads]"""
        x = self.to_q_global(as_autocast(x.permute(0, 3, 1, 2)))
        height, width = x.shape[2], x.shape[3]
        if is_symbol(height) or is_symbol(width) or height != self.window_size[0] or width != self.window_size[1]:
            x = F.interpolate(x, size=list(self.window_size), mode="bicubic", align_corners=False)
        return x.permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))


class GlobalContextLevel(nn.Module):
    """Blocks at one resolution, the global query of every second one, and the downsampler to the next level."""

    def __init__(self, blocks: Sequence[nn.Module], q_global_gen: nn.Module | None, downsample: nn.Module | None):
        super().__init__()
        self.q_global_gen = q_global_gen
        self.blocks = GlobalContextBlocks(blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: [batch, height, width, dim].

        Returns:
            The level's map, [batch, height, width, dim], and the input of the next level.
        """
        q_global = None if self.q_global_gen is None else self.q_global_gen(x)
        x = self.blocks(x, q_global)
        return x, self.downsample(x)


class GcVit(Backbone):
    """GC ViT (https://arxiv.org/abs/2206.09959), for any input size; exact where the windows divide the maps.

    Windows are a fraction of the image given at construction, `img_size`. They stay as they are for images of other
    sizes, whose maps are padded to whole windows.
    """

    trunk_name = "levels"
    no_decay_suffixes = (".relative_position_bias_table",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        window_ratio: Sequence[int] = (32, 32, 16, 32),
        window_size: Sequence[int | tuple[int, int]] | None = None,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 19, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType = nn.LayerNorm,
        act_layer: LayerType = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            img_size: Side of the image, or (height, width), from which the sides of the windows follow.
            window_ratio: Per level, side of the image over that of a window.
            window_size: Per level, side of the window in tokens, or (height, width); None for what follows from
                `img_size`. `window_ratio` then only says how many times a map is halved on the way to a query.
            embed_dim: Width of the first level; it doubles from level to level.
            depths: Number of blocks per level; every second one has global queries.
            num_heads: Number of attention heads per level.
            mlp_ratio: Hidden width of the MLPs, in units of the level's width.
            init_values: Initial layer scale; None for no layer scale.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the attentions' outputs and in the MLPs.
            drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLPs and of the convolutions.

        Raises:
            ValueError: `depths`, `num_heads`, `window_ratio` and `window_size` differ in length, `num_heads` does not
                divide the widths, or one of the others is below 1.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(depths=depths, window_ratio=window_ratio)
        num_levels = len(depths)
        if window_size is None:
            window_size = [tuple(max(1, side // ratio) for side in to_2tuple(img_size)) for ratio in window_ratio]
        if not len(num_heads) == len(window_ratio) == len(window_size) == num_levels:
            raise ValueError(
                "depths, num_heads, window_ratio and window_size must have one entry per level, "
                f"got {depths}, {num_heads}, {window_ratio} and {window_size}"
            )
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        layers = dict(norm_layer=norm_layer, act_layer=act_layer, **dd)
        dims = [embed_dim * 2**i for i in range(num_levels)]
        reductions = [4 * 2**i for i in range(num_levels)]
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        self.patch_embed = ConvEmbed(in_chans, embed_dim, **layers)
        self.levels = Stages()
        for i, dim in enumerate(dims):
            blocks = [
                GlobalContextBlock(
                    dim,
                    num_heads=num_heads[i],
                    window_size=window_size[i],
                    use_global=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    **layers,
                )
                for j, drop_path in enumerate(drop_paths[i])
            ]
            q_global_gen = None
            if depths[i] > 1:
                num_pools = max(0, int(log2(window_ratio[i] / reductions[i])))
                q_global_gen = GlobalQuery(dim, num_heads[i], window_size[i], num_pools, act_layer, **dd)
            downsample = ConvReduction(dim, 2 * dim, **layers) if i < num_levels - 1 else None
            self.levels.append(GlobalContextLevel(blocks, q_global_gen, downsample))
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction, module=f"levels.{i}.blocks")
            for i, (dim, reduction) in enumerate(zip(dims, reductions))
        ]
        self._init_head(dims[-1], in_chans, num_classes, global_pool, drop_rate, norm_layer, **dd)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.levels(x, take_indices, max_index)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        level = r"^levels\.(\d+)"
        blocks = [
            (rf"{level}\.q_global_gen", (0,)),  # with the first block
            (rf"{level}\.blocks\.(\d+)", None),
            (rf"{level}\.downsample", (99999,)),  # 99999: with the group before it
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=level if coarse else blocks)


def _cfg(url: str = "", **kwargs) -> dict:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "cc-by-nc-sa-4.0",
        "origin_url": "https://github.com/NVlabs/GCVit",
        "paper_ids": "arXiv:2206.09959",
        "paper_name": "Global Context Vision Transformers",
        **kwargs,
    }


_HUB = "https://huggingface.co/nvidia/GCViT/resolve/main"
# Unconfirmed, Google Drive answers for a file of this size with a page that asks whether to skip the virus scan.
_DRIVE = "https://drive.google.com/uc?export=download&confirm=t&id="

default_cfgs = generate_default_cfgs(
    {
        "gc_vit_xxtiny.in1k": _cfg(f"{_HUB}/gcvit_1k_xxtiny.pth.tar", crop_pct=1.0),
        "gc_vit_xtiny.in1k": _cfg(f"{_HUB}/gcvit_1k_xtiny.pth.tar"),
        "gc_vit_tiny.in1k": _cfg(f"{_HUB}/gcvit_1k_tiny.pth.tar", crop_pct=1.0),
        "gc_vit_tiny2.in1k": _cfg(f"{_HUB}/gcvit_1k_tiny2.pth.tar"),
        "gc_vit_small.in1k": _cfg(f"{_HUB}/gcvit_1k_small.pth.tar"),
        "gc_vit_small2.in1k": _cfg(f"{_HUB}/gcvit_1k_small2.pth.tar"),
        "gc_vit_base.in1k": _cfg(f"{_HUB}/gcvit_1k_base.pth.tar", crop_pct=1.0),
        "gc_vit_large.in1k": _cfg(f"{_HUB}/gcvit_1k_large.pth.tar", crop_pct=1.0),
        "gc_vit_large_224_21k.in21k_ft_in1k": _cfg(f"{_DRIVE}1maGDr6mJkLyRTUkspMzCgSlhDzNRFGEf", crop_pct=1.0),
        "gc_vit_large_384_21k.in21k_ft_in1k": _cfg(
            f"{_HUB}/gcvit_21k_large_384.pth.tar",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
            crop_mode="squash",
        ),
        "gc_vit_large_512_21k.in21k_ft_in1k": _cfg(
            f"{_HUB}/gcvit_21k_large_512.pth.tar",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
            crop_pct=1.0,
            crop_mode="squash",
        ),
        "test_gc_vit.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_gc_vit(variant: str, pretrained: bool = False, **kwargs) -> GcVit:
    return build_model(GcVit, variant, pretrained, **kwargs)


_TINY = dict(embed_dim=64, num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, num_heads=(3, 6, 12, 24), mlp_ratio=2.0, init_values=1e-5, drop_path_rate=0.3)
_BASE = dict(embed_dim=128, num_heads=(4, 8, 16, 32), mlp_ratio=2.0, init_values=1e-5, drop_path_rate=0.5)
_LARGE = dict(embed_dim=192, num_heads=(6, 12, 24, 48), mlp_ratio=2.0, init_values=1e-5, drop_path_rate=0.5)


@register_model
def gc_vit_xxtiny(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_TINY, depths=(2, 2, 6, 2))
    return _create_gc_vit("gc_vit_xxtiny", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_xtiny(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_TINY, depths=(3, 4, 6, 5))
    return _create_gc_vit("gc_vit_xtiny", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_tiny(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_TINY, depths=(3, 4, 19, 5))
    return _create_gc_vit("gc_vit_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_tiny2(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_TINY, depths=(3, 4, 29, 5), drop_path_rate=0.25)
    return _create_gc_vit("gc_vit_tiny2", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_small(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_SMALL, depths=(3, 4, 19, 5))
    return _create_gc_vit("gc_vit_small", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_small2(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_SMALL, depths=(3, 4, 23, 5), mlp_ratio=3.0, drop_path_rate=0.35)
    return _create_gc_vit("gc_vit_small2", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_base(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_BASE, depths=(3, 4, 19, 5))
    return _create_gc_vit("gc_vit_base", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_large(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_LARGE, depths=(3, 4, 19, 5))
    return _create_gc_vit("gc_vit_large", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_large_224_21k(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_LARGE, depths=(3, 4, 19, 5))
    return _create_gc_vit("gc_vit_large_224_21k", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_large_384_21k(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_LARGE, depths=(3, 4, 19, 5), img_size=384, drop_path_rate=0.1)
    return _create_gc_vit("gc_vit_large_384_21k", pretrained, **{**model_args, **kwargs})


@register_model
def gc_vit_large_512_21k(pretrained: bool = False, **kwargs) -> GcVit:
    model_args = dict(_LARGE, depths=(3, 4, 19, 5), img_size=512, drop_path_rate=0.1)
    return _create_gc_vit("gc_vit_large_512_21k", pretrained, **{**model_args, **kwargs})


@register_model
def test_gc_vit(pretrained: bool = False, **kwargs) -> GcVit:  # noqa: PT028 (a model, not a test)
    """The smallest GC ViT, for tests, at 96x96."""
    model_args = dict(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2.0, img_size=96)
    return _create_gc_vit("test_gc_vit", pretrained, **{**model_args, **kwargs})
