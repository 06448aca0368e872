"""Copies: a model's modules as others that share nothing with them that a forward could write to.

In: a module. Out: a copy of it and of all that it refers to, on the meta device or with the same values. Nothing of the
original is written, not even for a moment: another thread may run or train it meanwhile.

What refers to a module, a tensor or a container refers to its copy in the copy: attributes, containers, bound methods,
partials, closures and small objects. Everything else is shared, and so is what no rule here knows.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import random
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .bindings import (
    SHARED,
    copy_builtin,
    copy_cell,
    copy_function,
    copy_generator,
    copy_method,
    copy_namespace,
    copy_numbers,
    copy_object,
    copy_partial,
    copy_proxy,
    copy_reference,
    copy_slots,
    is_open,
)
from .shapes import like

# What hooks of a module's own are in; they are blanked unless they are asked for.
_HOOKS = frozenset(
    {
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
)
# Hooks of the backward pass and of state dicts, which no forward of a copy comes to.
_NEVER = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
# Where a module keeps what is registered with it.
_GROUPS = frozenset({"_parameters", "_buffers", "_modules"})
_WRITTEN = frozenset({dict, list, set, collections.OrderedDict})
# What `torch.compile` and this library's looking keep on a module stands for the original's forward.
_LEFT_OUT = frozenset({"_compiled_call_impl"})

Rule = Callable[["Copier", Any], Any]


def copied_on(model: nn.Module, device: str | None = "meta", hooks: bool = False) -> nn.Module:
    """A copy of a module and of everything that it refers to.

    Args:
        model: The module; it is only read.
        device: `meta` for tensors without values, or None for the same ones: parameters share their values with the
            model's, buffers and other tensors have them for themselves.
        hooks: Whether the copy has the forward hooks of the modules, bound to the copy.

    Examples:
        >>> copied_on(timm.create_model("resnet18")).conv1.weight.device
        device(type='meta')
    """
    copy: nn.Module = Copier(device, hooks)(model)
    return copy


class Copier:
    """Copies values so that what is shared between them stays shared; `self.memo` has the copies by the originals' id.

    Args:
        device: As for `copied_on`.
        hooks: As for `copied_on`.
    """

    def __init__(self, device: str | None = "meta", hooks: bool = False) -> None:
        self.device = device
        self.blank = _NEVER if hooks else _NEVER | _HOOKS
        # Each original is kept with its copy: another thread may let go of it, and its id would be another's.
        self.memo: dict[int, tuple[Any, Any]] = {}
        # Those of a user's classes go with the copier, so that the classes can go, too.
        self.rules = dict(_RULES)

    def __call__(self, value: Any) -> Any:
        """The copy of a value, or the value itself where it may be shared."""
        kind = type(value)
        if kind in SHARED:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known[1]
        rule = self.rules.get(kind)
        if rule is None:
            rule = self.rules[kind] = _rule_for(kind)
        return rule(self, value)

    def keep(self, value: Any, copy: Any) -> Any:
        """Note a copy before what is in it is copied: that may lead back here."""
        self.memo[id(value)] = value, copy
        return copy

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of a module that has been copied."""
        copy: nn.Module = self.memo[id(module)][1]
        return copy

    @contextlib.contextmanager
    def undoing(self) -> Iterator[None]:
        """Undo what is written to attributes and containers of the copies inside; what is in tensors stays."""
        kept = [(space, space.copy() if space else ()) for space in self._spaces()]
        try:
            yield
        finally:
            for space, contents in kept:
                if space or contents:
                    space.clear()
                    (space.extend if isinstance(space, list) else space.update)(contents)

    def _spaces(self) -> Iterator[Any]:
        """The dicts, lists and sets of the copies, those of their attributes among them."""
        for original, copy in self.memo.values():
            kind = type(copy)
            if kind is nn.Parameter or kind is Tensor or copy is original:
                continue
            if kind in _WRITTEN:
                yield copy
            elif isinstance(copy, nn.Module):
                state = copy.__dict__
                yield state
                yield from (state[group] for group in _GROUPS if state.get(group))
            elif kind is types.SimpleNamespace or (hasattr(copy, "__dict__") and is_open(kind)):
                yield copy.__dict__


def _rule_for(kind: type) -> Rule:
    """The rule for values of a type."""
    for base, rule in _FAMILIES:
        if issubclass(kind, base):
            return rule
    return copy_object if is_open(kind) else _same


