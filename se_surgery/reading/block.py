"""Block: one traced forward, with what every node of it did in the run that was looked at.

In: a trace, and the call that it is a trace of. Out: the meta value of every node, the events (convolutions,
activations, ...) that happened inside every node, and the few questions about them that all rules ask.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from ..records import Edge
from .answers import asks_for_shape
from .events import Call, Event, is_gate, is_sum, kind_of
from .look import Look
from .observed import Observed
from .trace import Trace

_OPERATORS = {operator.add: "add", operator.iadd: "add", operator.mul: "gate", operator.imul: "gate"}
_PASSING = frozenset(
    {"contiguous", "clone", "dropout", "dropout_", "feature_dropout", "drop_path", "split", "chunk", "narrow"}
)
_TURNING = frozenset({"permute", "transpose"})
_DIVISIONS = frozenset({"div", "div_", "truediv", "itruediv", "true_divide"})


class Block:
    """One block: its graph, and what every node of it did.

    Nodes are named; sets of nodes are integers, one bit a node in the graph's order.
    """

    def __init__(self, look: Look, call: Call, view: nn.Module, traced: Trace) -> None:
        self.look = look
        self.call = call
        self.view = view
        self.trace = traced
        self.path = call.path
        self.nodes: list[fx.Node] = list(traced.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        observed = replayed(look, traced, view, call)
        self.calls = observed.calls
        self.values = observed.values

    @cached_property
    def ancestors(self) -> dict[fx.Node, int]:
        """For every node the set of itself and all it was computed from."""
        found: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            mask = 1 << i
            for source in node.all_input_nodes:
                mask |= found[source]
            found[node] = mask
        return found

    def within(self, mask: int) -> list[fx.Node]:
        """The nodes of a set, in order."""
        return [node for i, node in enumerate(self.nodes) if mask >> i & 1]

    def value(self, node: fx.Node) -> Any:
        """Meta value of a node, or None."""
        return self.values[node.name]

    def is_map(self, node: Any) -> bool:
        """Whether a node's value is a batch of feature maps."""
        value = self.values.get(node.name) if isinstance(node, fx.Node) else None
        return isinstance(value, Tensor) and self.look.maps.is_map(value.shape)

    def kind(self, node: fx.Node) -> str | None:
        """Kind of the operation a node itself is, not counting what a child module does inside."""
        if node.op == "call_function":
            return _OPERATORS.get(node.target) or kind_of(node.target)  # type: ignore[arg-type]
        if node.op == "call_method":
            return kind_of(getattr(Tensor, str(node.target), None))
        return None

    def events(self, node: fx.Node) -> tuple[Event, ...]:
        """What happened inside a node, on feature maps."""
        if node.op == "call_module":
            call = self.calls.get(node.name)
            return tuple(e for e in self.look.during(call) if e.spatial and e.kind != "squeeze") if call else ()
        return (self._own[node.name],) if node.name in self._own else ()

    @cached_property
    def _own(self) -> dict[str, Event]:
        """The events of the block's own forward, by node: the n-th node of a kind and shape is the n-th such event."""
        waiting: dict[tuple[str, tuple[int, ...]], list[Event]] = {}
        for event in self.look.own(self.call):
            waiting.setdefault((event.kind, event.shape), []).append(event)
        matched = {}
        for node in self.nodes:
            kind = self.kind(node)
            if kind not in (None, "squeeze") and self.is_map(node) and self._is_noted(node, kind):
                shape = tuple(self.value(node).shape)
                left = waiting.get((kind, shape))
                matched[node.name] = left.pop(0) if left else Event(-1, kind, self.path, shape, spatial=True)
        return matched

    def _is_noted(self, node: fx.Node, kind: str | None) -> bool:
        """Whether a sum or product is an event: not one with a number, and no product but a gate's."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.values[source.name])
        if kind == "add":
            return is_sum(args, kwargs)
        return kind != "gate" or self.is_gate(args, self.value(node))

    def is_gate(self, args: tuple[Any, ...], product: Tensor) -> bool:
        """Whether a product scales the channels of a map by one number each."""
        maps = self.look.maps
        axis = maps.axis(product.shape) if maps.are_signals else None
        return maps.is_map(product.shape) and is_gate(args, product, axis)

    def script(self, nodes: list[fx.Node]) -> str:
        """The convolutions (c) and activations (a) of some nodes, in order of execution, as a string."""
        letters = {"conv": "c", "act": "a"}
        return "".join(letters[e.kind] for node in nodes for e in self.events(node) if e.kind in letters)

    def convolutions(self, nodes: list[fx.Node]) -> list[Event]:
        """The convolutions of some nodes that have weights to learn, in order."""
        return [e for node in nodes for e in self.events(node) if e.kind == "conv" and self.look.learns(e.path)]

    def kinds(self, node: fx.Node) -> frozenset[str]:
        """The kinds of events inside a node."""
        return frozenset(event.kind for event in self.events(node))

    def maps_into(self, node: fx.Node) -> list[fx.Node]:
        """The feature maps a node is computed from."""
        return [source for source in node.all_input_nodes if self.is_map(source)]

    def passes(self, node: fx.Node) -> bool:
        """Whether a node hands on its one feature map, at most scaled or dropped: drop path, layer scale, identity.

        Slices of channels count: what is cut off them is joined again elsewhere (RexNet, dual-path networks).
        """
        if node.op == "call_module":
            sources = self.maps_into(node)
            same = len(sources) == 1 and self.is_map(node) and self.value(sources[0]).shape == self.value(node).shape
            return same and not self.kinds(node)
        if _is_slice(node):
            return self._is_sliced(node)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if self.kind(node) == "gate" or name in _DIVISIONS:
            return len(self.maps_into(node)) == 1 and not self._gates_channels(node)
        return name in _PASSING

    def _is_sliced(self, node: fx.Node) -> bool:
        """Whether an item is a part of one map, its channels or some of them, and not one of several values of a child.

        What is cropped is another map: its mean is.
        """
        source = node.all_input_nodes[0]
        if not self.is_map(source):
            return source.op != "call_module"
        maps, value = self.look.maps, self.value(node)
        return not self.is_map(node) or maps.sides(value.shape) == maps.sides(self.value(source).shape)

    def _gates_channels(self, node: fx.Node) -> bool:
        """Whether a product's other factor is a number a channel computed from the images, as an SE's gate is.

        A parameter is none, and neither is a number an image, as drop path's mask is.
        """
        computed = sum(1 << self.index[n] for n in self.nodes if n.op in ("placeholder", "call_module"))
        others = [source for source in node.all_input_nodes if not self.is_map(source)]
        return any(self.ancestors[other] & computed and _is_per_channel(self.value(other)) for other in others)

    def map_under(self, node: fx.Node) -> fx.Node | None:
        """The feature map that a passing node hands on, through `split` and its items."""
        sources = [s for s in node.all_input_nodes if self.is_map(s) or isinstance(self.value(s), (tuple, list))]
        return sources[0] if sources else None

    def walk_back(self, node: fx.Node) -> fx.Node:
        """From a branch's last value back over drop path, layer scale and channel slices to what made it."""
        while self.passes(node):
            source = self.map_under(node)
            if source is None:
                break
            node = source
        return node

    def takers(self, node: fx.Node) -> list[fx.Node]:
        """The users of a value, without those that only ask for its shape, which an SE leaves as it is."""
        return [user for user in node.users if not asks_for_shape(user)]

    def walk_forward(self, node: fx.Node, kinds: frozenset[str]) -> fx.Node:
        """From a value on through operations of `kinds`, as long as each is its only user; ends behind the last one."""
        last = node
        while len(users := self.takers(node)) == 1:
            (user,) = users
            found = self.kinds(user)
            if found and found <= kinds and self.is_map(user):
                last = user
            elif user.op == "output" or not (user.target in _TURNING or (self.passes(user) and not _is_slice(user))):
                break
            node = user
        return last

    def edge(self, producer: fx.Node, axis: int, consumers: list[fx.Node] | None = None, late: bool = False) -> Edge:
        """The edge from a node to some of its users, all that take more than its shape when none are named."""
        users = sorted(self.takers(producer) if consumers is None else consumers, key=self.index.__getitem__)
        shape = tuple(self.value(producer).shape)
        names = tuple(user.name for user in users)
        return Edge(self.path, self.trace.method, producer.name, names, shape, axis, late)

    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.nodes[-1]


