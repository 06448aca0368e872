"""With timm's options, surgery on timm's ResNets gives timm's own SE networks: keys, weights, outputs, gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from patients import assert_same, build, copied, images, run
from torch import nn

from se_surgery import add_se
from se_surgery.se import lean

PAIRS = {"resnet18": "seresnet18", "resnet50": "seresnet50", "resnext50_32x4d": "seresnext50_32x4d"}


@functools.lru_cache(maxsize=1)
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The operated network and timm's, with timm's weights in both; tests only look at them."""
    theirs = build(PAIRS[name])
    ours = add_se(build(name), bias=True, rd_divisor=8, init="paper")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module", params=PAIRS)
def networks(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return pair(request.param)


def test_same_keys_shapes_dtypes_and_order(networks):
    ours, theirs = ([(key, t.shape, t.dtype) for key, t in model.state_dict().items()] for model in networks)
    assert ours == theirs


def test_same_order_of_parameters(networks):
    """What an optimizer's saved state goes by."""
    ours, theirs = ([name for name, _ in model.named_parameters()] for model in networks)
    assert ours == theirs


@pytest.mark.parametrize("name", PAIRS)
def test_strict_load_both_ways(name):
    ours, theirs = add_se(build(name), bias=True, rd_divisor=8, init="paper"), build(PAIRS[name])
    mine = {key: value.clone() for key, value in ours.state_dict().items()}
    theirs.load_state_dict(mine, strict=True)
    assert_same(run(theirs, images()), run(ours, images()))
    fresh = build(PAIRS[name])
    ours.load_state_dict(fresh.state_dict(), strict=True)
    assert_same(run(ours, images()), run(fresh, images()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_bit_identical_outputs(networks, training):
    ours, theirs = networks
    assert_same(run(ours, images(), training), run(theirs, images(), training))


def gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Those of a training step, of the images and of every parameter; the model's statistics go along."""
    model = copied(model).to(dtype).train()
    x = images().to(dtype).requires_grad_()
    torch.manual_seed(0)
    model(x).square().mean().backward()
    found = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    assert all(grad.isfinite().all() and grad.any() for grad in found.values())
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_bit_identical_gradients(name):
    """In the plain form, operation for operation."""
    theirs = pair(name)[1]
    plain = add_se(build(name), bias=True, rd_divisor=8, init="paper", lean=False)
    plain.load_state_dict(theirs.state_dict(), strict=True)
    mine, wanted = gradients(plain, torch.float32), gradients(theirs, torch.float32)
    assert mine.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(mine[key], wanted[key])] == []


def test_equal_gradients_in_the_lean_form(networks, monkeypatch):
    """What the lean form makes again is the forward's map, bit for bit, and so are its gradients."""
    made = []
    scale = lean._Scale.apply
    monkeypatch.setattr(lean._Scale, "apply", lambda *args: made.append(args) or scale(*args))
    mine, wanted = (gradients(model, torch.float64) for model in networks)
    assert len(made) == len([name for name in wanted if name.endswith("se.fc1.weight")])
    assert mine.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(mine[key], wanted[key])] == []
