"""Options: what was asked for, checked before anything is looked at.

In: the keyword arguments of `add_se` and `plan_se`. Out: a frozen `Options`, plain data but for `where`.
"""

from __future__ import annotations

import fnmatch
import keyword
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from timm.layers import get_act_layer

from ..errors import OptionError, PlacementError, StageError, shorten
from ..se.excite import GATES, INITS, LIGHT_ATTENTION, SQUEEZES
from .placements import PLACEMENTS

DEFAULT_PLACEMENT = "standard"
EXISTING = ("skip", "replace", "stack", "error")
Where = Callable[[Any], bool] | str | Collection[str] | None
Widths = int | Mapping[str, int] | Callable[[Any], int] | None


@dataclass(frozen=True)
class Options:
    """Checked options of one operation; see `add_se` for what they mean.

    A `placement` of None keeps the places of the SEs that are replaced; a unit that has none gets its SE at `standard`.
    """

    placement: str | None = "standard"
    r: int | Mapping[int, int] = 16
    stages: tuple[int, ...] | None = None
    where: Where = None
    rd_channels: Widths = None
    rd_divisor: int = 1
    bias: tuple[bool, bool] = (False, False)
    squeeze: str = "avg"
    act: str = "relu"
    gate: str = "sigmoid"
    gate_scale: float | None = None
    init: str = "identity"
    attn: str = "se"
    existing: str = "skip"
    name: str = "se"
    heads: bool = False

    @property
    def scale(self) -> float:
        """The gate's factor: as given, else what makes a zero input of the gate a one."""
        if self.gate_scale is not None:
            return self.gate_scale
        at_zero = GATES[self.gate].at_zero
        return 1.0 / at_zero if self.init == "identity" and at_zero else 1.0

    @property
    def mix(self) -> bool:
        """Whether the identity needs a learnable mix, because no factor makes this gate one at zero."""
        return self.init == "identity" and (self.attn != "se" or not GATES[self.gate].at_zero)


def option_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a verb's arguments those that are options."""
    return {option.name: arguments[option.name] for option in fields(Options)}


def check_options(
    *,
    placement: Any,
    r: Any,
    stages: Any,
    where: Any,
    rd_channels: Any,
    rd_divisor: Any,
    bias: Any,
    squeeze: Any,
    act: Any,
    gate: Any,
    gate_scale: Any,
    init: Any,
    attn: Any,
    existing: Any,
    name: Any,
    heads: Any = False,
) -> Options:
    """Check every option by itself.

    Raises:
        OptionError: A value means nothing there; `PlacementError` and `StageError` for those two.
    """
    if placement is None and not (existing == "replace" and name == Options.name):
        placement = DEFAULT_PLACEMENT
    if placement is not None and placement not in tuple(PLACEMENTS):
        raise PlacementError(f"There is no placement {shorten(placement)}. Take one of {', '.join(PLACEMENTS)}.")
    checked = Options(
        placement=placement,
        r=_ratios(r),
        stages=check_stages(stages),
        where=check_where(where),
        rd_channels=_widths(rd_channels),
        rd_divisor=_whole("rd_divisor", rd_divisor),
        bias=_bias(bias),
        squeeze=_choice("squeeze", squeeze, SQUEEZES),
        act=_activation(act),
        gate=_choice("gate", gate, GATES),
        gate_scale=_factor(gate_scale),
        init=_choice("init", init, INITS),
        attn=_choice("attn", attn, ("se", *LIGHT_ATTENTION)),
        existing=_choice("existing", existing, EXISTING),
        name=_name(name),
        heads=_switch("heads", heads),
    )
    _check_attention(checked)
    _check_identity(checked)
    return checked


# What is about the layers, the squeeze or the gate of an SE, which another kind of attention does not have.
_OF_AN_SE = ("bias", "squeeze", "act", "gate", "gate_scale")


def _check_attention(options: Options) -> None:
    default = Options()
    given = [name for name in _OF_AN_SE if getattr(options, name) != getattr(default, name)]
    if options.attn != "se" and given:
        raise OptionError(
            f"{given[0]}={getattr(options, given[0])!r} is about an SE, and means nothing to attn={options.attn!r}, "
            f'which has its own. Leave it out, or take attn="se".'
        )


def _check_identity(options: Options) -> None:
    given = options.rd_channels
    widths = given.items() if isinstance(given, Mapping) else [("", given)]
    for path, width in widths:
        if width == 1:
            check_width(options, width, path)
    start = GATES[options.gate].at_zero * options.scale
    if options.init == "identity" and options.attn == "se" and not options.mix and start != 1.0:
        raise OptionError(
            f"gate_scale={options.gate_scale!r} makes the {options.gate} gate start at {start:g}, which is not the "
            f'identity. Leave gate_scale out, or take init="paper".'
        )


