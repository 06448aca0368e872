"""Reads: what a forward went by that is no tensor, where it is found, and what it was.

In: values met while a forward is traced. Out: `Read`s. A graph of the forward is made for just these values: two blocks
share it only where both have them, and the code that is written from it asks whether they are still the same.
"""

from __future__ import annotations

import enum
import functools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..records import children_of

# One step on the way to a value: (".", an attribute's name) or ("[]", an index or key).
Step = tuple[str, Any]

# Where the way to a value begins, if not in a Python module that can be imported: the block, and its class.
SELF, BASE = "self", "base"


@dataclass(frozen=True)
class Read:
    """One value that a forward read.

    Attributes:
        root: `SELF`, `BASE`, or the name of the Python module in which the way to it begins.
        steps: The way from there.
        kind: What of it counts, a key of `FOUND`.
        value: What that was.
    """

    root: str
    steps: tuple[Step, ...]
    kind: str
    value: Any

    @property
    def name(self) -> str:
        """The way to it as one would say it: `layers.0.gains[1]`."""
        return "".join(f".{name}" if kind == "." else f"[{written(name)}]" for kind, name in self.steps).lstrip(".")

    def holds(self, start: Any) -> bool:
        """Whether it is what it was, found from another start: a block of the same class, for instance."""
        try:
            found = FOUND[self.kind](start, self.steps)
        except (AttributeError, LookupError, TypeError, ValueError):
            return False
        return found is self.value if self.kind in ("same", "kind") else is_same(self.value, found)


def reach(start: Any, steps: Sequence[Step]) -> Any:
    """What is at the end of the way; an attribute or item that is not there is the error it always is."""
    for kind, name in steps:
        start = getattr(start, name) if kind == "." else start[name]
    return start


# What a read looks at, at the end of the way.
FOUND: dict[str, Callable[[Any, tuple[Step, ...]], Any]] = {
    "equal": reach,
    "same": reach,
    "absent": lambda start, steps: hasattr(reach(start, steps[:-1]), steps[-1][1]),
    "inherited": lambda start, steps: steps[-1][1] in vars(reach(start, steps[:-1])),
    "length": lambda start, steps: len(reach(start, steps)),
    "keys": lambda start, steps: tuple(reach(start, steps)),
    "children": lambda start, steps: children_of(reach(start, steps)),
    "kind": lambda start, steps: type(reach(start, steps)),
    "mode": lambda start, steps: None,
}


def is_plain(value: Any) -> bool:
    """Whether a value can be written down in source and compared: None, numbers, strings, and containers of such.

    Examples:
        >>> is_plain((1, 2)), is_plain({"gain": float("inf")}), is_plain(len)
        (True, True, False)
    """
    if type(value) in (list, tuple, set, frozenset):
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in _WRITTEN


def is_same(value: Any, other: Any) -> bool:
    """Whether two plain values are the same, types included; a shape is a tuple.

    Examples:
        >>> is_same([1, 2], [1, 2]), is_same(1, True), is_same(float("nan"), float("nan"))
        (True, False, True)
    """
    if type(other) is torch.Size:
        other = tuple(other)
    if type(value) is not type(other):
        return False
    if type(value) in (list, tuple):
        return len(value) == len(other) and all(map(is_same, value, other))
    if type(value) is dict:
        return list(value) == list(other) and all(map(is_same, value.values(), other.values()))
    return bool(value == other) or (value != value and other != other)


def written(value: Any) -> str:
    """A plain value as source.

    Examples:
        >>> written([1.5, float("inf"), torch.float16])
        "[1.5, float('inf'), torch.float16]"
    """
    if type(value) in (list, tuple):
        items = ", ".join(map(written, value))
        return f"[{items}]" if type(value) is list else f"({items},)" if len(value) == 1 else f"({items})"
    if type(value) in (set, frozenset):
        return f"{type(value).__name__}([{', '.join(sorted(map(written, value)))}])"
    if type(value) is dict:
        return "{" + ", ".join(f"{written(key)}: {written(item)}" for key, item in value.items()) + "}"
    return "None" if value is None else _WRITTEN[type(value)](value)


_WRITTEN: dict[type, Callable[[Any], str]] = {
    **dict.fromkeys((bool, int, str, bytes, complex), repr),
    float: lambda value: repr(value) if math.isfinite(value) else f"float({str(value)!r})",
    **dict.fromkeys((torch.dtype, torch.memory_format), str),
    torch.device: lambda value: f"torch.device({str(value)!r})",
}


def written_way(start: str, steps: Sequence[Step]) -> str:
    """The source that goes a way.

    Examples:
        >>> written_way("self", ((".", "layers"), (".", "0"), (".", "gains"), ("[]", 1)))
        "getattr(self.layers, '0').gains[1]"
    """
    for kind, name in steps:
        if kind == "[]":
            start += f"[{written(name)}]"
        else:
            start = f"{start}.{name}" if name.isidentifier() else f"getattr({start}, {name!r})"
    return start


class Reads:
    """The reads of one trace, as they come in; and what was met that has still to be looked into.

    Attributes:
        found: The reads, by what they look at.
        functions: Python functions that were met, each with the way to it.
        objects: Objects of other classes that were met, each with the way to it: their fields may be read.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, tuple[Step, ...], str], Read] = {}
        self.functions: list[tuple[types.FunctionType, str, tuple[Step, ...]]] = []
        self.objects: list[tuple[Any, str, tuple[Step, ...]]] = []
        self.has_tensors = False

    def add(self, root: str, steps: tuple[Step, ...], kind: str, value: Any) -> None:
        """Note one; of two that look at the same the first stays."""
        self.found.setdefault((root, steps, kind), Read(root, steps, kind, value))

    def take(self, root: str, steps: tuple[Step, ...], value: Any, identity: bool = True) -> None:
        """Note a value by what it is: what is plain by its value, containers by their items, all else by identity.

        Args:
            root: Where the way to it begins.
            steps: The way.
            value: The value; modules of the block's own are none, and tensors are read when the forward runs.
            identity: Whether it can be exchanged for another, so that it matters which one it is.
        """
        if is_plain(value):
            self.add(root, steps, "equal", _kept(value))
        elif isinstance(value, (list, tuple)):
            self.add(root, steps, "length", len(value))
            for i, item in enumerate(value):
                self.take(root, (*steps, ("[]", i)), item, identity)
        elif isinstance(value, dict) and all(is_plain(key) for key in value):
            self.add(root, steps, "keys", tuple(value))
            for key, item in value.items():
                self.take(root, (*steps, ("[]", key)), item, identity)
        elif isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self.take(root, (*steps, (".", part)), getattr(value, part), identity)
        elif not isinstance(value, (nn.Module, types.ModuleType)):
            self._take_object(root, steps, value, identity)

    def _take_object(self, root: str, steps: tuple[Step, ...], value: Any, identity: bool) -> None:
        if isinstance(value, types.MethodType):
            # A new object each time that it is asked for.
            self.take(root, (*steps, (".", "__func__")), value.__func__, identity)
            self.take(root, (*steps, (".", "__self__")), value.__self__, identity)
            return
        if identity:
            self.add(root, steps, "same", value)
        if isinstance(value, types.FunctionType):
            self.functions.append((value, root, steps))
        elif isinstance(value, Tensor):
            self.has_tensors = True
        elif not isinstance(value, (type, types.BuiltinFunctionType, enum.Enum)):
            self.objects.append((value, root, steps))


def _kept(value: Any) -> Any:
    """A plain value that later changes of a container do not reach."""
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    if type(value) is dict:
        return {key: _kept(item) for key, item in value.items()}
    return set(value) if type(value) is set else value
