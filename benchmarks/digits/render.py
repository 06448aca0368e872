"""Render: the rows as docs/digits.md.

In: rows. Out: text that depends on nothing but the rows and the setting: no time, no machine, no training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.coverage.table import grid

from . import prose
from .evidence import Evidence, missing_arms
from .gates_text import gates_text
from .replication_text import replication_text
from .retrofit_text import retrofit_text
from .rows import VERSIONED, Row
from .setting import Setting

_SECTIONS = {
    "gates": ("Gates: strip, fold, trade off", gates_text),
    "retrofit": ("Retrofit: SEs in a trained network", retrofit_text),
    "replication": ("Replication: placement, r, squeeze, gate", replication_text),
}


def write(rows: Iterable[Row], document: Path, setting: Setting) -> None:
    """Write the document."""
    document.write_text(document_text(rows, setting), encoding="utf-8")


def document_text(rows: Iterable[Row], setting: Setting) -> str:
    """docs/digits.md."""
    evidence = Evidence(rows)
    sections = [section_text(evidence, study, setting) for study in _SECTIONS]
    parts = [prose.TITLE, prose.LIMITS, prose.method(setting), *sections, prose.AGAIN, _made(evidence)]
    return "\n\n".join(parts) + "\n"


def section_text(evidence: Evidence, study: str, setting: Setting) -> str:
    """The section on a study; where arms have no row yet, it says so."""
    title, make = _SECTIONS[study]
    missing = missing_arms(evidence, study)
    text = f"Not yet complete: {len(missing)} arms have no row." if missing else make(evidence, setting)
    return f"## {title}\n\n{text}"


def _made(evidence: Evidence) -> str:
    counts = Counter(tuple(row[name] for name in (*VERSIONED, "setting")) for row in evidence.rows.values())
    return grid([*VERSIONED, "setting", ">rows"], [[*stamp, number] for stamp, number in sorted(counts.items())])
