"""What SEs are worth: scores against what is freed, the best set for a budget, a job that goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from patients import build, differences, images, randomise, snapshot
from torch import Tensor, nn

from se_surgery import (
    DataError,
    NothingToDoError,
    OptionError,
    PatientError,
    SurgeryError,
    Tradeoff,
    add_se,
    excitations,
    find_se,
    strip_se,
    tradeoff,
)
from se_surgery.gates import choice
from se_surgery.gates.choice import best_sets, cheapest
from se_surgery.gates.scores import accuracy
from se_surgery.gates.worth import Worth

SIZE = toys.Functional.SIZE


def patient() -> nn.Module:
    """Two residual blocks, in each an SE on the branch and one on the shortcut, which cannot be folded."""
    torch.manual_seed(3)
    model = randomise(toys.Functional())
    add_se(model, r=4, bias=True, init="paper", example_input=SIZE)
    add_se(model, "identity", r=2, bias=True, init="paper", existing="stack", example_input=SIZE)
    with torch.no_grad():
        for site in find_se(model, SIZE):
            se = model.get_submodule(site.path)
            se.fc2.weight.normal_(0.0, 2.0)
            # One of each pair of rows passes the ReLU: none of the gates is a constant.
            half = len(se.fc1.weight) // 2
            se.fc1.weight[half:] = -se.fc1.weight[:half]
            se.fc1.bias.zero_()
    return model.eval()


def data(batch: int = 12) -> list[tuple[Tensor, Tensor]]:
    x = images(SIZE, batch) * torch.linspace(0.2, 3.0, batch)[:, None, None, None]
    return [(part, torch.arange(len(part)) % 10) for part in x.split(5)]


@functools.cache
def wanted() -> list[Tensor]:
    """What the network puts out as it is."""
    with torch.no_grad():
        model = patient()
        return [model(x) for x, _ in data()]


@torch.no_grad()
def nearness(model: nn.Module) -> float:
    """A score without luck: how near the outputs are to those of the network as it is."""
    return -sum(float((model(x) - y).square().sum()) for (x, _), y in zip(data(), wanted(), strict=True))


def test_each_se_alone_is_stripped_and_folded() -> None:
    """What the table says is what surgery on copies does to the score."""
    model = patient()
    wanted()
    before, rng = snapshot(model), torch.get_rng_state()
    found = tradeoff(model, data(), nearness)
    assert differences(before, snapshot(model)) == [] and torch.equal(rng, torch.get_rng_state())
    assert found.score == nearness(model) and found.result is None and found.taken == ()
    assert [worth.site for worth in found.worths] == find_se(model, SIZE)
    for worth in found.worths:
        where = worth.site.path
        stripped = strip_se(copy.deepcopy(model), where=where, example_input=SIZE)
        assert worth.stripped == pytest.approx(found.score - nearness(stripped), rel=1e-4)
        assert abs(worth.stripped) > 1e-4 and worth.seconds > 0
        if where.endswith("identity"):
            assert worth.folded is None and "goes elsewhere" in worth.why_not and worth.way == "strip"
        else:
            folded = strip_se(copy.deepcopy(model), where=where, fold="mean", loader=data(), example_input=SIZE)
            assert worth.folded == pytest.approx(found.score - nearness(folded), rel=1e-3)
            assert worth.loss == min(worth.stripped, worth.folded)
    losses = [worth.loss / worth.site.params for worth in found.ranked]
    assert losses == sorted(losses) and set(found.ranked) == set(found.worths)


@pytest.mark.parametrize("score", [np.float32(0.5), np.int64(2), torch.tensor(0.5), 1])
def test_scores_may_be_numbers_of_any_kind(score: Any) -> None:
    assert tradeoff(patient(), data(), lambda model: score).score == float(score)


def test_what_loses_nothing_is_ranked_by_what_it_gains_and_frees() -> None:
    """By hand: the sizes and losses of six SEs, and their places."""
    site = find_se(patient(), SIZE)[0]
    cases = {"a": (10, -0.1), "b": (90, -0.1), "c": (10, 0.0), "d": (90, 0.0), "e": (10, 0.1), "f": (90, 0.1)}
    worths = [
        Worth(dataclasses.replace(site, path=path, params=freed), 0.0, loss, None)
        for path, (freed, loss) in cases.items()
    ]
    ranked = Tradeoff(0.0, tuple(worths)).ranked
    assert [worth.site.path for worth in ranked] == ["b", "a", "d", "c", "f", "e"]


def test_a_budget_takes_the_best_set_out() -> None:
    model = patient()
    expected = tradeoff(copy.deepcopy(model), data(), nearness).choose(0.5)
    found = tradeoff(model, data(), nearness, budget=0.5)
    assert found.taken == tuple(worth.site.path for worth in expected) and found.taken
    left = find_se(model, SIZE)
    assert {site.path for site in left} == {worth.site.path for worth in found.worths} - set(found.taken)
    assert sum(site.params for site in left) <= found.parameters / 2
    assert found.result == pytest.approx(nearness(model), rel=1e-4)
    assert {worth.way for worth in expected} == {"fold", "strip"}, "both are done"


def test_what_a_score_does_to_the_modes_is_taken_back() -> None:
    model = patient().train()
    model.head.eval()
    before = snapshot(model)

    def evaluate(patient: nn.Module) -> float:
        assert patient.training and not patient.head.training
        return nearness(patient.eval())

    found = tradeoff(model, data(), evaluate)
    assert differences(before, snapshot(model)) == [] and found.score == nearness(patient())


def test_a_wrapped_model_is_scored_but_not_operated_on() -> None:
    model = patient()
    found = tradeoff(nn.DataParallel(model), data(), nearness)
    assert [worth.site for worth in found.worths] == find_se(model, SIZE)


@pytest.mark.parametrize(
    ("budget", "left"), [(np.float64(0.5), 2), (np.int64(84), 1), (0, 0), (0.0, 0), (1.0, 4), (236, 4), (235, 3)]
)
def test_budgets_are_parameters_or_shares(budget: float, left: int) -> None:
    """The two on the branches have 42 parameters each, 8 -> 2 -> 8, those on the shortcuts 76, 8 -> 4 -> 8."""
    model = patient()
    found = tradeoff(model, data(), nearness, budget=budget)
    assert len(find_se(model, SIZE)) == left and len(found.taken) == 4 - left
    assert (found.result is None) is (left == 4)


def test_the_default_score_is_the_share_that_is_right() -> None:
    model = patient()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data())
    assert accuracy(model, data()) == right / 12
    assert tradeoff(model, data()).score == right / 12


# ------------------------------------------------------------------------------------------------------- the best sets


def test_best_sets_are_those_of_trying_all() -> None:
    """Eight SEs, all 256 sets by hand; with losses below zero and equal sizes among them."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        freed = torch.randint(1, 5, (8,), generator=generator).mul(10).tolist()
        losses = torch.randn(8, generator=generator, dtype=torch.float64).tolist()
        best = best_sets(freed, losses)
        everything = [
            (sum(freed[i] for i in members), sum(losses[i] for i in members))
            for count in range(9)
            for members in itertools.combinations(range(8), count)
        ]
        for need in range(0, sum(freed) + 1, 5):
            found = cheapest(best, need)
            assert found.freed == sum(freed[i] for i in found.members) >= need
            assert found.loss == pytest.approx(min(loss for size, loss in everything if size >= need), abs=1e-12)


