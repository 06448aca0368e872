"""The stage of every unit, against a ground truth written down from the architectures' sources and papers."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pytest
import timm
import torch
import torchvision
from patients import build
from torch import Tensor, nn
from toys import Basic

from se_surgery import Plan, StageError, add_se, find_se, plan_se


@dataclass(frozen=True, eq=False)
class Truth:
    """One network, and which of its units are in which stage.

    `stages` has one string a stage: globs on the paths of units. `layer1.0-2` stands for three paths, so it says that
    there are these three and no more. A stage that timm counts and that has no unit is "".
    """

    name: str
    stages: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "meta"

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def grid(form: str, *counts: int, stage: int = 0, block: int = 0) -> tuple[str, ...]:
    """One string a stage: `form` with the stage's number and the range of its blocks, each from its first on."""
    return tuple(form.format(i, f"{block}-{block + n - 1}") for i, n in enumerate(counts, stage))


def each(form: str, *choices: str) -> tuple[str, ...]:
    """One string a stage: `form` with what stands for that stage."""
    return tuple(form.format(choice) for choice in choices)


def os8(truth: Truth) -> Truth:
    """The same truth for the same network with dilation in place of the strides after the third."""
    return Truth(truth.name, truth.stages, {**truth.options, "output_stride": 8}, truth.device)


def features(truth: Truth, old: str = "", new: str = "", **options: Any) -> Truth:
    """The same truth for timm's `features_only` network, which may rename what holds the units."""
    stages = tuple(stage.replace(old, new) if old else stage for stage in truth.stages)
    return Truth(truth.name, stages, {**truth.options, "features_only": True, **options})


# A ResNet's levels are act1, of stride 2 and without a unit, and its four layers.
RESNET50 = Truth("resnet50", grid("layer{}.{}", 3, 4, 6, 3, stage=1))
RESNETV2 = Truth("resnetv2_50", grid("stages.{}.blocks.{}", 3, 4, 6, 3))
CONVNEXT = Truth("convnext_atto", grid("stages.{}.blocks.{}", 2, 2, 6, 2))
DENSENET = Truth("densenet121", grid("features.denseblock{}.denselayer{}", 6, 12, 24, 16, stage=1, block=1))
# Stage 1 is layer1. The modules that widen the branches' outputs for the classifier come after stage4: the last stage.
HRNET = Truth(
    "hrnet_w18_small",
    (
        "layer1.0",
        "stage2.0.branches.0-1.0-1",
        "stage3.0.branches.0-2.0-1",
        "stage4.0.branches.0-3.0-1 incre_modules.0-3.0",
    ),
)
# Groups of 1, 2, 3, 4, 3, 3, 1 blocks; 1, 2, 3, 4 and 6 start with a stride (the first one's is the stem's). Levels
# are of stride 2, 4, 8, 16 and 32, so that groups 4 and 5 make one stage, and 6 and 7.
MOBILENETV2 = Truth(
    "mobilenetv2_100",
    ("blocks.0.0", "blocks.1.0-1", "blocks.2.0-2", "blocks.3.0-3 blocks.4.0-2", "blocks.5.0-2 blocks.6.0"),
)
EFFICIENTNET = Truth(
    "efficientnet_b0",
    ("blocks.0.0", "blocks.1.0-1", "blocks.2.0-1", "blocks.3.0-2 blocks.4.0-2", "blocks.5.0-3 blocks.6.0"),
)
# A level's maps are taken inside the block that makes them smaller, before it does (`blocks.1.stack.act3`). The block
# belongs to the level that it makes: its SE gates the small maps. Nothing ends at the first level, of stride 2.
XCEPTION = Truth("xception41", ("blocks.0", "blocks.1", "blocks.2-10", "blocks.11-12"))
# Between the poolings: the indices of the activations. The last pooling is a level, too, and nothing ends there.
VGG16_ACTIVATIONS = ((2, 5), (9, 12), (16, 19, 22), (26, 29, 32), (36, 39, 42))
VGG16 = Truth("vgg16_bn", tuple(" ".join(f"features.{i}" for i in stage) for stage in VGG16_ACTIVATIONS))
# timm calls the first block the stem, level 0. The paper calls it stage 1 of 5, but a stem is no stage here: it goes
# with the first one, as in the other networks of ByobNet.
REPVGG = Truth("repvgg_a0", ("stem stages.0.0-1", *grid("stages.{}.{}", 4, 14, 1, stage=1)))
PYRAMID = each("stages.{}.*", "0", "1", "2", "3")

