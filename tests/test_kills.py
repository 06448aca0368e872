"""Saves that are killed: what is left is the old model, the new one, or an error with the way back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import se_surgery

SCRIPT = Path(__file__).with_name("kills.py")
ROOT = str(Path(se_surgery.__file__).parents[1])
# A kill right before each call that writes: three drafts, their way to the disk, three names, and the folder's own.
AT_CALLS = {
    "open: old": 5,
    "open: mixed": 2,
    "open: new": 1,
    "fsync: old": 4,
    "fsync: mixed": 2,
    "fsync: new": 1,
    "replace: old": 1,
    "replace: mixed": 2,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("kills", [18, pytest.param(218, marks=pytest.mark.sweep)])
def test_a_killed_save(kills, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "net"), str(kills), "0"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["left"] == [] and found["kills"] == kills
    outcomes = found["outcomes"]
    assert {name: number for name, number in outcomes.items() if ":" in name} == AT_CALLS
    assert set(outcomes) - AT_CALLS.keys() <= {"old", "new", "mixed"}
