"""Forwards exchanged after surgery: the SEs are on the other way too, or it is refused and nothing changes."""

from __future__ import annotations

import copy
import functools
import gc
import linecache
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from patients import copied, differences, images, randomise, run, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import se_surgery
from se_surgery import SqueezeExcite, SurgeryError, VerifyError, add_se, find_se, plan_se, strip_se, verify

SIZE = (3, 16, 16)
# What the blocks are given.
INNER = (8, 16, 16)


def fused(block: nn.Module) -> nn.Conv2d:
    return fuse_conv_bn_eval(block.conv, block.bn)


class Plain(nn.Module):
    """What most of the forms below start from."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class OnInstance(Plain):
    """Ultralytics' Conv, but that it does so itself."""

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def deploy(self) -> None:
        self.conv = fused(self)
        del self.bn
        self.forward = self.forward_fuse


class FromOutside(OnInstance):
    """A function elsewhere exchanges the forward, and knows no other name for what is deleted."""

    def deploy(self) -> None:
        deploy_from_outside(self)


def deploy_from_outside(block: nn.Module) -> None:
    block.conv = fused(block)
    delattr(block, "bn")
    block.forward = block.forward_fuse


class OtherName(Plain):
    """The other forward's name says nothing of a forward."""

    def deployed(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def convert_to_deploy(self) -> None:
        self.conv = fused(self)
        self.__delattr__("bn")
        self.forward = self.deployed

    deploy = convert_to_deploy


class Asked(Plain):
    """RepVGG's own: the forward asks what is there."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam"):
            return self.act(self.reparam(x))
        return self.act(self.bn(self.conv(x)))

    def deploy(self) -> None:
        self.reparam = fused(self)
        del self.conv
        del self.bn


class Flagged(Plain):
    inference = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.inference = False

    def forward(self, x: Tensor) -> Tensor:
        if self.inference:
            return self.act(self.reparam(x))
        return self.act(self.bn(self.conv(x)))

    def deploy(self) -> None:
        self.reparam = fused(self)
        delattr(self, "conv")
        delattr(self, "bn")
        self.inference = True


class WithIdentity(Plain):
    """As torch.ao.quantization.fuse_modules does it."""

    def deploy(self) -> None:
        self.conv = fused(self)
        self.bn = nn.Identity()


class MadeLater(nn.Module):
    """Two branches become a convolution that is not there before: the other forward cannot be traced at surgery."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(inputs, outputs, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.one(x) + self.two(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def fuse_convs(self) -> None:
        self.conv = self.one
        self.conv.weight.data[:, :, 1:2, 1:2] += self.two.weight.data
        self.conv.bias.data += self.two.bias.data
        self.__delattr__("one")
        self.__delattr__("two")

    def deploy(self) -> None:
        self.fuse_convs()
        self.forward = self.forward_fuse


class Residual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.act(self.bn(self.conv(x))) + x)


class ResidualFused(Residual):
    def fuseforward(self, x: Tensor) -> Tensor:
        return torch.relu(self.act(self.conv(x)) + x)

    def deploy(self) -> None:
        self.conv = fused(self)
        del self.bn
        self.forward = self.fuseforward


class Steps(OnInstance):
    """The method that is called leaves the work to others."""

    def _switch(self) -> None:
        self.forward = self.forward_fuse

    def _fold(self) -> None:
        self.conv = fused(self)
        del self.bn

    def deploy(self) -> None:
        self._fold()
        self._switch()


KEEP = (
    OnInstance, FromOutside, OtherName, Asked, Flagged, WithIdentity, MadeLater, ResidualFused, Steps
)  # fmt: skip


class AnotherClass(Plain):
    def deploy(self) -> None:
        self.conv = fused(self)
        del self.bn
        self.__class__ = Bare


class Bare(AnotherClass):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class ByPartial(Plain):
    def deploy(self) -> None:
        self.conv = fused(self)
        del self.bn
        self.forward = functools.partial(bare, self)


