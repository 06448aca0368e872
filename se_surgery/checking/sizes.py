"""Sizes: whether a block's forward may do something else at another width, or on maps of another size.

In: a function of torch that ran, or a method. Out: whether it tells the size of a tensor or the width of a layer. What
is asked of tensors is seen when the forward runs, and what is read of layers in the code that it may run: a forward
that does neither does the same for blocks of all widths.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..reading.outer import Names, content_of, is_foreign, names_in
from .alike import WIDTHS

# What is told by these is the same at all widths.
_ASKED = ("dim", "ndimension", "is_contiguous", "is_floating_point", "is_complex")
_READ = ("ndim", "dtype", "device", "layout", "requires_grad", "is_meta", "is_cuda")
_SAME = frozenset(getattr(Tensor, name) for name in _ASKED) | frozenset(getattr(Tensor, name).__get__ for name in _READ)
# What reads an attribute by a name that cannot be seen in the code.
_UNSEEN = frozenset({"getattr", "vars", "__dict__", "__getattribute__", "attrgetter"})


def tells_a_size(function: Any, result: Any) -> bool:
    """Whether a function of torch put out what may go by sizes: numbers, or as many tensors as there are parts."""
    return not isinstance(result, Tensor) and result is not None and function not in _SAME


def names_a_width(cls: type[nn.Module], method: str) -> bool:
    """Whether a method, or a function or method that it may call, names a width of torch's layers."""
    waiting, seen = list(_versions(cls, method)), set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        names = names_in(function.__code__)
        if names.mentioned & (WIDTHS | _UNSEEN):
            return True
        for name in names.mentioned:
            waiting += _versions(cls, name)
        waiting += _functions(function, names)
    return False


def _versions(cls: type[nn.Module], name: str) -> Iterator[types.FunctionType]:
    """The functions by a name of a class and of those that it inherits from, whichever of them runs."""
    for base in cls.__mro__:
        raw = base.__dict__.get(name) if base is not nn.Module else None
        inner = next((part for part in ("fget", "func", "__func__") if hasattr(raw, part)), None)
        found: Any = getattr(raw, inner) if inner is not None else raw
        function = inspect.unwrap(found)
        if isinstance(function, types.FunctionType):
            yield function


def _functions(function: types.FunctionType, names: Names) -> Iterator[types.FunctionType]:
    """The functions of users that a function names, by way of its module and its closure."""
    values = [content_of(cell) for cell in function.__closure__ or ()]
    for name, chain in names.outer:
        value = function.__globals__.get(name)
        for attribute in chain:
            if not isinstance(value, (types.ModuleType, type)):
                break
            value = getattr(value, attribute, None)
        values.append(value)
    for value in values:
        if isinstance(value, types.FunctionType) and not is_foreign(value.__module__):
            yield value
