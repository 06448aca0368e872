"""Card: the README.md of a saved model, which the Hub shows and searches.

In: what a model was made of and by, and what its author says of it. Out: text. What is not known is left out: a licence
is the base's own or the author's word, and never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from timm.models import get_pretrained_cfg

from ..errors import OptionError, shorten
from ..measuring.cost import Costs, Count
from ..showing.tables import compact, count, groups
from .artefact import MARK

TAGS = ("image-classification", "timm", "se-surgery", "squeeze-and-excitation")
PAPER = "[Squeeze-and-Excitation Networks](https://arxiv.org/abs/1709.01507)"
# Licences that the Hub knows by these names. Any other one is called `other` there, and named beside it.
_HUB_LICENSES = frozenset(
    """apache-2.0 mit isc bsd bsd-2-clause bsd-3-clause mpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 unlicense cc0-1.0 cc-by-4.0
    cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 openrail apple-ascl apple-amlr gemma
    fair-noncommercial-research-license""".split()
)


def card_text(
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    parameters: int,
    costs: Costs | None,
    *,
    where: str,
    license: str | None = None,
    base_model: str | None = None,
    tags: Iterable[str] = (),
    plot: str | None = None,
) -> str:
    """A model card: what the Hub indexes, what was done to the base, and how to use the model.

    Args:
        recipe: The model's recipe.
        config: Its `pretrained_cfg`.
        parameters: Number of its parameters.
        costs: What it costs, if that could be counted.
        where: What `timm.create_model` takes for it: `hf-hub:user/repo` or `local-dir:path`.
        license: The licence, if one is known.
        base_model: Repository of the weights it was made from, if there is one.
        tags: Further tags.
        plot: Name of a picture of its excitations, if there is one.
    """
    name = " ".join(where.partition(":")[2].rstrip("/").rpartition("/")[2].split())
    classes = config.get("num_classes", 0)
    data = ModelCardData(
        library_name="se-surgery",
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        base_model=base_model,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        **_license_fields(license),
    )
    size = " x ".join(map(str, config.get("input_size", ())))
    facts = [
        f"Base: `{recipe['base'] or 'a network of its own'}`" + (f", weights `{base_model}`" if base_model else ""),
        f"Parameters: {parameters:,}",
        *([f"Input: {size}"] if size else []),
        *([f"Classes: {classes:,}"] if classes else []),
        f"Licence: {license}" if license else "Licence: not stated",
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {name}",
        f"A convolutional network with squeeze-and-excitation ({PAPER}), made with se-surgery.",
        "\n".join(f"- {fact}" for fact in facts),
        "## How to use it",
        f"```python\n{_usage(where)}\n```",
        "## What was done to the base",
        *(_operation(number, operation) for number, operation in enumerate(recipe["operations"], 1)),
        *([] if recipe["operations"] else ["Nothing."]),
        "## What it costs",
        "Not counted: the network reads the values of its own maps." if costs is None else _costs(costs),
        *([f"## Excitations\n\n![Mean excitation of each channel]({plot})"] if plot else []),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(where: str) -> str:
    lines = [
        "import timm",
        "import se_surgery  # pip install se-surgery",
        f"model = timm.create_model({json.dumps(where, ensure_ascii=False)}, pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "scores = model(transform(image).unsqueeze(0))  # image: a PIL image",
    ]
    return "\n".join(lines)


def _operation(number: int, operation: Mapping[str, Any]) -> str:
    """One operation as a sentence and a table of its sites."""
    sites = operation["sites"]
    if operation["op"] == "prune":
        return f"{number}. {count(len(sites), 'module')} made narrower by torch-pruning."
    what = {"add": "put in", "strip": "taken out"}.get(operation["op"], operation["op"])
    options = operation.get("options", {})
    said = ", ".join(f"{key}={options[key]}" for key in ("placement", "r", "init") if options.get(key) is not None)
    title = f"{number}. {count(len(sites), 'SE')} {what}" + (f" ({said})." if said else ".")
    rows = []
    for group in groups(sites, _same, lambda site: str(site["path"])):
        first = group[0]
        rows.append(
            (
                first["stage"],
                f"`{compact([site['path'] for site in group])}`",
                len(group),
                first.get("placement") or first.get("origin", ""),
                f"{first['channels']} to {first['rd_channels'] or '-'}",
                f"{sum(site['params'] for site in group):,}",
            )
        )
    return f"{title}\n\n{_table(('stage', 'SE', 'number', 'kind', 'channels to hidden', 'parameters'), rows)}"


def _costs(costs: Costs) -> str:
    """What each part costs, and its SEs in it."""
    parts = {**costs.parts, "whole": costs.whole}
    ses = {**costs.ses, "whole": sum(costs.ses.values(), Count())}
    kinds = ("parameters", "multiply_adds", "activations")
    rows = [(part, *(f"{getattr(side[part], kind):,}" for kind in kinds for side in (parts, ses))) for part in parts]
    headers = ("", "parameters", "of SEs", "multiply-adds", "of SEs", "activations", "of SEs")
    size = " x ".join(map(str, costs.image))
    return (
        f"For one image of {size}; multiply-adds with one for each value that an SE scales.\n\n{_table(headers, rows)}"
    )


def _same(site: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(site.get(key) for key in ("stage", "channels", "rd_channels", "params", "placement", "origin"))


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _license_fields(license: str | None) -> dict[str, Any]:
    """A licence as the Hub takes it."""
    if license is None:
        return {}
    known = license.lower() in _HUB_LICENSES
    return {"license": license.lower()} if known else {"license": "other", "license_name": license}


def license_of(given: str | None, config: Mapping[str, Any], lineage: str | None, *, needed: bool) -> str | None:
    """The licence of a model: what its author says, else that of the weights it was made from.

    Args:
        given: What the author says.
        config: The model's `pretrained_cfg`.
        lineage: Repository of the base's weights.
        needed: Whether it is to be published, which takes one.

    Raises:
        OptionError: None is known and it is needed, or what was given is none.
    """
    if given is not None and (not isinstance(given, str) or not given.strip() or "\n" in given or len(given) > 200):
        raise OptionError(
            f"license={shorten(given)} is not the name of a licence. Give one, 'apache-2.0' for instance."
        )
    known = given or config.get("license") or (_config_of(lineage) or {}).get("license")
    if isinstance(known, str) and known.lower() != "unknown":
        return known.strip()
    if needed:
        raise OptionError(
            "The licence of the base's weights is not known, and to publish a model is to give it one. See what the "
            "base's authors allow, and give license='apache-2.0' for instance."
        )
    return None


def lineage_of(given: str | None, base: str | None, config: Mapping[str, Any]) -> str | None:
    """The repository of the weights that a model was made from: what its author says, else that of its base's tag.

    An empty text says that there are none: the model was trained from random weights.

    Raises:
        OptionError: What was given is no name.

    Examples:
        >>> lineage_of(None, "resnet50", {"tag": "a1_in1k"}), lineage_of("", "resnet50", {"tag": "a1_in1k"})
        ('timm/resnet50.a1_in1k', None)
    """
    if given is not None and (not isinstance(given, str) or len(given.splitlines()) > 1):
        raise OptionError(
            f"base_model={shorten(given)} is not the name of a repository. Give one, 'user/model' for instance."
        )
    if given is not None:
        return given.strip() or None
    tag = config.get("tag")
    known = _config_of(f"timm/{base}.{tag}") if base and tag and "/" not in base else None
    return f"timm/{base}.{tag}" if known and known.get("hf_hub_id") == f"timm/{base}.{tag}" else None


def _config_of(lineage: str | None) -> dict[str, Any] | None:
    """What timm says of weights that are in a repository of its own."""
    if lineage is None or not lineage.startswith("timm/"):
        return None
    found = get_pretrained_cfg(lineage.removeprefix("timm/"))
    return None if found is None else {"license": found.license, "hf_hub_id": found.hf_hub_id}


def refuse_tags(tags: Collection[str]) -> None:
    """Refuse tags that are none.

    Raises:
        OptionError: One is not a text of one line.
    """
    # What can be gone through only once would be empty by the time it is written.
    listed = isinstance(tags, Collection) and not isinstance(tags, (str, bytes, Mapping))
    if not listed or not all(isinstance(tag, str) and tag.strip() and len(tag.splitlines()) == 1 for tag in tags):
        raise OptionError(f"tags={shorten(tags)} is not a list of words. Give tags=['medical'] for instance.")
