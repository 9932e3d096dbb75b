"""The scripts for GPUs, as far as they run without one: their help, arithmetic, tables and comparisons."""

import importlib
import json
import math
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from zoo.kernels import neighborhood_attention_2d

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def script_folder(monkeypatch):
    """As `python scripts/x.py` has it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def measure():
    return importlib.import_module("measure")


@pytest.fixture
def bench_gpu():
    return importlib.import_module("bench_gpu")


@pytest.fixture
def bench_models():
    return importlib.import_module("bench_models")


@pytest.fixture
def bench_diffusion():
    return importlib.import_module("bench_diffusion")


@pytest.fixture
def check_diffusion(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent / "tests"))
    module = importlib.import_module("check_diffusion")
    monkeypatch.setattr(module.diffusers.utils.logging, "set_verbosity_error", lambda: None)  # it would last
    return module


@pytest.fixture
def check_kernels(monkeypatch):
    module = importlib.import_module("check_kernels")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "BACKEND", "tiled")
    monkeypatch.setattr(module, "CHOSEN", ["neighborhood"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


@pytest.mark.parametrize("name", sorted(p.stem for p in SCRIPTS.glob("*.py") if p.stem != "measure"))
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(name).main()
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "name", ["bench_agents", "bench_diffusion", "bench_gpu", "bench_models", "check_diffusion", "check_kernels"]
)
def test_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        importlib.import_module(name).main()


# Attention in plain torch


def random_problem(window, shape, bias, extra):
    batch, _, _, heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    table = randn(heads, *(2 * k - 1 for k in window.kernel_size)) if bias else None
    tokens = [randn(batch, extra, heads, dim) if extra else None for _ in range(2)]
    return [*(randn(*shape) for _ in range(3)), table, *tokens], randn(*shape), randn(*shape[:-1])


@pytest.mark.parametrize("most", [2**27, 400])  # one band, many
@pytest.mark.parametrize(
    ("shape", "window", "bias", "extra"),
    [
        ((2, 9, 11, 2, 4), ((3, 4), (2, 2), (1, 2), (False, True)), True, 3),
        ((1, 14, 12, 2, 4), ((7, 5), (2, 1)), True, 0),
        ((1, 6, 6, 1, 4), ((6, 6),), False, 2),
    ],
)
def test_plain_attention(measure, shape, window, bias, extra, most):
    window = measure.Window(*window)
    inputs, *grads = random_problem(window, shape, bias, extra)
    ours = measure.attend_and_differentiate(window, inputs, *grads, backend="reference")
    plain = measure.plain_attention(window, inputs, *grads, dtype=torch.float64, most=most)
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_plain_circular_attention(measure):
    window = measure.Window(radius=3)
    (query, key, value, _, *text), grad_out, grad_lse = random_problem(window, (1, 5, 7, 1, 4), False, 2)
    out, lse, *grads = measure.plain_attention(
        window, [query, key, value, None, *text], grad_out, grad_lse, dtype=torch.float64, most=100
    )
    y, x = torch.arange(35) // 7, torch.arange(35) % 7
    seen = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < 9
    keys, values = (torch.cat([a.flatten(1, 2), b], 1)[0, :, 0] for a, b in ((key, text[0]), (value, text[1])))
    logits = query[0, :, :, 0].flatten(0, 1) @ keys.T / 2
    logits[:, :35] = logits[:, :35].masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out[0, :, :, 0].flatten(0, 1), logits.softmax(-1) @ values, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse[0, :, :, 0].flatten(), logits.logsumexp(-1), rtol=0, atol=1e-13)
    assert [None if g is None else g.shape for g in grads] == [query.shape] * 3 + [None] + [text[0].shape] * 2


def test_flash_rule(measure):
    exact = [torch.ones(3, dtype=torch.double)] + [None] * 7
    plain = [torch.ones(3) + 1e-3] + [None] * 7
    good, bad, broken = ([torch.ones(3) + e] + [None] * 7 for e in (1.9e-3, 2.1e-3, math.nan))
    shares, wrong = measure.flash_rule(good, plain, exact)
    assert shares["out"] == pytest.approx(0.95, rel=0.01) and not wrong
    for result in (bad, broken):
        [wrong] = measure.flash_rule(result, plain, exact)[1]
        assert wrong.startswith("out: ")


# Arithmetic and words


def test_floors(measure, bench_gpu):
    row = bench_gpu.NEIGHBORHOOD[0]
    tokens, heads = 128 * 56 * 56, 2
    assert bench_gpu.row_bytes(row, False) == tokens * heads * (4 * 32 * 2 + 4)
    assert bench_gpu.row_bytes(row, True) == tokens * heads * (12 * 32 * 2 + 2 * 4)
    memory, products = bench_gpu.floors(row, bandwidth=4e12, rate=8e14)["forward"]
    assert memory == pytest.approx(tokens * heads * 260 / 4e9)
    assert products == pytest.approx(tokens * heads * 4 * 49 * 32 / 8e11)
    text = bench_gpu.CIRCULAR[0]
    assert bench_gpu.row_bytes(text, False) == 24 * (4096 * (4 * 256 + 4) + 2 * 512 * 256)


@pytest.mark.parametrize(("height", "width", "radius"), [(40, 30, 8), (5, 3, 4), (1, 1, 2)])
def test_mean_window(measure, height, width, radius):
    y, x = (i.flatten() for i in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    pairs = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2).sum().item()
    assert measure.mean_window(measure.Window(radius=radius), height, width) == pytest.approx(pairs / (height * width))
    assert measure.mean_window(measure.Window((3, 5)), height, width) == 15


def test_markdown_table(measure):
    table = measure.markdown_table(["a", "b"], [["x", "1"], ["y", "2"]])
    assert table == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"


def test_first_line(measure):
    assert measure.first_line(ValueError("a | b\nc")) == "ValueError: a / b"
    assert measure.first_line(RuntimeError()) == "RuntimeError: "


def test_row_numbers(bench_gpu):
    assert bench_gpu.row_numbers(["1", "10-12"]) == [1, 10, 11, 12]


# The tables


def test_natten_times(bench_gpu):
    natten = json.loads((SCRIPTS / "results" / "natten-0.21.7-h200.json").read_text())
    best = [bench_gpu.natten_best(natten, row) for row in bench_gpu.NEIGHBORHOOD]
    assert best[0] == [0.6827, 3.346]  # forward by one kernel, with backward by the other
    assert best[3] == [0.1718, 1.1188]  # forward by tuned tiles
    assert None not in best
    assert bench_gpu.natten_best(natten, bench_gpu.CIRCULAR[0]) is None


def test_report(bench_gpu):
    """A row that fails says why, and has no ratio; a row that is missing is left out."""
    good, bad, missing = bench_gpu.NEIGHBORHOOD[:3]
    times = {"forward": [0.25, 0.2], "both": [1.0], "error": 0.5}
    floors = {"forward": [0.1, 0.01], "both": [0.2, 0.02]}
    flex = {"forward": [0.5], "both": [4.0]}
    results = {
        good.label: {"floors": floors, "no bias": times, "bias": times, "flex": flex, "dense": "no time was left"},
        bad.label: {"floors": floors, "no bias": "wrong: out: 2 > 1", "flex": flex},
    }
    text = bench_gpu.report(results, [], bench_gpu.headline({"versions": "v", "bandwidth": 4e12, "rate": 8e14}))
    forward, both = (part.splitlines() for part in text.split("## ")[1:])
    lines = [
        [line for line in part if line.startswith(f"| {row.label}")] for part in (forward, both) for row in (good, bad)
    ]
    cells = [[c.strip() for c in line[0].strip("|").split("|")] for line in lines]
    headers = [[c.strip() for c in part[2].strip("|").split("|")] for part in (forward, forward, both, both)]
    named = [dict(zip(h, c, strict=True)) for h, c in zip(headers, cells)]
    assert named[0]["ours, no bias"] == "0.250 (0.200)" and named[0]["aim, bias"] == "0.24"
    assert named[0]["FlexAttention / ours"] == "2.00" and named[0]["dense, whole map"] == "no time was left"
    assert named[1]["ours, no bias"] == "wrong: out: 2 > 1" and named[1]["FlexAttention / ours"] == "-"
    assert named[2]["floor: memory, products"] == "0.200, 0.020" and named[2]["FlexAttention / ours"] == "4.00"
    assert missing.label not in text


# FlexAttention with our masks


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), [(20, 5, 2), (17, 4, 1), (7, 7, 1), (40, 13, 1)])
def test_flex_masks(measure, bench_gpu, size, kernel_size, dilation, monkeypatch):
    row = bench_gpu.neighborhood(1, size, 2, 16, kernel_size, dilation, False)
    mask, queries, keys = bench_gpu.mask_of(row)
    blocks = bench_gpu.block_mask(mask, queries, keys, "cpu")
    expected = create_block_mask(mask, None, None, queries, keys, device="cpu")
    assert torch.equal(blocks.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(blocks, name), getattr(expected, name)), name
    inputs = [*torch.randn(3, *row.shape).unbind(0), None, None, None]
    flex = flex_attention(*bench_gpu.flex_inputs(row, inputs), block_mask=blocks)
    ours = neighborhood_attention_2d(*inputs[:3], kernel_size, dilation)
    torch.testing.assert_close(flex, bench_gpu.by_class(ours, row.window.dilation), rtol=0, atol=1e-5)


def test_circular_flex_mask(measure, bench_gpu):
    row = bench_gpu.Row((1, 6, 9, 1, 16), measure.Window(radius=3), text=5)
    mask, queries, keys = bench_gpu.mask_of(row)
    seen = mask(0, 0, torch.arange(queries)[:, None], torch.arange(keys)[None, :])
    assert (queries, keys) == (54, 59)
    assert seen[:, :5].all()
    window = measure.mean_window(row.window, 6, 9)
    assert seen[:, 5:].sum().item() == pytest.approx(window * 54)
    assert torch.equal(seen[:, 5:], seen[:, 5:].T)


# Random problems and named checks


def test_families_are_valid_calls(check_kernels):
    """Over all of a default run: what the operator takes, small enough for plain torch, and the same every time."""
    for number in range(200):
        kind = check_kernels.family(number, "neighborhood")
        assert kind == check_kernels.family(number, "neighborhood")
        for seed in range(10 * number, 10 * number + 10):
            batch, height, width, heads, dim = check_kernels.shape_of(kind, seed)
            for length, k, d, s, _ in zip((height, width), *kind["window"][:4]):
                assert k * d <= length and s <= k
            assert batch * heads * (height * width) ** 2 < 2**28
    assert check_kernels.family(4, "circular")["window"].radius > 0


def test_a_random_problem(check_kernels):
    """The comparison as a whole, on a backend that is right and on one that is not."""
    kind = check_kernels.kind_of(3, bias=True, extra=2, dim=8, dtype=torch.bfloat16)
    problem = check_kernels.example(kind, 1, 6, 7)
    assert not check_kernels.compare(*problem)[1]
    ours = check_kernels.fused(*problem)
    ours[3] = ours[3] * 1.05
    assert [w.split(":")[0] for w in check_kernels.compare(*problem, ours=ours)[1]] == ["key"]


def test_drawing_again(check_kernels, monkeypatch):
    """What is outside the rule is judged by the largest errors of all draws; what does not repeat is wrong."""
    shape, kind = (1, 6, 7, 3, 8), {**check_kernels.kind_of(3, bias=True, dim=8, dtype=torch.bfloat16), "lse": True}
    found = check_kernels.check_problem(shape, kind, 5)
    assert found[1:] == ([], [], []) and 0 < found.shares["rel_pos_bias"] <= 1

    def draw(error, of_plain):
        exact = torch.zeros(4, dtype=torch.double)
        tensors = (exact.float() + error, exact.float() + of_plain, exact)
        return [[x, *[None] * 7] for x in tensors], [exact.float() + 0.25, *[None] * 7]

    for errors, repeats, expected in (
        ([(0.3, 0.1)] * 7 + [(0.1, 0.2)], True, (8, ["out"], [], ["out"])),
        ([(0.3, 0.1)] + [(0.1, 0.1)] * 7, True, (8, ["out"], ["out"], ["out"])),
        ([(0.1, 0.2)], True, (1, [], [], [])),
        ([(0.1, 0.1)], False, (1, [], ["does not repeat"], ["out"])),
    ):
        results = [(results, repeats, tiled) for results, tiled in (draw(*error) for error in errors)]
        left = iter(results)
        monkeypatch.setattr(check_kernels, "draw_problem", lambda *_, left=left: next(left))
        found = check_kernels.check_problem(shape, kind, 5)
        words = ([w.split(":")[0] for w in x] for x in (found.at_first, found.wrong, found.in_tiled))
        assert (len(results) - len(list(left)), *words) == expected


def test_log_of_a_sweep(check_kernels, capsys):
    """What misses at first and what fails are both named, and counted by dtype beside plain torch."""
    future = Future()
    missed, failed = ["out: 3e-6 > 2e-6"], ["key: 5e-6 > 4e-6"]
    future.set_result(
        [
            ("one", "float32", check_kernels.Found({"out": 0.5}, [], missed)),
            ("two", "float32", check_kernels.Found({"out": 0.25}, failed, failed, missed)),
            ("three", "bfloat16", check_kernels.Found({"out": 0.75}, [])),
        ]
    )
    done, failures, lines = check_kernels.finish_sweep([future], time.time() + 1)
    assert (done, failures) == (3, 1)
    assert lines == [
        "2 drawn again, 1 failed",
        "outside the rule by the first draw: bfloat16 0 of 1, tiled 0; float32 2 of 2, tiled 1",
        "largest error / allowed: bfloat16 out 0.75, float32 out 0.50",
        "drawn again: one: by the first draw out: 3e-6 > 2e-6",
        "drawn again: two: by the first draw key: 5e-6 > 4e-6",
        "failed: two: key: 5e-6 > 4e-6",
    ]


def test_named_checks(check_kernels, capsys):
    wanted = ["infinities", "export", "empty"]
    lines, failed = check_kernels.run_checks(wanted)
    assert failed == 0 and [line[:2] for line in lines] == ["ok"] * 3, lines


def test_named_checks_that_fail(check_kernels, monkeypatch, capsys):
    def leak():
        raise check_kernels.Failure("it leaks")

    monkeypatch.setattr(check_kernels, "CHECKS", {"a": leak, "b": lambda: 1 / 0, "c": lambda: "fine"})
    lines, failed = check_kernels.run_checks(None)
    assert failed == 2
    assert [line.split(" (")[0] for line in lines] == [
        "FAIL  a: it leaks",
        "FAIL  b: ZeroDivisionError: division by zero",
        "ok    c: fine",
    ]


# Models


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_model_errors(bench_models, monkeypatch, mode):
    monkeypatch.setattr(bench_models, "DEVICE", "cpu")
    job = bench_models.Job("test_dinat", 96, 4, mode, "eager")
    model = bench_models.create(job)
    error = bench_models.error_of(model, model, job, torch.channels_last)
    assert 0 < error < bench_models.ALLOWED[mode] / 2
    for part in ("levels.0.blocks.1.attn.rpb", "levels.1.blocks.0.attn.proj.weight"):
        model = bench_models.create(job)
        with torch.no_grad():
            model.get_parameter(part).neg_()
        for amp in (True, False):
            with pytest.raises(ValueError, match=f"differs from float32 .* in {'bfloat16' if amp else 'float32'};"):
                bench_models.checked_error(model, model, job, torch.channels_last, amp)


def test_model_errors_where_rounding_grows(bench_models, monkeypatch):
    """Batch norm over two images of a map of 4 x 4."""
    monkeypatch.setattr(bench_models, "DEVICE", "cpu")
    job = bench_models.Job("test_halonet", 128, 2, "training", "eager")
    model = bench_models.create(job)
    assert bench_models.error_of(model, model, job, torch.contiguous_format) > bench_models.ALLOWED["training"]
    assert bench_models.checked_error(model, model, job, torch.contiguous_format) < 1
    assert bench_models.checked_error(model, model, job, torch.channels_last, amp=False) < 0.001
    with torch.no_grad():
        model.get_parameter("stages.1.0.self_attn.pos_embed.height_rel").neg_()
    with pytest.raises(ValueError, match="in float32; 0"):
        bench_models.checked_error(model, model, job, torch.channels_last, amp=False)


@pytest.mark.parametrize(("what", "sizes"), [("agents", (2, 17, 2, 8, 4)), ("convolution", (2, 5, 8, 3))])
def test_agents(what, sizes, monkeypatch):
    """Ours and torch's are the same function, and an error is no time."""
    bench_agents = importlib.import_module("bench_agents")
    monkeypatch.setattr(bench_agents, "randn", lambda *shape, dtype=None: torch.randn(*shape))
    monkeypatch.setattr(bench_agents, "gpu_ms", lambda call: 1.5 if call() is None else 2.5)
    make = getattr(bench_agents, what)
    *times, worst = bench_agents.measure(make, sizes)
    assert times == ["1.500", "1.500", "2.500", "2.500"]
    assert float(worst) <= 2

    def wrong(sizes):
        inputs, ours, torchs = make(sizes)
        return inputs, lambda *x: 1.001 * ours(*x), torchs

    assert bench_agents.measure(wrong, sizes)[0] == "-"


