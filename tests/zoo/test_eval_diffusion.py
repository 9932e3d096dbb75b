"""`zoo eval-diffusion`: distances that are known beforehand, and both kinds of sources."""

import math
import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from zoo.cli import main
from zoo.diffusion import FlowPipeline, NeighborhoodDenoiser
from zoo.eval_diffusion import compare, coverage
from zoo.judge import frechet_distance


def features(seed, n=200, width=6, shift=0.0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double) + shift


def test_a_set_beside_itself():
    distances = compare(features(0), features(0))
    assert abs(distances.frechet) < 1e-5
    assert distances.precision == distances.recall == 1


def test_frechet_and_kernel_distance():
    a, b = features(0), features(1, n=150, shift=0.7)
    distances = compare(a, b, subset_size=40)
    assert distances.frechet == pytest.approx(frechet_distance(a, b), rel=1e-4)
    kernel = lambda x, y: (x @ y.T / 6 + 1) ** 3  # noqa: E731
    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    unbiased = (aa.sum() - aa.trace()) / (200 * 199) + (bb.sum() - bb.trace()) / (150 * 149) - 2 * ab.mean()
    assert abs(distances.kernel - unbiased) < 4 * distances.kernel_std / math.sqrt(100)
    assert compare(a, b, subset_size=40) == distances  # the subsets are those of the seed


def test_precision_and_recall():
    """Real points on a line one apart: their third neighbour is two away, at the ends three."""
    real = torch.arange(10.0)[:, None]
    generated = torch.tensor([[0.5], [4.5], [-2.9], [-3.1], [12.1]])
    assert coverage(generated, real) == 3 / 5
    clump = torch.tensor([[2.0], [2.1], [2.2], [2.3], [2.4]])
    assert coverage(clump, real) == 1  # precise
    assert coverage(real, clump) == 1 / 10  # but without variety


def pictures(folder, seed, count=6):
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return str(folder)


def test_folders_and_a_pipeline(capsys, tmp_path):
    real, made = pictures(tmp_path / "real", 0), pictures(tmp_path / "made", 1)
    (tmp_path / "made" / "broken.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"skipping .*broken.png is not a readable image"):
        assert main(["eval-diffusion", made, real, "--model", "test_vit", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "6 of them beside 6" in out and "random weights" in out
    assert float(re.search(r"Fréchet distance\W+([\d.e-]+)", out)[1]) > 0

    denoiser = NeighborhoodDenoiser(sample_size=8, in_channels=1, num_classes=3, dim=16, depth=1, num_heads=1)
    FlowPipeline(denoiser, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "pipeline")
    args = ["--model", "test_vit", "--samples", "5", "--steps", "1", "--device", "cpu"]
    assert main(["eval-diffusion", str(tmp_path / "pipeline"), real, *args]) == 0
    assert "5 samples of" in capsys.readouterr().out


def test_mistakes(capsys, tmp_path):
    real, few = pictures(tmp_path / "real", 0), pictures(tmp_path / "few", 1, count=3)
    for made, options, message in (
        (few, ["--model", "test_vit"], "expected more than 3 generated images, got 3"),
        ("nowhere", ["--model", "test_vit"], "there is no folder nowhere"),
        (real, [], "--model: expected a model's name"),
        (real, ["--model", "test_vit", "--samples", "0"], "--samples: expected 1 or more, got 0"),
    ):
        assert main(["eval-diffusion", made, real, "--device", "cpu", *options]) == 2
        assert message in capsys.readouterr().err
