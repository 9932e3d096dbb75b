"""What the families share: timm's interface around a patch embedding, a trunk and a head, and the trunks of most."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerType,
    Mlp,
    PatchEmbed,
    create_classifier,
    get_device_dtype,
    global_pool_nlc,
    trunc_normal_,
)
from timm.layers import get_norm_layer as timm_norm_layer
from timm.models import checkpoint, named_apply, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.backbones._checkpoint import CheckedLoading
from zoo.kernels._symbols import is_symbol
from zoo.kernels.depthwise_conv import add_depthwise_conv
from zoo.kernels.layer_norm import layer_norm

__all__ = [
    "Backbone",
    "Blocks",
    "CheckpointedBlock",
    "DepthwiseConv",
    "LayerNorm",
    "PaddedPatchEmbed",
    "Stage",
    "Stages",
    "TransformerBlock",
    "any_padding",
    "autocast_dtype",
    "before_product",
    "check_heads",
    "check_positive",
    "get_norm_layer",
]


# timm's patches as a map of [batch, height, width, channels], of an image of any size padded to whole patches
PaddedPatchEmbed = partial(PatchEmbed, img_size=None, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True)


def check_heads(num_heads: int, **dim: int) -> None:
    """Check that the heads share the width, which is given by the name that it has for the caller.

    Raises:
        ValueError: They do not.
    """
    ((name, width),) = dim.items()
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide {name}, got num_heads={num_heads} and {name}={width}")


def check_positive(**named: int | Sequence) -> None:
    """Check that all are at least 1. A sequence is if it has entries and all of them are.

    Raises:
        ValueError: One is not.
    """

    def is_positive(value: int | Sequence) -> bool:
        return len(value) > 0 and all(map(is_positive, value)) if isinstance(value, Sequence) else value >= 1

    for name, value in named.items():
        if not is_positive(value):
            must = "have entries, all of at least 1" if isinstance(value, Sequence) else "be at least 1"
            raise ValueError(f"{name} must {must}, got {value}")


def any_padding(bottom: int, right: int) -> bool:
    """Whether a map is to be padded. By symbols it always is: they may be 0."""
    return is_symbol(bottom) or is_symbol(right) or bottom > 0 or right > 0


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` to before a product, or None if it is not on."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # meta has no autocast
        return None
    return torch.get_autocast_dtype(x.device.type)


@register_notrace_module  # what runs depends on the device
class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis by `zoo.kernels.layer_norm`."""

    before_product = False  # whether all that reads the output would cast it to autocast's dtype

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self.weight is not None and self.bias is not None:
                dtype = autocast_dtype(x) if self.before_product else None
                return layer_norm(x, self.weight, self.bias, self.eps, dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def before_product(norm: nn.Module) -> nn.Module:
    """`norm`, whose output only products read: a `LayerNorm` writes it in autocast's dtype at once."""
    if isinstance(norm, LayerNorm):
        norm.before_product = True
    return norm


def get_norm_layer(norm_layer: LayerType) -> Callable[..., nn.Module]:
    """timm's, with `LayerNorm` for torch's."""
    layer = timm_norm_layer(norm_layer)
    if isinstance(layer, partial) and layer.func is nn.LayerNorm:
        return partial(LayerNorm, *layer.args, **layer.keywords)
    return LayerNorm if layer is nn.LayerNorm else layer


@register_notrace_module  # what runs depends on the device
class DepthwiseConv(nn.Conv2d):
    """Convolution of every channel of a map with zero padding, added to other tokens."""

    def __init__(self, dim: int, kernel_size: int = 3, device=None, dtype=None):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, base: Tensor, x: Tensor) -> Tensor:
        """
        Args:
            base: [batch, height, width, dim], or [batch, tokens, dim] of which those of the map are the last ones.
            x: [batch, height, width, dim].

        Returns:
            The shape of `base`.
        """
        return add_depthwise_conv(base, x, self.weight, self.bias)


