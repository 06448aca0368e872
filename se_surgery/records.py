"""Records: what this library leaves in a module it operated on, so that it can be found, undone and operated on again.

An operated block carries a list of `Implant`s in its `__dict__` (plain data, it survives deepcopy and pickle), and a
module out of which a native SE was taken carries that SE in `REPLACED`. In `FROZEN` a frozen module carries what it was
like before. `HELD` has the objects that a block's generated forward has to find in it still, by the way to them. The
model itself carries its operations, and the name of its base where this library created it. Each SE, with all that is
in it, carries in `PUT_IN` where it was put in, by which operation: it may be in another model by now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

IMPLANTS = "_se_implants"
REPLACED = "_se_replaced"
OPERATIONS = "_se_operations"
CODE = "_se_code"
BASE = "_se_base"
FROZEN = "_se_frozen"
PUT_IN = "_se_put_in"
HELD = "_se_held"

# Stands in `Implant.before` for an attribute that did not exist.
ABSENT = "absent"

_Durable = TypeVar("_Durable")


def durable(thing: _Durable) -> _Durable:
    """Mark a class or function whose name stands in pickles of operated models: they name `_runtime`, not its file.

    Files move, and a pickle has to load after that. `_runtime` has the same names and stays.
    """
    thing.__module__ = f"{__package__}._runtime"
    return thing


@durable
@dataclass(frozen=True)
class Edge:
    """A place in a block's forward: the value of one node on its way to some of its users.

    Attributes:
        owner: Path of the block whose forward it is in.
        method: The method.
        producer: Node that makes the value.
        consumers: Nodes that take it from there and will take the gated value, in order.
        shape: Shape of the value in the probing run.
        axis: Its channel axis, counted from the end for channels-last values.
        late: Whether the SE runs right before its first consumer and not right after the producer. A value that other
            branches may change in place in between has to be read when the original forward reads it.
        mode: `both`, or the one of `evaluation` and `training` whose graph it is in, where the two differ.
    """

    owner: str
    method: str
    producer: str
    consumers: tuple[str, ...]
    shape: tuple[int, ...] = field(compare=False)
    axis: int = field(compare=False)
    late: bool = False
    mode: str = "both"

    @property
    def channels(self) -> int:
        """Number of channels of the value."""
        return self.shape[self.axis]


@durable
@dataclass
class Implant:
    """One SE that this library put into a block.

    Attributes:
        name: The child's name in the block.
        unit: Path of the unit it serves.
        placement: Its placement.
        edges: Its edge in each of the block's original methods; none where it fills the block's own empty slot.
        before: What stood under that name: a module, None, or `ABSENT`.
        host: Path of the block at the time; a model that is a part of another by now has all paths moved.
        replaced: Paths of the native SEs that it replaced, at the time.
    """

    name: str
    unit: str
    placement: str
    edges: tuple[Edge, ...]
    before: Any = ABSENT
    host: str = ""
    replaced: tuple[str, ...] = ()

    def now(self, path: str, host: str) -> str:
        """A path of the time, now that the block is at `host`.

        Examples:
            >>> Implant("se", "layer1.0", "standard", (), host="layer1.0").now("layer1.0", "backbone.layer1.0")
            'backbone.layer1.0'
        """
        if host.endswith(self.host):
            return (host[: len(host) - len(self.host)] + ("." if host and not self.host else "") + path).strip(".")
        if self.host.endswith(host):
            return path.removeprefix(self.host[: len(self.host) - len(host)])
        return host


def base_of(model: nn.Module) -> str | None:
    """Name of a model's base, if it knows it: those that this library created do, and timm's.

    Examples:
        >>> base_of(timm.create_model("resnet18")), base_of(torchvision.models.resnet18())
        ('resnet18', None)
    """
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, dict) else None
    name = model.__dict__.get(BASE, architecture)
    return name if isinstance(name, str) else None


def note_origin(se: nn.Module, path: str, model: nn.Module, operation: dict[str, Any]) -> None:
    """Let an SE and all that is in it say where it was put in."""
    origin = {"path": path, "model": type(model).__name__, "operation": operation}
    for module in se.modules():
        module.__dict__[PUT_IN] = origin


def implants(block: nn.Module) -> list[Implant]:
    """The implants of one block, oldest first."""
    return list(block.__dict__.get(IMPLANTS, ()))


@durable
def children_of(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's children, without those that this library put where there had been no module."""
    ours = {one.name for one in implants(module) if not isinstance(one.before, nn.Module)}
    return tuple(name for name in module._modules if name not in ours)


def implanted(model: nn.Module) -> list[str]:
    """Paths of the SEs that this library put into a model.

    Examples:
        >>> implanted(add_se(timm.create_model("resnet18")))[:2]
        ['layer1.0.se', 'layer1.1.se']
    """
    return [f"{path}.{one.name}".lstrip(".") for path, host in model.named_modules() for one in implants(host)]


def is_implant(parent: nn.Module | None, name: str) -> bool:
    """Whether the child `name` of `parent` is an SE that this library put there."""
    return parent is not None and any(implant.name == name for implant in implants(parent))


def generated_class(block: nn.Module) -> type[nn.Module] | None:
    """The class that surgery gave a block; it may have been given another one on top of it since."""
    return next((cls for cls in type(block).__mro__ if CODE in cls.__dict__), None)


def original_class(block: nn.Module) -> type[nn.Module]:
    """The block's class before surgery."""
    generated = generated_class(block)
    return type(block) if generated is None else generated.__mro__[1]


def original_state(block: nn.Module) -> dict[str, Any]:
    """The block's `__dict__` as it was before surgery (a copy; children and parameters are the block's own)."""
    state = dict(block.__dict__)
    state["_modules"] = dict(state["_modules"])
    state.pop(HELD, None)
    for implant in reversed(state.pop(IMPLANTS, [])):
        state["_modules"].pop(implant.name, None)
        if isinstance(implant.before, nn.Module):
            state["_modules"][implant.name] = implant.before
        elif implant.before is None:
            state[implant.name] = None
    return state


def narrowed_beyond(operations: list[dict[str, Any]]) -> bool:
    """Whether a network was pruned in other places than inside of SEs that this library had put in."""
    added = tuple(
        f"{site['path']}." for operation in operations if operation["op"] == "add" for site in operation["sites"]
    )
    pruned = [site["path"] for operation in operations if operation["op"] == "prune" for site in operation["sites"]]
    return any(not path.startswith(added) for path in pruned)
