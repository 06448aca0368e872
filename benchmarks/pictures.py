"""Draw the pictures of docs/: the placements, a block before and after, the gallery of networks.

    python -m benchmarks.pictures            all of them, and docs/gallery.md
    python -m benchmarks.pictures resnet50   those whose file's name begins so

Only the sheets in which networks are drawn look at models, without values. One release of matplotlib writes the same
files every time.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from se_surgery import plan_se
from se_surgery.models.bases import create_base
from se_surgery.planning.placements import PLACEMENTS
from se_surgery.showing.drawing import sheet_of, title_of
from se_surgery.showing.glyphs import (
    BOX,
    BOX_EDGE,
    GLYPHS,
    NEW,
    RADIUS,
    WIDTH,
    draw_concat,
    draw_se,
    draw_sum,
    draw_unit,
)
from se_surgery.showing.sheet import GREY, PALE, PAPER, Sheet, Style

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
GALLERY_PAGE = DOCS / "gallery.md"

_LINE, _BOX, _SE = Style(1), Style(2, BOX, BOX_EDGE), Style(5, NEW, NEW)


# ------------------------------------------------------------------------------------------------------- placements


class Part(NamedTuple):
    """A part of a unit from left to right: what it is, its text, its modules in timm's Bottleneck, its width."""

    kind: str
    text: str = ""
    modules: tuple[str, ...] = ()
    width: float = 56


# A bottleneck unit, with room for an SE wherever a placement has one.
BOTTLENECK = (
    Part("fork", width=24),
    Part("se", "pre"),
    Part("box", "1×1 conv\nBN, ReLU", ("conv1", "bn1", "act1"), 92),
    Part("gap", width=20),
    Part("box", "3×3 conv\nBN, ReLU", ("conv2", "bn2", "act2"), 92),
    Part("se", "inner"),
    Part("box", "1×1 conv\nBN", ("conv3", "bn3"), 92),
    Part("se", "standard"),
    Part("sum", width=40),
    Part("box", "ReLU", ("act3",), 60),
    Part("se", "post"),
)


def residual(placement: str) -> Sheet:
    """A bottleneck unit with the SE of one placement."""
    sheet = Sheet()
    sheet.height = 150
    _bottleneck(sheet, 105, placement)
    return sheet


def _bottleneck(sheet: Sheet, y: float, placement: str | None) -> dict[str, float]:
    """Draw the unit with its middle line at a height; where its parts are, by their text."""
    left = (sheet.width - sum(part.width for part in BOTTLENECK)) / 2
    at: dict[str, float] = {}
    sheet.line(_LINE, (left - 60, y), (sheet.width - left + 60, y))
    _arrow(sheet, sheet.width - left + 60, y)
    for part in BOTTLENECK:
        middle = at[part.text or part.kind] = left + part.width / 2
        if part.kind == "box":
            _box(sheet, middle, y, part.width, 44, part.text)
        if part.kind == "se" and part.text == placement:
            _se(sheet, middle, y)
        left += part.width
    draw_sum(sheet, (at["sum"], y), 10)
    above = y - 65
    sheet.line(_LINE, (at["fork"], y), (at["fork"], above), (at["sum"], above), (at["sum"], y - 10))
    if placement == "identity":
        _se(sheet, (at["fork"] + at["sum"]) / 2, above)
    return at


def inception() -> Sheet:
    """An Inception module with its SE."""
    sheet = Sheet()
    sheet.height = 250
    middle, join = 125.0, 560.0
    one, three, five = (f"{size}×{size} conv\nBN, ReLU" for size in (1, 3, 5))
    branches = ((one,), (one, three), (one, five), ("3×3 pool", one))
    sheet.line(_LINE, (60, middle), (100, middle))
    for number, texts in enumerate(branches):
        y = 35.0 + number * 60
        sheet.line(_LINE, (100, middle), (130, y), (join, y))
        for column, text in enumerate(texts):
            _box(sheet, 230 + 190 * column + 95 * (len(texts) == 1), y, 130, 40, text)
    draw_concat(sheet, (join, middle), 224, 2)
    sheet.line(_LINE, (join, middle), (740, middle))
    _arrow(sheet, 740, middle)
    _se(sheet, 650, middle)
    return sheet


