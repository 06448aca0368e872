"""Table: the rows of all runs by what is asked of them, and how Markdown lays tables out.

In: rows, or cells. Out: a `Table` to render, or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .rows import KINDS, Key, Row, key_of
from .running import PASS
from .tasks import failure

# Characters of a reason that a table shows; the rows have all of it.
_LONGEST = 300


class Table:
    """The rows, by what is asked of them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[Key, Row] = {key_of(row): row for row in rows}
        ordered = [self.rows[key] for key in sorted(self.rows)]
        self.by_kind = {kind: [row for row in ordered if row["kind"] == kind] for kind in KINDS}
        self.plans = {row["name"]: row for row in self.by_kind["plan"]}
        self.targets = [row for row in self.plans.values() if "target" in row["roles"]]
        self.others = [row for row in self.plans.values() if "target" not in row["roles"]]
        self.failures = [(row, fault) for row in ordered if (fault := failure(row))]

    def families(self) -> dict[str, list[Row]]:
        """The plans of the targets by family, timm's families before torchvision's."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.targets, key=lambda row: (row["family"].startswith("torchvision/"), row["family"])):
            found.setdefault(row["family"], []).append(row)
        return found

    def run_representatives(self) -> tuple[int, int]:
        """How many placements of the representatives of sets of module classes were run, and how many there are."""
        heads = [row for row in self.targets if {"family", "class"} & set(row["roles"])]
        wanted = [("run", row["name"], placement) for row in heads for placement in row.get("stacked", {})]
        return sum(key in self.rows for key in wanted), len(wanted)

    def passed(self, kind: str, names: Iterable[str] | None = None) -> str:
        """How many rows with values passed, of how many."""
        chosen = None if names is None else set(names)
        rows = [row for row in self.by_kind[kind] if chosen is None or row["name"] in chosen]
        return f"{sum(row['status'] == PASS for row in rows)} of {len(rows)}"


def grid(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; a header that begins with `>` is that of a column of numbers."""
    lines = [
        [header.removeprefix(">") for header in headers],
        ["--:" if header.startswith(">") else "---" for header in headers],
        *([str(cell).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(text: str) -> str:
    """The first lines of a text, as one line that Markdown leaves alone."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 4] + " ..."
    return line.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
