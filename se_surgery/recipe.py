"""Recipe: the operations on a model as plain data, so that they can be done again on a fresh base.

In: an operated model and its base's name, or a recipe and a fresh base. Out: a recipe, or the operated model. A recipe
holds what was asked and the sites that came of it; a library version that would place them differently says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .edits import Journal
from .errors import SurgeryError
from .exam import Exam
from .graft import graft
from .options import check_options
from .plan import site_to_dict
from .planner import make_plan
from .records import OPERATIONS
from .strip import remove

FORMAT = "se_surgery.recipe"
VERSION = 1
_KEYS = {"format", "version", "base", "base_args", "operations"}


def recipe_of(model: nn.Module, base: str | None = None, base_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The recipe of an operated model.

    Args:
        model: A model; one that was never operated on has a recipe without operations.
        base: Name of its base: `resnet50` (timm) or `torchvision/resnet50`.
        base_args: Arguments the base was created with.

    Raises:
        SurgeryError: A part of the model was operated on by itself, or the model is wrapped.
    """
    part = next((path for path, module in model.named_modules() if path and OPERATIONS in module.__dict__), None)
    if part is not None:
        raise SurgeryError(
            f"{part!r} of this {type(model).__name__} was operated on by itself, so that the recipe of the whole would "
            f"lack it. Give the recipe of that part: recipe_of(model.{part})."
        )
    operations = [dict(operation) for operation in model.__dict__.get(OPERATIONS, [])]
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": base,
        "base_args": dict(base_args or {}),
        "operations": operations,
    }


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], example_input: Any = None) -> nn.Module:
    """Do what a recipe says on a fresh base, in place, all of it or nothing.

    Args:
        model: A fresh base.
        recipe: The recipe, as `recipe_of` gives it or read from JSON.
        example_input: What to look at the model with, as for `add_se`.

    Returns:
        The operated model.

    Raises:
        SurgeryError: The recipe is not one, or its sites would not come out the same.
    """
    check_recipe(recipe)
    with Journal() as journal:
        for module in model.modules():
            journal.open(module)
        for number, operation in enumerate(recipe["operations"], 1):
            _OPERATIONS[operation["op"]](model, operation, number, example_input)
    return model


def check_recipe(recipe: Any) -> None:
    """Check that something is a recipe this library reads, before anything is built for it.

    Raises:
        SurgeryError: It is not; the message says why.
    """
    if not isinstance(recipe, Mapping) or recipe.get("format") != FORMAT:
        raise SurgeryError(f"This is not a recipe: its format is not {FORMAT!r}. Give what recipe_of returned.")
    if recipe.get("version") != VERSION:
        raise SurgeryError(
            f"The recipe has version {recipe.get('version')!r}, and this library reads version {VERSION}. "
            f"Take the version of se-surgery that wrote it."
        )
    unknown = sorted(set(recipe) - _KEYS)
    if unknown:
        raise SurgeryError(f"The recipe has the unknown key {unknown[0]!r}. Known are {', '.join(sorted(_KEYS))}.")
    operations = recipe.get("operations")
    if not isinstance(operations, list):
        raise SurgeryError(f"The recipe's operations are {operations!r}, not a list. The recipe is damaged.")
    for number, operation in enumerate(operations, 1):
        _check_operation(operation, number)


def _check_operation(operation: Any, number: int) -> None:
    known = isinstance(operation, Mapping) and operation.get("op") in _OPERATIONS
    sites = operation.get("sites") if known else None
    if not isinstance(sites, list) or not sites or not all(_is_site(site) for site in sites):
        raise SurgeryError(
            f"Of the recipe's operations number {number} is no add or strip with its sites. The recipe is damaged."
        )


def _is_site(site: Any) -> bool:
    return isinstance(site, Mapping) and isinstance(site.get("path"), str)


def _add(model: nn.Module, operation: Mapping[str, Any], number: int, example_input: Any) -> None:
    given = {**operation.get("options", {}), "where": tuple(site["path"] for site in operation["sites"])}
    try:
        if isinstance(given.get("r"), Mapping):
            given["r"] = {int(stage): ratio for stage, ratio in given["r"].items()}
        options = check_options(**given)
    except (TypeError, ValueError) as error:
        raise SurgeryError(f"Operation {number} of the recipe has options that mean nothing here: {error}") from error
    plan = make_plan(Exam(model, example_input), options)
    _compare(operation["sites"], [site_to_dict(site) for site in plan.sites], number)
    graft(model, plan)


def _compare(asked: list[Any], found: list[dict[str, Any]], number: int) -> None:
    by_path = {site["path"]: site for site in found}
    for site in asked:
        now = by_path.get(site.get("path"))
        if now != site:
            raise SurgeryError(
                f"Operation {number} of the recipe put an SE at {site.get('path')!r}, and here it would come out as "
                f"{now or 'none'}. The base or the versions of timm and se-surgery differ from those it was made with."
            )
    if len(found) != len(asked):
        raise SurgeryError(f"Operation {number} of the recipe has {len(asked)} sites, and here {len(found)} came out.")


def _strip(model: nn.Module, operation: Mapping[str, Any], number: int, example_input: Any) -> None:
    exam = Exam(model, example_input)
    by_path = {site.path: site for site in exam.existing}
    paths = [site.get("path") for site in operation["sites"]]
    missing = [path for path in paths if path not in by_path]
    if missing:
        raise SurgeryError(f"Operation {number} of the recipe strips {missing[0]!r}, and here is no SE.")
    remove(model, exam, [by_path[path] for path in paths], restore=bool(operation.get("restore")))


_OPERATIONS = {"add": _add, "strip": _strip}
