"""Placements: where in a unit each placement puts its SE (section 6.4 and figure 5 of the paper).

In: a `Unit`. Out: the `Edge` of its graph that the SE goes on, or a `NoPlace` with the reason.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace

from torch import fx

from ..errors import TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.trace import structure
from ..records import Edge
from ..structure.behind import after_convolution
from ..structure.joins import placeholders
from ..structure.unit import WITH_SHORTCUT, Unit
from ..structure.units import in_other_way, in_training, is_part


class NoPlace(Exception):
    """The unit has no place for the placement; the message says why."""


def places(anatomy: Anatomy, unit: Unit, placement: str) -> tuple[Edge, ...]:
    """The edges for one placement in one unit: in its block's forward, and in every other way into the block.

    Where a forward's training graph differs from its evaluation graph (functional drop path), each has its own edge.

    Raises:
        NoPlace: The unit has none, or not in both modes.
    """
    edge = place(anatomy, unit, placement)
    own = _in_both_modes(anatomy, unit, placement, edge)
    others = (_in_other_way(anatomy, unit, placement, own, block) for block in anatomy.other_ways(edge.owner))
    return tuple(itertools.chain(own, *others))


def _in_other_way(
    anatomy: Anatomy, unit: Unit, placement: str, own: tuple[Edge, ...], block: Block
) -> tuple[Edge, ...]:
    """The edges for the same SE in another way into its block; none where that way has no such place.

    A way that is left as it is cannot be taken instead of the forward: see `surgery.exchange`.
    """
    edge = own[0]
    found = tuple(same for one in own if (same := _same_edge(anatomy, one, block.trace.method)) is not None)
    if len(found) == len(own):
        return found
    other = in_other_way(unit, block) if edge.owner == unit.path else None
    if other is not None and unit.join is not None:
        there = place(anatomy, other, placement)
        is_same = there.method == block.trace.method and there.shape == edge.shape
        return _in_both_modes(anatomy, other, placement, there) if is_same else ()
    with contextlib.suppress(NoPlace):
        found = _in_both_modes(anatomy, other, placement, place(anatomy, other, placement)) if other else ()
        if found and found[0].shape == edge.shape:
            return found
    returns = is_returned(anatomy.block(edge.owner, edge.method), edge) and not is_part(block)
    return _on_return(anatomy, edge, block) if returns else ()


def _same_edge(anatomy: Anatomy, edge: Edge, method: str) -> Edge | None:
    """The edge in another method that has the same graph."""
    anatomy = anatomy.in_training if edge.mode == "training" else anatomy
    try:
        home, block = (anatomy.block(edge.owner, name) for name in (edge.method, method))
    except TraceError:
        return None
    if structure(home.trace.graph) != structure(block.trace.graph):
        return None
    names = {node.name: other.name for node, other in zip(home.nodes, block.nodes, strict=True)}
    return replace(
        edge, method=method, producer=names[edge.producer], consumers=tuple(names[name] for name in edge.consumers)
    )


def _on_return(anatomy: Anatomy, edge: Edge, block: Block) -> tuple[Edge, ...]:
    """The edge on the one map that another way returns, where that is of the same shape."""
    output = block.output()
    producer = output.args[0]
    if not isinstance(producer, fx.Node) or not block.is_map(producer):
        return ()
    if anatomy.differs_in_training(block.path, block.trace.method):
        return ()
    found = block.edge(producer, edge.axis, [output])
    return (found,) if found.shape == edge.shape else ()


def is_returned(block: Block, edge: Edge) -> bool:
    """Whether an edge is the one on which a block returns its map."""
    output = block.output()
    returned = output.args[0]
    return edge.consumers == (output.name,) and isinstance(returned, fx.Node) and returned.name == edge.producer


def _in_both_modes(anatomy: Anatomy, unit: Unit, placement: str, edge: Edge) -> tuple[Edge, ...]:
    if not anatomy.differs_in_training(edge.owner, edge.method):
        return (edge,)
    try:
        trained = in_training(anatomy, unit)
    except TraceError as error:
        raise NoPlace(str(error)) from error
    if trained is None:
        raise NoPlace("in training its forward is another one, without this place")
    other = place(anatomy.in_training, trained, placement)
    if other.channels != edge.channels or other.owner != edge.owner:
        raise NoPlace("in training its forward is another one, with another place")
    return (replace(edge, mode="evaluation"), replace(other, mode="training"))


def place(anatomy: Anatomy, unit: Unit, placement: str) -> Edge:
    """The edge for one placement in one unit's own graph.

    Raises:
        NoPlace: The unit has none.
    """
    rules = PLACEMENTS[placement]
    if unit.kind not in rules:
        raise NoPlace(_WHY_NOT[placement])
    if not unit.is_first and placement in ("post", "identity"):
        raise NoPlace("its addition is another unit's, too, and that one has the place")
    try:
        edge = rules[unit.kind](anatomy, unit)
    except TraceError as error:
        raise NoPlace(str(error)) from error
    if not edge.consumers:
        raise NoPlace("nothing takes the value there")
    return edge


# ----------------------------------------------------------------------------------------------------------- standard


def _after_transformation(anatomy: Anatomy, unit: Unit) -> Edge:
    """After the branch, before it is joined and before a trailing drop path or layer scale."""
    assert unit.transformed is not None
    return _edge(anatomy, unit.block, unit.block.walk_back(unit.transformed))


def _after_join(anatomy: Anatomy, unit: Unit) -> Edge:
    """After the concatenation, and after the activation behind it where the branches have none of their own."""
    assert unit.join is not None
    block, node = unit.block, unit.join
    if "a" not in block.script(unit.nodes):
        node = block.walk_forward(node, frozenset({"norm", "act"}))
    return _edge(anatomy, block, node)


def _at_the_end(anatomy: Anatomy, unit: Unit) -> Edge:
    block = _own_block(anatomy, unit)
    return _edge(anatomy, block, block.walk_back(_returned_map(block)))


def _after_layer(anatomy: Anatomy, unit: Unit) -> Edge:
    return _at_the_end(anatomy, unit) if is_module(unit) else _after_transformation(anatomy, unit)


def _behind_activation(anatomy: Anatomy, unit: Unit) -> Edge:
    assert unit.transformed is not None
    return _edge(anatomy, unit.block, unit.transformed)


# ---------------------------------------------------------------------------------------------------------------- pre


def _before_branch(anatomy: Anatomy, unit: Unit) -> Edge:
    """On the one fork that feeds the branch, behind an activation that changes the fork in place."""
    block = _own_block(anatomy, unit)
    inside = _whole(block) if is_module(unit) else unit.branch
    fork, consumers = _fork(block, inside)
    while any(changes_in_place(block, consumer) for consumer in consumers):
        if len(consumers) > 1:
            raise NoPlace("an activation changes the branch's input in place while others read it")
        fork, consumers = consumers[0], block.takers(consumers[0])
    return _edge(anatomy, block, fork, consumers, late=True)


def _fork(block: Block, inside: int) -> tuple[fx.Node, list[fx.Node]]:
    """What feeds a branch, and its takers; the part of a chunked input that the branch takes is already its own."""
    inside &= ~placeholders(block)
    for node in block.within(inside):
        if block.passes(node) and not any(inside >> block.index[source] & 1 for source in node.all_input_nodes):
            inside &= ~(1 << block.index[node])
    entries: dict[fx.Node, list[fx.Node]] = {}
    for node in block.within(inside):
        for source in node.all_input_nodes:
            if not inside >> block.index[source] & 1 and block.is_map(source):
                entries.setdefault(source, []).append(node)
    takers = {node for nodes in entries.values() for node in nodes}
    if len(takers) == 1 and block.kind(joined := next(iter(takers))) == "cat":
        return joined, block.takers(joined)
    if len(entries) == 1:
        ((fork, consumers),) = entries.items()
        return fork, consumers
    raise NoPlace(f"{len(entries)} different values feed the branch, not one")


def changes_in_place(block: Block, node: fx.Node) -> bool:
    """Whether a node changes the map that it is given."""
    if node.op == "call_module":
        module = block.view.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and block.kinds(node) == {"act"}
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return block.kind(node) == "act" and (name.endswith("_") or node.kwargs.get("inplace") is True)


def _whole(block: Block) -> int:
    return sum(1 << i for i, node in enumerate(block.nodes) if node.op not in ("placeholder", "output"))


# --------------------------------------------------------------------------------------------------------------- post


def _after_addition(anatomy: Anatomy, unit: Unit) -> Edge:
    """After the addition and the activations that follow it in the same forward."""
    block, node = unit.block, unit.join
    assert node is not None
    node = _rejoined(block, node)
    return _edge(anatomy, block, block.walk_forward(node, frozenset({"act"})))


def _rejoined(block: Block, node: fx.Node) -> fx.Node:
    """RexNet adds its shortcut to some channels only and joins the others again: the sum is that whole map."""
    users = block.takers(node)
    if len(users) == 1:
        (user,) = users
        slices = [source for source in block.maps_into(user) if source is not node]
        if block.kind(user) == "cat" and slices and all(block.passes(source) for source in slices):
            return user
    return node


def _before_return(anatomy: Anatomy, unit: Unit) -> Edge:
    block = _own_block(anatomy, unit)
    return _edge(anatomy, block, _returned_map(block))


# ----------------------------------------------------------------------------------------------------------- identity


def _on_shortcut(anatomy: Anatomy, unit: Unit) -> Edge:
    """On the shortcut, in parallel with the branch."""
    assert unit.untransformed is not None and unit.join is not None
    block = unit.block
    if block.is_map(unit.untransformed):
        return _edge(anatomy, block, unit.untransformed, [_taker(block, unit.join, unit.untransformed)], late=True)
    raise NoPlace("the shortcut is not a feature map")


def _taker(block: Block, join: fx.Node, operand: fx.Node) -> fx.Node:
    """The node that takes an operand into a join: the join itself, or one of the additions that are a part of it."""
    sums = [join]
    while operand not in sums[0].all_input_nodes:
        taker, *others = sums
        sums = [*others, *(source for source in taker.all_input_nodes if block.kind(source) == "add")]
    return sums[0]


# -------------------------------------------------------------------------------------------------------------- inner


def _after_wide_convolution(anatomy: Anatomy, unit: Unit) -> Edge:
    """After the branch's last convolution with k > 1, its normalisation and activation: on the whole map there."""
    block = _own_block(anatomy, unit)
    nodes = block.within(_whole(block)) if is_module(unit) else unit.nodes
    # What makes one channel is an attention over positions.
    wide = [event for event in block.convolutions(nodes) if event.wide and event.shape[1] > 1]
    if not wide:
        raise NoPlace("the branch has no convolution with k > 1")
    return _edge(anatomy, *after_convolution(anatomy, wide[-1], unit))


