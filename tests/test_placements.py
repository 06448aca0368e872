"""Where each SE sits, by values: gates at one half must do what halving the right value by hand does.

Halving is exact, so outputs are compared bit by bit. In real networks hooks halve what the modules that the table names
return (`out`) or take (`in`); toys are compared with their forward written out by hand.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from patients import assert_differs, assert_same, build, copied, images, is_native_se, pass_through, run
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import OptionError, PlacementError, SqueezeExcite, add_se, apply_recipe, plan_se, recipe_of


def half_open(model: nn.Module) -> int:
    """Set all gates to one half, and say how many there are."""
    found = [module for module in model.modules() if isinstance(module, SqueezeExcite)]
    for se in found:
        se.gate_scale = 1.0
    return len(found)


def halve(model: nn.Module, pattern: str, side: str) -> int:
    """Halve what the modules with names like `pattern` take or return, and say how many those are."""
    matched = [module for path, module in model.named_modules() if re.fullmatch(pattern, path)]
    for module in matched:
        if side == "in":
            module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        else:
            module.register_forward_hook(lambda module, args, out: out * 0.5)
    return len(matched)


# By network and placement: (names, side) of the modules whose value the SEs gate.
BASIC = {
    "standard": (r"layer\d\.\d+\.bn2", "out"),
    "inner": (r"layer\d\.\d+\.bn2", "out"),  # no activation comes between the second 3x3 convolution and the addition
    "post": (r"layer\d\.\d+\.act2", "out"),
    "pre": (r"layer\d\.\d+\.conv1", "in"),
}
BOTTLENECK = {
    "standard": (r"layer\d\.\d+\.bn3", "out"),
    "inner": (r"layer\d\.\d+\.act2", "out"),
    "post": (r"layer\d\.\d+\.act3", "out"),
    "pre": (r"layer\d\.\d+\.conv1", "in"),
}
# The first group's block is depthwise-separable: its depthwise convolution is conv_dw, bn1, its last one conv_pw, bn2.
INVERTED = {
    "standard": (r"blocks\.0\.0\.bn2|blocks\.[1-9]\.\d\.bn3", "out"),
    "inner": (r"blocks\.0\.0\.bn1|blocks\.[1-9]\.\d\.bn2", "out"),
    "post": (r"blocks\.\d\.\d", "out"),
    "pre": (r"blocks\.0\.0\.conv_dw|blocks\.[1-9]\.\d\.conv_pw", "in"),
}
WHERE: dict[str, dict[str, tuple[str, str]]] = {
    "resnet18": BASIC,
    "resnet50": BOTTLENECK,
    "resnext50_32x4d": BOTTLENECK,
    "resnetv2_50": {
        "standard": (r"stages\.\d\.blocks\.\d\.conv3", "out"),
        "inner": (r"stages\.\d\.blocks\.\d\.norm3", "out"),
        "post": (r"stages\.\d\.blocks\.\d", "out"),
        # norm1 is the branch's first layer, but in the first blocks, where the shortcut takes its value as well.
        "pre": (r"stages\.\d\.blocks\.0\.conv1|stages\.\d\.blocks\.[1-9]\.norm1", "in"),
    },
    "res2net50_26w_4s": {**BOTTLENECK, "inner": (r"layer\d\.\d+\.conv3", "in"), "post": (r"layer\d\.\d+", "out")},
    "nf_resnet50": {"standard": (r"stages\.\d\.\d\.conv3", "out"), "post": (r"stages\.\d\.\d", "out")},
    "cspresnet50": {
        "standard": (r"stages\.\d\.blocks\.\d\.conv3", "out"),
        "inner": (r"stages\.\d\.blocks\.\d\.conv2", "out"),
        "post": (r"stages\.\d\.blocks\.\d", "out"),
        "pre": (r"stages\.\d\.blocks\.\d\.conv1", "in"),
    },
    "hrnet_w18_small": {
        "standard": (r"(layer1|incre_modules\.\d)\.0\.bn3|stage\d\.0\.branches\.\d\.\d\.bn2", "out"),
        "pre": (r"(layer1\.0|incre_modules\.\d\.0|stage\d\.0\.branches\.\d\.\d)\.conv1", "in"),
    },
    "vgg16_bn": {"standard": (r"features\.(2|5|9|12|16|19|22|26|29|32|36|39|42)", "out")},
    "inception_v3": {"standard": (r"Mixed_\w+", "out"), "inception": (r"Mixed_\w+", "out")},
    "inception_v4": {
        # Mixed_3a and Mixed_5a (features 3 and 5) join a convolution with a pooled map.
        "standard": (r"features\.(4|[6-9]|1\d|2[01])|features\.[35]\.conv", "out"),
        "inception": (r"features\.(4|[6-9]|1\d|2[01])", "out"),
    },
    "inception_resnet_v2": {
        "standard": (r"mixed_\d\w|(repeat(_\d)?\.\d+|block8)\.conv2d", "out"),
        "post": (r"repeat(_\d)?\.\d+|block8", "out"),
        "inception": (r"mixed_\d\w", "out"),
    },
    "mobilenetv1_100": {
        "standard": (r"blocks\.\d\.\d\.bn2", "out"),
        "inner": (r"blocks\.\d\.\d\.bn1", "out"),
        "post": (r"blocks\.\d\.\d\.bn2", "out"),
        "pre": (r"blocks\.\d\.\d\.conv_dw", "in"),
    },
    "mobilenetv2_100": INVERTED,
    "efficientnet_b0": INVERTED,
    "regnetx_008": {
        "standard": (r"s\d\.b\d\.conv3", "out"),
        "inner": (r"s\d\.b\d\.conv2", "out"),
        "post": (r"s\d\.b\d\.act3", "out"),
        "pre": (r"s\d\.b\d\.conv1", "in"),
    },
    "repvit_m0_9": {
        "standard": (
            r"(stages\.\d\.(blocks\.(\d*[13579])|downsample\.pre_block))\.channel_mixer|.*downsample\.ffn",
            "out",
        ),
        "pre": (r"(stages\.\d\.(blocks\.(\d*[13579])|downsample\.pre_block))\.channel_mixer|.*downsample\.ffn", "in"),
        "post": (r"stages\.\d\.(blocks\.(\d*[13579])|downsample\.pre_block)|stages\.[123]\.downsample", "out"),
    },
    "densenet121": {
        "standard": (r"features\.denseblock\d\.denselayer\d+\.conv2", "out"),
        "inner": (r"features\.denseblock\d\.denselayer\d+\.conv2", "out"),
        "pre": (r"features\.denseblock\d\.denselayer\d+\.norm1", "in"),
    },
    "dpn68": {
        "standard": (r"features\.conv\d_\d+\.c1x1_c", "out"),
        "inner": (r"features\.conv\d_\d+\.c3x3_b", "out"),  # its norm and activation belong to the next convolution
    },
    "convnext_atto": {
        "standard": (r"stages\.\d\.blocks\.\d\.mlp", "out"),  # before the layer scale
        "inner": (r"stages\.\d\.blocks\.\d\.norm", "out"),
        "post": (r"stages\.\d\.blocks\.\d", "out"),
        "pre": (r"stages\.\d\.blocks\.\d\.conv_dw", "in"),
    },
    "xception41p": {
        "standard": (r"blocks\.\d+\.stack", "out"),
        "post": (r"blocks\.\d+", "out"),
    },
    "rexnet_100": {
        "standard": (r"features\.[012]\.conv_pwl", "out"),
        "inner": (r"features\.[012]\.act_dw", "out"),
        "post": (r"features\.[012]", "out"),
        "pre": (r"features\.0\.conv_dw|features\.[12]\.conv_exp", "in"),
    },
    "mixnet_s": {
        # Convolutions of several kernel sizes, each for some of the channels, are one layer.
        "inner": (r"blocks\.0\.0\.bn1|blocks\.1\.\d\.bn2", "out"),
    },
    "inception_next_atto": {"inner": (r"stages\.\d\.blocks\.\d\.norm", "out")},
    "skresnet50": {"inner": (r"layer\d\.\d+\.conv2", "out")},
    # The chain's last convolution, before all of the chain and its input are concatenated.
    "vovnet39a": {"inner": (r"stages\.\d\.blocks\.\d\.conv_mid\.4", "out")},
    "hgnet_tiny": {"inner": (r"stages\.\d\.blocks\.\d\.layers\.4", "out")},
    "ghostnet_100": {
        "inner": (r"blocks\.([0125]\.0|6\.[012]|8\.[02])\.ghost2", "out"),
        "standard": (r"blocks\.([0125]\.0|6\.[012]|8\.[02])\.ghost2", "out"),
        "post": (r"blocks\.([0125]\.0|6\.[012]|8\.[02])", "out"),
        "pre": (r"blocks\.([0125]\.0|6\.[012]|8\.[02])\.ghost1", "in"),
    },
    "ese_vovnet39b": {
        "standard": (r"stages\.[23]\.blocks\.0\.conv_concat", "out"),
        "post": (r"stages\.[23]\.blocks\.0", "out"),
        "pre": (r"stages\.[23]\.blocks\.0", "in"),
    },
    "torchvision/resnet50": {
        "standard": (r"layer\d\.\d+\.bn3", "out"),
        "inner": (r"layer\d\.\d+\.conv3", "in"),
        "post": (r"layer\d\.\d+", "out"),
        "pre": (r"layer\d\.\d+\.conv1", "in"),
    },
    "torchvision/vgg16_bn": {"standard": (r"features\.(2|5|9|12|16|19|22|26|29|32|36|39|42)", "out")},
    "torchvision/googlenet": {"standard": (r"inception\d\w", "out"), "inception": (r"inception\d\w", "out")},
    "torchvision/inception_v3": {"standard": (r"Mixed_\w\w", "out"), "inception": (r"Mixed_\w\w", "out")},
    "torchvision/mobilenet_v2": {
        "standard": (r"features\.\d+\.conv", "out"),
        "inner": (r"features\.1\.conv\.0|features\.([2-9]|1[0-7])\.conv\.1", "out"),
        "post": (r"features\.([1-9]|1[0-7])", "out"),
        "pre": (r"features\.\d+\.conv", "in"),
    },
    "torchvision/efficientnet_b0": {
        "standard": (r"features\.\d\.\d\.block", "out"),
        "inner": (r"features\.1\.0\.block\.0|features\.[2-7]\.\d\.block\.1", "out"),
        "post": (r"features\.[1-7]\.\d", "out"),
        "pre": (r"features\.\d\.\d\.block", "in"),
    },
    "torchvision/densenet121": {
        "standard": (r"features\.denseblock\d\.denselayer\d+\.conv2", "out"),
        "pre": (r"features\.denseblock\d\.denselayer\d+\.norm1", "in"),
    },
    "torchvision/shufflenet_v2_x1_0": {
        "standard": (r"stage\d\.\d\.branch2", "out"),
        "pre": (r"stage\d\.\d\.branch2", "in"),
        "post": (r"stage\d\.\d", "out"),
    },
    "torchvision/regnet_x_400mf": {
        "standard": (r"trunk_output\.block\d\.\S+\.f", "out"),
        "inner": (r"trunk_output\.block\d\.\S+\.f\.b", "out"),
        "post": (r"trunk_output\.block\d\.\S+\.activation", "out"),
        "pre": (r"trunk_output\.block\d\.\S+\.f", "in"),
    },
    "torchvision/convnext_tiny": {
        "standard": (r"features\.\d\.\d\.block", "out"),
        "post": (r"features\.[1357]\.\d", "out"),
        "pre": (r"features\.\d\.\d\.block", "in"),
    },
}
CASES = [(name, placement) for name, table in WHERE.items() for placement in table]
LARGER = ("inception_v3", "inception_v4", "inception_resnet_v2", "torchvision/inception_v3")
# VGG's head alone has 120 million parameters.
NARROW = {"vgg16_bn": {"mlp_ratio": 1 / 64}}
EXISTING = {"efficientnet_b0": "replace", "torchvision/efficientnet_b0": "replace", "hgnet_tiny": "stack"}


# By default the standard placement of each network and every third of the others.
IN_TURN = [
    pytest.param(*case, marks=() if case[1] == "standard" or number % 3 == 0 else pytest.mark.sweep)
    for number, case in enumerate(CASES)
]


@pytest.mark.parametrize(("name", "placement"), IN_TURN)
def test_where_it_sits(name, placement):
    base = build(name, **NARROW.get(name, {}))
    x = images((3, 96, 96) if name in LARGER else (3, 64, 64))
    plain = run(base, x)
    model = add_se(copied(base), placement, existing=EXISTING.get(name, "skip"))
    if EXISTING.get(name) == "replace":
        pass_through(base, is_native_se)
    assert half_open(model) == halve(base, *WHERE[name][placement])
    expected = run(base, x)
    assert_differs(expected, plain)
    assert_same(run(model, x), expected)


@pytest.mark.parametrize("name", ["resnet50", "torchvision/resnet50"])
def test_identity_sits_on_the_shortcut(name):
    """In the blocks that project their shortcut, where there is a module to halve."""
    base = build(name)
    model = add_se(copied(base), "identity", where="*.0")
    assert half_open(model) == halve(base, r"layer\d\.0\.downsample", "out") == 4
    assert_same(run(model, images()), run(base, images()))


# ---------------------------------------------------------------------------------- toys, their forward written by hand


Gates = Callable[[str, Tensor], Tensor]


def basic(block: Any, x: Tensor, gate: Gates) -> Tensor:
    y = gate("pre", x)
    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(y)))))
    y = gate("standard", gate("inner", y))
    shortcut = gate("identity", x if block.project is None else block.project(x))
    return gate("post", F.relu(y + shortcut))


def digits(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    for block in net.layers:
        x = basic(block, x, gate)
    return net.fc(x.flatten(1))


def root_adds(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = F.relu(net.bn0(net.conv0(x)))
    y = F.relu(net.bn1(net.conv1(gate("pre", x))))
    y = gate("standard", gate("inner", net.bn2(net.conv2(y))))
    x = gate("post", F.relu(gate("identity", x) + y))
    return net.fc(x.mean((2, 3)))


def functional(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:
        y = F.relu(block.bn1(block.conv1(gate("pre", x))))
        y = gate("standard", gate("inner", block.bn2(block.conv2(y))))
        x = gate("post", F.relu(y + gate("identity", x)))
    return net.head(x.mean((2, 3)))


def plain(net: Any, x: Tensor, gate: Gates) -> Tensor:
    for layer in net:
        x = layer(x)
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
            x = gate("standard", x)
    return x


def pre_activation(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:
        x = F.relu(x)  # in place in the block, so the shortcut has it too
        y = F.relu(block.bn1(block.conv1(gate("pre", x))))
        y = gate("standard", gate("inner", block.conv2(y)))
        x = gate("post", y + gate("identity", x))
    return net.head(x.mean((2, 3)))


def oddly_called(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    for block, scale in zip(net.blocks, (1.0, 0.5, 2.0), strict=True):
        y = F.relu(block.bn1(block.conv1(gate("pre", x))))
        y = gate("standard", gate("inner", block.bn2(block.conv2(y))))
        x = gate("post", F.relu(gate("identity", x) + y * scale))
    return net.fc(x.mean((2, 3)))


def two_units(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:
        y = F.relu(block.bn1(block.conv1(gate("pre", x))))
        y = gate("standard", gate("inner", block.bn2(block.conv2(y))))
        x = gate("post", gate("identity", x) + y)
        y = F.gelu(block.bn3(block.conv3(gate("pre", x))))
        y = gate("standard", gate("inner", block.conv4(y)))
        x = gate("post", gate("identity", x) + y)
    return net.head(x.mean((2, 3)))


def channels_last(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x).permute(0, 2, 3, 1)
    for block in net.blocks:
        y = block.conv(gate("pre", x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = gate("inner", block.norm(y))
        y = gate("standard", block.fc2(F.gelu(block.fc1(y))))
        x = gate("post", gate("identity", x) + block.gamma * y)
    return net.fc(x.mean((1, 2)))


def planes(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    (block,) = net.blocks
    y = F.relu(block.bn1(block.conv1(gate("pre", x))))
    y = gate("inner", F.relu(block.bn2(block.conv2(y))))
    y = gate("standard", block.bn3(block.conv3(y)))
    x = gate("post", F.relu(y + gate("identity", block.shortcut(x))))
    return net.head(x.mean((2, 3)))


def own_slot(net: Any, x: Tensor, gate: Gates) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:
        y = gate("inner", F.silu(block.bn1(block.conv1(gate("pre", x)))))
        y = gate("standard", block.bn2(block.conv2(y)))
        x = gate("post", y + gate("identity", x))
    return net.head(x.mean((2, 3)))


def write_ups(net: Any, x: Tensor, gate: Gates) -> Tensor:
    """With the write-ups' own SEs replaced."""
    x = net.stem(x)
    for block in net.blocks:
        y = F.relu(block.bn1(block.conv1(gate("pre", x))))
        y = gate("standard", gate("inner", block.bn2(block.conv2(y))))
        x = gate("post", F.relu(gate("identity", x) + y))
    return net.head(x.mean((2, 3)))