def plain() -> Sheet:
    """Two convolutions of a plain network with their SEs."""
    sheet = Sheet()
    sheet.height = 90
    sheet.line(_LINE, (40, 45), (760, 45))
    _arrow(sheet, 760, 45)
    for left in (70, 430):
        _box(sheet, left + 95, 45, 150, 44, "3×3 conv\nBN, ReLU")
        _se(sheet, left + 225, 45)
    return sheet


def kinds() -> Sheet:
    """Every kind of unit with the SE of every placement that it has."""
    sheet = Sheet()
    width, height = 108.0, 74.0
    scale = 0.92
    for column, placement in enumerate(PLACEMENTS):
        sheet.words(134 + column * width + width / 2, 28, placement, size=12, bold=True, at="center")
    for row, (kind, glyph) in enumerate(GLYPHS.items()):
        top = 40 + row * height
        sheet.line(Style(0, edge=PALE), (12, top), (sheet.width - 12, top))
        sheet.words(12, top + height / 2 + 4, kind, size=12)
        for column, placement in enumerate(PLACEMENTS):
            left = 134 + column * width + (width - WIDTH * scale) / 2
            if placement not in glyph.spots:
                sheet.words(left + WIDTH * scale / 2, top + height / 2 + 4, "-", colour=GREY, at="center")
                continue
            corner = (left, top + (height - (glyph.top + glyph.bottom) * scale) / 2)
            draw_unit(sheet, kind, corner, scale)
            x, y = glyph.spots[placement]
            draw_se(sheet, (corner[0] + x * scale, corner[1] + y * scale), RADIUS * scale, NEW)
    sheet.height = 40 + len(GLYPHS) * height
    return sheet


def block() -> Sheet:
    """A unit before and after, and what is inside the SE."""
    sheet = Sheet()
    for y, text, placement in ((95.0, "before", None), (235.0, "after", "standard")):
        sheet.words(12, y - 72, text, size=14, bold=True)
        at = _bottleneck(sheet, y, placement)
    x, top, y = at["standard"], 300.0, 345.0
    edge = Style(1, edge=NEW, width=1.2, dashed=True)
    sheet.box(Style(0, PAPER, NEW), 400, 355, 744, 110)
    sheet.line(edge, (x - 16, 250), (x - 60, top))
    sheet.line(edge, (x + 16, 250), (x + 60, top))
    sheet.line(_LINE, (50, y), (752, y))
    _arrow(sheet, 752, y)
    names = ("mean over the map\nC", "fc1\nC / r", "ReLU", "fc2\nC", "2 × sigmoid\nC gates")
    sheet.line(_LINE, (68, y), (68, 396), (650, 396), (650, y + 12))
    for middle, width, name in zip((154, 272, 358, 444, 550), (132, 62, 62, 62, 100), names, strict=True):
        _box(sheet, middle, y, width, 44, name)
    sheet.disc(Style(3, PAPER), 650, y, 12)
    for sign in (-1, 1):
        sheet.line(Style(4), (650 - 5, y - 5 * sign), (650 + 5, y + 5 * sign))
    sheet.words(670, y + 28, "each channel times", size=10, colour=GREY)
    sheet.words(670, y + 41, "its gate", size=10, colour=GREY)
    sheet.height = 422
    return sheet


def _box(sheet: Sheet, x: float, y: float, width: float, height: float, text: str) -> None:
    sheet.box(_BOX, x, y, width, height)
    lines = text.split("\n")
    for number, line in enumerate(lines):
        sheet.words(x, y + 4 + (number - (len(lines) - 1) / 2) * 15, line, size=12, at="center")


def _se(sheet: Sheet, x: float, y: float) -> None:
    sheet.box(_SE, x, y, 34, 30)
    sheet.words(x, y + 5, "SE", size=14, colour=PAPER, bold=True, at="center")


def _arrow(sheet: Sheet, x: float, y: float) -> None:
    sheet.line(_LINE, (x - 8, y - 5), (x, y), (x - 8, y + 5))


# ---------------------------------------------------------------------------------------------------------- gallery


