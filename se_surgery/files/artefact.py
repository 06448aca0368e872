"""Artefact: the files that a saved model consists of, and whether they belong together.

In: what was read of them. Out: nothing, or an error. `config.json` is timm's: the generic architecture `se_surgery`
with the recipe in `model_args`. `model.safetensors` carries the same configuration among its metadata, and so is a
whole model by itself.

Both hold a digest of the recipe and of every tensor. Files that were not saved together, or bytes that were changed on
the way, are refused: huggingface_hub compares sizes only, and timm fetches the two files in two requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtefactError

# What timm builds any base with any recipe as.
ARCHITECTURE = "se_surgery"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
PLOT = "excitations.png"
# A card that has this line is one of ours, and is written anew with its model.
MARK = "<!-- Written by se-surgery, together with the model. Delete this line to keep what you write here. -->"
# Under this key both files say what only this library reads.
OWN = "se_surgery"


def is_ours(text: str) -> bool:
    """Whether a README was written by this library and not touched since, so that it may be written anew."""
    return MARK in text


def outdated(card: str | None, files: Mapping[str, bytes]) -> list[str]:
    """What goes when `files` are written over a model with this README: its picture, where they bring no other."""
    return [PLOT] if card is not None and is_ours(card) and f"({PLOT})" in card and PLOT not in files else []


def digest_of(tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> str:
    """A hash of a recipe and of tensors: their names, dtypes, shapes and bytes.

    Examples:
        >>> digest_of({}, {})[:8]
        '44136fa3'
    """
    found = hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def refuse_mix(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], recipe: Mapping[str, Any], digest: Any, where: str
) -> None:
    """Refuse tensors that are not the ones that a configuration was saved with.

    Args:
        tensors: All tensors of the weights' file.
        metadata: What that file says of itself.
        recipe: The recipe of the configuration.
        digest: The digest of the configuration; none where another program wrote it.
        where: The weights' file, for messages.

    Raises:
        ArtefactError: They are others, or were changed.
    """
    inside = json_of(metadata[OWN], f"The metadata of {where}") if OWN in metadata else {}
    own = _digest_in(inside.get("model_args") if isinstance(inside, Mapping) else None)
    expected = {value for value in (digest, own) if value}
    if not expected:
        return
    found = digest_of(tensors, recipe)
    if expected == {found}:
        return
    whole = own is not None and own == _digest_with(tensors, inside)
    if whole:
        raise ArtefactError(
            f"{where} and its {CONFIG} were not saved together: a save was interrupted between the two, or one of them "
            f"is of another time. The weights are whole and know their own configuration. In a folder, remove "
            f"{CONFIG}, read the rest with se_surgery.from_pretrained and save it again; from the Hub, name a revision."
        )
    raise ArtefactError(
        f"{where} is not what was saved: the sha256 of the recipe and the weights is {found[:16]}..., and should be "
        f"{min(expected)[:16]}... The file was changed or damaged: fetch it again, or save the model again."
    )


def _digest_with(tensors: Mapping[str, Tensor], config: Any) -> str | None:
    recipe = config["model_args"].get("recipe")
    return digest_of(tensors, recipe) if isinstance(recipe, Mapping) else None


def _digest_in(model_args: Any) -> str | None:
    digest = model_args.get("digest") if isinstance(model_args, Mapping) else None
    value = digest.get("sha256") if isinstance(digest, Mapping) else None
    return value if isinstance(value, str) else None


def take_digest(digest: Any) -> str | None:
    """The digest among `model_args`, which is used up by reading it.

    timm keeps `model_args` on the live model and writes them again when it saves that model, by then with other
    weights. An empty digest says that nothing is known.

    Raises:
        ArtefactError: It is none.
    """
    if digest is None or digest == {}:
        return None
    value = _digest_in({"digest": digest})
    if value is None or set(digest) != {"sha256"}:
        raise ArtefactError(f"The digest in {CONFIG} is {str(digest)[:60]!r} and no sha256. Save the model again.")
    digest.clear()
    return value


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are in another format.

    Raises:
        ArtefactError: There are no weights, or pickles only.
    """
    if (folder / WEIGHTS).exists():
        return
    pickles = sorted(path.name for ending in ("bin", "pth", "pt", "pkl", "npz") for path in folder.glob(f"*.{ending}"))
    if pickles:
        raise ArtefactError(
            f"{str(folder)!r} has no {WEIGHTS}, and {pickles[0]!r} is not read: loading a pickle may run whatever its "
            f"author wrote into it. Ask for the model in safetensors, or convert it where you trust it."
        )
    if not folder.is_dir():
        raise ArtefactError(f"There is no folder {str(folder)!r}. Name one that save_pretrained wrote.")
    raise ArtefactError(f"{str(folder)!r} has no {WEIGHTS}. Name a folder that save_pretrained wrote.")


def json_of(text: str | bytes, where: str) -> Any:
    """Parsed JSON.

    Raises:
        ArtefactError: It is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(
            f"{where} is damaged: it is no JSON ({error}). Save or fetch the model again; in a folder that a save was "
            f"interrupted in, remove {CONFIG}: the weights know it."
        ) from error
