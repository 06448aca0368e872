"""Render: the rows as a section of docs/coverage.md.

In: rows. Out: text that depends on nothing but the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..coverage.running import PASS
from ..coverage.table import grid, short
from .rows import ROWS, Row, read

_INTRO = """\
Made by `python -m benchmarks.others --write`, with the packages of the extra `others`, and with Ultralytics' where that
is installed (its license is the AGPL, so that it is in no extra). These are networks that the rules did not grow up
with. The count is by hand, from each network's source and arguments; a number behind a plus is that of units that hold
an SE already. How it counts decoders, heads and attention is in `benchmarks/others/counts.py`.

What is in a row's numbers, by values: the sites of the plan are as many as counted, with `existing="skip"` and with
`"stack"`; all of them were operated on; with one gate at one half, what is halved is what `standard` says, for each SE;
with all gates at one the outputs are bit-equal and each SE runs once; keys are kept; a pickled copy has classes and
values; stripping gives the base back. What has no unit is refused with an error that says so."""


def section(path: Path = ROWS) -> str:
    """The section of docs/coverage.md, from a file of rows."""
    rows = read(path)
    if not rows:
        return "## Networks of others\n\nNot run."
    return "\n\n".join(["## Networks of others", _INTRO, _summary(list(rows.values())), _table(rows.values())])


def _summary(rows: Sequence[Row]) -> str:
    passed = sum(row["status"] == PASS for row in rows)
    wrong = [f"- `{row['name']}`: {short(row['status'])}" for row in rows if row["status"] != PASS]
    total = sum(row.get("operated", 0) for row in rows if row["status"] == PASS)
    told = f"{passed} of {len(rows)} networks passed, with {total} SEs in them."
    return "\n".join([told, *(["", *wrong] if wrong else [])])


def _table(rows: Iterable[Row]) -> str:
    lines = [
        [
            row["name"],
            row["arithmetic"],
            _count(row),
            _sites(row),
            row.get("operated", "·"),
            _census(row),
            _outcome(row),
        ]
        for row in rows
    ]
    return grid(["network", "by hand", ">units", ">sites", ">operated", "census", ""], lines)


def _count(row: Row) -> str:
    held = row["all"] - row["free"]
    return f"{row['free']} + {held}" if held else str(row["free"])


def _sites(row: Row) -> str:
    if "sites" not in row:
        return "·"
    held = row["stacked"] - row["sites"]
    return f"{row['sites']} + {held}" if held else str(row["sites"])


def _census(row: Row) -> str:
    return short(row.get("census", ""))


def _outcome(row: Row) -> str:
    if row["status"] != PASS:
        return "**fails**"
    return "pass" if row["all"] else "refused"
