"""What a forward reads that is no tensor: of children, classes, globals, closures and other objects.

Blocks of one class for which such a value differs are traced each by itself; that one changes after surgery is an
error.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import toys
from patients import assert_differs, assert_same, copied, images, randomise, run
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import SurgeryError, TraceError, add_se, plan_se, strip_se, verify

SIZE = (3, 16, 16)
GAIN = 1.5
GAINS = {"first": 1.5, "other": [1.0, 2.0]}
SHARED = types.SimpleNamespace(gain=1.5, unread=0)
THIS = sys.modules[__name__]


def doubled(y: Tensor) -> Tensor:
    return y * 2


def halved(y: Tensor) -> Tensor:
    return y / 2


class Block(nn.Module):
    """A residual block whose branch is changed by what `through` goes by."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = toys.conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2 = toys.conv(8, 8)
        self.set(value)

    def set(self, value: Any) -> None:
        """Keep the value where this class reads it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.through(self.conv2(self.act(self.bn(self.conv(x)))))

    def through(self, y: Tensor) -> Tensor:
        return y


class Scale(nn.Module):
    base: ClassVar[float] = 1.0

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.inner = nn.Module()
        self.inner.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def factor(self) -> float:
        return self.gain * 2 + GAIN

    def method(self) -> float:
        return self.gain + 1


class OfChild(Block):
    def set(self, value):
        self.scale = Scale(value)

    def through(self, y):
        return self.scale(y) * self.scale.gain


class OfGrandchild(OfChild):
    def through(self, y):
        return y * self.scale.inner.gain


class OfProperty(OfChild):
    def through(self, y):
        return y * self.scale.factor


class OfMethod(OfChild):
    def through(self, y):
        return y * self.scale.method()


class OfLocal(OfChild):
    def through(self, y):
        inner = next(iter(self.scale.children()))
        return y * getattr(inner, "ga" + "in")


class OfList(Block):
    def set(self, value):
        self.gains = [{"gain": value}, doubled]

    def through(self, y):
        return self.gains[1](y) * self.gains[0]["gain"]


class OfDict(Block):
    def set(self, value):
        self.table = {"gain": value, "act": functools.partial(torch.mul, other=value)}

    def through(self, y):
        return self.table["act"](y) * self.table["gain"]


class OfModuleList(Block):
    def set(self, value):
        self.scales = nn.ModuleList([Scale(value), Scale(2.0)])

    def through(self, y):
        for scale in self.scales:
            y = scale(y) * scale.gain
        return y * len(self.scales)


class OfHidden(Block):
    def set(self, value):
        self.hidden = [Scale(value)]

    def through(self, y):
        return y * self.hidden[0].gain


@dataclasses.dataclass
class Config:
    gain: float
    unread: int = 0
    shift: ClassVar[float] = 0.5

    def factor(self) -> float:
        return self.gain + self.shift


class OfConfig(Block):
    def set(self, value):
        self.cfg = types.SimpleNamespace(inner=Config(value))

    def through(self, y):
        return y * self.cfg.inner.gain


class OfConfigMethod(Block):
    def set(self, value):
        self.cfg = Config(value)

    def through(self, y):
        return y * self.cfg.factor()


class OfFunction(Block):
    def set(self, value):
        self.act_fn = F.relu if value == 1.0 else F.gelu if value == 2.0 else torch.tanh

    def through(self, y):
        return self.act_fn(y)


class OfLambda(Block):
    def set(self, value):
        self.act_fn = lambda y: y * value

    def through(self, y):
        return self.act_fn(y)


class OfPartial(Block):
    def set(self, value):
        self.act_fn = functools.partial(F.leaky_relu, negative_slope=value / 10)

    def through(self, y):
        return self.act_fn(y)


class Drop(nn.Module):
    """As timm's, but that it does without random numbers."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x


