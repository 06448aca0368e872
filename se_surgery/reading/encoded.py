"""Encoded: parameters that hold their values in another form than numbers, one for each element.

In: a model. Out: an error that names the first of these, or nothing. Quantised ones (torchao, bitsandbytes) and those
that lie in pieces on several devices (DTensor) are tensors of classes of their own, which know some operations of torch
and raise NotImplementedError in all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatientError
from .modes import modes_off

_PLAIN = (Tensor, nn.Parameter)
# Without values on purpose: it stands for a plain tensor.
_SKETCH = "FakeTensor"
# What is operated on, and what is inside of SEs.
_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def is_encoded(tensor: Tensor) -> bool:
    """Whether a tensor's class has its values in another form."""
    kind: Any = type(tensor)
    if kind in _PLAIN or kind.__name__ == _SKETCH:
        return False
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    learns = tensor.is_floating_point() or tensor.is_complex()
    if isinstance(tensor, nn.Parameter) and not learns and not kind.__module__.startswith("torch."):
        return True
    return not _computes(tensor)


@modes_off
def _computes(tensor: Tensor) -> bool:
    """Whether it can do what is asked of every parameter here."""
    try:
        with torch.no_grad():
            torch.empty_like(tensor, device="meta")
            tensor.detach().abs()
    except NotImplementedError:
        return False
    return True


def _held(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and type(tensor) not in _PLAIN:
                yield module, f"{path}.{name}".lstrip("."), tensor


def refuse_encoded(model: nn.Module, what: str) -> None:
    """Refuse a model with an encoded parameter or buffer.

    Args:
        model: The model.
        what: What cannot be done with it, as the end of "and cannot be ...".

    Raises:
        PatientError: There is one; the message says which, and of what class.
    """
    for _, name, tensor in _held(model):
        if is_encoded(tensor):
            raise _refusal(model, name, tensor, what)


def refuse_encoded_layers(model: nn.Module, paths: tuple[str, ...] | None = None) -> None:
    """Refuse a model whose convolutions or normalisations are encoded, or what is in the modules at some paths.

    A classifier may be: nobody operates on it.

    Raises:
        PatientError: There is one.
    """
    for module, name, tensor in _held(model):
        chosen = isinstance(module, _LAYERS) if paths is None else name.startswith(tuple(f"{path}." for path in paths))
        if chosen and is_encoded(tensor):
            raise _refusal(model, name, tensor, "operated on")


def _refusal(model: nn.Module, name: str, tensor: Tensor, what: str) -> PatientError:
    kind = type(tensor)
    return PatientError(
        f"{name!r} of this {type(model).__name__} is of the class {kind.__module__}.{kind.__name__}, whose values are "
        f"quantised, sharded or kept in another form than a plain tensor's, and cannot be {what}. Do that with the "
        f"plain model, and quantise or shard it then."
    )
