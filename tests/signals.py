"""Networks of signals, (B, C, L): audio, ECG, sensors. Each small, and each with something of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basic(nn.Module):
    """ResNet's basic block in one dimension."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, width, 7, stride, 3, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv1d(width, width, 5, 1, 2, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        self.downsample = None
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv1d(inputs, width, 1, stride, bias=False), nn.BatchNorm1d(width))
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.act2(x)


class ResNet1d(nn.Module):
    """Four stages of basic blocks: 12 leads in, 5 classes out."""

    def __init__(self, depths: tuple[int, ...] = (2, 1, 1, 1), channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(channels, 16, 15, 2, 7, bias=False), nn.BatchNorm1d(16), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool1d(3, 2, 1)
        widths = (16, 16, 24, 32, 40)
        for i, depth in enumerate(depths):
            blocks = [Basic(widths[i], widths[i + 1], 2 if i else 1)]
            blocks += [Basic(widths[i + 1], widths[i + 1]) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[len(depths)], 5)
        self.depth = len(depths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(-1))


class Chomp(nn.Module):
    """Cuts off what a causal convolution was padded with."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class Temporal(nn.Module):
    """A block of a temporal convolutional network: dilated, causal, cropped."""

    def __init__(self, inputs: int, width: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        self.net = nn.Sequential(
            *(nn.Conv1d(inputs, width, 3, padding=pad, dilation=dilation), Chomp(pad), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Conv1d(width, width, 3, padding=pad, dilation=dilation), Chomp(pad), nn.ReLU(), nn.Dropout(0.1)),
        )
        self.downsample = nn.Conv1d(inputs, width, 1) if inputs != width else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    """Four temporal blocks, and a class for the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Temporal(w, v, 2**i) for i, (w, v) in enumerate([(3, 8), (8, 8), (8, 12)])))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x)[:, :, -1])


class InceptionModule(nn.Module):
    """A module of InceptionTime: a bottleneck, three widths, and a pooled branch, concatenated."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inputs, width, 1, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, k, padding=k // 2, bias=False) for k in (9, 5, 3))
        self.pool = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(inputs, width, 1, bias=False))
        self.bn = nn.BatchNorm1d(4 * width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        out = torch.cat([conv(narrow) for conv in self.convs] + [self.pool(x)], dim=1)
        return self.act(self.bn(out))


class InceptionTime(nn.Module):
    """Three modules and a shortcut over them, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.modules1 = nn.Sequential(InceptionModule(2, 4), InceptionModule(16, 4), InceptionModule(16, 4))
        self.shortcut1 = nn.Sequential(nn.Conv1d(2, 16, 1, bias=False), nn.BatchNorm1d(16))
        self.modules2 = nn.Sequential(InceptionModule(16, 4), InceptionModule(16, 4), InceptionModule(16, 4))
        self.shortcut2 = nn.Sequential(nn.Conv1d(16, 16, 1, bias=False), nn.BatchNorm1d(16))
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.modules1(x) + self.shortcut1(x))
        x = F.relu(self.modules2(x) + self.shortcut2(x))
        return self.fc(self.pool(x).flatten(1))


class BranchNormed(nn.Module):
    """Parallel branches, each with its own normalisation and activation, concatenated."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv1d(inputs, width, k, padding=k // 2, bias=False), nn.BatchNorm1d(width), nn.ReLU())
            for k in (1, 3, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Inception1d(nn.Module):
    """Two modules of parallel branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BranchNormed(2, 4), BranchNormed(12, 8)
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x)).amax(2))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm1d(inputs), nn.Conv1d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm1d(2 * growth), nn.Conv1d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.Module):
    def __init__(self, inputs: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + i * growth, growth) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet1d(nn.Module):
    """Two dense blocks of three and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 7, 2, 3, bias=False)
        self.block1 = DenseBlock(8, 4, 3)
        self.transition = nn.Sequential(nn.BatchNorm1d(20), nn.ReLU(), nn.Conv1d(20, 10, 1), nn.AvgPool1d(2))
        self.block2 = DenseBlock(10, 4, 2)
        self.norm = nn.BatchNorm1d(18)
        self.fc = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self.block1(self.stem(x)))
        return self.fc(F.relu(self.norm(self.block2(x))).mean(2))


class Double(nn.Sequential):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(
            *(nn.Conv1d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)),
            *(nn.Conv1d(width, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)),
        )


class UNet1d(nn.Module):
    """A U-Net that denoises one channel; its skip connections are no units."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Double(1, 8), Double(8, 16), Double(16, 32)
        self.pool = nn.MaxPool1d(2)
        self.up2, self.join2 = nn.ConvTranspose1d(32, 16, 2, 2), Double(32, 16)
        self.up1, self.join1 = nn.ConvTranspose1d(16, 8, 2, 2), Double(16, 8)
        self.head = nn.Conv1d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        x = self.middle(self.pool(two))
        x = self.join2(torch.cat([two, self.up2(x)], 1))
        x = self.join1(torch.cat([one, self.up1(x)], 1))
        return self.head(x)


class ConvNeXtBlock1d(nn.Module):
    """Depthwise convolution, LayerNorm and pointwise layers with channels last, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).transpose(1, 2)
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + y.transpose(1, 2)


class ConvNeXt1d(nn.Module):
    """Three blocks; a Vocos-like stem."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv1d(4, width, 7, padding=3)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ConvNeXtBlock1d(width) for _ in range(3))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x.transpose(1, 2)).mean(1))


class Gated(nn.Module):
    """WaveNet's block: a gated dilated convolution, a residual and a skip output."""

    def __init__(self, width: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.gate = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))
        return x + self.residual(z), self.skip(z)


class WaveNet(nn.Module):
    """Four blocks, their skips summed."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.blocks = nn.ModuleList(Gated(8, 12, 2**i) for i in range(4))
        self.end1, self.end2 = nn.Conv1d(12, 12, 1), nn.Conv1d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.end2(torch.relu(self.end1(torch.relu(total)))).mean(-1)


class Separable(nn.Module):
    """A depthwise convolution and its pointwise one."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(inputs, inputs, 5, stride, 2, groups=inputs, bias=False)
        self.bn1, self.act1 = nn.BatchNorm1d(inputs), nn.ReLU6()
        self.pointwise = nn.Conv1d(inputs, width, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm1d(width), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.depthwise(x)))
        return self.act2(self.bn2(self.pointwise(x)))


class MobileNet1d(nn.Module):
    """Three separable units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 8, 3, 2, 1)
        self.units = nn.Sequential(Separable(8, 16), Separable(16, 24, 2), Separable(24, 24))
        self.fc = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool1d(self.units(self.stem(x)), 1).squeeze(-1))


class Plain1d(nn.Module):
    """Convolutions in a row, and a Linear on all that is left: it takes 128 positions and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv1d(9, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(16, 32, 5, padding=2), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool1d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(32 * 32, 20), nn.ReLU(), nn.Linear(20, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Raw(nn.Module):
    """Takes (B, L) as audio comes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ResNet1d((1, 1, 1, 1), channels=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.unsqueeze(1))


class Last(nn.Module):
    """Takes (B, L, C) as tables of sensors come."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ResNet1d((1, 1, 1, 1), channels=7)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 1))
