"""Anatomy: the graphs of a model's blocks, each with what its nodes did in the run that was looked at.

In: a `Look`. Out: for any block of the model a `Block`, by any of its methods, in evaluation and in training; and the
channel axis of its values. Blocks of equal class and children share one trace where all that it read is equal, too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from functools import cached_property
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import InstanceForwardError, TraceError
from ..records import HELD, IMPLANTS, OPERATIONS, PUT_IN, REPLACED, original_class, original_state
from .answers import must_bes
from .block import Block, calls_inside, replayed
from .events import Call
from .look import Look, look_again
from .reads import SELF
from .trace import Trace, shallow_view, structure, trace, with_bare
from .ways import names_in, stand_ins, takes

# Attributes every module has; they do not tell blocks apart.
_OWN = frozenset(nn.Module().__dict__) | {"_forward_hooks_with_kwargs", IMPLANTS, REPLACED, OPERATIONS, PUT_IN, HELD}


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
        self._traces: dict[Any, list[Trace | TraceError]] = {}
        self._blocks: dict[tuple[str, str], Block] = {}
        self._differs: dict[tuple[int, int], bool] = {}
        self._stand_ins: dict[type[nn.Module], tuple[str, ...]] = {}

    def block(self, path: str, method: str = "") -> Block:
        """The block at `path`, by one of its methods; by the one that is its way in when none is named.

        Raises:
            TraceError: The method cannot be written as a graph.
        """
        # A forward that writes, to itself or to its children, writes to the copy.
        module = self.look.copies[path]
        call = self.look.calls[path][0]
        method = method or ("forward" if path else self._way_in)
        if (path, method) not in self._blocks:
            view = shallow_view(original_class(module), original_state(module))
            traced = self.traced(view, call, method, self.training)
            self._blocks[path, method] = Block(self.look, call, view, traced)
        return self._blocks[path, method]

    @cached_property
    def _way_in(self) -> str:
        """The method that the whole model is operated on in.

        A timm model's forward calls its forward_features; what stands in there is reached from elsewhere, too.
        """
        cls, call, inner = original_class(self.look.modules[""]), self.look.calls[""][0], "forward_features"
        is_called = hasattr(cls, inner) and inner in names_in(cls, "forward")
        return inner if is_called and takes(cls, inner, call) else "forward"

    @cached_property
    def in_training(self) -> Anatomy:
        """The same blocks as they run in training."""
        anatomy = Anatomy(self.look, training=True)
        anatomy._traces = self._traces
        return anatomy

    def axis(self, block: Block, node: fx.Node) -> int:
        """The channel axis of a value; the first one behind the batch's where that cannot be told."""
        return self.known_axis(block, node) or 1

    def known_axis(self, block: Block, node: fx.Node) -> int | None:
        """The channel axis of a value: the one that does not change with the image's size; None if that is unknown."""
        shape = tuple(block.value(node).shape)
        axis = self.look.maps.axis(shape)
        if axis is None and self._again is not None:
            other = self._again.block(block.path, block.trace.method).values.get(node.name)
            fixed = [axis for axis in (1, -1) if isinstance(other, Tensor) and other.shape[axis] == shape[axis]]
            axis = fixed[0] if len(fixed) == 1 else None
        return axis

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
        """The block by the other methods that can stand in for its forward, as far as they can be traced."""
        blocks = []
        for name in self.ways(path):
            with contextlib.suppress(TraceError):
                blocks.append(self.block(path, name))
        return blocks

    def later_ways(self, path: str) -> list[str]:
        """The methods that can stand in for a block's forward once the block has what they read and it lacks now.

        They are for the block as it is deployed: what they call is made by fusing.
        """
        names = []
        for name in self.ways(path):
            try:
                self.block(path, name)
            except TraceError as error:
                if isinstance(error.__cause__, AttributeError):
                    names.append(name)
        cls = original_class(self.look.modules[path])
        return [name for name in names if not names_in(cls, name) & (set(self.ways(path)) - {name})]

    def ways(self, path: str) -> tuple[str, ...]:
        """The methods that can stand in for a block's forward; the model's own is called as it is."""
        if not path:
            return ()
        cls = original_class(self.look.modules[path])
        if cls not in self._stand_ins:
            self._stand_ins[cls] = stand_ins(cls, self.look.calls[path][0])
        return self._stand_ins[cls]

    def traced(self, view: nn.Module, call: Call, method: str, training: bool) -> Trace:
        """The trace of one method in one mode, shared by blocks for which all that it read is the same."""
        key = (training, method, self._shape_of(view), _argument_key(call))
        fitting = (one for one in self._traces.get(key, ()) if _fits(one, view))
        found = next((one for one in fitting if _granted(self.look, one, view, call)), None)
        if found is None:
            found = self._made(view, call, method, training)
            modal = isinstance(found, TraceError) or found.modal
            for mode in (training,) if modal else (True, False):
                self._traces.setdefault((mode, *key[1:]), []).append(found)
        if isinstance(found, TraceError):
            # It is kept, and each time that it is raised would lengthen its traceback.
            raise found.with_traceback(None)
        return found

    def _made(self, view: nn.Module, call: Call, method: str, training: bool) -> Trace | TraceError:
        try:
            _refuse_instance_forward(view, method)
            calls_of = functools.partial(calls_inside, self.look, call)
            traced = trace(view, call, method=method, training=training, calls_of=calls_of)
            self._refuse_sizes(traced, view, call)
            return with_bare(traced, view, call, training, calls_of)
        except TraceError as error:
            return error

    def _refuse_sizes(self, traced: Trace, view: nn.Module, call: Call) -> None:
        """Refuse a graph that takes for granted what is another thing at another size, or in another batch.

        Raises:
            TraceError: It does, with what that is.
        """
        for other in self.look.others if must_bes(traced.graph) else ():
            calls = other.calls.get(call.path, ())
            for node in _denied(other, traced, view, calls[0]) if calls else ():
                raise TraceError(
                    f"its forward goes by the size of the images or their number ({node.args[2]}), and a graph of it "
                    f"would not"
                )

    def _shape_of(self, module: nn.Module) -> Any:
        state = {k: _plain(v) for k, v in module.__dict__.items() if k not in _OWN}
        children = tuple((name, _class_tree(child)) for name, child in module._modules.items())
        tensors = tuple((name, t is None) for name, t in (*module._parameters.items(), *module._buffers.items()))
        return (type(module), tuple(sorted(state.items(), key=lambda item: item[0])), children, tensors)


def _fits(traced: Trace | TraceError, view: nn.Module) -> bool:
    """Whether a block has all that a trace of another one read as that other one had it."""
    return all(read.holds(view) for read in traced.reads if read.root == SELF)


def _granted(look: Look, traced: Trace | TraceError, view: nn.Module, call: Call) -> bool:
    """Whether all that a graph takes for granted of the observed call is so in this one."""
    return isinstance(traced, TraceError) or not list(_denied(look, traced, view, call))


def _denied(look: Look, traced: Trace, view: nn.Module, call: Call) -> Iterator[fx.Node]:
    """What a graph takes for granted and is not so in a call: its nodes that ask for it."""
    asking = must_bes(traced.graph)
    values = replayed(look, traced, view, call).values if asking else {}
    for node in asking:
        found: Any = node.args[0]
        if values[found.name] is not None and values[found.name] != node.args[1]:
            yield node


def _refuse_instance_forward(view: nn.Module, method: str) -> None:
    if "forward" in view.__dict__:
        raise InstanceForwardError("it has a forward of its own on the instance, which a rewritten class cannot reach")
    if not isinstance(inspect.getattr_static(type(view), method, None), FunctionType):
        raise InstanceForwardError(f"its {method} is no function of its class, and may be another one at each call")
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
