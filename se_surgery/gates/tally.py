"""Tally: sum up gates batch by batch, so that nothing but the sums is kept.

In: the gates of one SE, one batch after another. Out: their moments, over all inputs and over those of each class. The
tallies of several processes, each of its part of the data, make one.

Moments are kept as means and squared deviations and merged after Chan, Golub and LeVeque (1979): the difference of two
large sums would lose what little a gate varies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import gathered, total


@dataclass
class Tally:
    """Moments of the gates of one SE, in double precision.

    Attributes:
        count: Number of inputs.
        mean: Mean over the inputs, (C,).
        deviations: Sum of the squared deviations from it, (C,).
        saturated: Number of inputs for which the gate was saturated, (C,); None where that is not known.
        labels: The classes seen, ascending.
        class_counts: Number of inputs of each, (K,).
        class_sums: Sum of the gates over the inputs of each, (K, C).
    """

    count: int
    mean: Tensor
    deviations: Tensor
    saturated: Tensor | None
    labels: Tensor
    class_counts: Tensor
    class_sums: Tensor

    @classmethod
    def empty(cls, channels: int) -> Tally:
        """A tally of nothing."""
        nothing, none = torch.zeros(channels, dtype=torch.float64), torch.empty(0, dtype=torch.long)
        return cls(0, nothing, nothing, nothing, none, none.double(), nothing.new_empty(0, channels))

    def add(self, gates: Tensor, saturated: Tensor | None, labels: Tensor | None) -> None:
        """Add the gates of one batch, (B, C)."""
        mean = gates.mean(0)
        self.deviations = self.deviations + (gates - mean).square().sum(0)
        count = self.count + len(gates)
        step = mean - self.mean
        self.deviations = self.deviations + step.square() * (self.count * len(gates) / count)
        self.mean = self.mean + step * (len(gates) / count)
        self.count = count
        known = saturated is not None and self.saturated is not None
        self.saturated = self.saturated + saturated.double().sum(0) if known else None  # type: ignore[operator, union-attr]
        if labels is not None:
            self._add_classes(gates, labels)

    def _add_classes(self, gates: Tensor, labels: Tensor) -> None:
        self._know(labels)
        rows = torch.searchsorted(self.labels, labels)
        self.class_counts.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
        self.class_sums.index_add_(0, rows, gates)

    def _know(self, labels: Tensor) -> None:
        """Make rows for classes that have none yet."""
        known = torch.cat([self.labels, labels]).unique()
        if len(known) == len(self.labels):
            return
        rows = torch.searchsorted(known, self.labels)
        self.class_counts = self.class_counts.new_zeros(len(known)).index_copy(0, rows, self.class_counts)
        grown = self.class_sums.new_zeros(len(known), self.class_sums.shape[1])
        self.class_sums = grown.index_copy(0, rows, self.class_sums)
        self.labels = known


def whole(part: Tally) -> Tally:
    """The tally of all processes' parts, the same on each of them."""
    told = gathered((part.labels.tolist(), part.saturated is not None or not part.count))
    part._know(torch.tensor(sorted({label for labels, _ in told for label in labels}), dtype=torch.long))
    count = total(torch.tensor(float(part.count), dtype=torch.float64))
    mean = total(part.mean * part.count) / count.clamp_min(1)
    deviations = total(part.deviations + (part.mean - mean).square() * part.count)
    known = all(knows for _, knows in told)
    saturated = total(part.saturated if part.saturated is not None else part.mean) if known else None
    return Tally(int(count), mean, deviations, saturated, part.labels, total(part.class_counts), total(part.class_sums))
