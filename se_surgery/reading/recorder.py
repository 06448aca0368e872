"""Recorder: what notes calls and events while a model runs, and holds the model still meanwhile.

In: the modules of a model. Out: the calls and events of one forward, under hooks of this library alone and, unless it
runs for real, on the meta device; the modules are as they were afterwards, whatever happens.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .effects import is_container
from .events import KINDS, MAXIMA, Call, Event, is_gate, is_like_first, is_map


class Recorder(TorchFunctionMode):
    """Notes events and calls while a model runs."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real
        self.clock = 0
        self.stack: list[Call] = []
        self.events: list[Event] = []
        self.calls: dict[str, list[Call]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(function)
        kwargs = kwargs or {}
        if kind is None:
            return function(*args, **kwargs)
        result = args[0] if not self.real and is_like_first(function, args) else function(*args, **kwargs)
        value = result[0] if isinstance(result, tuple) and result else result
        if isinstance(value, Tensor) and self.stack:
            if function in MAXIMA and not (len(args) > 1 and isinstance(args[1], Tensor)):
                kind = "squeeze"
            self._note(kind, args, kwargs, value)
        return result

    def _note(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        extra: dict[str, Any] = {}
        if kind == "conv":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            given = args[0] if args else kwargs["input"]
            channels = given.shape[1 - len(weight.shape)] if given.dim() < weight.dim() else given.shape[1]
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            extra = {"kernel": tuple(weight.shape[2:]), "groups": groups, "channels": channels}
            extra["alone"] = given.dim() in (4, 5) and not is_map(given.shape)
        if kind in ("conv", "linear"):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            extra["macs"] = math.prod(result.shape[1:]) * math.prod(weight.shape[1:])
        if kind == "gate" and not is_gate(args, result):
            return
        if kind == "add" and (len(args) < 2 or not isinstance(args[1], Tensor)):
            return
        self.clock += 1
        self.events.append(Event(self.clock, kind, self.stack[-1].path, tuple(result.shape), **extra))

    def enter(self, path: str) -> Callable[..., None]:
        """The hook that runs before a module's forward."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clock += 1
            parent = self.stack[-1] if self.stack else None
            call = Call(path, self.clock, to_meta(args), to_meta(kwargs), parent=parent)
            self.calls.setdefault(path, []).append(call)
            if parent is not None:
                parent.children.append(call)
            self.stack.append(call)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook that runs after a module's forward."""
        self.clock += 1
        call = self.stack.pop()
        call.end = self.clock
        call.output = to_meta(output)


def to_meta(value: Any) -> Any:
    """`value` with its tensors on the meta device, so that a record holds no memory."""
    if isinstance(value, Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if value is None or isinstance(value, (int, float, str)):
        return value
    if type(value) in (tuple, list):
        return type(value)(to_meta(item) for item in value)
    if type(value) is dict:
        return {key: to_meta(item) for key, item in value.items()}
    return pytree.tree_map_only(Tensor, to_meta, value)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_OWN = frozenset(nn.Module().__dict__)
# Those that register_module_forward_hook and its like keep for all modules of the process.
_GLOBAL_HOOKS = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)


@contextlib.contextmanager
def on_the_table(modules: dict[str, nn.Module], recorder: Recorder) -> Iterator[None]:
    """Hold the modules in evaluation mode, on the meta device and under the recorder's hooks only; then undo it all."""
    saved = [(module, dict(module.__dict__)) for module in modules.values()]
    for_all = [(hooks, dict(hooks)) for hooks in _GLOBAL_HOOKS]
    # Parameters shared between modules stay shared.
    seen: dict[int, Tensor] = {}

    def meta(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in seen:
            seen[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=False)
        return seen[id(tensor)]

    try:
        for hooks, _ in for_all:
            hooks.clear()
        for path, module in modules.items():
            state = module.__dict__
            state["training"] = False
            # What a forward appends to or sets in a container of its own goes with the copy.
            state.update({k: copy.copy(v) for k, v in state.items() if k not in _OWN and is_container(v)})
            state.update({name: OrderedDict() for name in (*_HOOKS, *_HOOK_FLAGS) if name in state})
            state["_forward_pre_hooks"] = OrderedDict({0: recorder.enter(path)})
            state["_forward_pre_hooks_with_kwargs"] = OrderedDict({0: True})
            state["_forward_hooks"] = OrderedDict({0: recorder.leave})
            if recorder.real:
                continue
            for group in ("_parameters", "_buffers"):
                if state[group]:
                    state[group] = {name: None if t is None else meta(t) for name, t in state[group].items()}
            state.update({name: meta(value) for name, value in state.items() if isinstance(value, Tensor)})
        yield
    finally:
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
        for hooks, registered in for_all:
            hooks.update(registered)
