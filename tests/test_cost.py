"""Parameters and multiply-adds, against the paper's figures and against numbers worked out by hand."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from se_surgery import ProbeError, add_se, count_costs, find_se, plan_se
from se_surgery.measuring.cost import Count, multiply_adds, parameters
from se_surgery.se.excite import LIGHT_ATTENTION


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


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
    model = on_meta(name)
    plan, before = plan_se(model), multiply_adds(model)
    add_se(model)
    assert multiply_adds(model) - before == plan.macs_added == added
    assert abs(added - printed) <= rounding


def test_base_networks():
    # The paper's figures where it has the same network: VGG-16 15.47 G, MobileNet 569 M.
    assert multiply_adds(on_meta("vgg16_bn")) == 15_470_264_320
    assert multiply_adds(on_meta("mobilenetv1_100")) == 568_740_352
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


# ------------------------------------------------------------------------------------------------------- part by part


def resnet18_by_hand():
    """Stem, four stages of two blocks of two 3x3 convolutions, head. A stage's first block widens, from the second on
    with half the resolution and a 1x1 convolution in its shortcut."""
    costs = {"stem": Count(64 * 147 + 128, 128, 64 * 112**2 * 147, 64 * 112**2)}
    before = 64
    for stage, channels, side in ((1, 64, 56), (2, 128, 28), (3, 256, 14), (4, 512, 7)):
        taps = [9 * before, 9 * channels, 9 * channels, 9 * channels, *([before] if stage > 1 else [])]
        costs[f"stage {stage}"] = Count(
            parameters=channels * sum(taps) + 2 * channels * len(taps),
            statistics=2 * channels * len(taps),
            multiply_adds=channels * side**2 * sum(taps),
            activations=channels * side**2 * len(taps),
        )
        before = channels
    costs["head"] = Count(512 * 1000 + 1000, 0, 512 * 1000, 1000)
    return costs


def test_each_part_of_resnet18_by_hand():
    model = on_meta("resnet18")
    costs = count_costs(model)
    assert costs.image == (3, 224, 224)
    assert costs.base == costs.parts == resnet18_by_hand()
    assert (costs.whole.parameters, costs.whole.parameters + costs.whole.statistics) == parameters(model)
    assert costs.whole.multiply_adds == multiply_adds(model)


@pytest.mark.parametrize("placement", ["standard", "post", "identity"])
def test_what_ses_cost_by_hand(placement):
    """Two of C -> C/16 -> C in every stage, and the map that they scale; the rest costs what it did."""
    costs = count_costs(add_se(on_meta("resnet18"), placement))
    assert costs.base == resnet18_by_hand()
    for stage, channels, side in ((1, 64, 56), (2, 128, 28), (3, 256, 14), (4, 512, 7)):
        layers, scaled = 2 * channels * channels // 16, channels * side**2
        assert costs.ses[f"stage {stage}"] == Count(
            2 * layers, 0, 2 * (layers + scaled), 2 * (channels // 16 + channels + scaled)
        )
    assert costs.ses["stem"] == costs.ses["head"] == Count()


def test_native_ses_are_told_from_the_rest():
    costs = count_costs(on_meta("seresnet18"))
    assert costs.base == resnet18_by_hand()
    assert sum(costs.ses.values(), Count()).parameters == sum(site.params for site in find_se(on_meta("seresnet18")))


class Branching(nn.Module):
    """A stem, a residual unit whose branches are in a list, which does not run itself, and what never runs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.stem = nn.Conv2d(3, 4, 1)
        self.unit = Unit()
        self.fc = nn.Linear(4, 5)
        self.again = self.fc
        self.aux = nn.Sequential(nn.Conv2d(4, 7, 1), nn.BatchNorm2d(7))

    def forward(self, x):
        return self.fc(self.unit(self.stem(x) * self.scale).mean((2, 3)))


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 4, 1)])

    def forward(self, x):
        return x + self.branches[1](self.branches[0](x))


def test_lists_of_modules_shared_ones_and_what_does_not_run():
    costs = count_costs(Branching(), (3, 8, 8))
    assert costs.parts == {
        "stem": Count(4 * 3 + 4 + 1, 0, 64 * 4 * 3, 64 * 4),
        "stage 1": Count(16 * 9 + 4 + 16 + 4, 0, 64 * (16 * 9 + 16), 2 * 64 * 4),
        "head": Count(4 * 5 + 5, 0, 4 * 5, 5),
        "not run": Count(4 * 7 + 7 + 14, 14, 0, 0),
    }


@pytest.mark.parametrize("name", ["test_resnet", "shufflenet_g3", "test_efficientnet"])
def test_the_plan_says_what_will_be_counted(name):
    model = on_meta(name)
    before, plan = count_costs(model), plan_se(model, existing="replace", r=8)
    add_se(model, existing="replace", r=8)
    after = count_costs(model)
    assert list(after.parts) == list(before.parts) and after.base == before.base
    assert after.whole == before.whole + Count(plan.params_added, 0, plan.macs_added, plan.activations_added)
    assert f"{plan.activations_added:,} ({plan.activations_added / 1e6:.2f} M) activations." in str(plan)


@pytest.mark.parametrize("attn", LIGHT_ATTENTION)
def test_other_attention_is_planned_as_it_is_counted(attn):
    model = on_meta("test_resnet")
    plan = plan_se(model, attn=attn)
    found = find_se(add_se(model, attn=attn))
    added = sum(count_costs(model).ses.values(), Count())
    assert added == Count(plan.params_added, added.statistics, plan.macs_added, plan.activations_added)
    assert [site.activations for site in plan.sites] == [site.activations for site in found]


def test_costs_as_tables():
    text = str(count_costs(add_se(on_meta("resnet18"))))
    assert text.startswith("For one image of 3 x 224 x 224\n\nParameters\n")
    lines = [line.split() for line in text.splitlines()]
    assert ["stem", "9,536", "9,536"] in lines
    assert ["stage", "1", "147,968", "+1,024", "148,992", "+0.69%"] in lines
    assert ["whole", "11,689,512", "+87,040", "11,776,552", "+0.74%"] in lines
    assert ["with", "running", "statistics", "11,699,112", "+87,040", "11,786,152", "+0.74%"] in lines
    assert ["stage", "4", "411,041,792", "+115,712", "411,157,504", "+0.03%"] in lines
    assert ["head", "1,000", "1,000"] in lines