# --------------------------------------------------------------------------------------------------------------- kept


def slot_of(anatomy: Anatomy, path: str) -> Edge:
    """The edge into the call of an SE that is there.

    Raises:
        NoPlace: No one call of it can be seen.
    """
    host, _, name = path.rpartition(".")
    try:
        block = anatomy.block(host)
    except TraceError as error:
        raise NoPlace(f"the call of {path!r} cannot be seen ({error}); name a placement") from error
    calls = [node for node in block.nodes if node.op == "call_module" and node.target == name]
    sources = [source for call in calls for source in block.maps_into(call)]
    if len(calls) != 1 or len(sources) != 1:
        raise NoPlace(f"{path!r} is not called once with one map by {host or 'the model'!r}; name a placement")
    return _edge(anatomy, block, sources[0], calls)


# ------------------------------------------------------------------------------------------------------------- common


def _own_block(anatomy: Anatomy, unit: Unit) -> Block:
    """The unit's own block; a dense layer was recognised in the forward of the block that joins it."""
    return anatomy.block(unit.path) if is_module(unit) else unit.block


def is_module(unit: Unit) -> bool:
    """Whether all that a module does is the branch: a dense layer, or one of a block that nobody can look into."""
    return unit.kind == "branch" or (unit.kind == "dense" and unit.join is None)


