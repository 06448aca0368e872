"""Saved: an operated model as a folder, and back.

In: a model and its base's name. Out: a folder with `model.safetensors` (all values) and `recipe.json` (the base and
what was done to it). Loading creates the base, does the recipe and fills in the values.

The format is provisional: it is what the command line writes until the library saves for the Hugging Face Hub. Recipes
carry a version, and a later release that reads another one says so.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .bases import create_base
from .errors import SurgeryError
from .recipe import apply_recipe, recipe_of
from .schema import check_recipe

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"
# Arguments that name weights, files or addresses. The values come from the folder itself, and a recipe that somebody
# else wrote must not make this machine read or fetch anything.
_NOT_IN_RECIPES = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir weights weights_backbone".split()
)


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    base: str,
    base_args: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a model into a folder.

    Both files are written under other names first, so that a failure leaves what was there.

    Args:
        model: The model.
        directory: The folder; it is made where it does not exist.
        base: Name of its base: `resnet50` (timm) or `torchvision/resnet50`.
        base_args: Arguments the base was created with; plain data.
        overwrite: Whether to write into a folder that holds something. Other files in it stay.

    Returns:
        The folder.

    Raises:
        SurgeryError: The folder holds something, cannot be written, or the arguments are no plain data.
    """
    folder = check_directory(directory, overwrite)
    recipe = recipe_of(model, base, base_args)
    _check_arguments(recipe["base_args"], folder)
    try:
        text = json.dumps(recipe, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise SurgeryError(f"The recipe is no plain data ({error}). Give base_args that JSON can hold.") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / WEIGHTS) as weights, _replacing(folder / RECIPE) as written:
            save_file(_tensors(model), weights, metadata={"format": "pt"})
            written.write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise SurgeryError(f"{str(folder)!r} cannot be written ({error}). Name a folder that can.") from error
    return folder


def load(directory: str | os.PathLike[str], example_input: Any = None) -> nn.Module:
    """Read back a model that `save` wrote.

    Args:
        directory: The folder.
        example_input: What to look at the base with, as for `add_se`. By default what fits it.

    Raises:
        SurgeryError: A file is missing or damaged, the recipe is of another version, or the values do not fit.
    """
    folder = Path(directory)
    recipe = read_recipe(folder)
    check_recipe(recipe)
    values = _read_values(folder / WEIGHTS)
    model = apply_recipe(create_base(recipe["base"], **recipe["base_args"]), recipe, example_input)
    _compare(model, values, folder)
    _take_dtypes(model, values)
    model.load_state_dict(values, strict=True)
    return model


def read_recipe(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe in a folder that `save` wrote; what its operations say is checked when they are done.

    Raises:
        SurgeryError: There is none, or it does not name a base.
    """
    path = Path(directory) / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeryError(
            f"{str(path)!r} cannot be read ({error.strerror}). Name a folder that `se-surgery add` wrote."
        ) from error
    except ValueError as error:
        raise SurgeryError(f"{str(path)!r} is not JSON ({error}). Write the model again.") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("base"), str):
        raise SurgeryError(f"{str(path)!r} names no base, such as 'resnet50'. Write the model again.")
    arguments = recipe.setdefault("base_args", {})
    if not isinstance(arguments, dict):
        raise SurgeryError(f"{str(path)!r} has base_args {arguments!r}, not a mapping. Write the model again.")
    _check_arguments(arguments, path)
    return recipe


def check_directory(directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The folder as a path, if it can be written into.

    Raises:
        SurgeryError: It is a file, or it holds something and `overwrite` is not given.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise SurgeryError(f"{str(folder)!r} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SurgeryError(f"{str(folder)!r} is not empty. Name another folder, or ask for overwrite.")
    return folder


def _check_arguments(arguments: Mapping[str, Any], place: Path) -> None:
    refused = sorted(_NOT_IN_RECIPES & arguments.keys())
    if refused:
        raise SurgeryError(
            f"base_args for {str(place)!r} hold {refused[0]!r}. The folder has all values of its own: leave it out."
        )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name next to `path` to write to; it takes the place of `path` when the block ends well, and goes when not."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.touch()
    usual = draft.stat().st_mode
    try:
        yield draft
        # Some versions of safetensors leave a file that nobody else may read.
        draft.chmod(usual)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All values on the CPU, none of them sharing memory with another: safetensors takes no others."""
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise SurgeryError(f"{key!r} has no values that could be saved. Load the model's weights first.")
        tensor = value.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in held else tensor
        held.add(storage)
    return tensors


def _read_values(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SurgeryError(
            f"{str(path)!r} cannot be read ({error}). Name a folder that `se-surgery add` wrote, or write it again."
        ) from error


def _take_dtypes(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the model the dtypes of the values: a half model comes back as one."""
    floating = {tensor.dtype for tensor in values.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        # What is not saved follows, too: buffers that the model computes for itself.
        model.to(dtype=floating.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in values:
            tensor.data = tensor.data.to(values[name].dtype)


def _compare(model: nn.Module, values: Mapping[str, Tensor], folder: Path) -> None:
    """The values have to be the model's, key for key and shape for shape."""
    asked = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in values.items()}
    differences = [
        *(f"{key} is missing" for key in asked.keys() - given.keys()),
        *(f"{key} is not the model's" for key in given.keys() - asked.keys()),
        *(
            f"{key} is {given[key]} and not {asked[key]}"
            for key in asked.keys() & given.keys()
            if asked[key] != given[key]
        ),
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5])
        raise SurgeryError(
            f"{WEIGHTS} in {str(folder)!r} does not fit its recipe: {len(differences)} of {len(asked)} keys differ "
            f"({shown}). The two files are not of one model, or the base has changed: write the model again."
        )
