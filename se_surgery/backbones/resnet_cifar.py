"""ResNets for images of 32 x 32, as in CIFAR: a stem that keeps the resolution, and stages of basic blocks.

He et al., *Deep Residual Learning* (arXiv 1512.03385), section 4.2, has those of 6n + 2 layers with 16, 32 and 64
channels. `resnet18_cifar` is ResNet-18 behind the same kind of stem. A block that changes the width has a 1x1
convolution in its shortcut. The blocks are timm's.
"""

from __future__ import annotations

from typing import Any

from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock
from torch import nn

from ..models.registry import register
from ..records import durable
from .common import Backbone, config, create

__all__: list[str] = []


@durable
class CifarResNet(Backbone):
    """A ResNet for small images.

    Args:
        units: Blocks in each stage.
        width: Channels of the stem and the first stage; they double from stage to stage.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name for the pooling of the last maps.
        drop_rate: Probability of dropout before the classifier.
    """

    def __init__(
        self,
        units: tuple[int, ...],
        width: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stages, levels, in_chs = [], [], width
        for number, depth in enumerate(units):
            out_chs = width * 2**number
            blocks = [_block(in_chs, out_chs), *(_block(out_chs, out_chs) for _ in range(depth - 1))]
            stages.append(nn.Sequential(*blocks))
            levels.append((f"stages.{number}", out_chs, 2**number))
            in_chs = out_chs
        stem = [ConvNormAct(in_chans, width, 3)]
        super().__init__(stem, stages, levels, num_classes, in_chans, global_pool, drop_rate)


def _block(in_chs: int, out_chs: int) -> nn.Module:
    """A block; one that widens halves the resolution."""
    stride = 1 if in_chs == out_chs else 2
    shortcut = ConvNormAct(in_chs, out_chs, 1, stride, apply_act=False) if stride == 2 else None
    block: nn.Module = BasicBlock(in_chs, out_chs, stride, shortcut)
    return block


_CIFAR = config(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar.untrained": {**_CIFAR, "pool_size": (4, 4)},
        "resnet20_cifar.untrained": _CIFAR,
        "resnet56_cifar.untrained": _CIFAR,
        "resnet110_cifar.untrained": _CIFAR,
    }
)


@register
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for small images."""
    return _create("resnet18_cifar", pretrained, units=(2, 2, 2, 2), width=64, **kwargs)


@register
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for small images."""
    return _create("resnet20_cifar", pretrained, units=(3, 3, 3), width=16, **kwargs)


@register
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for small images."""
    return _create("resnet56_cifar", pretrained, units=(9, 9, 9), width=16, **kwargs)


@register
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for small images."""
    return _create("resnet110_cifar", pretrained, units=(18, 18, 18), width=16, **kwargs)


def _create(name: str, pretrained: bool, units: tuple[int, ...], **kwargs: Any) -> CifarResNet:
    return create(CifarResNet, name, pretrained, levels=len(units), units=units, **kwargs)
