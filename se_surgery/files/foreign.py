"""Foreign: which tensors of a state dict made elsewhere are whose SE.

In: the SEs that a model was given, and tensors that are not its base's. Out: a `Matching`: for every SE its two layers,
or what is in the way. What makes an SE is its shapes, (hidden, C) and then (C, hidden), of Linear layers or of
convolutions of one position. Names say where a tensor belongs; where shapes leave a choice, they say which is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import NothingToDoError, PatientError
from ..planning.exam import refuse_unfit
from ..reading.layout import is_under
from ..records import Implant, implants
from ..se.excite import SqueezeExcite

LAYERS = ("fc1", "fc2")
_NUMBER = re.compile(r"(\d+)")
# What the first and the second layer are called where that is no number: `_se_reduce` and `_se_expand`, for instance.
_NAMES = (("reduce", "expand"), ("squeeze", "excite"), ("squeeze", "excitation"), ("squeeze", "expand"), ("down", "up"))


class Grafted(NamedTuple):
    """An SE that this library put into a model."""

    path: str
    unit: str
    module: SqueezeExcite
    record: Implant

    @property
    def widths(self) -> tuple[int, int]:
        """Channels it gates, and its hidden width."""
        return self.module.fc1.in_channels, self.module.fc1.out_channels

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether its layers have biases."""
        return self.module.fc1.bias is not None, self.module.fc2.bias is not None

    @property
    def extras(self) -> list[str]:
        """Names of its parameters beyond those of the two layers: a mix, or the activation's own."""
        return [name for name, _ in self.module.named_parameters() if name.partition(".")[0] not in LAYERS]


@dataclass(frozen=True)
class LoadedSE:
    """One SE and the tensors of a checkpoint that are its.

    Attributes:
        path: Path of the SE module in the model.
        unit: Path of the unit it serves.
        source: Path of the module that the tensors come from.
        layers: Names of its two layers, from there.
        channels: Channels it gates (C).
        rd_channels: Width of its hidden layer.
        bias: Whether the first and the second layer have a bias.
        keys: The checkpoint's names of the tensors by the model's.
    """

    path: str
    unit: str
    source: str
    layers: tuple[str, str]
    channels: int
    rd_channels: int
    bias: tuple[bool, bool]
    keys: Mapping[str, str] = field(repr=False)


class Problem(NamedTuple):
    """What is in the way of loading a checkpoint: a kind, for which there is a remedy, and what it is about."""

    kind: str
    text: str


class Matching(NamedTuple):
    """What goes where, what does not, and the tensors that are nobody's."""

    ses: tuple[LoadedSE, ...]
    problems: tuple[Problem, ...]
    left: tuple[str, ...]


class _Layer(NamedTuple):
    path: str
    widths: tuple[int, int]  # out, in
    bias: bool

    def __str__(self) -> str:
        return f"{self.path} {self.widths[1]} -> {self.widths[0]}"


