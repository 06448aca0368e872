"""Rows: what every arm of a study came to, as lines of JSON that are appended while a run goes on.

In: rows of one run. Out: the file of all rows, one per key, sorted; and which of them hold for a setting and the
versions at hand. There is no time in a row: the same command makes the same rows on the same machine.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from .setting import Setting
from .studies import STUDIES

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "digits.jsonl"

Row = dict[str, Any]
Key = tuple[str, int, str]
VERSIONED = ("torch", "timm", "scikit-learn")


def key_of(row: Row) -> Key:
    """What makes a row the same row in another run: the study, the seed and the arm."""
    return (row["study"], row["seed"], row["arm"])


@functools.cache
def versions() -> dict[str, str]:
    """What a row depends on besides the setting, without build tags."""
    return {package: metadata.version(package).partition("+")[0] for package in VERSIONED}


def stamp(setting: Setting) -> dict[str, str]:
    """What a row's result depends on."""
    return {**versions(), "setting": setting.name}


def is_current(row: Row, setting: Setting) -> bool:
    """Whether a row was made with a setting and the versions at hand."""
    return all(row.get(name) == value for name, value in stamp(setting).items())


def read(path: Path) -> dict[Key, Row]:
    """The rows of a file, the last one of every key; a last line that was broken off in writing does not count."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return {key_of(row): row for row in map(json.loads, lines)}


def append(path: Path, row: Row) -> None:
    """Add one row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file anew: by study, seed and arm, as the studies have them. It is there whole, or as it was."""
    places = {(study, arm): place for study, (arms, _) in STUDIES.items() for place, arm in enumerate(arms())}
    ordered = sorted(rows, key=lambda r: (list(STUDIES).index(r["study"]), r["seed"], places[r["study"], r["arm"]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(map(_line, ordered)), encoding="utf-8")
    draft.replace(path)


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
