"""Torchvision: its networks, created with timm's arguments and described as timm describes its own.

In: one of torchvision's names and timm's arguments. Out: the network, with `pretrained_cfg`, `num_classes`,
`num_features` and `in_chans` on it. The networks know nothing of timm and get none of its methods; what timm's
configurations would say of them is in `names.json`. Those that are not in there (detection, segmentation, video) take
torchvision's arguments only.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from timm.models import FeatureHookNet, PretrainedCfg, adapt_input_conv, load_pretrained
from torch import nn

from ..errors import OptionError
from ..files.sources import as_dict, fetch, names_a_source
from .catalog import torchvision_facts


def create(
    torchvision: ModuleType,
    name: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create one of torchvision's networks.

    Args:
        torchvision: `torchvision.models`.
        name: The network's name there.
        pretrained: Whether to load weights: those that the configuration names, else torchvision's.
        pretrained_cfg: Which of torchvision's weights, `imagenet1k_v2` for instance, or a configuration as timm's.
        pretrained_cfg_overlay: Entries that override the configuration's: `file`, `num_classes`, ...
        cache_dir: Where downloads of a source named in the configuration are kept.
        features_only: Whether to return maps of each resolution instead of class scores.
        kwargs: `num_classes`, `in_chans`, `drop_rate`, behind `features_only` also `out_indices`, and arguments of
            torchvision's function for the network.

    Raises:
        OptionError: There are no such weights, or the network has nothing that an argument could mean.
    """
    facts = torchvision_facts(name)
    own_weights = pretrained and not names_a_source(pretrained_cfg, pretrained_cfg_overlay)
    if facts is None:
        for argument, given in (("features_only", features_only), ("pretrained_cfg", isinstance(pretrained_cfg, str))):
            if given:
                raise _means_nothing(name, argument)
        model = _other(torchvision, name, own_weights, kwargs)
        if pretrained and not own_weights:
            named = {**as_dict(pretrained_cfg), **(pretrained_cfg_overlay or {})}
            model.load_state_dict(fetch(named, cache_dir).tensors)
        return model
    config = resolve_config(name, pretrained_cfg, pretrained_cfg_overlay)
    out_indices = kwargs.pop("out_indices", None) if features_only else None
    in_chans = kwargs.pop("in_chans", config["input_size"][0])
    num_classes = kwargs.pop("num_classes", config["num_classes"])
    # torchvision's DenseNet has an argument of that name itself.
    drop_rate = kwargs.pop("drop_rate", None) if not name.startswith("densenet") else None
    model = torchvision.get_model(name, weights=_weights(name, config) if own_weights else None, **kwargs)
    if drop_rate is not None:
        _set_dropout(model, name, drop_rate)
    _adapt_classes(model, config["classifier"], num_classes)
    _adapt_channels(model, config["first_conv"], in_chans, own_weights)
    model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
    model.num_classes, model.in_chans, model.num_features = num_classes, in_chans, facts["num_features"]
    if pretrained and not own_weights:
        load_pretrained(model, config, num_classes, in_chans, cache_dir=cache_dir)
    return features(model, name, out_indices) if features_only else model


