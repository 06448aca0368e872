"""Retrofit text: the section of docs/digits.md on SEs that are put into a trained network.

In: the evidence and the setting. Out: Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.coverage.table import grid

from . import prose
from .evidence import Evidence, Sample, average, difference, estimate
from .network import PLACEMENTS
from .rows import Row
from .setting import Setting
from .studies import BASE, GATES, INITS, RATIOS, SQUEEZES, WAYS, retrofit_arm

_NONE = "·"
ALL_WAYS = (*WAYS, "scratch")


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
    rows = [row for key, row in sorted(evidence.rows.items()) if key[0] == "retrofit" and key[2] != BASE]
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


def sample_of(evidence: Evidence, way: str, placement: str, r: int) -> Sample:
    """The accuracies of one way to an SE network; those from scratch are of the other study."""
    if way in WAYS:
        return evidence.sample("retrofit", retrofit_arm(way, placement, r))
    return evidence.sample("replication", f"{placement} {r} {SQUEEZES[0]} {GATES[0]} {INITS[0]}")


def _retrofit_table(evidence: Evidence) -> str:
    base, table = evidence.sample("retrofit", BASE), []
    for placement in PLACEMENTS:
        for r in RATIOS:
            arm = retrofit_arm(WAYS[0], placement, r)
            row = [placement, r, *(f"{evidence.size('retrofit', arm, f):,}" for f in ("parameters", "se_parameters"))]
            for way in ALL_WAYS:
                if way == "paper":
                    row.append(estimate(evidence.sample("retrofit", retrofit_arm(way, placement, r), "step0").values()))
                sample = sample_of(evidence, way, placement, r)
                row += [estimate(sample.values()), difference(sample, base).signed()] if sample else [_NONE, _NONE]
            table.append(row)
    minus = ">minus base"
    headers = ["placement", ">r", ">parameters", ">added", ">`identity`", minus, ">`paper`, step 0", ">`paper`", minus]
    return grid([*headers, ">`scratch`", minus], table)


def _counted(evidence: Evidence) -> str:
    """How many differences of each kind there are."""
    base, told = evidence.sample("retrofit", BASE), []
    for way in WAYS:
        found = [difference(sample_of(evidence, way, placement, r), base) for placement in PLACEMENTS for r in RATIOS]
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
        averages = [
            average([sample_of(evidence, way, placement, r) for placement in placements for r in ratios])
            for way in ALL_WAYS
        ]
        table.append([title, *(difference(one, base).signed() if one else _NONE for one in averages)])
    return grid(["", *(f">`{way}`" for way in ALL_WAYS)], table)
