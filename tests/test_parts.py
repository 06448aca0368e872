"""Parts of operated models, and other arrangements: a recipe that would be that of another model is refused.

And plans apart from their model: pickled or copied in depth they are plain data.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from patients import assert_differs, assert_same, build, calls, images, randomise, run
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import se_surgery
from se_surgery import (
    OptionError,
    SqueezeExcite,
    SurgeryError,
    add_se,
    apply_recipe,
    plan_se,
    recipe_of,
    save_pretrained,
    strip_se,
    verify,
)
from se_surgery.records import PUT_IN
from se_surgery.surgery.journal import Journal

SIZE = (3, 32, 32)


def trunk(blocks: int = 3) -> nn.Module:
    """Equal blocks, so that any arrangement of them runs."""
    torch.manual_seed(0)
    return randomise(toys.Trunk(*(toys.Basic(8, 8) for _ in range(blocks)))).eval()


class Holder(nn.Module):
    """A network that holds another one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = trunk()
        self.last = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x))


class Pairs(nn.Module):
    """A siamese network: its encoder runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = trunk()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.encoder(a) - self.encoder(b)


def spoiled(model: nn.Module, seed: int = 5) -> nn.Module:
    """Every gate differs from one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.normal_(module.fc2.weight, generator=generator)
    return model


def operated(model: nn.Module, **options: Any) -> nn.Module:
    return spoiled(add_se(model, example_input=SIZE, **options))


# --------------------------------------------------------------------------------------------------- what is refused


def reordered() -> nn.Module:
    model = operated(trunk())
    model.blocks = nn.Sequential(model.blocks[1], model.blocks[0], model.blocks[2])
    return model


def shortened() -> nn.Module:
    model = operated(trunk())
    model.blocks = model.blocks[:2]
    return model


def emptied() -> nn.Module:
    model = operated(trunk())
    model.blocks = nn.Identity()
    return model


def bypassed() -> nn.Module:
    model = operated(trunk())
    model.blocks[1].se = nn.Identity()
    return model


def wrapped_se() -> nn.Module:
    model = operated(trunk())
    model.blocks[1].se = nn.Sequential(model.blocks[1].se, nn.Dropout2d())
    return model


def moved_se() -> nn.Module:
    model = operated(trunk())
    model.behind = model.blocks[1].se
    return model


def foreign_block() -> nn.Module:
    """A block of a model that was operated on with other options, where one of its own was."""
    model = operated(trunk())
    model.blocks[0] = operated(trunk(), bias=True).blocks[0]
    return model


def renamed() -> nn.Module:
    model = operated(trunk())
    model.body = model.blocks
    del model.blocks
    return model


def narrowed() -> nn.Module:
    """Narrowed by hand, and nobody wrote it down."""
    model = operated(trunk())
    se = model.blocks[0].se
    se.fc1.weight = nn.Parameter(se.fc1.weight[:1])
    se.fc2.weight = nn.Parameter(se.fc2.weight[:, :1])
    return model


def stripped_part() -> nn.Module:
    model = operated(Holder())
    return strip_se(model.encoder, example_input=SIZE)


def tied() -> nn.Module:
    model = operated(trunk())
    model.blocks[0].se = model.blocks[1].se
    return model


def extractor(model: nn.Module) -> nn.Module:
    return create_feature_extractor(model, ["blocks"])


