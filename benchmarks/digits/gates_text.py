"""Gates text: the section of docs/digits.md on what is lost when SEs are taken out.

In: the evidence and the setting. Out: Markdown.
"""

from __future__ import annotations

from benchmarks.coverage.table import grid

from . import prose
from .evidence import Evidence, estimate
from .setting import Setting
from .studies import BASE, HALVES, SE, gates_arms

_NONE = "·"


def gates_text(evidence: Evidence, setting: Setting) -> str:
    """What is lost when SEs are taken out, and what their gates are."""
    table = []
    for arm in evidence.arms("gates", gates_arms()):
        sizes = [estimate(evidence.sample("gates", arm, f).values()).mean for f in ("se_parameters", "parameters")]
        against = [evidence.against("gates", arm, other) if arm != other else _NONE for other in (SE, BASE)]
        table.append([arm, *(f"{size:,.0f}" for size in sizes), evidence.accuracy("gates", arm), *against])
    seeds = len(evidence.of("gates", SE))
    headers = ["network", ">SE parameters", ">parameters", ">accuracy", f">minus `{SE}`", f">minus `{BASE}`"]
    parts = [
        prose.GATES,
        grid(headers, table),
        f"{seeds} seeds. {_spread(evidence, setting)}",
        "![What each way of taking SEs out loses](digits-gates.svg)",
        prose.GATES_SITES,
        _sites(evidence),
        "The mean gates of the first seed's network for some classes, as in figure 9 of the paper:",
        "![Mean gates by channel and class](digits-excitations.svg)",
        prose.CHOICES.format(share=100 / setting.choice_images),
        _choices(evidence),
    ]
    return "\n\n".join(parts)


def _spread(evidence: Evidence, setting: Setting) -> str:
    losses = [estimate(evidence.sample("gates", arm, "loss").values()).mean for arm in (BASE, SE)]
    return (
        f"Trained for {setting.gates_steps} steps; the loss on the last of these is {losses[0]:.3f} for the base and "
        f"{losses[1]:.3f} for the SE network. `strip 3` is the last stage, which has the most of the parameters."
    )


def _sites(evidence: Evidence) -> str:
    rows = evidence.of("gates", SE)
    table = []
    for path in rows[0]["gates"]:
        means = [estimate([row["gates"][path][f] for row in rows]) for f in ("mean", "inputs", "classes", "saturated")]
        *gates, saturated = means
        cells = [f"{one.mean:.3f} ± {one.error:.3f}" for one in gates]
        table.append([f"`{path}`", *cells, f"{100 * saturated.mean:.1f} %"])
    return grid(["SE", ">mean", ">over images", ">between classes", ">saturated"], table)


def _choices(evidence: Evidence) -> str:
    table = []
    for arm in HALVES:
        for row in evidence.of("gates", arm):
            ways = {way: [f"`{p}`" for p, how in row["taken"].items() if how == way] for way in ("fold", "strip")}
            told = (*(", ".join(ways[way]) or _NONE for way in ways), f"{row['se_parameters']:,}", row["accuracy"])
            table.append([arm, row["seed"], *told])
    return grid(["network", ">seed", "folded", "stripped", ">SE parameters left", ">accuracy"], table)
