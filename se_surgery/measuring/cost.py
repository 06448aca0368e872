"""Cost: what a model costs to keep and to run, counted as the paper counts (section 4, tables 2, 10 and 13).

In: a model. Out: numbers, of the whole or part by part, of its SEs and of the rest. The model is not touched: what runs
is a copy of it on the meta device, which has shapes and no values.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ProbeError
from ..planning.exam import Exam
from ..reading.anatomy import Anatomy
from ..reading.encoded import is_encoded
from ..reading.look import Look, look
from ..structure.find import SESite, sites_in
from ..structure.stages import Stages

STEM, HEAD, NOT_RUN = "stem", "head", "not run"


@dataclass(frozen=True)
class Count:
    """What something costs.

    Attributes:
        parameters: Number of parameters.
        statistics: Elements of floating-point buffers: in nearly every CNN BatchNorm's running statistics.
        multiply_adds: Multiply-adds an image.
        activations: Values an image that convolutions and linear layers put out, and those of the maps that SEs scale.
    """

    parameters: int = 0
    statistics: int = 0
    multiply_adds: int = 0
    activations: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Costs:
    """What a model costs, part by part: its stem, its stages, its head, and what does not run in evaluation.

    Attributes:
        image: Shape of the image that was counted for.
        base: The cost of each part without its SEs.
        ses: The cost of each part's SEs, whoever put them there.
    """

    image: tuple[int, ...]
    base: dict[str, Count]
    ses: dict[str, Count]

    @property
    def parts(self) -> dict[str, Count]:
        """The cost of each part, with its SEs."""
        return {part: self.base[part] + self.ses[part] for part in self.base}

    @property
    def whole(self) -> Count:
        """The cost of the model."""
        return sum(self.parts.values(), Count())

    def __str__(self) -> str:
        from .cost_text import costs_text

        return costs_text(self.base, self.parts, self.image)

    def _repr_html_(self) -> str:
        from ..showing.notebook import html
        from .cost_text import costs_parts

        return html(costs_parts(self.base, self.parts, self.image))


def parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters, and that number with BatchNorm's running statistics counted in.

    Frozen parameters count, shared ones once. What is added for the second number are the elements of all
    floating-point buffers; in nearly every CNN these are the running statistics and nothing else. The paper's table 10
    counts them in.

    Examples:
        >>> parameters(timm.create_model("resnet50"))
        (25557032, 25610152)
    """
    learned = sum(parameter.numel() for parameter in model.parameters())
    return learned, learned + sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())


def multiply_adds(model: nn.Module, example_input: Any = None) -> int:
    """Multiply-adds of one forward in evaluation, for one image.

    Convolutions, linear layers and matrix products count, and for every SE the scale, one multiplication an element of
    its map; its pooling is free, as all pooling, normalisation and activation is.

    Args:
        model: The model; it is left as found.
        example_input: (C, H, W), a tensor with its batch axis, or a tuple of arguments. By default what fits the model.

    Raises:
        ProbeError: The model does not run on that input.

    Examples:
        >>> multiply_adds(timm.create_model("resnet50"))
        4089184256
    """
    seen = look(model, example_input)
    return _layers(model, seen).total() + _scales(seen)


def count_costs(model: nn.Module, example_input: Any = None) -> Costs:
    """What a model costs, part by part, without its SEs and with them.

    Stem is what comes before the first unit, head what comes after the last one. What a module's own forward computes
    counts where the module begins.

    Args:
        model: The model; it is left as found.
        example_input: (C, H, W), a tensor with its batch axis, or a tuple of arguments. By default what fits the model.

    Returns:
        The costs; `print` shows them as tables.

    Raises:
        ProbeError: The model does not run on that input.

    Examples:
        >>> costs = count_costs(se_surgery.add_se(timm.create_model("resnet50")))
        >>> costs.whole.parameters, costs.ses["stage 4"].parameters
        (28071976, 1572864)
    """
    exam = Exam(model, example_input)
    places = _Places(exam)
    base, ses = dict.fromkeys(places.names, Count()), dict.fromkeys(places.names, Count())
    weights = {path for one in exam.written.values() for path in one.weights}
    for path, count in (*_kept(model, weights), *_made(model, exam)):
        side, part = ses if places.is_se(path) else base, places.part(path)
        side[part] += count
    present = [part for part in places.names if base[part] + ses[part] != Count()]
    images = [arg for arg in pytree.tree_leaves(exam.seen.args) if isinstance(arg, Tensor)]
    return Costs(
        image=tuple(images[0].shape[1:]),
        base={part: base[part] for part in present},
        ses={part: ses[part] for part in present},
    )


