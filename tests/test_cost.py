"""Parameters and multiply-adds, against the paper's figures and against numbers worked out by hand."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from se_surgery import ProbeError, add_se, plan_se
from se_surgery.cost import multiply_adds, parameters


class Small(nn.Module):
    """On 3 x 10 x 10: a convolution to 4 x 8 x 8 and a linear layer to 5."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


CONV, FC = 4 * 8 * 8 * 3 * 3 * 3, 4 * 5


def test_small_network_by_hand():
    # conv 4 x 3 x 3 x 3 + 4, norm 2 x 4, linear 4 x 5 + 5; then a mean and a variance a channel.
    assert parameters(Small()) == (112 + 8 + 25, 112 + 8 + 25 + 8)
    assert multiply_adds(Small(), (3, 10, 10)) == CONV + FC
    # The same for an input of any batch.
    assert multiply_adds(Small(), torch.zeros(5, 3, 10, 10)) == CONV + FC
    assert multiply_adds(Small(), (torch.zeros(1, 3, 10, 10),)) == CONV + FC


def test_se_costs_two_layers_and_the_scale():
    model = add_se(Small(), rd_channels=2, example_input=(3, 10, 10))
    assert multiply_adds(model, (3, 10, 10)) == CONV + FC + 2 * 4 * 2 + 4 * 8 * 8
    assert parameters(model)[0] == parameters(Small())[0] + 2 * 4 * 2


def test_frozen_parameters_count_and_shared_ones_once():
    model = Small()
    model.conv.weight.requires_grad_(False)
    model.again = model.conv
    assert parameters(model) == (145, 153)


# Paper, tables 2 and 3: the printed figures, in millions, differ by what SE adds, each rounded to its last digit.
PAPER = [
    # name, with SE, what our own count says SE adds, the paper's printed difference and the rounding of two figures
    ("resnet50", 8_034_304, 10e6, 10e6),
    ("resnet152", 19_724_288, 20e6, 10e6),
    ("vgg16_bn", 13_773_824, 10e6, 10e6),
    ("mobilenetv1_100", 3_189_248, 3e6, 1e6),
]


@pytest.mark.parametrize(("name", "added", "printed", "rounding"), PAPER)
def test_what_se_adds(name, added, printed, rounding):
    model = timm.create_model(name)
    plan, before = plan_se(model), multiply_adds(model)
    add_se(model)
    assert multiply_adds(model) - before == plan.macs_added == added
    assert abs(added - printed) <= rounding


def test_base_networks():
    # The paper's figures where it has the same network: VGG-16 15.47 G, MobileNet 569 M.
    assert multiply_adds(timm.create_model("vgg16_bn")) == 15_470_264_320
    assert multiply_adds(timm.create_model("mobilenetv1_100")) == 568_740_352
    assert multiply_adds(torchvision.models.resnet50(), (3, 224, 224)) == 4_089_184_256


def test_table_10_counts_running_statistics():
    assert parameters(timm.create_model("resnet50")) == (25_557_032, 25_557_032 + 53_120)


def test_native_ses_cost_what_ours_do():
    ours = add_se(timm.create_model("resnet18"), bias=True, rd_divisor=8, init="paper")
    theirs = timm.create_model("seresnet18")
    assert multiply_adds(ours) == multiply_adds(theirs) > multiply_adds(timm.create_model("resnet18"))


def test_model_is_left_as_found():
    model = add_se(timm.create_model("test_resnet")).train()
    model.layer1.eval()
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args))
    model.layer1.register_forward_pre_hook(lambda *args: seen.append(args))
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    multiply_adds(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not seen and not any(tensor.is_meta for tensor in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    assert multiply_adds(model) == multiply_adds(timm.create_model("test_resnet"))


def test_input_that_does_not_fit():
    with pytest.raises(ProbeError, match=r"does not run on .*1, 10, 10"):
        multiply_adds(Small(), (1, 10, 10))


def test_forward_that_needs_values():
    class Reader(Small):
        def forward(self, x):
            return super().forward(x if x.sum().item() < 1 else -x)

    with pytest.raises(ProbeError, match="Reader reads the values of its feature maps"):
        multiply_adds(Reader(), (3, 10, 10))
