"""What a rewritten forward was written for is checked when it runs: an attribute that has changed since is an error.

And what changes on purpose after surgery (re-parameterised branches, flags to recompute) still works.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import timm
import torch
import toys
from patients import assert_differs, assert_same, build, calls, copied, images, run
from timm.models import FeatureListNet
from torch import Tensor, nn

from se_surgery import SqueezeExcite, SurgeryError, add_se, strip_se


class Switched(nn.Module):
    """A residual block that goes by plain attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = toys.conv(8, 8), nn.ReLU()
        self.extra = None
        self.scale = 1.0
        self.times = 1
        self.mode = "plain"
        self.flag = False
        self.sizes = (1, 1)
        self.unread = 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        if self.extra is not None:
            y = self.extra(y)
        if self.mode == "double" or self.flag:
            y = y * 2
        for _ in range(self.times):
            y = y * self.scale
        return x + nn.functional.avg_pool2d(y, self.sizes)


def switched() -> nn.Module:
    return add_se(nn.Sequential(toys.conv(3, 8), Switched()).eval(), example_input=(3, 16, 16))


CHANGES = {
    "a module where there was None": ("extra", nn.Identity()),
    "another float": ("scale", 0.5),
    "an int of another value": ("times", 2),
    "another string": ("mode", "double"),
    "another flag": ("flag", True),
    "another tuple": ("sizes", (3, 3)),
    "a parameter where there was None": ("extra", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_attribute_that_changed_is_an_error_and_not_ignored(change):
    name, value = CHANGES[change]
    model = switched()
    (before,) = run(model, images((3, 16, 16)))
    was = getattr(model[1], name)
    setattr(model[1], name, value)
    with pytest.raises(SurgeryError, match=rf"'{name}' of this Switched was .* Set it first"):
        model(images((3, 16, 16)))
    if isinstance(value, (nn.Module, nn.Parameter)):
        delattr(model[1], name)
    setattr(model[1], name, was)
    assert_same(run(model, images((3, 16, 16))), [before])


class Optional(nn.Module):
    """A residual block with arguments that the model leaves to their defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = toys.conv(8, 8), nn.ReLU()

    def forward(
        self, x: Tensor, scale: float = 2.0, extra: Tensor | None = None, *rest: Tensor, **more: float
    ) -> Tensor:
        y = self.act(self.conv(x)) * scale * more.get("gain", 1.0)
        for one in (extra, *rest):
            if one is not None:
                y = y + one
        return x + y


LEFT_OUT = {
    "a number": ((), {"scale": 3.0}),
    "a tensor for a number": ((), {"scale": torch.ones(8, 1, 1)}),
    "a tensor for None": ((), {"extra": torch.ones(1)}),
    "one more": ((2.0, None, torch.ones(1)), {}),
    "a keyword more": ((), {"gain": 3.0}),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_an_argument_that_the_model_never_gives_is_an_error_and_not_ignored(case):
    base = nn.Sequential(toys.conv(3, 8), Optional()).eval()
    model = add_se(copied(base), example_input=(3, 16, 16))
    x = torch.randn(2, 8, 4, 4)
    args, kwargs = LEFT_OUT[case]
    with torch.no_grad():
        assert torch.equal(model[1](x), base[1](x)) and torch.equal(model[1](x, 2.0, extra=None), base[1](x))
        assert not torch.equal(base[1](x, *args, **kwargs), base[1](x))
    with pytest.raises(SurgeryError, match="was operated on for calls with another"):
        model[1](x, *args, **kwargs)


def test_attributes_that_are_not_read_may_change():
    model = switched()
    model[1].unread = 4
    model[1].training = True
    run(model, images((3, 16, 16)))


def test_the_remedy_works():
    base = nn.Sequential(toys.conv(3, 8), Switched()).eval()
    model = add_se(copied(base), example_input=(3, 16, 16))
    strip_se(model, origin="se_surgery", example_input=(3, 16, 16))
    base[1].mode = model[1].mode = "double"
    add_se(model, example_input=(3, 16, 16))
    assert_same(run(model, images((3, 16, 16))), run(base, images((3, 16, 16))))


def test_copies_and_pickles_keep_the_checks():
    for model in (copy.deepcopy(switched()), pickle.loads(pickle.dumps(switched()))):
        model[1].flag = True
        with pytest.raises(SurgeryError, match="'flag'"):
            model(images((3, 16, 16)))


def test_the_new_child_is_no_change():
    """`se` is None in a timm block, and the SE takes that place."""
    model = add_se(build("resnet18"))
    assert "self.se is" not in inspect.getsource(type(model.layer1[0]).forward)
    run(model, images())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnetx_002", "mobilenetv2_035"])
def test_torchscript_still_compiles(name):
    model = add_se(build(name), init="paper")
    with pytest.warns(FutureWarning) if torch.__version__ >= "2.10" else pytest.MonkeyPatch.context():
        scripted = torch.jit.script(model)
    assert_same(run(scripted, images()), run(model, images()))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121", "toy/Volumes", "toy/NHWC"])
def test_torch_fx_traces_an_operated_model(name):
    size = toys.Volumes.SIZE if name.startswith("toy/V") else toys.NHWC.SIZE if name.startswith("toy") else (3, 64, 64)
    base = build(name)
    model = add_se(copied(base), init="paper", example_input=size)
    traced = torch.fx.symbolic_trace(model)
    assert_same(run(traced, images(size)), run(model, images(size)))
    assert_differs(run(traced, images(size)), run(base, images(size)))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_reparameterise_before_and_after_surgery_come_to_the_same(name):
    base = build(name)
    after = timm.utils.reparameterize_model(add_se(copied(base)))
    before = add_se(timm.utils.reparameterize_model(copied(base)))
    assert [path for path, _ in after.named_parameters()] == [path for path, _ in before.named_parameters()]
    (one,), (other,) = run(after, images()), run(before, images())
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_list_of_one_tensor_and_the_tensor_itself():
    """SelecSLS's first block is given one by its network and the other by timm's feature extractor."""
    base = build("selecsls42", num_classes=3)
    model = add_se(copied(base))
    assert "isinstance(x, torch.Tensor)" in inspect.getsource(type(model.features[0]).forward)
    flat = functools.partial(FeatureListNet, out_indices=range(len(base.feature_info)), flatten_sequential=True)
    assert_same(run(flat(model), images()), run(flat(copied(base)), images()))
    with pytest.raises(SurgeryError, match="another 'x' than 3 items"):
        model.features[0]([images()] * 3)


@pytest.mark.parametrize("name", ["densenet121", "hgnet_tiny"])
@pytest.mark.parametrize("placement", ["standard", "pre", "inner"])
def test_gradient_checkpointing_after_surgery(name, placement):
    """A block that computes itself again on a flag still does, its SEs with it, to the same gradients."""
    model = add_se(build(name, num_classes=3), placement, existing="stack", init="paper").train()
    state = copy.deepcopy(model.state_dict())
    paths = [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]

    def step() -> tuple[Tensor, list[Tensor], dict[str, int]]:
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(0)
        with calls(model, paths, begun=True) as counts:
            out = model(images())
            out.square().sum().backward()
        return out.detach(), [parameter.grad.clone() for parameter in model.parameters()], dict(counts)

    out, gradients, once = step()
    model.set_grad_checkpointing(True)
    again, recomputed, twice = step()
    assert set(once.values()) == {1}
    # The gate on what a block returns is outside of what timm's DenseLayer computes again; and a recomputation ends as
    # soon as it has what the backward pass needs.
    assert max(twice.values()) == (1 if name == "densenet121" and placement != "pre" else 2)
    assert_same([again], [out])
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
