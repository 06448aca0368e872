"""Studies: the arms of each study, and what one seed of them comes to.

In: a study, a seed, and which arms are wanted. Out: for each arm the body of its row. All arms of a seed see the same
images, and start from the same base; so what differs between two arms of a seed is what the arms differ in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from se_surgery import add_se, excitations, find_se, strip_se, tradeoff

from .data import CLASSES, SHAPE, Digits, loader
from .network import PLACEMENTS, base
from .setting import Setting
from .training import accuracy, loss, scores, share_right, train

Body = dict[str, Any]
Runs = Iterator[tuple[str, Body]]
BASE, SE = "base", "se"
# By the share of images that are classified right, as `tradeoff` does it by itself, and by the loss.
HALVES = ("tradeoff", "tradeoff by loss")
RATIOS = (4, 8, 16)
# The recipe of the network whose gates are looked at, and the one for networks that learn from scratch: the paper's.
RECIPE = {"placement": "standard", "r": 16, "init": "paper"}
WAYS = ("identity", "paper")
SQUEEZES, GATES, INITS = ("avg", "max"), ("sigmoid", "tanh", "relu"), ("paper", "identity")


# -------------------------------------------------------------------------------------------------------------- arms


def gates_arms() -> list[str]:
    """The base, the SE network, and what is left of it when SEs are stripped or folded."""
    parts = ("1", "2", "3", "all")
    return [BASE, SE, *(f"{how} {part}" for part in parts for how in ("strip", "fold")), *HALVES]


def retrofit_arms() -> list[str]:
    """The base fine-tuned on; every placement and r by every way to come to an SE network."""
    return [BASE, *(retrofit_arm(way, placement, r) for way in WAYS for placement in PLACEMENTS for r in RATIOS)]


def retrofit_arm(way: str, placement: str, r: int) -> str:
    """The name of an arm of the retrofit study."""
    return f"{way} {placement} {r}"


def replication_arms() -> list[str]:
    """The base; every placement with every r; and every placement with the other squeeze, gates and start."""
    usual = SQUEEZES[0], GATES[0], INITS[0]
    variants = [(SQUEEZES[1], *usual[1:]), *((usual[0], gate, usual[2]) for gate in GATES[1:]), (*usual[:2], INITS[1])]
    arms = [(placement, r, *usual) for placement in PLACEMENTS for r in RATIOS]
    arms += [(placement, RATIOS[-1], *variant) for variant in variants for placement in PLACEMENTS]
    return [BASE, *(" ".join(map(str, arm)) for arm in arms)]


# ------------------------------------------------------------------------------------------------------------- runs


def _fresh(seed: int, setting: Setting, **recipe: Any) -> nn.Module:
    """A network with random weights: the base's are the same with any SEs, and without."""
    torch.manual_seed(seed)
    model: nn.Module = base(setting)
    return _operated(model, **recipe) if recipe else model


def _operated(model: nn.Module, **recipe: Any) -> nn.Module:
    return add_se(model, example_input=SHAPE, **recipe)


def _sizes(model: nn.Module) -> Body:
    ses = sum(site.params for site in find_se(model, SHAPE))
    return {"parameters": sum(p.numel() for p in model.parameters()), "se_parameters": ses}


def _scratch(digits: Digits, setting: Setting, steps: int, **recipe: Any) -> tuple[nn.Module, float]:
    model = _fresh(digits.seed, setting, **recipe)
    return model, train(model, digits.batches(steps), steps, setting.rate, setting)


def run_gates(seed: int, wanted: Collection[str], setting: Setting) -> Runs:
    """Train a base and an SE network, look at its gates, and take SEs out of copies of it."""
    digits = Digits(seed, setting)
    for arm in (BASE, SE):
        # All other arms are made of the second network.
        if arm == SE or arm in wanted:
            model, last = gates_network(digits, setting, arm)
        if arm in wanted:
            more = {"gates": _gates(model, digits)} if arm == SE else {}
            yield arm, {"accuracy": accuracy(model, digits.test), "loss": last, **_sizes(model), **more}
    for arm in (arm for arm in gates_arms()[2:] if arm in wanted):
        lighter, more = _lightened(copy.deepcopy(model), arm, digits)
        yield arm, {"accuracy": accuracy(lighter, digits.test), **_sizes(lighter), **more}


