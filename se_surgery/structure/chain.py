"""Chain: the way of a gate, from the maps that are pooled, over layers of one position, to what multiplies a map.

In: a node of a `Block` whose value is a number an image and channel. Out: a `Chain`: the nodes that it is computed
from, the maps where these begin, the layers among them that learn, and their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from ..errors import TraceError
from ..reading.anatomy import Anatomy
from ..reading.block import Block, arguments
from ..reading.events import Call, Event
from ..reading.look import Look

# A node of one of the graphs that the way goes through.
Step = tuple[Block, fx.Node]

_POOLS, _LAYERS = ("squeeze", "pool"), ("conv", "linear")
# What reduces a map and makes no such event; what multiplies by a weight and is no layer of torch's.
_REDUCTIONS = frozenset("max std std_mean var var_mean".split())
_PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ mm bmm addmm einsum".split())
# What comes behind the first argument of these gives a shape or a type, and no values.
_SHAPED = frozenset("expand_as view_as reshape_as type_as to".split())


@dataclass(frozen=True)
class Layer:
    """A layer on the way.

    Attributes:
        path: Its path, or that of its weight where it is a function.
        child: The path of the child that it is, or is in, of the block whose forward calls it.
        event: What it did.
    """

    path: str
    child: str
    event: Event


class Chain:
    """The way of a gate.

    Attributes:
        steps: The nodes of the way, each with those of them that it takes.
        entries: The maps that the way begins with.
    """

    def __init__(self, anatomy: Anatomy, block: Block, gate: fx.Node) -> None:
        self.seen = anatomy.look
        self.steps: dict[Step, list[Step]] = {}
        self.entries: list[Step] = []
        waiting = [(block, gate)]
        while waiting:
            step = waiting.pop()
            if step in self.steps:
                continue
            sources = list(_sources(anatomy, *step))
            self.entries += [source for source in sources if _is_whole(*source)]
            self.steps[step] = [source for source in sources if not _is_whole(*source)]
            waiting += self.steps[step]

    def layers(self) -> list[Layer]:
        """The layers of one position behind a pooling, in order of execution."""
        found = [layer for step in self.steps for layer in self._layers_at(*step)]
        return sorted(found, key=lambda layer: layer.event.clock)

    def weights(self) -> list[str]:
        """The paths of the parameters that functions take on the way."""
        steps = [step for step in self.steps if step[1].name not in step[0].calls]
        return [
            _under(block.path, str(weight.target)) for block, node in steps for weight in self._weights_at(block, node)
        ]

    def parameters(self) -> int:
        """Number of the parameters that make the gate of what is pooled."""
        tensors = [tensor for step in self.steps for tensor in self._tensors_at(*step)]
        return sum({id(tensor): tensor.numel() for tensor in tensors}.values())

    @cached_property
    def _pooled(self) -> set[Step]:
        """The nodes that pool, and those behind them."""
        found = {step for step in self.steps if self._pools(*step)}
        size = 0
        while len(found) > size:
            size = len(found)
            found |= {step for step in self.steps if self._takes_pooled(found, step)}
        return found

    def _takes_pooled(self, pooled: set[Step], step: Step) -> bool:
        return not pooled.isdisjoint(self.steps[step])

    def _pools(self, block: Block, node: fx.Node) -> bool:
        if node.op == "call_module":
            return first_pool(self.seen, block.calls.get(node.name)) is not None
        return node.op != "placeholder" and (block.kind(node) in _POOLS or name_of(node) in _REDUCTIONS)

    def _since(self, step: Step, call: Call) -> float:
        """Since when the call of a child works on what is pooled; never, if it does not."""
        if self._takes_pooled(self._pooled, step):
            return call.start
        pooled = first_pool(self.seen, call)
        return math.inf if pooled is None else pooled

    def _layers_at(self, block: Block, node: fx.Node) -> Iterator[Layer]:
        if node.name in block.calls:
            call, child = block.calls[node.name], _under(block.path, str(node.target))
            since = self._since((block, node), call)
            behind = (event for event in self.seen.during(call) if event.clock > since)
            yield from (Layer(event.path, child, event) for event in behind if is_layer(event))
            return
        weight = next((w for w in self._weights_at(block, node) if block.value(w).dim() > 1), None)
        is_function = block.kind(node) in _LAYERS or name_of(node) in _PRODUCTS
        if weight is not None and is_function:
            path = _under(block.path, str(weight.target))
            holder = path.rpartition(".")[0]
            layer = holder if holder != block.path else path
            yield Layer(layer, layer, _event(block, node, weight))

    def _weights_at(self, block: Block, node: fx.Node) -> list[fx.Node]:
        """The block's own parameters that a function behind a pooling takes, transposed or not."""
        if node.op == "placeholder" or not self._takes_pooled(self._pooled, (block, node)):
            return []
        given = sum(1 << block.index[n] for n in block.nodes if n.op in ("placeholder", "call_module"))
        fixed = [source for source in node.all_input_nodes if not block.ancestors[source] & given]
        found = [n for source in fixed for n in block.within(block.ancestors[source]) if n.op == "get_attr"]
        return [weight for weight in found if isinstance(block.value(weight), Tensor)]

    def _tensors_at(self, block: Block, node: fx.Node) -> Iterator[Tensor]:
        """The parameters that a node works with on what is pooled."""
        if node.name in block.calls:
            since = self._since((block, node), block.calls[node.name])
            behind = [call for call in _with_inner(block.calls[node.name]) if call.start >= since]
            for call in behind:
                yield from self.seen.modules[call.path].parameters(recurse=False)
            return
        tensors = [_held_by(block, str(weight.target)) for weight in self._weights_at(block, node)]
        yield from (tensor for tensor in tensors if tensor is not None)


