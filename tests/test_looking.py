"""Looking at a model leaves it as found, whatever its forward does, and tells its stages."""

from __future__ import annotations

import functools
import math
import operator
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from patients import assert_same, build, images, randomise, run
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery import PatientError, ProbeError, SurgeryError, add_se, find_se, plan_se, strip_se, verify
from se_surgery.reading.anatomy import Anatomy
from se_surgery.reading.events import is_like_first
from se_surgery.reading.look import look
from se_surgery.reading.shapes import like, worked_out
from se_surgery.se.excite import SqueezeExcite

# Blocks a stage, counted by hand from the papers' tables; the first of RegNetX-400MF's four stages has one block.
STAGES = {
    "torchvision/resnet18": (2, 2, 2, 2),
    "torchvision/resnet34": (3, 4, 6, 3),
    "torchvision/resnet50": (3, 4, 6, 3),
    "torchvision/regnet_x_400mf": (1, 2, 7, 12),
    "torchvision/shufflenet_v2_x1_0": (4, 8, 4),
    "torchvision/densenet121": (6, 12, 24, 16),
    "torchvision/convnext_tiny": (3, 3, 9, 3),
    "torchvision/googlenet": (2, 5, 2),
    "torchvision/vgg16_bn": (2, 2, 3, 3, 3),
    "resnet18": (2, 2, 2, 2),
    "hrnet_w18_small": (1, 2 * 2, 2 * 3, 2 * 4 + 4),
    "convmixer_768_32": (32,),
    "vgg11": (1, 1, 2, 2, 2),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_those_of_the_architecture(name):
    plan = plan_se(build(name))
    counts = [sum(site.stage == stage for site in plan.sites) for stage in range(1, plan.stages + 1)]
    assert tuple(counts) == STAGES[name]


def test_stages_of_images_that_are_not_square():
    stages = [site.stage for site in plan_se(build("torchvision/resnet18"), example_input=(3, 128, 256)).sites]
    assert stages == [1, 1, 2, 2, 3, 3, 4, 4]


class Writes(nn.Module):
    """A residual block whose forward does something beside computing its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[object] = []
        self.log: dict[str, object] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x)))
        self.note(y)
        return torch.relu(x + y)

    def note(self, y: Tensor) -> None:
        raise NotImplementedError


class KeepsAMean(Writes):
    def note(self, y: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * y.mean((0, 2, 3))


class Appends(Writes):
    def note(self, y: Tensor) -> None:
        self.seen.append(y)


class Logs(Writes):
    def note(self, y: Tensor) -> None:
        self.log["y"] = y


class SetsAnAttribute(Writes):
    def note(self, y: Tensor) -> None:
        self.last = y


class CountsInTraining(Writes):
    def note(self, y: Tensor) -> None:
        if self.training:
            self.count += 1


class DrawsByItself(Writes):
    def note(self, y: Tensor) -> None:
        if self.training and torch.rand(()) < 0.5:
            self.skipped = True


@pytest.mark.parametrize(
    "block", [KeepsAMean, Appends, Logs, SetsAnAttribute, CountsInTraining, DrawsByItself], ids=lambda cls: cls.__name__
)
def test_a_forward_with_side_effects_is_refused_and_nothing_is_written(block):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block(), block())
    values = {key: value.clone() for key, value in model.state_dict().items()}
    assert find_se(model) == [] and plan_se(model).sites == ()
    with pytest.raises(SurgeryError, match=r"writes to self|random numbers"):
        add_se(model)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert type(model[1]) is block and model[1].seen == [] and model[1].log == {} and not hasattr(model[1], "last")
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 8, 14, 14)


@pytest.mark.parametrize(("name", "host"), [("toy/Functional", "blocks.0"), ("toy/FunctionalDropPath", "blocks.0")])
def test_a_forward_is_traced_once_where_it_does_not_ask_for_the_mode(name, host):
    model = build(name)
    anatomy = Anatomy(look(model))
    view, call = anatomy.block(host).view, anatomy.look.calls[host][0]
    evaluating, training = (anatomy.traced(view, call, "forward", mode) for mode in (False, True))
    asks = name == "toy/FunctionalDropPath"
    assert evaluating.modal is asks and (training is not evaluating) is asks
    assert anatomy.differs_in_training(host, "forward") is asks


MAP = torch.empty(2, 4, 6, 6)
# What looking does not compute, because the first argument will do; and what is alike only at first sight.
RESULTS = {
    "relu": (torch.relu, (MAP,), True),
    "sum": (torch.add, (MAP, MAP), True),
    "sum-in-place": (operator.iadd, (MAP, MAP), True),
    "sum-broadcast": (torch.add, (MAP[:, :1, :1, :1], MAP), False),
    "sum-promoted": (torch.add, (MAP.half(), MAP), False),
    "sum-of-number": (torch.add, (MAP, 1.0), False),
    "sum-expanded": (torch.add, (MAP[:, :, :1].expand_as(MAP), MAP[:, :, :1].expand_as(MAP)), False),
    "halved": (F.glu, (MAP, 1), False),
    "product": (torch.mul, (MAP, MAP), False),
}


@pytest.mark.parametrize("case", RESULTS.values(), ids=RESULTS)
def test_a_result_that_is_like_the_first_argument(case):
    function, args, alike = case
    method = Tensor.__iadd__ if function is operator.iadd else function
    result = function(*args)
    assert is_like_first(method, args) is alike
    assert not alike or (result.shape, result.stride(), result.dtype) == (MAP.shape, MAP.stride(), MAP.dtype)


AROUND = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another-default-device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_is_on_around_an_operation_is_not_its_business(around):
    model = build("resnet18", channels=(8, 16, 32, 64))
    before = run(model, images())
    with around():
        add_se(model, example_input=(3, 64, 64))
        report = verify(model, (3, 64, 64), thorough=False)
    assert {check.name: check.passed for check in report.checks}["gradients"] is True
    assert {(p.device.type, p.dtype, p.requires_grad) for p in model.parameters()} == {("cpu", torch.float32, True)}
    assert_same(run(model, images()), before)


class Switches(Writes):
    """Switches something for a part of its forward that a graph of it knows nothing of."""

    def __init__(self, around: Any) -> None:
        super().__init__()
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        with self.around():
            y = torch.relu(self.conv1(x))
        return torch.relu(x + self.conv2(y.to(x.dtype)))


class WithoutGradients(Writes):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


SWITCHES = {
    "no_grad": lambda: Switches(torch.no_grad),
    "inference_mode": lambda: Switches(torch.inference_mode),
    "set_grad_enabled": lambda: Switches(lambda: torch.set_grad_enabled(False)),
    "autocast": lambda: Switches(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "no-autocast": lambda: Switches(lambda: torch.autocast("cpu", enabled=False)),
    "decorated": WithoutGradients,
}


@pytest.mark.parametrize("is_on", [True, False], ids=["gradients", "no-gradients"])
@pytest.mark.parametrize("block", SWITCHES.values(), ids=SWITCHES)
def test_a_forward_that_switches_gradients_or_autocast_is_refused(block, is_on):
    """In its graph the base would be trained where it was not, or run in another precision."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block())
    with torch.set_grad_enabled(is_on):
        plan = plan_se(model)
        assert plan.sites == () and torch.is_grad_enabled() is is_on
        assert any(skip.unit == "1" and "switches gradients or autocast" in skip.reason for skip in plan.skipped)
        with pytest.raises(PatientError, match="switches gradients or autocast"):
            add_se(model)


def test_other_threads_operate_and_run_and_draw_meanwhile():
    """torch.fx patches nn.Module for all of them while it traces."""
    stop, errors = threading.Event(), []
    runner = build("toy/Digits")
    expected = run(runner, images((1, 28, 28)))

    def goes_on(act: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                act()
        except Exception as error:
            errors.append(error)

    def operate() -> None:
        model = add_se(build("toy/Functional"))
        assert len(find_se(model)) == 2
        strip_se(model)

    others = (operate, lambda: assert_same([runner(images((1, 28, 28))).detach()], expected))
    threads = [threading.Thread(target=goes_on, args=(act,)) for act in others]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for _ in range(5):
            operate()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert errors == []
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"


def test_ses_are_not_made_in_inference_mode():
    model = build("resnet18")
    with torch.inference_mode(), pytest.raises(PatientError, match=r"Leave torch\.inference_mode"):
        add_se(model, example_input=(3, 64, 64))
    assert find_se(model, (3, 64, 64)) == []


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_without_a_classifier_the_last_maps_are_no_scores(name):
    """What the network puts out are then its last maps, pooled: their channels are its outputs."""
    with torch.device("meta"):
        planned = [plan_se(timm.create_model(name, num_classes=classes)) for classes in (10, 0)]
    assert planned[0].sites == planned[1].sites != ()


class Scaled(nn.Module):
    """It takes a number before its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x * scale))))


def test_a_number_may_come_before_the_images():
    assert len(plan_se(Scaled(), example_input=(torch.tensor(2.0), images((3, 32, 32)))).sites) == 2


# Convolutions and whether they have one filter a channel.
DEPTHWISE = {
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), True),
    "full": (nn.Conv2d(8, 8, 3), False),
    "to one map": (nn.Conv2d(8, 1, 3), False),
    "transposed, depthwise": (nn.ConvTranspose2d(8, 8, 2, groups=8), True),
    "transposed": (nn.ConvTranspose2d(8, 8, 2), False),
    "transposed, to one map": (nn.ConvTranspose2d(8, 1, 2), False),
}


@pytest.mark.parametrize("case", DEPTHWISE.values(), ids=DEPTHWISE)
def test_a_convolution_with_one_filter_a_channel(case):
    layer, is_depthwise = case
    (event,) = look(nn.Sequential(layer), (8, 16, 16)).events
    assert event.kind == "conv" and event.depthwise is is_depthwise and event.channels == 8


def test_a_transposed_convolution_to_one_map_makes_no_separable_unit():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2), nn.Conv2d(1, 8, 1), nn.ReLU()]
    plan = plan_se(nn.Sequential(*layers), heads=True, example_input=(3, 16, 16))
    assert [site.path for site in plan.sites] == ["1.se", "4.se"]


class Fails(SqueezeExcite):
    """An SE with a fault of its own."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a fault of the SE")


class FailsInside(SqueezeExcite):
    """An SE whose layer has a fault."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc1(x[:, :1])


@pytest.mark.parametrize(("fault", "words"), [(Fails, "a fault of the SE"), (FailsInside, "channel")])
def test_what_fails_in_an_se_is_not_the_inputs_fault(fault, words):
    model = add_se(build("resnet18", channels=(8, 16, 32, 64)), example_input=(3, 64, 64))
    model.layer3[0].se.__class__ = fault
    with pytest.raises(RuntimeError, match=words):
        find_se(model)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyboardInterrupt, SurgeryError])
def test_what_no_other_input_would_help_against_comes_through(error):
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("of the kind")

    with pytest.raises(error, match="of the kind"):
        find_se(nn.Sequential(nn.Conv2d(3, 8, 3), Raises()))


class Kept:
    """A small object that keeps what a hook is given."""

    def __init__(self) -> None:
        self.maps: dict[str, Any] = {}

    def note(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.maps[name] = output

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.maps["skip"] = output


class Unet(nn.Module):
    """A network that takes its skip connection from what a hook has left."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build("resnet18", channels=(8, 16, 32, 64), num_classes=0, global_pool="")
        self.up = nn.Conv2d(64 + 8, 4, 1)
        self.kept = Kept()

    def forward(self, x: Tensor) -> Tensor:
        deep, skip = self.body(x), self.kept.maps.pop("skip")
        return self.up(torch.cat([F.interpolate(deep, size=skip.shape[2:]), skip], 1))


LEFT: dict[str, Any] = {}


def leaves_in_a_global(module: nn.Module, args: Any, output: Tensor) -> None:
    LEFT["skip"] = output


def before(model: Unet) -> None:
    model.body.layer2.register_forward_pre_hook(lambda module, args: model.kept.maps.update(skip=args[0]))


def with_kwargs(model: Unet) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        model.kept.maps["skip"] = output

    model.body.layer1.register_forward_hook(hook, with_kwargs=True)


def of_a_child(model: Unet) -> None:
    """The hook gives another output, which the forward of the child does not make."""
    model.body.layer1[1].register_forward_hook(lambda module, args, output: output * 0.5)
    model.body.layer1.register_forward_hook(model.kept)


HOOKS = {
    "closure": lambda m: m.body.layer1.register_forward_hook(lambda *given: m.kept.maps.update(skip=given[-1])),
    "bound method": lambda m: m.body.layer1.register_forward_hook(functools.partial(m.kept.note, "skip")),
    "object": lambda m: m.body.layer1.register_forward_hook(m.kept),
    "default": lambda m: m.body.layer1.register_forward_hook(
        lambda module, args, output, maps=m.kept.maps: maps.update(skip=output)
    ),
    "before": before,
    "with keywords": with_kwargs,
    "of a child": of_a_child,
}


@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "has run"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_forward_that_needs_its_hooks_is_looked_at_with_them(hook, has_run):
    model = Unet()
    hook(model)
    randomise(model).eval()
    x = images()
    expected = run(model, x)
    model.kept.maps.clear()
    if has_run:
        model.kept.maps["old"] = x
    held = dict(model.kept.maps)
    add_se(model, example_input=(3, 64, 64))
    assert model.kept.maps == held
    assert [site.path for site in find_se(model, (3, 64, 64))] == [
        f"body.layer{stage}.{block}.se" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert_same(run(model, x), expected)


def test_a_hook_that_cannot_be_bound_to_a_copy_is_named():
    model = Unet()
    model.body.layer1.register_forward_hook(leaves_in_a_global)
    with pytest.raises(ProbeError, match=r"'body\.layer1' \(leaves_in_a_global\) cannot run .* the global 'LEFT'"):
        plan_se(model, example_input=(3, 64, 64))
    assert LEFT == {}


def test_hooks_of_a_model_that_does_without_them_do_not_run():
    model, seen = build("resnet18", channels=(8, 16, 32, 64)), []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output))
    assert len(plan_se(model, example_input=(3, 64, 64)).sites) == 8 and seen == []


