"""Schema: what a recipe may hold, checked before anything is built for it.

In: parsed JSON from anywhere, a stranger's included. Out: nothing, or an error that names the place. One schema serves
the recipes in `registry/`, those on the Hub, and `Plan.to_json()`. Every size has a bound: a recipe describes a network
that people train, and one beyond these bounds is damaged or means harm.

A check is a function `(value, place) -> None` that raises; the tables below are built of such functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import SurgeryError, shorten

FORMAT = "se_surgery.recipe"
VERSION = 1

Check = Callable[[Any, str], None]

_PATH = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)  # torchvision has a `block1-0`
# Wider than any network that is trained today by a factor of 16 or more.
_WIDTH, _SITES, _OPERATIONS, _TEXT, _PARAMETERS = 2**20, 20_000, 100, 2_000, 2**40


def damaged(place: str, value: Any, wanted: str) -> SurgeryError:
    """The error for a value that is not what its place wants; a long value is cut short."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return SurgeryError(
        f"The recipe is damaged: {place} is {shown}, and should be {wanted}. "
        f"Take the recipe from where it was written, or write it anew with `se-surgery recipe`."
    )


def _is(kind: Callable[[Any], bool], wanted: str) -> Check:
    def check(value: Any, place: str) -> None:
        if not kind(value):
            raise damaged(place, value, wanted)

    return check


def _whole(low: int, high: int) -> Check:
    return _is(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f"a whole number from {low} to {high}",
    )


def _one_of(*known: Any) -> Check:
    return _is(lambda v: isinstance(v, str) and v in known, f"one of {', '.join(known)}")


def _listed(item: Check, limit: int, least: int = 0) -> Check:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= limit:
            raise damaged(place, value, f"a list of {least} to {limit} entries")
        for number, entry in enumerate(value):
            item(entry, f"{place}[{number}]")

    return check


def _or_none(check: Check) -> Check:
    return lambda value, place: None if value is None else check(value, place)


def _mapping(key: Check, value: Check, limit: int) -> Check:
    def check(given: Any, place: str) -> None:
        if not isinstance(given, Mapping) or len(given) > limit:
            raise damaged(place, given, f"a mapping of at most {limit} entries")
        for name, entry in given.items():
            key(name, f"a key of {place}")
            value(entry, f"{place}.{name}")

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A mapping with exactly these keys; those in `optional` may be absent."""
    optional = optional or {}

    def check(value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            raise damaged(place, value, "a mapping")
        _refuse_keys(place, "lacks", required.keys() - value.keys(), [*required, *optional])
        _refuse_keys(
            place, "has the unknown key", value.keys() - required.keys() - optional.keys(), [*required, *optional]
        )
        for key, inner in {**required, **optional}.items():
            if key in value:
                inner(value[key], f"{place}.{key}" if place else key)

    return check


def _refuse_keys(place: str, verb: str, keys: Collection[Any], known: Collection[str]) -> None:
    if keys:
        raise SurgeryError(
            f"The recipe is damaged: {place or 'it'} {verb} {min(map(repr, keys))}. Its keys are "
            f"{', '.join(known)}. Take the recipe from where it was written, or the se-surgery that wrote it."
        )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500 and bool(_PATH.fullmatch(value)) and "__" not in value


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain data of a moderate size: what an argument of a model's function may be."""
    if isinstance(value, (list, tuple)):
        return depth < 4 and len(value) <= 100 and all(_is_plain(entry, depth + 1) for entry in value)
    if isinstance(value, Mapping):
        return depth < 4 and len(value) <= 100 and all(_is_plain([k, v], depth + 1) for k, v in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) <= _WIDTH
    return value is None or (isinstance(value, str) and len(value) <= _TEXT)


_text = _is(lambda v: isinstance(v, str) and len(v) <= _TEXT, f"a text of at most {_TEXT} characters")
_flag = _is(lambda v: isinstance(v, bool), "true or false")
_path = _is(_is_path, "a module's path such as 'layer1.0.se'")
_unit = _is(lambda v: v == "" or _is_path(v), "a module's path such as 'layer1.0', or ''")
_name = _is(lambda v: isinstance(v, str) and 0 < len(v) <= 200, "a name")
_count, _params = _whole(0, _SITES), _whole(0, _PARAMETERS)
_width, _stage = _whole(1, _WIDTH), _whole(1, _SITES)
_either_stage = _whole(-_SITES, _SITES)
_number = _is(lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 2**20, "a positive number")
_stage_text = _is(lambda v: isinstance(v, str) and bool(re.fullmatch(r"-?\d{1,5}", v, re.ASCII)), "a stage's number")


def _ratio(value: Any, place: str) -> None:
    check = _mapping(_stage_text, _width, 1000) if isinstance(value, Mapping) else _width
    check(value, place)


def _widths(value: Any, place: str) -> None:
    check = _mapping(_path, _width, _SITES) if isinstance(value, Mapping) else _width
    check(value, place)