def arguments(child: Block, call: fx.Node) -> dict[str, fx.Node]:
    """The nodes of the caller that a block's placeholders stand for."""
    bound = child.trace.signature.bind(*call.args, **call.kwargs)
    found = {}
    for argument in child.trace.arguments:
        value: Any = bound.arguments.get(argument.parameter)
        for step in argument.steps:
            value = value[step] if isinstance(value, Sequence) else None
        if argument.node is not None and isinstance(value, fx.Node):
            found[argument.node] = value
    return found


def _is_per_channel(value: Any) -> bool:
    return not isinstance(value, Tensor) or any(size > 1 for size in value.shape[1:])


def _is_slice(node: fx.Node) -> bool:
    return node.target is operator.getitem


def calls_inside(look: Look, call: Call, child: str) -> list[Call]:
    """The calls of a block's child inside one of the block."""
    return look.inside(call, f"{call.path}.{child}" if call.path else child)


def replayed(look: Look, traced: Trace, view: nn.Module, call: Call) -> Observed:
    """What the nodes of a block's graph were in one observed call."""
    observed = Observed(view, functools.partial(calls_inside, look, call))
    for name, value in _leaves(traced, call).items():
        observed.give(name, value)
    observed.follow(list(traced.graph.nodes))
    return observed


def _leaves(traced: Trace, call: Call) -> dict[str, Any]:
    bound = traced.signature.bind(*call.args, **call.kwargs)
    found = {}
    for argument in traced.arguments:
        if argument.node is not None:
            value = bound.arguments[argument.parameter]
            for step in argument.steps:
                value = value[step]
            found[argument.node] = value
    return found
