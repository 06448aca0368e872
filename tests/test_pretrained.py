"""Saved models: they come back bit for bit, whoever loads them, and what is not one is refused with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import toys
from patients import assert_differs, assert_same, build, copied, differences, images, run, snapshot
from timm.models._hub import save_for_hf
from torch import nn

import se_surgery
from se_surgery import (
    SurgeryError,
    add_se,
    count_costs,
    find_se,
    from_pretrained,
    prune_se,
    recipe_of,
    register_se,
    save_pretrained,
    strip_se,
)
from se_surgery.files.artefact import digest_of
from se_surgery.files.config import read_config

ROOT = str(Path(se_surgery.__file__).parents[1])
FILES = ["README.md", "config.json", "model.safetensors"]


def operated(name="test_resnet", **options):
    return add_se(build(name), **{"init": "paper", **options})


def timm_load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


# How a saved model is loaded.
LOADERS = {"from_pretrained": from_pretrained, "timm": timm_load}

# Name, and how it is operated on.
CASES = {
    "standard": ("test_resnet", lambda model: add_se(model, init="paper")),
    "identity start": ("test_resnet", lambda model: add_se(model)),
    "r by stage, biases": (
        "test_resnet",
        lambda model: add_se(model, r={2: 4, -1: 8}, bias=(False, True), init="paper"),
    ),
    "where": ("test_resnet", lambda model: add_se(model, "pre", where="layer[12].*", init="paper")),
    "gate and squeeze": ("test_resnet", lambda model: add_se(model, gate="tanh", gate_scale=1.5, squeeze="max")),
    "attention": ("test_resnet", lambda model: add_se(model, attn="eca", init="paper")),
    "replaced": ("test_efficientnet", lambda model: add_se(model, existing="replace", stages=-1, init="paper")),
    "twice": ("test_resnet", lambda model: add_se(add_se(model, init="paper"), "post", init="paper", existing="stack")),
    "add and strip": ("test_resnet", lambda model: strip_se(add_se(model, init="paper"), -1)),
    "native strip": ("test_efficientnet", lambda model: strip_se(model, 4)),
    "never operated on": ("test_resnet", lambda model: model),
    "torchvision": ("torchvision/shufflenet_v2_x0_5", lambda model: add_se(model, init="paper")),
    "torchvision, versions": ("torchvision/mnasnet0_5", lambda model: add_se(model, init="paper", stages=4)),
    "torchvision, stripped": ("torchvision/regnet_y_400mf", lambda model: strip_se(model, -1)),
    "half": ("test_resnet:half", lambda model: add_se(model, init="paper")),
    "gray": ("test_resnet:gray", lambda model: add_se(model, init="paper")),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    name, operate = CASES[case]
    model = operate(build(name))
    bare = name.partition(":")[0]
    folder = tmp_path / "a" / "b"
    assert save_pretrained(model, folder, base=bare if "/" in name else None) == folder
    assert sorted(os.listdir(folder)) == FILES
    x = images((1, 64, 64) if name.endswith("gray") else (3, 64, 64), like=model)
    for how, load in LOADERS.items():
        back = load(folder)
        if how == "timm" and name.endswith("half"):
            back = back.half()  # timm creates models in float32
        assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in back.state_dict().items()}
        assert list(model.state_dict()) == list(back.state_dict())
        assert find_se(back) == find_se(model)
        assert recipe_of(back)["operations"] == recipe_of(model)["operations"]
        assert_same(run(model, x), run(back, x))
        assert_same(run(copied(model), x, training=True), run(back, x, training=True))


@pytest.fixture(scope="module")
def model():
    """An operated model; no test changes it."""
    torch.manual_seed(0)
    return operated()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Where it is saved; tests that spoil it take a copy."""
    return save_pretrained(model, tmp_path_factory.mktemp("saved") / "good")


