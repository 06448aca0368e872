"""Outer: what a forward's code reads from outside of its block: globals, closures, and fields of other objects.

In: `Reads` of one trace, with the functions and objects that it met. Out: the same, with the plain values that these
functions read by name added. Code is read and not run, so that what an untaken branch reads is there, too.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .reads import BASE, SELF, Reads, Step, is_plain, reach
from .watch import Watch

# Packages whose functions compute, and have no settings that belong to a network; Python's own are such, too.
_FOREIGN = frozenset({"torch", "functorch", "numpy", "einops", "opt_einsum", __name__.partition(".")[0], ""})


@dataclass(frozen=True)
class Names:
    """The names that one piece of code uses, those of the functions in it included.

    Attributes:
        outer: Names of globals, each with the attributes that are read of it in the same breath.
        free: Names of the variables of functions around it.
        mentioned: Names of all attributes it reads, and all strings in it, by which attributes and keys are read.
        asked: Attributes of its first argument of which it asks the class.
    """

    outer: tuple[tuple[str, tuple[str, ...]], ...]
    free: tuple[str, ...]
    mentioned: frozenset[str]
    asked: tuple[tuple[str, ...], ...]


def add_outer(watch: Watch, view: nn.Module) -> None:
    """Add what the functions that were met read from outside, and the fields they may read of objects.

    Args:
        watch: What was read in one trace.
        view: The block.
    """
    scan = _Scan(watch.reads, view)
    size = -1
    # What is found in one round may be a function or an object, or a name, that matters to what was found before.
    while size != scan.size:
        size = scan.size
        scan.functions()
        scan.fields()
        scan.whole(watch.opened)


class _Scan:
    def __init__(self, reads: Reads, view: nn.Module) -> None:
        self.reads = reads
        self.view = view
        self.cls = type(view)
        self.package = self.cls.__module__.partition(".")[0]
        self.seen: set[int] = set()
        self.mentioned: set[str] = set()

    @property
    def size(self) -> int:
        """How much has been found."""
        return sum(map(len, (self.reads.found, self.reads.functions, self.reads.objects, self.mentioned)))

    def functions(self) -> None:
        """Read the code of the functions that have not been read yet."""
        for function, root, steps in list(self.reads.functions):
            if id(function) not in self.seen:
                self.seen.add(id(function))
                if not is_foreign(function.__module__):
                    self._read(function, root, steps)

    def _read(self, function: types.FunctionType, root: str, steps: tuple[Step, ...]) -> None:
        names = names_in(function.__code__)
        self.mentioned |= names.mentioned
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for i, (name, cell) in enumerate(cells):
            if name in names.free:
                self._take_cell(cell, root, (*steps, (".", "__closure__"), ("[]", i), (".", "cell_contents")))
        for chain in names.asked if (".", "__mro__") in steps else ():
            self._take_kind(root, steps, chain)
        space = function.__globals__
        module = str(space.get("__name__"))
        if is_foreign(module):  # a decorator's own code, which has taken the function's name
            return
        if getattr(sys.modules.get(module), "__dict__", None) is space:
            root, steps = module, ()
        else:
            steps = (*steps, (".", "__globals__"))
        for name, chain in names.outer:
            # What a test runner puts into the code of assertions has names that nobody can write.
            if name in space and name.isidentifier():
                first: Step = (".", name) if not steps else ("[]", name)
                self._follow(space[name], chain, root, (*steps, first))
        if names.mentioned & {"type", "__class__"}:
            self._take_of_class(names.mentioned)

    def _take_kind(self, root: str, steps: tuple[Step, ...], chain: tuple[str, ...]) -> None:
        """A method asks for the class of a child, by `isinstance` for one."""
        here = steps[: steps.index((".", "__class__"))] if root == SELF else ()
        way = (*here, *((".", name) for name in chain))
        try:
            child = reach(self.view, way)
        except AttributeError:
            return
        if isinstance(child, nn.Module):
            self.reads.add(SELF, way, "kind", type(child))

    def _take_cell(self, cell: Any, root: str, steps: tuple[Step, ...]) -> None:
        """A function's own functions do not change; numbers and fields of objects do."""
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            return
        if not isinstance(value, (type, Tensor, nn.Module)):
            self.reads.take(root, steps, value, identity=False)
        self.reads.has_tensors |= isinstance(value, Tensor)

    def _follow(self, value: Any, chain: tuple[str, ...], root: str, steps: tuple[Step, ...]) -> None:
        """Take what a global is, or what is read of it where it is a Python module or a class."""
        while isinstance(value, types.ModuleType) and chain:
            if is_foreign(value.__name__) or not hasattr(value, chain[0]):
                return
            if sys.modules.get(value.__name__) is value:
                root, steps = value.__name__, ()
            steps = (*steps, (".", chain[0]))
            value, chain = getattr(value, chain[0]), chain[1:]
        if isinstance(value, type):
            self._take_class(value, chain, root, steps)
        elif isinstance(value, types.FunctionType):
            is_renamed = value.__name__ != steps[-1][1]
            if is_renamed or not is_foreign(value.__module__):
                self.reads.take(root, steps, value)
        elif isinstance(value, Tensor):
            self.reads.has_tensors = True
        elif is_plain(value) and type(value) not in (list, dict, set):
            self.reads.take(root, steps, value)
        elif not isinstance(value, (nn.Module, types.ModuleType)) and root.partition(".")[0] in self._own_packages():
            self.reads.take(root, steps, value)

    def _own_packages(self) -> set[str]:
        """Where containers count: those of other packages may be caches, which change without any meaning."""
        return {self.package, BASE, SELF}

    def _take_class(self, cls: type, chain: tuple[str, ...], root: str, steps: tuple[Step, ...]) -> None:
        if not chain or is_foreign(cls.__module__):
            return
        raw = next((base.__dict__[chain[0]] for base in cls.__mro__ if chain[0] in base.__dict__), None)
        function = getattr(raw, "__func__", raw)
        there = (*steps, (".", chain[0]))
        if is_plain(raw):
            self.reads.take(root, there, raw)
        elif isinstance(function, types.FunctionType) and raw is not function:
            self.reads.functions.append((function, root, (*steps, (".", "__dict__"), ("[]", chain[0]))))

    def _take_of_class(self, mentioned: frozenset[str]) -> None:
        """What may be read by `type(self)`: the plain attributes of the block's class that are mentioned."""
        for base in self.cls.__mro__:
            names = mentioned & base.__dict__.keys() if not is_foreign(base.__module__) else ()
            for name in names:
                if is_plain(base.__dict__[name]) and not name.startswith("__"):
                    self.reads.take(BASE, ((".", name),), getattr(self.cls, name))

    def fields(self) -> None:
        """Take the fields of objects that any of the code mentions, and the functions of theirs that it does."""
        for value, root, steps in list(self.reads.objects):
            held = _fields(value)
            for name in sorted(self.mentioned & held.keys()):
                self._once(root, (*steps, (".", name)), held[name])
            for base in type(value).__mro__ if not is_foreign(type(value).__module__) else ():
                for name in (self.mentioned | {"__call__"}) & base.__dict__.keys():
                    self._of_class(value, name, base.__dict__[name], root, steps)

    def _of_class(self, value: Any, name: str, raw: Any, root: str, steps: tuple[Step, ...]) -> None:
        function = next((getattr(raw, part) for part in ("fget", "func", "__func__") if hasattr(raw, part)), raw)
        if isinstance(function, types.FunctionType):
            way = (*steps, (".", "__class__"), (".", "__dict__"), ("[]", name))
            if id(function) not in self.seen:
                self.reads.functions.append((function, root, way))
        elif is_plain(raw) and not name.startswith("__") and name not in _fields(value):
            self._once(root, (*steps, (".", name)), raw)

    def _once(self, root: str, steps: tuple[Step, ...], value: Any) -> None:
        if not any((root, steps, kind) in self.reads.found for kind in ("equal", "same", "length", "keys")):
            self.reads.take(root, steps, value, identity=not isinstance(value, nn.Module))

    def whole(self, opened: list[tuple[Step, ...]]) -> None:
        """What may be read by way of a module's `__dict__`: the plain attributes that are mentioned, there or not."""
        for way in opened:
            state = vars(reach(self.view, way))
            for name in sorted(self.mentioned - state.keys()):
                if name.isidentifier() and not hasattr(nn.Module, name) and not hasattr(reach(self.view, way), name):
                    self.reads.add(SELF, (*way, (".", name)), "absent", False)
            for name in sorted(self.mentioned & state.keys()):
                if is_plain(state[name]):
                    self._once(SELF, (*way, (".", name)), state[name])


