"""Cost, as tables: each part of a model before and after, and the whole.

In: the costs of the parts. Out: parts as `tables` has them, or text without colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..showing.tables import Part, Section, as_text
from .cost import Count

_TABLES = {"parameters": "Parameters", "multiply_adds": "Multiply-adds", "activations": "Activations"}


def costs_text(before: Mapping[str, Count], after: Mapping[str, Count], image: Sequence[int]) -> str:
    """Costs as text."""
    return as_text(costs_parts(before, after, image))


def costs_parts(before: Mapping[str, Count], after: Mapping[str, Count], image: Sequence[int]) -> list[Part]:
    """A table for each kind of cost: of every part, and of the whole, before, added and after."""
    title = f"For one image of {' x '.join(map(str, image))}"
    return [title, *(_section(label, what, before, after) for what, label in _TABLES.items())]


def _section(label: str, what: str, before: Mapping[str, Count], after: Mapping[str, Count]) -> Section:
    parts = dict.fromkeys([*before, *after])
    rows = [_row(part, *(getattr(costs.get(part, Count()), what) for costs in (before, after))) for part in parts]
    wholes = [sum(costs.values(), Count()) for costs in (before, after)]
    rows.append(_row("whole", *(getattr(whole, what) for whole in wholes)))
    if what == "parameters":
        rows.append(_row("with running statistics", *(whole.parameters + whole.statistics for whole in wholes)))
    return Section(label, ["", ">before", ">added", ">after", ">"], rows)


def _row(part: str, before: int, after: int) -> tuple[str, ...]:
    added = f"{after - before:+,}" if after != before else ""
    share = f"{(after - before) / before:+.2%}" if added and before else ""
    return (part, f"{before:,}", added, f"{after:,}", share)
