"""Bases: models by name, `resnet50` of timm or `torchvision/resnet50`.

In: a name. Out: a fresh model. Names are looked up in the two libraries' own lists and nowhere else: a name never
becomes a path, a download from elsewhere, or an import. Names that this library registered are no bases.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import timm
from torch import nn

from ..errors import OptionError, SurgeryError, shorten
from . import tv
from .registry import is_own

TORCHVISION = "torchvision/"
# Arguments that name weights, files or addresses, or change what is promised of the result. A recipe or configuration
# that somebody else wrote must not make this machine read or fetch anything.
_REFUSED = frozenset("checkpoint_path weights weights_backbone".split())


def create_base(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model by name.

    Args:
        name: `resnet50`, or with a weights tag `resnet50.a1_in1k` (timm); `torchvision/resnet50`.
        pretrained: Whether to load the library's weights for it; torchvision's are those called `DEFAULT`.
        kwargs: Arguments of timm's or torchvision's function for that model: `in_chans=1`, `num_classes=10`, ... The
            classifiers of torchvision take `num_classes`, `in_chans` and `features_only` as timm's do.

    Raises:
        SurgeryError: There is no such name, the arguments do not fit, or the weights cannot be had.

    Examples:
        >>> create_base("resnet18", num_classes=10).fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    create = _creator(name)
    refuse_arguments(kwargs)
    _check_weights(name, kwargs.get("pretrained_cfg"))
    try:
        return create(pretrained, kwargs)
    except SurgeryError:
        raise
    # What a model's function raises for arguments it was not made for, and what the hub's client raises for whatever
    # its transport raises, have no class in common. Without either it is the library's own mistake.
    except Exception as error:
        if not (pretrained or kwargs):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in _all(pretrained, kwargs).items())
        raise SurgeryError(
            f"{name!r} cannot be created with {given} ({type(error).__name__}: {error}). {_REMEDIES[pretrained]}"
        ) from error


_REMEDIES = {
    True: "See that the model has weights and that their host can be reached, or leave pretrained out.",
    False: "Give arguments that the model's own function takes.",
}


def is_base(name: str) -> bool:
    """Whether timm or torchvision has a model of that name.

    Examples:
        >>> is_base("resnet50"), is_base("torchvision/resnet50"), is_base("./resnet50")
        (True, True, False)
    """
    if name.startswith(TORCHVISION):
        torchvision = _torchvision()
        return torchvision is not None and name.removeprefix(TORCHVISION) in torchvision.list_models()
    # timm drops what stands before a slash or a colon of its own schemes; `name` has to be the model's name itself.
    return not set(name) & set("/\\:") and bool(timm.is_model(name)) and _has_tag(name) and not is_own(name)


def torchvision_names(module: str) -> list[str]:
    """The names of torchvision's networks whose functions are in one of its modules, by the module's name."""
    torchvision = _torchvision()
    if torchvision is None:
        return []
    names = torchvision.list_models()
    return [TORCHVISION + name for name in names if torchvision.get_model_builder(name).__module__ == module]


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would read a file, or fetch something, besides the weights that are asked for.

    Raises:
        OptionError: There is one.
    """
    refused = sorted(_REFUSED & arguments.keys())
    if refused:
        raise OptionError(
            f"A base cannot be created with {refused[0]!r}. Leave it out: pretrained and pretrained_cfg say which "
            f"weights it takes."
        )


def _check_weights(name: str, given: Any) -> None:
    """Refuse weights by a tag that timm's model does not have; torchvision's networks see to theirs themselves."""
    plain = name.partition(".")[0]
    if not given or not isinstance(given, str) or name.startswith(TORCHVISION):
        return
    tags = [tagged.partition(".")[2] for tagged in _tagged(plain)]
    if given not in tags:
        known = f"Take one of {', '.join(tags)}." if tags else "Leave it out."
        raise OptionError(f"{plain!r} has no weights {given!r}. {known}")


def _has_tag(name: str) -> bool:
    """Whether the tag behind the dot, if there is one, is one of the model's."""
    return "." not in name or name in _tagged(name.partition(".")[0])


def _tagged(model: str) -> list[str]:
    """The names of a timm model with each of its weights tags."""
    return list(timm.list_models(model + ".*", include_tags=True))


def _creator(name: Any) -> Callable[[bool, dict[str, Any]], nn.Module]:
    if not isinstance(name, str) or not name:
        raise OptionError(f"{shorten(name)} is not the name of a model. Give one as a string, 'resnet50' for instance.")
    if name.startswith(TORCHVISION) and _torchvision() is None:
        raise OptionError(f"{name!r} needs torchvision. Install it with: pip install 'se-surgery[torchvision]'.")
    if not is_base(name):
        raise OptionError(unknown(name))
    if name.startswith(TORCHVISION):
        return lambda pretrained, kwargs: _from_torchvision(name.removeprefix(TORCHVISION), pretrained, kwargs)
    return lambda pretrained, kwargs: timm.create_model(name, pretrained=pretrained, **kwargs)


def _from_torchvision(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    torchvision = _torchvision()
    if torchvision is None:
        raise OptionError("torchvision is gone. Install it with: pip install 'se-surgery[torchvision]'.")
    return tv.create(torchvision, name, pretrained, **kwargs)


def _torchvision() -> ModuleType | None:
    """Torchvision's models, or None where it is not installed."""
    try:
        return importlib.import_module("torchvision.models")
    except ImportError:
        return None


def unknown(name: str) -> str:
    """That there is no base of that name, and which are called like it."""
    reason = f"There is no model {name!r} in timm or torchvision."
    if ":" in name:
        return f"{reason} Names with a colon, such as hf-hub: and local-dir:, are not taken: create the model yourself."
    close = _close(name)
    found = f"Did you mean {' or '.join(close)}?" if close else "Nothing there is called anything like it."
    return f"{reason} {found} timm.list_models() and torchvision.models.list_models() list all names."


def _close(name: str) -> list[str]:
    """The names of either library, or the tagged names of one model, that look most like `name`."""
    bare, _, tag = name.rpartition("/")[2].partition(".")
    if tag and timm.is_model(bare):
        tagged, full = _tagged(bare), f"{bare}.{tag}"
        longer = [other for other in tagged if other.startswith(full)]
        return longer[:4] or difflib.get_close_matches(full, tagged, n=3, cutoff=0.0) or [bare]
    torchvision = _torchvision()
    listed = torchvision.list_models() if torchvision is not None else []
    spelled: dict[str, list[str]] = {known: [known] for known in timm.list_models()}
    for known in listed:
        spelled.setdefault(known, []).append(TORCHVISION + known)
    plain = bare.lower().replace("-", "_")
    longer = [known for known in spelled if plain and known.startswith(plain)][:2]
    matches = dict.fromkeys([*longer, *difflib.get_close_matches(plain, spelled, n=3, cutoff=0.6)])
    return [full for match in matches for full in spelled[match]][:4]


def _all(pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What to show of a call: arguments that are there, and not those that hold whole state dicts."""
    shown = {key: value for key, value in kwargs.items() if value is not None and not key.startswith("pretrained_cfg")}
    return {"pretrained": True, **shown} if pretrained else shown
