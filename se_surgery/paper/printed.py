"""What is printed: the figures of Hu et al., *Squeeze-and-Excitation Networks* (arXiv 1709.01507), as strings.

In: nothing. Out: tables. A string keeps the digits that were printed, and so the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A network of tables 2 and 3, as a pair of figures each: of the base, and with SE.

    Attributes:
        title: What the paper calls it.
        base: The base's name here.
        gflops: Billions of multiply-adds.
        top1: Top-1 error in percent.
        top5: Top-5 error in percent.
        parameters: Millions of parameters, where they are printed.
        strided_first: Whether the paper strides the first 1x1 convolution of a unit and the base here the 3x3 one.
        note: Why a figure here is another one, where the stride is not the reason.
    """

    title: str
    base: str
    gflops: tuple[str, str]
    top1: tuple[str, str]
    top5: tuple[str, str]
    parameters: tuple[str, str] | None = None
    strided_first: bool = False
    note: str = ""


_OTHER_SIZE = (
    "timm's network is larger than the one that the paper counted, which it does not describe. At 298 x 298, where the "
    "maps of all stages are a position smaller on each side, timm's takes 11.73 G and SE adds 20.2 M."
)
_ROUNDING = (
    "the base has the paper's digits, and with what SE adds it comes to {total:.4f} G, which rounds to 2.03. The unit "
    "of the paper's figures, 10 M, is more than five times what SE adds: their difference cannot say more."
)
_NOMINAL = (
    "ShuffleNet's own paper has 137 M for this network (table 1, g = 3), as is counted here; 140 M stands for all of "
    "its networks of this width."
)

NETWORKS = (
    Network("ResNet-50", "resnet50", ("3.86", "3.87"), ("24.80", "23.29"), ("7.48", "6.62"), strided_first=True),
    Network("ResNet-101", "resnet101", ("7.58", "7.60"), ("23.17", "22.38"), ("6.52", "6.07"), strided_first=True),
    Network("ResNet-152", "resnet152", ("11.30", "11.32"), ("22.42", "21.57"), ("6.34", "5.73"), strided_first=True),
    Network("ResNeXt-50 32x4d", "resnext50_32x4d", ("4.24", "4.25"), ("22.11", "21.10"), ("5.90", "5.49")),
    Network("ResNeXt-101 32x4d", "resnext101_32x4d", ("7.99", "8.00"), ("21.18", "20.70"), ("5.57", "5.01")),
    Network("VGG-16 with BN", "vgg16_bn", ("15.47", "15.48"), ("27.02", "25.22"), ("8.81", "7.70")),
    Network("BN-Inception", "bn_inception", ("2.03", "2.04"), ("25.38", "24.23"), ("7.89", "7.14"), note=_ROUNDING),
    Network(
        "Inception-ResNet-v2",
        "inception_resnet_v2",
        ("11.75", "11.76"),
        ("20.37", "19.80"),
        ("5.21", "4.79"),
        note=_OTHER_SIZE,
    ),
    Network("MobileNet 1.0", "mobilenetv1_100", ("0.569", "0.572"), ("29.1", "25.3"), ("10.1", "7.9"), ("4.2", "4.7")),
    Network(
        "ShuffleNet 1x, g = 3",
        "shufflenet_g3",
        ("0.140", "0.142"),
        ("32.6", "31.0"),
        ("12.5", "11.1"),
        ("1.8", "2.4"),
        note=_NOMINAL,
    ),
)


@dataclass(frozen=True)
class Variant:
    """A variant of SE-ResNet-50.

    Attributes:
        title: What it is called.
        recipe: The name of its recipe in `registry/`, or of the base.
        parameters: Millions of parameters, where they are printed.
        top1: Top-1 error in percent, where one is printed.
        top5: Top-5 error in percent, where one is printed.
    """

    title: str
    recipe: str
    parameters: str = ""
    top1: str = ""
    top5: str = ""


TABLE_10 = (
    Variant("4", "se_resnet50_r4", "35.7", "22.25", "6.09"),
    Variant("8", "se_resnet50_r8", "30.7", "22.26", "5.99"),
    Variant("16", "se_resnet50_r16", "28.1", "22.28", "6.03"),
    Variant("32", "se_resnet50_r32", "26.9", "22.72", "6.20"),
    Variant("base", "resnet50", "25.6", "23.30", "6.55"),
)
# Tables 13 and 14; where SEs are put into Inception modules and plain networks is in sections 3.3 and 6.
PLACEMENTS = (
    Variant("standard", "se_resnet50_standard", "28.1", "22.28"),
    Variant("pre", "se_resnet50_pre", "", "22.23"),
    Variant("post", "se_resnet50_post", "", "22.78"),
    Variant("identity", "se_resnet50_identity", "", "22.20"),
    Variant("inner", "se_resnet50_inner", "25.8", "22.48"),
    Variant("inception", "se_bn_inception_paper"),
    Variant("standard, plain network", "se_vgg16_bn_paper"),
    Variant("standard, MobileNet", "se_mobilenetv1_100_paper"),
    Variant("standard, ShuffleNet", "se_shufflenet_g3_paper"),
    Variant("base", "resnet50", "25.6", "23.30"),
)
WHERE = {
    "standard": "on the residual branch, before the addition",
    "pre": "before the residual branch's first layer",
    "post": "after the addition and the ReLU that follows it",
    "identity": "on the shortcut, in parallel with the residual branch",
    "inner": "right after the unit's 3x3 convolution (the paper's SE_3x3)",
    "inception": "after the concatenation of an Inception module",
    "standard, plain network": "after every convolution with its norm and activation",
    "standard, MobileNet": "after the pointwise convolution of every depthwise-separable block",
    "standard, ShuffleNet": "on the branch, before the concatenation or the addition",
    "base": "",
}
VARIANTS = (
    Variant("squeeze: max", "se_resnet50_max", "", "22.57", "6.09"),
    Variant("squeeze: average", "se_resnet50_r16", "", "22.28", "6.03"),
    Variant("gate: ReLU", "se_resnet50_relu", "", "23.47", "6.98"),
    Variant("gate: tanh", "se_resnet50_tanh", "", "23.00", "6.38"),
    Variant("gate: sigmoid", "se_resnet50_r16", "", "22.28", "6.03"),
)
# Top-1 and top-5 error in percent of SENet-154, by the size of the images.
SENET_154 = (
    ("at 224 pixels", "18.68", "4.47"),
    ("at 320", "17.28", "3.79"),
    ("trained and tested at 320", "16.88", "3.58"),
)
# Table 1: hidden and outer width of each stage's units, and how many there are.
WIDTHS = "[16, 256] x3, [32, 512] x4, [64, 1024] x6, [128, 2048] x3"
