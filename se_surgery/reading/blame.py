"""Blame: whose an error is that came out of code of others which this library runs.

In: an error. Out: whether this library's own code raised it, by the frames that it came through. What a model's own
code raises says that the model does not take this input, or cannot be traced; an error of this library's says nothing
of the model, and has to come out as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0] + "."
_LOOKING = __name__.rpartition(".")[0] + "."
_NETWORKS = _PACKAGE + "backbones."
# Python's own and torch's functions work for whoever calls them.
_WORKING = (sys.stdlib_module_names | {"torch"}) - {"__main__"}


def handed(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of others returns: from here on it is they who raise errors, until they call us again."""
    return function(*args, **kwargs)


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by code of this library, or by a function of torch's or Python's at work for it.

    Looking calls models by `handed` alone. What a rewritten block calls of this library is ours as well; the networks
    in `backbones` are models as any other.
    """
    ours = around = False
    trail = error.__traceback__
    while trail is not None:
        name = str(trail.tb_frame.f_globals.get("__name__"))
        if trail.tb_frame.f_code is handed.__code__:
            ours = around
        elif name.startswith(_LOOKING):
            ours = True
        elif name.startswith(_PACKAGE) and not name.startswith(_NETWORKS):
            ours = around = True
        elif name.partition(".")[0] not in _WORKING:
            ours = around = False
        trail = trail.tb_next
    return ours
