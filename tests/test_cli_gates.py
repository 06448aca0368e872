"""The command line on images: what it says of gates and SEs is what the library says of the same images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from patients import assert_same, build
from PIL import Image
from sklearn.datasets import load_digits
from test_cli import call
from timm.data import create_transform
from torch import Tensor, nn

from se_surgery import (
    DataError,
    Excitations,
    excitations,
    find_se,
    from_pretrained,
    save_pretrained,
    strip_se,
    tradeoff,
)
from se_surgery.gates.pictures import open_pictures

SIDE, CLASSES = 32, 3
SIZE = (3, SIDE, SIDE)
NAMES = ("0", "1", "2")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Handwritten digits as an image folder: 8 of each of three classes, 8 x 8 pixels made larger."""
    found, folder = load_digits(), tmp_path_factory.mktemp("data") / "digits"
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        for i, pixels in enumerate(found.images[found.target == label][:8]):
            picture = Image.fromarray((pixels * 15.9).astype("uint8")).resize((40, 40))
            picture.save(folder / str(label) / f"{i}.png")
    return folder


def network(**options: Any) -> nn.Module:
    """Two native SEs, whose gates vary."""
    model = build("test_efficientnet", num_classes=CLASSES, **options)
    torch.manual_seed(4)
    with torch.no_grad():
        for site in find_se(model, (model.conv_stem.in_channels, SIDE, SIDE)):
            model.get_submodule(site.path).conv_reduce.weight.normal_(0.0, 20.0)
            model.get_submodule(site.path).conv_expand.weight.normal_()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The network in a folder; no test writes into it."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    save_pretrained(network(), folder, example_input=SIZE)
    return folder


def by_hand(model: nn.Module, folder: Path, mode: str = "RGB") -> list[tuple[Tensor, Tensor]]:
    """The images of a folder, scaled, cropped and normalised by timm's own function, in one batch."""
    config: Any = model.pretrained_cfg
    gray = {name: (sum(config[name]) / 3,) for name in ("mean", "std")} if mode == "L" else {}
    told = {name: config[name] for name in ("mean", "std", "crop_pct", "interpolation")} | gray
    transform = create_transform((len(told["mean"]), SIDE, SIDE), is_training=False, **told)
    files = [(label, path) for label in range(CLASSES) for path in sorted((folder / str(label)).glob("*.png"))]
    x = torch.stack([transform(Image.open(path).convert(mode)) for _, path in files])
    return [(x, torch.tensor([label for label, _ in files]))]


LOOKING = ("--size", "3,32,32", "--workers", "0")


def told(*arguments: Any) -> Any:
    return json.loads(call(*arguments, "--json")[0])


# ---------------------------------------------------------------------------------------------------------- excitations


def assert_gates(data: Any, expected: Excitations) -> None:
    """The statistics of a command are those of the library, but for the sizes of batches."""
    assert [site["path"] for site in data["sites"]] == [gates.site.path for gates in expected]
    for site, gates in zip(data["sites"], expected, strict=True):
        assert site["inputs"] == gates.count
        assert site["mean"] == pytest.approx(float(gates.mean.mean()), rel=1e-5)
        assert site["variance"] == pytest.approx(float(gates.variance.mean()), rel=1e-3) and site["variance"] > 1e-8
        assert site["saturated"] == pytest.approx(float(gates.saturated.mean()), rel=1e-5)
        if gates.between is not None:
            assert site["between"] == pytest.approx(float(gates.between.mean()), rel=1e-3)


def test_excitations_are_those_of_the_images(saved: Path, digits: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved).eval()
    expected = excitations(model, by_hand(model, digits), NAMES)
    plot, file = tmp_path / "gates.png", tmp_path / "gates.safetensors"
    data = told("excitations", saved, digits, *LOOKING, "--batch-size", 7, "--plot", plot, "--save", file)
    assert_gates(data, expected)
    assert data["classes"] == list(NAMES) and data["data"] == repr(str(digits)) and data["skipped"] == {}
    assert plot.read_bytes()[:4] == b"\x89PNG"
    again = Excitations.load(file)
    assert again.names == NAMES
    for gates, other in zip(again, expected, strict=True):
        assert torch.allclose(gates.class_means, other.class_means, rtol=1e-5)


def test_excitations_are_shown_as_a_table(saved: Path, digits: Path) -> None:
    stdout, stderr = call("excitations", saved, digits, *LOOKING, "--images", 6)
    lines = stdout.splitlines()
    assert lines[0] == f"{saved} on {str(digits)!r}" and lines[2] == "2 SEs over 6 inputs of 3 classes"
    assert [line.split()[1] for line in lines if "blocks" in line] == ["blocks.3.0.se", "blocks.4.0.se"]
    assert f"Opening {digits} ..." in stderr


def test_a_part_of_the_images_is_spread_over_all(saved: Path, digits: Path) -> None:
    """Images 0, 4, 8, ... of 24, by processes of their own."""
    model = from_pretrained(saved).eval()
    ((x, y),) = by_hand(model, digits)
    some = told("excitations", saved, digits, *LOOKING[:2], "--images", 6, "--workers", 2, "--batch-size", 4)
    assert_gates(some, excitations(model, [(x[::4], y[::4])], NAMES))


