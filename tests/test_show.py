"""What a plan and a list of SEs look like: every candidate has to be in it, with the numbers that are true."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from patients import build

from se_surgery import Skipped, find_se, plan_se
from se_surgery.showing.show import plan_text, sites_text
from se_surgery.showing.tables import compact, count, groups, table

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["layer1.0.se"], ["layer1.0.se"]),
        (["layer1.0.se", "layer1.1.se", "layer1.2.se"], ["layer1.[0-2].se"]),
        (["features.2.se", "features.5.se", "features.6.se"], ["features.[2,5-6].se"]),
        (["denselayer9", "denselayer10", "denselayer11"], ["denselayer[9-11]"]),
        # Two numbers move: no one row can say which pairs there are.
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1"], ["a.0.[0-1]", "a.1.[0-1]"]),
        (["s1.b1", "s2.b1", "s2.b2"], ["s[1-2].b1", "s2.b2"]),
        (["Mixed_5b.se", "Mixed_5c.se"], ["Mixed_5b.se", "Mixed_5c.se"]),
        # Not in rising order, and the same path twice: each stays.
        (["a.1", "a.0"], ["a.1", "a.0"]),
        (["a.1", "a.1"], ["a.1", "a.1"]),
        ([""], ["(the model itself)"]),
    ],
)
def test_paths_that_count_up_are_one_row(paths, expected):
    found = groups(paths, lambda _: None, str)
    assert [compact(group) for group in found] == expected
    assert [path for group in found for path in group] == paths


def test_unequal_items_are_not_grouped():
    found = groups([(8, "a.0"), (8, "a.1"), (16, "a.2")], lambda item: item[0], lambda item: item[1])
    assert found == [[(8, "a.0"), (8, "a.1")], [(16, "a.2")]]


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a title, without its header."""
    lines = text[text.index(title) :].split("\n\n", 1)[0].splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) == {"-"})
    return [re.split(r" {3,}", line.strip()) for line in lines[rule + 1 :]]


def test_plan_of_resnet50():
    text = str(plan_se(timm.create_model("resnet50")))
    assert text.startswith("resnet50, 4 stages: placement=standard, r=16\n")
    assert rows(text, "16 SEs to put in") == [
        ["1", "layer1.[0-2].se", "3", "residual", "56 x 56", "256 -> 16", "24,576"],
        ["2", "layer2.[0-3].se", "4", "residual", "28 x 28", "512 -> 32", "131,072"],
        ["3", "layer3.[0-5].se", "6", "residual", "14 x 14", "1024 -> 64", "786,432"],
        ["4", "layer4.[0-2].se", "3", "residual", "7 x 7", "2048 -> 128", "1,572,864"],
    ]
    # 53,120 running statistics are in the second row.
    assert "parameters                25,557,032   +2,514,944   28,071,976   +9.84%" in text
    assert "with running statistics   25,610,152   +2,514,944   28,125,096   +9.82%" in text
    added = "8,034,304 (8.03 M) multiply-adds, 5,535,408 (5.54 M) activations."
    assert f"Added for one image of 3 x 224 x 224: {added}" in text
    assert "skipped" not in text and "there already" not in text
    assert text in README.read_text(encoding="utf-8"), "README.md shows another plan than this one"


def test_plan_of_resnet152_is_still_readable():
    text = str(plan_se(timm.create_model("resnet152")))
    assert [row[1:3] for row in rows(text, "50 SEs to put in")] == [
        ["layer1.[0-2].se", "3"],
        ["layer2.[0-7].se", "8"],
        ["layer3.[0-35].se", "36"],
        ["layer4.[0-2].se", "3"],
    ]
    assert len(text.splitlines()) < 20


def test_existing_ones_are_shown_with_what_becomes_of_them():
    model = timm.create_model("efficientnet_b0")
    skipping, replacing = (str(plan_se(model, existing=existing)) for existing in ("skip", "replace"))
    assert "No SE to put in. Units with a place: standard 16, pre 16, post 16, identity 9, inner 16." in skipping
    kept = rows(skipping, "16 SEs there already, to be left alone")
    assert sum(int(row[2]) for row in kept) == 16
    assert kept[0] == ["1", "blocks.0.0.se", "1", "32 -> 8", "552", "timm"]
    assert rows(skipping, "16 candidates skipped")[0][:2] == ["16", "holds an SE already"]
    assert rows(replacing, "16 SEs there already, to be replaced") == kept
    assert "existing=replace" in replacing and "skipped" not in replacing