def grafted(model: nn.Module) -> list[Grafted]:
    """The SEs that this library put into a model.

    Raises:
        NothingToDoError: There are none.
        PatientError: The model is wrapped, or one of them is another kind of attention.
    """
    refuse_unfit(model)
    found = []
    for host, module in model.named_modules():
        for record in implants(module):
            path, child = f"{host}.{record.name}".strip("."), module._modules[record.name]
            if not isinstance(child, SqueezeExcite):
                raise PatientError(
                    f"{path!r} is a {type(child).__name__} and not squeeze-and-excitation, whose two layers are what "
                    f'this is about. Leave it out, or operate with attn="se".'
                )
            found.append(Grafted(path, record.now(record.unit, host), child, record))
    if not found:
        raise NothingToDoError(f"This {type(model).__name__} holds no SE of this library. Put them in with add_se.")
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's own tensors by their names in its state dict.

    Raises:
        PatientError: The model is on the meta device.
    """
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    if any(tensor.is_meta for tensor in held.values()):
        raise PatientError("The model is on the meta device and has no values. Create it on another one.")
    return {key: held[key] for key in model.state_dict() if key in held}


def match(ses: Sequence[Grafted], tensors: Mapping[str, Tensor]) -> Matching:
    """Find every SE's tensors among those that are not the base's.

    A tensor belongs to the SE whose own path it lies under, or else to the one SE of the deepest unit that it lies
    under. Of the layers there, the SE's are the two that have its shapes.
    """
    shares: dict[str, dict[str, Tensor]] = {se.path: {} for se in ses}
    problems, left = [], []
    for key, tensor in tensors.items():
        owners = _owners(key, ses)
        if len(owners) == 1:
            shares[owners[0].path][key] = tensor
        elif owners:
            problems.append(Problem("ambiguous", f"{key} (of {' or '.join(se.path for se in owners)})"))
        else:
            left.append(key)
    found = []
    for se in ses:
        share = shares[se.path]
        loaded, wrong = _loaded(se, share)
        problems += wrong
        if loaded is not None:
            found.append(loaded)
            left += [key for key in share if key not in loaded.keys.values()]
    return Matching(tuple(found), tuple(problems), tuple(left))


def of_same_make(keys: Iterable[str], ses: Iterable[LoadedSE]) -> list[str]:
    """Those names that end as the tensors of SEs do: SEs of the same make, elsewhere."""
    ends = tuple({key.removeprefix(se.unit) for se in ses for key in se.keys.values() if is_under(key, se.unit)})
    ends = tuple("." + end.removeprefix(".") for end in ends)
    return [key for key in keys if ("." + key).endswith(ends)] if ends else []


def _owners(key: str, ses: Sequence[Grafted]) -> list[Grafted]:
    exact = [se for se in ses if is_under(key, se.path)]
    around = exact or [se for se in ses if is_under(key, se.unit)]
    deepest = max((len(se.unit) for se in around), default=0)
    return [se for se in around if len(se.unit) == deepest]


def _loaded(se: Grafted, share: Mapping[str, Tensor]) -> tuple[LoadedSE | None, list[Problem]]:
    """The two layers of one SE, or what is wrong with the tensors that would be its."""
    if not share:
        return None, [Problem("missing", se.path)]
    pair = _pair(se, _layers(share))
    if isinstance(pair, Problem):
        return None, [pair]
    keys = {}
    for name, layer in zip(LAYERS, pair, strict=True):
        keys[f"{se.path}.{name}.weight"] = f"{layer.path}.weight"
        if layer.bias:
            keys[f"{se.path}.{name}.bias"] = f"{layer.path}.bias"
    problems = [problem for problem in (_bias_problem(se, pair), *_extra_problems(se, share)) if problem]
    keys.update({key: key for key in (f"{se.path}.{name}" for name in se.extras) if key in share})
    source, layers = _common(pair)
    channels, hidden = se.widths
    return LoadedSE(se.path, se.unit, source, layers, channels, hidden, se.biases, keys), problems


def _layers(share: Mapping[str, Tensor]) -> list[_Layer]:
    """The Linear layers, and the convolutions of one position, among some tensors."""
    found = []
    for key, tensor in share.items():
        path, _, name = key.rpartition(".")
        if name == "weight" and tensor.dim() >= 2 and all(size == 1 for size in tensor.shape[2:]):
            found.append(_Layer(path, (tensor.shape[0], tensor.shape[1]), f"{path}.bias" in share))
    return found


def _pair(se: Grafted, layers: Sequence[_Layer]) -> tuple[_Layer, _Layer] | Problem:
    """The first and the second layer."""
    channels, hidden = se.widths
    named = _named(layers, (hidden, channels), (channels, hidden))
    if len(named) == 1:
        return named[0]
    first = [layer for layer in layers if layer.widths == (hidden, channels)]
    second = [layer for layer in layers if layer.widths == (channels, hidden)]
    if channels == hidden:
        first, second = _numbered(first)
    if len(first) == len(second) == 1:
        return first[0], second[0]
    shown = " and ".join(map(str, layers)) or "no Linear layer and no convolution of one position"
    kind = "ambiguous" if first and second else "widths"
    return Problem(kind, f"{se.path} ({channels} -> {hidden} -> {channels}, the checkpoint has {shown})")


def _named(layers: Sequence[_Layer], *widths: tuple[int, int]) -> list[tuple[_Layer, _Layer]]:
    """The pairs of layers of these widths whose names differ in nothing but the words for a first and a second one."""
    first, second = ({layer.path: layer for layer in layers if layer.widths == those} for those in widths)
    others = {path: {one.join(path.rsplit(other, 1)) for other, one in _NAMES if other in path} for path in first}
    return [(first[path], second[form]) for path, forms in others.items() for form in forms if form in second]


def _numbered(layers: list[_Layer]) -> tuple[list[_Layer], list[_Layer]]:
    """Two layers of one shape in order, where a number in their names tells it.

    The order of the tensors does not: some kinds of files sort them by name.
    """
    if len(layers) != 2:
        return layers, layers[1:]
    one, other = (_NUMBER.split(layer.path) for layer in layers)
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other) or len(differ) != 1 or differ[0] % 2 == 0:
        return layers, layers
    first, second = sorted(layers, key=lambda layer: int(_NUMBER.split(layer.path)[differ[0]]))
    return [first], [second]


def _bias_problem(se: Grafted, pair: tuple[_Layer, _Layer]) -> Problem | None:
    given = (pair[0].bias, pair[1].bias)
    if given == se.biases:
        return None
    return Problem("bias", f"{se.path} (bias={se.biases}, the checkpoint's {given})")


def _extra_problems(se: Grafted, share: Mapping[str, Tensor]) -> list[Problem]:
    lacking = [name for name in se.extras if f"{se.path}.{name}" not in share]
    return [Problem("extra", f"{se.path}.{name}") for name in lacking]


def _common(pair: tuple[_Layer, _Layer]) -> tuple[str, tuple[str, str]]:
    """Path of the module that holds both layers, and their names in it."""
    one, other = (layer.path.split(".") for layer in pair)
    same = sum(1 for _ in takewhile(lambda names: names[0] == names[1], zip(one, other, strict=False)))
    return ".".join(one[:same]), (".".join(one[same:]), ".".join(other[same:]))
