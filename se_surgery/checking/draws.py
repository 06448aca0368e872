"""Draws: what a forward draws at random by itself, drawn from a generator of one's own.

In: a function of torch that draws, and its arguments. Out: `DRAWING`, what is done in its place: the process's
generators stay as they are, and a second run draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_Draw = Callable[[torch.Generator, Any, tuple[Any, ...], dict[str, Any]], Any]


def _with_generator(generator: torch.Generator, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **{**kwargs, "generator": generator})


def _like(generator: torch.Generator, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`rand_like` and its kind take no generator in older releases; any values will do."""
    return torch.empty_like(args[0], **kwargs).float().uniform_(generator=generator).to(args[0].dtype)


def _dropped(generator: torch.Generator, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dropout with a mask of its own: every map keeps half of what it has."""
    names = ("input", "p", "training", "inplace")
    given = {"p": 0.5, "training": True, "inplace": False, **dict(zip(names, args, strict=False)), **kwargs}
    if not given.get("train", given["training"]) or not given["p"]:
        return function(*args, **kwargs)
    x = given["input"]
    mask = torch.rand(x.shape, generator=generator, device="cpu").lt(0.5).to(x.dtype) / (1 - min(given["p"], 0.5))
    return x.mul_(mask) if given["inplace"] or function.__name__.endswith("_") else x * mask


def _table(space: Any, names: str, draw: _Draw) -> dict[Any, _Draw]:
    return {getattr(space, name): draw for name in names.split()}


DRAWING: dict[Any, _Draw] = {
    **_table(torch, "rand randn randint randperm bernoulli normal", _with_generator),
    **_table(Tensor, "bernoulli bernoulli_ normal_ uniform_ random_", _with_generator),
    **_table(Tensor, "exponential_ cauchy_ log_normal_ geometric_", _with_generator),
    **_table(torch, "rand_like randn_like", _like),
    **_table(F, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout", _dropped),
    **_table(torch, "dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_", _dropped),
}
