"""Backbones of the paper and its write-ups that neither timm nor torchvision has, as models of timm's kind.

In: timm's arguments. Out: networks that `timm.create_model` builds by name. Importing this registers the names and
builds nothing. There are no weights for them.
"""

from . import bn_inception, resnet_cifar, shufflenet

__all__ = ["bn_inception", "resnet_cifar", "shufflenet"]
