"""The shared interface over what no single family has all of: layouts, norms and trunks, on the smallest models."""

import copy
from functools import partial

import pytest
import torch
from timm.layers import ConvNormAct
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from zoo.backbones._backbone import Backbone, Blocks, CheckpointedBlock

SIZE = 24, 40


class Conv(CheckpointedBlock):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def _forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class ChannelsFirst(Backbone):
    """Two stages in attributes of their own."""

    def __init__(self, norm_layer=nn.BatchNorm2d, num_features=8, **kwargs):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 4, 4)
        self.stage1 = Conv(4)
        self.down = nn.Conv2d(4, 8, 2, 2)
        self.stage2 = Conv(8)
        self.feature_info = [
            dict(num_chs=4, reduction=4, module="stage1"),
            dict(num_chs=8, reduction=8, module="stage2"),
        ]
        self._init_head(num_features, 3, 5, "avg", 0.0, norm_layer, output_fmt="NCHW")

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        taken: list[Tensor] = []
        x = self.stage1(x)
        if 0 in take_indices:
            taken.append(x)
        if max_index >= 1:
            x = self.stage2(self.down(x))
            if 1 in take_indices:
                taken.append(x)
        return x, taken

    def _prune_trunk(self, max_index: int) -> None:
        if max_index == 0:
            self.down, self.stage2 = nn.Identity(), nn.Identity()


class Linear(CheckpointedBlock):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def _forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


class Tokens(Backbone):
    """A class token before those of the map."""

    trunk_name = "blocks"
    no_decay_suffixes = ("cls_token",)

    def __init__(self, norm_layer=nn.LayerNorm):
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 8))
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.blocks = Blocks([Linear(8) for _ in range(3)])
        self.feature_info = [dict(num_chs=8, reduction=8, module=f"blocks.{i}") for i in range(3)]
        self._init_head(8, 3, 5, "token", 0.0, norm_layer, output_fmt="NLC", num_prefix_tokens=1)

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)

    def _map_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def _forward_trunk(self, x: Tensor, take_indices: list[int], max_index: int) -> tuple[Tensor, list[Tensor]]:
        return self.blocks(x, take_indices, max_index)


MODELS = {
    "channels first": ChannelsFirst,
    "without a norm": partial(ChannelsFirst, None),
    "a norm that widens": partial(ChannelsFirst, partial(ConvNormAct, 8), 12),
    "tokens": Tokens,
    "tokens without a norm": partial(Tokens, None),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def as_map(y, model):
    """Output of the trunk or the final norm, channels first and without prefix tokens."""
    return y[:, 1:].mT.unflatten(2, (3, 5)) if model.output_fmt == "NLC" else y


def test_maps(model, x):
    features = model.forward_features(x)
    final, taps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, features)
    torch.testing.assert_close(taps[-1], as_map(features, model), rtol=0, atol=0)
    _, raw = model.forward_intermediates(x)
    for tap, info in zip(raw, model.feature_info, strict=True):
        assert tap.shape == (2, info["num_chs"], *(side // info["reduction"] for side in SIZE))
    assert torch.equal(as_map(model.norm(model._forward_trunk(model._embed(x), [], 9)[0]), model), taps[-1])
    other = "NLC" if model.output_fmt == "NLC" else "NHWC"
    for y, tap in zip(model.forward_intermediates(x, output_fmt=other, intermediates_only=True), raw, strict=True):
        assert torch.equal(y, tap.flatten(2).mT if other == "NLC" else tap.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=f"output_fmt must be NCHW or {other}, got NCL"):
        model.forward_intermediates(x, output_fmt="NCL")


def test_stopping_early_leaves_out_a_norm_that_does_not_fit(model, x):
    final, taps = model.forward_intermediates(x, indices=[0], stop_early=True)
    width = final.shape[1] if model.output_fmt == "NCHW" else final.shape[2]
    fits = width == 8
    expected = model._forward_trunk(model._embed(x), [], 0)[0]
    assert torch.equal(final, model.norm(expected) if fits else expected)
    assert torch.equal(taps[0], as_map(expected, model))


def test_prune(model, x):
    _, taps = model.forward_intermediates(x)
    for i, info in enumerate(model.feature_info):
        for prune_norm in (False, True):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([i], prune_norm=prune_norm) == [i]
            features = pruned.forward_features(x)
            assert isinstance(pruned.norm, nn.Identity) or not prune_norm
            assert features.shape[1 if model.output_fmt == "NCHW" else 2] == pruned.num_features
            if isinstance(pruned.norm, nn.Identity):
                assert pruned.num_features == info["num_chs"]
                assert torch.equal(as_map(features, model), taps[i])
            features.sum().backward()
            assert [name for name, p in pruned.named_parameters() if p.grad is None] == []
            pruned.reset_classifier(7, "avg")
            assert pruned(x).shape == (2, 7)
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers([len(taps) - 1], prune_head=False)
    assert torch.equal(kept(x), model(x))


def test_pooling(model, x):
    features = model.forward_features(x)
    flat = as_map(features, model).flatten(2)
    expected = dict(avg=flat.mean(2), max=flat.amax(2), avgmax=(flat.mean(2) + flat.amax(2)) / 2)
    if model.output_fmt == "NLC":
        expected["token"] = features[:, 0]
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    else:
        expected["catavgmax"] = torch.cat([flat.mean(2), flat.amax(2)], 1)
    for pool, y in expected.items():
        model.reset_classifier(3, pool)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), y)
        assert model.head_hidden_size == y.shape[1] and model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


def test_pooling_of_tokens_that_is_not():
    with pytest.raises(ValueError, match="global_pool must be token, avg, max, avgmax or '', got 'catavgmax'"):
        Tokens().reset_classifier(3, "catavgmax")
    model = Tokens()
    model.num_prefix_tokens = 0
    with pytest.raises(ValueError, match="class token"):
        model.reset_classifier(3, "token")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(model, x):
    getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1))
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
        torch.testing.assert_close(torch.jit.script(getter)(x), getter(x))


def test_checkpointing(model, x):
    calls = []
    block = next(module for module in model.modules() if isinstance(module, CheckpointedBlock))
    next(block.children()).register_forward_hook(lambda *args: calls.append(1))
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert len(calls) == 1
    model.set_grad_checkpointing()
    recomputed = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert len(calls) == 3
    torch.testing.assert_close(recomputed, plain)


def test_no_weight_decay():
    assert Tokens().no_weight_decay() == {"cls_token"}
    assert ChannelsFirst().no_weight_decay() == set()
