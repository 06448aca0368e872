"""An operated model lives on as the normal model it was: all that people do to models works, with equal results."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed
from patients import (
    OLD_TIMM,
    assert_differs,
    assert_same,
    build,
    calls,
    copied,
    differences,
    images,
    pass_through,
    run,
    snapshot,
    tensors,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from se_surgery import (
    NothingToDoError,
    SqueezeExcite,
    SurgeryError,
    VerifyError,
    add_se,
    apply_recipe,
    find_se,
    plan_se,
    recipe_of,
    records,
    strip_se,
    verify,
)
from se_surgery.surgery import generated


def ses(model: nn.Module) -> list[str]:
    """Paths of the SEs that surgery put in, by their class."""
    return [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]


def operated(name: str = "resnet18", seed: int = 0, **options: object) -> nn.Module:
    """An operated network whose gates are not one any more, as if it had been trained."""
    model = add_se(build(name), **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for path in ses(model):
            model.get_submodule(path).fc2.weight.normal_(0.0, 3.0)
    return model


def assert_each_runs_once(model: nn.Module, call: object = None, x: Tensor | None = None) -> None:
    paths = ses(model)
    with calls(model, paths) as counts, torch.no_grad():
        (call or model)(images() if x is None else x)
    assert paths and set(counts.values()) == {1}, counts


# A residual net, one whose SEs hang on activations, channels-last blocks, a slot of its own, two SEs in a block.
KINDS = ("resnet18", "toy/PlainSequential", "convnext_atto", "toy/OwnSlot", "toy/TwoUnits", "torchvision/densenet121")


# ------------------------------------------------------------------------------------------------- copies and processes


@pytest.mark.parametrize("name", KINDS)
def test_deepcopy_is_equal_and_independent(name):
    model = operated(name)
    twin = copied(model)
    assert [type(a) for a in model.modules()] == [type(b) for b in twin.modules()]
    assert_same(run(twin, images()), run(model, images()))
    before = run(model, images())
    with torch.no_grad():
        twin.get_submodule(ses(twin)[0]).fc2.weight.mul_(-1)
    assert_differs(run(twin, images()), before)
    assert_same(run(model, images()), before)


LOADS_AND_RUNS = """
import pickle, sys, torch
torch.set_num_threads(1)
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        model, x = pickle.load(file)
    with torch.no_grad():
        out = model.eval()(x)
        torch.manual_seed(3)
        train = model.train()(x)
    torch.save({"eval": out, "train": train, "text": repr(model), "keys": list(model.state_dict())}, path + ".out")
