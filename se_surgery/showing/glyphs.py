"""Glyphs: what a unit of each kind looks like in a drawing, and where in it each placement puts its SE.

In: the kind of a unit. Out: a `Glyph`, in a cell that is 100 wide. Data goes from the left to the right;
what is transformed goes along the middle, a shortcut above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .sheet import GREY, INK, PAPER, Sheet, Style

WIDTH = 100.0
RADIUS = 7.0

Point = tuple[float, float]
_MIDDLE, _ABOVE = 34.0, 10.0
# One colour for each thing that is said, told apart by those who see few colours (Okabe and Ito's palette).
NEW, THERE, BOX, BOX_EDGE = "#d55e00", "#0072b2", "#e3ebf5", "#5b7da3"


class Glyph(NamedTuple):
    """A unit.

    Attributes:
        boxes: What transforms: middle, width and height of each.
        lines: The ways of the data.
        spots: Where each placement has its SE.
        sum: Where branches are added.
        concat: Where they are concatenated, and how high that is.
    """

    boxes: tuple[tuple[float, float, float, float], ...]
    lines: tuple[tuple[Point, ...], ...]
    spots: Mapping[str, Point]
    sum: Point | None = None
    concat: tuple[float, float, float] | None = None

    @property
    def top(self) -> float:
        """Where it begins, an SE on its uppermost line counted in."""
        lines = (y for line in self.lines for _, y in line)
        return min(min(lines) - RADIUS, *(y - height / 2 for _, y, _, height in self.boxes)) - 2

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return max(y + height / 2 for _, y, _, height in self.boxes)


_TRUNK = ((0.0, _MIDDLE), (100.0, _MIDDLE))
_TWO_BOXES = ((27.0, _MIDDLE, 12.0, 20.0), (55.0, _MIDDLE, 12.0, 20.0))
_ON_BRANCH = {"pre": (13.0, _MIDDLE), "inner": (41.0, _MIDDLE), "standard": (69.0, _MIDDLE)}
_AT_THE_END = {"post": (94.0, _MIDDLE)}
_ON_SHORTCUT = {"identity": (41.0, _ABOVE)}
_SHORTCUT = ((4.0, _MIDDLE), (4.0, _ABOVE), (82.0, _ABOVE), (82.0, _MIDDLE))
_PARALLEL = tuple(((12.0, _MIDDLE), (18.0, y), (62.0, y)) for y in (12.0, 56.0))

GLYPHS: dict[str, Glyph] = {
    "residual": Glyph(
        _TWO_BOXES, (_TRUNK, _SHORTCUT), {**_ON_BRANCH, **_AT_THE_END, **_ON_SHORTCUT}, sum=(82.0, _MIDDLE)
    ),
    "concat_residual": Glyph(
        _TWO_BOXES,
        (_TRUNK, _SHORTCUT),
        {**_ON_BRANCH, **_AT_THE_END, **_ON_SHORTCUT},
        concat=(82.0, _MIDDLE, 16.0),
    ),
    "dense": Glyph(_TWO_BOXES, (_TRUNK, _SHORTCUT), _ON_BRANCH, concat=(82.0, _MIDDLE, 16.0)),
    "aggregation": Glyph(
        ((24.0, _MIDDLE, 9.0, 20.0), (36.5, _MIDDLE, 9.0, 20.0), (71.0, _MIDDLE, 9.0, 20.0)),
        (
            _TRUNK,
            ((4.0, _MIDDLE), (4.0, _ABOVE), (61.0, _ABOVE), (61.0, _MIDDLE)),
            ((30.25, _MIDDLE), (30.25, _ABOVE)),
        ),
        {"pre": (12.0, _MIDDLE), "inner": (49.5, _MIDDLE), "standard": (83.0, _MIDDLE), "post": (94.0, _MIDDLE)},
        concat=(61.0, 24.0, 36.0),
    ),
    "inception": Glyph(
        tuple((38.0, y, 22.0, 14.0) for y in (12.0, _MIDDLE, 56.0)),
        (_TRUNK, *_PARALLEL),
        {"standard": (80.0, _MIDDLE), "inception": (80.0, _MIDDLE)},
        concat=(63.0, _MIDDLE, 56.0),
    ),
    "branch": Glyph(_TWO_BOXES, (_TRUNK, _SHORTCUT), _ON_BRANCH, sum=(82.0, _MIDDLE)),
    "straight": Glyph(_TWO_BOXES, (_TRUNK,), {**_ON_BRANCH, **_AT_THE_END}),
    "plain": Glyph(((42.0, _MIDDLE, 30.0, 20.0),), (_TRUNK,), {"standard": (74.0, _MIDDLE)}),
}


def spot_of(kind: str, placement: str) -> Point:
    """Where a placement has its SE in a unit of a kind."""
    spots = GLYPHS[kind].spots
    return spots.get(placement, spots["standard"])


def draw_unit(sheet: Sheet, kind: str, corner: Point, scale: float, has_one: bool = True) -> None:
    """A unit without its SEs, pale and dashed where it has none and gets none."""
    glyph = GLYPHS[kind]
    edge = Style(1, edge=INK if has_one else GREY)
    box = Style(2, BOX, BOX_EDGE) if has_one else Style(2, PAPER, GREY, dashed=True)
    for line in glyph.lines:
        sheet.line(edge, *(_at(point, corner, scale) for point in line))
    for x, y, width, height in glyph.boxes:
        sheet.box(box, *_at((x, y), corner, scale), width * scale, height * scale)
    if glyph.sum:
        draw_sum(sheet, _at(glyph.sum, corner, scale), 5 * scale, edge.edge)
    if glyph.concat:
        x, y, height = glyph.concat
        draw_concat(sheet, _at((x, y), corner, scale), height * scale, scale, edge.edge)


def draw_sum(sheet: Sheet, point: Point, radius: float, colour: str = INK) -> None:
    """The sign of an addition."""
    x, y = point
    arm = radius * 0.6
    sheet.disc(Style(3, PAPER, colour), x, y, radius)
    sheet.line(Style(4, edge=colour), (x - arm, y), (x + arm, y))
    sheet.line(Style(4, edge=colour), (x, y - arm), (x, y + arm))


def draw_concat(sheet: Sheet, point: Point, height: float, scale: float, colour: str = INK) -> None:
    """The sign of a concatenation."""
    sheet.box(Style(3, colour, colour), *point, 5 * scale, height)


def draw_se(sheet: Sheet, point: Point, radius: float, colour: str) -> None:
    """An SE."""
    sheet.disc(Style(6, colour, PAPER), *point, radius)


def draw_replaced(sheet: Sheet, point: Point, radius: float) -> None:
    """An SE that is there and will go."""
    x, y = point
    arm = radius * 0.7
    sheet.disc(Style(5, PAPER, THERE), x, y, radius * 0.9)
    sheet.line(Style(5, edge=THERE), (x - arm, y - arm), (x + arm, y + arm))
    sheet.line(Style(5, edge=THERE), (x - arm, y + arm), (x + arm, y - arm))


def _at(point: Point, corner: Point, scale: float) -> Point:
    return corner[0] + point[0] * scale, corner[1] + point[1] * scale
