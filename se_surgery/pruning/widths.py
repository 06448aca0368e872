"""Widths: the sizes of a network's layers, how two states of it differ, and how a fresh one is narrowed alike.

In: a model, before and after it was pruned. Out: plain data for a recipe; and with that and a fresh model, the same
sizes again. The values are not in it: they come from a file of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import SurgeryError
from ..reading.look import Look, look
from ..surgery.journal import Journal

# timm's own notes on how wide a network's features are, which its `reset_classifier` goes by.
_NOTES = ("num_features", "head_hidden_size", "in_features")


def widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The shapes of all tensors of every module, and the numbers it keeps, by path."""
    return {path: {"shapes": _shapes(module), "attributes": _numbers(module)} for path, module in model.named_modules()}


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    held = {**module._parameters, **module._buffers}
    return {name: list(tensor.shape) for name, tensor in held.items() if isinstance(tensor, Tensor)}


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in module.__dict__.items()
        if _is_size(value) and not name.startswith("_")
    }


def _is_size(value: Any) -> bool:
    """Whether a value is a whole number, or a tuple of such: `out_channels`, `normalized_shape`."""
    if isinstance(value, tuple):
        return bool(value) and all(type(number) is int for number in value)
    return type(value) is int


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is another size in a second state, as a recipe's operation lists it: one entry a module.

    Raises:
        SurgeryError: A module or a tensor came or went, or something has grown.
    """
    if before.keys() != after.keys():
        path = min(before.keys() ^ after.keys())
        raise SurgeryError(f"{path!r} came or went, and pruning only narrows. Do that before or after.")
    sites = []
    for path, old in before.items():
        changed = {kind: _changed(path, old[kind], after[path][kind]) for kind in ("shapes", "attributes")}
        if any(changed.values()):
            sites.append({"path": path, **changed})
    return sites


def _changed(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    if old.keys() != new.keys():
        raise SurgeryError(f"{min(old.keys() ^ new.keys())!r} of {path!r} came or went, and pruning only narrows.")
    return {name: size for name, size in new.items() if size != old[name]}


def narrow(module: nn.Module, site: Mapping[str, Any]) -> None:
    """Give a module the sizes that an entry of `difference` says; of its values the first ones stay.

    Raises:
        SurgeryError: The module has no such tensor or number, or a smaller one.
    """
    for name, shape in site["shapes"].items():
        kind = "_parameters" if name in module._parameters else "_buffers"
        tensor = module.__dict__[kind].get(name)
        if not isinstance(tensor, Tensor) or not _fits(shape, list(tensor.shape)):
            raise _unfit(site["path"], name, shape, None if tensor is None else list(tensor.shape))
        part = tensor.detach()[tuple(slice(0, size) for size in shape)].clone()
        new = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
        module.__dict__[kind][name] = new
    for name, size in site["attributes"].items():
        old = module.__dict__.get(name)
        if not _is_size(old) or isinstance(old, tuple) is not isinstance(size, (list, tuple)):
            raise _unfit(site["path"], name, size, old)
        module.__dict__[name] = tuple(size) if isinstance(size, (list, tuple)) else size


def _fits(shape: list[int], old: list[int]) -> bool:
    return len(shape) == len(old) and all(0 < size <= full for size, full in zip(shape, old, strict=True))


def _unfit(path: str, name: str, wanted: Any, here: Any) -> SurgeryError:
    return SurgeryError(
        f"The recipe narrows {name!r} of {path!r} to {wanted}, and here it is {here}. Take the recipe's own base, with "
        f"the versions of timm and se-surgery that it was made with."
    )


class Notes:
    """What a timm model notes of how wide its features are, as far as that is true before it is narrowed.

    Its `reset_classifier` and its feature extractors go by these notes, and nothing that prunes brings them up to date.

    Args:
        model: The model, not yet narrowed.
        example_input: What to look at it with, as for `add_se`.
    """

    def __init__(self, model: nn.Module, example_input: Any = None) -> None:
        self.model, self.example_input = model, example_input
        self.before = _Seen(model, example_input)

    def refresh(self, journal: Journal) -> None:
        """Bring the notes up to date, now that the model is narrowed."""
        after = _Seen(self.model, self.example_input)
        now = {self.before.last: after.last, self.before.classified: after.classified}
        for module in {self.model, self.model.get_submodule(after.classifier.rpartition(".")[0])}:
            journal.open(module)
            for name in _NOTES:
                if type(module.__dict__.get(name)) is int:
                    module.__dict__[name] = now.get(module.__dict__[name], module.__dict__[name])
        listed = self.model.__dict__.get("feature_info")
        if isinstance(listed, list) and len(listed) == len(self.before.features) == len(after.features):
            pairs = zip(listed, self.before.features, after.features, strict=True)
            self.model.__dict__["feature_info"] = [
                {**entry, "num_chs": new} if entry.get("num_chs") == old else entry for entry, old, new in pairs
            ]


class _Seen:
    """The widths of what runs in a model: of its last map, of what its classifier takes, of each noted feature."""

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        seen = look(model, example_input)
        layers = [event.path for event in seen.events if event.kind in ("conv", "linear")]
        calls = sorted((call for calls in seen.calls.values() for call in calls), key=lambda call: call.end)
        returned = (call.output for call in calls if isinstance(call.output, Tensor))
        maps = [output for output in returned if seen.maps.is_map(output.shape)]
        self.classifier = layers[-1] if layers else ""
        given = seen.calls[self.classifier][-1].args if layers else ()
        self.classified = int(given[0].shape[1]) if given and isinstance(given[0], Tensor) and given[0].dim() > 1 else 0
        self.last = _channels(maps[-1], seen) if maps else 0
        listed = model.__dict__.get("feature_info")
        names = [str(entry.get("module", "")) for entry in listed] if isinstance(listed, list) else []
        outputs = [seen.calls[name][-1].output if name in seen.calls else None for name in names]
        self.features = [_channels(output, seen) if isinstance(output, Tensor) else 0 for output in outputs]


def _channels(output: Tensor, seen: Look) -> int:
    shape = tuple(output.shape)
    return int(shape[seen.maps.axis(shape) or 1]) if len(shape) > 2 else 0
