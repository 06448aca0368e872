"""Zoo: the networks there are, which package each is from, and how one is built and called.

In: packages that are installed. Out: `Network`s. A package is imported only when one of its networks is built, so that
the names are known everywhere.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation, video

# The packages by what names begin with; what a package is called where it is installed from.
PACKAGES = {
    "monai2d": "monai",
    "monai3d": "monai",
    "smp": "segmentation-models-pytorch",
    "ultralytics": "ultralytics",
    "efficientnet_pytorch": "efficientnet-pytorch",
    "facenet": "facenet-pytorch",
    "doctr": "python-doctr",
    "torchvision": "torchvision",
    "timm": "timm",
}
ENCODERS = (
    *("resnet18", "se_resnet50", "densenet121", "efficientnet-b0", "mobilenet_v2", "dpn68", "mobileone_s0", "xception"),
    *("tu-convnext_atto",),
)
DECODERS = ("Unet", "FPN", "DeepLabV3Plus", "PAN", "PSPNet", "Linknet")
# These two want dilated encoders, which smp makes of no encoder that pools to get smaller.
DILATED, UNDILATED = ("DeepLabV3Plus", "PAN"), ("densenet121", "xception")
ULTRALYTICS = {
    **dict.fromkeys(("yolov8n-cls", "yolo11n-cls", "yolov8-cls-resnet50"), "ClassificationModel"),
    **dict.fromkeys(("yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-ghost"), "DetectionModel"),
    **dict.fromkeys(("yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"), "DetectionModel"),
    **dict.fromkeys(("yolov8n-seg", "yolo11n-seg"), "SegmentationModel"),
    "yolov8n-pose": "PoseModel",
}
DOCTR = (
    *("magc_resnet31", "mobilenet_v3_small", "mobilenet_v3_large", "mobilenet_v3_small_r", "mobilenet_v3_large_r"),
    *("resnet18", "resnet31", "resnet34", "resnet34_wide", "resnet50", "starnet_s3", "vgg16_bn_r"),
    *("textnet_tiny", "textnet_small", "textnet_base"),
)
# The smallest of each of 40 families of timm that are no targets of the table of names: hybrids and transformers.
HYBRIDS = (
    *("caformer_s18", "cpubone_nano", "edgenext_xx_small", "efficientformer_l1", "efficientvit_b0", "efficientvit_m0"),
    *("fastvit_mci0", "gcvit_xxtiny", "halonet_h1", "lowformer_b0", "mobilevit_xxs", "nextvit_small", "shvit_s1"),
    *("swiftformer_xs", "test_coatnet", "tiny_vit_5m_224", "visformer_tiny", "vitamin_small_224", "cait_xxs24_224"),
    *("coat_tiny", "convit_tiny", "crossvit_tiny_240", "davit_tiny", "deit_tiny_patch16_224", "gmlp_ti16_224"),
    *("hiera_tiny_224", "levit_128s", "mvitv2_tiny", "nest_tiny", "pit_ti_224", "pvt_v2_b0", "sequencer2d_s"),
    *("swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "test_vit", "test_vit_relpos", "twins_svt_small"),
    *("vit_tiny_r_s16_p8_224", "volo_d1_224", "xcit_nano_12_p8_224"),
)


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: `monai3d/VNet`: its package, and what it is called there.
        make: Builds it with random weights; nothing is downloaded.
        example: (C, H, W) to look at it with, or what makes the arguments of its forward; None for what fits.
    """

    name: str
    make: Callable[[], nn.Module]
    example: tuple[int, ...] | Callable[[], tuple[Any, ...]] | None = None

    @property
    def package(self) -> str:
        """What its package is called where it is installed from."""
        return PACKAGES[self.name.partition("/")[0]]

    @property
    def version(self) -> str | None:
        """The version of its package that is installed, without its build tag, or None."""
        try:
            return metadata.version(self.package).partition("+")[0]
        except metadata.PackageNotFoundError:
            return None

    @property
    def input(self) -> Any:
        """What to give as `example_input`."""
        return self.example() if callable(self.example) else self.example

    def build(self) -> nn.Module:
        """The network, in evaluation."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make().eval()


@functools.cache
def networks() -> dict[str, Network]:
    """Every network, by name."""
    sources = (_monai, _smp, _ultralytics, _small_packages, _doctr, _torchvision, _timm)
    return {network.name: network for source in sources for network in source()}


def _calling(module: str, function: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """What imports a module and calls one of its functions or classes."""

    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), function)(*args, **kwargs)
        return model

    return make


def _monai() -> Iterator[Network]:
    for dims in (2, 3):
        size = (1, 64, 64) if dims == 2 else (1, 32, 32, 32)
        sides = {"spatial_dims": dims, "in_channels": 1}
        unet = {**sides, "out_channels": 2, "channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
        dyn = {**sides, "out_channels": 2, "kernel_size": [3] * 4, "strides": [1, 2, 2, 2]}
        dyn.update(upsample_kernel_size=[2, 2, 2], filters=[8, 16, 32, 64])
        deep = {**dyn, "kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
        deep.update(filters=[8, 16, 32, 64, 64], deep_supervision=True, deep_supr_num=2, res_block=True)
        b0 = {"model_name": "efficientnet-b0", "pretrained": False, **sides}
        chosen = {
            "ResNet18": ("resnet18", {"spatial_dims": dims, "n_input_channels": 1, "num_classes": 3}),
            "ResNet50": ("resnet50", {"spatial_dims": dims, "n_input_channels": 1, "num_classes": 3}),
            "SEResNet50": ("SEResNet50", {**sides, "num_classes": 3}),
            "DenseNet121": ("DenseNet121", {**sides, "out_channels": 3}),
            "EfficientNetBN-b0": ("EfficientNetBN", b0),
            "UNet": ("UNet", unet),
            "UNet, residual": ("UNet", {**unet, "num_res_units": 2}),
            "AttentionUnet": ("AttentionUnet", {**unet, "channels": (8, 16, 32), "strides": (2, 2)}),
            "DynUNet": ("DynUNet", dyn),
            "DynUNet, residual": ("DynUNet", {**dyn, "res_block": True}),
            "DynUNet, deep": ("DynUNet", deep),
            **{name: (name, {**sides, "out_channels": 2}) for name in ("SegResNet", "HighResNet", "VNet", "BasicUNet")},
        }
        for name, (function, kwargs) in chosen.items():
            yield Network(f"monai{dims}d/{name}", _calling("monai.networks.nets", function, **kwargs), size)


def _smp() -> Iterator[Network]:
    for decoder in DECODERS:
        for encoder in ENCODERS:
            if decoder in DILATED and encoder in UNDILATED:
                continue
            make = _calling("segmentation_models_pytorch", decoder, encoder, encoder_weights=None)
            yield Network(f"smp/{decoder} {encoder}", make, (3, 128, 128))


def _ultralytics() -> Iterator[Network]:
    for name, task in ULTRALYTICS.items():
        make = _calling("ultralytics.nn.tasks", task, f"{name}.yaml", verbose=False)
        yield Network(f"ultralytics/{name}", make, (3, 128, 128))


def _small_packages() -> Iterator[Network]:
    for name in ("efficientnet-b0", "efficientnet-b1"):
        make = functools.partial(_efficientnet, name)
        yield Network(f"efficientnet_pytorch/{name}", make, (3, 96, 96))
    resnet = _calling("facenet_pytorch", "InceptionResnetV1", pretrained=None, classify=True, num_classes=5)
    yield Network("facenet/InceptionResnetV1", resnet, (3, 160, 160))
    for name, side in (("PNet", 64), ("RNet", 24), ("ONet", 48)):
        make = _calling("facenet_pytorch.models.mtcnn", name, pretrained=False)
        yield Network(f"facenet/{name}", make, (3, side, side))


def _efficientnet(name: str) -> nn.Module:
    model: nn.Module = importlib.import_module("efficientnet_pytorch").EfficientNet.from_name(name)
    return model


def _doctr() -> Iterator[Network]:
    for name in DOCTR:
        make = _calling("doctr.models.classification", name, pretrained=False)
        yield Network(f"doctr/{name}", make, (3, 64, 64))


def _torchvision() -> Iterator[Network]:
    """Detectors take a list of images; those that scale them are told to stay small."""
    for name in torchvision.models.list_models(detection):
        size = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
        yield Network(f"torchvision/{name}", _of_torchvision(name, weights_backbone=None, **size), _images)
    for name in torchvision.models.list_models(segmentation):
        yield Network(f"torchvision/{name}", _of_torchvision(name, weights_backbone=None), (3, 64, 64))
    for name in torchvision.models.list_models(video):
        size = () if name.startswith("mvit") else (3, 8, 64, 64)
        yield Network(f"torchvision/{name}", _of_torchvision(name), size or None)


def _of_torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return functools.partial(torchvision.models.get_model, name, weights=None, **kwargs)


def _images() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return ([torch.rand(3, 96, 96, generator=generator)],)


def _timm() -> Iterator[Network]:
    for name in HYBRIDS:
        yield Network(f"timm/{name}", functools.partial(timm.create_model, name))
