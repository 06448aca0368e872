"""Describe: the configuration that a model will be saved with.

In: a model, and what its user says of its base. Out: the base's name, the recipe, and the configuration as it will be
read again. What a model knows of itself is taken from it: timm notes the arguments of its models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from ..errors import OptionError, shorten
from ..models import tv
from ..models.bases import TORCHVISION, create_base, is_base, torchvision_names
from ..models.catalog import torchvision_facts
from ..records import base_of, implanted
from ..surgery.recipe import check_base_args, recipe_of
from ..surgery.schema import ARGUMENTS, check_recipe
from .artefact import ARCHITECTURE, OWN, digest_of
from .config import FORMAT, check_config

# Fields of timm's `pretrained_cfg`, without those that say where weights were once read from, or how.
_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(
    "url file hf_hub_id hf_hub_filename source state_dict architecture custom_load label_offset".split()
)
_LABELS = ("label_names", "label_descriptions")
_SIZES = ("input_size", "test_input_size", "min_input_size")


def base_name(model: nn.Module, base: Any) -> str:
    """The name of a model's base."""
    name = base_of(model) if base is None else base
    if isinstance(name, str) and is_base(name):
        return name
    if base is not None:
        raise OptionError(
            f"base={shorten(base)} is no model of timm or torchvision. Give a name such as 'resnet50' or "
            f"'torchvision/resnet50', or, for a class of your own, a fresh model of that class."
        )
    candidates = _candidates(model)
    which = f"Its keys and shapes are those of {', '.join(candidates)}. " if candidates else ""
    example = candidates[0] if candidates else "torchvision/resnet50"
    raise OptionError(
        f"This {type(model).__name__} does not know the name of its base. {which}Give base={example!r} for instance; "
        f"for a class of your own, base={type(model).__name__}(...), a fresh model."
    )


def _candidates(model: nn.Module) -> list[str]:
    """Names of torchvision's networks that have the model's keys and shapes, but for its SEs and its last layer."""
    ours = tuple(f"{path}." for path in implanted(model))
    mine = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(ours)}
    found = []
    for name in torchvision_names(type(model).__module__):
        if torchvision_facts(name.removeprefix(TORCHVISION)) is None:
            continue
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in create_base(name).state_dict().items()}
        differing = [key for key in shapes if shapes[key] != mine.get(key)]
        if shapes.keys() == mine.keys() and set(differing) <= set(list(shapes)[-2:]):
            found.append(name)
    return found


def full_recipe(model: nn.Module, name: str | None, base_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The recipe as it will be read again."""
    check_base_args(base_args)
    recipe = recipe_of(model, name, {**({} if name is None else _arguments(model)), **dict(base_args or {})})
    recipe["base"] = None if name is None else name.partition(".")[0]
    try:
        recipe = json.loads(json.dumps(recipe, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise OptionError(f"The recipe is no plain data ({error}). Give base_args that JSON can hold.") from error
    check_recipe(recipe)
    return dict(recipe)


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments that the base was made with, as far as the model knows them. timm 1.0.31 notes them on its models."""
    noted = getattr(model, "_model_args", None) or {}
    found = {**noted, **_current(model)}
    return {
        name: value
        for name, value in found.items()
        if name in ARGUMENTS and name != "num_classes" and not name.endswith("drop_rate") and _is_json(value)
    }


def _current(model: nn.Module) -> dict[str, Any]:
    """Input channels, pooling and image size as they are by now."""
    try:
        from timm.models._input import get_model_args
    except ImportError:  # timm before 1.0.31
        return {"in_chans": model.in_chans} if isinstance(getattr(model, "in_chans", None), int) else {}
    return {
        name: value for name, value in get_model_args(model).items() if name in ("in_chans", "global_pool", "img_size")
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def full_config(model: nn.Module, recipe: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration as it will be read again."""
    described = _described(model, recipe)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": described.get("num_classes", recipe["base_args"].get("num_classes", 0)),
        "num_features": getattr(model, "num_features", None),
        "model_args": {"base": recipe["base"], "recipe": recipe, "digest": {"sha256": digest_of(tensors, recipe)}},
        "pretrained_cfg": described,
        OWN: {"format": FORMAT, "class": type(model).__qualname__, "timm": timm.__version__},
    }
    try:
        config = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise OptionError(f"The model's pretrained_cfg is no plain data ({error}). Mend or remove it.") from error
    return check_config(config, "The configuration")


def _described(model: nn.Module, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Timm's description of the weights: what the model carries, else that of its base, as it is by now."""
    carried = getattr(model, "pretrained_cfg", None)
    found = carried if isinstance(carried, Mapping) and carried else _description_of(recipe["base"])
    described = {key: value for key, value in found.items() if key in _FIELDS and value is not None}
    classes = _classes(model, described)
    if classes is None:
        return described
    if classes != described.get("num_classes"):
        described = {key: value for key, value in described.items() if key not in _LABELS}
    channels = recipe["base_args"].get("in_chans") or (described.get("input_size") or (3,))[0]
    sizes = {key: [channels, *described[key][1:]] for key in _SIZES if described.get(key)}
    return {**described, **sizes, "num_classes": classes}


def _description_of(base: str | None) -> dict[str, Any]:
    if base is None:
        return {}
    if base.startswith(TORCHVISION):
        name = base.removeprefix(TORCHVISION)
        return tv.resolve_config(name, None, None) if torchvision_facts(name) else {}
    known = get_pretrained_cfg(base)
    return {} if known is None else dict(known.to_dict())


def _classes(model: nn.Module, described: Mapping[str, Any]) -> int | None:
    """Number of classes: what timm notes on its models, else what the classifier has; None where neither is there."""
    noted = getattr(model, "num_classes", None)
    if isinstance(noted, int):
        return noted
    heads = described.get("classifier")
    modules = dict(model.named_modules())
    head = modules.get(heads if isinstance(heads, str) else next(iter(heads or ()), ""))
    for name in ("out_features", "out_channels"):
        if isinstance(getattr(head, name, None), int):
            return int(getattr(head, name))
    return 0 if isinstance(head, nn.Identity) else None
