"""find_se lists every SE of a model with what it is, whoever put it there, and takes nothing else for one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
import toys
from patients import build, images
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import Plan, SESite, add_se, find_se, plan_se
from se_surgery.reading.look import look

# A ResNet-18 of 0.25 million parameters.
NARROW = {"channels": (8, 16, 32, 64)}


@dataclass(frozen=True)
class Native:
    """One SE that a library's model is known to have, by its model's definition."""

    path: str
    unit: str
    stage: int
    channels: int
    rd_channels: int | None
    params: int


def two_layers(path: str, unit: str, stage: int, channels: int, width: int) -> Native:
    """An SE of two layers with biases."""
    return Native(path, unit, stage, channels, width, 2 * channels * width + width + channels)


def one_layer(path: str, unit: str, stage: int, channels: int, params: int) -> Native:
    """An attention without a hidden layer."""
    return Native(path, unit, stage, channels, None, params)


def resnet18(name: str, widths: tuple[int, ...]) -> list[Native]:
    """Two blocks in each of four layers of 64, 128, 256 and 512 channels."""
    blocks = [(i, f"layer{i}.{j}", 2 ** (5 + i)) for i in (1, 2, 3, 4) for j in (0, 1)]
    return [two_layers(f"{block}.{name}", block, i, c, widths[i - 1]) for i, block, c in blocks]


# Channels that go into the blocks of EfficientNet-B0, group by group. All but the first widen them sixfold; the SE's
# hidden width is a quarter of what goes in. By resolution, groups 3 and 4 are one stage, and so are 5 and 6.
B0_GROUPS = ((32,), (16, 24), (24, 40), (40, 80, 80), (80, 112, 112), (112, 192, 192, 192), (192,))
B0_STAGES = (1, 2, 3, 4, 4, 5, 5)


def efficientnet_b0(path: str, unit: str) -> list[Native]:
    blocks = [(i, j, c) for i, group in enumerate(B0_GROUPS) for j, c in enumerate(group)]
    return [
        two_layers(
            path.format(i=i, i1=i + 1, j=j, slot=1 if i == 0 else 2),
            unit.format(i=i, i1=i + 1, j=j),
            B0_STAGES[i],
            c if i == 0 else 6 * c,
            c // 4,
        )
        for i, j, c in blocks
    ]


# The blocks of MobileNetV3-small that have an SE: timm's path, torchvision's index, stage, channels, hidden width.
V3_SMALL = (
    *(("0.0", 1, 1, 16, 8), ("2.0", 4, 3, 96, 24), ("2.1", 5, 3, 240, 64), ("2.2", 6, 3, 240, 64)),
    *(("3.0", 7, 3, 120, 32), ("3.1", 8, 3, 144, 40)),
    *(("4.0", 9, 4, 288, 72), ("4.1", 10, 4, 576, 144), ("4.2", 11, 4, 576, 144)),
)
WITH_SE: dict[str, list[Native]] = {
    "seresnet18": resnet18("se", (8, 8, 16, 32)),
    "legacy_seresnet18": resnet18("se_module", (4, 8, 16, 32)),
    "efficientnet_b0": efficientnet_b0("blocks.{i}.{j}.se", "blocks.{i}.{j}"),
    "mobilenetv3_small_100": [
        two_layers(f"blocks.{block}.se", f"blocks.{block}", stage, c, width) for block, _, stage, c, width in V3_SMALL
    ],
    "torchvision/efficientnet_b0": efficientnet_b0("features.{i1}.{j}.block.{slot}", "features.{i1}.{j}"),
    "torchvision/mobilenet_v3_small": [
        two_layers(f"features.{i}.block.{1 if i == 1 else 2}", f"features.{i}", stage, c, width)
        for _, i, stage, c, width in V3_SMALL
    ],
    "ese_vovnet19b_slim": [
        one_layer(f"stages.{i}.blocks.0.attn", f"stages.{i}.blocks.0", i + 1, c, c * c + c)
        for i, c in enumerate((112, 256, 384, 512))
    ],
    # A one-dimensional convolution over channels, of 3 or 5 weights.
    "eca_resnext26ts": [
        one_layer(f"stages.{i}.{j}.attn", f"stages.{i}.{j}", i + 1, c, k)
        for i, (c, k) in enumerate(((64, 3), (128, 5), (256, 5), (512, 5)))
        for j in (0, 1)
    ],
    # 8 channels, r=4, in the write-ups' forms: without biases, with both, with both, with the second only.
    "toy/WriteUps": [
        Native(f"blocks.{i}.attention", f"blocks.{i}", 1, 8, 2, params)
        for i, params in enumerate((32, 32 + 10, 32 + 10, 32 + 8))
    ],
}


def size_of(name: str) -> tuple[int, ...]:
    return (3, 32, 32) if name.startswith("toy/") else (3, 64, 64)


def as_natives(sites: list[SESite]) -> list[Native]:
    return [Native(s.path, s.unit, s.stage, s.channels, s.rd_channels, s.params) for s in sites]


@pytest.mark.parametrize("name", WITH_SE)
def test_native_ses_are_found_with_all_that_they_are(name):
    sites = find_se(build(name), size_of(name))
    assert as_natives(sites) == WITH_SE[name]
    library = {"torchvision": "torchvision", "toy": "other"}.get(name.rpartition("/")[0], "timm")
    assert {site.origin for site in sites} == {library}


@pytest.mark.parametrize("name", WITH_SE)
def test_parameters_are_those_of_the_module_at_the_path(name):
    model = build(name)
    for site in find_se(model, size_of(name)):
        assert site.params == sum(p.numel() for p in model.get_submodule(site.path).parameters())


@pytest.mark.parametrize("name", WITH_SE)
def test_unit_and_stage_are_those_of_the_plan(name):
    """An SE serves the unit in which surgery would put another."""
    model = build(name)
    planned = {site.unit: site.stage for site in plan_se(model, existing="stack", example_input=size_of(name)).sites}
    assert {site.unit: site.stage for site in find_se(model, size_of(name))} == {
        unit: stage for unit, stage in planned.items() if unit in {native.unit for native in WITH_SE[name]}
    }


@pytest.mark.parametrize("name", ["seresnet18", "efficientnet_b0", "torchvision/mobilenet_v3_small"])
def test_native_ses_are_found_on_the_meta_device(name):
    library, _, short = name.rpartition("/")
    with torch.device("meta"):
        model = torchvision.models.get_model(short) if library else timm.create_model(short)
    assert as_natives(find_se(model)) == WITH_SE[name]


@pytest.mark.parametrize("name", ["seresnet18:half", "seresnet18:gray"])
def test_native_ses_are_found_in_half_and_gray_models(name):
    assert as_natives(find_se(build(name))) == WITH_SE["seresnet18"]


# Nets that gate something else too: over branches (SK, split attention), by whole maps (MambaOut), by layer scale.
WITHOUT_SE = (
    *("resnet18", "convnext_atto", "vgg11", "densenet121", "hrnet_w18_small", "mobilenetv2_050", "regnetx_002"),
    *("skresnet18", "resnest14d", "mambaout_femto", "efficientnet_lite0", "starnet_s1", "test_vit"),
    *("torchvision/resnet18", "torchvision/densenet121", "torchvision/shufflenet_v2_x0_5", "torchvision/convnext_tiny"),
)


@pytest.mark.parametrize("name", WITHOUT_SE)
def test_nothing_is_found_where_there_is_no_se(name):
    library, _, short = name.rpartition("/")
    # A RegNet's widths are computed with tensors, which the meta device of older releases of torch cannot do.
    with torch.device("cpu" if short.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(short) if library else timm.create_model(short)
    assert find_se(model) == []


@pytest.mark.parametrize("toy", [toy for toy in toys.SOUND if toy is not toys.WriteUps], ids=lambda toy: toy.__name__)
def test_nothing_is_found_in_users_networks_without_se(toy):
    assert find_se(toy(), toy.SIZE) == []


# --------------------------------------------------------------------------------------------- forms users write SEs in


class Form(nn.Module):
    """An SE of 8 channels in two Linear layers; each subclass pools and multiplies in its own way."""

    PARAMS, WIDTH = 2 * 8 * 2, 2

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def gate(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.fc1(z))))


class InPlaceMethod(Form):
    def forward(self, x: Tensor) -> Tensor:
        s = self.gate(x.mean((2, 3)))
        return x.mul_(s[:, :, None, None])


class InPlaceOperator(Form):
    def forward(self, x: Tensor) -> Tensor:
        s = self.gate(x.mean((2, 3)))
        x *= s[:, :, None, None]
        return x


class FunctionOfTwo(Form):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.gate(x.mean(3).mean(2)).unsqueeze(2).unsqueeze(3), x)


class Expanded(Form):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x * self.gate(x.view(b, c, h * w).mean(2)).view(b, c, 1, 1).expand(b, c, h, w)


class MaximumPooled(Form):
    def forward(self, x: Tensor) -> Tensor:
        s = self.gate(F.max_pool2d(x, x.shape[2:]).flatten(1))
        return x.multiply(s.reshape(len(x), 8, 1, 1))


class FunctionalLayers(Form):
    def gate(self, z: Tensor) -> Tensor:
        return F.hardsigmoid(F.linear(F.silu(F.linear(z, self.fc1.weight)), self.fc2.weight))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(F.adaptive_avg_pool2d(x, 1)[..., 0, 0])[..., None, None]


class NormalisedHidden(Form):
    PARAMS = 2 * 8 * 2 + 2 * 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def gate(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.norm(self.fc1(z)))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class OverChannels(nn.Module):
    """ECA: a convolution over the channels, and no hidden layer."""

    PARAMS, WIDTH = 3, None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))[:, None]
        return x * self.conv(z).sigmoid()[:, 0, :, None, None]


FORMS = (
    *(InPlaceMethod, InPlaceOperator, FunctionOfTwo, Expanded, MaximumPooled, FunctionalLayers, NormalisedHidden),
    OverChannels,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_an_se_is_known_by_what_it_does(form):
    model = toys.Trunk(toys.HoldsSE(8, form()), toys.Basic(8, 8))
    (site,) = find_se(model, (3, 32, 32))
    assert (site.path, site.unit, site.channels, site.origin) == ("blocks.0.attention", "blocks.0", 8, "other")
    assert (site.params, site.rd_channels) == (form.PARAMS, form.WIDTH)


class LastAxis(Form):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((1, 2)))[:, None, None, :]


class HoldsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.attention = toys.conv(8, 8), nn.Linear(8, 8), LastAxis()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        return x + self.attention(F.gelu(self.fc(y))).permute(0, 3, 1, 2)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv3d(8, 2, 1), nn.Conv3d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3, 4), keepdim=True)))))


class HoldsVolume(toys.VolumeBlock):
    def __init__(self) -> None:
        super().__init__(8)
        self.attention = Volume()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.attention(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


class Volumes(toys.Volumes):
    def __init__(self) -> None:
        super().__init__()
        self.block = HoldsVolume()


def test_channels_last_se_gates_the_last_axis():
    (site,) = find_se(toys.Trunk(HoldsLast()), (3, 32, 32))
    assert (site.path, site.channels, site.rd_channels, site.params) == ("blocks.0.attention", 8, 2, 32)


def test_three_dimensional_se_is_found():
    (site,) = find_se(Volumes(), toys.Volumes.SIZE)
    assert (site.path, site.channels, site.rd_channels, site.params) == ("block.attention", 8, 2, 2 * 16 + 10)


def test_a_wrapped_se_is_listed_once():
    model = toys.Trunk(toys.HoldsSE(8, nn.Sequential(toys.SequenceSE(8))))
    (site,) = find_se(model, (3, 32, 32))
    assert site.path.startswith("blocks.0.attention")


def test_two_ses_in_a_row_are_listed_one_by_one():
    model = toys.Trunk(toys.HoldsSE(8, nn.Sequential(toys.SequenceSE(8), toys.ExcitationSE(8))))
    sites = find_se(model, (3, 32, 32))
    assert [site.path for site in sites] == ["blocks.0.attention.0", "blocks.0.attention.1"]
    assert [site.params for site in sites] == [32, 42]


class MapGate(nn.Module):
    """A gate for every position and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class PositionGate(nn.Module):
    """A gate for every position, as in CBAM's second half."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x.mean(1, keepdim=True)))


class LearnedScale(nn.Module):
    """A scale for every channel that is the same for any input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class BatchedScale(nn.Module):
    """The same, through a layer and expanded over the batch: what it computes does not depend on the map."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.fc = nn.Parameter(torch.rand(4)), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.fc(self.code.expand(len(x), 4)))
        return x * s[:, :, None, None]


class NoLayer(nn.Module):
    """Scales by the mean itself: nothing in it is learned."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class OtherChannels(Form):
    """Gives the gate and not the gated map."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x.mean((2, 3)))[:, :, None, None].expand_as(x)


NOT_SE = (MapGate, PositionGate, LearnedScale, BatchedScale, NoLayer, OtherChannels)


@pytest.mark.parametrize("form", [*NOT_SE, nn.Identity], ids=lambda form: form.__name__)
def test_other_gates_are_not_taken_for_se(form):
    assert find_se(toys.Trunk(toys.HoldsSE(8, form()), toys.Basic(8, 8)), (3, 32, 32)) == []


# --------------------------------------------------------------------------------------------- after this library's own


OURS = {
    "resnet18": {},
    "mobilenetv3_small_050": {"existing": "stack", "placement": "inner"},
    "test_convnext": {"placement": "pre"},
    "toy/WriteUps": {"existing": "stack"},
    "toy/TwoUnits": {},
    "toy/PlainSequential": {},
    "toy/RootAdds": {},
    "toy/Volumes": {},
    "toy/NHWC": {"gate": "tanh", "squeeze": "max", "bias": True},
    "test_resnet": {"attn": "cbam"},
}


def operated(name: str) -> tuple[nn.Module, Plan, tuple[int, ...]]:
    """An operated network, its plan, and the size of its input."""
    size = getattr(toys, name.removeprefix("toy/")).SIZE if name.startswith("toy/") else (3, 64, 64)
    kwargs = NARROW if name == "resnet18" else {}
    plan = plan_se(build(name, **kwargs), **OURS[name], example_input=size)
    return add_se(build(name, **kwargs), **OURS[name], example_input=size), plan, size


@pytest.mark.parametrize("name", OURS)
def test_ours_are_found_as_they_were_planned(name):
    model, plan, size = operated(name)
    found = [site for site in find_se(model, size) if site.origin == "se_surgery"]
    assert found
    assert [(s.path, s.unit, s.stage, s.channels, s.params) for s in found] == [
        (s.path, s.unit, s.stage, s.channels, s.params) for s in plan.sites
    ]
    if "attn" not in OURS[name]:
        assert [site.rd_channels for site in found] == [site.rd_channels for site in plan.sites]


@pytest.mark.parametrize("name", OURS)
def test_natives_stay_listed_beside_ours_in_order_of_execution(name):
    model, plan, size = operated(name)
    sites = find_se(model, size)
    assert [site for site in sites if site.origin != "se_surgery"] == list(plan.existing)
    order = []
    for site in sites:
        model.get_submodule(site.path).register_forward_hook(lambda *_, path=site.path: order.append(path))
    with torch.no_grad():
        model.eval()(images(size))
    assert order == [site.path for site in sites]


class Wrapper(nn.Module):
    """A user's own model around a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"backbone": backbone})
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts["backbone"](x)[:, :10])


