"""Tensor file: one safetensors file, read with suspicion, and the bytes of one that is to be written.

In: a path, or tensors. Out: tensors and metadata, or bytes. No other format is ever read: a pickle may run code when it
is loaded. What safetensors itself takes without a word (duplicate names, headers of 100 MB) is refused before it looks.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..errors import ArtefactError

# The largest header of timm's CNNs takes 0.3 MB; safetensors itself takes 100 MB and a million empty tensors.
HEADER_LIMIT = 5_000_000
METADATA = "__metadata__"
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
# What other formats begin with.
_PICKLES = {b"PK\x03\x04": "a zip archive, as torch.save writes,", b"\x80": "a pickle", b"\x93NUMPY": "a NumPy file"}


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: The file; a link to one is followed.

    Returns:
        The tensors by name, on the CPU, and the file's metadata.

    Raises:
        ArtefactError: It is missing, no safetensors file, damaged, or larger than its header says.
    """
    path = Path(path)
    header = read_header(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{str(path)!r} is damaged ({error}). Save or fetch it again.") from error
    return tensors, header.get(METADATA, {})


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the header of a safetensors file: what each tensor is, and under `__metadata__` texts by name.

    Raises:
        ArtefactError: There is none that can be read.
    """
    path = Path(path)
    try:
        # Opening a pipe would wait for somebody to write into it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ArtefactError(f"{str(path)!r} is no file. Name a folder with a safetensors file.")
        with open(path, "rb") as file:
            return _header(path, file.read(8), os.fstat(file.fileno()).st_size, file)
    except ArtefactError:
        raise
    except (OSError, ValueError) as error:  # a zero byte in a name is a ValueError
        raise ArtefactError(
            f"{str(path)!r} cannot be read ({error}). Name a folder that holds a saved model."
        ) from error


def _header(path: Path, start: bytes, size: int, file: Any) -> dict[str, Any]:
    for beginning, what in _PICKLES.items():
        if start.startswith(beginning) and int.from_bytes(start, "little") > size:
            raise ArtefactError(
                f"{str(path)!r} is {what} and no safetensors file. Loading a pickle may run whatever its author wrote "
                f"into it, so that it is not read: load it where you trust it, and save the model again."
            )
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
        raise ArtefactError(
            f"{str(path)!r} is no whole safetensors file: of its {size:,} bytes {length:,} would be the header, and "
            f"{HEADER_LIMIT:,} are taken at most. Save or fetch it again."
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{str(path)!r} has no readable header ({error}). Save or fetch it again.") from error
    problem = _problem(header)
    if problem:
        raise ArtefactError(f"{str(path)!r} has a damaged header: {problem}. Save or fetch it again.")
    return dict(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _problem(header: Any) -> str | None:
    """What is wrong with a header, as far as safetensors does not see to it."""
    if not isinstance(header, dict):
        return "it is no mapping"
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        return "its metadata are no texts"
    for name, entry in header.items():
        if name != METADATA and not (isinstance(entry, dict) and entry.get("dtype") in _DTYPES):
            return f"{name[:100]!r} has no dtype that is read"
    return None


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with these tensors, all of it in memory.

    Raises:
        ArtefactError: safetensors cannot hold them, or the header would not be read again.
    """
    try:
        data = to_safetensors(dict(tensors), dict(metadata))
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ArtefactError(f"These tensors cannot be saved ({error}). Convert the model first.") from error
    start = 8 + int.from_bytes(data[:8], "little")
    # safetensors writes the metadata in an order that differs from time to time: equal models shall be equal files.
    parsed = json.loads(data[8:start])
    parsed.pop(METADATA, None)
    header = json.dumps({METADATA: dict(metadata), **parsed}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    length = len(header)
    if length > HEADER_LIMIT:
        raise ArtefactError(
            f"The header would have {length:,} bytes and {HEADER_LIMIT:,} are read at most: the model has too many "
            f"tensors ({len(tensors):,}). Save its parts by themselves."
        )
    return b"".join([length.to_bytes(8, "little"), header, memoryview(data)[start:]])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All values of a model as safetensors takes them: on the CPU, contiguous, none sharing memory with another.

    Raises:
        ArtefactError: A value is on the meta device, none at all, or one parameter stands in two places.
    """
    tensors: dict[str, Tensor] = {}
    held: dict[tuple[int, int], str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ArtefactError(f"{key!r} is a {type(value).__name__} and no tensor, and cannot be saved. Take it out.")
        if value.is_meta:
            raise ArtefactError(f"{key!r} is on the meta device and has no values. Load the model's weights first.")
        if isinstance(value, nn.Parameter) and value.numel():
            other = held.setdefault((value.data_ptr(), value.numel()), key)
            if other != key:
                raise ArtefactError(
                    f"{key!r} and {other!r} share their memory, and would be two after loading. Give each place a "
                    f"parameter of its own, by copy.deepcopy for instance."
                )
        tensors[key] = _own(value.detach().to("cpu").contiguous())
    return tensors


def _own(tensor: Tensor) -> Tensor:
    """A tensor that is not a part of a larger one."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
