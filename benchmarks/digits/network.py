"""Network: the base of all studies, a small ResNet of bottlenecks, in which five placements exist.

In: a setting, and torch's global random numbers. Out: a network for images of 8 x 8 with one channel. The blocks are
timm's; the stem keeps the resolution, as in ResNets for small images.
"""

from __future__ import annotations

from timm.layers import ConvNormAct
from timm.models.resnet import Bottleneck
from torch import nn

from se_surgery.backbones.common import Backbone

from .data import CLASSES, SHAPE
from .setting import Setting

PLACEMENTS = ("standard", "pre", "post", "identity", "inner")


def base(setting: Setting) -> Backbone:
    """A network with random weights."""
    stages, levels, channels = [], [], setting.stem
    for number, depth in enumerate(setting.units):
        blocks = []
        for place in range(depth):
            inner = setting.width * 2**number
            blocks.append(_block(channels, inner, 2 if number and not place else 1))
            channels = inner * Bottleneck.expansion
        stages.append(nn.Sequential(*blocks))
        levels.append((f"stages.{number}", channels, 2**number))
    stem = [ConvNormAct(SHAPE[0], setting.stem, 3)]
    return Backbone(stem, stages, levels, CLASSES, SHAPE[0], global_pool="avg", drop_rate=0.0)


def _block(channels: int, inner: int, stride: int) -> nn.Module:
    """A bottleneck, with a 1x1 convolution in the shortcut where the shape changes."""
    out = inner * Bottleneck.expansion
    changes = channels != out or stride != 1
    shortcut = ConvNormAct(channels, out, 1, stride, apply_act=False) if changes else None
    return Bottleneck(channels, inner, stride, shortcut)
