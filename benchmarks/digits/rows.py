"""Rows: what every arm of a study came to, as lines of JSON that are appended while a run goes on.

In: rows of one run. Out: the file of all rows, one per key, sorted; and which of them hold for a setting and the
versions at hand. There is no time in a row: the same command makes the same rows on the same machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from .. import lines
from .setting import Setting
from .studies import STUDIES

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "digits.jsonl"

Row = lines.Row
append = lines.append
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
    return {key_of(row): row for row in lines.read(path)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file anew: by study, seed and arm, as the studies have them. It is there whole, or as it was."""
    places = {(study, arm): place for study, (arms, _) in STUDIES.items() for place, arm in enumerate(arms())}
    ordered = sorted(rows, key=lambda r: (list(STUDIES).index(r["study"]), r["seed"], places[r["study"], r["arm"]]))
    lines.write(path, ordered)
