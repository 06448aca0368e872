"""Rules: what an addition or concatenation of feature maps is, seen from the way its operands came about.

In: a traced `Block`. Out: the `Unit`s that its joins make, and a `Reject` with the reason for every other join. Rules
go in a fixed order; the first one with an opinion decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import fx

from ..reading.block import Block
from .joins import Join, area, join_at, joined, placeholders, union_of
from .unit import Reject, Unit

Answer = Reject | list[Unit] | None
WITHIN = "a join inside a unit's branch belongs to that unit"


def _long_skip(join: Join) -> Answer:
    """A skip connection over lower resolutions (U-Net): the rest of the network is no branch."""
    block = join.block
    size = area(block, join.node)
    for operand in join.operands:
        inside = [node for node in block.within(operand.alone) if block.is_map(node)]
        holds_join = any(node is not operand.node and join_at(block, node) is not None for node in inside)
        if (join.kind == "cat" or holds_join) and any(area(block, node) < size for node in inside):
            return Reject(block.path, "a skip connection over lower resolutions, not a unit")
    return None


def _residual(join: Join) -> Answer:
    """A branch with convolutions and activations, and a shortcut with fewer of the one and none of the other after."""
    if join.kind != "add" or len(join.operands) != 2:
        return None
    for branch, shortcut in (join.operands, join.operands[::-1]):
        fewer = shortcut.convolutions < branch.convolutions
        if branch.transformed and fewer and _no_activation_after_convolution(shortcut.script):
            return [joined("residual", join, branch, shortcut)]
    return None


def _no_activation_after_convolution(script: str) -> bool:
    """Whether a shortcut's script has no activation after its first convolution."""
    return re.search("c.*a", script) is None


def _sum(join: Join) -> Answer:
    """Any other addition is no unit."""
    if join.kind != "add":
        return None
    path = join.block.path
    if len(join.operands) > 2:
        return Reject(path, f"a sum of {len(join.operands)} maps is a fusion, not a residual")
    if sum(operand.transformed for operand in join.operands) == 2:
        return Reject(path, "a sum of two transformed maps is a fusion, not a residual")
    if any("c" in operand.script for operand in join.operands):
        return Reject(path, "no activation on the branch: a sum that can be re-parameterised, or an attention's")
    return Reject(path, "no convolution on either side of the addition")


def _cell(join: Join) -> Answer:
    """NASNet's cells: a concatenation of two and more sums."""
    block = join.block
    sums = [operand for operand in join.operands if block.kind(operand.node) == "add"]
    # Its sums take one another's results, and all of them are the cell's.
    whole = block.ancestors[join.node] & ~placeholders(block) & ~(1 << block.index[join.node])
    return [replace(joined("inception", join), branch=whole)] if len(sums) >= 2 else None


def _dual_path(join: Join) -> Answer:
    """Dual-path networks join the same transformation twice: the addition is the unit, the concatenation a part."""
    sides = [operand for operand in join.operands if operand.transformed]
    if len(sides) != 1:
        return None
    block = join.block
    made = block.walk_back(sides[0].node)
    added = any(block.kind(user) == "add" for user in _reached(block, made))
    return Reject(block.path, "joins a second time what is added to the shortcut") if added else None


def _reached(block: Block, node: fx.Node) -> Iterable[fx.Node]:
    """What takes a node's value, itself or a slice of it."""
    for user in node.users:
        yield user
        if block.passes(user):
            yield from _reached(block, user)


def _dense(join: Join) -> Answer:
    """Dense connectivity: every operand but the first is a layer's output, and each layer took all those before."""
    block, operands = join.block, [operand.node for operand in join.operands]
    layers = operands[1:]
    if not layers or not all(
        layer.op == "call_module" and all(block.ancestors[layer] >> block.index[o] & 1 for o in operands[:i])
        for i, layer in enumerate(layers, 1)
    ):
        return None
    takes_all = all(set(operands[:i]) <= set(layer.all_input_nodes) for i, layer in enumerate(layers, 1))
    return [_layer(block, layer) for layer in layers] if takes_all and len(layers) > 1 else None