def _returned_map(block: Block) -> fx.Node:
    value = block.output().args[0]
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, fx.Node) or not block.is_map(value):
        raise NoPlace("its block does not return one feature map")
    return value


def _edge(
    anatomy: Anatomy, block: Block, producer: fx.Node, consumers: list[fx.Node] | None = None, late: bool = False
) -> Edge:
    if not block.is_map(producer):
        raise NoPlace("the value there is not a feature map")
    axis = anatomy.known_axis(block, producer)
    if axis is None and anatomy.look.maps.are_signals:
        raise NoPlace("there its channels cannot be told from its positions, and the network takes no other length")
    return block.edge(producer, axis or 1, consumers, late)


Rule = Callable[[Anatomy, Unit], Edge]

_BRANCHES = (*WITH_SHORTCUT, "aggregation", "straight")
PLACEMENTS: dict[str, dict[str, Rule]] = {
    "standard": {
        **dict.fromkeys((*WITH_SHORTCUT, "aggregation"), _after_transformation),
        "inception": _after_join,
        **dict.fromkeys(("straight", "branch"), _at_the_end),
        "dense": _after_layer,
        "plain": _behind_activation,
    },
    "pre": dict.fromkeys((*_BRANCHES, "branch", "dense"), _before_branch),
    "post": {
        **dict.fromkeys(WITH_SHORTCUT, _after_addition),
        **dict.fromkeys(("aggregation", "straight"), _before_return),
    },
    "identity": dict.fromkeys(WITH_SHORTCUT, _on_shortcut),
    "inner": dict.fromkeys((*_BRANCHES, "branch", "dense"), _after_wide_convolution),
    "inception": {"inception": _after_join},
}
# The placement of an SE that took over the place of one that was there, wherever that was.
KEPT = "kept"
_WHY_NOT = {
    "standard": "the unit has no transformation to follow",
    "pre": "there is no one branch to precede",
    "post": "there is no addition to follow",
    "identity": "there is no shortcut",
    "inner": "there is no branch with a convolution of k > 1",
    "inception": "there is no concatenation of parallel branches",
}