@pytest.mark.parametrize("name", [*OURS, "seresnet18", "torchvision/mobilenet_v3_small"])
def test_paths_move_with_the_model(name):
    """A model operated on, and then made a part of another."""
    if name in OURS:
        model, _, size = operated(name)
    else:
        model, size = build(name), (3, 64, 64)
    before = find_se(model, size)
    after = find_se(Wrapper(model), size)
    assert before
    assert [(s.path, s.unit, s.channels, s.rd_channels, s.params, s.origin) for s in after] == [
        (f"parts.backbone.{s.path}", f"parts.backbone.{s.unit}".strip("."), *rest)
        for s, rest in ((s, (s.channels, s.rd_channels, s.params, s.origin)) for s in before)
    ]


# Where a part is taken out of an operated narrow ResNet-18: its input, and the paths and units that are left.
PARTS = {
    "layer2": ((8, 16, 16), [("0.se", "0"), ("1.se", "1")]),
    "layer2.1": ((16, 8, 8), [("se", "")]),
    "layer1.0": ((64, 16, 16), [("se", "")]),
}


@pytest.mark.parametrize("part", PARTS)
def test_paths_are_those_of_an_extracted_part(part):
    model, _, _ = operated("resnet18")
    size, expected = PARTS[part]
    sites = find_se(model.get_submodule(part), size)
    assert [(site.path, site.unit) for site in sites] == expected
    assert {site.origin for site in sites} == {"se_surgery"}
    assert {site.channels for site in sites} == {16 if "2" in part else 8}


