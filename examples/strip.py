"""Take SEs out: timm's own from a network's last stage, and those that se-surgery put in, to the last bit.

    python examples/strip.py --size 64

The paper removes the SEs of the last stage for less than 0.1 % of top-5 accuracy (section 6.5): they have most of the
parameters. Runs offline on a CPU in seconds; with `--pretrained` it starts from timm's weights.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

import se_surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", default="seresnet50", help="a timm model with SEs (default: %(default)s)")
    parser.add_argument("--plain", default="mobilenetv2_050", help="a timm model without (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the images (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights")
    args = parser.parse_args()
    size = (3, args.size, args.size)

    strip_last_stage(timm.create_model(args.native, pretrained=args.pretrained), args.native, size)
    undo(timm.create_model(args.plain, pretrained=args.pretrained).eval(), args.plain, size)


def strip_last_stage(model: nn.Module, name: str, size: tuple[int, ...]) -> None:
    """Take a network's own SEs out of its last stage."""
    before = se_surgery.find_se(model, size)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {sum(s.params for s in before):,} of them in {len(before)} SEs")

    se_surgery.strip_se(model, stages=-1, example_input=size)

    after = se_surgery.find_se(model, size)
    left = sum(p.numel() for p in model.parameters())
    print(
        f"without the last stage's: {left:,} parameters, {sum(s.params for s in after):,} of them in {len(after)} SEs"
    )
    print(f"{len(before) - len(after)} SEs less are {parameters - left:,} parameters less, {1 - left / parameters:.2%}")


def undo(model: nn.Module, name: str, size: tuple[int, ...]) -> None:
    """Put SEs in, let them learn something, and take back what was done."""
    images = torch.randn(2, *size)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        outputs = model(images)

    se_surgery.add_se(model, example_input=size)
    sites = se_surgery.find_se(model, size)
    for site in sites:
        nn.init.normal_(model.get_submodule(site.path).fc2.weight)
    with torch.no_grad():
        change = (model(images) - outputs).abs().max() / outputs.abs().max()
    print(f"\n{name} with {len(sites)} SEs that gate: its outputs change by {change:.1%}")

    se_surgery.strip_se(model, origin="se_surgery", example_input=size)
    left = model.state_dict()
    same_values = left.keys() == values.keys() and all(torch.equal(left[key], values[key]) for key in values)
    same_classes = [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        same_outputs = torch.equal(model(images), outputs)
    print(f"Stripped: outputs bit-equal {same_outputs}, keys and values {same_values}, classes {same_classes}")


if __name__ == "__main__":
    main()
