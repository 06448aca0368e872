"""What can go wrong, as a user sees it: every mistake a user can make ends in one of these.

A message says what is wrong, which value or module it is about, and, in its last sentence, what to do.
"""

from __future__ import annotations

from typing import Any

# Characters of a value that an error shows.
_SHOWN = 60


def shorten(value: Any) -> str:
    """A value in one short line: what stands in the place of an option may be a whole model.

    Examples:
        >>> shorten({"x": [1, 2]}), len(shorten("x" * 100))
        ("{'x': [1, 2]}", 60)
    """
    line = " ".join(repr(value).split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 4] + " ..."


class SurgeryError(ValueError):
    """Base class of all errors this library raises for a model or an argument that it cannot work with."""


class SurgeryWarning(UserWarning):
    """What is done is right as far as it goes, and is less than was asked for."""


class OptionError(SurgeryError):
    """An argument of a public function has a value that means nothing there."""


class PlacementError(SurgeryError):
    """The model has no place for the placement that was asked for."""


class StageError(SurgeryError):
    """A stage was named that the model does not have."""


class NothingToDoError(SurgeryError):
    """The operation would change nothing: no site is left after `stages`, `where` and `existing`."""


class ProbeError(SurgeryError):
    """The model cannot be run on the probing input."""


class PatientError(SurgeryError):
    """The model itself is in a state that cannot be operated on (wrapped, shared, partly on the meta device, ...)."""


class TraceError(SurgeryError):
    """A block's forward cannot be written as a graph.

    Attributes:
        reads: What the forward went by until it failed: a block where that is otherwise may be traced.
    """

    reads: tuple[Any, ...] = ()


class InstanceForwardError(TraceError):
    """A block has a forward of its own on the instance, which a rewritten class cannot reach."""


class RewriteError(SurgeryError):
    """A rewritten block computes something else than its own forward did, so that the operation was undone."""


class DataError(SurgeryError):
    """A loader gives something that cannot be used: no batches, values that are not finite, labels out of range."""


class FoldError(SurgeryError):
    """No layer can take the mean gate of an SE."""


class VerifyError(SurgeryError):
    """A promise about an operated model does not hold."""


class ArtefactError(SurgeryError):
    """A saved model is damaged, incomplete, or not what it says it is."""


class CheckpointError(SurgeryError):
    """The tensors of a checkpoint are not those of the model, or the other way round."""


class HubError(SurgeryError):
    """The Hugging Face Hub cannot be reached, or refuses."""
