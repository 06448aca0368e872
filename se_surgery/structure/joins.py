"""Joins: the additions and concatenations of feature maps in one block's graph, with their operands.

In: a traced `Block`. Out: its joins, and for a join of one graph of a block the same one in another graph of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from ..reading.block import Block
from .unit import Unit


@dataclass(frozen=True)
class Side:
    """One operand of a join in a block's graph, with the set of nodes that it alone is computed from."""

    node: fx.Node
    alone: int


def sources_of(block: Block, node: fx.Node) -> list[fx.Node]:
    """The operands of a join; a sum of sums, each used nowhere else, is one sum of all."""
    found: list[fx.Node] = []
    for source in block.maps_into(node):
        is_part = block.kind(node) == block.kind(source) == "add" and len(block.takers(source)) == 1
        is_sum = is_part and len(block.maps_into(source)) > 1
        found += sources_of(block, source) if is_sum else [behind_constants(block, source)]
    return found


def behind_constants(block: Block, node: fx.Node) -> fx.Node:
    """From a map with a parameter added, and used once, back to the map."""
    while block.kind(node) == "add" and len(block.takers(node)) == 1 and len(block.maps_into(node)) == 1:
        (node,) = block.maps_into(node)
    return node


def sides_of(block: Block, sources: list[fx.Node]) -> list[Side]:
    """Operands with what each alone is computed from."""
    sides = []
    for source in sources:
        others = union_of(block.ancestors[other] for other in sources if other is not source)
        sides.append(Side(source, block.ancestors[source] & ~others))
    return sides


def counterpart(unit: Unit, block: Block) -> Unit | None:
    """The same unit in another graph of its block: at the join with the same number; None where there is no such."""
    assert unit.join is not None
    mine, others = (_joins(graph, str(unit.block.kind(unit.join))) for graph in (unit.block, block))
    if unit.join not in mine or len(mine) != len(others):
        return None
    join = others[mine.index(unit.join)]
    before, after = sources_of(unit.block, unit.join), sources_of(block, join)
    if len(before) != len(after):
        return None
    sides = dict(zip(before, sides_of(block, after), strict=True))
    if unit.transformed is not None and unit.transformed not in sides:
        return None
    branch = sides[unit.transformed] if unit.transformed is not None else None
    inside = branch.alone if branch is not None else union_of(side.alone for side in sides.values())
    return replace(
        unit,
        block=block,
        end=end_of(block, join),
        join=join,
        branch=inside,
        transformed=branch.node if branch is not None else None,
        untransformed=sides[unit.untransformed].node if unit.untransformed is not None else None,
    )


def _joins(block: Block, kind: str) -> list[fx.Node]:
    """The joins of one kind, without the sums that are a part of another one."""
    found = [n for n in block.nodes if block.kind(n) == kind and block.is_map(n) and len(block.maps_into(n)) > 1]
    inner = {n for join in found if kind == "add" for n in block.maps_into(join)}
    parts = {n for n in inner if n in found and len(block.takers(n)) == 1}
    return [node for node in found if node not in parts]


def placeholders(block: Block) -> int:
    """The set of a block's inputs."""
    return sum(1 << i for i, node in enumerate(block.nodes) if node.op == "placeholder")


def union_of(masks: Iterable[int]) -> int:
    """The union of some sets of nodes."""
    union = 0
    for mask in masks:
        union |= mask
    return union


def end_of(block: Block, node: fx.Node) -> int:
    """When a node ran: the end of the last child called before it. The block's own end where it is its only unit."""
    before = [block.calls[n.name].end for n in block.nodes[: block.index[node]] if n.name in block.calls]
    return max(before, default=block.call.start) + 1 if not block.path else block.call.end
