"""Put SEs into a network, see that nothing else changed, look at them, and take some out again.

    python examples/retrofit.py resnet18 --size 64

Runs offline on a CPU in seconds; with `--pretrained` it starts from timm's weights.
"""

from __future__ import annotations

import argparse

import timm
import torch

import se_surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="resnet18", help="a timm model (default: %(default)s)")
    parser.add_argument("--r", type=int, default=16, help="reduction ratio (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the images (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights")
    args = parser.parse_args()

    model = timm.create_model(args.name, pretrained=args.pretrained).eval()
    images = torch.randn(2, 3, args.size, args.size)
    size = (3, args.size, args.size)
    with torch.no_grad():
        before = model(images)

    print(se_surgery.plan_se(model, r=args.r, example_input=size))
    se_surgery.add_se(model, r=args.r, example_input=size)
    with torch.no_grad():
        print(f"\nOutputs bit-equal to those before: {torch.equal(model(images), before)}")
    print(f"\n{se_surgery.verify(model, size, thorough=False)}")

    se_surgery.strip_se(model, stages=-1, example_input=size)
    left = se_surgery.find_se(model, size)
    print(f"\nWithout those of the last stage: {len(left)} SEs, {sum(site.params for site in left):,} parameters")


if __name__ == "__main__":
    main()