def test_batches_keep_the_pixels(bench_models):
    assert [bench_models.batch_at(size, 256) for size in (192, 256, 448, 512, 1024, 8192)] == [
        256, 256, 64, 48, 12, 2
    ]  # fmt: skip


def test_models_in_several_runs(bench_models, monkeypatch, tmp_path):
    """A run adds to the table of an earlier one, takes its memory format, and passes over what is there."""
    seen = []

    def best_of(job, layouts):
        seen.append((job.row, job.way, *layouts))
        if job.name == "b" and job.way == "compiled":
            return "too hard"
        return {"images": 1.0, "memory": 1.0, "error": 0.0, "layout": layouts[-1]}

    monkeypatch.setattr(bench_models, "best_of", best_of)
    monkeypatch.setattr(bench_models, "versions", lambda: "v")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_models, "settle", lambda: None)
    warmed = []
    monkeypatch.setattr(bench_models, "compile_all", lambda work, *_: warmed.extend(work))

    def run(*arguments):
        seen.clear()
        fixed = "--modes", "inference", "--output", str(tmp_path / "models.md")
        monkeypatch.setattr("sys.argv", ["bench_models.py", *arguments, *fixed])
        bench_models.main()
        return seen

    both = "contiguous", "channels last"
    assert run("a", "b", "--accelerate", "a", "--ways", "eager") == [
        ("a", "eager", *both), ("b", "eager", *both), ("a, accelerated", "eager", *both)
    ]  # fmt: skip
    compiled = [(name, way, "channels last") for way in ("compiled", "graphs") for name in "ab"]
    assert run("a", "b", "--missing", "--warm", "2") == compiled
    assert [(job.name, job.way, layout) for job, layout in warmed] == compiled
    assert run("a", "b", "--missing") == [("b", "compiled", "channels last")]
    assert run("a", "--seconds", "-1") == []
    lines = (tmp_path / "models.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(("| a |", "| b |"))] == [
        "| a | 1 (1.0) | 1 (1.0) | 1 (1.0) | inference channels last | 0.000 | - |",
        "| b | 1 (1.0) | too hard | 1 (1.0) | inference channels last | 0.000 | - |",
    ]


