"""Wrappers: what a model may be in, the model itself, and what it holds.

In: a model, perhaps in DataParallel, DistributedDataParallel or torch.compile. Out: the model that they hold. They are
known by name: importing torch.distributed's to compare classes would cost more than the surgery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import PatientError

# Where a wrapper holds the model.
_INSIDE = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def unwrapped(model: Any) -> Any:
    """The model itself, out of DataParallel, DistributedDataParallel and torch.compile; it need not be in any.

    Examples:
        >>> unwrapped(torch.compile(model)) is model
        True
    """
    while type(model).__name__ in _INSIDE:
        model = getattr(model, _INSIDE[type(model).__name__])
    return model


def check_module(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        PatientError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise PatientError(f"{type(model).__name__!r} is not an nn.Module. Give the model itself.")


def tensors_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of modules by their paths, and then their buffers, each with its name.

    What `named_parameters` and `named_buffers` do walks over all modules for each; a tensor in two places comes twice.
    """
    for group in ("_parameters", "_buffers"):
        for path, module in modules.items():
            for name, tensor in module.__dict__[group].items():
                if tensor is not None:
                    yield f"{path}.{name}".lstrip("."), tensor
