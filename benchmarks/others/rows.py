"""Rows: what came of each network, as lines of JSON that are appended while a run goes on.

In: rows of one run. Out: the file of all rows, one a network, sorted; and which of them still hold for the sources and
the versions at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .. import lines
from ..coverage.rows import ROOT
from ..coverage.rows import stamp as _stamp
from .zoo import Network

ROWS = ROOT / "docs" / "others.jsonl"

Row = lines.Row
append = lines.append


def stamp(network: Network) -> dict[str, str | None]:
    """What a row's result depends on: the versions, the one of the network's package, and the library's sources."""
    return {**_stamp(), "package": network.package, "version": network.version}


def is_current(row: Row, network: Network) -> bool:
    """Whether a row was made with the versions and the sources at hand."""
    return all(row.get(name) == value for name, value in stamp(network).items())


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by name, the last one of each; a last line that was broken off does not count."""
    return {row["name"]: row for row in lines.read(path)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file anew, sorted by name. It is there whole, or as it was."""
    lines.write(path, sorted(rows, key=lambda row: row["name"]))