class ByMethodType(Plain):
    def deploy(self) -> None:
        self.conv = fused(self)
        setattr(self, "forward", types.MethodType(bare, self))  # noqa: B010


def bare(block: nn.Module, x: Tensor) -> Tensor:
    return block.act(block.conv(x))


class Thrown(Plain):
    """Nothing is put in place of the forward: the class around it does, with a function of its own."""

    def deploy(self) -> None:
        self.conv = fused(self)
        del self.bn


class Returned(Plain):
    """RepViT's own: the parent puts what it returns in the block's place."""

    def fuse(self) -> nn.Module:
        return nn.Sequential(fused(self), self.act)

    def deploy(self) -> nn.Module:
        return self.fuse()


class Inside(Residual):
    """The SE sits in front of the addition, and what is deployed has no addition."""

    def forward_fuse(self, x: Tensor) -> Tensor:
        return torch.relu(self.merged(x))

    def deploy(self) -> None:
        self.merged = Merged(fused(self))
        self.forward = self.forward_fuse


class Merged(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) + x


REFUSE = (AnotherClass, ByPartial, ByMethodType, Thrown, Returned, Inside)


class Net(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = nn.Sequential(block(8, 8), block(8, 8), block(8, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def net(block: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(block), seed=1).eval()


def operated(block: type[nn.Module] = OnInstance, placement: str = "standard") -> nn.Module:
    """A net with SEs far from the identity."""
    return drawn(add_se(net(block), placement, r=2, init="paper", example_input=SIZE))


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for module in ses(model):
        for parameter in module.parameters():
            parameter.data.normal_(0.0, 0.5, generator=generator)
    return model


def ses(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, SqueezeExcite)]


def ran(model: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """What a model returns, and how often each of its SEs ran."""
    counts = dict.fromkeys(map(id, ses(model)), 0)

    def count(module: nn.Module, *_: Any) -> None:
        counts[id(module)] += 1

    handles = [module.register_forward_hook(count) for module in ses(model)]
    (out,) = run(model, x)
    for handle in handles:
        handle.remove()
    return out, list(counts.values())


def assert_gated(model: nn.Module, want: Tensor) -> None:
    got, counts = ran(model, images(SIZE))
    assert counts == [1] * len(counts) and counts
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- deployed by itself


@pytest.mark.parametrize(
    ("block", "placement"),
    [*((block, "standard") for block in KEEP), (ResidualFused, "post"), (ResidualFused, "inner"), (Inside, "post")],
)
def test_what_is_deployed_has_its_ses(block, placement):
    model = operated(block, placement)
    want, counts = ran(model, images(SIZE))
    (plain,) = run(net(block), images(SIZE))
    assert counts == [1, 1, 1] and not torch.allclose(want, plain, rtol=1e-2)
    for one in model.body:
        one.deploy()
    assert_gated(model, want)
    for again in (copied(model), pickle.loads(pickle.dumps(model))):
        assert_gated(again, want)


@pytest.mark.parametrize("block", REFUSE)
def test_what_would_lose_its_ses_is_refused_before_anything_is_changed(block):
    model = operated(block)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=r"would fold away what the forward of this operated .* operate again"):
        model.body[1].deploy()
    assert not differences(before, snapshot(model))


def test_a_class_that_has_a_forward_for_each_mode():
    class Modal(Plain):
        def forward_fast(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.__dict__.pop("forward", None)
            if not mode:
                self.forward = self.forward_fast
            return self

    model = drawn(add_se(randomise(Net(Modal), seed=1), r=2, init="paper", example_input=SIZE))
    model.training = False
    want, counts = ran(model, images(SIZE))
    assert counts == [1, 1, 1]
    model.eval()
    assert model.body[0].__dict__["forward"] == model.body[0].forward_fast
    out = model(images(SIZE))
    torch.testing.assert_close(out, want)
    model.train()
    assert "forward" not in model.body[0].__dict__


def test_a_property_in_the_place_of_a_forward_is_refused_at_surgery():
    class Choice(Plain):
        @property
        def forward(self) -> Callable[[Tensor], Tensor]:
            return self._fast if hasattr(self, "fast") else self._slow

        def _slow(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

        def _fast(self, x: Tensor) -> Tensor:
            return self.act(self.fast(x))

    model = net(Choice)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match="has no convolutional unit"):
        add_se(model, example_input=SIZE)
    reasons = [skip.reason for skip in plan_se(model, example_input=SIZE).skipped]
    assert any(reason.startswith("its forward is no function of its class") for reason in reasons)
    assert not differences(before, snapshot(model))


def test_methods_that_are_a_part_of_the_forward_stay_as_they_are():
    class Parts(Plain):
        def forward_conv(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.forward_conv(x))

        def forward_twice(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.forward(x), x

    model, base = operated(Parts), net(Parts)
    x = images(INNER)
    assert torch.equal(model.body[0].forward_conv(x), base.body[0].forward_conv(x))
    assert torch.equal(model.body[0].forward_twice(x)[0], model.body[0](x))
    assert_gated(model, run(model, images(SIZE))[0])


def test_a_forward_that_only_calls_another_method_is_gated_by_both_once():
    class Implemented(Plain):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

        def forward(self, x: Tensor) -> Tensor:
            return self._forward_impl(x)

    model = operated(Implemented)
    x = images(INNER)
    assert torch.equal(model.body[0]._forward_impl(x), model.body[0](x))
    assert not torch.equal(model.body[0](x), net(Implemented).body[0](x))
    assert_gated(model, run(model, images(SIZE))[0])


def test_blocks_that_share_an_activation_with_others():
    """As Ultralytics' Conv does, whose activation is an attribute of the class."""
    act = nn.SiLU(inplace=True)

    class First(OnInstance):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.act = act

    class Second(First):
        pass

    torch.manual_seed(0)
    both = nn.Sequential(First(3, 8), Second(8, 8), First(8, 8))
    model = drawn(add_se(randomise(both).eval(), r=2, example_input=SIZE))
    want, counts = ran(model, images(SIZE))
    assert counts == [1, 1, 1]
    for block in model:
        block.deploy()
    assert_gated(model, want)


def test_a_dense_layer_has_its_se_by_its_other_forward():
    class Layer(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(inputs), nn.ReLU()
            self.conv = nn.Conv2d(inputs, 4, 3, 1, 1)

        def forward(self, x: list[Tensor]) -> Tensor:
            return self.conv(self.act(self.bn(torch.cat(x, 1))))

        def forward_joined(self, x: list[Tensor]) -> Tensor:
            return self.conv(self.act(self.bn(torch.cat(x, dim=1))))

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 1, 1)
            self.layers = nn.ModuleList([Layer(8), Layer(12), Layer(16)])
            self.fc = nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            maps = [self.stem(x)]
            for layer in self.layers:
                maps.append(layer(maps))
            return self.fc(torch.cat(maps, 1).mean((2, 3)))

    torch.manual_seed(0)
    model = drawn(add_se(randomise(Dense()).eval(), r=2, example_input=SIZE))
    want, counts = ran(model, images(SIZE))
    assert counts == [1, 1, 1]
    for layer in model.layers:
        layer.forward = layer.forward_joined
    assert_gated(model, want)


# -------------------------------------------------------------------------------------------- put in place by others


class Wrapper:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def by_name(block: nn.Module) -> Callable[..., Any]:
    block.old_forward = block.forward
    return types.MethodType(lambda self, x: self.old_forward(x), block)


def by_key(block: nn.Module) -> Callable[..., Any]:
    block.old_forward = block.forward
    return functools.partial(lambda self, x: self.__dict__["old_forward"](x), block)


def by_weak_reference(block: nn.Module) -> Callable[..., Any]:
    old = weakref.WeakMethod(block.forward)
    return lambda x: old()(x)


def by_cell(block: nn.Module) -> Callable[..., Any]:
    old = block.forward
    return lambda x: old(x)


LEAD = {
    "itself": lambda b: b.forward,
    "checkpoint": lambda b: functools.partial(checkpoint, b.forward, use_reentrant=False),
    "a lambda": by_cell,
    "an attribute": by_name,
    "a key": by_key,
    "a weak reference": by_weak_reference,
    "its class": lambda b: types.MethodType(lambda self, x: type(self).forward(self, x), b),
    "its __class__": lambda b: types.MethodType(lambda self, x: self.__class__.forward(self, x), b),
    "its function": lambda b: types.MethodType(type(b).forward, b),
    "an object": lambda b: Wrapper(b.forward),
    "an object's method": lambda b: Wrapper(b.forward).__call__,
    "autocast": lambda b: torch.autocast("cpu", enabled=False)(b.forward),
    "no_grad": lambda b: torch.no_grad()(b.forward),
    "torch.compile": lambda b: torch.compile(b.forward, backend="eager"),
    "one's own, with the SE": lambda b: types.MethodType(lambda self, x: self.se(self.act(self.bn(self.conv(x)))), b),
    "wrapped twice": lambda b: functools.partial(Wrapper(by_cell(b))),
}


@pytest.mark.parametrize("how", LEAD)
def test_what_runs_the_forward_in_the_end_may_take_its_place(how):
    model = operated()
    (want,) = run(model, images(SIZE))
    for block in model.body:
        block.forward = LEAD[how](block)
    assert_gated(model, want)


ASTRAY = {
    "one's own": lambda b: types.MethodType(lambda self, x: self.act(self.bn(self.conv(x))), b),
    "a lambda": lambda b: lambda x: b.act(b.bn(b.conv(x))),
    "a partial": lambda b: functools.partial(bare, b),
    "the base's": lambda b: types.MethodType(OnInstance.forward, b),
    "the base's by name": lambda b: lambda x: OnInstance.forward(b, x),
    "by super": lambda b: types.MethodType(lambda self, x: super(type(self), self).forward(x), b),
    "its children's": lambda b: lambda x: b.act.forward(b.bn.forward(b.conv.forward(x))),
    "another block's": lambda b: copied(b).forward,
    "a module": lambda b: nn.Identity(),
    "nothing": lambda b: None,
}


@pytest.mark.parametrize("name", ["forward", "forward_fuse"])
@pytest.mark.parametrize("how", ASTRAY)
def test_what_does_not_is_refused(how, name):
    model = operated()
    value = ASTRAY[how](model.body[1])
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=rf"'{name}' of this operated OnInstance .* does not run its SE 'se'"):
        setattr(model.body[1], name, value)
    assert not differences(before, snapshot(model))


def test_a_root_that_holds_ses_is_no_exception():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 1, 1)
            self.conv, self.bn = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.fc(torch.relu(self.bn(self.conv(x)) + x).mean((2, 3)))

        def forward_fuse(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.fc(torch.relu(self.conv(x) + x).mean((2, 3)))

        def deploy(self) -> None:
            self.conv = fused(self)
            self.forward = self.forward_fuse

    torch.manual_seed(0)
    model = drawn(add_se(randomise(Whole()).eval(), example_input=SIZE))
    want, counts = ran(model, images(SIZE))
    assert counts == [1, 1]
    before = snapshot(model)
    for exchange in (model.deploy, lambda: setattr(model, "__class__", Whole)):
        with pytest.raises(SurgeryError):
            exchange()
    assert not differences(before, snapshot(model))
    model.forward = functools.partial(checkpoint, model.forward, use_reentrant=False)
    assert_gated(model, want)


# -------------------------------------------------------------------------------------------------------- its class


def test_a_class_below_the_generated_one_may_be_given_and_others_not():
    model = operated()
    want, _ = ran(model, images(SIZE))
    block = model.body[1]
    generated = type(block)
    block.__class__ = type("Below", (generated,), {})
    assert_gated(model, want)
    calls_super = {"forward": lambda self, x: super(type(self), self).forward(x)}
    block.__class__ = type("Calls", (generated,), calls_super)
    assert_gated(model, want)
    block.__class__ = generated
    for cls in (OnInstance, Bare, type("Other", (generated,), {"forward": bare})):
        with pytest.raises(SurgeryError, match="forward does not run its SE"):
            block.__class__ = cls
    assert type(block) is generated
    assert_gated(model, want)


def test_a_parametrization_comes_and_goes():
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    class Gained(Plain):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)) * self.gain)

    model = operated(Gained)
    want, _ = ran(model, images(SIZE))
    generated = type(model.body[0])
    for block in model.body:
        parametrize.register_parametrization(block, "gain", Halved())
    assert ran(model, images(SIZE))[1] == [1, 1, 1]
    for block in model.body:
        parametrize.remove_parametrizations(block, "gain", leave_parametrized=False)
    assert type(model.body[0]) is generated
    assert_gated(model, want)


