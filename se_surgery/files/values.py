"""Values: whether the values of a checkpoint fit the tensors that they are for, and their way into them.

In: tensors of a checkpoint, and those of a model. Out: what does not fit, or the model's tensors with new values.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import PatientError
from ..surgery.journal import Journal
from .foreign import Problem
from .strict import value_problem


def value_problems(
    keys: Mapping[str, str], places: Mapping[str, Tensor], values: Mapping[str, Tensor], base: frozenset[str]
) -> list[Problem]:
    """The values that do not fit their places.

    Args:
        keys: Names of the values by those of their places.
        places: The model's tensors.
        values: The checkpoint's.
        base: Those of the places that are the base's. An SE's values may be a Linear layer's.
    """
    problems = []
    for to, key in keys.items():
        text = _unfit(to, values[key], places[to], to in base)
        problems += [Problem("value", f"{key} {text}")] if text else []
    return problems


def _unfit(to: str, value: Tensor, place: Tensor, is_base: bool) -> str | None:
    """What is wrong with one value, if anything is."""
    if _shape(value, is_base) != _shape(place, is_base):
        return f"is {tuple(value.shape)} and not {tuple(place.shape)}"
    wrong = value_problem(to, value, place)
    too_large = not wrong and place.is_floating_point() and not bool(_ready(value, place).isfinite().all())
    return f"is too large for {place.dtype}" if too_large else wrong


def _shape(tensor: Tensor, is_base: bool) -> tuple[int, ...]:
    """A tensor's shape; of an SE's without the ones at its end, so that Linear layers are convolutions."""
    sizes = list(tensor.shape)
    while not is_base and sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _ready(value: Tensor, place: Tensor) -> Tensor:
    """A value in the shape and dtype and on the device of its place."""
    return value.detach().to(device=place.device, dtype=place.dtype).reshape(place.shape)


def copy_values(
    journal: Journal, keys: Mapping[str, str], places: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Copy values to their places, one after the other, so that of each no more than the old one is kept.

    Raises:
        PatientError: A place cannot be written to.
    """
    for to, key in keys.items():
        value = _ready(values[key], places[to])
        try:
            journal.write(places[to], value)
        except RuntimeError as error:
            raise PatientError(
                f"{to!r} of the model cannot be written to ({error}). Give it memory of its own, outside of inference "
                f"mode."
            ) from error
