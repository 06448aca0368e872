"""BN-Inception: the Inception network with batch normalisation.

Ioffe & Szegedy, *Batch Normalization* (arXiv 1502.03167), figure 5. Where the figure disagrees with itself, its filters
hold: those of module 4c, 160 + 160 + 160 + 128, come to 608 channels, and those of 4e to 1056; it has 576 and 1024
beside them. The first convolution is a full one; the authors had a separable one, which is cheaper. Auxiliary
classifiers, which serve nothing but training, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..models.registry import register
from ..records import durable
from .common import Backbone, config, create

__all__: list[str] = []


class Row(NamedTuple):
    """A row of figure 5: the filters of one Inception module.

    Attributes:
        conv1: `#1x1`.
        reduce3: `#3x3 reduce`.
        conv3: `#3x3`.
        reduce33: `double #3x3 reduce`.
        conv33: `double #3x3`.
        pooling: `avg` or `max`.
        pool: Filters behind the pooling; without any its maps pass through.
    """

    conv1: int
    reduce3: int
    conv3: int
    reduce33: int
    conv33: int
    pooling: str
    pool: int


# Modules 3a and 3b; 3c to 4d; 4e to 5b. A module without a 1x1 convolution halves the resolution.
TABLE = (
    (Row(64, 64, 64, 64, 96, "avg", 32), Row(64, 64, 96, 64, 96, "avg", 64)),
    (
        Row(0, 128, 160, 64, 96, "max", 0),
        Row(224, 64, 96, 96, 128, "avg", 128),
        Row(192, 96, 128, 96, 128, "avg", 128),
        Row(160, 128, 160, 128, 160, "avg", 128),
        Row(96, 128, 192, 160, 192, "avg", 128),
    ),
    (
        Row(0, 128, 192, 192, 256, "max", 0),
        Row(352, 192, 320, 160, 224, "avg", 128),
        Row(352, 192, 320, 192, 224, "max", 128),
    ),
)
_POOLS: dict[str, Callable[..., nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


@durable
class Inception(nn.Module):
    """An Inception module: convolutions 1x1, 3x3 and twice 3x3, and a pooling, side by side."""

    def __init__(self, in_chs: int, row: Row) -> None:
        super().__init__()
        stride = 1 if row.conv1 else 2
        pool = _POOLS[row.pooling](3, stride, padding=1)
        branches: list[list[nn.Module]] = [
            [ConvNormAct(in_chs, row.conv1, 1)] if row.conv1 else [],
            [ConvNormAct(in_chs, row.reduce3, 1), ConvNormAct(row.reduce3, row.conv3, 3, stride)],
            [
                ConvNormAct(in_chs, row.reduce33, 1),
                ConvNormAct(row.reduce33, row.conv33, 3),
                ConvNormAct(row.conv33, row.conv33, 3, stride),
            ],
            [pool, ConvNormAct(in_chs, row.pool, 1)] if row.pool else [pool],
        ]
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches if branch)
        self.out_chs = row.conv1 + row.conv3 + row.conv33 + (row.pool or in_chs)

    def forward(self, x: Tensor) -> Tensor:
        """The maps of all branches, one after the other."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


@durable
class BNInception(Backbone):
    """BN-Inception.

    Args:
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name for the pooling of the last maps.
        drop_rate: Probability of dropout before the classifier.
    """

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        stem = [
            ConvNormAct(in_chans, 64, 7, stride=2),
            nn.MaxPool2d(3, 2, padding=1),
            ConvNormAct(64, 64, 1),
            ConvNormAct(64, 192, 3),
            nn.MaxPool2d(3, 2, padding=1),
        ]
        levels = [("stem.0", 64, 2), ("stem.3", 192, 4)]
        stages, channels = [], 192
        for number, rows in enumerate(TABLE):
            modules = []
            for row in rows:
                modules.append(Inception(channels, row))
                channels = modules[-1].out_chs
            stages.append(nn.Sequential(*modules))
            levels.append((f"stages.{number}", channels, 8 * 2**number))
        super().__init__(stem, stages, levels, num_classes, in_chans, global_pool, drop_rate)


default_cfgs = generate_default_cfgs({"bn_inception.untrained": config()})


@register
def bn_inception(pretrained: bool = False, **kwargs: Any) -> BNInception:
    """BN-Inception."""
    return create(BNInception, "bn_inception", pretrained, **kwargs)