def test_a_network_of_one_channel_sees_gray_images_and_images_alone_have_no_classes(digits: Path, tmp_path) -> None:
    model = network(in_chans=1)
    save_pretrained(model, tmp_path / "gray", example_input=(1, SIDE, SIDE))
    ((x, _),) = by_hand(model, digits, "L")
    data = told("excitations", tmp_path / "gray", digits / "1", "--size", "1,32,32", "--workers", 0)
    assert_gates(data, excitations(model, [x[8:16]]))
    assert data["classes"] == [] and {site["between"] for site in data["sites"]} == {None}


@pytest.mark.parametrize("name", ["se_test_resnet", "torchvision/mobilenet_v3_small"])
def test_models_by_name_and_data_sets_by_name(name: str, digits: Path) -> None:
    """torchvision's reader of a folder, by timm's name for it, and the part of it that is asked for."""
    given = ("torch/image_folder", "--root", digits.parent, "--split", "digits", "--images", 4)
    data = told("excitations", name, *given, *LOOKING)
    assert {site["inputs"] for site in data["sites"]} == {4} and data["classes"] == list(NAMES)
    assert len(data["sites"]) == {"se_test_resnet": 4, "torchvision/mobilenet_v3_small": 9}[name]


def test_class_names_of_the_model_give_the_labels(saved: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("2\nnine\n0\n")
    data = told("excitations", saved, digits, *LOOKING, "--class-map", tmp_path / "names.txt")
    assert data["classes"] == ["2", "0"] and {site["inputs"] for site in data["sites"]} == {16}


# ------------------------------------------------------------------------------------------------- tradeoff, folding


def test_tradeoff_takes_the_best_set_out_and_writes_the_rest(saved: Path, digits: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved).eval()
    expected = tradeoff(model, by_hand(model, digits), budget=2184, example_input=SIZE)
    scores, plot, folder = tmp_path / "scores.json", tmp_path / "plot.png", tmp_path / "less"
    given = (saved, digits, *LOOKING, "--budget", 2184, "--resume", scores)
    data = told("tradeoff", *given, "--plot", plot, "-o", folder)
    assert (data["score"], data["result"], data["taken"]) == (expected.score, expected.result, list(expected.taken))
    assert [(s["path"], s["stripped"], s["folded"]) for s in data["sites"]] == [
        (worth.site.path, worth.stripped, worth.folded) for worth in expected.ranked
    ]
    freed = {site["path"]: site["params"] for site in data["sites"]}
    for best in data["best_sets"]:
        assert best["freed"] == sum(freed[path] for path in best["sites"])
    assert plot.read_bytes()[:4] == b"\x89PNG" and data["taken"]
    loaded = from_pretrained(folder).eval()
    assert [site.path for site in find_se(loaded, SIZE)] == [site.path for site in find_se(model, SIZE)]
    for key, value in model.state_dict().items():
        assert torch.allclose(loaded.state_dict()[key], value, rtol=1e-5), "folded gates differ by batches alone"
    before = scores.read_text()
    stdout, _ = call("tradeoff", *given)
    assert f"Score then: {expected.result:.4f}." in stdout and scores.read_text() == before


def test_strip_folds_the_mean_gates(saved: Path, digits: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved).eval()
    base = strip_se(from_pretrained(saved).eval(), stages=-1, example_input=SIZE)
    expected = strip_se(model, stages=-1, fold="mean", loader=by_hand(model, digits), example_input=SIZE)
    stdout, _ = call("strip", saved, "--stages", "-1", "--fold", digits, *LOOKING, "-o", tmp_path / "folded")
    assert f"1 of 2 SEs taken out, the mean of their gates on {digits} folded" in stdout
    loaded = from_pretrained(tmp_path / "folded").eval()
    assert list(loaded.state_dict()) == list(base.state_dict())
    for (key, value), other in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.allclose(value, other, rtol=1e-5), key
    changed = [key for key, value in base.state_dict().items() if not torch.equal(value, loaded.state_dict()[key])]
    assert 1 <= len(changed) <= 2


# -------------------------------------------------------------------------------------------------------------- refused


def broken(digits: Path, folder: Path) -> Path:
    """The digits with one file that is no image."""
    for path in digits.glob("*/*.png"):
        target = folder / path.relative_to(digits)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if path.name != "3.png" or path.parent.name != "1" else b"no image")
    return folder


def parted(digits: Path, folder: Path) -> Path:
    """The digits in two parts, neither of which is for validation."""
    for part in ("train", "test"):
        shutil.copytree(digits, folder / part)
    return folder


def many(digits: Path, folder: Path) -> Path:
    for label in range(5):
        (folder / str(label)).mkdir(parents=True)
        (folder / str(label) / "0.png").write_bytes((digits / "0" / "0.png").read_bytes())
    return folder


