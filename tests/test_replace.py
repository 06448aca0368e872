"""A replaced SE hands its place and its name on: the new one is called where that was, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from patients import assert_same, build, copied, images, run
from torch import nn

import se_surgery
from se_surgery import SqueezeExcite, add_se, apply_recipe, find_se, plan_se, recipe_of, strip_se

# By network: how many SEs it has, and in how many units more one is put.
NETWORKS = {
    "seresnet18": (8, 0),
    "legacy_seresnet18": (8, 0),
    "seresnet33ts": (10, 0),
    "ecaresnet26t": (8, 0),
    "regnety_002": (13, 0),
    "test_efficientnet": (2, 0),
    "ghostnet_050": (7, 9),
    "mobilenetv3_small_050": (9, 2),
    "torchvision/mobilenet_v3_small": (9, 2),
    "torchvision/regnet_y_400mf": (16, 0),
}
SIZE = (3, 64, 64)


class Halved(nn.Module):
    """In place of an SE: half of what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


def with_each_se(model: nn.Module, paths: list[str], made: type[nn.Module]) -> nn.Module:
    """The model with something else in the place of every SE."""
    model = copied(model)
    for path in paths:
        model.set_submodule(path, made())
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_new_one_is_where_the_old_one_was(name):
    had, more = NETWORKS[name]
    base = build(name)
    there = [site.path for site in find_se(base, SIZE)]
    assert len(there) == had
    model = add_se(copied(base), existing="replace", example_input=SIZE)
    kept = [path for path in there if isinstance(model.get_submodule(path), SqueezeExcite)]
    assert kept == there and sum(isinstance(m, SqueezeExcite) for m in model.modules()) == had + more
    x = images(SIZE)
    assert_same(run(model, x), run(with_each_se(base, there, nn.Identity), x))
    for path in there:
        model.get_submodule(path).gate_scale = 1.0  # a gate at one half
    assert_same(run(model, x), run(with_each_se(base, there, Halved), x))


@pytest.mark.parametrize("name", ["legacy_seresnet18", "test_efficientnet", "torchvision/mobilenet_v3_small"])
def test_what_was_there_comes_back(name):
    base = build(name)
    model = add_se(copied(base), existing="replace", example_input=SIZE)
    recipe = recipe_of(model)
    assert recipe["operations"][0]["options"]["placement"] is None
    again = apply_recipe(copied(base), recipe, example_input=SIZE)
    again.load_state_dict(model.state_dict())
    x = images(SIZE)
    assert_same(run(again, x), run(model, x))
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert list(model.state_dict()) == list(base.state_dict())
    assert_same(run(model, x), run(base, x))


ASKED = {
    "a placement": ({"placement": "standard"}, {"standard"}, "se_standard"),
    "a name": ({"name": "gate"}, {"standard"}, "gate"),
    "nothing": ({}, {"kept", "standard"}, "se"),
}


@pytest.mark.parametrize("case", ASKED)
def test_who_asks_for_another_place_gets_it(case):
    options, placements, name = ASKED[case]
    plan = plan_se(build("mobilenetv3_small_050"), existing="replace", **options)
    assert {site.placement for site in plan.sites} == placements
    assert {site.path.rpartition(".")[2] for site in plan.sites if site.replaces} == {name}


@pytest.mark.parametrize("placement", ["pre", "post", "inner"])
def test_our_own_are_replaced_where_they_were_put(placement):
    model = add_se(build("resnet18"), placement, r=8, name="gate", example_input=SIZE)
    before = [(site.path, site.placement) for site in plan_se(build("resnet18"), placement, name="gate").sites]
    plan = plan_se(model, r=4, existing="replace", example_input=SIZE)
    assert {site.placement for site in plan.sites} == {placement}
    assert [site.replaces for site in plan.sites] == [(path,) for path, _ in before]
    halved = add_se(copied(model), r=4, existing="replace", example_input=SIZE)
    due = copied(model)
    for module in (*halved.modules(), *due.modules()):
        if isinstance(module, SqueezeExcite):
            module.gate_scale = 1.0
            nn.init.zeros_(module.fc2.weight)
    x = images(SIZE)
    assert_same(run(halved, x), run(due, x))


def test_every_promise_holds_of_what_was_kept():
    model = add_se(build("ghostnet_050"), existing="replace", example_input=SIZE)
    assert not se_surgery.verify(model, SIZE, thorough=False).broken


def test_several_ses_of_a_unit_have_no_one_place():
    model = add_se(build("seresnet18"), "pre", existing="stack", example_input=SIZE)
    plan = plan_se(model, existing="replace", example_input=SIZE)
    assert {site.placement for site in plan.sites} == {"standard"}
    assert all(len(site.replaces) == 2 for site in plan.sites)