def test_another_method_on_a_class_is_refused():
    class Patched(Plain):
        pass

    model = operated(Patched)
    want, _ = ran(model, images(SIZE))
    with pytest.raises(SurgeryError, match="which does not run their SEs"):
        type(model.body[0]).forward = bare
    assert_gated(model, want)
    Patched.forward = bare
    with pytest.raises(SurgeryError, match="'forward' of the class Patched was exchanged"):
        run(model, images(SIZE))
    # What is operated on now is operated on as it is now.
    fresh = operated(Patched)
    assert_gated(fresh, run(fresh, images(SIZE))[0])
    with pytest.raises(SurgeryError, match="was exchanged"):
        run(model, images(SIZE))


# ------------------------------------------------------------------------------------------------------ its children


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("how", ["deleted", "None"])
def test_a_child_that_went_is_named_when_the_forward_is_called(how, wrapped):
    model = operated()
    want, _ = ran(model, images(SIZE))
    block, bn = model.body[1], model.body[1].bn
    if wrapped:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if how == "deleted":
        del block.bn
        assert not hasattr(block, "bn") and getattr(block, "bn", 3) == 3
    else:
        block.bn = None
    for broken in (model, copied(model)):
        with pytest.raises(SurgeryError, match=r"forward of this operated OnInstance needs 'bn', which was taken out"):
            run(broken, images(SIZE))
    block.bn = bn
    assert_gated(model, want)
    assert ("forward" in block.__dict__) is wrapped