def _same(copier: Copier, value: Any) -> Any:
    return value


def _module(copier: Copier, module: nn.Module) -> nn.Module:
    copy = copier.keep(module, object.__new__(type(module)))
    state, blank = copy.__dict__, copier.blank
    # Methods of `dict` alone are not interrupted by other threads.
    for name, value in module.__dict__.copy().items():
        if type(value) in SHARED:
            state[name] = value
        elif name in blank:
            state[name] = collections.OrderedDict()
        elif name in _GROUPS:
            state[name] = _group(copier, value)
        elif name not in _LEFT_OUT:
            state[name] = copier(value)
    copy_slots(copier, module, copy)
    return copy  # type: ignore[no-any-return]


def _group(copier: Copier, group: dict[str, Any]) -> dict[str, Any]:
    """What is registered with a module; no other module has the same dict."""
    copy = type(group)()
    for name, item in group.copy().items():
        copy[name] = None if item is None else copier(item)
    return copy


def _tensor(copier: Copier, tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter):  # one of another class
        return _parameter(copier, tensor)
    if copier.device == "meta":
        return copier.keep(tensor, like(tensor))  # type: ignore[no-any-return]
    return copier.keep(tensor, tensor.detach().clone())  # type: ignore[no-any-return]


def _parameter(copier: Copier, parameter: Tensor) -> Tensor:
    values = like(parameter) if copier.device == "meta" else parameter.detach()
    return copier.keep(parameter, nn.Parameter(values, parameter.requires_grad))  # type: ignore[no-any-return]


def _dict(copier: Copier, value: dict[Any, Any]) -> Any:
    copy: dict[Any, Any] = copier.keep(value, {})
    for key, item in value.copy().items():
        copy[copier(key)] = item if type(item) in SHARED else copier(item)
    return copy


def _list(copier: Copier, value: list[Any]) -> Any:
    copy: list[Any] = copier.keep(value, [])
    copy.extend(map(copier, value.copy()))
    return copy


def _set(copier: Copier, value: set[Any]) -> Any:
    copy: set[Any] = copier.keep(value, set())
    copy.update(map(copier, value.copy()))
    return copy


def _tuple(copier: Copier, value: tuple[Any, ...]) -> Any:
    items = tuple(map(copier, value))
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    made = copier.memo.get(id(value))
    if made is not None:
        # What is in it has led back to it.
        return made[1]
    if type(value) is tuple:
        return copier.keep(value, items)
    return copier.keep(value, type(value)._make(items) if hasattr(value, "_make") else type(value)(items))


def _container(copier: Copier, value: Any) -> Any:
    """A container of another class: its own copy, filled anew."""
    copy = copier.keep(value, value.copy())
    if isinstance(value, dict):
        items = [(copier(key), copier(item)) for key, item in dict(value).items()]
        dict.clear(copy)
        for key, item in items:
            dict.__setitem__(copy, key, item)
        return copy
    items = [copier(item) for item in value.copy()]
    copy.clear()
    (copy.update if isinstance(value, set) else copy.extend)(items)
    return copy


def _ordered(copier: Copier, value: collections.OrderedDict[Any, Any]) -> Any:
    copy: collections.OrderedDict[Any, Any] = copier.keep(value, collections.OrderedDict())
    for key, item in value.copy().items():
        copy[copier(key)] = copier(item)
    return copy


# The rules by type; a copier finds those of further types when it first meets them.
_RULES: dict[type, Rule] = {
    nn.Parameter: _parameter,
    Tensor: _tensor,
    dict: _dict,
    list: _list,
    set: _set,
    tuple: _tuple,
    collections.OrderedDict: _ordered,
    types.CellType: copy_cell,
    types.SimpleNamespace: copy_namespace,
    random.Random: copy_numbers,
    torch.Generator: copy_generator,
    weakref.ProxyType: copy_proxy,
    weakref.CallableProxyType: copy_proxy,
}
_FAMILIES: tuple[tuple[Any, Rule], ...] = (
    (nn.Module, _module),
    (Tensor, _tensor),
    ((enum.Enum, type), _same),
    (tuple, _tuple),
    ((dict, list, set, collections.deque), _container),
    (types.MethodType, copy_method),
    ((types.BuiltinMethodType, types.MethodWrapperType), copy_builtin),
    (types.FunctionType, copy_function),
    (functools.partial, copy_partial),
    (weakref.ref, copy_reference),
)
