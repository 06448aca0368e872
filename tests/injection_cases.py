"""The verbs that `injection` is tried with: each on a small fresh model with gradients, hooks and mixed modes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import timm.layers
import torch
import toys
from injection import ERRORS, Case
from patients import randomise
from torch import Tensor, nn

from se_surgery import (
    SqueezeExcite,
    add_se,
    apply_recipe,
    freeze_base,
    load_se,
    prune_se,
    recipe_of,
    record_pruning,
    strip_se,
    tradeoff,
    unfreeze_base,
)
from se_surgery.gates import judge

SIZE = (3, 16, 16)
CHANGING = (
    *("surgery/", "checking/", "se/", "training/freezing", "pruning/"),
    *("files/load", "files/values", "folding/absorb"),
)
MEASURING = (*CHANGING, "gates/")
LOOKING = ("reading/", "structure/", "planning/")
ALL = ("",)
# What is called where a model changes, or runs.
CALLS = (
    (torch.Tensor, "copy_", ERRORS),
    (torch.Tensor, "clone", ERRORS),
    (torch.Tensor, "requires_grad_", ERRORS),
    (nn.Parameter, "__new__", ERRORS),
    (nn.Module, "to", ERRORS),
    (nn.Module, "train", ERRORS),
    (nn.init, "kaiming_uniform_", ERRORS),
    (SqueezeExcite, "forward", ERRORS),
    # What the model's own code raises means that it does not take this input, and that others are tried.
    (nn.Conv2d, "forward", (KeyboardInterrupt,)),
)

# torch concatenates by a clone where tensors have no values: what that raises is the concatenation's, and the model is
# then looked at with values.
CONCATENATING = tuple(
    (owner, name, (MemoryError, KeyboardInterrupt) if name == "clone" else kinds) for owner, name, kinds in CALLS
)


class Parallel(nn.Module):
    """Two branches that are concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Sequential(toys.conv(width, width // 2, 1), nn.BatchNorm2d(width // 2), nn.ReLU())
        self.right = nn.Sequential(toys.conv(width, width // 2), nn.BatchNorm2d(width // 2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def fresh(cls: type, *args: Any) -> Any:
    """An object of a new class, for which nothing has been generated yet."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})(*args)


def lived_in(model: nn.Module) -> nn.Module:
    """A model as it may be in use: gradients, a hook, a frozen parameter, modules in both modes, notes of its own."""
    randomise(model, seed=2).train()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5) if number % 2 else None
    model.blocks[0].eval()
    model.blocks[0].register_forward_hook(_hook)
    model.stem[0].weight.requires_grad_(False)
    model.num_features = 16
    return model


def _hook(module: nn.Module, args: Any, output: Any) -> None:
    """Do nothing."""


def plain() -> nn.Module:
    return lived_in(fresh(toys.Trunk, fresh(toys.Basic, 8, 8)))


def held() -> nn.Module:
    """Two blocks that hold an SE of timm's already."""
    ses = [timm.layers.SEModule(8, rd_channels=4) for _ in range(2)]
    return lived_in(fresh(toys.Trunk, *(fresh(toys.HoldsSE, 8, se) for se in ses)))


def slotted() -> nn.Module:
    return lived_in(fresh(toys.Trunk, fresh(toys.OwnSlotBlock, 8)))


def parallel() -> nn.Module:
    return lived_in(fresh(toys.Trunk, fresh(Parallel, 8), fresh(Parallel, 8)))


def mixed() -> nn.Module:
    """Blocks of several kinds in a model that does not say what it takes: one may be lost, or another input tried."""
    return lived_in(
        fresh(toys.Trunk, fresh(toys.Basic, 8, 8), fresh(toys.FunctionalBlock, 8), fresh(toys.TwoUnitsBlock, 8))
    )


operate = functools.partial(add_se, example_input=SIZE, r=2)


def loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, *SIZE, generator=generator), torch.arange(4)) for _ in range(2)]


def on(make: Callable[[], nn.Module], verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """The `make` of a case whose verb takes the model and no more than is given here."""

    def both() -> tuple[nn.Module, Callable[[], Any]]:
        model = make()
        return model, lambda: verb(model, *args, **kwargs)

    return both


def _operated(make: Callable[[], nn.Module] = plain, **options: Any) -> Callable[[], nn.Module]:
    return lambda: operate(make(), **options)


def _halved() -> nn.Module:
    """A model whose replaced SEs, kept aside, have not gone along to another dtype and mode."""
    return operate(held(), existing="replace").double().eval()


def _following() -> tuple[nn.Module, Callable[[], Any]]:
    """A recipe with every kind of operation."""
    done = prune_se(operate(held(), existing="replace"), 0.5, example_input=SIZE)
    strip_se(done, where="blocks.1*", example_input=SIZE)
    model = held()
    recipe = recipe_of(done)
    return model, lambda: apply_recipe(model, recipe, SIZE)


def _loading() -> tuple[nn.Module, Callable[[], Any]]:
    model = operate(plain(), init="paper", bias=True)
    theirs = {name: tensor + 1 for name, tensor in copy.deepcopy(model).state_dict().items()}
    return model, lambda: load_se(model, theirs)


def _stripping_frozen() -> tuple[nn.Module, Callable[[], Any]]:
    model = freeze_base(_operated()())
    return model, lambda: strip_se(model, origin="se_surgery", example_input=SIZE)


def _narrowing(model: nn.Module) -> None:
    """What torch-pruning does, by hand: one hidden channel of an SE goes, and the model is trained on the way."""
    with record_pruning(model, SIZE):
        se = model.blocks[0].se
        for layer, axis in ((se.fc1, 0), (se.fc2, 1)):
            kept = layer.weight.detach().narrow(axis, 0, layer.weight.shape[axis] - 1).clone()
            layer.weight = nn.Parameter(kept)
        se.fc1.out_channels -= 1
        se.fc2.in_channels -= 1
        with torch.no_grad():
            model.head.weight.mul_(2)


def _judging(**options: Any) -> Callable[[nn.Module], Any]:
    def verb(model: nn.Module) -> Any:
        seconds, judge._SECONDS = judge._SECONDS, 1e-5
        try:
            return tradeoff(model, loader(), example_input=SIZE, **options)
        finally:
            judge._SECONDS = seconds

    return verb


def _all_to_one() -> nn.Module:
    return operate(plain(), init="paper").eval()


CASES = [
    Case("add_se", on(plain, operate), ALL, CALLS),
    Case("add_se, no size given", on(mixed, add_se, r=2), LOOKING, CALLS),
    Case("add_se placement=pre", on(plain, operate, "pre"), CHANGING, CALLS),
    Case("add_se placement=post", on(plain, operate, "post"), CHANGING, CALLS),
    Case("add_se placement=identity", on(plain, operate, "identity"), CHANGING, CALLS),
    Case("add_se placement=inner, in a slot", on(slotted, operate, "inner"), CHANGING, CALLS),
    Case("add_se placement=inception", on(parallel, operate, "inception"), CHANGING, CONCATENATING),
    Case("add_se existing=replace", on(held, operate, existing="replace"), CHANGING, CALLS),
    Case("add_se existing=replace, ours", on(_operated(), operate, "pre", existing="replace"), CHANGING, CALLS),
    Case("add_se existing=stack", on(held, operate, existing="stack"), CHANGING, CALLS),
    Case("add_se lean=False", on(plain, operate, lean=False, init="paper"), CHANGING, CALLS),
    Case("add_se inplace=False", on(plain, operate, inplace=False), CHANGING, CALLS),
    Case("add_se attn=eca", on(plain, operate, attn="eca"), CHANGING, CALLS),
    Case("strip_se", on(_operated(held, existing="stack"), strip_se, example_input=SIZE), CHANGING, CALLS),
    Case("strip_se origin=se_surgery", on(_halved, strip_se, origin="se_surgery", example_input=SIZE), ALL, CALLS),
    Case("strip_se origin=se_surgery, frozen", _stripping_frozen, CHANGING, CALLS),
    Case(
        "strip_se fold=mean",
        on(_all_to_one, strip_se, fold="mean", loader=loader(), example_input=SIZE),
        MEASURING,
        CALLS,
    ),
    Case("strip_se inplace=False", on(_operated(), strip_se, inplace=False, example_input=SIZE), CHANGING, CALLS),
    Case("apply_recipe", _following, ALL, CALLS),
    Case("load_se", _loading, ALL, CALLS),
    Case("freeze_base", on(_operated(), freeze_base, head="head"), ALL, CALLS),
    Case("freeze_base, again", on(lambda: freeze_base(_operated()()), freeze_base, head="head"), CHANGING, CALLS),
    Case("unfreeze_base", on(lambda: freeze_base(_operated()()), unfreeze_base), ALL, CALLS),
    Case("prune_se", on(_operated(held, existing="stack"), prune_se, 0.5, example_input=SIZE), MEASURING, CALLS),
    Case("prune_se loader", on(_all_to_one, prune_se, 0.5, loader(), example_input=SIZE), MEASURING, CALLS),
    Case("record_pruning", on(_operated(), _narrowing), ALL, CALLS),
    Case("tradeoff", on(_all_to_one, _judging()), MEASURING, CALLS),
    Case("tradeoff budget", on(_all_to_one, _judging(budget=0.5)), MEASURING, CALLS),
]
