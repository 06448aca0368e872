"""Judge: measure what a model's score loses without each of its SEs, and take out the best set.

In: a model, and a loader or a user's own score. Out: a `Tradeoff`; with a budget, the model without the best set that
keeps it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..errors import FoldError, OptionError
from ..folding.fold import factors_of, plan_foldings
from ..planning.exam import Exam, refuse_unfit
from ..reading.layout import in_rank
from ..structure.find import SESite, axis_of
from ..surgery.journal import Journal, guarded
from ..surgery.strip import refuse_written_out, remove
from .excited import Excitations, measured
from .feed import batches, evaluating, modes_kept, runnable
from .scores import Evaluate, Scores, accuracy, replaced
from .worth import Tradeoff, Worth, parameters_kept


def tradeoff(
    model: nn.Module,
    loader: Any,
    evaluate: Evaluate | None = None,
    budget: float | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    example_input: Any = None,
) -> Tradeoff:
    """Rank the SEs of a model by what taking out each would cost against what it frees.

    Each SE alone is replaced by nothing (stripped) and by its mean gate (folded, where a layer can take that), and the
    score measured, with a progress bar on terminals. With a budget the best set is then taken out of the model, each SE
    by its better way, and the score measured again; on an error the model is as before.

    Args:
        model: A model with SEs. One in DistributedDataParallel or `torch.compile` is scored; with a budget give the
            model itself.
        loader: Gives batches of images and labels, as for `excitations`; it is gone through many times.
        evaluate: A function of the model that returns its score; larger is better. By default the share of the loader's
            images that it classifies right.
        budget: Parameters that the SEs may keep, an int, or as a float from 0 to 1 the share of what they have. By
            default nothing is taken out.
        resume: File that keeps every score as soon as it is known; when it is there, those in it are not measured
            again. It is for one model, one data set and one way to evaluate.
        example_input: (C, H, W), a tensor or a tuple of arguments, to look at the model with.

    Returns:
        What each SE is worth, and what was taken out.

    Raises:
        NothingToDoError: The model has no SE.
        DataError: The loader or the score is of no use.
        OptionError: The budget is below zero or above all there is, or evaluate is no function.
        SurgeryError: The model cannot be looked at or operated on, or the file is of another model or other data.

    Examples:
        >>> found = tradeoff(timm.create_model("seresnet18", pretrained=True), loader, budget=0.5)
        >>> print(found.table())
    """
    if evaluate is not None and not callable(evaluate):
        raise OptionError(f"evaluate={evaluate!r} is no function. Give one that returns the score of a model, or none.")
    if budget is not None:
        refuse_unfit(model)
    return guarded(_tradeoff, runnable(model), loader, evaluate, budget, resume, example_input)


def _tradeoff(
    journal: Journal,
    model: nn.Module,
    loader: Any,
    evaluate: Evaluate | None,
    budget: float | None,
    resume: str | os.PathLike[str] | None,
    example_input: Any,
) -> Tradeoff:
    """What each SE is worth; while that is measured the model evaluates, and its SEs are replaced in turn."""
    journal.open_all(model)
    with evaluating(model):
        first = next(batches(loader, model), None)
    if example_input is None and first is not None:
        example_input = tuple(first.images.shape[1:])
    exam = Exam(model, example_input)
    if exam.existing and not any(site.is_module for site in exam.existing):
        refuse_written_out(exam.existing)
    if budget is not None:
        parameters_kept(budget, sum(site.params for site in exam.existing if site.is_module))
    scores = Scores(resume, model)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("Measuring the gates", total=None)
        found = measured(model, loader, example_input=example_input)
        scores.bind(_data_of(found))
        judge = _Judge(exam, found, evaluate or (lambda patient: accuracy(patient, loader)), scores)
        told = judge.judged(1 if first is None else len(first.images), bar, task)
    if budget is None:
        return told
    chosen = told.choose(budget)
    if not chosen:
        return told
    # The score first: where it fails, the model is as it was.
    result = judge.result(chosen)
    return replace(told, result=result, taken=judge.take_out(journal, chosen))


def _data_of(found: Excitations) -> str:
    """A data set in a few words that another one, with other labels or more images, does not have."""
    if not found.sites:
        return "data without gates"
    gates = found.sites[0]
    counts = zlib.crc32(repr((found.labels, gates.class_counts.tolist())).encode())
    return f"{gates.count} images of {len(found.labels)} classes ({counts:08x})"


# How an SE's time is taken.
_SECONDS, _REPEATS = 0.01, 3


@dataclass(frozen=True)
class _Trial:
    """An SE to be replaced while the score is measured: by nothing, or by a gate in its map's rank."""

    name: str
    path: str
    gate: Tensor | None = None