def test_a_child_that_the_way_in_use_does_not_need_may_go():
    model = operated()
    for block in model.body:
        block.conv = fused(block)
        block.bn = nn.Identity()
    want, _ = ran(model, images(SIZE))
    for block in model.body:
        block.forward = block.forward_fuse
        del block.bn
    assert_gated(model, want)
    del model.body[0].conv
    with pytest.raises(SurgeryError, match="needs 'conv'"):
        run(model, images(SIZE))


# ----------------------------------------------------------------------------------------------- what comes after it


def test_a_deployed_model_is_found_stripped_and_compiled():
    model = operated()
    for block in model.body:
        block.deploy()
    want, _ = ran(model, images(SIZE))
    assert [site.path for site in find_se(model, example_input=SIZE)] == [f"body.{i}.se" for i in range(3)]
    (compiled,) = run(torch.compile(model, fullgraph=True, backend="eager"), images(SIZE))
    torch.testing.assert_close(compiled, want)
    exported = torch.export.export(model, (images(SIZE),)).module()
    torch.testing.assert_close(exported(images(SIZE)), want)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(run(traced, images(SIZE))[0], want)
    base = net(OnInstance)
    for block in base.body:
        block.deploy()
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert type(model.body[0]) is OnInstance
    torch.testing.assert_close(run(model, images(SIZE)), run(base, images(SIZE)))