def test_a_saved_model_is_left_as_it_was(tmp_path):
    model = operated().train()
    model.layer1.eval()
    model.conv1.register_forward_hook(lambda *_: pytest.fail("a hook of the user's ran"))
    before, state = snapshot(model), torch.random.get_rng_state()
    save_pretrained(model, tmp_path)
    assert not differences(before, snapshot(model)) and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize(
    ("wanted", "shape"),
    [
        ({"num_classes": 7}, (2, 7)),
        ({"num_classes": 0}, (2, 96)),
        ({"in_chans": 1}, (2, 1000)),
        ({"num_classes": 7, "in_chans": 5}, (2, 7)),
        ({"global_pool": "max"}, (2, 1000)),
    ],
    ids=str,
)
def test_other_classes_and_channels(wanted, shape, how, model, folder):
    back = LOADERS[how](folder, **wanted).eval()
    assert back(images((wanted.get("in_chans", 3), 64, 64))).shape == shape
    own, loaded = model.state_dict(), back.state_dict()
    changed = {key for key in own if key not in loaded or not torch.equal(own[key], loaded[key])}
    heads = {"fc.weight", "fc.bias"} if "num_classes" in wanted else set()
    assert changed == heads | ({"conv1.0.weight"} if "in_chans" in wanted else set())
    assert find_se(back) and back.pretrained_cfg["num_classes"] == 1000


@pytest.mark.parametrize("how", LOADERS)
def test_features(how, model, folder):
    back = LOADERS[how](folder, features_only=True, out_indices=(1, 4)).eval()
    _, maps = model.forward_intermediates(images(), indices=(1, 4))
    assert_same(run(back, images()), maps)


# timm's functions for whole networks, one of each way behind `features_only`.
def test_features_of_a_class_of_their_own(tmp_path):
    model = add_se(build("mobilenetv2_050"), init="paper")
    save_pretrained(model, tmp_path)
    _, maps = model.forward_intermediates(images())
    assert_same(run(timm_load(tmp_path, features_only=True).eval(), images()), maps)


def test_weights_of_float64_keep_all_their_digits(tmp_path):
    model = operated().double()
    save_pretrained(model, tmp_path)
    back = from_pretrained(tmp_path)
    assert_same(run(model, images().double()), run(back, images().double()))
    assert from_pretrained(tmp_path, num_classes=3).fc.weight.dtype == torch.float64


def test_mixed_dtypes(tmp_path):
    model = operated()
    model.conv1.half()
    model.layer1.to(torch.bfloat16)
    model.fc.double()
    save_pretrained(model, tmp_path)
    back = from_pretrained(tmp_path).state_dict()
    assert {value.dtype for value in back.values() if value.is_floating_point()} == {
        torch.float16, torch.bfloat16, torch.float32, torch.float64
    }  # fmt: skip
    assert all(
        value.dtype == back[key].dtype and torch.equal(value, back[key]) for key, value in model.state_dict().items()
    )


def test_arguments_that_timm_noted_come_back(tmp_path):
    model = timm.create_model("test_resnet", in_chans=1, num_classes=7, output_stride=8, act_layer="silu")
    save_pretrained(add_se(model, init="paper"), tmp_path)
    arguments = read_config(tmp_path)["model_args"]["recipe"]["base_args"]
    assert arguments == {"in_chans": 1, "output_stride": 8, "act_layer": "silu", "global_pool": "avg"}
    x = images((1, 64, 64))
    assert_same(run(model.eval(), x), run(timm_load(tmp_path).eval(), x))


def test_changes_since_creation_come_back(tmp_path):
    model = operated()
    model.reset_classifier(5, "max")
    save_pretrained(model, tmp_path)
    config = read_config(tmp_path)
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 5
    assert_same(run(model, images()), run(timm_load(tmp_path).eval(), images()))


def test_what_the_configuration_does_not_say_is_asked_for(tmp_path):
    silent = [
        (timm.create_model("test_resnet", act_layer=nn.SiLU), {"act_layer": "silu"}),
        (build("test_resnet"), {"act_layer": "gelu"}),
    ]
    for module in silent[1][0].modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
    for model, arguments in silent:
        add_se(model, init="paper")
        with pytest.raises(
            SurgeryError, match=r"does not compute the same: its outputs differ by .*Give base and base_a"
        ):
            save_pretrained(model, tmp_path)
        assert not os.listdir(tmp_path)
        save_pretrained(model, tmp_path, base_args=arguments)
        assert_same(run(model, images()), run(timm_load(tmp_path), images()))
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_change_in_a_branch_that_is_multiplied_by_zero_is_seen(tmp_path):
    model = timm.create_model("resnet10t").eval()
    before = run(model, images())
    model.layer1[0].act1 = nn.GELU()
    assert_same(before, run(model, images()))
    with pytest.raises(SurgeryError, match="does not compute the same"):
        save_pretrained(model, tmp_path)