def told(now: str, then: str) -> str:
    return f"'{now}' was put in as '{then}' of a"


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "children": (lambda: nn.Sequential(*list(operated(trunk()).children())[:-1]), told("1.0.se", "blocks.0.se")),
    "stage": (lambda: operated(trunk()).blocks, told("0.se", "blocks.0.se") + " Trunk"),
    "block": (lambda: operated(trunk()).blocks[1], told("se", "blocks.1.se") + " Trunk"),
    "se": (lambda: operated(trunk()).blocks[1].se, told("itself", "blocks.1.se")),
    "layer of an SE": (lambda: operated(trunk()).blocks[1].se.fc1, told("itself", "blocks.1.se")),
    "encoder": (lambda: operated(Holder()).encoder, "holds 3 SEs .*" + told("blocks.0.se", "encoder.blocks.0.se")),
    "copied": (lambda: copy.deepcopy(operated(Holder()).encoder), told("blocks.0.se", "encoder.blocks.0.se")),
    "pickled": (lambda: pickle.loads(pickle.dumps(operated(Holder()).encoder)), "as 'encoder.blocks.0.se'"),
    "reordered": (reordered, told("blocks.0.se", "blocks.1.se")),
    "renamed": (renamed, told("body.0.se", "blocks.0.se")),
    "moved SE": (moved_se, told("behind", "blocks.1.se")),
    "tied": (tied, told("blocks.0.se", "blocks.1.se")),
    "foreign block": (foreign_block, "holds an SE .*" + told("blocks.0.se", "blocks.0.se") + " Trunk"),
    "wrapped SE": (wrapped_se, told("blocks.1.se.0", "blocks.1.se")),
    "shortened": (shortened, "put in 3 SEs, and 1 of them are not there any more, 'blocks.2.se' for one"),
    "emptied": (emptied, "put in 3 SEs, and 3 of them"),
    "bypassed": (bypassed, "1 of them are not there any more, 'blocks.1.se'"),
    "narrowed": (narrowed, "'blocks.0.se' has a hidden layer of 1 for 8 channels, and by the operations one of 2"),
    "stripped part": (stripped_part, "took out 'blocks.0.se', and none had put that in"),
    "graph": (lambda: extractor(operated(trunk())), "a graph of torch.fx"),
    "held graph": (
        lambda: nn.Sequential(extractor(operated(trunk()))),
        "'0.blocks.0.se.fc1' was put in as 'blocks.0.se",
    ),
    "script": (lambda: torch.jit.trace(operated(trunk()), images(SIZE)), "compiled by torch.jit"),
    "data parallel": (lambda: nn.DataParallel(operated(trunk())), r"'module' of this DataParallel .*\(model.module\)"),
    "around": (lambda: nn.Sequential(operated(trunk()), nn.ReLU()), "'0' of this Sequential was operated on by itself"),
    "two parts": (
        lambda: nn.Sequential(operated(trunk()), operated(trunk())),
        r"'0' \(and 1 more\) of this Sequential",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*(jit|TracerWarning|trace)")
def test_what_is_no_whole_operated_model_has_no_recipe(name):
    made, message = REFUSED[name]
    with pytest.raises(SurgeryError, match=message) as raised:
        recipe_of(made())
    assert str(raised.value).endswith((".", ").")) and "bug" not in str(raised.value)


@pytest.mark.parametrize("name", ["encoder", "reordered", "shortened", "foreign block", "bypassed"])
def test_nor_is_it_saved(name, tmp_path):
    with pytest.raises(SurgeryError, match="|".join((REFUSED[name][1], "put in"))):
        save_pretrained(REFUSED[name][0](), tmp_path / "x", base=trunk())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- what has a recipe


def twice() -> nn.Module:
    return operated(operated(trunk()), placement="inner", existing="stack", name="second")


def replaced() -> nn.Module:
    return operated(operated(trunk()), r=2, existing="replace")


def partly_stripped() -> nn.Module:
    return strip_se(operated(trunk()), where="blocks.1*", example_input=SIZE)


def retaken() -> nn.Module:
    """The encoder's SEs go and come again, by operations of its own."""
    model = Holder()
    strip_se(operated(model), origin="se_surgery", example_input=SIZE)
    return operated(model.encoder)


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    "fresh": trunk,
    "operated": lambda: operated(trunk()),
    "twice": twice,
    "replaced": replaced,
    "partly stripped": partly_stripped,
    "retaken": retaken,
    "copied": lambda: copy.deepcopy(operated(trunk())),
    "pickled": lambda: pickle.loads(pickle.dumps(operated(trunk()))),
    "own operations in a whole": lambda: nn.Sequential(operated(trunk()))[0],
    "another head": lambda: _with_head(operated(trunk())),
}


def _with_head(model: nn.Module) -> nn.Module:
    model.head = nn.Sequential(nn.Dropout(), model.head)
    return model


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_recipe_of_a_whole_gives_it_again(name):
    model = ACCEPTED[name]().eval()
    again = apply_recipe(trunk(), json.loads(json.dumps(recipe_of(model))), SIZE)
    assert recipe_of(again) == recipe_of(model)
    keys = {key: value for key, value in model.state_dict().items() if "head" not in key}
    assert not again.load_state_dict(keys, strict=False).unexpected_keys
    model.head = again.head
    assert_same(run(again, images(SIZE)), run(model, images(SIZE)))
    if name != "fresh":
        assert_differs(run(trunk(), images(SIZE)), run(model, images(SIZE)))


