"""Fine-tuning operated models: groups for optimizers, and bases that are held as they are while SEs learn."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import distributed_worker as worker
import numpy as np
import pytest
import timm.optim
import timm.scheduler
import torch
import toys
from patients import assert_same, build, differences, digest, images, run, snapshot
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from se_surgery import (
    NothingToDoError,
    OptionError,
    PatientError,
    add_se,
    apply_recipe,
    find_se,
    freeze_base,
    from_pretrained,
    param_groups,
    prune_se,
    recipe_of,
    save_pretrained,
    strip_se,
    unfreeze_base,
    verify,
)

SIZE = (3, 64, 64)
CHANNELS = (8, 16, 32, 64)


def base(name: str = "resnet18", **kwargs: Any) -> nn.Module:
    """A ResNet of one block a stage."""
    return build(name, layers=(1, 1, 1, 1), channels=CHANNELS, num_classes=4, **kwargs)


def operated(**options: Any) -> nn.Module:
    """The same with 4 SEs whose gates are open, so that gradients reach both layers."""
    return worker.open_gates(add_se(base(), r=4, example_input=SIZE, **options), 0)


def is_new(name: str) -> bool:
    return ".se" in name


# ----------------------------------------------------------------------------------------------------------- groups


def named(groups: list[dict[str, Any]]) -> dict[str, int]:
    return {group["name"]: len(group["params"]) for group in groups}


def test_groups_of_a_resnet() -> None:
    """Counted by hand: 13 convolutions and a head; a weight and a bias in 13 norms, and the head's; 2 layers an SE."""
    groups = param_groups(operated(), lr=0.1, se_lr=0.3, weight_decay=0.05)
    assert named(groups) == {"base": 14, "base, no decay": 27, "SEs": 8}
    assert [group["lr"] for group in groups] == [0.1, 0.1, 0.3]
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "base": 0.05,
        "base, no decay": 0.0,
        "SEs": 0.05,
    }
    assert named(param_groups(operated(bias=True), lr=0.1))["SEs, no decay"] == 8
    assert named(param_groups(base(), lr=0.1)) == {"base": 14, "base, no decay": 27}


def test_weight_decay_is_the_optimizers_own_where_none_is_given() -> None:
    optimizer = torch.optim.AdamW(param_groups(operated(), lr=0.1), weight_decay=0.07)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.0, 0.07]


def test_each_parameter_is_in_one_group_under_its_name() -> None:
    model = operated(bias=True)
    model.conv1.weight.requires_grad_(False)
    groups = param_groups(model, lr=0.1, layer_decay=0.5)
    found = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
    trained = {name: p for name, p in model.named_parameters() if name != "conv1.weight"}
    assert sum(map(len, (group["params"] for group in groups))) == len(trained)
    assert found.keys() == trained.keys() and all(found[name] is trained[name] for name in trained)
    assert all(is_new(name) is group["name"].startswith("SEs") for group in groups for name in group["param_names"])


class Odd(toys.Digits):
    """A normalisation of another rank, and a name that is not to be decayed."""

    class ChannelNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    def __init__(self) -> None:
        super().__init__()
        self.stem.append(self.ChannelNorm())
        self.gain = nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self) -> set[str]:
        return {"layers.*.conv1.weight", "gain"}


def test_what_is_not_decayed() -> None:
    groups = param_groups(Odd(), lr=0.1)
    decayed = [name for group in groups if "no decay" not in group["name"] for name in group["param_names"]]
    assert decayed == [
        "stem.0.weight",
        "layers.0.conv2.weight",
        "layers.1.conv2.weight",
        "layers.1.project.0.weight",
        "fc.weight",
    ]


def test_names_that_are_not_decayed_may_be_an_attribute() -> None:
    model = base()
    model.no_weight_decay = {"fc.weight"}  # type: ignore[assignment]
    groups = {group["name"]: group["param_names"] for group in param_groups(model, lr=0.1)}
    assert "fc.weight" in groups["base, no decay"] and "conv1.weight" in groups["base"]


