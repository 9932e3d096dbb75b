"""`zoo explain`: answers, Grad-CAM and attention are those of the model as it runs."""

import os

import pytest
import timm
import torch
from PIL import Image

from zoo.cli import main
from zoo.errors import UserError
from zoo.explain import attention_at, choose, grad_cam, grid_of, record_attention
from zoo.pictures import attention_maps, save_explanation
from zoo.task import Classification


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((60, 90), 80).convert("RGB").save(path)
    return path


def images(size=96, channels=3):
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_attention_is_that_of_the_blocks():
    torch.manual_seed(0)
    model, x = timm.create_model("test_dinat").eval(), images()
    calls = record_attention(model, x)
    maps = [weights for level in attention_maps(model, x[0]) for weights in level]
    assert len(calls) == len(maps) > 3
    for call, expected in zip(calls, maps, strict=True):
        rows, columns = call.grid[:2]
        weights, token = attention_at(call, (0.3, 0.8))
        assert token == (int(0.3 * rows), int(0.8 * columns))
        torch.testing.assert_close(weights, expected[token], rtol=0, atol=1e-6)
    chosen = [(call.label, call.grid) for _, call in choose(calls)]
    assert len(chosen) == len(set(chosen)) == 6
    assert sum("dilation" in label for label, _ in chosen) == 2


def test_attention_of_a_class_token_model():
    """Of timm's own: the class token's share is not on the map."""
    calls = record_attention(timm.create_model("test_vit").eval(), images(160))
    weights, _ = attention_at(calls[0], (0.5, 0.5))
    assert [number for number, _ in choose(calls)] == [1, 3, 6]
    assert weights.shape == (10, 10)
    assert weights.min() > 0 and 0.9 < weights.sum() < 1


def test_grad_cam_before_mean_pooling_is_the_weighted_features():
    torch.manual_seed(0)
    model, x = timm.create_model("test_dinat").eval(), images()
    probabilities, cam = grad_cam(model, x)
    features = model.forward_features(x)[0]
    expected = (features @ model.get_classifier().weight[probabilities.argmax()]).relu()
    torch.testing.assert_close(cam, expected / expected.max())
    torch.testing.assert_close(probabilities, model(x)[0].softmax(-1))


def test_grad_cam_of_other_models():
    _, cam = grad_cam(timm.create_model("test_vit").eval(), images(160))  # answers from its class token
    assert cam.shape == (10, 10) and cam.max() == 1
    model = timm.create_model("test_resnet").eval()
    torch.nn.init.zeros_(model.get_classifier().weight)
    assert not grad_cam(model, images())[1].any()  # nothing depends on the image
    with pytest.raises(UserError, match="expected \\[1, classes\\]"):
        grad_cam(timm.create_model("test_dinat", num_classes=0, global_pool="").eval(), images())


def test_grids():
    assert grid_of(197, (224, 224), 1) == (14, 14, 1)
    assert grid_of(28, (56, 112), 0) is None  # no stride gives 28 tokens
    assert grid_of(32, (64, 128), 0) == (4, 8, 0)
    assert grid_of(81, (64, 64), 0) is None  # a padded map


def test_picture(capsys, tmp_path, photo):
    path = tmp_path / "new" / "picture.png"
    assert main(["explain", str(photo), "--model", "test_dinat", "--output", str(path)]) == 0
    assert "random weights" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 256


def test_a_full_disk_leaves_the_old_picture(capsys, tmp_path, photo, monkeypatch):
    def fill_the_disk(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.png"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    assert main(["explain", str(photo), "--model", "test_dinat", "--output", str(path)]) == 2
    assert capsys.readouterr().err == f"zoo: error: cannot write {path}: No space left on device\n"
    assert path.read_text() == "old"


def test_any_names_are_drawn(tmp_path):
    """Those of folders: dollars that are no formula, and bytes that are no text."""
    answers = [("$x^^$", 0.5), ("5$", 0.3), ("caf\udce9", 0.2)]
    panels = [("1 of 1: $\\frac$", torch.ones(2, 2), (0, 1))]
    title = "weights of $\\a$ \udce9.ckpt"
    save_explanation(tmp_path / "x.png", torch.rand(3, 32, 32), answers, torch.rand(2, 2), (0.5, 0.5), panels, title)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_checkpoint_knows_model_and_classes(capsys, tmp_path, photo):
    task = Classification("test_dinat", num_classes=3, model_args={"in_chans": 1})
    path = tmp_path / "last.ckpt"
    checkpoint = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
        "pytorch-lightning_version": "2.6.6",
        "classes": ["ant", "bee", "caf\udce9"],
    }
    torch.save(checkpoint, path)
    args = ["explain", str(photo), "--checkpoint", str(path), "--output", str(tmp_path / "x.png")]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "test_dinat, weights of last.ckpt" in out
    assert {"ant", "bee", r"caf\udce9"} <= set(out.split())
    assert main([*args, "--model", "nat_tiny"]) == 2
    assert "holds a test_dinat, but --model asks for nat_tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "test_dinat", "--output", "x.jpg"], "ends in .png"),
        ([], "--model: expected a model's name"),
        (["--model", "test_dinatt"], "did you mean test_dinat"),
        (["--model", "test_dinat", "--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_mistakes(capsys, photo, args, message):
    assert main(["explain", str(photo), *args]) == 2
    assert message in capsys.readouterr().err


def test_unreadable_image(capsys, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (("nowhere.jpg", "there is no image"), ("text.jpg", "is not a readable image")):
        assert main(["explain", str(tmp_path / name), "--model", "test_dinat"]) == 2
        assert message in capsys.readouterr().err
