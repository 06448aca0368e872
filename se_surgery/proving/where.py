"""Where: whether every SE sits where its placement says, by values that do not come from the plan.

In: a `Pair`. Out: an `Outcome`. The operated model runs once, as a flat graph of values (see `flow`); then, for one SE
after the other, what follows it is computed again with its gate at one half, which is exact in floating point. What is
halved by that, in front of which addition or concatenation, and which operand has the convolutions, is compared with
what the placement says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..records import implants
from .compare import Outcome, blocked, outputs_of
from .flow import Flow, Value
from .pair import Pair, twin


def placed(pair: Pair) -> Outcome:
    """Whether every SE sits where its placement says."""
    due = {path: placement_of(pair, path) for path in pair.sites}
    flow = Flow(twin(pair.operated).eval(), pair.sites)
    try:
        with flow:
            outputs_of(flow.model, pair.inputs)
    except Exception as error:  # whatever the model's own code raises
        return blocked(error)
    rows = [(path, due[path], flow.seats[path]) for path in pair.sites if due[path] in RULES and path in flow.seats]
    with torch.no_grad():
        for path, placement, seat in rows:
            wrong = RULES[placement](Seat(flow, path, seat))
            if wrong is not None:
                return Outcome(False, f"{path} is not where {placement} says: {wrong}")
    kinds = ", ".join(dict.fromkeys(placement for _, placement, _ in rows))
    if not rows:
        return Outcome(None, "no SE says where it should be")
    return Outcome(True, f"{len(rows)} of {len(pair.sites)} SEs where {kinds} says")


def placement_of(pair: Pair, path: str) -> str:
    """An SE's placement, as its record says, or the module itself."""
    holder, _, name = path.rpartition(".")
    record = next((one for one in implants(pair.operated.get_submodule(holder)) if one.name == name), None)
    told = record.placement if record is not None else getattr(pair.operated.get_submodule(path), "placement", "")
    return str(told)


@dataclass(frozen=True)
class Join:
    """An addition or concatenation of maps, as one SE has it.

    Attributes:
        value: What it makes.
        operands: The maps that it joins.
        reached: Those of them that depend on the SE.
    """

    value: Value
    operands: tuple[Value, ...]
    reached: tuple[Value, ...]

    @property
    def free(self) -> tuple[Value, ...]:
        """The operands that do not depend on the SE."""
        return tuple(operand for operand in self.operands if operand not in self.reached)

    def alone(self, operand: Value) -> int:
        """The set of values that one operand alone is computed from."""
        others = 0
        for other in self.operands:
            others |= other.mask if other is not operand else 0
        return operand.mask & ~others

    def __str__(self) -> str:
        name = {"add": "addition", "cat": "concatenation"}[self.value.kind]
        return f"the {name} in {self.value.frame or 'the model'!r}"


