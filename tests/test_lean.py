"""The lean form of the SE: the plain form's outputs bit for bit, its gradients, less kept for the backward pass."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from patients import build, copied, images, randomise
from timm.layers import BatchNormAct2d, ConvNormAct, GroupNormAct
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from se_surgery import OptionError, SqueezeExcite, add_se, recipe_of
from se_surgery.measuring.bench import saved_bytes
from se_surgery.se import lean, tail
from se_surgery.se.excite import SESpec

WIDTH = 6
SIZE = (3, WIDTH, 5, 4)


def an_se(width: int = WIDTH, **spec: Any) -> SqueezeExcite:
    spec = {"gate_scale": 2.0, "bias": (True, True), "act": "silu", **spec}
    return SqueezeExcite(SESpec(width, 3, **spec), init="paper", dtype=torch.float64)


def a_norm(kind: Callable[..., nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Module:
    return randomise(kind(WIDTH, **options).double())


def a_conv() -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 1).double()


def maps(seed: int = 0, size: tuple[int, ...] = SIZE) -> Tensor:
    # A mean away from zero: what is computed from sums of c must not lose digits to it.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64) * 0.7 + 2.0


def in_plain_form(module: nn.Module) -> nn.Module:
    plain = copy.deepcopy(module)
    for se in plain.modules():
        if isinstance(se, SqueezeExcite):
            se.lean = False
    return plain


def differentiated(
    call: Callable[[Tensor], Tensor], modules: list[nn.Module], c: Tensor, kept: list[str]
) -> list[Tensor | None]:
    """The output of a call, which keeps what it should, and the gradients of a fixed combination of it."""
    c = c.clone(memory_format=torch.preserve_format).requires_grad_()
    out = call(c)
    assert kept_by(out) == kept
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    (out * weights).sum().backward()
    return [out.detach(), c.grad, *(p.grad for p in parameters)]


def assert_equal_but_for_rounding(lean_form: list[Tensor | None], plain_form: list[Tensor | None]) -> None:
    """Outputs bit for bit, gradients to 1e-10 of their size, in float64."""
    assert torch.equal(lean_form[0], plain_form[0])
    for mine, other in zip(lean_form[1:], plain_form[1:], strict=True):
        assert other.abs().max() > 1e-6
        assert (mine - other).abs().max() <= 1e-10 * other.abs().max()


def kept_by(out: Tensor) -> list[str]:
    """What the lean products that an output was made by keep: `c`, a normalisation's input, or `y`, the map itself."""
    nodes, seen, found = [out.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "_ScaleBackward":
            found.append("y" if node.rebuild is lean._itself else "c")
        nodes += [following for following, _ in node.next_functions]
    return sorted(found)


# ----------------------------------------------------------------------------------------------------- values of a tail

NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": a_norm,
    "BatchNorm that tracks nothing": lambda: a_norm(track_running_stats=False),
    "timm's BatchNorm, its activation left out": lambda: a_norm(BatchNormAct2d, apply_act=False),
    **{
        f"timm's BatchNorm with {act.__name__}": lambda act=act: a_norm(BatchNormAct2d, act_layer=act)
        for act in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
    },
    "BatchNorm and activations": lambda: nn.Sequential(a_norm(), nn.Identity(), nn.SiLU(), nn.ReLU(inplace=True)),
    "GroupNorm": lambda: a_norm(lambda width: nn.GroupNorm(2, width)),
    "timm's GroupNorm with activation": lambda: a_norm(GroupNormAct, num_groups=3),
    "at the end of a Sequential": lambda: nn.Sequential(a_conv(), nn.Sequential(nn.ReLU(), a_norm())),
    "at the end of timm's ConvNormAct": lambda: randomise(ConvNormAct(WIDTH, WIDTH, 3, apply_act=False).double()),
    "with an activation, at the end of it": lambda: randomise(ConvNormAct(WIDTH, WIDTH, 3).double()),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("maker", NORMS.values(), ids=NORMS)
def test_a_tail_has_the_plain_forms_outputs_gradients_and_statistics(maker, training, memory_format):
    model = nn.ModuleList([maker(), an_se()]).train(training)
    plain, c = in_plain_form(model), maps().to(memory_format=memory_format)
    mine = differentiated(lambda c: tail.tail(model[1], (model[0],), c), [model], c, ["c"])
    other = differentiated(lambda c: tail.tail(plain[1], (plain[0],), c), [plain], c, [])
    assert_equal_but_for_rounding(mine, other)
    assert list(map(str, model.buffers())) == list(map(str, plain.buffers()))
    assert mine[0].is_contiguous(memory_format=memory_format) and mine[1].is_contiguous(memory_format=memory_format)


NO_GRADIENTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("context", NO_GRADIENTS.values(), ids=NO_GRADIENTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("maker", NORMS.values(), ids=NORMS)
def test_a_tail_has_the_plain_forms_outputs_where_there_are_no_gradients(maker, training, context):
    model = nn.ModuleList([maker(), an_se()]).train(training)
    plain, c = in_plain_form(model), maps()
    with context():
        mine, other = tail.tail(model[1], (model[0],), c), tail.tail(plain[1], (plain[0],), c)
    assert torch.equal(mine, other) and torch.equal(c, maps())
    assert list(map(str, model.buffers())) == list(map(str, plain.buffers()))


class Shown(nn.Sigmoid):
    """A gate that shows the map that it is a gate of, whatever made that."""

    def forward(self, x: Tensor) -> Tensor:
        frame = inspect.currentframe()
        while frame.f_code is not lean.gated.__code__:
            frame = frame.f_back
        self.place = frame.f_locals["y"].data_ptr()
        return super().forward(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("maker", ["BatchNorm", "BatchNorm and activations", "GroupNorm"])
def test_the_product_is_taken_in_place_where_nobody_else_has_the_map(maker, grad):
    norm, se = NORMS[maker](), an_se()
    se.gate, x = Shown(), maps()
    with torch.set_grad_enabled(grad):
        assert tail.tail(se, (norm,), x).data_ptr() == se.gate.place
        assert se(x).data_ptr() != se.gate.place == x.data_ptr()
    assert torch.equal(x, maps())


class Residual(SqueezeExcite):
    """It takes its map again after the product."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("grad", [True, False])
def test_a_map_that_somebody_else_can_have_is_left_as_it_is(grad):
    seen: list[list[Tensor]] = []
    for form in (lean_form := Tail(), in_plain_form(lean_form)):
        found: list[Tensor] = []
        with torch.set_grad_enabled(grad):
            form.se.__class__ = Residual
            found.append(form(maps()))
            form.se.__class__ = SqueezeExcite
            handle = form.se.register_forward_hook(lambda se, args, out, found=found: found.extend((*args, out)))
            form(maps())
            handle.remove()
            handle = form.norm.register_forward_hook(lambda norm, args, out, found=found: found.append(out))
            form(maps())
            handle.remove()
        seen.append(found)
    assert len(seen[0]) == 4
    assert all(torch.equal(mine, other) for mine, other in zip(*seen, strict=True))


SPECS: dict[str, dict[str, Any]] = {
    "without biases": {"bias": (False, False)},
    "plain gate": {"gate_scale": 1.0},
    "hard sigmoid": {"gate": "hard_sigmoid"},
    "tanh": {"gate": "tanh", "gate_scale": 1.0},
    "relu": {"gate": "relu", "gate_scale": 1.0},
    "another activation": {"act": "gelu"},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_excitation(spec):
    model = nn.ModuleList([a_norm(), an_se(**spec)])
    plain = in_plain_form(model)
    mine = differentiated(lambda c: tail.tail(model[1], (model[0],), c), [model], maps(), ["c"])
    assert_equal_but_for_rounding(mine, differentiated(lambda c: plain[1](plain[0](c)), [plain], maps(), []))


LAYOUTS = {"channels last": ({"channels_last": True}, (3, 5, 4, WIDTH)), "volumes": ({"dims": 3}, (2, WIDTH, 3, 4, 2))}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_maps_that_no_normalisation_made(layout):
    spec, size = layout
    se, shift = an_se(**spec), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    plain = in_plain_form(se)
    mine = differentiated(lambda x: se(x + shift), [se], maps(size=size), ["y"])
    other = differentiated(lambda x: plain(x + shift), [plain], maps(size=size), [])
    assert_equal_but_for_rounding(mine, other)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_are_the_slopes_of_the_outputs(training):
    """Against finite differences, and not against another form of the same."""
    norm, se = a_norm(momentum=0.0).train(training), an_se()
    c = maps().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, *_: tail.tail(se, (norm,), c), (c, *norm.parameters(), *se.parameters()))


def test_by_hand():
    """One map of two positions, y = (1, 3), its gate the mean: out = (2, 6), and out[0] = y[0] * (y[0] + y[1]) / 2."""
    se = an_se(1, act="relu", gate="relu", gate_scale=1.0, bias=(False, False))
    with torch.no_grad():
        se.fc1.weight.fill_(1.0)
        se.fc2.weight.fill_(1 / 3)  # three hidden units
    y = torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(1, 1, 1, 2).requires_grad_()
    out = se(y * 1)
    out[..., 0].sum().backward()
    torch.testing.assert_close(out.detach().flatten().tolist(), [2.0, 6.0])
    torch.testing.assert_close(y.grad.flatten().tolist(), [2.5, 0.5])


FROZEN = {
    "the SE": ("1.",),
    "the normalisation": ("0.",),
    "the normalisation's bias": ("0.bias",),
    "all but the last layer's bias": ("0.", "1.fc1", "1.fc2.weight"),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("input_learns", [True, False], ids=["", "constant input"])
def test_frozen_parts(frozen, input_learns):
    model = nn.ModuleList([a_norm(), an_se()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    plain, gradients = in_plain_form(model), []
    for form in (model, plain):
        c = maps().requires_grad_(input_learns)
        tail.tail(form[1], (form[0],), c).pow(3).sum().backward()
        gradients.append([tensor.grad for tensor in (c, *form.parameters())])
    for mine, other in zip(*gradients, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or (mine - other).abs().max() <= 1e-10 * other.abs().max()


def test_an_empty_batch():
    out = an_se()(torch.empty(0, *SIZE[1:], dtype=torch.float64, requires_grad=True) * 1)
    out.sum().backward()
    assert out.shape == (0, *SIZE[1:])


# --------------------------------------------------------------------------------------------------------- when it runs


class Subclass(Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def switched_off(se: SqueezeExcite) -> None:
    se.lean = False


def each(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.vmap(lambda row: function(row[None])[0])(x)


def tangent(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            out, along = forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x))))
            assert along is not None and along.abs().max() > 0
            return out

    return run


def under(context: Callable[[], Any]) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    def around(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with context():
                return function(x)

        return run

    return around


# By clause: the SE's options, what is done to it, and how it is called, so that this clause alone does not hold.
Around = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]
BREAKS: dict[str, tuple[dict[str, Any], Callable[[Any], Any] | None, Around | None]] = {
    "the lean form is wanted": ({}, switched_off, None),
    "the map is a plain tensor": ({}, None, lambda f: lambda x: f(x.as_subclass(Subclass)).as_subclass(Tensor)),
    "the squeeze is the mean": ({"squeeze": "max"}, None, None),
    "nothing is mixed in": ({"mix": True}, lambda se: se.mix.data.fill_(0.5), None),
    "nothing traces": ({}, None, lambda f: lambda x: torch.jit.trace(f, x, check_trace=False)(x)),
    "nothing transforms": ({}, None, each),
    "no gradient in forward mode": ({}, None, tangent),
    "no function mode": ({}, None, under(Mode)),
    "no dispatch mode": ({}, None, under(lambda: FlopCounterMode(display=False))),
}


class Recorded(dict[str, Callable[..., bool]]):
    """Clauses that note which of them is the first that does not hold."""

    def __init__(self, clauses: dict[str, Callable[..., bool]]) -> None:
        super().__init__(clauses)
        self.broken: set[str] = set()

    def values(self) -> Any:
        return [self.hold]

    def hold(self, module: Any, x: Tensor) -> bool:
        broken = next((name for name, holds in self.items() if not holds(module, x)), None)
        self.broken |= {broken} - {None}
        return broken is None


@pytest.fixture
def recorded(monkeypatch):
    tables = [(lean, "CLAUSES"), (tail, "OPEN_CLAUSES"), (tail, "KEPT_CLAUSES")]
    for module, name in tables:
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    return lambda: set().union(*(getattr(module, name).broken for module, name in tables))


def test_every_clause_has_its_tests():
    assert {*BREAKS, "the map is real"} == set(lean.CLAUSES)
    assert {*(clause for clause, _ in NORM_BREAKS.values()), *OTHER_BREAKS} == {*tail.OPEN_CLAUSES, *tail.KEPT_CLAUSES}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("clause", BREAKS)
def test_a_clause_of_the_se_that_does_not_hold_brings_the_plain_form(clause, recorded):
    options, spoil, around = BREAKS[clause]
    se = an_se(**options)
    if spoil is not None:
        spoil(se)
    plain, x = in_plain_form(an_se(**options)), maps().requires_grad_()
    plain.load_state_dict(se.state_dict())
    call, other = (form if around is None else around(form) for form in (se, plain))
    out = call(x)
    assert recorded() == {clause} and kept_by(out) == []
    expected = other(x)
    assert torch.equal(out, expected) and out.requires_grad == expected.requires_grad
    if out.requires_grad:
        torch.testing.assert_close(slope(out, x), slope(expected, x), rtol=1e-12, atol=1e-12)


def slope(out: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    out.sum().backward()
    return x.grad


def hooked(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = a_norm()
        getattr(norm, register)(lambda *_: None)
        return norm

    return make


def with_own_forward() -> nn.Module:
    norm = a_norm()
    norm.forward = types.MethodType(lambda self, c: nn.BatchNorm2d.forward(self, c) * 2, norm)
    return norm


def with_bare_weight() -> nn.Module:
    norm = a_norm()
    weight = norm._parameters.pop("weight")
    norm.weight = weight.detach()
    return norm


class Doubling(nn.BatchNorm2d):
    def forward(self, c: Tensor) -> Tensor:
        return super().forward(c) * 2


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized() -> nn.Module:
    norm = a_norm()
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


DOUBLE = torch.float64
NORM_BREAKS: dict[str, tuple[str, tuple[Callable[[], nn.Module], torch.dtype, bool]]] = {
    "a subclass": ("its class is known", (lambda: a_norm(Doubling), DOUBLE, True)),
    "a parametrization": ("its class is known", (parametrized, DOUBLE, True)),
    "another kind": ("its class is known", (lambda: a_norm(nn.InstanceNorm2d, affine=True), DOUBLE, True)),
    "synchronised": ("its class is known", (lambda: a_norm(nn.SyncBatchNorm).eval(), DOUBLE, True)),
    "another activation": (
        "no activation in it that is not known",
        (lambda: a_norm(BatchNormAct2d, act_layer=nn.PReLU), DOUBLE, True),
    ),
    "a dropout": (
        "no dropout in it",
        (lambda: a_norm(BatchNormAct2d, apply_act=False, drop_layer=lambda: nn.Dropout(0.0)), DOUBLE, True),
    ),
    "not affine": ("plain affine parameters", (lambda: a_norm(affine=False), DOUBLE, True)),
    "sharded or replicated": ("plain affine parameters", (with_bare_weight, DOUBLE, True)),
    "half precision": ("parameters in full precision", (lambda: a_norm().bfloat16(), torch.bfloat16, True)),
    "no eps": ("something is added to the variance", (lambda: a_norm(eps=0.0).eval(), DOUBLE, True)),
    "a cumulative average": ("a momentum", (lambda: a_norm(momentum=None), DOUBLE, True)),
    "a hook": ("nothing hangs on it", (hooked("register_forward_hook"), DOUBLE, True)),
    "a hook before it": ("nothing hangs on it", (hooked("register_forward_pre_hook"), DOUBLE, True)),
    "a backward hook": ("nothing hangs on it", (hooked("register_full_backward_hook"), DOUBLE, True)),
    "a forward of its own": ("nothing hangs on it", (with_own_forward, DOUBLE, True)),
    "frozen, and a constant input": ("the input is needed", (lambda: a_norm().requires_grad_(False), DOUBLE, False)),
    "mixed dtypes": ("dtypes agree", (lambda: NORMS["GroupNorm"]().float(), torch.bfloat16, True)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("case", NORM_BREAKS.values(), ids=NORM_BREAKS)
def test_a_clause_of_the_normalisation_that_does_not_hold_leaves_it_to_itself(case, recorded):
    clause, (make, dtype, learns) = case
    norm, se = make(), an_se().to(dtype)
    other = copied(norm)
    c = maps().to(dtype).requires_grad_(learns)
    out = tail.tail(se, (norm,), c)
    assert recorded() == {clause} and kept_by(out) == ["y"]
    assert torch.equal(out, in_plain_form(se)(other(c)))
    assert list(map(str, norm.buffers())) == list(map(str, other.buffers()))


# With tests of their own, below.
OTHER_BREAKS = (
    "the input is a batch of maps",
    "its input is a plain tensor",
    "plain statistics",
    "its tensors lie dense",
)
NO_MAPS = {
    "one value a channel": ((1, WIDTH, 1, 1), "Expected more than 1 value"),
    "no map": (SIZE[:3], "expected 4D input"),
}


@pytest.mark.parametrize(("size", "error"), NO_MAPS.values(), ids=NO_MAPS)
def test_an_input_that_is_no_batch_of_maps_is_the_normalisations_own_business(size, error, recorded):
    with pytest.raises(ValueError, match=error):
        tail.tail(an_se(), (a_norm(),), maps(size=size).requires_grad_())
    assert recorded() == {"the input is a batch of maps"}


class AsSubclass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_subclass(Subclass)


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_of_a_class_of_its_own_is_left_to_it(grad, recorded):
    norm, se, x = a_norm(), an_se(), maps().requires_grad_(grad)
    other = copied(norm)
    with torch.set_grad_enabled(grad):
        out = tail.tail(se, (AsSubclass(), norm), x)
    assert recorded() == {"its input is a plain tensor", "the map is a plain tensor"}
    assert type(out) is Subclass and torch.equal(out, in_plain_form(se)(other(x.as_subclass(Subclass))))


def test_statistics_of_a_class_of_their_own_are_left_to_it(recorded):
    norm, se = a_norm().eval(), an_se()
    norm.running_mean = norm.running_mean.as_subclass(Subclass)
    out = tail.tail(se, (norm,), x := maps().requires_grad_())
    assert recorded() == {"plain statistics", "the map is a plain tensor"}
    assert type(out) is Subclass and torch.equal(out, in_plain_form(se)(norm(x)))


def test_parameters_that_are_a_part_of_others(recorded):
    norm, se, c = a_norm(), an_se(), maps().requires_grad_()
    norm.weight = nn.Parameter(torch.arange(1.0, 2 * WIDTH + 1).double()[::2])
    out = tail.tail(se, (norm,), c)
    assert recorded() == {"its tensors lie dense"} and kept_by(out) == ["y"]
    assert torch.equal(out, in_plain_form(se)(norm(c)))


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_complex_maps_have_the_plain_forms_gradients(recorded):
    """There the gradient is the product with the conjugate."""
    se = an_se(act="tanh", gate="tanh", gate_scale=1.0).to(torch.complex128)
    gradients = []
    for form in (se, in_plain_form(se)):
        x = torch.complex(maps(), maps(1)).requires_grad_()
        form(x).abs().sum().backward()
        gradients.append(x.grad)
    assert recorded() == {"the map is real", "the lean form is wanted"}
    assert torch.equal(*gradients) and gradients[0].imag.any()


def test_a_hook_for_all_modules_counts(recorded):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        tail.tail(an_se(), (a_norm(),), maps().requires_grad_())
    finally:
        handle.remove()
    assert recorded() == set()  # one hangs on the SE as well, and it is called as any module


def test_a_default_device_is_no_reason_against_it():
    torch.set_default_device("cpu")
    try:
        assert kept_by(tail.tail(an_se(), (a_norm(),), maps().requires_grad_())) == ["c"]
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_a_chain_run(register):
    chain, ran = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)).double(), []
    getattr(chain, register)(lambda *_: ran.append(1))
    assert kept_by(tail.tail(an_se(), (chain,), maps())) == ["y"]
    assert ran == [1]


class Changed(nn.Module):
    """A sigmoid whose output is not what an SE's gate puts out."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, gate: Tensor) -> Tensor:
        return self.change(gate.sigmoid())


@pytest.mark.parametrize("change", [lambda g: g[:1], lambda g: g.expand(*SIZE) * 1], ids=["one for all", "a map"])
def test_a_gate_of_another_shape(change):
    model = nn.ModuleList([a_norm(), an_se()])
    model[1].gate = Changed(change)
    plain = in_plain_form(model)
    mine = differentiated(lambda c: tail.tail(model[1], (model[0],), c), [model], maps(), [])
    assert_equal_but_for_rounding(mine, differentiated(lambda c: plain[1](plain[0](c)), [plain], maps(), []))


def test_a_gate_in_a_wider_dtype():
    se = an_se().float()
    se.gate = Changed(lambda gate: gate.double())
    x = maps().float().requires_grad_()
    out = se(x)
    assert out.dtype == torch.float64
    assert torch.equal(out, in_plain_form(se)(x))
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.any()


# ------------------------------------------------------------------------------------------- the map that is made again

LAYOUTS_OF_C: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-last": lambda c: c.contiguous(memory_format=torch.channels_last),
    "a part of a wider map": lambda c: torch.cat([c, c], 3)[..., : c.shape[3]],
    "transposed": lambda c: c.mT.contiguous().mT,
    "one map for all": lambda c: c[:1].expand_as(c),
}
# A constant channel and a bias of zero: what an activation sees is zero but for rounding.
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def with_jumps(norm: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A normalisation and its input, of which every other channel is constant."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for module in norm.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.zeros_(module.bias)
            # One whose rstd of a constant channel is not that of a variance taken back from it.
            module.eps = 1e-3
    c = maps(size=(4, WIDTH, 5, 7))
    c[:, ::2] = torch.tensor([0.7, 1.3, 2.9]).double().reshape(1, 3, 1, 1)
    return norm.to(wide), c.to(dtype)


def runs(kinds: dict[str, Callable[[], nn.Module]], *without: str) -> dict[str, Callable[[], nn.Module]]:
    return {name: kind for name, kind in kinds.items() if name not in without}


@pytest.mark.parametrize("exactly", [True, False], ids=["", "as on other devices"])
@pytest.mark.parametrize("layout", LAYOUTS_OF_C.values(), ids=LAYOUTS_OF_C)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("maker", ["BatchNorm", "timm's BatchNorm with ReLU", "timm's BatchNorm with Hardswish"])
def test_the_map_is_made_again_bit_for_bit(maker, dtype, layout, exactly, monkeypatch):
    for training in (True, False):
        norm, c = with_jumps(NORMS[maker]().train(training), dtype)
        c, se = layout(c).requires_grad_(), an_se().to(dtype)
        if not exactly:
            monkeypatch.setattr(tail, "_scales_exactly", lambda c: False)
        node = tail.tail(se, (norm,), c).grad_fn
        _, *kept = node.saved_tensors
        with torch.no_grad():
            y = norm(c)
        assert torch.equal(node.rebuild(*kept), y)
        anew = [tensor.clone(memory_format=torch.contiguous_format) for tensor in kept]
        assert torch.equal(node.rebuild(*anew), y)


def test_without_it_the_masks_differ_by_rounding_and_nothing_else():
    """What the two tests around this one are about: the variance taken back from the rstd gives another ReLU's mask."""
    norm, c = with_jumps(a_norm(), torch.float32)
    differ = []
    for seed in range(50):
        randomise(norm, seed)
        nn.init.zeros_(norm.bias)
        y, mean, rstd, *_ = torch._batch_norm_impl_index(
            c, norm.weight, norm.bias, None, None, True, 0.0, norm.eps, True
        )
        other = torch.batch_norm(c, norm.weight, norm.bias, mean, rstd**-2, False, 0.0, 0.0, True)
        mine = tail._scaled(c, mean, rstd * norm.weight, norm.bias)
        assert torch.equal(mine, y)
        differ.append(y[(y > 0) != (other > 0)])
    at_jump = torch.cat(differ)
    # Of maps of size three, scaled by thirty.
    assert at_jump.numel() > 100 and at_jump.abs().max() < 100 * torch.finfo(torch.float32).eps


PACKS: dict[str, Callable[[], Any]] = {
    "no hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "hooks that clone": lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone),
    "offloaded": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("context", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_C.values(), ids=LAYOUTS_OF_C)
@pytest.mark.parametrize("maker", ["timm's BatchNorm with ReLU", "BatchNorm and activations"])
def test_an_activation_at_its_jump_has_the_plain_forms_gradient(maker, layout, context):
    """The ReLU's slope is zero or one where its input is zero but for rounding: one bit there is a whole gradient."""
    norm, c = with_jumps(NORMS[maker](), torch.float32)
    model = nn.ModuleList([norm, an_se().float()])
    gradients = []
    for form in (model, in_plain_form(model)):
        x = layout(c).requires_grad_()
        with context():
            out = tail.tail(form[1], (form[0],), x)
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in form.parameters())])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


# --------------------------------------------------------------------------- what changes between forward and backward


def added(path: str, unseen: bool = False) -> Callable[[nn.ModuleList], None]:
    @torch.no_grad()
    def change(model: nn.ModuleList) -> None:
        owner, _, name = path.rpartition(".")
        tensor = getattr(model.get_submodule(owner), name)
        (tensor.data if unseen else tensor).add_(0.5)

    return change


def trained(model: nn.ModuleList) -> None:
    model[0].train()(maps(5) * 3)


def stepped(model: nn.ModuleList) -> None:
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.grad = torch.ones_like(bias)
    torch.optim.SGD(biases, lr=0.1).step()
    for bias in biases:
        bias.grad = None


# By what is done, whether the plain form raises in training and in evaluation, where it keeps what has changed.
CHANGES: dict[str, tuple[Callable[[nn.ModuleList], None], bool, bool]] = {
    "the norm's bias": (added("0.bias"), False, False),
    "the norm's bias, unseen": (added("0.bias", unseen=True), False, False),
    "the norm's weight": (added("0.weight"), True, True),
    "its running mean": (added("0.running_mean"), True, True),
    "its running variance": (added("0.running_var"), True, True),
    "all biases, by an optimizer": (stepped, False, False),
    "the SE's weight": (added("1.fc2.weight"), True, True),
    "its statistics, by training": (trained, False, False),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_forward_pass(change, training):
    """An error where the plain form has one, and else its gradient."""
    act, *raises = CHANGES[change]
    model = nn.ModuleList([a_norm(), an_se()]).train(training)
    gradients = []
    for form in (model, in_plain_form(model)):
        c = maps().requires_grad_()
        out = tail.tail(form[1], (form[0],), c)
        act(form)
        if raises[not training]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.square().sum().backward()
        else:
            out.square().sum().backward()
            gradients.append([c.grad, *(parameter.grad for parameter in form.parameters())])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients or [(), ()], strict=True))