def test_rates_may_be_numpys() -> None:
    assert {group["lr"] for group in param_groups(base(), lr=np.float32(0.5))} == {0.5}


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "convnext_atto", "mobilenetv2_035", "se_tv_resnet18"])
def test_layer_decay_is_timms_for_the_base_and_none_for_the_ses(name: str) -> None:
    """A VGG's SEs hang on activations, which have no layer in timm's count: the base's layers stay what they were."""
    kwargs = {"num_classes": 4}
    with torch.device("meta"):
        plain = timm.create_model(name.replace("se_tv_", ""), **kwargs)
    expected: dict[Any, float] = {}
    for group in timm.optim.param_groups_layer_decay(plain, layer_decay=0.5):
        expected |= dict.fromkeys(group["params"], group["lr_scale"])
    scales = {key: expected[parameter] for key, parameter in plain.named_parameters()}
    assert len(set(scales.values())) > 4

    model = timm.create_model(name, **kwargs) if name.startswith("se_") else add_se(plain)
    if name.startswith("se_"):  # torchvision's has no group_matcher: timm then takes 12 parameters as a layer
        assert not hasattr(model, "group_matcher")
        names = [key for key, _ in model.named_parameters() if not is_new(key) and not key.startswith("fc.")]
        layers = -(-len(names) // 12)
        scales = {key: 0.5 ** (layers - i // 12) for i, key in enumerate(names)} | {"fc.weight": 1.0, "fc.bias": 1.0}
    for group in param_groups(model, lr=0.1, se_lr=0.2, layer_decay=0.5):
        for key in group["param_names"]:
            assert group["lr_scale"] == scales.get(key, 1.0)
            assert group["lr"] == (0.1 if key in scales else 0.2)


def test_timms_schedulers_scale_each_group() -> None:
    groups = param_groups(operated(), lr=0.1, se_lr=0.4, layer_decay=0.5)
    scales = [group["lr_scale"] for group in groups]
    optimizer = timm.optim.create_optimizer_v2(groups, "sgd")
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=4)
    scheduler.step(2)  # half way down a cosine is half
    for group, scale in zip(optimizer.param_groups, scales, strict=True):
        assert group["lr"] == pytest.approx(0.5 * scale * (0.4 if "SEs" in group["name"] else 0.1))
    assert len(set(scales)) > 4


@pytest.mark.parametrize("make", ["timm", "torch"])
def test_a_step_of_sgd_by_hand(make: str) -> None:
    model = operated()
    groups = param_groups(model, lr=0.1, se_lr=0.3, weight_decay=0.05)
    make_it = (
        partial(timm.optim.create_optimizer_v2, opt="momentum", momentum=0.0) if make == "timm" else torch.optim.SGD
    )
    optimizer = make_it(groups)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()(images()).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.05 if parameter.ndim > 1 else 0.0
        expected = before[name] - (0.3 if is_new(name) else 0.1) * (parameter.grad + decay * before[name])
        assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-7) and not torch.equal(parameter, before[name])


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "adafactor", "lookahead_adamw"])
def test_timms_optimizers_take_the_groups_as_they_are(name: str) -> None:
    model = operated(bias=True)
    optimizer = timm.optim.create_optimizer_v2(param_groups(model, lr=0.01, weight_decay=0.05), name)
    before = {key: digest(parameter) for key, parameter in model.named_parameters()}
    model.train()(images()).square().mean().backward()
    optimizer.step()
    assert all(digest(parameter) != before[key] for key, parameter in model.named_parameters())


def rebuilt(model: nn.Module) -> nn.Module:
    return apply_recipe(base(), recipe_of(model))


# Ways for an operated model to have come about, or to be in something: its SEs are known as such.
LIVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "recipe": rebuilt,
    "pruned": lambda model: prune_se(model, 0.5, example_input=SIZE),
    "part of another": lambda model: nn.Sequential(nn.Identity(), model),
    "frozen and given back": lambda model: unfreeze_base(freeze_base(model)),
}


