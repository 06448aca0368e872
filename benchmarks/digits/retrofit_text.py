"""Retrofit text: the section of docs/digits.md on SEs that are put into a trained network.

In: the evidence and the setting. Out: Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.coverage.table import grid

from . import prose
from .evidence import Evidence, difference, estimate
from .network import PLACEMENTS
from .rows import Row
from .setting import Setting
from .studies import BASE, MORE_R, MORE_WAYS, RATIOS, WAYS, retrofit_arm


def retrofit_text(evidence: Evidence, setting: Setting) -> str:
    """What is gained when a trained network gets SEs."""
    parts = [
        prose.RETROFIT,
        _bases(evidence, setting),
        _steps0(evidence),
        _retrofit_table(evidence),
        _counted(evidence),
        prose.MARGINS,
        _margins(evidence),
        "![Accuracy of retrofits against that of the base fine-tuned on](digits-retrofit.svg)",
    ]
    more = [way for way in MORE_WAYS if all(evidence.of("retrofit", retrofit_arm(way, p, MORE_R)) for p in PLACEMENTS)]
    if more:
        parts += [prose.MORE.format(r=MORE_R, fast=setting.fast), _more_table(evidence, more)]
    return "\n\n".join(parts)


def _bases(evidence: Evidence, setting: Setting) -> str:
    before, after, loss, tuned = (
        estimate(evidence.sample("retrofit", BASE, field).values())
        for field in ("step0", "accuracy", "base_loss", "loss")
    )
    gain = difference(evidence.sample("retrofit", BASE), evidence.sample("retrofit", BASE, "step0"))
    return (
        f"The base, {evidence.size('retrofit', BASE):,} parameters, has {before} % after {setting.base_steps} steps, "
        f"with a loss of {loss.mean:.3f} on the last of them, and {after} % after {setting.tune_steps} more "
        f"({tuned.mean:.3f}): {gain.signed()}. {before.seeds} seeds."
    )


def _steps0(evidence: Evidence) -> str:
    rows = [row for key, row in sorted(evidence.rows.items()) if key[0] == "retrofit" and "equal" in row]
    exact = [row for row in rows if not row["arm"].startswith("paper")]
    equal = sum(row["equal"] and row["step0"] == _base_step0(evidence, row) for row in exact)
    paper = [row for row in rows if row["arm"].startswith("paper")]
    lost = [row["step0"] - _base_step0(evidence, row) for row in paper]
    return (
        f"Before the first step {equal} of {len(exact)} identity retrofits have class scores bit-equal to the base's, "
        f"and so its accuracy. The paper's start loses {-max(lost):.1f} to {-min(lost):.1f} points of it: "
        f"the column `step 0`."
    )


def _base_step0(evidence: Evidence, row: Row) -> float:
    return float(evidence.rows["retrofit", row["seed"], BASE]["step0"])


def _retrofit_table(evidence: Evidence) -> str:
    table = []
    for placement in PLACEMENTS:
        for r in RATIOS:
            arms = {way: retrofit_arm(way, placement, r) for way in WAYS}
            sizes = [f"{evidence.size('retrofit', arms['identity'], f):,}" for f in ("parameters", "se_parameters")]
            step0 = estimate(evidence.sample("retrofit", arms["paper"], "step0").values())
            cells = [
                cell
                for way, arm in arms.items()
                for cell in (
                    *([step0] if way == "paper" else []),
                    evidence.accuracy("retrofit", arm),
                    evidence.against("retrofit", arm, BASE),
                )
            ]
            table.append([placement, r, *sizes, *cells])
    minus = ">minus base"
    headers = ["placement", ">r", ">parameters", ">added", ">`identity`", minus, ">`paper`, step 0", ">`paper`", minus]
    return grid([*headers, ">`scratch`", minus], table)


def _counted(evidence: Evidence) -> str:
    """How many differences of each kind there are."""
    base, told = evidence.sample("retrofit", BASE), []
    for way in WAYS:
        arms = [retrofit_arm(way, placement, r) for placement in PLACEMENTS for r in RATIOS]
        found = [difference(evidence.sample("retrofit", arm), base) for arm in arms]
        sure = [one for one in found if one.is_beyond_chance]
        none = sum(not one.is_beyond_error for one in found)
        told.append(
            f"`{way}` {sum(one.mean > 0 for one in sure)} better, {sum(one.mean < 0 for one in sure)} worse, "
            f"{none} under their standard error"
        )
    return f"Beyond chance, of {len(PLACEMENTS) * len(RATIOS)} each: {'; '.join(told)}."


def _margins(evidence: Evidence) -> str:
    levels: list[tuple[str, Sequence[str], Sequence[int]]] = [("all", PLACEMENTS, RATIOS)]
    levels += [(placement, (placement,), RATIOS) for placement in PLACEMENTS]
    levels += [(f"r = {r}", PLACEMENTS, (r,)) for r in RATIOS]
    base, table = evidence.sample("retrofit", BASE), []
    for title, placements, ratios in levels:
        sets = [[retrofit_arm(way, placement, r) for placement in placements for r in ratios] for way in WAYS]
        table.append([title, *(difference(evidence.average("retrofit", arms), base).signed() for arms in sets)])
    return grid(["", *(f">`{way}`" for way in WAYS)], table)


def _more_table(evidence: Evidence, ways: Sequence[str]) -> str:
    table = []
    for placement in PLACEMENTS:
        arms = [retrofit_arm(way, placement, MORE_R) for way in ways]
        told = [(evidence.accuracy("retrofit", arm), evidence.against("retrofit", arm, BASE)) for arm in arms]
        table.append([placement, *(cell for pair in told for cell in pair)])
    return grid(["placement", *(header for way in ways for header in (f">`{way}`", ">minus base"))], table)
