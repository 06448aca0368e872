"""Render: the rows as docs/coverage.md and as a section of README.md.

In: rows. Out: text that depends on nothing but the rows: no time, no machine, no second look at the library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import readme
from ..others import render as others
from .planning import HELD, SITES
from .rows import ROOT, Row
from .running import PASS
from .table import Table, grid, short
from .tasks import PLANNED, failure, wanted_placements

DOCUMENT = ROOT / "docs" / "coverage.md"
PLACEMENTS = ("standard", "pre", "post", "identity", "inner", "inception")
_VERSIONS = ("torch", "timm", "torchvision", "se_surgery", "digest")
_NONE = "·"


def write(rows: Iterable[Row], document: Path = DOCUMENT, page: Path = readme.README) -> None:
    """Write the document, and the section of the README where it has the markers."""
    table = Table(rows)
    document.write_text(document_text(table), encoding="utf-8")
    page.write_text(with_section(page.read_text(encoding="utf-8"), table), encoding="utf-8")


def with_section(text: str, table: Table) -> str:
    """A README with its section made anew.

    Raises:
        ValueError: The text does not have the two markers.
    """
    return readme.with_section(text, "coverage", "python -m benchmarks.coverage --render", section_text(table))


def document_text(table: Table) -> str:
    """docs/coverage.md."""
    parts = [
        "# What surgery was tried on",
        "Made by `python -m benchmarks.coverage --render` from the rows in [coverage.jsonl](coverage.jsonl); not to be "
        "edited by hand.",
        _failures(table),
        _what_was_run(table),
        _RUN_AGAIN,
        "## Families\n\n" + _families(table),
        "## What gets no SE, and why\n\n" + _reasons(table.targets),
        "## Names\n\n" + _LEGEND + "\n\n" + _names(table.targets),
        "## Other names\n\nThese are no targets: networks without convolutional units are refused with an error that "
        "says so.\n\n" + _names(table.others),
        "## Runs\n\n" + _RUNS + "\n\n" + _runs(table),
        "## Compilers and exporters\n\n" + _thorough(table),
        others.section(),
    ]
    return "\n\n".join(parts) + "\n"


_LEGEND = """\
The number of sites for each placement, of units that hold no SE yet. A number in parentheses is what there is with
`existing="stack"`, where every such unit holds one. `·`: the network has no place for it."""
_RUNS = """\
One row for every set of module classes and every family: built with random weights whose normalisations are drawn at
random, operated, checked, and stripped again. A number is that of SEs put in, and everything that was checked passed;
in parentheses with `existing="stack"`. What is checked, by values:

- the SEs are those planned; none is inside another, none in the classifier; a base that is re-parameterised first has
  the same units;
- in the first and the last unit with a shortcut of each kind, a zero gate cuts the branch and leaves the shortcut open
  (`identity`: the reverse; `post`: cuts both);
- outputs are bit-equal to the base's, in evaluation and in training; the base's keys, their order and values are as
  they were; every SE runs once in every way into the model; the backward pass reaches every SE parameter;
- deepcopy and pickle keep classes, keys, values and outputs;
- stripping gives the base back, bit for bit."""
_RUN_AGAIN = """\
## Run it again

From the root of a checkout, with the `test` extra installed:

```bash
python -m benchmarks.coverage --write           # what is missing: plans of all names, runs of the representatives
python -m benchmarks.coverage --fresh --write   # all of it anew
python -m benchmarks.coverage --help
```"""


def _failures(table: Table) -> str:
    if not table.failures:
        return "No row is a failure."
    lines = [
        f"- {row['kind']} `{row['name']}`{' ' + row['placement'] if 'placement' in row else ''}: {short(fault)}"
        for row, fault in table.failures
    ]
    return "\n".join([f"## Failures: {len(lines)}", "", *lines])


def _what_was_run(table: Table) -> str:
    counts = Counter(tuple(row[name] for name in _VERSIONS) for rows in table.by_kind.values() for row in rows)
    versions = grid(
        ["torch", "timm", "torchvision", "se-surgery", "its sources", ">rows"],
        [[*stamp[:-1], f"`{stamp[-1]}`", number] for stamp, number in sorted(counts.items())],
    )
    planned = sum(row["status"] in PLANNED for row in table.targets)
    held = sum(row["status"] == HELD for row in table.targets)
    silent = sum(len(row.get("silent", ())) for row in table.targets)
    runs = table.by_kind["run"]
    lines = [
        f"- {planned} of {len(table.targets)} targets planned: {planned - held} with sites for `standard`, "
        f"{held} with an SE in every unit already; {silent} units left out without a reason",
        f"- {len(table.others)} other names: {sum(row['status'] in PLANNED for row in table.others)} planned, the rest "
        f"refused",
        f"- {table.passed('run')} runs passed, of {len({row['name'] for row in runs})} networks with real weights",
        f"- {table.passed('thorough')} runs with compilers and exporters passed",
    ]
    return "\n".join(["## What was run", "", *lines, "", versions])


def _families(table: Table) -> str:
    rows = []
    for family, plans in table.families().items():
        names = [plan["name"] for plan in plans]
        heads = [plan for plan in plans if "family" in plan["roles"]]
        for head in heads or plans[:1]:
            first = head is (heads or plans)[0]
            rows.append(
                [
                    family if first else "",
                    f"{sum(plan['status'] in PLANNED for plan in plans)} of {len(plans)}" if first else "",
                    table.passed("run", names) if first else "",
                    head["name"],
                    *(_sites(head, placement) for placement in PLACEMENTS),
                    head.get("native", 0) or _NONE,
                ]
            )
    return grid(
        ["family", ">planned", ">runs passed", "for instance", *(f">{p}" for p in PLACEMENTS), ">own SEs"], rows
    )


def _reasons(plans: Sequence[Row]) -> str:
    """The reasons for which units of the targets get no SE, by placement, and those for which joins are no units."""
    units: dict[tuple[str, str], list[int]] = {}
    joins: dict[str, list[int]] = {}
    for plan in plans:
        for placement, reasons in plan.get("skipped", {}).items():
            for reason, number in reasons.items():
                units.setdefault((reason.removeprefix(f"no place for {placement}: "), placement), []).append(number)
        for reason, number in plan.get("joins", {}).items():
            joins.setdefault(reason, []).append(number)
    ordered = sorted(units.items(), key=lambda item: (PLACEMENTS.index(item[0][1]), -sum(item[1]), item[0][0]))
    others = sorted(joins.items(), key=lambda item: (-sum(item[1]), item[0]))
    return "\n\n".join(
        [
            "Units of the targets, by placement:",
            grid(
                ["placement", "reason", ">units", ">names"],
                [[placement, short(reason), sum(found), len(found)] for (reason, placement), found in ordered],
            ),
            "Joins and convolutions that are no units:",
            grid(
                ["reason", ">places", ">names"], [[short(reason), sum(found), len(found)] for reason, found in others]
            ),
        ]
    )


def _sites(plan: Row, placement: str) -> str:
    """A plan's sites for one placement: those of free units, else in parentheses those on top of what is there."""
    free, stacked = plan.get("sites", {}).get(placement), plan.get("stacked", {}).get(placement)
    return str(free) if free else f"({stacked})" if stacked else _NONE