@dataclass(frozen=True)
class Seat:
    """One SE in the flow.

    Attributes:
        flow: All that was computed.
        path: The SE's path.
        value: What it gave.
    """

    flow: Flow
    path: str
    value: Value

    @property
    def source(self) -> Value:
        """What it was given."""
        return self.value.sources[0]

    @property
    def host(self) -> str:
        """Path of the module that calls it."""
        return self.path.rpartition(".")[0]

    def depends(self, value: Value) -> bool:
        """Whether a value is computed from what it gave."""
        return bool(value.mask >> self.value.number & 1)

    def within(self, mask: int) -> list[Value]:
        """The values of a set."""
        return [value for value in self.flow.values if mask >> value.number & 1]

    def convolutions(self, mask: int) -> list[Value]:
        """The convolutions with parameters in a set."""
        return [value for value in self.within(mask) if value.learns]

    @cached_property
    def halved(self) -> dict[int, Tensor]:
        """What changes without a convolution in between when its gate is at one half, by number."""
        changed = {self.value.number: self.value.tensor * 0.5}
        waiting = list(self.value.users)
        while waiting:
            value = min(waiting, key=lambda one: one.number)
            waiting = [one for one in waiting if one is not value]
            if value.learns or value.number in changed:
                continue
            changed[value.number] = value.again(changed)
            if join_of(value) is None and value.is_map:
                waiting += value.users
        return changed

    def is_half(self, value: Value) -> bool:
        """Whether it is exactly half of what it was."""
        found = self.halved.get(value.number)
        return found is not None and torch.equal(found, value.tensor * 0.5)

    @cached_property
    def first(self) -> Join | None:
        """The first join that takes what it gave, with no convolution in between."""
        direct = [self.flow.values[number] for number in sorted(self.halved)]
        joins = [self.join(value) for value in direct if join_of(value) is not None]
        return joins[0] if joins else None

    def join(self, value: Value) -> Join:
        """A join as this SE has it."""
        operands = tuple(join_of(value) or ())
        return Join(value, operands, tuple(operand for operand in operands if self.depends(operand)))

    def parting(self, around: str) -> Join | None:
        """The first join in the call of a module that takes something that depends on it, and something that does not.

        Dependent parts of one map that are put together again are no such join.
        """
        start, end = self.call(around)
        for value in self.flow.values[max(start, self.value.number) : end]:
            if join_of(value) is None or not self.depends(value):
                continue
            join = self.join(value)
            if join.free:
                return join
        return None

    def call(self, path: str) -> tuple[int, int]:
        """The numbers of the values in the call of a module that it ran in."""
        spans = self.flow.calls.get(path, [])
        return next((span for span in spans if span[0] <= self.value.number < span[1]), (0, len(self.flow.values)))

    @cached_property
    def origin(self) -> Value:
        """What made its map, behind activations, normalisations and what hands a map on."""
        return origin_of(self.source)

    @property
    def is_in_front(self) -> bool:
        """Whether what made its map is outside of its block, which has convolutions of its own to come."""
        start, end = self.call(self.host)
        return self.origin.number < start and any(value.learns for value in self.flow.values[start:end])

    @cached_property
    def is_straight(self) -> bool:
        """Whether its block has no join, and is of a class that elsewhere has: all the block does is a branch."""
        classes = self.flow.classes
        frames = {value.frame for value in self.flow.values if join_of(value) is not None}
        cls = classes.get(self.host)
        return self.host not in frames and any(classes.get(frame) is cls for frame in frames)

    @cached_property
    def both(self) -> Join | None:
        """The addition in its block of a branch and a shortcut that both depend on it."""
        start, end = self.call(self.host)
        for value in reversed(self.flow.values[max(start, self.value.number) : end]):
            if value.kind == "add" and value.frame == self.host and join_of(value) is not None:
                join = self.join(value)
                counts = [len(self.convolutions(join.alone(operand))) for operand in join.operands]
                return join if not join.free and min(counts) == 0 < max(counts) else None
        return None

    @property
    def others(self) -> list[Value]:
        """What takes the map that it is given, beside itself."""
        return [user for user in self.source.users if user is not self.value]


def join_of(value: Value) -> list[Value] | None:
    """The operands of a join: an addition of maps of one shape, or a concatenation of maps."""
    if value.kind not in ("add", "cat") or not value.is_map or len(value.maps) < 2:
        return None
    if value.kind == "add" and len({source.tensor.shape for source in value.maps}) > 1:
        return None
    return value.maps


def origin_of(value: Value) -> Value:
    """From a map back to the convolution or join that made it.

    A sum of branches that no activation is in counts as the convolution that re-parameterisation makes of it.
    """
    while not value.learns and value.maps:
        if join_of(value) is not None:
            if not is_sum_of_convolutions(value):
                return value
            value = _longest(value)
            continue
        # Of x * f(x) the one that the other is computed from.
        value = min(value.maps, key=lambda one: one.number)
    return value


def _longest(value: Value) -> Value:
    """The map of a sum that has convolutions of its own; an identity, normalised or not, has none."""
    shared = value.maps[0].mask
    for one in value.maps:
        shared &= one.mask
    made = {one: one.mask & ~shared for one in value.maps}
    convolved = [one for one, mask in made.items() if any(mask >> v.number & 1 and v.learns for v in value.flow.values)]
    return max(convolved or value.maps, key=lambda one: (_depth(one), one.number))


def is_sum_of_convolutions(value: Value) -> bool:
    """Whether a join is a sum of branches with convolutions and no activation in any."""
    operands = join_of(value) or []
    if value.kind != "add":
        return False
    shared = operands[0].mask
    whole = 0
    for operand in operands:
        shared &= operand.mask
        whole |= operand.mask
    inside, kinds = whole & ~shared, set()
    waiting = list(operands)
    met: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one.number in met or not inside >> one.number & 1:
            continue
        met.add(one.number)
        kinds.add("conv" if one.learns else one.kind)
        waiting += one.sources
    return "conv" in kinds and "act" not in kinds


