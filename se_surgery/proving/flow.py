"""Flow: one forward as a flat graph of values, whatever modules it goes through.

In: a model with SEs, and inputs. Out: a `Flow`, with every tensor that was computed, what from, and by which module's
forward. SEs give back what they are given. From any value on, the rest can be computed again with another one in its
place: that is how it is told what an SE's gate acts on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..reading.events import KINDS
from ..reading.maps import Maps, ranks_by
from ..records import original_class


@dataclass(eq=False)
class Value:
    """One tensor that a forward computed.

    Attributes:
        number: Its number, in order of execution.
        kind: What computed it, as an event's kind; `se`, or nothing for whatever else.
        tensor: The tensor as it was then.
        again: Computes it from other inputs.
        sources: The values it was computed from, in order.
        frame: Path of the module whose forward computed it.
        flow: The flow that it is in.
        kernel: Kernel of a convolution with parameters.
        users: The values computed from it.
    """

    number: int
    kind: str
    tensor: Tensor
    again: Callable[[dict[int, Tensor]], Tensor]
    sources: list[Value]
    frame: str
    flow: Flow = field(repr=False)
    kernel: tuple[int, ...] | None = None
    users: list[Value] = field(default_factory=list)

    @property
    def is_map(self) -> bool:
        """Whether it is a batch of maps."""
        return self.flow.maps.is_map(self.tensor.shape)

    @property
    def maps(self) -> list[Value]:
        """The maps it was computed from."""
        return [source for source in self.sources if source.is_map]

    @property
    def learns(self) -> bool:
        """Whether it is what a convolution with parameters puts out."""
        return self.kernel is not None

    @functools.cached_property
    def mask(self) -> int:
        """The set of itself and all it was computed from, a bit for each number."""
        found = 1 << self.number
        for source in self.sources:
            found |= source.mask
        return found


@dataclass
class _Ref:
    """Stands for a value in the arguments of a function."""

    number: int


class Flow(TorchFunctionMode):
    """Notes all that is computed while it is active.

    Args:
        model: The model, whose hooks and SEs are this flow's from now on.
        sites: Paths of its SEs.
    """

    def __init__(self, model: nn.Module, sites: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.classes = {path: original_class(module) for path, module in model.named_modules()}
        self.values: list[Value] = []
        self.seats: dict[str, Value] = {}
        # The calls of every module: the numbers of the first value computed in it, and of the first one behind it.
        self.calls: dict[str, list[tuple[int, int]]] = {}
        self._by_id: dict[int, Value] = {}
        self._kept: list[Tensor] = []
        self._stack: list[tuple[str, int]] = [("", 0)]
        self._parameters = {id(parameter) for parameter in model.parameters()}
        for path, module in model.named_modules():
            module.register_forward_pre_hook(functools.partial(self._enter, path))
            module.register_forward_hook(functools.partial(self._leave, path))
        for path in sites:
            model.get_submodule(path).forward = functools.partial(self._seat, path)

    @functools.cached_property
    def maps(self) -> Maps:
        """What the maps of the network look like, by its convolutions; to be asked when it has run."""
        made = (value for value in self.values if value.kind == "conv" and value.learns)
        return Maps(ranks_by(len(value.kernel or ()) for value in made if any(n > 1 for n in value.tensor.shape[2:])))

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        self._stack.append((path, len(self.values)))

    def _leave(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        with torch._C.DisableTorchFunction():
            # What was computed out of sight, as in an autograd.Function, is the module's as a whole.
            known = any(isinstance(leaf, Tensor) and id(leaf) in self._by_id for leaf in pytree.tree_leaves(args))
            if isinstance(output, Tensor) and id(output) not in self._by_id and known:
                self._add("", module.forward, args, {}, output)
        _, start = self._stack.pop()
        self.calls.setdefault(path, []).append((start, len(self.values)))

    def _seat(self, path: str, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            output = x.clone()
            self.seats[path] = self._add("se", torch.clone, (x,), {}, output)
        return output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_in_place(function, args, kwargs) and args and id(args[0]) in self._by_id:
            # What was there before is needed when others are computed again.
            self._by_id[id(args[0])].tensor = args[0].clone()
        result = function(*args, **kwargs)
        parts = result if isinstance(result, (tuple, list)) else [result]
        for index, part in enumerate(parts):
            if isinstance(part, Tensor):
                one = index if part is not result else None
                self._add(KINDS.get(function, ""), function, args, kwargs, part, one)
        return result

    def _add(
        self,
        kind: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
        index: int | None = None,
    ) -> Value:
        sources: list[Value] = []
        given = pytree.tree_map_only(Tensor, functools.partial(self._ref, sources), (args, kwargs))
        again = functools.partial(_again, function, given, index, {source.number: source for source in sources})
        value = Value(len(self.values), kind, result, again, sources, self._stack[-1][0], self)
        value.kernel = self._kernel(kind, args, kwargs)
        for source in dict.fromkeys(sources):
            source.users.append(value)
        self.values.append(value)
        self._by_id[id(result)] = value
        self._kept.append(result)
        return value

    def _ref(self, sources: list[Value], tensor: Tensor) -> Any:
        value = self._by_id.get(id(tensor))
        if value is None:
            return tensor
        sources.append(value)
        return _Ref(value.number)

    def _kernel(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if kind not in ("conv", "linear") or not isinstance(weight, Tensor):
            return None
        # A weight may be computed from parameters, as standardised ones are; a blur's filters are a buffer.
        made = id(weight) in self._parameters or id(weight) in self._by_id
        return tuple(weight.shape[2:]) if made else None


def is_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(function, "__name__", "")
    is_operator = name.startswith("__i") and name.endswith("__") and name != "__invert__"
    is_asked = kwargs.get("inplace") is True or (KINDS.get(function) == "act" and any(arg is True for arg in args))
    return is_operator or is_asked or (name.endswith("_") and not name.endswith("__"))


def _again(
    function: Callable[..., Any], given: Any, index: int | None, sources: dict[int, Value], changed: dict[int, Tensor]
) -> Tensor:
    def filled(ref: _Ref) -> Tensor:
        return changed[ref.number] if ref.number in changed else sources[ref.number].tensor

    args, kwargs = pytree.tree_map_only(_Ref, filled, given)
    if args and isinstance(args[0], Tensor) and is_in_place(function, args, kwargs):
        args = (args[0].clone(), *args[1:])
    result = function(*args, **kwargs)
    part: Tensor = result if index is None else result[index]
    return part
