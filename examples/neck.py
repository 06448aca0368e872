"""Use a network with SEs as the backbone of a detector: its maps of every stride go into a feature pyramid.

    python examples/neck.py resnet18 --size 128

Runs offline on a CPU in seconds; with `--pretrained` backbone and base have timm's weights.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import se_surgery


class Pyramid(nn.Module):
    """A feature pyramid (arXiv 1612.03144): every level gets what the coarser ones know, and the same channels."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse become as many maps of `width` channels."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for fine in reversed(range(len(levels) - 1)):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], size=levels[fine].shape[-2:])
        return [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="resnet18", help="a ResNet of timm (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights")
    args = parser.parse_args()

    # timm's fresh ResNets multiply every residual branch by zero, and then no SE on it could learn.
    arguments = {"features_only": True, "out_indices": (-3, -2, -1), "zero_init_last": False}
    base = timm.create_model(args.base, pretrained=args.pretrained, **arguments).eval()
    backbone = timm.create_model(f"se_{args.base}", pretrained=args.pretrained, **arguments).eval()
    backbone.load_state_dict(base.state_dict(), strict=False)

    images = torch.randn(2, 3, args.size, args.size)
    maps = backbone(images)
    same = all(torch.equal(a, b) for a, b in zip(maps, base(images), strict=True))
    print(f"Features bit-equal to the base's at the start: {same}\n")

    neck = Pyramid(backbone.feature_info.channels(), width=64)
    levels = neck(maps)
    print("stride  backbone               pyramid")
    for reduction, x, level in zip(backbone.feature_info.reduction(), maps, levels, strict=True):
        print(f"{reduction:>6}  {list(x.shape)!s:<22} {list(level.shape)}")

    sum(level.square().mean() for level in levels).backward()
    ses = {path: module for path, module in backbone.named_modules() if isinstance(module, se_surgery.SqueezeExcite)}
    learning = sum(bool(se.fc2.weight.grad.any()) for se in ses.values())
    print(f"\nGradients reach {learning} of {len(ses)} SEs: {', '.join(ses)}")


if __name__ == "__main__":
    main()