def _depth(value: Value) -> int:
    return 1 if value.learns else max((_depth(source) for source in value.maps), default=0)


# --------------------------------------------------------------------------------------------------------------- rules


def _standard(seat: Seat) -> str | None:
    join = seat.first
    if join is not None and join.free and not seat.is_straight:
        wrong = _one_operand(seat, join, transformed=True)
        return wrong if wrong is None or not _is_behind_module(seat) else _inception(seat)
    inside = seat.parting(seat.host)
    if inside is not None:
        return f"convolutions follow it before {inside}"
    if seat.is_in_front:
        return f"it is in front of the convolutions of {seat.host!r}"
    if seat.origin.kind == "add":
        return f"it is behind {seat.join(seat.origin)}, not in front of it"
    if seat.others:
        return f"others take the map in front of it, {_frames(seat.others)}"
    return None


def _is_behind_module(seat: Seat) -> bool:
    """Whether what made its map is the concatenation of an Inception module, of whose parts each has convolutions."""
    operands = join_of(seat.origin) if seat.origin.kind == "cat" else None
    if operands is None:
        return False
    join = seat.join(seat.origin)
    return all(seat.convolutions(join.alone(operand)) for operand in operands)


def _identity(seat: Seat) -> str | None:
    join = seat.first
    if join is None or not join.free:
        return "no addition or concatenation takes what it gives and something else"
    return _one_operand(seat, join, transformed=False)


def _one_operand(seat: Seat, join: Join, transformed: bool) -> str | None:
    """Exactly one operand is halved; it is the one with more convolutions, or with fewer."""
    halved = [operand for operand in join.reached if seat.is_half(operand)]
    if transformed and join.value.kind == "cat" and len(halved) == 1 and _goes_on(seat, join, halved[0]):
        return None  # of dense layers those that come later take what it gives, too
    if len(join.reached) > 1:
        return f"it changes {len(join.reached)} operands of {join}"
    (mine,) = join.reached
    if not halved:
        return f"its operand of {join} is not halved with its gate"
    convolutions = len(seat.convolutions(join.alone(mine)))
    most = max(_convolutions(seat, join, other, transformed) for other in join.free)
    if transformed and convolutions <= most:
        return f"it is on an operand of {join} with {convolutions} convolutions; another has {most}"
    if not transformed and convolutions >= most:
        return f"it is on an operand of {join} with {convolutions} convolutions; no other has more"
    if transformed and join.value.kind == "cat" and _is_parallel(seat, join):
        return f"it is behind one branch of {join}, not behind all"
    return None


def _convolutions(seat: Seat, join: Join, other: Value, is_branch: bool) -> int:
    """Convolutions on the way to another operand; a sum has a shortcut and more branches in it (x + f(x) + g(x))."""
    alone = join.alone(other)
    inner = (join_of(other) or []) if is_branch and other.kind == "add" and other.frame == join.value.frame else []
    return min(len(seat.convolutions(alone & one.mask)) for one in (inner or [other]))


def _goes_on(seat: Seat, join: Join, new: Value) -> bool:
    """Whether a concatenation hands on a map as it was, beside new ones of convolutions: dense connectivity."""
    before = 0
    for operand in join.free:
        before |= operand.mask
    if not seat.convolutions(new.mask & ~before):
        return False
    alone = [seat.within(join.alone(operand)) for operand in join.free]
    return any(not any(value.learns or value.kind == "pool" for value in values) for values in alone)


def _is_parallel(seat: Seat, join: Join) -> bool:
    """Whether several operands of a concatenation are branches: each has a convolution and an activation alone."""
    branches = [operand for operand in join.operands if _transforms(seat, join.alone(operand))]
    return len(branches) > 1 and not _is_strided(seat, join)


def _is_strided(seat: Seat, join: Join) -> bool:
    """Whether a concatenation of two is a residual one whose other side is projected, by blocks of that class."""
    if len(join.operands) != 2:
        return False
    cls = seat.flow.classes.get(join.value.frame)
    alike = [value for value in seat.flow.values if value.kind == "cat" and join_of(value) is not None]
    others = [seat.join(value) for value in alike if seat.flow.classes.get(value.frame) is cls]
    return any(any(not seat.convolutions(one.alone(operand)) for operand in one.operands) for one in others)