def test_a_folder_can_be_loaded_operated_on_and_saved_again(tmp_path):
    save_pretrained(operated(stages=1), tmp_path)
    for load in LOADERS.values():
        model = add_se(load(tmp_path), stages=2, init="paper").eval()
        save_pretrained(model, tmp_path / "again", overwrite=True)
        back = from_pretrained(tmp_path / "again").eval()
        assert [site.stage for site in find_se(back)] == [1, 2]
        assert_same(run(model, images()), run(back, images()))
        assert recipe_of(back)["base_args"] == {} and back._model_args["recipe"]["base_args"]["in_chans"] == 3


def test_base_arguments_survive_a_second_save(tmp_path):
    model = timm.create_model("test_resnet", output_stride=8, act_layer="silu", in_chans=1)
    recipe = recipe_of(save_and_read(add_se(model, init="paper"), tmp_path / "first"))
    named = timm.create_model("se_surgery", recipe={**recipe, "base_args": {"output_stride": 8, "act_layer": "silu"}})
    for back in (*(load(tmp_path / "first") for load in LOADERS.values()), named):
        save_pretrained(back, tmp_path / "second", overwrite=True)
        saved = read_config(tmp_path / "second")["model_args"]["recipe"]["base_args"]
        channels = 3 if back is named else 1
        assert saved == {"in_chans": channels, "output_stride": 8, "act_layer": "silu", "global_pool": "avg"}
        x = images((channels, 64, 64))
        assert_same(run(back.eval(), x), run(from_pretrained(tmp_path / "second").eval(), x))


def save_and_read(model, folder):
    return from_pretrained(save_pretrained(model, folder))


class Figure:
    """What `savefig` of matplotlib's does, as far as a card needs it."""

    def savefig(self, path, **options):
        path.write_bytes(PNG)


PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 9


def test_a_picture_of_the_excitations(model, tmp_path):
    (tmp_path / "gates.png").write_bytes(PNG)
    for number, plot in enumerate((tmp_path / "gates.png", str(tmp_path / "gates.png"), Figure())):
        folder = save_pretrained(model, tmp_path / f"net{number}", plot=plot)
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", "excitations.png", "model.safetensors"]
        assert (folder / "excitations.png").read_bytes() == PNG
        assert "(excitations.png)" in (folder / "README.md").read_text()
    save_pretrained(model, folder, overwrite=True)  # without a picture, and that of before is not this model's
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    (folder / "excitations.png").write_bytes(PNG)  # somebody else's: the card does not show it
    save_pretrained(model, folder, overwrite=True)
    assert (folder / "excitations.png").read_bytes() == PNG
    (folder / "README.md").write_text("")  # somebody else's, too
    save_pretrained(model, folder, overwrite=True)
    assert (folder / "README.md").read_bytes() == b"" and (folder / "excitations.png").exists()
    (tmp_path / "gates.png").write_text("a drawing")
    with pytest.raises(SurgeryError, match=r"is no PNG file"):
        save_pretrained(model, tmp_path / "none", plot=tmp_path / "gates.png")
    assert not (tmp_path / "none").exists()


def test_wrapped_models(tmp_path):
    model = operated()
    compiled = operated()
    compiled.compile(backend="eager")
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager"), compiled):
        save_pretrained(wrapped, tmp_path, overwrite=True)
        assert_same(run(model, images()), run(timm_load(tmp_path), images()))


def test_layouts(tmp_path):
    model = operated().to(memory_format=torch.channels_last)
    weight = model.layer3[0].se.fc1.weight
    weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    save_pretrained(model, tmp_path)
    plain = from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.allclose(run(model, images())[0], run(plain, images())[0], rtol=1e-3, atol=1e-5)


def test_a_registered_name_is_not_needed_to_load(tmp_path):
    register_se("my_se_net", "test_resnet", placement="pre", r=8)
    try:
        model = timm.create_model("my_se_net", num_classes=7).eval()
    finally:
        se_surgery.unregister_se("my_se_net")
    save_pretrained(model, tmp_path / "ours")
    # The same by timm alone.
    save_for_hf(model, tmp_path / "timms", safe_serialization=True)
    for name in ("ours", "timms"):
        code = (
            f"import sys; sys.path.insert(0, {ROOT!r}); import se_surgery, timm, torch; torch.set_num_threads(1)\n"
            f"model = timm.create_model('local-dir:{tmp_path / name}', pretrained=True).eval()\n"
            f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
            f"torch.save(model(x), {str(tmp_path / 'y.pt')!r})\n"
        )
        torch.save(images(), tmp_path / "x.pt")
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        assert_same(run(model, images()), [torch.load(tmp_path / "y.pt").detach()])