@pytest.mark.parametrize("life", LIVES)
def test_ses_are_known_in_every_life(life: str) -> None:
    assert named(param_groups(LIVES[life](operated()), lr=0.1)) == {"base": 14, "base, no decay": 27, "SEs": 8}


def test_native_ses_are_the_bases() -> None:
    native = build("seresnet18", channels=CHANNELS)
    assert not any("SEs" in group["name"] for group in param_groups(native, lr=0.1))
    model = add_se(native, "pre", stages=1, existing="stack")
    assert named(param_groups(model, lr=0.1))["SEs"] == 4


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"lr": 0}, OptionError, "lr=0 is not a positive number"),
        ({"lr": None}, OptionError, "lr=None is not a positive number"),
        ({"lr": "0.1"}, OptionError, "lr='0.1' is not a positive number"),
        ({"lr": True}, OptionError, "lr=True is not a positive number"),
        ({"lr": NAN}, OptionError, "lr=nan is not a positive number"),
        ({"se_lr": -1}, OptionError, "se_lr=-1 is not a positive number"),
        ({"weight_decay": -0.1}, OptionError, "weight_decay=-0.1 is not a number of at least 0"),
        ({"layer_decay": 0}, OptionError, "layer_decay=0 is not a number above 0 and of at most 1"),
        ({"layer_decay": 1.5}, OptionError, "layer_decay=1.5 is not a number above 0 and of at most 1"),
    ],
)
def test_values_that_mean_nothing(values: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace(".", r"\.")) as caught:
        param_groups(operated(), **{"lr": 0.1, **values})
    assert str(caught.value).endswith("Give one.")


def test_groups_that_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"se_lr=0\.1, but the model has no SE of this library"):
        param_groups(base(), lr=0.1, se_lr=0.1)
    with pytest.raises(OptionError, match="neither timm's group_matcher nor a pretrained_cfg"):
        param_groups(add_se(toys.Digits(), example_input=toys.Digits.SIZE), lr=0.1, layer_decay=0.5)
    with pytest.raises(NothingToDoError, match="No parameter requires gradients"):
        param_groups(operated().requires_grad_(False), lr=0.1)
    with pytest.raises(PatientError, match=r"'dict' is not an nn\.Module"):
        param_groups({}, lr=0.1)


# ---------------------------------------------------------------------------------------------------------- freezing


def state(model: nn.Module) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in model.state_dict().items()}


def changed(before: dict[str, str], model: nn.Module) -> set[str]:
    return {key for key, value in state(model).items() if value != before[key]}


def two_steps(model: nn.Module, fast: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
    """Two steps of SGD, each with `model.train()` before it, as training scripts do."""
    called = model if fast is None else fast
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, weight_decay=0.01), momentum=0.9)
    cast = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    for seed in range(2):
        model.train()
        optimizer.zero_grad()
        with cast:
            output = called(images(batch=4) + seed)
        nn.functional.cross_entropy(output.float(), torch.arange(4)).backward()
        optimizer.step()


def with_checkpoints(model: nn.Module) -> None:
    model.set_grad_checkpointing()
    two_steps(model)


def compiled(model: nn.Module) -> None:
    torch.compiler.reset()
    fast = torch.compile(model, backend="aot_eager")
    fast.train()
    assert model.bn1.training is model.bn1.weight.requires_grad
    two_steps(model, fast)


TRAININGS: dict[str, Callable[[nn.Module], None]] = {
    "plain": two_steps,
    "gradient checkpointing": with_checkpoints,
    "bfloat16": partial(two_steps, dtype=torch.bfloat16),
    "torch.compile": compiled,
}


@pytest.mark.parametrize("training", TRAININGS)
def test_training_changes_the_ses_and_not_one_bit_of_the_base(training: str) -> None:
    model = freeze_base(operated())
    before = state(model)
    TRAININGS[training](model)
    assert changed(before, model) == {key for key in before if is_new(key)}
    # Given back, all of it learns, and statistics are collected.
    unfreeze_base(model)
    TRAININGS[training](model)
    assert changed(before, model) == set(before)


