"""What a forward asks of its tensors' shapes: computed when it runs, or asked again then, or the block is left out.

A network that was operated on puts out what it did before, bit for bit, at other sizes and in other batches; or it says
in words what it was made for.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
import torch
import toys
from patients import assert_same, copied, images, randomise, run
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import SurgeryError, add_se, plan_se

SIZE = (3, 16, 16)
# Image sizes, odd ones among them, each with a batch.
OTHERS = ((2, 3, 16, 16), (1, 3, 17, 23), (3, 3, 40, 9))


class Block(nn.Module):
    """A residual block that asks something of its maps in `through`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = toys.conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = toys.conv(8, 8), nn.BatchNorm2d(8)
        self.open = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        return x + self.bn2(self.conv2(self.through(y)))

    def through(self, y: Tensor) -> Any:
        return y


def padding(y: Tensor, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """As TensorFlow pads, in floating point."""
    height, width = y.size()[2:]
    down, right = math.ceil(float(height) / stride), ceil(float(width) / stride)
    more = max((down - 1) * stride + kernel - height, 0), max((right - 1) * stride + kernel - width, 0)
    return more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2


class OfPadding(Block):
    def through(self, y):
        return self.open(F.pad(y, padding(y, 3, 1)))


class OfParity(Block):
    """The padding is another one at odd sizes."""

    def through(self, y):
        return F.pad(y, padding(y, 2, 2))[:, :, : y.shape[2], : y.shape[3]] * sum(padding(y, 2, 2)[1::2])


class OfIntegers(Block):
    def through(self, y):
        gains = int(y.shape[2] / 2), round(y.shape[3] / 3), abs(-y.size(0))
        return F.interpolate(y, size=[int(size) for size in y.shape[-2:]]) * gains[0] + gains[1] / gains[2]


class OfDivmod(Block):
    def through(self, y):
        whole, rest = divmod(y.size(-1), 2)
        return F.pad(y, (0, rest))[..., : whole * 2 + rest] * whole


class OfRank(Block):
    def through(self, y):
        assert len(y.shape) == 4 and y.ndim == len(y.size()) == y.dim()
        return y.mean(dim=tuple(range(2, len(y.shape))), keepdim=True) + y


class OfChannels(Block):
    def through(self, y):
        if y.shape[1] == 8 and y.size(1) > 4:
            return y * 2
        return y


class OfNoOp(Block):
    def through(self, y):
        return torch.as_tensor(self.act(y)) + torch.as_tensor(data=y)


class OfChunk(Block):
    def through(self, y):
        parts = list(y.chunk(2, 1))
        parts.extend(self.act(parts[-1]) for _ in range(2))
        return torch.cat(tuple(parts[2:]), 1)


class OfSplit(Block):
    def through(self, y):
        first, *rest = y.split(2, 1)
        return torch.cat([part * (i + 1) for i, part in enumerate((*rest, first))], 1)


class OfUnbind(Block):
    def through(self, y):
        return torch.stack(tuple(part.sin() for part in y.unbind(1)), 1)


class OfKind(Block):
    def through(self, y):
        y = [y] if isinstance(y, torch.Tensor) and torch.is_tensor(y) else y
        return y[0] if type(y[0]) is Tensor and not isinstance(y[0], (list, tuple)) else y[1]


class OfNew(Block):
    def through(self, y):
        zeros = y.new_zeros(y.shape[0], y.size(1), 1, 1) + torch.zeros(y.shape[0], 8, 1, 1) + torch.ones(y.size())
        return y + zeros + torch.full((y.shape[0], 1, 1, 1), y.shape[2] / 8)


class OfSize(Block):
    def through(self, y):
        size = torch.Size([y.shape[0], y.shape[1], *y.shape[2:]])
        flat = y.reshape(*y.shape[:2], -1)
        assert size.numel() == y.numel()
        return flat.view(y.shape[:2] + size[2:]) + flat.reshape(tuple(s for s in size))


class OfTable(Block):
    """A dictionary is asked by a number of channels, and a list by a number of axes."""

    def through(self, y):
        return y * {8: 3, 16: 5}[y.shape[1]] * [1, 2, 3, 4, 5][y.dim()]


class OfAttributes(Block):
    def through(self, y):
        scale = 2.0 if hasattr(y, "sample") else getattr(y, "gain", 3.0)
        return y * scale if callable(y.mul) and hasattr(y, "shape") else y


class OfOwnMethod(Block):
    def through(self, y):
        return self.open(self.padded(y, stride=1))

    def padded(self, y: Tensor, stride: int) -> Tensor:
        height, width = (int(size) for size in y.shape[2:])
        down, right = (max((ceil(size / stride) - 1) * stride + 3 - size, 0) for size in (height, width))
        return F.pad(y, (right // 2, right - right // 2, down // 2, down - down // 2))


class OfLoop(Block):
    def through(self, y):
        for i in range(y.shape[1] // 4):
            y = y * (i + 1)
        return y


class OfArange(Block):
    def through(self, y):
        return y * torch.arange(y.shape[3]).view(1, 1, 1, -1) + torch.linspace(0, 1, y.size(2)).unsqueeze(-1)


FOLLOWED = (
    *(OfPadding, OfParity, OfIntegers, OfDivmod, OfRank, OfChannels, OfNoOp, OfChunk, OfSplit, OfUnbind, OfKind),
    *(OfNew, OfSize, OfTable, OfAttributes, OfOwnMethod, OfLoop, OfArange),
)


def net(cls: type[Block], blocks: int = 2) -> nn.Module:
    """A network of blocks of one class, all weights drawn."""
    torch.manual_seed(0)
    return randomise(nn.Sequential(toys.conv(3, 8), *(cls() for _ in range(blocks)))).eval()


def tensors(cls: type[Block]) -> list[Tensor]:
    """Images at the probing size and at others."""
    torch.manual_seed(1)
    return [torch.randn(shape) for shape in OTHERS]


@pytest.mark.parametrize("cls", FOLLOWED)
def test_outputs_are_the_same_at_other_sizes_and_in_other_batches(cls):
    base = net(cls)
    model = add_se(copied(base), example_input=SIZE)
    assert [site.path for site in plan_se(base, example_input=SIZE).sites] == ["1.se", "2.se"]
    for x in tensors(cls):
        for training in (False, True):
            assert_same(run(copied(model), x, training), run(copied(base), x, training))


@pytest.mark.parametrize("cls", [OfParity, OfIntegers, OfDivmod, OfNew, OfOwnMethod, OfArange])
def test_what_goes_by_the_size_is_computed_and_never_frozen(cls):
    source = inspect.getsource(type(add_se(net(cls), example_input=SIZE)[1]).forward)
    asked = re.findall(r"must_\w+\((\w+)", source)
    assert all(name.startswith("len") for name in asked), source


# -------------------------------------------------------------------------------------------------------- left out


class OfBranch(Block):
    def through(self, y):
        return y * 2 if y.shape[2] > 20 else y


class OfBatch(Block):
    def through(self, y):
        return y * 2 if y.size(0) > 2 else y


class OfOddness(Block):
    def through(self, y):
        return F.pad(y, (0, y.shape[3] % 2))[..., : y.shape[3]] if y.shape[3] % 2 else y


class OfImages(Block):
    def through(self, y):
        return torch.stack([one * 2 for one in y])


class OfRows(Block):
    def through(self, y):
        return torch.cat([y[:, :, i : i + 1] * 2 for i in range(y.shape[2])], 2)


class OfValues(Block):
    def through(self, y):
        return y * 2 if y.sum() > 0 else y


class OfItem(Block):
    def through(self, y):
        return y[:, :, : 1 + len(range(int(y.amax())))]


class OfDtype(Block):
    def through(self, y):
        return y * 2 if y.dtype == torch.float32 else y


class OfDevice(Block):
    def through(self, y):
        return y * 2 if y.is_cuda or y.device.type == "meta" else y


class OfLayout(Block):
    def through(self, y):
        return y * 2 if y.is_contiguous() else y


COUNT = [0]


class OfGlobal(Block):
    def through(self, y):
        global COUNT
        COUNT = [COUNT[0] + 1]
        return y


LEFT_OUT: dict[type[Block], str] = {
    OfBranch: r"goes by the size of the images or their number \(y?.*shape\[2\] > 20\)",
    OfBatch: r"goes by the size of the images or their number \(.*size\(0\) > 2\)",
    OfOddness: r"goes by the size of the images or their number",
    OfImages: r"goes by the size of the images or their number \(len\(",
    OfRows: r"goes by the size of the images or their number",
    OfValues: r"goes by .*sum\(\) > 0, which a graph of it would keep",
    OfItem: r"cannot be traced|goes by",
    OfDtype: r"goes by .*dtype == torch.float32, which a graph of it would keep",
    OfDevice: r"goes by .*is_cuda, which a graph of it would keep",
    OfLayout: r"goes by .*is_contiguous\(\), which a graph of it would keep",
    OfGlobal: r"writes to the global COUNT",
}


@pytest.mark.parametrize("cls", LEFT_OUT)
def test_what_a_graph_would_keep_is_left_out_with_the_reason(cls):
    plan = plan_se(net(cls), example_input=SIZE)
    assert not [site for site in plan.sites if site.host in ("1", "2")]
    reasons = [reject.reason for reject in plan.exam.units.rejected]
    assert any(re.search(LEFT_OUT[cls], reason) for reason in reasons), reasons


# --------------------------------------------------------------------------------------------------- asked at run time


class OfSides(Block):
    """The same at all sizes that a network of squares takes."""

    def through(self, y):
        return y * 2 if y.shape[2] == y.shape[3] else y


class OfStrictSize(nn.Module):
    """A network that takes one size alone, with a block that goes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = toys.conv(3, 8), OfBranch(), nn.Linear(8 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).flatten(1))


GUARDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "a size where only one is taken": (OfStrictSize, (2, 8, 24, 24), r"shape\[2\] > 20 is False.* is True"),
    "another number of channels": (lambda: net(OfChannels), (2, 4, 16, 16), "shape.1. == 8 is True"),
    "another number of parts": (lambda: net(OfChunk), (2, 1, 16, 16), "len.* is 2"),
}


@pytest.mark.parametrize("case", GUARDED)
def test_another_answer_is_an_error_in_words(case):
    make, shape, message = GUARDED[case]
    base = randomise(make()).eval()
    model = add_se(copied(base), example_input=SIZE)
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))
    block = model.block if hasattr(model, "block") else model[1]
    for name in ("conv", "bn", "conv2", "bn2"):
        setattr(block, name, nn.Identity())
    with pytest.raises(SurgeryError, match=rf"{message}.*example_input"):
        block(torch.zeros(shape))


def test_blocks_of_one_class_with_other_channels_are_traced_each_by_itself():
    class OfWidth(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.act, self.conv2 = toys.conv(width, width), nn.ReLU(), toys.conv(width, width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv2(self.act(self.conv(x)))
            return x + (y * 2 if y.shape[1] > 10 else y)

    torch.manual_seed(0)
    base = nn.Sequential(toys.conv(3, 8), OfWidth(8), toys.conv(8, 16), OfWidth(16)).eval()
    model = add_se(copied(base), example_input=SIZE)
    assert type(model[1]) is not type(model[3])
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))


@pytest.mark.parametrize("cls", [OfPadding, OfChunk, OfRank, OfChannels, OfNew])
@pytest.mark.parametrize("compiler", ["compile", "export"])
def test_compilers_take_what_asks_at_run_time(cls, compiler):
    base, x = net(cls), images(SIZE)
    model = add_se(copied(base), example_input=SIZE)
    if compiler == "compile":
        torch._dynamo.reset()
        made = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    else:
        made = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(made(x), base(x))


class Asks(nn.Module):
    """A block that asks every one of its maps for its shape, or none."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.conv, self.act, self.conv2 = toys.conv(8, 8), nn.ReLU(), toys.conv(8, 8)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.asked(self.conv2(self.asked(self.act(self.asked(self.conv(self.asked(x)))))))
        return self.asked(self.act(self.asked(self.asked(x) + y)))

    def asked(self, x: Tensor) -> Tensor:
        if self.asks:
            assert len(x.shape) == x.dim() == x.ndim == 4 and isinstance(x, Tensor)
        return x


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "inner"])
def test_who_asks_for_a_shape_takes_no_map(placement):
    """The SE sits where it would without the question, which on the same weights are the same outputs."""
    torch.manual_seed(0)
    bases = [nn.Sequential(toys.conv(3, 8), Asks(asks), Asks(asks)).eval() for asks in (False, True)]
    bases[1].load_state_dict(bases[0].state_dict())
    models = [add_se(base, placement, init="paper", example_input=SIZE) for base in bases]
    models[1].load_state_dict(models[0].state_dict())
    assert_same(run(models[1], images(SIZE)), run(models[0], images(SIZE)))


@pytest.mark.parametrize("cls", [OfChannels, OfSides, OfPadding])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_takes_what_asks_at_run_time_and_asks(cls):
    base, x = net(cls), images(SIZE)
    model = add_se(copied(base), example_input=SIZE) if cls is not OfSides else add_se(Square(base), example_input=SIZE)
    scripted, traced = torch.jit.script(model), torch.jit.trace(model, x)
    for made in (scripted, traced):
        assert_same(run(made, x), run(base, x))
    if cls is OfSides:
        with pytest.raises(SurgeryError, match=r"shape\[2\] == .*shape\[3\] is True.* is False"):
            model[0](torch.zeros(2, 3, 16, 24))


class Square(nn.Sequential):
    """A network that takes squares alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == x.shape[3]
        return self[0](x)
