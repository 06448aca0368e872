"""Leads: whether a callable runs an operated block's generated methods in the end, however it is wrapped.

In: a block, its generated methods, and what is to take the place of one. Out: the names of those that it leads to.
Hooks of others, compilers, `functools.partial`, decorators and lambdas hold what they wrap in a place that can be
looked into; what cannot be found there counts as not called.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..reading.outer import content_of
from ..records import implants
from .gone import Gone

# How many objects a wrapper is followed through before it counts as leading nowhere.
_FAR = 500


class Leads:
    """Whether a callable runs a block's generated methods in the end, however it is wrapped.

    Args:
        block: The block.
        ways: The block's generated methods by name.
        name: The method whose place the callable takes; reading that one from the block leads back to the callable.
    """

    def __init__(self, block: nn.Module, ways: dict[str, FunctionType], name: str) -> None:
        self.block = block
        self.ways = ways
        self.name = name
        self.ses = {implant.name for implant in implants(block)}

    def found(self, value: Any) -> set[str]:
        """The names of the generated methods that a callable leads to."""
        found: set[str] = set()
        # What is near comes first: behind a compiler's wrapper there is the whole compiler.
        waiting, seen = deque([(value, False)]), {id(self.block): self.block}
        while waiting and len(seen) < _FAR:
            one, bound = waiting.popleft()
            if id(one) in seen:
                continue
            seen[id(one)] = one
            found |= {name for name, way in self.ways.items() if one is way}
            if isinstance(one, FunctionType) and one not in self.ways.values():
                found |= self._read_by(one, bound)
            waiting += self._behind(one, bound)
        return found

    def _behind(self, one: Any, bound: bool) -> Iterator[tuple[Any, bool]]:
        """What a callable holds that it may call, and whether it gives the block to it."""
        if isinstance(one, MethodType):
            mine = one.__self__ is self.block
            # The same method of another block runs that one's SEs.
            if mine or not isinstance(one.__self__, nn.Module):
                yield one.__func__, mine
            if not mine:
                yield from ((value, False) for value in _held(one.__self__))
        elif isinstance(one, functools.partial):
            yield one.func, one.args[:1] == (self.block,)
            yield from ((value, False) for value in (*one.args, *one.keywords.values()))
        elif isinstance(one, Gone):
            yield one.before, False
        elif isinstance(one, weakref.ReferenceType):
            yield one(), False
        elif isinstance(one, (list, tuple)):
            yield from ((value, False) for value in one)
        elif isinstance(one, FunctionType) and one not in self.ways.values():
            yield from ((value, False) for value in self._around(one))
        elif callable(one) and not isinstance(one, (type, nn.Module, FunctionType)):
            yield from ((value, False) for value in (*_held(one), inspect.getattr_static(type(one), "__call__")))

    def _around(self, function: FunctionType) -> Iterator[Any]:
        """What a function closes over, and what it reads of its module and of the block by name."""
        yield from (content_of(cell) for cell in function.__closure__ or ())
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from vars(function).values()
        names = _names(function.__code__)
        yield from (function.__globals__[name] for name in names if callable(function.__globals__.get(name)))
        yield from (value for name, value in vars(self.block).items() if name in names and name != self.name)

    def _read_by(self, function: FunctionType, bound: bool) -> set[str]:
        """The generated methods that a function reads from the block or its class; its SEs count as all of them."""
        code = function.__code__
        variables = dict(zip(code.co_freevars, map(content_of, function.__closure__ or ()), strict=False))
        defaults = function.__defaults__ or ()
        variables |= zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=False)
        if bound and code.co_argcount:
            variables[code.co_varnames[0]] = self.block
        mine = {name for name, value in variables.items() if value is self.block}
        read = set(_attributes_of(code, mine)) if mine else set()
        if self.ses and self.ses <= read:
            return set(self.ways)
        by_class = {name for name in self.ways if ("type", name) in _pairs(code)} if mine else set()
        return (read & self.ways.keys() - {self.name}) | by_class


def _held(one: Any) -> list[Any]:
    """The callables that an object holds as attributes."""
    return [value for value in getattr(one, "__dict__", {}).values() if callable(value)]


def _names(code: CodeType) -> set[str]:
    """The names, and the strings, in a function's code and in the functions that it defines."""
    names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return names.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]


def _attributes_of(code: CodeType, variables: set[str]) -> Iterator[str]:
    """The attributes that a code reads from some of its variables."""
    steps = _steps(code)
    for step, following in itertools.pairwise(steps):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname.startswith(_LOADS) and names[-1] in variables and following.opname in _READS:
            yield following.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _attributes_of(inner, variables & set(inner.co_freevars))


def _pairs(code: CodeType) -> set[tuple[str, str]]:
    """The attributes that a code reads from a class: `type(self).forward`, `self.__class__.forward`."""
    if "super" in code.co_names or not {"type", "__class__"} & set(code.co_names):
        return set()
    steps = _steps(code)
    pairs = itertools.pairwise(steps)
    return {
        ("type", str(following.argval))
        for step, following in pairs
        if following.opname in _READS and (step.opname.startswith("CALL") or step.argval == "__class__")
    }


_NO_STEPS = frozenset({"CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL", "PUSH_NULL"})
_READS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")