BY_HAND: dict[type[nn.Module], Callable[[Any, Tensor, Gates], Tensor]] = {
    toys.Digits: digits,
    toys.RootAdds: root_adds,
    toys.Functional: functional,
    toys.PlainSequential: plain,
    toys.PreActivation: pre_activation,
    toys.OddlyCalled: oddly_called,
    toys.FunctionalDropout: functional,
    toys.FunctionalDropPath: functional,
    toys.TwoUnits: two_units,
    toys.NHWC: channels_last,
    toys.Planes: planes,
    toys.OwnSlot: own_slot,
    toys.WriteUps: write_ups,
}
TOY_CASES = [(toy, placement) for toy in BY_HAND for placement, count in toy.PLACES.items() if count]


@pytest.mark.parametrize(("toy", "placement"), TOY_CASES, ids=lambda value: getattr(value, "__name__", value))
def test_where_it_sits_in_a_toy(toy, placement):
    base = build(f"toy/{toy.__name__}")
    x = images(toy.SIZE)
    model = add_se(copied(base), placement, existing="replace")
    assert half_open(model) == toy.PLACES[placement]
    asked: list[str] = []

    def gate(here: str, value: Tensor) -> Tensor:
        asked.append(here)
        return value * 0.5 if here == placement else value

    with torch.no_grad():
        expected = [BY_HAND[toy](base, x.clone(), gate)]
    assert asked.count(placement) == toy.PLACES[placement]
    assert_same(run(model, x), expected)


