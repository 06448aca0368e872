"""Guards: the lines by which a generated forward refuses to run when what its trace went by has changed.

In: the reads of a method's traces. Out: source, the names that it uses, and the objects that a block has to keep so
that the source can compare them: what cannot be found again by import is found in the block itself, copies included.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import TraceError
from ..reading.reads import BASE, SELF, Read, Step, reach, written, written_way
from ..reading.trace import Trace
from ..records import HELD, children_of
from .generated import refuse_change, refuse_other, resolve


@dataclass
class Guards:
    """The guards of one method.

    Attributes:
        lines: Their source, one test in each.
        names: What the names in it stand for.
    """

    lines: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)


def watched(traces: Sequence[Trace], besides: Collection[str]) -> list[Read]:
    """What is read in any of the traces of a method, without the block's attributes named in `besides`."""
    reads = dict.fromkeys((read.root, read.steps, read.kind) for traced in traces for read in traced.reads)
    found = {(read.root, read.steps, read.kind): read for traced in reversed(traces) for read in traced.reads}
    return [found[key] for key in reads if not (key[0] == SELF and len(key[1]) == 1 and key[1][0][1] in besides)]


def guards(reads: Sequence[Read]) -> Guards:
    """Refuse to run when one of the reads is not what it was.

    Raises:
        TraceError: One of them cannot be found again, with its name.
    """
    made = Guards()
    attributes = [read for read in reads if read.root == SELF and read.kind == "equal" and _is_path(read)]
    others = [read for read in reads if read not in attributes]
    if attributes:
        tests = [f"{written_way('self', read.steps)} {_differs(read.value)}" for read in attributes]
        values = ", ".join(f"{read.name!r}: {written(read.value)}" for read in attributes)
        made.lines.append(f"if {' or '.join(tests)}: _changed(self, {{{values}}})")
        made.names["_changed"] = refuse_change
    for read in others:
        made.lines.append(_line(read, made.names))
    return made


def _is_path(read: Read) -> bool:
    """Whether it is an attribute of the block or of a module in it, and its name the path to it."""
    return all(kind == "." for kind, _ in read.steps)


def _differs(value: Any) -> str:
    """What asks whether something is another value than this one."""
    return f"{'is not' if value is None or isinstance(value, bool) else '!='} {written(value)}"


def _line(read: Read, names: dict[str, Any]) -> str:
    way, parent = _way(read.root, read.steps, names), _way(read.root, read.steps[:-1], names)
    last = read.steps[-1][1] if read.steps else ""
    names["_other"] = refuse_other
    what = read.name if read.root in (SELF, BASE) else f"{read.root}.{read.name}"
    if read.kind == "equal":
        test, was, now = f"{way} {_differs(read.value)}", written(read.value), way
    elif read.kind == "same":
        kept = _kept(read, names)
        test, was, now = f"{way} is not {kept}", kept, way
    elif read.kind == "absent":
        test, was, now = f"hasattr({parent}, {last!r})", "...", f"getattr({parent}, {last!r})"
    elif read.kind == "inherited":
        test, was, now = f"{last!r} in {parent}.__dict__", f"type({parent}).{last}", way
    elif read.kind == "length":
        what, test, was, now = f"len({what})", f"len({way}) != {read.value}", str(read.value), f"len({way})"
    elif read.kind == "keys":
        test, was, now = f"tuple({way}) != {written(read.value)}", written(read.value), f"tuple({way})"
    elif read.kind == "children":
        names["_children"] = children_of
        what = f"the children of {what or 'itself'}"
        test, was, now = f"_children({way}) != {written(read.value)}", written(read.value), f"_children({way})"
    elif read.kind == "kind":
        names[kept := _name(read.value)] = read.value
        test, was, now = f"not isinstance({way}, {kept})", f"{kept}.__name__", f"type({way}).__name__"
    else:
        test, was, now = f"{way} is not self.training", "self.training", way
    return f"if {test}: _other(self, {what!r}, {was}, {now})"


def _way(root: str, steps: tuple[Step, ...], names: dict[str, Any]) -> str:
    if root in (SELF, BASE):
        return written_way("self" if root == SELF else "_base", steps)
    start = f"_m_{root.replace('.', '_')}"
    names[start] = importlib.import_module(root)
    return written_way(start, steps)


def _name(value: Any) -> str:
    return f"_k_{getattr(value, '__module__', '')}_{getattr(value, '__qualname__', '')}".replace(".", "_")


def importable(value: Any) -> bool:
    """Whether a function or class is found again by its own module and name."""
    module, inner = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(inner, str) or not isinstance(value, _NAMED):
        return False
    try:
        return resolve(module, inner) is value
    except (ImportError, AttributeError, ValueError):
        return False


_NAMED = (types.FunctionType, types.BuiltinFunctionType, type)


def _kept(read: Read, names: dict[str, Any]) -> str:
    """What an object is compared with: itself by import, or as the block keeps it."""
    if importable(read.value):
        name = _name(read.value)
        names[name] = read.value
        return name
    if read.root == SELF:
        return f"self.{HELD}[{read.name!r}]"
    if read.root != BASE and _is_path(read):
        name = f"_k_{read.root}_{read.name}".replace(".", "_")
        names[name] = ByWay(read.root, read.name)
        return name
    raise TraceError(
        f"its forward goes by {read.name!r}, {'which' if read.root == BASE else 'of ' + read.root + ', which'} "
        f"is a {type(read.value).__name__} that cannot be found again by import"
    )


@dataclass(frozen=True)
class ByWay:
    """A name of generated source that stands for what is found under a Python module's own name for it."""

    module: str
    inner: str


def objects(reads: Sequence[Read], block: nn.Module) -> dict[str, Any]:
    """The objects that a block keeps for its guards, by the way to them."""
    kept = [read for read in reads if read.root == SELF and read.kind == "same" and not importable(read.value)]
    return {read.name: reach(block, read.steps) for read in kept}
