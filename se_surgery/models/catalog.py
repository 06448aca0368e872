"""Catalog: what is shipped by name.

In: nothing but where this file lies. Out: the recipes in `registry/`, and the bases that get a name `se_<base>`. An
installed wheel carries the recipes inside the package; a checkout (uninstalled, or installed with ``pip install -e``)
has their folder next to the package. What is in a recipe is checked when it is used.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OptionError, SurgeryError

_PACKAGE = Path(__file__).resolve().parents[1]


def registry_dir() -> Path:
    """Find the folder with one JSON recipe per model shipped by name.

    Returns:
        The wheel's ``se_surgery/_registry``, or else the checkout's ``registry``.

    Raises:
        FileNotFoundError: Neither is there, so the installation is damaged.
    """
    places = (_PACKAGE / "_registry", _PACKAGE.parent / "registry")
    for place in places:
        if place.is_dir():
            return place
    looked_in = " and ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"se-surgery's own recipes are missing: looked in {looked_in}. Reinstall it: pip install --force-reinstall "
        "--no-deps se-surgery."
    )


def recipe_names() -> list[str]:
    """List the models shipped by name.

    Returns:
        The stems of the recipe files, sorted. A stem is the name that ``timm.create_model`` takes.
    """
    return sorted(path.stem for path in registry_dir().glob("*.json"))


def shipped_recipe(name: str) -> dict[str, Any]:
    """Read the recipe of a model shipped by name.

    Raises:
        SurgeryError: There is none of that name, or its file is damaged.

    Examples:
        >>> shipped_recipe("se_resnet50_pre")["base"]
        'resnet50'
    """
    if not name.isidentifier() or not (registry_dir() / f"{name}.json").is_file():
        raise OptionError(f"There is no recipe {name!r}. Take one of {', '.join(recipe_names())}.")
    try:
        recipe = json.loads((registry_dir() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SurgeryError(f"The recipe {name!r} cannot be read ({error}). Reinstall se-surgery.") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("base"), str):
        raise SurgeryError(f"The recipe {name!r} names no base. Reinstall se-surgery, or mend the file.")
    return recipe


@functools.cache
def named_bases() -> Mapping[str, Any]:
    """The bases that have a place for one more SE, lists of names: `timm` and `torchvision`; and what is in `facts`.

    `python -m benchmarks.names` writes the file, from the coverage of the whole zoo.
    """
    names: dict[str, Any] = json.loads((_PACKAGE / "names.json").read_text(encoding="utf-8"))
    return names


def torchvision_facts(name: str) -> Mapping[str, Any] | None:
    """What timm's configurations would say of one of torchvision's networks, or None where nothing is known."""
    facts: Mapping[str, Any] | None = named_bases()["facts"].get(name)
    return facts
