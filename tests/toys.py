"""Users' own small networks, one for each hazard, each with its expected number of sites, counted by hand.

`SIZE` is the (C, H, W) that a network takes, `PLACES` the units with a place by placement. None is from a library.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def five(count: int, **other: int) -> dict[str, int]:
    """The five placements of a residual unit, each `count` times but for those named."""
    places = {**dict.fromkeys(("standard", "pre", "post", "identity", "inner"), count), **other}
    return {placement: n for placement, n in places.items() if n}


def conv(inputs: int, outputs: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, stride, k // 2, groups=groups, bias=False)


class Basic(nn.Module):
    """A residual block in the plainest form."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.project = None
        if stride != 1 or inputs != outputs:
            self.project = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.project is None else self.project(x)
        y += shortcut
        return self.relu(y)


class Trunk(nn.Module):
    """A stem, some blocks, a head; what most toys share."""

    SIZE: ClassVar[tuple[int, ...]] = (3, 32, 32)
    PLACES: ClassVar[dict[str, int]] = {}

    def __init__(self, *blocks: nn.Module, width: int = 8, outputs: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(self.SIZE[0], width), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(outputs or width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Digits(nn.Module):
    """1x28x28 only, because of its flatten."""

    SIZE = (1, 28, 28)
    PLACES = five(2)  # two residual blocks

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(Basic(8, 8), Basic(8, 16, stride=2))
        self.fc = nn.Linear(16 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.layers(self.stem(x)), 1))


class RootAdds(nn.Module):
    """The root's own forward holds the addition: the SE is the model's own child."""

    SIZE = (3, 32, 32)
    PLACES = five(1)

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.conv0(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        x = self.relu(x + y)
        return self.fc(x.mean((2, 3)))


class FunctionalBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu_(torch.add(y, x))


class Functional(Trunk):
    """No activation is a module, and the addition is torch.add."""

    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__(FunctionalBlock(8), FunctionalBlock(8))


class SequenceSE(nn.Module):
    """The first write-up's block."""

    def __init__(self, channels: int, r: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.sequence = nn.Sequential(
            nn.Linear(channels, channels // r, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // r, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.sequence(self.pool(x).view(b, c)).view(b, c, 1, 1)


class ExpandSE(nn.Module):
    """Called `fc` in the write-up, with an expand_as."""

    def __init__(self, channels: int, r: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // r), nn.ReLU(), nn.Linear(channels // r, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ExcitationSE(nn.Module):
    """Convolutions instead of Linear layers, the gate first in the product."""

    def __init__(self, channels: int, r: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excitation = nn.Sequential(
            nn.Conv2d(channels, channels // r, 1), nn.ReLU(), nn.Conv2d(channels // r, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.excitation(self.squeeze(x)) * x


class TwoLayerSE(nn.Module):
    """fc0 and fc1 (the second with a bias only), everything else functional."""

    def __init__(self, channels: int, r: int = 4) -> None:
        super().__init__()
        self.fc0 = nn.Linear(channels, channels // r, bias=False)
        self.fc1 = nn.Linear(channels // r, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        z = F.adaptive_avg_pool2d(x, 1).flatten(1)
        s = torch.sigmoid(self.fc1(F.relu(self.fc0(z))))
        return x * s[:, :, None, None]


class HoldsSE(nn.Module):
    """A residual block with somebody's SE on its branch."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x + self.attention(y))


class WriteUps(Trunk):
    """The write-ups' own SE blocks, four forms of them, one in each unit."""

    PLACES = five(4)
    SES = ("blocks.0.attention", "blocks.1.attention", "blocks.2.attention", "blocks.3.attention")

    def __init__(self) -> None:
        super().__init__(*(HoldsSE(8, kind(8)) for kind in (SequenceSE, ExpandSE, ExcitationSE, TwoLayerSE)))


class PlainSequential(nn.Sequential):
    """The whole network is one Sequential: nothing can be inserted, indices are keys."""

    SIZE = (3, 32, 32)
    PLACES: ClassVar[dict[str, int]] = {"standard": 3}  # one for each convolution

    def __init__(self) -> None:
        super().__init__(
            *(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(conv(16, 16), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )


class PreActivationBlock(nn.Module):
    """`relu` changes the block's input in place, and so the shortcut with it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(x)
        y = self.conv2(self.relu2(self.bn1(self.conv1(y))))
        return y + x


class PreActivation(Trunk):
    """`pre` has to go behind the in-place ReLU: in front, the shortcut would no longer be changed by it."""

    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__(PreActivationBlock(8), PreActivationBlock(8))


class ForkedInPlaceBlock(nn.Module):
    """The branch reads its input twice, once through a ReLU that changes it in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 1), nn.BatchNorm2d(width)
        self.conv3 = conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(self.relu(x))))
        z = self.bn2(self.conv2(x))
        return x + self.conv3(torch.cat([y, z], 1))


class ForkedInPlace(Trunk):
    """`pre` has no right place here."""

    PLACES = five(1, pre=0)

    def __init__(self) -> None:
        super().__init__(ForkedInPlaceBlock(8))


class OddlyCalledBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, maps: list[Tensor], mask: Tensor | None = None, *, scale: float = 1.0, last: bool = False) -> Any:
        x = maps[-1] if isinstance(maps, (list, tuple)) else maps
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if mask is not None:
            y = y * mask
        x = F.relu(x + y * scale)
        return x if last else [*maps, x]


class OddlyCalled(nn.Module):
    """Blocks are called with a growing list, with None, and with keywords."""

    SIZE = (3, 32, 32)
    PLACES = five(3)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.ModuleList(OddlyCalledBlock(8) for _ in range(3))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        maps = self.blocks[0](maps, None)
        maps = self.blocks[1](maps, mask=None, scale=0.5)
        x = self.blocks[2](maps, scale=2.0, last=True)
        return self.fc(x.mean((2, 3)))


class DropoutBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.dropout(y, p=0.3, training=self.training)
        y = self.bn2(self.conv2(y))
        return F.relu(x + y)


class FunctionalDropout(Trunk):
    """The training and the evaluation forward are two different graphs."""

    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__(DropoutBlock(8), DropoutBlock(8))


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    if not training:
        return x
    return x.div(1 - p) * torch.bernoulli(torch.full_like(x[:, :1, :1, :1], 1 - p))


class DropPathBlock(FunctionalBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + drop_path(y, 0.1, self.training))


class FunctionalDropPath(Trunk):
    """In training there are operations between the branch and the addition that evaluation does not have."""

    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__(DropPathBlock(8), DropPathBlock(8))


class TwoUnitsBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.conv4 = conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x + self.conv4(F.gelu(self.bn3(self.conv3(x))))
        return x


class TwoUnits(Trunk):
    """Two residual units in one forward: two SEs in one block."""

    PLACES = five(4)  # two blocks of two units

    def __init__(self) -> None:
        super().__init__(TwoUnitsBlock(8), TwoUnitsBlock(8))


class NHWCBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 5, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.fc2(F.gelu(self.fc1(self.norm(y))))
        return x + self.gamma * y


class NHWC(nn.Module):
    """Channels are the last axis where the addition is."""

    SIZE = (3, 32, 32)
    PLACES = five(2)

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.blocks = nn.Sequential(NHWCBlock(width), NHWCBlock(width))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).permute(0, 2, 3, 1))
        return self.fc(x.mean((1, 2)))


class PlanesBottleneck(nn.Module):
    """A bottleneck that knows its width by `planes` only; its SE sees four times as many channels."""

    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        self.planes = planes
        self.conv1, self.bn1 = conv(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, planes * 4, 1), nn.BatchNorm2d(planes * 4)
        self.shortcut = nn.Sequential(conv(inputs, planes * 4, 1), nn.BatchNorm2d(planes * 4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Planes(Trunk):
    """Channels at each placement of its one unit: what goes in 8, inside 4, what comes out 16."""

    PLACES = five(1)
    CHANNELS: ClassVar[dict[str, int]] = {"standard": 16, "pre": 8, "post": 16, "identity": 16, "inner": 4}

    def __init__(self) -> None:
        super().__init__(PlanesBottleneck(8, 4), outputs=16)


class Volumes(nn.Module):
    """Three-dimensional convolutions: maps are (B, C, T, H, W)."""

    SIZE = (3, 8, 16, 16)
    PLACES = five(1)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.block = VolumeBlock(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3, 4)))


class VolumeBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width)
        self.conv2, self.bn2 = nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class OwnSlotBlock(nn.Module):
    """A block whose forward calls an empty `se` of its own in front of the last convolution, and has an `act` too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.se = nn.Identity()
        self.act = nn.SiLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.act(self.bn1(self.conv1(x))))
        return self.bn2(self.conv2(y)) + x


class OwnSlot(Trunk):
    """`se` is taken: an SE of that name at the branch's end would run twice. `inner` is the slot itself."""

    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__(OwnSlotBlock(8), OwnSlotBlock(8))


class UNet(nn.Module):
    """A U-Net in one forward: its skip connection joins two resolutions' ways; what comes before is units."""

    SIZE = (3, 16, 16)
    PLACES: ClassVar[dict[str, int]] = {"standard": 2}

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = conv(3, 8), conv(8, 16, stride=2), conv(24, 8)
        self.act = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act[0](self.down(x))
        deep = F.interpolate(self.act[1](self.bottom(skip)), scale_factor=2)
        return self.head(self.act[2](self.up(torch.cat([deep, skip], 1))))


class AllConvolutional(nn.Module):
    """A net whose last convolution makes the class scores (network in network): those get no gate."""

    SIZE = (3, 16, 16)
    PLACES: ClassVar[dict[str, int]] = {"standard": 2}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 8), conv(8, 16, stride=2), conv(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))).mean((2, 3))


class Segmenter(nn.Module):
    """A backbone and a head that is a residual block of classes: only the backbone is operated on."""

    SIZE = (3, 16, 16)
    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8), Basic(8, 8), Basic(8, 8))
        self.head = Basic(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class InnerAttentionBlock(nn.Module):
    """A residual branch with an attention module in it that is a residual itself (bilinear attention)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.act, self.attn, self.conv2 = conv(channels, 8), nn.ReLU(), Basic(8, 8), conv(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.attn(self.act(self.conv1(x))))


class InnerAttention(Trunk):
    """Two of them: the branch is the unit, whatever is inside."""

    PLACES = five(2)

    def __init__(self) -> None:
        super().__init__(InnerAttentionBlock(8), InnerAttentionBlock(8))


class ShortcutGiven(nn.Module):
    """A block that is given its shortcut beside its input (deep layer aggregation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = conv(channels, channels), nn.ReLU(), conv(channels, channels)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))) + shortcut)


