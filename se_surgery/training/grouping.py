"""Grouping: the parameters of a model as the groups that an optimizer takes, new SEs and base apart.

In: a model, operated on or not, and learning rates. Out: a list of dictionaries, as torch's and timm's optimizers take
it. Layers are timm's: by the model's `group_matcher`, or, without one, by its order and the name of its classifier.
"""

from __future__ import annotations

import math
from fnmatch import fnmatch
from numbers import Real
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from ..errors import NothingToDoError, OptionError, shorten
from ..reading.wrappers import check_module, unwrapped
from ..records import implanted


def param_groups(
    model: nn.Module,
    lr: float,
    se_lr: float | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups for an optimizer: the SEs that this library put in, and the base.

    Biases, normalisations, scalars and vectors, and what the model's `no_weight_decay()` names, are not decayed. Frozen
    parameters are left out. Each group has `lr`, `lr_scale`, `name` (`base, layer 3, no decay`) and `param_names`.

    `layer_decay` is timm's: a layer of the base learns with `layer_decay` to the power of its distance from the head.
    It is the group's `lr_scale`, which timm's schedulers apply. Without one of them, apply it yourself:
    `group["lr"] *= group.pop("lr_scale")`. The SEs are new, wherever they sit, and learn at their full rate.

    Args:
        model: A model; it may be in DataParallel, DistributedDataParallel, FSDP2 or torch.compile.
        lr: Learning rate of the base.
        se_lr: Learning rate of the SEs; by default that of the base.
        weight_decay: Weight decay of what is decayed; by default the optimizer's own.
        layer_decay: Factor from layer to layer of the base, above 0 and at most 1.

    Returns:
        The groups, in the order of the model's parameters.

    Raises:
        OptionError: A value means nothing, or the model says nothing of its layers.
        NothingToDoError: All parameters are frozen.

    Examples:
        >>> groups = se_surgery.param_groups(model, lr=1e-4, se_lr=1e-3, weight_decay=0.05)
        >>> optimizer = torch.optim.AdamW(groups)  # or timm.optim.create_optimizer_v2(groups, "adamw")
    """
    bare = unwrapped(model)
    check_module(bare)
    _check(lr=lr, se_lr=se_lr, weight_decay=weight_decay, layer_decay=layer_decay)
    ours = tuple(f"{path}." for path in implanted(bare))
    if se_lr is not None and not ours:
        raise OptionError(
            f"se_lr={se_lr!r}, but the model has no SE of this library. Leave it out, or use add_se first."
        )
    scales = {} if layer_decay is None else _scales(bare, ours, layer_decay)
    exempt = _not_decayed(bare)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in bare.named_parameters():
        if not parameter.requires_grad:
            continue
        new = name.startswith(ours)
        layer, scale = (None, 1.0) if new else scales.get(name, (None, 1.0))
        parts = ["SEs" if new else "base"]
        parts += [] if layer is None else [f"layer {layer}"]
        parts += ["no decay"] if name in exempt else []
        rate = se_lr if new and se_lr is not None else lr
        group = groups.setdefault(", ".join(parts), {"params": [], "lr": rate, "lr_scale": scale, "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
        if name in exempt:
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
    if not groups:
        raise NothingToDoError("No parameter requires gradients. Unfreeze what is to be trained first.")
    return [{"name": name, **group} for name, group in groups.items()]


# What each number may be: the text for an error, and the test.
_RANGES = {
    "lr": ("a positive number", lambda value: value > 0),
    "se_lr": ("a positive number", lambda value: value > 0),
    "weight_decay": ("a number of at least 0", lambda value: value >= 0),
    "layer_decay": ("a number above 0 and of at most 1", lambda value: 0 < value <= 1),
}


def _check(**values: Any) -> None:
    for name, value in values.items():
        if value is None and name != "lr":
            continue
        text, holds = _RANGES[name]
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not holds(value):
            raise OptionError(f"{name}={shorten(value)} is not {text}. Give one.")


def _not_decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that are not decayed."""
    listed: Any = getattr(model, "no_weight_decay", ())  # a method in timm; others have the names themselves
    listed = listed() if callable(listed) else listed
    found = set()
    for path, module in model.named_modules():
        norm = "norm" in type(module).__name__.lower()
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}".lstrip(".")
            if norm or own.endswith("bias") or parameter.ndim <= 1 or any(fnmatch(name, entry) for entry in listed):
                found.add(name)
    return found


def _scales(model: nn.Module, ours: tuple[str, ...], decay: float) -> dict[str, tuple[int, float]]:
    """The layer of each of the base's parameters and its scale, as timm has them for the base by itself."""
    base = [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(ours)]
    config = getattr(model, "pretrained_cfg", None) or {}
    alone: Any = SimpleNamespace(named_parameters=lambda: iter(base), pretrained_cfg=config)
    matcher: Any = getattr(model, "group_matcher", None)
    layers = group_parameters(alone, matcher(coarse=False), reverse=True) if matcher else auto_group_layers(alone)
    last = max(layers.values())
    if not last:
        raise OptionError(
            f"layer_decay={decay!r}, but this {type(model).__name__} has neither timm's group_matcher nor a "
            f"pretrained_cfg with its classifier, so that it is all one layer. Leave layer_decay out, or give it one."
        )
    return {name: (layer, decay ** (last - layer)) for name, layer in layers.items()}
