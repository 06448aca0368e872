"""add_se compares what it wrote with what was there: what is wrong it undoes, and what is right it lets pass.

Wrong forwards are made by putting a fault into the tracing, the insertion or the generated source. Each has to be seen,
by name, and the model has to be what it was, bit for bit.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patients import build, differences, images, run, snapshot
from torch import Tensor, fx, nn
from torch.nn import functional as F

from se_surgery import RewriteError, add_se, strip_se
from se_surgery.checking import check
from se_surgery.reading import anatomy, trace
from se_surgery.reading.tracer import Tracer
from se_surgery.surgery import codegen, graft

SIZE = (3, 32, 32)


class Body(nn.Module):
    """A block: convolution, normalisation, activation, convolution; what it does with them is in a subclass."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.bn(self.conv(x))))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Gained(Body):
    """Reads a number of its own."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return x + self.branch(x) * self.gain


class Blended(Body):
    """Joins what it is given with weights that differ, so that the order of operands shows."""

    def forward(self, x):
        y = self.branch(x)
        return x + torch.sub(y, y.relu(), alpha=0.25)


class Accumulating(Body):
    """Adds to what it is given, in place."""

    def forward(self, x):
        x += self.branch(x)
        return x


class Dropping(Body):
    """Draws by functions, in training."""

    def forward(self, x):
        return x + F.dropout(self.branch(x), 0.5, self.training)


# ------------------------------------------------------------------------------------------------------- wrong forwards


def refused(model: nn.Module, **options: Any) -> str:
    """The message that operating ends with; the model is what it was."""
    before, outputs = snapshot(model), run(model, images(SIZE))
    with pytest.raises(RewriteError) as caught:
        add_se(model, example_input=SIZE, **options)
    assert differences(before, snapshot(model)) == []
    assert all(torch.equal(a, b) for a, b in zip(run(model, images(SIZE)), outputs, strict=True))
    message = str(caught.value)
    assert "Nothing was changed." in message
    assert message.endswith("Leave this block out with where, and please report this as a bug.")
    return message


def test_equal_blocks_that_share_a_trace_by_mistake_are_told_apart(monkeypatch):
    shape_of = anatomy.Anatomy._shape_of
    # As if neither attributes nor what a trace read told blocks apart.
    monkeypatch.setattr(anatomy.Anatomy, "_shape_of", lambda self, module: shape_of(self, module)[0])
    monkeypatch.setattr(anatomy, "_fits", lambda traced, view: True)
    message = refused(Net(Gained(1.0), Gained(2.0)))
    assert "'blocks.1' (Gained)" in message and "forward" in message


def in_graph(change: Callable[[fx.Graph], None]) -> Callable[..., Any]:
    """A patch that changes each graph before SEs are put into it."""
    inner = codegen.insert

    def insert(graph, insertions):
        done = inner(graph, insertions)
        change(done)
        return done

    return insert


def node_of(graph: fx.Graph, target: Any) -> fx.Node:
    """The node that calls a child or function; of products the one under its name."""
    return next(node for node in graph.nodes if target in (node.target, node.name))


def other_constant(graph: fx.Graph) -> None:
    node = node_of(graph, operator.mul)
    node.args = (node.args[0], 3.0)


def swapped(graph: fx.Graph) -> None:
    node = node_of(graph, torch.sub)
    node.args = node.args[::-1]


def lost_keyword(graph: fx.Graph) -> None:
    node_of(graph, torch.sub).kwargs = {}


def dropped(graph: fx.Graph) -> None:
    node = node_of(graph, "act")
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def called_twice(graph: fx.Graph) -> None:
    node = node_of(graph, "act")
    with graph.inserting_after(node):
        again = graph.call_module("act", (node.args[0],))
    node.replace_all_uses_with(again)


def out_of_place(graph: fx.Graph) -> None:
    node_of(graph, operator.iadd).target = operator.add


def other_input(graph: fx.Graph) -> None:
    x = next(iter(graph.nodes))
    node_of(graph, "conv2").args = (x,)


def moved(producer: str, consumer: Any) -> Callable[[fx.Graph], None]:
    """Put the SE behind another value than the planned one."""

    def change(graph: fx.Graph) -> None:
        se = next(node for node in graph.nodes if "se" in str(node.target).split("_"))
        se.replace_all_uses_with(se.args[0])
        source, taker = node_of(graph, producer), node_of(graph, consumer)
        graph.erase_node(se)
        with graph.inserting_before(taker):
            again = graph.call_module("se", (source,))
        taker.replace_input_with(source, again)

    return change


FAULTS = {
    "a constant": (lambda: Net(Gained(2.0)), other_constant, "returns other values"),
    "swapped operands": (lambda: Net(Blended()), swapped, "returns other values"),
    "a keyword": (lambda: Net(Blended()), lost_keyword, "returns other values"),
    "a node dropped": (lambda: Net(Gained(2.0)), dropped, "calls 'blocks.0.conv2' where 'blocks.0.act' is due"),
    "a call made twice": (lambda: Net(Gained(2.0)), called_twice, "calls 'blocks.0.act' where 'blocks.0.conv2' is due"),
    "another input": (lambda: Net(Gained(2.0)), other_input, "gives 'blocks.0.conv2' other values"),
    "an SE behind another value": (lambda: Net(Gained(2.0)), moved("bn", "act"), "is given another value than that of"),
    "an SE behind the gain": (
        lambda: Net(Gained(2.0)),
        moved("mul", operator.add),
        "is given another value than that of",
    ),
    "in place": (lambda: Net(Accumulating()), out_of_place, "leaves other values in what it was given"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_graph_is_seen_and_undone(monkeypatch, fault):
    make, change, what = FAULTS[fault]
    model = make().eval()
    monkeypatch.setattr(codegen, "insert", in_graph(change))
    assert what in refused(model, lean=False)


def test_another_default_of_an_argument_is_seen(monkeypatch):
    parameters = codegen._parameters
    monkeypatch.setattr(codegen, "_parameters", lambda traced: parameters(traced).replace("scale=2.0", "scale=1.0"))
    monkeypatch.setattr(codegen, "_left_out", lambda traced: [])
    assert "has other defaults" in refused(Net(Defaulted()).eval())


class Defaulted(Body):
    """Has an argument that nobody gives, and calls itself what it likes."""

    def forward(this, x, scale=2.0):
        return x + this.branch(x)


class Unnamed(Body):
    """Calls itself otherwise than `self`."""

    def forward(block, x):
        return x + block.branch(x)


class Scaling(nn.Module):
    """Takes a keyword."""

    def forward(self, x, factor=1.0):
        return x * factor


class Passing(Body):
    """Gives a child a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling = Scaling()

    def forward(self, x):
        return x + self.scaling(self.branch(x), factor=0.5)


