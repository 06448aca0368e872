"""Zoo: the names there are, which of them are targets and representatives, and models by name.

In: timm's and torchvision's own lists of names (this library's backbones are in timm's), and the project's lists in
tests/zoo. Out: `Entry`s, and models with or without values.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from se_surgery.models.bases import TORCHVISION
from se_surgery.models.registry import is_own

LISTS = Path(__file__).parents[2] / "tests" / "zoo"
# The lists in tests/zoo that make a name a target, its family's representative, or one for a set of module classes.
_ROLES = {"target": "cnns", "family": "reps", "class": "sigreps"}


@dataclass(frozen=True)
class Entry:
    """One name.

    Attributes:
        name: `resnet50`, or `torchvision/resnet50`.
        family: The module that defines it: `resnet`, or `torchvision/resnet`.
        roles: Which of `target`, `family` (its representative) and `class` (one for a set of module classes) it is.
    """

    name: str
    family: str
    roles: tuple[str, ...]


def listed(role: str) -> set[str]:
    """The names that the project's lists give a role."""
    kind = _ROLES[role]
    return {
        prefix + name
        for library, prefix in _LIBRARIES.items()
        for name in (LISTS / f"{library}_{kind}.txt").read_text().split()
    }


_LIBRARIES = {"timm": "", "torchvision": TORCHVISION, "se_surgery": ""}


@functools.cache
def entries() -> dict[str, Entry]:
    """Every name of both libraries, the project's own lists not asked; targets that a library lacks are not in it."""
    roles = {role: listed(role) for role in _ROLES}
    own = set(filter(is_own, timm.list_models()))
    names = [
        *(name for name in timm.list_models() if name not in own),
        *(TORCHVISION + name for name in torchvision.models.list_models()),
    ]
    return {
        name: Entry(name, _family(name), tuple(role for role, members in roles.items() if name in members))
        for name in names
    }


def _family(name: str) -> str:
    if name.startswith(TORCHVISION):
        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        return TORCHVISION + str(builder.__module__).removeprefix("torchvision.models.")
    module: str = timm.model_entrypoint(name).__module__
    return module.rpartition(".")[2]


def build(name: str, **kwargs: Any) -> nn.Module:
    """A model with random weights. Nothing is downloaded, a backbone's weights neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not name.startswith(TORCHVISION):
            return timm.create_model(name, **kwargs)
        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        if "weights_backbone" in inspect.signature(builder).parameters:
            kwargs = {"weights_backbone": None, **kwargs}
        model: nn.Module = builder(**kwargs)
        return model


def build_on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model without values, in no time and no memory."""
    try:
        with torch.device("meta"):
            return build(name, **kwargs)
    except NotImplementedError:  # torchvision's RegNets work out their widths with tensors
        with torch.device("meta"), _CountingForReal():
            return build(name, **kwargs)


class _CountingForReal(TorchFunctionMode):
    """Puts small tensors of numbers on the CPU, so that what is worked out with them has values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_small = function in (torch.arange, torch.tensor)
        return function(*args, **({"device": "cpu", **kwargs} if is_small else kwargs))
