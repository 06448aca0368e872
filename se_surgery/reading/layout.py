"""Layout: how the axes of a map are laid out, and how the modules of a model.

In: the shape of a map, gates, or paths. Out: its channel axis and its positions; gates in its rank; what lies under
what.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


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


def in_rank(gate: Tensor, rank: int, axis: int) -> Tensor:
    """One number a channel, (C,) or (B, C), as maps of that rank and channel axis take it.

    Examples:
        >>> in_rank(torch.ones(8), 4, 1).shape, in_rank(torch.ones(2, 8), 4, -1).shape
        (torch.Size([1, 8, 1, 1]), torch.Size([2, 1, 1, 8]))
    """
    shape = [gate.shape[0] if gate.dim() == 2 else 1] + [1] * (rank - 1)
    shape[axis] = gate.shape[-1]
    return gate.reshape(shape)


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
