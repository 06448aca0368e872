"""Rows: what was measured, as lines of JSON, one for each key; what is measured anew takes the old row's place.

In: rows. Out: docs/benchmarks.jsonl, and what a row says of the machine. A row has no names of machines and no paths.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import lines

DOCS = Path(__file__).parents[2] / "docs"
ROWS = "benchmarks.jsonl"
Row = dict[str, Any]
KINDS = ("saved", "time", "compiled", "surgery")


def key_of(row: Row) -> tuple[str, str, str]:
    """What makes a row the same row in another run."""
    return (row["kind"], row["model"], row.get("mode", ""))


def read(folder: Path = DOCS) -> list[Row]:
    """The rows of a folder; none where there is no file."""
    return lines.read(folder / ROWS)


def add(row: Row, folder: Path = DOCS) -> None:
    """Put a row into the file, in place of the one with its key."""
    rows = {key_of(one): one for one in (*read(folder), row)}
    ordered = sorted(rows.values(), key=lambda one: (KINDS.index(one["kind"]), *key_of(one)))
    draft = (folder / ROWS).with_suffix(".tmp")
    draft.write_text("".join(json.dumps(one) + "\n" for one in ordered), encoding="utf-8")
    draft.replace(folder / ROWS)


def machine() -> dict[str, Any]:
    """The processor, what of it is used, and the versions."""
    names = ("torch", "timm", "torchvision")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name).partition("+")[0] for name in names},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{found[1] if found else platform.machine()} ({instructions})"


def of_kind(rows: Iterable[Row], kind: str, mode: str = "") -> dict[str, Row]:
    """The rows of one kind and mode, by the model."""
    return {row["model"]: row for row in rows if row["kind"] == kind and row.get("mode", "") == mode}