class OfDropPath(Block):
    def set(self, value):
        self.drop_path = Drop(value - 1) if value > 1 else nn.Identity()

    def through(self, y):
        if hasattr(self.drop_path, "drop_prob"):
            y = y * (1 - self.drop_path.drop_prob / 10)
        return self.drop_path(y)


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class OfEnum(Block):
    def set(self, value):
        self.mode = Mode.DOUBLE if value == 2.0 else Mode.PLAIN

    def through(self, y):
        return y * 2 if self.mode is Mode.DOUBLE else y


class OfDictItself(Block):
    def set(self, value):
        self.gain = value

    def through(self, y):
        return y * self.__dict__.get("gain", 1.0) * vars(self).get("more", 1.0)


class OfKind(Block):
    def set(self, value):
        self.last = nn.ReLU() if value == 2.0 else nn.Tanh()

    def through(self, y):
        return F.relu(y) if isinstance(self.last, nn.ReLU) else self.last(y) * 2


class Pair(NamedTuple):
    gain: float
    other: int = 2


class OfNamedTuple(Block):
    def set(self, value):
        self.pair = Pair(value)

    def through(self, y):
        return y * self.pair.gain


class Times:
    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.gain


class OfCallable(Block):
    def set(self, value):
        self.times = Times(value)

    def through(self, y):
        return self.times(y)


class OfBoundMethod(Block):
    def set(self, value):
        self.times = Times(value).__call__

    def through(self, y):
        return self.times(y)


class OfLayer(Block):
    def set(self, value):
        self.leaky = nn.LeakyReLU(value / 10)

    def through(self, y):
        return self.leaky.forward(y) * self.conv.padding[0] * self.bn.eps


class OfDefault(Block):
    def set(self, value):
        if value == 2.0:
            self.extra = 3.0

    def through(self, y):
        return y * getattr(self, "extra", 1.5)


class OfTry(OfDefault):
    def through(self, y):
        try:
            return y * self.extra
        except AttributeError:
            return y


class OfInfinity(Block):
    def set(self, value):
        self.top = float("inf") if value == 1.0 else value / 10

    def through(self, y):
        return y.clamp(max=self.top)


class OfSet(Block):
    def set(self, value):
        self.flags = {"double", "plain"} if value == 2.0 else {"plain"}

    def through(self, y):
        return y * 2 if "double" in self.flags else y


class OfModuleDict(Block):
    def set(self, value):
        self.layers = nn.ModuleDict({"once": nn.Identity()})
        if value == 2.0:
            self.layers["twice"] = nn.Identity()

    def through(self, y):
        return y * 2 if "twice" in self.layers else y


class OfParameterList(Block):
    """Its parameter stands in the list more than once."""

    def set(self, value):
        self.gains = nn.ParameterList([nn.Parameter(torch.tensor(1.5))] * int(value))

    def through(self, y):
        for gain in self.gains:
            y = y * gain
        return y


class OfBox(Block):
    def set(self, value):
        self.box = [value]
        box = self.box
        self.times = lambda y: y * box[0]

    def through(self, y):
        return self.times(y)


