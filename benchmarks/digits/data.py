"""Data: scikit-learn's handwritten digits, made harder, and split by a seed.

In: a seed. Out: images and labels to train on, to choose by and to test on; the same for every arm of that seed.

As they are, the 1,797 images of 8 x 8 pixels are too easy: every network gets nearly all of them right. So each is
moved by up to a pixel and has noise added: anew in every batch of training, once and for all in the other two parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from .setting import Setting

CLASSES = 10
SHAPE = (1, 8, 8)
Part = tuple[Tensor, Tensor]
# Images that are looked at together where nothing is learned.
_TOGETHER = 256


@functools.cache
def digits() -> Part:
    """All images, of mean 0 and standard deviation 1, (1797, 1, 8, 8), and their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(found.target)


class Digits:
    """One seed's images.

    Attributes:
        train: Images to train on, and their labels.
        measure: The same images, moved and with noise, to measure gates on.
        choice: Images to choose SEs by, likewise.
        test: Images to test on, likewise.
    """

    def __init__(self, seed: int, setting: Setting) -> None:
        self.seed, self.setting = seed, setting
        images, labels = digits()
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=draw)
        ends = (setting.train_images, setting.train_images + setting.choice_images)
        train, choice, test = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
        self.train = (images[train], labels[train])
        self.measure, self.choice, self.test = (
            (self._distorted(images[part], draw), labels[part]) for part in (train, choice, test)
        )

    def batches(self, steps: int, phase: int = 0) -> Iterator[Part]:
        """Random batches of the images to train on; another phase of a training has others."""
        draw = torch.Generator().manual_seed(1000 * (phase + 1) + self.seed)
        images, labels = self.train
        for _ in range(steps):
            taken = torch.randint(len(images), (self.setting.batch,), generator=draw)
            yield self._distorted(images[taken], draw), labels[taken]

    def _distorted(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Images moved, what comes in from outside being paper, and with noise."""
        shift, side = self.setting.shift, images.shape[-1]
        paper = float(digits()[0].min())
        wide = functional.pad(images, (shift,) * 4, value=paper)
        down, right = torch.randint(2 * shift + 1, (2, len(images), 1), generator=draw) + torch.arange(side)
        moved = wide[torch.arange(len(images))[:, None, None], 0, down[:, :, None], right[:, None, :]][:, None]
        return moved + self.setting.noise * torch.randn(moved.shape, generator=draw)


def loader(part: Part) -> list[Part]:
    """A part as batches, in order."""
    return list(zip(*(tensor.split(_TOGETHER) for tensor in part), strict=True))
