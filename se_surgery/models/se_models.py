"""Names of this library in timm's registry, and the functions behind them.

In: `names.json`, `registry/` and timm's registry. Out: `se_<base>` for every base with a place for one more SE,
`se_tv_<base>` for torchvision's, every recipe in `registry/` under its own name, and the generic `se_surgery`. Nothing
is built for it. `timm.list_models(module="se_models")` lists them, `exclude_filters="se_*"` leaves them out.

`timm.list_pretrained` lists a name with each tag of its base: `se_resnet50.a1_in1k` loads the weights of
`resnet50.a1_in1k` and starts as good as those, with SEs that are the identity.

A name that somebody else registered with timm before this was imported stays theirs, and ours is left out. One that
somebody registers afterwards is theirs from then on, as timm has it; timm warns of it.
"""

from __future__ import annotations

import copy
import importlib.util
import keyword
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, is_model
from timm.models import _registry as timm_registry
from torch import nn

from .. import backbones  # noqa: F401 - its names are bases, which have to be in timm's registry before those made of them
from ..errors import OptionError, shorten
from ..files.artefact import ARCHITECTURE
from . import tv
from .bases import TORCHVISION, is_base, unknown
from .catalog import named_bases, recipe_names, shipped_recipe
from .registry import LOCK, forget, is_own, left_out, register

__all__: list[str] = []
# What timm's `register_model` reads the weights of a name from.
default_cfgs: dict[str, DefaultCfg] = {}
# The functions by name. They are no globals of this module, which a name may be equal to; see `__getattr__`.
_functions: dict[str, Callable[..., nn.Module]] = {}
_users: set[str] = set()


def __getattr__(name: str) -> Any:
    if name not in _functions:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _functions[name]


def register_se(name: str, base: str, **options: Any) -> None:
    """Register a model of your own with timm: `timm.create_model(name)` then builds it.

    The model calls itself `se_surgery`, with its base and recipe among its arguments, so that what is saved of it loads
    where the name was never registered.

    Args:
        name: The new name: a plain identifier that timm does not have, and no keyword of Python.
        base: The base: `resnet50`, or `torchvision/resnet50`.
        options: Options of `add_se`, and `lean`.

    Raises:
        SurgeryError: The name is taken or no identifier, there is no such base, or an option means nothing.

    Examples:
        >>> se_surgery.register_se("my_se_resnet50", "resnet50", placement="pre", r=8)
        >>> model = timm.create_model("my_se_resnet50", num_classes=10)
    """
    from ..planning.options import Options, check_flags, check_options

    _check_name(name)
    if not isinstance(base, str):
        raise OptionError(f"base={shorten(base)} is not the name of a model. Give base='resnet50' for instance.")
    if not is_base(base):
        raise OptionError(unknown(base))
    known = (*Options().__dict__, "lean")
    strange = sorted(options.keys() - set(known))
    if strange:
        raise OptionError(f"There is no option {strange[0]!r}. Take one of {', '.join(known)}.")
    architecture = {option: value for option, value in options.items() if option != "lean"}
    check_options(**{**Options().__dict__, **architecture})
    check_flags(lean=options.get("lean", True))
    with LOCK:
        if is_model(name):
            raise OptionError(f"timm has a model {name!r} already. Give another name.")
        try:
            _register(name, base, "by_a_user", se=copy.deepcopy(options))
            _users.add(name)
        except BaseException:
            _take_back(name)
            raise


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(
            f"{shorten(name)} cannot be a model's name. Give a plain identifier, 'my_se_resnet50' for instance."
        )
    if keyword.iskeyword(name) or (name.startswith("__") and name.endswith("__")):
        raise OptionError(
            f"{name!r} is a word of Python itself, and cannot be a model's name. Give another, 'my_se_resnet50' for "
            f"instance."
        )


def unregister_se(name: str) -> None:
    """Take back what `register_se` did.

    Raises:
        OptionError: It was not registered by `register_se`.

    Examples:
        >>> se_surgery.unregister_se("my_se_resnet50")
    """
    with LOCK:
        # Somebody else may have registered a model under the name since, which is theirs.
        ours = sorted(user for user in _users if is_own(user))
        if not isinstance(name, str) or name not in ours:
            raise OptionError(
                f"{shorten(name)} was not registered by register_se. Registered are: {', '.join(ours) or 'none'}."
            )
        try:
            _take_back(name)
        except BaseException:
            # Interrupted half-way: what was begun is brought to its end.
            _take_back(name)
            raise


def _take_back(name: str) -> None:
    _unregister(name)
    _users.discard(name)


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
    try:
        configs = {} if base is None else _configs_of(base)
        if configs:
            default_cfgs[name] = _weights_in(configs)
        _functions[name] = function
        register(function)
    except BaseException:
        _unregister(name)
        raise


def _unregister(name: str) -> None:
    """Take a name out of timm's tables and out of this module's."""
    forget(name, __name__)
    default_cfgs.pop(name, None)
    _functions.pop(name, None)


def _configs_of(base: str) -> dict[str, PretrainedCfg]:
    """A base's weights by tag, the default first; none where they are not known, as of a network that segments."""
    return tv.configs_of(base.removeprefix(TORCHVISION)) if base.startswith(TORCHVISION) else _timm_weights(base)


def _weights_in(configs: dict[str, PretrainedCfg]) -> DefaultCfg:
    """The same as timm holds them; the addresses stay the base's."""
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
    # What somebody else builds under the name of one of our backbones is another network.
    others = list(left_out)
    try:
        for name, (base, maker) in table.items():
            if base in left_out or (is_model(name) and not is_own(name)):
                others.append(name)
            else:
                _register(name, base, maker)
        _warn_of(others)
    except BaseException:
        for name in list(_functions):
            _unregister(name)
        raise


def _warn_of(others: list[str]) -> None:
    """One warning of all names that are somebody else's."""
    if others:
        warnings.warn(
            f"se-surgery leaves out {len(others)} of its names in timm's registry, because somebody else registered "
            f"models under them, or under those of their bases, before it was imported: {', '.join(others)}. Import "
            f"se_surgery first, or build its models by timm.create_model({ARCHITECTURE!r}, base='resnet50').",
            stacklevel=2,
        )


_register_all()
