"""Counts: how many units each network has, by hand from its source and arguments, with the arithmetic beside it.

A plan is held against these; they are never made from one. What is counted where that is a matter of view:

- of what puts out maps or boxes, the encoder or backbone with its bottleneck. Decoder, neck and head are left out;
- of a Sequential of YOLO's, its file's backbone: the bottlenecks with a shortcut, and an ELAN without any as one unit;
- an attention, and the pointwise layers in the module that holds it, are a transformer's block and no unit; a
  bottleneck with an attention in its middle is one;
- a network without any unit counts each convolution that an activation follows, a depthwise and pointwise pair as one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """The units of one network.

    Attributes:
        free: Those without an SE: the sites with `existing="skip"`.
        arithmetic: How many there are of what.
        held: Those that hold one already. With `existing="stack"` they are sites, too.
    """

    free: int
    arithmetic: str
    held: int = 0

    @property
    def all(self) -> int:
        """The sites with `existing="stack"`."""
        return self.free + self.held


_MOBILE_LARGE = Count(7, "15 blocks, 8 of which hold an SE", 8)
_MOBILE_SMALL = Count(2, "11 blocks, 9 of which hold an SE", 9)
_RESNET18 = Count(8, "2+2+2+2 basic blocks = 8")
_RESNET34 = Count(16, "3+4+6+3 basic blocks = 16")
_RESNET50 = Count(16, "3+4+6+3 bottlenecks = 16")
_RESNET101 = Count(33, "3+4+23+3 bottlenecks = 33")
_DENSE = Count(58, "6+12+24+16 dense layers = 58")
_B0 = Count(0, "1+2+2+3+3+4+1 inverted residuals = 16, each with an SE", 16)
_NO_CNN = Count(0, "a transformer: no convolutional unit")

_MONAI = {
    "ResNet18": _RESNET18,
    "ResNet50": _RESNET50,
    "SEResNet50": Count(0, "3+4+6+3 bottlenecks = 16, each with an SE", 16),
    "DenseNet121": _DENSE,
    "EfficientNetBN-b0": _B0,
    "UNet": Count(4, "encoder: 3 down + 1 bottom convolutions = 4"),
    "UNet, residual": Count(4, "encoder: 3 down + 1 bottom residual units = 4"),
    "AttentionUnet": Count(6, "encoder: head, down and bottom of 2 convolutions each = 6"),
    "DynUNet": Count(8, "encoder: input + 2 down + bottleneck, of 2 convolutions each = 8"),
    "DynUNet, residual": Count(4, "encoder: input + 2 down + bottleneck residual blocks = 4"),
    "DynUNet, deep": Count(5, "encoder: input + 3 down + bottleneck residual blocks = 5"),
    "SegResNet": Count(9, "encoder: 1+2+2+4 residual blocks = 9"),
    "HighResNet": Count(9, "3 dilations x 3 residual blocks = 9"),
    "VNet": Count(4, "encoder: 4 DownTransitions; the input's transition adds without an activation"),
    "BasicUNet": Count(10, "encoder: 5 TwoConv of 2 convolutions = 10"),
}
_SMP = {
    "resnet18": _RESNET18,
    "se_resnet50": _MONAI["SEResNet50"],
    "densenet121": _DENSE,
    "efficientnet-b0": _B0,
    "mobilenet_v2": Count(17, "1+2+3+4+3+3+1 inverted residuals = 17"),
    "dpn68": Count(22, "3+4+12+3 dual-path blocks = 22"),
    "mobileone_s0": Count(21, "2+8+10+1 depthwise and pointwise pairs = 21"),
    "xception": Count(14, "12 blocks + 2 separable convolutions = 14"),
    "tu-convnext_atto": Count(12, "2+2+6+2 blocks = 12"),
}
# PSPNet takes three scales; some encoders run a stage more, whose maps are dropped.
_PSPNET = {
    "resnet18": Count(4, "2+2 basic blocks = 4, two stages run"),
    "se_resnet50": Count(0, "3+4 bottlenecks = 7, each with an SE, two stages run", 7),
    "densenet121": Count(18, "6+12 dense layers = 18, two stages run"),
    "efficientnet-b0": Count(0, "9 inverted residuals run, each with an SE", 9),
    "mobilenet_v2": Count(13, "1+2+3+4+3 inverted residuals = 13, which run"),
    "dpn68": Count(7, "3+4 dual-path blocks = 7, two stages run"),
    "mobileone_s0": Count(10, "2+8 depthwise and pointwise pairs = 10, two stages run"),
    "xception": Count(2, "2 blocks run"),
    "tu-convnext_atto": Count(4, "2+2 blocks = 4, two stages run"),
}
_ULTRALYTICS = {
    "yolov8n-cls": Count(6, "C2f: 1+2+2+1 bottlenecks = 6"),
    "yolo11n-cls": Count(6, "C3k2: 1+1 bottlenecks, 2+2 in C3k = 6; C2PSA is attention"),
    "yolov8-cls-resnet50": _RESNET50,
    "yolov3-tiny": Count(6, "backbone: 6 convolutions"),
    "yolov5n": Count(7, "backbone: C3 of 1+2+3+1 bottlenecks = 7"),
    "yolov6n": Count(21, "backbone: 5 strided + 2+4+6+2 convolutions + 2 of SPPF = 21"),
    "yolov8n": Count(6, "backbone: C2f of 1+2+2+1 bottlenecks = 6"),
    "yolov8n-ghost": Count(6, "backbone: C3Ghost of 1+2+2+1 GhostBottlenecks = 6"),
    "yolov8n-seg": Count(6, "backbone: C2f of 1+2+2+1 bottlenecks = 6"),
    "yolov8n-pose": Count(6, "backbone: C2f of 1+2+2+1 bottlenecks = 6"),
    "yolov9t": Count(19, "backbone: 1 ELAN1 + 3 RepNCSPELAN4 x 2 RepCSP x 3 bottlenecks = 19"),
    "yolov10n": Count(6, "backbone: C2f of 1+2+2+1 bottlenecks = 6; PSA is attention"),
    "yolo11n": Count(6, "backbone: C3k2 of 1+1 bottlenecks, 2+2 in C3k = 6; C2PSA is attention"),
    "yolo11n-seg": Count(6, "backbone: C3k2 of 1+1 bottlenecks, 2+2 in C3k = 6; C2PSA is attention"),
    "yolo12n": Count(2, "backbone: C3k2 of 1+1 bottlenecks = 2; A2C2f is attention"),
    "yolo26n": Count(7, "backbone: C3k2 of 1+1 bottlenecks, 2+2 in C3k, SPPF with its shortcut = 7"),
}
_DOCTR = {
    "magc_resnet31": Count(11, "1+2+5+3 basic blocks = 11"),
    "mobilenet_v3_small": _MOBILE_SMALL,
    "mobilenet_v3_small_r": _MOBILE_SMALL,
    "mobilenet_v3_large": _MOBILE_LARGE,
    "mobilenet_v3_large_r": _MOBILE_LARGE,
    "resnet18": _RESNET18,
    "resnet31": Count(11, "1+2+5+3 basic blocks = 11"),
    "resnet34": _RESNET34,
    "resnet34_wide": _RESNET34,
    "resnet50": _RESNET50,
    "starnet_s3": Count(16, "2+2+8+4 blocks = 16"),
    "vgg16_bn_r": Count(13, "2+2+3+3+3 convolutions = 13"),
    "textnet_tiny": Count(16, "stem + 3+4+4+4 re-parameterisable convolutions = 16"),
    "textnet_small": Count(24, "stem + 2+8+8+5 re-parameterisable convolutions = 24"),
    "textnet_base": Count(34, "stem + 10+10+8+5 re-parameterisable convolutions = 34"),
}
_TORCHVISION = {
    **dict.fromkeys(("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"), _MOBILE_LARGE),
    **dict.fromkeys(("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn"), _RESNET50),
    **dict.fromkeys(("keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"), _RESNET50),
    **dict.fromkeys(("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"), _RESNET50),
    "ssd300_vgg16": Count(22, "10 to conv4_3 + 3 of conv5 + fc6, fc7 + 4x2 extra = 23, less the last, of one position"),
    "ssdlite320_mobilenet_v3_large": Count(
        10, "15 blocks, 8 of which hold an SE, + 4 extra pairs, less the last, of one position", 8
    ),
    **dict.fromkeys(("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"), _MOBILE_LARGE),
    **dict.fromkeys(("deeplabv3_resnet50", "fcn_resnet50"), _RESNET50),
    **dict.fromkeys(("deeplabv3_resnet101", "fcn_resnet101"), _RESNET101),
    **dict.fromkeys(("r3d_18", "mc3_18", "r2plus1d_18"), _RESNET18),
    "s3d": Count(9, "2+5+2 Inception modules = 9"),
    **dict.fromkeys(("mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"), _NO_CNN),
}
_TIMM = {
    "caformer_s18": Count(
        12, "2 stages of 3 convolutional blocks with 2 residuals each = 12; the others are attention"
    ),
    "cpubone_nano": Count(7, "4 downsamplings + 1+2 local modules = 7"),
    "edgenext_xx_small": Count(12, "2+2+6+2 blocks = 12, 3 of them with an attention in the branch"),
    "efficientformer_l1": Count(14, "3+2+6+3 blocks of maps = 14; the last block is attention"),
    "efficientvit_b0": Count(11, "1 of the stem + 2+2 blocks + 2 downsamplings + 2+2 local modules = 11"),
    "efficientvit_m0": Count(4, "2 downsamplings x 2 FFNs = 4, with a PatchMerging each, which holds an SE", 2),
    "fastvit_mci0": Count(20, "2+6+10+2 blocks, whose MLP has a 7x7 convolution = 20"),
    "gcvit_xxtiny": Count(0, "stem + 3 downsamplings + 3+2+1+1 feature blocks = 11, each with an SE", 11),
    "halonet_h1": Count(19, "3+3+10+3 bottlenecks = 19, with attention in the middle"),
    "lowformer_b0": Count(11, "4 downsamplings + 3+4 local modules = 11"),
    "mobilevit_xxs": Count(10, "1+3+1+1+1 inverted residuals + 3 MobileViT blocks that are joined to their input = 10"),
    "nextvit_small": Count(36, "3+3+8+2 convolutional blocks with 2 residuals each + 4 in transformer blocks = 36"),
    "shvit_s1": Count(6, "2 FFNs without attention + 2 downsamplings x 2 FFNs = 6; PatchMergings hold an SE", 2),
    "swiftformer_xs": Count(16, "3+3+6+4 blocks = 16; in the last of each stage the local representation"),
    "test_coatnet": Count(0, "1+1 inverted residuals = 2, each with an SE", 2),
    "tiny_vit_5m_224": Count(5, "2 inverted residuals + 3 PatchMergings = 5"),
    "visformer_tiny": Count(7, "7 convolutional blocks of the first stage; the others are attention"),
    "vitamin_small_224": Count(6, "2+4 inverted residuals of the patch embedding = 6"),
}


def count_of(name: str) -> Count:
    """The count of a network.

    Raises:
        KeyError: Nobody has counted it.
    """
    package, _, rest = name.partition("/")
    if package == "smp":
        decoder, _, encoder = rest.partition(" ")
        return (_PSPNET if decoder == "PSPNet" else _SMP)[encoder]
    if package == "timm":
        return _TIMM.get(rest, _NO_CNN)
    return _TABLES[package][rest]


_TABLES = {
    "monai2d": _MONAI,
    "monai3d": _MONAI,
    "ultralytics": _ULTRALYTICS,
    "doctr": _DOCTR,
    "torchvision": _TORCHVISION,
    "efficientnet_pytorch": {
        "efficientnet-b0": _B0,
        "efficientnet-b1": Count(0, "2+3+3+4+4+5+2 inverted residuals = 23, each with an SE", 23),
    },
    "facenet": {
        "InceptionResnetV1": Count(23, "5+10+6 Inception-ResNet blocks + 2 reductions = 23"),
        "PNet": Count(3, "3 convolutions in front of the two that make the outputs"),
        "RNet": Count(3, "3 convolutions"),
        "ONet": Count(4, "4 convolutions"),
    },
}
