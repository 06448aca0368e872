"""Axes: what each axis of what a network of signals computes is.

In: every function of torch's that ran in one forward, with its arguments and its result. Out: for each tensor what its
axes are: the batch, channels, positions, a single position, or something else.

A shape tells this of images, by two axes in the image's proportions. Of signals it does not: (B, 1, N) is a map of one
channel, or N channels of what was pooled, and (B, M, N) may have its channels last.
"""

from __future__ import annotations

from types import MethodWrapperType
from typing import Any

import torch
from torch import Tensor

from .blame import handed
from .dataflow import tensors_in
from .events import KINDS, functions
from .maps import SIGNALS, Maps

BATCH, CHANNELS, POSITIONS, ONE, OTHER = "bcp1?"
# Of operands that are broadcast the axis is what says most.
_PREFERRED = (POSITIONS, CHANNELS, BATCH, OTHER, ONE)
_INPUTS = {1: BATCH, 2: BATCH + POSITIONS, 3: BATCH + CHANNELS + POSITIONS}
# What turns axes, drops them or adds some, and is seen on any tensor alike.
_TURNS = functions(
    *"transpose permute swapaxes swapdims movedim moveaxis t select unsqueeze __getitem__".split(),
    *"mean sum amax amin max min std var median logsumexp".split(),
)
_ITEMS = functions("__getitem__")
# Sides of a tensor to see it on: none is another one's.
_SIDES = (1009, 1013, 1019, 1021, 1031, 1033)


