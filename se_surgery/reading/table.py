"""Table: the copies of a model that are looked at, and why one does not run.

In: a model. Out: a copy for each way of looking, made when first asked for; and for an error in one the reason, by what
was under way when it was raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import SurgeryError
from .again import comes_again
from .blame import is_ours
from .copies import Copier
from .hooks import loose_hooks, own_hooks
from .recorder import Recorder, on_the_table

_PACKAGE = __name__.partition(".")[0] + "."
_SES = _PACKAGE + "se."
# No other input would help against these.
_NEVER_THE_INPUT = (SurgeryError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Way:
    """A way to run a copy.

    Attributes:
        real: With values, and not on the meta device.
        hooks: With the hooks of its modules.
    """

    real: bool = False
    hooks: bool = False

    def on_meta(self) -> Way:
        """The same way on the meta device."""
        return replace(self, real=False)


class DoesNotRun(Exception):
    """A model's own code fails on an input.

    Attributes:
        cause: What it raised.
        is_about_shapes: Whether that would come again on tensors with values: it is not about the meta device.
    """

    def __init__(self, cause: Exception, is_about_shapes: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.is_about_shapes = is_about_shapes


class Table:
    """A model and its copies.

    Attributes:
        model: The model; it is only read.
        modules: Its modules by path; one that is in several places by the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self._copiers: dict[Way, Copier] = {}

    def ways(self) -> Iterator[Way]:
        """The ways to try, first those that cost least."""
        for real in (False, True):
            if real and any(parameter.is_meta for parameter in self.model.parameters()):
                return
            yield Way(real)
            if own_hooks(self.modules) and not loose_hooks(self.modules):
                yield Way(real, hooks=True)

    def hooks_text(self) -> str:
        """What there is to say of the model's hooks where it does not run."""
        if not own_hooks(self.modules):
            return ""
        loose = loose_hooks(self.modules)
        if loose:
            return f" It may need its forward hooks, and {loose[0]}. Let the hook keep in the model what it keeps."
        paths = ", ".join(repr(path) for path in list(own_hooks(self.modules))[:3])
        return f" It has forward hooks, of {paths}; it was tried without them, and with them on a copy of the model."

    @contextlib.contextmanager
    def ready(self, way: Way, recorder: Recorder) -> Iterator[dict[str, nn.Module]]:
        """The copies of the modules by path, noted by the recorder; afterwards they are as before.

        Raises:
            DoesNotRun: There is no such copy: a tensor's class has no meta device.
        """
        copier = self._copier(way)
        copies = {path: copier.of(module) for path, module in self.modules.items()}
        with torch.no_grad(), copier.undoing(), on_the_table(copies, recorder, copier if way.hooks else None):
            yield copies

    def _copier(self, way: Way) -> Copier:
        if way not in self._copiers:
            copier = self._new(way)
            try:
                copier(self.model)
            except _NEVER_THE_INPUT:
                raise
            except Exception as error:  # whatever a tensor of another class raises
                if not comes_again(error, lambda: self._new(way)(self.model)):
                    raise
                raise DoesNotRun(error, is_about_shapes=False) from error
            self._copiers[way] = copier
        return self._copiers[way]

    @staticmethod
    def _new(way: Way) -> Copier:
        return Copier(None if way.real else "meta", way.hooks)


def reason_of(error: Exception, recorder: Recorder, copies: dict[str, nn.Module]) -> Exception:
    """What to raise for an error in a run: `DoesNotRun`, or where no other input would help the error itself."""
    if isinstance(error, _NEVER_THE_INPUT) or _is_in_an_se(recorder, copies) or is_ours(error):
        return error
    failure = recorder.failure
    is_its = failure is not None and failure.error is error
    return DoesNotRun(error, is_about_shapes=is_its and failure.comes_again())  # type: ignore[union-attr]


def _is_in_an_se(recorder: Recorder, copies: dict[str, nn.Module]) -> bool:
    """Whether an SE of this library was at work: it takes whatever maps its block makes."""
    forwards = [vars(cls).get("forward") for call in recorder.stack for cls in type(copies[call.path]).__mro__]
    return any(str(getattr(forward, "__globals__", {}).get("__name__")).startswith(_SES) for forward in forwards)
