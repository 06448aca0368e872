"""Recorder: what notes calls and events while a copy of a model runs.

In: the modules of a copy (see `copies`). Out: the calls and events of one forward. Hooks of the modules run only where
they are asked for, and those that are global never; nothing that other threads see is changed for it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodWrapperType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .axes import Axes
from .blame import handed
from .copies import Copier
from .dataflow import Dataflow
from .draws import Undrawn
from .events import KINDS, MAXIMA, Call, Event, functions, is_gate, is_in_place, is_like_first, is_sum
from .hooks import after_forward, before_forward, bound_forward
from .maps import SIGNALS, Maps
from .shapes import like, worked_out

# What tells something of a tensor that is none.
_ASKING = functions("dim", "size", "numel", "stride", "is_contiguous", "is_floating_point")
# What makes a new map of maps.
_NEW = frozenset({"conv", "norm", "linear", "pool", "squeeze", "gate", "add"})
# Attributes of a tensor that are the same tensor turned.
_TURNED = frozenset({"T", "mT", "H", "mH"})


@dataclass(frozen=True)
class Failure:
    """A function of torch's that raised an error, and what it was given."""

    error: Exception
    function: Any
    args: Any
    kwargs: Any

    def comes_again(self) -> bool:
        """Whether it fails on tensors with values, too: then it is about shapes and not about the meta device."""

        def real(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

        args, kwargs = pytree.tree_map_only(Tensor, real, (self.args, self.kwargs))
        try:
            with torch.no_grad():
                self.function(*args, **kwargs)
        except MemoryError:
            raise
        except Exception:
            return True
        return False


class Recorder(TorchFunctionMode):
    """Notes events and calls while a model runs.

    Args:
        real: Whether it runs on tensors with values.
        ranks: The ranks of its maps.
    """

    def __init__(self, real: bool, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.real = real
        self.ranks = ranks
        self.axes = Axes() if ranks == SIGNALS else None
        self._maps = Maps(ranks)
        self.failure: Failure | None = None
        self._undrawn = Undrawn()
        self.clock = 0
        self.stack: list[Call] = []
        self.events: list[Event] = []
        self.calls: dict[str, list[Call]] = {}
        self.flow = Dataflow(self.is_map, self.is_gate)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(function)
        kwargs = kwargs or {}
        if type(function) is MethodWrapperType:  # what reads `shape`, `dtype` and the like
            result = handed(function, *args, **kwargs)
            if getattr(function.__self__, "__name__", "") in _TURNED:
                self._turn(function, args, kwargs, result)
            return result
        if function in _ASKING:
            return handed(function, *args, **kwargs)
        if kind is not None and not self.real and is_like_first(function, args):
            # A value is known by the identity of its tensor.
            result = args[0] if is_in_place(function, args, kwargs) else like(args[0])
        else:
            result = self._run(function, kind, args, kwargs)
        value = result[0] if isinstance(result, tuple) and result else result
        if self.axes is not None:
            self.axes.follow(function, args, kwargs, result)
        if self.stack:
            event = None
            if kind is not None and isinstance(value, Tensor):
                if function in MAXIMA and not (len(args) > 1 and isinstance(args[1], Tensor)):
                    kind = "squeeze"
                event = self._note(kind, args, kwargs, value)
            self._follow(function, kind, args, kwargs, result, event)
        return result

    def _turn(self, function: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        """Note an attribute of a tensor that is the same tensor turned."""
        if self.axes is not None:
            self.axes.follow(function, args, kwargs, result)
        if self.stack:
            self._follow(torch.transpose, None, args, kwargs, result, None)

    def _run(self, function: Any, kind: str | None, args: Any, kwargs: Any) -> Any:
        """Run a function of torch's; one that fails is remembered."""
        try:
            if kind is None or self.real:  # it may draw
                return self._undrawn.run(function, args, kwargs)
            is_new = kind in _NEW and not is_in_place(function, args, kwargs)
            return worked_out(function, args, kwargs) if is_new else handed(function, *args, **kwargs)
        except Exception as error:
            self.failure = Failure(error, function, args, kwargs)
            raise

    def _follow(
        self, function: Any, kind: str | None, args: Any, kwargs: Any, result: Any, event: Event | None
    ) -> None:
        self.flow.note(function, kind, args, kwargs, result, self.stack[-1], self.clock, event)

    def _note(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Event | None:
        extra: dict[str, Any] = {}
        if kind == "conv":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            given = args[0] if args else kwargs["input"]
            channels = given.shape[1 - len(weight.shape)] if given.dim() < weight.dim() else given.shape[1]
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            extra = {"kernel": tuple(weight.shape[2:]), "groups": groups, "channels": channels}
            extra["alone"] = self._maps.is_single(given.shape)
        if kind in ("conv", "linear"):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            extra["macs"] = math.prod(result.shape[1:]) * math.prod(weight.shape[1:])
        if kind == "gate" and not self.is_gate(args, result):
            return None
        if kind == "add" and not is_sum(args, kwargs):
            return None
        self.clock += 1
        extra["spatial"] = self.is_map(result)
        event = Event(self.clock, kind, self.stack[-1].path, tuple(result.shape), **extra)
        self.events.append(event)
        return event

    def is_map(self, tensor: Tensor) -> bool:
        """Whether a tensor is a batch of feature maps of more than one position."""
        return self._maps.is_map(tensor.shape) if self.axes is None else self.axes.is_map(tensor)

    def is_gate(self, args: tuple[Any, ...], result: Tensor) -> bool:
        """Whether a product scales the channels of a map by one number each."""
        axis = None if self.axes is None else self.axes.axis(result)
        return self.is_map(result) and is_gate(args, result, axis)

    def call(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a module's forward as one call, in the place of what nn.Module does: no hook runs."""
        self._enter(path, args, kwargs)
        output = handed(module.forward, *args, **kwargs)
        self._leave(output)
        return output

    def call_with_hooks(self, path: str, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The same with the hooks of the module, and none that are global; what these compute is not noted."""
        with self._silent():
            args, kwargs = before_forward(module, args, kwargs)
        self._enter(path, args, kwargs)
        output = handed(forward, *args, **kwargs)
        with self._silent():
            output = after_forward(module, args, kwargs, output)
        self._leave(output)
        return output

    @contextlib.contextmanager
    def _silent(self) -> Iterator[None]:
        """Note no events inside."""
        noted = self.stack, self.events, self.calls, self.flow
        self.stack, self.events, self.calls, self.flow = [], [], {}, Dataflow(self.is_map, self.is_gate)
        try:
            yield
        finally:
            self.stack, self.events, self.calls, self.flow = noted

    def _enter(self, path: str, args: Any, kwargs: Any) -> None:
        self.clock += 1
        parent = self.stack[-1] if self.stack else None
        if parent is None:
            if self.axes is not None:
                self.axes.take((args, kwargs))
            self.flow.take((args, kwargs), self.clock)
        call = Call(path, self.clock, to_meta(args), to_meta(kwargs), parent=parent)
        self.calls.setdefault(path, []).append(call)
        if parent is not None:
            parent.children.append(call)
        self.stack.append(call)

    def _leave(self, output: Any) -> None:
        self.clock += 1
        call = self.stack.pop()
        call.end = self.clock
        self.flow.returned(output, call)
        call.output = to_meta(output)


def to_meta(value: Any) -> Any:
    """`value` with its tensors on the meta device, so that a record holds no memory."""
    if isinstance(value, Tensor):
        return value if value.is_meta else like(value)
    if value is None or isinstance(value, (int, float, str)):
        return value
    if type(value) in (tuple, list):
        return type(value)([to_meta(item) for item in value])
    if type(value) is dict:
        return {key: to_meta(item) for key, item in value.items()}
    return pytree.tree_map_only(Tensor, to_meta, value)


@contextlib.contextmanager
def on_the_table(copies: dict[str, nn.Module], recorder: Recorder, hooks: Copier | None = None) -> Iterator[None]:
    """Have the calls of copied modules noted by a recorder, in evaluation mode.

    What stands in `_compiled_call_impl` is what nn.Module calls in the place of hooks and forward. With `hooks`, the
    copier of the modules, their own hooks run, and forwards share with them the variables that they share.
    """
    try:
        for path, module in copies.items():
            state = module.__dict__
            state["training"] = False
            if hooks is None:
                state["_compiled_call_impl"] = functools.partial(recorder.call, path, module)
            else:
                forward = bound_forward(module, hooks)
                state["_compiled_call_impl"] = functools.partial(recorder.call_with_hooks, path, module, forward)
        yield
    finally:
        for module in copies.values():
            module.__dict__.pop("_compiled_call_impl", None)