def _names(plans: Sequence[Row]) -> str:
    rows = [
        [plan["name"], *(_sites(plan, p) for p in PLACEMENTS), plan.get("native", 0) or _NONE, _status(plan)]
        for plan in plans
    ]
    return grid(["name", *(f">{placement}" for placement in PLACEMENTS), ">own SEs", ""], rows)


def _status(plan: Row) -> str:
    fault = failure(plan)
    return f"**{short(fault)}**" if fault else "" if plan["status"] == SITES else short(plan["status"])


def _runs(table: Table) -> str:
    names = dict.fromkeys(row["name"] for row in table.by_kind["run"])
    rows = []
    for name in names:
        found = {placement: table.rows.get(("run", name, placement)) for placement in PLACEMENTS}
        sizes = {tuple(map(tuple, row["input"])) for row in found.values() if row and "input" in row}
        images = ", ".join(" x ".join(map(str, shape)) for size in sorted(sizes) for shape in size)
        rows.append([name, images, *(_run(table.plans.get(name, {}), p, row) for p, row in found.items())])
    return grid(["name", "input", *(f">{placement}" for placement in PLACEMENTS)], rows)


def _run(plan: Row, placement: str, row: Row | None) -> str:
    if row is None:
        return "not run" if placement in wanted_placements(plan) else _NONE
    if row["status"] != PASS:
        return "**fails**"
    return f"({row['sites']})" if row["existing"] == "stack" else str(row["sites"])


def _thorough(table: Table) -> str:
    found = table.by_kind["thorough"]
    if not found:
        return "Not run."
    tried = [way for row in found for way, what in row["ways"].items() if what == PASS or what.startswith("fail: ")]
    ways = dict.fromkeys(tried)
    reasons = dict.fromkeys(what for row in found for way, what in row["ways"].items() if way in ways and what != PASS)
    notes = {reason: str(number) for number, reason in enumerate(reasons, 1)}
    rows = [
        [row["name"], "pass" if row["status"] == PASS else "**fails**"]
        + [notes.get(row["ways"].get(way, ""), row["ways"].get(way, _NONE)) for way in ways]
        for row in found
    ]
    listed = "\n".join(f"{number}. {short(reason)}" for reason, number in notes.items())
    intro = "A number stands for a reason below; `·` for a way that was not tried.\n\n"
    return f"{intro}{grid(['name', '', *ways], rows)}\n\n{listed}".rstrip()


def section_text(table: Table) -> str:
    """The section of the README: the totals, and a row for every family."""
    planned = sum(row["status"] in PLANNED for row in table.targets)
    rows = []
    for family, plans in table.families().items():
        heads = [plan for plan in plans if "family" in plan["roles"]] or plans[:1]
        has = [p for p in PLACEMENTS if any(p in head.get("stacked", {}) for head in heads)]
        covered = sum(plan["status"] in PLANNED for plan in plans)
        names = f"{covered}" if covered == len(plans) else f"{covered} of {len(plans)}"
        checked = table.passed("run", [head["name"] for head in heads])
        rows.append([family, names, ", ".join(has), ", ".join(head["name"] for head in heads), checked])
    done, wanted = table.run_representatives()
    so_far = "was operated on" if done == wanted else f"is to be operated on (so far {done} of {wanted} times)"
    text = (
        f"{planned} of {len(table.targets)} names of CNNs in timm, torchvision and this library are planned, each with "
        f"a site for `standard` or with an SE in every unit already. One for every set of module classes {so_far} with "
        f"real weights, by every placement: {table.passed('run')} operations passed all checks. "
        f"[docs/coverage.md](docs/coverage.md) has every name and what was checked.\n"
    )
    families = grid(["family", ">names", "placements", "checked on", ">runs passed"], rows)
    return f"{text}\n<details>\n<summary>By family</summary>\n\n{families}\n\n</details>\n"
