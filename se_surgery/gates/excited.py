"""Excited: how a model's gates go over a data set (section 7.2 and figure 9 of the paper).

In: a model and a loader. Out: `Excitations`, for every SE the mean of its gates, their variance over the inputs and
between classes, and how often they are saturated. One pass, in memory that does not grow with the data.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import DataError, NothingToDoError, OptionError, SurgeryError
from ..planning.exam import Exam
from ..structure.find import SESite, axis_of
from ..surgery.journal import Journal, guarded
from .capture import catching
from .feed import Batch, batches, check_classes, evaluating, run, runnable
from .shards import attempt, gathered
from .tally import Tally, whole

FORMAT = "se_surgery.excitations.1"
_NO_GATE = "it does more than multiply each channel by a gate"


@dataclass(frozen=True)
class Gates:
    """The gates of one SE over a data set: what it multiplied each channel of its maps by, its factor counted in.

    Attributes:
        site: The SE.
        count: Number of inputs.
        mean: Mean over the inputs, (C,).
        variance: Variance over the inputs, (C,).
        saturated: Share of the inputs for which the gate was within 5 % of an end of its function's range, (C,); None
            where that function is not known.
        class_means: Mean over the inputs of each class, (K, C); no rows where the data had no labels.
        class_counts: Number of inputs of each class, (K,).
    """

    site: SESite
    count: int
    mean: Tensor
    variance: Tensor
    saturated: Tensor | None
    class_means: Tensor
    class_counts: Tensor

    @property
    def between(self) -> Tensor | None:
        """Variance of the classes' means about the mean, each class by its number of inputs, (C,)."""
        if not len(self.class_counts):
            return None
        weights = (self.class_counts / self.class_counts.sum())[:, None]
        return ((self.class_means - self.mean).square() * weights).sum(0)