# Names (of placements, gates, ...) are checked against their tables when the operation is done.
OPTIONS = record(
    {
        "placement": _or_none(_name),
        "r": _ratio,
        "stages": _or_none(_listed(_either_stage, 1000, 1)),
        "where": _or_none(_listed(_text, _SITES, 1)),
        "rd_channels": _or_none(_widths),
        "rd_divisor": _width,
        "bias": _listed(_flag, 2, 2),
        "squeeze": _name,
        "act": _name,
        "gate": _name,
        "gate_scale": _or_none(_number),
        "init": _name,
        "attn": _name,
        "existing": _name,
        "name": _name,
    },
    {"heads": _flag},
)
_ADDED = record(
    {
        "path": _path,
        "unit": _unit,
        "kind": _name,
        "placement": _name,
        "stage": _stage,
        "channels": _width,
        "rd_channels": _width,
        "params": _params,
        "replaces": _listed(_path, 1000),
    }
)
_STRIPPED = record(
    {
        "path": _path,
        "unit": _unit,
        "stage": _stage,
        "channels": _width,
        "rd_channels": _or_none(_width),
        "params": _params,
        "origin": _name,
    }
)
_sizes = _listed(_whole(0, _WIDTH), 8)


def _size(value: Any, place: str) -> None:
    (_sizes if isinstance(value, (list, tuple)) else _width)(value, place)


# A module that was narrowed: the shapes of its tensors and the numbers that it keeps, those that are others now.
_PRUNED = record({"path": _unit, "shapes": _mapping(_name, _sizes, 100), "attributes": _mapping(_name, _size, 100)})
# One row an operation: what it says besides its name, `op`.
OPERATIONS: dict[str, Check] = {
    "add": record({"op": _name, "options": OPTIONS, "sites": _listed(_ADDED, _SITES, 1)}),
    "strip": record({"op": _name, "restore": _flag, "sites": _listed(_STRIPPED, _SITES, 1)}),
    "prune": record({"op": _name, "sites": _listed(_PRUNED, _SITES, 1)}),
}


def _operation(value: Any, place: str) -> None:
    _is(lambda v: isinstance(v, Mapping), "a mapping")(value, place)
    _one_of(*OPERATIONS)(value.get("op"), f"{place}.op")
    OPERATIONS[value["op"]](value, place)


# Arguments of a base that a recipe may give: those that say what it computes. None of them reads a file, fetches
# anything, or runs what it names.
ARGUMENTS = frozenset(
    """num_classes in_chans global_pool img_size output_stride drop_rate drop_path_rate drop_block_rate proj_drop_rate
    act_layer norm_layer norm_eps aa_layer pad_type conv_bias zero_init_last fix_stem stem_type stem_size stem_width
    stem_kernel_size stem_chs replace_stem_pool avg_down down_kernel_size block_reduce_first cardinality base_width
    head_hidden_size head_init_scale head_norm_first head_bias head_norm conv_mlp use_grn use_mlp_head mlp_ratio mlp_act
    mlp_bias ls_init_value layer_scale_init_value layerscale_value expand_ratio se_ratio num_features attn_mlp
    aa_stem_only memory_efficient preact use_lab use_post_norm
    width_mult dropout dropout_p stochastic_depth_prob aux_logits transform_input init_weights progress groups
    width_per_group zero_init_residual replace_stride_with_dilation""".split()
)
_argument = _is(_is_plain, "plain data")
_base_args = _mapping(_is(lambda v: v in ARGUMENTS, "an argument that a recipe may give a base"), _argument, 100)


def check_arguments(arguments: Any, place: str = "base_args") -> None:
    """Check that arguments of a base are those that a recipe may give.

    Options of `add_se`, which begin with `se_`, are among those of this library's own names.

    Raises:
        SurgeryError: One is not; the message says which.
    """
    ours = {name for name in arguments if isinstance(name, str) and name.startswith("se_")} - ARGUMENTS
    _base_args({name: value for name, value in arguments.items() if name not in ours}, place)


# What a recipe in `registry/` says of itself; the figures are what it has to come to.
_ABOUT = record(
    {},
    {
        "title": _text,
        "source": _text,
        "sites": _count,
        "params": _params,
    },
)
_RECIPE = record(
    {
        "format": _name,
        "version": _stage,
        "base": _or_none(_name),
        "base_args": _base_args,
        "operations": _listed(_operation, _OPERATIONS),
    },
    # `plan` is what a plan tells besides: only people read it.
    {"about": _ABOUT, "plan": _is(lambda v: isinstance(v, Mapping), "a mapping")},
)


def check_recipe(recipe: Any) -> None:
    """Check that something is a recipe this library reads.

    Raises:
        SurgeryError: It is not; the message says why.
    """
    if not isinstance(recipe, Mapping) or recipe.get("format") != FORMAT:
        raise SurgeryError(
            f"This is not a recipe: {shorten(recipe)} has not the format {FORMAT!r}. Give what recipe_of returned, or "
            f"what json.load reads from a recipe's file."
        )
    if recipe.get("version") != VERSION:
        raise SurgeryError(
            f"The recipe has version {recipe.get('version')!r}, and this library reads version {VERSION}. "
            f"Take the version of se-surgery that wrote it."
        )
    _RECIPE(recipe, "")
