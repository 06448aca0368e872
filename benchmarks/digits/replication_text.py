"""Replication text: the section of docs/digits.md on placement, r, squeeze and gate.

In: the evidence and the setting. Out: Markdown, and the effects of each factor for a plot.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.coverage.table import grid
from se_surgery.paper.printed import PLACEMENTS as PAPER_PLACEMENTS
from se_surgery.paper.printed import TABLE_10, VARIANTS

from . import prose
from .evidence import Estimate, Evidence, Sample, average, difference
from .network import PLACEMENTS
from .setting import Setting
from .studies import BASE, GATES, INITS, RATIOS, SQUEEZES, replication_arms

_NONE = "·"
# The paper's top-1 errors of SE-ResNet-50, by the recipe's name.
_ERRORS = {v.recipe: float(v.top1) for v in (*PAPER_PLACEMENTS, *TABLE_10, *VARIANTS) if v.top1}
_RECIPE = ("standard", "16", "avg", "sigmoid", "paper")
# The factors of the replication, each with its levels, the one compared with first, and the paper's recipe of each, if
# it has one.
FACTORS: dict[str, tuple[int, dict[str, str]]] = {
    "placement": (0, {placement: f"se_resnet50_{placement}" for placement in PLACEMENTS}),
    "r": (1, {str(r): f"se_resnet50_r{r}" for r in sorted(RATIOS, reverse=True)}),
    "squeeze": (2, dict(zip(SQUEEZES, ("se_resnet50_r16", "se_resnet50_max"), strict=True))),
    "gate": (3, dict(zip(GATES, ("se_resnet50_r16", "se_resnet50_tanh", "se_resnet50_relu"), strict=True))),
    "init": (4, dict.fromkeys(INITS, "")),
}


def replication_text(evidence: Evidence, setting: Setting) -> str:
    """What each factor does, from scratch."""
    arms = evidence.arms("replication", replication_arms())
    everything = difference(_average(evidence, arms[1:]), evidence.sample("replication", BASE))
    seeds = len(_average(evidence, arms))
    parts = [
        prose.REPLICATION,
        f"{seeds} seeds, {setting.tune_steps} steps. The base has {evidence.accuracy('replication', BASE)} %; the mean "
        f"of the {len(arms) - 1} SE networks is {everything.signed()} from it.",
        _factor_table(evidence),
        "![Differences between the levels of each factor](digits-replication.svg)",
        prose.RECIPE,
        _recipe_table(evidence),
        prose.PLACED,
        _placed_table(evidence),
    ]
    return "\n\n".join(parts)


def _average(evidence: Evidence, arms: Iterable[str]) -> Sample:
    return average([evidence.sample("replication", arm) for arm in arms])


def effects(evidence: Evidence) -> list[tuple[str, str, int, Estimate, float | None]]:
    """For every level but the first of a factor: networks with it, their difference to those with the first, the paper.

    Two networks are compared where they differ in that factor alone.
    """
    found = []
    for factor, (place, levels) in FACTORS.items():
        first, *others = levels
        for level in others:
            pairs = _pairs(place, level, first)
            one, other = (_average(evidence, arms) for arms in zip(*pairs, strict=True))
            found.append((factor, level, len(pairs), difference(one, other), _there(levels[first], levels[level])))
    return found


def _there(first: str, recipe: str) -> float | None:
    """By how much a recipe is better than another in the paper, where that has both."""
    return _ERRORS[first] - _ERRORS[recipe] if first in _ERRORS and recipe in _ERRORS else None


def _written(there: float | None) -> str:
    return _NONE if there is None else f"{there:+.2f}"


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
        [factor, level, firsts[factor], pairs, here.signed(), _written(there)]
        for factor, level, pairs, here, there in effects(evidence)
    ]
    return grid(["factor", "level", "against", ">pairs a seed", ">difference", ">the paper"], table)


def _recipe_table(evidence: Evidence) -> str:
    recipe = " ".join(_RECIPE)
    named = {BASE: (BASE, _there("se_resnet50_r16", "resnet50"))}
    for factor, (place, levels) in FACTORS.items():
        first, *others = levels
        for level in others:
            named[_changed(place, level)] = (f"{factor} {level}", _there(levels[first], levels[level]))
    table = [["the recipe", evidence.accuracy("replication", recipe), _NONE, _NONE]]
    for arm, (name, there) in named.items():
        cells = [evidence.accuracy("replication", arm), evidence.against("replication", arm, recipe)]
        table.append([name, *cells, _written(there)])
    return grid(["network", ">accuracy", ">minus the recipe", ">the paper"], table)


def _changed(place: int, level: str, placement: str = _RECIPE[0]) -> str:
    """The recipe with a placement, and another level of one factor."""
    recipe = (placement, *_RECIPE[1:])
    return " ".join([*recipe[:place], level, *recipe[place + 1 :]])


def _placed_table(evidence: Evidence) -> str:
    columns = [(place, level) for place, levels in list(FACTORS.values())[1:] for level in levels]
    columns = [one for number, one in enumerate(columns) if one[1] not in _RECIPE or not number]
    table = [
        [placement, *(evidence.against("replication", _changed(*one, placement), BASE) for one in columns)]
        for placement in PLACEMENTS
    ]
    names = list(FACTORS)
    return grid(["placement", *(f">{names[place]} {level}" for place, level in columns)], table)
