"""Worth: what each SE of a model does for its score, against what it costs to keep and to run.

In: what `judge` has measured. Out: a `Tradeoff`: the SEs by what is lost for what they free, and the best sets to take
out, as tables and pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..structure.find import SESite
from .choice import Choice, best_sets, cheapest


@dataclass(frozen=True)
class Worth:
    """What one SE is worth.

    Attributes:
        site: The SE.
        seconds: What one of its calls takes on a batch of the loader.
        stripped: What the score loses without it.
        folded: What the score loses when its mean gate takes its place; None where no layer can take that.
        why_not: Why it cannot be folded.
    """

    site: SESite
    seconds: float
    stripped: float
    folded: float | None
    why_not: str = ""

    @property
    def way(self) -> str:
        """The better way to take it out: `fold` or `strip`."""
        return "fold" if self.folded is not None and self.folded <= self.stripped else "strip"

    @property
    def loss(self) -> float:
        """What the score loses by the better way; below zero where it gains."""
        return min(self.stripped, self.stripped if self.folded is None else self.folded)


def _rank(worth: Worth) -> tuple[float, int]:
    """What an SE is sorted by: one that loses no more than another and frees no less never comes behind it."""
    freed = max(worth.site.params, 1)
    # A gain divided by what is freed would put the smallest first.
    return (worth.loss / freed if worth.loss > 0 else worth.loss * freed), -freed


@dataclass(frozen=True)
class Tradeoff:
    """What the SEs of a model are worth.

    Attributes:
        score: The score of the model as it was.
        worths: What each SE is worth, in order of execution.
        taken: The SEs that were taken out to keep the budget, by path.
        result: The score after that, measured; None where nothing was taken out.
        left: The SEs that were left alone because they are no modules, each with where it is written out.
    """

    score: float
    worths: tuple[Worth, ...]
    taken: tuple[str, ...] = ()
    result: float | None = None
    left: tuple[tuple[str, str], ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters of all SEs together."""
        return sum(worth.site.params for worth in self.worths)

    @property
    def ranked(self) -> tuple[Worth, ...]:
        """The SEs by what the score loses for each parameter that they free, least first.

        Where nothing is lost, those come first that gain more and free more.
        """
        return tuple(sorted(self.worths, key=_rank))

    @cached_property
    def front(self) -> list[Choice]:
        """The best sets to take out, by the parameters that they free; members are numbers of `worths`."""
        return best_sets([worth.site.params for worth in self.worths], [worth.loss for worth in self.worths])

    def choose(self, budget: float) -> tuple[Worth, ...]:
        """The SEs to take out so that the others keep the budget and the least is lost.

        Args:
            budget: Parameters that the SEs may keep, or, as a float from 0 to 1, the share of what they have.

        Raises:
            OptionError: The budget is below zero or above all there is.
        """
        kept = parameters_kept(budget, self.parameters)
        choice = cheapest(self.front, self.parameters - kept)
        return tuple(self.worths[number] for number in choice.members)

    def table(self) -> str:
        """The SEs by what is lost for each parameter freed, and what was done."""
        from ..showing.show import tradeoff_parts
        from ..showing.tables import as_text

        return as_text(tradeoff_parts(self))

    def _repr_html_(self) -> str:
        from ..showing.notebook import html
        from ..showing.show import tradeoff_parts

        return html(tradeoff_parts(self))

    def plot(self, path: str | Path) -> Path:
        """Draw what is lost against the parameters that are kept: each SE alone, and the best sets.

        Args:
            path: Image file to write; its ending says the format.

        Raises:
            SurgeryError: matplotlib is missing, or the file cannot be written.
        """
        from ..showing.figures import draw_tradeoff

        return draw_tradeoff(self, Path(path))


def parameters_kept(budget: Any, everything: int) -> int:
    """The parameters that SEs may keep, from a number of them or a share of all they have.

    Raises:
        OptionError: It is neither, below zero, or above all there is.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real) or budget != budget:
        raise OptionError(f"budget={budget!r} is no number. Give parameters to keep, or a share from 0.0 to 1.0.")
    is_count, kept = isinstance(budget, Integral), float(budget)
    limit = everything if is_count else 1.0
    if not 0 <= kept <= limit:
        told = f"{everything} parameters, all that its SEs have" if is_count else "1.0, the whole share"
        where = "below zero" if kept < 0 else f"above {told}"
        raise OptionError(f"budget={budget!r} is {where}. Give a number from 0 to {limit}.")
    return int(kept if is_count else kept * everything)
