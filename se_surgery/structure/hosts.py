"""Hosts: in which block's forward a unit is, and which nodes of its graph are the unit's.

In: a unit as the flat graph of a whole forward shows it. Out: a `Unit` of the block whose forward can hold its SE.

A block's graph has the same joins as its call in the forward; their events tell which is which. The operands of a join
are the same in both, in the same order.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from torch import fx, nn

from ..errors import InstanceForwardError, TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.dataflow import Value
from ..reading.events import Call
from .graph import Graph, Join, Operand, members
from .joins import Side, behind_constants, end_of, placeholders, sides_of, union_of
from .rules import Found, around, before_gates, behind
from .unit import Unit

ELSEWHERE = "its join is not in the graph of its forward"


class Hosts:
    """Finds the places of units in the forwards of blocks."""

    def __init__(self, anatomy: Anatomy, graph: Graph) -> None:
        self.anatomy = anatomy
        self.graph = graph

    def unit(self, found: Found) -> Unit:
        """The unit in the block that holds its place.

        Raises:
            TraceError: The forward that it is in cannot be written as a graph, or its graph has no such join.
        """
        try:
            if found.kind == "aggregation":
                return self._aggregation(found)
            layer = self._layer(found) if found.kind == "dense" else None
            return layer or self._joined(found)
        except InstanceForwardError:
            raise
        except TraceError:
            branch = self._branch(found)
            if branch is None:
                raise
            return branch

    def _joined(self, found: Found) -> Unit:
        block, node = self._node(found.join)
        values = [operand.value.index for operand in found.join.operands]
        sides = dict(zip(values, self._sides(block, node, found.join), strict=True))
        branch = sides[found.branch.value.index] if found.branch is not None else None
        shortcut = sides[found.shortcut.value.index] if found.shortcut is not None else None
        inside = branch.alone if branch is not None else union_of(side.alone for side in sides.values())
        if found.cut is not None and (cut := self._node_of(block, found.cut)) is not None:
            inside &= ~block.ancestors[cut]
        if found.kind == "cell":
            # Its sums take one another's results, and all of them are the cell's.
            inside = block.ancestors[node] & ~placeholders(block) & ~(1 << block.index[node])
        return Unit(
            path=block.path,
            kind="inception" if found.kind == "cell" else found.kind,
            block=block,
            end=end_of(block, node),
            join=node,
            branch=inside,
            transformed=branch.node if branch else None,
            untransformed=shortcut.node if shortcut else None,
            is_first=found.is_first,
        )

    def _node(self, join: Join) -> tuple[Block, fx.Node]:
        """The block whose forward a join is in, and its node there."""
        frame = join.value.frame
        assert frame is not None and join.value.event is not None
        block = self.anatomy.block(frame.path)
        node = self._node_of(block, join.value.index)
        if node is None:
            raise TraceError(ELSEWHERE)
        return block, node

    def _node_of(self, block: Block, index: int) -> fx.Node | None:
        """The node of a block that is a value of its own forward."""
        event = self.graph.values[index].event
        own = (node for node in block.nodes if node.op != "call_module")
        return next((node for node in own if event is not None and event in block.events(node)), None)

    def _sides(self, block: Block, node: fx.Node, join: Join) -> list[Side]:
        """The operands of a join as nodes of a block's graph, each with the nodes that it alone is computed from."""
        sources = self._sources(block, node, join.value, join)
        if len(sources) != len(join.operands):
            raise TraceError(ELSEWHERE)
        pairs = zip(sides_of(block, sources), join.operands, strict=True)
        return [replace(side, alone=side.alone | self._shared(block, operand, side.node)) for side, operand in pairs]

    def _sources(self, block: Block, node: fx.Node, value: Value, join: Join) -> list[fx.Node]:
        """The nodes that a join takes, those of the sums that are a part of it included."""
        maps = block.maps_into(node)
        if len(maps) != len(value.inputs):
            raise TraceError(ELSEWHERE)
        found: list[fx.Node] = []
        for index, source in zip(value.inputs, maps, strict=True):
            if index in join.absorbed:
                found += self._sources(block, source, self.graph.values[index], join)
            else:
                found.append(behind_constants(block, source))
        return found

    def _shared(self, block: Block, operand: Operand, source: fx.Node) -> int:
        """The calls that make an operand and something else besides: a body that returns a pair."""
        mask = 0
        alone = operand.alone & self.graph.convolutions
        for node in block.within(block.ancestors[source]):
            call = block.calls.get(node.name)
            if call is not None and any(self.graph.values[index].is_in(call) for index in members(alone)):
                mask |= 1 << block.index[node]
        return mask

    def _layer(self, found: Found) -> Unit | None:
        """A dense layer that is a module of its own: the outermost one that returns the new features, and joins not."""
        join, branch = found.join, found.branch
        assert branch is not None and join.value.frame is not None
        around = [call for call in branch.value.calls if not join.value.is_in(call)]
        made = [self.graph.values[index] for index in members(found.region & self.graph.convolutions)]
        around = [call for call in around if call.path and all(value.is_in(call) for value in made)]
        layers = [call for call in around if not _is_sequential(self.graph, call)]
        if not layers:
            return None
        frame = self.anatomy.block(join.value.frame.path)
        return Unit(layers[-1].path, "dense", frame, layers[-1].end)

    def _branch(self, found: Found) -> Unit | None:
        """A branch that is a module of its own, where the forward around it cannot be written as a graph."""
        if found.branch is None:
            return None
        calls = [call for call in found.branch.value.calls if not found.join.value.is_in(call)]
        modules = self.graph.look.modules
        layers = [call for call in calls if not type(modules[call.path]).__module__.startswith("torch.nn.")]
        layers = [call for call in layers if not _is_sequential(self.graph, call)]
        for call in reversed(layers):
            with contextlib.suppress(TraceError):
                return Unit(call.path, "branch", self.anatomy.block(call.path), call.end)
        return None

    def _aggregation(self, found: Found) -> Unit:
        """A concatenated chain with the convolution behind it, which may be in the forward around."""
        block = self.anatomy.block(around(found.join).path)
        node = self._result(block, found.join.value)
        chain = behind(found.join)
        inner = before_gates(self.graph, chain)
        # In front of an SE that is there already, or where the forward has no such place behind it.
        candidates = (self._result(block, self.graph.values[i]) for i in (chain[inner - 1], *chain[inner:]))
        end = next((candidate for candidate in candidates if candidate is not None), None)
        if end is None and block.path:
            # What follows is nothing that its forward could be parted at: all that it does is the branch.
            return whole(block)
        if node is None or end is None:
            raise TraceError(ELSEWHERE)
        inside = block.ancestors[end] & ~placeholders(block)
        return Unit(block.path, "aggregation", block, block.call.end, node, inside, end)

    def _result(self, block: Block, value: Value) -> fx.Node | None:
        """The node of a block whose result a value is: an operation of its own, or a child that returns it."""
        returned = (n for n in block.nodes if block.calls.get(n.name) in value.calls)
        return self._node_of(block, value.index) or next(returned, None)


def whole(block: Block) -> Unit:
    """All that a block does as a branch."""
    output = block.output()
    inside = block.ancestors[output] & ~placeholders(block) & ~(1 << block.index[output])
    return Unit(block.path, "straight", block, block.call.end, None, inside)


def aggregation(block: Block, node: fx.Node) -> Unit | None:
    """The unit that ends with the convolution of a concatenated chain, or None where no convolution follows."""
    end = _after_aggregation(block, node)
    if "c" not in block.script(block.within(block.ancestors[end] & ~block.ancestors[node])):
        return None
    inside = block.ancestors[end] & ~placeholders(block)
    return Unit(block.path, "aggregation", block, block.call.end, node, inside, end)


def _after_aggregation(block: Block, node: fx.Node) -> fx.Node:
    allowed = frozenset({"conv", "norm", "act"})
    last = node
    while len(last.users) >= 1:
        users = [user for user in last.users if user.op != "output"]
        if len(users) != 1 or not block.kinds(users[0]) or not block.kinds(users[0]) <= allowed:
            break
        last = users[0]
    return last


def _is_sequential(graph: Graph, call: Call) -> bool:
    return type(graph.look.modules[call.path]).forward is nn.Sequential.forward
