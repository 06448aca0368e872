"""Tasks: what is still to be tried, and trying it.

In: a choice of names and kinds of rows, and the rows there are. Out: the tasks for what is missing; `work` answers one.
"""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from se_surgery.planning.placements import PLACEMENTS

from . import zoo
from .planning import FAILED, HELD, SITES, plan_body
from .pool import Answer, Task
from .rows import Key, Row, is_current, stamp
from .running import PASS, run_bodies, thorough_bodies

# Which roles a name has to have, one of them at least, for rows that need values.
REPRESENTATIVES = {"families": ("family",), "classes": ("family", "class"), "all": ("target",)}
# What a plan of a target comes to.
PLANNED = (SITES, HELD)
# Copies of a model's weights that are alive at one time, at most, and what a process takes besides.
_COPIES, _BESIDES = 6, 0.9


@dataclass(frozen=True)
class Choice:
    """Which rows are wanted.

    Attributes:
        kinds: Of `plan`, `run` and `thorough`.
        names: A glob on names.
        family: A glob on families.
        placements: Placements of `run` rows; `thorough` ones are of `standard`.
        representatives: Whose `run` and `thorough` rows: see `REPRESENTATIVES`.
    """

    kinds: Collection[str] = ("plan", "run")
    names: str = "*"
    family: str = "*"
    placements: Collection[str] = tuple(PLACEMENTS)
    representatives: str = "classes"

    def entries(self) -> list[zoo.Entry]:
        """The names that were chosen."""
        return [
            entry
            for entry in zoo.entries().values()
            if fnmatch.fnmatchcase(entry.name, self.names) and fnmatch.fnmatchcase(entry.family, self.family)
        ]

    def represents(self, entry: zoo.Entry) -> bool:
        """Whether a name is one of those that are run."""
        return bool(set(entry.roles) & set(REPRESENTATIVES[self.representatives]))


def wanted_placements(plan: Row) -> dict[str, str]:
    """The placements to run, by a name's plan: what `existing` has to be for each to have a site."""
    sites = plan.get("sites", {})
    return {placement: "skip" if placement in sites else "stack" for placement in plan.get("stacked", {})}


def plan_tasks(choice: Choice, rows: Mapping[Key, Row], is_done: Callable[[Row], bool] = is_current) -> list[Task]:
    """The plans that are missing; rows that need values need the plan of their name, so those count, too."""
    entries = [entry for entry in choice.entries() if "plan" in choice.kinds or choice.represents(entry)]
    return [Task("plan", e.name, ("",)) for e in entries if not _has(rows, ("plan", e.name, ""), is_done)]


def value_tasks(choice: Choice, rows: Mapping[Key, Row], is_done: Callable[[Row], bool] = is_current) -> list[Task]:
    """The rows with values that are missing, the small models first: most of what is wrong is known soon."""
    tasks = []
    for entry in filter(choice.represents, choice.entries()):
        plan = rows.get(("plan", entry.name, ""), {})
        gigabytes = _BESIDES + 4e-9 * _COPIES * plan.get("parameters", 0)
        for kind in (kind for kind in ("run", "thorough") if kind in choice.kinds):
            placements = choice.placements if kind == "run" else ("standard",)
            wanted = {p: existing for p, existing in wanted_placements(plan).items() if p in placements}
            parts = tuple(item for item in wanted.items() if not _has(rows, (kind, entry.name, item[0]), is_done))
            if parts:
                tasks.append(Task(kind, entry.name, parts, gigabytes))
    return sorted(tasks, key=lambda task: (task.kind, task.gigabytes, task.name))


def _has(rows: Mapping[Key, Row], key: Key, is_done: Callable[[Row], bool]) -> bool:
    return key in rows and is_done(rows[key])


def dropped(choice: Choice, rows: Mapping[Key, Row]) -> dict[Key, Row]:
    """The rows without those that were chosen, for a run that starts over."""
    names = {entry.name for entry in choice.entries()}
    return {
        key: row
        for key, row in rows.items()
        if not (row["kind"] in choice.kinds and row["name"] in names and key[2] in ("", *choice.placements))
    }


def work(task: Task) -> Iterator[dict[str, Any]]:
    """Answer one task: one body for every part, with the seconds it took and what its result depends on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bodies = _WORK[task.kind](task)
    while True:
        start = time.process_time()
        body = next(bodies, None)
        if body is None:
            return
        yield {**body, "seconds": round(time.process_time() - start, 1), **stamp()}


_WORK: dict[str, Callable[[Task], Iterator[dict[str, Any]]]] = {
    "plan": lambda task: (plan_body(task.name) for _ in task.parts),
    "run": lambda task: run_bodies(task.name, dict(task.parts)),
    "thorough": lambda task: thorough_bodies(task.name, dict(task.parts)),
}


def row_of(answer: Answer) -> Row:
    """An answer as a row of the file."""
    entry, kind = zoo.entries()[answer.task.name], answer.task.kind
    row: Row = {"kind": kind, "name": entry.name, "family": entry.family, "roles": list(entry.roles)}
    if kind != "plan":
        row["placement"], row["existing"] = answer.part
    trouble = f"{FAILED if kind == 'plan' else 'fail'}: {answer.trouble}"
    return {**row, **(answer.body if answer.body is not None else {"status": trouble, **stamp()})}


def failure(row: Row) -> str:
    """What is wrong with a row, or nothing.

    A target has to have a plan with sites, or one that says of all units that they hold an SE. Of any other name only a
    mistake of the library's own counts: it may be refused, with an error that is clear.
    """
    if row["kind"] != "plan":
        return "" if row["status"] == PASS else str(row["status"])
    status = str(row["status"])
    is_refused = "target" in row["roles"] and status not in PLANNED
    faults = [status] if is_refused or status.startswith(FAILED) else []
    faults += [f"says nothing of {', '.join(row['silent'][:3])}"] if row.get("silent") else []
    faults += row.get("misplaced", [])[:3]
    return "; ".join(faults)
