"""Capture: the gates that a model's SEs compute while it runs.

In: a model, and the SEs in it, whoever put them there. Out: for every batch and SE one gate an image and channel: what
the SE multiplies that channel of its map by. It is read off the product that makes a module an SE (see `find`), not off
any class; what a module does besides is found out by comparing what it returns with that product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..reading.events import KINDS, gate_of
from ..reading.layout import in_rank

# How near to an end of its range a gate is saturated, as a share of that range.
SATURATED = 0.05
_INF = float("inf")
# The ends of what the functions that make gates can give.
_ENDS: dict[Callable[..., Any], tuple[float, float]] = {
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, torch.sigmoid_, F.sigmoid), (0.0, 1.0)),
    F.hardsigmoid: (0.0, 1.0),
    **dict.fromkeys((torch.tanh, Tensor.tanh, Tensor.tanh_, torch.tanh_, F.tanh), (-1.0, 1.0)),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), (0.0, _INF)),
    F.relu6: (0.0, 6.0),
}


@dataclass(frozen=True)
class Gating:
    """What one call of an SE did to one batch.

    Attributes:
        gates: The factor on each channel of each image's map, (B, C), in double precision on the CPU.
        saturated: Where the gate's own function is at an end of its range, (B, C); None where that is not known.
    """

    gates: Tensor
    saturated: Tensor | None


@dataclass
class _Call:
    """An SE that is running."""

    path: str
    given: Tensor
    kept: Tensor | None
    gate: Tensor | None = None
    last: tuple[Tensor, tuple[float, float]] | None = None


class Catcher(TorchFunctionMode):
    """Notes the gates of some SEs while the model that they are in runs.

    Args:
        axes: The channel axis of each SE's maps, by its path.

    Attributes:
        caught: What each SE did since this was last emptied, by path.
        unfaithful: The paths of those that do something else than to multiply their channels by gates.
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        super().__init__()
        self.axes = axes
        self.caught: dict[str, list[Gating]] = {}
        self.unfaithful: set[str] = set()
        self._compared: set[str] = set()
        self._running: list[_Call] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self._running[-1] if self._running else None
        # Read before it runs: a product in place overwrites its map.
        gate = gate_of(args, call.given) if call is not None and KINDS.get(function) == "gate" else None
        result = function(*args, **(kwargs or {}))
        if call is not None and gate is not None:
            call.gate = gate
        elif call is not None and call.gate is None and function in _ENDS:
            call.last = (result.clone(), _ENDS[function])
        return result

    def enter(self, path: str) -> Callable[..., None]:
        """A hook for the SE at `path`, before it runs."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept = args[0].clone() if path not in self._compared else None
            self._running.append(_Call(path, args[0], kept))

        return hook

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A hook for an SE, behind its run."""
        call = self._running.pop()
        axis = self.axes[call.path]
        gate = _effective(call.gate, getattr(module, "mix", None), output, axis) if call.gate is not None else None
        if call.kept is not None and output.isfinite().all():
            self._compared.add(call.path)
            if gate is None or not _is_product(output, call.kept, gate, axis):
                self.unfaithful.add(call.path)
        if gate is not None and call.path not in self.unfaithful:
            gating = Gating(gate.detach().cpu().double(), _saturated(call.last, gate))
            self.caught.setdefault(call.path, []).append(gating)


def _effective(gate: Tensor, mix: Any, output: Tensor, axis: int) -> Tensor:
    """The factor on each channel, (B, C), of a gate in the rank of its map, expanded or not."""
    channels = axis % gate.dim()
    gate = gate[tuple(slice(None) if i in (0, channels) else 0 for i in range(gate.dim()))]
    gate = gate.expand(output.shape[0], output.shape[axis])
    return 1 + mix * (gate - 1) if isinstance(mix, Tensor) else gate


def _is_product(output: Tensor, given: Tensor, gate: Tensor, axis: int) -> bool:
    """Whether an output is its input times a gate, as near as half precision comes."""
    expected = given * in_rank(gate, given.dim(), axis)
    size = float(expected.abs().amax()) if expected.numel() else 0.0
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-2, atol=1e-3 * size)


def _saturated(last: tuple[Tensor, tuple[float, float]] | None, gate: Tensor) -> Tensor | None:
    """Where the function that made the gates gave (nearly) an end of its range; None where it is not seen."""
    if last is None or last[0].numel() != gate.numel():
        return None
    values, (low, high) = last[0].reshape(gate.shape), last[1]
    margin = SATURATED * (high - low) if high < _INF else 0.0
    return ((values <= low + margin) | (values >= high - margin)).cpu()


@contextlib.contextmanager
def catching(model: nn.Module, axes: Mapping[str, int]) -> Iterator[Catcher]:
    """Catch the gates of the SEs at these paths as long as the block runs."""
    catcher, handles = Catcher(axes), []
    try:
        for path in axes:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(catcher.enter(path)))
            handles.append(module.register_forward_hook(catcher.leave))
        with catcher:
            yield catcher
    finally:
        for handle in handles:
            handle.remove()
