"""Scores: how good a model is on a data set, and scores kept in a file so that a long job can go on.

In: a model and a loader, or a user's own function. Out: numbers; larger is better.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, SurgeryError
from .feed import Batch, batches, evaluating, run
from .shards import attempt, gathered, rank, total

Evaluate = Callable[[nn.Module], float]
_FORMAT = "se_surgery.scores.1"


def accuracy(model: nn.Module, loader: Any) -> float:
    """Share of the images whose label has the largest score, over the parts of all processes.

    Raises:
        DataError: The loader gives no images or no labels, or labels that the model has no scores for.
    """

    def part() -> Tensor:
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches(loader, model):
            scores, labels = class_scores(model, batch)
            hits = (scores.argmax(1).cpu() == labels).sum()
            counts += torch.tensor([float(hits), float(len(labels))], dtype=torch.float64)
        return counts

    with evaluating(model):
        hits, seen = total(attempt(part)).tolist()
    if not seen:
        raise DataError("The loader gave no images. Give one that does, and can be gone through several times.")
    return float(hits / seen)


def class_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """What a model puts out for a batch, (B, K), and the labels, (B,), each of which has a score.

    Raises:
        DataError: The batch has no labels or others than the model, or the model does not put out class scores.
    """
    if batch.labels is None:
        raise DataError(f"The loader gives no labels (batch {batch.number} has none). Give pairs of images and labels.")
    scores = run(model, batch)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise DataError(
            f"{type(model).__name__} returns no class scores of shape (B, K), by which its images could be scored. "
            f"Give a classifier; tradeoff takes a score of your own as evaluate."
        )
    if int(batch.labels.max()) >= scores.shape[1]:
        raise DataError(
            f"Batch {batch.number} has the label {int(batch.labels.max())}, and the model has scores for "
            f"{scores.shape[1]} classes. Give the data that it was trained for."
        )
    return scores, batch.labels


def checked(score: Any) -> float:
    """A score as a number.

    Raises:
        DataError: It is none.
    """
    value = score.item() if isinstance(score, Tensor) and score.numel() == 1 else score
    if not _is_score(value):
        raise DataError(f"evaluate returned {score!r}, which is no score. Return a finite number; larger is better.")
    return float(value)


def _is_score(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_scores(found: Any) -> bool:
    return isinstance(found, Mapping) and all(map(_is_score, found.values()))


class Scores:
    """Scores by name, each computed once, and with a file not again when the job is started again.

    Args:
        path: The file; None keeps them in memory only.
        model: The model they are of. A file of another model, or other weights, is refused.

    Raises:
        SurgeryError: The file cannot be read, or is of another model.
    """

    def __init__(self, path: str | os.PathLike[str] | None, model: nn.Module) -> None:
        self.path = None if path is None else Path(path)
        self.model = digest(model) if path is not None else ""
        # Of several processes the first one's count: all of them have to do the same.
        self.known: dict[str, float]
        self.known, self.data = gathered(attempt(self._read))[0]

    def bind(self, data: str) -> None:
        """Say what data the scores are of, in a few words.

        Raises:
            SurgeryError: The file has scores of other data.
        """
        if self.data not in ("", data):
            raise SurgeryError(
                f"{str(self.path)!r} holds scores on other data: {self.data}, and these are {data}. Name another file."
            )
        self.data = data

    def of(self, name: str, compute: Callable[[], Any]) -> float:
        """The score of that name, computed where it is not known yet."""
        if name not in self.known:
            self.known[name] = gathered(attempt(lambda: checked(compute())))[0]
            self._write()
        return self.known[name]

    def _read(self) -> tuple[dict[str, float], str]:
        if self.path is None or not self.path.exists():
            return {}, ""
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
            is_one = isinstance(told, dict) and told.get("format") == _FORMAT and _are_scores(told.get("scores"))
        except (OSError, ValueError) as error:
            raise SurgeryError(f"{str(self.path)!r} cannot be read ({error}). Name another file to resume.") from error
        if not is_one:
            raise SurgeryError(f"{str(self.path)!r} holds no scores. Name another file to resume.")
        if told.get("model") != self.model:
            raise SurgeryError(
                f"{str(self.path)!r} holds the scores of another model, or of other weights. Name another file."
            )
        return {str(name): float(score) for name, score in told["scores"].items()}, str(told.get("data", ""))

    def _write(self) -> None:
        if self.path is None or rank() > 0:
            return
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        told = {"format": _FORMAT, "model": self.model, "data": self.data, "scores": self.known}
        text = json.dumps(told, indent=1)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, self.path)
        except OSError as error:
            raise SurgeryError(f"{str(self.path)!r} cannot be written ({error}). Name a file that can.") from error


def digest(model: nn.Module) -> str:
    """A hash of all names and values of a model."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def replaced(se: nn.Module, gate: Tensor | None) -> Iterator[None]:
    """Let an SE return what it is given, times a gate in its map's rank, as if it were stripped, or folded."""

    def forward(x: Tensor) -> Tensor:
        return x if gate is None else x * gate.to(x)

    own = se.__dict__.get("forward")
    se.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del se.__dict__["forward"]
        else:
            se.__dict__["forward"] = own