def test_many_ses_of_many_sizes_are_thinned_and_still_good(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(2)
    freed = torch.randint(1, 10**6, (14,), generator=generator).tolist()
    # A loss that goes with the size makes nearly every set one of the best.
    losses = [size * (1 + 0.05 * float(torch.randn((), generator=generator))) for size in freed]
    exact = best_sets(freed, losses)
    monkeypatch.setattr(choice, "_KEPT", 200)
    thinned = best_sets(freed, losses)
    assert len(thinned) <= 200 < len(exact)
    for share in (0.2, 0.5, 0.8):
        need = int(share * sum(freed))
        assert cheapest(exact, need).loss <= cheapest(thinned, need).loss <= 1.1 * cheapest(exact, need).loss
    assert cheapest(thinned, sum(freed)).members == tuple(range(14))


# --------------------------------------------------------------------------------------------------- stopped, resumed


def test_a_job_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """What is known is not measured again; what comes out is the same."""
    model, file, asked = patient(), tmp_path / "scores.json", []
    before = snapshot(model)

    def stops(patient: nn.Module) -> float:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return nearness(patient)

    with pytest.raises(KeyboardInterrupt):
        tradeoff(model, data(), stops, resume=file)
    assert differences(before, snapshot(model)) == []
    assert len(json.loads(file.read_text())["scores"]) == 3
    found = tradeoff(model, data(), stops, resume=file)
    assert len(asked) == 4 + 4, "seven scores in all: of the model, of four stripped and of two folded"
    again = tradeoff(model, data(), nearness)
    assert [(w.site, w.stripped, w.folded) for w in found.worths] == [
        (w.site, w.stripped, w.folded) for w in again.worths
    ]
    with pytest.raises(
        SurgeryError, match=r"on other data: 12 images of 5 classes \(\w+\), and these are 10 images of 5"
    ):
        tradeoff(model, data(10), nearness, resume=file)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    with pytest.raises(SurgeryError, match="of another model, or of other weights"):
        tradeoff(model, data(), nearness, resume=file)


SCORES = '{"format": "se_surgery.scores.1", '


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no scores"),
        ("{}", "no scores"),
        (SCORES + '"model": ""}', "holds no scores"),
        (SCORES + '"scores": {"all": "good"}}', "holds no scores"),
        (SCORES + '"scores": {"all": 1}}', "of another model"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(SurgeryError, match=said):
        tradeoff(patient(), data(), nearness, resume=tmp_path / "scores.json")


# ---------------------------------------------------------------------------------------------------- shown, refused


def test_table_and_plot(tmp_path: Path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self))
    found = tradeoff(patient(), data(), nearness, budget=0.5)
    lines = found.table().splitlines()
    assert [line.split()[1] for line in lines if ".se" in line] == [worth.site.path for worth in found.ranked]
    for worth in found.worths:
        line = next(line for line in lines if f" {worth.site.path} " in line)
        assert f"{worth.site.params:,}" in line and f"{worth.stripped:+.4f}" in line
        assert line.endswith(("fold", "strip")) is (worth.site.path in found.taken)
    assert f"Score then: {found.result:.4f}." in lines[-1]
    assert found.plot(tmp_path / "tradeoff.png") == tmp_path / "tradeoff.png"
    kept = [found.parameters - one.freed for one in found.front]
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == kept


def fails(model: nn.Module) -> float:
    raise RuntimeError("no disk")


# Model, loader, arguments, the error and what it says.
BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "below zero": (patient, data, {"budget": -1}, OptionError, "budget=-1 is below zero"),
    "share below zero": (patient, data, {"budget": -0.1}, OptionError, "budget=-0.1 is below zero"),
    "above all": (patient, data, {"budget": 10**6}, OptionError, r"budget=1000000 is above \d+ parameters, all that"),
    "share above all": (patient, data, {"budget": 1.5}, OptionError, "budget=1.5 is above 1.0, the whole share"),
    "no number": (patient, data, {"budget": "half"}, OptionError, "budget='half' is no number"),
    "not a number": (patient, data, {"budget": math.nan}, OptionError, "budget=nan is no number"),
    "true": (patient, data, {"budget": True}, OptionError, "budget=True is no number"),
    "in DataParallel": (
        lambda: nn.DataParallel(patient()),
        data,
        {},
        PatientError,
        "wrapped or compiled by DataParallel",
    ),
    "bytes": (patient, lambda: [(images(SIZE).byte(), [0, 1])], {}, DataError, "batch 1 of shape .*, torch.uint8 "),
    "no SE": (lambda: build("toy/Functional"), data, {}, NothingToDoError, "has no SE"),
    "empty": (patient, lambda: [], {}, DataError, "gave no images"),
    "once only": (patient, lambda: iter(data()), {}, DataError, "gone through several times"),
    "no labels": (patient, lambda: [x for x, _ in data()], {}, DataError, "gives no labels"),
    "labels out of range": (patient, lambda: [(images(SIZE), [0, 10])], {}, DataError, "label 10, and the model has"),
    "NaN": (patient, lambda: [(images(SIZE) * math.nan, [0, 1])], {}, DataError, "not finite"),
    "no function": (patient, data, {"evaluate": 0.5}, OptionError, "evaluate=0.5 is no function"),
    "a score that is none": (patient, data, {"evaluate": lambda model: None}, DataError, "returned None"),
    "a score that is NaN": (patient, data, {"evaluate": lambda model: math.nan}, DataError, "returned nan"),
    "a score that fails": (patient, data, {"evaluate": fails}, RuntimeError, "no disk"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_of_no_use_is_refused_and_the_model_left_alone(name: str) -> None:
    make, loader, options, error, text = BAD[name]
    model = make().train()
    before, rng = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=text):
        tradeoff(model, loader(), **{"budget": 0.5, **options})
    assert differences(before, snapshot(model)) == [] and torch.equal(rng, torch.get_rng_state())


def test_an_attention_without_gates_can_only_be_stripped() -> None:
    torch.manual_seed(3)
    model = add_se(randomise(toys.Functional()), attn="cbam", example_input=SIZE)
    with torch.no_grad():
        for site in find_se(model, SIZE):
            model.get_submodule(site.path).mix.fill_(1.0)
    found = tradeoff(model.eval(), data(), nearness)
    assert isinstance(found, Tradeoff) and [worth.folded for worth in found.worths] == [None, None]
    assert len(excitations(add_se(model, existing="stack", example_input=SIZE), data()).skipped) == 2
