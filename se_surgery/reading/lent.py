"""Lent: functions of a forward as copies that see other builtins, so that they take what a graph will know later.

In: a Python function that a trace runs. Out: the same function over its own globals, in which a name that is called
stands for its stand-in: `float(height)` becomes a part of the graph where `height` is. Nothing that others see is
changed, and what is not called (`isinstance(x, float)` reads `float` only) is itself.
"""

from __future__ import annotations

import builtins
import dis
import sys
import types
from collections.abc import Callable
from typing import Any

from .blame import handed
from .outer import is_foreign

# Finds what stands for a callable, or None.
StandIn = Callable[[Any], Any]
# How many values besides its arguments a call takes off the stack, before Python 3.11.
_CALLS = {"CALL_FUNCTION": 1, "CALL_FUNCTION_KW": 2}
# Modules of others in which there are functions that have stand-ins.
_LENDING = frozenset({"torch", "math"})


def opcode(frame: types.FrameType) -> tuple[str, int]:
    """The name and the argument of the instruction that a frame is at."""
    code, place = frame.f_code.co_code, frame.f_lasti
    # Where Python runs a method in the place of an instruction, it is at the end of what that caches.
    while dis.opname[code[place]] == "CACHE":
        place -= 2
    return dis.opname[code[place]], code[place + 1]


def is_called(frame: types.FrameType) -> bool:
    """Whether what a frame is about to read, by a name or of an object, is to be called."""
    name, argument = opcode(frame)
    if name == "LOAD_METHOD":
        return True
    if name == "LOAD_ATTR":
        return sys.version_info >= (3, 12) and bool(argument & 1 or _is_followed_by_null(frame))
    if name not in ("LOAD_GLOBAL", "LOAD_NAME"):
        return False
    return bool(argument & 1) if sys.version_info >= (3, 11) else _is_callee(frame)


def _is_followed_by_null(frame: types.FrameType) -> bool:
    """Whether the next instruction makes room for a call, which Python 3.13 has behind `module.name`."""
    steps = dis.get_instructions(frame.f_code)
    return next((step.opname == "PUSH_NULL" for step in steps if step.offset > frame.f_lasti), False)


def _is_callee(frame: types.FrameType) -> bool:
    """The same for a name, from what becomes of it: before Python 3.11 the instruction does not say."""
    depth = 1
    for step in dis.get_instructions(frame.f_code):
        if step.offset <= frame.f_lasti:
            continue
        if step.opname in _CALLS and (step.arg or 0) + _CALLS[step.opname] == depth:
            return True
        if step.opname == "CALL_FUNCTION_EX" and ((step.arg or 0) & 1) + 2 == depth:
            return True
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if depth < 1 or step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            return False
    return False


class Lender:
    """Makes the copies for one trace.

    Args:
        stand_in: Finds what stands for a callable.
    """

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in
        self._functions: dict[int, tuple[Any, Any]] = {}
        self._spaces: dict[int, _Globals] = {}

    def function(self, function: Any) -> Any:
        """The copy of a function, or the function itself where it is none of a user's."""
        if not isinstance(function, types.FunctionType) or is_foreign(function.__globals__.get("__name__")):
            return function
        if id(function) not in self._functions:
            self._functions[id(function)] = function, self._copy(function)
        return self._functions[id(function)][1]

    def method(self, method: Any) -> Any:
        """The copy of a bound method of a module, or what it is otherwise."""
        if not isinstance(method, types.MethodType):
            return method
        copy = self.function(method.__func__)
        return method if copy is method.__func__ else types.MethodType(copy, method.__self__)

    def value(self, value: Any, is_called: bool) -> Any:
        """What a name stands for in a copy."""
        if isinstance(value, types.ModuleType):
            return self._module(value, is_called)
        if not is_called:
            return value
        found = self.stand_in(value)
        return self.function(value) if found is None else found

    def written(self) -> str | None:
        """The name of a global variable that one of the copies has assigned to, or None."""
        names = (space.written() for space in self._spaces.values())
        return next((name for name in names if name is not None), None)

    def _copy(self, function: types.FunctionType) -> types.FunctionType:
        space = function.__globals__
        if id(space) not in self._spaces:
            self._spaces[id(space)] = _Globals(space, self)
        copy = types.FunctionType(
            function.__code__,
            self._spaces[id(space)],
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__dict__.update(function.__dict__)
        return copy

    def _module(self, module: types.ModuleType, is_called: bool) -> Any:
        if module.__name__ not in _LENDING and is_foreign(module.__name__):
            return module
        return _Module(module, self, is_called)


class _Globals(dict[str, Any]):
    """The globals of copies of functions: those of the functions, read when they are asked for."""

    def __init__(self, space: dict[str, Any], lender: Lender) -> None:
        super().__init__(space)
        self._space = space
        self._lender = lender
        self._begun = dict(space)

    def __getitem__(self, name: str) -> Any:
        space = self._space if name in self._space else vars(builtins)
        return self._lender.value(space[name], is_called(sys._getframe(1)))

    def written(self) -> str | None:
        """The name of a variable that was assigned to here, or None."""
        return next((name for name in self if self.get(name) is not self._begun.get(name)), None)


class _Module(types.ModuleType):
    """A Python module whose functions are lent, too.

    Python 3.11 says where the module's name is read that something of the module will be called.
    """

    def __init__(self, module: types.ModuleType, lender: Lender, is_called: bool) -> None:
        super().__init__(module.__name__)
        object.__setattr__(self, "_lent", (module, lender, is_called))

    def __getattribute__(self, name: str) -> Any:
        module, lender, is_head = object.__getattribute__(self, "_lent")
        frame = sys._getframe(1)
        is_last = is_called(frame) or (is_head and opcode(frame)[0] == "LOAD_ATTR")
        return lender.value(handed(getattr, module, name), is_last)
