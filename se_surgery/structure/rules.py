"""Rules: what an addition or concatenation of feature maps is, seen from the way its operands came about.

In: a `Join`. Out: the `Found`s that it makes, or an `Unfit` with the reason. Rules go in a fixed order; the first one
with an opinion decides. They ask what is computed from what, over the borders of modules, and for no name or class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..reading.events import Call, Event
from .graph import Graph, Join, Operand, members, union_of

WITHIN = "a join inside a unit's branch belongs to that unit"
TWICE = "joins a second time what is added to the shortcut"
ATTENTION = "the pointwise layers behind an attention: a transformer's block"
LINEAR = "no activation on the branch: a sum that can be re-parameterised, or an attention's"
UNUSED = "nothing that the network puts out is made of it"
PARTS = "adds a part of a map to what became of another part of it (Res2Net)"
ACCUMULATED = "a sum that is only added to further ones is a fusion, not a residual"
LONG = "a skip connection over lower resolutions, not a unit"
# Of two transformed operands the longer one is the branch if it has this many times the convolutions.
_LONGER = 2
_BEHIND = frozenset({"conv", "norm", "act", "pass", "gate"})


@dataclass(frozen=True, eq=False)
class Found:
    """A unit as the graph shows it.

    Attributes:
        kind: See `Unit`; or `cell`, which is an Inception module of sums.
        join: Its join.
        branch: The operand that is its branch; None where all operands are.
        shortcut: The operand that is its shortcut.
        cut: Where its branch begins, if that is behind an inner join: of this and what comes before it nothing counts.
        is_first: Whether it is the first unit of its join: what comes behind the join is the first one's.
    """

    kind: str
    join: Join
    branch: Operand | None = None
    shortcut: Operand | None = None
    cut: int | None = None
    is_first: bool = True

    @property
    def site(self) -> int:
        """The value whose channels are recalibrated."""
        return self.branch.made if self.branch is not None else self.join.value.index

    @cached_property
    def region(self) -> int:
        """Everything that belongs to it."""
        graph = self.join.graph
        if self.kind == "aggregation":
            links = union_of(operand.since.alone for operand in self.join.operands if not operand.is_base)
            after = union_of(1 << index for index in behind(self.join))
            # A chain of this forward's own does not reach back behind it; one of what it was given (DLA) does.
            chain = self.join.region | links
            own = chain & self._inside
            return (own if own & self.join.graph.convolutions else chain) | after
        if self.kind == "cell":
            return self._inside
        alone = self.branch.alone if self.branch is not None else self.join.region
        return alone & ~graph.ancestors[self.cut] if self.cut is not None else alone

    @property
    def _inside(self) -> int:
        """What was made inside the call that its join is in."""
        frame, before = self.join.value.frame, self.join.graph.ancestors[self.join.value.index]
        assert frame is not None
        return union_of(1 << index for index in members(before) if self.join.graph.values[index].is_in(frame))


@dataclass(frozen=True)
class Unfit:
    """A join that is no unit.

    Attributes:
        reason: Why.
        is_understood: Whether what it is instead is known: then what is left of its block may still be a unit.
    """

    reason: str
    is_understood: bool = True


Answer = Unfit | list[Found] | None


def _unused(join: Join) -> Answer:
    """The last residual of a WaveNet, of which the skips alone go on: no SE on it would ever learn."""
    graph, output = join.graph, join.graph.look.calls[""][0].output
    # Of what comes out in an object nobody can tell.
    is_known = isinstance(output, (Tensor, tuple, list, dict))
    is_returned = any(not call.path for call in join.value.calls)
    is_dead = is_known and join.value.calls and not is_returned and not graph.users[join.value.index]
    return Unfit(UNUSED) if is_dead else None


def _long_skip(join: Join) -> Answer:
    """A skip connection over lower resolutions (U-Net): the rest of the network is no branch.

    What fuses several resolutions that it was given (HRNet) is no such connection.
    """
    return Unfit(LONG) if join in join.graph.long_skips and not fuses(join) else None


def fuses(join: Join) -> bool:
    """Whether the forward that joins was given maps of several resolutions."""
    graph, frame = join.graph, join.value.frame
    given = {source for operand in join.operands for source in operand.entries}
    areas = {graph.area(source) for source in given if graph.values[source].is_map}
    return frame is not None and bool(frame.path) and len(areas) > 1


def _of_parts(join: Join) -> Answer:
    """Res2Net adds the next part of a map to what became of the one before, and convolves that; reversible do not."""
    graph = join.graph
    if join.kind != "add" or len(join.operands) != 2:
        return None
    for part, other in (join.operands, join.operands[::-1]):
        whole = graph.part_of(part.value.index)
        if whole is None or part.convolutions or not other.transforms:
            continue
        is_of_other = any(graph.source(index) == whole for index in members(other.alone & graph.slices))
        users = graph.users[join.value.index]
        if is_of_other and users and all(graph.values[user].kind == "conv" for user in users):
            return Unfit(PARTS)
    return None


def _accumulated(join: Join) -> Answer:
    """The skips of a WaveNet, each cropped to the length of the next one and added to that."""
    if join.kind != "add":
        return None
    cropped = [source for source in map(join.graph.cropped, join.value.inputs) if source is not None]
    return Unfit(ACCUMULATED, is_understood=False) if cropped or join.graph.goes_cropped(join.value) else None


def _residual(join: Join) -> Answer:
    """A branch with convolutions and activations, and a shortcut with fewer of the one and none of the other after."""
    if join.kind != "add" or len(join.operands) != 2:
        return None
    for branch, shortcut in (join.operands, join.operands[::-1]):
        fewer = shortcut.convolutions < branch.convolutions
        if branch.transforms and fewer and not shortcut.activates_last:
            if _is_of_attention(join, branch):
                return Unfit(ATTENTION, is_understood=False)
            return _unless_fused(join, branch, shortcut)
    for branch, shortcut in (join.operands, join.operands[::-1]):
        longer = branch.convolutions >= _LONGER * shortcut.convolutions
        same = branch.entries == shortcut.entries and len(branch.entries) == 1
        if branch.transforms and shortcut.transforms and longer and same and not _joins_in(shortcut):
            return [Found("residual", join, branch, shortcut)]
    return None


def _is_of_attention(join: Join, branch: Operand) -> bool:
    """Whether a branch is the pointwise layers beside an attention: a transformer's block.

    A bottleneck with an attention in its branch is none. The block is the innermost call with more than this one join.
    """
    graph, frame = join.graph, join.value.frame
    events = [graph.values[index].event for index in members(branch.alone & graph.convolutions)]
    if any(event is not None and event.wide for event in events):
        return False
    while frame is not None and frame.path and sum(one.value.is_in(frame) for one in graph.joins) < 2:
        frame = frame.parent
    beside = members(graph.attentions & ~branch.alone)
    return frame is not None and bool(frame.path) and any(graph.values[index].is_in(frame) for index in beside)


def _unless_fused(join: Join, branch: Operand, shortcut: Operand) -> Answer:
    """The residual, its branch cut behind what brings several maps together; a fusion where nothing is left then."""
    graph = join.graph
    several = len(begins_with(branch)) > 1
    cut = _last_fusion(graph, branch) if several else None
    if cut is None:
        return [Found("residual", join, branch, shortcut)]
    rest = Operand(graph, branch.value, branch.alone & ~graph.ancestors[cut])
    if rest.transforms:
        return [Found("residual", join, branch, shortcut, cut)]
    return Unfit("a sum that fuses maps from several places", is_understood=False)


def _last_fusion(graph: Graph, operand: Operand) -> int | None:
    """The last join in an operand's branch whose sides begin with different maps."""
    outside = graph.entries(operand.alone, operand.value.index)
    for index in reversed(list(members(operand.alone))):
        value = graph.values[index]
        if value.kind not in ("add", "cat", "product") or len(value.inputs) < 2:
            continue
        sides = [{e for e in outside if graph.ancestors[source] >> e & 1} for source in value.inputs]
        if any(one != other for one, other in itertools.pairwise(sides)):
            return index
    return None


