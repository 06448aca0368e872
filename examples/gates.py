"""Look at the gates of a small SE network, and take the SEs out that are not worth their parameters.

    python examples/gates.py --epochs 4

Trains a network with SEs on scikit-learn's handwritten digits (1,797 images of 8 x 8), prints what its gates do on
images it was not trained on, and compares: all SEs, those of the last stage stripped, all folded, and the best set for
half of the SEs' parameters. Which are worth it is decided on images apart from those that the table is of. Runs on a
CPU in seconds.
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import se_surgery

SIZE = (1, 8, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the SEs' parameters (default: %(default)s)")
    parser.add_argument("--plot", help="image file for the gates by class")
    args = parser.parse_args()
    torch.manual_seed(0)

    training, choosing, testing = digits()
    model = se_surgery.add_se(timm.create_model("resnet20_cifar", num_classes=10, in_chans=1), r=4, example_input=SIZE)
    train(model, training, args.epochs)

    found = se_surgery.excitations(model, choosing, classes=10)
    print(found.table())
    if args.plot:
        print(f"Figure: {found.plot(args.plot)}")

    print("\n" + f"{'':<24}{'parameters':>12}{'of SEs':>8}{'right':>8}")
    report("all SEs", model, testing)
    report("last stage stripped", se_surgery.strip_se(model, stages=-1, inplace=False, example_input=SIZE), testing)
    report("all stripped", se_surgery.strip_se(model, inplace=False, example_input=SIZE), testing)
    report("all folded", se_surgery.strip_se(model, fold=found, inplace=False, example_input=SIZE), testing)
    chosen = copy.deepcopy(model)
    worth = se_surgery.tradeoff(chosen, choosing, budget=args.budget)
    report(f"tradeoff, {args.budget:.0%} may stay", chosen, testing)
    print("\n" + worth.table())


def digits() -> tuple[DataLoader, DataLoader, DataLoader]:
    """Digits to train on, to choose SEs with, and to test on: half, a quarter, a quarter."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    half, quarter = len(x) // 2, len(x) // 4
    parts = order.split([half, quarter, len(x) - half - quarter])
    sets = [TensorDataset(x[part], torch.tensor(data.target)[part]) for part in parts]
    return DataLoader(sets[0], 64, shuffle=True), DataLoader(sets[1], 256), DataLoader(sets[2], 256)


def train(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Train all parameters with AdamW under a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def report(what: str, model: nn.Module, loader: DataLoader) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    in_ses = sum(site.params for site in se_surgery.find_se(model, SIZE))
    print(f"{what:<24}{parameters:>12,}{in_ses:>8,}{right(model, loader):>8.1%}")


@torch.no_grad()
def right(model: nn.Module, loader: DataLoader) -> float:
    """The share of the images that a model classifies right."""
    hits: list[Tensor] = [(model(x).argmax(1) == y).float() for x, y in loader]
    return float(torch.cat(hits).mean())


if __name__ == "__main__":
    main()
