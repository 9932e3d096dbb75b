"""Registration: the published sizes, addresses and scores."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

import zoo

PARAMETERS = {  # of the authors' models, with 1000 classes
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_large_21k": 200_943_514,
    "dinat_large_21k_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "dinat_s_large_21k": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "dinat_isotropic_small": 21_999_736,
    "vitrpb_small": 22_080_376,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_base": 86_627_080,
}
URLS = {
    "nat_mini.in1k": "nat/checkpoints/CLS/nat_mini.pth",
    "nat_tiny.in1k": "nat/checkpoints/CLS/nat_tiny.pth",
    "nat_small.in1k": "nat/checkpoints/CLS/nat_small.pth",
    "nat_base.in1k": "nat/checkpoints/CLS/nat_base.pth",
    "dinat_mini.in1k": "dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth",
    "dinat_tiny.in1k": "dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth",
    "dinat_small.in1k": "dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth",
    "dinat_base.in1k": "dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth",
    "dinat_large.in22k_ft_in1k": "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth",
    "dinat_large_384.in22k_ft_in1k": "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth",
    "dinat_large_384_11x11.in22k_ft_in1k": "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth",
    "dinat_large_21k.in22k": "dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth",
    "dinat_large_21k_11x11.in22k": "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth",
    "dinat_s_tiny.in1k": "dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth",
    "dinat_s_small.in1k": "dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth",
    "dinat_s_base.in1k": "dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth",
    "dinat_s_large.in22k_ft_in1k": "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth",
    "dinat_s_large_384.in22k_ft_in1k": "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth",
    "dinat_s_large_21k.in22k": "dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth",
    "nat_isotropic_small.in1k": "dinat/checkpoints/isotropic/nat_isotropic_small_in1k_224.pth",
    "dinat_isotropic_small.in1k": "dinat/checkpoints/isotropic/dinat_isotropic_small_in1k_224.pth",
    "vitrpb_small.in1k": "dinat/checkpoints/isotropic/vitrpb_small_in1k_224.pth",
    "nat_isotropic_base.in1k": "dinat/checkpoints/isotropic/nat_isotropic_base_in1k_224.pth",
    "dinat_isotropic_base.in1k": "dinat/checkpoints/isotropic/dinat_isotropic_base_in1k_224.pth",
    "vitrpb_base.in1k": "dinat/checkpoints/isotropic/vitrpb_base_in1k_224.pth",
}

ROOT = Path(zoo.__file__).parent.parent


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, num_classes=1000, device="meta")
    assert sum(param.numel() for param in model.parameters()) == PARAMETERS[name]
    assert not list(model.buffers())


@pytest.mark.parametrize("name", URLS)
def test_pretrained_cfg(name):
    cfg = get_pretrained_cfg(name)
    assert cfg.url == f"https://shi-labs.com/projects/{URLS[name]}"
    assert cfg.num_classes == (21841 if name.endswith(".in22k") else 1000)
    assert cfg.input_size == ((3, 384, 384) if "384" in name else (3, 224, 224))
    assert cfg.crop_pct == (1.0 if "384" in name else 0.875)
    assert list(get_arch_pretrained_cfgs(name.partition(".")[0])) == [name]


def test_every_published_model_is_registered_and_scored():
    with (ROOT / "zoo" / "published.csv").open() as file:
        scores = {row["model"]: float(row["top1"]) for row in csv.DictReader(file)}
    top1 = {name: score for name, score in scores.items() if "nat" in name or "vitrpb" in name}
    assert top1.keys() == {name for name in URLS if not name.endswith(".in22k")}
    assert set(PARAMETERS) == {name.partition(".")[0] for name in URLS}
    assert top1["nat_mini.in1k"] == 81.8 and top1["dinat_large_384_11x11.in22k_ft_in1k"] == 87.5
    assert all(80.0 <= score <= 87.5 for score in top1.values())


def test_state_dict_is_float32_weights_only():
    for key, tensor in timm.create_model("test_dinat").state_dict().items():
        assert tensor.dtype == torch.float32, key
