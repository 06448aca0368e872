"""Every example runs as its docstring says, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# Figures are the paper's (tables 10 and 13, section 6.5), or timm's own.
PROMISES = {
    "plan.py": (
        "resnet50: 25,557,032 parameters",
        "standard     16     2,514,944   +9.84%       8,034,304",
        "inner        16       157,184",
        "inception     0  ",
        "no place for inception",
    ),
    "retrofit.py": (
        "17 SEs put in",
        "Outputs bit-equal to those before: True",
        "ok  forward, training: with gates at one bit-equal to the base; 17 SEs, each once",
        "17 of 17 gates moved",
    ),
    "strip.py": (
        "seresnet50: 28,088,024 parameters, 2,530,992 of them in 16 SEs",
        "26,508,632 parameters, 951,600 of them in 13 SEs",
        "3 SEs less are 1,579,392 parameters less",
        "Stripped: outputs bit-equal True, keys and values True, classes True",
    ),
    "register.py": (
        "timm lists ['my_se_model']",
        "8 SEs, of 8, 8, 8, 16, 16, 32, 32, 64 hidden channels",
        "Its architecture is 'se_surgery'",
        "Another process knows my_se_model: False; it builds the same model: True",
        "Unregistered, timm lists []",
    ),
    "neck.py": (
        "Features bit-equal to the base's at the start: True",
        "     8  [2, 128, 16, 16]       [2, 64, 16, 16]",
        "    32  [2, 512, 4, 4]         [2, 64, 4, 4]",
        "Gradients reach 8 of 8 SEs",
    ),
    "finetune.py": (
        "SEs epoch 1 train_loss",
        "all epoch 2 train_loss",
        "Saved as timm's local-dir:digits/model",
    ),
    "save_load.py": (
        "Loaded, its outputs are bit-equal: True",
        "With 10 classes and 1 channel 4 of 4 SEs are those that were saved",
        "Without one tensor it is refused: is not what was saved",
    ),
    "gates.py": (
        "9 SEs over 449 inputs of 10 classes",
        "all SEs                      280,250   8,064   9",
        "last stage stripped          274,106   1,920   9",
        "all folded                   272,186       0   9",
        "tradeoff, 50% may stay",
        "9 SEs, 8,064 parameters; score 0.9",
        "Taken out: ",
    ),
}


def test_every_example_has_its_promise_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By the command in its docstring, in this process: importing PyTorch anew takes longer than most examples."""
    script = EXAMPLES / name
    command = re.search(r"^    python (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert command is not None, "the docstring does not say how to call it"
    path, *arguments = shlex.split(command[1])
    assert path == f"examples/{name}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python` does for a script
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for promise in PROMISES[name]:
        assert promise in printed, printed
