"""What the command line reports, as plain data for `--json` and as text.

In: models before and after an operation, exams and reports. Out: dicts and text; nothing is printed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..measuring.cost import multiply_adds, parameters
from ..planning.exam import Exam, find_se
from ..proving.compare import same_tensors
from ..proving.pair import randomise
from ..proving.promises import Report
from ..showing.show import exam_text
from ..showing.tables import count, table
from ..surgery.graft import copied

_SEED = 0


@dataclass(frozen=True)
class State:
    """A model at one time: what it costs, and what it puts out.

    Attributes:
        parameters: Number of parameters.
        with_statistics: That number with BatchNorm's running statistics counted in.
        multiply_adds: Multiply-adds for one image.
        outputs: The tensors it puts out in evaluation for the same noise.
        outputs_anew: Those with its normalisations drawn anew: in a fresh network the last one of a branch may be zero,
            and then nothing that is in the branch shows.
    """

    parameters: int
    with_statistics: int
    multiply_adds: int
    outputs: tuple[Tensor, ...]
    outputs_anew: tuple[Tensor, ...]


_COUNTS = {
    "parameters": "parameters",
    "with_statistics": "with running statistics",
    "multiply_adds": "multiply-adds",
}


def state_of(model: nn.Module, exam: Exam) -> State:
    """The state of a model in evaluation, for images of the size that `exam` looked at it with."""
    anew = copied(model)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        randomise(anew, skip=[site.path for site in find_se(model, exam.seen.args)])
    outputs = (_outputs(network, exam.seen.args) for network in (model, anew))
    return State(*parameters(model), multiply_adds(model, exam.seen.args), *outputs)


def _outputs(model: nn.Module, images: tuple[Any, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(_SEED)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)

    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*pytree.tree_map_only(Tensor, noise, images)))
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def same_outputs(before: State, after: State) -> dict[str, bool]:
    """Whether the outputs are equal bit for bit: of the model as it is, and with its normalisations drawn anew."""
    return {
        "as_it_is": same_tensors(before.outputs, after.outputs),
        "normalisations_drawn_anew": same_tensors(before.outputs_anew, after.outputs_anew),
    }


def costs(before: State, after: State) -> dict[str, dict[str, int]]:
    """Parameters and multiply-adds before and after, as plain data."""
    return {name: {"before": getattr(before, name), "after": getattr(after, name)} for name in _COUNTS}


def costs_text(before: State, after: State) -> str:
    """Parameters and multiply-adds before and after, counted on the models themselves."""
    rows = []
    for name, label in _COUNTS.items():
        old, new = getattr(before, name), getattr(after, name)
        rows.append((label, f"{old:,}", f"{new:,}", f"{new - old:+,}", f"{(new - old) / old:+.2%}" if old else ""))
    return "Counted on the model\n" + table(["", ">before", ">after", ">difference", ">"], rows)


def outputs_text(equal: Mapping[str, bool]) -> str:
    """Whether an operation changed what the model puts out."""
    rows = [(case.replace("_", " "), "bit-equal" if same else "not equal") for case, same in equal.items()]
    return "Outputs on the same noise, before and after\n" + table(["", ""], rows)


def checks(report: Report) -> list[dict[str, Any]]:
    """A report as plain data."""
    return [asdict(check) for check in report.checks]


def inspected(name: str, model: nn.Module, exam: Exam, operations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a model is made of, as plain data."""
    learned, with_statistics = parameters(model)
    stages: dict[int, Counter[str]] = {stage: Counter() for stage in range(1, exam.stages.count + 1)}
    for unit in exam.units.found:
        stages[exam.stage_of(unit)][unit.kind] += 1
    return {
        "base": name,
        "class": type(model).__name__,
        "parameters": learned,
        "with_statistics": with_statistics,
        "multiply_adds": multiply_adds(model, exam.seen.args),
        "stages": [{"stage": stage, "units": dict(units)} for stage, units in stages.items()],
        "places": exam.places,
        "existing": [asdict(site) for site in exam.existing],
        "rejected": [{"unit": reject.path, "reason": reject.reason} for reject in dict.fromkeys(exam.units.rejected)],
        "operations": list(operations),
    }


def inspected_text(data: Mapping[str, Any], exam: Exam) -> str:
    """What a model is made of, for people."""
    counts = [(label, f"{data[name]:,}") for name, label in _COUNTS.items()]
    parts = [
        f"{data['base']} ({data['class']}), {count(len(data['stages']), 'stage')}",
        table(["", ">"], counts),
        exam_text(exam),
        _operations_text(data["operations"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _operations_text(operations: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for number, operation in enumerate(operations, 1):
        options = operation.get("options", {})
        what = ", ".join(f"{key}={options[key]}" for key in ("placement", "r", "init") if options.get(key) is not None)
        # What is pruned is listed by layer, those of SEs among them or alone.
        of_what = "layer" if operation["op"] == "prune" else "SE"
        named = f"{operation['op']} {count(len(operation['sites']), of_what)}"
        lines.append(f"{number:>6}  {named}{f' ({what})' if what else ''}")
    return "\n".join(["Operations", *lines]) if lines else ""