# Class, what changes one block, and what the error names.
OWN: dict[str, tuple[type[Block], Callable[[Any], Any], str]] = {
    "child": (OfChild, lambda b: setattr(b.scale, "gain", 9.0), r"'scale.gain' of this OfChild was 1.0 .* is 9.0"),
    "grandchild": (OfGrandchild, lambda b: setattr(b.scale.inner, "gain", 9.0), r"'scale.inner.gain' .* was 1.0"),
    "property": (OfProperty, lambda b: setattr(b.scale, "gain", 9.0), r"'scale.gain' .* was 1.0"),
    "method": (OfMethod, lambda b: setattr(b.scale, "gain", 9.0), r"'scale.gain' .* was 1.0"),
    "local name": (OfLocal, lambda b: setattr(b.scale.inner, "gain", 9.0), r"'scale.inner.gain' .* was 1.0"),
    "list": (OfList, lambda b: b.gains[0].update(gain=9.0), r"gains\[0\].* was .*1.0"),
    "function in a list": (OfList, lambda b: b.gains.__setitem__(1, halved), r"gains\[1\].* was doubled .* is halved"),
    "dict": (OfDict, lambda b: b.table.update(gain=9.0), r"table\['gain'\].* was 1.0"),
    "ModuleList": (OfModuleList, lambda b: setattr(b.scales[0], "gain", 9.0), r"'scales.0.gain' .* was 1.0"),
    "length": (OfModuleList, lambda b: b.scales.append(Scale(1.0)), r"children of scales.* now is \('0', '1', '2'\)"),
    "hidden module": (OfHidden, lambda b: setattr(b.hidden[0], "gain", 9.0), r"hidden\[0\].gain.* was 1.0"),
    "config": (OfConfig, lambda b: setattr(b.cfg.inner, "gain", 9.0), r"'cfg.inner.gain' .* was 1.0"),
    "another config": (OfConfig, lambda b: b.set(9.0), r"'cfg.inner.gain' .* is 9.0"),
    "method of a config": (OfConfigMethod, lambda b: setattr(b.cfg, "gain", 9.0), r"'cfg.gain' .* was 1.0"),
    "function": (OfFunction, lambda b: b.set(2.0), r"'act_fn' of this OfFunction was relu .* now is gelu"),
    "lambda": (OfLambda, lambda b: b.set(9.0), r"'act_fn' of this OfLambda was .*lambda"),
    "partial": (OfPartial, lambda b: b.set(9.0), r"act_fn.keywords.* was .*0.1.* is .*0.9"),
    "drop path": (OfDropPath, lambda b: setattr(b.drop_path, "drop_prob", 0.1), r"'drop_path.drop_prob' .* not there"),
    "enum": (OfEnum, lambda b: b.set(2.0), r"'mode' of this OfEnum was a Mode"),
    "__dict__": (OfDictItself, lambda b: b.set(9.0), r"'gain' of this OfDictItself was 1.0"),
    "vars": (OfDictItself, lambda b: setattr(b, "more", 9.0), r"'more' .* not there .* is 9.0"),
    "helper on the instance": (OfChild, lambda b: setattr(b, "through", halved), r"'through' of this OfChild"),
    "named tuple": (OfNamedTuple, lambda b: b.set(9.0), r"'pair\[0\]' .* was 1.0"),
    "slot of a callable": (OfCallable, lambda b: setattr(b.times, "gain", 9.0), r"'times.gain' .* was 1.0"),
    "bound method": (OfBoundMethod, lambda b: b.set(9.0), r"times.__self__.gain' .* was 1.0"),
    "forward of a layer": (
        OfLayer,
        lambda b: setattr(b.leaky, "negative_slope", 0.9),
        r"'leaky.negative_slope' .*0.1",
    ),
    "number of a layer": (OfLayer, lambda b: setattr(b.bn, "eps", 0.9), r"'bn.eps' .* was 1e-05"),
    "default": (OfDefault, lambda b: b.set(2.0), r"'extra' of this OfDefault was not there .* is 3.0"),
    "try": (OfTry, lambda b: b.set(2.0), r"'extra' of this OfTry was not there .* is 3.0"),
    "infinity": (OfInfinity, lambda b: b.set(0.1), r"'top' of this OfInfinity was inf"),
    "set": (OfSet, lambda b: b.flags.add("double"), r"'flags' of this OfSet was \{'plain'\}"),
    "ModuleDict": (OfModuleDict, lambda b: b.set(2.0), r"children of layers' .* now is \('once', 'twice'\)"),
    "ParameterList": (OfParameterList, lambda b: b.set(2.0), r"'gains._size' .* was 1"),
    "class of a child": (OfKind, lambda b: setattr(b, "last", nn.ReLU()), r"'last' of this OfKind was .*Tanh"),
}


def net(cls: type[Block], *values: Any) -> nn.Module:
    """A network of blocks of one class, all weights drawn."""
    torch.manual_seed(0)
    blocks = (cls(value) for value in values or (1.0, 2.0, 3.0))
    return randomise(nn.Sequential(toys.conv(3, 8), *blocks)).eval()