class Aggregated(nn.Module):
    """One such block."""

    SIZE = (3, 16, 16)
    PLACES = five(1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.project, self.block, self.fc = conv(3, 8), conv(8, 8, 1), ShortcutGiven(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.block(x, self.project(x)).mean((2, 3)))


SOUND = (
    *(Digits, RootAdds, Functional, WriteUps, PlainSequential, PreActivation, ForkedInPlace, OddlyCalled),
    *(FunctionalDropout, FunctionalDropPath, TwoUnits, NHWC, Planes, Volumes, OwnSlot),
    *(UNet, AllConvolutional, Segmenter, InnerAttention, Aggregated),
)


# ------------------------------------------------------------------------------------------------ cannot be operated on


class CalledTwice(nn.Module):
    """One block runs twice in a forward: its SE would too."""

    SIZE = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = conv(3, 8), Basic(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.block(self.stem(x))).mean((2, 3)))


class SharedBlock(Trunk):
    """One block stands in two places under two names."""

    def __init__(self) -> None:
        block = Basic(8, 8)
        super().__init__(block, nn.Identity(), block)


class SharedActivation(nn.Sequential):
    """One ReLU behind two convolutions of a Sequential: an SE hung on it would serve both."""

    SIZE = (3, 32, 32)

    def __init__(self) -> None:
        relu = nn.ReLU()
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        super().__init__(conv(3, 8), nn.BatchNorm2d(8), relu, conv(8, 8), nn.BatchNorm2d(8), relu, *pool)


class InstanceForward(Trunk):
    """A block whose forward hangs on the instance, where a rewritten class does not reach."""

    def __init__(self) -> None:
        block = Basic(8, 8)
        block.forward = types.MethodType(Basic.forward, block)
        super().__init__(block)


class DataDependentBlock(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return x + y if x.mean() > 0 else x - y


class DataDependent(Trunk):
    """Which way a block goes depends on the values: it has no one graph."""

    def __init__(self) -> None:
        super().__init__(DataDependentBlock(8, 8))


class NoConvolution(nn.Module):
    """Nothing to recalibrate."""

    SIZE = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))
