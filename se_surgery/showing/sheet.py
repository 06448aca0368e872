"""Sheet: what a drawing is put on, and the file that comes of it.

In: lines, boxes, discs and words, in pixels from the top left. Out: an SVG, PNG or PDF file, the same byte for byte
whenever it is made with one release of matplotlib. matplotlib is an extra; nothing is imported before the file is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .figures import blank, written

# In an SVG a pixel is three quarters of a point, and matplotlib counts in points.
_POINTS = 0.75
_PIXELS_AN_INCH = 96
INK, GREY, PALE, PAPER = "#333333", "#8a8a8a", "#d9d9d9", "#ffffff"


class Style(NamedTuple):
    """How a shape looks; those of a lower layer lie under those of a higher one."""

    layer: int
    fill: str = "none"
    edge: str = INK
    width: float = 1.2
    dashed: bool = False


class _Words(NamedTuple):
    x: float
    y: float
    text: str
    size: float
    colour: str
    bold: bool
    anchor: str


class Sheet:
    """A white sheet, 800 pixels wide unless it says otherwise, and as high as what is put on it.

    Shapes of one style become one path in the file, so that a network of fifty blocks is some ten kilobytes.
    """

    def __init__(self, width: float = 800) -> None:
        self.width = width
        self.height = 0.0
        self._shapes: dict[Style, list[tuple[str, tuple[Any, ...]]]] = {}
        self._words: list[_Words] = []

    def line(self, style: Style, *points: tuple[float, float]) -> None:
        """A line through points."""
        self._put(style, "line", points)

    def box(self, style: Style, x: float, y: float, width: float, height: float) -> None:
        """A box with round corners about its middle."""
        self._put(style, "box", (x, y, width, height))

    def disc(self, style: Style, x: float, y: float, radius: float) -> None:
        """A disc about its middle."""
        self._put(style, "disc", (x, y, radius))

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        colour: str = INK,
        bold: bool = False,
        at: str = "left",
    ) -> None:
        """A line of text; `x` is its left end, its `center` or its right end, `y` the line it stands on."""
        self._words.append(_Words(x, y, text, size, colour, bold, at))

    def save(self, path: Path, title: str) -> Path:
        """Write the file; its ending says the format.

        Raises:
            SurgeryError: matplotlib is missing, or the file cannot be written.
        """
        return written(self.figure(), path, title)

    def figure(self) -> Any:
        """The sheet as a figure of matplotlib.

        Raises:
            SurgeryError: matplotlib is missing.
        """
        figure = blank(self.width / _PIXELS_AN_INCH, self.height / _PIXELS_AN_INCH, dpi=2 * _PIXELS_AN_INCH)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()
        for style in sorted(self._shapes):
            axes.add_patch(_patch(style, self._shapes[style]))
        for words in self._words:
            axes.text(
                words.x,
                words.y,
                words.text,
                fontsize=words.size * _POINTS,
                color=words.colour,
                weight="bold" if words.bold else "normal",
                ha=words.anchor,
                va="baseline",
                parse_math=False,
                zorder=100,
            )
        return figure

    def _put(self, style: Style, kind: str, numbers: tuple[Any, ...]) -> None:
        self._shapes.setdefault(style, []).append((kind, numbers))


def _patch(style: Style, shapes: list[tuple[str, tuple[Any, ...]]]) -> Any:
    """All shapes of one style as one patch."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    outlines: dict[str, Callable[[Any], Any]] = {
        "line": Outline,
        "box": _box,
        "disc": lambda numbers: Outline.circle(numbers[:2], numbers[2]),
    }
    made = [outlines[kind](numbers) for kind, numbers in shapes]
    return PathPatch(
        Outline.make_compound_path(*made),
        facecolor=style.fill,
        edgecolor=style.edge,
        linewidth=style.width * _POINTS,
        linestyle=(0, (2.5, 2)) if style.dashed else "solid",
        capstyle="butt",
        joinstyle="round",
        zorder=style.layer,
    )


def _box(numbers: tuple[float, ...]) -> Any:
    from matplotlib.patches import BoxStyle

    x, y, width, height = numbers
    rounding = min(3.0, width / 4, height / 4)
    return BoxStyle.Round(pad=0, rounding_size=rounding)(x - width / 2, y - height / 2, width, height, 1)