class _Judge:
    """Measures scores of one model."""

    def __init__(self, exam: Exam, found: Excitations, evaluate: Evaluate, scores: Scores) -> None:
        self.exam, self.found, self.evaluate, self.scores = exam, found, evaluate, scores
        self.model = exam.seen.model
        self.sites = [site for site in exam.existing if site.is_module]
        self.why_not: dict[str, str] = {}
        self.gates = {site.path: gate for site in self.sites if (gate := self._gate(site)) is not None}

    def _gate(self, site: SESite) -> Tensor | None:
        """The mean gate of an SE that can be folded."""
        try:
            ((_, factor),) = factors_of(plan_foldings(self.exam, [site]), self.found)
        except FoldError as error:
            self.why_not[site.path] = str(error)
            return None
        rank = self.exam.seen.calls[site.path][0].output.dim()
        return in_rank(factor, rank, axis_of(site.path, self.exam.seen))

    def judged(self, batch: int, bar: Progress, task: TaskID) -> Tradeoff:
        """The score of the model and of every trial, which the bar shows."""
        paths = [site.path for site in self.sites]
        trials = [_Trial(f"strip {path}", path) for path in paths]
        trials += [_Trial(f"fold {path}", path, gate) for path, gate in self.gates.items()]
        bar.update(task, description="Scoring", total=len(trials) + 1, completed=0)
        score = self._score("all", [])
        for trial in trials:
            bar.advance(task)
            self._score(trial.name, [trial])
        losses = {trial.name: score - self.scores.known[trial.name] for trial in trials}
        return Tradeoff(
            score,
            tuple(
                Worth(
                    site,
                    self._seconds(site, batch),
                    losses[f"strip {site.path}"],
                    losses.get(f"fold {site.path}"),
                    self.why_not.get(site.path, ""),
                )
                for site in self.sites
            ),
            left=tuple((site.path, site.written_out) for site in self.exam.existing if not site.is_module),
        )

    def _score(self, name: str, trials: list[_Trial]) -> float:
        with contextlib.ExitStack() as stack:
            stack.enter_context(modes_kept(self.model))
            for trial in trials:
                stack.enter_context(replaced(self.model.get_submodule(trial.path), trial.gate))
            return self.scores.of(name, lambda: self.evaluate(self.model))

    def _seconds(self, site: SESite, batch: int) -> float:
        """The time that one call of an SE takes."""
        se, given = self.model.get_submodule(site.path), self.exam.seen.calls[site.path][0].args[0]
        reference = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        with evaluating(self.model):
            x = torch.randn((batch, *given.shape[1:]), device=reference.device).to(reference.dtype)
            timer = Timer("se(x)", globals={"se": se, "x": x}, num_threads=torch.get_num_threads())
            # The least of several: the first calls and a busy machine only add to it.
            return min(min(timer.blocked_autorange(min_run_time=_SECONDS).times) for _ in range(_REPEATS))

    def result(self, chosen: Collection[Worth]) -> float:
        """The score without a set of SEs."""
        trials = [
            _Trial(worth.way, worth.site.path, self.gates[worth.site.path] if worth.way == "fold" else None)
            for worth in chosen
        ]
        return self._score("; ".join(f"{trial.name} {trial.path}" for trial in trials), trials)

    def take_out(self, journal: Journal, chosen: Collection[Worth]) -> tuple[str, ...]:
        """Take a set of SEs out of the model, each by its better way; their paths."""
        sites = [worth.site for worth in chosen]
        folded = [worth.site for worth in chosen if worth.way == "fold"]
        factors = factors_of(plan_foldings(self.exam, folded, gone=sites), self.found)
        remove(journal, self.model, self.exam, sites, restore=False, factors=factors)
        return tuple(site.path for site in sites)