"""


def test_pickles_run_in_a_fresh_process_that_never_imported_the_library(tmp_path):
    models = {name: operated(name) for name in KINDS}
    files = []
    for number, model in enumerate(models.values()):
        files.append(tmp_path / f"{number}.pkl")
        files[-1].write_bytes(pickle.dumps((model, images())))
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LOADS_AND_RUNS, *map(str, files)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for model, file in zip(models.values(), files, strict=True):
        out = torch.load(f"{file}.out", weights_only=True)
        assert out["text"] == repr(model) and out["keys"] == list(model.state_dict())
        assert_same([out["eval"]], run(model, images()))
        assert_same([out["train"]], run(copied(model), images(), training=True))


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_loads_into_another_operated_model(name):
    model, other = operated(name, seed=0), operated(name, seed=1)
    assert_differs(run(other, images()), run(model, images()))
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(run(other, images()), run(model, images()))


def test_surgery_on_the_meta_device_gives_the_same_architecture():
    with torch.device("meta"):
        model = add_se(timm.create_model("resnet18"))
    assert all(parameter.is_meta for parameter in model.parameters())
    real = operated("resnet18")
    model.load_state_dict(real.state_dict(), strict=True, assign=True)
    assert_same(run(model.eval(), images()), run(real, images()))


# --------------------------------------------------------------------------------------------------- conversions


# timm has a converter of its own because torch's drops the activation of its BatchNormAct2d.
TORCHS, TIMMS = nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm
CONVERSIONS = [
    *((name, converter) for name in ("resnet18", "toy/PlainSequential") for converter in (TORCHS, TIMMS)),
    ("torchvision/densenet121", TORCHS),
    ("torchvision/mobilenet_v2", TORCHS),
    ("mobilenetv1_100", TIMMS),
    ("densenet121", TIMMS),
]


@pytest.mark.parametrize(("name", "converter"), CONVERSIONS)
def test_synchronised_batchnorm(name, converter):
    """Whatever an SE hangs on, it is not what the conversion replaces."""
    model = operated(name)
    before, keys, paths = run(model, images()), list(model.state_dict()), ses(model)
    model = converter(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert (list(model.state_dict()), ses(model)) == (keys, paths)
    assert_each_runs_once(model)
    assert_same(run(model, images()), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "toy/PlainSequential"])
def test_another_dtype_before_or_after_surgery(name, dtype):
    base = build(name).to(dtype)
    x = images().to(dtype)
    expected = run(base, x)
    assert_same(run(add_se(copied(base)), x), expected)
    assert_same(run(add_se(build(name)).to(dtype), x), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121"])
def test_autocast(name):
    model = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(model, images())
        assert_same(run(add_se(model), images()), expected)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121"])
def test_channels_last_memory_format(name):
    """Outputs are bit-equal, and no SE turns its map back to the contiguous format."""
    base = build(name).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    expected = run(base, x)
    model = add_se(base).to(memory_format=torch.channels_last)
    formats = []
    for path in ses(model):
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out: formats.append((args[0].stride(), out.stride()))
        )
    assert_same(run(model, x), expected)
    assert formats and all(given == returned for given, returned in formats)


# --------------------------------------------------------------------------------------------------- timm's methods


WAYS = ("forward_features", "forward_intermediates")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name",
    ["resnet18", "xception41p", "xception41", "convnext_atto", "densenet121", "hrnet_w18_small", "efficientnet_b0"],
)
def test_other_ways_into_the_model(name, way):
    """timm's models are entered elsewhere than by forward: xception's blocks have a forward_with_tap of their own."""
    base = build(name)
    if not hasattr(base, way):
        without = ["densenet121", "hrnet_w18_small", *(["xception41p", "xception41"] if OLD_TIMM else [])]
        assert way == "forward_intermediates" and name in without
        return
    existing = "replace" if name == "efficientnet_b0" else "skip"
    model = add_se(copied(base), existing=existing)
    if existing == "replace":
        assert pass_through(base, lambda module: type(module).__name__ == "SqueezeExcite") == 16
    assert_each_runs_once(model, getattr(model, way))
    with torch.no_grad():
        assert_same(tensors(getattr(model, way)(images())), tensors(getattr(base, way)(images())))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121", "mobilenetv2_100", "vgg11_bn"])
def test_reset_classifier(name):
    narrow = {"mlp_ratio": 1 / 64} if name.startswith("vgg") else {}  # VGG's head alone has 120 million parameters
    base = build(name, num_classes=5, **narrow)
    model = add_se(copied(base))
    torch.manual_seed(0)
    base.reset_classifier(7)
    torch.manual_seed(0)
    model.reset_classifier(7)
    (out,) = run(model, images())
    assert out.shape == (2, 7)
    assert_same([out], run(base, images()))
    assert_each_runs_once(model)
    model.reset_classifier(0)
    base.reset_classifier(0)
    assert_same(run(model, images()), run(base, images()))


# Sites: the wrapped network's own, less what features_only cuts off.
FEATURES = {
    "resnet18": 8,
    "convnext_atto": 12,
    "densenet121": 58,
    "resnetv2_50": 16,
    "hrnet_w18_small": 23,
    "mobilenetv2_100": 17,
    "mobilenetv3_small_100": 2,
    "inception_v4": 19,
    "regnetx_002": 13,
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_only_models(name):
    """timm's wrappers rename paths (convnext, densenet, resnetv2) or are of other classes (HRNet, EfficientNet)."""
    size = (3, 96, 96) if name == "inception_v4" else (3, 64, 64)
    base = build(name, features_only=True)
    model = add_se(copied(base))
    assert len(ses(model)) == FEATURES[name]
    assert_each_runs_once(model, x=images(size))
    expected = run(base, images(size))
    assert len(expected) > 2
    assert_same(run(model, images(size)), expected)
    assert model.feature_info.channels() == base.feature_info.channels()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121", "mobilenetv2_100", "regnetx_002"])
def test_gradient_checkpointing(name):
    """Same outputs and gradients as without, and the same convolutions run again in the backward as in the base.

    A DenseNet's layers look at their own flag; a forward written for one of its values would ignore the other.
    """
    outs, grads = {}, {}
    plain = operated(name).train()
    for saving in (False, True):
        model = copied(plain)
        model.set_grad_checkpointing(saving)
        torch.manual_seed(0)
        outs[saving] = model(images().requires_grad_())
        outs[saving].square().mean().backward()
        grads[saving] = {key: p.grad for key, p in model.named_parameters()}
    assert_same([outs[True].detach()], [outs[False].detach()])
    assert all(torch.equal(grads[True][key], grads[False][key]) for key in grads[False])
    base = build(name).train()
    convolutions = [path for path, module in base.named_modules() if isinstance(module, nn.Conv2d)]
    assert recomputed(copied(plain), convolutions) == recomputed(base, convolutions)