def check_width(options: Options, width: Any, path: str = "") -> int:
    """A checked width of one SE's hidden layer.

    Raises:
        OptionError: It is no whole number from 1; or 1, of which the identity start can make nothing.
    """
    name = f"rd_channels[{path!r}]" if path else "rd_channels"
    checked = _whole(name, width)
    if options.init == "identity" and checked == 1:
        raise OptionError(
            f"{name}=1 leaves the identity start's one hidden unit without its partner: it may never learn. "
            'Take at least 2, or init="paper".'
        )
    return checked


def check_flags(**flags: Any) -> None:
    """Refuse what is neither True nor False where one of the two is asked for: "no" would be taken for a yes.

    Raises:
        OptionError: The value and its name.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name}={shorten(value)} is neither True nor False. Leave it out, or give one of them.")


def _choice(option: str, value: Any, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{option}={shorten(value)} is not known. Take one of {', '.join(known)}.")
    return value


def _switch(option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{option}={shorten(value)} is not True or False. Give one of them.")
    return value


def _whole(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{option}={shorten(value)} is not a whole number of at least 1. Give one, 16 for instance.")
    return int(value)


def _widths(widths: Any) -> Widths:
    if widths is None or callable(widths):
        return widths  # type: ignore[no-any-return]
    if not isinstance(widths, Mapping):
        return _whole("rd_channels", widths)
    if not widths or not all(isinstance(path, str) for path in widths):
        raise OptionError(
            f"rd_channels={shorten(widths)} is no mapping of sites to widths. Give {{'layer1.0.se': 16}} for instance, "
            f"or a function of a site."
        )
    return {path: _whole(f"rd_channels[{path!r}]", width) for path, width in widths.items()}


def _ratios(r: Any) -> int | Mapping[int, int]:
    if not isinstance(r, Mapping):
        return _whole("r", r)
    if not r:
        raise OptionError("r={} names no stage. Give at least one, {4: 16} for instance.")
    return {_stage(stage): _whole(f"r[{shorten(stage)}]", ratio) for stage, ratio in r.items()}


def check_stages(stages: Any) -> tuple[int, ...] | None:
    """A checked list of stages, or None for all."""
    if stages is None:
        return None
    listed = [stages] if isinstance(stages, int) and not isinstance(stages, bool) else stages
    if isinstance(listed, str) or not isinstance(listed, Collection) or not listed:
        raise StageError(
            f"stages={shorten(stages)} is not a list of stages. Give whole numbers from 1, [3, 4] for instance."
        )
    return tuple(_stage(stage) for stage in listed)


def _stage(stage: Any) -> int:
    if isinstance(stage, bool) or not isinstance(stage, int) or stage == 0:
        raise StageError(f"{shorten(stage)} is not a stage. Stages count from 1. Take -1 for the last.")
    return stage


def resolve_stage(stage: int, count: int) -> int:
    """A stage as a number from 1 to `count`.

    Raises:
        StageError: The model has no such stage.
    """
    resolved = stage if stage > 0 else count + 1 + stage
    if not 1 <= resolved <= count:
        raise StageError(f"There is no stage {stage}: this model has the stages 1 to {count}. Name one of them.")
    return resolved


def check_where(where: Any) -> Where:
    """A checked choice of sites: None, a glob, a tuple of globs, or a predicate."""
    if where is None or callable(where) or (isinstance(where, str) and where):
        return where  # type: ignore[no-any-return]
    if isinstance(where, Collection) and where and all(isinstance(glob, str) for glob in where):
        return tuple(where)
    raise OptionError(
        f"where={shorten(where)} selects nothing. "
        f"Give a glob such as 'layer4.*', a list of them, or a function of a site."
    )


def matches(where: Where, site: Any) -> bool:
    """Whether a choice takes a site: its predicate says so, or a glob fits the site's path or its unit's."""
    if where is None:
        return True
    if callable(where):
        return bool(where(site))
    globs = [where] if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs for path in (site.path, site.unit))


def _bias(bias: Any) -> tuple[bool, bool]:
    pair = (bias, bias) if isinstance(bias, bool) else bias
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(b, bool) for b in pair):
        raise OptionError(
            f"bias={shorten(bias)} is neither a bool nor a pair of them. Give (False, True), for instance."
        )
    return (pair[0], pair[1])


def _activation(act: Any) -> str:
    try:
        known = isinstance(act, str) and bool(act) and get_act_layer(act) is not None
    except (KeyError, AttributeError, AssertionError):
        known = False
    if not known:
        raise OptionError(
            f"act={shorten(act)} is not the name of an activation in timm. Take relu, silu or gelu, for instance."
        )
    return str(act)


def _factor(scale: Any) -> float | None:
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise OptionError(f"gate_scale={shorten(scale)} is not a positive number. Give one, or leave it out.")
    return float(scale)


def _name(name: Any) -> str:
    unusable = not isinstance(name, str) or not name.isidentifier() or name.startswith("_")
    if unusable or keyword.iskeyword(name) or name == "self":
        raise OptionError(f"name={shorten(name)} cannot name a child module. Give a plain identifier such as 'se'.")
    return str(name)
