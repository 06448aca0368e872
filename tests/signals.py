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


class Concat(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, dim=1)


class ConcatModule(InceptionModule):
    """The same with a child that concatenates."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.concat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        return self.act(self.bn(self.concat([*(conv(narrow) for conv in self.convs), self.pool(x)])))


class InceptionTime(nn.Module):
    """Three modules and a shortcut over them, twice."""

    MODULE: type[InceptionModule] = InceptionModule

    def __init__(self) -> None:
        super().__init__()
        self.modules1 = nn.Sequential(self.MODULE(2, 4), self.MODULE(16, 4), self.MODULE(16, 4))
        self.shortcut1 = nn.Sequential(nn.Conv1d(2, 16, 1, bias=False), nn.BatchNorm1d(16))
        self.modules2 = nn.Sequential(self.MODULE(16, 4), self.MODULE(16, 4), self.MODULE(16, 4))
        self.shortcut2 = nn.Sequential(nn.Conv1d(16, 16, 1, bias=False), nn.BatchNorm1d(16))
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.modules1(x) + self.shortcut1(x))
        x = F.relu(self.modules2(x) + self.shortcut2(x))
        return self.fc(self.pool(x).flatten(1))


class ConcatTime(InceptionTime):
    """InceptionTime with a child that concatenates in each module."""

    MODULE = ConcatModule


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


# ------------------------------------------------------------------------------- attentions of others in one dimension


class LinearSE(nn.Module):
    """An SE with linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Sequential(
            *(nn.Linear(channels, channels // 4, bias=False), nn.ReLU()),
            *(nn.Linear(channels // 4, channels, bias=False), nn.Sigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _ = x.size()
        gate = self.fc(self.pool(x).view(batch, channels)).view(batch, channels, 1)
        return x * gate.expand_as(x)


class PointwiseSE(nn.Module):
    """An SE with convolutions of one position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv1d(channels, channels // 4, 1), nn.Conv1d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(2, keepdim=True)))))


class TurnedECA(nn.Module):
    """ECA: a convolution over the channels, turned to be positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool1d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(self.pool(x).transpose(-1, -2)).transpose(-1, -2)
        return x * torch.sigmoid(gate)


class ViewedECA(nn.Module):
    """ECA with views."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean(2).view(x.shape[0], 1, -1)).view(x.shape[0], -1, 1)
        return x * torch.sigmoid(gate)


class OverPositions(nn.Module):
    """A gate a position, which is no SE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(pooled))


class Both(nn.Module):
    """CBAM: a gate a channel, then a gate a position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.positions = PointwiseSE(channels), OverPositions(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(self.channels(x))


class AttendedBlock(nn.Module):
    def __init__(self, inputs: int, width: int, attention: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(inputs, width, 3, padding=1), nn.BatchNorm1d(width)
        self.conv2, self.bn2 = nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)
        self.att = attention(width)
        self.shortcut = nn.Conv1d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.att(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(y + self.shortcut(x))


class Attended(nn.Module):
    """Two residual blocks with an attention at the end of their branches."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 7, 2, 3)
        self.blocks = nn.Sequential(AttendedBlock(16, 16, attention), nn.MaxPool1d(2), AttendedBlock(16, 32, attention))
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean(2))


# --------------------------------------------------------------------------------------------------- what looks alike


class TNet(nn.Module):
    """PointNet's: a matrix for each cloud of points, made of all its points."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv1, self.bn1 = nn.Conv1d(size, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, size * size)
        self.register_buffer("eye", torch.eye(size).flatten())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 32)
        return (self.fc2(F.relu(self.fc1(x))) + self.eye).view(-1, self.size, self.size)


class PointNet(nn.Module):
    """A T-net, two convolutions of points, their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.tnet = TNet(3)
        self.conv1, self.bn1, self.act1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU()
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.bmm(x.transpose(2, 1), self.tnet(x)).transpose(2, 1)
        x = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.fc(torch.max(x, 2)[0])


class Transformer1d(nn.Module):
    """Patches of a signal as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, 32, 16, 16)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embed(x).transpose(1, 2)).mean(1))


class FunctionalBlock1d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(0.1 * torch.randn(width, width, 3))
        self.second = nn.Parameter(0.1 * torch.randn(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv1d(F.relu(F.conv1d(x, self.first, padding=1)), self.second, padding=1)


class Functional1d(nn.Module):
    """Two residual blocks without a module that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FunctionalBlock1d(8), FunctionalBlock1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean(2)


class Spectral(nn.Module):
    """Filters of one dimension, and a CNN on what they make as an image."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 16, 64, 8, 32)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(torch.relu(self.filters(x)).unsqueeze(1)).mean((2, 3)))


class Square(nn.Module):
    """A block with channels last on as many positions as channels, and a Linear that fixes their number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(4, 16, 3, padding=1)
        self.block = ConvNeXtBlock1d(16)
        self.fc = nn.Linear(16 * 16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.embed(x)).flatten(1))


# ------------------------------------------------------------------------------------------------------- more of units


class CroppedBlock(nn.Module):
    """A causal block that crops in its own forward."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.Conv1d(width, width, 3, padding=self.pad, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 3, padding=self.pad, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, : -self.pad])
        y = self.conv2(y)[:, :, : -self.pad]
        return x + y


class Cropped(nn.Module):
    """Three causal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 1)
        self.blocks = nn.Sequential(*(CroppedBlock(8, 2**i) for i in range(3)))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x))[:, :, -1])