@dataclass(frozen=True)
class Excitations:
    """The gates of a model's SEs over a data set.

    `print(found.table())` shows them, `found["layer4.1.se"]` are those of one SE, `plot` draws figure 9 of the paper.

    Attributes:
        sites: The gates of every SE, in order of execution.
        labels: The classes that were seen, ascending.
        names: Their names.
        skipped: The SEs that have no gates of this kind, each with the reason.
    """

    sites: tuple[Gates, ...]
    labels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, path: str) -> Gates:
        found = {gates.site.path: gates for gates in self.sites}
        if path not in found:
            raise OptionError(f"There are no gates of an SE at {path!r}. There are those of {', '.join(found)}.")
        return found[path]

    def __iter__(self) -> Iterator[Gates]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def table(self) -> str:
        """One line for every SE: its gates' mean and spread over the channels, their variances, the saturated share."""
        from ..showing.show import gates_parts
        from ..showing.tables import as_text

        return as_text(gates_parts(self))

    def _repr_html_(self) -> str:
        from ..showing.notebook import html
        from ..showing.show import gates_parts

        return html(gates_parts(self))

    def plot(self, path: str | Path, classes: Collection[int | str] | None = None) -> Path:
        """Draw the mean gate against the channel, for every SE a line for each class and one for all (figure 9).

        Args:
            path: Image file to write; its ending says the format.
            classes: Names or labels of the classes to draw; all by default.

        Returns:
            The path.

        Raises:
            SurgeryError: matplotlib is missing, a class is not there, or the file cannot be written.
        """
        from ..showing.figures import draw_gates

        return draw_gates(self, Path(path), classes)

    def save(self, path: str | Path) -> Path:
        """Write everything into one safetensors file, for `load` to read.

        Raises:
            SurgeryError: The file cannot be written.
        """
        told = {
            "sites": [{"site": asdict(gates.site), "count": gates.count} for gates in self.sites],
            **{name: list(getattr(self, name)) for name in ("labels", "names", "skipped")},
        }
        tensors = {f"{i}.{name}": tensor for i, gates in enumerate(self.sites) for name, tensor in _tensors(gates)}
        try:
            save_file(tensors, path, metadata={"format": FORMAT, "content": json.dumps(told)})
        except (OSError, SafetensorError) as error:
            raise SurgeryError(f"{str(path)!r} cannot be written ({error}). Name a file that can.") from error
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Excitations:
        """Read a file that `save` wrote.

        Raises:
            SurgeryError: It cannot be read, or is none.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise SurgeryError(f"{str(path)!r} holds no excitations. Name a file that Excitations.save wrote.")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return _read(json.loads(metadata["content"]), tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, SurgeryError):
                raise
            raise SurgeryError(
                f"{str(path)!r} cannot be read as excitations ({error}). Name a file that Excitations.save wrote."
            ) from error


_TENSORS = ("mean", "variance", "saturated", "class_means", "class_counts")


def _tensors(gates: Gates) -> Iterator[tuple[str, Tensor]]:
    for name in _TENSORS:
        tensor = getattr(gates, name)
        if tensor is not None:
            yield name, tensor.contiguous()


def _read(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Excitations:
    sites = []
    for i, one in enumerate(told["sites"]):
        values = {name: tensors.get(f"{i}.{name}") for name in _TENSORS}
        site = SESite(**{**one["site"], "layers": ()})
        sites.append(Gates(site, one["count"], **values))  # type: ignore[arg-type]
    skipped = tuple((path, reason) for path, reason in told["skipped"])
    return Excitations(tuple(sites), tuple(told["labels"]), tuple(told["names"]), skipped)


def excitations(
    model: nn.Module, loader: Any, classes: int | Sequence[str] | None = None, *, example_input: Any = None
) -> Excitations:
    """Measure the gates of all SEs of a model over a data set, whoever put them there.

    The model runs in evaluation and is left as found. It may be on any device, and in DistributedDataParallel. Where
    several processes run (torchrun, accelerate), each gives the loader of its own part of the data, and the statistics
    are those of all parts, the same on every process; what a `DistributedSampler` or accelerate gives twice counts
    once.

    Args:
        model: A model with SEs.
        loader: Gives batches of images, or of images and labels: a DataLoader, a list, any iterable.
        classes: Number of classes, or their names in the order of the labels; the loader has to give labels then. With
            None any label is taken.
        example_input: (C, H, W), a tensor or a tuple of arguments, to look at the model with. By default as the
            loader's images.

    Returns:
        The statistics, by SE.

    Raises:
        NothingToDoError: The model has no SE.
        DataError: The loader gives nothing, values that are not finite, or labels out of range.
        SurgeryError: The model cannot be looked at, or does not run on these images.

    Examples:
        >>> found = excitations(timm.create_model("seresnet18", pretrained=True), loader)
        >>> print(found.table())

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, section 7.2.
    """
    found = measured(model, loader, classes, example_input=example_input)
    if not found.sites:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in found.skipped)
        raise NothingToDoError(f"No SE of the model has gates ({reasons}). Look at them with find_se.")
    return found


def measured(
    model: nn.Module, loader: Any, classes: int | Sequence[str] | None = None, *, example_input: Any = None
) -> Excitations:
    """As `excitations`, but where SEs have no gates of this kind they are only skipped, be it all of them."""
    number, names = check_classes(classes)
    model = runnable(model)

    def part() -> tuple[Exam, dict[str, Tally], set[str]]:
        given = iter(batches(loader, model, number))
        first = next(given, None)
        size = tuple(first.images.shape[1:]) if first is not None else None
        exam = Exam(model, size if example_input is None else example_input)
        if not exam.existing:
            raise NothingToDoError("The model has no SE. Put some in with add_se first.")
        return exam, *_tallied(exam, itertools.chain([first] if first is not None else [], given))

    def evaluated(journal: Journal) -> tuple[Exam, dict[str, Tally], set[str]]:
        journal.open_all(model)
        with evaluating(model):
            return attempt(part)

    return _put_together(*guarded(evaluated), names)


def _tallied(exam: Exam, given: Iterator[Batch]) -> tuple[dict[str, Tally], set[str]]:
    """Run the batches through the model; the tally of each SE, and the SEs that are no gates."""
    model = exam.seen.model
    tallies = {site.path: Tally.empty(site.channels) for site in exam.existing if site.is_module}
    with catching(model, {path: axis_of(path, exam.seen) for path in tallies}) as catcher:
        for batch in given:
            catcher.caught.clear()
            run(model, batch)
            for path, gatings in catcher.caught.items():
                for gating in gatings:
                    if not gating.gates.isfinite().all():
                        raise DataError(
                            f"The gates of {path!r} are not finite for batch {batch.number}, whose images are. "
                            f"See to the model's weights, or run it in a wider format than {batch.images.dtype}."
                        )
                    if batch.labels is not None and len(gating.gates) != len(batch.labels):
                        raise DataError(
                            f"{path!r} gates {len(gating.gates)} maps for the {len(batch.labels)} images of batch "
                            f"{batch.number}, which have a label each. Give the images without labels."
                        )
                    tallies[path].add(gating.gates, gating.saturated, batch.labels)
    return tallies, catcher.unfaithful


def _put_together(exam: Exam, tallies: dict[str, Tally], unfaithful: set[str], names: tuple[str, ...]) -> Excitations:
    told = gathered((unfaithful, sum(tally.count for tally in tallies.values())))
    no_gates = {path: _NO_GATE for path in tallies if any(path in paths for paths, _ in told)}
    no_gates |= {site.path: site.written_out for site in exam.existing if not site.is_module}
    if not no_gates and not any(count for _, count in told):
        raise DataError("The loader gave no images. Give one that does; a generator gives its own only once.")
    sites, labels = [], torch.empty(0, dtype=torch.long)
    for site in (site for site in exam.existing if site.is_module):
        tally = whole(tallies[site.path])
        if not tally.count:
            no_gates.setdefault(site.path, "it did not run")
        if site.path in no_gates:
            continue
        labels = tally.labels
        means = tally.class_sums / tally.class_counts[:, None]
        share = tally.saturated / tally.count if tally.saturated is not None else None
        variance = tally.deviations / tally.count
        sites.append(Gates(site, tally.count, tally.mean, variance, share, means, tally.class_counts))
    shown = tuple(names[i] if names else str(i) for i in labels.tolist())
    return Excitations(tuple(sites), tuple(labels.tolist()), shown, tuple(no_gates.items()))