TIMM = (
    RESNET50,
    os8(RESNET50),
    features(RESNET50),
    os8(features(RESNET50)),
    # What comes after the last level asked for is not in the model.
    Truth("resnet50", RESNET50.stages[:2], {"features_only": True, "out_indices": (1, 2)}),
    # Which levels come out does not change which there are.
    features(RESNET50, out_indices=(2, 4)),
    features(RESNET50, "layer", "model.layer", feature_cls="getter"),
    features(RESNET50, "layer", "body.layer", feature_cls="hook"),
    Truth("resnext50_32x4d", RESNET50.stages),
    Truth("res2net50_26w_4s", RESNET50.stages),
    Truth("resnest14d", grid("layer{}.{}", 1, 1, 1, 1, stage=1)),
    Truth("skresnet18", grid("layer{}.{}", 2, 2, 2, 2, stage=1)),
    Truth("senet154", grid("layer{}.{}", 3, 8, 36, 3, stage=1)),
    Truth("legacy_seresnet18", grid("layer{}.{}", 2, 2, 2, 2, stage=1)),
    Truth("tresnet_m", grid("body.layer{}.{}", 3, 4, 11, 3, stage=1)),
    RESNETV2,
    os8(RESNETV2),
    features(RESNETV2, "stages.", "stages_"),
    Truth("nf_resnet50", grid("stages.{}.{}", 3, 4, 6, 3)),
    Truth("dm_nfnet_f0", grid("stages.{}.{}", 1, 2, 6, 3)),
    # Their widths are computed with tensors, which the meta device of older releases of torch cannot do.
    Truth("regnetx_008", grid("s{}.b{}", 1, 3, 7, 5, stage=1, block=1), device="cpu"),
    os8(Truth("regnety_002", grid("s{}.b{}", 1, 1, 4, 7, stage=1, block=1), device="cpu")),
    Truth("mobilenetv1_100", ("blocks.0.0", "blocks.1.0-1", "blocks.2.0-1", "blocks.3.0-5", "blocks.4.0-1")),
    MOBILENETV2,
    os8(MOBILENETV2),
    # Levels are taken inside the last block of each, before its last convolution.
    features(MOBILENETV2, feature_location="expansion"),
    os8(features(MOBILENETV2, feature_location="expansion")),
    # The first group begins with a stride, so that the stem is a level of its own, and no stage.
    Truth("mobilenetv3_small_100", ("blocks.0.0", "blocks.1.0-1", "blocks.2.0-2 blocks.3.0-1", "blocks.4.0-2")),
    Truth(
        "mobilenetv3_large_100",
        ("blocks.0.0", "blocks.1.0-1", "blocks.2.0-2", "blocks.3.0-3 blocks.4.0-1", "blocks.5.0-2"),
    ),
    # In the small model stages 1 and 2 are plain convolutions, in the medium one stage 1 is (a fused block without a
    # shortcut). timm numbers its levels 0 (the stem) to 4 in all of them, and so a stage is the same in all of them.
    Truth("mobilenetv4_conv_small", ("", "", "blocks.2.0-5", "blocks.3.0-5")),
    Truth("mobilenetv4_conv_medium", ("", "blocks.1.0-1", "blocks.2.0-7", "blocks.3.0-10")),
    # The stem is one module, conv_stem, and not the bn1 that timm names.
    Truth("mobilenetv5_300m_enc", each("blocks.{}", "0.*", "1.*", "2.*", "3.*")),
    EFFICIENTNET,
    os8(EFFICIENTNET),
    features(EFFICIENTNET),
    features(EFFICIENTNET, out_indices=(1, 2)),
    # Its first block convolves in groups of eight, which is no separable convolution; the others keep their numbers.
    Truth("efficientnet_b0_g8_gn", ("", *EFFICIENTNET.stages[1:])),
    Truth("tinynet_e", each("blocks.{}.*", "0", "1", "2", "[34]", "[56]")),
    Truth("fbnetc_100", each("blocks.{}.*", "0", "1", "2", "[34]", "[56]")),
    Truth("hardcorenas_a", each("blocks.{}.*", "0", "1", "2", "[34]", "5")),
    Truth("lcnet_050", each("blocks.{}.*", "0", "1", "2", "[34]", "5")),
    # The paper ends a stage with its strided block, and so does timm: `blocks.5`, the first at stride 16, ends stage 3.
    # What comes after the last level, at stride 32, goes with it.
    Truth(
        "ghostnet_100",
        (
            "blocks.0.0 blocks.1.0",
            "blocks.2.0 blocks.3.0",
            "blocks.4.0 blocks.5.0",
            "blocks.6.0-4 blocks.7.0 blocks.8.0-3",
        ),
    ),
    Truth("rexnet_100", each("features.{}", "0", "1-2", "3-4", "5-10", "11-15")),
    DENSENET,
    features(DENSENET, "features.", "features_"),
    Truth("rdnet_tiny", each("dense_stages.{}.*", "0", "1", "[2345]", "6")),
    Truth("dpn68", grid("features.conv{}_{}", 3, 4, 12, 3, stage=2, block=1)),
    # Levels 0 and 1 are plain convolutions.
    Truth("dla34", each("level{}", "2.tree1-2", "3.tree1-2.tree1-2", "4.tree1-2.tree1-2", "5.tree1-2")),
    CONVNEXT,
    os8(CONVNEXT),
    features(CONVNEXT, "stages.", "stages_"),
    os8(features(CONVNEXT, "stages.", "stages_")),
    Truth("convnext_atto", each("stages_{}.blocks.*", "0", "1"), {"features_only": True, "out_indices": (0, 1)}),
    Truth("inception_next_atto", PYRAMID),
    Truth("poolformer_s12", PYRAMID),
    HRNET,
    features(HRNET),
    VGG16,
    Truth("inception_v3", each("Mixed_{}", "5[bcd]", "6[abcde]", "7[abc]")),
    # Mixed3a is a level of its own (stride 4); Mixed4a and Mixed5a lead to the next, which the four blocks A end.
    Truth("inception_v4", each("features.{}", "3", "4-9", "10-17", "18-21")),
    Truth("inception_resnet_v2", ("mixed_5b repeat.0-9", "mixed_6a repeat_1.0-19", "mixed_7a repeat_2.0-8 block8")),
    XCEPTION,
    os8(XCEPTION),
    Truth("xception41p", XCEPTION.stages),
    # A level's maps are taken at the start of the next block; the last two separable convolutions are at stride 32.
    Truth("legacy_xception", ("block1", "block2", "block3-11", "block12 conv3-4")),
    # Levels are what goes into cell_stem_1 and into the reductions: the cells by the stride of what they put out.
    Truth(
        "nasnetalarge",
        ("cell_stem_0", "cell_stem_1 cell_0-5", "reduction_cell_0 cell_6-11", "reduction_cell_1 cell_12-17"),
    ),
    Truth("pnasnet5large", ("cell_stem_0", "cell_stem_1 cell_0-3", "cell_4-7", "cell_8-11")),
    Truth("ese_vovnet39b", grid("stages.{}.blocks.{}", 1, 1, 2, 2)),
    # Its stem has two separable convolutions, which are units. A stem is no stage: they go with the first one.
    Truth("ese_vovnet19b_dw", ("stem.1-2 stages.0.blocks.0", *grid("stages.{}.blocks.{}", 1, 1, 1, stage=1))),
    Truth("hgnet_tiny", grid("stages.{}.blocks.{}", 1, 1, 2, 1)),
    # The two levels of the head are plain convolutions, of stride 32 and 64.
    Truth("selecsls42b", each("features.{}", "0-1", "2-3", "4-5")),
    Truth("cspresnet50", grid("stages.{}.blocks.{}", 3, 3, 5, 2)),
    Truth("cspdarknet53", grid("stages.{}.blocks.{}", 1, 2, 8, 8, 4)),
    Truth("darknet53", grid("stages.{}.blocks.{}", 1, 2, 8, 8, 4)),
    REPVGG,
    features(REPVGG, "stages.", "stages_"),
    Truth("mobileone_s0", PYRAMID),
    # Stages 4 and 5 of the paper are both at stride 32, and timm's last level is what comes after both.
    Truth("gernet_s", each("stages.{}.*", "0", "1", "2", "[34]")),
    Truth("resnet51q", PYRAMID),
    Truth("fastvit_t8", ("stem.* stages.0.*", *PYRAMID[1:])),
    # The stem's residual block comes before the first level that timm lists.
    # Its attention asks for autocast on its input's device, which torch 2.4 does not have for meta.
    Truth("efficientvit_b0", ("stem.* stages.0.*", *PYRAMID[1:]), device="cpu"),
    # A downsampling begins a stage, with its own block at the resolution of the stage before.
    Truth("repvit_m0_9", PYRAMID),
    Truth("edgenext_xx_small", PYRAMID),
    Truth("starnet_s1", PYRAMID),
    Truth("mambaout_femto", PYRAMID),
    Truth("fasternet_t0", PYRAMID),
    Truth("shvit_s1", PYRAMID[:3]),
    # One resolution: each block is a level of timm's, and all of them are one stage.
    Truth("convmixer_768_32", ("blocks.0-31.0",)),
)
TV_MOBILENETV3 = each("features.{}", "1", "2-3", "4-6", "7-12", "13-15")
TORCHVISION = (
    Truth("torchvision/resnet50", RESNET50.stages),
    Truth("torchvision/resnet50", RESNET50.stages, {"replace_stride_with_dilation": [False, True, True]}),
    Truth(
        "torchvision/fcn_resnet50", tuple(f"backbone.{stage}" for stage in RESNET50.stages), {"weights_backbone": None}
    ),
    Truth("torchvision/mobilenet_v3_large", TV_MOBILENETV3),
    Truth(
        "torchvision/deeplabv3_mobilenet_v3_large",
        tuple(stage.replace("features", "backbone") for stage in TV_MOBILENETV3),
        {"weights_backbone": None},
    ),
    Truth("torchvision/vgg16_bn", VGG16.stages),
    Truth("torchvision/mobilenet_v2", each("features.{}", "1", "2-3", "4-6", "7-13", "14-17")),
    Truth("torchvision/mnasnet0_5", each("layers.{}", "8.0-2", "9.0-2", "10.0-2 layers.11.0-1", "12.0-3 layers.13.0")),
    Truth("torchvision/efficientnet_b0", each("features.{}", "1.0", "2.0-1", "3.0-1", "[45].*", "[67].*")),
    Truth("torchvision/densenet121", DENSENET.stages),
    Truth("torchvision/shufflenet_v2_x1_0", grid("stage{}.{}", 4, 8, 4, stage=2)),
    Truth("torchvision/googlenet", each("inception{}", "3[ab]", "4[abcde]", "5[ab]")),
    Truth("torchvision/squeezenet1_1", each("features.{}", "[34]", "[67]", "9-12")),
    # Its widths are computed with tensors, which the meta device cannot do.
    Truth("torchvision/regnet_x_400mf", each("trunk_output.block{}.*", "1", "2", "3", "4"), device="cpu"),
    Truth("torchvision/convnext_tiny", each("features.{}", "1.0-2", "3.0-2", "5.0-8", "7.0-2")),
    # Video: time shrinks along with the image.
    Truth("torchvision/r3d_18", grid("layer{}.{}", 2, 2, 2, 2, stage=1)),
    Truth("torchvision/s3d", each("features.{}", "5-6", "8-12", "14-15")),
)
TRUTHS = (*TIMM, *TORCHVISION)


