"""Evidence: what the rows of several seeds say together, and how sure that is.

In: rows. Out: means with their standard errors, and differences between arms, taken seed by seed: the arms of a seed
share images, splits and initial weights, so much of what differs between seeds falls out of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from .rows import Row, key_of
from .studies import STUDIES

# A value for each seed.
Sample = dict[int, float]
_SURE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error: the seeds' standard deviation by the root of their number; NaN for one seed.
        seeds: How many seeds there are.
    """

    mean: float
    error: float
    seeds: int

    @property
    def bound(self) -> float:
        """What a mean has to exceed so that its 95 % confidence interval, by Student's t, leaves out zero."""
        return float(student.ppf((1 + _SURE) / 2, self.seeds - 1)) * self.error if self.seeds > 1 else math.nan

    @property
    def is_beyond_error(self) -> bool:
        """Whether it is farther from zero than its standard error."""
        return abs(self.mean) > self.error

    @property
    def is_beyond_chance(self) -> bool:
        """Whether its confidence interval leaves out zero."""
        return abs(self.mean) > self.bound

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"

    def signed(self) -> str:
        """As a difference in Markdown: bold where it is beyond chance, in parentheses where under its error."""
        text = f"{self.mean:+.2f} ± {self.error:.2f}"
        if self.is_beyond_chance:
            return f"**{text}**"
        return text if self.is_beyond_error else f"({text})"


def estimate(values: Collection[float]) -> Estimate:
    """The mean of one value for each seed, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


def difference(sample: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """The mean of the differences of each seed that both have."""
    return estimate([sample[seed] - reference[seed] for seed in sorted(sample.keys() & reference.keys())])


def average(samples: Sequence[Mapping[int, float]]) -> Sample:
    """For each seed that all samples have, the mean over these."""
    seeds = sorted(set.intersection(*(set(sample) for sample in samples)))
    return {seed: statistics.fmean(sample[seed] for sample in samples) for seed in seeds}


class Evidence:
    """The rows, by study, arm and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {key_of(row): row for row in rows}

    def of(self, study: str, arm: str) -> list[Row]:
        """The rows of an arm, by seed."""
        return [self.rows[key] for key in sorted(self.rows) if (key[0], key[2]) == (study, arm)]

    def arms(self, study: str, among: Iterable[str]) -> list[str]:
        """Of some arms those that there are rows of."""
        return [arm for arm in among if self.of(study, arm)]

    def sample(self, study: str, arm: str, field: str = "accuracy") -> Sample:
        """One number of an arm for each seed."""
        return {row["seed"]: row[field] for row in self.of(study, arm)}

    def size(self, study: str, arm: str, field: str = "parameters") -> int:
        """The parameters of an arm that has the same in every seed."""
        return int(self.of(study, arm)[0][field])

    def accuracy(self, study: str, arm: str) -> str:
        """An arm's accuracy, as text."""
        return str(estimate(self.sample(study, arm).values()))

    def against(self, study: str, arm: str, reference: str) -> str:
        """The difference of an arm's accuracy to another's, as text."""
        return difference(self.sample(study, arm), self.sample(study, reference)).signed()


def missing_arms(evidence: Evidence, study: str) -> list[str]:
    """The arms of a study of which there is no row."""
    return [arm for arm in STUDIES[study][0]() if not evidence.of(study, arm)]