def recomputed(model: nn.Module, paths: list[str]) -> dict[str, int]:
    """How often each module runs in the backward of a model that saves memory.

    A recomputation is broken off inside its last module, as soon as it has what the backward pass needs.
    """
    model.set_grad_checkpointing(True)
    out = model(images().requires_grad_())
    with calls(model, paths, begun=True) as counts:
        out.square().mean().backward()
    assert any(counts.values()), "nothing was computed again"
    return dict(counts)


@pytest.mark.parametrize("name", ["ghostnetv3_100"])
def test_reparameterisation_of_operated_blocks_is_refused(name):
    """Their own reparameterize would delete what the rewritten forward calls."""
    model = operated(name)
    before = run(model, images())
    with pytest.raises(SurgeryError, match="reparameterize"):
        timm.utils.reparameterize_model(model)
    assert_same(run(model, images()), before)


@pytest.mark.parametrize(
    "name", ["repvit_m0_9", "repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_050", "resnet18"]
)
def test_reparameterisation_after_surgery(name):
    """Folding a block's branches keeps the SEs in it, and the outputs to rounding."""
    model = operated(name)
    x = images()
    (before,) = run(model, x)
    paths = ses(model)
    folded = timm.utils.reparameterize_model(copied(model))
    assert ses(folded) == paths
    assert_each_runs_once(folded)
    (after,) = run(folded, x)
    pass_through(model, lambda module: isinstance(module, SqueezeExcite))
    (ungated,) = run(model, x)
    error, effect = (after - before).abs().max().item(), (ungated - before).abs().max().item()
    assert error < 1e-2 * effect, f"folding changed the output by {error:g}, the gates do by {effect:g}"


# ------------------------------------------------------------------------------------------------ operating again


def test_another_placement_on_top():
    base = build("resnet18")
    model = add_se(copied(base), stages=[1, 2])
    add_se(model, "pre", existing="stack")
    assert len(ses(model)) == 4 + 8
    assert_each_runs_once(model)
    assert_same(run(model, images()), run(base, images()))
    assert_same(run(model, images(), True), run(base, images(), True))


@pytest.mark.parametrize(
    "placements", [("standard", "post", "identity", "inner", "pre"), ("inner", "standard", "inner")]
)
@pytest.mark.parametrize("name", ["resnet18", "toy/TwoUnits", "toy/OwnSlot", "torchvision/mobilenet_v2", "regnetx_002"])
def test_placements_stacked_in_one_unit(name, placements):
    base = build(name)
    model = copied(base)
    expected = 0
    for placement in placements:
        expected += len(plan_se(base, placement).sites)
        add_se(model, placement, existing="stack")
        assert len(ses(model)) == expected
    assert_each_runs_once(model)
    assert_same(run(model, images()), run(base, images()))
    assert_same(run(model, images(), True), run(base, images(), True))
    assert not differences_of_type(strip_se(model, origin="se_surgery"), base)


def differences_of_type(model: nn.Module, other: nn.Module) -> list[str]:
    """Paths at which two models have modules of different classes, or one has none."""
    first, second = ({path: type(module) for path, module in m.named_modules()} for m in (model, other))
    return [path for path in first.keys() | second.keys() if first.get(path) is not second.get(path)]


def test_stages_one_after_the_other_equal_all_at_once():
    at_once = add_se(build("resnet50"))
    in_turn = build("resnet50")
    for stage in (3, 1, 4, 2):
        add_se(in_turn, stages=stage)
    assert list(in_turn.state_dict()) == list(at_once.state_dict())
    assert [type(m) for m in in_turn.modules()] == [type(m) for m in at_once.modules()]
    in_turn.load_state_dict(at_once.state_dict())
    assert_same(run(in_turn, images()), run(at_once, images()))


def test_operating_twice_has_nothing_to_do():
    model = operated()
    before = snapshot(model)
    with pytest.raises(NothingToDoError, match="holds an SE already"):
        add_se(model)
    assert differences(before, snapshot(model)) == []


