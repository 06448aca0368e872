"""What notebooks show: the tables that `print` shows, with everything in them escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import timm
import torch

import se_surgery
from se_surgery.files.load import LoadReport
from se_surgery.gates.worth import Tradeoff, Worth
from se_surgery.proving.promises import Check, Report
from se_surgery.showing.notebook import html
from se_surgery.showing.tables import Section
from se_surgery.structure.find import SESite


class _Reader(HTMLParser):
    """The cells of every table, the paragraphs, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open, "not every tag is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert all(name == "style" for name, _ in attrs), "nothing but an alignment"
        self.tags.append(tag)
        if tag == "br":
            self.cells[-1] += "\n"
        else:
            self.open.append(tag)
        if tag in ("td", "th", "p"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def test_a_plan_is_its_tables() -> None:
    with torch.device("meta"):
        plan = se_surgery.plan_se(timm.create_model("efficientnet_b0"), "inner", stages=[2, 3], existing="replace")
    shown = _Reader(plan._repr_html_())
    assert {"table", "thead", "tbody", "tr", "th", "td", "p", "strong", "div", "br"} == set(shown.tags)
    # Each word that is printed is shown, in the same order.
    printed = [word for word in str(plan).replace("-" * 10, "").split() if set(word) != {"-"} or word == "->"]
    assert " ".join(shown.cells).split() == printed
    assert "4 SEs to put in" in shown.cells and f"{plan.params_added:+,}" in shown.cells


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "a & b", '"><img src=x>', "x' onload='y"])
def test_what_a_model_is_called_is_text(hostile: str) -> None:
    shown = html([hostile, Section(hostile, [hostile, ">" + hostile], [(hostile, 1)])])
    read = _Reader(shown)
    assert set(read.tags) <= {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert read.cells.count(hostile) == 5


def test_numbers_are_on_the_right() -> None:
    right = ' style="text-align: right"'
    assert html([Section("", ["a", ">b"], [("x", 1)]), ""]) == (
        f"<div><table><thead><tr><th>a</th><th{right}>b</th></tr></thead>"
        f"<tbody><tr><td>x</td><td{right}>1</td></tr></tbody></table></div>"
    )


def test_everything_that_prints_as_tables_is_shown_as_tables() -> None:
    model = timm.create_model("seresnet18")
    costs = se_surgery.count_costs(model, (3, 32, 32))
    gates = se_surgery.excitations(model, [torch.randn(2, 3, 32, 32)])
    report = Report((Check("keys", True, "all there"), Check("<graphs>", None, "the base has none")))
    site = SESite("layer1.0.se", "layer1.0", 1, 64, 4, 512, 9, 9, "other")
    worths = Tradeoff(0.5, (Worth(site, 0.001, 0.25, None),))
    loaded = LoadReport("file.pth", (), ("conv1.weight",), (), (), "gates of scale 1")
    cells = {type(one): _Reader(one._repr_html_()).cells for one in (costs, gates, report, worths, loaded)}
    assert f"{costs.whole.parameters:,}" in cells[type(costs)] and "stage 4" in cells[type(costs)]
    assert "layer4.1.se" in cells[type(gates)] and "8 SEs over 2 inputs" in cells[type(gates)]
    assert cells[Report][3:] == ["ok", "keys", "all there", "-", "<graphs>", "the base has none"]
    assert "layer1.0.se" in cells[Tradeoff] and "+0.2500" in cells[Tradeoff]
    assert "Not in any checkpoint, and taken as the model has it: gates of scale 1." in cells[LoadReport]