def _joins_in(operand: Operand) -> bool:
    inside = (operand.graph.values[index] for index in members(operand.alone))
    return any(value.kind in ("add", "cat") and value.is_map for value in inside)


def _several(join: Join) -> Answer:
    """A sum of three and more: each transformed operand from the same fork is a branch of its own.

    Of `x + f(x) + g(f(x))` f is a part of g's branch.
    """
    if join.kind != "add" or len(join.operands) < 3 or not any(operand.is_activated for operand in join.operands):
        return None
    bases = [operand for operand in join.operands if not operand.convolutions]
    branches = [operand for operand in join.operands if operand.transforms]
    if not bases or not branches:
        return Unfit(f"a sum of {len(join.operands)} maps is a fusion, not a residual", is_understood=False)
    known = frozenset(operand.made for operand in join.operands)
    known = known.union(*(operand.entries for operand in bases))
    if not all(operand.entries <= known for operand in branches):
        return Unfit(f"a sum of {len(join.operands)} maps is a fusion, not a residual", is_understood=False)
    base = _base_of(bases)
    return [Found("residual", join, branch, base, None, i == 0) for i, branch in enumerate(branches)]


def _base_of(bases: list[Operand]) -> Operand:
    """The shortcut among the operands without convolutions: the first to be there."""
    return min(bases, key=lambda operand: operand.value.index)


