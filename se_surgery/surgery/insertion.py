"""Insertion: calls of new children in a traced graph.

In: a graph and the edges to put calls on. Out: a copy of the graph with them, each checked to be there once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..errors import TraceError
from ..records import Edge


@dataclass(frozen=True)
class Insertion:
    """A call of the child `name` to be put on an edge; equal for equal blocks.

    `makers` are the calls that make its map, the last of them the producer, where they end with a normalisation and
    perhaps activations: all these calls and the SE's become one.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    late: bool
    makers: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, edge: Edge, makers: tuple[str, ...] = ()) -> Insertion:
        """The insertion of a child on an edge."""
        return cls(name, edge.producer, edge.consumers, edge.late, makers)


def insert(graph: fx.Graph, insertions: Sequence[Insertion]) -> fx.Graph:
    """A copy of the graph with one call for every insertion, in their order; each is checked to be there once."""
    graph = copy.deepcopy(graph)
    nodes = {node.name: node for node in graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    standing: dict[tuple[str, str], fx.Node] = {}
    for new in insertions:
        missing = [name for name in (new.producer, *new.consumers) if name not in nodes]
        if missing:
            raise TraceError(f"the forward has no value {missing[0]!r} any more")
        sources = {standing.get((new.producer, consumer), nodes[new.producer]) for consumer in new.consumers}
        if len(sources) > 1:
            raise TraceError(f"{new.name!r} would gate the same value before and behind another SE")
        (source,) = sources
        first = min(new.consumers, key=order.__getitem__)
        with graph.inserting_before(nodes[first]) if new.late else graph.inserting_after(source):
            call = graph.call_module(new.name, (source,))
        for consumer in new.consumers:
            nodes[consumer].replace_input_with(source, call)
            standing[new.producer, consumer] = call
    for insertion in insertions:
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == insertion.name]
        if len(calls) != 1 or not calls[0].users:
            raise TraceError(f"{insertion.name!r} would be called {len(calls)} times, not once")
        _join(graph, [nodes[maker] for maker in insertion.makers], calls[0])
    return graph


# Under this a node's `meta` has the modules whose calls were made one, the SE's last.
JOINED = "se_surgery_joined"


def _join(graph: fx.Graph, makers: list[fx.Node], call: fx.Node) -> None:
    """Make one call of an SE's and of those that make its map, where nothing else takes what is between them."""
    calls = [*makers, call]
    if not makers or any(set(one.users) != {following} for one, following in itertools.pairwise(calls)):
        return
    targets = tuple(str(one.target) for one in calls)
    with graph.inserting_before(makers[0]):
        joined = graph.call_module("_lean_" + "_".join(targets).replace(".", "_"), makers[0].args)
    joined.meta[JOINED] = targets
    call.replace_all_uses_with(joined)
    for one in reversed(calls):
        graph.erase_node(one)
