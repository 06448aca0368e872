"""Entry: what `timm.create_model` builds for this library's names.

In: a base's name, what to do to it, and timm's own arguments. Out: the operated model as timm makes models: with its
classes, channels, weights, `features_only` wrapper and `pretrained_cfg`.

Weights are one of two kinds. Those of a base (its tags', or a checkpoint without any tensor of an SE) go into the base
by its own function, with its own checkpoint filter, and then it is operated on: with the identity start it is as good
as the base. Those of an operated model hold every tensor of every SE; they are checked key for key and loaded after the
operation. A checkpoint with some SE tensors and not all is an error, whatever the number of classes.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet, load_pretrained
from timm.models._features import FeatureGetterNet
from torch import nn

from ..errors import ArtefactError, OptionError
from ..files.artefact import OWN, refuse_mix
from ..files.config import check_foreign
from ..files.sources import FOREIGN, KEYS, READ, Checkpoint, as_dict, fetch
from ..files.stem import fit_stems
from ..files.strict import checked
from ..planning.options import Options, check_flags
from ..records import BASE, implanted
from ..surgery.graft import add_se
from ..surgery.recipe import recipe_of, replay
from . import tv
from .bases import TORCHVISION
from .order import Order, Surgery

_PREFIX = "se_"
# An argument of timm's own EfficientNets, which is none of ours.
_NOT_OURS = frozenset({"se_layer"})
# Options that say how SEs run, and not what a model is: a recipe says nothing of them.
RUNNING = ("lean",)
# Arguments of `build` that are not for those who call a model's name.
_RESERVED = frozenset({"name", "base", "surgery", "belongs"})
# timm's classes that wrap a network as it is, and so can be given an operated one.
_WRAPPERS = (FeatureDictNet, FeatureHookNet, FeatureGraphNet, FeatureGetterNet)


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell `add_se`'s options, `se_r=8` for instance, from the base's arguments.

    Returns:
        The options without the prefix, and the rest.

    Raises:
        OptionError: There is no such option.

    Examples:
        >>> split_options({"se_r": 8, "num_classes": 10})
        ({'r': 8}, {'num_classes': 10})
    """
    known = [*(option.name for option in dataclasses.fields(Options)), *RUNNING]
    ours = {name for name in arguments if name.startswith(_PREFIX)} - _NOT_OURS
    unknown = sorted(name for name in ours if name.removeprefix(_PREFIX) not in known)
    if unknown:
        listed = ", ".join(_PREFIX + name for name in known)
        raise OptionError(f"There is no option {unknown[0]!r}. Take one of {listed}.")
    refused = sorted(_RESERVED & arguments.keys())
    if refused:
        raise OptionError(f"{refused[0]!r} is no argument of this model. Leave it out.")
    options = {name.removeprefix(_PREFIX): arguments[name] for name in arguments if name in ours}
    if isinstance(options.get("r"), Mapping):
        # JSON has no other keys than strings.
        options["r"] = {
            int(stage) if str(stage).lstrip("-").isdigit() else stage: r for stage, r in options["r"].items()
        }
    return options, {name: value for name, value in arguments.items() if name not in ours}


def adding(options: Mapping[str, Any]) -> Surgery:
    """The surgery that puts SEs in."""
    return lambda model: add_se(model, **options)


def following(recipe: Mapping[str, Any], lean: bool = True) -> Surgery:
    """The surgery that a checked recipe describes; its SEs run in the lean form or in the plain one."""
    check_flags(lean=lean)

    def follow(model: nn.Module) -> None:
        replay(model, recipe["operations"])
        if not lean:
            _run_plainly(model, implanted(model))

    return follow


def _run_plainly(model: nn.Module, paths: Iterable[str]) -> None:
    for path in paths:
        vars(model.get_submodule(path))["lean"] = False


