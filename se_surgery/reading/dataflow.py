"""Dataflow: what a forward computes from what, across all of its modules.

In: every function of torch's that ran in one forward, with its arguments and its result. Out: a list of `Value`s in
order of execution, one for each tensor that came out, each with the values that it was made of. Parameters and buffers
are none, and neither is what is computed from these alone.

A value is known by the identity of its tensor; where an operation works in place, the same tensor is a newer value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .events import Call, Event, functions


@dataclass(slots=True, eq=False)
class Value:
    """One tensor that a forward made.

    Attributes:
        index: Its place among the values.
        kind: `in` (an input of the model), `conv`, `norm`, `act`, `pool`, `add`, `cat`, `gate`, `linear`, `squeeze`,
            `up` (what makes maps larger), `slice`, `pass` (the same numbers), `product` (of two maps), `attention` (a
            product of matrices), or `other`.
        inputs: The values that it was made of: where there are maps among these, the maps alone.
        all_inputs: All values that it was made of.
        shape: Its shape.
        is_map: Whether it is a batch of feature maps of more than one position.
        clock: When it was made, on the look's clock.
        frame: The call whose own forward made it; None for an input of the model.
        event: The event that it is the result of.
        gates: Whether a sigmoid or the like made it.
        calls: The calls of modules that returned it, innermost first.
    """

    index: int
    kind: str
    inputs: tuple[int, ...]
    all_inputs: tuple[int, ...]
    shape: tuple[int, ...]
    is_map: bool
    clock: int
    frame: Call | None
    event: Event | None = None
    gates: bool = False
    calls: list[Call] = field(default_factory=list)

    def is_in(self, call: Call) -> bool:
        """Whether it was made inside a call."""
        return call.start <= self.clock < call.end


_UP = functions("interpolate", "upsample", "pixel_shuffle", "max_unpool1d", "max_unpool2d", "max_unpool3d", "fold")
_TRANSPOSED = functions("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_SLICES = functions(*"chunk split split_with_sizes narrow unbind tensor_split select index_select __getitem__".split())
_PASSES = functions(
    *"contiguous clone detach dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout".split(),
    *"to type_as float half bfloat16 view reshape flatten unflatten permute transpose movedim pad".split(),
    *"channel_shuffle div true_divide neg roll flip".split(),
)
_EXPANDED = functions("expand", "expand_as", "repeat", "broadcast_to")
# Functions that make a gate of what they are given.
_GATES = functions("sigmoid", "hardsigmoid", "softmax", "tanh")
_KINDS: dict[Callable[..., Any], str] = {
    **dict.fromkeys(_PASSES | _EXPANDED, "pass"),
    **dict.fromkeys(_SLICES, "slice"),
    **dict.fromkeys(_UP | _TRANSPOSED, "up"),
    **dict.fromkeys(functions("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"), "attention"),
}
# What takes one map; whatever else they are given are weights and statistics.
_OF_ONE = frozenset({"conv", "norm", "linear", "squeeze", "pool", "up"})
# Through these a map is followed to what it is an activation of.
_BY_ELEMENTS = frozenset({"act", "pass"})
_RESULTS = (tuple, list)


class Dataflow:
    """The values of one forward, noted while it runs.

    Args:
        is_map: Whether a tensor is a batch of feature maps of more than one position.
        is_gate: Whether a product of some operands scales the channels of a map by one number each.
    """

    def __init__(self, is_map: Callable[[Tensor], bool], is_gate: Callable[[Any, Tensor], bool]) -> None:
        self._is_map, self._is_channelwise = is_map, is_gate
        self.values: list[Value] = []
        self._index: dict[int, int] = {}
        # An identity is a tensor's own as long as the tensor lives.
        self._kept: list[Tensor] = []
        self._by_storage: dict[int, int] = {}
        self._stored = 0

    def take(self, given: Any, clock: int) -> None:
        """Note the inputs of the model."""
        for tensor in tensors_in(given):
            self._add(tensor, "in", (), (), clock, None, None)

    def note(
        self, function: Any, kind: str | None, args: Any, kwargs: Any, result: Any, call: Call, clock: int, event: Any
    ) -> None:
        """Note what a function made.

        Args:
            function: The function.
            kind: What kind of event it is, or None.
            args: What it was given.
            kwargs: What it was given by name.
            result: What came out.
            call: The call in whose own forward it ran.
            clock: When that was.
            event: The event that was noted for it, or None.
        """
        if result is None and args and isinstance(args[0], Tensor):
            result = args[0]  # an item was set
        if type(result) not in _RESULTS and not isinstance(result, Tensor):
            return
        kind = _KINDS.get(function) or kind or "other"
        given = list(self._given(kind, args, kwargs))
        if not given:
            return
        all_inputs = tuple(dict.fromkeys(given))
        inputs = self._maps(all_inputs)
        if kind == "gate":
            kind, inputs = self._product(args, inputs, result)
        elif kind in ("add", "cat") and len(inputs) < 2:
            kind = "pass"
        elif kind == "pass":
            inputs = inputs[:1]  # what a map is divided by
        for tensor in (result,) if isinstance(result, Tensor) else tensors_in(result):
            value = self._add(tensor, kind, inputs, all_inputs, clock, call, event)
            value.gates = function in _GATES
            if function in _EXPANDED:
                value.is_map = value.is_map and _varies(tensor)

    def returned(self, output: Any, call: Call) -> None:
        """Note what a call returned."""
        for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
            index = self.index(tensor)
            if index is not None:
                self.values[index].calls.append(call)

    def index(self, tensor: Tensor) -> int | None:
        """The value that a tensor is, or None where it is no value."""
        index = self._index.get(id(tensor))
        if index is not None or isinstance(tensor, torch.nn.Parameter):
            return index
        return self._by_memory(tensor)

    def _by_memory(self, tensor: Tensor) -> int | None:
        """The newest value of the same memory: an autograd.Function hands its results on as other tensors."""
        for kept in self._kept[self._stored :]:
            self._by_storage[_memory(kept)] = self._index[id(kept)]
        self._stored = len(self._kept)
        index = self._by_storage.get(_memory(tensor))
        if index is not None:
            self._keep(tensor, index)
        return index

    def _given(self, kind: str, args: Any, kwargs: Any) -> Iterator[int]:
        """The values among some arguments."""
        if kind in _OF_ONE and args:
            args, kwargs = args[:1], {}
        for tensor in tensors_in(args) if not kwargs else tensors_in((*args, *kwargs.values())):
            index = self.index(tensor)
            if index is not None:
                yield index

    def _maps(self, given: tuple[int, ...]) -> tuple[int, ...]:
        maps = tuple(index for index in given if self.values[index].is_map)
        return maps or given

    def _product(self, args: Any, inputs: tuple[int, ...], result: Any) -> tuple[str, tuple[int, ...]]:
        """What a product is: of a map with a gate, an activation that is written out, or of two maps."""
        if len(inputs) < 2:
            is_channelwise = len(args) > 1 and isinstance(result, Tensor) and self._is_channelwise(args, result)
            return "gate" if is_channelwise else "pass", inputs
        first, second = (self.values[index] for index in inputs[:2])
        for one, other in ((first, second), (second, first)):
            if self._comes_by_elements(other, one.index):
                return "act", (one.index,)
            if self._is_gate(other) and not self._is_gate(one):
                return "gate", (one.index,)
        return "product", inputs

    def _comes_by_elements(self, value: Value, index: int) -> bool:
        """Whether a value is computed from another element by element."""
        while value.index > index and value.kind in _BY_ELEMENTS and len(value.inputs) == 1:
            value = self.values[value.inputs[0]]
        return value.index == index

    def _is_gate(self, value: Value) -> bool:
        """Whether a value is what a sigmoid or the like put out, by way of whatever leaves numbers alone."""
        while value.kind in ("pass", "slice", "up") and value.inputs:
            value = self.values[value.inputs[0]]
        return value.gates

    def _add(
        self,
        tensor: Tensor,
        kind: str,
        inputs: tuple[int, ...],
        all_inputs: tuple[int, ...],
        clock: int,
        frame: Call | None,
        event: Event | None,
    ) -> Value:
        shape = tuple(tensor.shape)
        value = Value(len(self.values), kind, inputs, all_inputs, shape, self._is_map(tensor), clock, frame, event)
        self.values.append(value)
        self._keep(tensor, value.index)
        return value

    def _keep(self, tensor: Tensor, index: int) -> None:
        self._index[id(tensor)] = index
        self._kept.append(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, however deep in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own
        return id(tensor)


def _varies(tensor: Tensor) -> bool:
    """Whether an expanded tensor has values of its own along more than one axis behind the batch's."""
    axes = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return sum(size > 1 and stride != 0 for size, stride in axes) > 1
