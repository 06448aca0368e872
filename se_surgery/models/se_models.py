"""Names of this library in timm's registry, and the functions behind them.

In: `names.json`, `registry/` and timm's registry. Out: `se_<base>` for every base with a place for one more SE,
`se_tv_<base>` for torchvision's, every recipe in `registry/` under its own name, and the generic `se_surgery`. Nothing
is built for it. `timm.list_models(module="se_models")` lists them, `exclude_filters="se_*"` leaves them out.

`timm.list_pretrained` lists a name with each tag of its base: `se_resnet50.a1_in1k` loads the weights of
`resnet50.a1_in1k` and starts as good as those, with SEs that are the identity.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, is_model, register_model
from timm.models import _registry as timm_registry
from torch import nn

from .. import backbones  # noqa: F401 - its names are bases, which have to be in timm's registry before those made of them
from ..errors import OptionError, SurgeryError, shorten
from ..files.artefact import ARCHITECTURE
from . import tv
from .bases import OWN_MODULE, TORCHVISION, is_base, unknown
from .catalog import named_bases, recipe_names, shipped_recipe

__all__: list[str] = []
# What timm's `register_model` reads the weights of a name from.
default_cfgs: dict[str, DefaultCfg] = {}
_users: set[str] = set()


def register_se(name: str, base: str, **options: Any) -> None:
    """Register a model of your own with timm: `timm.create_model(name)` then builds it.

    The model calls itself `se_surgery`, with its base and recipe among its arguments, so that what is saved of it loads
    where the name was never registered.

    Args:
        name: The new name: a plain identifier that timm does not have.
        base: The base: `resnet50`, or `torchvision/resnet50`.
        options: Options of `add_se`.

    Raises:
        SurgeryError: The name is taken or no identifier, there is no such base, or an option means nothing.

    Examples:
        >>> se_surgery.register_se("my_se_resnet50", "resnet50", placement="pre", r=8)
        >>> model = timm.create_model("my_se_resnet50", num_classes=10)
    """
    from ..planning.options import Options, check_options

    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(
            f"{shorten(name)} cannot be a model's name. Give a plain identifier, 'my_se_resnet50' for instance."
        )
    if is_model(name):
        raise OptionError(f"timm has a model {name!r} already. Give another name.")
    if not isinstance(base, str):
        raise OptionError(f"base={shorten(base)} is not the name of a model. Give base='resnet50' for instance.")
    if not is_base(base):
        raise OptionError(unknown(base))
    strange = sorted(options.keys() - Options().__dict__.keys())
    if strange:
        raise OptionError(f"There is no option {strange[0]!r}. Take one of {', '.join(Options().__dict__)}.")
    check_options(**{**Options().__dict__, **options})
    _users.add(name)
    _register(name, base, "by_a_user", se=options)


def unregister_se(name: str) -> None:
    """Take back what `register_se` did.

    Raises:
        OptionError: It was not registered by `register_se`.

    Examples:
        >>> se_surgery.unregister_se("my_se_resnet50")
    """
    if name not in _users:
        listed = ", ".join(sorted(_users)) or "none"
        raise OptionError(f"{shorten(name)} was not registered by register_se. Registered are: {listed}.")
    _users.remove(name)
    for tagged in timm_registry._model_with_tags.pop(name, []):
        timm_registry._model_pretrained_cfgs.pop(tagged, None)
        timm_registry._model_has_pretrained.discard(tagged)
    timm_registry._model_has_pretrained.discard(name)
    for table in ("_model_entrypoints", "_model_to_module", "_model_default_cfgs", "_model_pretrained_cfgs"):
        getattr(timm_registry, table).pop(name, None)
    timm_registry._module_to_models[OWN_MODULE].discard(name)
    default_cfgs.pop(name, None)
    __all__.remove(name)
    delattr(sys.modules[__name__], name)


def _register(name: str, base: str | None, maker: str, **given: Any) -> None:
    """Give timm a function of that name, and the weights of its base.

    Args:
        name: The name.
        base: The base's, or None where the call names it.
        maker: The function of `named` that builds the model; it is imported when it is called.
        given: Arguments for it.
    """

    def function(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        make = getattr(importlib.import_module(".named", __package__), maker)
        known = {} if base is None else {"base": base}
        model: nn.Module = make(name, pretrained=pretrained, **known, **given, **kwargs)
        return model

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{base or 'Any base'} with squeeze-and-excitation modules."
    if base is not None:
        default_cfgs[name] = _weights_of(base)
    setattr(sys.modules[__name__], name, function)
    register_model(function)


def _weights_of(base: str) -> DefaultCfg:
    """A base's weights by tag, the default first; the addresses stay the base's."""
    configs = tv.configs_of(base.removeprefix(TORCHVISION)) if base.startswith(TORCHVISION) else _timm_weights(base)
    pretrained = any(config.has_weights for config in configs.values())
    return DefaultCfg(tags=deque(configs), cfgs=configs, is_pretrained=pretrained)


def _timm_weights(base: str) -> dict[str, PretrainedCfg]:
    plain, _, tag = base.partition(".")
    # As get_arch_pretrained_cfgs does, without a deep copy of every one: register_model makes copies of its own.
    names = timm_registry._model_with_tags.get(plain, [])
    configs = {full.partition(".")[2]: timm_registry._model_pretrained_cfgs[full] for full in names}
    return {tag: configs[tag], **configs} if tag in configs else configs


def _register_all() -> None:
    names = named_bases()
    table: dict[str, tuple[str | None, str]] = {ARCHITECTURE: (None, "generic")}
    table.update({f"se_{base}": (base, "by_options") for base in names["timm"] if is_model(base)})
    if importlib.util.find_spec("torchvision") is not None:
        full = {base: TORCHVISION + base for base in names["torchvision"]}
        table.update({f"se_tv_{base}": (path, "by_options") for base, path in full.items()})
    table.update({name: (shipped_recipe(name)["base"], "shipped") for name in recipe_names()})
    for name, (base, maker) in table.items():
        if is_model(name):
            raise SurgeryError(f"timm has a model {name!r} of its own by now. Take another version of one of the two.")
        _register(name, base, maker)


_register_all()