def test_a_lost_keyword_of_a_child_is_seen(monkeypatch):
    def without(graph):
        node_of(graph, "scaling").kwargs = {}

    monkeypatch.setattr(codegen, "insert", in_graph(without))
    assert "gives 'blocks.0.scaling' other values" in refused(Net(Passing()).eval(), lean=False)


def test_a_fault_in_training_alone_is_seen(monkeypatch):
    def without(graph):
        for node in [node for node in graph.nodes if node.target is F.dropout]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    monkeypatch.setattr(codegen, "insert", in_graph(without))
    assert "in training: it returns other values" in refused(Net(Dropping()), lean=False)


# ------------------------------------------------------------------------------------------------------- sound forwards


@pytest.fixture
def compared(monkeypatch):
    """What the comparisons of the test came to."""
    found: list[check.Compared] = []

    def keep(*args):
        found.append(check.compare_rewritten(*args))
        return found[-1]

    monkeypatch.setattr(graft, "compare_rewritten", keep)
    return found


SOUND = {
    "blocks that differ in a number": (lambda: Net(Gained(1.0), Gained(2.0), Gained(1.0)), ()),
    # On the shortcut, what the block changes in place would be the SE's map and no more what it was given.
    "in place": (lambda: Net(Accumulating()), ("identity",)),
    "keywords": (lambda: Net(Passing()), ()),
    "defaults": (lambda: Net(Defaulted()), ()),
    "draws in training": (lambda: Net(Dropping()), ()),
    "a block that is not called self": (lambda: Net(Unnamed()), ()),
}


@pytest.mark.parametrize("case", SOUND)
@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "inner"])
def test_sound_operations_pass_and_nothing_is_drawn_or_left(compared, case, placement):
    make, refused_for = SOUND[case]
    model = make().train()
    before, python = snapshot(model), random.getstate()
    if placement in refused_for:
        assert "leaves other values in what it was given" in refused(model, placement=placement)
        return
    add_se(model, placement, example_input=SIZE)
    assert compared == [check.Compared(len(model.blocks), ())]
    assert random.getstate() == python
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert differences(before, snapshot(model)) == []


def test_comparing_draws_from_no_generator_of_the_process(monkeypatch):
    def compare(*args):
        state, python = torch.get_rng_state(), random.getstate()
        found = check.compare_rewritten(*args)
        assert torch.equal(state, torch.get_rng_state()) and random.getstate() == python
        return found

    monkeypatch.setattr(graft, "compare_rewritten", compare)
    for make in (lambda: Net(Dropping()), lambda: build("convnext_atto", drop_path_rate=0.2)):
        add_se(make().train(), example_input=SIZE)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5"])
def test_every_rewritten_block_of_a_family_is_compared(compared, name):
    library = "torchvision/" if name.startswith("shuffle") else ""
    model = add_se(build(library + name), existing="stack")
    rewritten = [path for path, module in model.named_modules() if "_se_code" in type(module).__dict__]
    assert compared == [check.Compared(len(rewritten), ())]


