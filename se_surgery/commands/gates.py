"""The commands `se-surgery excitations` and `tradeoff`: what a model's SEs do on a data set, and what they are worth.

In: a model by name or folder, and images by folder or name. Out: tables (or JSON) on stdout; figures, statistics and a
folder with the model where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from ..errors import DataError, OptionError
from ..files.replace import check_directory
from ..gates.excited import Gates, excitations
from ..gates.judge import tradeoff
from ..gates.pictures import Pictures, open_pictures
from ..gates.worth import Tradeoff
from ..showing.figures import check_format
from . import options as cli
from .app import app, check_file, examples, open_model, progress, say, write


@app.command(
    "excitations",
    epilog=examples(
        "se-surgery excitations seresnet50 imagenet --pretrained --plot gates.png",
        "se-surgery excitations my_model torch/cifar10 --root data --images 2000 --save gates.safetensors",
    ),
)
@cli.takes_data
def excitations_(
    model: cli.Model,
    data: cli.Data,
    plot: cli.Figure = None,
    save: cli.GatesFile = None,
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    as_json: cli.Json = False,
    **options: Any,
) -> None:
    """Measure the gates of a model's SEs over a data set: mean, variance, saturation, by class."""
    _check_files(plot, save)
    patient = open_model(model, pretrained).model
    shown = shown_pictures(patient, data, size, **options)
    found = excitations(patient, shown, shown.pictures.classes or None, example_input=size)
    where = shown.pictures.where
    written = [call(path) for call, path in ((found.plot, plot), (found.save, save)) if path is not None]
    plain = {"data": where, "classes": list(found.names), "sites": [_plain(gates) for gates in found]}
    text = "\n\n".join([found.table(), *(f"Written to {path}." for path in written)])
    say(as_json, {**plain, "skipped": dict(found.skipped)}, f"{model} on {where}\n\n{text}")


@app.command(
    "tradeoff",
    epilog=examples(
        "se-surgery tradeoff seresnet50 imagenet --pretrained --images 5000 --resume scores.json",
        "se-surgery tradeoff seresnet50 imagenet --pretrained --budget 0.5 -o half_of_its_ses",
    ),
)
@cli.takes_data
def tradeoff_(
    model: cli.Model,
    data: cli.Data,
    budget: cli.Budget = None,
    output: cli.TakenOutput = None,
    plot: cli.Figure = None,
    resume: cli.Resume = None,
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    overwrite: cli.Overwrite = False,
    as_json: cli.Json = False,
    **options: Any,
) -> None:
    """Rank a model's SEs by the accuracy that each brings; with a budget, take out the set that loses least."""
    _check_files(plot, resume)
    if output is not None:
        if budget is None:
            raise OptionError("--output is for the model without some SEs. Say how many parameters stay: --budget.")
        check_directory(output, overwrite)
    patient = open_model(model, pretrained)
    pictures = shown_pictures(patient.model, data, size, **options).pictures
    _check_labels(pictures, patient.model)
    found = tradeoff(patient.model, pictures, budget=budget, resume=resume, example_input=size)
    written = [] if plot is None else [found.plot(plot)]
    if output is not None:
        patient.model.cpu()
        write(patient, output, overwrite, size)
        written.append(output)
    text = "\n\n".join([found.table(), *(f"Written to {path}." for path in written)])
    say(as_json, {"data": pictures.where, **_plain_tradeoff(found)}, f"{model} on {pictures.where}\n\n{text}")


def shown_pictures(
    model: nn.Module,
    data: str,
    size: Any,
    device: str,
    **options: Any,
) -> ShownPictures:
    """Open a data set for a model, and send that where it is to run.

    Args:
        model: The model.
        data: A folder, or timm's name of a data set.
        size: The size of the images, or None.
        device: Where the model is to run.
        options: The others of `options.takes_data`.

    Raises:
        SurgeryError: The data or the device is of no use.
    """
    with progress(f"Opening {data}"):
        pictures = open_pictures(model, data, example_input=size, **options)
        try:
            model.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:  # an unknown device, or a build of torch without it
            told = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise OptionError(f"device={device!r} cannot be used ({told}). Take another.") from error
    return ShownPictures(pictures)


class ShownPictures:
    """Pictures whose going through is shown on terminals."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __iter__(self) -> Iterator[Any]:
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            yield from bar.track(self.pictures, total=len(self.pictures) or None, description="Measuring the gates")


def _check_files(plot: Path | None, other: Path | None) -> None:
    """Refuse files that could not be written when all is measured."""
    for path in (plot, other):
        if path is not None:
            check_file(path)
    if plot is not None:
        check_format(plot)


def _check_labels(pictures: Pictures, model: nn.Module) -> None:
    """Refuse data whose labels the model has no scores for before anything takes its time."""
    scores = getattr(model, "num_classes", None)
    if not pictures.has_labels:
        raise DataError(f"{pictures.where} has no classes. Put the images of each class into a folder of its own.")
    if isinstance(scores, int) and len(pictures.classes) > scores:
        raise DataError(
            f"{pictures.where} has {len(pictures.classes)} classes, and the model has scores for {scores}. Give the "
            f"data that it was trained for, or with --class-map the names of its classes."
        )


def _plain(gates: Gates) -> dict[str, Any]:
    """The gates of one SE as plain data: means over the channels, as in the table."""
    between, saturated = gates.between, gates.saturated
    return {
        **asdict(gates.site),
        "inputs": gates.count,
        "mean": float(gates.mean.mean()),
        "spread": float(gates.mean.std(correction=0)),
        "variance": float(gates.variance.mean()),
        "between": float(between.mean()) if between is not None else None,
        "saturated": float(saturated.mean()) if saturated is not None else None,
    }


def _plain_tradeoff(found: Tradeoff) -> dict[str, Any]:
    worths = [{**asdict(worth), **asdict(worth.site), "way": worth.way, "loss": worth.loss} for worth in found.ranked]
    paths = [worth.site.path for worth in found.worths]
    front = [{"freed": one.freed, "loss": one.loss, "sites": [paths[i] for i in one.members]} for one in found.front]
    return {
        "score": found.score,
        "result": found.result,
        "taken": list(found.taken),
        "sites": [{key: value for key, value in worth.items() if key != "site"} for worth in worths],
        "best_sets": front,
    }
