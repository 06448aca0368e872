"""Strict: whether weights are those of a model, before they are loaded into it.

In: a state dict and the model. Out: the same state dict, or an error that names what does not fit. timm loads without
looking as soon as another number of classes is asked for: SEs and whole stages may be missing, integers become weights,
and NaN is as good as any number. Here only what such a request really changes may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtefactError

_SHOWN = 5
# What to do about weights that are read; a model that is about to be saved has no file.
REMEDY = "The file is damaged or another model's: save the model again."
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checked(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    pretrained_cfg: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    where: str = "The state dict",
) -> dict[str, Tensor]:
    """Check that weights are those of a model: names, shapes, dtypes, finiteness and running variances.

    Nothing is loaded and nothing is changed. Weights in float16 or bfloat16 fit a float32 model.

    Args:
        state_dict: The weights.
        model: The model they are for.
        pretrained_cfg: timm's description of the weights; of it `num_classes`, `input_size`, `classifier` and
            `first_conv` count. Without it the model has to be just the one that was saved.
        num_classes: Number of classes of the model. Where the weights have another, the layers called `classifier`
            may differ. By default that of the weights.
        in_chans: Number of input channels of the model. Where the weights have another, the layers called `first_conv`
            may differ in theirs, if timm can convert them. By default that of the weights.
        where: What the weights are, to begin the error's text with.

    Returns:
        The weights.

    Raises:
        ArtefactError: They do not fit; the message names the first five keys and what is wrong with each.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> checked({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, layer)["bias"]
        tensor([0.])
    """
    if not isinstance(state_dict, Mapping):
        raise ArtefactError(f"{where} is a {type(state_dict).__name__} and no mapping of names to tensors. Give one.")
    found = problems(state_dict, model, pretrained_cfg, num_classes=num_classes, in_chans=in_chans)
    if found:
        keys = state_dict.keys() | model.state_dict().keys()
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ArtefactError(
            f"{where} does not fit this {type(model).__name__}: of {len(keys)} keys {len(found)} are wrong "
            f"({'; '.join(found[:_SHOWN])}{more}). {REMEDY}"
        )
    return dict(state_dict)


def problems(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    pretrained_cfg: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
) -> list[str]:
    """What is wrong with weights for a model, key by key; the arguments are those of `checked`."""
    asked = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    change = _change(model, pretrained_cfg or {}, num_classes, in_chans)
    keys = [*asked, *sorted(state_dict.keys() - asked.keys(), key=str)]
    return [f"{key} {problem}" for key in keys if (problem := _problem(key, state_dict, asked, change))]


@dataclass(frozen=True)
class _Change:
    """What the model that is asked for has otherwise than the one that was saved.

    Attributes:
        classes: Number of classes of the weights, where the model has another; else None.
        heads: Paths of the layers that depend on it.
        gone: Beginnings of keys of the weights that have no place in a model without classes.
        channels: Input channels of the weights and of the model, where they differ; else None.
        stems: Paths of the layers that depend on them.
    """

    classes: int | None
    heads: tuple[str, ...]
    gone: tuple[str, ...]
    channels: tuple[int, int] | None
    stems: tuple[str, ...]


def _change(model: nn.Module, cfg: Mapping[str, Any], num_classes: int | None, in_chans: int | None) -> _Change:
    classes = _whole(cfg.get("num_classes", num_classes or 0), "num_classes")
    size = cfg.get("input_size") or (in_chans or 3,)
    channels = _whole(size[0] if isinstance(size, (list, tuple)) else size, "input_size")
    heads, stems = (_paths(cfg.get(name), name) for name in ("classifier", "first_conv"))
    if cfg.get("label_offset"):
        raise ArtefactError(
            f"pretrained_cfg has label_offset={cfg['label_offset']!r}, which would drop classes. Save the model again."
        )
    differ = num_classes is not None and num_classes != classes
    return _Change(
        classes if differ else None,
        heads if differ else (),
        tuple(gone for head in heads if (gone := _gone(model, head))) if differ else (),
        (channels, in_chans) if in_chans is not None and in_chans != channels else None,
        stems,
    )


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArtefactError(f"pretrained_cfg has {name}={value!r}, no whole number. Save the model again.")
    return value


def _paths(given: Any, name: str) -> tuple[str, ...]:
    paths = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else None
    if given is None:
        return ()
    if paths is None or not all(isinstance(path, str) and path for path in paths):
        raise ArtefactError(f"pretrained_cfg has {name}={given!r}, no path of a layer. Save the model again.")
    return paths


def _gone(model: nn.Module, head: str) -> str | None:
    """What is left of a classifier, as the beginning of the keys that were below it: timm leaves an Identity."""
    module, reached = model, ""
    for name in head.split("."):
        child = module._modules.get(name)
        if child is None:
            break
        module, reached = child, f"{reached}{name}."
    return reached if reached and isinstance(module, nn.Identity) else None


def _problem(key: str, given: Mapping[str, Any], asked: Mapping[str, Tensor], change: _Change) -> str | None:
    """What is wrong with one key, if anything is."""
    is_head = key in {f"{head}.{kind}" for head in change.heads for kind in ("weight", "bias")}
    if key not in given:
        return "is missing" if not is_head or change.classes else None
    value = given[key]
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__} and no tensor"
    if key not in asked:
        if is_head or str(key).startswith(change.gone):
            kind = () if key.rpartition(".")[2] == "num_batches_tracked" else (_float,)
            return _first(rule(value) for rule in (*kind, *_VALUES, lambda v: _classes(v, change, is_head)))
        return "is not the model's"
    shape = _head_shape if is_head else _shape
    return shape(key, value, asked[key], change) or value_problem(key, value, asked[key])


def value_problem(key: str, value: Tensor, mine: Tensor) -> str | None:
    """What is wrong with a value of the right shape, if anything is: its dtype, or the numbers in it."""
    return _dtype(value, mine) or _first(rule(value) for rule in _values(key))


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _shape(key: str, value: Tensor, mine: Tensor, change: _Change) -> str | None:
    if value.shape == mine.shape:
        return None
    if change.channels is not None and key in {f"{stem}.weight" for stem in change.stems}:
        return _stem_shape(value, mine, *change.channels)
    return f"is {_text(value)} and not {_text(mine)}"


def _stem_shape(value: Tensor, mine: Tensor, saved: int, wanted: int) -> str | None:
    """A first convolution of another number of input channels, which timm will convert.

    What it cannot convert it leaves at random values, with no more than a line in the log.
    """
    if value.dim() == mine.dim() == 4 and value.shape[0] == mine.shape[0] and value.shape[2:] == mine.shape[2:]:
        fits = value.shape[1] * wanted == mine.shape[1] * saved
        if fits and (value.shape[1] == saved or wanted == 1):
            return None
    return f"is {_text(value)} and cannot be converted from {saved} to {wanted} channels, {_text(mine)}"


def _head_shape(key: str, value: Tensor, mine: Tensor, change: _Change) -> str | None:
    if value.shape[1:] != mine.shape[1:]:
        return f"is {_text(value)}, which is not {_text(mine)} but for the number of classes"
    return _classes(value, change, True)


def _classes(value: Tensor, change: _Change, is_head: bool) -> str | None:
    """Whether a classifier has the number of classes that the weights are said to have."""
    if is_head and (value.dim() == 0 or value.shape[0] != change.classes):
        return f"is {_text(value)}, and the configuration says {change.classes} classes"
    return None


def _dtype(value: Tensor, mine: Tensor) -> str | None:
    if value.dtype == mine.dtype or (mine.dtype in _FLOATS and value.dtype in _FLOATS):
        return None
    return f"is of {value.dtype} and not of {mine.dtype}"


def _float(value: Tensor) -> str | None:
    return None if value.dtype in _FLOATS else f"is of {value.dtype}"


def _real(value: Tensor) -> str | None:
    return "has no values to read" if value.is_meta or value.layout != torch.strided else None


def _finite(value: Tensor) -> str | None:
    return None if not value.is_floating_point() or bool(value.isfinite().all()) else "holds NaN or infinity"


def _not_negative(value: Tensor) -> str | None:
    return "is a negative variance" if value.numel() and bool((value < 0).any()) else None


_VALUES: tuple[Callable[[Tensor], str | None], ...] = (_real, _finite)


def _values(key: str) -> tuple[Callable[[Tensor], str | None], ...]:
    return (*_VALUES, _not_negative) if key.rpartition(".")[2] == "running_var" else _VALUES


def _text(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
