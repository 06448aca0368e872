"""Load: put the weights of an SE network made elsewhere into a model that was given SEs.

In: an operated model and a checkpoint. Out: the same model with the checkpoint's values, and a `LoadReport` of what
went where. Everything is looked at first; then all of it is copied, or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, OptionError
from ..planning.options import check_flags
from ..reading.layout import is_under
from ..showing.tables import Part, Section, as_text, compact, count, groups, shape
from ..surgery.journal import Journal, guarded
from .checkpoint import Checkpoint, read_checkpoint
from .foreign import Grafted, LoadedSE, Problem, grafted, match, of_same_make, tensors_of
from .values import copy_values, value_problems

_log = logging.getLogger("se_surgery")
_SHOWN = 5
_UNITS = "Operate on just the units that have an SE in the checkpoint, with stages and where of add_se."
# What can be in the way: what to call it, and what to do.
_KINDS = {
    "scale": (
        "gates of another scale",
        'Operate with init="paper" or gate_scale=1.0, as SEs made elsewhere are; if the checkpoint was trained with a '
        "factor on its gates, as those of the identity start are, say so: load_se(gate_scale=2.0).",
    ),
    "missing": ("SEs without tensors", _UNITS),
    "spare": ("tensors of SEs that the model lacks", _UNITS),
    "widths": ("SEs of other widths", "Give add_se the checkpoint's widths, with r, rd_channels or rd_divisor."),
    "bias": ("SEs with other biases", "Give add_se the checkpoint's biases, with bias."),
    "extra": (
        "parameters that no SE made elsewhere has",
        'Operate with init="paper" and an activation without parameters.',
    ),
    "ambiguous": (
        "SEs that cannot be told apart",
        "Rename the tensors of each to the model's own names, fc1 and fc2 below the SE's path.",
    ),
    "base": ("tensors of the base that are missing", ""),
    "left": ("tensors that are nobody's", ""),
    "value": ("tensors that do not fit", "Give a checkpoint with the values of a trained network of this kind."),
}
_ALONE = "Give a checkpoint with all of the base's tensors and no others, or take the SEs alone with base=False."
# The beginnings of names that tell a network whose other names are those of a ResNet, and which is not one.
_LEGACY = ("layer0.", "last_linear.")
_NOT_RESNET = (
    "The checkpoint is one of timm's legacy_senet or Cadene's, whose pooling, and in some the strides and activations, "
    "are other than a ResNet's: operate on that network itself, or take its SEs alone with base=False."
)


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What went where, as a table where it is printed or shown.

    Attributes:
        source: The checkpoint.
        ses: The SEs in the model's order, each with the tensors that are now its.
        base: The base's tensors that were loaded, too.
        kept: The base's tensors that the checkpoint does not have, and that are as they were.
        aside: The checkpoint's tensors that were left aside.
        assumed: What a checkpoint does not say of its SEs, as the model has it.
    """

    source: str
    ses: tuple[LoadedSE, ...]
    base: tuple[str, ...]
    kept: tuple[str, ...]
    aside: tuple[str, ...]
    assumed: str

    def __str__(self) -> str:
        return as_text(self._told())

    def _repr_html_(self) -> str:
        from ..showing.notebook import html

        return html(self._told())

    def _told(self) -> list[Part]:
        rows = []
        for group in groups(self.ses, lambda se: (_inside(se), se.layers, se.rd_channels, se.bias), lambda se: se.path):
            first = group[0]
            sources, paths = (compact([getattr(se, name) for se in group]) for name in ("source", "path"))
            width = shape(first.channels, first.rd_channels)
            rows.append((sources, ", ".join(first.layers), paths, len(group), width, _BIASES[first.bias]))
        headers = ["from", "layers", "SE", ">number", "channels -> hidden", "bias"]
        parts: list[Part] = [Section(f"{self.source}: {count(len(self.ses), 'SE')} loaded", headers, rows)]
        parts += [f"The base's, loaded: {count(len(self.base), 'tensor')}."] if self.base else []
        parts += [f"The base's, as they were: {_counted(self.kept)}."] if self.kept else []
        parts += [f"The checkpoint's, left aside: {_counted(self.aside)}."] if self.aside else []
        return [*parts, f"Not in any checkpoint, and taken as the model has it: {self.assumed}."]

    def __repr__(self) -> str:
        return str(self)


