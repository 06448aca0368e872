"""Inline: the SEs that are written out in a block's own forward, and have no module of their own.

In: an `Anatomy`, and the SE modules that are known. Out: for each a `Written`. It is known by what is computed, and not
by any name: a product of a map with a gate per channel, and the gate made by at least one layer of one position from a
map pooled. What pools and what the layers are may be functions or children, or one child that does it all; where the
product is in a child of its own, the gate is followed to where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx

from ..errors import TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block
from ..reading.events import Event
from ..reading.layout import is_under
from ..reading.look import Look
from .chain import Chain, held, in_order


@dataclass(frozen=True)
class Written:
    """An SE that is written out in a forward.

    Attributes:
        path: Path of its first layer, or of the child of the block that this layer is in.
        block: Path of the block whose own forward multiplies the map by the gate.
        layers: Paths of its layers, in order; a weight that is a block's own is one, too.
        node: The product's name in the block's graph; none where the block cannot be traced.
        clock: When that was.
        shape: Shape of the product.
        axis: Its channel axis.
        weights: Paths of the parameters that functions take to make the gate.
        params: Number of all parameters that make the gate.
        events: What its layers did.
    """

    path: str
    block: str
    layers: tuple[str, ...]
    node: str
    clock: int
    shape: tuple[int, ...]
    axis: int
    weights: tuple[str, ...]
    params: int
    events: tuple[Event, ...]

    @property
    def scaled(self) -> int:
        """Values an image of the map that it scales."""
        return math.prod(self.shape[1:])

    @property
    def rd_channels(self) -> int | None:
        """Width of its hidden layer, or None where it has one layer only."""
        return max(self.events[0].shape[1:], default=1) if len(self.layers) > 1 else None


def written_out(anatomy: Anatomy, known: Collection[str]) -> list[Written]:
    """The SEs that are written out in the forwards of a model's modules, but for what the modules at `known` do."""
    seen = anatomy.look
    owners = dict.fromkeys(event.path for event in seen.events if event.kind == "gate")
    found: dict[str, Written] = {}
    for path in owners:
        if not any(path == other or is_under(path, other) for other in known):
            for one in _in(anatomy, path):
                found.setdefault(one.path, one)
    return list(found.values())


def _in(anatomy: Anatomy, path: str) -> Iterator[Written]:
    """The SEs whose product is in the forward at `path`."""
    try:
        block = anatomy.block(path)
    except TraceError:
        yield from _untraced(anatomy.look, path)
        return
    # The same layers for a second map are the same SE, as a module that is called twice is one.
    taken: dict[tuple[str, ...], str] = {}
    for node in block.nodes:
        gate = _gate_of(anatomy, block, node)
        chain = Chain(anatomy, block, gate) if gate is not None else None
        layers = chain.layers() if chain is not None else []
        paths = tuple(dict.fromkeys(layer.path for layer in layers))
        if chain is None or not layers or paths in taken or not _is_related(block, node, chain):
            continue
        children = [layer.child for layer in layers]
        taken[paths] = next((child for child in children if child not in taken.values()), children[0])
        yield Written(
            path=taken[paths],
            block=path,
            layers=paths,
            node=node.name,
            clock=_clock(block, node),
            shape=tuple(block.value(node).shape),
            axis=anatomy.axis(block, node),
            weights=tuple(chain.weights()),
            params=chain.parameters(),
            events=tuple(layer.event for layer in layers),
        )


def _clock(block: Block, node: fx.Node) -> int:
    """When a node ran; the end of its block where the run has no such event."""
    clock = max((event.clock for event in block.events(node)), default=0)
    return clock if clock > 0 else block.call.end


def _gate_of(anatomy: Anatomy, block: Block, node: fx.Node) -> fx.Node | None:
    """The operand of a product that is one number an image and channel of the other, a map; None where neither is."""
    operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
    if block.kind(node) != "gate" or len(operands) < 2 or not block.is_map(node):
        return None
    values = tuple(block.value(operand) for operand in operands)
    if not block.is_gate(values, block.value(node)):
        return None
    gate = next(operand for operand in operands if len(held(block.value(operand))) < 2)
    axes, shape = held(block.value(gate)), tuple(block.value(node).shape)
    axis = anatomy.axis(block, node) % len(shape)
    return gate if axes == [axis] or (not axes and shape[axis] == 1) else None


def _is_related(block: Block, product: fx.Node, chain: Chain) -> bool:
    """Whether what is pooled has to do with what is multiplied: one comes of the other, or both of one map."""
    if any(here is not block for here, _ in chain.entries):
        return True
    maps = sum(1 << block.index[node] for node in block.nodes if block.is_map(node))
    multiplied = [source for source in product.all_input_nodes if (block, source) not in chain.steps]
    shared = sum(block.ancestors[source] for source in multiplied[:1]) & maps
    return any(block.ancestors[source] & shared for _, source in chain.entries)


def _untraced(seen: Look, path: str) -> Iterator[Written]:
    """As far as the order of events tells it, where no graph shows what comes of what."""
    call = seen.calls[path][0]
    since = call.start
    for gate in (event for event in seen.own(call) if event.kind == "gate"):
        layers = in_order(seen, call, since, gate)
        since = gate.clock
        if not layers:
            continue
        width = max(layers[-1].event.shape[1:], default=1)
        paths = dict.fromkeys(layer.path for layer in layers)
        own = {id(p): p.numel() for at in paths for p in seen.modules[at].parameters(recurse=False)}
        yield Written(
            path=layers[0].child,
            block=path,
            layers=tuple(paths),
            node="",
            clock=gate.clock,
            shape=gate.shape,
            axis=1 if gate.shape[1] == width else -1,
            weights=(),
            params=sum(own.values()),
            events=tuple(layer.event for layer in layers),
        )
