"""Choice: which SEs to take out, by what each costs and frees.

In: for every SE the parameters that it frees and the score that is lost without it. Out: the best sets, from nothing
to all of them. Losses are taken to add up, which is a guess: what a set loses is known when it is measured.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

# Sets that are kept while the best are looked for: below this number the search is exact.
_KEPT = 4096


@dataclass(frozen=True)
class Choice:
    """A set of SEs to take out.

    Attributes:
        freed: Parameters that they free.
        loss: The sum of what is lost without each.
        members: Their numbers, ascending.
    """

    freed: int
    loss: float
    members: tuple[int, ...]


def best_sets(freed: Sequence[int], losses: Sequence[float]) -> list[Choice]:
    """The sets that no other beats: none frees as much and loses less. By what they free, ascending.

    Examples:
        >>> [choice.members for choice in best_sets([10, 10, 30], [0.2, 0.1, 0.4])]
        [(), (1,), (0, 1), (2,), (1, 2), (0, 1, 2)]
    """
    best = [Choice(0, 0.0, ())]
    for number, (parameters, loss) in enumerate(zip(freed, losses, strict=True)):
        grown = [Choice(one.freed + parameters, one.loss + loss, (*one.members, number)) for one in best]
        best = _thinned(_unbeaten([*best, *grown]))
    return best


def _unbeaten(choices: list[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (-one.freed, one.loss, len(one.members))):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept[::-1]


def _thinned(choices: list[Choice]) -> list[Choice]:
    """At most so many sets, spread evenly over what they free; the first and the last are among them."""
    if len(choices) <= _KEPT:
        return choices
    first, last = choices[0].freed, choices[-1].freed
    marks = (first + (last - first) * i / (_KEPT - 1) for i in range(_KEPT))
    places = {min(bisect.bisect_left(choices, mark, key=lambda one: one.freed), len(choices) - 1) for mark in marks}
    return [choices[place] for place in sorted(places)]


def cheapest(choices: Sequence[Choice], at_least: int) -> Choice:
    """Of the best sets the one that loses least among those that free at least so many parameters."""
    return next(choice for choice in choices if choice.freed >= at_least)