class CheckpointedBlock(nn.Module):
    """A block, `_forward(x)`, whose activations are recomputed in the backward pass if `grad_checkpointing` is set.

    A block of more arguments has a `forward` of its own, with these lines and its signature.
    """

    def __init__(self):
        super().__init__()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map to map, of the same shape."""
        # Here, not in the loops over blocks, so that every loop and every hook on one sees the same modules called.
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class TransformerBlock(CheckpointedBlock):
    """Pre-norm transformer block of an attention and an MLP, each with optional layer scale."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        """
        Args:
            dim: Width of the tokens.
            attn: The attention.
            mlp_ratio: Hidden width of the MLP, in units of `dim`.
            init_values: Initial layer scale; None for no layer scale.
            proj_drop: Dropout rate in the MLP.
            drop_path: Stochastic depth rate.
            norm_layer: Normalisation over the last axis.
            act_layer: Activation of the MLP.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.init_values = init_values

        self.norm1 = before_product(norm_layer(dim, **dd))
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm2 = before_product(norm_layer(dim, **dd))
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

        # timm's LayerScale would name these `ls1.gamma` and `ls2.gamma`; the published weights do not.
        self.gamma1 = nn.Parameter(torch.empty(dim, **dd)) if init_values is not None else None
        self.gamma2 = nn.Parameter(torch.empty(dim, **dd)) if init_values is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma1 is not None and self.gamma2 is not None:
            nn.init.constant_(self.gamma1, self.init_values)
            nn.init.constant_(self.gamma2, self.init_values)

    def _forward(self, x: Tensor) -> Tensor:
        return self._add(x, self.attn(self.norm1(x)))

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output, of its input and what attention makes of that."""
        if self.gamma1 is not None:
            y = self.gamma1 * y
        x = x + self.drop_path1(y)

        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = self.gamma2 * y
        return x + self.drop_path2(y)


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampler to the next."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: Input of the stage, such as [batch, height, width, dim].

        Returns:
            The stage's map, of that shape, and the input of the next stage.
        """
        x = self.blocks(x)
        return x, self.downsample(x)


