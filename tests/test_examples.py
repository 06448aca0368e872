"""Every example runs as its docstring says, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "retrofit.py": ("Outputs bit-equal to those before: True", "Without those of the last stage: 6 SEs"),
}


def test_every_example_has_its_promise_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example_runs(name: str) -> None:
    ran = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for promise in PROMISES[name]:
        assert promise in ran.stdout