_BIASES = {(False, False): "none", (True, True): "both", (True, False): "first", (False, True): "second"}


def load_se(
    model: nn.Module,
    file_or_state_dict: Any,
    *,
    base: bool = True,
    gate_scale: float | None = None,
) -> LoadReport:
    """Load an SE network that was made and trained elsewhere into a model with the same SEs, in place.

    Whatever its SEs are called (timm's `se.fc1`, `se_module.fc1` of timm's legacy_senet and Cadene's nets, `se.fc.0`,
    `excitation.2`, ...), and whether their layers are Linear or convolutions: an SE's tensors are found by the unit
    that they lie under and by their shapes. The base's tensors are loaded along where the checkpoint has them: all or,
    in a checkpoint of SEs alone, none. On an error the model is exactly what it was before.

    A checkpoint does not say how its SEs pool, what their activation and their gate are, or where in the unit they
    sit: see that `add_se` was called accordingly. It does not say either what its gates are multiplied by. SEs made
    elsewhere have no such factor, while `init="identity"` makes one of 2: a model with that is refused.

    timm's legacy_senet and Cadene's nets differ from ResNets in more than the names of their layers: the pooling behind
    the stem has no padding, SE-ResNet bottlenecks stride in their first convolution, and basic blocks have a ReLU
    before the SE. So their base is not renamed: it goes into such a network only, such as
    `add_se(timm.create_model("legacy_seresnet50"), existing="replace", bias=True, init="paper")`.

    Args:
        model: A model that `add_se` operated on, with the checkpoint's widths and biases. For timm's SE networks:
            `bias=True, rd_divisor=8, init="paper"`; for legacy_senet's: `bias=True, init="paper"`.
        file_or_state_dict: A `.safetensors` file; a `.pth`, `.pt`, `.bin` or `.tar` file with nothing but tensors and
            plain data (no code in it is run); or a state dict. A dictionary around it, and a beginning that all names
            share (`module.`), are gone through.
        base: Whether to load the base's tensors, too. With False all tensors but the SEs' are left aside.
        gate_scale: The factor on the checkpoint's gates. By default what this library wrote into the file, or 1.

    Returns:
        What went where; print it.

    Raises:
        CheckpointError: The tensors are not the model's, not all there, or no finite numbers; or the file cannot be
            read.
        NothingToDoError: The model holds no SE of this library.
        PatientError: The model is wrapped, on the meta device, or holds other kinds of attention.

    Examples:
        >>> theirs = timm.create_model("seresnet50", pretrained=True).state_dict()
        >>> model = add_se(timm.create_model("resnet50"), bias=True, rd_divisor=8, init="paper")
        >>> print(load_se(model, theirs))
    """
    check_flags(base=base)
    _check_factor(gate_scale)
    ses = grafted(model)
    mine = tensors_of(model)
    checkpoint = read_checkpoint(file_or_state_dict, mine)
    report, problems = _decide(ses, mine, checkpoint, base)
    problems += _scale_problems(ses, report.ses, checkpoint, gate_scale)
    keys = {**{key: key for key in report.base}, **{to: key for se in report.ses for to, key in se.keys.items()}}
    if not problems:
        problems = value_problems(keys, mine, checkpoint.tensors, frozenset(report.base))
    if problems:
        raise CheckpointError(_refusal(model, checkpoint.name, problems))
    return guarded(_put_in, keys, mine, checkpoint.tensors, report)


def _put_in(
    journal: Journal,
    keys: Mapping[str, str],
    mine: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    told: LoadReport,
) -> LoadReport:
    copy_values(journal, keys, mine, values)
    _log.info("%s", told)
    return told


