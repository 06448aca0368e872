"""Named: what each of this library's names in timm's registry builds.

In: a name, its base, and the arguments of `timm.create_model`. Out: the model. `se_models` registers the names; this is
imported when one of them is built.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import OptionError
from ..files.artefact import ARCHITECTURE, refuse_mix, take_digest
from ..files.sources import Checkpoint
from ..surgery.recipe import recipe_of
from ..surgery.schema import check_recipe
from .catalog import shipped_recipe
from .entry import RUNNING, adding, build, following, split_options


def by_options(name: str, base: Any, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build `se_<base>`: options of `add_se` are arguments with the prefix `se_`."""
    options, rest = split_options(kwargs)
    return build(name, base, adding(options), pretrained=pretrained, **rest)


def shipped(name: str, base: Any, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a recipe in `registry/`."""
    return _from_recipe(name, None, shipped_recipe(name), pretrained, kwargs)


def generic(
    name: str, base: Any = None, pretrained: bool = False, recipe: Any = None, digest: Any = None, **kwargs: Any
) -> nn.Module:
    """Build `se_surgery`: any base, by a recipe, by the name of a shipped one, or by options.

    `digest` is that of the weights a saved model was saved with. It is used up: the model that comes of it may learn.
    """
    expected = take_digest(digest)
    if recipe is not None:
        recipe = shipped_recipe(recipe) if isinstance(recipe, str) else recipe
        return _from_recipe(name, base, recipe, pretrained, kwargs, expected)
    if not isinstance(base, str):
        raise OptionError(f"base={base!r} is not the name of a model. Give base='resnet50' for instance, or a recipe.")
    return by_options(name, base, pretrained, **kwargs)


def _from_recipe(
    name: str, base: Any, recipe: Any, pretrained: bool, kwargs: dict[str, Any], digest: str | None = None
) -> nn.Module:
    check_recipe(recipe)
    if base is not None and not isinstance(base, str):
        raise OptionError(f"base={base!r} is not the name of a model. Give base='resnet50' for instance, or a recipe.")
    options, rest = split_options(kwargs)
    running = _running(options)
    if options:
        raise OptionError(
            f"{name!r} is made by a recipe, which says all that se_{sorted(options)[0]} could. Leave it out, or take "
            f"se_{recipe['base']} for a model by options."
        )
    if base is not None and recipe["base"] is not None and base.partition(".")[0] != recipe["base"].partition(".")[0]:
        raise OptionError(f"base={base!r} is not the recipe's, {recipe['base']!r}. Give one of the two.")
    chosen = base or recipe["base"]
    if chosen is None:
        raise OptionError("The recipe names no base. Give base='resnet50' for instance.")

    def belongs(checkpoint: Checkpoint) -> None:
        refuse_mix(checkpoint.tensors, checkpoint.metadata, recipe, digest, checkpoint.where)

    arguments = {**recipe["base_args"], **rest}
    return build(name, chosen, following(recipe, **running), pretrained=pretrained, belongs=belongs, **arguments)


def by_a_user(name: str, base: Any, pretrained: bool = False, se: Any = None, **kwargs: Any) -> nn.Module:
    """Build a name of `register_se`, whose options are `se`."""
    options, rest = split_options(kwargs)
    running = _running(options)
    if options:
        raise OptionError(f"{name!r} was registered with its options. Leave se_{sorted(options)[0]} out.")
    model = build(ARCHITECTURE, base, adding({**se, **running}), pretrained=pretrained, **rest)
    if not rest.get("features_only"):
        # What timm saves.
        model._model_args |= {"base": base, "recipe": recipe_of(model)}  # type: ignore[operator]
    return model


def _running(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of the options those that say how SEs run, which no recipe does."""
    return {option: options.pop(option) for option in RUNNING if option in options}