def build(
    name: str,
    base: str,
    surgery: Surgery,
    *,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    pretrained_model_args: Any = None,
    cache_dir: Any = None,
    features_only: bool = False,
    belongs: Callable[[Checkpoint], None] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build an operated model as timm builds one of its own.

    Args:
        name: The architecture's name, for `pretrained_cfg`.
        base: The base: `resnet50`, `resnet50.a1_in1k` or `torchvision/resnet50`.
        surgery: What to do to it.
        pretrained: Whether to load weights.
        pretrained_cfg: A tag of the base's weights, or a configuration.
        pretrained_cfg_overlay: Entries that override the configuration's; `file` and the like name a checkpoint of the
            base or of the operated model.
        pretrained_model_args: What timm says of the saved model; its values are among `kwargs` already.
        cache_dir: Where downloads are kept.
        features_only: Whether to return maps of each level instead of class scores.
        belongs: Refuses weights that were not saved with the recipe.
        kwargs: Arguments of the base: `num_classes`, `in_chans`, `output_stride`, `out_indices`, ...

    Raises:
        SurgeryError: An argument means nothing, the weights cannot be had or are not the model's, or the surgery cannot
            be done.
    """
    channels = kwargs.get("in_chans")
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise OptionError(f"in_chans={channels!r} is no number of input channels. Give 1 or more.")
    order = Order(base, pretrained_cfg, dict(pretrained_cfg_overlay or {}), cache_dir, kwargs)
    source = order.config.get("source")
    if source in FOREIGN:
        check_foreign(order.pretrained_cfg, pretrained_model_args)
    checkpoint = fetch(order.config, cache_dir) if pretrained and order.names_a_source else None
    if checkpoint is not None:
        order = order.without_source()
        if belongs is not None:
            belongs(checkpoint)
        elif OWN in checkpoint.metadata:
            refuse_mix(*checkpoint[:2], {}, None, checkpoint.where)
        sketch = order.without_features().sketch(surgery)
        if source in (*FOREIGN, READ):
            # Before anything of the sizes that a configuration asks for is made.
            _checked(sketch, checkpoint, kwargs.get("in_chans"))
        elif not _holds_ses(checkpoint, sketch):
            order, checkpoint = order.with_weights(checkpoint), None
    finish = _finishing(surgery, checkpoint, kwargs.get("in_chans"))
    make = _features if features_only else _whole
    model = make(order, pretrained and checkpoint is None, finish, surgery)
    return _signed(model, name, order, pretrained_cfg_overlay)


def _se_keys(model: nn.Module) -> set[str]:
    """The keys of every SE that the surgery put in."""
    paths = tuple(f"{path}." for path in implanted(model))
    return {key for key in model.state_dict() if key.startswith(paths)}


def _holds_ses(checkpoint: Checkpoint, sketch: nn.Module) -> bool:
    """Whether a checkpoint is one of the operated model, and not of its base.

    Raises:
        ArtefactError: It holds some of the SEs' tensors and not all, or says that it is an operated model's.
    """
    own = _se_keys(sketch)
    missing = sorted(own - checkpoint.tensors.keys())
    if own and not missing:
        return True
    if not own:
        return not checkpoint.tensors.keys() - sketch.state_dict().keys()
    if len(missing) < len(own) or OWN in checkpoint.metadata:
        raise ArtefactError(
            f"{checkpoint.where} lacks {len(missing)} of the {len(own)} tensors of the SEs, {missing[0]!r} for one. "
            f"Give a checkpoint of this operated model, or one of its base, which has none of them."
        )
    return False


def _finishing(surgery: Surgery, checkpoint: Checkpoint | None, in_chans: int | None) -> Surgery:
    """The surgery, and loading what is for the operated model only."""

    def finish(model: nn.Module) -> None:
        surgery(model)
        if checkpoint is not None:
            _load(model, checkpoint, in_chans)

    return finish


def _load(model: nn.Module, checkpoint: Checkpoint, in_chans: int | None) -> None:
    """Load an operated model's weights by timm's rules for other classes and channels, and strictly all the same."""
    source = {"state_dict": checkpoint.tensors, "source": None}
    config = {**as_dict(getattr(model, "pretrained_cfg", None)), **dict.fromkeys(KEYS), **source}
    classes, channels = _wanted(model, config, in_chans)
    saved = (config.get("input_size") or (None,))[0]

    def strict(state_dict: Any, target: nn.Module) -> Any:
        tensors = _checked(target, checkpoint._replace(tensors=state_dict), in_chans)
        # Weights that do not say for how many channels they are, are for the model's, or have been refused.
        fitted = fit_stems(tensors, config.get("first_conv"), saved or channels or 0, channels or 0)
        return _of_this_version(fitted, target)

    # When timm comes to the stems they fit already.
    sizes = {"input_size": (channels, *config["input_size"][1:])} if saved else {}
    fitted = {**config, "first_conv": None, **sizes}
    load_pretrained(model, fitted, classes or 0, channels or 3, filter_fn=strict)


def _of_this_version(tensors: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """A state dict that says of which versions its modules are, those of the model; files of tensors do not.

    torchvision's MNASNet loads no other, and asks nothing else of it: keys and shapes are the model's already.
    """
    state = OrderedDict(tensors)
    state._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    return state


def _checked(model: nn.Module, checkpoint: Checkpoint, in_chans: int | None) -> dict[str, Any]:
    """The weights, if they are the model's."""
    config = as_dict(getattr(model, "pretrained_cfg", None))
    classes, channels = _wanted(model, config, in_chans)
    return checked(checkpoint.tensors, model, config, num_classes=classes, in_chans=channels, where=checkpoint.where)


def _wanted(model: nn.Module, config: Mapping[str, Any], in_chans: int | None) -> tuple[int | None, int | None]:
    """Numbers of classes and of input channels that the model was made for, as far as they are known."""
    classes = getattr(model, "num_classes", config.get("num_classes"))
    return classes, in_chans or (config.get("input_size") or (None,))[0]


def _whole(order: Order, pretrained: bool, finish: Surgery, surgery: Surgery) -> nn.Module:
    model = order.create(pretrained)
    finish(model)
    return model


def _features(order: Order, pretrained: bool, finish: Surgery, surgery: Surgery) -> nn.Module:
    """The operated network behind `features_only`, in the class that timm has for this base."""
    if order.base.startswith(TORCHVISION):
        kwargs = dict(order.kwargs)
        out_indices = kwargs.pop("out_indices", None)
        model = _whole(dataclasses.replace(order, kwargs=kwargs), pretrained, finish, surgery)
        return tv.features(model, order.base.removeprefix(TORCHVISION), out_indices)
    wrapper = order.sketch(features_only=True)
    if isinstance(wrapper, _WRAPPERS):
        return order.create(pretrained, features_only=True, feature_cls=_operating(wrapper, finish))
    # A class of its own, that is the network without its head: its blocks are where they are in the whole network.
    plain = order.without_features()
    model = order.create(pretrained, features_only=True)
    if pretrained:
        whole = plain.sketch(surgery)
    else:
        whole = plain.create(False)
        finish(whole)
    replay(model, recipe_of(whole)["operations"], partial=True)
    _run_plainly(model, (path for path in implanted(model) if vars(whole.get_submodule(path)).get("lean") is False))
    if not pretrained:
        values = whole.state_dict()
        model.load_state_dict({key: values[key] for key in model.state_dict()})
    return model


def _operating(wrapper: nn.Module, finish: Surgery) -> type[nn.Module]:
    """The class of a timm wrapper that operates on the network before it wraps it."""
    kind = type(wrapper)

    class Operating(kind):  # type: ignore[valid-type, misc]
        def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            finish(model)
            # Before 1.0.31 timm sees to these two only where it is given a class by a string.
            if not issubclass(kind, (FeatureDictNet, FeatureHookNet)):
                kwargs.pop("flatten_sequential", None)
            if issubclass(kind, FeatureGetterNet):
                kwargs["output_fmt"] = wrapper.output_fmt
            # What is returned is no instance of this class, so that Python does not call its __init__.
            return kind(model, *args, **kwargs)

    return Operating


def _signed(model: nn.Module, name: str, order: Order, overlay: Mapping[str, Any] | None) -> nn.Module:
    """Write down whose model this is: the architecture in timm's configuration, and the base."""
    config = {**as_dict(getattr(model, "pretrained_cfg", None)), **(overlay or {}), "architecture": name}
    config.pop("state_dict", None)
    model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
    model.__dict__[BASE] = order.base.partition(".")[0]
    # As timm notes them since 1.0.31, less what was made here of them; it adds the arguments of the call.
    model._model_args = dict(order.kwargs)  # type: ignore[assignment]
    return model
