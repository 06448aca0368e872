"""Runtime: everything that a pickle of an operated model names. This module never moves, and no name in it goes.

In: nothing. Out: the classes of an operated model's own modules and records, and the functions that its generated
forwards call, each by its name. Their code is where it belongs; what is `durable` says that it is at home here, so that
a pickle names this module and not the file that holds the code today.
"""

from __future__ import annotations

from .backbones.bn_inception import BNInception, Inception
from .backbones.resnet_cifar import CifarResNet
from .backbones.shufflenet import ChannelShuffle, ShuffleNet, ShuffleUnit
from .reading.answers import must_be, must_count
from .records import Edge, Implant, children_of
from .se.excite import Attention, SqueezeExcite
from .se.tail import tail
from .surgery.generated import Code, recomputed, refuse_argument, refuse_change, refuse_other, refuse_patch, revive
from .surgery.gone import Gone

__all__ = [
    "Attention",
    "BNInception",
    "ChannelShuffle",
    "CifarResNet",
    "Code",
    "Edge",
    "Gone",
    "Implant",
    "Inception",
    "ShuffleNet",
    "ShuffleUnit",
    "SqueezeExcite",
    "children_of",
    "must_be",
    "must_count",
    "recomputed",
    "refuse_argument",
    "refuse_change",
    "refuse_other",
    "refuse_patch",
    "revive",
    "tail",
]
