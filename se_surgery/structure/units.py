"""Units: the places of a network that an SE serves, recognised by the way the data goes.

In: an `Anatomy`. Out: `Unit`s in order of execution, and every candidate that is none with its reason.

Every addition and concatenation of feature maps is a candidate (see `rules`). Blocks without a join are units too where
they are of a class that elsewhere has a shortcut, or pair a depthwise with a pointwise convolution; a network with no
unit at all is a plain one, and each of its convolutions is a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import fx, nn

from ..errors import InstanceForwardError, TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.events import Event
from ..reading.layout import is_under, parents
from ..reading.look import Look
from ..reading.ways import names_in
from ..records import original_class
from .behind import after_convolution, behind_in
from .census import Census, Counted, Fate
from .graph import Graph, Join, members
from .hosts import ELSEWHERE, Hosts, aggregation, whole
from .joins import Side, counterpart, end_of, sides_of, sources_of, union_of
from .nesting import HOLDER, settle
from .outside import (
    ON_TOKENS,
    backbone_of,
    in_heads,
    in_scores,
    outside,
    puts_out_maps,
    works_on_tokens,
)
from .rules import LINEAR, LONG, TWICE, UNUSED, WITHIN, Found, Verdicts, judged
from .unit import WITH_SHORTCUT, Reject, Unit

AGAIN = "its module runs again"
ODD = "it joins a map with what convolutions made of it by neither a sum nor a concatenation, which is not understood"
# Of two maps these are understood, or told apart elsewhere.
_JOINS = frozenset({"add", "cat", "gate", "attention"})


@dataclass
class Units:
    """What `recognise` found.

    Attributes:
        found: The units in order of execution.
        rejected: The candidates that are none.
        closed: Modules that join feature maps and cannot be traced.
        lost: Units that get no place, because their forward cannot be looked into or nothing in it can hold an SE: the
            path of each, and when it ended.
        census: What became of each join.
    """

    found: list[Unit] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    lost: list[tuple[str, int]] = field(default_factory=list)
    census: Census = field(default_factory=Census)


def recognise(anatomy: Anatomy, heads: bool = False) -> Units:
    """Find the units of a model.

    Args:
        anatomy: The model.
        heads: Whether the units of heads, necks and decoders count, too.
    """
    seen, units = anatomy.look, Units()
    graph = Graph(seen)
    verdicts = judged(graph)
    settle(graph, verdicts)
    hosted = _hosted(anatomy, graph, verdicts, units)
    _same_class(anatomy, units, verdicts)
    _separable(anatomy, graph, verdicts, units)
    left = [] if heads else list(in_heads(graph, verdicts, units.found))
    _take_out(units, left)
    if not units.found and works_on_tokens(seen):
        units.closed = []
        units.rejected.append(Reject("", ON_TOKENS))
    # A network whose blocks cannot be looked into is not a plain one, nor is one that is not understood.
    elif not units.found and not units.closed and all(unfit.is_understood for _, unfit in verdicts.unfit):
        odd = [Reject(path, ODD) for path in _odd_joins(graph)]
        units.rejected[:0] = odd
        if not odd:
            _plain(anatomy, units)
        _take_out(units, [] if heads else list(in_heads(graph, verdicts, units.found)))
    units.found.sort(key=lambda unit: (unit.end, unit.start, unit.number))
    _take_out(units, list(in_scores(seen, units.found)))
    units.rejected = [_settled(reject, units.found) for reject in units.rejected]
    units.rejected += list(outside(seen, units.found, units.rejected))
    units.census = _counted(graph, verdicts, units, hosted)
    return units


def _hosted(anatomy: Anatomy, graph: Graph, verdicts: Verdicts, units: Units) -> dict[Found, Unit]:
    """The units in the blocks that can hold them; a block that runs again has the same ones."""
    hosts, hosted = Hosts(anatomy, graph), {}
    for found in verdicts.found:
        if not is_first_run(graph, found.join):
            continue
        try:
            hosted[found] = hosts.unit(found)
        except TraceError as error:
            path = found.join.path
            units.lost.append((path, graph.look.calls[path][0].end))
            if path not in units.closed:
                units.closed.append(path)
                units.rejected.append(Reject(path, str(error), "untraceable", isinstance(error, InstanceForwardError)))
    units.found += hosted.values()
    units.rejected += [Reject(join.path, unfit.reason) for join, unfit in verdicts.unfit]
    return hosted


def _take_out(units: Units, left: list[tuple[Unit, Reject]]) -> None:
    for unit, reject in left:
        units.found.remove(unit)
        units.rejected.append(reject)


def is_first_run(graph: Graph, join: Join) -> bool:
    """Whether a join is in the first call of its module."""
    return graph.look.calls[join.path][0] is join.value.frame


def _counted(graph: Graph, verdicts: Verdicts, units: Units, hosted: dict[Found, Unit]) -> Census:
    """What became of each join; one of a module that runs again became what it was in the first run."""
    reasons = {join: unfit.reason for join, unfit in verdicts.unfit}
    served = {found.join for found, unit in hosted.items() if unit in units.found}
    named = {reject.path: reject.reason for reject in units.rejected}
    counted = []
    for join in graph.joins:
        reason = reasons.get(join, "")
        again = not reason and not is_first_run(graph, join)
        fate: Fate = "unit" if join in served else "part" if reason in (WITHIN, TWICE) or again else "none"
        why = "" if fate == "unit" else reason or (AGAIN if again else named.get(join.path, ELSEWHERE))
        counted.append(Counted(join.path, join.kind, fate, why))
    return Census(tuple(counted))


def _settled(reject: Reject, found: list[Unit]) -> Reject:
    """What cannot be looked into blocks nothing where it lies in a unit's branch (FasterNet's partial convolution)."""
    inside = reject.blocking and any(unit.path != reject.path and unit.calls(reject.path) for unit in found)
    return replace(reject, blocking=False) if inside else reject


def _same_class(anatomy: Anatomy, units: Units, verdicts: Verdicts) -> None:
    """Blocks of a class that elsewhere has a shortcut, and have none themselves: strided inverted residuals.

    One whose own forward joins maps in a way that is not understood is none.
    """
    seen = anatomy.look
    unfit = [(join.path, one) for join, one in verdicts.unfit]
    doubtful = {path for path, one in unfit if not one.is_understood or one.reason in (LONG, UNUSED)}
    classes = {_class_of(unit) for unit in units.found if unit.kind in WITH_SHORTCUT and unit.path} - {nn.Sequential}
    _open_holders(anatomy, units, classes)
    found = []
    for path in seen.calls:
        is_open = not any(path == closed or is_under(closed, path) for closed in units.closed)
        if not path or not is_open or path in doubtful:
            continue
        if original_class(seen.modules[path]) in classes and not _touches(units.found, path):
            try:
                unit = _straight(anatomy.block(path))
            except TraceError as error:
                units.rejected.append(Reject(path, str(error), "untraceable"))
                continue
            script = unit.block.script(unit.nodes)
            if "c" in script and "a" in script:
                found.append(unit)
    units.found += found


def _open_holders(anatomy: Anatomy, units: Units, classes: set[type[nn.Module]]) -> None:
    """Give up parallel branches that hold blocks of such a class (the last stage of CSPNeXt) for those blocks."""
    blocks = [path for path, module in anatomy.look.modules.items() if original_class(module) in classes]
    for unit in [unit for unit in units.found if unit.kind == "inception"]:
        if any(is_under(path, unit.path) and unit.calls(path) for path in blocks):
            units.found.remove(unit)
            units.rejected.append(Reject(unit.path, HOLDER))


def _class_of(unit: Unit) -> type[nn.Module]:
    return original_class(unit.block.look.modules[unit.path])


def in_other_way(unit: Unit, block: Block) -> Unit | None:
    """The same unit as another method of its block has it (aligned Xception's `forward_with_tap`), or None.

    A method that the forward calls is a part of it: it has the unit only where it has its join.
    """
    if unit.convolution is not None:
        return _plain_in(unit, unit.convolution, block)
    if unit.join is not None:
        return _counterpart(unit, block)
    return None if is_part(block) else whole(block)


def is_part(block: Block) -> bool:
    """Whether a block's forward calls the method that this is the block by."""
    return block.trace.method in names_in(original_class(block.look.modules[block.path]), "forward")


def _plain_in(unit: Unit, convolution: Event, block: Block) -> Unit | None:
    """A convolution with its activation in another graph of its block."""
    try:
        node = behind_in(block, convolution)
    except TraceError:
        return None
    return replace(unit, block=block, transformed=node)


def in_training(anatomy: Anatomy, unit: Unit) -> Unit | None:
    """The same unit as its block has it in training, or None where there is none."""
    training = anatomy.in_training
    if unit.kind == "dense":
        return unit
    if unit.convolution is not None:
        return plain_unit(training, unit.convolution)
    return _counterpart(unit, training.block(unit.path, unit.block.trace.method))


def _counterpart(unit: Unit, block: Block) -> Unit | None:
    """A unit in another graph of its block."""
    if unit.join is None:
        return _straight(block)
    if unit.kind == "aggregation" and unit.join.op == "call_module":
        node = next((node for node in block.nodes if node.target == unit.join.target), None)
        return aggregation(block, node) if node is not None else None
    other = counterpart(unit, block)
    if other is None or unit.kind != "aggregation":
        return other
    return aggregation(block, other.join) if other.join is not None else None


def _straight(block: Block) -> Unit:
    """A block without a shortcut as a unit: all it does is the branch."""
    join = _last_concat(block)
    if join is not None:
        # ShuffleNet's strided unit: both sides are transformed; the longer one is the branch.
        sides = sides_of(block, sources_of(block, join))
        branch, other = sorted(sides, key=lambda side: _length(block, side), reverse=True)
        return Unit(
            path=block.path,
            kind="concat_residual",
            block=block,
            end=end_of(block, join),
            join=join,
            branch=branch.alone,
            transformed=branch.node,
            untransformed=other.node,
        )
    return whole(block)


def _length(block: Block, side: Side) -> int:
    return block.script(block.within(side.alone)).count("c")


def _last_concat(block: Block) -> fx.Node | None:
    """The last join of a block, where that is a concatenation of two maps."""
    joins = [
        n for n in block.nodes if block.kind(n) in ("add", "cat") and block.is_map(n) and len(block.maps_into(n)) > 1
    ]
    last = joins[-1] if joins else None
    return last if last is not None and block.kind(last) == "cat" and len(block.maps_into(last)) == 2 else None


def _touches(units: Iterable[Unit], path: str) -> bool:
    """Whether a block is a unit's, lies in one, or holds one."""
    return any(
        unit.path == path
        or is_under(unit.path, path)
        or (is_under(path, unit.path) and (unit.kind in ("dense", "straight") or unit.calls(path)))
        for unit in units
    )


def _separable(anatomy: Anatomy, graph: Graph, verdicts: Verdicts, units: Units) -> None:
    """A depthwise convolution followed by a pointwise one in the same module (MobileNetV1, LCNet)."""
    seen = anatomy.look
    holders: dict[str, list[Event]] = {}
    for first, second in _pairs(graph, verdicts, units):
        around = (first.path, *parents(first.path))
        holder = next(path for path in around if path == second.path or is_under(second.path, path))
        if not _is_alone(seen, holder, first) or not _is_alone(seen, holder, second):
            continue
        if not any(unit.holds(event) for event in (first, second) for unit in units.found):
            holders.setdefault(holder, []).append(second)
    found = []
    for holder, seconds in holders.items():
        try:
            if len(seconds) == 1 and not isinstance(seen.modules[holder], nn.Sequential) and holder:
                found.append(_straight(anatomy.block(holder)))
            else:
                found += _once(plain_unit(anatomy, event) for event in seconds)
        except TraceError as error:
            units.rejected.append(Reject(holder, str(error)))
    units.found += found


def _once(units: Iterable[Unit]) -> list[Unit]:
    """Of several convolutions of one re-parameterisable block one."""
    found: dict[tuple[str, str], Unit] = {}
    for unit in units:
        assert unit.transformed is not None
        found.setdefault((unit.block.path, unit.transformed.name), unit)
    return list(found.values())


def _is_alone(seen: Look, holder: str, convolution: Event) -> bool:
    """Whether the child of a holder that has a convolution in it does nothing else than that convolution.

    It may be one of several that are re-parameterised as one. A depthwise convolution at the end of one block and the
    pointwise one that begins the next are no pair.
    """
    names = convolution.path[len(holder) + 1 if holder else 0 :].split(".")
    child = f"{holder}.{names[0]}" if holder else names[0]
    if convolution.path == holder or child not in seen.calls:
        return True
    others = [event for event in seen.during(seen.calls[child][0]) if event.kind == "conv" and event.spatial]
    if convolution.depthwise:
        return all(event.depthwise for event in others)
    return not any(event.wide for event in others)


def _pairs(graph: Graph, verdicts: Verdicts, units: Units) -> Iterator[tuple[Event, Event]]:
    """The depthwise convolutions that one pointwise one takes alone, behind normalisation and activation at most.

    They are in no unit and on no shortcut; in a network that puts out maps those behind its last unit are its head.
    """
    taken = union_of(found.region | found.join.region for found in verdicts.found)
    is_headed = puts_out_maps(graph) and backbone_of(graph.look, units.found) is None
    ends = [found.join.value.index for found in verdicts.found] if is_headed else []
    last = max(ends, default=len(graph.values))
    sums = _sums_of_one(graph, verdicts)
    for index in members(graph.convolutions & ~taken):
        second = graph.values[index].event
        sources = [i for i in graph.before(index, sums) if not taken >> i & 1 and i <= last]
        firsts = [event for i in sources if (event := graph.values[i].event) is not None]
        first = next((event for event in firsts if event.depthwise and event.wide), None)
        if first is not None and second is not None and not second.wide and second.groups == 1:
            yield first, second


def _sums_of_one(graph: Graph, verdicts: Verdicts) -> frozenset[int]:
    """The sums that are re-parameterised as one convolution; what an attention is summed with is no such sum."""
    linear = (join for join, unfit in verdicts.unfit if unfit.reason == LINEAR)
    sums = (join for join in linear if not any(graph.values[i].kind == "attention" for i in members(join.region)))
    return frozenset().union(*(join.absorbed | {join.value.index} for join in sums))


def _odd_joins(graph: Graph) -> list[str]:
    """The modules that join a map with what their convolutions made of it, by neither a sum nor a concatenation.

    Differences, interpolations, maxima, stacks that are reduced. What ends with an activation may be a gate.
    """
    found = []
    for value in graph.values:
        maps = [index for index in dict.fromkeys(value.inputs) if graph.values[index].is_map]
        if len(maps) != 2 or value.kind in _JOINS or value.frame is None:
            continue
        shortcut, branch = sorted(graph.operands(maps), key=lambda operand: operand.convolutions)
        is_branch = branch.convolutions > 0 and not shortcut.convolutions
        if is_branch and branch.value.shape == shortcut.value.shape and branch.value.kind != "act":
            found.append(value.frame.path)
    return list(dict.fromkeys(found))


def _plain(anatomy: Anatomy, units: Units) -> None:
    """In a network without any unit every convolution is one, with its normalisation and activation."""
    found, lost = [], []
    for event in anatomy.look.events:
        if event.kind != "conv" or not event.spatial or not anatomy.look.learns(event.path):
            continue
        try:
            found.append(plain_unit(anatomy, event))
        except TraceError as error:
            units.rejected.append(Reject(event.path, str(error)))
            lost.append((event.path, event.clock))
    units.found += _once(found)
    # Some convolutions without an activation are as they should be: those that make the scores, or a branch's last.
    units.lost += lost if len(lost) > 2 * len(units.found) else []


def plain_unit(anatomy: Anatomy, event: Event) -> Unit:
    """A convolution with its normalisation and activation as a unit of its own.

    Raises:
        TraceError: There is no place behind its activation that can hold an SE, with the reason.
    """
    block, node = after_convolution(anatomy, event)
    return Unit(block.path, "plain", block, block.call.end if block.path else event.clock, None, 0, node, None, event)
