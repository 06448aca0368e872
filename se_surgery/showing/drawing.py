"""Drawing: a plan as a picture, each unit of the model by stage, with its SEs where the placement puts them.

In: a `Plan`. Out: an SVG, PNG or PDF file, 800 pixels wide. Every unit is in it: with the SEs that it gets, those that
it has, or a letter that the legend gives the reason for.
"""

from __future__ import annotations

import itertools
import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..planning.exam import Exam
from ..planning.placements import KEPT
from ..planning.plan import Plan, Site, Skipped
from ..structure.unit import Unit
from .glyphs import (
    GLYPHS,
    NEW,
    RADIUS,
    THERE,
    WIDTH,
    Point,
    draw_concat,
    draw_replaced,
    draw_se,
    draw_sum,
    draw_unit,
    spot_of,
)
from .sheet import GREY, PALE, Sheet, Style
from .show import options_text
from .tables import compact, count, groups

_MARGIN = 12.0
_COLUMNS = range(8, 13)
# Width of a letter of 10 pixels, and letters of 11 pixels on a sheet of 800.
_LETTER, _LINE = 6, 125
_NUMBERED = re.compile(r"(.*?[^\d]|)((?:\d+[a-z]?)(?:[._]\d+[a-z]?)*)")


@dataclass(frozen=True)
class _Drawn:
    """What is drawn of a unit.

    Attributes:
        path: Its path.
        kind: Its kind.
        stage: Its stage.
        site: The SE that it gets.
        there: The SEs that it has: the placement of each, and whether it goes.
        skipped: Why it gets none.
    """

    path: str
    kind: str
    stage: int
    site: Site | None
    there: tuple[tuple[str, bool], ...]
    skipped: Skipped | None

    @property
    def placement(self) -> str:
        """The placement of the SE that it gets; that of the one that goes where its place is kept."""
        if self.site is None:
            return ""
        return self.there[0][0] if self.site.placement == KEPT else self.site.placement


def draw_plan(plan: Plan, path: Path) -> Path:
    """Draw a plan into a file.

    Raises:
        SurgeryError: matplotlib is missing, or the file cannot be written.
    """
    return sheet_of(plan).save(path, title_of(plan))


def title_of(plan: Plan) -> str:
    """What a drawing is called."""
    return f"{plan.model}: {options_text(plan.options)}"


def sheet_of(plan: Plan) -> Sheet:
    """Draw a plan on a sheet."""
    units = list(_units(plan))
    letters = _letters(units)
    sheet = Sheet()
    sheet.height = 30
    for line in textwrap.wrap(title_of(plan), 85):
        sheet.words(_MARGIN, sheet.height, line, size=15, bold=True)
        sheet.height += 20
    stages = {unit.stage: [other for other in units if other.stage == unit.stage] for unit in units}
    longest = max((len(run) for those in stages.values() for run in _runs(those)), default=0)
    columns = min(max(longest, _COLUMNS[0]), _COLUMNS[-1])
    for number, those in stages.items():
        _draw_stage(sheet, number, those, columns, letters)
    _draw_legend(sheet, plan, units, letters)
    return sheet


# ---------------------------------------------------------------------------------------------------- what is drawn


def _units(plan: Plan) -> Iterator[_Drawn]:
    """Every unit with what the plan says of it, in order of execution."""
    exam = plan.exam
    sites = list(plan.sites)
    skipped = [skip for skip in plan.skipped if skip.is_unit]
    gone = {path for site in plan.sites for path in site.replaces}
    for index, unit in enumerate(exam.units.found):
        site = next((site for site in sites if site.unit == unit.path and _is_its(exam, unit, site)), None)
        skip = None if site else next((skip for skip in skipped if skip.unit == unit.path), None)
        # Two units of one block have one path: each outcome is for one of them.
        if site:
            sites.remove(site)
        elif skip:
            skipped.remove(skip)
        there = tuple((exam.placement_of(unit, se), se.path in gone) for se in exam.held[index])
        yield _Drawn(unit.path, unit.kind, exam.stage_of(unit), site, there, skip)


