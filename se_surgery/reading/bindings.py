"""Bindings: what refers to something else, made to refer to its copy.

In: a bound method, a partial, a closure, a reference or a small object, and the copier that is under way. Out: one that
refers to the copies; or the same one where it refers to nothing that is copied.
"""

from __future__ import annotations

import collections
import functools
import random
import sys
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .copies import Copier

# What is the same in every copy: no forward can write to it.
SHARED = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, type, range, slice, type(Ellipsis), type(NotImplemented)),
        *(types.ModuleType, types.CodeType, types.GeneratorType),
        *(torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout),
    }
)
# Ways of an object to be copied or to end that are its own: it is shared.
_OWN_WAYS = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__del__")
# Objects and closures of these are not about one model.
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}
# Objects that lead to more values than this are no part of a model: a trainer, a data set.
_SMALL = 2000


def copy_method(copier: Copier, method: types.MethodType) -> Any:
    """A method of a module or object, which is its copy's."""
    owner, function = copier(method.__self__), copier(method.__func__)
    if owner is method.__self__ and function is method.__func__:
        return method
    return copier.keep(method, types.MethodType(function, owner))


def copy_builtin(copier: Copier, method: types.BuiltinMethodType) -> Any:
    """A method of a container (`kept.append`), which is its copy's, or a function of a module written in C."""
    owner = method.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return method
    other = copier(owner)
    return method if other is owner else copier.keep(method, getattr(other, method.__name__))


def copy_partial(copier: Copier, partial: functools.partial[Any]) -> Any:
    """A partial of the copies of what it was made of."""
    function, args = copier(partial.func), tuple(map(copier, partial.args))
    keywords = {name: copier(value) for name, value in partial.keywords.items()}
    new, old = (function, *args, *keywords.values()), (partial.func, *partial.args, *partial.keywords.values())
    if all(one is other for one, other in zip(new, old, strict=True)):
        return partial
    return copier.keep(partial, type(partial)(function, *args, **keywords))


def copy_function(copier: Copier, function: types.FunctionType) -> Any:
    """A function that refers to what is copied, by its closure or its defaults, refers to the copies.

    Which of them changes is not asked: of two functions that share a variable one may read what the other assigns.
    """
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    is_bound = function.__closure__ is not None or not all(type(value) in SHARED for value in given)
    if not is_bound or library(function) in LIBRARIES:
        return function
    cells = tuple(map(copier, function.__closure__ or ()))
    made = copier.memo.get(id(function))
    if made is not None:
        # One of its variables has led back to it.
        return made[1]
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    copier.keep(function, copy)
    copy.__defaults__ = copier(function.__defaults__)
    copy.__kwdefaults__ = copier(function.__kwdefaults__)
    copy.__dict__.update(function.__dict__)
    copy.__qualname__, copy.__module__, copy.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return copy


def copy_cell(copier: Copier, cell: types.CellType) -> types.CellType:
    """A variable of closures, with what it holds."""
    copy: types.CellType = copier.keep(cell, types.CellType())
    try:
        content = cell.cell_contents
    except ValueError:  # empty: its variable has not been assigned yet
        return copy
    copy.cell_contents = copier(content)
    return copy


def copy_reference(copier: Copier, reference: weakref.ref[Any]) -> Any:
    """A weak reference to a module, as a child has one to its parent."""
    owner = reference()
    return copier.keep(reference, weakref.ref(copier(owner))) if isinstance(owner, nn.Module) else reference


def copy_proxy(copier: Copier, proxy: Any) -> Any:
    """A weak proxy of a module."""
    try:
        owner = proxy.__repr__.__self__
    except ReferenceError:  # what it stood for is gone
        return proxy
    return copier.keep(proxy, weakref.proxy(copier(owner))) if isinstance(owner, nn.Module) else proxy


def copy_namespace(copier: Copier, value: types.SimpleNamespace) -> types.SimpleNamespace:
    """A namespace with its values."""
    copy: types.SimpleNamespace = copier.keep(value, types.SimpleNamespace())
    copy.__dict__.update((name, copier(item)) for name, item in value.__dict__.copy().items())
    return copy


def copy_numbers(copier: Copier, generator: random.Random) -> random.Random:
    """A generator of Python's, in the same state."""
    copy: random.Random = copier.keep(generator, type(generator)())
    copy.setstate(generator.getstate())
    return copy


def copy_generator(copier: Copier, generator: torch.Generator) -> torch.Generator:
    """A generator of torch's, in the same state."""
    copy: torch.Generator = copier.keep(generator, torch.Generator(generator.device))
    copy.set_state(generator.get_state())
    return copy


def copy_object(copier: Copier, value: Any) -> Any:
    """A small object that is no more than its attributes; a large one is shared."""
    if not _is_small(value):
        return copier.keep(value, value)
    try:
        copy = object.__new__(type(value))
    except TypeError:  # it holds something beside its attributes
        return copier.keep(value, value)
    copier.keep(value, copy)
    if hasattr(value, "__dict__"):
        copy.__dict__.update((name, copier(item)) for name, item in value.__dict__.copy().items())
    copy_slots(copier, value, copy)
    return copy


def copy_slots(copier: Copier, value: Any, copy: Any) -> None:
    """Give a copy what the original has in slots."""
    for slot in _slots(type(value)):  # type: ignore[arg-type]
        if hasattr(value, slot):
            object.__setattr__(copy, slot, copier(getattr(value, slot)))


# By class, each of which goes when its user lets go of it.
_known_slots: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _slots(kind: type[Any]) -> tuple[str, ...]:
    """The attributes that objects of a class have in slots."""
    known = _known_slots.get(kind)
    if known is None:
        known = _known_slots[kind] = _slots_in(kind)
    return known


def _slots_in(kind: type[Any]) -> tuple[str, ...]:
    """The slots of a class, under the names that a class makes of private ones."""
    found = []
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{cls.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def library(value: Any) -> str:
    """The package that a function or class is from."""
    return str(value.__module__).partition(".")[0]


def is_open(kind: type) -> bool:
    """Whether objects of a class are no more than their attributes, and may be copied by these."""
    own_way = any(name in cls.__dict__ for cls in kind.__mro__[:-1] for name in _OWN_WAYS)
    return not own_way and library(kind) not in LIBRARIES


def _is_small(value: Any) -> bool:
    """Whether an object leads to few values beside modules and tensors."""
    seen: set[int] = set()
    waiting = [value]
    while waiting and len(seen) <= _SMALL:
        one = waiting.pop()
        if type(one) not in SHARED and id(one) not in seen:
            waiting.extend(_held(one))
        seen.add(id(one))
    return not waiting


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, (nn.Module, Tensor)):
        return iter(())
    if isinstance(value, dict):
        return iter([*value.keys(), *value.values()][: _SMALL + 1])
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return iter(list(value)[: _SMALL + 1])
    return iter(list(vars(value).values()) if hasattr(value, "__dict__") and is_open(type(value)) else ())