def model_of(truth: Truth) -> nn.Module:
    """The network, without weights where it can be made so."""
    library, _, short = truth.name.rpartition("/")
    with torch.device(truth.device):
        if library == "torchvision":
            return torchvision.models.get_model(short, weights=None, **truth.options)
        return timm.create_model(short, **truth.options)


@functools.cache
def plan_of(truth: Truth) -> Plan:
    """The plan that has a site for every unit, those with an SE included."""
    return plan_se(model_of(truth), existing="stack")


def globs(stage: str) -> list[str]:
    """The globs of one stage, their ranges written out.

    Example:
        >>> globs("stem level3.tree1-2")
        ['stem', 'level3.tree1', 'level3.tree2']
    """
    parts = [re.split(r"(\d+-\d+)", pattern) for pattern in stage.split()]
    choices = [[numbers(part) if i % 2 else [part] for i, part in enumerate(pattern)] for pattern in parts]
    return ["".join(choice) for pattern in choices for choice in itertools.product(*pattern)]


def numbers(text: str) -> list[str]:
    first, last = text.split("-")
    return [str(i) for i in range(int(first), int(last) + 1)]


def staged(plan: Plan) -> list[list[str]]:
    """The units of every stage."""
    return [[site.unit for site in plan.sites if site.stage == stage] for stage in range(1, plan.stages + 1)]


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_units_are_in_the_stages_of_the_architecture(truth):
    found = staged(plan_of(truth))
    assert len(found) == len(truth.stages)
    for units, stage in zip(found, truth.stages, strict=True):
        wanted = globs(stage)
        assert [unit for unit in units if not any(fnmatchcase(unit, glob) for glob in wanted)] == []
        assert [glob for glob in wanted if not any(fnmatchcase(unit, glob) for unit in units)] == []


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_no_unit_vanishes_and_stages_follow_each_other(truth):
    plan = plan_of(truth)
    assert [site.unit for site in plan.sites] == [unit.path for unit in plan.exam.units.found]
    stages = [site.stage for site in plan.sites]
    assert stages == sorted(stages)
    assert set(stages) == {i for i, stage in enumerate(truth.stages, 1) if stage}
    assert stages[-1] == plan.stages