def gates_network(digits: Digits, setting: Setting, arm: str) -> tuple[nn.Module, float]:
    """The network whose gates are looked at, or its base, trained; and its loss."""
    return _scratch(digits, setting, setting.gates_steps, **(RECIPE if arm == SE else {}))


def _lightened(model: nn.Module, arm: str, digits: Digits) -> tuple[nn.Module, Body]:
    """A network with SEs taken out as an arm says, and which those were where it is a choice."""
    how, _, which = arm.partition(" ")
    if arm in HALVES:
        evaluate = None if arm == HALVES[0] else lambda patient: -loss(patient, digits.choice)
        found = tradeoff(model, loader(digits.choice), evaluate, budget=0.5)
        ways = {worth.site.path: worth.way for worth in found.worths}
        return model, {"taken": {path: ways[path] for path in found.taken}}
    stages = None if which == "all" else int(which)
    folding = {"fold": "mean", "loader": loader(digits.measure)} if how == "fold" else {}
    return strip_se(model, stages, example_input=SHAPE, **folding), {}


def _gates(model: nn.Module, digits: Digits) -> dict[str, dict[str, float]]:
    """Of every SE the mean over its channels of its gates, their deviations and their saturated share."""
    found = excitations(model, loader(digits.measure), classes=CLASSES)
    return {
        gates.site.path: {
            "mean": round(gates.mean.mean().item(), 5),
            "inputs": round(gates.variance.mean().sqrt().item(), 5),
            "classes": round(gates.between.mean().sqrt().item(), 5),
            "saturated": round(gates.saturated.mean().item(), 5),
        }
        for gates in found
    }


def run_retrofit(seed: int, wanted: Collection[str], setting: Setting) -> Runs:
    """Train a base to the end, then give it, and networks made of it, the same number of steps."""
    digits = Digits(seed, setting)
    trained, last = _scratch(digits, setting, setting.base_steps)
    expected = scores(trained, digits.test)
    for arm in (arm for arm in retrofit_arms() if arm in wanted):
        model = copy.deepcopy(trained)
        if arm != BASE:
            way, placement, r = arm.split()
            torch.manual_seed(seed)
            _operated(model, placement=placement, r=int(r), init=way)
        first = scores(model, digits.test)
        start = {"step0": share_right(first, digits.test), "equal": torch.equal(first, expected), "base_loss": last}
        batches = digits.batches(setting.tune_steps, phase=1)
        tuned = train(model, batches, setting.tune_steps, setting.tune_rate, setting)
        yield arm, {"accuracy": accuracy(model, digits.test), "loss": tuned, **_sizes(model), **start}


def run_replication(seed: int, wanted: Collection[str], setting: Setting) -> Runs:
    """Train every network from scratch, with the steps that a retrofit has."""
    digits = Digits(seed, setting)
    for arm in (arm for arm in replication_arms() if arm in wanted):
        recipe: Body = {}
        if arm != BASE:
            placement, r, squeeze, gate, init = arm.split()
            recipe = {"placement": placement, "r": int(r), "squeeze": squeeze, "gate": gate, "init": init}
        model, last = _scratch(digits, setting, setting.tune_steps, **recipe)
        yield arm, {"accuracy": accuracy(model, digits.test), "loss": last, **_sizes(model)}


STUDIES: dict[str, tuple[Callable[[], list[str]], Callable[[int, Collection[str], Setting], Runs]]] = {
    "gates": (gates_arms, run_gates),
    "retrofit": (retrofit_arms, run_retrofit),
    "replication": (replication_arms, run_replication),
}
