"""Prune: narrow networks with torch-pruning, and write down what came of it.

In: a model. Out: the same model, narrower; its recipe says how wide every layer is, so that it can be built, saved and
loaded without torch-pruning. `prune_se` narrows the hidden layers of SEs; `to_pruner_args` and `record_pruning` go
around torch-pruning's own pruners of whole networks. torch-pruning is an extra, and imported only here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NothingToDoError, OptionError, PatientError, SurgeryError, shorten
from ..gates.feed import batches, evaluating, modes_kept, runnable
from ..gates.scores import class_scores
from ..gates.shards import attempt, total
from ..planning.exam import Exam, refuse_unfit
from ..planning.options import check_stages, check_where
from ..reading.encoded import refuse_encoded_layers
from ..reading.look import look
from ..structure.find import SESite
from ..surgery.edits import append_operation
from ..surgery.journal import Journal, guarded
from ..surgery.strip import check_origin, choose, refuse_written_out
from .widths import Notes, difference, widths


def prune_se(
    model: nn.Module,
    ratio: float,
    loader: Any = None,
    *,
    stages: int | Collection[int] | None = None,
    where: Any = None,
    origin: str | None = None,
    example_input: Any = None,
) -> nn.Module:
    """Narrow the hidden layers of SEs, in place, so that each keeps the width it needs.

    All hidden channels of the chosen SEs are ranked together by torch-pruning's importance, and the least important
    share goes; every SE keeps at least one. On an error the model is as before.

    Args:
        model: A model with SEs of two layers, whoever put them there; other kinds of attention are left alone, and
            SEs that are written out in the forward of a block.
        ratio: Share of all their hidden channels to take out, between 0 and 1.
        loader: Gives images and labels; then importance is that of a channel's weights times the size of the
            cross-entropy's gradients (`GroupTaylorImportance`, the root of the mean square over the batches for the
            gradient). By default it is their magnitude (`GroupMagnitudeImportance`).
        stages: Stages to prune in, from 1; -1 is the last. All by default.
        where: A glob on the SE's path or its unit's, a list of globs, or a function `(SESite) -> bool`.
        origin: Only the SEs of this origin: `se_surgery`, `timm`, `torchvision` or `other`.
        example_input: (C, H, W), a tensor or a tuple of arguments, to look at the model with.

    Returns:
        The model; the SEs that were narrowed are new modules in the same places.

    Raises:
        OptionError: The ratio is no share.
        NothingToDoError: No such SE is there, or there is nothing to take out.
        SurgeryError: torch-pruning is missing, or cannot see through an SE.

    Examples:
        >>> model = timm.create_model("seresnet18", pretrained=True)
        >>> se_surgery.prune_se(model, 0.5)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio < 1:
        raise OptionError(
            f"ratio={shorten(ratio)} is no share of channels. Give a number between 0 and 1, 0.5 for instance."
        )
    check_origin(origin)
    listed, where = check_stages(stages), check_where(where)
    _torch_pruning()
    exam = Exam(model, example_input)
    chosen = choose(exam, listed, where, origin)
    sites = [site for site in chosen if site.is_module and _has_hidden(exam, site)]
    if not sites:
        refuse_written_out(chosen)
        raise NothingToDoError("No SE of two layers is among those asked for. Look at them with find_se.")
    refuse_encoded_layers(model, tuple(site.path for site in sites))
    return guarded(_prune, model, exam, sites, ratio, loader)


def _prune(journal: Journal, model: nn.Module, exam: Exam, sites: list[SESite], ratio: float, loader: Any) -> nn.Module:
    """Look at the SEs with torch-pruning, and take out what is the least important."""
    pruning = _torch_pruning()
    # torch-pruning sees by gradients which layers hang together, and parameters have to be fit for them.
    with torch.inference_mode(False), torch.enable_grad():
        gradients = _gradients(journal, model, sites, loader) if loader is not None else {}
        hidden = [_hidden(pruning, exam, site, gradients) for site in sites]
        _narrow(journal, model, hidden, ratio)
    return model


