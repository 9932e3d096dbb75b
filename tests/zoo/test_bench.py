"""`zoo bench`: nothing is timed before it was found right, and figures are of what they say."""

import csv
import os
from functools import partial

import pytest
import timm
import torch
import torch._dynamo
from torch.nn.attention import flex_attention

import zoo.bench
import zoo.task
from zoo.bench import Settings, bench_call, bench_model, peak_bytes, relative_error, scatter_weights, time_flex
from zoo.cli import main
from zoo.errors import UserError

CPU = Settings("cpu", seconds=0.0)


def test_models(capsys, tmp_path):
    args = ["--device", "cpu", "--batch-size", "3", "--seconds", "0.01", "--image-size", "64"]
    assert main(["bench", "test_dinat", "test_vit", *args, "--output", str(tmp_path / "new")]) == 0
    with (tmp_path / "new" / "models.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["test_dinat", "test_vit"]
    for row in rows:
        model = timm.create_model(row["name"], num_classes=1000, **({"img_size": 64} if "vit" in row["name"] else {}))
        parameters = sum(p.numel() for p in model.parameters())
        assert int(row["parameters"]) == parameters
        assert float(row["MiB"]) > 4 * parameters / 2**20
        assert 0 < float(row["error"]) < 1e-5
        assert float(row["images/s"]) > 0 and float(row["latency ms"]) > 0
        assert row["image size"] == "64x64" and row["batch_size"] == "3" and not row["note"]
    assert (tmp_path / "new" / "models.png").stat().st_size > 1000
    printed = capsys.readouterr()
    assert "test_vit" in printed.out and "…" not in printed.out
    assert [line.split("  ")[0] for line in printed.err.splitlines()] == ["test_dinat", "test_vit"]


def test_rows_are_printed_as_they_are_measured(capsys, monkeypatch):
    printed = []

    def measure(name, *_):
        printed.append(capsys.readouterr().err)
        return {"name": name, "latency ms": 1234.567, "note": "seen"}

    monkeypatch.setattr(zoo.bench, "bench_model", measure)
    monkeypatch.setattr(zoo.bench, "bench_kernels", lambda _: (measure(name) for name in ("c", "d")))
    assert main(["bench", "test_vit", "nat_tiny", "--kernels", "--device", "cpu"]) == 0
    rows = [f"{name}  latency ms 1,234.57  seen\n" for name in ("test_vit", "nat_tiny")]
    assert printed == ["", *rows, "c  seen\n"]


def test_a_model_that_is_wrong_has_no_figures(monkeypatch):
    monkeypatch.setitem(zoo.bench.ALLOWED, "bfloat16", 1e-9)
    row = bench_model("test_dinat", CPU._replace(dtype="bfloat16"))
    assert 1e-4 < row["error"] < 0.02
    assert row["note"] == "not timed: differs from float64 by more than 1e-09"
    assert not {"images/s", "latency ms", "MiB"} & set(row)


def test_every_part_of_a_model_counts():
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    model = scatter_weights(timm.create_model("test_dinat")).eval()
    with torch.no_grad():
        out = model(x).double()
        for part in ("levels.0.blocks.1.attn.rpb", "levels.1.blocks.0.attn.proj.weight"):
            model.get_parameter(part).neg_()
            assert relative_error(model(x), out) > max(zoo.bench.ALLOWED.values()), part
            model.get_parameter(part).neg_()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of FlexAttention, which NATTEN runs without compiling
def test_kernels():
    rows = {row["name"]: row for row in bench_call((2, 7, 9, 2, 32), 1, CPU)}
    assert set(rows) == {"zoo tiled", "zoo tiled, bias", "NATTEN", "dense (torch)"}
    for name in ("zoo tiled", "zoo tiled, bias", "NATTEN"):
        assert rows[name]["error / allowed"] <= 1 and rows[name]["forward ms"] > 0, rows[name]
        assert ("with gradients ms" in rows[name]) == (name != "NATTEN")
    assert "another function" in rows["dense (torch)"]["note"]
    assert not any(name.startswith("zoo ") and "note" in row for name, row in rows.items())


def test_a_kernel_that_is_wrong_has_no_times(monkeypatch):
    right = zoo.bench.neighborhood_attention_2d

    def wrong(query, key, value, *args, backend, **kwargs):
        out = right(query, key, value, *args, backend="auto", **kwargs)
        return out if backend == "reference" else out + 1e-3 * key

    monkeypatch.setattr(zoo.bench, "neighborhood_attention_2d", wrong)
    row = next(bench_call((1, 8, 8, 1, 32), 1, CPU))
    assert row["note"].startswith("not timed: out: ") and "key: " in row["note"] and "value: " not in row["note"]
    assert "forward ms" not in row


def test_every_model_is_compiled(monkeypatch):
    uncompiled = []

    class Layers(torch.nn.Sequential):
        def forward(self, images):
            if not torch.compiler.is_compiling():
                uncompiled.append(images.dtype)
            return super().forward(images)

    monkeypatch.setattr(zoo.task, "create_model", lambda name, *_: Layers(*[torch.nn.Conv2d(3, 3, 1)] * int(name)))
    monkeypatch.setattr(torch, "compile", lambda model, mode, compile=torch.compile: compile(model, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=3):  # a model takes two, of the batch and of one image
        rows = [bench_model(str(depth), CPU._replace(compile="default", batch_size=2)) for depth in (1, 2, 3)]
    assert all(row["images/s"] > 0 and row["latency ms"] > 0 for row in rows), rows
    assert uncompiled == [torch.float64] * 3  # what is compared with


@pytest.fixture
def uncompiled(monkeypatch):
    """The shapes of FlexAttention's calls that are not compiled, while it can be differentiated on the CPU."""
    called = []

    def attention(query, *args, **kwargs):
        if not torch.compiler.is_compiling():
            called.append(query.shape)
        return flex_attention.flex_attention(query, *args, **kwargs)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(zoo.bench, "flex_attention", attention)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    return called


def flex_row(side):
    qkv = [torch.randn(1, side, side, 1, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return time_flex(qkv[:3], 1, qkv[3], CPU)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of FlexAttention, by a backend that does not compile its kernel
def test_every_flex_attention_is_compiled(uncompiled):
    with torch._dynamo.config.patch(recompile_limit=3):  # a problem takes two, without and with gradients
        rows = [flex_row(side) for side in (7, 8, 9)]
    assert all(row["forward ms"] > 0 and row["with gradients ms"] > 0 for row in rows), rows
    assert not uncompiled


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_that_is_not_compiled_has_no_times(uncompiled):
    with torch._dynamo.config.patch(recompile_limit=1):
        row = flex_row(7)
    assert list(row) == ["note"] and row["note"].startswith("not timed: FailOnRecompileLimitHit: ")
    assert not uncompiled


def test_peak_memory(capfd):
    def call():
        a = torch.ones(1000, 250)  # 1 MB
        b = a + 1
        del a
        return b + torch.ones(1000, 500).sum()  # at most a and b, or b and 2 MB, or b and the result

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(3e6, rel=1e-3)
    assert not capfd.readouterr().err


def test_a_full_disk_leaves_the_old_figures(tmp_path, monkeypatch):
    def fill_the_disk(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "models.csv").write_text("old")
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot write .*models\.csv: No space left on device"):
        zoo.bench.report("models", [{"name": "a", "latency ms": 1.0}], zoo.bench.MODEL_FIGURES, CPU, tmp_path)
    assert (tmp_path / "models.csv").read_text() == "old"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to measure: give names of models, or --kernels"),
        (["test_dinat", "test_dinatt"], "did you mean test_dinat"),
        (["test_dinat", "--batch-size", "0"], "--batch-size: expected more than 0, got 0"),
        (["--kernels", "--image-size", "50"], "--image-size: expected a multiple of 32 for the operators, got 50"),
        (["--kernels", "--device", "warp"], "--device: torch cannot use 'warp' here"),
    ],
)
def test_mistakes(capsys, monkeypatch, args, message):
    monkeypatch.setattr(zoo.bench, "bench_model", None)  # nothing is measured before
    assert main(["bench", *args]) == 2
    assert message in capsys.readouterr().err
