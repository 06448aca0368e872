"""Joins: the additions and concatenations of feature maps in a block's forward, with their operands.

In: a traced `Block`. Out: the `Join` that a node of it is, and the `Unit` around a join, where a rule says it is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ..reading.block import Block
from ..reading.layout import channel_axis, positions
from .unit import Unit


@dataclass(frozen=True)
class Operand:
    """One operand of a join, with the set of nodes that it alone is computed from."""

    node: fx.Node
    alone: int
    script: str

    @property
    def convolutions(self) -> int:
        """Number of convolutions on the way to this operand alone."""
        return self.script.count("c")

    @property
    def transformed(self) -> bool:
        """Whether it has a convolution and an activation."""
        return "c" in self.script and "a" in self.script


@dataclass(frozen=True)
class Join:
    """An addition or concatenation of feature maps in a block's own forward."""

    block: Block
    node: fx.Node
    kind: str
    operands: tuple[Operand, ...]


def join_at(block: Block, node: fx.Node) -> Join | None:
    """The join a node is, or None."""
    kind = block.kind(node)
    if kind not in ("add", "cat") or not block.is_map(node):
        return None
    sources = _flatten(block, node, kind)
    shapes = [tuple(block.value(source).shape) for source in sources]
    if len(sources) < 2 or (kind == "add" and len(set(shapes)) > 1):
        return None
    operands = []
    for source in sources:
        others = 0
        for other in sources:
            if other is not source:
                others |= block.ancestors[other]
        alone = block.ancestors[source] & ~others
        operands.append(Operand(source, alone, block.script(block.within(alone))))
    return Join(block, node, kind, tuple(operands))


def _flatten(block: Block, node: fx.Node, kind: str) -> list[fx.Node]:
    """The operands of a join; a sum of sums, each used nowhere else, is one sum of all."""
    operands: list[fx.Node] = []
    for source in block.maps_into(node):
        if kind == "add" and block.kind(source) == "add" and len(source.users) == 1 and block.is_map(source):
            operands += _flatten(block, source, kind)
        else:
            operands.append(source)
    return operands


def placeholders(block: Block) -> int:
    """The set of a block's inputs."""
    return sum(1 << i for i, node in enumerate(block.nodes) if node.op == "placeholder")


def area(block: Block, node: fx.Node) -> int:
    """Number of positions of a node's map."""
    shape = tuple(block.value(node).shape)
    return math.prod(positions(shape, channel_axis(shape, block.look.size or (1, 1))))


def joined(kind: str, join: Join, branch: Operand | None = None, other: Operand | None = None) -> Unit:
    """The unit around a join; without a branch, all of its operands are."""
    block = join.block
    mask = branch.alone if branch else union_of(operand.alone for operand in join.operands)
    return Unit(
        path=block.path,
        kind=kind,
        block=block,
        end=_end(block, join.node),
        join=join.node,
        branch=mask,
        transformed=branch.node if branch else None,
        untransformed=other.node if other else None,
    )


def union_of(masks: Iterable[int]) -> int:
    """The union of some sets of nodes."""
    union = 0
    for mask in masks:
        union |= mask
    return union


def _end(block: Block, node: fx.Node) -> int:
    """When a node ran: the end of the last child called before it. The block's own end where it is its only unit."""
    before = [block.calls[n.name].end for n in block.nodes[: block.index[node]] if n.name in block.calls]
    return max(before, default=block.call.start) + 1 if not block.path else block.call.end
