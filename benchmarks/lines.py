"""Lines: rows of JSON in a file, one a line, that are appended while a run goes on and written anew at its end.

In: rows. Out: the file, or the rows of one. What a row is, and what makes two rows the same, is the business of each
benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is none; a last line that was broken off in writing does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def append(path: Path, row: Row) -> None:
    """Add one row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file anew, in the order of the rows. It is there whole, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(map(_line, rows)), encoding="utf-8")
    draft.replace(path)


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