def test_models_again(bench_models, monkeypatch, tmp_path):
    """The median of all runs, and their range where they differ; without the option the last run counts."""
    speeds = iter([100.0, 300.0, 120.0, 121.0, 122.0])

    def best_of(*_):
        return {"images": next(speeds), "memory": 1.0, "error": 0.0, "layout": "contiguous"}

    monkeypatch.setattr(bench_models, "best_of", best_of)
    monkeypatch.setattr(bench_models, "versions", lambda: "v")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_models, "settle", lambda: None)
    fixed = "--modes", "inference", "--ways", "eager", "--output", str(tmp_path / "models.md")
    shown = []
    for again in ((), ("--again",), ("--again",), (), ("--again",)):
        monkeypatch.setattr("sys.argv", ["bench_models.py", "a", *fixed, *again])
        bench_models.main()
        shown.append((tmp_path / "models.md").read_text().splitlines()[-1].split(" | ")[1])
    assert shown == ["100 (1.0)", "200 [100 to 300] (1.0)", "120 [100 to 300] (1.0)", "121 (1.0)", "122 (1.0)"]


def test_models_report(bench_models):
    result = {"images": 12345.6, "memory": 3.21, "error": 0.0123, "layout": "channels last"}
    rows = {"nat_tiny": {"inference eager": result, "inference compiled": "out of memory"}}
    rows["swin"] = {"training eager": {**result, "exact": 0.0000123}}
    text = bench_models.report({"224": {"batch": {"inference": 256}, "rows": rows}}, "v")
    assert text.splitlines()[-2:] == [
        "| nat_tiny | 12,346 (3.2) | out of memory | - | inference channels last | 0.012 | - |",
        "| swin | - | - | 12,346 (3.2) | training channels last | 0.012 | 1.2e-05 |",
    ]
    assert "224 x 224 pixels, inference at batch 256" in text


