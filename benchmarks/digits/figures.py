"""Figures: the plots of docs/digits.md, with error bars.

In: rows, and a setting. Out: image files beside the document. They are the same whenever they are drawn from the same
rows by the same matplotlib; for the plot of the gates one network is trained again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from se_surgery import excitations

from .data import CLASSES, Digits, loader
from .evidence import Evidence, difference, missing_arms
from .network import PLACEMENTS
from .replication_text import effects
from .retrofit_text import ALL_WAYS, sample_of
from .rows import Row
from .setting import Setting
from .studies import BASE, RATIOS, SE, WAYS, gates_arms, gates_network

# The classes whose gates are drawn: more lines than these are hard to tell apart.
_SHOWN = (0, 1, 3, 8)
# Losses up to one percent are drawn to scale, larger ones by their logarithm.
_TO_SCALE = 1.0
_TICKS = (-30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10)


def write(rows: Iterable[Row], folder: Path, setting: Setting) -> None:
    """Draw the plots that there are rows for."""
    evidence = Evidence(rows)
    # By these matplotlib writes the same file again: else there are random names and the time in it.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    with matplotlib.rc_context({"svg.hashsalt": "digits"}):
        for study, draw in _PLOTS.items():
            if not missing_arms(evidence, study):
                draw(evidence).savefig(folder / f"digits-{study}.svg")
        seeds = [row["seed"] for row in evidence.of("gates", SE)]
        if seeds:
            digits = Digits(seeds[0], setting)
            model, _ = gates_network(digits, setting, SE)
            found = excitations(model, loader(digits.measure), classes=CLASSES)
            found.plot(folder / "digits-excitations.svg", classes=_SHOWN)


def _gates(evidence: Evidence) -> Figure:
    """What each way of taking SEs out loses against the SE network."""
    figure, panel = _panel(6.4, 3.6)
    arms = [arm for arm in evidence.arms("gates", gates_arms()) if arm != SE]
    found = [difference(evidence.sample("gates", arm), evidence.sample("gates", SE)) for arm in arms]
    colours = [{"fold": "C0", "strip": "C1"}.get(arm.split()[0], "black") for arm in arms]
    for place, (one, colour) in enumerate(zip(found, colours, strict=True)):
        panel.errorbar([one.mean], [place], xerr=[one.error], fmt="o", capsize=3, color=colour)
    panel.set_yticks(range(len(arms)), arms)
    panel.invert_yaxis()
    _scale(panel)
    panel.set_xlabel("accuracy minus that of the SE network, in percent (logarithmic beyond 1)")
    return figure


def _retrofit(evidence: Evidence) -> Figure:
    """What each way to an SE network gains over the base fine-tuned on, by placement and r."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    base = evidence.sample("retrofit", BASE)
    ways = [way for way in ALL_WAYS if all(sample_of(evidence, way, p, r) for p in PLACEMENTS for r in RATIOS)]
    for panel, way in zip(figure.subplots(1, len(ways)), ways, strict=True):
        for number, r in enumerate(RATIOS):
            found = [difference(sample_of(evidence, way, placement, r), base) for placement in PLACEMENTS]
            places = [place + 0.22 * (number - 1) for place in range(len(PLACEMENTS))]
            means, errors = [one.mean for one in found], [one.error for one in found]
            panel.errorbar(places, means, yerr=errors, fmt="o", capsize=3, markersize=4, label=f"r = {r}")
        panel.axhline(0.0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(PLACEMENTS)), PLACEMENTS, rotation=30)
        panel.set_title(f'init="{way}"' if way in WAYS else "from scratch", fontsize=10)
    figure.supylabel("accuracy minus the base's, in percent", fontsize=9)
    figure.axes[0].legend(fontsize=7)
    return figure


def _replication(evidence: Evidence) -> Figure:
    """What each level of a factor gains over the factor's first, here and in the paper."""
    figure, panel = _panel(6.4, 4.0)
    found = effects(evidence)
    means, errors = [one.mean for *_, one, _ in found], [one.error for *_, one, _ in found]
    panel.errorbar(means, range(len(found)), xerr=errors, fmt="o", capsize=3, label="digits")
    panel.scatter(
        [there for *_, there in found], range(len(found)), marker="x", color="C1", label="ImageNet, the paper"
    )
    panel.set_yticks(range(len(found)), [f"{factor} {level}" for factor, level, *_ in found])
    panel.invert_yaxis()
    _scale(panel)
    panel.set_xlabel("accuracy minus the first level's, in percent (logarithmic beyond 1)")
    panel.legend(fontsize=7)
    return figure


def _panel(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _scale(panel: Any) -> None:
    """A scale for small and large differences."""
    panel.axvline(0.0, color="black", linewidth=0.8)
    panel.set_xscale("symlog", linthresh=_TO_SCALE)
    panel.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])


_PLOTS = {"gates": _gates, "retrofit": _retrofit, "replication": _replication}
