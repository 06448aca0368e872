"""Maps: what the feature maps of one network look like.

In: the convolutions of a network, and what one forward made. Out: a `Maps`, which says of any shape whether maps have
it, which axis holds their channels, and what their positions are.

The rank of maps is a property of the network. Where all convolutions have one dimension (audio, ECG, sensors) maps are
(B, C, L). In any other network they are (B, C, H, W) or (B, C, T, H, W), and a tensor of three axes is tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..records import implants
from .layout import channel_axis, positions

Shape = tuple[int, ...] | torch.Size

# Numbers of axes of a batch of maps, in networks of images and videos, and in networks of signals.
IMAGES = (4, 5)
SIGNALS = (3,)


@dataclass(frozen=True, eq=False)
class Maps:
    """What the maps of a network look like.

    Attributes:
        ranks: The numbers of axes that a batch of maps has.
        image: Spatial size of what went into the model.
        inputs: The axes of positions of what goes into the model, by the number of its axes.
        axes: In a network of signals the channel axes of the maps that there were, 1 or -1, by shape.
        others: In a network of signals the shapes of what was no map.
    """

    ranks: tuple[int, ...] = IMAGES
    image: tuple[int, ...] = (1, 1)
    inputs: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: {4: (2, 3), 5: (3, 4)})
    axes: Mapping[tuple[int, ...], frozenset[int]] = field(default_factory=dict)
    others: frozenset[tuple[int, ...]] = frozenset()

    @property
    def are_signals(self) -> bool:
        """Whether maps have one dimension."""
        return self.ranks == SIGNALS

    def is_map(self, shape: Shape) -> bool:
        """Whether a shape is that of a batch of feature maps with more than one position.

        Examples:
            >>> Maps().is_map((2, 64, 7, 7)), Maps().is_map((2, 64, 1, 1)), Maps().is_map((2, 49, 64))
            (True, False, False)
            >>> Maps(SIGNALS).is_map((2, 64, 49)), Maps(SIGNALS).is_map((2, 64, 1))
            (True, False)
        """
        if len(shape) not in self.ranks:
            return False
        if self.axes and (shape in self.axes) != (shape in self.others):
            return shape in self.axes
        return sum([size > 1 for size in shape[1:]]) > 1

    def is_single(self, shape: Shape) -> bool:
        """Whether a shape is that of maps of one position; a signal of one channel is none."""
        if self.are_signals:
            return len(shape) in self.ranks and shape[2] == 1
        return len(shape) in self.ranks and not self.is_map(shape)

    def axis(self, shape: Shape) -> int | None:
        """The channel axis of maps, 1 or -1, or None where their shape does not tell."""
        if not self.are_signals:
            return channel_axis(tuple(shape), self.image)
        found = self.axes.get(tuple(shape), frozenset({1}))
        return next(iter(found)) if len(found) == 1 else None

    def sides(self, shape: Shape) -> tuple[int, ...]:
        """Spatial size of maps."""
        return positions(tuple(shape), self.axis(shape))

    def area(self, shape: Shape) -> int:
        """Number of positions of maps."""
        return math.prod(self.sides(shape))


def ranks_of(model: nn.Module) -> tuple[int, ...]:
    """The ranks of a network's maps as its layers tell them; the SEs of this library are no part of it."""
    layers = (module for module in _outside_of_implants(model) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    # What pools first may have pointwise layers of two dimensions behind that, as the SE of a network of signals has.
    return ranks_by(len(layer.kernel_size) for layer in layers if len(layer.kernel_size) == 1 or _is_wide(layer))


def ranks_by(dimensions: Iterable[int]) -> tuple[int, ...]:
    """The ranks of maps by the dimensions of the convolutions that make them.

    Examples:
        >>> ranks_by([1, 1]), ranks_by([2, 1]), ranks_by([])
        ((3,), (4, 5), (4, 5))
    """
    found = 0
    for dimension in dimensions:
        if dimension > 1:
            return IMAGES
        found = dimension
    return SIGNALS if found else IMAGES


def _is_wide(layer: nn.Module) -> bool:
    return any(size > 1 for size in layer.kernel_size)  # type: ignore[arg-type, union-attr]


def _outside_of_implants(module: nn.Module) -> Iterable[nn.Module]:
    yield module
    ours = {implant.name for implant in implants(module)}
    for name, child in module._modules.items():
        if child is not None and name not in ours:
            yield from _outside_of_implants(child)
