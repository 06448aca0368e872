"""The pages of docs/: their Python runs, and prints what stands below it; their commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import typer
from prose import ROOT, blocks, notebook, rendered

import se_surgery
from se_surgery.commands.main import app

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
WITH_PYTHON = [page for page in PAGES if any(b.language == "python" and b.is_run for b in blocks(page))]
COMMANDS = {
    (page, line.strip())
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip().startswith("se-surgery ")
}
# Pages on other packages, which the extra `downstream` installs; what they warn of is theirs.
OTHERS = [pytest.mark.downstream, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=OTHERS if "downstream" in page else ()) for page in WITH_PYTHON]
)
def test_a_page_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert rendered(text, page) == text, f"python tests/prose.py {page} writes what its blocks print now"


def test_the_notebook_is_the_tutorial() -> None:
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    assert notebook(text) == (ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8")


@pytest.mark.downstream
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbclient

    book = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = (cell for cell in book.cells if cell.source.endswith("print(plan)"))
    assert "9 SEs to put in" in "".join(output.get("text", "") for output in shown.outputs)
    assert (tmp_path / "se_digits" / "model.safetensors").exists()


def test_the_reference_has_every_public_name() -> None:
    named = set(
        re.findall(r"^::: se_surgery\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    errors = {name for name in se_surgery.__all__ if name.endswith(("Error", "Warning"))}
    assert named - {"errors"} == set(se_surgery.__all__) - errors


@pytest.mark.parametrize(("page", "line"), sorted(COMMANDS))
def test_a_command_is_understood(page: str, line: str) -> None:
    _, command, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[command].make_context(command, arguments)
