"""The Tab key: what it offers is what the command line takes, and it does not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import se_surgery
from benchmarks.words import words as made
from se_surgery.commands import complete
from se_surgery.commands.main import app
from se_surgery.models.bases import is_base


def offered(line: str) -> list[str]:
    """What bash is told at the end of a line."""
    given = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), complete.ASKED: "complete_bash"}
    result = CliRunner().invoke(complete.outline(), [], env=given, prog_name="se-surgery")
    assert result.exit_code == 0, result.output
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "some", "others"),
    [
        ("se-surgery ", ["plan", "add", "strip", "verify"], ["resnet50"]),
        ("se-surgery pl", ["plan"], ["add"]),
        ("se-surgery plan resnet5", ["resnet50", "resnet50d"], ["seresnet50", "plan"]),
        ("se-surgery plan se_resnet5", ["se_resnet50", "se_resnet50_pre"], ["resnet50"]),
        ("se-surgery list seres", ["seresnet50"], ["se_resnet50"]),
        ("se-surgery plan torchvision/res", ["torchvision/resnet50"], ["resnet50"]),
        ("se-surgery verify se_tv_", ["se_tv_resnet50"], ["se_resnet50"]),
        ("se-surgery plan resnet50 --placement ", ["standard", "pre", "post", "identity", "inner", "inception"], []),
        ("se-surgery plan resnet50 -p i", ["identity", "inner", "inception"], ["pre"]),
        ("se-surgery add resnet50 --gate h", ["hard_sigmoid"], ["sigmoid"]),
        ("se-surgery strip seresnet50 --origin t", ["timm", "torchvision"], ["other"]),
        ("se-surgery plan resnet50 --no", ["--no-bias"], ["--bias"]),
        ("se-surgery push x y --pr", ["--private", "--pretrained"], ["--public"]),
    ],
)
def test_what_is_offered(line: str, some: list[str], others: list[str]) -> None:
    words = offered(line)
    assert set(some) <= set(words) and not set(others) & set(words)
    assert all(word.startswith(line.split(" ")[-1]) for word in words)


def test_the_words_are_those_of_the_command_line() -> None:
    assert made() == complete.words(), "run python -m benchmarks.words"


def test_every_name_is_a_model() -> None:
    names = list(complete.models())
    assert len(names) > 1500
    assert [name for name in names if not is_base(name) and not _is_registered(name)] == []


def _is_registered(name: str) -> bool:
    from timm.models import is_model

    return bool(is_model(name))


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*({'torch', 'timm', 'torchvision'} & sys.modules.keys()), 'imported'))\n"
        "from se_surgery.commands.complete import main\n"
        "main()\n"
    )
    given = {"COMP_WORDS": "se-surgery plan resnet50", "COMP_CWORD": "2", complete.ASKED: "complete_bash"}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **given}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "resnet50" and done.stdout.splitlines()[-1].strip() == "imported"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_that_asks_as_is_answered(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--show-completion", shell], prog_name="se-surgery")
    assert result.exit_code == 0, result.output
    assert f"{complete.ASKED}=complete_{shell}" in result.stdout


def test_without_the_shells_question_it_is_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(complete.ASKED, raising=False)
    monkeypatch.setattr(sys, "argv", ["se-surgery", "--version"])
    with pytest.raises(SystemExit) as ended:
        complete.main()
    assert ended.value.code == 0 and capsys.readouterr().out == f"se-surgery {se_surgery.__version__}\n"
