"""verify: what it passes is right, and what is wrong it sees, by name, in every way into a model.

The broken patients are one small network with timm's methods, each with one thing wrong that a surgery could get wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import logging
import re
import sys
import types
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from patients import OLD_TIMM, OLD_TORCH, build, differences, images, randomise, run, snapshot
from timm.utils import reparameterize_model
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from toys import Basic, Trunk
from typer.testing import CliRunner

from se_surgery import NothingToDoError, ProbeError, SqueezeExcite, VerifyError, add_se, find_se, verify
from se_surgery.commands import main as cli
from se_surgery.planning.exam import Exam
from se_surgery.proving.compare import deviation, gradient_deviation, is_telling, reason, tensors_in
from se_surgery.proving.compilers import Lowered
from se_surgery.proving.pair import draw_anew, paired, twin
from se_surgery.proving.pair import randomise as randomise_anew
from se_surgery.proving.promises import trials
from se_surgery.proving.ways import WAYS
from se_surgery.records import CODE, original_class
from se_surgery.se.excite import GATES, LIGHT_ATTENTION
from se_surgery.surgery.generated import subclass

SIZE = (3, 32, 32)
QUICK = [way.name for way in WAYS if not way.thorough]
THOROUGH = [way.name for way in WAYS if way.thorough]
FORWARD = ["forward, evaluation", "forward, training", "gradients"]
METHODS = ["forward_features", "forward_head", "forward_intermediates", "set_grad_checkpointing"]
WRAPPERS = [name for name in QUICK if name.startswith("features_only")]
NO_GETTER = [name for name in WRAPPERS if name != "features_only, getter"]
NO_ONNX = ["ONNX"] if OLD_TORCH else []
UNTOLD = pytest.mark.skipif(OLD_TORCH, reason="torch 2.4 does not tell a forward that it is exported")


def outcomes(model: nn.Module, size: Any = SIZE, names: Any = None) -> dict[str, Any]:
    """What comes of every trial that is asked for (of the quick ones by default): its check, by its name."""
    planned = trials(model, size, thorough=names is not None)
    return {trial.name: trial.run() for trial in planned if names is None or trial.name in names}


def broken(model: nn.Module, size: Any = SIZE, names: Any = None) -> dict[str, str]:
    return {name: check.detail for name, check in outcomes(model, size, names).items() if check.passed is False}


# --------------------------------------------------------------------------------------------------- sound operations


@dataclasses.dataclass(frozen=True)
class Row:
    """A network, and the ways that it does not have."""

    name: str
    lacks: tuple[str, ...] = ("reparameterize",)
    size: Any = (3, 64, 64)
    build: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name + "".join(f"-{key}" for key in self.build)


TORCHVISION = (*METHODS, *WRAPPERS, "reparameterize")
ROWS = (
    Row("resnet18"),
    Row("efficientnet_b0", size=(3, 32, 32)),
    Row("convnext_atto"),
    Row("repvgg_a0", lacks=()),
    Row("mobilenetv3_small_050"),
    Row(
        "hrnet_w18_small",
        lacks=("forward_features", "forward_head", *NO_GETTER, "set_grad_checkpointing", "reparameterize"),
        build={"features_only": True},
    ),
    Row("resnet18", (*METHODS[:3], *WRAPPERS[2:4], "reparameterize"), build={"features_only": True}),
    Row("torchvision/mobilenet_v3_small", TORCHVISION),
    # Losses only come with targets, and the boxes of random weights hardly depend on them.
    Row("torchvision/ssdlite320_mobilenet_v3_large", lacks=("forward, training", "gradients", *TORCHVISION)),
)


SWEPT = (
    Row("densenet121", size=(3, 32, 32)),
    # Its features end in a child of a block: only hooks get there.
    Row("xception41p", lacks=("features_only, list", "features_only, dict", "reparameterize")),
    Row("ghostnetv3_050"),
    Row("resnet18:half"),
    Row("vgg11_bn", lacks=("set_grad_checkpointing", "reparameterize")),
    Row("nf_resnet26"),
)


# What timm 1.0.31 gave to some of these networks.
LATER = {"forward_intermediates", "features_only, getter", "set_grad_checkpointing"}


def inputs_of(row: Row) -> Any:
    return ([torch.rand(3, 64, 64)],) if "ssd" in row.name else row.size


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_sound_operations_pass_in_every_way_that_the_base_has(row):
    size = inputs_of(row)
    kwargs = {"weights_backbone": None} if "ssd" in row.name else row.build
    model = add_se(build(row.name, **kwargs), existing="stack", example_input=size)
    checks = outcomes(model, size)
    assert {name: str(check) for name, check in checks.items() if check.passed is False} == {}
    assert list(checks) == ["keys", "identity", *QUICK]
    lacking = {name for name, check in checks.items() if check.passed is None}
    assert lacking - (LATER if OLD_TIMM else set()) == {"identity", *row.lacks} - (LATER if OLD_TIMM else set())
    assert all(len(str(check)) < 320 and "\n" not in str(check) for check in checks.values())


def test_compilers_and_exporters_agree_with_the_operated_model():
    model = add_se(build("resnet18"), example_input=SIZE)
    checks = outcomes(model, SIZE, THOROUGH)
    assert list(checks) == THOROUGH
    if OLD_TORCH:
        assert "torch 2.4's exporter" in checks.pop("ONNX").detail
    assert {name: check.detail for name, check in checks.items() if check.passed is not True} == {}
    for check in checks.values():
        outputs = float(re.search(r"outputs by (\S+) of", check.detail)[1])
        apart = float(re.search(r"base is (\S+) away", check.detail)[1])
        assert outputs <= 1e-3 and apart >= 1e-2 and apart >= 100 * outputs


@pytest.mark.sweep
@pytest.mark.parametrize("row", [*ROWS, *SWEPT], ids=str)
def test_every_way_is_right_in_sound_operations(row):
    size = inputs_of(row)
    kwargs = {"weights_backbone": None} if "ssd" in row.name else row.build
    model = add_se(build(row.name, **kwargs), existing="stack", example_input=size)
    checks = outcomes(model, size, [way.name for way in WAYS])
    assert {name: check.detail for name, check in checks.items() if check.passed is False} == {}
    lacks = {*row.lacks, *(THOROUGH if "ssd" in row.name else ())}
    assert {name for name, check in checks.items() if check.passed is None} == lacks


KINDS = [
    *({"attn": name} for name in LIGHT_ATTENTION),
    *({"gate": gate} for gate in GATES),
    {"squeeze": "max"},
    {"init": "paper", "bias": True, "rd_divisor": 8},
    {"init": "paper", "rd_channels": 1},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_all_kinds_of_ses_are_drawn_so_that_they_show(options):
    """Also in graphs: their gates are far from one, and gradients reach all of them."""
    checks = outcomes(add_se(tapped(), example_input=SIZE, **options), names=[*FORWARD, "features_only, graph"])
    assert {name: check.detail for name, check in checks.items() if check.passed is not True} == {}
    assert float(re.search(r"base is (\S+) away", checks["features_only, graph"].detail)[1]) > 0.05


def test_reparameterised_first_and_then_operated():
    model = add_se(reparameterize_model(build("repvgg_a0")), example_input=SIZE)
    checks = outcomes(model, SIZE)
    assert {name for name, check in checks.items() if check.passed is not True} == {"identity", "reparameterize"}


class Foldable(Basic):
    """Folding takes a child away that the rewritten forward calls."""

    def reparameterize(self) -> None:
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.Identity()


def test_a_refusal_to_reparameterise_says_in_which_order_it_goes():
    model = add_se(randomise(Trunk(Foldable(8, 8))).eval(), example_input=SIZE)
    check = outcomes(model, SIZE, ["reparameterize"])["reparameterize"]
    assert check.passed is None
    assert check.detail.startswith("refused: ") and "first and then operate" in check.detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype):
    checks = outcomes(
        add_se(tapped().to(dtype), example_input=SIZE), names=[*FORWARD, "set_grad_checkpointing", "torch.export"]
    )
    assert {name: check.detail for name, check in checks.items() if check.passed is not True} == {}


# ----------------------------------------------------------------------------------------------------- left as found


def test_a_thorough_look_leaves_everything_as_found():
    """No value, flag, hook, gradient or class of the model, no random number, no filter of warnings."""
    model = tapped().train()
    model.blocks[1].eval()
    add_se(model, example_input=SIZE)
    model.stem.requires_grad_(False)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before, random, filters = snapshot(model), torch.get_rng_state(), list(warnings.filters)
    checks = outcomes(model, names=[way.name for way in WAYS])
    assert {name for name, check in checks.items() if not check.passed} == {"reparameterize", *NO_ONNX}
    assert differences(before, snapshot(model)) == []
    assert torch.equal(torch.get_rng_state(), random)
    assert warnings.filters == filters


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_gradients_are_checked_whatever_is_around(context):
    model = add_se(tapped(), example_input=SIZE)
    with context():
        assert outcomes(model)["gradients"].passed


def test_frozen_models_are_checked_for_gradients_too():
    assert outcomes(add_se(tapped(), example_input=SIZE).requires_grad_(False))["gradients"].passed


def test_a_twin_shares_values_and_nothing_else():
    model = tapped()
    other = twin(model)
    for (name, mine), (same, its) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == same and mine is not its and mine.data_ptr() == its.data_ptr()
    other(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    other.blocks[0].bn1.running_mean.fill_(7.0)
    assert not (model.blocks[0].bn1.running_mean == 7.0).any()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gates_are_drawn_so_that_they_spread_in_both_modes(training):
    """Whatever the size of the features, which differs by far between the modes where statistics are just drawn."""
    model = add_se(tapped(), example_input=SIZE)
    nn.init.normal_(model.stem[0].weight, std=1e-3)
    exam = Exam(model, SIZE)
    pair = paired(model, exam, exam.existing)
    torch.manual_seed(5)
    draw_anew(pair)
    assert all(torch.equal(value, pair.operated.state_dict()[key]) for key, value in pair.base.state_dict().items())
    for path in pair.sites:
        pair.operated.get_submodule(path).gate.register_forward_hook(lambda *args: gates.append(args[2]))
    gates: list[Tensor] = []
    run(pair.operated, images(SIZE), training)
    assert len(gates) == 2
    # Twenty times and more what verify takes for equal.
    assert all(0.02 < gate.std() < 0.3 and (gate - 0.5).abs().mean() > 0.02 for gate in gates)


def test_gates_of_few_hidden_units_are_not_drawn_shut():
    """What cancels out by chance in evaluation need not in training: no gate is so far off that it learns nothing."""
    model = add_se(tapped(), gate="hard_sigmoid", example_input=SIZE)
    exam = Exam(model, SIZE)
    largest: list[float] = []
    for seed in range(60):
        torch.manual_seed(seed)
        pair = paired(copy.deepcopy(model), exam, exam.existing)
        draw_anew(pair)
        for path in pair.sites:
            gate = pair.operated.get_submodule(path).gate
            gate.register_forward_hook(lambda module, args, output: largest.append(args[0].abs().max().item()))
        run(pair.operated, images(SIZE), training=True)
    assert len(largest) == 120 and 1 < max(largest) < 12


def test_a_learned_mix_is_drawn_as_one():
    """However little of it the user's model has learned."""
    model = add_se(tapped(), attn="eca", example_input=SIZE)
    nn.init.constant_(model.blocks[0].se.mix, 0.01)
    exam = Exam(model, SIZE)
    pair = paired(model, exam, exam.existing)
    draw_anew(pair)
    assert [pair.operated.get_submodule(path).mix.item() for path in pair.sites] == [1.0, 1.0]