@pytest.mark.parametrize("case", OWN)
def test_blocks_of_one_class_with_other_values_are_traced_each_by_itself(case):
    cls, change, message = OWN[case]
    base = net(cls)
    model = add_se(copied(base), example_input=SIZE)
    assert len(plan_se(model, existing="stack", example_input=SIZE).sites) == 3
    for training in (False, True):
        assert_same(run(copied(model), images(SIZE), training), run(copied(base), images(SIZE), training))
    change(model[1])
    with pytest.raises(SurgeryError, match=message):
        model(images(SIZE))
    before = run(base, images(SIZE))
    change(base[1])
    assert_differs(run(base, images(SIZE)), before)
    assert_same(run(add_se(copied(base), example_input=SIZE), images(SIZE)), run(base, images(SIZE)))


def test_a_list_that_a_function_closes_over_is_guarded():
    model = add_se(net(OfBox), example_input=SIZE)
    assert_same(run(model, images(SIZE)), run(net(OfBox), images(SIZE)))
    model[1].box[0] = 9.0
    with pytest.raises(SurgeryError, match=r"times.__closure__.* was \[1.0\]"):
        model(images(SIZE))


def decorated(gain: float) -> Callable[[Any], Any]:
    def around(method: Any) -> Any:
        @functools.wraps(method)
        def inner(self: Block, y: Tensor) -> Tensor:
            return method(self, y) * gain

        return inner

    return around


class OfDecorator(Block):
    @decorated(1.5)
    def through(self, y):
        return y


class OfSuper(OfChild):
    def through(self, y):
        return super().through(y) * self.conv.stride[0]


@pytest.mark.parametrize("cls", [OfDecorator, OfSuper])
def test_methods_around_methods(cls):
    base = net(cls)
    model = add_se(copied(base), example_input=SIZE)
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))


def test_equal_blocks_share_their_code():
    model = add_se(net(OfChild, 1.0, 1.0, 2.0), example_input=SIZE)
    assert type(model[1]) is type(model[2]) is not type(model[3])


def test_the_guard_reads_like_what_it_guards():
    source = inspect.getsource(type(add_se(net(OfChild), example_input=SIZE)[1]).forward)
    assert "if self.scale.gain != 1.0: _changed(self, {'scale.gain': 1.0})" in source


def test_what_is_not_read_may_change():
    model = add_se(net(OfConfig), example_input=SIZE)
    before = run(model, images(SIZE))
    model[1].cfg.inner.unread = model[1].scale = 3
    assert_same(run(model, images(SIZE)), before)


# ------------------------------------------------------------------------------- what all blocks of a class have alike


class OfClass(Block):
    expansion: ClassVar[float] = 1.5

    def through(self, y):
        return y * self.expansion


class OfType(OfClass):
    expansion: ClassVar[float] = 1.5

    def through(self, y):
        return y * type(self).expansion


class OfNamedClass(Block):
    def through(self, y):
        return y * OfClass.expansion


class OfGlobal(Block):
    def through(self, y):
        return y * GAIN


class OfGlobalTable(Block):
    def through(self, y):
        return y * GAINS["first"] * GAINS["other"][1]


class OfGlobalConfig(Block):
    def through(self, y):
        return y * SHARED.gain


class OfHelper(Block):
    def through(self, y):
        return helped(y)


def helped(y: Tensor) -> Tensor:
    return sum([y * factor for factor in (GAIN, 1.0)])


class OfSettings(Block):
    def through(self, y):
        return y * settings.inner.GAIN


settings = types.ModuleType("settings_of_test_constants")
settings.inner = types.ModuleType("settings_of_test_constants.inner")
settings.inner.GAIN = 1.5
sys.modules |= {module.__name__: module for module in (settings, settings.inner)}


class OfSharedConfig(Block):
    def set(self, value):
        self.cfg = SHARED

    def through(self, y):
        return y * self.cfg.gain


