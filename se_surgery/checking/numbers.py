"""Numbers: the values that a block is compared on, drawn without touching a generator that anybody else draws from.

In: shapes and dtypes, or what a forward draws itself. Out: random values that are the same for the same number, and
sizes of maps made small.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..reading.events import Call
from ..reading.look import Look
from ..reading.maps import Maps
from .alike import FEW

_POOL = 2**17


@functools.cache
def _pool(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_POOL, generator=generator, device="cpu")
    if dtype.is_floating_point or dtype.is_complex:
        return values.to(dtype)
    return (values > 0) if dtype is torch.bool else (values * 8).abs().to(dtype)


class Numbers:
    """Random values by number: the same for the same number, and others for another."""

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next values, as a tensor of its own."""
        self.drawn += 1
        return numbered(self.drawn, shape, dtype)


def numbered(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The values with this number, as a tensor of its own."""
    pool, (count, strides) = _pool(dtype), _layout(shape)
    # Large and odd steps: no two tensors of a block begin at one place.
    start = number * 7919 % (_POOL // 2)
    if count > _POOL // 2:
        return pool.roll(-start).repeat(count // _POOL + 1)[:count].view(shape)
    return pool.as_strided(shape, strides, start).clone()


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How many values a contiguous tensor of a shape has, and its strides."""
    return math.prod(shape), tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def positive(tensor: Tensor, number: int) -> Tensor:
    """Values for a tensor: never near zero; those that a forward may count with stay as they are."""
    if not tensor.is_floating_point() or (tensor.numel() <= FEW and not isinstance(tensor, nn.Parameter)):
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().to("cpu", copy=True)
    return numbered(number, tuple(tensor.shape), tensor.dtype).sigmoid_().add_(0.5)


class Scale:
    """Sizes of maps, made small: all maps of a call by one factor, so that what fitted together still does.

    Args:
        look: What the model did.
        call: The call.
        small: Whether sizes are changed at all.
    """

    def __init__(self, look: Look, call: Call, small: bool) -> None:
        self.maps = look.maps
        sides = [side for value in (*call.args, *call.kwargs.values(), call.output) for side in self._sides(value)]
        self.factor = max(min(sides, default=2) / 2, 1.0) if small else 1.0

    def _sides(self, value: Any) -> list[int]:
        if isinstance(value, Tensor):
            return [side for side in positions_of(value.shape, self.maps) if side > 1]
        return [side for item in value for side in self._sides(item)] if isinstance(value, (list, tuple)) else []

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a map, made small."""
        return shape if self.factor == 1.0 else _shrunk(shape, self.maps, self.factor)


def positions_of(shape: tuple[int, ...], maps: Maps) -> tuple[int, ...]:
    """The sides of a batch of maps; none of anything else."""
    return maps.sides(shape) if len(shape) in maps.ranks else ()


def _shrunk(shape: tuple[int, ...], maps: Maps, factor: float) -> tuple[int, ...]:
    sides = tuple(math.ceil(side / factor) for side in positions_of(shape, maps))
    if not sides:
        return shape
    return (shape[0], *sides, shape[-1]) if maps.axis(shape) == -1 else (*shape[:2], *sides)