BY_NAME = {truth.name: truth for truth in reversed(TRUTHS)}
ASKED = (
    "resnet50",
    "mobilenetv4_conv_small",
    "hrnet_w18_small",
    "repvgg_a0",
    "convmixer_768_32",
    "torchvision/vgg16_bn",
)


@pytest.mark.parametrize("name", ASKED)
def test_stages_are_asked_for_from_either_end(name):
    truth, whole = BY_NAME[name], plan_of(BY_NAME[name])
    model, count = model_of(truth), len(truth.stages)
    for options, stages in (
        ({"stages": 1}, {1}),
        ({"stages": -1}, {count}),
        ({"r": {-count: 16, count: 16}}, {1, count}),
    ):
        sites = tuple(site for site in whole.sites if site.stage in stages)
        assert plan_se(model, existing="stack", **options).sites == sites


@pytest.mark.parametrize("name", ASKED)
def test_a_stage_that_is_not_there_is_an_error(name):
    model, count = model_of(BY_NAME[name]), len(BY_NAME[name].stages)
    for stage in (count + 1, -count - 1):
        with pytest.raises(StageError, match=f"no stage {stage}: this model has the stages 1 to {count}"):
            plan_se(model, stages=stage)


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "inner"])
@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_an_se_is_found_in_the_stage_it_was_planned_for(name, placement):
    model = build(name)
    planned = [(site.path, site.stage) for site in plan_se(model, placement).sites]
    assert [(site.path, site.stage) for site in find_se(add_se(model, placement))] == planned
    assert [(site.path, site.stage) for site in plan_se(model, placement).existing] == planned


