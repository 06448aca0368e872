"""Anatomy: the graphs of a model's blocks, each with what its nodes did in the run that was looked at.

In: a `Look`. Out: for any block of the model a `Block`: its traced forward, the meta value of every node, the events
(convolutions, activations, ...) that happened inside every node, and the few questions about them that all rules ask.
Blocks of equal class, children and plain attributes share one trace.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import InstanceForwardError, TraceError
from .events import Call, Event, is_map, kind_of
from .look import Look, look_again
from .records import IMPLANTS, OPERATIONS, REPLACED, Edge, original_class, original_state
from .trace import Trace, replay, shallow_view, structure, trace, with_bare

# Attributes every module has; they do not tell blocks apart.
_OWN = frozenset(nn.Module().__dict__) | {"_forward_hooks_with_kwargs", IMPLANTS, REPLACED, OPERATIONS}
_OPERATORS = {operator.add: "add", operator.iadd: "add", operator.mul: "gate", operator.imul: "gate"}
_PASSING = frozenset({"contiguous", "clone", "dropout", "dropout_", "feature_dropout", "drop_path"})
_PASSING |= {"split", "chunk", "narrow"}
_DIVISIONS = frozenset({"div", "div_", "truediv", "itruediv", "true_divide"})


class Anatomy:
    """The blocks of one model, traced when first asked for; `codes` keeps what was generated for equal blocks.

    Args:
        look: What one forward did.
        training: Whether the blocks are traced as they run in training.
    """

    def __init__(self, look: Look, training: bool = False) -> None:
        self.look = look
        self.training = training
        self.codes: dict[Any, Any] = {}
        self._traces: dict[Any, Trace | TraceError] = {}
        self._blocks: dict[tuple[str, str], Block] = {}
        self._differs: dict[tuple[int, int], bool] = {}

    def block(self, path: str, method: str = "") -> Block:
        """The block at `path`, by one of its methods; by the one that is its way in when none is named.

        Raises:
            TraceError: The method cannot be written as a graph.
        """
        module = self.look.modules[path]
        # A timm model's forward calls its forward_features; what stands in there is reached from elsewhere too.
        method = method or ("forward_features" if not path and hasattr(module, "forward_features") else "forward")
        if (path, method) not in self._blocks:
            view = shallow_view(module, original_class(module), original_state(module))
            call = self.look.calls[path][0]
            traced = self.traced(view, call, method, self.training)
            self._blocks[path, method] = Block(self.look, call, view, traced)
        return self._blocks[path, method]

    @cached_property
    def in_training(self) -> Anatomy:
        """The same blocks as they run in training."""
        anatomy = Anatomy(self.look, training=True)
        anatomy._traces = self._traces
        return anatomy

    def axis(self, block: Block, node: fx.Node) -> int:
        """The channel axis of a value: the one that does not change with the image's size."""
        shape = tuple(block.value(node).shape)
        axis = channel_axis(shape, self.look.size or (1, 1))
        if axis is None and self._again is not None:
            other = self._again.block(block.path, block.trace.method).values.get(node.name)
            fixed = [axis for axis in (1, -1) if isinstance(other, Tensor) and other.shape[axis] == shape[axis]]
            axis = fixed[0] if len(fixed) == 1 else None
        return 1 if axis is None else axis

    @cached_property
    def _again(self) -> Anatomy | None:
        again = look_again(self.look)
        return Anatomy(again, self.training) if again is not None else None

    def differs_in_training(self, path: str, method: str) -> bool:
        """Whether a block's training graph has other nodes than its evaluation graph, or cannot be made."""
        block = self.block(path, method)
        if not block.trace.modal:
            return False
        try:
            training = self.traced(block.view, block.call, method, training=True)
        except TraceError:
            return True
        pair = (id(block.trace), id(training))
        if pair not in self._differs:
            self._differs[pair] = structure(block.trace.graph) != structure(training.graph)
        return self._differs[pair]

    def other_ways(self, path: str) -> list[Block]:
        """The block by its other public `forward_*` methods that take what its forward takes and can be traced."""
        call, cls = self.look.calls[path][0], original_class(self.look.modules[path])
        names = [name for name in dir(cls) if name.startswith("forward_") and callable(getattr(cls, name))]
        blocks = []
        for name in names if path else []:
            try:
                inspect.signature(getattr(cls, name)).bind(None, *call.args, **call.kwargs)
                blocks.append(self.block(path, name))
            except (TypeError, TraceError):
                continue
        return blocks

    def traced(self, view: nn.Module, call: Call, method: str, training: bool) -> Trace:
        """The trace of one method in one mode, shared by equal blocks."""
        key = (training, method, self._shape_of(view), _argument_key(call))
        if key not in self._traces:
            try:
                _refuse_instance_forward(view)
                traced = with_bare(trace(view, call, method=method, training=training), view, call, training)
                modes = (training,) if traced.modal else (True, False)
                self._traces.update({(mode, *key[1:]): traced for mode in modes})
            except TraceError as error:
                self._traces[key] = error
        found = self._traces[key]
        if isinstance(found, TraceError):
            raise found
        return found

    def _shape_of(self, module: nn.Module) -> Any:
        state = {k: _plain(v) for k, v in module.__dict__.items() if k not in _OWN}
        children = tuple((name, _class_tree(child)) for name, child in module._modules.items())
        tensors = tuple((name, t is None) for name, t in (*module._parameters.items(), *module._buffers.items()))
        return (type(module), tuple(sorted(state.items(), key=lambda item: item[0])), children, tensors)


