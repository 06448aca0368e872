"""Names: what `import se_surgery` registers with timm without building anything.

    python -m benchmarks.names          writes se_surgery/names.json from docs/coverage.jsonl and torchvision

Every network of timm and torchvision that the coverage command planned, and that has a place for one more SE, gets a
name. Of torchvision's networks the file also holds what timm's configurations would say of them.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from se_surgery.reading.look import Look, look

from .coverage import rows, zoo
from .coverage.planning import HELD, SITES

ROWS = Path(__file__).parent.parent / "docs" / "coverage.jsonl"
NAMES = Path(__file__).parent.parent / "se_surgery" / "names.json"
TORCHVISION = "torchvision/"


def names() -> dict[str, Any]:
    """The whole file as plain data."""
    plans = [row for row in rows.read(ROWS).values() if row["kind"] == "plan" and "target" in row["roles"]]
    placed = sorted(row["name"] for row in plans if row["status"] == SITES)
    planned = sorted(row["name"] for row in plans if row["status"] in (SITES, HELD))
    timm = [name for name in placed if not name.startswith(TORCHVISION)]
    facts = {name: torchvision_facts(name) for name in _of_torchvision(planned)}
    return {"timm": timm, "torchvision": _of_torchvision(placed), "facts": facts}


def _of_torchvision(names: list[str]) -> list[str]:
    return [name.removeprefix(TORCHVISION) for name in names if name.startswith(TORCHVISION)]


def torchvision_facts(name: str) -> dict[str, Any]:
    """What timm's configuration would say of one of torchvision's networks, its weights and its levels."""
    model, other = (zoo.build_on_meta(TORCHVISION + name, **classes) for classes in ({}, {"num_classes": 7}))
    first = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    heads = [key for key, value in other.state_dict().items() if value.shape != shapes[key]]
    classifiers = list(dict.fromkeys(key.rpartition(".")[0] for key in heads))
    # The classifiers of auxiliary outputs come before the network's own.
    final = sorted(classifiers, key=lambda path: path.lower().startswith("aux"))
    # VGG-16 has weights of the feature part alone, which timm has no word for.
    weights = [entry for entry in torchvision.models.get_model_weights(name) if entry.meta["categories"]]
    default = torchvision.models.get_model_weights(name).DEFAULT if weights else None
    ordered = sorted(weights, key=lambda entry: entry is not default)
    size = _size(default)
    return {
        "first_conv": first,
        "classifier": final if len(final) > 1 else final[0],
        "num_features": model.get_submodule(final[0]).weight.shape[1],
        "input_size": [3, size, size],
        "weights": {entry.name.lower(): _config(entry) for entry in ordered},
        "features": _levels(look(model, (3, size, size)), {path.partition(".")[0] for path in classifiers}),
    }


def _size(weights: Any) -> int:
    return int(_crop(weights.transforms.keywords["crop_size"])) if weights is not None else 224


def _crop(size: Any) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


def _config(weights: Any) -> dict[str, Any]:
    """What a weights entry of torchvision says, in the fields of timm's configuration."""
    given = weights.transforms.keywords
    crop, resize = _crop(given["crop_size"]), _crop(given.get("resize_size", 256))
    mode = given.get("interpolation", "bilinear")
    return {
        "url": weights.url,
        "input_size": [3, crop, crop],
        "crop_pct": round(crop / resize, 4),
        "interpolation": mode.value if isinstance(mode, enum.Enum) else mode,
        "mean": list(given.get("mean", (0.485, 0.456, 0.406))),
        "std": list(given.get("std", (0.229, 0.224, 0.225))),
        "num_classes": len(weights.meta["categories"]),
    }


def _levels(seen: Look, outside: set[str]) -> list[dict[str, Any]]:
    """For every resolution the outermost module that was the last to return maps of that size.

    Not one of the heads, and none inside a module that makes maps of that size smaller.
    """
    calls = [(call.end, path, call) for path, listed in seen.calls.items() for call in listed]
    levels: dict[int, dict[str, Any]] = {}
    for _, path, call in sorted(calls, key=lambda item: item[0]):
        reduction = _reduction(seen, call.output)
        shrunk = any(_reduction(seen, *outer.args[:1]) == reduction for outer in _around(call) if _shrinks(seen, outer))
        if path and path.partition(".")[0] not in outside and reduction > 1 and not shrunk:
            axis = seen.maps.axis(call.output.shape) or 1
            levels[reduction] = {"num_chs": call.output.shape[axis], "reduction": reduction, "module": path}
    return [levels[reduction] for reduction in sorted(levels)]


def _reduction(seen: Look, value: Any = None) -> int:
    """Nominal reduction of a map, as in timm's lists: Inception's 35 of 299 positions are one by 8. No map: 0."""
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    if not seen.maps.is_map(shape):
        return 0
    size = seen.maps.sides(shape)
    return int(2 ** round(math.log2(min(seen.size) / min(size))))


def _shrinks(seen: Look, call: Any) -> bool:
    return _reduction(seen, call.output) > _reduction(seen, *call.args[:1])


def _around(call: Any) -> Iterator[Any]:
    while call.parent is not None:
        call = call.parent
        yield call


def main() -> None:
    """Write the file."""
    found = names()
    NAMES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found['timm'])} names of timm, {len(found['torchvision'])} of torchvision: {NAMES.name}")


if __name__ == "__main__":
    main()