def _other(torchvision: ModuleType, name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """A network that `names.json` has nothing of, by torchvision's own arguments."""
    function = torchvision.get_model_builder(name)
    # torchvision fetches a backbone's weights unless it is told not to.
    unasked = {"weights_backbone"} & inspect.signature(function).parameters.keys()
    model: nn.Module = function(weights="DEFAULT" if pretrained else None, **dict.fromkeys(unasked), **kwargs)
    return model


def features(model: nn.Module, name: str, out_indices: Any = None) -> nn.Module:
    """A network behind timm's hooks: it returns the last maps of each resolution, the largest first."""
    facts = torchvision_facts(name)
    if facts is None:
        raise _means_nothing(name, "features_only")
    model.feature_info = [dict(level) for level in facts["features"]]  # type: ignore[assignment]
    config: Any = model.pretrained_cfg
    indices = tuple(range(len(facts["features"]))) if out_indices is None else out_indices
    wrapper: Any = FeatureHookNet(model, out_indices=indices, no_rewrite=True)
    wrapper.pretrained_cfg = {key: config[key] for key in config if key not in ("num_classes", "classifier")}
    wrapper.default_cfg = wrapper.pretrained_cfg
    features_net: nn.Module = wrapper
    return features_net


def resolve_config(name: str, given: Any, overlay: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of a network with some weights of its own, or as given, with the overlay on it.

    Raises:
        OptionError: There are no such weights.
    """
    configs = configs_of(name)
    if given and not isinstance(given, str):
        said = {key: value for key, value in as_dict(given).items() if value is not None}
        given = PretrainedCfg(**{**_paths(name), **said})
    config = given or next(iter(configs.values())) if not isinstance(given, str) else configs.get(given.lower())
    if config is None:
        raise OptionError(f"{name!r} of torchvision has no weights {given!r}. Take one of {', '.join(configs)}.")
    resolved = dataclasses.replace(config, **dict(overlay or {})).to_dict()
    return {**resolved, "architecture": f"torchvision/{name}"}


def configs_of(name: str) -> dict[str, PretrainedCfg]:
    """The configurations of a network by the name of their weights, torchvision's default first.

    There are none where what timm would say of the network is not known.
    """
    facts = torchvision_facts(name)
    if facts is None:
        return {}
    weights = facts["weights"] or {"": {"input_size": facts["input_size"]}}
    return {tag: PretrainedCfg(tag=tag or None, **_paths(name), **_tuples(config)) for tag, config in weights.items()}


def _paths(name: str) -> dict[str, Any]:
    """Where a network's first convolution and its classifiers are."""
    facts = torchvision_facts(name) or {}
    return {key: facts[key] for key in ("first_conv", "classifier")}


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _weights(name: str, config: Mapping[str, Any]) -> str:
    tag = config.get("tag")
    if not tag:
        raise OptionError(f"torchvision has no weights for {name!r}. Leave pretrained out.")
    return str(tag).upper()


def _means_nothing(name: str, argument: str) -> OptionError:
    """The error for one of timm's arguments, where what timm would say of a network is not known."""
    return OptionError(
        f"Of torchvision's networks those take timm's arguments that have a name, se_tv_resnet18 for instance, and "
        f"{name!r} has none. Leave {argument} out."
    )


def _set_dropout(model: nn.Module, name: str, rate: float) -> None:
    """Set the dropout before the classifier, as timm's argument does; that of auxiliary classifiers is another."""
    layers = [module for path, module in model.named_modules() if isinstance(module, nn.Dropout) and "aux" not in path]
    if rate and not layers:
        raise OptionError(f"torchvision's {name!r} has no dropout that drop_rate={rate!r} could set. Leave it out.")
    for layer in layers:
        layer.p = rate


def _adapt_classes(model: nn.Module, classifiers: Any, num_classes: int) -> None:
    """Give every classifier that is there as many outputs as asked for; other than its own, it starts anew."""
    for path in [classifiers] if isinstance(classifiers, str) else classifiers:
        parent, _, name = path.rpartition(".")
        holder = dict(model.named_modules()).get(parent)
        old = getattr(holder, name, None)
        if isinstance(old, nn.Linear) and old.out_features != num_classes:
            new: nn.Module = (
                nn.Linear(old.in_features, num_classes, old.bias is not None) if num_classes else nn.Identity()
            )
        elif isinstance(old, nn.Conv2d) and old.out_channels != num_classes:
            new = nn.Conv2d(old.in_channels, num_classes, 1) if num_classes else nn.Identity()
        else:
            continue
        setattr(holder, name, new)


def _adapt_channels(model: nn.Module, path: str, in_chans: int, keep_weights: bool) -> None:
    """Give the first convolution as many input channels as asked for; timm's rule makes its weights of the old ones."""
    old = model.get_submodule(path)
    if not isinstance(old, nn.Conv2d) or old.in_channels == in_chans:
        return
    shape = (old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(in_chans, *shape, bias=old.bias is not None)  # type: ignore[arg-type]
    if keep_weights:
        with torch.no_grad():
            new.weight.copy_(adapt_input_conv(in_chans, old.weight))
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