def test_what_exporters_say_is_dropped(capfd, caplog):
    """Here a warning would be an error; what the graph computes counts."""

    def talking(model: nn.Module, *inputs: Any) -> nn.Module:
        warnings.warn("about the exporter", stacklevel=1)
        print("a whole graph", file=sys.stderr)
        logging.getLogger("torch.onnx").error("step 1 of 3")
        return model

    model = add_se(tapped(), example_input=SIZE)
    exam = Exam(model, SIZE)
    pair = paired(copy.deepcopy(model), exam, exam.existing)
    draw_anew(pair)
    outcome = Lowered(talking)(pair)
    assert outcome.passed, outcome.detail
    assert capfd.readouterr().err == "" and caplog.text == ""
    assert logging.getLogger("torch.onnx").getEffectiveLevel() < logging.CRITICAL


# ----------------------------------------------------------------------------------------------------- broken patients


class Switch:
    """Whether the network's own forward runs; twins have one of their own each."""

    def __init__(self) -> None:
        self.on = False


class Tapped(Trunk):
    """A residual network with the methods of timm's, and with taps at all of its children."""

    def __init__(self) -> None:
        super().__init__(Basic(8, 8), Basic(8, 16, stride=2), outputs=16)
        self.feature_info = [
            {"num_chs": 8, "reduction": 1, "module": "stem"},
            {"num_chs": 16, "reduction": 2, "module": "blocks"},
        ]
        self.checkpointed = False

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.checkpointed:
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False, **kwargs: Any) -> Any:
        taps = [self.stem(x)]
        taps += [self.blocks(taps[0])]
        return taps if intermediates_only else (taps[-1], taps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointed = enable

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Identity()


def tapped(cls: type[Tapped] = Tapped) -> Tapped:
    torch.manual_seed(0)
    return randomise(cls(), seed=1).eval()


def original(block: nn.Module, x: Tensor) -> Tensor:
    """What a way that does not go through the operated block computes."""
    return Basic.forward(block, x)


class SkippingFeatures(Tapped):
    def forward_features(self, x: Tensor) -> Tensor:
        return original(self.blocks[1], self.blocks[0](self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(super().forward_features(x))


class RepeatingHead(Tapped):
    """Its head gates the last block's features once more."""

    def forward_head(self, x: Tensor) -> Tensor:
        return super().forward_head(getattr(self.blocks[1], "se", nn.Identity())(x))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward_head(self.forward_features(x))


class IntermediatesOfItsOwn(Tapped):
    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False, **kwargs: Any) -> Any:
        taps = [self.stem(x)]
        first, second = self.blocks
        y = first.bn2(first.conv2(first.relu(first.bn1(first.conv1(taps[0])))))
        taps += [second(first.relu(y + taps[0]))]
        return taps if intermediates_only else (taps[-1], taps)


class OwnChildren(Tapped):
    """Whoever goes through its children, and not through its forward, finds other blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = self.blocks.switch = Switch()
        self.blocks.forward = types.MethodType(self.skip, self.blocks)

    @staticmethod
    def skip(blocks: nn.Sequential, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x) if blocks.switch.on else original(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        self.switch.on = True
        try:
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))
        finally:
            self.switch.on = False


class ForgetfulOfItsHead(Tapped):
    def reset_classifier(self, classes: int) -> None:
        super().reset_classifier(classes)
        reclass(self.blocks[0], Basic)


class SkippingCheckpoints(Tapped):
    def forward_features(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return super().forward_features(x)
        x = checkpoint(self.blocks[0], self.stem(x), use_reentrant=False)
        return checkpoint(original, self.blocks[1], x, use_reentrant=False)


class FoldingBlocks(nn.Sequential):
    """Its folding gives the blocks the class they have in the library."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.unused = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))

    def reparameterize(self) -> None:
        del self.unused
        for block in self:
            reclass(block, Basic)


class Folding(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = FoldingBlocks(*self.blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


# Classes that go another way into an operated model, and the promises that this breaks: these, and no others.
ASTRAY = {
    SkippingFeatures: {
        "forward_features": "blocks.1.se ran never instead of once",
        "forward_head": "blocks.1.se ran never instead of once",
    },
    RepeatingHead: {"forward_head": "blocks.1.se ran 2 times instead of once"},
    IntermediatesOfItsOwn: {
        "forward_intermediates": "blocks.0.se ran never instead of once",
        "features_only, getter": "blocks.0.se ran never instead of once",
    },
    OwnChildren: dict.fromkeys(
        [*METHODS[:3], "features_only, list", "features_only, dict", "features_only, getter"],
        "blocks.0.se ran never instead of once",
    ),
    ForgetfulOfItsHead: {"features_only, hook": "blocks.0.se ran never instead of once"},
    SkippingCheckpoints: {"set_grad_checkpointing": "blocks.1.se ran never instead of once"},
    Folding: {"reparameterize": "the outputs change by"},
}


@pytest.mark.parametrize("cls", ASTRAY, ids=lambda cls: cls.__name__)
def test_a_way_around_an_se_is_seen(cls):
    model = add_se(tapped(cls), example_input=SIZE)
    found = broken(model)
    assert found.keys() == ASTRAY[cls].keys()
    assert all(found[name].startswith(detail) for name, detail in ASTRAY[cls].items()), found
    with pytest.raises(VerifyError) as caught:
        verify(model, SIZE, thorough=False)
    assert all(f"BROKEN  {name}: " in str(caught.value) for name in found)


# What a bug in the rewriting could write instead of the SE's call, and the promises that it breaks among others.
WRITTEN_INSTEAD = {
    "self.se(self.se(bn2))": {"forward, evaluation": "blocks.0.se ran 2 times instead of once"},
    "self.se(bn2).detach()": {"gradients": "nothing reaches blocks.0.se.fc1.weight"},
    "self.se(bn2) * 0 + bn2": {"gradients": "all that reaches blocks.0.se is zero"},
    "self.se(bn2) * 1.5": {"forward, training": "with gates at one the outputs differ from the base's by "},
    "self.se(bn2) if not torch.is_grad_enabled() or torch.is_inference_mode_enabled() else self.se(bn2).detach()": {
        "gradients": "nothing reaches blocks.0.se.fc1.weight"
    },
    "(self.bn2.running_mean.add_(1), self.se(bn2))[1]": {
        "forward, training": "with gates at one blocks.0.bn2.running_mean is left with other values than in the base",
    },
}


@pytest.mark.parametrize("written", WRITTEN_INSTEAD)
def test_a_forward_that_is_written_wrongly_is_seen(written):
    model = add_se(tapped(), example_input=SIZE)
    rewrite(model.blocks[0], written)
    found = broken(model)
    assert all(found[name].startswith(detail) for name, detail in WRITTEN_INSTEAD[written].items()), found


def rewrite(block: nn.Module, written: str) -> None:
    code = getattr(type(block), CODE)
    call = "_tail(self.se, (self.bn2,), x)"
    assert code.source.count(call) == 1
    origins = (*code.origins, ("torch", "torch", ""))
    wrong = dataclasses.replace(
        code, source=code.source.replace(call, f"[bn2 := self.bn2(x), {written}][1]"), origins=origins
    )
    reclass(block, subclass(Basic, wrong))


def reclass(block: nn.Module, cls: type[nn.Module]) -> None:
    """Give an operated block another class past its own refusal, as what changes objects from outside does."""
    object.__setattr__(block, "__class__", cls)


def given(block: nn.Module, **methods: Any) -> None:
    """Give a block other methods than surgery did; copies have them, too."""
    members = {name: value for name, value in vars(type(block)).items() if name not in ("__dict__", "__weakref__")}
    members["__reduce_ex__"] = lambda self, protocol: reduced(self, type(self))
    reclass(block, type(type(block).__name__, (original_class(block),), {**members, **methods}))


def test_a_block_with_its_old_class_is_seen():
    model = add_se(tapped(), example_input=SIZE)
    reclass(model.blocks[1], Basic)
    assert broken(model) == {
        "calls": "blocks.1.se is never called; its block has lost the forward that surgery gave it"
    }


class Scaled(Basic):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(1))


def test_a_lost_key_is_seen():
    def save(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        del destination[f"{prefix}scale"]

    torch.manual_seed(0)
    model = add_se(randomise(Trunk(Scaled(8, 8)), seed=1).eval(), example_input=SIZE)
    assert broken(model, SIZE) == {}
    given(model.blocks[0], _save_to_state_dict=save)
    assert broken(model, SIZE, ["keys", "forward, evaluation"]) == {
        "keys": "blocks.0.scale is in only one of the base and the operated model"
    }


def test_a_copy_that_loses_the_class_is_seen():
    model = add_se(tapped(), example_input=SIZE)
    given(model.blocks[1], __reduce_ex__=lambda self, protocol: reduced(self, Basic))
    assert broken(model) == {"deepcopy": "blocks.1 is not what it was in a copy of the model"}


def test_a_pickle_that_loses_the_class_is_seen():
    model = add_se(tapped(), example_input=SIZE)
    # copy.deepcopy asks for protocol 4, whatever pickle's newest is.
    given(
        model.blocks[1],
        __reduce_ex__=lambda self, protocol: reduced(self, type(self) if protocol <= 4 else Basic),
    )
    assert broken(model) == {"pickle": "blocks.1 comes out with another class"}


def reduced(block: nn.Module, cls: type) -> Any:
    return (object.__new__, (cls,), *object.__reduce_ex__(block, 2)[2:])


def test_gradients_that_checkpointing_changes_are_seen():
    class OfSE(torch.autograd.Function):
        """What is recomputed in the backward pass does not see the first forward's value."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.factor = next(numbers)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.factor

    numbers = itertools.count(1.0)
    model = add_se(tapped(), example_input=SIZE)
    model.blocks[0].se.forward = types.MethodType(
        lambda self, x: OfSE.apply(SqueezeExcite.forward(self, x)), model.blocks[0].se
    )
    assert "the SEs' gradients change with it" in broken(model)["set_grad_checkpointing"]


def skipped(x: Tensor, y: Tensor) -> Tensor:
    return x


def cut(x: Tensor, y: Tensor) -> Tensor:
    return y.detach()


# When an SE does what instead of its work, what is tried, and the graphs among it that are wrong then.
COMPILED = ["torch.compile, evaluation", "torch.compile, training"]
IN_GRAPHS = {
    "a tracer skips it": (
        lambda x: isinstance(x, fx.Proxy),
        skipped,
        ["forward, evaluation", "features_only, graph", "create_feature_extractor"],
        ["features_only, graph", "create_feature_extractor"],
    ),
    "an exporter skips it": (
        lambda x: torch.compiler.is_exporting(),
        skipped,
        ["features_only, graph", "torch.export", "ONNX"],
        ["torch.export", "ONNX"],
    ),
    "only ONNX skips it": (lambda x: torch.onnx.is_in_onnx_export(), skipped, ["torch.export", "ONNX"], ["ONNX"]),
    "a compiler skips it": (
        lambda x: torch.compiler.is_dynamo_compiling(),
        skipped,
        ["features_only, graph", *COMPILED],
        COMPILED,
    ),
    "a compiler cuts its gradient": (
        lambda x: torch.compiler.is_dynamo_compiling(),
        cut,
        COMPILED,
        ["torch.compile, training"],
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[UNTOLD] if "ONNX" in row[2] else []) for case, row in IN_GRAPHS.items()]
)
def test_a_graph_without_the_se_is_seen(case, monkeypatch):
    is_wrong, instead, tried, expected = IN_GRAPHS[case]
    forward = SqueezeExcite.forward

    def sometimes(self: nn.Module, x: Tensor) -> Tensor:
        y = forward(self, x)
        return instead(x, y) if is_wrong(x) else y

    monkeypatch.setattr(SqueezeExcite, "forward", sometimes)
    found = broken(add_se(tapped(), example_input=SIZE), names=tried)
    assert list(found) == expected
    assert all("differs from the eager model's" in detail for detail in found.values())


def test_a_graph_that_breaks_after_surgery_only_is_seen(monkeypatch):
    """A side effect that no graph can hold. The same one in the base is nothing that surgery has promised."""
    forward = SqueezeExcite.forward
    monkeypatch.setattr(SqueezeExcite, "forward", speaking(forward))
    found = broken(add_se(tapped(), example_input=SIZE), names=COMPILED)
    assert list(found) == COMPILED
    assert all(detail.startswith("the base can, the operated model cannot: ") for detail in found.values())
    monkeypatch.setattr(SqueezeExcite, "forward", forward)

    class Speaking(Tapped):
        forward = speaking(Tapped.forward)

    checks = outcomes(add_se(tapped(Speaking), example_input=SIZE), names=COMPILED)
    assert [check.passed for check in checks.values()] == [None, None]
    assert all(check.detail.startswith("the base has no such way: ") for check in checks.values())


def speaking(forward: Any) -> Any:
    def speak(self: nn.Module, x: Tensor) -> Tensor:
        open("/dev/null").close()
        return forward(self, x)

    return speak


def test_an_error_in_one_way_only_is_seen():
    model = add_se(tapped(), example_input=SIZE)
    model.blocks[0].se.register_forward_pre_hook(refuse_gradients)
    found = broken(model)
    assert found.keys() == {"gradients", "set_grad_checkpointing", "features_only, graph"}
    assert found["gradients"] == "the base can, the operated model cannot: RuntimeError: not with gradients"


def refuse_gradients(module: nn.Module, args: Any) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("not with gradients\nand more")


# ---------------------------------------------------------------------------------- what the base does all the same


class OtherWhenExported(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)


class HalvedWhenCheckpointed(Tapped):
    def forward_features(self, x: Tensor) -> Tensor:
        x = super().forward_features(x)
        return x.detach() + (x - x.detach()) / 2 if self.checkpointed else x


# What is the base's own doing: reported, and no promise.
OWN = [
    pytest.param(OtherWhenExported, "torch.export", "the base itself comes out different: ", marks=UNTOLD),
    (HalvedWhenCheckpointed, "set_grad_checkpointing", "the base's own gradients change with it"),
]


@pytest.mark.parametrize(("cls", "name", "detail"), OWN, ids=lambda value: getattr(value, "__name__", ""))
def test_what_the_base_does_itself_is_not_broken(cls, name, detail):
    check = outcomes(add_se(tapped(cls), example_input=SIZE), names=[name])[name]
    assert check.passed is None and check.detail.startswith(detail)


def test_a_way_that_ends_early_goes_without_the_ses_behind_its_end():
    model = tapped()
    model.feature_info = [{"num_chs": 8, "reduction": 1, "module": "blocks.0"}]
    checks = outcomes(add_se(model, example_input=SIZE))
    expected = "with gates at one bit-equal to the base; 1 of 2 SEs are on it, each once"
    assert checks["features_only, list"].detail == checks["features_only, dict"].detail == expected
    assert checks["features_only, hook"].detail.endswith("; 2 SEs, each once")


def test_a_parametrised_se_is_excused_from_pickle():
    """Torch does not pickle it, whatever it is a part of."""
    model = add_se(tapped(), example_input=SIZE)
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].se.fc1)
    checks = outcomes(model)
    assert {name for name, check in checks.items() if check.passed is False} == set()
    assert checks["pickle"].detail == "not tried: blocks.0.se is parametrised, which the base is not"
    assert checks["deepcopy"].passed


def test_weights_and_gains_of_zero_are_drawn_anew():
    """NFNet's gains, and a last convolution of zeros: behind them no SE would show."""
    model = tapped()
    nn.init.zeros_(model.blocks[0].conv2.weight)
    model.blocks[0].conv1.gain = nn.Parameter(torch.zeros(8, 1, 1, 1))
    nn.init.zeros_(model.head.bias)
    randomise_anew(model)
    assert model.blocks[0].conv2.weight.std() > 0.05
    assert (model.blocks[0].conv1.gain > 0.4).all()
    assert not model.head.bias.any()


class Twice(Tapped):
    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False, **kwargs: Any) -> Any:
        return self.forward_features(x) + self.forward_features(-x)


def test_a_way_that_runs_blocks_twice_runs_their_ses_twice():
    check = outcomes(add_se(tapped(Twice), example_input=SIZE))["forward_intermediates"]
    assert check.passed and check.detail.endswith("; 2 SEs, each as often as its block")


# ------------------------------------------------------------------------------------------- what shows nothing


def test_what_is_not_installed_is_not_tried(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    check = outcomes(add_se(tapped(), example_input=SIZE), names=["ONNX"])["ONNX"]
    assert check.passed is None
    assert check.detail == "not tried: install onnxruntime, with pip install 'se-surgery[onnx]'"


class Constant(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


def test_outputs_of_one_value_pass_for_nothing():
    checks = outcomes(
        add_se(tapped(Constant), example_input=SIZE), names=["forward, evaluation", "gradients", "torch.export"]
    )
    assert [check.passed for check in checks.values()] == [None, None, None]
    assert "shows nothing" in checks["forward, evaluation"].detail
    assert checks["gradients"].detail.endswith("is zero, as all that reaches its block in the base is")
    assert "would not be seen" in checks["torch.export"].detail


def test_a_base_that_does_not_run_is_an_error():
    model = add_se(tapped(), example_input=SIZE)
    model.stem.forward = types.MethodType(refuse_values, model.stem)
    with pytest.raises(ProbeError, match=r"does not run on this input \(RuntimeError: not these values\)"):
        verify(model, SIZE, thorough=False)
    with pytest.raises(NothingToDoError):
        verify(tapped(), SIZE, thorough=False)


def refuse_values(stem: nn.Module, x: Tensor) -> Tensor:
    if not x.is_meta and x.any():
        raise RuntimeError("not these values")
    return nn.Sequential.forward(stem, x)


class Untrained(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("only in evaluation")
        return super().forward(x)


def test_a_base_that_does_not_train_has_its_gradients_checked_in_evaluation():
    checks = outcomes(add_se(tapped(Untrained), example_input=SIZE))
    assert checks["forward, training"].detail == "the base has no such way: ValueError: only in evaluation"
    assert checks["gradients"].passed and "in evaluation" in checks["gradients"].detail


# -------------------------------------------------------------------------------------------------------- comparing


@dataclasses.dataclass
class Named:
    a: Any
    b: Any


class Keyed(dict):
    """A mapping that pytree does not know."""


def test_tensors_are_found_whatever_holds_them():
    one, two, three, four = (torch.full((1,), float(i)) for i in range(4))
    held = {"x": [one, "text"], "y": Named(two, Keyed(z=(three, None))), "z": OrderedDict(q=four)}
    assert [float(tensor) for tensor in tensors_in(held)] == [0.0, 1.0, 2.0, 3.0]
    assert tensors_in("nothing") == []


INF = float("inf")
# Two tensors, and how far they are apart in units of the second's range.
DEVIATIONS = [
    ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 0.0),
    ([0.0, 1.0, 2.5], [0.0, 1.0, 2.0], 0.25),
    ([10.0, 10.5], [10.0, 11.0], 0.5),
    ([3.0], [2.0], 0.5),  # one value has no range: its own size
    ([1.0, 1.0], [0.0, 0.0], INF),
    ([float("nan"), 1.0], [0.0, 1.0], INF),
    ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
    ([0.0, 1.0], [0.0, 1.0, 2.0], INF),
]


@pytest.mark.parametrize(("first", "second", "expected"), DEVIATIONS, ids=str)
def test_deviation(first, second, expected):
    assert deviation([torch.tensor(first)], [torch.tensor(second)]) == expected


def test_deviation_is_the_worst_of_several():
    near, far = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])
    assert deviation([near, far], [near, near]) == 1.0
    assert deviation([near], [near, near]) == INF
    assert deviation([], []) == 0.0
    assert gradient_deviation({"a": near, "b": None}, {"a": near, "b": None}) == 0.0
    assert gradient_deviation({"a": far, "b": None}, {"a": near, "b": None}) == 1.0
    assert gradient_deviation({"a": None}, {"a": near}) == gradient_deviation({"a": near}, {"a": None}) == INF


def test_is_telling():
    nan, zero = torch.tensor([float("nan")] * 2), torch.zeros(3)
    assert is_telling([zero, torch.arange(3)]) and is_telling([torch.tensor([1.0, float("nan")])])
    assert not is_telling([]) and not is_telling([zero, nan, torch.empty(0)])


def test_reasons_are_one_plain_line():
    assert reason(ValueError("\n \x1b[96mfirst\x1b[0m line \nsecond")) == "ValueError: first line"
    assert reason(AssertionError()) == "AssertionError"
    assert len(reason(ValueError("x" * 1000))) < 230


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def in_folder(monkeypatch):
    """The command line takes this model, whatever it is asked for."""

    def take(model: nn.Module) -> None:
        monkeypatch.setattr(cli, "open_model", lambda *_: types.SimpleNamespace(model=model))

    return take


def test_the_command_prints_every_check_when_it_is_done(in_folder, monkeypatch):
    in_folder(add_se(tapped(), example_input=SIZE))
    printed: list[str] = []
    monkeypatch.setattr(cli.typer, "echo", lambda text, **_: printed.append(str(text)))
    run, counts = cli.trials, []

    def watched(*args: Any, **kwargs: Any) -> list[Any]:
        return [types.SimpleNamespace(name=t.name, run=watch(t)) for t in run(*args, **kwargs)]

    def watch(trial: Any) -> Any:
        def attempt() -> Any:
            counts.append(len(printed))
            return trial.run()

        return attempt

    monkeypatch.setattr(cli, "trials", watched)
    result = CliRunner().invoke(cli.app, ["verify", "any", "--size", "3,32,32", "--quick"])
    assert result.exit_code == 0, result.output
    assert counts == list(range(len(QUICK) + 2))
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in printed] == ["keys", "identity", *QUICK]
    assert "3 of 18: forward, evaluation" in result.stderr


def test_the_command_is_thorough_unless_told_otherwise(in_folder, monkeypatch):
    in_folder(add_se(tapped(), example_input=SIZE))
    asked: list[bool] = []
    monkeypatch.setattr(cli, "trials", lambda model, size, thorough: asked.append(thorough) or [])
    for arguments in (["verify", "any", "--size", "3,32,32"], ["verify", "any", "--size", "3,32,32", "--quick"]):
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert asked == [True, False]


def test_the_command_names_what_is_broken_and_fails(in_folder):
    in_folder(add_se(tapped(SkippingFeatures), example_input=SIZE))
    for extra in ([], ["--json"]):
        result = CliRunner().invoke(cli.app, ["verify", "any", "--size", "3,32,32", "--quick", *extra])
        assert result.exit_code == 1
        assert "se-surgery: forward_features: blocks.1.se ran never instead of once" in result.stderr
        if extra:
            assert [c["name"] for c in json.loads(result.stdout) if c["passed"] is False] == [
                "forward_features",
                "forward_head",
            ]
        else:
            assert "BROKEN  forward_head" in result.stdout and "    ok  pickle" in result.stdout


def test_copies_of_an_operated_model_are_those_of_the_library():
    """What `deepcopy` and `pickle` promise is what users do with models."""
    model = add_se(tapped(), example_input=SIZE)
    other = copy.deepcopy(model)
    assert [site.path for site in find_se(other)] == [site.path for site in find_se(model)]