def test_a_wrapper_of_a_forward_has_to_go_before_the_ses():
    model = operated()
    model.body[1].forward = by_cell(model.body[1])
    before = snapshot(model)
    with pytest.raises(SurgeryError, match="Take that wrapper off first"):
        strip_se(model, origin="se_surgery", example_input=SIZE)
    assert not differences(before, snapshot(model))
    del model.body[1].forward
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert not ses(model)


def test_torch_fuses_modules_around_the_ses():
    model = operated()
    want, _ = ran(model, images(SIZE))
    names = [[f"body.{i}.conv", f"body.{i}.bn"] for i in range(3)]
    assert_gated(torch.ao.quantization.fuse_modules(copied(model), names), want)


def test_what_goes_past_the_block_is_seen_by_verify():
    """An entry of `__dict__` cannot be seen when it is made."""
    model = add_se(net(OnInstance), r=2, example_input=SIZE)
    model.body[1].__dict__["forward"] = functools.partial(bare, model.body[1])
    with pytest.raises(VerifyError):
        verify(model, SIZE, thorough=False)


@pytest.mark.parametrize(
    "put",
    [
        lambda blocks: functools.partial(bare, blocks[1]),
        lambda blocks: types.MethodType(OnInstance.forward, blocks[1]),
        lambda blocks: blocks[2].forward,
        lambda blocks: lambda x: x,
    ],
    ids=["another function", "the forward of before", "another block's", "nothing of it"],
)
def test_what_goes_past_the_block_has_no_recipe(put, tmp_path):
    model = add_se(net(OnInstance), r=2, example_input=SIZE)
    model.body[1].__dict__["forward"] = put(model.body)
    with pytest.raises(SurgeryError, match=r"body\.1.*does not run its SE"):
        se_surgery.recipe_of(model)
    with pytest.raises(SurgeryError, match=r"body\.1.*does not run its SE"):
        se_surgery.save_pretrained(model, tmp_path / "net", base=net(OnInstance))
    assert not (tmp_path / "net").exists()
    before = functools.partial(type(model.body[1]).forward, model.body[1])
    model.body[1].__dict__["forward"] = lambda x: before(x)
    assert se_surgery.recipe_of(model)["operations"]