def _kept(model: nn.Module, weights: Container[str]) -> Iterator[tuple[str, Count]]:
    """The parameters and statistics of every module, each tensor once, by its path; these weights by their own."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = [(*item, "parameters") for item in module._parameters.items()]
        held += [(*item, "statistics") for item in module._buffers.items()]
        for name, tensor, what in held:
            if tensor is not None and id(tensor) not in seen and (what == "parameters" or tensor.is_floating_point()):
                seen.add(id(tensor))
                own = f"{path}.{name}".strip(".")
                yield own if own in weights else path, Count(**{what: tensor.numel()})


def _made(model: nn.Module, exam: Exam) -> Iterator[tuple[str, Count]]:
    """The multiply-adds and activations of every module, for one image, by its path."""
    for path, number in _layers(model, exam.seen).items():
        yield path, Count(multiply_adds=number)
    for event in exam.seen.events:
        yield event.path, Count(activations=event.activations)
    for site in exam.existing:
        if site.block is not None:
            yield from _written_out(exam, site)
            continue
        for call in exam.seen.calls[site.path]:
            scaled = math.prod(call.output.shape[1:])
            yield site.path, Count(multiply_adds=scaled, activations=scaled)


def _written_out(exam: Exam, site: SESite) -> Iterator[tuple[str, Count]]:
    """What an SE makes that is written out: the scaled map, and what its block's own forward does for its layers."""
    one = exam.written[site.path]
    for _ in exam.seen.calls[one.block]:
        yield site.path, Count(multiply_adds=one.scaled, activations=one.scaled)
        for event in (event for event in one.events if event.path not in one.layers):
            yield site.path, Count(multiply_adds=event.macs, activations=event.activations)
            yield event.path, Count(multiply_adds=-event.macs, activations=-event.activations)


class _Places:
    """Which part of the model a module is in."""

    def __init__(self, exam: Exam) -> None:
        self._exam = exam
        units = exam.units.found
        self._first = min((unit.start for unit in units), default=0)
        self._last = max((unit.end for unit in units), default=math.inf)
        self._ses = {path: site for site in exam.existing for path in (site.path, *site.layers)}
        by_path = {site.path: site for site in exam.existing}
        self._ses |= {path: by_path[at] for at, one in exam.written.items() if at in by_path for path in one.weights}
        self.names = (STEM, *(f"stage {number}" for number in range(1, exam.stages.count + 1)), HEAD, NOT_RUN)

    def is_se(self, path: str) -> bool:
        """Whether it is an SE, or inside one."""
        return self._se(path) is not None

    def part(self, path: str) -> str:
        """The part's name."""
        site = self._se(path)
        if site is not None:
            return f"stage {site.stage}"
        calls = self._exam.seen.calls
        around = _nearest(path, calls)
        if path and not around:
            return NOT_RUN
        start = calls[around][0].start
        if start < self._first:
            return STEM
        return HEAD if start > self._last else f"stage {self._exam.stages.of(start)}"

    def _se(self, path: str) -> SESite | None:
        return self._ses.get(_nearest(path, self._ses))


def _layers(model: nn.Module, seen: Look) -> Counter[str]:
    """Multiply-adds of everything that multiplies matrices, by the path of the module whose own forward does it."""
    images = pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor[:1], device="meta"), seen.args)
    patient = on_meta(model).eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            patient(*images)
    except Exception as error:  # whatever the model's own code raises where a tensor has no values
        raise ProbeError(
            f"{type(model).__name__} reads the values of its feature maps ({error}), so its multiply-adds cannot be "
            f"counted without running it. Count them with torch.utils.flop_counter on real images."
        ) from error
    # The counter calls the model by its class, what is in it by paths from there, and the sum of all `Global`.
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name != "Global"}
    own = Counter(flops)
    for name, number in flops.items():
        # What holds it: a ModuleList does not run, and has no count.
        own[_nearest(name.rpartition(".")[0], flops)] -= number
    # A multiply-add is two floating-point operations.
    return Counter({name.partition(".")[2]: own[name] // 2 for name in flops})


def _nearest(path: str, known: Container[str]) -> str:
    """The path itself or that of the innermost module around it that is known; `""` where none is."""
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path


def _scales(seen: Look) -> int:
    """The multiplications with which SEs scale their maps."""
    sites, written = sites_in(Anatomy(seen), Stages(seen, []))
    maps = [tuple(call.output.shape) for site in sites if site.is_module for call in seen.calls[site.path]]
    maps += [one.shape for one in written.values() for _ in seen.calls[one.block]]
    return sum(math.prod(shape[1:]) for shape in maps)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without its hooks; no weight is copied on the way."""
    tensors = [tensor for module in model.modules() for tensor in _tensors(module)]
    memo: dict[int, Any] = {id(tensor): _empty(tensor) for tensor in tensors}
    patient = copy.deepcopy(model, memo)
    for module in patient.modules():
        # They are the user's: what they note must come from the user's own runs.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return patient


def _tensors(module: nn.Module) -> list[Tensor]:
    held = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


def _empty(tensor: Tensor) -> Tensor:
    if is_encoded(tensor):
        # It need not know how to be copied; what it stands for is counted.
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
