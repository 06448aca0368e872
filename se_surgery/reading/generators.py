"""Generators: random numbers of Python's and of NumPy's that a forward draws while it is traced.

In: a block and its method. Out: nothing, or an error before the first number is drawn. Both have generators for the
whole process, from which other threads draw meanwhile, so that states cannot be compared; what is called is looked at.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .bindings import LIBRARIES, library

# The modules that hold generators.
_SOURCES = {"random": "python", "secrets": "python", "numpy.random": "numpy"}
# No block leads to more functions than this; one that seems to is watched.
_MANY = 2000


@contextlib.contextmanager
def no_numbers(view: nn.Module, method: str, error: Callable[[], Exception]) -> Iterator[None]:
    """Refuse every draw from a generator of Python's or NumPy's inside, before it happens.

    What is called of Python's is looked at by a profiler of this thread. It costs a third of the time that a trace
    takes, and is on only where the functions that a method leads to name such a generator; where another profiler is
    at work, none is set. No profiler sees calls of NumPy's: a method that leads to its generators is refused for that.

    Args:
        view: The block.
        method: The method that runs inside.
        error: Makes the error.
    """
    named = sources(view, method)
    if "numpy" in named:
        raise error()
    if sys.getprofile() is not None or not named:
        yield
        return

    def watch(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and isinstance(getattr(called, "__self__", None), random.Random):
            raise error()

    try:
        sys.setprofile(watch)
        yield
        sys.setprofile(None)
    except BaseException:
        # Here and not in a `finally`, before which an interrupt may come.
        sys.setprofile(None)
        raise


def sources(view: nn.Module, method: str) -> set[str]:
    """Whose generators the functions that a method leads to name: `python`, `numpy`.

    The methods of the modules inside count by their names. Python's named too often costs time and nothing else.
    """
    classes = {cls for module in view.modules() for cls in type(module).__mro__ if library(cls) not in LIBRARIES}
    waiting: list[Any] = [vars(cls)[method] for cls in classes if method in vars(cls)]
    waiting += [value for name, value in view.__dict__.items() if name not in _MODULES_OWN]
    seen: set[int] = set()
    found: set[str] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found |= _source(value)
        if len(seen) > _MANY:
            return found | {"python"}
        waiting += _led_to(value, classes)
    return found


def _source(value: Any) -> set[str]:
    """Whose generator a value is, a method of, or a module of."""
    if isinstance(value, types.ModuleType):
        return {_SOURCES[value.__name__]} if value.__name__ in _SOURCES else set()
    owner = getattr(value, "__self__", None) if isinstance(value, _METHODS) else value
    if isinstance(owner, random.Random):
        return {"python"}
    numpy = sys.modules.get("numpy")
    is_numpys = numpy is not None and type(owner).__module__.partition(".")[0] == "numpy"
    kinds = ("RandomState", "Generator", "BitGenerator")
    return {"numpy"} if is_numpys and type(owner).__mro__[-2].__name__ in kinds else set()


def _led_to(value: Any, classes: set[type]) -> list[Any]:
    """The values that a function, or what stands for one, names."""
    function = getattr(value, "__wrapped__", None) or getattr(value, "__func__", None) or getattr(value, "func", value)
    if isinstance(function, property):
        function = function.fget
    if not isinstance(function, types.FunctionType):
        return [] if function is value else [function]
    if library(function) in LIBRARIES:
        return []
    found = _variables(function)
    names = _names(function.__code__)
    spaces: list[Any] = [vars(cls) for cls in classes]
    spaces += [vars(held) for held in found if isinstance(held, types.ModuleType) and _is_open(held)]
    found += [space[name] for name in names for space in spaces if name in space]
    if "random" in names or "secrets" in names:
        found.append(random)
    return found


def _variables(function: types.FunctionType) -> list[Any]:
    """The values of a function's global variables and of those around it."""
    found = [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it holds nothing yet
            found.append(cell.cell_contents)
    return found


def _is_open(module: types.ModuleType) -> bool:
    return module.__name__.partition(".")[0] not in LIBRARIES or module.__name__ == "numpy"


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The names in code, and in that of functions in it; a name may stand in a text, too."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


_METHODS = (types.MethodType, types.BuiltinMethodType)
_MODULES_OWN = frozenset(nn.Module().__dict__)
