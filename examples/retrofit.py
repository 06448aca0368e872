"""Put SEs into a network, see that nothing else changed, and see that they learn from the first step on.

    python examples/retrofit.py mobilenetv2_050 --size 64

Runs offline on a CPU in seconds; with `--pretrained` it starts from timm's weights.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

import se_surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="mobilenetv2_050", help="a timm model (default: %(default)s)")
    parser.add_argument("--r", type=int, default=16, help="reduction ratio (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the images (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights")
    args = parser.parse_args()

    model = timm.create_model(args.name, pretrained=args.pretrained).eval()
    images, size = torch.randn(4, 3, args.size, args.size), (3, args.size, args.size)
    with torch.no_grad():
        before = model(images)

    se_surgery.add_se(model, r=args.r, example_input=size)
    sites = se_surgery.find_se(model, size)
    print(f"{len(sites)} SEs put in, {sum(site.params for site in sites):,} parameters")
    with torch.no_grad():
        print(f"Outputs bit-equal to those before: {torch.equal(model(images), before)}")
    print(f"\n{se_surgery.verify(model, size, thorough=False)}")

    train_ses(model, sites, images)
    with torch.no_grad():
        change = (model(images) - before).abs().max() / before.abs().max()
    gates = [model.get_submodule(site.path).fc2.weight for site in sites]
    moved = sum(bool(gate.any()) for gate in gates)
    print(f"\nAfter one step, on the SEs alone: {moved} of {len(gates)} gates moved, outputs changed by {change:.1%}")


def train_ses(model: nn.Module, sites: list[se_surgery.SESite], images: torch.Tensor) -> None:
    """One step of SGD with the base as it is: in evaluation mode, so that its running statistics stay, too."""
    model.requires_grad_(False)
    parameters = [p for site in sites for p in model.get_submodule(site.path).requires_grad_(True).parameters()]
    labels = torch.arange(len(images)) % model.num_classes
    nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(parameters, lr=0.1).step()


if __name__ == "__main__":
    main()