# ---------------------------------------------------------------------------------------- what to look at a model with


class Says(nn.Module):
    """A classifier that takes one size alone, and says in some way which."""

    def __init__(self, channels: int, size: tuple[int, ...], **said: Any) -> None:
        super().__init__()
        conv = nn.Conv3d if len(size) == 3 else nn.Conv2d
        self.stem = conv(channels, 4, 3, padding=1)
        self.conv1, self.conv2 = conv(4, 4, 3, padding=1), conv(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * math.prod(size), 2)
        vars(self).update(said)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.flatten(x + self.conv2(F.relu(self.conv1(x))), 1))


class SaysOfItsClass(Says):
    input_size = (3, 44, 52)


class Rearranges(Says):
    """Positions become channels before the first convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pixel_unshuffle(x, 2))


class NeedsMultiples(nn.Module):
    """A segmentation network: its stages are added up again, which wants sides that can be halved, and many of them."""

    def __init__(self, least: int, multiple: int, exact: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.least, self.multiple, self.exact = least, multiple, exact

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if side % self.multiple or side < self.least or (self.exact and side != self.least):
            raise RuntimeError("the wrong size")
        x = self.stem(x)
        return x + self.conv2(F.relu(self.conv1(x)))


SAID: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "an int": (lambda: Says(3, (72, 72), in_size=72), (2, 3, 72, 72)),
    "a pair": (lambda: Says(1, (40, 72), input_size=(40, 72)), (2, 1, 40, 72)),
    "a list": (lambda: Says(3, (40, 72), img_size=[40, 72]), (2, 3, 40, 72)),
    "channels and sides": (lambda: Says(5, (36, 40), image_size=(5, 36, 40)), (2, 5, 36, 40)),
    "channels last": (lambda: Says(5, (36, 40), input_shape=(36, 40, 5)), (2, 5, 36, 40)),
    "a configuration": (
        lambda: Says(3, (76, 76), config=types.SimpleNamespace(image_size=76, num_channels=3)),
        (2, 3, 76, 76),
    ),
    "a dict": (lambda: Says(2, (76, 80), cfg={"input_size": (2, 76, 80)}), (2, 2, 76, 80)),
    "timm's": (lambda: Says(3, (76, 76), default_cfg={"input_size": (3, 76, 76)}), (2, 3, 76, 76)),
    "its class": (lambda: SaysOfItsClass(3, (44, 52)), (2, 3, 44, 52)),
    "a channel of its own": (lambda: Rearranges(20, (22, 22), in_channels=5, img_size=44), (2, 5, 44, 44)),
    "what it says is of another net": (lambda: Says(3, (28, 28), input_size=9, in_channels=64), (2, 3, 28, 28)),
    "volumes": (lambda: Says(1, (12, 20, 20), img_size=(12, 20, 20)), (2, 1, 12, 20, 20)),
    "a cube": (lambda: Says(1, (20, 20, 20), in_size=20), (2, 1, 20, 20, 20)),
    "channels and a volume": (lambda: Says(2, (8, 20, 24), input_size=(2, 8, 20, 24)), (2, 2, 8, 20, 24)),
    "nonsense": (lambda: Says(3, (32, 32), input_size="large", img_size=(0, -1), in_size=True), (2, 3, 32, 32)),
    "multiples of 32": (lambda: NeedsMultiples(256, 32), (2, 3, 256, 256)),
    "480 pixels": (lambda: NeedsMultiples(480, 480), (2, 3, 480, 480)),
    "473 pixels": (lambda: NeedsMultiples(473, 1, exact=True), (2, 3, 473, 473)),
}


@pytest.mark.parametrize("case", SAID)
def test_a_model_is_asked_what_it_takes(case):
    make, shape = SAID[case]
    model = make()
    seen = look(model)
    assert tuple(seen.args[0].shape) == shape
    assert len(plan_se(model).sites) == 1


MAPS = torch.empty(2, 8, 9, 7, device="meta")
WORKED_OUT = {
    "convolution": (F.conv2d, (MAPS, torch.empty(16, 8, 3, 3), None, (2, 1), (1, 0)), {}),
    "with a bias": (F.conv2d, (MAPS, torch.empty(16, 8, 3, 3), torch.empty(16)), {}),
    "padded by name": (F.conv2d, (MAPS, torch.empty(8, 1, 3, 3)), {"padding": "same", "groups": 8}),
    "of videos": (F.conv3d, (torch.empty(2, 4, 5, 9, 7), torch.empty(6, 4, 3, 3, 3), None, 2, 1), {}),
    "transposed": (F.conv_transpose2d, (MAPS, torch.empty(8, 4, 2, 2), None, 2), {}),
    "settings in a list": (F.conv2d, (MAPS, torch.empty(16, 8, 3, 3), None, [2, 2]), {}),
    "linear": (F.linear, (MAPS, torch.empty(5, 7)), {}),
    "mean": (torch.mean, (MAPS, (2, 3)), {"keepdim": True}),
    "mean of everything": (Tensor.mean, (MAPS,), {}),
    "mean in another dtype": (Tensor.mean, (MAPS, 1), {"dtype": torch.float64}),
    "gate": (torch.mul, (MAPS, torch.empty(2, 8, 1, 1)), {}),
    "gate in front": (torch.mul, (torch.empty(2, 8, 1, 1), MAPS), {}),
    "expanded gate": (torch.mul, (torch.empty(2, 8, 1, 1).expand(2, 8, 9, 7), MAPS), {}),
    "pool": (F.max_pool2d, (MAPS, 3), {"stride": 2, "padding": 1}),
    "pool with places": (F.max_pool2d, (MAPS, 3), {"return_indices": True}),
    "adaptive pool": (F.adaptive_avg_pool2d, (MAPS, 1), {}),
    "whole numbers": (torch.add, (torch.empty(3, dtype=torch.int64), 1), {}),
    "whole numbers and another": (torch.add, (torch.empty(3, dtype=torch.int64), 1.0), {}),
    "whole numbers and a truth": (torch.add, (torch.empty(3, dtype=torch.bool), True), {}),
    "layer norm": (F.layer_norm, (MAPS, (9, 7), None, None, 1e-5), {}),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("case", WORKED_OUT)
def test_what_is_worked_out_once_for_equal_calls_is_what_torch_says(case, dtype, memory_format):
    function, args, kwargs = WORKED_OUT[case]

    def changed(value):
        if not isinstance(value, Tensor):
            return value
        value = value.to("meta", dtype if value.is_floating_point() else None)
        return value.to(memory_format=memory_format) if value.dim() == 4 else value

    first, *rest = map(changed, args)
    for one in (first, first[:1], first[..., ::2], first.double()):
        want = form_of(lambda one=one: function(one, *rest, **kwargs))
        for _ in range(2):
            assert form_of(lambda one=one: worked_out(function, (one, *rest), kwargs)) == want


def test_what_is_worked_out_is_a_tensor_of_its_own_each_time():
    gate = torch.empty(2, 8, 1, 1, device="meta")
    made = [worked_out(torch.mul, (MAPS, gate), {}) for _ in range(2)]
    assert made[0] is not made[1] and made[0].untyped_storage()._cdata != made[1].untyped_storage()._cdata


GIVEN = {
    "plain": torch.zeros(2, 8, 9, 7),
    "channels last": torch.zeros(2, 8, 9, 7).to(memory_format=torch.channels_last),
    "expanded": torch.zeros(2, 8, 1, 1).expand(2, 8, 9, 7),
    "part": torch.zeros(2, 8, 9, 7)[:, ::2, 1:],
    "number": torch.tensor(3),
    "half": torch.zeros(4, dtype=torch.float16),
    "parameter": nn.Parameter(torch.zeros(4, 3)),
    "sparse": torch.eye(3).to_sparse(),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_tensor_like_another_is_what_torch_makes_of_it(given):
    want = form_of(lambda: torch.empty_like(given, device="meta", requires_grad=False))
    assert form_of(lambda: like(given)) == want


def form_of(work):
    """The form of a tensor, or of several, or the error's class."""
    try:
        made = work()
    except (RuntimeError, TypeError) as error:
        return type(error)
    if isinstance(made, tuple):
        return [form_of(lambda one=one: one) for one in made]
    return made.shape, made.stride(), made.dtype, made.device, made.requires_grad
