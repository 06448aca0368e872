"""What the epochs of a run came to: a table and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def write(file: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """The epochs as CSV."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Losses and accuracy as curves, with a line where the base begins to learn."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, names in zip(axes, (("train_loss", "loss"), ("top1",)), strict=True):
        for name in names:
            axis.plot(range(1, len(rows) + 1), [row[name] for row in rows], marker="o", label=name)
        axis.axvline(0.5 + sum(row["phase"] == "SEs" for row in rows), color="gray", linestyle=":")
        axis.set(xlabel="epoch")
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
