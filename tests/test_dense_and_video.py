"""Torchvision's detection, segmentation and video networks: the backbone is operated on, and nothing behind it.

Detectors are compared by their losses: from random weights most find nothing, and two empty results are always equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from patients import assert_differs, assert_same, calls, copied, images, pass_through, randomise, run, tensors
from torch import Tensor, nn
from torchvision.models import detection, get_model
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from se_surgery import ProbeError, SqueezeExcite, add_se, plan_se, strip_se

SIDE = 64
BARE = {"weights": None, "weights_backbone": None}


def faster_rcnn() -> nn.Module:
    """With the frozen normalisation that pretrained detectors have."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    return detection.FasterRCNN(backbone, num_classes=3, min_size=SIDE, max_size=SIDE)


def mobile_rcnn() -> nn.Module:
    """Its backbone holds SEs of its own."""
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_small", weights=None, fpn=True, norm_layer=FrozenBatchNorm2d
    )
    anchors = detection.anchor_utils.AnchorGenerator(((32,),) * 3, ((1.0,),) * 3)
    return detection.FasterRCNN(backbone, num_classes=3, min_size=SIDE, max_size=SIDE, rpn_anchor_generator=anchors)


def retina() -> nn.Module:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, extra_blocks=LastLevelP6P7(256, 256))
    anchors = detection.anchor_utils.AnchorGenerator(((32,),) * 6, ((1.0,),) * 6)
    return detection.RetinaNet(backbone, num_classes=3, min_size=SIDE, max_size=SIDE, anchor_generator=anchors)


@dataclass(frozen=True)
class Row:
    """A detector or segmentation network: how to make it, and its sites by placement."""

    make: Callable[[], nn.Module]
    sites: dict[str, int]
    within: str
    existing: str = "skip"


DETECTORS = {
    "faster_rcnn": Row(faster_rcnn, {"standard": 8, "identity": 8, "inner": 8}, "backbone.body."),
    # 11 inverted residuals, 9 of which hold an SE; two groups begin without a shortcut.
    "mobile_rcnn": Row(mobile_rcnn, {"standard": 2, "post": 2}, "backbone.body."),
    "mobile_rcnn-stack": Row(mobile_rcnn, {"standard": 11}, "backbone.body.", "stack"),
    "retinanet": Row(retina, {"standard": 8}, "backbone.body."),
    # 13 convolutions of VGG, 1 that was a linear layer, 2 in each of 4 extra stages.
    "ssd300": Row(lambda: get_model("ssd300_vgg16", num_classes=3, **BARE), {"standard": 13 + 1 + 8}, "backbone."),
}
BIG = ("ssd300",)
SEGMENTERS = {
    "fcn_resnet50": Row(
        lambda: get_model("fcn_resnet50", num_classes=3, aux_loss=True, **BARE),
        {"standard": 16, "pre": 16},
        "backbone.",
    ),
    "deeplabv3_mobilenet": Row(
        lambda: get_model("deeplabv3_mobilenet_v3_large", num_classes=3, **BARE), {"standard": 15 - 8}, "backbone."
    ),
    "lraspp": Row(
        lambda: get_model("lraspp_mobilenet_v3_large", num_classes=3, **BARE), {"standard": 15 - 8}, "backbone."
    ),
}
CLIP = (3, 8, 32, 32)
CLIPS = {
    # Every second axis is time: the squeeze goes over T, H and W.
    "r3d_18": {"standard": 8, "pre": 8, "post": 8, "identity": 8, "inner": 8},
    "mc3_18": {"standard": 8},
    "r2plus1d_18": {"standard": 8},
}


def cases(rows: dict[str, Row]) -> list[Any]:
    return [
        pytest.param(row, placement, id=f"{name}-{placement}", marks=pytest.mark.sweep if name in BIG else ())
        for name, row in rows.items()
        for placement in row.sites
    ]


def made(row: Row) -> nn.Module:
    torch.manual_seed(0)
    return randomise(row.make().eval())


@torch.no_grad()
def of_backbone(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps that a detector's backbone returns while the detector runs."""
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, args, output: seen.extend(tensors(output)))
    model(list(x))
    handle.remove()
    return seen


def losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a detector returns in training, with one box an image."""
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])} for _ in x]
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(copied(model).train()(list(x), targets))


def ses(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]


@pytest.mark.parametrize(("row", "placement"), cases(DETECTORS))
def test_detectors(row, placement):
    base, x = made(row), images((3, SIDE, SIDE))
    model = add_se(copied(base), placement, existing=row.existing, init="paper")
    paths = ses(model)
    assert len(paths) == row.sites[placement]
    assert all(path.startswith(row.within) for path in paths)
    assert [key for key in model.state_dict() if not key.startswith(tuple(f"{path}." for path in paths))] == list(
        base.state_dict()
    )
    features = of_backbone(base, x)
    with calls(model, paths) as counts:
        assert_differs(of_backbone(model, x), features)
    assert set(counts.values()) == {1}
    pass_through(model, lambda module: isinstance(module, SqueezeExcite))
    assert_same(of_backbone(model, x), features)
    assert all(torch.equal(a, b) for a, b in zip(losses(model, x), losses(base, x), strict=True))


def test_a_detector_trains():
    row, x = DETECTORS["faster_rcnn"], images((3, SIDE, SIDE))
    model = add_se(made(row)).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])} for _ in x]
    sum(model(list(x), targets).values()).backward()
    for path in ses(model):
        assert model.get_submodule(path).fc2.weight.grad.abs().sum() > 0


def test_frozen_normalisation_is_kept_as_it_is():
    base = made(DETECTORS["faster_rcnn"])
    before = {path: module for path, module in base.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    buffers = {key: value.clone() for key, value in base.named_buffers()}
    add_se(base)
    after = {path: module for path, module in base.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    assert len(before) == 20 and before.keys() == after.keys() and all(before[p] is after[p] for p in before)
    losses(base, images((3, SIDE, SIDE)))
    assert all(torch.equal(value, buffers[key]) for key, value in base.named_buffers())


@pytest.mark.parametrize(("row", "placement"), cases(SEGMENTERS))
def test_segmentation(row, placement):
    base, x = made(row), images((3, SIDE, SIDE))
    model = add_se(copied(base), placement, init="paper")
    paths = ses(model)
    assert len(paths) == row.sites[placement]
    assert all(path.startswith(row.within) for path in paths)
    with calls(model, paths) as counts:
        assert_differs(run(model, x), run(base, x))
    assert set(counts.values()) == {1}
    pass_through(model, lambda module: isinstance(module, SqueezeExcite))
    for training in (False, True):
        assert_same(run(copied(model), x, training), run(copied(base), x, training))


@pytest.mark.parametrize(
    ("name", "placement"), [(name, placement) for name, sites in CLIPS.items() for placement in sites]
)
def test_video(name, placement):
    torch.manual_seed(0)
    base, x = randomise(get_model(name, weights=None, num_classes=5).eval()), images(CLIP, batch=1)
    model = add_se(copied(base), placement, init="paper", example_input=CLIP)
    paths = ses(model)
    assert len(paths) == CLIPS[name][placement]
    se = model.get_submodule(paths[0])
    clip = torch.randn(2, se.fc1.in_channels, 3, 4, 5)
    gate = torch.sigmoid(se.fc2(torch.relu(se.fc1(clip.mean((2, 3, 4))[:, :, None, None]))))
    torch.testing.assert_close(se(clip), clip * gate[..., None])
    assert_differs(run(model, x), run(base, x))
    pass_through(model, lambda module: isinstance(module, SqueezeExcite))
    assert_same(run(model, x), run(base, x))
    assert_same(run(strip_se(model, origin="se_surgery", example_input=CLIP), x), run(base, x))


def test_s3d_needs_a_larger_clip_and_finds_it_by_itself():
    with torch.device("meta"):
        plan = plan_se(get_model("s3d", weights=None))
    # Its 9 mixed modules concatenate four branches.
    assert [site.kind for site in plan.sites] == ["inception"] * 9
    assert plan.exam.seen.args[0].shape[2:] == (16, 224, 224)


def test_a_detector_without_values_says_what_it_needs():
    with torch.device("meta"):
        model = faster_rcnn()
    with pytest.raises(ProbeError, match="FasterRCNN does not run"):
        add_se(model)


class Clips(nn.Module):
    """Two residual blocks of videos."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.first, self.second = ClipBlock(), ClipBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


class ClipBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.conv2, self.bn2 = nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


def clips(spoil: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    model = add_se(randomise(Clips()).eval(), example_input=(3, 4, 8, 8), **options)
    for module in model.modules():
        if isinstance(module, SqueezeExcite) and spoil:
            nn.init.normal_(module.fc2.weight)
    return model


LAST = torch.channels_last_3d
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "layout": lambda model: model.to(memory_format=LAST),
    "layout and dtype": lambda model: model.to(dtype=torch.float64, memory_format=LAST).float(),
    "there and back": lambda model: model.to(memory_format=LAST).to(memory_format=torch.contiguous_format),
    "an SE alone": lambda model: (model.first.se.to(memory_format=LAST), model)[1],
    "dtype": lambda model: model.double().float(),
    "by exchange": lambda model: by_exchange(model),
}


def by_exchange(model: nn.Module) -> nn.Module:
    """As `to` does where torch is told to exchange parameters and not to set their values."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(memory_format=LAST)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "options", [{}, {"lean": False}, {"bias": True, "squeeze": "max"}], ids=["lean", "plain", "bias"]
)
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_network_of_videos_changes_its_layout(convert, options):
    model, expected = clips(**options), clips(**options)
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    parameters = dict(model.named_parameters())
    x = images((3, 4, 8, 8)).to(memory_format=LAST)
    moved = convert(model)
    assert moved is model and {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    (got,), (wanted,) = run(model, x), run(expected, x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=LAST)
    assert_differs(run(clips(spoil=False, **options), x), [wanted])
    model.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_checkpoint_of_another_layout_fits(tmp_path):
    model, other = clips().to(memory_format=LAST), clips(spoil=False)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    other.load_state_dict(torch.load(tmp_path / "x.pt"))
    assert {tuple(p.shape) for name, p in other.named_parameters() if ".se." in name} == {(2, 8, 1, 1), (8, 2, 1, 1)}
    x = images((3, 4, 8, 8))
    torch.testing.assert_close(run(other, x), run(model, x), rtol=1e-5, atol=1e-5)


def test_a_layout_that_a_network_of_videos_does_not_take_is_refused_as_without_ses():
    for model in (clips(), Clips()):
        with pytest.raises(RuntimeError, match="rank 4"):
            model.to(memory_format=torch.channels_last)


def test_a_network_of_images_changes_its_layout_as_before():
    model = add_se(randomise(get_model("resnet18", weights=None)).eval())
    x = images()
    (wanted,) = run(model, x)
    (got,) = run(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert model.layer4[0].se.fc1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="rank 5"):
        model.to(memory_format=LAST)