def test_a_head_learns_as_well_where_it_is_asked_for() -> None:
    model = freeze_base(operated(), head=True)
    before = state(model)
    two_steps(model)
    assert changed(before, model) == {key for key in before if is_new(key) or key.startswith("fc.")}


@pytest.mark.parametrize(
    ("make", "head", "learning"),
    [
        (lambda: add_se(timm.create_model("mobilenetv2_035")), True, ["classifier.weight", "classifier.bias"]),
        (lambda: timm.create_model("se_tv_resnet18"), True, ["fc.weight", "fc.bias"]),
        (lambda: add_se(toys.Digits(), example_input=toys.Digits.SIZE), "fc", ["fc.weight", "fc.bias"]),
        (lambda: add_se(base()), ["fc", "bn1"], ["bn1.weight", "bn1.bias", "fc.weight", "fc.bias"]),
        (base, True, ["fc.weight", "fc.bias"]),
    ],
)
def test_which_head(make: Callable[[], nn.Module], head: Any, learning: list[str]) -> None:
    model = freeze_base(make(), head)
    assert [name for name, p in model.named_parameters() if p.requires_grad and not is_new(name)] == learning


def test_averages_of_weights_follow_the_ses_alone() -> None:
    model = freeze_base(operated())
    ema = ModelEmaV3(model, decay=0.5)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    two_steps(model)
    ema.update(model)
    for key, mean in ema.module.state_dict().items():
        now = model.state_dict()[key]
        assert torch.equal(mean, torch.lerp(start[key], now, 0.5) if is_new(key) else start[key])
        assert torch.equal(now, start[key]) is not is_new(key)


