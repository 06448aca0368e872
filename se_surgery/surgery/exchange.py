"""Exchange: what may take the place of an operated block's methods, and what may be taken out of the block.

In: an operated block and what is to become of it: another forward on the instance, another class, a child less. Out:
nothing where its SEs still run afterwards, else a `SurgeryError`. Nothing is changed before that is known.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..errors import SurgeryError
from ..records import implants
from .gone import REMEDY, Gone
from .leads import Leads

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


def refuse_standing(block: nn.Module, ways: dict[str, FunctionType]) -> None:
    """Refuse what stands in a block's `__dict__` in the place of a generated method and does not run one.

    What is written into the `__dict__` itself cannot be seen when it is.

    Raises:
        SurgeryError: There is such a thing.
    """
    for name in ways:
        if name in block.__dict__:
            refuse_exchange(block, ways, name, block.__dict__[name])


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