ALONE: dict[str, Callable[[nn.ModuleList], None]] = {
    "the norm's weight": added("0.weight"),
    "its running variance": added("0.running_var"),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", ALONE.values(), ids=ALONE)
def test_what_changes_and_is_not_asked_for(change, training):
    """A gradient of the SE alone does not go through the normalisation, whose own keeping is not looked at."""
    model = nn.ModuleList([a_norm(), an_se()]).train(training)
    gradients = []
    for form in (model, in_plain_form(model)):
        out = tail.tail(form[1], (form[0],), maps().requires_grad_())
        change(form)
        gradients.append(torch.autograd.grad(out.square().sum(), list(form[1].parameters())))
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


def test_an_input_that_changes_is_refused_and_not_wrong():
    """The map is made from it. The plain form refuses it as well, but for gradients of the SE alone."""
    for wanted in (slice(None), slice(2, None)):
        norm, se, c = a_norm(), an_se(), maps().requires_grad_()
        out = tail.tail(se, (norm,), c)
        with torch.no_grad():
            c.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), [*norm.parameters(), *se.parameters()][wanted])


def raised(call: Callable[[], Any]) -> tuple[type[Exception], str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "no eps": lambda: a_norm(eps=0.0),
    "a negative eps": lambda: a_norm(eps=-1.0),
    "a negative eps in evaluation": lambda: a_norm(eps=-1.0).eval(),
    "timm's, no eps": lambda: a_norm(BatchNormAct2d, eps=0.0),
    "no eps, but in groups": lambda: a_norm(GroupNormAct, num_groups=3, eps=0.0),
    "other channels": lambda: randomise(nn.BatchNorm2d(WIDTH + 1).double()),
    "other channels in evaluation": lambda: randomise(nn.BatchNorm2d(WIDTH + 1).double()).eval(),
    "groups that do not fit": lambda: randomise(nn.GroupNorm(2, WIDTH + 2).double()),
    "another dtype": lambda: a_norm().float(),
    "one of two statistics": lambda: vars(norm := a_norm().eval())["_buffers"].update(running_mean=None) or norm,
    "in place on what a ReLU keeps": lambda: nn.Sequential(a_norm(), nn.ReLU(), nn.SiLU(inplace=True)),
    "in place on what timm's keeps": lambda: nn.Sequential(a_norm(BatchNormAct2d), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("maker", REFUSED.values(), ids=REFUSED)
def test_what_the_plain_form_refuses_is_refused_alike(maker):
    norm, se = maker(), an_se()
    other, plain = copied(norm), in_plain_form(se)
    mine = raised(lambda: tail.tail(se, (norm,), maps().requires_grad_()).sum().backward())
    assert mine == raised(lambda: plain(other(maps().requires_grad_())).sum().backward())
    assert list(map(str, norm.buffers())) == list(map(str, other.buffers()))


def test_a_sum_in_the_order_of_the_plain_forms():
    """A gradient that is laid out otherwise than the map: its product has the gradient's layout."""
    model = nn.ModuleList([a_norm(), an_se()]).float()
    c = maps(size=(3, WIDTH, 11, 9)).float().contiguous(memory_format=torch.channels_last)
    gradients = []
    for form in (model, in_plain_form(model)):
        x = c.clone().requires_grad_()
        out = tail.tail(form[1], (form[0],), x) + form[1](x)
        (out * maps(1, size=out.shape).float()).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in form.parameters())])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