class Axes:
    """The labels of the axes of all tensors of one forward, noted while it runs."""

    def __init__(self) -> None:
        self._labels: dict[int, str] = {}
        # An identity is a tensor's own as long as the tensor lives.
        self._kept: list[Tensor] = []
        self._given: list[Tensor] = []
        self._has_convolved = False

    def take(self, given: Any) -> None:
        """Note the inputs of the model: (B, C, L), until a convolution tells otherwise, or (B, L)."""
        for tensor in tensors_in(given):
            self._given.append(tensor)
            self._note(tensor, _INPUTS.get(tensor.dim(), BATCH + OTHER * (tensor.dim() - 2) + POSITIONS))

    def follow(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a function made."""
        sources = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self._labels]
        is_turn = len(sources) == 1 and (function in _TURNS or type(function) is MethodWrapperType)
        for made in tensors_in(result) if sources else ():
            if KINDS.get(function) == "conv":
                labels = self._convolved(sources[0], made)
            elif is_turn and sources[0].dim() <= len(_SIDES) and not _is_cut(function, sources[0], made):
                labels = self._turned(function, args, kwargs, sources[0], made)
            else:
                labels = self._made(sources, made)
            self._note(made, _without_ones(labels, made))

    def is_map(self, tensor: Tensor) -> bool:
        """Whether a tensor is a batch of maps of more than one position."""
        labels = self._labels.get(id(tensor), "")
        if not labels:
            return Maps(SIGNALS).is_map(tensor.shape)
        return tensor.dim() in SIGNALS and labels.startswith(BATCH) and labels.count(POSITIONS) == 1

    def axis(self, tensor: Tensor) -> int:
        """The channel axis of a map, 1 or -1."""
        return -1 if self._labels.get(id(tensor), "")[1:2] == POSITIONS else 1

    def maps(self) -> Maps:
        """What the maps of the network look like by all that was noted."""
        axes: dict[tuple[int, ...], frozenset[int]] = {}
        others: set[tuple[int, ...]] = set()
        for tensor in self._kept:
            shape = tuple(tensor.shape)
            if self.is_map(tensor):
                axes[shape] = axes.get(shape, frozenset()) | {self.axis(tensor)}
            elif tensor.dim() in SIGNALS:
                others.add(shape)
        image, inputs = self._image()
        return Maps(SIGNALS, image, inputs, axes, frozenset(others))

    def _image(self) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
        """The length of what went in, and which axis of it that is."""
        signals = [tensor for tensor in self._given if POSITIONS in self._labels[id(tensor)] and tensor.dim() in (2, 3)]
        if not signals:
            return (1,), {}
        # What comes with a signal in three axes may be a vector.
        signal = max(signals, key=lambda tensor: tensor.dim())
        axis = self._labels[id(signal)].index(POSITIONS)
        return (signal.shape[axis],), {signal.dim(): (axis,)}

    def _note(self, tensor: Tensor, labels: str) -> None:
        self._labels[id(tensor)] = labels
        self._kept.append(tensor)

    def _convolved(self, source: Tensor, result: Tensor) -> str:
        """A convolution makes (B, C, L); one over the channels of what is pooled (ECA) makes no map of it."""
        labels = self._labels.get(id(source), BATCH + CHANNELS + POSITIONS)
        if not self._has_convolved and labels == BATCH + POSITIONS + CHANNELS:
            # What went in was not what it was taken for.
            turned = str.maketrans(CHANNELS + POSITIONS, POSITIONS + CHANNELS)
            for other in self._kept:
                if other.dim() in SIGNALS:
                    self._labels[id(other)] = self._labels[id(other)].translate(turned)
        self._has_convolved = True
        is_pooled = POSITIONS not in labels and OTHER not in labels
        if is_pooled or result.dim() not in SIGNALS:
            return self._made([source], result)
        return BATCH + CHANNELS + POSITIONS

    def _turned(self, function: Any, args: Any, kwargs: Any, source: Tensor, result: Tensor) -> str:
        """What becomes of the axes is seen on a tensor of which each is of another size."""
        like = torch.empty(_SIDES[: source.dim()], device="meta")
        try:
            seen = handed(function, like, *args[1:], **kwargs)
        except (IndexError, RuntimeError, TypeError, ValueError):  # another kind of index: its shape tells what it is
            return self._made([source], result)
        seen = seen if isinstance(seen, Tensor) else next(iter(seen))
        if seen.dim() != result.dim():
            return self._made([source], result)
        labels = self._labels[id(source)]
        found = ""
        for size, stride in zip(seen.shape, seen.stride(), strict=True):
            same = [axis for axis in range(like.dim()) if size == like.shape[axis] or stride == like.stride(axis)]
            found += ONE if size == 1 else labels[same[0]] if same else OTHER
        return found

    def _made(self, sources: list[Tensor], result: Tensor) -> str:
        """The labels of what is computed from some tensors: element by element, or with its axes in other sizes."""
        alike = [source for source in sources if source.dim() == result.dim()]
        first = self._labels[id(alike[0])] if alike else ""
        # A view of one axis as another (ECA's) has the same sizes in another order.
        is_turned = len(alike) == 1 and alike[0].shape != result.shape and _sizes(alike[0]) == _sizes(result)
        if not alike or is_turned:
            return self._reshaped(sources[0], result)
        found = ""
        for axis, size in enumerate(result.shape):
            labels = [self._labels[id(source)][axis] for source in alike if source.shape[axis] == size]
            if not labels and first[axis] == ONE:
                # What is made larger is positions again; a second map of one channel makes channels.
                labels = [CHANNELS if POSITIONS in first else POSITIONS]
            found += min(labels or [first[axis]], key=_PREFERRED.index)
        return found

    def _reshaped(self, source: Tensor, result: Tensor) -> str:
        """The axes whose sizes are still there, from the last one on; others are what was none of these before."""
        labels = self._labels[id(source)]
        left = list(zip(source.shape, labels, strict=True))
        found: list[str] = []
        # The batch is the first one, whatever else is as large.
        has_batch = labels[:1] == BATCH and source.shape[0] == result.shape[0] if result.dim() else False
        first = [left.pop(0)[1]] if has_batch else []
        for size in reversed(result.shape[len(first) :]):
            same = [pair for pair in left if pair[0] == size]
            found.insert(0, same[-1][1] if same else ONE if size == 1 else OTHER)
            if same:
                left.remove(same[-1])
        return "".join(first + found)


def _is_cut(function: Any, source: Tensor, result: Tensor) -> bool:
    """Whether an item is a tensor's own with other sizes at most."""
    return function in _ITEMS and source.dim() == result.dim()


def _without_ones(labels: str, tensor: Tensor) -> str:
    """An axis of positions with a single one has none to tell of any more."""
    pairs = zip(labels, tensor.shape, strict=True)
    return "".join(ONE if label == POSITIONS and size == 1 else label for label, size in pairs)


def _sizes(tensor: Tensor) -> list[int]:
    return sorted(tensor.shape)