def _fields(value: Any) -> dict[str, Any]:
    """What an object holds by name, in its `__dict__` or in slots."""
    held = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                held.setdefault(name, getattr(value, name))
    return held


def is_foreign(module: str | None) -> bool:
    """Whether a Python module is one whose functions are not read: torch's, Python's own, and this library's.

    Examples:
        >>> is_foreign("torch.nn.functional"), is_foreign("math"), is_foreign("timm.layers.drop")
        (True, True, False)
    """
    package = (module or "").partition(".")[0]
    # `builtins` is what a class says that was made by exec.
    is_python = package in sys.stdlib_module_names and package not in ("__main__", "builtins")
    return package in _FOREIGN or is_python


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> Names:
    """The names that a piece of code uses."""
    outer: dict[tuple[str, tuple[str, ...]], None] = {}
    asked: dict[tuple[str, ...], None] = {}
    mentioned: set[str] = set()
    free = set(code.co_freevars)
    for one in _with_inner(code):
        chains = list(_chains(one))
        outer |= dict.fromkeys((name, chain) for kind, name, chain in chains if kind == "global")
        asked |= dict.fromkeys(_asked(one, chains))
        mentioned |= {*one.co_names, *_strings(one.co_consts)}
    return Names(tuple(outer), tuple(free - {"__class__"}), frozenset(mentioned), tuple(asked))


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _strings(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from _strings(constant)


def _chains(code: types.CodeType) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each global and each local that is loaded, with the attributes that are read of it directly."""
    kind, name, chain = "", "", []
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if operation in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(instruction.argval))
        elif operation not in ("CACHE", "EXTENDED_ARG"):
            if kind:
                yield kind, name, tuple(chain)
            kind = "global" if operation in ("LOAD_GLOBAL", "LOAD_NAME") else ""
            kind = "local" if operation.startswith("LOAD_FAST") else kind
            name, chain = str(instruction.argval), []
    if kind:
        yield kind, name, tuple(chain)


def _asked(code: types.CodeType, chains: list[tuple[str, str, tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """What follows on `isinstance` and `type` as an attribute of the first argument."""
    first = code.co_varnames[0] if code.co_argcount else None
    for (kind, name, _), (_, owner, chain) in itertools.pairwise(chains):
        if (kind, name) in (("global", "isinstance"), ("global", "type")) and owner == first and chain:
            yield chain


def content_of(cell: types.CellType) -> Any:
    """What a variable of a closure holds; None where it has not been assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
