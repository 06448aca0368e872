"""Checkpoint: the tensors of a file, or of a state dict, and what the file says of itself.

In: a file of safetensors, a file that torch.save wrote (no code in it is run), or a mapping. Out: a `Checkpoint`: the
tensors by name, taken out of what training scripts and wrappers put around them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, OptionError, SurgeryError
from ..planning.options import Options
from ..surgery.schema import check_recipe
from .artefact import OWN


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint.

    Attributes:
        name: What to call it.
        tensors: The tensors by name.
        scales: Where this library wrote the file: the factor on the gate of each of its SEs, by path.
    """

    name: str
    tensors: dict[str, Tensor]
    scales: Mapping[str, float]


def read_checkpoint(source: Any, known: Collection[str]) -> Checkpoint:
    """Read a checkpoint.

    One level of a dictionary around the tensors is gone through (`state_dict`, `model`, ...), and so is a beginning
    that all names share and none of the model's has (`module.` of DataParallel, `_orig_mod.` of torch.compile, ...).

    Args:
        source: Path of a `.safetensors`, `.pth`, `.pt`, `.bin` or `.tar` file, or a mapping.
        known: The model's own names.

    Raises:
        OptionError: It is none of these.
        CheckpointError: The file cannot be read safely, or holds no state dict.
    """
    if isinstance(source, Mapping):
        return _checkpoint("The state dict", source, {}, known)
    if not isinstance(source, (str, os.PathLike)):
        raise OptionError(f"A {type(source).__name__} is no checkpoint. Give the path of a file, or a state dict.")
    path = Path(source)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise OptionError(
            f"{str(path)!r} has none of the endings {', '.join(_READERS)}. Name such a file, or give a state dict."
        )
    raw, metadata = read(path)
    return _checkpoint(path.name, raw, _scales(metadata, path.name), known)


def _checkpoint(name: str, raw: Any, scales: Mapping[str, float], known: Collection[str]) -> Checkpoint:
    level, inside = _state_dict(raw, name)
    prefix, tensors = _bare(inside, known)
    around = [f"its {level!r}"] if level else []
    around += [f"without {prefix!r}"] if prefix else []
    return Checkpoint(f"{name} ({', '.join(around)})" if around else name, tensors, scales)


def _read_safetensors(path: Path) -> tuple[Any, Mapping[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}). Name a whole file of safetensors.") from error


def _read_pickle(path: Path) -> tuple[Any, Mapping[str, str]]:
    """What torch.save wrote, if it is tensors and plain data: unpickling anything else could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror}). Name a file that torch.save wrote."
        ) from error
    # What damaged bytes raise on their way through zipfile, pickle and torch has no class in common.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # what follows is how to run its code
        raise CheckpointError(
            f"{str(path)!r} cannot be read as tensors alone ({type(error).__name__}: {reason}). No code of a file is "
            f"run here: where you trust it, save the state_dict() of what is in it with safetensors."
        ) from error


_READERS: dict[str, Callable[[Path], tuple[Any, Mapping[str, str]]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".bin": _read_pickle,
    ".tar": _read_pickle,
}


def _state_dict(raw: Any, name: str) -> tuple[str, dict[str, Tensor]]:
    """The state dict in what was read: that itself, or the one entry of it that is one, with its name."""
    if _is_state_dict(raw):
        return "", dict(raw)
    entries = dict(raw) if isinstance(raw, Mapping) else {}
    inside = [key for key, value in entries.items() if _is_state_dict(value)]
    if len(inside) == 1:
        return str(inside[0]), dict(entries[inside[0]])
    if inside:
        raise CheckpointError(
            f"{name} holds {len(inside)} state dicts, {', '.join(map(repr, inside))}. Load it, and give one of them."
        )
    odd = next((f" ({key!r} is {type(value).__name__})" for key, value in entries.items() if not _fits(key, value)), "")
    raise CheckpointError(
        f"{name} is {type(raw).__name__} and holds no state dict{odd}. Give names with tensors, as state_dict() does."
    )


def _is_state_dict(raw: Any) -> bool:
    return isinstance(raw, Mapping) and bool(raw) and all(_fits(key, value) for key, value in raw.items())


def _fits(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _bare(tensors: dict[str, Tensor], known: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """What wrappers put before all names, and the tensors without it."""
    taken = ""
    while True:
        first, dot, _ = next(iter(tensors)).partition(".")
        prefix = first + dot
        if not dot or not all(key.startswith(prefix) for key in tensors) or any(k.startswith(prefix) for k in known):
            return taken, tensors
        taken += prefix
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}


def _scales(metadata: Mapping[str, str], name: str) -> dict[str, float]:
    """The factors on the gates of the SEs that a file's own recipe puts in."""
    if OWN not in metadata:
        return {}
    try:
        recipe = _recipe(json.loads(metadata[OWN]))
        check_recipe(recipe)
        added = [operation for operation in recipe["operations"] if operation["op"] == "add"]
        return {site["path"]: _scale(operation["options"]) for operation in added for site in operation["sites"]}
    except SurgeryError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"The recipe in {name} is damaged ({error}). Save the model again.") from error


def _recipe(own: Any) -> Any:
    """The recipe in what this library writes: that itself, or a configuration of timm's with it among the arguments."""
    arguments = own.get("model_args") if isinstance(own, Mapping) else None
    return arguments.get("recipe") if isinstance(arguments, Mapping) else own


def _scale(options: Mapping[str, Any]) -> float:
    return float(Options(gate=options["gate"], gate_scale=options["gate_scale"], init=options["init"]).scale)