def test_replacing_this_librarys_own_ses():
    model = operated("resnet18", r=16)
    paths = ses(model)
    add_se(model, r=4, existing="replace")
    assert ses(model) == paths
    assert {site.rd_channels for site in find_se(model, (3, 64, 64))} == {16, 32, 64, 128}
    assert_same(run(model, images()), run(build("resnet18"), images()))
    assert_each_runs_once(model)


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_in_json_rebuilds_the_model_from_its_base(name):
    model = operated(name)
    if name == "resnet18":
        add_se(model, "inner", r=8, stages=[2, 3], existing="stack", squeeze="max")
        strip_se(model, stages=1)
    recipe = json.loads(json.dumps(recipe_of(model, base=name)))
    again = apply_recipe(build(name), recipe)
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict(), strict=True)
    assert_same(run(again, images()), run(model, images()))
    assert recipe_of(again, base=name) == recipe_of(model, base=name)


# ------------------------------------------------------------------------------------------------ left as found


LOOKERS = {
    "plan_se": lambda model: print(plan_se(model)),
    "find_se": find_se,
    "verify": lambda model: verify(model, (3, 64, 64), thorough=False),
    "add_se on a copy": lambda model: add_se(model, "inner", existing="stack", inplace=False),
    "strip_se on a copy": lambda model: strip_se(model, inplace=False),
    "recipe_of": recipe_of,
}


@pytest.mark.parametrize("looker", LOOKERS)
def test_looking_changes_nothing(looker):
    """Not a class, attribute, flag, hook, value or gradient of the model, and no random number is used up."""
    model = operated().train()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    model(images()).sum().backward()
    model.layer1.register_forward_hook(lambda *_: None)
    before, rng = snapshot(model), torch.get_rng_state()
    LOOKERS[looker](model)
    if not looker.startswith("add_se"):
        assert torch.equal(torch.get_rng_state(), rng)
    assert differences(before, snapshot(model)) == []


def test_a_copy_is_operated_on_and_shares_nothing():
    model = build("resnet18")
    other = add_se(model, inplace=False)
    assert ses(model) == [] and len(ses(other)) == 8
    mine = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not mine & ({id(p) for p in other.parameters()} | {id(b) for b in other.buffers()})
    assert add_se(model) is model


