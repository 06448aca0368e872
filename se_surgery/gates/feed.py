"""Feed: run the batches of a loader through a model, as they are in evaluation.

In: a model and a loader. Out: `Batch`es, checked, with their images where the model is; and the model's own modes,
gradients and the random number generators as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, OptionError, PatientError, shorten
from ..planning.exam import refuse_unfit
from ..reading.maps import SIGNALS, ranks_of
from ..reading.wrappers import unwrapped
from .shards import first_times

# Under which names batches that are mappings hold their images and labels.
_IMAGES = ("image", "images", "pixel_values", "img", "input", "x")
_LABELS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class Batch:
    """A batch of a loader.

    Attributes:
        number: Its number, from 1.
        images: The images, on the model's device and in its dtype.
        labels: The class of each image, on the CPU, or None.
    """

    number: int
    images: Tensor
    labels: Tensor | None


def runnable(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, DataParallel and torch.compile.

    Raises:
        PatientError: It is no model, otherwise wrapped, or has no values to run with.
    """
    model = unwrapped(model)
    refuse_unfit(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise PatientError("The model is on the meta device and cannot be run. Load its weights first.")
    return model


def batches(loader: Any, like: nn.Module, classes: int | None = None) -> Iterator[Batch]:
    """The batches of a loader, checked one by one.

    Args:
        loader: Gives images, `(images, labels)`, or mappings with names such as `image` and `label`.
        like: The model that they are for.
        classes: Number of classes; None for any.

    Raises:
        DataError: The loader gives something else, values that are not finite, or labels out of range.
    """
    reference = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    # Audio comes as (B, L), too.
    least = 2 if ranks_of(like) == SIGNALS else 3
    seen, labelled = 0, None
    for number, given in enumerate(_iterated(loader), 1):
        images, labels = _parted(given, number, least)
        own = first_times(loader, seen, len(images))
        seen += len(images)
        images, labels = images[:own], labels if labels is None else labels[:own]
        if labelled is not None and labelled is not (labels is not None):
            raise DataError(f"Batch {number} {'has no' if labelled else 'has'} labels, unlike those before. Give all.")
        labelled = labels is not None
        _check(images, labels, number, classes)
        if own:
            dtype = reference.dtype if images.is_floating_point() else None
            yield Batch(number, images.to(device=reference.device, dtype=dtype), labels)


def run(model: nn.Module, batch: Batch) -> Any:
    """What a model puts out for a batch.

    Raises:
        DataError: It does not run on such images.
    """
    try:
        return model(batch.images)
    except RuntimeError as error:  # what torch raises for shapes, types and memory
        raise DataError(
            f"{type(model).__name__} does not run on batch {batch.number} of shape {tuple(batch.images.shape)}, "
            f"{batch.images.dtype} ({error}). Give images of a size, type and number that it takes."
        ) from error


def _iterated(loader: Any) -> Iterable[Any]:
    if isinstance(loader, (Tensor, str, Mapping)) or not isinstance(loader, Iterable):
        raise DataError(
            f"loader is a {type(loader).__name__}, which gives no batches. "
            f"Give a DataLoader, or a list of batches: images, or pairs of images and labels."
        )
    return loader


def _parted(given: Any, number: int, least: int) -> tuple[Tensor, Tensor | None]:
    """The images and labels of what a loader gave; images have so many axes at least."""
    images, labels = given, None
    if isinstance(given, Mapping):
        images = next((given[name] for name in _IMAGES if name in given), None)
        labels = next((given[name] for name in _LABELS if name in given), None)
    elif isinstance(given, Sequence) and not isinstance(given, str) and given:
        images, labels = given[0], given[1] if len(given) > 1 else None
    if not isinstance(images, Tensor) or images.dim() < least:
        what = given if images is None else images
        shown = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(what).__name__
        raise DataError(
            f"Batch {number} is {shown}, in which no images are. Give images of shape (B, C, H, W) or signals of shape "
            f"(B, C, L), or pairs of these and labels."
        )
    if isinstance(labels, int) or (isinstance(labels, Tensor) and labels.dim() == 0):
        raise DataError(
            f"Batch {number} is no batch but one image, of shape {tuple(images.shape)}, and its label. "
            f"Give a DataLoader of the data set."
        )
    return images, None if labels is None else _whole_numbers(labels, len(images), number)


def _whole_numbers(labels: Any, size: int, number: int) -> Tensor:
    found, cause = torch.empty(0), None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises for what is no list of numbers
        cause = error
    if found.shape != (size,) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        shown = f"{found.dtype} of shape {tuple(found.shape)}" if found.numel() else type(labels).__name__
        raise DataError(
            f"The labels of batch {number} are {shown}, not one whole number for each of its {size} images. "
            f"Give class numbers; take mixing augmentations off."
        ) from cause
    return found.detach().to("cpu", torch.long).contiguous()


def _check(images: Tensor, labels: Tensor | None, number: int, classes: int | None) -> None:
    if images.is_floating_point() and not images.isfinite().all():
        raise DataError(f"Batch {number} holds values that are not finite. See to the data, or to its normalisation.")
    if labels is None and classes is not None:
        raise DataError(
            f"Batch {number} has no labels, and {classes} classes are asked for. Give pairs, or no classes."
        )
    if labels is None or not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        known = f"of {classes} classes go from 0 to {classes - 1}" if classes is not None else "count from 0"
        raise DataError(
            f"Batch {number} has the label {low if low < 0 else high}, and labels {known}. "
            f"Give the number of classes that the data has, or see to its labels."
        )


def check_classes(classes: Any) -> tuple[int | None, tuple[str, ...]]:
    """The number of classes and their names, from a number, a list of names, or None.

    Raises:
        OptionError: It is none of these.
    """
    if classes is None:
        return None, ()
    if isinstance(classes, int) and not isinstance(classes, bool) and classes > 0:
        return classes, ()
    if isinstance(classes, Sequence) and not isinstance(classes, str) and classes:
        return len(classes), tuple(str(name) for name in classes)
    raise OptionError(
        f"classes={shorten(classes)} is neither a number of classes nor a list of names. Give one of them."
    )


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, afterwards every module trains or evaluates as before."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without gradients; afterwards modes and random number generators are as found."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with modes_kept(model), torch.no_grad(), torch.random.fork_rng(sorted(devices)):
        for module in model.modules():
            module.training = False
        yield
