"""Assemble: the model that a configuration and weights describe.

In: a checked configuration, and tensors that were read. Out: the model. timm builds it, by the architecture that this
library registers; one whose base is of a class of the user's own is built onto a fresh model of that class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..models.registry import refuse_taken
from ..surgery.graft import copied
from ..surgery.recipe import replay
from .artefact import ARCHITECTURE, refuse_mix, take_digest
from .sources import READ, Checkpoint
from .strict import checked


def assemble(
    config: Mapping[str, Any], checkpoint: Checkpoint, base: nn.Module | None = None, **kwargs: Any
) -> nn.Module:
    """Build the model that a checked configuration describes, with its weights.

    Args:
        config: The configuration.
        checkpoint: The weights.
        base: A fresh model of a class of your own, which is left as it is.
        kwargs: timm's arguments: `num_classes`, `in_chans`, `features_only`, ...

    Raises:
        SurgeryError: It cannot be built, or the weights are not the model's.
    """
    arguments = json.loads(json.dumps(config["model_args"]))
    if base is not None:
        model = _onto(base, arguments, checkpoint, kwargs)
    else:
        refuse_taken(ARCHITECTURE)
        source = {"source": READ, "state_dict": checkpoint, "num_classes": config["num_classes"]}
        described = {**config["pretrained_cfg"], **source}
        model = timm.create_model(ARCHITECTURE, True, described, **{**arguments, **kwargs})
    return _settle(model, checkpoint.tensors)


def _onto(base: nn.Module, arguments: dict[str, Any], checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> nn.Module:
    """A copy of a fresh model, operated on, with the weights."""
    if kwargs:
        raise OptionError(f"{next(iter(kwargs))!r} is for bases by name. Give the base as it should be.")
    expected, recipe = take_digest(arguments.get("digest")), arguments["recipe"]
    refuse_mix(checkpoint.tensors, checkpoint.metadata, recipe, expected, checkpoint.where)
    model = replay(copied(base), recipe["operations"])
    model.load_state_dict(checked(checkpoint.tensors, model, where=checkpoint.where))
    return model


def _settle(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a model the dtypes of its weights, and where those hold more than float32, all of them."""
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if floating <= {torch.float32}:
        return model
    if len(floating) == 1:
        # What is not saved follows, too: buffers that the model computes for itself.
        model.to(dtype=floating.pop())
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        saved = tensors.get(name)
        if saved is not None and held.is_floating_point():
            same = saved.shape == held.shape
            held.data = saved.to(held.device, copy=True) if same else held.data.to(saved.dtype)
    return model