def test_hooks_of_accelerate_go_around_a_forward():
    hooks = pytest.importorskip("accelerate.hooks")
    model = operated()
    want, _ = ran(model, images(SIZE))
    for block in model.body:
        hooks.add_hook_to_module(block, hooks.ModelHook())
        hooks.add_hook_to_module(block, hooks.ModelHook(), append=True)
    assert_gated(model, want)
    for block in model.body:
        hooks.remove_hook_from_module(block)
    assert_gated(model, want)


# --------------------------------------------------------------------------------------------------- nothing is kept


def test_a_class_of_ones_own_goes_with_its_last_model():
    class Own(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

    model = operated(Own)
    run(model, images(SIZE))
    kept, generated = weakref.ref(Own), weakref.ref(type(model.body[0]))
    lines = [name for name in linecache.cache if name.startswith("<se_surgery") and ".Own " in name]
    assert lines
    again = copy.deepcopy(model)
    assert type(again.body[0]) is type(model.body[0])
    del model, again, Own
    gc.collect()
    assert kept() is None and generated() is None
    assert not [name for name in lines if name in linecache.cache]


def test_equal_blocks_share_a_class():
    first, second = (add_se(timm.create_model("resnet18")) for _ in range(2))
    assert type(first.layer1[0]) is type(first.layer1[1]) is type(second.layer1[0])
    assert se_surgery.recipe_of(first) == se_surgery.recipe_of(second)