def _refuse_instance_forward(view: nn.Module) -> None:
    if "forward" in view.__dict__:
        raise InstanceForwardError("it has a forward of its own on the instance, which a rewritten class cannot reach")
    if isinstance(view, fx.GraphModule):
        raise TraceError("it is a torch.fx graph, which is copied without its class: operate first, then graph it")


def _class_tree(module: nn.Module | None) -> Any:
    if module is None:
        return None
    return (type(module), tuple((name, _class_tree(child)) for name, child in module._modules.items()))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return id(value)


def _argument_key(call: Call) -> Any:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return str(spec), tuple("tensor" if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves)


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
        self.calls = self._match_calls()
        self.values = replay(traced, view, call, self.calls)

    def _match_calls(self) -> dict[str, Call]:
        """The calls of the children, by node: the n-th node of a child is its n-th call inside this one."""
        prefix = self.path + "." if self.path else ""
        waiting: dict[str, list[Call]] = {}
        matched = {}
        for node in self.nodes:
            if node.op == "call_module":
                path = f"{prefix}{node.target}"
                left = waiting.setdefault(path, self.look.inside(self.call, path))
                if left:
                    matched[node.name] = left.pop(0)
        return matched

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
        return isinstance(value, Tensor) and is_map(value.shape)

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
        kind = self.kind(node)
        if kind in (None, "squeeze") or not self.is_map(node):
            return ()
        event = Event(-1, kind, self.path, tuple(self.value(node).shape))
        return (next((own for own in self._own.get(kind, []) if own.shape == event.shape), event),)

    @cached_property
    def _own(self) -> dict[str, list[Event]]:
        grouped: dict[str, list[Event]] = {}
        for event in self.look.own(self.call):
            grouped.setdefault(event.kind, []).append(event)
        return grouped

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
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if self.kind(node) == "gate" or name in _DIVISIONS:
            return len(self.maps_into(node)) == 1 and not self._gates_channels(node)
        return name in _PASSING

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

    def walk_forward(self, node: fx.Node, kinds: frozenset[str]) -> fx.Node:
        """From a value on through operations of `kinds`, as long as each is its only user; ends behind the last one."""
        last = node
        while len(node.users) == 1:
            (user,) = node.users
            found = self.kinds(user)
            if found and found <= kinds and self.is_map(user):
                last = user
            elif user.op == "output" or not (user.target == "permute" or (self.passes(user) and not _is_slice(user))):
                break
            node = user
        return last

    def edge(self, producer: fx.Node, axis: int, consumers: list[fx.Node] | None = None, late: bool = False) -> Edge:
        """The edge from a node to some of its users, all of them when none are named."""
        users = sorted(producer.users if consumers is None else consumers, key=self.index.__getitem__)
        shape = tuple(self.value(producer).shape)
        names = tuple(user.name for user in users)
        return Edge(self.path, self.trace.method, producer.name, names, shape, axis, late)

    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.nodes[-1]


def _is_per_channel(value: Any) -> bool:
    return not isinstance(value, Tensor) or any(size > 1 for size in value.shape[1:])


def _is_slice(node: fx.Node) -> bool:
    return node.target is operator.getitem


def channel_axis(shape: tuple[int, ...], image: tuple[int, ...] = (1, 1)) -> int | None:
    """The channel axis of a batch of maps, 1 or -1: the one that leaves the image's proportions to the other two.

    None where both would: a map with as many channels as positions on a side.

    Examples:
        >>> channel_axis((2, 64, 7, 7)), channel_axis((2, 7, 7, 64)), channel_axis((2, 7, 7, 7))
        (1, -1, None)
    """
    last, first = (_is_proportional(shape[axes], image) for axes in (slice(-2, None), slice(-3, -1)))
    return None if last == first else (1 if last else -1)


def positions(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """Spatial size of a batch of maps, given its channel axis.

    Examples:
        >>> positions((2, 64, 7, 5), 1), positions((2, 7, 5, 64), -1)
        ((7, 5), (7, 5))
    """
    return shape[1:-1] if axis == -1 else shape[2:]


def _is_proportional(size: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Whether a map is that image made smaller; each halving may have rounded each side by one."""
    (height, width), (full_height, full_width) = size, image
    return abs(height * full_width - width * full_height) < max(full_height, full_width)


def parents(path: str) -> Iterator[str]:
    """The paths above `path`, nearest first, the root's `""` last.

    Examples:
        >>> list(parents("layer1.0.conv1"))
        ['layer1.0', 'layer1', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path


def is_under(path: str, root: str) -> bool:
    """Whether `path` lies strictly under `root`."""
    return path != root and (not root or path.startswith(root + "."))


def no_activation_after_convolution(script: str) -> bool:
    """Whether a shortcut's script has no activation after its first convolution."""
    return re.search("c.*a", script) is None