def _narrow(journal: Journal, model: nn.Module, hidden: list[_Hidden], ratio: float) -> None:
    """Take the least important share of some hidden channels out of a model."""
    doomed = _least([one.importance for one in hidden], ratio)
    if not any(doomed):
        raise NothingToDoError(
            f"ratio={ratio!r} of {sum(len(one.importance) for one in hidden)} hidden channels, one of each SE kept, is "
            f"none. Give a larger ratio."
        )
    modules = dict(model.named_modules())
    before = widths(model)
    for one, channels in zip(hidden, doomed, strict=True):
        if channels:
            _put(journal, model, modules[one.path], one.without(channels))
    append_operation(journal, model, {"op": "prune", "sites": difference(before, widths(model))})


def _put(journal: Journal, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module where another one is, in all of its places."""
    for holder in model.modules():
        for name in [name for name, child in holder._modules.items() if child is old]:
            journal.open(holder)._modules[name] = new


def _layers(se: nn.Module) -> list[nn.Module]:
    return [module for module in se.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))]


def _has_hidden(exam: Exam, site: SESite) -> bool:
    """Whether an SE is what the paper describes: two layers and what is hidden between them."""
    layers = _layers(exam.seen.model.get_submodule(site.path))
    return len(layers) == 2 and len(layers[0].weight) == layers[1].weight.shape[1]  # type: ignore[arg-type, index]


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise SurgeryError(
            "Pruning needs torch-pruning, which is not installed. Install it with: pip install 'se-surgery[prune]'."
        ) from error
    return torch_pruning


@dataclass
class _Hidden:
    """The hidden layer of a copy of one SE, with the dependency graph that says what goes with its channels."""

    path: str
    copy: nn.Module
    graph: Any
    layer: nn.Module
    function: Any
    importance: Tensor
    flags: dict[str, bool]

    def without(self, channels: list[int]) -> nn.Module:
        """The copy without some channels of its hidden layer."""
        self.graph.get_pruning_group(self.layer, self.function, channels).prune()
        for name, parameter in self.copy.named_parameters():
            parameter.requires_grad_(self.flags[name])
            parameter.grad = None
        return self.copy


def _hidden(pruning: Any, exam: Exam, site: SESite, gradients: dict[str, Tensor]) -> _Hidden:
    """Look at an SE with torch-pruning; all of it happens on a copy."""
    se = exam.seen.model.get_submodule(site.path)
    patient = copy.deepcopy(se)
    flags = {name: parameter.requires_grad for name, parameter in patient.named_parameters()}
    layer = _layers(patient)[0]
    given = exam.seen.calls[site.path][0].args[0]
    reference = next(patient.parameters())
    for name, parameter in patient.named_parameters():
        parameter.requires_grad_(True)
        if gradients:
            parameter.grad = gradients[f"{site.path}.{name}"].to(parameter)
    try:
        x = torch.ones(given.shape, device=reference.device, dtype=reference.dtype)
        with modes_kept(patient):
            # By itself torch-pruning tries another call after any exception, an interrupt included.
            graph = pruning.DependencyGraph().build_dependency(
                patient, example_inputs=x, forward_fn=lambda module, given: module(given), verbose=False
            )
        function = graph.get_pruner_of_module(layer).prune_out_channels
        group = graph.get_pruning_group(layer, function, list(range(site.rd_channels or 0)))
        score = pruning.importance.GroupTaylorImportance if gradients else pruning.importance.GroupMagnitudeImportance
        importance = score()(group).detach().double().cpu()
    except Exception as error:  # whatever torch-pruning raises for what it does not know
        raise SurgeryError(
            f"torch-pruning cannot see through {site.path!r} ({type(se).__name__}: {error}). Leave it out with where."
        ) from error
    return _Hidden(site.path, patient, graph, layer, function, importance, flags)


def _least(importances: list[Tensor], ratio: float) -> list[list[int]]:
    """Of each SE the channels to take out: the least important of all, but never the best one of an SE."""
    ranked = sorted(
        (float(value), se, channel)
        for se, values in enumerate(importances)
        for channel, value in enumerate(values)
        if channel != int(values.argmax())
    )
    number = int(ratio * sum(len(values) for values in importances))
    doomed: list[list[int]] = [[] for _ in importances]
    for _, se, channel in ranked[:number]:
        doomed[se].append(channel)
    return [sorted(channels) for channels in doomed]


def _gradients(journal: Journal, model: nn.Module, sites: list[SESite], loader: Any) -> dict[str, Tensor]:
    """Root of the mean square, over the batches of all processes, of the gradients of the SEs' parameters."""
    model = runnable(model)
    journal.open_all(model)
    named = {f"{site.path}.{n}": p for site in sites for n, p in model.get_submodule(site.path).named_parameters()}
    flags = {name: journal.flag(parameter).requires_grad for name, parameter in named.items()}

    def part() -> tuple[dict[str, Tensor], int]:
        squares, count = {name: torch.zeros_like(p, dtype=torch.float64, device="cpu") for name, p in named.items()}, 0
        for batch in batches(loader, model):
            scores, labels = class_scores(model, batch)
            loss = nn.functional.cross_entropy(scores, labels.to(scores.device))
            found = torch.autograd.grad(loss, list(named.values()))
            for name, gradient in zip(named, found, strict=True):
                squares[name] += gradient.detach().cpu().double().square()
            count += 1
        return squares, count

    with evaluating(model), torch.enable_grad():
        try:
            for parameter in named.values():
                parameter.requires_grad_(True)
            squares, count = attempt(part)
        finally:
            for name, parameter in named.items():
                parameter.requires_grad_(flags[name])
    batches_seen = float(total(torch.tensor(float(count), dtype=torch.float64)))
    if not batches_seen:
        raise DataError("The loader gave no images. Give one that does.")
    return {name: (total(square) / batches_seen).sqrt() for name, square in squares.items()}


def to_pruner_args(model: nn.Module, example_input: Any = None) -> dict[str, Any]:
    """What a pruner of torch-pruning has to be told about a model, operated on or not.

    That is the input to trace it with, and what to leave alone: the layer that makes the model's outputs. torch-pruning
    warns of "unwrapped parameters" where an SE has a scalar of its own (`mix`), and leaves it alone, too.

    Args:
        model: A model.
        example_input: (C, H, W), a tensor or a tuple of arguments, to look at the model with.

    Returns:
        Keyword arguments for any pruner of torch-pruning.

    Raises:
        SurgeryError: The model cannot be looked at.

    Examples:
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     model, importance=torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ...     **se_surgery.to_pruner_args(model))
        >>> with se_surgery.record_pruning(model):
        ...     pruner.step()
    """
    refuse_unfit(model)
    seen = look(model, example_input)
    last = next((event.path for event in reversed(seen.events) if event.kind in ("conv", "linear")), None)
    if last is None:
        raise PatientError(f"{type(model).__name__} has no convolution or linear layer to prune. Give a CNN.")
    # Pruners write into the mappings that they are given, and without them all share one.
    return {
        "example_inputs": seen.args[0] if len(seen.args) == 1 else seen.args,
        "ignored_layers": [seen.modules[last]],
        "in_channel_groups": {},
        "out_channel_groups": {},
    }


@contextlib.contextmanager
def record_pruning(model: nn.Module, example_input: Any = None) -> Iterator[nn.Module]:
    """Write down what torch-pruning does to a model in the block, so that its recipe says how wide every layer is.

    Behind the block, timm's own notes of the model's widths (`num_features`, `feature_info`) are those of the narrowed
    network, so that `reset_classifier` and feature extractors work. On an error in the block the model is as before:
    its values are kept a second time while the block runs.

    Args:
        model: The model that is pruned in the block.
        example_input: What to look at the model with.

    Yields:
        The model.

    Raises:
        NothingToDoError: Nothing was pruned.
        SurgeryError: The block did other things than narrow layers.
    """
    refuse_unfit(model)
    journal = Journal()
    try:
        journal.open_all(model)
        journal.keep((*model.parameters(), *model.buffers()))
        before, notes = widths(model), Notes(model, example_input)
        with modes_kept(model):
            yield model
        notes.refresh(journal)
        sizes = difference(before, widths(model))
        if not sizes:
            raise NothingToDoError("Nothing was pruned. Prune the model inside of the block.")
        append_operation(journal, model, {"op": "prune", "sites": sizes})
    except BaseException:
        journal.undo_for_sure()
        raise
