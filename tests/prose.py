"""Texts with Python in them: the blocks of a page run in order, in one namespace, and what they print is shown.

    python tests/prose.py docs/tutorial.md ...   writes what the blocks print into the pages, and their notebooks

A fenced `text` block right after a `python` block is what that prints; or each `print(...)  # text` prints that text. A
block under the marker `<!-- not run: why -->` is not run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PROMISED = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- (needs weights|not run: .+) -->\n$")


class Block(NamedTuple):
    """A fenced block: the heading it is under, its language, its text, whether it is run, and where its text is."""

    section: str
    language: str
    text: str
    is_run: bool
    span: tuple[int, int]


def blocks(name: str) -> list[Block]:
    """All fenced blocks of a text, in order."""
    return blocks_of((ROOT / name).read_text(encoding="utf-8"))


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks of a text, in order."""
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        section = re.findall(r"^#+ (.*)$", before, re.MULTILINE)[-1]
        found.append(Block(section, match[2], match[3], _NOT_RUN.search(before) is None, match.span(3)))
    return found


def printed(text: str, title: str) -> Iterator[tuple[Block, str]]:
    """Run the Python of a page; every block that was run, and what it printed."""
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks_of(text):
        if block.language == "python" and block.is_run:
            line = text[: block.span[0]].count("\n")
            code = compile("\n" * line + block.text, title, "exec")  # an error names the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            yield block, out.getvalue()


def rendered(text: str, title: str) -> str:
    """A page with what its blocks print below them."""
    shown = {a.span: b.span for a, b in _pairs(text)}
    changes = []
    for block, output in printed(text, title):
        lines = "".join(f"{line.rstrip()}\n" for line in output.rstrip().splitlines())
        if block.span in shown:
            changes.append((shown[block.span], lines))
        elif lines.splitlines() != _PROMISED.findall(block.text):
            raise ValueError(f"{title}: the block under {block.section!r} prints what it does not say: {lines}")
    for (start, end), lines in reversed(changes):
        text = text[:start] + lines + text[end:]
    return text


def _pairs(text: str) -> Iterator[tuple[Block, Block]]:
    """Each Python block with the text block right below it."""
    found = blocks_of(text)
    for first, second in itertools.pairwise(found):
        between = text[first.span[1] : second.span[0]]
        if (first.language, second.language) == ("python", "text") and between.split() == ["```", "```text"]:
            yield first, second


def notebook(text: str) -> str:
    """A page as a notebook: a cell for each Python block, and for the text between two."""
    cells, end = [], 0
    shown = {b.span for _, b in _pairs(text)}
    for match in _FENCE.finditer(text):
        before, end = text[end : match.start()].strip(), match.end()
        is_code = match[2] == "python" and _NOT_RUN.search(text[: match.start()]) is None
        cells += [nbformat.v4.new_markdown_cell(before)] if before else []
        if is_code:
            cells.append(nbformat.v4.new_code_cell(match[3].rstrip()))
        elif match.span(3) not in shown:
            cells.append(nbformat.v4.new_markdown_cell(match[0]))
    rest = text[end:].strip()
    cells += [nbformat.v4.new_markdown_cell(rest)] if rest else []
    for number, cell in enumerate(cells, 1):
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return str(nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel))) + "\n"


if __name__ == "__main__":
    for page in [Path(argument).absolute() for argument in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            text = rendered(page.read_text(encoding="utf-8"), page.name)
        page.write_text(text, encoding="utf-8")
        book = page.with_suffix(".ipynb")
        if book.exists():
            book.write_text(notebook(text), encoding="utf-8")