def _is_its(exam: Exam, unit: Unit, site: Site) -> bool:
    alone = sum(other.path == unit.path for other in exam.units.found) == 1
    if site.placement == KEPT:
        return alone or unit.calls(site.path)
    return alone or exam.is_place(unit, site.placement, site.edges)


def _letters(units: Sequence[_Drawn]) -> dict[str, str]:
    """A letter for every reason for which units get no SE."""
    reasons = dict.fromkeys(unit.skipped.summary for unit in units if unit.skipped)
    return {why: string.ascii_lowercase[i % 26] * (i // 26 + 1) for i, why in enumerate(reasons)}


# ------------------------------------------------------------------------------------------------------- the stages


def _draw_stage(sheet: Sheet, number: int, units: Sequence[_Drawn], columns: int, letters: dict[str, str]) -> None:
    """A line that says what the stage is, and its units in rows, a new one where their paths begin in another way."""
    sheet.line(Style(0, edge=PALE), (_MARGIN, sheet.height - 8), (sheet.width - _MARGIN, sheet.height - 8))
    sheet.height += 10
    runs = _runs(units)
    starts = [f"{start}*" if (start := _split(run[0].path)[0]) else "" for run in runs]
    sheet.words(_MARGIN, sheet.height, f"Stage {number}", size=12, bold=True)
    sheet.words(_MARGIN + 62, sheet.height, _about(units, starts[0] if len(runs) == 1 else ""), colour=GREY)
    for start, run in zip(starts, runs, strict=True):
        if len(runs) > 1 and start:
            sheet.height += 18
            sheet.words(_MARGIN, sheet.height, start, size=10, colour=GREY)
        for first in range(0, len(run), columns):
            _draw_row(sheet, run[first : first + columns], columns, letters)
    sheet.height += 16


def _runs(units: Sequence[_Drawn]) -> list[list[_Drawn]]:
    return [list(run) for _, run in itertools.groupby(units, lambda unit: _split(unit.path)[0])]


def _draw_row(sheet: Sheet, units: Sequence[_Drawn], columns: int, letters: dict[str, str]) -> None:
    width = (sheet.width - 2 * _MARGIN) / columns
    scale = width / WIDTH * 0.96
    top, bottom = min(GLYPHS[unit.kind].top for unit in units), max(GLYPHS[unit.kind].bottom for unit in units)
    upper, lower = sheet.height + 8 - top * scale, sheet.height + 8 + (bottom - top) * scale
    for column, unit in enumerate(units):
        left = _MARGIN + column * width
        _draw_one(sheet, unit, (left, upper), scale)
        mark = f" ({letters[unit.skipped.summary]})" if unit.skipped else ""
        label = _short(_split(unit.path)[1], int(width / _LETTER) - len(mark)) + mark
        sheet.words(left + scale * WIDTH / 2, lower + 14, label, size=10, colour=GREY, at="center")
    sheet.height = lower + 18


def _draw_one(sheet: Sheet, unit: _Drawn, corner: tuple[float, float], scale: float) -> None:
    radius = RADIUS * scale

    def at(placement: str) -> tuple[float, float]:
        x, y = spot_of(unit.kind, placement)
        return corner[0] + x * scale, corner[1] + y * scale

    draw_unit(sheet, unit.kind, corner, scale, has_one=bool(unit.site or unit.there))
    new = at(unit.placement) if unit.site else None
    for placement, goes in unit.there:
        x, y = at(placement)
        # Two at one place are one above the other.
        beside = radius if (x, y) == new else 0
        if goes:
            draw_replaced(sheet, (x, y - beside), radius)
        else:
            draw_se(sheet, (x, y - beside), radius, THERE)
        new = (x, y + beside) if beside else new
    if new:
        draw_se(sheet, new, radius, NEW)


def _about(units: Sequence[_Drawn], shared: str) -> str:
    """What the paths share, and the sizes and widths of the SEs that are put in."""
    sites = [unit.site for unit in units if unit.site]
    told: dict[str, set[tuple[int, ...]]] = {
        "": {site.size for site in sites},
        " channels": {(site.channels,) for site in sites},
        " hidden": {(site.rd_channels,) for site in sites if site.spec.attn == "se"},
    }
    parts = [count(len(units), "unit"), shared]
    for noun, values in told.items():
        ends = [" × ".join(map(str, value)) for value in sorted(values)]
        parts.append(" … ".join(dict.fromkeys([ends[0], ends[-1]])) + noun if ends else "")
    # An SVG makes one space of several.
    return ", ".join(part for part in parts if part)


def _split(path: str) -> tuple[str, str]:
    """A path in front of the numbers that it ends with, and those.

    Examples:
        >>> _split("stages.0.blocks.1"), _split("Mixed_5b"), _split("stem")
        (('stages.0.blocks.', '1'), ('Mixed_', '5b'), ('', 'stem'))
    """
    found = _NUMBERED.fullmatch(path)
    return (found[1], found[2]) if found else ("", path or "(the model itself)")


def _short(label: str, longest: int) -> str:
    return label if len(label) <= longest else "…" + label[len(label) - max(longest, 2) + 1 :]


# ------------------------------------------------------------------------------------------------------- the legend


def _draw_legend(sheet: Sheet, plan: Plan, units: Sequence[_Drawn], letters: dict[str, str]) -> None:
    """What the signs mean, and what is not drawn."""
    sheet.line(Style(0, edge=PALE), (_MARGIN, sheet.height - 8), (sheet.width - _MARGIN, sheet.height - 8))
    sheet.height += 10
    for sign, text in _signs(plan, units, letters):
        sign(sheet, (_MARGIN + 8, sheet.height - 4))
        for line in textwrap.wrap(text, _LINE - 4):
            sheet.words(_MARGIN + 24, sheet.height, line)
            sheet.height += 17
    for text in _not_drawn(plan):
        for line in textwrap.wrap(text, _LINE):
            sheet.words(_MARGIN, sheet.height, line, colour=GREY)
            sheet.height += 16
    sheet.height += 2


def _signs(
    plan: Plan, units: Sequence[_Drawn], letters: dict[str, str]
) -> Iterator[tuple[Callable[[Sheet, Point], None], str]]:
    """The signs that are in the drawing, and what each means."""
    radius = RADIUS * 0.8
    fates = Counter(goes for unit in units for _, goes in unit.there)
    glyphs = [GLYPHS[unit.kind] for unit in units]
    if plan.sites:
        adds = f"{plan.params_added:+,} parameters, {plan.macs_added / 1e6:+,.2f} M multiply-adds an image"
        yield partial(draw_se, radius=radius, colour=NEW), f"{count(len(plan.sites), 'SE')} to put in: {adds}"
    if fates[False]:
        yield partial(draw_se, radius=radius, colour=THERE), f"{count(fates[False], 'SE')} there already, left alone"
    if fates[True]:
        yield partial(draw_replaced, radius=radius), f"{count(fates[True], 'SE')} there already, to be replaced"
    if any(glyph.sum for glyph in glyphs):
        yield partial(draw_sum, radius=5), "addition"
    if any(glyph.concat for glyph in glyphs):
        yield partial(draw_concat, height=13, scale=0.8), "concatenation"
    numbers = Counter(unit.skipped.summary for unit in units if unit.skipped)
    for why, letter in letters.items():
        yield partial(_draw_letter, letter=letter), f"gets none: {why} ({count(numbers[why], 'unit')})"


def _draw_letter(sheet: Sheet, point: Point, letter: str) -> None:
    sheet.words(point[0], point[1] + 4, f"({letter})", colour=GREY, at="center")


def _not_drawn(plan: Plan) -> Iterator[str]:
    """What the model has beside its units."""
    held = {se.path for those in plan.exam.held.values() for se in those}
    outside = dict.fromkeys(skip.unit for skip in plan.skipped if skip.kind == "outside")
    others = [skip for skip in plan.skipped if not skip.is_unit and skip.kind != "outside"]
    for title, paths in (
        ("SEs that serve no unit", [se.path for se in plan.existing if se.path not in held]),
        ("Outside of all units", list(outside)),
    ):
        if paths:
            yield f"{title}: {', '.join(compact(group) for group in groups(paths, lambda _: None, str))}."
    if others:
        yield f"Not drawn: {count(len(others), 'other join')}; print(plan) says where and why they are no units."