# What to make of the digits, the command and its options, the exit code and what it says.
REFUSED: dict[str, tuple[Any, str, tuple[Any, ...], int, str]] = {
    "no folder": (lambda digits, path: path / "x", "excitations", (), 1, "is neither a folder nor timm's name"),
    "a file": (lambda digits, path: digits / "0/0.png", "excitations", (), 1, "is neither a folder nor timm's name"),
    "an empty folder": (lambda digits, path: path, "excitations", (), 1, "Found 0 images"),
    "images alone": (lambda digits, path: digits / "0", "tradeoff", (), 1, "has no classes. Put the images of each"),
    "no image": (broken, "excitations", (), 1, "3.png' cannot be read as an image"),
    "no image, in another process": (broken, "excitations", ("--workers", 1), 1, "3.png' cannot be read as an image"),
    "no image, tradeoff": (broken, "tradeoff", (), 1, "3.png' cannot be read as an image"),
    "no image, fold": (broken, "strip", (), 1, "3.png' cannot be read as an image"),
    "no such part": (parted, "tradeoff", ("--split", "vall"), 1, "has no part 'vall'. It has test, train: name one"),
    "no part to evaluate on": (parted, "excitations", (), 1, "has no part 'validation'. It has test, train: name one"),
    "more classes": (many, "tradeoff", (), 1, "has 5 classes, and the model has scores for 3"),
    "below zero": (None, "tradeoff", ("--budget", "-1"), 1, "budget=-1 is below zero"),
    "above all": (None, "tradeoff", ("--budget", "6997"), 1, "budget=6997 is above 6996 parameters"),
    "above one": (None, "tradeoff", ("--budget", "1.5"), 1, "budget=1.5 is above 1.0"),
    "no number": (None, "tradeoff", ("--budget", "half"), 2, "'half' is neither a number of parameters nor a share"),
    "no budget": (None, "tradeoff", ("-o", "out"), 1, "Say how many parameters stay: --budget"),
    "no such device": (None, "excitations", ("--device", "abacus"), 1, "device='abacus' cannot be used"),
    "no images wanted": (None, "excitations", ("--images", "0"), 1, "images=0 is below 1"),
    "no batches": (None, "excitations", ("--batch-size", "0"), 1, "batch_size=0 is below 1"),
    "no class map": (None, "excitations", ("--class-map", "nowhere.txt"), 1, "'nowhere.txt' is no file"),
    "no place for a plot": (None, "excitations", ("--plot", "no/folder/a.png"), 1, "cannot be written"),
    "no format for a plot": (
        None,
        "excitations",
        ("--plot", "a.xyz"),
        1,
        "'a.xyz' has the ending 'xyz', and figures are",
    ),
    "no format for a plot, tradeoff": (None, "tradeoff", ("--plot", "a"), 1, "'a' has the ending '', and figures are"),
    "no place for scores": (None, "tradeoff", ("--resume", "no/folder/a.json"), 1, "cannot be written"),
    "no such stage": (None, "strip", ("--stages", "9"), 1, "There is no stage 9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_no_use_is_refused_in_a_line(case: str, saved: Path, digits: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, command, options, code, text = REFUSED[case]
    (tmp_path / "data").mkdir()
    data = make(digits, tmp_path / "data") if make else digits
    out = ("-o", "written", "--fold") if command == "strip" else ()
    _, stderr = call(command, saved, *out, data, *LOOKING, *options, code=code)
    line = stderr.splitlines()[-1]
    assert text in (line if code == 1 else " ".join(stderr.replace("│", " ").split()))
    assert code == 2 or line.startswith("se-surgery: ")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("test_resnet", None, "The model has no SE"),
        ("seresnext26d_32x4d", "torch/nothing", "'torch/nothing' cannot be opened"),
        ("seresnext26d_32x4d", "torch/mnist", "See to its root and split, or ask for download."),
        ("seresnext26d_32x4d", "hfds/user/none", "'hfds/user/none' cannot be opened"),
        ("seresnext26d_32x4d", "tfds/mnist", "Install the package that reads it."),
    ],
)
def test_models_without_ses_and_data_that_is_not_there(name: str, data: str | None, text: str, digits: Path) -> None:
    _, stderr = call("excitations", name, data or digits, *LOOKING, code=1)
    assert stderr.splitlines()[-1].startswith("se-surgery: ") and text in stderr.splitlines()[-1]


def test_pictures_may_be_gone_through_again_and_say_what_they_cannot_read(saved: Path, digits: Path) -> None:
    model = from_pretrained(saved).eval()
    pictures = open_pictures(model, str(digits), example_input=SIZE, batch_size=10)
    ((x, y),) = by_hand(model, digits)
    for _ in range(2):
        given = list(pictures)
        assert len(given) == len(pictures) == 3
        assert_same([torch.cat([images for images, _ in given]), torch.cat([labels for _, labels in given])], [x, y])
    pictures.loader.dataset.transform = None
    with pytest.raises(DataError, match=r"'.*0/0\.png' cannot be read as an image \(TypeError"):
        list(pictures)