ALIKE: dict[str, tuple[type[Block], Any, str, Any, str]] = {
    "class": (OfClass, OfClass, "expansion", 9.0, r"'expansion' of this OfClass was 1.5 .* is 9.0"),
    "type(self)": (OfType, OfType, "expansion", 9.0, r"'expansion' of this OfType was 1.5"),
    "class by its name": (OfNamedClass, OfClass, "expansion", 9.0, r"OfClass.expansion.* was 1.5"),
    "global": (OfGlobal, THIS, "GAIN", 9.0, r"test_constants.GAIN' of this OfGlobal was 1.5 .* is 9.0"),
    "table": (OfGlobalTable, THIS, "GAINS", {"first": 9.0, "other": [1.0, 2.0]}, r"test_constants.GAINS"),
    "global config": (OfGlobalConfig, SHARED, "gain", 9.0, r"SHARED.gain.* was 1.5"),
    "global of a helper": (OfHelper, THIS, "GAIN", 9.0, r"test_constants.GAIN"),
    "helper": (OfHelper, THIS, "helped", halved, r"test_constants.helped.* was helped .* is halved"),
    "settings": (OfSettings, settings.inner, "GAIN", 9.0, r"inner.GAIN"),
    "shared config": (OfSharedConfig, SHARED, "gain", 9.0, r"'cfg.gain' of this OfSharedConfig was 1.5"),
}


@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("kind", ["itself", "copy", "pickle"])
def test_what_is_alike_for_all_blocks_is_guarded(case, kind, monkeypatch):
    cls, holder, name, value, message = ALIKE[case]
    base = net(cls)
    model = add_se(net(cls), example_input=SIZE)
    model = {"itself": lambda m: m, "copy": copied, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[kind](model)
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))
    is_copied = holder is SHARED and case == "shared config" and kind != "itself"
    monkeypatch.setattr(model[1].cfg if is_copied else holder, name, value)
    with pytest.raises(SurgeryError, match=message):
        model(images(SIZE))


def closed(gain: float) -> type[Block]:
    def more(y: Tensor) -> Tensor:
        return y * gain

    def put(value: float) -> None:
        nonlocal gain
        gain = value

    class OfClosure(Block):
        change = staticmethod(put)

        def through(self, y):
            return more(y) * gain

    return OfClosure


def test_closures_are_guarded():
    base = net(closed(1.5))
    model = add_se(copied(base), example_input=SIZE)
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))
    model[1].change(9.0)
    with pytest.raises(SurgeryError, match=r"was 1.5 .* is 9.0"):
        model(images(SIZE))


# ------------------------------------------------------------------------------------------------- tensors, and modes


class OfNumber(Block):
    def set(self, value):
        self.gain = torch.tensor(value)

    def through(self, y):
        return y * float(self.gain)


class OfBuffer(Block):
    def set(self, value):
        self.register_buffer("gain", torch.tensor(value))

    def through(self, y):
        return y * self.gain.item()


class OfBufferAsNumber(OfBuffer):
    def through(self, y):
        return y * float(next(self.buffers(recurse=False)))


class OfDtype(Block):
    def through(self, y):
        return y.to(next(self.parameters()).dtype)


@pytest.mark.parametrize("cls", [OfNumber, OfBufferAsNumber])
def test_a_tensor_read_as_a_number_is_refused(cls):
    plan = plan_se(net(cls), example_input=SIZE)
    assert not plan.sites
    assert any("reads a tensor's values as numbers" in reject.reason for reject in plan.exam.units.rejected)


def test_a_buffer_is_read_when_the_forward_runs():
    base = net(OfBuffer)
    model = add_se(copied(base), example_input=SIZE)
    for one in (model, base):
        one[1].gain.fill_(9.0)
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))


def test_a_dtype_is_read_when_the_forward_runs():
    base = net(OfDtype)
    model = add_se(copied(base), example_input=SIZE)
    assert_same(run(model.double(), images(SIZE).double()), run(base.double(), images(SIZE).double()))


class OfChildsMode(Block):
    def set(self, value):
        self.drop = nn.Dropout(0.5)

    def through(self, y):
        return y * 2 if self.drop.training else y


