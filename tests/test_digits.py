"""The studies on digits: docs/digits.md says what the rows say, the rows are complete, and the command makes them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.digits import __main__ as command
from benchmarks.digits import render, rows
from benchmarks.digits.data import Digits, digits
from benchmarks.digits.evidence import Estimate, Evidence, difference, estimate
from benchmarks.digits.network import PLACEMENTS, base
from benchmarks.digits.replication_text import FACTORS, _pairs
from benchmarks.digits.setting import Setting
from benchmarks.digits.studies import BASE, HALVES, SE, STUDIES, retrofit_arm
from se_surgery import add_se

DOCUMENT = rows.ROWS.with_suffix(".md")
TINY = Setting(
    units=(1, 1, 1),
    width=4,
    stem=8,
    train_images=48,
    choice_images=32,
    gates_steps=3,
    base_steps=4,
    tune_steps=2,
)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence(rows.read(rows.ROWS).values())


# ------------------------------------------------------------------------------------------------- the committed rows


def test_the_document_is_that_of_the_rows(evidence):
    assert DOCUMENT.read_text(encoding="utf-8") == render.document_text(evidence.rows.values(), Setting())


def test_the_document_changes_with_a_row(evidence):
    changed = [dict(row) for row in evidence.rows.values()]
    changed[0]["accuracy"] += 3.0
    assert DOCUMENT.read_text(encoding="utf-8") != render.document_text(changed, Setting())


@pytest.mark.parametrize("study", STUDIES)
def test_every_arm_of_a_study_has_five_seeds_of_one_setting(evidence, study):
    seeds = {arm: sorted(evidence.sample(study, arm)) for arm in STUDIES[study][0]()}
    short = {arm: found for arm, found in seeds.items() if found[:5] != [0, 1, 2, 3, 4]}
    assert not short, short
    settings = {row["setting"] for key, row in evidence.rows.items() if key[0] == study}
    assert settings == {Setting().name}


def test_identity_retrofits_begin_as_the_base_and_paper_ones_do_not(evidence):
    found = [row for key, row in evidence.rows.items() if key[0] == "retrofit"]
    for row in found:
        same = row["step0"] == evidence.rows["retrofit", row["seed"], BASE]["step0"]
        assert (row["equal"], same) == ((False, False) if row["arm"].startswith("paper") else (True, True)), row["arm"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_parameters_in_the_rows_are_those_of_the_library(evidence, placement):
    model = base(Setting())
    plain = sum(p.numel() for p in model.parameters())
    added = sum(p.numel() for p in add_se(model, placement, 8, example_input=(1, 8, 8)).parameters()) - plain
    arm = retrofit_arm("identity", placement, 8)
    assert evidence.size("retrofit", arm) == plain + added == plain + evidence.size("retrofit", arm, "se_parameters")


def test_what_is_left_after_stripping_is_counted(evidence):
    # (2 / r) * sum of N * C^2: two blocks in each stage with 32, 64 and 128 channels, r = 16.
    of_stage = {stage: 2 * 2 * (16 * 2**stage) ** 2 // 16 for stage in (1, 2, 3)}
    assert sum(of_stage.values()) == 5376 == evidence.size("gates", SE, "se_parameters")
    for stage, freed in of_stage.items():
        for how in ("strip", "fold"):
            assert evidence.size("gates", f"{how} {stage}", "se_parameters") == 5376 - freed
    base_size = evidence.size("gates", BASE)
    assert {evidence.size("gates", f"{how} all") for how in ("strip", "fold")} == {base_size}
    for arm in HALVES:
        assert all(size <= 5376 / 2 for size in evidence.sample("gates", arm, "se_parameters").values())


# --------------------------------------------------------------------------------------------------- the statistics


def test_an_estimate_is_the_mean_and_its_standard_error():
    # Deviations -1, 0, 1: variance 1 of three values.
    found = estimate([1.0, 2.0, 3.0])
    assert found == Estimate(2.0, 1 / math.sqrt(3), 3)
    assert found.bound == pytest.approx(4.302653 / math.sqrt(3))  # Student's t, two degrees of freedom
    assert str(found) == "2.00 ± 0.58"


def test_a_difference_is_taken_seed_by_seed():
    assert difference({0: 91.0, 1: 93.0, 2: 80.0}, {0: 90.0, 1: 92.0, 7: 0.0}) == Estimate(1.0, 0.0, 2)


@pytest.mark.parametrize(
    ("mean", "text"),
    [(0.19, "(+0.19 ± 0.20)"), (-0.21, "-0.21 ± 0.20"), (0.55, "+0.55 ± 0.20"), (-0.56, "**-0.56 ± 0.20**")],
)
def test_how_a_difference_is_written_says_how_sure_it_is(mean, text):
    assert Estimate(mean, 0.2, 5).signed() == text  # t is 2.776: 0.555


def test_one_seed_has_no_error_and_says_nothing_sure():
    assert estimate([1.0]).signed() == "(+1.00 ± nan)"


PAIRS = [
    ("r", "4", "16", 5),
    ("squeeze", "max", "avg", 5),
    ("gate", "tanh", "sigmoid", 5),
    ("init", "identity", "paper", 5),
    ("placement", "pre", "standard", 7),
]


@pytest.mark.parametrize(("factor", "level", "first", "number"), PAIRS)
def test_levels_are_compared_between_networks_that_are_the_same_in_all_else(factor, level, first, number):
    pairs = _pairs(FACTORS[factor][0], level, first)
    assert len(pairs) == number
    for one, other in pairs:
        differing = [(a, b) for a, b in zip(one.split(), other.split(), strict=True) if a != b]
        assert differing == [(level, first)]


# ------------------------------------------------------------------------------------------------------- the images


def test_the_parts_of_a_seed_are_disjoint_and_whole():
    parts = Digits(3, TINY)
    assert [len(part[1]) for part in (parts.train, parts.measure, parts.choice, parts.test)] == [48, 48, 32, 1717]
    assert torch.equal(parts.train[1], parts.measure[1])
    counts = sum(torch.bincount(part[1], minlength=10) for part in (parts.train, parts.choice, parts.test))
    assert torch.equal(counts, torch.bincount(digits()[1]))


def test_an_image_is_moved_by_a_pixel_at_most_and_filled_with_paper():
    parts = Digits(0, replace(TINY, noise=0.0))
    paper = digits()[0].min()
    wide = torch.nn.functional.pad(parts.train[0], (1,) * 4, value=float(paper))
    shifts = [wide[:, :, down : down + 8, right : right + 8] for down in range(3) for right in range(3)]
    fits = torch.stack([(parts.measure[0] == shifted).flatten(1).all(1) for shifted in shifts])
    assert fits.any(0).all() and fits.any(1).all()


def test_batches_are_the_same_for_every_arm_and_others_in_another_phase():
    one, again, other = (next(iter(Digits(1, TINY).batches(1, phase)))[0] for phase in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_makes_what_is_missing_and_writes_it_down(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SETTING", TINY)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    path = tmp_path / "digits.jsonl"
    call = ["--rows", str(path), "--seeds", "1", "--studies"]
    assert command.main([*call, "gates", "--write"]) == 0
    made = path.read_text()
    assert [key[2] for key in rows.read(path)] == STUDIES["gates"][0]()
    text = (tmp_path / "digits.md").read_text()
    assert capsys.readouterr().out.strip() in text
    assert text == render.document_text(rows.read(path).values(), TINY) and "Not yet complete" in text
    assert {file.name for file in tmp_path.glob("*.svg")} == {"digits-gates.svg", "digits-excitations.svg"}

    again = [*call, "retrofit", "--arms", "* inner 16"]
    assert command.main(again) == 0
    whole = path.read_text()
    assert whole.startswith(made) and len(whole.splitlines()) == 12 + 2
    # A line that was broken off in writing is made again, as it was, and nothing else is.
    path.write_text(whole[:-30])
    appended = []
    monkeypatch.setattr(command, "append", lambda _, row: appended.append(row["arm"]))
    assert command.main(again) == 0
    assert appended == ["paper inner 16"] and path.read_text() == whole


def test_rows_of_another_setting_are_made_again():
    row = {"study": "gates", "seed": 0, "arm": BASE, **rows.stamp(TINY)}
    assert rows.is_current(row, TINY) and not rows.is_current(row, Setting())
    assert not rows.is_current({**row, "torch": "1.0"}, TINY)


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--arms", "nothing"], ["--render"]])
def test_a_mistake_on_the_command_line_changes_nothing(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        command.main(["--rows", str(tmp_path / "digits.jsonl"), *wrong])
    assert "error: " in capsys.readouterr().err and not list(tmp_path.iterdir())
