"""Census: what became of each addition and concatenation of feature maps in a forward.

In: the joins of a network, and the units that were found. Out: a `Census`: every join is that of a unit, inside one, or
none with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Fate = Literal["unit", "part", "none"]
_NOUNS = {"add": ("addition", "additions"), "cat": ("concatenation", "concatenations")}


@dataclass(frozen=True)
class Counted:
    """One join.

    Attributes:
        path: The module whose own forward it is in.
        kind: `add` or `cat`.
        fate: `unit`, where it is that of a unit, in front of which (or behind which, for an Inception module) an SE
            sits; `part`, where it is inside of a unit or served by another's; `none` otherwise.
        reason: Why it is none.
    """

    path: str
    kind: str
    fate: Fate
    reason: str = ""


@dataclass(frozen=True)
class Census:
    """The joins of a network, in order of execution."""

    joins: tuple[Counted, ...] = ()

    def __str__(self) -> str:
        """The numbers, in a sentence.

        Examples:
            >>> print(plan_se(timm.create_model("resnet50")).census)
            16 additions: 16 of units
        """
        return "; ".join(_told(kind, list(those)) for kind in _NOUNS if (those := list(self._of(kind))))

    def _of(self, kind: str) -> Iterable[Counted]:
        return (join for join in self.joins if join.kind == kind)


def _told(kind: str, joins: list[Counted]) -> str:
    fates = Counter(join.fate for join in joins)
    told = {"unit": "of units", "part": "inside units", "none": "no unit's"}
    parts = [f"{fates[fate]} {words}" for fate, words in told.items() if fates[fate]]  # type: ignore[index]
    return f"{len(joins)} {_NOUNS[kind][len(joins) > 1]}: {', '.join(parts)}"
