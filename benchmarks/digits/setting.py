"""Setting: every number that the results depend on, in one place.

In: nothing. Out: a frozen `Setting`, and its short name, by which rows know whether they were made with it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Setting:
    """What the studies are made with.

    Attributes:
        units: Blocks in each stage.
        width: Inner channels of the first stage's blocks; their outputs have four times as many.
        stem: Channels of the stem.
        train_images: Images to train on.
        choice_images: Images to choose SEs by; all others are for the test.
        shift: Pixels, at most, by which an image is moved in each direction.
        noise: Standard deviation of what is added to every pixel, in those of the pixels.
        batch: Images in a batch.
        rate: Highest learning rate, from scratch.
        tune_rate: Highest learning rate, in fine-tuning.
        decay: Weight decay, AdamW's.
        gates_steps: Steps of the networks whose gates are looked at.
        base_steps: Steps of a base that is to be retrofitted.
        tune_steps: Steps of fine-tuning, and of the networks from scratch that are compared with one another.
    """

    units: tuple[int, ...] = (2, 2, 2)
    width: int = 8
    stem: int = 16
    train_images: int = 300
    choice_images: int = 300
    shift: int = 1
    noise: float = 0.3
    batch: int = 32
    rate: float = 0.02
    tune_rate: float = 0.002
    decay: float = 0.05
    gates_steps: int = 320
    base_steps: int = 640
    tune_steps: int = 120

    @property
    def name(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]
