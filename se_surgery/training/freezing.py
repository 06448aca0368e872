"""Freezing: the base of an operated model held as it is, so that its SEs can be trained alone, and given back.

In: an operated model. Out: the same model, no module of it replaced. Each module of the base notes in its `__dict__`
what it was like; those that keep statistics, BatchNorm above all, also get a `train` of their own that leaves them in
evaluation. Both are plain attributes, which deepcopy and pickle take along and no state dict has.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn

from ..errors import NothingToDoError, OptionError, PatientError, shorten
from ..reading.wrappers import check_module, unwrapped
from ..records import FROZEN, implanted
from ..surgery.journal import Journal, guarded

# Buffers that a module in training mode changes: those of normalisations, and of both forms of spectral_norm.
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "weight_u", "_u"}
# What fixes which parameters it averages or holds when it is made.
_FIXED = {"DistributedDataParallel", "FullyShardedDataParallel"}


def freeze_base(model: nn.Module, head: bool | str | Collection[str] = False) -> nn.Module:
    """Freeze all of a model but the SEs that this library put in, in place, and return it.

    The base's parameters no longer require gradients, and its BatchNorms and other modules with running statistics
    stay in evaluation, whatever `model.train()` says; dropout goes on following it. No module is replaced, and keys,
    outputs in evaluation, copies, pickles and whatever this library does to models are as before. In front of the first
    SE no activation is kept for the backward pass.

    Freeze before wrapping in DistributedDataParallel and before making optimizers: both take what is trained then.

    Args:
        model: An operated model.
        head: Whether its classifier is trained, too: True, or the path of it, or several.

    Returns:
        The model.

    Raises:
        NothingToDoError: Nothing would be left to train.
        OptionError: There is no such head.
        PatientError: The model is in DistributedDataParallel already.

    Examples:
        >>> model = se_surgery.add_se(timm.create_model("resnet50", pretrained=True))
        >>> se_surgery.freeze_base(model).train()
        >>> optimizer = torch.optim.AdamW(se_surgery.param_groups(model, lr=1e-3))
    """
    bare = _operable(model)
    kept = [*map(bare.get_submodule, implanted(bare)), *_heads(bare, head)]
    learning = {id(parameter) for module in kept for parameter in module.parameters()}
    flags = _flags(bare)
    if not any(flags[number] for number in learning):
        raise NothingToDoError(
            "Nothing would be left to train: the model has no SE of this library that requires gradients. "
            "Put some in with add_se first, or name a head to train."
        )
    untouched = {id(module) for one in kept for module in one.modules()}
    flags = {number: flag for number, flag in flags.items() if number not in learning}
    return guarded(_freeze_all, model, untouched, flags)


def unfreeze_base(model: nn.Module) -> nn.Module:
    """Undo `freeze_base`, in place, and return the model.

    Each parameter requires gradients if it did before; each module that was held in evaluation gets the mode that it
    would have by now. A model that is not frozen stays as it is.

    Args:
        model: The model.

    Raises:
        PatientError: The model is in DistributedDataParallel, which would not average the gradients of the base.

    Examples:
        >>> se_surgery.unfreeze_base(model)
        >>> optimizer = torch.optim.AdamW(se_surgery.param_groups(model, lr=1e-4, se_lr=1e-3))
    """
    _operable(model)
    return guarded(_unfreeze_all, model)


def _freeze_all(journal: Journal, model: nn.Module, untouched: set[int], flags: dict[int, bool]) -> nn.Module:
    """Freeze all modules but the untouched ones, as if nothing had been frozen before."""
    _unfreeze_all(journal, model)
    for module in unwrapped(model).modules():
        if id(module) not in untouched:
            _freeze(journal, module, flags)
    return model


def _unfreeze_all(journal: Journal, model: nn.Module) -> nn.Module:
    for module in unwrapped(model).modules():
        if FROZEN in module.__dict__:
            _unfreeze(journal, module)
    return model


def _unfreeze(journal: Journal, module: nn.Module) -> None:
    """Give a module and its own parameters back what it has noted of them."""
    found = journal.open(module).__dict__.pop(FROZEN)
    for name, flag in found["requires_grad"].items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            journal.flag(parameter).requires_grad_(flag)
    if "training" in found:
        module.training = found["training"]
        del module.__dict__["train"]
        module.__dict__.update(found["train"])


def _operable(model: Any) -> nn.Module:
    """The model itself.

    Raises:
        PatientError: It is none, or it is too late to change what is trained.
    """
    bare: nn.Module = unwrapped(model)
    check_module(bare)
    late = {type(module).__name__ for module in model.modules()} & _FIXED
    if late:
        raise PatientError(
            f"The model is in {late.pop()}, which has fixed what is trained. Take the model out of it (`.module`), "
            f"freeze or unfreeze, and wrap it anew."
        )
    return bare


def _flags(model: nn.Module) -> dict[int, bool]:
    """Of every parameter, by its id, whether it requires gradients when nothing is frozen."""
    flags = {}
    for module in model.modules():
        found = module.__dict__.get(FROZEN, {"requires_grad": {}})["requires_grad"]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                flags[id(parameter)] = found.get(name, parameter.requires_grad)
    return flags


def _freeze(journal: Journal, module: nn.Module, flags: dict[int, bool]) -> None:
    """Freeze a module's own statistics, and those of its own parameters that have a flag here."""
    journal.open(module)
    own = {name: p for name, p in module._parameters.items() if p is not None and id(p) in flags}
    found: dict[str, Any] = {"requires_grad": {name: flags[id(parameter)] for name, parameter in own.items()}}
    for parameter in own.values():
        journal.flag(parameter).requires_grad_(False)
    statistics = any(name in _STATISTICS and buffer is not None for name, buffer in module._buffers.items())
    if statistics:
        found |= {"training": module.training, "train": {k: v for k, v in module.__dict__.items() if k == "train"}}
        module.training = False
        module.__dict__["train"] = partial(_held, module)
    if own or statistics:
        module.__dict__[FROZEN] = found


def _held(module: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a module that stays in evaluation: its children go along, and it notes what it was asked for."""
    type(module).train(module, mode)
    module.__dict__[FROZEN]["training"] = mode
    module.training = False
    return module


def _heads(model: nn.Module, head: Any) -> list[nn.Module]:
    """The modules that are trained besides the SEs."""
    if head is False:
        return []
    paths = _classifiers(model) if head is True else [head] if isinstance(head, str) else head
    modules = {path: module for path, module in model.named_modules() if path}
    known = isinstance(paths, Collection) and all(isinstance(path, str) and path in modules for path in paths)
    if not known or not paths:
        raise OptionError(
            f"head={shorten(head)} is no module of this {type(model).__name__}. "
            f"Give the path of its classifier, {list(modules)[-1]!r} for instance."
        )
    return [modules[path] for path in paths]


def _classifiers(model: nn.Module) -> list[str]:
    """Paths of the classifier: the one that timm's method gives, or that timm's description of the weights names."""
    method: Any = getattr(model, "get_classifier", None)
    if method is not None:
        found = method()
        wanted = set(map(id, found if isinstance(found, (tuple, list)) else [found]))
        return [path for path, module in model.named_modules() if id(module) in wanted]
    config = getattr(model, "pretrained_cfg", None)
    named = (config.get("classifier") if isinstance(config, dict) else None) or ()
    return [named] if isinstance(named, str) else list(named)
