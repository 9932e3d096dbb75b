"""Which backend a call takes: what is explained is what happens."""

import pytest
import torch

from zoo.kernels import explain_backend, neighborhood_attention_2d
from zoo.kernels.neighborhood import dense, tiled

# shape, kernel_size, dilation, is_causal, return_lse
CALLS = {
    "window inside the map": ((1, 8, 8, 1, 4), 3, 1, False, False),
    "window over the map": ((1, 8, 6, 1, 4), (8, 6), 1, False, False),
    "window over each class": ((1, 8, 6, 1, 4), (4, 3), 2, False, False),
    "over the map, causal": ((1, 8, 8, 1, 4), 8, 1, (True, False), False),
    "over the map, with the log-sum-exp": ((1, 8, 8, 1, 4), 8, 1, False, True),
    "over the map, empty batch": ((0, 8, 8, 1, 4), 8, 1, False, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_what_is_explained(name, monkeypatch):
    shape, kernel_size, dilation, is_causal, return_lse = CALLS[name]
    choice = explain_backend(shape, kernel_size, dilation, is_causal=is_causal, return_lse=return_lse)
    taken = []
    for module, function, label in ((dense, "neighborhood_attention_2d", "dense"), (tiled, "forward", "tiled")):
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, original=original, label=label: taken.append(label) or original(*a)
        )
    x = torch.randn(shape)
    neighborhood_attention_2d(x, x, x, kernel_size, dilation, is_causal=is_causal, return_lse=return_lse)
    assert taken == [choice.backend]


@pytest.mark.parametrize(
    ("options", "backend", "reason"),
    [
        ({}, "triton", "fused kernels"),
        ({"device": "cuda:3", "dtype": torch.bfloat16}, "triton", "fused kernels"),
        ({"dtype": torch.float64}, "tiled", "triton needs float16, bfloat16 or float32, got torch.float64"),
        ({"device": "cpu"}, "tiled", "triton needs CUDA tensors, got cpu"),
        ({"backend": "tiled"}, "tiled", "asked for"),
        ({"backend": "reference"}, "reference", "asked for"),
        ({"backend": "natten"}, "natten", "asked for"),
        ({"backend": "triton"}, "triton", "asked for"),
        ({"kernel_size": 8, "dtype": torch.float64}, "dense", "the window covers the map"),
    ],
)
def test_devices_that_need_not_be_there(options, backend, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = explain_backend((2, 8, 8, 2, 32), **{"kernel_size": 3, "device": "cuda"} | options)
    assert choice.backend == backend
    assert reason in choice.reason


def test_large_heads(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = explain_backend((1, 8, 8, 1, 300), 3, device="cuda")
    assert choice.backend == "tiled" and "head_dim of at most 256, got 300" in choice.reason


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((1, 8, 8, 4), {}, ValueError, r"shape must be \[batch, height, width, heads, head_dim\], got \(1, 8, 8, 4\)"),
        ((1, 8, -8, 1, 4), {}, ValueError, "shape must be"),
        ((1, 8, 8, 1, 4), {"kernel_size": 9}, ValueError, "kernel_size"),
        ((1, 8, 8, 1, 4), {"kernel_size": 3.0}, TypeError, "kernel_size must be one int"),
        ((1, 8, 8, 1, 4), {"dtype": torch.int32}, TypeError, "query must be of a floating dtype"),
        ((1, 8, 8, 1, 4), {"backend": "cuda"}, ValueError, "backend must be one of"),
        ((1, 8, 8, 1, 4), {"backend": "triton"}, ValueError, "backend='triton' needs CUDA tensors, got cpu"),
    ],
)
def test_refusals_are_those_of_the_call(shape, options, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=message):
        explain_backend(shape, **{"kernel_size": 3} | options)
