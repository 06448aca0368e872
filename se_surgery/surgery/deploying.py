"""Deploying: methods of a block that throw away what its generated forward needs.

In: a block's class, and what the generated methods need. Out: the names of the methods that may not be called any more,
found in their code. They are refused when they are called, before they change anything.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from ..errors import SurgeryError
from ..reading.ways import Switch, names_in, own_methods
from .exchange import Needs

# What timm.utils.reparameterize_model calls on blocks: each changes the children that the generated forward calls.
FOLDING = ("reparameterize", "fuse", "switch_to_deploy")

_DELETES = dis.opmap["DELETE_ATTR"]


@dataclass(frozen=True)
class Change:
    """What a method does to its block, as its code tells.

    Attributes:
        drops: The attributes that it deletes.
        sets: The attributes that it sets.
        ways: The methods that it puts in forward's place.
        unknown: Whether it puts something else there, too.
        swaps: Whether it gives the block another class.
        returns: Whether it returns something, which may be another module in the block's place.
    """

    drops: frozenset[str] = frozenset()
    sets: frozenset[str] = frozenset()
    ways: frozenset[str] = frozenset()
    unknown: bool = False
    swaps: bool = False
    returns: bool = False

    def __or__(self, other: Change) -> Change:
        return Change(
            self.drops | other.drops,
            self.sets | other.sets,
            self.ways | other.ways,
            self.unknown or other.unknown,
            self.swaps or other.swaps,
            self.returns,
        )


def folds(cls: type[nn.Module], children: Collection[str]) -> bool:
    """Whether a class has methods that throw children of its forward away, and its forward goes by what they leave.

    Args:
        cls: A block's class.
        children: What its forward calls as the block is now.
    """
    if any(hasattr(cls, name) for name in FOLDING):
        return True
    gone = [change for _, change in _changes(cls) if change.drops & set(children)]
    left = {name for change in gone if not change.ways and not change.unknown for name in change.sets}
    return bool((left - set(children)) & names_in(cls, "forward"))


def thrown_away_by(cls: type[nn.Module], needs: dict[str, Needs]) -> list[str]:
    """The methods of a block that leave it without a way that its SEs are on."""
    changes = dict(_changes(cls))
    own = own_methods(cls)
    changes |= {name: _change(own[name].__code__) for name in FOLDING if name in own and name not in changes}
    return [name for name, change in changes.items() if name not in needs and _loses(name, change, needs)]


def _loses(name: str, change: Change, needs: dict[str, Needs]) -> bool:
    """Whether a method that makes such a change leaves a block without its SEs."""
    own = needs.get("forward", next(iter(needs.values())))
    throws = bool(change.drops & own.names)
    others = [need for way, need in needs.items() if way != "forward" and not change.drops & need.names]
    if change.swaps or change.ways - needs.keys() or (name in FOLDING and change.returns):
        return True
    if change.unknown:
        return throws or bool(change.sets & own.names)
    if change.ways or own.outer:
        return throws and not change.ways
    return (throws or name in FOLDING) and not others


def _changes(cls: type[nn.Module]) -> Iterator[tuple[str, Change]]:
    """The methods of a class that change what it is made of, with what they and those that they call do."""
    own = {name: _change(method.__code__) for name, method in own_methods(cls).items()}
    telling = {name for name, change in own.items() if change not in (Change(), Change(returns=True))}
    telling -= {"__init__", "forward"}
    for name in own if telling else ():
        called = names_in(cls, name) & telling if name not in ("__init__", "forward") else set()
        if called:
            change = own[name]
            for other in called:
                change |= own[other]
            yield name, change


@functools.lru_cache(maxsize=4096)
def _change(code: CodeType) -> Change:
    """What one code object does itself; it is asked for every block of a class, and again for the next model."""
    deletes = _DELETES in code.co_code[::2]
    by_name = {"delattr", "__delattr__", "setattr", "__setattr__"} & set(code.co_names)
    if not (deletes or by_name or "forward" in code.co_names or "__class__" in code.co_names):
        return Change(returns=_returns(code))
    steps = list(dis.get_instructions(code))
    drops = {step.argval for step in steps if step.opname == "DELETE_ATTR"}
    if by_name & {"delattr", "__delattr__"}:
        drops |= {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    sets = frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")
    switch = Switch.of(code)
    if not (drops or "forward" in sets or switch.unknown or "__class__" in sets):
        return Change(returns=_returns(code))
    return Change(
        frozenset(drops),
        sets - {"forward", "__class__"},
        frozenset(switch.names),
        switch.unknown,
        "__class__" in sets,
        _returns(code),
    )


def _returns(code: CodeType) -> bool:
    """Whether a method returns something else than nothing or the block itself."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    mine = code.co_varnames[:1]
    for step, following in itertools.pairwise(steps):
        is_self = step.opname.startswith("LOAD_FAST") and mine == (step.argval,)
        is_nothing = step.opname == "LOAD_CONST" and step.argval is None
        if following.opname == "RETURN_VALUE" and not is_self and not is_nothing:
            return True
    return any(step.opname == "RETURN_CONST" and step.argval is not None for step in steps)


def refusal(name: str, code_of: type[nn.Module]) -> Callable[..., Any]:
    """A method that says why the one of its name may not be called."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise SurgeryError(
            f"{name}() would fold away what the forward of this operated {type(self).__name__} calls, or put another "
            f"in its place that lacks its SEs. Re-parameterise the base first and then operate, or strip the SEs, "
            f"{name}, and operate again."
        )

    refuse.__name__ = name
    refuse.__qualname__ = f"{code_of.__qualname__}.{name}"
    return refuse
