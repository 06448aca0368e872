"""Rows: what was tried and what came of it, as lines of JSON that are appended while a run goes on.

In: rows of one run. Out: the file of all rows, one per key, sorted; and which of them still hold for the library and
the versions at hand.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import se_surgery

from .. import lines

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "coverage.jsonl"

Row = lines.Row
append = lines.append
Key = tuple[str, str, str]
KINDS = ("plan", "run", "thorough")
_VERSIONED = ("torch", "timm", "torchvision")


def key_of(row: Row) -> Key:
    """What makes a row the same row in another run: its kind, the model and the placement."""
    return (row["kind"], row["name"], row.get("placement", ""))


@functools.cache
def stamp() -> dict[str, str]:
    """What a row's result depends on: the versions, without their build tags, and a digest of the library's sources."""
    versions = {package: metadata.version(package).partition("+")[0] for package in _VERSIONED}
    return {**versions, "se_surgery": se_surgery.__version__, "digest": digest(Path(se_surgery.__file__).parent)}


def digest(sources: Path) -> str:
    """A digest of all Python files of a folder, names and contents."""
    found = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        found.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def is_current(row: Row) -> bool:
    """Whether a row was made with the versions and the sources at hand."""
    return all(row.get(name) == value for name, value in stamp().items())


def read(path: Path) -> dict[Key, Row]:
    """The rows of a file, the last one of every key; a last line that was broken off in writing does not count."""
    return {key_of(row): row for row in lines.read(path)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file anew, sorted by kind, name and placement. It is there whole, or as it was."""
    lines.write(path, sorted(rows, key=key_of))