def _sum(join: Join) -> Answer:
    """Any other addition is no unit."""
    if join.kind != "add":
        return None
    if all(operand.transforms for operand in join.operands):
        return Unfit("a sum of two transformed maps is a fusion, not a residual", is_understood=False)
    if any(operand.convolutions for operand in join.operands):
        return Unfit(LINEAR)
    return Unfit("no convolution on either side of the addition")


def _reversible(join: Join) -> Answer:
    """Reversible networks take a map apart, add to each part, and put the parts together again: those are the units."""
    sums = [operand for operand in join.operands if _is_own_sum(join, operand)]
    if join.kind != "cat" or len(sums) < len(join.operands):
        return None
    parts = [{part for part in map(join.graph.part_of, operand.value.inputs) if part is not None} for operand in sums]
    return Unfit("puts the parts of a map together again") if set.intersection(*parts) else None


def _cell(join: Join) -> Answer:
    """NASNet's cells: a concatenation of two and more sums of the same forward."""
    sums = [operand for operand in join.operands if _is_own_sum(join, operand)]
    return [Found("cell", join)] if len(sums) >= 2 else None


def _is_own_sum(join: Join, operand: Operand) -> bool:
    value = join.graph.values[operand.value.index]
    return value.kind == "add" and value.frame is join.value.frame and len(value.inputs) > 1


def _aggregation(join: Join) -> Answer:
    """One-shot aggregation: a chain of convolutions, all of it concatenated, and a convolution of that."""
    is_whole = is_chain(join) and _convolves(join) and not _goes_on_with_both(join)
    return [Found("aggregation", join)] if is_whole else None


def _goes_on_with_both(join: Join) -> bool:
    """Whether what is made of a concatenation is joined later with what went into it: dense layers (HarDNet)."""
    graph, after = join.graph, behind(join)[1:]
    mine = {operand.value.index for operand in join.operands}
    later = (other for index in after for other in graph.joined.get(index, ()) if other.kind == "cat")
    return any(not mine.isdisjoint(operand.value.index for operand in other.operands) for other in later)


def is_chain(join: Join) -> bool:
    """Whether at least two operands of a concatenation were each made of one other one, and no two of the same.

    Where one of them was made of several others (HarDNet), they are dense layers.
    """
    if join.kind != "cat":
        return False
    links = [operand.since for operand in join.operands if not operand.is_base and operand.since.convolutions]
    entries = [begins_with(link) for link in links]
    is_single = all(len(found) == 1 for found in entries)
    return (
        is_single
        and len(frozenset().union(*entries)) >= 2
        and all(e <= set(o.others) for e, o in zip(entries, links, strict=True))
    )


def begins_with(operand: Operand) -> set[int]:
    """The values that an operand's branch begins with."""
    return operand.graph.entries(operand.alone, operand.value.index)


def behind(join: Join) -> list[int]:
    """The convolutions, normalisations and activations behind a concatenation that nothing else follows, in order.

    They are in the forward that joins, or where that returns what it joined in the one around it. An SE among them is
    one of them.
    """
    graph, frame = join.graph, around(join)
    chain = [join.value.index]
    while True:
        users = [user for user in graph.users[chain[-1]] if graph.values[user].is_map]
        if len(users) != 1 or graph.values[users[0]].kind not in _BEHIND or not graph.values[users[0]].is_in(frame):
            return chain
        chain.append(users[0])


def before_gates(graph: Graph, chain: list[int]) -> int:
    """How many of a chain come before the first SE in it."""
    gates = (i for i, index in enumerate(chain) if graph.values[index].kind == "gate")
    return next(gates, len(chain))


def around(join: Join) -> Call:
    """The call of the innermost forward that goes on with what a join makes."""
    frame = join.value.frame
    assert frame is not None
    while frame in join.value.calls and frame.parent is not None:
        frame = frame.parent
    return frame


def _convolves(join: Join) -> bool:
    graph = join.graph
    between = graph.ancestors[behind(join)[-1]] & ~graph.ancestors[join.value.index]
    return bool(between & graph.convolutions)