class Stages(nn.ModuleList):
    """`Stage`s in a row."""

    def forward(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            x: Input of the first stage.
            take_indices: Stages whose maps to collect.
            max_index: Last stage to run.

        Returns:
            The map of stage `max_index`, and those of `take_indices` in ascending order.
        """
        taken: list[Tensor] = []
        out = x
        for i, stage in enumerate(self):
            if i <= max_index:  # TorchScript has no slices of modules
                out, x = stage(x)
                if i in take_indices:
                    taken.append(out)
        return out, taken


class Blocks(nn.ModuleList):
    """Blocks in a row, each with a map: `Stages` of a model of one resolution."""

    def forward(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        """See `Stages.forward`, with blocks for stages."""
        taken: list[Tensor] = []
        for i, block in enumerate(self):
            if i <= max_index:
                x = block(x)
                if i in take_indices:
                    taken.append(x)
        return x, taken


class TokenPool(nn.Module):
    """Pooling of [batch, tokens, channels], whose first `num_prefix_tokens` are on no map."""

    def __init__(self, pool_type: str, num_prefix_tokens: int):
        super().__init__()
        if pool_type not in ("", "token", "avg", "max", "avgmax"):
            raise ValueError(f"global_pool must be token, avg, max, avgmax or '', got {pool_type!r}")
        if pool_type == "token" and num_prefix_tokens == 0:
            raise ValueError("global_pool='token' needs a class token, which the model has not")
        self.pool_type = pool_type
        self.num_prefix_tokens = num_prefix_tokens

    def feat_mult(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return global_pool_nlc(x, self.pool_type, self.num_prefix_tokens)


class Backbone(CheckedLoading, nn.Module):
    """timm's interface around a patch embedding, a trunk and a head.

    A subclass sets `patch_embed`, the trunk under the name that its published weights have, and `feature_info` (one
    entry for every map of the trunk), then calls `_init_head`. It defines
    * `trunk_name`, of a list of modules with one map each, and `_forward_trunk`, which calls it: TorchScript has no
      attributes by name. `Stages` and `Blocks` are such lists. A trunk in several attributes defines `_prune_trunk`.
    * `group_matcher`;
    * `no_decay_suffixes`, the ends of the names of parameters that are not to decay besides biases and norms;
    * `_embed`, where `patch_embed` is not all that precedes the trunk, or `_forward_image`, where more than a tensor
      goes from one to the other;
    * `_init_weights`, where the authors start from other weights than this one gives;
    * `_map_size`, where the trunk's outputs are lists of tokens.
    Blocks are `CheckpointedBlock`s, or something that has such blocks inside.
    """

    trunk_name: str
    no_decay_suffixes: tuple[str, ...] = ()

    def _init_head(
        self,
        num_features: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        norm_layer: Callable[..., nn.Module] | None,
        output_fmt: str = "NHWC",
        num_prefix_tokens: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        """Everything behind the trunk, and the weights of the whole.

        Args:
            num_features: Width of the final map: that of the trunk's last, unless the norm changes it.
            in_chans: Number of image channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier, "" for none.
            drop_rate: Dropout rate before the classifier.
            norm_layer: Makes `norm`, between the trunk and the pooling, of `num_features`; None for none.
            output_fmt: Layout of the trunk's maps: "NHWC", "NCHW", or "NLC" for lists of tokens.
            num_prefix_tokens: Number of tokens before those of the map, such as a class token, in lists of tokens.
        """
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = num_features
        self.norm_features: int = self.feature_info[-1]["num_chs"]  # width that the norm takes
        self.depth = len(self.feature_info)
        self.output_fmt = output_fmt
        self.num_prefix_tokens = num_prefix_tokens
        self.grad_checkpointing = False

        self.norm = nn.Identity() if norm_layer is None else norm_layer(num_features, **dd)
        self._set_classifier(num_classes, global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights(needs_reset=False)

    def _set_classifier(self, num_classes: int, global_pool: str, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        if self.output_fmt == "NLC":
            self.global_pool = TokenPool(global_pool, self.num_prefix_tokens)
            self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        else:
            self.global_pool, self.head = create_classifier(
                self.num_features, num_classes, global_pool, input_fmt=self.output_fmt, **dd
            )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _embed(self, x: Tensor) -> Tensor:
        """Image -> input of the trunk."""
        return self.patch_embed(x)

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        """The trunk's last map and those of `take_indices`, without the final norm. Stops after `max_index`."""
        raise NotImplementedError

    def _forward_image(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        """`_forward_trunk` of an image."""
        return self._forward_trunk(self._embed(x), take_indices, max_index)

    def _prune_trunk(self, max_index: int) -> None:
        """Remove what follows the map `max_index`."""
        trunk = getattr(self, self.trunk_name)
        del trunk[max_index + 1 :]
        if isinstance(trunk, Stages):
            trunk[-1].downsample = nn.Identity()

    def _map_size(self, height: int, width: int) -> tuple[int, int]:
        """Sides of the map that the trunk's lists of tokens are, for an image of this size."""
        raise NotImplementedError

    @staticmethod
    def _init_weights(module: nn.Module, name: str = "", needs_reset: bool = True) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise the weights; `needs_reset` also those of modules that do so at construction."""
        named_apply(partial(self._init_weights, needs_reset=needs_reset), self, include_root=True)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not to decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.no_decay_suffixes)}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, CheckpointedBlock):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless `global_pool` is None.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: "avg", "max", "avgmax", "" for none; of a map also "catavgmax", of a list with a class token
                also "token".
        """
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(num_classes, pool_type, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final map and those on the way to it.

        Args:
            x: [batch, in_chans, height, width].
            indices: Maps to take: the last n, these, or all if None.
            norm: Apply the final norm to every map of its width.
            stop_early: Stop after the last map taken. The final norm is then left out where it does not fit.
            output_fmt: Layout of the maps on the way, "NCHW" or "NHWC"; "NCHW" or "NLC" of a model whose
                `output_fmt` is "NLC". They have no prefix tokens. The final map is that of `forward_features`.
            intermediates_only: Return only the maps on the way.

        Raises:
            ValueError: `output_fmt` is unknown.
        """
        other_fmt = "NLC" if self.output_fmt == "NLC" else "NHWC"
        if output_fmt not in ("NCHW", other_fmt):
            raise ValueError(f"output_fmt must be NCHW or {other_fmt}, got {output_fmt}")  # TorchScript knows no !r
        height, width = x.shape[2], x.shape[3]
        take_indices, max_index = feature_take_indices(self.depth, indices)
        x, taken = self._forward_image(x, take_indices, max_index if stop_early else self.depth - 1)

        intermediates: list[Tensor] = []
        for y in taken:
            if norm:
                y = self._norm_where_it_fits(y)
            if self.output_fmt == "NLC":
                y = y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    map_height, map_width = self._map_size(height, width)
                    y = y.reshape(y.shape[0], map_height, map_width, y.shape[-1]).permute(0, 3, 1, 2).contiguous()
            elif self.output_fmt != output_fmt:
                y = (y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y.permute(0, 2, 3, 1)).contiguous()
            intermediates.append(y)
        if intermediates_only:
            return intermediates
        return self._norm_where_it_fits(x), intermediates

    def _norm_where_it_fits(self, x: Tensor) -> Tensor:
        width = x.shape[1] if self.output_fmt == "NCHW" else x.shape[-1]
        return self.norm(x) if width == self.norm_features else x

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers after the last of `indices`.

        Args:
            indices: Maps to keep: the last n, or these.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier and the pooling.

        Returns:
            The maps kept, as indices from the first.
        """
        take_indices, max_index = feature_take_indices(self.depth, indices)
        self._prune_trunk(max_index)
        self.depth = max_index + 1
        num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or num_features != self.norm_features:
            self.norm = nn.Identity()
            self.norm_features = num_features
        else:
            num_features = self.num_features
        if prune_head or num_features != self.num_features:  # the head is made for the width of the last map
            self.num_features = num_features
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[batch, in_chans, height, width] -> the final map, such as [batch, map height, map width, num_features]"""
        take_indices: list[int] = []
        x, _ = self._forward_image(x, take_indices, self.depth - 1)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of `forward_features` -> [batch, num_classes], or [batch, head_hidden_size] if `pre_logits`"""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_chans, height, width] -> [batch, num_classes]"""
        return self.forward_head(self.forward_features(x))