class Hazards(toys.Digits):
    """A parameter that two modules share, a `train` of its own, spectral normalisation in both forms, a plain norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.second = nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.own = nn.BatchNorm1d(10)
        self.own.train = partial(self._never, self.own)
        self.none = nn.BatchNorm1d(10, track_running_stats=False)
        self.spectral = parametrizations.spectral_norm(nn.Linear(10, 10))
        self.old = nn.utils.spectral_norm(nn.Linear(10, 10))
        self.drop = nn.Dropout(0.5)

    @staticmethod
    def _never(module: nn.Module, mode: bool = True) -> nn.Module:
        module.training = False
        return module

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(super().forward(x)))
        return self.old(self.spectral(self.drop(self.none(self.own(x)))))


def hazards() -> nn.Module:
    model = add_se(Hazards(), r=2, example_input=toys.Digits.SIZE)
    model.stem[0].weight.requires_grad_(False)
    return model


def test_what_else_a_training_mode_changes_is_held() -> None:
    model = freeze_base(hazards())
    before = state(model)
    x = torch.randn(4, *toys.Digits.SIZE)
    for _ in range(2):
        model.train()(x)
    assert changed(before, model) == set()
    assert model.drop.training and model.none.training and not model.spectral.parametrizations.weight[0].training
    unfreeze_base(model).train()(x)
    moved = {key.rpartition(".")[2] for key in changed(before, model)}
    assert moved == {"running_mean", "running_var", "num_batches_tracked", "_u", "_v", "weight_u", "weight_v"}


@pytest.mark.parametrize("make", [operated, hazards])
def test_unfreezing_restores_everything(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    model.get_submodule("stem.1" if make is hazards else "bn1").eval()
    before = snapshot(model)
    for head in (False, "fc", False):  # frozen again, what was found first is what counts
        freeze_base(model, head)
    assert differences(before, snapshot(model))
    unfreeze_base(unfreeze_base(model))
    assert differences(before, snapshot(model)) == []


def test_modes_asked_for_meanwhile_are_those_after_it() -> None:
    model = unfreeze_base(freeze_base(operated().train()).eval())
    assert not any(module.training for module in model.modules())
    model = unfreeze_base(freeze_base(operated().eval()).train())
    assert all(module.training for module in model.modules())
    assert freeze_base(model).layer1.train().get_submodule("0.bn1").training is False, "a part's train holds it, too"


def held(model: nn.Module) -> bool:
    """Whether a model's norms stay in evaluation, and each by a `train` of its own."""
    norms = [module for module in model.train().modules() if isinstance(module, nn.BatchNorm2d)]
    return len(norms) == 13 and not any(norm.training or norm.train.args[0] is not norm for norm in norms)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = freeze_base(operated())
    other = copied(model)
    assert held(other) and [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    unfreeze_base(other).train()
    assert other.bn1.training and held(model)
    assert all(p.requires_grad for p in other.parameters()) and not model.conv1.weight.requires_grad


def test_what_this_library_does_goes_on_with_a_frozen_model(tmp_path: Any) -> None:
    model, plain = freeze_base(operated()), operated()
    assert list(model.state_dict()) == list(plain.state_dict()) and repr(model) == repr(plain)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert_same(run(model, images()), run(plain, images()))
    assert json.dumps(recipe_of(model)) == json.dumps(recipe_of(plain))
    verify(model, SIZE, thorough=False)

    loaded = from_pretrained(save_pretrained(model, tmp_path, base=base(), example_input=SIZE), base=base()).eval()
    assert_same(run(loaded, images()), run(model, images()))
    assert all(p.requires_grad for p in loaded.parameters())

    add_se(model, "pre", existing="stack", stages=1, example_input=SIZE)
    two_steps(model)
    assert len(find_se(model, SIZE)) == 5 and held(model)
    strip_se(model, origin="se_surgery", example_input=SIZE)
    assert held(model) and not any(p.requires_grad for p in model.parameters())
    fresh = base()
    assert_same(run(model, images()), run(fresh, images()))
    unfreeze_base(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "_se_frozen")


def saved_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that each stage, and the whole, keep for the backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[str, dict[int, int]] = {"all": {}}
    inside = ["all"]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            for name in inside:
                kept.setdefault(name, {})[storage.data_ptr()] = storage.nbytes()
        return tensor

    with contextlib.ExitStack() as stack:
        for name, module in model.named_children():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: inside.pop() and None).remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.train()(images(batch=4))
    assert output.requires_grad
    return {name: sum(found.values()) for name, found in kept.items()}


def test_nothing_is_kept_for_the_backward_pass_before_the_first_se() -> None:
    full = saved_bytes(operated(stages=[3, 4]))
    frozen = saved_bytes(freeze_base(operated(stages=[3, 4])))
    early = {"conv1", "bn1", "act1", "maxpool", "layer1", "layer2"}
    assert early & full.keys() >= {"conv1", "bn1", "maxpool", "layer1", "layer2"} and not early & frozen.keys()
    assert 0 < frozen["all"] < full["all"] / 5


def test_nothing_left_to_train_is_refused() -> None:
    model = operated()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_new(name))
    for patient in (model, base()):
        before = snapshot(patient)
        with pytest.raises(NothingToDoError, match=r"Nothing would be left to train.*Put some in with add_se first"):
            freeze_base(patient)
        assert differences(before, snapshot(patient)) == []


@pytest.mark.parametrize("head", ["", "nowhere", [], ["fc", "nowhere"], [["fc"]], 1, True])
def test_a_head_that_is_none(head: Any) -> None:
    model = add_se(toys.Digits(), example_input=toys.Digits.SIZE) if head is True else operated()
    before = snapshot(model)
    with pytest.raises(OptionError, match=r"is no module of this .*Give the path of its classifier, 'fc'"):
        freeze_base(model, head)
    assert differences(before, snapshot(model)) == []


def test_what_is_no_model() -> None:
    for verb in (freeze_base, unfreeze_base):
        with pytest.raises(PatientError, match=r"'list' is not an nn\.Module"):
            verb([])
