"""Checkpoints of a training run, as one safetensors file each: nothing in them is code.

In: tensors, and everything else as what JSON holds. Out: a file, and both again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all: tensors, and everything else as JSON beside them."""
    temporary = path.with_suffix(".new")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of a checkpoint, by what they belong to, and the rest. No code in the file is run."""
    found: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part, _, key = name.partition(".")
            found[part][key] = file.get_tensor(name)
        return found, json.loads(file.metadata()["state"])


def optimizer_to_plain(found: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """What an optimizer holds, of each parameter and of each group: tensors, and entries that JSON holds."""
    named = [(f"state|{name}", held) for name, held in found["state"].items()]
    named += [(f"group|{number}", held) for number, held in enumerate(found["param_groups"])]
    entries = [(place, key, value) for place, held in named for key, value in held.items()]
    tensors = {f"{place}|{key}": value for place, key, value in entries if isinstance(value, Tensor)}
    return tensors, [entry for entry in entries if not isinstance(entry[-1], Tensor)]


def optimizer_from_plain(tensors: dict[str, Tensor], plain: list[Any]) -> dict[str, Any]:
    """The other way."""
    found: dict[str, dict[str, Any]] = {"state": {}, "group": {}}
    entries = [(*place.rsplit("|", 1), tensor) for place, tensor in tensors.items()]
    for place, key, value in [*plain, *entries]:
        kind, _, name = place.partition("|")
        found[kind].setdefault(name, {})[key] = value
    return {"state": found["state"], "param_groups": list(found["group"].values())}
