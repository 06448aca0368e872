"""Walk: from an SE along the data to the layers that can take its gate, if that were a constant.

In: an `Exam`, and the place of one SE in a forward. Out: the layers and the factors that they can take, or a `NoFold`
with the reason. The way goes back, against the data, to the normalisation or convolution in front of the SE, and where
that is not possible ahead, to the one behind it. It goes on as long as what stands in between lets a factor on each
channel through (activations such as ReLU, drop path, layer scale, pooling) and as nothing else takes the values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx

from ..errors import TraceError
from ..planning.exam import Exam
from ..planning.placements import changes_in_place
from ..reading.again import comes_again
from ..reading.anatomy import Anatomy
from ..reading.block import Block, arguments
from ..reading.events import Call
from ..reading.layout import is_under
from ..records import implants
from .absorb import ANY, TAKERS, Absorption, NoFold, Trial
from .steps import called, kept_by, told

# The way from the outside to a block inside: the callers, outermost first.
_Above = tuple[tuple[Block, fx.Node], ...]


@dataclass(frozen=True)
class Place:
    """Where an SE is in a forward.

    Attributes:
        anatomy: The blocks, in evaluation or in training.
        block: The block whose forward it is.
        value: The node whose value the SE takes.
        users: The nodes that take it there: the call of the SE; where the graph has none, those behind the SE.
        gated: The node whose value is that behind the SE, once the SE is gone.
        unit: Path of the unit that the SE serves.
        order: Its number among the implants of its block, where the graph has no call of it.
    """

    anatomy: Anatomy
    block: Block
    value: fx.Node
    users: tuple[fx.Node, ...]
    gated: fx.Node
    unit: str
    order: int | None = None


def caller(anatomy: Anatomy, call: Call) -> tuple[Block, fx.Node]:
    """The block whose forward makes a call, and the node that it is.

    Raises:
        NoFold: No graph shows it.
    """
    block = anatomy.block(call.parent.path) if call.parent is not None else None
    for node in block.nodes if block is not None else ():
        if block is not None and block.calls.get(node.name) is call:
            return block, node
    raise NoFold(f"{call.path!r} is called from where no graph shows it")


class Walk:
    """The way from one place of an SE to the layers that take its factor."""

    def __init__(self, exam: Exam, place: Place, gone: Collection[str]) -> None:
        self.seen = exam.seen
        self.anatomy = place.anatomy
        self.place = place
        self.gone = gone
        self.needs = ANY
        held = [t for _, m in exam.seen.model.named_modules(remove_duplicate=False) for t in m._parameters.values()]
        self.tied = {key for key, times in Counter(id(t) for t in held if t is not None).items() if times > 1}

    def done(self) -> tuple[tuple[Absorption, ...], int]:
        """The layers, and what factors they take."""
        reasons = []
        for way in (self._in_front, self._behind):
            self.needs = ANY
            try:
                return tuple(way()), self.needs
            except NoFold as reason:
                reasons.append(str(reason))
        raise NoFold(f"in front of it {reasons[0]}, and behind it {reasons[1]}")

    # ------------------------------------------------------------------------------------------------------- in front

    def _in_front(self) -> list[Absorption]:
        place = self.place
        if set(place.value.users) != set(place.users):
            raise NoFold(f"{told(place.block, place.value)} goes elsewhere, too")
        for user in place.users:
            self._refuse_se(place.block, place.value, user, slice(place.order))
        channels = place.block.value(place.value).shape[self.anatomy.axis(place.block, place.value)]
        return self._back(place.block, place.value, (0, channels), ())

    def _back(self, block: Block, node: fx.Node, span: tuple[int, int], above: _Above) -> list[Absorption]:
        """The layers that scale the value of a node by the channels of the factor in `span`."""
        if node.op == "placeholder":
            return self._outwards(block, node, span, above)
        if node.op == "call_module":
            return self._into(block, node, span, above)
        sources = block.maps_into(node)
        kind = block.kind(node)
        if kind == "add" and len(sources) == 2 and len({block.value(s).shape for s in sources}) == 1:
            return [taken for source in sources for taken in self._from(block, source, node, span, above)]
        if kind == "cat" and len(sources) == len(node.args[0]):  # type: ignore[arg-type]
            return self._from_parts(block, sources, node, span, above)
        if len(sources) != 1:
            raise NoFold(f"{called(block, node)} does not keep a factor")
        self._pass(block, node)
        return self._from(block, sources[0], node, span, above)

    def _from(
        self, block: Block, source: fx.Node, taker: fx.Node, span: tuple[int, int], above: _Above
    ) -> list[Absorption]:
        """The layers that scale what a node takes from a source, if nothing else takes it."""
        if set(source.users) != {taker}:
            raise NoFold(f"{told(block, source)} goes elsewhere, too")
        self._refuse_se(block, source, taker)
        return self._back(block, source, span, above)

    def _from_parts(
        self, block: Block, sources: list[fx.Node], node: fx.Node, span: tuple[int, int], above: _Above
    ) -> list[Absorption]:
        """The layers that scale the parts of a concatenation, each by its channels."""
        axis, start = self.anatomy.axis(block, node), span[0]
        found = []
        for source in sources:
            stop = start + block.value(source).shape[axis]
            found += self._from(block, source, node, (start, stop), above)
            start = stop
        if start != span[1]:
            raise NoFold(f"{called(block, node)} does not join channels")
        return found

    def _into(self, block: Block, node: fx.Node, span: tuple[int, int], above: _Above) -> list[Absorption]:
        """The layers that scale what a module returns: it itself, others in it, or those in front of it."""
        path = block.calls[node.name].path if node.name in block.calls else ""
        sources = block.maps_into(node)
        if path in self.gone and len(sources) == 1:
            return self._from(block, sources[0], node, span, above)
        trial = self._trial(block, node, sources[0], node) if len(sources) == 1 else None
        how = trial.taker(ahead=False) if trial is not None else None
        if how is not None:
            return [self._absorption(path, how, span)]
        if trial is not None and self._lets_through(block, node, trial):
            return self._from(block, sources[0], node, span, above)
        child = self._inside(path)
        returned = child.output().args[0]
        if not isinstance(returned, fx.Node) or not child.is_map(returned):
            raise NoFold(f"{path!r} does not return one map")
        return self._from(child, returned, child.output(), span, (*above, (block, node)))

    def _outwards(self, block: Block, node: fx.Node, span: tuple[int, int], above: _Above) -> list[Absorption]:
        """The layers that scale what a block was given."""
        outer, call = self._out_of(block, above)
        given = arguments(block, call).get(node.name)
        if given is None:
            raise NoFold(f"{block.path!r} is given no one map")
        return self._from(outer, given, call, span, above[:-1])

    # --------------------------------------------------------------------------------------------------------- behind

    def _behind(self) -> list[Absorption]:
        place = self.place
        found = []
        alone = set(place.value.users) == set(place.users)
        after = 0 if place.order is None else place.order + 1
        for taker in place.users if place.gated is place.value else place.gated.users:
            if not alone and changes_in_place(place.block, taker):
                raise NoFold(f"{called(place.block, taker)} would change in place what goes elsewhere, too")
            self._refuse_se(place.block, place.gated, taker, slice(after, None))
            found += self._beyond(place.block, place.gated, taker, ())
        if not found:
            raise NoFold("nothing takes it")
        return found

    def _ahead(self, block: Block, node: fx.Node, taker: fx.Node, above: _Above) -> list[Absorption]:
        """The layers that take the factor on the value of a node, as one of its users takes it."""
        self._refuse_se(block, node, taker)
        return self._beyond(block, node, taker, above)

    def _beyond(self, block: Block, node: fx.Node, taker: fx.Node, above: _Above) -> list[Absorption]:
        if taker.op == "output":
            outer, call = self._out_of(block, above)
            if taker.args[0] is not node:
                raise NoFold(f"{block.path!r} returns it with others")
            return self._all_ahead(outer, call, above[:-1])
        if block.maps_into(taker) != [node]:
            raise NoFold(f"{called(block, taker)} joins it with others")
        if taker.op != "call_module":
            self._pass(block, taker)
            return self._all_ahead(block, taker, above)
        path = block.calls[taker.name].path if taker.name in block.calls else ""
        trial = self._trial(block, taker, node, taker) if path not in self.gone else None
        how = trial.taker(ahead=True) if trial is not None else None
        if how is not None:
            return [self._absorption(path, how, (0, block.value(node).shape[self.anatomy.axis(block, node)]))]
        if path in self.gone or (trial is not None and self._lets_through(block, taker, trial)):
            return self._all_ahead(block, taker, above)
        child = self._inside(path)
        entries = [inner for inner in child.nodes if arguments(child, taker).get(inner.name) is node]
        way = (*above, (block, taker))
        return [taken for entry in entries for user in entry.users for taken in self._ahead(child, entry, user, way)]

    def _all_ahead(self, block: Block, node: fx.Node, above: _Above) -> list[Absorption]:
        return [taken for user in node.users for taken in self._ahead(block, node, user, above)]

    # --------------------------------------------------------------------------------------------------------- common

    def _out_of(self, block: Block, above: _Above) -> tuple[Block, fx.Node]:
        """The caller of a block, to go on there.

        Out of the block that the SE is in the way goes no further than the unit: what that returns, others may read.
        An activation in a Sequential that holds an SE is its own unit, and the Sequential takes its place.
        """
        if above:
            return above[-1]
        if is_under(block.path, self.place.unit) or not block.view._modules:
            return caller(self.anatomy, block.call)
        raise NoFold(f"the way leaves {block.path or 'the model'!r}")

    def _absorption(self, path: str, how: str, span: tuple[int, int]) -> Absorption:
        module = self.seen.modules[path]
        if len(self.seen.calls[path]) > 1 or any(id(tensor) in self.tied for tensor in module._parameters.values()):
            raise NoFold(f"{path!r} is used in several places")
        self.needs = max(self.needs, TAKERS[how].needs)
        return Absorption(path, how, *span)

    def _lets_through(self, block: Block, node: fx.Node, trial: Trial) -> bool:
        # With a mean of zero a normalisation only scales in evaluation, and still does not in training.
        needs = trial.lets_through() if "norm" not in block.kinds(node) else None
        self.needs = max(self.needs, needs or ANY)
        return needs is not None

    def _trial(self, block: Block, node: fx.Node, source: fx.Node, result: fx.Node) -> Trial | None:
        """A trial of the module that a node calls; None where it is made of others, or does not run by itself."""
        call = block.calls.get(node.name)
        module = self.seen.modules[call.path] if call is not None else None
        if module is None or not block.is_map(source) or not block.is_map(result):
            return None
        has_own = any(isinstance(t, Tensor) for t in (*module._parameters.values(), *module._buffers.values()))
        if module._modules and not has_own and next(module.parameters(), None) is not None:
            return None
        axes = (self.anatomy.axis(block, source), self.anatomy.axis(block, result))
        given = block.value(source)
        try:
            return Trial(module, given, axes)
        except Exception as error:  # whatever its own code raises on a map of another size, or when it is copied
            if not comes_again(error, lambda: Trial(module, given, axes)):
                raise
            return None

    def _inside(self, path: str) -> Block:
        """The block of a module that is made of others."""
        module = self.seen.modules[path]
        if not path or not module._modules:
            raise NoFold(f"{path!r} ({type(module).__name__}) does not keep a factor")
        try:
            return self.anatomy.block(path)
        except TraceError as error:
            raise NoFold(f"{path!r} cannot be looked into: {error}") from error

    def _pass(self, block: Block, node: fx.Node) -> None:
        """Go through a function, or refuse to."""
        needs = kept_by(block, node)
        if needs is None:
            raise NoFold(f"{called(block, node)} does not keep a factor")
        self.needs = max(self.needs, needs)

    def _refuse_se(self, block: Block, value: fx.Node, taker: fx.Node, which: slice = slice(None)) -> None:
        """Refuse to go past an SE of this library that stays: the graphs are those from before it was put in.

        Several that are on one way run in the order in which they were put in; `which` of them to look at.
        """
        for implant in implants(self.seen.modules[block.path])[which]:
            path = f"{block.path}.{implant.name}" if block.path else implant.name
            for edge in implant.edges if path not in self.gone else ():
                if edge.producer == value.name and taker.name in edge.consumers and edge.method == block.trace.method:
                    raise NoFold(f"{path!r} is in between")
