"""Graph: the questions that rules ask about what a forward computed from what.

In: a `Look`. Out: for every value the set of those that it was computed from, and its joins: the additions and
concatenations of feature maps, with their operands.

Sets of values are integers, one bit a value in order of execution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..reading.dataflow import Value
from ..reading.look import Look

# What hands on the numbers of a map: also what a walk back to the value that made them goes over.
_HANDED_ON = ("pass", "slice", "gate")
_BETWEEN = ("norm", "act", "pass", "gate")


@dataclass(frozen=True, eq=False)
class Operand:
    """One operand of a join.

    Attributes:
        graph: The graph.
        value: The value that is joined.
        alone: The values that it alone is computed from, itself among them.
        others: The other operands of its join.
    """

    graph: Graph
    value: Value
    alone: int
    others: tuple[int, ...] = ()

    @property
    def convolutions(self) -> int:
        """Number of the convolutions on the way to it alone."""
        return (self.alone & self.graph.convolutions).bit_count()

    @property
    def is_activated(self) -> bool:
        """Whether there is an activation on the way."""
        return bool(self.alone & self.graph.activations)

    @property
    def transforms(self) -> bool:
        """Whether there are a convolution and an activation on the way."""
        return bool(self.convolutions) and self.is_activated

    @property
    def activates_last(self) -> bool:
        """Whether an activation comes behind the first convolution on the way."""
        first = lowest(self.alone & self.graph.convolutions)
        return first is not None and bool((self.alone & self.graph.activations) >> first)

    @property
    def is_pooled(self) -> bool:
        """Whether there is a pooling on the way."""
        return any(self.graph.values[index].kind == "pool" for index in members(self.alone))

    @property
    def is_squeezed(self) -> bool:
        """Whether a map was reduced to a value per channel on the way."""
        return any(self.graph.values[index].kind == "squeeze" for index in members(self.alone))

    @cached_property
    def entries(self) -> frozenset[int]:
        """The values outside that the way begins with, each at what made it."""
        return frozenset(self.graph.source(index) for index in self.graph.entries(self.alone, self.value.index))

    @cached_property
    def since(self) -> Operand:
        """The operand with all that it was made of since those of its join that it was made of."""
        graph, index = self.graph, self.value.index
        others = [other for other in self.others if other != index and graph.ancestors[index] >> other & 1]
        return replace(self, alone=graph.ancestors[index] & ~union_of(graph.ancestors[other] for other in others))

    @property
    def own(self) -> Operand:
        """The operand with what makes it new: all since the others that it was made of, or what it alone is made of."""
        return self if self.is_base else self.since

    @property
    def is_base(self) -> bool:
        """Whether it was made of none of the other operands of its join."""
        return not any(self.graph.ancestors[self.value.index] >> other & 1 for other in self.others)

    @property
    def made(self) -> int:
        """What made its numbers, behind drop path, layer scale and slices."""
        return self.graph.source(self.value.index)


@dataclass(frozen=True, eq=False)
class Join:
    """An addition or concatenation of feature maps.

    Attributes:
        value: What it makes.
        operands: What it joins; a sum of sums, each used nowhere else, is one sum of all.
        absorbed: The sums in it that are a part of it.
    """

    graph: Graph
    value: Value
    operands: tuple[Operand, ...]
    absorbed: frozenset[int]

    @property
    def kind(self) -> str:
        """`add` or `cat`."""
        return self.value.kind

    @property
    def path(self) -> str:
        """The module whose own forward it is in."""
        return self.value.frame.path if self.value.frame is not None else ""

    @property
    def region(self) -> int:
        """Everything that its operands alone are computed from."""
        return union_of(operand.alone for operand in self.operands)


class Graph:
    """What a forward computed from what.

    Attributes:
        values: The values in order of execution.
        ancestors: For each the set of itself and all that it was computed from.
        convolutions: The set of convolutions of maps that have filters to learn.
        activations: The set of activations.
        slices: The set of parts of maps.
        enlarged: The set of maps made by what makes maps larger.
        attentions: The set of products of matrices, as attentions make them.
    """

    def __init__(self, look: Look) -> None:
        self.look = look
        self.values = look.values
        self.ancestors: list[int] = []
        self.users: list[list[int]] = [[] for _ in self.values]
        self.convolutions = self.activations = self.slices = self.enlarged = self.attentions = 0
        for value in self.values:
            mask = 1 << value.index
            for source in value.inputs:
                mask |= self.ancestors[source]
            self.ancestors.append(mask)
            for source in value.all_inputs:
                self.users[source].append(value.index)
            self._sort(value)

    def _sort(self, value: Value) -> None:
        bit = 1 << value.index
        if value.kind == "attention":
            self.attentions |= bit
        if not value.is_map:
            return
        event = value.event
        if event is not None and event.kind == "conv" and self.look.learns(event.path):
            self.convolutions |= bit
        if value.kind == "act":
            self.activations |= bit
        if value.kind == "slice":
            self.slices |= bit
        if value.kind == "up" and self._grows(value):
            self.enlarged |= bit

    def _grows(self, value: Value) -> bool:
        before = self.values[value.inputs[0]] if value.inputs else value
        # Windows are cut out of maps as images of their own, and put together again.
        return before.is_map and before.shape[0] == value.shape[0] and self.area(value) > self.area(before)

    def area(self, value: Value | int) -> int:
        """Number of positions of a value's map."""
        shape = (self.values[value] if isinstance(value, int) else value).shape
        return self.look.maps.area(shape)

    def source(self, index: int) -> int:
        """From a value back over what hands its numbers on, scaled or sliced, to what made them."""
        while self.values[index].kind in _HANDED_ON and len(self.values[index].inputs) == 1:
            index = self.values[index].inputs[0]
        return index

    def part_of(self, index: int) -> int | None:
        """The map that a value is a part of, or None where it is a whole one."""
        while self.values[index].kind == "pass" and len(self.values[index].inputs) == 1:
            index = self.values[index].inputs[0]
        return self.source(index) if self.values[index].kind == "slice" else None

    def cropped(self, index: int) -> int | None:
        """The sum that a value is a part of, cropped, and that goes nowhere else; None where it is no such part."""
        value, is_cut = self.values[index], False
        while value.kind in ("slice", "pass") and len(value.inputs) == 1:
            is_cut |= value.kind == "slice"
            value = self.values[value.inputs[0]]
            if len(self.users[value.index]) != 1:
                return None
        is_sum = value.kind == "add" and value.is_map and len(value.inputs) > 1
        return value.index if is_sum and is_cut else None

    def goes_cropped(self, value: Value) -> bool:
        """Whether a sum goes, cropped, into another sum and nowhere else."""
        last = value
        while len(self.users[last.index]) == 1:
            last = self.values[self.users[last.index][0]]
            if last.kind == "add":
                return any(self.cropped(source) == value.index for source in last.inputs)
            if last.kind not in ("slice", "pass"):
                return False
        return False

    def before(self, index: int, through: frozenset[int] = frozenset()) -> list[int]:
        """The convolution that another one follows, with normalisation, activation and gates at most between them.

        Args:
            index: The other one.
            through: Sums that count as one convolution: what they are made of is all of it.
        """
        found = []
        waiting = list(self.values[index].inputs)
        while waiting:
            value = self.values[waiting.pop()]
            if self.convolutions >> value.index & 1:
                found.append(value.index)
            elif value.index in through or (len(value.inputs) == 1 and value.is_map and value.kind in _BETWEEN):
                waiting += value.inputs
        return found

    def entries(self, inside: int, end: int) -> set[int]:
        """The values outside a set that the values in it were made of; of an end that is not in it the end itself."""
        found = {
            source for index in members(inside) for source in self.values[index].inputs if not inside >> source & 1
        }
        return found or {end}

    @cached_property
    def joins(self) -> list[Join]:
        """The joins in order of execution, but for those that are a part of another one."""
        found = [join for value in self.values if (join := self._join(value)) is not None]
        absorbed = frozenset().union(*(join.absorbed for join in found))
        return [join for join in found if join.value.index not in absorbed]

    @cached_property
    def joined(self) -> dict[int, list[Join]]:
        """The joins that a value goes into, by value."""
        found: dict[int, list[Join]] = {}
        for join in self.joins:
            for operand in join.operands:
                found.setdefault(operand.value.index, []).append(join)
        return found

    @cached_property
    def long_skips(self) -> frozenset[Join]:
        """The joins of which one operand comes up from smaller maps that it alone is computed from.

        An attention that does so inside a branch (BAT) makes nothing of the kind of that branch.
        """
        found: list[Join] = []
        for join in self.joins:
            alike = [other for other in found if self.area(other.value) == self.area(join.value)]
            if any(self._comes_up(operand.alone, alike, join.value) for operand in join.operands):
                found.append(join)
        return frozenset(found)

    def _comes_up(self, alone: int, closed: list[Join], joined: Value) -> bool:
        """Whether a branch has smaller maps in it, but for those of skip connections that are closed inside of it."""
        if not alone & self.enlarged:
            return False
        alone &= ~union_of(other.region for other in closed if alone >> other.value.index & 1)
        inside = (self.values[index] for index in members(alone)) if alone & self.enlarged else ()
        maps = (value for value in inside if value.is_map and value.shape[0] == joined.shape[0])
        return any(self.area(value) < self.area(joined) for value in maps)

    def _join(self, value: Value) -> Join | None:
        if value.kind not in ("add", "cat") or not value.is_map or len(value.inputs) < 2 or value.frame is None:
            return None
        sources, absorbed = self._flat(value)
        if value.kind == "add":
            is_join = all(self.values[source].shape == value.shape for source in sources)
        else:
            is_join = all(self._keeps_positions(value, self.values[source]) for source in sources)
        if not is_join or not all(self.values[source].is_map for source in sources):
            return None
        return Join(self, value, tuple(self.operands(sources)), frozenset(absorbed))

    def operands(self, sources: list[int]) -> Iterator[Operand]:
        """What is joined, each with what it alone is computed from."""
        for source in sources:
            others = tuple(other for other in sources if other != source)
            alone = self.ancestors[source] & ~union_of(self.ancestors[other] for other in others)
            yield Operand(self, self.values[source], alone, others)

    def _flat(self, value: Value) -> tuple[list[int], set[int]]:
        """The operands of a join, and the sums among them that are a part of it."""
        sources: list[int] = []
        absorbed: set[int] = set()
        for index in value.inputs:
            if value.kind == "add" and self.is_part(index, value):
                inner, more = self._flat(self.values[index])
                sources += inner
                absorbed |= {index, *more}
            else:
                sources.append(index)
        return sources, absorbed

    def is_part(self, index: int, outer: Value) -> bool:
        """Whether a value is a sum of the same forward that goes into another sum and nowhere else."""
        inner = self.values[index]
        is_inner = inner.kind == "add" and inner.is_map and len(inner.inputs) > 1 and inner.frame is outer.frame
        return is_inner and not inner.calls and len(self.users[index]) == 1

    def _keeps_positions(self, value: Value, part: Value) -> bool:
        """Whether a part of a concatenation has other channels than the whole, and the same positions."""
        if len(value.shape) != len(part.shape):
            return False
        other = [axis for axis, sizes in enumerate(zip(value.shape, part.shape, strict=True)) if len(set(sizes)) > 1]
        if other == [1]:
            return self.look.maps.axis(value.shape) != -1
        return other == [len(value.shape) - 1] and self.look.maps.axis(value.shape) != 1


def members(mask: int) -> Iterator[int]:
    """The members of a set, in order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def lowest(mask: int) -> int | None:
    """The first member of a set, or None."""
    return (mask & -mask).bit_length() - 1 if mask else None


def union_of(masks: Iterable[int]) -> int:
    """The union of some sets."""
    union = 0
    for mask in masks:
        union |= mask
    return union