def held(value: Tensor) -> list[int]:
    """The axes behind the batch's along which a tensor has values of its own: those of size 1 and expanded ones do not.

    Examples:
        >>> held(torch.ones(2, 8, 1, 1)), held(torch.ones(2, 8, 1, 1).expand(2, 8, 7, 7)), held(torch.ones(2, 8, 7, 7))
        ([1], [1], [1, 2, 3])
    """
    sizes = zip(value.shape, value.stride(), strict=True)
    return [axis for axis, (size, stride) in enumerate(sizes) if axis and size > 1 and stride]


def is_layer(event: Event) -> bool:
    """Whether an event is a layer's that works on one position, on a vector for each image, and sees all channels.

    In groups it is that of a split attention (ResNeSt), which is another thing even where it splits nothing.
    """
    return event.kind in _LAYERS and event.groups == 1 and sum(size > 1 for size in event.shape[1:]) < 2


def first_pool(seen: Look, call: Call | None) -> int | None:
    """When a call first pooled a map, or None."""
    events = seen.during(call) if call is not None else ()
    return next((event.clock for event in events if event.kind in _POOLS), None)


def in_order(seen: Look, call: Call, since: int, gate: Event) -> list[Layer]:
    """The layers between a pooling and a gate in a call, as far as the order of events tells it.

    The last one has to put out as many channels as are gated.
    """
    events = [event for event in seen.during(call) if since < event.clock < gate.clock]
    pooled = next((event.clock for event in events if event.kind in _POOLS), gate.clock)
    layers = [event for event in events if event.clock > pooled and is_layer(event)]
    if not layers or max(layers[-1].shape[1:], default=1) not in (gate.shape[1], gate.shape[-1]):
        return []
    prefix = len(call.path) + 1 if call.path else 0
    return [Layer(e.path, e.path[:prefix] + e.path[prefix:].partition(".")[0], e) for e in layers]


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_whole(block: Block, node: fx.Node) -> bool:
    """Whether a value is a feature map, and not numbers that are expanded to the size of one."""
    value = block.value(node)
    return isinstance(value, Tensor) and block.is_map(node) and len(held(value)) > 1


def _sources(anatomy: Anatomy, block: Block, node: fx.Node) -> Iterator[Step]:
    """The values that a node is computed from, but for weights, shapes and types."""
    if node.op == "placeholder":
        yield from _given(anatomy, block, node)
        return
    sources = node.all_input_nodes[:1] if name_of(node) in _SHAPED else node.all_input_nodes
    for source in sources:
        if source.op != "get_attr" and isinstance(block.value(source), (Tensor, tuple, list)):
            yield block, source


def _given(anatomy: Anatomy, block: Block, node: fx.Node) -> Iterator[Step]:
    """The value that the caller of a block gives for a placeholder, where a graph shows it."""
    if block.call.parent is None:
        return
    try:
        outer = anatomy.block(block.call.parent.path)
    except TraceError:
        return
    for caller in outer.nodes:
        if outer.calls.get(caller.name) is block.call:
            source = arguments(block, caller).get(node.name)
            if source is not None:
                yield outer, source


def _event(block: Block, node: fx.Node, weight: fx.Node) -> Event:
    """What a layer that is a function did: its event of the run, the n-th of its kind and shape being its n-th node."""
    shape, kind = tuple(block.value(node).shape), block.kind(node)
    alike = [n for n in block.nodes if block.kind(n) == kind and _shape(block, n) == shape]
    events = [event for event in block.look.own(block.call) if (event.kind, event.shape) == (kind, shape)]
    number = alike.index(node)
    if kind in _LAYERS and number < len(events):
        return events[number]
    # Products of matrices are no events; on a vector each weight is multiplied once.
    return Event(block.call.start + block.index[node], "product", block.path, shape, macs=block.value(weight).numel())


def _shape(block: Block, node: fx.Node) -> tuple[int, ...]:
    value = block.value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _held_by(block: Block, target: str) -> Tensor | None:
    """The tensor that a name of a block stands for."""
    holder, _, name = target.rpartition(".")
    return block.view.get_submodule(holder)._parameters.get(name)


def _with_inner(call: Call) -> Iterator[Call]:
    yield call
    for child in call.children:
        yield from _with_inner(child)


def _under(root: str, name: str) -> str:
    return f"{root}.{name}" if root else name
