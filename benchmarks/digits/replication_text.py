"""Replication text: the section of docs/digits.md on placement, r, squeeze and gate.

In: the evidence and the setting. Out: Markdown, and the effects of each factor for a plot.
"""

from __future__ import annotations

from benchmarks.coverage.table import grid
from se_surgery.paper.printed import PLACEMENTS as PAPER_PLACEMENTS
from se_surgery.paper.printed import TABLE_10, VARIANTS

from . import prose
from .evidence import Estimate, Evidence, difference
from .network import PLACEMENTS
from .setting import Setting
from .studies import BASE, EXTREMES, GATES, SQUEEZES, replication_arms

_NONE = "·"
# The paper's top-1 errors of SE-ResNet-50, by the recipe's name.
_ERRORS = {v.recipe: float(v.top1) for v in (*PAPER_PLACEMENTS, *TABLE_10, *VARIANTS) if v.top1}
_RECIPE = ("standard", "16", "avg", "sigmoid")
# The factors of the replication, each with its levels, the one compared with first, and the paper's recipe of each.
FACTORS: dict[str, tuple[int, dict[str, str]]] = {
    "placement": (0, {placement: f"se_resnet50_{placement}" for placement in PLACEMENTS}),
    "r": (1, {str(r): f"se_resnet50_r{r}" for r in sorted(EXTREMES, reverse=True)}),
    "squeeze": (2, dict(zip(SQUEEZES, ("se_resnet50_r16", "se_resnet50_max"), strict=True))),
    "gate": (3, dict(zip(GATES, ("se_resnet50_r16", "se_resnet50_tanh", "se_resnet50_relu"), strict=True))),
}


def replication_text(evidence: Evidence, setting: Setting) -> str:
    """What each factor does, from scratch."""
    arms = evidence.arms("replication", replication_arms())
    everything = difference(evidence.average("replication", arms[1:]), evidence.sample("replication", BASE))
    seeds = len(evidence.average("replication", arms))
    everyone = [
        [
            *arm.split(),
            f"{evidence.size('replication', arm):,}",
            evidence.accuracy("replication", arm),
            evidence.against("replication", arm, BASE),
        ]
        for arm in arms[1:]
    ]
    parts = [
        prose.REPLICATION,
        f"{seeds} seeds, {setting.steps} steps. The base has {evidence.accuracy('replication', BASE)} %; the mean of "
        f"the {len(arms) - 1} SE networks is {everything.signed()} from it.",
        _factor_table(evidence),
        "![Differences between the levels of each factor](digits-replication.svg)",
        prose.RECIPE,
        _recipe_table(evidence),
        "<details>\n<summary>All combinations</summary>\n\n"
        + grid([*FACTORS, ">parameters", ">accuracy", ">minus base"], everyone)
        + "\n\n</details>",
    ]
    return "\n\n".join(parts)


def effects(evidence: Evidence) -> list[tuple[str, str, int, Estimate, float]]:
    """For every level but the first of a factor: networks with it, their difference to those with the first, the paper.

    Two networks are compared where they differ in that factor alone.
    """
    found = []
    for factor, (place, levels) in FACTORS.items():
        first, *others = levels
        for level in others:
            pairs = _pairs(place, level, first)
            one, other = (evidence.average("replication", arms) for arms in zip(*pairs, strict=True))
            there = _ERRORS[levels[first]] - _ERRORS[levels[level]]
            found.append((factor, level, len(pairs), difference(one, other), there))
    return found


def _pairs(place: int, level: str, first: str) -> list[tuple[str, str]]:
    """The networks with one level of a factor, each with the one that has the first level instead."""
    recipes = {tuple(arm.split()) for arm in replication_arms()[1:]}
    found = []
    for recipe in sorted(recipes):
        other = (*recipe[:place], first, *recipe[place + 1 :])
        if recipe[place] == level and other in recipes:
            found.append((" ".join(recipe), " ".join(other)))
    return found


def _factor_table(evidence: Evidence) -> str:
    firsts = {factor: next(iter(levels)) for factor, (_, levels) in FACTORS.items()}
    table = [
        [factor, level, firsts[factor], pairs, here.signed(), f"{there:+.2f}"]
        for factor, level, pairs, here, there in effects(evidence)
    ]
    return grid(["factor", "level", "against", ">pairs a seed", ">difference", ">the paper"], table)


def _recipe_table(evidence: Evidence) -> str:
    recipe = " ".join(_RECIPE)
    table = [[BASE, evidence.accuracy("replication", BASE), evidence.against("replication", BASE, recipe)]]
    table[0].append(f"{_ERRORS['se_resnet50_r16'] - _ERRORS['resnet50']:+.2f}")
    for place, levels in FACTORS.values():
        first, *others = levels
        for level in others:
            arm = " ".join([*_RECIPE[:place], level, *_RECIPE[place + 1 :]])
            there = f"{_ERRORS[levels[first]] - _ERRORS[levels[level]]:+.2f}"
            cells = [evidence.accuracy("replication", arm), evidence.against("replication", arm, recipe)]
            table.append([level if level not in map(str, EXTREMES) else f"r = {level}", *cells, there])
    table.insert(0, ["the recipe", evidence.accuracy("replication", recipe), _NONE, _NONE])
    return grid(["network", ">accuracy", ">minus the recipe", ">the paper"], table)
