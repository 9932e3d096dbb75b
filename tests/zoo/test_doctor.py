"""`zoo doctor`: versions, devices, and which backend calls would use."""

import pytest
import torch

from zoo.cli import main
from zoo.doctor import environment, try_fused


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def test_typical_calls(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch      {torch.__version__.partition('+')[0]}" in text
    found = {(call, device, dtype): backend for call, device, dtype, backend, _ in rows(text)}
    call = "1 x 56 x 56 x 2 x 32, kernel 7, dilation 1"
    assert found[call, "cpu", "float32"] == found[call, "cuda", "float64"] == "tiled"
    assert found[call, "cuda", "bfloat16"] == "triton"
    assert found["1 x 7 x 7 x 16 x 32, kernel 7, dilation 1", "cpu", "float32"] == "dense"
    assert ("what is said of cuda is what one would do" in text) != torch.cuda.is_available()


def test_one_call(capsys):
    options = ["--kernel-size", "16", "--dilation", "4", "--dtype", "float16", "--device", "cuda"]
    assert main(["doctor", "--shape", "1", "128", "128", "24", "300", *options]) == 0
    [row] = rows(capsys.readouterr().out)
    assert row[:4] == ["1 x 128 x 128 x 24 x 300, kernel 16, dilation 4", "cuda", "float16", "tiled"]
    assert row[4] == "it runs everywhere; triton needs a head_dim of at most 256, got 300"


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ("1 5 128 2 32", [], "kernel_size * dilation may not exceed the map: along the height 7 * 1 = 7 > 5"),
        ("1 -8 128 2 32", [], "shape must be [batch, height, width, heads, head_dim]"),
        ("1 8 8 2 32", ["--device", "gpu"], "there is no device 'gpu'"),
    ],
)
def test_mistakes(capsys, shape, options, message):
    assert main(["doctor", "--shape", *shape.split(), *options]) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"zoo: error: {message}")
    assert not out


def test_environment_names_what_is_missing(monkeypatch):
    monkeypatch.setattr("zoo.doctor.PACKAGES", ("torch", "no-such-package"))
    assert ("no-such-package", "not installed") in environment()


def test_trying_the_fused_kernels(monkeypatch):
    """Where they cannot run, the reason; where they break, what broke; where they run, how well."""
    if not torch.cuda.is_available():
        assert try_fused("cpu") == "not used: needs CUDA tensors, got cpu"
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert float(try_fused(device).rpartition(" ")[2]) < 1e-5
    monkeypatch.setattr("zoo.kernels.neighborhood.triton.forward", lambda *_: 1 / 0)
    assert try_fused(device).startswith("do not run: ")