def _check_factor(gate_scale: Any) -> None:
    is_number = isinstance(gate_scale, (int, float)) and not isinstance(gate_scale, bool)
    if gate_scale is not None and not (is_number and 0 < gate_scale < float("inf")):
        raise OptionError(f"gate_scale={gate_scale!r} is no factor. Give a positive number, or leave it out.")


def _decide(
    ses: Sequence[Grafted], mine: Mapping[str, Tensor], checkpoint: Checkpoint, base: bool
) -> tuple[LoadReport, list[Problem]]:
    """What goes where, and what is in the way."""
    bases = [key for key in mine if not any(is_under(key, se.path) for se in ses)]
    given, lacking = ([key for key in bases if (key in checkpoint.tensors) is there] for there in (True, False))
    taken = set(given)
    matching = match(ses, {key: value for key, value in checkpoint.tensors.items() if key not in taken})
    left, spare = list(matching.left), of_same_make(matching.left, matching.ses)
    problems = [*matching.problems, *(Problem("spare", key) for key in spare)]
    if base and given:
        # Checkpoints of before there were these counters load without them everywhere.
        problems += [Problem("base", key) for key in lacking if not key.endswith(".num_batches_tracked")]
    if base:
        problems += [Problem("left", key) for key in left if key not in spare]
    else:
        given, lacking, left = [], bases, given + left
    return LoadReport(checkpoint.name, matching.ses, tuple(given), tuple(lacking), tuple(left), _assumed(ses)), problems


def _scale_problems(
    ses: Sequence[Grafted], found: Sequence[LoadedSE], checkpoint: Checkpoint, gate_scale: float | None
) -> list[Problem]:
    """The SEs whose gates have another factor than those in the checkpoint."""
    mine = {se.path: float(se.module.gate_scale) for se in ses}
    problems = []
    for se in found:
        (first, *_) = se.keys.values()
        told = next((scale for path, scale in checkpoint.scales.items() if is_under(first, path)), 1.0)
        theirs = told if gate_scale is None else gate_scale
        if mine[se.path] != theirs:
            problems.append(Problem("scale", f"{se.path} ({mine[se.path]:g}, the checkpoint's {theirs:g})"))
    return problems


def _refusal(model: nn.Module, name: str, problems: Sequence[Problem]) -> str:
    """The error's text: of every kind of problem the first few, and then what to do about each kind."""
    kinds: dict[str, list[str]] = {}
    for kind, text in problems:
        kinds.setdefault(kind, []).append(text)
    left = kinds.get("left", [])
    legacy = all(any(key.startswith(begin) for key in left) for begin in _LEGACY)
    parts = [f"{_KINDS[kind][0]}: {_some(kinds[kind])}" for kind in _KINDS if kind in kinds]
    remedies = dict.fromkeys(_KINDS[kind][1] or (_NOT_RESNET if legacy else _ALONE) for kind in _KINDS if kind in kinds)
    return f"{name} does not fit this {type(model).__name__}. It has {'; '.join(parts)}. {' '.join(remedies)}"


def _counted(keys: Sequence[str]) -> str:
    return f"{count(len(keys), 'tensor')} ({_some(keys)})"


def _some(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return ", ".join([*texts[:_SHOWN], *more])


def _assumed(ses: Sequence[Grafted]) -> str:
    """What of the SEs is in no state dict."""
    modules = [se.module for se in ses]
    facts = {
        "squeeze": dict.fromkeys(module.squeeze for module in modules),
        "activation": dict.fromkeys(type(module.act).__name__ for module in modules),
        "gate": dict.fromkeys(type(module.gate).__name__ for module in modules),
    }
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in facts.items())


def _inside(se: LoadedSE) -> str:
    """Where in its unit the tensors were."""
    return se.source.removeprefix(se.unit) if is_under(se.source, se.unit) else se.source
