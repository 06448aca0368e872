"""Training: the one way in which every network of the studies learns, and how it is scored.

In: a network and batches. Out: the network, trained, in evaluation; what share of a part it classifies right.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from .data import Part, loader
from .setting import Setting

# Channels last are half again as fast for so small maps.
LAYOUT = torch.channels_last
# The share of steps in which the learning rate rises, and the steps at the end that the loss is the mean of.
_RISE, _LAST = 0.2, 20


def train(model: nn.Module, batches: Iterator[Part], steps: int, rate: float, setting: Setting) -> float:
    """Train a network with AdamW and one cycle of the learning rate; its loss over the last steps.

    With SGD of the usual rates the gates hardly leave the value they start with in so few steps.
    """
    model.to(memory_format=LAYOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=setting.decay, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=_RISE, cycle_momentum=False)
    losses = []
    for images, labels in batches:
        error = functional.cross_entropy(model(images.contiguous(memory_format=LAYOUT)), labels)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        losses.append(error.item())
    model.eval()
    last = losses[-_LAST:]
    return round(sum(last) / len(last), 4)


@torch.no_grad()
def scores(model: nn.Module, part: Part) -> torch.Tensor:
    """The class scores of a part's images, in evaluation."""
    model.to(memory_format=LAYOUT).eval()
    return torch.cat([model(images.contiguous(memory_format=LAYOUT)) for images, _ in loader(part)])


def accuracy(model: nn.Module, part: Part) -> float:
    """The percentage of a part's images that a network classifies right."""
    return share_right(scores(model, part), part)


def loss(model: nn.Module, part: Part) -> float:
    """The mean loss of a network over a part's images."""
    return functional.cross_entropy(scores(model, part), part[1]).item()


def share_right(found: torch.Tensor, part: Part) -> float:
    """The percentage of a part's images whose highest score is that of their class."""
    right = found.argmax(1) == part[1]
    return round(100 * right.double().mean().item(), 3)