# Diffusion models


def test_diffusion_figures(bench_diffusion, monkeypatch, tmp_path, capsys):
    """Toy models through the whole script: what is wrong has no figure, and a later run adds to the first."""
    clear, window = bench_diffusion.FLUX_ATTENTION["CLEAR, radius 8"]
    wrong = clear, window._replace(radius=7)
    large = bench_diffusion.FLUX_ATTENTION["neighborhood 32"]
    few = {"CLEAR, radius 8": (clear, window), "CLEAR, radius 16": wrong, "neighborhood 32": large}
    monkeypatch.setattr(bench_diffusion, "FLUX_ATTENTION", few)
    for kind in ("flux", "unet"):
        arguments = f"x.py --tiny --budget 0 --output {tmp_path} --only {kind} --flux-sizes 256"
        monkeypatch.setattr("sys.argv", arguments.split())
        bench_diffusion.main()
    results = json.loads((tmp_path / "diffusion_tiny.json").read_text())["results"]
    flux, unet = results["flux"]["256"], results["unet"]["tiny, 64"]
    for result in (flux["dense"], flux["CLEAR, radius 8"], *unet.values()):
        assert result["ms"] > 0 and result["repeats"] == 1
    assert flux["dense"]["from blocks"] > 0
    assert all(0 < result["error"] <= 1 for result in (flux["CLEAR, radius 8"], unet["agents"], unet["merging"]))
    assert flux["CLEAR, radius 16"].startswith("ValueError: wrong: out")
    assert flux["neighborhood 32"].startswith("ValueError: kernel_size * dilation may not exceed the map: 32 x 32")
    text = (tmp_path / "diffusion_tiny.md").read_text()
    assert f"| CLEAR, radius 8 | {bench_diffusion.milliseconds(flux['CLEAR, radius 8'], flux['dense'])} |" in text
    assert "| tiny, 64 x 64 |" in text and capsys.readouterr().out.count(text) == 1


