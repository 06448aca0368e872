"""Ways: the methods of a block's class by which a network may run it, other than its forward.

In: a class and an observed call of it. Out: names of methods. What is deployed often goes another way than what was
trained (`self.forward = self.forward_fuse`), and an SE that is not on that way is lost.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn

from .events import Call


def stand_ins(cls: type[nn.Module], call: Call) -> tuple[str, ...]:
    """The methods that can take forward's place: they are called so, or are put there, and take what it takes.

    One that calls the forward itself is none: it runs whatever that does.
    """
    named = [name for name in dir(cls) if "forward" in name and name != "forward"]
    candidates = dict.fromkeys((*named, *put_in_place(cls)))
    return tuple(
        name
        for name in candidates
        if not hasattr(nn.Module, name)
        and isinstance(inspect.getattr_static(cls, name, None), FunctionType)
        and takes(cls, name, call)
        and "forward" not in names_in(cls, name)
    )


def own_methods(cls: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a class that are not those of every module, by name."""
    found: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in base.__dict__.items():
            method = inspect.unwrap(value) if callable(value) else value
            if isinstance(method, FunctionType):
                found.setdefault(name, method)
    return found


def put_in_place(cls: type[nn.Module]) -> list[str]:
    """The methods that others of the class put in forward's place (`self.forward = self.deployed`)."""
    return [name for method in own_methods(cls).values() for name in Switch.of(method.__code__).names]


@dataclass(frozen=True)
class Switch:
    """What a method's code puts in the place of forwards.

    Attributes:
        names: The attributes that it puts there.
        unknown: Whether it puts something else there, too.
    """

    names: tuple[str, ...] = ()
    unknown: bool = False

    @classmethod
    def of(cls, code: CodeType) -> Switch:
        """What one code object puts there."""
        by_name = "setattr" in code.co_names and "forward" in code.co_consts
        if "forward" not in code.co_names:
            return cls(unknown=by_name)
        steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
        stores = [i for i, step in enumerate(steps) if step.opname == "STORE_ATTR" and step.argval == "forward"]
        # Value, object, store: what is put there is read two steps before.
        values = [steps[i - 2] for i in stores]
        names = tuple(value.argval for value in values if value.opname in _READS)
        return cls(names, by_name or len(names) < len(values))


_NO_STEPS = frozenset({"CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL"})
_READS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})


def takes(cls: type[nn.Module], method: str, call: Call) -> bool:
    """Whether a method takes what another one was called with."""
    try:
        inspect.signature(getattr(cls, method)).bind(None, *call.args, **call.kwargs)
    except TypeError:
        return False
    return True


def names_in(cls: type[nn.Module], method: str) -> set[str]:
    """The names of the attributes that a method reads, and of those that the methods among these read."""
    found: set[str] = set()
    waiting = {method}
    while waiting:
        found |= waiting
        waiting = {name for read in waiting for code in codes(cls, read) for name in code.co_names} - found
    return found


def codes(cls: type[nn.Module], method: str) -> Iterator[CodeType]:
    """The code of a method, and where that goes on with `super()`, the code of the one that it overrides."""
    for base in (base for base in cls.__mro__ if method in base.__dict__):
        code = getattr(inspect.unwrap(base.__dict__[method]), "__code__", None)
        if code is not None:
            yield code
            if "super" not in code.co_names:
                return