class Net(nn.Module):
    """Blocks of a user's own, one after the other, with nothing that tells the stages."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Attended(Basic):
    """A block with a gate that is computed at half the resolution, as GhostNetV2 has it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, stride)
        self.gate = nn.Conv2d(outputs, outputs, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        gate = torch.sigmoid(self.gate(nn.functional.avg_pool2d(y, 2)))
        return y * nn.functional.interpolate(gate, scale_factor=2)


class Up(Basic):
    """A decoder's block: twice as large, and added to what the encoder had."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.interpolate(x, scale_factor=2))


class Dilated(Basic):
    """A block whose two convolutions are dilated."""

    def __init__(self, inputs: int, outputs: int, first: int, second: int) -> None:
        super().__init__(inputs, outputs)
        for convolution, dilation in ((self.conv1, first), (self.conv2, second)):
            convolution.dilation = convolution.padding = (dilation, dilation)


NETS = {
    "plain": (lambda: Net(Basic(8, 8), Basic(8, 16, 2), Basic(16, 16), Basic(16, 16, 2)), (1, 2, 2, 3)),
    "attention-at-a-lower-resolution": (
        lambda: Net(Basic(8, 8), Attended(8, 8), Basic(8, 16, 2), Attended(16, 16), Attended(16, 16, 2)),
        (1, 1, 2, 2, 3),
    ),
    "decoder": (lambda: Net(Basic(8, 8), Basic(8, 16, 2), Basic(16, 32, 2), Up(32, 16), Up(16, 8)), (1, 2, 3, 3, 3)),
    "hourglass": (lambda: Net(Basic(8, 8), Basic(8, 16, 2), Up(16, 16), Basic(16, 16, 2)), (1, 2, 2, 2)),
    # As torchvision has it: a dilated stage begins where it widens, and its first block has the dilation before.
    "dilated": (
        lambda: Net(Dilated(8, 8, 1, 1), Dilated(8, 16, 1, 1), Dilated(16, 16, 2, 2), Dilated(16, 16, 2, 2)),
        (1, 2, 2, 2),
    ),
    "dilated-twice": (
        lambda: Net(Basic(8, 8), Dilated(8, 16, 2, 2), Basic(16, 16, 2), Dilated(16, 32, 2, 2)),
        (1, 2, 3, 4),
    ),
    # One resolution and one width: dilation that grows and falls makes no stages.
    "dilated-of-one-width": (lambda: Net(*(Dilated(8, 8, d, d) for d in (1, 2, 4, 2, 1))), (1, 1, 1, 1, 1)),
    "widened-without-dilation": (lambda: Net(Basic(8, 8), Basic(8, 16), Basic(16, 16)), (1, 1, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_stages_of_a_network_that_does_not_tell_them(name):
    make, stages = NETS[name]
    plan = plan_se(make(), heads=True, example_input=(3, 32, 32))
    assert tuple(site.stage for site in plan.sites) == stages
    assert plan.stages == max(stages)


class Pair(nn.Module):
    """Two networks, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[:, :3])


