"""Sources: the tensors that a configuration names, before they are loaded into anything.

In: timm's `pretrained_cfg`, with a file, a state dict, an address, a folder or a repository in it. Out: the tensors,
and what a safetensors file says of itself. A folder or repository is this library's own artefact, and of those only
safetensors is read; elsewhere a pickle is read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import load_state_dict
from torch import Tensor

from ..errors import SurgeryError
from .artefact import WEIGHTS, refuse_pickles
from .hub import download
from .tensorfile import read_tensors

KEYS = ("state_dict", "file", "hf_hub_id", "url")
# A folder or a repository that a model is created from, its configuration included, as timm calls them.
FOREIGN = ("local-dir", "hf-hub")
# The same, read and checked by this library already: the tensors are a `Checkpoint`.
READ = "se_surgery"


class Checkpoint(NamedTuple):
    """Tensors, the metadata of their file, and where they come from, for messages."""

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    where: str


def names_a_source(pretrained_cfg: Any, overlay: Mapping[str, Any] | None) -> bool:
    """Whether weights were named, other than those that timm or torchvision has for the network."""
    given = {**as_dict(pretrained_cfg), **(overlay or {})}
    return any(given.get(key) for key in KEYS)


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as a mapping, be it timm's own class or one already; a tag, or none, is empty."""
    if config is None or isinstance(config, str):
        return {}
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))


def fetch(config: Mapping[str, Any], cache_dir: Any = None) -> Checkpoint:
    """Read the tensors that a configuration names.

    The order is timm's: a folder or repository that the model was created from, else `state_dict`, `file`, `hf_hub_id`
    and `url`, the first that is there.

    Args:
        config: A resolved `pretrained_cfg`.
        cache_dir: Where downloads are kept.

    Raises:
        SurgeryError: They cannot be read.
    """
    if config.get("source") == "local-dir":
        refuse_pickles(Path(config["file"]))
        return _safetensors(Path(config["file"]) / WEIGHTS)
    if config.get("source") == "hf-hub":
        return _safetensors(download(config["hf_hub_id"], WEIGHTS, cache_dir))
    key = next((key for key in KEYS if config.get(key)), None)
    if key is None:
        raise SurgeryError("The configuration names no weights. Give a file, or leave pretrained out.")
    return _READERS[key](config, cache_dir)


def _from_state_dict(config: Mapping[str, Any], cache_dir: Any) -> Checkpoint:
    given = config["state_dict"]
    return given if isinstance(given, Checkpoint) else Checkpoint(dict(given), {}, "The state dict")


def _from_file(config: Mapping[str, Any], cache_dir: Any) -> Checkpoint:
    return _any(Path(config["file"]))


def _from_hub(config: Mapping[str, Any], cache_dir: Any) -> Checkpoint:
    return _any(download(config["hf_hub_id"], config.get("hf_hub_filename") or WEIGHTS, cache_dir))


def _from_url(config: Mapping[str, Any], cache_dir: Any) -> Checkpoint:
    url = config["url"]
    try:
        found = torch.hub.load_state_dict_from_url(url, model_dir=cache_dir, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, of the disk, of the pickle: they have no class in common
        raise SurgeryError(f"{url!r} cannot be read ({type(error).__name__}: {error}). Name another.") from error
    return Checkpoint(found, {}, url)


_READERS = {"state_dict": _from_state_dict, "file": _from_file, "hf_hub_id": _from_hub, "url": _from_url}


def _any(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        # timm knows the wrappings of checkpoints (`state_dict`, `model_ema`, `module.`); it allows weights only.
        return Checkpoint(load_state_dict(str(path), weights_only=True), {}, str(path))
    except Exception as error:  # whatever a damaged pickle makes torch.load raise
        raise SurgeryError(f"{str(path)!r} cannot be read ({type(error).__name__}: {error}). Name another.") from error


def _safetensors(path: Path) -> Checkpoint:
    return Checkpoint(*read_tensors(path), str(path))
