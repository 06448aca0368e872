"""Recipe: the operations on a model as plain data, so that they can be done again on a fresh base.

In: an operated model and its base's name, or a recipe and a fresh base. Out: a recipe, or the operated model. A recipe
holds what was asked and the sites that came of it. Doing it again asks the same and compares the sites: where another
base, or another version of timm or of this library, would place an SE elsewhere, that is an error and no model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import OptionError, SurgeryError, shorten
from ..planning.exam import Exam
from ..planning.options import check_options
from ..planning.plan import site_to_dict
from ..planning.planner import make_plan
from ..pruning.widths import Notes, narrow
from ..reading.wrappers import check_module
from ..records import OPERATIONS, base_of
from .accounts import refuse_unaccounted
from .edits import append_operation
from .graft import graft
from .journal import Journal, guarded
from .schema import FORMAT, VERSION, check_recipe
from .strip import remove, stripped_to_dict


def recipe_of(model: nn.Module, base: str | None = None, base_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The recipe of an operated model.

    Args:
        model: A model; one that was never operated on has a recipe without operations.
        base: Name of its base: `resnet50` (timm) or `torchvision/resnet50`. By default what the model itself knows.
        base_args: Arguments the base was created with.

    Raises:
        SurgeryError: The model's SEs are not those of its operations: it is a part of an operated model or another
            arrangement of it, or a part of it was operated on by itself. Or an argument means nothing.
    """
    check_module(model)
    if base is not None and not isinstance(base, str):
        raise OptionError(f"base={shorten(base)} is not the name of a model. Give base='resnet50' for instance.")
    check_base_args(base_args)
    operations = model.__dict__.get(OPERATIONS, [])
    refuse_unaccounted(model, operations)
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": base_of(model) if base is None else base,
        "base_args": dict(base_args or {}),
        "operations": copy.deepcopy(operations),
    }


def check_base_args(base_args: Any) -> None:
    """Refuse arguments of a base that are no mapping of names.

    Raises:
        OptionError: They are none.
    """
    if base_args is not None and (not isinstance(base_args, Mapping) or not all(isinstance(k, str) for k in base_args)):
        raise OptionError(f"base_args={shorten(base_args)} is no mapping. Give {{'output_stride': 16}} for instance.")


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], example_input: Any = None) -> nn.Module:
    """Do what a recipe says on a fresh base, in place, all of it or nothing.

    Args:
        model: A fresh base.
        recipe: The recipe, as `recipe_of` gives it, or read from JSON: a file in `registry/`, `Plan.to_json()`.
        example_input: What to look at the model with, as for `add_se`.

    Returns:
        The operated model.

    Raises:
        SurgeryError: The recipe is not one, or its sites would not come out the same.

    Examples:
        >>> recipe = se_surgery.recipe_of(se_surgery.add_se(timm.create_model("resnet18")))
        >>> model = se_surgery.apply_recipe(timm.create_model("resnet18"), recipe)
    """
    check_module(model)
    check_recipe(recipe)
    return replay(model, recipe["operations"], example_input)


def replay(model: nn.Module, operations: list[Any], example_input: Any = None, *, partial: bool = False) -> nn.Module:
    """Do checked operations, all of them or none.

    Args:
        model: A fresh base.
        operations: A recipe's.
        example_input: What to look at the model with.
        partial: Whether the model is the base without some of its modules, as behind timm's `features_only`, so that
            sites in what is not there are left out.

    Raises:
        SurgeryError: The sites would not come out the same.
    """
    return guarded(_replay, model, operations, example_input, partial)


def _replay(journal: Journal, model: nn.Module, operations: list[Any], example_input: Any, partial: bool) -> nn.Module:
    for number, operation in enumerate(operations, 1):
        sites = operation["sites"]
        if partial:
            modules = dict(model.named_modules())
            sites = [site for site in sites if site["path"].rpartition(".")[0] in modules]
        if sites:
            _OPERATIONS[operation["op"]](journal, model, {**operation, "sites": sites}, number, example_input, partial)
    return model


def _add(
    journal: Journal, model: nn.Module, operation: Mapping[str, Any], number: int, example_input: Any, partial: bool
) -> None:
    given = dict(operation["options"])
    if isinstance(given["r"], Mapping):
        given["r"] = {int(stage): ratio for stage, ratio in given["r"].items()}
    if partial:
        given["where"] = [site["path"] for site in operation["sites"]]
    try:
        options = check_options(**given)
    except SurgeryError as error:
        raise SurgeryError(f"Operation {number} of the recipe has options that mean nothing here: {error}") from error
    plan = make_plan(Exam(model, example_input, options.heads), options)
    _compare(operation["sites"], [site_to_dict(site) for site in plan.sites], number)
    graft(journal, model, plan)


def _strip(
    journal: Journal, model: nn.Module, operation: Mapping[str, Any], number: int, example_input: Any, partial: bool
) -> None:
    exam = Exam(model, example_input)
    wanted = {site["path"] for site in operation["sites"]}
    sites = [site for site in exam.existing if site.path in wanted]
    _compare(operation["sites"], [stripped_to_dict(site) for site in sites], number)
    remove(journal, model, exam, sites, restore=operation["restore"])


def _prune(
    journal: Journal, model: nn.Module, operation: Mapping[str, Any], number: int, example_input: Any, partial: bool
) -> None:
    modules, notes = dict(model.named_modules()), Notes(model, example_input)
    for site in operation["sites"]:
        if site["path"] in modules:
            narrow(journal.open(modules[site["path"]]), site)
        elif not partial:
            raise SurgeryError(
                f"Operation {number} of the recipe narrows {site['path']!r}, and here is no such module. Take the "
                f"recipe's own base, with the versions of timm and se-surgery that it was made with."
            )
    notes.refresh(journal)
    append_operation(journal, model, dict(operation))


_OPERATIONS: dict[str, Callable[[Journal, nn.Module, Mapping[str, Any], int, Any, bool], None]] = {
    "add": _add,
    "strip": _strip,
    "prune": _prune,
}


def _compare(asked: list[Any], found: list[dict[str, Any]], number: int) -> None:
    """Refuse to go on where the sites are not those of the recipe, one by one and all of them."""
    here, there = {site["path"]: site for site in found}, {site["path"]: site for site in asked}
    path = next((path for path in {**there, **here} if here.get(path) != there.get(path)), None)
    if path is not None:
        raise SurgeryError(
            f"Operation {number} of the recipe has {len(there)} sites, and here it would have {len(here)}. The first "
            f"that differs is {path!r}: {_said(there.get(path))} in the recipe, {_said(here.get(path))} here. Take the "
            f"recipe's own base, with the versions of timm and se-surgery that it was made with."
        )


def _said(site: Any) -> str:
    if site is None:
        return "no site"
    return ", ".join(f"{key}={value!r}" for key, value in site.items() if key != "path")
