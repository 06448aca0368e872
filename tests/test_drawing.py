"""Drawings of plans: every unit, each SE where it belongs, nothing over anything else, the same file every time."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from timm.models.metaformer import LayerNorm2dNoBias, MetaFormer, SepConv
from typer.testing import CliRunner

from benchmarks import pictures
from benchmarks.coverage.rows import ROWS, read
from se_surgery import Plan, SurgeryError, add_se, plan_se
from se_surgery.commands.main import app
from se_surgery.models.bases import create_base
from se_surgery.planning.options import Options
from se_surgery.planning.placements import PLACEMENTS
from se_surgery.planning.planner import make_plan
from se_surgery.showing.drawing import sheet_of
from se_surgery.showing.glyphs import GLYPHS, NEW, THERE
from se_surgery.showing.sheet import INK, PAPER, Sheet

NAMES = ("resnet50", "efficientnet_b0", "bn_inception", "vgg16_bn", "ese_vovnet19b_dw")


def planned(name: str, device: str = "meta", **options: Any) -> Plan:
    """A plan of a model without values: what looking at it tells is the same."""
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")  # torchvision's, of how GoogLeNet begins
        return plan_se(create_base(name, False), **options)


def discs(sheet: Sheet, fill: str, edge: str) -> list[tuple[float, float]]:
    """The middles of the discs of a colour, but for the legend's, at the sheet's left."""
    return [
        (x, y)
        for style, shapes in sheet._shapes.items()
        for kind, (x, y, *_) in (shape for shape in shapes if shape[0] == "disc")
        if (style.fill, style.edge) == (fill, edge) and x != 20
    ]


def texts(sheet: Sheet) -> list[str]:
    return [words.text for words in sheet._words]


@pytest.mark.parametrize("name", NAMES)
def test_every_unit_and_every_se_is_there(name: str) -> None:
    plan = planned(name)
    sheet = sheet_of(plan)
    assert len(discs(sheet, NEW, PAPER)) == len(plan.sites)
    assert len(discs(sheet, THERE, PAPER)) == len(plan.existing)
    units = plan.exam.units.found
    boxes = sum(kind == "box" for style, shapes in sheet._shapes.items() if style.layer == 2 for kind, _ in shapes)
    assert boxes == sum(len(GLYPHS[unit.kind].boxes) for unit in units)
    by_stage = Counter(plan.exam.stage_of(unit) for unit in units)
    told = [text.split(" unit")[0] for text in texts(sheet) if re.match(r"\d+ units?\b", text)]
    assert told == [str(by_stage[stage]) for stage in sorted(by_stage)]


def refuse_overlaps(sheet: Sheet) -> None:
    """No two texts share a pixel, none leaves the sheet, and no SE lies on one."""
    figure = sheet.figure()
    axes = figure.axes[0]
    to_pixels = axes.transData.transform
    boxes = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text
    for (one, box), (other, another) in itertools.combinations(boxes, 2):
        assert not (box.x0 < another.x1 and another.x0 < box.x1 and box.y0 < another.y1 and another.y0 < box.y1), (
            one,
            other,
        )
    for x, y in map(to_pixels, [*discs(sheet, NEW, PAPER), *discs(sheet, THERE, PAPER)]):
        assert not any(box.contains(x, y) for _, box in boxes)


# The glyph of a residual unit: 100 wide, in a cell of 97 of 776 pixels, 4 % of it the space between two.
SCALE = 97 / 100 * 0.96


@pytest.mark.parametrize(
    ("placement", "x", "above"),
    [("pre", 13, 0), ("inner", 41, 0), ("standard", 69, 0), ("post", 94, 0), ("identity", 41, 24)],
)
def test_an_se_is_where_its_placement_puts_it(placement: str, x: float, above: float) -> None:
    sheet = sheet_of(planned("resnet50", placement=placement))
    trunk = next(
        points[0][1]
        for style, shapes in sheet._shapes.items()
        if style.edge == INK and style.layer == 1
        for _, points in shapes
    )
    assert discs(sheet, NEW, PAPER)[:2] == [
        (pytest.approx(12 + left + x * SCALE), pytest.approx(trunk - above * SCALE)) for left in (0, 97)
    ]


def test_every_kind_of_unit_and_every_placement_it_has_is_drawn() -> None:
    kinds = {kind for rules in PLACEMENTS.values() for kind in rules}
    assert kinds == GLYPHS.keys()
    for kind in kinds:
        assert GLYPHS[kind].spots.keys() == {placement for placement, rules in PLACEMENTS.items() if kind in rules}


@pytest.mark.parametrize(
    ("options", "new", "left", "replaced"),
    [({}, 0, 16, 0), ({"existing": "replace"}, 16, 0, 16), ({"existing": "stack"}, 16, 16, 0)],
)
def test_ses_that_are_there(options: dict[str, Any], new: int, left: int, replaced: int) -> None:
    sheet = sheet_of(planned("seresnet50", **options))
    drawn = [discs(sheet, NEW, PAPER), discs(sheet, THERE, PAPER), discs(sheet, PAPER, THERE)]
    assert [len(those) for those in drawn] == [new, left, replaced]
    # Those of one unit go to one place: side by side they can both be seen.
    assert len({place for those in drawn for place in those}) == new + left + replaced
    legend = " ".join(texts(sheet))
    for number, text in ((new, "to put in"), (left, "there already, left alone"), (replaced, "to be replaced")):
        assert (f"16 SEs {text}" in legend or f"16 SEs there already, {text}" in legend) == bool(number)


def test_an_se_in_front_of_a_convolution_is_inside_the_branch() -> None:
    # EfficientNet's sits behind the depthwise convolution, SENet's behind the last one, and ours where it was put.
    there = {name: discs(sheet_of(planned(name)), THERE, PAPER)[-1][0] for name in ("efficientnet_b0", "seresnet50")}
    assert there["efficientnet_b0"] == pytest.approx(12 + 4 * 97 + 41 * SCALE)
    assert there["seresnet50"] == pytest.approx(12 + 2 * 97 + 69 * SCALE)
    with torch.device("meta"):
        model = add_se(timm.create_model("resnet18"), "identity")
    assert discs(sheet_of(plan_se(model)), THERE, PAPER)[-1][0] == pytest.approx(12 + 97 + 41 * SCALE)


def test_a_unit_without_an_se_has_a_letter_and_the_letter_a_reason() -> None:
    sheet = sheet_of(planned("mobilenetv2_100", placement="identity", stages=[2, 3, 4, 5]))
    words = texts(sheet)
    marks = Counter(match[1] for text in words if (match := re.search(r" \((\w)\)$", text)))
    assert marks == {"a": 1, "b": 6}
    legend = " ".join(words)
    assert "gets none: stage 1 was not asked for (1 unit)" in legend
    assert "gets none: no place for identity: there is no shortcut (6 units)" in legend
    assert sum(len(shapes) for style, shapes in sheet._shapes.items() if style.dashed) == 7 * 2
    refuse_overlaps(sheet)


def test_two_units_of_one_block_are_told_apart() -> None:
    with torch.device("meta"):
        # Its blocks have two residuals each: a token mixer, here of convolutions, and an MLP.
        model = MetaFormer(depths=(1, 1), dims=(16, 32), token_mixers=SepConv, norm_layers=LayerNorm2dNoBias)
    second = plan_se(model).sites[1]
    assert second.unit == plan_se(model).sites[0].unit
    only = plan_se(model, where=lambda site: (site.unit, site.edge) == (second.unit, second.edge))
    assert len(only.sites) == 1
    (there,) = discs(sheet_of(only), NEW, PAPER)
    assert there[0] == pytest.approx(12 + 97 + 69 * SCALE)


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_the_same_file_every_time(ending: str, tmp_path: Path) -> None:
    plan = planned("resnet18")
    files = [plan.draw(tmp_path / f"{number}{ending}") for number in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    begins = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert files[0].read_bytes().startswith(begins[ending])


def test_an_svg_has_its_words_as_text_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    written = planned("resnet18").draw(str(tmp_path / "out.svg")).read_text(encoding="utf-8")
    for text in ("resnet18: placement=standard, r=16", "layer*", "4.1", "8 SEs to put in: +87,040 parameters"):
        assert text in written
    assert 'width="600pt"' in written  # 800 pixels
    assert not re.search(r"<(image|script|foreignObject)|xlink:href=\"[^#]", written)


def test_a_drawing_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = planned("resnet18")
    with pytest.raises(SurgeryError, match=r"out\.nope' has the ending 'nope', .* Name such a file"):
        plan.draw(tmp_path / "out.nope")
    with pytest.raises(SurgeryError, match=r"out\.svg' cannot be written .* Name an image file"):
        plan.draw(tmp_path / "nowhere" / "out.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SurgeryError, match=r"pip install 'se-surgery\[plot\]'"):
        plan.draw(tmp_path / "out.svg")
    assert not list(tmp_path.iterdir())


def test_the_command_draws(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["plan", "resnet18", *arguments, "--draw", str(tmp_path / "out.svg")])

    result = run("--placement", "identity")
    assert result.exit_code == 0, result.output
    assert "8 SEs to put in" in result.stdout and "resnet18: placement=identity" in (tmp_path / "out.svg").read_text()
    as_json = run("--json")
    assert as_json.stdout.startswith('{\n  "format"')
    refused = CliRunner().invoke(app, ["plan", "resnet18", "--draw", str(tmp_path / "out.nope")])
    assert refused.exit_code == 1 and "Name such a file" in refused.stderr


# ------------------------------------------------------------------------------------------------- the pictures of docs


def shapes_of(svg: str) -> tuple[list[str], list[str]]:
    """The texts of an SVG, and its outlines to a tenth of a point: what releases of matplotlib should agree on."""
    outlines = [
        re.sub(r"-?\d+\.?\d*", lambda number: f"{float(number[0]):.1f}", " ".join(d.split()))
        for d in re.findall(r'<path d="([^"]*)"', svg)
    ]
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg), outlines


# Of the networks, whose looks are tested above, three at every run.
_QUICK = ("placement", "block", "resnet50", "vgg16_bn", "torchvision_shufflenet")
_STEMS = [
    pytest.param(stem, marks=() if stem.startswith(_QUICK) else pytest.mark.sweep) for stem, _ in pictures.pictures()
]


@pytest.mark.parametrize("stem", _STEMS)
def test_the_pictures_of_docs_are_what_is_drawn(stem: str, tmp_path: Path) -> None:
    sheet, title = dict(pictures.pictures())[stem]()
    refuse_overlaps(sheet)
    drawn = sheet.save(tmp_path / "drawn.svg", title).read_text(encoding="utf-8")
    there = (pictures.PICTURES / f"{stem}.svg").read_text(encoding="utf-8")
    assert shapes_of(drawn) == shapes_of(there), "run python -m benchmarks.pictures"


def test_the_gallery_is_what_is_written_and_nothing_is_left_over() -> None:
    page = pictures.GALLERY_PAGE.read_text(encoding="utf-8")
    assert page == pictures.gallery_page(), "run python -m benchmarks.pictures"
    pages = page + (pictures.DOCS / "placements.md").read_text(encoding="utf-8")
    there = {path.stem for path in pictures.PICTURES.iterdir()}
    assert there == {stem for stem, _ in pictures.pictures()} == set(re.findall(r"\(pictures/([\w-]+)\.svg\)", pages))
    assert sum(path.stat().st_size for path in pictures.PICTURES.iterdir()) < 1_500_000


@pytest.mark.parametrize("network", pictures.GALLERY, ids=lambda network: network.stem)
def test_a_command_of_the_gallery_asks_for_what_is_drawn(network: pictures.Network, tmp_path: Path) -> None:
    _, command, *arguments = network.command.split()
    given = typer.main.get_command(app).commands[command].make_context(command, arguments).params
    assert given["model"] == network.name and given["draw"] == Path(f"{network.stem}.svg")
    assert {key: given[key] for key in network.options} == network.options


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "inner"])
def test_the_picture_of_a_placement_has_the_se_where_a_plan_puts_it(placement: str) -> None:
    site = planned("resnet50", placement=placement).sites[1]
    parts = list(pictures.BOTTLENECK)
    before = parts[: parts.index(next(part for part in parts if part.text == placement))]
    modules = [name for part in before for name in part.modules]
    # In front of it stands the module whose result it gates; what comes before the unit is its input, `x`.
    assert site.edge.producer == (modules[-1] if modules else "x")


def _one_of_each_family() -> list[str]:
    """Of every family with units the smallest network."""
    rows = [row for row in read(ROWS).values() if row["kind"] == "plan" and row.get("units")]
    smallest: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["parameters"]):
        smallest.setdefault(row["family"], row["name"])
    return sorted(smallest.values())


@pytest.mark.sweep
@pytest.mark.parametrize("name", _one_of_each_family())
def test_every_family_can_be_drawn(name: str) -> None:
    # Some of torchvision's constructors and detectors read values.
    exam = planned(name, "cpu" if name.startswith("torchvision/") else "meta").exam
    for placement in PLACEMENTS:
        plan = make_plan(exam, replace(Options(), placement=placement))
        sheet = sheet_of(plan)
        assert len(discs(sheet, NEW, PAPER)) == len(plan.sites)
    refuse_overlaps(sheet)
