"""Plan every placement of a network and compare what each would cost, without changing or even filling the network.

    python examples/plan.py resnet50 --r 16

Runs offline on a CPU in seconds: the network is made on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import argparse

import timm
import torch

import se_surgery

COLUMNS = "{:<10} {:>4}  {:>12} {:>8}  {:>14}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="resnet50", help="a timm model (default: %(default)s)")
    parser.add_argument("--r", type=int, default=16, help="reduction ratio (default: %(default)s)")
    args = parser.parse_args()

    with torch.device("meta"):
        model = timm.create_model(args.name)
    before = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.name}: {before:,} parameters; with r={args.r} each placement adds\n")
    print(COLUMNS.format("placement", "SEs", "parameters", "", "multiply-adds", "channels"))

    # `places` has the number of units with a place, for every placement there is.
    for placement in se_surgery.plan_se(model).places:
        plan = se_surgery.plan_se(model, placement, args.r)
        channels = ", ".join(str(channels) for channels in dict.fromkeys(site.channels for site in plan.sites))
        share = plan.params_added / before
        costs = (f"{plan.params_added:,}", f"{share:+.2%}", f"{plan.macs_added:,}", channels)
        # Every unit without a site is in `plan.skipped`; print(plan) has them all.
        nothing = ("", "", "", plan.skipped[0].reason if plan.skipped else "")
        print(COLUMNS.format(placement, len(plan.sites), *(costs if plan.sites else nothing)))


if __name__ == "__main__":
    main()
