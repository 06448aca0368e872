"""Operated models compiled by torch.compile's own backend, in full graphs, for inference and for training.

It takes minutes and a C++ compiler, and so belongs to the sweep; `verify` compiles any model with aot_eager.
"""

from __future__ import annotations

import pytest
import torch
from patients import build, copied, images
from torch import nn

from se_surgery import SqueezeExcite, add_se

NAMES = (
    "resnet18",
    "regnetx_002",
    "mobilenetv2_035",
    "convnext_atto",
    "repvgg_a0",
    "torchvision/shufflenet_v2_x0_5",
)


def opened(model: nn.Module) -> nn.Module:
    """Gates away from one; the paired rows of the first layers stay, so that no SE is closed to all images."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.normal_(module.fc2.weight)
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_inductor(name, training):
    torch.compiler.reset()
    # In float64: with two images, batch normalisation makes much of another order of the same arithmetic.
    model = opened(add_se(build(name, num_classes=5))).double().train(training)
    x, compiled = images().double(), torch.compile(copied(model), fullgraph=True)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-8, atol=1e-10)
        return
    expected, found = model(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    expected.square().sum().backward()
    found.square().sum().backward()
    ses = [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]
    for path in ses:
        for (key, mine), (_, theirs) in zip(
            model.get_submodule(path).named_parameters(),
            compiled.get_submodule(f"_orig_mod.{path}").named_parameters(),
            strict=True,
        ):
            assert mine.grad.abs().max() > 0
            error = (mine.grad - theirs.grad).abs().max() / mine.grad.abs().max()
            assert error < 1e-6, f"{path}.{key}: the gradient differs by {error:g} of its largest element"
