"""The images that finetune.py trains on: timm's data sets and loaders, or digits that need no download."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn


class Digits(torch.utils.data.Dataset):
    """1,797 digits of 8 x 8 pixels that come with scikit-learn: 1,437 to train on, and 360."""

    def __init__(self, training: bool) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.RandomState(0).permutation(len(images))
        order = order[:1437] if training else order[1437:]
        self.images, self.labels = (images[order].reshape(-1, 8, 8) / 16 * 255).astype(np.uint8), labels[order]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def data_sets(args: argparse.Namespace) -> tuple[list[Any], int, int]:
    """The parts to train and to evaluate on, the number of classes, and the channels of an image."""
    if not args.data and not args.dataset:
        return [Digits(True), Digits(False)], 10, 1
    parts = [
        create_dataset(args.dataset, root=args.data, split=split, is_training=split == args.splits[0])
        for split in args.splits
    ]
    folders = {str(getattr(part.reader, "root", number)) for number, part in enumerate(parts)}
    if not args.dataset and len(folders) < len(parts):  # timm takes the whole folder for a part that it does not find
        sys.exit(f"{args.data} has no folders of its own for {' and '.join(args.splits)}. Name those it has: --splits.")
    classes = args.num_classes or len(getattr(parts[0].reader, "class_to_idx", ()))
    return parts, classes or sys.exit("The data set does not say how many classes it has: give --num-classes."), 3


def loaders(args: argparse.Namespace, parts: list[Any], model: nn.Module, channels: int) -> list[Any]:
    size = args.size or model.pretrained_cfg["input_size"][-1]
    gray = {"mean": (0.5,), "std": (0.5,)} if channels == 1 else {}
    config = resolve_data_config({"input_size": (channels, size, size), **gray}, model=model)
    config = {key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    common = {"batch_size": args.batch_size, "num_workers": args.workers, "use_prefetcher": False, **config}
    train = create_loader(
        parts[0], is_training=True, no_aug=args.no_aug or channels == 1, auto_augment=args.auto_augment, **common
    )
    return [train, create_loader(parts[1], **common)]