def _layer(block: Block, node: fx.Node) -> Unit:
    call = block.calls[node.name]
    return Unit(call.path, "dense", block, call.end)


def _aggregation(join: Join) -> Answer:
    """One-shot aggregation: a chain of convolutions, all of it concatenated, and a convolution of that."""
    unit = aggregation(join.block, join.node) if _is_chain(join) else None
    return [unit] if unit is not None else None


def _is_chain(join: Join) -> bool:
    ancestors, index = join.block.ancestors, join.block.index
    nodes = [operand.node for operand in join.operands]
    chained = [a for a in nodes if any(b is not a and ancestors[b] >> index[a] & 1 for b in nodes)]
    return len(chained) >= 2 and any("c" in operand.script for operand in join.operands)


def aggregation(block: Block, node: fx.Node) -> Unit | None:
    """The unit that ends with the convolution of a concatenated chain, or None where no convolution follows."""
    end = _after_aggregation(block, node)
    if "c" not in block.script(block.within(block.ancestors[end] & ~block.ancestors[node])):
        return None
    inside = block.ancestors[end] & ~placeholders(block)
    return Unit(block.path, "aggregation", block, block.call.end, node, inside, end)


def chains_of(block: Block) -> list[str]:
    """The block's path, if all it returns is a concatenated chain: what aggregates it is in the block around it."""
    returned = block.output().args[0]
    join = join_at(block, returned) if isinstance(returned, fx.Node) else None
    return [block.path] if join is not None and join.kind == "cat" and _is_chain(join) else []


def _after_aggregation(block: Block, node: fx.Node) -> fx.Node:
    allowed = frozenset({"conv", "norm", "act"})
    last = node
    while len(last.users) >= 1:
        users = [user for user in last.users if user.op != "output"]
        if len(users) != 1 or not block.kinds(users[0]) or not block.kinds(users[0]) <= allowed:
            break
        last = users[0]
    return last


def _concat_residual(join: Join) -> Answer:
    """A residual by concatenation: one transformed operand with an untransformed one (chunked, pooled or plain)."""
    if join.kind != "cat" or len(join.operands) != 2:
        return None
    for branch, other in (join.operands, join.operands[::-1]):
        if branch.transformed and "c" not in other.script:
            return [joined("concat_residual", join, branch, other)]
    return None


def _inception(join: Join) -> Answer:
    """Parallel branches from one input, concatenated."""
    branches = [operand for operand in join.operands if operand.transformed]
    return [joined("inception", join)] if join.kind == "cat" and len(branches) >= 2 else None


def _concat(join: Join) -> Answer:
    """Any other concatenation is no unit."""
    return Reject(join.block.path, "a concatenation of maps that were not transformed here")


RULES: tuple[Callable[[Join], Answer], ...] = (
    _long_skip,
    _residual,
    _sum,
    _cell,
    _dual_path,
    _dense,
    _aggregation,
    _concat_residual,
    _inception,
    _concat,
)


def joins_of(block: Block) -> tuple[list[Unit], list[Reject]]:
    """The units of one block, from its last join back: a join inside a unit's branch is a part of that unit."""
    found: list[Unit] = []
    rejected: list[Reject] = []
    taken = 0
    for node in reversed(block.nodes):
        join = join_at(block, node)
        if join is None:
            continue
        if taken >> block.index[node] & 1:
            rejected.append(Reject(block.path, WITHIN))
            continue
        answer = next(answer for rule in RULES if (answer := rule(join)) is not None)
        if isinstance(answer, Reject):
            rejected.append(answer)
            continue
        found.extend(answer)
        taken |= union_of([operand.alone for operand in join.operands] + [unit.branch for unit in answer])
    return found, rejected
