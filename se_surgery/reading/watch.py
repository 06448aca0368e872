"""Watch: what a forward reads of its block and of the block's children while it is traced.

In: a view of a block. Out: `Reads`. The modules stay what they are, so that what a forward asks of their types is
answered as ever: it is their classes that note what is read, in this thread and for the time of one trace.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..records import children_of
from .reads import BASE, SELF, Reads, Step, is_plain

# What every module has, and is no choice of the block's own; `_modules` is asked for by who iterates over children.
_UNREAD = (frozenset(nn.Module().__dict__) - {"training"}) | {"_call_impl", "_compiled_call_impl"}
# Where a module keeps what is registered with it; None is there for a child or parameter that it does without.
_GROUPS = ("_modules", "_parameters", "_buffers")
# Whose reads are not the forward's.
_OURS = ("torch.fx", __name__.partition(".")[0] + ".reading")
_BETWEEN = [__name__.replace("watch", name) for name in ("stand_ins", "blame")]


class Watch:
    """Notes what is read of the modules of one block, while `on`.

    Attributes:
        reads: What was read.
        modules: The block's modules by path, its own among them.
        modal: Whether the block's own `training` was read, or that of a child.
        opened: The ways to modules of which the whole `__dict__` was asked for.
        fault: An error in noting that Python has taken for a missing attribute of a module.
    """

    def __init__(self, view: nn.Module, training: bool) -> None:
        self.reads = Reads()
        self.modal = False
        self.opened: list[tuple[Step, ...]] = []
        self.fault: AttributeError | None = None
        self.view = view
        self.training = training
        self.is_on = False
        # What a method of a module is run as.
        self.lent: Callable[[Any], Any] = lambda method: method
        self._thread = threading.get_ident()
        self.modules = dict(view.named_modules())
        self._ways = {id(module): way(path) for path, module in self.modules.items()}
        self._hidden: list[nn.Module] = []
        self._patched: dict[type, Any] = {}

    @contextlib.contextmanager
    def patching(self) -> Iterator[None]:
        """Have the classes of the block's modules say what is read of them."""
        try:
            for cls in {type(module) for module in self.modules.values()}:
                self._patch(cls)
            yield
            self._unpatch()
        except BaseException:
            # An interrupt may come while this is undone, too; what is undone already is not touched again.
            self._unpatch()
            raise

    @contextlib.contextmanager
    def on(self, is_on: bool = True) -> Iterator[None]:
        """Note what is read in here, or do not."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before

    def _patch(self, cls: type) -> None:
        if cls in self._patched:
            return
        original: Callable[[Any, str], Any] = object.__getattribute__
        own = next((base for base in cls.__mro__ if "__getattribute__" in base.__dict__), object)
        if own not in self._patched and own is not object:
            original = own.__dict__["__getattribute__"]
        elif own in self._patched and self._patched[own] is not None:
            original = self._patched[own]

        def __getattribute__(module: nn.Module, name: str) -> Any:
            if self.is_on and threading.get_ident() == self._thread:
                if name == "training":
                    return self._mode(module, original(module, name))
                caller = _caller(sys._getframe(1))
                if not caller.startswith(_OURS):
                    self._note_or_keep(module, name, caller)
                    return self.lent(original(module, name))
            return original(module, name)

        self._patched[cls] = cls.__dict__.get("__getattribute__")
        cls.__getattribute__ = __getattribute__  # type: ignore[assignment]

    def _unpatch(self) -> None:
        for cls, own in self._patched.items():
            if own is not None:
                cls.__getattribute__ = own  # type: ignore[method-assign]
            elif "__getattribute__" in cls.__dict__:
                del cls.__getattribute__

    def _mode(self, module: nn.Module, flag: bool) -> bool:
        """The mode that is traced; a child's own flag has to be the block's when the forward runs."""
        here = self._ways.get(id(module))
        if here is None:
            return flag
        self.modal = True
        if here:
            self.reads.add(SELF, (*here, (".", "training")), "mode", None)
        return self.training

    def _note_or_keep(self, module: nn.Module, name: str, caller: str) -> None:
        """Note a read; after an AttributeError Python asks `__getattr__` next, and forgets it: it is kept."""
        try:
            with self.on(False):
                self._note(module, name, caller)
        except AttributeError as error:
            self.fault = error
            raise

    def _note(self, module: nn.Module, name: str, caller: str) -> None:
        here = self._ways.get(id(module))
        if here is None:
            return
        if name.startswith("__"):
            if name == "__dict__" and not caller.startswith("torch."):
                self.opened.append(here)
            return
        state = object.__getattribute__(module, "__dict__")
        if name in _UNREAD:
            if name == "_modules":
                self.reads.add(SELF, here, "children", children_of(module))
            return
        steps = (*here, (".", name))
        for space in (state, *(state[group] for group in _GROUPS)):
            if name in space:
                self._note_value(steps, space[name], space is state)
                return
        self._note_inherited(module, here, name)

    def _note_value(self, steps: tuple[Step, ...], value: Any, is_attribute: bool) -> None:
        """Note what a module holds; children and registered tensors are asked for when the forward runs."""
        if value is None or (is_attribute and not isinstance(value, nn.Module)):
            self.reads.take(SELF, steps, value)
            self._enter(steps, value)

    def _enter(self, steps: tuple[Step, ...], value: Any) -> None:
        """Modules in plain containers are no children, but they are read all the same."""
        items: Any = ()
        if isinstance(value, nn.Module) and id(value) not in self._ways:
            self._hidden.append(value)
            for path, module in value.named_modules():
                self._ways.setdefault(id(module), (*steps, *way(path)))
                self._patch(type(module))
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = value.items()
        for key, item in items if not is_plain(value) else ():
            self._enter((*steps, ("[]", key)), item)

    def _note_inherited(self, module: nn.Module, here: tuple[Step, ...], name: str) -> None:
        """Note what a module has of its class, or that it has no such attribute at all."""
        cls = type(module)
        steps = (*here, (".", name))
        place = next(((i, base) for i, base in enumerate(cls.__mro__) if name in base.__dict__), None)
        if place is None:
            # What stands there while a trace is made wraps it.
            if inspect.unwrap(cls.__getattr__) is inspect.unwrap(nn.Module.__getattr__):
                self.reads.add(SELF, steps, "absent", False)
            return
        i, base = place
        raw = base.__dict__[name]
        inner = next((part for part in ("fget", "func", "__func__") if hasattr(raw, part)), None)
        function = getattr(raw, inner) if inner is not None else raw
        if isinstance(function, types.FunctionType):
            start = (BASE, ()) if not here else (SELF, (*here, (".", "__class__")))
            there: tuple[Step, ...] = ((".", "__mro__"), ("[]", i), (".", "__dict__"), ("[]", name))
            there = (*there, (".", inner)) if inner is not None else there
            if not base.__module__.startswith("torch."):
                self.reads.functions.append((function, start[0], (*start[1], *there)))
                if inner != "fget":
                    self.reads.add(SELF, steps, "inherited", False)
        elif not hasattr(raw, "__get__") and not isinstance(raw, (Tensor, nn.Module)):
            self.reads.take(SELF, steps, raw)


def _caller(frame: Any) -> str:
    """The Python module that reads something; what it calls `getattr` by stands between."""
    while frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame.f_globals.get("__name__") or ""


def way(path: str) -> tuple[Step, ...]:
    """The way to a module's child or tensor."""
    return tuple((".", name) for name in path.split(".")) if path else ()