def _transforms(seat: Seat, mask: int) -> bool:
    values = seat.within(mask)
    return any(value.learns for value in values) and any(value.kind == "act" for value in values)


def _before(seat: Seat) -> str | None:
    join = _parting(seat)
    if join is None and seat.both is not None:
        return f"it changes both operands of {seat.both}"
    if join is None:
        start, _ = seat.call(seat.host)
        before = [value for value in seat.flow.values[start : seat.value.number] if value.learns]
        return (
            "convolutions of its block come before it"
            if any(seat.source.mask >> v.number & 1 for v in before)
            else None
        )
    wrong = _on_branch(seat, join)
    if wrong is not None:
        return wrong
    (mine,) = join.reached
    before = [value for value in seat.convolutions(join.alone(mine)) if not seat.depends(value)]
    return f"{len(before)} convolutions of the branch come before it" if before else None


def _inner(seat: Seat) -> str | None:
    if not any(is_wide(value) for value in _nearest(seat.source)):
        return "no convolution with k > 1 is right in front of it"
    join = _parting(seat)
    if join is None:
        return None
    wrong = _on_branch(seat, join)
    if wrong is not None:
        return wrong
    (mine,) = join.reached
    behind = [v for v in seat.convolutions(join.alone(mine)) if seat.depends(v) and is_wide(v)]
    return f"{len(behind)} convolutions with k > 1 come behind it" if behind else None


def _on_branch(seat: Seat, join: Join) -> str | None:
    if len(join.reached) > 1:
        return f"it changes {len(join.reached)} operands of {join}"
    (mine,) = join.reached
    convolutions = len(seat.convolutions(join.alone(mine)))
    most = max(len(seat.convolutions(join.alone(other))) for other in join.free)
    if convolutions <= most:
        return f"it is on an operand of {join} with {convolutions} convolutions; another has {most}"
    return None


def _parting(seat: Seat) -> Join | None:
    """The join that its unit ends with: in its block, or in a block around it; a straight unit has none."""
    path = seat.host
    if seat.is_straight:
        return seat.parting(path)
    while True:
        join = seat.parting(path)
        if join is not None or not path:
            return join
        path = path.rpartition(".")[0]


def is_wide(value: Value) -> bool:
    """Whether a convolution looks at more than one position of a map, and makes one.

    One that comes down to a row or a position is a part of an attention's gates (BAT's grid), and so is one that makes
    one channel (CBAM's).
    """
    shape = value.tensor.shape
    return any(size > 1 for size in value.kernel or ()) and shape[1] > 1 and min(shape[2:], default=1) > 1


def _nearest(value: Value) -> list[Value]:
    """The convolutions that a map comes from, with none in between."""
    found: dict[int, Value] = {}
    waiting, met = [value], set()
    while waiting:
        one = waiting.pop()
        if one.number in met:
            continue
        met.add(one.number)
        if one.learns:
            found[one.number] = one
        elif one.kind != "add" or join_of(one) is None or is_sum_of_convolutions(one):
            waiting += one.maps
    return list(found.values())


def _post(seat: Seat) -> str | None:
    if seat.others:
        return f"others take the map in front of it, {_frames(seat.others)}"
    if seat.is_in_front:
        return f"it is in front of the convolutions of {seat.host!r}"
    if seat.origin.kind in ("add", "cat") and join_of(seat.origin) is not None:
        return None
    join = seat.parting(seat.host)
    return f"it is in front of {join}, not behind it" if join is not None else None


def _inception(seat: Seat) -> str | None:
    if seat.origin.kind != "cat" or join_of(seat.origin) is None:
        join = seat.first
        return f"it is in front of {join}" if join is not None else "no concatenation is in front of it"
    if seat.is_in_front:
        return f"it is in front of the convolutions of {seat.host!r}"
    if seat.first is not None and seat.first.free and seat.first.value.frame == seat.host:
        return f"it is in front of {seat.first}, behind a part of it"
    return f"others take the map in front of it, {_frames(seat.others)}" if seat.others else None


def _frames(values: Iterable[Value]) -> str:
    return ", ".join(dict.fromkeys(value.frame or "the model" for value in values))


RULES: dict[str, Callable[[Seat], str | None]] = {
    "standard": _standard,
    "pre": _before,
    "post": _post,
    "identity": _identity,
    "inner": _inner,
    "inception": _inception,
}
