"""Folders: a model comes back bit for bit, and what is not one is refused with a reason."""

import json
import os
import stat

import pytest
import safetensors.torch
import torch
from patients import assert_same, build, images, run

from se_surgery import SurgeryError, add_se, find_se, strip_se
from se_surgery.saved import check_directory, load, read_recipe, save


def operated(name="test_resnet", **options):
    options = {"init": "paper", **options}
    return add_se(build(name), **options)


# Name, and how it is operated on.
CASES = {
    "standard": ("test_resnet", lambda model: add_se(model, init="paper")),
    "identity start": ("test_resnet", lambda model: add_se(model)),
    "r by stage, biases": (
        "test_resnet",
        lambda model: add_se(model, r={2: 4, -1: 8}, bias=(False, True), init="paper"),
    ),
    "where": ("test_resnet", lambda model: add_se(model, "pre", where="layer[12].*", init="paper")),
    "attention": ("test_resnet", lambda model: add_se(model, attn="eca", squeeze="avg", init="paper")),
    "replaced": ("efficientnet_b0", lambda model: add_se(model, existing="replace", stages=-1, init="paper")),
    "twice": ("test_resnet", lambda model: add_se(add_se(model, init="paper"), "post", init="paper", existing="stack")),
    "add and strip": ("test_resnet", lambda model: strip_se(add_se(model, init="paper"), -1)),
    "native strip": ("efficientnet_b0", lambda model: strip_se(model, [1, 2])),
    "never operated on": ("test_resnet", lambda model: model),
    "torchvision": ("torchvision/shufflenet_v2_x0_5", lambda model: add_se(model, init="paper")),
    "half": ("test_resnet:half", lambda model: add_se(model, init="paper")),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    name, operate = CASES[case]
    model = operate(build(name))
    assert save(model, tmp_path / "a" / "b", name.partition(":")[0]) == tmp_path / "a" / "b"
    back = load(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["model.safetensors", "recipe.json"]
    assert {key: value.dtype for key, value in model.state_dict().items()} == {
        key: value.dtype for key, value in back.state_dict().items()
    }
    assert list(model.state_dict()) == list(back.state_dict())
    assert find_se(back) == find_se(model)
    x = images(like=model)
    assert_same(run(model, x), run(back, x))
    assert_same(run(model, x, training=True), run(back, x, training=True))


def test_arguments_of_the_base_come_back(tmp_path):
    model = add_se(build("test_resnet", in_chans=1, num_classes=7))
    save(model, tmp_path, "test_resnet", {"in_chans": 1, "num_classes": 7})
    x = images((1, 64, 64))
    assert_same(run(model, x), run(load(tmp_path), x))


def test_a_folder_can_be_loaded_operated_on_and_saved_again(tmp_path):
    save(operated(stages=1), tmp_path, "test_resnet")
    model = add_se(load(tmp_path), stages=2, init="paper").eval()
    save(model, tmp_path, "test_resnet", overwrite=True)
    back = load(tmp_path)
    assert [site.stage for site in find_se(back)] == [1, 2]
    assert_same(run(model, images()), run(back, images()))


def test_shared_and_strided_tensors(tmp_path):
    model = operated()
    model.layer2[0].se.fc1.weight = torch.nn.Parameter(model.layer2[0].se.fc2.weight.detach().transpose(0, 1))
    model.layer3[0].se.fc1.weight.data = model.layer3[0].se.fc1.weight.data.contiguous(
        memory_format=torch.channels_last
    )
    save(model, tmp_path, "test_resnet")
    assert_same(run(model, images()), run(load(tmp_path), images()))


def test_the_file_is_plain_safetensors(tmp_path):
    model = operated()
    save(model, tmp_path, "test_resnet")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(model.state_dict())


@pytest.mark.skipif(os.name != "posix", reason="modes of files are a POSIX matter")
def test_files_have_the_usual_mode(tmp_path):
    usual = tmp_path / "usual"
    usual.write_text("")
    save(operated(), tmp_path / "a", "test_resnet")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (usual, *(tmp_path / "a").iterdir())}
    assert len(modes) == 1


def test_a_folder_that_holds_something(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SurgeryError, match=r"is not empty\. Name another folder"):
        save(operated(), tmp_path, "test_resnet")
    assert os.listdir(tmp_path) == ["notes.txt"]
    save(operated(), tmp_path, "test_resnet", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "notes.txt", "recipe.json"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(SurgeryError, match=r"'.*a' is a file\. Name a folder\."):
        save(operated(), tmp_path / "a", "test_resnet", overwrite=True)
    with pytest.raises(SurgeryError, match="cannot be written"):
        save(operated(), tmp_path / "a" / "b", "test_resnet")


def test_an_empty_folder_and_a_new_one_are_free(tmp_path):
    assert check_directory(tmp_path) == tmp_path
    assert check_directory(tmp_path / "new") == tmp_path / "new"


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    save(operated(), tmp_path, "test_resnet")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(SurgeryError, match=r"cannot be written .*no space left"):
        save(operated(stages=1), tmp_path, "test_resnet", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act_layer": torch.nn.ReLU}, "The recipe is no plain data"),
        ({"pretrained": True}, "hold 'pretrained'"),
        ({"checkpoint_path": "a.pth"}, "hold 'checkpoint_path'"),
    ],
)
def test_arguments_that_cannot_be_written(arguments, message, tmp_path):
    with pytest.raises(SurgeryError, match=message):
        save(operated(), tmp_path / "a", "test_resnet", arguments)
    assert not (tmp_path / "a").exists()


def test_a_model_without_values(tmp_path):
    with pytest.raises(SurgeryError, match=r"'conv1\.0\.weight' has no values"):
        save(build("test_resnet").to("meta"), tmp_path, "test_resnet")
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A good folder; each test below spoils a copy of it."""
    path = tmp_path_factory.mktemp("saved") / "good"
    save(operated(), path, "test_resnet")
    return path


def spoiled_recipe(**changes):
    def spoil(path):
        recipe = json.loads((path / "recipe.json").read_text())
        recipe.update(changes)
        (path / "recipe.json").write_text(json.dumps(recipe))

    return spoil


def spoiled_values(change):
    def spoil(path):
        values = safetensors.torch.load_file(path / "model.safetensors")
        change(values)
        safetensors.torch.save_file(values, path / "model.safetensors")

    return spoil


def written(name, content):
    return lambda path: (path / name).write_bytes(content)


SPOILED = {
    "no recipe": (lambda path: (path / "recipe.json").unlink(), "recipe.json' cannot be read .*se-surgery add"),
    "no values": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors' cannot be read"),
    "values cut": (written("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "model.safetensors' cannot be read"),
    "no JSON": (written("recipe.json", b"{"), "recipe.json' is not JSON"),
    "no text": (written("recipe.json", b"\xff\xfe"), "recipe.json' is not JSON"),
    "a list": (written("recipe.json", b"[]"), "names no base"),
    "no base": (spoiled_recipe(base=None), "names no base"),
    "an unknown base": (spoiled_recipe(base="test_resnets"), "There is no model 'test_resnets'"),
    "a path as base": (spoiled_recipe(base="../test_resnet"), "There is no model"),
    "a hub's base": (spoiled_recipe(base="hf-hub:timm/resnet18"), "Names with a colon"),
    "arguments no mapping": (spoiled_recipe(base_args=[1]), r"has base_args \[1\], not a mapping"),
    "arguments that fetch": (spoiled_recipe(base_args={"checkpoint_path": "x.pth"}), "hold 'checkpoint_path'"),
    "arguments that do not fit": (spoiled_recipe(base_args={"nosuch": 1}), "cannot be created with nosuch=1"),
    "a newer version": (spoiled_recipe(version=99), "version 99"),
    "another format": (spoiled_recipe(format="other"), "not a recipe"),
    "operations no list": (spoiled_recipe(operations=3), "operations"),
    "an unknown operation": (spoiled_recipe(operations=[{"op": "fold", "sites": []}]), "operations"),
    "another base": (spoiled_recipe(base="test_resnet", base_args={"num_classes": 3}), "fc.weight is .* and not"),
    "operations gone": (spoiled_recipe(operations=[]), "layer1.0.se.fc1.weight is not the model's"),
    "a value gone": (
        spoiled_values(lambda v: v.pop("layer2.0.se.fc1.weight")),
        r"1 of .*\(layer2.0.se.fc1.weight is missing\)",
    ),
    "a value more": (spoiled_values(lambda v: v.update(more=torch.zeros(1))), "more is not the model's"),
    "a value of another shape": (
        spoiled_values(lambda v: v.update({"fc.bias": torch.zeros(3)})),
        r"fc.bias is \(3,\) and not \(1000,\)",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_folders(case, folder, tmp_path):
    spoil, message = SPOILED[case]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(SurgeryError, match=message):
        load(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(SurgeryError, match=r"nosuch.recipe.json' cannot be read"):
        load(tmp_path / "nosuch")


def test_recipe_names_the_base(folder):
    recipe = read_recipe(folder)
    assert (recipe["base"], recipe["base_args"], len(recipe["operations"])) == ("test_resnet", {}, 1)
