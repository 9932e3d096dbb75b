"""The feature pyramid example runs from the root of the clone."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("size", "sides"), [(96, [24, 12, 6, 3]), (75, [19, 10, 5, 3])])
def test_example_fpn(size, sides, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["example_fpn.py", "--model", "test_dinat", "--size", str(size)])
    runpy.run_path("scripts/example_fpn.py", run_name="__main__")
    expected = [f"stride {s}: [1, 256, {side}, {side}]" for s, side in zip((4, 8, 16, 32), sides, strict=True)]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == expected