class ValidGated(nn.Module):
    """WaveNet's block without padding."""

    def __init__(self, width: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(width, width, 2, dilation=dilation)
        self.gate = nn.Conv1d(width, width, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))
        return self.residual(z) + x[:, :, -z.size(2) :], self.skip(z)


class ValidWaveNet(nn.Module):
    """Three blocks; each skip is cropped to the length of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.blocks = nn.ModuleList(ValidGated(8, 12, 2**i) for i in range(3))
        self.end = nn.Conv1d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total = None
        for block in self.blocks:
            x, skip = block(x)
            total = skip if total is None else total[:, :, -skip.size(2) :] + skip
        return self.end(F.relu(total))


class Hierarchical(nn.Module):
    """Res2Net's convolutions as a module of their own, as speaker recognition (ECAPA-TDNN) has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        part = width // 4
        self.convs = nn.ModuleList(nn.Conv1d(part, part, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(part) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(x, 4, 1)
        done: list[Tensor] = []
        for i in range(3):
            part = parts[0] if i == 0 else done[-1] + parts[i]
            done.append(self.norms[i](F.relu(self.convs[i](part))))
        return torch.cat([*done, parts[3]], 1)


class SpeakerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)
        self.inner = Hierarchical(width)
        self.conv2, self.bn2 = nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.bn1(F.relu(self.conv1(x))))
        return x + self.bn2(F.relu(self.conv2(y)))


class Speaker(nn.Module):
    """Three blocks, all of them aggregated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(20, 32, 5, padding=2)
        self.blocks = nn.ModuleList(SpeakerBlock(32) for _ in range(3))
        self.mix = nn.Conv1d(96, 48, 1)
        self.fc = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        outs = []
        for block in self.blocks:
            x = block(x)
            outs.append(x)
        return self.fc(F.relu(self.mix(torch.cat(outs, 1))).mean(2))


class ReparameterisedBlock(nn.Module):
    """RepVGG's three branches, the identity last."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv1d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm1d(width))
        self.narrow = nn.Sequential(nn.Conv1d(inputs, width, 1, stride, bias=False), nn.BatchNorm1d(width))
        self.identity = nn.BatchNorm1d(inputs) if inputs == width and stride == 1 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.narrow(x)
        return self.act(y if self.identity is None else y + self.identity(x))


class RepVGG1d(nn.Module):
    """Four blocks of sums that are re-parameterised as one convolution each."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1)]
        self.blocks = nn.Sequential(*(ReparameterisedBlock(*width) for width in widths))
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean(-1))


class Snake(nn.Module):
    """A periodic activation with a frequency per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)


class CodecUnit(nn.Module):
    """A residual unit of an audio codec."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(Snake(width), nn.Conv1d(width, width, 7, dilation=dilation, padding=3 * dilation)),
            *(Snake(width), nn.Conv1d(width, width, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        pad = (x.shape[-1] - y.shape[-1]) // 2
        if pad > 0:
            x = x[..., pad:-pad]
        return x + y


class Codec(nn.Module):
    """The encoder of an audio codec: three units, strided between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 7, padding=3)
        self.units = nn.Sequential(
            *(CodecUnit(8, 1), CodecUnit(8, 3), Snake(8), nn.Conv1d(8, 16, 4, 2, 1)),
            *(CodecUnit(16, 1), Snake(16), nn.Conv1d(16, 12, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x))


class ConformerBlock(nn.Module):
    """Half a feed-forward layer, an attention, and a convolution module, on (B, L, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width))
        self.norm1, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2, self.wide = nn.LayerNorm(width), nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.bn, self.out = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ff(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        y = F.glu(self.wide(self.norm2(x).transpose(1, 2)), dim=1)
        y = self.out(F.silu(self.bn(self.depthwise(y))))
        return x + y.transpose(1, 2)


class Conformer(nn.Module):
    """Two blocks; of their three additions each the last one is a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(20, 32, 3, 2, 1)
        self.blocks = nn.Sequential(ConformerBlock(32), ConformerBlock(32))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x)).transpose(1, 2)))


class TurnedBlock(nn.Module):
    """A ConvNeXt block that turns its map by an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv1d(width, width, 5, padding=2, groups=width), nn.LayerNorm(width)
        self.wide, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(F.gelu(self.wide(self.norm(self.dwconv(x).mT))))
        return x + y.mT


class Turned(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(4, 16, 4, 4)
        self.blocks = nn.Sequential(TurnedBlock(16), TurnedBlock(16))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.embed(x)).mean(2))