# ------------------------------------------------------------------------------------------------------- whole networks


def operated(name: str, **options: Any) -> nn.Module:
    """A network whose gates are away from one."""
    return add_se(build(name), init="paper", bias=True, **options)


# What each SE of a network keeps, by what stands in front of it.
NETWORKS = {
    "resnet18": (64, ["c"] * 8),
    "mobilenetv2_035": (64, ["c"] * 17),
    "regnetx_002": (64, ["c"] * 13),
    "torchvision/mobilenet_v2": (64, ["c"] * 17),
    "torchvision/regnet_x_400mf": (64, ["c"] * 22),
    "convnext_atto": (64, ["y"] * 12),
    "toy/WriteUps": (32, ["y"] * 4),  # they stand behind the write-ups' own SEs
    "toy/PlainSequential": (32, ["y"] * 3),
    "toy/TwoUnits": (32, ["c"] * 2 + ["y"] * 2),
    "toy/FunctionalDropPath": (32, ["c"] * 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_of_a_network(name):
    side, kept = NETWORKS[name]
    model = operated(name, existing="stack").double().train()
    plain = in_plain_form(model)
    for form in (model, plain):
        torch.manual_seed(3)
        form.out = form(images((3, side, side)).double())
        form.out.square().sum().backward()
    assert kept_by(model.out) == kept and kept_by(plain.out) == []
    assert torch.equal(model.out, plain.out)
    largest = max(parameter.grad.abs().max() for parameter in plain.parameters())
    for (path, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        # In exact arithmetic the gradient of a bias in front of a normalisation is zero.
        assert (mine.grad - other.grad).abs().max() <= 1e-10 * other.grad.abs().max() + 1e-14 * largest, path
    assert list(map(str, model.buffers())) == list(map(str, plain.buffers()))


def test_bytes_kept_by_hand():
    """Per SE, in floats: the excitation's own tensors in the lean form, and the map as well in the plain form.

    The excitation keeps its input, its hidden layer, the sigmoid's output and that times two. Of the normalisation the
    lean form keeps a scale and a bias a channel, as they were.
    """
    base, x = build("resnet18").train(), images()
    model = add_se(copied(base))
    plain = in_plain_form(model)
    sites = [
        (se.fc2.weight.shape[:2], map_size) for se, map_size in zip(ses(model), (16, 16, 8, 8, 4, 4, 2, 2), strict=True)
    ]
    excitation = sum(2 * (3 * channels + hidden) for (channels, hidden), _ in sites)
    normalisation = sum(2 * channels for (channels, _), _ in sites)
    outputs = sum(2 * channels * size**2 for (channels, _), size in sites)
    before = saved_bytes(base, x)
    assert saved_bytes(model, x) - before == 4 * (excitation + normalisation)
    assert saved_bytes(plain, x) - before == 4 * (excitation + outputs)


def ses(model: nn.Module) -> list[SqueezeExcite]:
    return [module for module in model.modules() if isinstance(module, SqueezeExcite)]


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "toy/Digits"])
def test_an_addition_in_place_stays_in_place(name):
    model = operated(name).train()
    block = next(module for module in model.modules() if hasattr(module, "se"))
    assert "+=" in inspect.getsource(type(block).forward)
    places = {}
    block.se.register_forward_hook(lambda module, args, out: places.update(out=out.data_ptr()))
    last = next(m for n, m in block.named_children() if n in ("act2", "relu"))
    last.register_forward_pre_hook(lambda module, args: places.update(sum=args[0].data_ptr()))
    model(images(getattr(type(build(name)), "SIZE", (3, 64, 64))))
    assert places["out"] == places["sum"]


def gradients_of(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    out = run(model, maps())
    out.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def offloaded(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def twice(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    out.square().sum().backward(retain_graph=True)
    model.zero_grad()
    return out


RUNS = {
    "recomputed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "recomputed, reentrant": lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True),
    "offloaded": offloaded,
    "two backward passes": twice,
}


class Tail(nn.Module):
    """Convolution, normalisation, SE."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.se = a_conv(), a_norm().eval(), an_se()

    def forward(self, x: Tensor) -> Tensor:
        return tail.tail(self.se, (self.norm,), self.conv(x))


def under_autocast(model: nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input; without a dtype, both in float64."""
    c = maps(size=(3, WIDTH, 12, 10)).to(torch.float32 if dtype else torch.float64).requires_grad_()
    model = copied(model).to(c.dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = tail.tail(model.se, (model.norm,), model.conv(c))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)).sum().backward()
    assert kept_by(out) == (["c"] if model.se.lean else [])
    return out, c.grad


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, training):
    """Outputs bit for bit; gradients as near as the plain form's to those in float64."""
    model = Tail().train(training)
    out, gradient = under_autocast(model, dtype)
    other, others = under_autocast(in_plain_form(model), dtype)
    _, exact = under_autocast(in_plain_form(model), None)
    assert out.dtype == dtype and torch.equal(out, other)
    assert (gradient - exact).norm() <= 1.5 * (others - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_other_ways_to_a_backward_pass(run):
    model = Tail()
    expected = gradients_of(in_plain_form(model), lambda model, x: model(x))
    for mine, other in zip(gradients_of(model, run), expected, strict=True):
        assert other.any() and (mine - other).abs().max() <= 1e-10 * other.abs().max()


def test_many_gradients_in_one_pass():
    model, c = Tail(), maps().requires_grad_()
    rows = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for form in (model, in_plain_form(model)):
        found += torch.autograd.grad(form(c), c, rows, is_grads_batched=True)
    assert (found[0] - found[1]).abs().max() <= 1e-10 * found[1].abs().max()


def test_a_gradient_of_a_gradient_is_refused_and_not_wrong():
    x = maps().requires_grad_()
    (slope,) = torch.autograd.grad(Tail()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    (slope,) = torch.autograd.grad(in_plain_form(Tail())(x).square().sum(), x, create_graph=True)
    slope.sum().backward()
    assert x.grad.any()


def test_hooks_on_the_se_see_the_branch_and_its_gradient():
    seen: list[list[Tensor]] = []
    for model in (lean_form := Tail(), in_plain_form(lean_form)):
        found: list[Tensor] = []
        model.se.register_forward_hook(lambda se, args, out, found=found: found.extend((*args, out)))
        model.se.fc1.register_forward_hook(lambda fc1, args, out, found=found: found.extend((*args, out)))
        model.se.register_full_backward_hook(lambda se, grads, out, found=found: found.extend((*grads, *out)))
        model(maps()).square().sum().backward()
        seen.append(found)
    assert [t.shape for t in seen[0]] == [t.shape for t in seen[1]] and len(seen[0]) == 6
    for mine, other in zip(*seen, strict=True):
        assert (mine - other).abs().max() <= 1e-10 * other.abs().max()


def test_the_branchs_gradient_reaches_who_took_it_from_a_hook():
    """As class activation maps take it: the gradient of an SE's input, which the product gives back in two factors."""
    gradients = []
    for model in (lean_form := Tail(), in_plain_form(lean_form)):
        kept: list[Tensor] = []
        handle = model.se.register_forward_hook(lambda se, args, out, kept=kept: kept.append(args[0]))
        out = model(maps())
        handle.remove()
        gradients.append(torch.autograd.grad(out.square().sum(), kept[0])[0])
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-10 * gradients[1].abs().max()


@pytest.mark.parametrize("change", [torch.mul, Tensor.mul_], ids=["another map", "in place"])
def test_a_map_that_a_hook_has_changed_is_what_is_gated(change):
    results = []
    for model in (lean_form := Tail(), in_plain_form(lean_form)):
        model.se.register_forward_pre_hook(lambda se, args: (change(args[0], 2),))
        results.append(differentiated(model, [model], maps(), ["y"] if model is lean_form else []))
    assert_equal_but_for_rounding(*results)


def test_it_is_a_matter_of_running_and_no_part_of_the_architecture():
    base = build("toy/Digits")
    model, plain = add_se(copied(base)), add_se(copied(base), lean=False)
    assert [se.lean for se in ses(model)] == [True, True] and [se.lean for se in ses(plain)] == [False, False]
    assert recipe_of(model) == recipe_of(plain) and list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain) and [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for again in (copied(plain), pickle.loads(pickle.dumps(plain))):
        assert [se.lean for se in ses(again)] == [False, False]
    assert kept_by(plain(images((1, 28, 28)))) == [] and kept_by(model(images((1, 28, 28)))) == ["c", "c"]
    for wrong in (None, 1, "yes"):
        with pytest.raises(OptionError, match=r"lean=.* is neither True nor False. Leave it out"):
            add_se(base, lean=wrong)
    assert type(base.layers[0]) is toys.Basic


class Halving(SqueezeExcite):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def replace_the_class(se: SqueezeExcite) -> None:
    se.__class__ = Halving


def replace_the_forward(se: SqueezeExcite) -> None:
    se.forward = lambda x: SqueezeExcite.forward(se, x) * 0.5


@pytest.mark.parametrize("replace", [replace_the_class, replace_the_forward])
def test_a_forward_around_the_ses_own(replace):
    results = []
    for model in (lean_form := Tail(), in_plain_form(lean_form)):
        replace(model.se)
        results.append(differentiated(model, [model], maps(), ["y"] if model is lean_form else []))
    assert_equal_but_for_rounding(*results)


class Identified(nn.Module):
    """Somebody's own module in an SE's place."""

    lean = "unrelated"

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_another_module_in_the_ses_place_is_called_as_it_is():
    norm, c = a_norm().eval(), maps().requires_grad_()
    for other in (nn.Identity(), Identified(), nn.Sequential(an_se())):
        assert torch.equal(tail.tail(other, (norm,), c), other(norm(c)))


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (x,)).module()


GRAPHS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "torch.compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True),
    "torch.export": exported,
    "torch.fx": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "functional_call": lambda model, x: lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*should not be saved:UserWarning"
)
@pytest.mark.parametrize("lower", GRAPHS.values(), ids=GRAPHS)
def test_graphs_hold_the_plain_form(lower):
    model, x = operated("toy/Digits").double(), images((1, 28, 28)).double().requires_grad_()
    out = model(x)
    graph = lower(model, x)
    result = graph(x)
    assert kept_by(out) == ["c", "c"] and (kept_by(result) == [] or lower is GRAPHS["functional_call"])
    torch.testing.assert_close(result, out, rtol=1e-12, atol=1e-12)
    (mine,), (wanted,) = torch.autograd.grad(result.sum(), x), torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)
    torch.compiler.reset()
