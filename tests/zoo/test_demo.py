"""The demo, cut short: that it runs and draws. How well it learns is measured by running it whole."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib.image import imread
from torch.utils.data import DataLoader

import zoo.demo
from zoo.data import Digits
from zoo.demo import inked_pixel
from zoo.judge import Judgement
from zoo.kernels import neighborhood_attention_2d
from zoo.pictures import attention_maps, attention_weights, save_confusion
from zoo.recipes import resolve_recipe
from zoo.task import Classification


@pytest.fixture(scope="module")
def digits():
    return Digits(channels=1, batch_size=90)


def test_runs_from_training_to_pictures(capsys, tmp_path, monkeypatch):
    for name, short in (("RECIPE", "short.yaml"), ("FLOW_RECIPE", "short_flow.yaml")):
        recipe = yaml.safe_load(Path(resolve_recipe(getattr(zoo.demo, name))).read_text())
        recipe["trainer"].update(max_epochs=2, limit_train_batches=2, limit_val_batches=1, enable_progress_bar=False)
        (tmp_path / short).write_text(yaml.safe_dump(recipe))
        monkeypatch.setattr(zoo.demo, name, short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    # Judging is tested by itself, and takes long.
    judgement = Judgement(898, 2, 1.0, 3, 0.123, 0.5, 1.0, 1.0, 0.5, 1.0, 1.0)
    monkeypatch.setattr(zoo.demo, "judge_digits", lambda pipeline, classifier, seed: judgement)
    zoo.demo.run_demo(seed=3)

    out = capsys.readouterr().out
    accuracy = float(re.search(r"accuracy +([0-9.]+)% of 360 held-out digits", out)[1])
    run = Path("runs/digits-dinat/version_0")
    task = Classification.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True).eval()
    images, labels = next(iter(DataLoader(Digits(channels=1).val_set, batch_size=360)))
    with torch.inference_mode():
        right = (task(images).argmax(-1) == labels).float().mean().item()
    assert accuracy == pytest.approx(100 * right, abs=0.06)

    assert re.search(r"898 samples: 2 steps, guidance 1, seed 3", out)
    assert Path("runs/digits-flow/version_0/pipeline/model_index.json").is_file()
    for name in ("predictions", "confusion", "curves", "attention", "samples"):
        assert f"runs/demo/{name}.png" in out
        pixels = imread(tmp_path / "runs" / "demo" / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) >= 500, name
        assert len(np.unique((pixels * 15).astype(int).reshape(-1, 3), axis=0)) > 20, name  # more than a blank page
        assert 0.01 < (pixels.min(-1) < 0.9).mean() < 0.9, name
    with (run / "metrics.csv").open() as file:
        epochs = {row["epoch"] for row in csv.DictReader(file) if row["val_top1"]}
    assert epochs == {"0", "1"}  # validating for the pictures adds nothing to the curves


def test_confusion_paints_only_mistakes_red(tmp_path):
    def red(predicted):
        save_confusion(tmp_path / "confusion.png", torch.arange(3), torch.tensor(predicted), list("abc"))
        pixels = imread(tmp_path / "confusion.png")
        return int(((pixels[..., 0] > 0.7) & (pixels[..., 1] < 0.3)).sum())

    assert red([0, 1, 2]) == 0
    assert red([0, 1, 0]) > 50


def test_attention_weights_reproduce_the_output(digits):
    """Weights times values is what the kernel computes, so the weights are those that the model uses."""
    torch.manual_seed(0)
    model = timm.create_model("test_dinat", in_chans=1).eval()
    for attn, size in ((model.levels[0].blocks[1].attn, 24), (model.levels[3].blocks[0].attn, 3)):
        with torch.inference_mode():
            attn.rpb.normal_()
            x = torch.randn(1, size, size, attn.qkv.in_features)
            weights = attention_weights(attn, x)
            assert weights.shape == (size, size, size, size)
            torch.testing.assert_close(weights.sum((2, 3)), torch.ones(size, size))
            query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
            value = value[:, :, :, :1].expand_as(value)  # the same for every head, so that averaging heads is exact
            out = neighborhood_attention_2d(
                query, key, value, attn.kernel_size, attn.dilation, rel_pos_bias=attn.rpb, scale=attn.scale
            )
            expected = torch.einsum("ijyx,yxd->ijd", weights, value[0, :, :, 0])
            torch.testing.assert_close(expected, out[0].mean(2), rtol=1e-4, atol=1e-5)


def test_attention_keeps_to_the_window(digits):
    model = timm.create_model("test_dinat", in_chans=1).eval()
    maps = attention_maps(model, digits.val_set[0][0])
    assert [[tuple(weights.shape[:2]) for weights in level] for level in maps] == [
        [(24, 24)] * 2, [(12, 12)] * 2, [(6, 6)] * 2, [(3, 3)],
    ]  # fmt: skip
    plain, dilated = (maps[0][block][12, 12].nonzero() for block in range(2))
    assert plain.tolist() == [[y, x] for y in (11, 12, 13) for x in (11, 12, 13)]
    assert dilated.tolist() == [[y, x] for y in (4, 12, 20) for x in (4, 12, 20)]


def test_inked_pixel():
    image = torch.full((9, 9), -1.0)
    image[0, 0] = image[5, 2] = 1
    assert inked_pixel(image) == (5, 2)