def test_timm_saves_what_has_learned_since(folder, tmp_path):
    """The digest is that of the weights in the file, and no longer on the model that came of them."""
    model = timm_load(folder).eval()
    assert model._model_args["digest"] == {}
    with torch.no_grad():
        model.layer1[0].se.fc1.weight.add_(1)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert_same(run(model, images()), run(timm_load(tmp_path).eval(), images()))
    other = timm_load(folder, in_chans=1, num_classes=7).eval()
    save_for_hf(other, tmp_path / "other", safe_serialization=True)
    assert_same(run(other, images((1, 64, 64))), run(timm_load(tmp_path / "other").eval(), images((1, 64, 64))))
    values = safetensors.torch.load_file(tmp_path / "model.safetensors")
    values.pop("layer1.0.se.fc1.weight")
    safetensors.torch.save_file(values, tmp_path / "model.safetensors")
    for wanted in ({}, {"num_classes": 3}):
        with pytest.raises(SurgeryError, match=r"layer1\.0\.se\.fc1\.weight is missing"):
            timm_load(tmp_path, **wanted)


@pytest.mark.downstream
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_it(model, folder):
    import transformers

    back = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert_same(run(model, images()), [back(images()).logits.detach()])
    maps = transformers.AutoModel.from_pretrained(folder).eval()(images()).last_hidden_state
    assert_same([maps.detach()], [model.forward_features(images()).detach()])


class Own(toys.Digits):
    """A class of the user's own."""


def test_a_class_of_ones_own(tmp_path):
    model = add_se(build("toy/Digits"), init="paper")
    with pytest.raises(
        SurgeryError,
        match=r"This Digits does not know .* a class of your own, base=Digits\(\.\.\.\)",
    ):
        save_pretrained(model, tmp_path)
    fresh = toys.Digits()
    before = snapshot(fresh)
    save_pretrained(model, tmp_path, base=fresh)
    assert read_config(tmp_path)["model_args"]["base"] is None
    back = from_pretrained(tmp_path, base=fresh)
    assert not differences(before, snapshot(fresh))
    x = images((1, 28, 28))
    assert_same(run(model, x), run(back.eval(), x))
    for load in LOADERS.values():
        with pytest.raises(SurgeryError, match=r"names no base|Give a fresh model of it: .*base=Digits"):
            load(tmp_path)
    with pytest.raises(SurgeryError, match="'num_classes' is for bases by name"):
        from_pretrained(tmp_path, base=fresh, num_classes=3)


def test_names_that_fit_are_listed(tmp_path):
    model = add_se(build("torchvision/resnet18", num_classes=7))
    with pytest.raises(SurgeryError, match=r"are those of torchvision/resnet18\. Give base='torchvision/resnet18'"):
        save_pretrained(model, tmp_path)


def test_the_files(model, folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(model.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert metadata["format"] == "pt" and json.loads(metadata["se_surgery"]) == config
    assert set(config) == {
        "architecture", "num_classes", "num_features", "model_args", "pretrained_cfg", "se_surgery"
    }  # fmt: skip
    assert config["architecture"] == "se_surgery" and config["num_classes"] == 1000 and config["num_features"] == 96
    arguments = config["model_args"]
    assert set(arguments) == {"base", "recipe", "digest"}  # transformers gives num_classes itself
    assert arguments["digest"] == {"sha256": digest_of(model.state_dict(), arguments["recipe"])}
    assert not {"architecture", "url", "file", "hf_hub_id", "source", "label_offset"} & config["pretrained_cfg"].keys()


def test_the_digest_is_of_names_dtypes_shapes_bytes_and_the_recipe():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2).to(torch.int32)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3)},
    ]
    digests = [digest_of(t, {"x": 1}) for t in (tensors, *others)] + [digest_of(tensors, {"x": 2})]
    assert len(set(digests)) == len(digests)
    same = {"b": torch.ones(4)[::2], "a": torch.zeros(3, 2).t()}
    assert digest_of(same, {"x": 1}) == digests[0]


def spoiled_config(change):
    def spoil(path):
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return spoil


