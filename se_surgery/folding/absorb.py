"""Absorb: layers that can take a factor on each channel of a map, and modules that let one through.

In: a module, and what it was given. Out: how its tensors take a factor, or with which signs it lets one through; and
the tensors that come of it. What a class does is not taken on trust: a copy of the module is run in double precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reading.layout import in_rank, positions


class NoFold(Exception):
    """No layer can take the factor; the message says why."""


@dataclass(frozen=True)
class Absorption:
    """A layer that takes a factor.

    Attributes:
        path: Path of the layer.
        how: A key of `TAKERS`.
        start: The first channel of the factor that is the layer's.
        stop: The channel behind its last one.
    """

    path: str
    how: str
    start: int
    stop: int


# Which factors an operation commutes with, from all to fewest.
ANY, NOT_NEGATIVE, POSITIVE = range(3)
# Largest sides of the maps on which a module is tried, by their number: signals have long kernels.
_SIDES = {1: 256, 2: 16, 3: 16}
_SEED = 0


class Taker(NamedTuple):
    """A way for a layer to take a factor.

    Attributes:
        names: The tensors that change; the first one has to be there.
        scaled: Their values for a factor in double precision, or None where their shapes do not fit.
        ahead: Whether the factor is on the layer's input, and not on its output.
        needs: The factors that it can take.
    """

    names: tuple[str, ...]
    scaled: Callable[[nn.Module, Mapping[str, Tensor], Tensor], dict[str, Tensor] | None]
    ahead: bool = False
    needs: int = ANY


def _by_row(module: nn.Module, tensors: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor] | None:
    if any(tensor.dim() == 0 or len(tensor) != len(factor) for tensor in tensors.values()):
        return None
    return {name: tensor * factor.reshape(-1, *[1] * (tensor.dim() - 1)) for name, tensor in tensors.items()}


def _by_column(module: nn.Module, tensors: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor] | None:
    weight, groups = tensors["weight"], getattr(module, "groups", 1)
    if weight.dim() < 2 or weight.shape[1] * groups != len(factor) or len(weight) % groups:
        return None
    grouped = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
    scaled = grouped * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return {"weight": scaled.reshape(weight.shape)}


def _by_statistics(module: nn.Module, tensors: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor] | None:
    """What a map loses of its scale, its running statistics lose; in training they are its own in any case."""
    eps = getattr(module, "eps", None)
    if len(tensors) < 2 or not isinstance(eps, float) or any(t.shape != factor.shape for t in tensors.values()):
        return None
    mean, var = tensors["running_mean"], tensors["running_var"]
    return {"running_mean": mean / factor, "running_var": (var + eps) / factor.square() - eps}


# In the order in which they are tried. The gain of a convolution whose weight is standardised is the only one of its
# tensors that counts.
TAKERS = {
    "gain": Taker(("gain", "bias"), _by_row),
    "weight": Taker(("weight", "bias"), _by_row),
    "columns": Taker(("weight",), _by_column, ahead=True),
    "statistics": Taker(("running_mean", "running_var"), _by_statistics, ahead=True, needs=POSITIVE),
}


def absorbed(module: nn.Module, how: str, factor: Tensor) -> dict[str, Tensor] | None:
    """The tensors of a layer that has taken a factor, in double precision, or None where it cannot."""
    taker = TAKERS[how]
    held = {**module._parameters, **module._buffers}
    tensors = {name: held[name].detach().double() for name in taker.names if held.get(name) is not None}  # type: ignore[union-attr]
    if taker.names[0] not in tensors:
        return None
    return taker.scaled(module, tensors, factor.to(next(iter(tensors.values())).device))


class Trial:
    """A module on trial: a copy in double precision, and a map to run it on.

    Args:
        module: The module.
        given: A map of the shape that it was given.
        axes: The channel axis of what it is given and of what it returns.
    """

    def __init__(self, module: nn.Module, given: Tensor, axes: tuple[int, int]) -> None:
        self.module = _copy(module)
        self.axes = axes
        self.generator = torch.Generator().manual_seed(_SEED)
        self.x = self._noise(given)
        self.y = self._run(self.module, self.x)

    def taker(self, ahead: bool) -> str | None:
        """How the module can take a factor on its input or its output, by a key of `TAKERS`; None where it cannot."""
        factor = self._factor((self.x if ahead else self.y).shape[self.axes[not ahead]])
        for how, taker in TAKERS.items():
            tensors = absorbed(self.module, how, factor) if taker.ahead is ahead else None
            if tensors is None:
                continue
            changed = _copy(self.module)
            for name, tensor in tensors.items():
                getattr(changed, name).data.copy_(tensor)
            given = self.x * in_rank(factor, self.x.dim(), self.axes[0]) if ahead else self.x
            wanted = self._run(self.module, given)
            wanted = wanted if ahead else wanted * in_rank(factor, wanted.dim(), self.axes[1])
            if _equal(self._run(changed, self.x), wanted):
                return how
        return None

    def lets_through(self) -> int | None:
        """Which factors on its input come out on its output; None where they do not."""
        if self.x.shape[self.axes[0]] != self.y.shape[self.axes[1]]:
            return None
        factor = self._factor(self.x.shape[self.axes[0]])
        signs = torch.where(torch.arange(len(factor)) % 2 == 0, 1.0, -1.0).double()
        if not self._commutes(factor):
            return None
        return ANY if self._commutes(factor * signs) else NOT_NEGATIVE

    def _commutes(self, factor: Tensor) -> bool:
        given = self.x * in_rank(factor, self.x.dim(), self.axes[0])
        return _equal(self._run(self.module, given), self.y * in_rank(factor, self.y.dim(), self.axes[1]))

    def _noise(self, given: Tensor) -> Tensor:
        """Values of all sizes: what clips, clips some of them."""
        channels, size = given.shape[self.axes[0]], positions(tuple(given.shape), self.axes[0])
        sides = tuple(min(side, _SIDES[len(size)]) for side in size)
        shape = (2, *sides, channels) if self.axes[0] == -1 else (2, channels, *sides)
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x * 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-2, 3, generator=self.generator)

    def _factor(self, channels: int) -> Tensor:
        return torch.empty(channels, dtype=torch.float64).uniform_(0.25, 2.0, generator=self.generator)

    @torch.no_grad()
    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x.clone())
        return y


def _copy(module: nn.Module) -> nn.Module:
    patient = copy.deepcopy(module).cpu().double().eval()
    for part in patient.modules():
        # They are the user's: what they note must come from the user's own runs.
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return patient


def _equal(first: Tensor, second: Tensor) -> bool:
    """Equal but for rounding, value by value: a small one counts as much as a large one."""
    if first.shape != second.shape or not first.isfinite().all():
        return False
    size = float(second.abs().amax()) if second.numel() else 0.0
    return torch.allclose(first, second, rtol=1e-9, atol=1e-11 * size)
