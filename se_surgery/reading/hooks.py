"""Hooks: the forward hooks of a model's modules, run on a copy of it.

In: modules and their hooks. Out: what the hooks make of arguments and outputs; and which of them cannot be bound to a
copy, because they refer to something by a global variable.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .bindings import LIBRARIES, SHARED, is_open, library
from .blame import handed
from .copies import Copier

_CALLED = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)


def before_forward(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments that a module's own hooks make of those it is called with."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed = handed(hook, module, args, kwargs)  # type: ignore[arg-type, var-annotated]
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = handed(hook, module, args)  # type: ignore[arg-type]
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def after_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """What a module's own hooks make of its output."""
    for key, hook in list(module._forward_hooks.items()):
        given = (args, kwargs, output) if key in module._forward_hooks_with_kwargs else (args, output)
        changed = handed(hook, module, *given)  # type: ignore[arg-type]
        output = output if changed is None else changed
    return output


def bound_forward(module: nn.Module, copier: Copier) -> Any:
    """The forward of a copied module; one with variables around it has the same as the hooks bound by `copier`."""
    function = getattr(type(module), "forward", None)
    if "forward" in module.__dict__ or not isinstance(function, types.FunctionType) or function.__closure__ is None:
        return module.forward
    return types.MethodType(copier(function), module)


def own_hooks(modules: dict[str, nn.Module]) -> dict[str, list[Any]]:
    """The forward hooks of each module that has some."""
    found = {}
    for path, module in modules.items():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if hooks:
            found[path] = hooks
    return found


def loose_hooks(modules: dict[str, nn.Module]) -> list[str]:
    """For every hook that cannot be bound to a copy: whose it is, what it is called, and why."""
    found = []
    for path, hooks in own_hooks(modules).items():
        for hook in hooks:
            name = _loose_end(hook)
            if name:
                what = getattr(hook, "__qualname__", type(hook).__name__)
                found.append(
                    f"that of {path!r} ({what}) cannot run on a copy of the model: it uses the global {name!r}"
                )
    return found


def _loose_end(hook: Any) -> str:
    """The global variable by which a hook refers to what a copy has for itself, or nothing."""
    seen: set[Any] = set()
    waiting = list(_functions(hook))
    while waiting:
        function = waiting.pop()
        if function in seen or library(function) in LIBRARIES:
            continue
        seen.add(function)
        for name, is_assigned in _globals(function.__code__):
            value = function.__globals__.get(name)
            if is_assigned or _is_written_to(value):
                return name
            waiting += _functions(value)
    return ""


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions that calling a value runs, as far as they can be told."""
    if isinstance(value, functools.partial):
        yield from _functions(value.func)
        return
    function = getattr(value, "__func__", value)
    if not isinstance(function, _CALLED):
        function = vars(type(value)).get("__call__")
    if isinstance(function, types.FunctionType):
        yield function
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # it holds nothing yet
                if isinstance(cell.cell_contents, _CALLED) and cell.cell_contents is not value:
                    yield from _functions(cell.cell_contents)


@functools.lru_cache(maxsize=1024)
def _globals(code: types.CodeType) -> tuple[tuple[str, bool], ...]:
    """The global variables that code uses, that of functions in it too, and whether it assigns them."""
    found = [
        (str(step.argval), step.opname != "LOAD_GLOBAL")
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")
    ]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _globals(constant)
    return tuple(found)


def _is_written_to(value: Any) -> bool:
    """Whether a value is one that a hook may write to, or a module of the model."""
    if type(value) in SHARED or isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return False
    return isinstance(value, (nn.Module, Tensor, list, dict, set)) or is_open(type(value))