def spoiled_values(change, metadata=None):
    def spoil(path):
        with safetensors.safe_open(path / "model.safetensors", "pt") as file:
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            kept = file.metadata()
        change(values)
        safetensors.torch.save_file(values, path / "model.safetensors", kept if metadata is None else metadata)

    return spoil


def written(name, content):
    return lambda path: (path / name).write_bytes(content)


def top(**changes):
    return spoiled_config(lambda config: config.update(changes))


def arguments(**changes):
    return spoiled_config(lambda config: config["model_args"].update(changes))


def recipe(**changes):
    return spoiled_config(lambda config: config["model_args"]["recipe"].update(changes))


def described(**changes):
    return spoiled_config(lambda config: config["pretrained_cfg"].update(changes))


def by_hand(path):
    """Weights that were changed and saved by a program that knows nothing of digests, with one in the configuration."""
    spoiled_values(lambda v: v["fc.bias"].add_(1), metadata={"format": "pt"})(path)


BOTH, OURS = ("from_pretrained", "timm"), ("from_pretrained",)
MIX = "is not what was saved: the sha256"
TIMES = "were not saved together"
# What is done to a folder, what is said, and by whom; timm reads config.json before it calls us.
SPOILED = {
    "no values": (lambda path: (path / "model.safetensors").unlink(), r"has no model\.safetensors", BOTH),
    "values cut": (written("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "no whole safetensors file", BOTH),
    "no JSON": (written("config.json", b"{"), "it is no JSON", OURS),
    "no text": (written("config.json", b"\xff\xfe"), "it is no JSON", OURS),
    "deep JSON": (written("config.json", b"[" * 100_000), "it is no JSON", OURS),
    "a large file": (written("config.json", b" " * 5_000_001), "is larger than", OURS),
    "a list": (written("config.json", b"[]"), r"all of it is \[\], and should be a mapping", OURS),
    "another program's": (
        spoiled_config(lambda config: config.update(architecture="resnet18")),
        "architecture 'resnet18'",
        OURS,
    ),
    "a later format": (spoiled_config(lambda config: config["se_surgery"].update(format=9)), "is of format 9", OURS),
    "no arguments": (spoiled_config(lambda config: config.pop("model_args")), "model_args is None", OURS),
    "no recipe": (spoiled_config(lambda config: config["model_args"].pop("recipe")), f"not a recipe|{TIMES}", BOTH),
    "no base": (recipe(base=None), f"Give a fresh model of it|{TIMES}", BOTH),
    "an unknown base": (recipe(base="test_resnets"), "is not the recipe's|There is no model|" + MIX, BOTH),
    "a path as base": (arguments(base="../test_resnet"), "is not the recipe's|There is no model|not the name", BOTH),
    "a list as base": (arguments(base=["test_resnet"]), "is not the name of a model", BOTH),
    "an argument that reads": (arguments(checkpoint_path="x.pth"), "an argument that a recipe may give", BOTH),
    "an argument that fetches": (arguments(pretrained_cfg_overlay={"url": "http://x"}), "an argument that", OURS),
    "a base argument that reads": (recipe(base_args={"checkpoint_path": "x"}), "an argument that a recipe may", BOTH),
    "other base arguments": (recipe(base_args={"output_stride": 8}), TIMES, BOTH),
    "operations gone": (recipe(operations=[]), TIMES, BOTH),
    "a newer recipe": (recipe(version=99), "version 99", BOTH),
    "no digest": (arguments(digest={}), None, BOTH),
    "another digest": (arguments(digest={"sha256": "0" * 64}), TIMES, BOTH),
    "a digest that is none": (arguments(digest="abc"), "no sha256", BOTH),
    "other classes": (top(num_classes=7), "fc.weight is 1000x96 and not 7x96|says 7 classes", BOTH),
    "other classes below": (described(num_classes=7), None, BOTH),  # timm goes by those above
    "many classes": (top(num_classes=10**13), "num_classes is 10000000000000, and should be a whole number", BOTH),
    "other channels": (described(input_size=[4, 64, 64]), "in_chans is 3 among the arguments and 4 in pre", BOTH),
    "many channels": (described(input_size=[10**13, 64, 64]), "pretrained_cfg.input_size is", BOTH),
    "no size": (described(input_size=None), None, BOTH),
    "an unknown field": (described(nosuch=1), "should be fields that timm knows", BOTH),
    "a field that fetches": (
        described(url="http://x"),
        "pretrained_cfg.url is 'http://x', and should be left out",
        BOTH,
    ),
    "a custom loader": (described(custom_load="hf"), "pretrained_cfg.custom_load is 'hf'", BOTH),
    "a label offset": (described(label_offset=1), "pretrained_cfg.label_offset is 1", BOTH),
    "a value gone": (spoiled_values(lambda v: v.pop("layer2.0.se.fc1.weight")), MIX, BOTH),
    "a value more": (spoiled_values(lambda v: v.update(more=torch.zeros(1))), MIX, BOTH),
    "a value changed": (spoiled_values(lambda v: v["fc.bias"].add_(1)), MIX, BOTH),
    "values changed by hand": (by_hand, MIX, BOTH),
    "metadata damaged": (spoiled_values(lambda v: None, metadata={"se_surgery": "{"}), "it is no JSON", BOTH),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_folders(case, folder, model, tmp_path):
    spoil, message, hows = SPOILED[case]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    for how in hows:
        if message is None:
            assert_same(run(model, images()), run(LOADERS[how](tmp_path), images()))
            continue
        for wanted in ({}, {"num_classes": 3}):
            with pytest.raises(SurgeryError, match=message):
                LOADERS[how](tmp_path, **wanted)


def test_pickles_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for name in ("pytorch_model.bin", "model.pth"):
        torch.save({}, tmp_path / name)
        for load in LOADERS.values():
            with pytest.raises(SurgeryError, match=rf"'{name}' is not read: loading a pickle may run"):
                load(tmp_path)
        (tmp_path / name).unlink()


def test_new_weights_and_an_old_configuration(folder, tmp_path):
    """What a save that was killed between its two files leaves: the way back is in the message."""
    save_pretrained(operated(stages=1), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for load in LOADERS.values():
        with pytest.raises(SurgeryError, match=r"were not saved together: .* remove config\.json, read the rest"):
            load(tmp_path)
    (tmp_path / "config.json").unlink()
    back = from_pretrained(tmp_path)
    assert_same(run(back, images()), run(from_pretrained(folder), images()))
    save_pretrained(back, tmp_path, overwrite=True)
    assert_same(run(back, images()), run(timm_load(tmp_path), images()))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("NaN", lambda model: model.fc.weight.data.fill_(float("nan")), r"cannot be saved: fc\.weight holds NaN"),
        ("variance", lambda model: model.bn1.running_var.fill_(-1), "bn1.running_var is a negative variance"),
        ("meta", lambda model: model.to("meta"), "'conv1.0.weight' is on the meta device"),
        (
            "tied",
            lambda model: setattr(model.layer1[0].bn1, "weight", model.layer1[0].bn2.weight),
            "share their memory",
        ),
        ("another head", lambda model: setattr(model, "fc", nn.Linear(96, 7)), "cannot be built anew: .*fc.weight"),
        ("another layer", lambda model: setattr(model, "act1", nn.Linear(3, 3)), "act1.weight is not the model's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_saved(name, spoil, message, tmp_path):
    model = operated()
    spoil(model)
    with pytest.raises(SurgeryError, match=message):
        save_pretrained(model, tmp_path)
    assert not os.listdir(tmp_path)


def test_what_was_put_into_a_model_since(tmp_path):
    model = operated()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(SurgeryError, match=r"extra\.weight is not the model's.*What was put into it since") as caught:
        save_pretrained(model, tmp_path)
    assert "file is damaged" not in str(caught.value)


@pytest.mark.parametrize("channels", [0, -1, "3", True, 1.5], ids=repr)
def test_channels_that_mean_nothing(channels, folder):
    for load in LOADERS.values():
        with pytest.raises(SurgeryError, match=r"is no number of input channels\. Give 1 or more"):
            load(folder, in_chans=channels)


# Arguments of save_pretrained that mean nothing.
MISTAKES = [
    ({"base": "nosuch"}, "base='nosuch' is no model of timm or torchvision"),
    ({"base": "hf-hub:timm/resnet18"}, "is no model of timm or torchvision"),
    ({"base": "resnet18"}, "cannot be built anew: .* Give base and base_args"),
    ({"base_args": {"act_layer": nn.SiLU}}, "The recipe is no plain data"),
    ({"base_args": {"checkpoint_path": "a.pth"}}, "an argument that a recipe may give a base"),
    ({"base_args": ["act_layer"]}, r"base_args=\['act_layer'\] is no mapping"),
    ({"base_args": "silu"}, "base_args='silu' is no mapping"),
    ({"license": 3}, "license=3 is not the name of a licence"),
    ({"base_model": 3}, "base_model=3 is not the name of a repository"),
    ({"base_model": "a/b\n# more"}, "is not the name of a repository"),
    ({"tags": "medical"}, r"tags='medical' is not a list of words\. Give tags=\['medical'\]"),
    ({"tags": None}, "tags=None is not a list of words"),
    ({"tags": ["a\nb"]}, "is not a list of words"),
    ({"plot": "nosuch.png"}, "plot='nosuch.png' cannot be read"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=str)
def test_mistakes(given, message, model, tmp_path):
    with pytest.raises(SurgeryError, match=message):
        save_pretrained(model, tmp_path, **given)
    assert not os.listdir(tmp_path)


def test_tags_that_can_be_gone_through_only_once(model, tmp_path):
    with pytest.raises(SurgeryError, match="is not a list of words"):
        save_pretrained(model, tmp_path, tags=(tag for tag in ["medical"]))


@pytest.mark.parametrize("place", [None, 3, b"net"], ids=str)
def test_places_that_are_none(place, model):
    with pytest.raises(SurgeryError, match=r"is no path of a folder\. Name a folder"):
        save_pretrained(model, place)
    with pytest.raises(SurgeryError, match="is no folder and no repository"):
        from_pretrained(place)


def test_names_of_folders(model, tmp_path):
    """Whatever a folder is called, the model loads and the card's lines of Python are Python."""
    for name in ("mödel 模型", 'a"b\nc'):
        path = save_pretrained(model, tmp_path / name)
        assert_same(run(model, images()), run(from_pretrained(path).eval(), images()))
        card = (path / "README.md").read_text(encoding="utf-8")
        compile(card.partition("```python\n")[2].partition("```")[0], "card", "exec")
        assert f"# {' '.join(name.split())}\n" in card
    with pytest.raises(SurgeryError, match=r"cannot be written \(.*surrogates not allowed"):
        save_pretrained(model, tmp_path / "\udcff")
    assert len(os.listdir(tmp_path)) == 2


def test_a_readme_that_cannot_be_read_is_left(model, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")

    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SurgeryError, match=r"README\.md' cannot be read \(not yours\), and may be yours\. Move it"):
        save_pretrained(model, tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["README.md"]


def test_a_folder_that_may_not_be_searched(folder, monkeypatch):
    def refuse(path, **options):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(SurgeryError, match=r"good' cannot be read \(not yours\)\. See that it can"):
        from_pretrained(folder)


def test_two_saves_into_a_new_folder(model, tmp_path, monkeypatch):
    """While this one was being made ready the other one has filled the folder."""
    packed = se_surgery.files.pretrained.pack

    def slow(*args):
        save(operated(stages=1), tmp_path / "net")
        return packed(*args)

    def save(model, folder):
        monkeypatch.setattr(se_surgery.files.pretrained, "pack", packed)
        save_pretrained(model, folder)

    monkeypatch.setattr(se_surgery.files.pretrained, "pack", slow)
    with pytest.raises(SurgeryError, match=r"is not empty, .*ask for overwrite"):
        save_pretrained(model, tmp_path / "net")
    assert len(find_se(from_pretrained(tmp_path / "net"))) == 1


def test_where_nothing_is(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path / "nosuch", "There is no folder"),
        (tmp_path / "file", "There is no folder"),
        (tmp_path, r"has no model\.safetensors"),
        ("resnet18", "There is no folder 'resnet18', and it names no repository"),
    ):
        with pytest.raises(SurgeryError, match=message):
            from_pretrained(place)
    with pytest.raises(SurgeryError, match="is a folder, which has no revision 'v1'"):
        from_pretrained(folder, revision="v1")
    with pytest.raises(SurgeryError, match="'pretrained' is what the folder or repository says"):
        from_pretrained(folder, pretrained=False)
    with pytest.raises(SurgeryError, match=r"base='test_resnet' is no model\. The folder names its base"):
        from_pretrained(folder, base="test_resnet")
    with pytest.raises(SurgeryError, match=r"is not empty, .*ask for overwrite"):
        save_pretrained(build("test_resnet"), folder)


def test_features_cannot_be_saved(tmp_path):
    with pytest.raises(SurgeryError, match=r"A FeatureListNet cannot be saved\. Give the whole network"):
        save_pretrained(timm.create_model("se_test_resnet", features_only=True), tmp_path)


def test_a_readme_of_ones_own_is_kept(tmp_path):
    save_pretrained(operated(), tmp_path)
    assert "4 SEs put in" in (tmp_path / "README.md").read_text()
    save_pretrained(operated(stages=1), tmp_path, overwrite=True)
    assert "1 SE put in" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(operated(), tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == "mine"


def rows_of(folder):
    """The tables of a model's card."""
    lines = (folder / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_card_says_what_the_model_costs(tmp_path):
    model = operated()
    costs = count_costs(model, (3, 96, 96))
    save_pretrained(model, tmp_path, example_input=(3, 96, 96))
    rows = {row[0]: row[1:] for row in rows_of(tmp_path)}
    for part, side, ses in (("whole", costs.whole, None), ("stage 2", costs.parts["stage 2"], costs.ses["stage 2"])):
        numbers = [int(number.replace(",", "")) for number in rows[part]]
        assert numbers[::2] == [side.parameters, side.multiply_adds, side.activations]
        assert ses is None or numbers[1::2] == [ses.parameters, ses.multiply_adds, ses.activations]
    assert int(rows["whole"][0].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert int(rows["whole"][1].replace(",", "")) == sum(site.params for site in find_se(model))


class ReadsValues(toys.Digits):
    """A network that looks at the values of its maps, as detectors do: its multiply-adds depend on them."""

    def forward(self, x):
        x = super().forward(x)
        return x if x.sum().item() > 0 else -x


def test_a_card_without_costs_where_they_cannot_be_counted(tmp_path):
    save_pretrained(add_se(ReadsValues(), init="paper"), tmp_path, base=ReadsValues())
    assert "Not counted: the network reads the values of its own maps." in (tmp_path / "README.md").read_text()


def test_trained_weights_differ(folder):
    """What makes the comparisons above mean something: the saved weights are not those of a fresh model."""
    fresh = timm.create_model("local-dir:" + str(folder), pretrained=False).eval()
    assert_differs(run(fresh, images()), run(timm_load(folder).eval(), images()))


ZOO = Path(__file__).parent / "zoo"
FAMILIES = [
    *(ZOO / "timm_reps.txt").read_text().split(),
    *(f"torchvision/{name}" for name in (ZOO / "torchvision_reps.txt").read_text().split()),
]
# Every representative of a family, each placement on both ResNet-50, SEs taken out, SEs made narrower: name, operation.
ROUND_TRIPS = [
    *((name, lambda model: add_se(model, init="paper", existing="stack")) for name in FAMILIES),
    *(
        (name, lambda model, placement=placement: add_se(model, placement, init="paper"))
        for name in ("resnet50", "torchvision/resnet50")
        for placement in ("standard", "pre", "post", "identity", "inner")
    ),
    ("seresnet50", lambda model: strip_se(model, -1)),
    ("torchvision/efficientnet_b0", strip_se),
    ("resnet50", lambda model: prune_se(add_se(model, init="paper"), 0.5)),
    ("torchvision/resnet50", lambda model: prune_se(add_se(model, "pre", init="paper"), 0.5, stages=(3, 4))),
    ("se_resnet50_last_stage_stripped", lambda model: model),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "operate"), ROUND_TRIPS, ids=lambda value: value if isinstance(value, str) else "")
def test_round_trips(name, operate, tmp_path):
    model = operate(build(name))
    x = images(size(name))
    save_pretrained(model, tmp_path, base=name if "/" in name else None, example_input=tuple(x.shape[1:]))
    expected, own = run(model, x), model.state_dict()
    for load in LOADERS.values():
        assert_same(expected, run(load(tmp_path).eval(), x))
    heads = read_config(tmp_path)["pretrained_cfg"]["classifier"]
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for classes in (7, 0):
        found = timm_load(tmp_path, num_classes=classes).state_dict()
        assert all(torch.equal(own[key], value) for key, value in found.items() if not key.startswith(heads))
        assert classes == 0 or found.keys() == own.keys()


def size(name):
    """The smallest image that a network's own pooling and strides leave more than one position of, or its own."""
    big = ("inception", "nasnet", "pnasnet", "legacy_xception", "vgg", "lowformer", "focalnet", "alexnet", "googlenet")
    return (3, 299, 299) if name.rpartition("/")[2].startswith(big) else (3, 128, 128)