def test_everything_skipped_is_there_with_its_reason():
    plan = plan_se(timm.create_model("resnet18"), r={3: 8, -1: 16}, where="*.0")
    text = str(plan)
    assert "r={3: 8, -1: 16}, where=*.0" in text
    assert [row[1] for row in rows(text, "2 SEs to put in")] == ["layer3.0.se", "layer4.0.se"]
    assert rows(text, "6 candidates skipped") == [
        ["2", "stage 1 was not asked for", "layer1.[0-1]"],
        ["2", "stage 2 was not asked for", "layer2.[0-1]"],
        ["2", "where leaves it out", "layer[3-4].1"],
    ]


# By model and options: what is skipped, by kind.
KINDS = {
    "stages": ("toy/Digits", {"stages": 2}, {"not asked": 1, "outside": 1}),
    "where": ("toy/Digits", {"where": "layers.1"}, {"not asked": 1, "outside": 1}),
    "held": ("toy/WriteUps", {}, {"held": 4, "outside": 1}),
    "no place": ("toy/ForkedInPlace", {"placement": "pre"}, {"no place": 1, "no unit": 1, "outside": 1}),
    "called twice": ("toy/CalledTwice", {}, {"refused": 1, "outside": 1}),
    "own forward": ("toy/InstanceForward", {}, {"untraceable": 1, "outside": 1}),
    "no unit": ("toy/Segmenter", {}, {"no unit": 1, "outside": 3}),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_what_is_skipped_has_a_kind(case):
    name, options, expected = case
    plan = plan_se(build(name), **options)
    assert Counter(skip.kind for skip in plan.skipped) == expected
    assert Counter(skip["kind"] for skip in plan.to_dict()["plan"]["skipped"]) == expected
    assert {skip.kind for skip in plan.skipped if skip.is_unit} == set(expected) & {
        *("not asked", "held", "no place", "refused")
    }


def test_what_add_se_would_refuse_comes_first():
    plan = plan_se(timm.create_model("resnet18"), stages=4)
    blocked = replace(plan, skipped=(*plan.skipped, Skipped("layer4.1", "refused", "it is shared", blocking=True)))
    assert rows(plan_text(blocked), "7 candidates skipped")[0] == ["1", "add_se refuses: it is shared", "layer4.1"]


def test_attention_without_a_hidden_layer_shows_none():
    text = str(plan_se(timm.create_model("resnet18"), attn="eca"))
    assert rows(text, "8 SEs to put in")[0][-2:] == ["64", "8"]


def test_a_predicate_shows_by_its_name():
    def strided(site):
        return site.unit.endswith(".0")

    assert "where=strided" in str(plan_se(timm.create_model("resnet18"), where=strided))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "seresnet18",
            [
                ["1", "layer1.[0-1].se", "2", "64 -> 8", "2,192", "timm"],
                ["2", "layer2.[0-1].se", "2", "128 -> 8", "4,368", "timm"],
                ["3", "layer3.[0-1].se", "2", "256 -> 16", "16,928", "timm"],
                ["4", "layer4.[0-1].se", "2", "512 -> 32", "66,624", "timm"],
            ],
        ),
        # eSE has one layer, C x C with a bias, and so no hidden width.
        ("ese_vovnet19b_slim", [["1", "stages.0.blocks.0.attn", "1", "112", f"{112 * 112 + 112:,}", "timm"]]),
    ],
)
def test_list_of_sites(name, expected):
    assert rows(sites_text(find_se(timm.create_model(name))), "")[: len(expected)] == expected


def test_list_of_none():
    assert sites_text([]) == "no SE"


def test_a_table_is_plain_text_and_keeps_long_cells(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    long = "stage2.0.branches.0." * 6
    text = table(["path", ">n"], [(long, 1), ("[bold]a[/bold]", 12)])
    assert text.isascii() and all(len(line) <= 60 and line == line.rstrip() for line in text.splitlines())
    assert "".join(line.split()[0] for line in text.splitlines()[2:-1]) == long
    assert "[bold]a[/bold]" in text


def test_headers_without_text_are_none():
    assert table(["", ">"], [("a", 1)]).splitlines() == [" a   1"]


@pytest.mark.parametrize(("number", "expected"), [(0, "0 SEs"), (1, "1 SE"), (2, "2 SEs")])
def test_count(number, expected):
    assert count(number, "SE") == expected