def test_users_hooks_stay_and_can_be_removed():
    model = build("resnet18")
    seen: list[str] = []
    handles = [
        model.layer1[0].register_forward_pre_hook(lambda *_: seen.append("block, before")),
        model.layer1[0].register_forward_hook(lambda *_: seen.append("block")),
        model.layer1[0].conv2.register_forward_hook(lambda *_: seen.append("conv2")),
        model.layer1[0].register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    add_se(model)
    assert seen == [], "surgery ran the users' hooks"
    model(images()).sum().backward()
    assert seen == ["block, before", "conv2", "block", "backward"]
    for handle in handles:
        handle.remove()
    model(images())
    assert len(seen) == 4


def test_training_flags_stay_and_the_se_takes_its_blocks():
    model = build("resnet18").train()
    model.layer1.eval()
    model.layer2[0].bn1.eval()
    flags = {path: module.training for path, module in model.named_modules()}
    add_se(model)
    new = ses(model)
    after = {path: module.training for path, module in model.named_modules()}
    assert {path: after[path] for path in flags} == flags
    for path in new:
        inside = {module.training for module in model.get_submodule(path).modules()}
        assert inside == {flags[path.rpartition(".")[0]]}
    assert {flags[path.rpartition(".")[0]] for path in new} == {True, False}


def test_requires_grad_and_gradients_stay():
    model = build("resnet18").requires_grad_(False)
    model.fc.requires_grad_(True)
    model(images()).sum().backward()
    before = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    add_se(model)
    after = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    new = [name for name in after if name not in before]
    assert {name: after[name] for name in before} == before
    assert new and all(after[name][1] for name in new), "the SEs are there to be trained"


def test_weights_come_from_the_global_generator():
    torch.manual_seed(0)
    first = add_se(build("resnet18"))  # build seeds the generator itself
    second = add_se(build("resnet18"))
    model = build("resnet18")
    torch.manual_seed(99)
    third = add_se(model)
    weights = [m.layer1[0].se.fc1.weight for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_parameters_of_the_base_are_the_same_objects():
    """An optimizer that was made before surgery goes on training them."""
    model = build("resnet18")
    before = {name: id(p) for name, p in model.named_parameters()}
    after = {name: id(p) for name, p in add_se(model).named_parameters()}
    assert {name: after[name] for name in before} == before


# --------------------------------------------------------------------------------------------------- what it looks like


def test_print_shows_the_se_in_its_place():
    model = add_se(build("resnet50"))
    block = repr(model.layer1[0])
    names = re.findall(r"^  \((\w+)\)", block, flags=re.MULTILINE)
    assert names.index("se") == names.index("bn3") + 1
    assert block.startswith("Bottleneck(")


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_still_of_their_class(name):
    base = build(name)
    model = add_se(copied(base))
    for path, module in base.named_modules():
        now = model.get_submodule(path)
        assert isinstance(now, type(module))
        assert (type(now).__name__, type(now).__module__) == (type(module).__name__, type(module).__module__)


def test_ses_are_on_the_named_path_and_return_the_gated_branch():
    """Hooks on the SE see what goes in and what comes out, whatever the block does with it."""
    model = operated("resnet18")
    seen: dict[str, Tensor] = {}
    block = model.layer1[0]
    block.bn2.register_forward_hook(lambda module, args, out: seen.update(branch=out.clone()))
    block.se.register_forward_hook(lambda module, args, out: seen.update(given=args[0], gated=out.clone()))
    run(model, images())
    assert torch.equal(seen["branch"], seen["given"])
    x = seen["given"]
    gate = 2 * torch.sigmoid(block.se.fc2(torch.relu(block.se.fc1(x.mean((2, 3), keepdim=True)))))
    assert torch.allclose(seen["gated"], x * gate, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- compilers and wrappers


@pytest.mark.parametrize("name", ["resnet18", "toy/TwoUnits"])
def test_compiles_in_one_graph(name):
    model = operated(name)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(images())
    assert torch.allclose(out, run(model, images())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "toy/PlainSequential"])
def test_exports(name):
    model = operated(name)
    exported = torch.export.export(model, (images(),))
    assert set(exported.state_dict) == set(model.state_dict())
    (out,) = tensors(exported.module()(images()))
    assert torch.allclose(out, run(model, images())[0], rtol=1e-4, atol=1e-5)


def test_moving_average():
    model = operated("resnet18")
    average = ModelEmaV3(model, decay=0.5)
    before = model.layer1[0].se.fc2.weight.detach().clone()
    with torch.no_grad():
        model.layer1[0].se.fc2.weight.zero_()
    average.update(model, step=10)
    assert torch.allclose(average.module.layer1[0].se.fc2.weight, before / 2)
    assert_each_runs_once(average.module)


def test_distributed_data_parallel_takes_an_operated_model():
    model = operated("resnet18").train()
    plain = copied(model)
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel(images()).square().mean().backward()
        finally:
            torch.distributed.destroy_process_group()
    plain(images()).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(model.named_parameters())[name].grad)


def test_torch_save_of_the_whole_model(tmp_path):
    model = operated("resnet18")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(run(again, images()), run(model, images()))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


# ------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("name", ["resnet18", "toy/Digits", "toy/NHWC", "mobilenetv3_small_100", "xception41p"])
def test_verify_passes_on_operated_models(name):
    """Trained ones too, whose outputs are not the base's any more."""
    size = getattr(type(build(name)), "SIZE", (3, 64, 64))
    report = verify(operated(name), size, thorough=False)
    assert report.checks and all(check.passed is not False for check in report.checks)


# Three ways in which a rewritten forward could be wrong: what stands in it instead of SE and normalisation.
CALL = "_tail(self.se, (self.bn2,), x)"
BROKEN = {
    "an SE is never called": "self.bn2(x)",
    "an SE is called twice": f"self.se({CALL})",
    "the branch is not what it was": f"{CALL} * 2",
}


@pytest.mark.parametrize("instead", BROKEN.values(), ids=BROKEN)
def test_verify_sees_what_is_broken(instead):
    model = operated("resnet18")
    verify(model, (3, 64, 64), thorough=False)
    block = model.layer2[1]
    code = getattr(type(block), records.CODE)
    assert code.source.count(CALL) == 1
    broken = dataclasses.replace(code, source=code.source.replace(CALL, instead))
    generated.give_class(block, generated.subclass(timm.models.resnet.BasicBlock, broken))
    with pytest.raises(VerifyError):
        verify(model, (3, 64, 64), thorough=False)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS, ids=WRAPPERS)
def test_the_recipe_of_a_wrapped_model_is_refused_and_not_empty(wrap):
    with pytest.raises(SurgeryError, match=r"was operated on by itself.*recipe_of\(model\."):
        recipe_of(WRAPPERS[wrap](operated("resnet18")))


def test_the_recipe_of_a_model_with_an_operated_part():
    model = nn.Sequential(operated("resnet18"), nn.Softmax(1))
    with pytest.raises(SurgeryError, match=r"'0' of this Sequential"):
        recipe_of(model)
    assert len(recipe_of(model[0])["operations"]) == 1
