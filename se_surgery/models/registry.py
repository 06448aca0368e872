"""Registry: what timm's tables hold of a name, and whose a name is.

In: a name, or a function that builds a model. Out: timm's tables with it or without it, and never half of it. A name
that somebody else registered first stays theirs. timm has no call that takes a name back, so its tables are edited
here, and nowhere else.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from timm.models import _registry as timm_registry
from timm.models import register_model

from ..errors import SurgeryError

# The module of this library's names, whose functions build operated models.
NAMES = f"{__package__}.se_models"
# timm's tables are for one thread at a time.
LOCK = threading.RLock()
# Names of this library that somebody else had registered before it was imported.
left_out: list[str] = []

_Function = TypeVar("_Function", bound=Callable[..., Any])
# timm's tables by a name, and by a name with a tag.
_BY_NAME = ("_model_entrypoints", "_model_to_module", "_model_default_cfgs", "_model_with_tags", "_deprecated_models")
_BY_TAG = ("_model_pretrained_cfgs", "_model_has_pretrained")


def maker_of(name: str) -> Any:
    """The function that timm calls for a name, with its tag or without; None where it knows none."""
    return timm_registry._model_entrypoints.get(name.partition(".")[0])


def is_own(name: str) -> bool:
    """Whether what timm builds under a name is an operated model of this library.

    The name alone does not say so, and neither does that of the module: others may have the same.
    """
    return getattr(maker_of(name), "__module__", None) == NAMES


def refuse_taken(name: str) -> None:
    """Refuse to go on where a name that this library needs is somebody else's.

    Raises:
        SurgeryError: It is.
    """
    if not is_own(name):
        module = getattr(maker_of(name), "__module__", None)
        raise SurgeryError(
            f"The name {name!r} in timm's registry is that of {module!r}, and this library builds its saved models "
            f"under it. Register that model under another name."
        )


def register(function: _Function) -> _Function:
    """Register a function with timm under its own name, or leave it out where somebody else has the name.

    Raises:
        BaseException: timm, or what it calls, did; its tables are as before.
    """
    name = function.__name__
    with LOCK:
        known = maker_of(name)
        if known is not None and getattr(known, "__module__", None) != function.__module__:
            left_out.append(name)
            return function
        if known is not None:
            # A module that is imported once more has its names in there already.
            forget(name, function.__module__)
        try:
            register_model(function)
        except BaseException:
            forget(name, function.__module__)
            raise
    return function


def forget(name: str, module: str) -> None:
    """Take a name out of each of timm's tables, and out of the list of names of the module that has it."""
    with LOCK:
        for table in (getattr(timm_registry, table, {}) for table in _BY_NAME):
            table.pop(name, None)
        for held in (getattr(timm_registry, table) for table in _BY_TAG):
            for full in [full for full in list(held) if full.partition(".")[0] == name]:
                held.pop(full) if isinstance(held, dict) else held.discard(full)
        short = module.rpartition(".")[2]
        siblings = timm_registry._module_to_models.get(short)
        if siblings is not None:
            siblings.discard(name)
            if not siblings:
                # timm lists the modules that are in there.
                del timm_registry._module_to_models[short]
        listed = getattr(sys.modules.get(module), "__all__", [])
        if name in listed:
            listed.remove(name)