def telling(model: nn.Module, *levels: str, stages: tuple[int | None, ...] = (None, None, None)) -> nn.Module:
    """The model with a `feature_info` as timm's have it, one entry for each of these modules."""
    numbered = enumerate(zip(levels, stages, strict=False))
    model.feature_info = [
        {"module": level, "num_chs": 8, "reduction": 2**i, "stage": stage} for i, (level, stage) in numbered
    ]
    return model


def told(*blocks: nn.Module, stages: tuple[int | None, ...] = (None, None, None)) -> nn.Module:
    """A network in which every block is a level; by default there are two, which differ in nothing but their names."""
    blocks = blocks or (Basic(8, 8), Basic(8, 8))
    return telling(Net(*blocks), *(f"blocks.{i}" for i in range(len(blocks))), stages=stages)


TOLD = {
    "one-resolution": (told, (1, 2)),
    # A level without units is no stage, be it before the units or behind them, ...
    "levels-without-units": (lambda: told(nn.ReLU(), Basic(8, 8), nn.ReLU()), (1,)),
    "a-level-without-units-between": (lambda: told(Basic(8, 8), nn.ReLU(), Basic(8, 8)), (1, 2)),
    # ... unless it has the number of one; the last stage has units all the same.
    "stages-without-units": (lambda: told(nn.ReLU(), Basic(8, 8), nn.ReLU(), stages=(1, 2, 3)), (2,)),
    "a-level-listed-twice": (
        lambda: telling(told(), "blocks.0", "blocks.0", "blocks.1", stages=(1, 2, 3)),
        (1, 2),
    ),
    # What a part of the network tells does not count beside what the whole tells.
    "one-within-another": (
        lambda: telling(Pair(told(), Net(Basic(8, 8), Basic(8, 8))), "first", "second"),
        (1, 1, 2, 2),
    ),
    "one-of-two": (lambda: Pair(told(), Net(Basic(8, 8), Basic(8, 8))), (1, 2, 2, 2)),
    # Two parts that tell their own levels do not tell the whole's: those are by resolution.
    "both-of-two": (lambda: Pair(told(), told(Basic(8, 8), Basic(8, 8, 2))), (1, 1, 1, 2)),
}


@pytest.mark.parametrize("name", TOLD)
def test_stages_of_a_network_that_tells_them(name):
    make, stages = TOLD[name]
    plan = plan_se(make(), example_input=(3, 32, 32))
    assert tuple(site.stage for site in plan.sites) == stages
    assert plan.stages == max(stages)


class Detector(nn.Module):
    """A backbone of timm's inside a user's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("mobilenetv4_conv_small_035")
        self.neck = nn.Conv2d(self.backbone.num_features, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.backbone.forward_features(x))


def test_stages_of_a_backbone_within_a_model():
    plan = plan_se(Detector(), example_input=(3, 64, 64))
    units = [f"backbone.blocks.{group}.{block}" for group in (2, 3) for block in range(6)]
    assert [site.unit for site in plan.sites] == units
    assert [site.stage for site in plan.sites] == [3] * 6 + [4] * 6


def test_a_block_that_cannot_be_operated_on_is_in_the_stage_around_it():
    """It is no unit, and closes its stage: it stands in the way of an operation on that stage, and of no other."""
    model = Net(nn.Sequential(Basic(8, 8), Basic(8, 8)), nn.Sequential(Basic(8, 16, 2), Basic(16, 16)))
    closed = model.blocks[0][1]
    closed.forward = closed.forward
    plans = {stage: plan_se(model, stages=stage, example_input=(3, 32, 32)) for stage in (1, 2)}
    blocking = {stage: [skipped.unit for skipped in plan.skipped if skipped.blocking] for stage, plan in plans.items()}
    assert blocking == {1: ["blocks.0.1"], 2: []}
