"""``import zoo`` in a fresh process: quiet, light, and from anywhere."""

import importlib.metadata
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[2]
HEAVY = ("diffusers", "lightning", "pytorch_lightning", "triton", "natten", "sklearn", "matplotlib", "torchmetrics")
IN_THE_CLONE = """
import json, socket, sys, time, warnings
def refuse(*args, **kwargs): raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
def loaded(): return {name.partition(".")[0] for name in sys.modules}
def models(): return {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
import timm
by_timm, theirs, modules = loaded(), models(), timm.list_modules()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    start = time.process_time()
    import zoo
    seconds = time.process_time() - start
by_zoo, ours = loaded() - by_timm, models()
import zoo.cli
by_cli = loaded() - by_timm
timm.create_model("test_dinat")
print(json.dumps({
    "file": zoo.__file__,
    "registered": timm.is_model("dinat_tiny"),
    "changed": [name for name in theirs if ours[name] is not theirs[name]],
    "modules of timm": modules,
    "modules of ours": sorted({ours[name].__module__.rpartition(".")[2] for name in ours.keys() - theirs.keys()}),
    "seconds": seconds,
    "by zoo": sorted(by_zoo),
    "by zoo.cli": sorted(by_cli),
}))
"""


def python(code, cwd=CLONE):
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_in_the_clone():
    """Without a network, with nothing printed or warned of, and beside timm as it was. One process tells all of it."""
    told = json.loads(python(IN_THE_CLONE))
    assert told["file"] == str(CLONE / "zoo" / "__init__.py") and told["registered"]
    assert not told["changed"]
    assert told["modules of ours"] and not set(told["modules of ours"]) & set(told["modules of timm"])
    assert "zoo" in told["by zoo"]
    assert not set(told["by zoo"]) & set(HEAVY)
    assert not set(told["by zoo.cli"]) & set(HEAVY)
    assert told["seconds"] < 0.5  # of the processor, on top of timm's


def test_works_from_elsewhere_when_installed(tmp_path):
    try:
        importlib.metadata.distribution("attn-zoo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("attn-zoo is not installed here")
    code = "import zoo, timm; from zoo.recipes import list_recipes; print(timm.is_model('dinat_tiny'), list_recipes())"
    out = python(code, cwd=tmp_path)
    assert out.startswith("True")
    assert "digits/dinat" in out


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zoo", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("zoo", run_name="__main__")
    assert exit_.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("zoo ") and not err
