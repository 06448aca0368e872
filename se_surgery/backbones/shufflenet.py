"""ShuffleNet: residual units of grouped 1x1 convolutions, with their channels shuffled in between.

Zhang et al., *ShuffleNet* (arXiv 1707.01083), table 1 and figure 2. SE goes on the branch, before it is added to the
shortcut or concatenated with it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..errors import OptionError
from ..models.registry import register
from ..records import durable
from .common import Backbone, config, create

__all__: list[str] = []

STEM = 24
# Units in each stage, and the channels of the first for every number of groups; they double from stage to stage.
UNITS = (4, 8, 4)
WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}


@durable
class ChannelShuffle(nn.Module):
    """Deals the channels of each group out to all groups: channel n of group g becomes channel g of group n."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """The same maps in another order."""
        dealt: Tensor = x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return dealt

    def extra_repr(self) -> str:
        """The number of groups."""
        return f"groups={self.groups}"


@durable
class ShuffleUnit(nn.Module):
    """A unit: 1x1, shuffle, depthwise 3x3, 1x1, then added to its input.

    One that halves the resolution is concatenated with its pooled input instead, and so makes more channels of them.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        mid_chs = out_chs // 4
        branch_chs = out_chs if stride == 1 else out_chs - in_chs
        self.conv_pw = ConvNormAct(in_chs, mid_chs, 1, groups=first_groups)
        self.shuffle = ChannelShuffle(groups)
        self.conv_dw = ConvNormAct(mid_chs, mid_chs, 3, stride, groups=mid_chs, apply_act=False)
        self.conv_pwl = ConvNormAct(mid_chs, branch_chs, 1, groups=groups, apply_act=False)
        self.pool = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The branch and the shortcut, joined."""
        shortcut = x
        x = self.conv_pw(x)
        x = self.shuffle(x)
        x = self.conv_dw(x)
        x = self.conv_pwl(x)
        x = x + shortcut if self.pool is None else torch.cat([self.pool(shortcut), x], dim=1)
        joined: Tensor = self.act(x)
        return joined


@durable
class ShuffleNet(Backbone):
    """ShuffleNet 1x.

    Args:
        groups: Groups of the 1x1 convolutions, 1, 2, 3, 4 or 8; the very first of them, on few channels, has one.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name for the pooling of the last maps.
        drop_rate: Probability of dropout before the classifier.
    """

    def __init__(
        self,
        groups: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        if groups not in WIDTHS:
            raise OptionError(
                f"groups={groups!r} is not in ShuffleNet's table. Take one of {', '.join(map(str, WIDTHS))}."
            )
        stem = [ConvNormAct(in_chans, STEM, 3, stride=2), nn.MaxPool2d(3, 2, padding=1)]
        levels = [("stem.0", STEM, 2), ("stem.1", STEM, 4)]
        stages, in_chs = [], STEM
        for number, depth in enumerate(UNITS):
            out_chs = WIDTHS[groups] * 2**number
            units = [ShuffleUnit(in_chs, out_chs, 2, groups, first_groups=groups if number else 1)]
            units += [ShuffleUnit(out_chs, out_chs, 1, groups, first_groups=groups) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*units))
            levels.append((f"stages.{number}", out_chs, 8 * 2**number))
            in_chs = out_chs
        super().__init__(stem, stages, levels, num_classes, in_chans, global_pool, drop_rate)


default_cfgs = generate_default_cfgs({"shufflenet_g3.untrained": config()})


@register
def shufflenet_g3(pretrained: bool = False, **kwargs: Any) -> ShuffleNet:
    """ShuffleNet 1x with three groups."""
    return create(ShuffleNet, "shufflenet_g3", pretrained, groups=3, **kwargs)
