"""What the texts say is so: README.md's Python runs, commands are understood, every key of a recipe is described.

Nothing is replaced: the blocks of a section run in order, in one namespace and without a network. A line
`print(...)  # text` has to print that text. A block under the marker `<!-- needs weights -->` is not run.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prose import ROOT, blocks
from typer.testing import CliRunner

from se_surgery.commands.main import app
from se_surgery.models.catalog import shipped_recipe
from se_surgery.surgery.schema import check_recipe

MARKER = "<!-- needs weights -->"
# Commands that look at a model and do not run it, so that they take a second at most.
QUICK = ("plan", "list", "recipe")


PYTHON = [block for block in blocks("README.md") if block.language == "python"]
SECTIONS = list(dict.fromkeys(block.section for block in PYTHON))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, also where there is one, and a folder to write into."""
    monkeypatch.chdir(tmp_path)

    def refuse(self: Any, address: Any) -> None:
        raise OSError(f"README.md reaches for {address}: a block that needs weights has {MARKER} above it")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_sections_python_runs(section: str, offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in PYTHON:
        code = compile(block.text, f"README.md, {section}", "exec")
        if block.section == section and block.is_run:
            exec(code, names)
            printed = capsys.readouterr().out.splitlines()
            promised = re.findall(r"^print\(.*\)  # (.*)$", block.text, re.MULTILINE)
            assert not promised or printed == promised


def test_what_is_marked_is_what_loads_weights() -> None:
    # Those in a folder that was written before are there.
    fetched = [re.sub(r".*local-dir:.*", "", block.text) for block in PYTHON]
    assert [not block.is_run for block in PYTHON] == ["pretrained=True)" in text for text in fetched]
    assert {section for section in SECTIONS if all(not b.is_run for b in PYTHON if b.section == section)} == set()


def commands() -> Iterator[str]:
    """Every command line of this library in the texts."""
    for name in ("README.md", "registry/README.md"):
        for block in blocks(name):
            lines = block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else []
            yield from (line.strip() for line in lines if line.strip().startswith("se-surgery "))


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_a_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    _, command, *arguments = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry").mkdir()
    if command not in QUICK:
        # Options and their values, as far as they can be checked without doing it.
        typer.main.get_command(app).commands[command].make_context(command, arguments)
        return
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, result.output
    for written in tmp_path.rglob("*.json"):
        check_recipe(json.loads(written.read_text(encoding="utf-8")))


def keys_of(value: Any) -> Iterator[str]:
    """Every key in a recipe; the stages in `r` are none."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from keys_of(item)
    yield from value if isinstance(value, dict) else []


def test_the_registrys_text_describes_every_key_of_a_recipe_and_no_other() -> None:
    text = (ROOT / "registry" / "README.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    described = [key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)]
    # One with an operation of each kind; `plan` is what only a plan has.
    recipe = shipped_recipe("se_resnet50_last_stage_stripped")
    assert {operation["op"] for operation in recipe["operations"]} == {"add", "strip"}
    assert set(described) == {*keys_of(recipe), "plan"}


def test_the_readme_names_every_example() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"\[examples/\]\(examples\)(.*?)\n\n", text, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+\.py)`", listed[1])) == {path.name for path in (ROOT / "examples").glob("*.py")}
