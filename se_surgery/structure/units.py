"""Units: the places of a network that an SE serves, recognised by the way the data goes.

In: an `Anatomy`. Out: `Unit`s in order of execution, and every candidate that is none with its reason.

Every addition and concatenation of feature maps is a candidate (see `rules`). Blocks without a join are units too where
they are of a class that elsewhere has a shortcut, or pair a depthwise with a pointwise convolution; a network with no
unit at all is a plain one, and each of its convolutions is a unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import fx, nn

from ..errors import InstanceForwardError, TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.events import Event
from ..reading.layout import is_under, parents
from ..reading.ways import names_in
from ..records import original_class
from .behind import after_convolution, behind_in
from .graph import Graph
from .hosts import Hosts, aggregation
from .joins import Side, counterpart, end_of, placeholders, sides_of, sources_of
from .nesting import HOLDER, settle
from .outside import ON_SEQUENCES, ON_TOKENS, in_heads, outside, works_on_sequences, works_on_tokens
from .rules import Verdicts, judged
from .unit import WITH_SHORTCUT, Reject, Unit


@dataclass
class Units:
    """What `recognise` found.

    Attributes:
        found: The units in order of execution.
        rejected: The candidates that are none.
        closed: Modules that join feature maps and cannot be traced.
        not_understood: Modules with a join of which it is not known what it is.
    """

    found: list[Unit] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)


def recognise(anatomy: Anatomy) -> Units:
    """Find the units of a model."""
    graph, units = Graph(anatomy.look), Units()
    verdicts = judged(graph)
    settle(graph, verdicts)
    _hosted(anatomy, graph, verdicts, units)
    _same_class(anatomy, units)
    _separable(anatomy, units)
    other = ON_TOKENS if works_on_tokens(anatomy.look) else ON_SEQUENCES if works_on_sequences(anatomy.look) else ""
    if not units.found and other:
        units.closed = []
        units.rejected.append(Reject("", other))
    # A network whose blocks cannot be looked into is not a plain one.
    elif not units.found and not units.closed:
        _plain(anatomy, units)
    units.found.sort(key=lambda unit: (unit.end, unit.start, unit.number))
    for unit, reject in list(in_heads(anatomy.look, units.found)):
        units.found.remove(unit)
        units.rejected.append(reject)
    units.rejected = [_settled(reject, units.found) for reject in units.rejected]
    units.rejected += list(outside(anatomy.look, units.found, units.rejected))
    return units


def _hosted(anatomy: Anatomy, graph: Graph, verdicts: Verdicts, units: Units) -> None:
    """The units in the blocks that can hold them; a block that runs again has the same ones."""
    hosts = Hosts(anatomy, graph)
    for found in verdicts.found:
        frame = found.join.value.frame
        if frame is None or anatomy.look.calls[frame.path][0] is not frame:
            continue
        try:
            units.found.append(hosts.unit(found))
        except TraceError as error:
            path = frame.path
            if path not in units.closed:
                units.closed.append(path)
                units.rejected.append(Reject(path, str(error), "untraceable", isinstance(error, InstanceForwardError)))
    units.rejected += [Reject(join.path, unfit.reason) for join, unfit in verdicts.unfit]
    units.not_understood = [join.path for join, unfit in verdicts.unfit if not unfit.is_understood]


def _settled(reject: Reject, found: list[Unit]) -> Reject:
    """What cannot be looked into blocks nothing where it lies in a unit's branch (FasterNet's partial convolution)."""
    inside = reject.blocking and any(unit.path != reject.path and unit.calls(reject.path) for unit in found)
    return replace(reject, blocking=False) if inside else reject


def _same_class(anatomy: Anatomy, units: Units) -> None:
    """Blocks of a class that elsewhere has a shortcut, and have none themselves: strided inverted residuals."""
    seen = anatomy.look
    classes = {_class_of(unit) for unit in units.found if unit.kind in WITH_SHORTCUT and unit.path} - {nn.Sequential}
    _open_holders(anatomy, units, classes)
    found = []
    for path in seen.calls:
        if not path or path in units.closed:
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
    return None if is_part(block) else _whole(block)


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
    return _whole(block)


def _whole(block: Block) -> Unit:
    """All that a block does as a branch."""
    output = block.output()
    inside = block.ancestors[output] & ~placeholders(block) & ~(1 << block.index[output])
    return Unit(block.path, "straight", block, block.call.end, None, inside)


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


def _separable(anatomy: Anatomy, units: Units) -> None:
    """A depthwise convolution followed by a pointwise one in the same module (MobileNetV1, LCNet)."""
    seen = anatomy.look
    convolutions = [e for e in seen.events if e.kind == "conv" and e.spatial]
    pairs = [
        (first, second)
        for first, second in itertools.pairwise(convolutions)
        if first.depthwise and first.wide and not second.wide and second.groups == 1 and seen.learns(first.path)
    ]
    holders: dict[str, list[Event]] = {}
    for first, second in pairs:
        around = (first.path, *parents(first.path))
        holder = next(path for path in around if path == second.path or is_under(second.path, path))
        if not any(unit.holds(event) for event in (first, second) for unit in units.found):
            holders.setdefault(holder, []).append(second)
    found = []
    for holder, seconds in holders.items():
        try:
            if len(seconds) == 1 and not isinstance(seen.modules[holder], nn.Sequential) and holder:
                found.append(_straight(anatomy.block(holder)))
            else:
                found += [plain_unit(anatomy, event) for event in seconds]
        except TraceError as error:
            units.rejected.append(Reject(holder, str(error)))
    units.found += found


def _plain(anatomy: Anatomy, units: Units) -> None:
    """In a network without any unit every convolution is one, with its normalisation and activation."""
    found: dict[tuple[str, str], Unit] = {}
    for event in anatomy.look.events:
        if event.kind != "conv" or not event.spatial or not anatomy.look.learns(event.path):
            continue
        try:
            unit = plain_unit(anatomy, event)
        except TraceError as error:
            units.rejected.append(Reject(event.path, str(error)))
            continue
        assert unit.transformed is not None
        # Several convolutions of one re-parameterisable block count as one.
        found.setdefault((unit.block.path, unit.transformed.name), unit)
    units.found += found.values()


def plain_unit(anatomy: Anatomy, event: Event) -> Unit:
    """A convolution with its normalisation and activation as a unit of its own.

    Raises:
        TraceError: There is no place behind its activation that can hold an SE, with the reason.
    """
    block, node = after_convolution(anatomy, event)
    return Unit(block.path, "plain", block, block.call.end if block.path else event.clock, None, 0, node, None, event)
