"""`zoo.accelerate`: timm's models by our kernels, with the same outputs, gradients, weights and hooks; and back."""

import copy
import io

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models import GraphExtractNet
from timm.models.gcvit import WindowAttentionGlobal

import zoo
from golden_cases import load_case, max_error
from zoo.backbones.halonet import HaloAttention

SIZES = {  # sides of the images: the least that timm takes
    "halonet26t": 256,
    "halonet50ts": 256,
    "sehalonet33ts": 256,
    "eca_halonext26ts": 256,
    "gcvit_xxtiny": 64,
}
# timm before 1.0.31 gave images of a batch each other's global queries.
BATCH = {"gcvit_xxtiny": 1 if timm.__version__ in ("1.0.29", "1.0.30") else 2}


def make(name, **kwargs):
    """A model with weights that make its attention matter, where timm starts residual branches at zero.

    In float64: so weighted the networks amplify rounding.
    """
    torch.manual_seed(0)
    if name.startswith("gcvit"):
        kwargs["img_size"] = SIZES[name]
    model = timm.create_model(name, num_classes=10, dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            if param.ndim == 1:
                param.uniform_(0.2, 0.8)
            elif key.endswith(("_rel", "_table")):
                param.normal_(std=0.5)
    return model


def image(name, batch=None):
    batch = batch or BATCH.get(name, 1)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIZES[name], SIZES[name], dtype=torch.float64, generator=generator)


def outputs_and_grads(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    grads = torch.autograd.grad(out.square().mean(), [x, *model.parameters()])
    return {"out": out.detach(), "x": grads[0]} | {
        key: grad for (key, _), grad in zip(model.named_parameters(), grads[1:])
    }


@pytest.mark.parametrize("name", SIZES)
def test_same_outputs_and_gradients(name):
    model, x = make(name), image(name)
    expected, weights = outputs_and_grads(model, x), copy.deepcopy(model.state_dict())
    assert zoo.accelerate(model) is model
    assert not any(type(m) in (HaloAttn, WindowAttentionGlobal) for m in model.modules())
    for key, actual in outputs_and_grads(model, x).items():
        assert max_error(actual, expected[key]) < 1e-9, key
    state_dict = model.state_dict()
    assert state_dict.keys() == weights.keys()
    assert all(torch.equal(state_dict[key], weight) for key, weight in weights.items())

    assert zoo.restore(model) is model
    with torch.no_grad():
        assert torch.equal(model(x), expected["out"])


def test_golden():
    case = load_case("halonet", "halonet26t_256")
    model = zoo.accelerate(timm.create_model("halonet26t")).eval()
    model.load_state_dict(case.state_dict, strict=False)  # without BatchNorm's counters
    taps = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _, args, out, i=i: taps.update({f"stage{i}": out.mean((2, 3))}))
    with torch.inference_mode():
        actual = {"logits": model(case.inputs["x"])} | taps
    assert actual.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        assert max_error(actual[key], expected) < 2e-6, key


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(stride=2),
        dict(stride=2, avg_down=True),
        dict(block_size=7, stride=2),
        dict(dim_head=5, qkv_bias=True, scale_pos_embed=True),
    ],
    ids=str,
)
def test_every_option_of_halo_attention(options):
    torch.manual_seed(0)
    module = HaloAttn(12, 16, **{"num_heads": 2, "block_size": 4, "halo_size": 1, **options}).double()
    x = torch.randn(2, 12, 2 * module.block_size, 4 * module.block_size, dtype=torch.float64)
    expected = outputs_and_grads(module, x)
    for key, actual in outputs_and_grads(zoo.accelerate(module), x).items():
        torch.testing.assert_close(actual, expected[key], rtol=0, atol=1e-13, msg=key)


def test_each_image_has_its_own_global_query():
    model = zoo.accelerate(make("gcvit_xxtiny"))
    x = image("gcvit_xxtiny", batch=3)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), torch.cat([model(y) for y in x.split(1)]), rtol=0, atol=1e-9)


def test_attention_dropout_stays():
    model = zoo.accelerate(make("gcvit_xxtiny", attn_drop_rate=0.5)).train()
    x = image("gcvit_xxtiny", batch=2)
    torch.manual_seed(0)
    dropped = model(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, zoo.restore(model)(x))
    assert not torch.allclose(dropped, model(x))


def small(name):
    """One attention module of a model, and its input."""
    if name == "halo":
        return HaloAttn(8, num_heads=2, block_size=4, halo_size=1), (torch.randn(2, 8, 8, 4),)
    module = WindowAttentionGlobal(8, 2, (2, 3), use_global=name == "global")
    return module, (torch.randn(6, 6, 8), *([torch.randn(1, 6, 8)] if name == "global" else []))


KINDS = ["halo", "window", "global"]


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once_and_back_is_exact(kind):
    module, args = small(kind)
    original, expected = type(module), module(*args)
    accelerated = type(zoo.accelerate(module))
    assert accelerated is not original and issubclass(accelerated, original)
    assert type(zoo.accelerate(module)) is accelerated
    assert type(zoo.restore(module)) is original
    assert type(zoo.restore(module)) is original
    assert torch.equal(module(*args), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_stay(kind):
    module, args = small(kind)
    calls = []
    projection = module.kv if kind == "halo" else module.qkv
    handles = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in (module, projection)]
    zoo.accelerate(module)(*args)
    assert calls == [projection, module]
    for handle in handles:
        handle.remove()
    module(*args)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_copy_save_and_compile(kind):
    torch.compiler.reset()
    module, args = small(kind)
    expected = zoo.accelerate(module)(*args)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        torch.load(file, weights_only=False),
        torch.compile(module, fullgraph=True, backend="aot_eager"),
    ]
    for other in copies:
        torch.testing.assert_close(other(*args), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript():
    module, args = small("halo")
    torch.testing.assert_close(torch.jit.script(zoo.accelerate(module))(*args), module(*args), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["halonet26t", "gcvit_xxtiny"])
def test_fx(name):
    model, x = zoo.accelerate(make(name)), image(name)
    node = timm.models.get_graph_node_names(model)[1][-1]
    with torch.inference_mode():
        assert torch.equal(GraphExtractNet(model, [node])(x), model(x))


def test_any_size_of_map():
    """Maps that blocks do not divide, which timm refuses, continue as beyond every border."""
    module = HaloAttn(8, num_heads=2, block_size=4, halo_size=1, qkv_bias=True)
    x = torch.randn(1, 8, 7, 9)
    with pytest.raises(AssertionError):
        module(x)
    assert zoo.accelerate(module)(x).shape == (1, 8, 7, 9)


def test_our_own_modules_are_left_alone():
    model = timm.create_model("test_halonet")
    assert type(zoo.restore(model).stages[0][0].self_attn) is HaloAttention
    with pytest.raises(ValueError, match="nothing to accelerate"):
        zoo.accelerate(model)


def test_refusals():
    with pytest.raises(
        ValueError,
        match=r"nothing to accelerate: ResNet has no timm\.layers\.halo_attn\.HaloAttn or timm\.models\.gcvit\.Window",
    ):
        zoo.accelerate(timm.create_model("test_resnet"))
    for function in (zoo.accelerate, zoo.restore):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            function("halonet26t")