class Network(NamedTuple):
    """A network of the gallery: its name, what of it is worth seeing, and the options of the plan."""

    name: str
    about: str
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def stem(self) -> str:
        return self.name.replace("/", "_")

    @property
    def command(self) -> str:
        options = "".join(f" --{key} {value}" for key, value in self.options.items())
        return f"se-surgery plan {self.name}{options} --draw {self.stem}.svg"

    def sheet(self) -> tuple[Sheet, str]:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # torchvision's, of how GoogLeNet begins
            plan = plan_se(create_base(self.name, False), **self.options)
        return sheet_of(plan), title_of(plan)


GALLERY = (
    Network("resnet50", "Residual units: one SE in each, after the last normalisation and before the addition."),
    Network(
        "densenet121", "Dense layers: an SE gates the 32 channels that a layer adds, before they are concatenated."
    ),
    Network("bn_inception", "Inception modules: an SE gates all branches, after they are concatenated."),
    Network("torchvision/googlenet", "The same in torchvision's GoogLeNet."),
    Network("vgg16_bn", "No units at all: an SE after every convolution with its normalisation and ReLU."),
    Network("mobilenetv2_100", "Inverted residuals, some with a stride and so without a shortcut: all get an SE."),
    Network(
        "efficientnet_b0",
        "SEs are inside the units already. They are replaced here, each in its place; by default they are left alone.",
        {"existing": "replace"},
    ),
    Network(
        "torchvision/shufflenet_v2_x1_0",
        "Units that join by concatenation. With `identity` the SE gates the half of the map that is not transformed.",
        {"placement": "identity"},
    ),
    Network("convnext_atto", "An SE in front of each depthwise convolution.", {"placement": "pre"}),
    Network(
        "hrnet_w18_small", "Branches of several resolutions: the residual units in them get SEs, the fusions none."
    ),
    Network("ese_vovnet19b_dw", "One-shot aggregation: timm's own eSE sits where `standard` would put one."),
    Network(
        "inception_resnet_v2",
        "Two kinds of units. With `inception` only those get an SE that concatenate parallel branches.",
        {"placement": "inception"},
    ),
    Network("repvgg_a0", "Re-parameterisable blocks: the SE is outside of what is folded."),
)
_INTRODUCTION = """# Gallery

<!-- made by python -m benchmarks.pictures -->

What `se-surgery plan NAME --draw FILE` draws: every unit of a network by stage, in the order in which they run, with
its SEs where the placement puts them. Orange ones are put in, blue ones are there already. What a stage's units have in
common of their names stands beside the stage, the rest below each. [Placements](placements.md) explains the signs.

In Python a plan draws itself:

```python
import timm
import se_surgery

se_surgery.plan_se(timm.create_model("resnet18"), "identity").draw("resnet18.svg")
```
"""


def gallery_page() -> str:
    """docs/gallery.md."""
    parts = [_INTRODUCTION]
    for network in GALLERY:
        image = f"![{network.name} by stage, with its SEs](pictures/{network.stem}.svg)"
        parts.append(f"## {network.name}\n\n{network.about}\n\n```bash\n{network.command}\n```\n\n{image}\n")
    return "\n".join(parts)


def pictures() -> Iterator[tuple[str, Callable[[], tuple[Sheet, str]]]]:
    """The stem of every file, and what draws it and says its title."""
    for placement in ("standard", "pre", "post", "identity", "inner"):
        yield f"placement-{placement}", lambda p=placement: (residual(p), f"placement {p} in a bottleneck unit")
    yield "placement-inception", lambda: (inception(), "placement inception in an Inception module")
    yield "placement-plain", lambda: (plain(), "placement standard in a plain network")
    yield "placements", lambda: (kinds(), "every kind of unit with every placement that it has")
    yield "block", lambda: (block(), "a bottleneck unit before and after")
    for network in GALLERY:
        yield network.stem, network.sheet


def main() -> None:
    """Write the files."""
    PICTURES.mkdir(exist_ok=True)
    for stem, draw in pictures():
        if stem.startswith(tuple(sys.argv[1:]) or ""):
            sheet, title = draw()
            path = sheet.save(PICTURES / f"{stem}.svg", title)
            print(f"{path.stat().st_size:>8,}  {path.relative_to(DOCS.parent)}")
    GALLERY_PAGE.write_text(gallery_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
