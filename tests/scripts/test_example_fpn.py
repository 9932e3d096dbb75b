"""The feature pyramid example runs from the root of the clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("size", "sides"), [(96, [24, 12, 6, 3]), (75, [19, 10, 5, 3])])
def test_example_fpn(size, sides):
    result = subprocess.run(
        [sys.executable, "scripts/example_fpn.py", "--model", "test_dinat", "--size", str(size)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = [f"stride {s}: [1, 256, {side}, {side}]" for s, side in zip((4, 8, 16, 32), sides, strict=True)]
    assert [line.strip() for line in result.stdout.splitlines()] == expected