@pytest.mark.parametrize("placement", toys.Planes.CHANNELS)
def test_channels_come_from_the_tensor(placement):
    """And not from the constructor's `planes`, which is 4."""
    (site,) = plan_se(build("toy/Planes"), placement, r=2).sites
    assert (site.channels, site.rd_channels) == (toys.Planes.CHANNELS[placement], toys.Planes.CHANNELS[placement] // 2)


@pytest.mark.parametrize(
    ("width", "example"),
    [(12, None), (12, (3, 32, 48)), (32, None), (32, (3, 32, 32)), (28, (3, 28, 56)), (224, None)],
    ids=str,
)
def test_the_channel_axis_of_channels_last_blocks(width, example):
    """Also on maps that are not square, and with as many channels as there are positions on a side."""
    plan = plan_se(build("toy/NHWC", width=width), example_input=example)
    assert [(site.spec.channels_last, site.channels) for site in plan.sites] == [(True, width)] * 2


@pytest.mark.parametrize("example", [(3, 64, 96), (3, 96, 64), (3, 56, 56), (3, 33, 47)], ids=str)
def test_the_channel_axis_of_channels_first_blocks(example):
    """ResNet's stages have 64 to 512 channels, on maps of a quarter of the image and less."""
    plan = plan_se(build("resnet18"), example_input=example)
    assert [site.channels for site in plan.sites] == [64, 64, 128, 128, 256, 256, 512, 512]


class BareWeights(nn.Module):
    """A residual block without children: its convolutions and all else are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1, self.weight2 = (nn.Parameter(torch.randn(8, 8, k, k)) for k in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(F.group_norm(F.conv2d(x, self.weight1, padding=1), 2))
        return x + F.conv2d(y, self.weight2)


def test_inner_of_a_block_without_children():
    base = toys.Trunk(BareWeights(), BareWeights()).eval()
    model, x = add_se(copied(base), "inner"), images((3, 32, 32))
    assert half_open(model) == 2
    for block in base.blocks:
        block.weight2.data *= 0.5  # halves what comes in, as well
    assert_same(run(model, x), run(base, x))


class BareAlike(nn.Module):
    """Convolutions without modules whose maps are all of one shape: k = 1, 3 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1, self.weight2, self.weight3 = (nn.Parameter(torch.randn(8, 8, k, k) / 8) for k in (1, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(F.conv2d(x, self.weight1))
        y = F.gelu(F.conv2d(y, self.weight2, padding=1))
        return x + F.conv2d(y, self.weight3)


def test_inner_tells_convolutions_without_modules_apart():
    base = toys.Trunk(BareAlike(), BareAlike()).eval()
    model, x = add_se(copied(base), "inner"), images((3, 32, 32))
    assert half_open(model) == 2
    for block in base.blocks:
        block.weight3.data *= 0.5
    assert_same(run(model, x), run(base, x))


class BareSeparable(nn.Module):
    """A depthwise and a pointwise convolution, both without modules; with `adds` they are a residual branch."""

    def __init__(self, adds: bool = False) -> None:
        super().__init__()
        self.adds = adds
        self.depthwise, self.pointwise = nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.depthwise, padding=1, groups=8))
        y = F.conv2d(y, self.pointwise)
        return x + y if self.adds else F.relu(y)


class BareRoot(toys.Trunk):
    """The same in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.depthwise, padding=1, groups=8)
        return self.head(F.relu(F.conv2d(x, self.pointwise)).mean((2, 3)))


SEPARABLE = {
    "blocks": (lambda: toys.Trunk(BareSeparable(), BareSeparable()), ["blocks.0", "blocks.1"]),
    "residual": (lambda: toys.Trunk(BareSeparable(True), BareSeparable(True)), ["blocks.0", "blocks.1"]),
    "root": (BareRoot, [""]),
}


@pytest.mark.parametrize("case", SEPARABLE.values(), ids=SEPARABLE)
def test_depthwise_separable_convolutions_without_modules(case):
    """The pointwise one is halved, or what makes its map."""
    make, units = case
    base = make().eval()
    model, x = add_se(copied(base)), images((3, 32, 32))
    assert [site.unit for site in plan_se(base).sites] == units
    assert half_open(model) == len(units)
    for path in units:
        base.get_submodule(path).pointwise.data *= 0.5
    assert_same(run(model, x), run(base, x))


class BiasedShortcut(toys.Basic):
    """The shortcut goes through an addition of its own, behind which the branch does not look."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.offset, self.halved = nn.Parameter(torch.randn(1, 8, 1, 1)), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return y + ((x * 0.5 if self.halved else x) + self.offset)


def test_identity_of_a_shortcut_with_an_addition_of_its_own():
    base = toys.Trunk(BiasedShortcut(), BiasedShortcut()).eval()
    model, x = add_se(copied(base), "identity"), images((3, 32, 32))
    assert half_open(model) == 2
    for block in base.blocks:
        block.halved = True
    assert_same(run(model, x), run(base, x))


class Plain(nn.Module):
    """Convolutions in a method that timm's models call `forward_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = toys.conv(3, 8), toys.conv(8, 8), nn.Linear(8, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


class CallsSuper(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class CallsAnother(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)

    def scores(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


class CallsNothing(Plain):
    """Its forward does it all by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class TakesMore(Plain):
    def forward(self, x: Tensor, twice: bool) -> Tensor:
        return super().forward(x) * (2 if twice else 1)


WAYS_IN = {
    Plain: "forward_features",
    CallsSuper: "forward_features",
    CallsAnother: "forward_features",
    CallsNothing: "forward",
    TakesMore: "forward",
}


@pytest.mark.parametrize("network", WAYS_IN, ids=lambda network: network.__name__)
def test_the_method_that_is_operated_on_is_one_that_the_forward_calls(network):
    base, x = network().eval(), images((3, 32, 32))
    given = (x, True) if network is TakesMore else (x,)
    model = add_se(copied(base), example_input=given)
    sites = plan_se(base, example_input=given).sites
    assert [edge.method for site in sites for edge in site.edges] == [WAYS_IN[network]] * 2
    assert half_open(model) == 2
    for module in (base.conv1, base.conv2):
        module.weight.data *= 0.5
    with torch.no_grad():
        assert_same([model(*given)], [base(*given)])


class ConvNormAct(nn.Module):
    def __init__(self, inputs: int, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = toys.conv(inputs, 8), nn.BatchNorm2d(8), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def plain_blocks() -> nn.Module:
    return nn.Sequential(*(ConvNormAct(inputs, nn.ReLU()) for inputs in (3, 8, 8)))


@pytest.mark.parametrize("make", [lambda: build("torchvision/resnet18"), plain_blocks], ids=["resnet18", "plain"])
def test_one_activation_for_all_blocks_is_as_good_as_one_for_each(make):
    """What a module does counts where it is called, under whichever of its paths."""
    apart, one, relu = make(), make(), nn.ReLU(inplace=True)
    for block in one.modules():
        for name in {"relu", "act"} & block._modules.keys():
            setattr(block, name, relu)
    for placement, count in plan_se(apart).places.items():
        if count:
            sites = [[(s.path, s.kind, s.channels) for s in plan_se(model, placement).sites] for model in (apart, one)]
            assert sites[0] == sites[1] and len(sites[0]) == count
    one.eval()
    before = run(one, images())
    add_se(one)
    assert_same(run(one, images()), before)


def test_pre_is_refused_where_the_fork_changes_in_place_for_some_readers():
    with pytest.raises(PlacementError, match="in place"):
        add_se(build("toy/ForkedInPlace"), "pre")


# ----------------------------------------------------------------------------------------------------- stages and names


STAGES = {
    "resnet50": [3, 4, 6, 3],
    "mobilenetv2_100": [1, 2, 3, 4 + 3, 3 + 1],
    "regnetx_008": [1, 3, 7, 5],
    "densenet121": [6, 12, 24, 16],
    "convnext_atto": [2, 2, 6, 2],
    "hrnet_w18_small": [1, 4, 6, 8 + 4],
    "vgg16_bn": [2, 2, 3, 3, 3],
    "torchvision/resnet50": [3, 4, 6, 3],
    "torchvision/vgg16_bn": [2, 2, 3, 3, 3],
    "torchvision/googlenet": [2, 5, 2],
    "torchvision/shufflenet_v2_x1_0": [4, 8, 4],
    "torchvision/mobilenet_v2": [1, 2, 3, 4 + 3, 3 + 1],
    "torchvision/convnext_tiny": [3, 3, 9, 3],
    "torchvision/densenet121": [6, 12, 24, 16],
    "toy/PlainSequential": [1, 1, 1],
    "toy/Functional": [2],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages(name):
    """Units in each stage; a plain net's stages lie between poolings."""
    plan = plan_se(build(name))
    stages = [site.stage for site in plan.sites]
    assert [stages.count(stage) for stage in range(1, plan.stages + 1)] == STAGES[name]
    assert stages == sorted(stages)


@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_merges_no_stages(stride):
    plan = plan_se(build("resnet50", output_stride=stride))
    assert [site.stage for site in plan.sites] == [1] * 3 + [2] * 4 + [3] * 6 + [4] * 3


def test_stages_from_the_end():
    model = build("resnet50")
    assert {site.unit for site in plan_se(model, stages=-1).sites} == {f"layer4.{i}" for i in range(3)}
    assert {site.stage for site in plan_se(model, stages=[-2, 1]).sites} == {1, 3}


WHERES = {
    "a glob on the unit": ("layer4.*", 3),
    "a glob on the SE's path": ("*.0.se", 4),
    "a list of globs": (["layer1.0", "layer2.1"], 2),
    "a function": (lambda site: site.channels >= 1024 and site.unit.endswith("1"), 2),
}


@pytest.mark.parametrize("case", WHERES)
def test_where(case):
    where, count = WHERES[case]
    model = build("resnet50")
    plan = plan_se(model, where=where)
    assert len(plan.sites) == count
    assert len(plan.sites) + len(plan.skipped) == 16 + 1  # and the stem
    assert half_open(add_se(model, where=where)) == count


NAMES = {
    ("resnet18", "standard"): "layer1.0.se",  # the block has an attribute `se = None`, which is free
    ("toy/OwnSlot", "standard"): "blocks.0.se_standard",  # its own forward calls `se`
    ("toy/OwnSlot", "inner"): "blocks.0.se",  # that very slot
    ("regnetx_008", "standard"): "s1.b1.se_standard",
    ("regnetx_008", "inner"): "s1.b1.se",
    ("mobilenetv2_100", "standard"): "blocks.0.0.se_standard",
    ("mobilenetv2_100", "inner"): "blocks.0.0.se",
    ("toy/PlainSequential", "standard"): "2.se",  # on the activation
    ("toy/RootAdds", "standard"): "se",
    ("torchvision/mobilenet_v2", "standard"): "features.1.se",
    ("torchvision/vgg16_bn", "standard"): "features.2.se",
}


@pytest.mark.parametrize(("name", "placement"), NAMES)
def test_names(name, placement):
    assert plan_se(build(name), placement).sites[0].path == NAMES[name, placement]


class DefinesNone(toys.Basic):
    se = None


class DefinesProperty(toys.Basic):
    @property
    def se(self) -> None:
        return None


@pytest.mark.parametrize("block", [DefinesNone, DefinesProperty], ids=lambda cls: cls.__name__)
def test_a_name_that_the_blocks_class_defines_is_not_free(block):
    """The forward would find that, and not the child."""
    model = toys.Trunk(block(8, 8)).eval()
    before = run(model, images((3, 32, 32)))
    add_se(model)
    assert isinstance(model.blocks[0].se_standard, SqueezeExcite)
    assert_same(run(model, images((3, 32, 32))), before)


def test_a_name_of_ones_own():
    model = add_se(build("resnet18"), name="attention")
    assert isinstance(model.layer1[0].attention, SqueezeExcite)
    assert plan_se(build("toy/TwoUnits"), name="gate").sites[1].path == "blocks.0.gate_standard"


# ------------------------------------------------------------------------------------------------- widths by the site

QUARTERS = {
    "regnety_002": lambda site: round(0.25 * site.in_channels),
    "efficientnet_b0": lambda site: round(0.25 * site.in_channels),
    "semnasnet_100": lambda site: round(0.25 * site.in_channels),
}


def _quarter(site):
    return round(site.in_channels / 4)


@pytest.mark.parametrize("name", QUARTERS)
def test_widths_by_the_input_of_a_unit_are_those_that_timm_builds(name):
    """RegNetY's and MBConv's SEs squeeze to a quarter of what goes into their block."""
    plan = plan_se(build(name), rd_channels=QUARTERS[name], existing="replace", init="paper")
    native = {se.unit: se.rd_channels for se in plan.existing}
    assert {site.unit: site.rd_channels for site in plan.sites if site.replaces} == native and native


# Network, size, and by site: the input of the unit, and its channels.
INPUTS = {
    "resnet18": {"layer1.0.se": (64, 64), "layer2.0.se": (64, 128), "layer2.1.se": (128, 128)},
    "convnext_atto": {"stages.0.blocks.0.se": (40, 40), "stages.1.blocks.1.se": (80, 80)},
    "densenet121": {"features.denseblock1.denselayer2.se": (96, 32)},
    "mobilenetv2_035": {"blocks.0.0.se_standard": (16, 8), "blocks.2.0.se_standard": (8, 16)},
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_function_sees_the_input_of_a_unit(name):
    seen = {}

    def width(site):
        seen[site.path] = (site.in_channels, site.channels)
        return 4 + site.stage

    plan = plan_se(build(name), rd_channels=width)
    assert {path: seen[path] for path in INPUTS[name]} == INPUTS[name]
    assert [site.rd_channels for site in plan.sites] == [4 + site.stage for site in plan.sites]
    assert list(seen) == [site.path for site in plan.sites]


def test_widths_by_a_function_are_kept_in_recipes_plans_and_pickles():
    where = ["layer2.*", "layer4.0.*"]
    model = add_se(build("resnet18"), rd_channels=_quarter, where=where, init="paper")
    widths = {f"layer{path}.se": width for path, width in {"2.0": 16, "2.1": 32, "4.0": 64}.items()}
    assert {path: module.fc1.out_channels for path, module in implanted_in(model).items()} == widths
    recipe = json.loads(json.dumps(recipe_of(model)))
    assert recipe["operations"][0]["options"]["rd_channels"] == widths
    again = apply_recipe(build("resnet18"), recipe)
    assert {path: module.fc1.out_channels for path, module in implanted_in(again).items()} == widths
    plan = plan_se(build("resnet18"), rd_channels=lambda site: 7, where=where)
    kept = pickle.loads(pickle.dumps(plan))
    assert kept.options.rd_channels == dict.fromkeys(widths, 7)
    assert kept.to_json() == plan.to_json()


def implanted_in(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, SqueezeExcite)}


WRONG_WIDTHS = {
    "no number": (lambda site: None, "paper", r"rd_channels\['layer1.0.se'\]=None is not a whole number"),
    "half a unit": (lambda site: site.channels / 4, "paper", r"'layer1.0.se'\]=16.0 is not a whole number"),
    "none at all": (lambda site: 0, "paper", r"'layer1.0.se'\]=0 is not a whole number"),
    "one, from the identity": (lambda site: 1, "identity", r"'layer1.0.se'\]=1 .*init=\"paper\""),
    "a mapping with one": ({"layer1.0.se": 1}, "identity", r"'layer1.0.se'\]=1 .*init=\"paper\""),
    "a site without a width": ({"layer1.0.se": 4}, "paper", "no width for 'layer1.1.se'"),
    "no mapping of paths": ({1: 4}, "paper", "no mapping of sites"),
}


@pytest.mark.parametrize("case", WRONG_WIDTHS)
def test_widths_that_mean_nothing_are_refused(case):
    widths, init, message = WRONG_WIDTHS[case]
    with pytest.raises(OptionError, match=message):
        plan_se(build("resnet18"), rd_channels=widths, init=init)


def test_a_width_of_one_where_it_is_asked_for():
    model = add_se(build("resnet18"), rd_channels=lambda site: max(1, site.channels // 128), init="paper")
    assert [module.fc1.out_channels for module in implanted_in(model).values()] == [1, 1, 1, 1, 2, 2, 4, 4]