def test_the_mode_of_a_child_is_the_one_of_its_block_or_refused():
    base = net(OfChildsMode)
    model = add_se(copied(base), example_input=SIZE)
    for training in (False, True):
        assert_same(run(copied(model), images(SIZE), training), run(copied(base), images(SIZE), training))
    model[1].drop.train()
    with pytest.raises(SurgeryError, match=r"'drop.training' of this OfChildsMode"):
        model(images(SIZE))


class OfWhatIsMissing(Block):
    """Asks for what it lacks, and has a child that is a plain nn.Module."""

    def set(self, value):
        self.box = nn.Module()
        self.box.scale = Scale(value)

    def through(self, y):
        return y * (3.0 if hasattr(self, "deployed") else self.box.scale.gain)


class Twice(nn.ReLU):
    """Is called in a way of its own."""

    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) * 2


class OfTwice(Block):
    def set(self, value):
        self.twice = Twice()

    def through(self, y):
        return self.twice(y)


@pytest.mark.parametrize("cls", [OfWhatIsMissing, OfTwice])
def test_what_modules_are_called_and_asked_by_is_as_before(cls):
    base, methods = net(cls), (nn.Module._call_impl, nn.Module.__getattr__, Twice._call_impl)
    model = add_se(copied(base), example_input=SIZE)
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))
    assert (nn.Module._call_impl, nn.Module.__getattr__, Twice._call_impl) == methods
    model[1].deployed = True
    if cls is OfWhatIsMissing:
        with pytest.raises(SurgeryError, match="deployed"):
            model(images(SIZE))


# -------------------------------------------------------------------------------------------- copies, and compilers


@pytest.mark.parametrize("cls", [OfFunction, OfPartial, OfConfig, OfList, OfEnum])
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_objects_are_compared_in_copies_too(cls, copying):
    base = net(cls)
    model = copying(add_se(copied(base), example_input=SIZE))
    assert_same(run(model, images(SIZE)), run(base, images(SIZE)))
    model[1].set(2.0)
    with pytest.raises(SurgeryError, match="when it was operated on"):
        model(images(SIZE))


def test_nothing_is_left_behind_by_undoing():
    model = net(OfConfig)
    before = {name: set(vars(module)) for name, module in model.named_children()}
    strip_se(add_se(model, example_input=SIZE), example_input=SIZE)
    assert {name: set(vars(module)) for name, module in model.named_children()} == before


COMPILED = [OfChild, OfConfig, OfFunction, OfPartial, OfModuleList, OfGlobal, OfGlobalTable, OfDictItself, closed(1.5)]


@pytest.mark.parametrize("cls", COMPILED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("compiler", ["compile", "export"])
def test_compilers_take_guarded_forwards(cls, compiler):
    base, x = net(cls), images(SIZE)
    model = add_se(copied(base), example_input=SIZE)
    if compiler == "compile":
        torch._dynamo.reset()
        made = torch.compile(model, backend="eager", fullgraph=True)
    else:
        made = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(made(x), base(x))


def test_a_compiled_model_refuses_a_change():
    torch._dynamo.reset()
    model = add_se(net(OfChild), example_input=SIZE)
    made = torch.compile(model, backend="eager")
    made(images(SIZE))
    model[1].scale.gain = 9.0
    with pytest.raises(Exception, match=r"scale.gain"):
        made(images(SIZE))


def test_verify_passes():
    report = verify(add_se(net(OfChild), example_input=SIZE), example_input=SIZE, thorough=False)
    assert all(check.passed is not False for check in report.checks)


def test_what_cannot_be_found_again_is_refused(monkeypatch):
    table = {"act": lambda y: y * 2}
    monkeypatch.setattr(THIS, "GAINS", table)

    class OfTable(Block):
        def through(self, y):
            return GAINS["act"](y)

    with pytest.raises((TraceError, SurgeryError), match="cannot be found again by import"):
        add_se(net(OfTable), example_input=SIZE)