def test_a_recipe_is_apart_from_the_model():
    model = operated(trunk())
    before = recipe_of(model)
    recipe_of(model)["operations"][0]["sites"].clear()
    assert recipe_of(model) == before


def test_a_model_pickled_before_ses_said_where_they_were_put_in():
    model = operated(Holder())
    for module in model.modules():
        module.__dict__.pop(PUT_IN, None)
    assert len(recipe_of(model)["operations"][0]["sites"]) == 3
    with pytest.raises(SurgeryError, match=r"as 'encoder\.blocks\.0\.se' of another model"):
        recipe_of(model.encoder)


def test_an_se_of_ones_own_network_was_not_put_in():
    """The class is public, and a network that is written with it is nobody's operated model."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcite(se_surgery.SESpec(8, 2)))
    assert recipe_of(model)["operations"] == []


@pytest.mark.parametrize(
    "given", [{"base_args": 3}, {"base_args": [1]}, {"base_args": {1: 2}}, {"base": 3}, {"base": nn.ReLU()}]
)
def test_arguments_that_mean_nothing(given):
    (name,) = given
    with pytest.raises(OptionError, match=f"{name}=.*Give"):
        recipe_of(operated(trunk()), **given)


def test_a_siamese_network_is_verified_as_a_whole_and_has_the_recipe_of_its_part():
    model = Pairs().eval()
    operated(model.encoder)
    pair = (images(SIZE), images(SIZE) + 1)
    report = verify(model, example_input=pair, thorough=False)
    told = {check.name: check.detail for check in report.checks if check.passed}
    for name in ("forward, evaluation", "forward, training", "deepcopy", "pickle"):
        assert told[name].endswith("SEs, each as often as its block")
    assert verify(model.encoder, example_input=SIZE, thorough=False)
    with pytest.raises(SurgeryError, match=r"recipe_of\(model.encoder\)"):
        recipe_of(model)


# --------------------------------------------------------------------------------------------------------------- plans


def planned(**options: Any) -> se_surgery.Plan:
    return plan_se(build("resnet18"), **options)


WHERES = {
    "nothing": {},
    "function": {"where": lambda site: site.stage > 2},
    "function that takes none": {"where": lambda site: False},
    "ratios": {"r": {1: 8, -1: 4}},
    "none": {"placement": "inception"},
}


@pytest.mark.parametrize("options", WHERES.values(), ids=WHERES)
@pytest.mark.parametrize(
    "apart", [lambda plan: pickle.loads(pickle.dumps(plan)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_plan_apart_from_its_model(options, apart):
    plan = planned(**options)
    other = apart(plan)
    assert (other.sites, other.existing, other.skipped) == (plan.sites, plan.existing, plan.skipped)
    assert other.to_json() == plan.to_json() and other.places == plan.places
    assert str(other).splitlines()[3:] == str(plan).splitlines()[3:]
    assert callable(plan.options.where) or (other == plan and str(other) == str(plan))
    assert len(pickle.dumps(plan)) < 20_000 and len(pickle.dumps(other)) < 20_000
    assert "exam" in vars(plan) and "exam" not in vars(other)


NEEDS_THE_MODEL: dict[str, Callable[[se_surgery.Plan], Any]] = {
    "exam": lambda plan: plan.exam,
    "draw": lambda plan: plan.draw("plan.svg"),
    "graft": lambda plan: se_surgery.surgery.graft.graft(Journal(), build("resnet18"), plan),
}


@pytest.mark.parametrize("needs", NEEDS_THE_MODEL.values(), ids=NEEDS_THE_MODEL)
def test_what_needs_the_model_says_so(needs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SurgeryError, match=r"for resnet18 was pickled or copied, without the model.*apply_recipe\(model"
    ):
        needs(pickle.loads(pickle.dumps(planned())))
    assert not list(tmp_path.iterdir())


def test_what_a_plan_apart_says_can_be_done():
    plan = pickle.loads(pickle.dumps(planned(where=lambda site: site.stage > 2)))
    model = apply_recipe(build("resnet18"), json.loads(plan.to_json()))
    with calls(model, [site.path for site in plan.sites]) as counts:
        run(model, images())
    assert len(counts) == 4 and set(counts.values()) == {1}


def test_a_shallow_copy_is_the_plan():
    plan = planned()
    assert copy.copy(plan) is plan
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = plan.nothing_like_it
