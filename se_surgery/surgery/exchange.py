"""Exchange: what may take the place of an operated block's methods, and what may be taken out of the block.

In: an operated block and what is to become of it: another forward on the instance, another class, a child less. Out:
nothing where its SEs still run afterwards, else a `SurgeryError`. Nothing is changed before that is known.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..errors import SurgeryError
from ..records import durable, implants

# How many objects a wrapper is followed through before it counts as leading nowhere.
_FAR = 500

REMEDY = (
    "Do so first and operate then: strip_se(model, origin='se_surgery') undoes the operation, and add_se puts SEs "
    "into what came of it."
)


# ---------------------------------------------------------------------------------------------------- what code needs


@dataclass(frozen=True)
class Needs:
    """What one generated method needs.

    Attributes:
        names: The attributes of the block that it reads, itself or by the methods that it calls.
        outer: Whether it calls the block's own method and gates what that returns.
    """

    names: frozenset[str]
    outer: bool


@functools.lru_cache(maxsize=512)
def needs_of(source: str) -> dict[str, Needs]:
    """What each method of a generated source needs."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    reads = {name: _reads(function) for name, function in functions.items()}
    for _ in functions:
        reads = {name: found.union(*(reads.get(read, frozenset()) for read in found)) for name, found in reads.items()}
    return {name: Needs(reads[name], _calls_own(function)) for name, function in functions.items()}


def _reads(function: ast.FunctionDef) -> frozenset[str]:
    attributes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute))
    return frozenset(node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self")


def _calls_own(function: ast.FunctionDef) -> bool:
    called = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    owners = (func.value for func in called if isinstance(func, ast.Attribute))
    return any(isinstance(owner, ast.Name) and owner.id == "_base" for owner in owners)


# -------------------------------------------------------------------------------------------------- where wrappers lead


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
        yield from (_content(cell) for cell in function.__closure__ or ())
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from vars(function).values()
        names = _names(function.__code__)
        yield from (function.__globals__[name] for name in names if callable(function.__globals__.get(name)))
        yield from (value for name, value in vars(self.block).items() if name in names and name != self.name)

    def _read_by(self, function: FunctionType, bound: bool) -> set[str]:
        """The generated methods that a function reads from the block or its class; its SEs count as all of them."""
        code = function.__code__
        variables = dict(zip(code.co_freevars, map(_content, function.__closure__ or ()), strict=False))
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


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


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


# ----------------------------------------------------------------------------------------------- refusing an exchange


def refuse_exchange(block: nn.Module, ways: dict[str, FunctionType], name: str, value: Any) -> None:
    """Refuse a callable in the place of a generated method that does not run one.

    Raises:
        SurgeryError: It does not; nothing was changed.
    """
    if isinstance(value, Gone) or Leads(block, ways, name).found(value):
        return
    shown = getattr(value, "__qualname__", None) or type(value).__name__
    raise SurgeryError(
        f"{name!r} of this operated {type(block).__name__} was to become {shown}, which does not run "
        f"{_ses(block)}. {REMEDY}"
    )


def refuse_method(cls: type[nn.Module], ways: dict[str, FunctionType], name: str, value: Any) -> None:
    """Refuse another method on a generated class than one that runs the one from before.

    Raises:
        SurgeryError: It does not; nothing was changed.
    """
    if not Leads(nn.Module(), ways, name).found(value):
        raise SurgeryError(
            f"{name!r} of the class of operated {cls.__name__}s was to become "
            f"{getattr(value, '__qualname__', value)}, which does not run their SEs. {REMEDY}"
        )


def refuse_class(block: nn.Module, generated: type[nn.Module], ways: dict[str, FunctionType], cls: Any) -> None:
    """Refuse another class than one derived from the generated one that keeps its methods, or calls them.

    Raises:
        SurgeryError: It is none; nothing was changed.
    """
    if isinstance(cls, type) and issubclass(cls, generated):
        over = [base.__dict__[name] for base in _below(cls, generated) for name in ways if name in base.__dict__]
        if all(_goes_on(value) or Leads(block, ways, "").found(MethodType(value, block)) for value in over):
            return
    raise SurgeryError(
        f"This operated {type(block).__name__} was to be given the class {getattr(cls, '__qualname__', cls)}, whose "
        f"forward does not run {_ses(block)}. {REMEDY}"
    )


def _below(cls: type, generated: type) -> list[type]:
    return list(cls.__mro__[: cls.__mro__.index(generated)])


def _goes_on(value: Any) -> bool:
    return isinstance(value, FunctionType) and "super" in value.__code__.co_names


def _ses(block: nn.Module) -> str:
    names = [repr(implant.name) for implant in implants(block)]
    return f"its SE{'s' if len(names) > 1 else ''} {', '.join(names)}".rstrip()


# ------------------------------------------------------------------------------------------------ children that go


@durable
@dataclass
class Gone:
    """Stands on an operated block in the place of a method that cannot run any more, and says so when it is called.

    Attributes:
        cls: Name of the block's class.
        method: Name of the method.
        children: What the method needs and the block has no more.
        before: What stood there on the instance; None where nothing did.
    """

    cls: str
    method: str
    children: tuple[str, ...]
    before: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say what is missing.

        Raises:
            SurgeryError: Always.
        """
        raise SurgeryError(
            f"The {self.method} of this operated {self.cls} needs {', '.join(map(repr, self.children))}, which was "
            f"taken out of it or replaced by what cannot be called, after surgery. {REMEDY}"
        )


def has_gone(block: nn.Module, ways: Iterable[str]) -> bool:
    """Whether a method of a block cannot run any more."""
    return any(isinstance(block.__dict__.get(method), Gone) for method in ways)


def settle(block: nn.Module, ways: dict[str, FunctionType], needs: dict[str, Needs], name: str, usable: bool) -> None:
    """Put a `Gone` in the place of each method that needs an attribute that went, or take it away when it is back."""
    for method in ways:
        standing = block.__dict__.get(method)
        gone, before = (standing.children, standing.before) if isinstance(standing, Gone) else ((), standing)
        if usable and name in gone:
            _put(block, method, tuple(child for child in gone if child != name), before)
        elif not usable and name not in gone and _needs(block, ways, needs, method, standing, name):
            _put(block, method, (*gone, name), before)


def _needs(
    block: nn.Module,
    ways: dict[str, FunctionType],
    needs: dict[str, Needs],
    method: str,
    standing: Any,
    name: str,
) -> bool:
    """Whether what stands in a method's place needs an attribute."""
    run = {method} if standing is None or isinstance(standing, Gone) else Leads(block, ways, method).found(standing)
    return any(name in needs[way].names for way in run)


def _put(block: nn.Module, method: str, children: tuple[str, ...], before: Any) -> None:
    if children:
        block.__dict__[method] = Gone(type(block).__name__, method, children, before)
    elif before is not None:
        block.__dict__[method] = before
    else:
        del block.__dict__[method]
