"""Unit: where an SE can sit, and what looks like such a place and is none.

In: nothing. These are the terms in which `rules` answers, and in which all stages behind it go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import fx

from ..reading.block import Block
from ..reading.events import Event
from ..reading.layout import is_under

RejectKind = Literal["no unit", "untraceable", "outside"]
# The kinds of units that have a shortcut.
WITH_SHORTCUT = ("residual", "concat_residual")


@dataclass(frozen=True)
class Unit:
    """A unit: where an SE can sit.

    Attributes:
        path: Path of its block.
        kind: `residual`, `concat_residual`, `inception`, `aggregation`, `straight`, `dense`, `plain`, or `branch`: a
            module that is the branch of a block whose own forward nobody can look into.
        block: The traced block.
        end: When it ended, on the look's clock.
        join: The addition or concatenation; None for `straight`, `branch` and `plain`,
            and for a dense layer that is a module.
        branch: Set of nodes of the transformed branch alone.
        transformed: Last node of the branch.
        untransformed: Last node of the shortcut.
        convolution: The convolution of a `plain` unit.
        is_first: Whether it is the first unit of its join; what comes behind the join is the first one's.
    """

    path: str
    kind: str
    block: Block
    end: int
    join: fx.Node | None = None
    branch: int = 0
    transformed: fx.Node | None = None
    untransformed: fx.Node | None = None
    convolution: Event | None = None
    is_first: bool = True

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the branch."""
        return self.block.within(self.branch)

    def calls(self, path: str) -> bool:
        """Whether its branch calls the module at `path`, itself or inside another."""
        called = [self.block.calls[node.name].path for node in self.nodes if node.name in self.block.calls]
        return any(path == root or is_under(path, root) for root in called)

    def holds(self, convolution: Event) -> bool:
        """Whether a convolution is in its block; in the model's own forward, whether it is in the branch."""
        path = convolution.path
        if self.path and (path == self.path or is_under(path, self.path)):
            return True
        return self.calls(path) or any(convolution in self.block.events(node) for node in self.nodes)

    @property
    def number(self) -> int:
        """Where its join is among the nodes of its block, for the order of several units in one forward."""
        return self.block.index[self.join] if self.join is not None else 0

    @property
    def start(self) -> int:
        """When its block began."""
        return self.block.call.start


@dataclass(frozen=True)
class Reject:
    """Something that looks like a unit, or might hold one, and is none.

    Attributes:
        path: Path of the module: of the block that joins maps, or of a convolution.
        reason: Why it is none.
        kind: `no unit`, by what it does; `untraceable`, where what it does cannot be told; `outside`, a convolution in
            no unit.
        blocking: Whether an operation that asks for it must be refused.
    """

    path: str
    reason: str
    kind: RejectKind = "no unit"
    blocking: bool = False