def _dense(join: Join) -> Answer:
    """Dense connectivity: what was there before goes on beside new features, and these are what an SE recalibrates."""
    if join.kind != "cat":
        return None
    bases = (operand for operand in join.operands if operand.is_base and not operand.convolutions)
    # What was squeezed and made as large again (ASPP's) is not what was there before.
    passing = [operand for operand in bases if not operand.is_squeezed]
    new = [operand for operand in join.operands if operand not in passing and operand.own.transforms]
    if not new or not passing or len(new) + len(passing) < len(join.operands):
        return None
    if any(_is_image(operand) for operand in passing):
        return Unfit("a concatenation with the network's input")
    whole = [operand for operand in passing if not operand.is_pooled]
    if not whole:
        return [Found("concat_residual", join, new[0], passing[0])] if len(join.operands) == 2 else None
    if all(_is_cheap(operand) for operand in new):
        return Unfit("a convolution that makes a part of its channels of the others (GhostNet)")
    if len(join.operands) == 2 and not _is_fed_by(new[0], passing[0]):
        return [Found("concat_residual", join, new[0], passing[0])]
    return [Found("dense", join, operand.own, whole[0], None, i == 0) for i, operand in enumerate(new)]


def _is_image(operand: Operand) -> bool:
    """Whether an operand is the network's input, as it is or made smaller."""
    graph = operand.graph
    sources = graph.entries(operand.alone, operand.value.index) if operand.alone else {operand.value.index}
    return all(graph.values[graph.source(source)].kind == "in" for source in sources)


def _is_cheap(operand: Operand) -> bool:
    """Whether all convolutions on the way have one filter a channel."""
    return all(event.depthwise for event in _events(operand))


def _is_fed_by(operand: Operand, other: Operand) -> bool:
    """Whether an operand was made of another one as a whole, and not of another part of what that is a part of."""
    return other.value.index in operand.graph.entries(operand.alone, operand.value.index)


def _concat_residual(join: Join) -> Answer:
    """A residual by concatenation: one transformed operand, and one without an activation on its way."""
    if join.kind != "cat" or len(join.operands) != 2:
        return None
    for branch, other in (join.operands, join.operands[::-1]):
        if branch.transforms and not other.transforms:
            return [Found("concat_residual", join, branch, other)]
    return None


def _inception(join: Join) -> Answer:
    """Parallel branches from one input, concatenated."""
    branches = [operand for operand in join.operands if operand.transforms]
    return [Found("inception", join)] if join.kind == "cat" and len(branches) >= 2 else None


def _inception_of_one(join: Join) -> Answer:
    """Parallel convolutions of one map, concatenated, and one activation behind them all (InceptionTime)."""
    graph = join.graph
    if join.kind != "cat" or not all(operand.convolutions for operand in join.operands):
        return None
    made = union_of(operand.alone for operand in join.operands)
    activates = any(graph.values[index].kind == "act" for index in behind(join))
    is_whole = activates and not made & graph.slices
    wide = [operand for operand in join.operands if any(event.wide for event in _events(operand))]
    return [Found("inception", join)] if is_whole and len(wide) >= 2 else None


def _events(operand: Operand) -> Iterator[Event]:
    """The convolutions on the way to an operand."""
    for index in members(operand.alone & operand.graph.convolutions):
        event = operand.graph.values[index].event
        if event is not None:
            yield event


def _concat(join: Join) -> Answer:
    """Any other concatenation is no unit."""
    return Unfit("a concatenation of maps that were not transformed here")


RULES: tuple[Callable[[Join], Answer], ...] = (
    _unused,
    _long_skip,
    _of_parts,
    _accumulated,
    _residual,
    _several,
    _sum,
    _reversible,
    _cell,
    _aggregation,
    _dense,
    _concat_residual,
    _inception,
    _inception_of_one,
    _concat,
)


@dataclass
class Verdicts:
    """What the joins of a network are.

    Attributes:
        found: The units, in order of execution.
        unfit: Every other join, with the reason.
    """

    found: list[Found] = field(default_factory=list)
    unfit: list[tuple[Join, Unfit]] = field(default_factory=list)


def judged(graph: Graph) -> Verdicts:
    """What each join of a network is, by itself."""
    verdicts = Verdicts()
    for join in graph.joins:
        answer = next(answer for rule in RULES if (answer := rule(join)) is not None)
        if isinstance(answer, Unfit):
            verdicts.unfit.append((join, answer))
        else:
            verdicts.found += answer
    return verdicts
