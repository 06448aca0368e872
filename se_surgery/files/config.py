"""Config: the `config.json` of a saved model, which somebody else may have written.

In: a folder, or what timm read of such a file. Out: the configuration, checked. It is of timm's kind: architecture,
arguments and `pretrained_cfg`. Every field has its bounds, and none may name another place to read from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..errors import ArtefactError
from ..surgery.schema import check_arguments, check_recipe
from .artefact import ARCHITECTURE, CONFIG, OWN, WEIGHTS, json_of, refuse_pickles
from .tensorfile import METADATA, read_header

FORMAT = 1
# What `model_args` holds besides arguments of the base.
_OURS = ("base", "recipe", "digest")
_LIMIT = 5_000_000
_CLASSES = 2**20
_SIDE = 2**14


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The bytes of `config.json`."""
    return (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a saved model: `config.json`, or what the weights know of it where that is missing.

    Raises:
        ArtefactError: There is none, it cannot be read, or it is not of this library.
    """
    path = folder / CONFIG
    try:
        there = path.exists()
    except OSError as error:  # a folder that may not be searched
        raise ArtefactError(f"{str(folder)!r} cannot be read ({error}). See that it can.") from error
    if there:
        text = _text(path)
        config = json_of(text, f"{str(path)!r}")
    else:
        refuse_pickles(folder)
        path = folder / WEIGHTS
        metadata = read_header(path).get(METADATA, {})
        if OWN not in metadata:
            raise ArtefactError(
                f"{str(folder)!r} has no {CONFIG}, and its {WEIGHTS} was not written by se-surgery. Name a folder that "
                f"save_pretrained wrote."
            )
        config = json_of(metadata[OWN], f"The metadata of {str(path)!r}")
    return check_config(config, str(path))


def _text(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ArtefactError(f"{str(path)!r} is no file. Save the model again.")
        with open(path, "rb") as file:
            text = file.read(_LIMIT + 1)
    except OSError as error:
        raise ArtefactError(f"{str(path)!r} cannot be read ({error}). See that it can.") from error
    if len(text) > _LIMIT:
        raise ArtefactError(f"{str(path)!r} is larger than {_LIMIT:,} bytes. Save the model again.")
    return text


def check_config(config: Any, where: str) -> dict[str, Any]:
    """Check a whole configuration.

    Raises:
        SurgeryError: It is damaged, or of another program or version.
    """
    if not isinstance(config, dict):
        raise _damaged(where, "all of it", config, "a mapping")
    if config.get("architecture") != ARCHITECTURE:
        raise ArtefactError(
            f"{where} is of the architecture {str(config.get('architecture'))[:60]!r} and not {ARCHITECTURE!r}: "
            f"another program saved that model. Load it with timm, timm.create_model('local-dir:...') for instance."
        )
    arguments = config.get("model_args")
    if not isinstance(arguments, dict):
        raise _damaged(where, "model_args", arguments, "a mapping with a recipe")
    check_recipe(arguments.get("recipe"))
    described, classes = config.get("pretrained_cfg"), config.get("num_classes")
    if not isinstance(described, Mapping):
        raise _damaged(where, "pretrained_cfg", described, "a mapping")
    if not _is_whole(0, _CLASSES)(classes):
        raise _damaged(where, "num_classes", classes, f"a whole number from 0 to {_CLASSES}")
    # As timm does: what stands above counts.
    check_foreign({**described, "num_classes": classes}, arguments)
    own = config.get(OWN, {})
    if not isinstance(own, dict) or own.get("format", FORMAT) != FORMAT:
        found = own.get("format") if isinstance(own, dict) else own
        raise ArtefactError(
            f"{where} is of format {str(found)[:60]}, and this library reads format {FORMAT}. Take the version of "
            f"se-surgery that wrote it."
        )
    return config


def check_foreign(pretrained_cfg: Any, model_args: Any) -> None:
    """Check what a configuration that somebody else wrote gives to timm, and timm to us.

    Raises:
        SurgeryError: There is an argument or a field that it may not give, or two that contradict each other.
    """
    arguments = {key: value for key, value in (model_args or {}).items() if key not in _OURS}
    check_pretrained_cfg(pretrained_cfg, CONFIG)
    check_arguments(arguments, "model_args")
    recipe = (model_args or {}).get("recipe")
    if isinstance(recipe, Mapping):
        check_recipe(recipe)
        arguments = {**recipe["base_args"], **arguments}
    _check_agreement(pretrained_cfg, arguments)


def _check_agreement(pretrained_cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse numbers of classes or channels that are not the same where they stand twice.

    One of them would pass for what the user wants now, and the layer that depends on it would start anew.
    """
    sizes = pretrained_cfg.get("input_size") or (None,)
    for name, described in (("num_classes", pretrained_cfg.get("num_classes")), ("in_chans", sizes[0])):
        given = arguments.get(name)
        if given is not None and described is not None and given != described:
            raise ArtefactError(
                f"{CONFIG} is damaged: {name} is {str(given)[:60]} among the arguments and {described} in "
                f"pretrained_cfg. Save or fetch the model again."
            )


def check_pretrained_cfg(config: Any, where: str) -> None:
    """Check timm's description of weights that came with them: somebody else may have written it.

    Raises:
        ArtefactError: A field is unknown, out of bounds, or names another place to read from.
    """
    if not isinstance(config, Mapping):
        raise _damaged(where, "pretrained_cfg", config, "a mapping")
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    for name, value in config.items():
        fits, wanted = _FIELDS.get(name, (_is_plain, "text"))
        if name not in known:
            raise _damaged(where, "pretrained_cfg", name, "fields that timm knows")
        if value is not None and not fits(value):
            raise _damaged(where, f"pretrained_cfg.{name}", value, wanted)


def _damaged(where: str, place: str, value: Any, wanted: str) -> ArtefactError:
    shown = repr(value)
    return ArtefactError(
        f"{where} is damaged: {place} is {shown if len(shown) <= 60 else shown[:57] + '...'}, and should be {wanted}. "
        f"Save or fetch the model again."
    )


Fits = Callable[[Any], bool]


def _is_whole(low: int, high: int) -> Fits:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    # A comparison takes whole numbers that no float can hold; NaN fails it.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_SIDE <= value <= _SIDE


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


def _listed(fits: Fits, low: int, high: int) -> Fits:
    return lambda value: isinstance(value, (list, tuple)) and low <= len(value) <= high and all(map(fits, value))


def _either(*fits: Fits) -> Fits:
    return lambda value: any(fit(value) for fit in fits)


def _nothing(value: Any) -> bool:
    return not value


_is_plain = _either(_is_text, _is_number, lambda value: isinstance(value, bool), _listed(_is_text, 0, 100))
_is_size = _listed(_is_whole(1, _SIDE), 3, 3)
_is_pair = _either(_is_whole(1, _SIDE), _listed(_is_whole(1, _SIDE), 1, 2))
_is_color = _either(_is_number, _listed(_is_number, 1, 10_000))
_is_path = _either(_is_text, _listed(_is_text, 1, 100))
_is_names = _either(_listed(_is_text, 0, _CLASSES), lambda v: isinstance(v, dict) and all(map(_is_text, v.values())))
_SIZE = (_is_size, f"channels, height and width, each from 1 to {_SIDE:,}")
_NONE = (_nothing, "left out")
# Fields of timm's that are more than plain text, and what they may be. Weights are those of the folder or repository
# itself; what timm is given to find them is not in this table's hands, and set by timm after the file was read.
_FIELDS: dict[str, tuple[Fits, str]] = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "min_input_size": _SIZE,
    "pool_size": (_is_pair, "a size"),
    "test_pool_size": (_is_pair, "a size"),
    "num_classes": (_is_whole(0, _CLASSES), f"a whole number from 0 to {_CLASSES}"),
    "first_conv": (_is_path, "paths of layers"),
    "classifier": (_is_path, "paths of layers"),
    "mean": (_is_color, "numbers"),
    "std": (_is_color, "numbers"),
    "crop_pct": (_is_number, "a number"),
    "test_crop_pct": (_is_number, "a number"),
    "label_names": (_is_names, "texts"),
    "label_descriptions": (_is_names, "texts"),
    "label_offset": _NONE,
    "custom_load": _NONE,
    "state_dict": _NONE,
    "url": _NONE,
    "hf_hub_filename": _NONE,
}