def test_checks_of_agents(bench_diffusion, monkeypatch):
    """A kernel that is wrong is noticed, and so is a check that compares nothing."""
    scale = bench_diffusion.TINY
    model = bench_diffusion.create(bench_diffusion.UNet2DConditionModel, scale.unets["tiny"], "cpu")
    call = bench_diffusion.unet_call(model, 64)
    real = bench_diffusion.agent_attention
    monkeypatch.setattr(bench_diffusion, "agent_attention", lambda *args, **scales: 1.1 * real(*args, **scales))
    assert "wrong: out" in bench_diffusion.unet_figures(model, call, 0, 1, 0)
    assert isinstance(bench_diffusion.unet_figures(model, call, bench_diffusion.AGENT_STEPS, 1, 0), dict)
    with pytest.raises(ValueError, match="nothing was compared"):
        bench_diffusion.Verdict().raise_if_wrong()


def test_sums_of_blocks(bench_diffusion, monkeypatch):
    """Every part counts as often as it runs, by a clock that ticks once a reading."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench_diffusion.time, "perf_counter", lambda: float(next(ticks)))
    model = bench_diffusion.create(bench_diffusion.FluxTransformer2DModel, bench_diffusion.TINY.flux, "cpu")
    call = bench_diffusion.flux_call(model, 64, 5)
    result = bench_diffusion.summed_times(model, lambda: model(**call), 0)
    # A block reads the clock twice, the whole besides: 1 tick in each of 4 blocks, 5 between them.
    assert result["summed"] == {"double": 1e3, "single": 1e3, "rest": 5e3}
    assert result["ms"] == 1e3 * (3 + 3 + 5)
    assert len(model.transformer_blocks) == 3 and not model.transformer_blocks[0]._forward_hooks


def test_what_tokens_see(bench_diffusion):
    """Text sees and is seen by all; the rest as the operators have it."""
    window = bench_diffusion.Window((4, 4))
    seen = bench_diffusion.sees(window, torch.arange(3 + 36), 6, 3)
    assert seen[:3].all() and seen[:, :3].all()
    assert (seen[3:, 3:].sum(1) == 16).all()
    circle = bench_diffusion.sees(bench_diffusion.Window(radius=2), torch.arange(36), 6, 0)
    assert circle[0].nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_diffusion_report(bench_diffusion):
    """Ratios are to dense attention of the same size, and sums of blocks are marked."""
    summed = {"double": 1.0, "single": 2.0, "rest": 3.0}
    dense = {"ms": 6000.0, "memory": 30.0, "backend": "CUDNN", "from blocks": 5940.0}
    rows = {
        "4096": {"dense": dense, "CLEAR, radius 8": {"ms": 1500.0, "memory": 31.0, "error": 0.25}},
        "8192": {"dense": {**dense, "summed": summed}, "CLEAR, radius 8": "out of memory"},
    }
    unet = {"dense": dense, "agents": {**dense, "ms": 4000.0, "error": 0.5}, "merging": {**dense, "ms": 5000.0}}
    text = bench_diffusion.report({"flux": rows, "unet": {"SDXL, 1024": unet}}, "v", tiny=False)
    assert "| dense | 6,000 | 6,000 * | - |" in text
    assert "| CLEAR, radius 8 | 1,500 (4.00x) | out of memory | 0.25 |" in text
    assert "sums of blocks differ from whole forwards by at most 1.0 %" in text
    assert (
        "| SDXL, 1024 x 1024 | 6,000 | 4,000 (1.50x) | 5,000 (1.20x) | 1.30x | 30.0, 30.0, 30.0 | cudnn | 0.50 |"
        in text
    )


def test_checks_of_models(check_diffusion, monkeypatch, tmp_path, capsys):
    """Every check of a kind passes on the CPU, and one that must not pass has the last word."""
    monkeypatch.setitem(check_diffusion.LOCAL, "no window", check_diffusion.ClearAttnProcessor(99))
    monkeypatch.setitem(check_diffusion.LOCAL, "large window", check_diffusion.NeighborhoodAttnProcessor(9))
    monkeypatch.setattr("sys.argv", f"x.py --cpu --kinds flux --output {tmp_path / 'log'}".split())
    with pytest.raises(SystemExit) as exit_:
        check_diffusion.main()
    assert exit_.value.code == 1
    _, *lines, failed = (tmp_path / "log").read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("ok")] == [
        f"ok    flux, {name}" for name in [*check_diffusion.COVERING, *list(check_diffusion.LOCAL)[:-2], "threads"]
    ]
    assert "FAIL  flux, no window: the window makes no difference" in lines
    assert any(line.startswith("FAIL  flux, large window: ValueError: kernel_size * dilation") for line in lines)
    assert failed.startswith("2 failed")


def test_scaling_says_what_differs_and_how_well_it_scales():
    bench_scaling = importlib.import_module("bench_scaling")
    evaluation = {"val_top1": 0.5, "val_top5": 0.75, "val_ece": 0.25, "val_loss": 2.0}
    single = {"evaluation float32": evaluation, "training float32": [2.0, 1.0], "training float64": [2.0, 1.0]}
    single |= {"accumulated float32": [2.0, 1.0], "accumulated float64": [2.0, 1.0]}
    close = single | {"training float32": [2.0, 1.00005]}
    table, fine = bench_scaling.check_table({"single 1": single, "ddp 2": close})
    assert fine
    assert "| ddp 2 | equal | 5.0e-05 | 0.0e+00 |" in table

    far = close | {"training float64": [2.0, 1.00005], "evaluation float32": evaluation | {"val_ece": 0.2500001}}
    table, fine = bench_scaling.check_table({"single 1": single, "ddp 2": far, "fsdp 2": "not done in 60 s"})
    assert not fine
    assert "| ddp 2 | WRONG: val_ece differ | 5.0e-05 | WRONG: 5.0e-05 |" in table
    assert "| fsdp 2 | WRONG: not done in 60 s |" in table

    cells = {"single 1": {"images": 100, "memory": 1}, "ddp 4": {"images": 360, "memory": 2}}
    table = bench_scaling.time_table(cells | {"ddp 1": {"images": 96, "memory": 2}, "ddp 2": "failed"}, [1, 2, 4])
    assert "| ddp | 96 (2.0) | failed | 360 (2.0) |  |  | 93.8% | 90.0% |" in table