def test_paths_are_those_of_parts_put_together_anew():
    model, _, _ = operated("resnet18")
    model = nn.Sequential(model.conv1, model.bn1, model.act1, nn.Sequential(model.layer1, model.layer2))
    sites = find_se(model, (3, 64, 64))
    assert [(site.path, site.unit) for site in sites] == [
        (f"3.{i}.{j}.se", f"3.{i}.{j}") for i in (0, 1) for j in (0, 1)
    ]
    assert {site.origin for site in sites} == {"se_surgery"}


class Rooted(nn.Module):
    """Two residual units in the model's own forward, or, with `adds` off, as many convolutions in no unit."""

    def __init__(self, adds: bool = True) -> None:
        super().__init__()
        self.adds = adds
        self.stem, self.head = toys.conv(3, 8), nn.Linear(8, 10)
        self.conv1, self.conv2, self.conv3, self.conv4 = (toys.conv(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            y = second(F.relu(first(x)))
            x = F.relu(x + y) if self.adds else F.relu(y)
        return self.head(x.mean((2, 3)))


class Slotted(nn.Module):
    """Two residual units in one forward, the second of which has an empty slot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (toys.conv(8, 8) for _ in range(4))
        self.se = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return F.relu(x + self.se(self.conv4(F.relu(self.conv3(x)))))


SEVERAL = {
    "blocks, a slot": (lambda: toys.Trunk(Slotted()), ("standard", "pre"), 2),
    "root, residual": (Rooted, ("standard", "pre", "post", "identity", "inner"), 2),
    "root, plain": (lambda: Rooted(False), ("standard",), 4),
    "blocks, residual": (toys.TwoUnits, ("standard", "pre", "post", "identity", "inner"), 4),
}
SEVERAL_CASES = [(name, placement) for name, (_, placements, _) in SEVERAL.items() for placement in placements]


@pytest.mark.parametrize(("name", "placement"), SEVERAL_CASES)
def test_of_the_units_of_one_block_each_holds_its_own_se(name, placement):
    make, _, count = SEVERAL[name]
    model = add_se(make(), placement, example_input=(3, 32, 32))
    again = plan_se(model, placement, example_input=(3, 32, 32))
    assert not again.sites and len(again.existing) == count
    told = [skip.reason for skip in again.skipped if skip.kind == "held"]
    assert told == [f"holds an SE already ({site.path})" for site in again.existing]
    part = nn.Sequential(nn.Identity(), model)
    assert not plan_se(part, placement, example_input=(3, 32, 32)).sites


def test_an_unused_se_is_not_listed():
    """Nor does anything fail: a branch that this forward does not take may hold one."""
    model = build("seresnet18", **NARROW)
    model.spare = toys.SequenceSE(8)
    assert len(find_se(model, (3, 64, 64))) == 8
    assert "spare" not in {site.path for site in find_se(model, (3, 64, 64))}


def test_an_se_on_a_map_of_one_position_is_found() -> None:
    """At 32 x 32 the last stage's maps have one position, on which a gate looks like any product."""
    model = build("test_efficientnet")
    seen = look(model, (3, 32, 32))
    assert seen.size == (64, 64) and seen.asked[0].shape == (2, 3, 32, 32)
    assert [site.path for site in find_se(model, (3, 32, 32))] == ["blocks.3.0.se", "blocks.4.0.se"]