def test_an_se_in_a_slot_of_the_block_s_own_beside_others_is_sound(compared):
    model = build("toy/OwnSlot")
    for placement in ("inner", "standard", "post", "inner"):
        add_se(model, placement, existing="stack")
    assert [found.left for found in compared] == [()] * 4
    assert [found.ran for found in compared] == [0, 2, 2, 2]


def test_a_block_that_does_not_run_on_its_own_is_left_and_told(compared, caplog, monkeypatch):
    def refuse(self, path):
        raise RuntimeError("no answer")

    monkeypatch.setattr("se_surgery.checking.stage.Stage._recorded", refuse)
    with caplog.at_level("INFO", logger="se_surgery"):
        add_se(Net(Gained(1.0)), example_input=SIZE)
    assert compared == [check.Compared(0, (("blocks.0", "RuntimeError: no answer"),))]
    assert "'blocks.0' could not be compared with what it was" in caplog.text


class Plain(Body):
    def forward(self, x):
        return x + self.branch(x)


class ByWidth(Body):
    """Goes by the width of its convolution, which no attribute of its own says."""

    def forward(self, x):
        y = self.branch(x)
        return x + (y if self.conv.out_channels < 30 else -y)


class Widening(Net):
    """Two blocks of 24 channels, and two of 32: buffers of fewer values may be numbers to count with."""

    def __init__(self, block: type[Body]) -> None:
        wide, wider = [block(24), block(24)], [block(32), block(32)]
        super().__init__(nn.Conv2d(8, 24, 1), *wide, nn.Conv2d(24, 32, 1), *wider)


class Reshaped(Body):
    """Asks a map for its shape, of which nothing is a constant in its graph."""

    def forward(self, x):
        y = self.branch(x)
        return x + y.flatten(2).reshape(y.shape)


def restored(flat: Tensor, like: Tensor) -> Tensor:
    return flat.reshape(like.size())


class ReshapedElsewhere(Body):
    """Has it asked by a function."""

    def forward(self, x):
        y = self.branch(x)
        return x + restored(y.flatten(2), y)


class Parted(Body):
    """Has its map in parts."""

    def forward(self, x):
        first, second = self.branch(x).chunk(2, 1)
        return x + torch.cat((second, first), 1)


class Typed(Body):
    """Asks a map for what is the same at all widths."""

    def forward(self, x):
        y = self.branch(x)
        return x + (y.to(x.dtype) if y.dim() == 4 else y)


def is_wide(layer: nn.Module) -> bool:
    return layer.out_channels > 1000


class NamedElsewhere(Body):
    """Calls a method, in which a function reads a width, where it is said to."""

    asks = False

    def forward(self, x):
        return x + self.scaled(self.branch(x))

    def scaled(self, y):
        return y * 2 if self.asks and is_wide(self.conv) else y


class NamedAbove(NamedElsewhere):
    """Goes on with a method that it overrides, in which it is read, by way of a property."""

    def forward(self, x):
        return super().forward(x)

    @property
    def doubled(self):
        return self.asks and self.conv.out_channels > 1000

    def scaled(self, y):
        return y * 2 if self.doubled else y


class ByAnotherName(Body):
    """Reads an attribute by a name that is put together."""

    asks = False

    def forward(self, x):
        y = self.branch(x)
        return x + (y * 2 if self.asks and getattr(self.conv, "_".join(["out", "channels"])) > 1000 else y)


# Dropping once in each mode.
COMPARISONS = {Plain: 1, Dropping: 2, Typed: 1, **dict.fromkeys((ByWidth, Reshaped, ReshapedElsewhere), 2)}
COMPARISONS |= dict.fromkeys((Parted, NamedElsewhere, NamedAbove, ByAnotherName), 2)


@pytest.mark.parametrize(("block", "times"), COMPARISONS.items())
def test_blocks_that_differ_in_width_are_compared_once_if_their_forward_goes_by_none(block, times, monkeypatch):
    ran = []
    monkeypatch.setattr(check._Comparison, "run", counted(check._Comparison.run, ran))
    model = Widening(block).eval()
    (want,) = run(model, images(SIZE))
    add_se(model, r=2, example_input=SIZE)
    assert torch.equal(run(model, images(SIZE))[0], want)
    assert len(ran) == times


class BySize(Body):
    """Goes by the number of channels of a map."""

    def forward(self, x):
        y = self.branch(x)
        return x + (y if y.shape[1] < 30 else -y)


def test_a_width_that_a_trace_has_taken_for_granted_without_a_word_is_seen(monkeypatch):
    monkeypatch.setattr(trace, "_read", lambda watch: ())
    assert "'blocks.4' (ByWidth)" in refused(Widening(ByWidth).eval(), r=2)


def test_an_answer_that_a_trace_does_not_ask_for_again_is_seen(monkeypatch):
    monkeypatch.setattr(Tracer, "frozen", lambda self, node, function=None: self.observed(node))
    assert "'blocks.4' (BySize)" in refused(Widening(BySize).eval(), r=2)


def counted(function: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    def counting(self: Any) -> Any:
        ran.append(self.path)
        return function(self)

    return counting
