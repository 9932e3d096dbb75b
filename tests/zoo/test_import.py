"""``import zoo`` in a fresh process: quiet, light, and from anywhere."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[2]
HEAVY = ("diffusers", "lightning", "pytorch_lightning", "triton", "natten", "sklearn", "matplotlib", "torchmetrics")


def python(code, cwd=CLONE, **env):
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def loaded_after(statement):
    names = json.loads(python(f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"))
    return {name.partition(".")[0] for name in names}


def test_prints_nothing_and_pulls_in_nothing_heavy():
    extra = loaded_after("import zoo") - loaded_after("import timm")
    assert "zoo" in extra
    assert not extra & set(HEAVY)


def test_takes_little_longer_than_timm():
    code = "import time, timm; start = time.perf_counter(); import zoo; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_needs_no_network():
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import zoo, timm; timm.create_model('test_dinat')"
    )
    assert python(code) == ""


def test_registers_models_from_the_clone():
    assert python("import zoo, timm; print(timm.is_model('dinat_tiny'), zoo.__file__)").split() == [
        "True",
        str(CLONE / "zoo" / "__init__.py"),
    ]


def test_works_from_elsewhere_when_installed(tmp_path):
    try:
        importlib.metadata.distribution("attn-zoo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("attn-zoo is not installed here")
    code = "import zoo, timm; from zoo.recipes import list_recipes; print(timm.is_model('dinat_tiny'), list_recipes())"
    out = python(code, cwd=tmp_path)
    assert out.startswith("True")
    assert "digits/dinat" in out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "zoo", "--version"], cwd=CLONE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("zoo ")


def test_help_is_light():
    heavy = loaded_after("import zoo.cli")
    assert not (heavy - loaded_after("import timm")) & set(HEAVY)
