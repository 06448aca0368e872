"""The gates over a data set: what `excitations` says is what a direct computation in double precision says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import toys
from patients import build, differences, images, snapshot
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from se_surgery import (
    DataError,
    Excitations,
    NothingToDoError,
    OptionError,
    PatientError,
    SqueezeExcite,
    SurgeryError,
    add_se,
    excitations,
    find_se,
)
from se_surgery.gates.tally import Tally

NARROW = {"channels": (8, 16, 32, 64), "num_classes": 10}
CLASSES = 3


# ------------------------------------------------------------------------------------------- the gates, by the formulas


def pooled(x: Tensor, axis: int) -> Tensor:
    """Mean over the positions, (B, C, 1, 1)."""
    moved = x.movedim(axis, 1).flatten(2)
    return moved.mean(2)[:, :, None, None]


def ours(se: SqueezeExcite, x: Tensor) -> Tensor:
    axis = -1 if se.channels_last else 1
    z = x.movedim(axis, 1).flatten(2).amax(2)[:, :, None, None] if se.squeeze == "max" else pooled(x, axis)
    gate = se.gate(se.fc2(se.fc1(z).relu())) * se.gate_scale
    return gate if se.mix is None else 1 + se.mix * (gate - 1)


def efficient(se: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.hardsigmoid(se.conv_expand(se.conv_reduce(pooled(x, 1)).relu()))


def eca(se: nn.Module, x: Tensor) -> Tensor:
    return 1 + se.mix * (se.attn.conv(pooled(x, 1).flatten(1)[:, None]).sigmoid().flatten(1)[:, :, None, None] - 1)


def effective(se: nn.Module, x: Tensor) -> Tensor:
    return 1 + se.mix * (nn.functional.hardsigmoid(se.attn.fc(pooled(x, 1))) - 1)


# What each class of SE multiplies its channels by.
FORMULAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "SqueezeExcite": ours,
    "SEModule": lambda se, x: se.fc2(se.fc1(pooled(x, 1)).relu()).sigmoid(),
    "SqueezeExcitation": lambda se, x: nn.functional.hardsigmoid(se.fc2(se.fc1(pooled(x, 1)).relu())),
    "SequenceSE": lambda se, x: se.sequence(pooled(x, 1).flatten(1)),
    "ExpandSE": lambda se, x: se.fc(pooled(x, 1).flatten(1)),
    "efficient": efficient,
    "eca": eca,
    "ese": effective,
}


@torch.no_grad()
def directly(model: nn.Module, x: Tensor, kind: str) -> dict[str, Tensor]:
    """The gates of every SE for all images at once, (N, C), by the formula of its class, from what it was given."""
    given: dict[str, Tensor] = {}
    modules = {site.path: model.get_submodule(site.path) for site in find_se(model, tuple(x.shape[1:]))}
    handles = [
        module.register_forward_pre_hook(lambda module, args, path=path: given.update({path: args[0].clone()}))
        for path, module in modules.items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return {path: FORMULAS[kind](module, given[path]).flatten(1) for path, module in modules.items()}


class UserSE(toys.Trunk):
    """A write-up's SEs, in residual blocks."""

    def __init__(self, se: Callable[[int], nn.Module]) -> None:
        super().__init__(*(nn.Sequential(toys.Basic(8, 8), se(8)) for _ in range(2)))


def with_ours(placement: str = "standard", name: str = "resnet18", **options: Any) -> nn.Module:
    model = build(name, **(NARROW if name == "resnet18" else {}))
    return add_se(model, placement, r=4, example_input=size_of(name), **options)


def size_of(name: str) -> tuple[int, ...]:
    return getattr(toys, name.removeprefix("toy/")).SIZE if name.startswith("toy/") else (3, 64, 64)


# Models with SEs of every kind, the formula of their gates, and the size of their images.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "ours": (partial(with_ours, bias=True), "SqueezeExcite", (3, 64, 64)),
    "ours, pre, max": (partial(with_ours, "pre", squeeze="max"), "SqueezeExcite", (3, 64, 64)),
    "ours, tanh with a mix": (partial(with_ours, gate="tanh"), "SqueezeExcite", (3, 64, 64)),
    "ours, paper": (partial(with_ours, init="paper", gate="hard_sigmoid"), "SqueezeExcite", (3, 64, 64)),
    "ours, channels last": (partial(with_ours, name="toy/NHWC"), "SqueezeExcite", toys.NHWC.SIZE),
    "ours, volumes": (partial(with_ours, name="toy/Volumes"), "SqueezeExcite", toys.Volumes.SIZE),
    "eca": (partial(with_ours, attn="eca"), "eca", (3, 64, 64)),
    "ese": (partial(with_ours, attn="ese"), "ese", (3, 64, 64)),
    "timm": (partial(build, "seresnet18", **NARROW), "SEModule", (3, 64, 64)),
    "timm, maps of one position": (partial(build, "seresnet18", **NARROW), "SEModule", (3, 32, 32)),
    "timm's EfficientNet": (partial(build, "mobilenetv3_small_050", se_layer=None), "efficient", (3, 64, 64)),
    "torchvision": (partial(build, "torchvision/mobilenet_v3_small"), "SqueezeExcitation", (3, 64, 64)),
    "a write-up's": (partial(UserSE, toys.SequenceSE), "SequenceSE", (3, 32, 32)),
    "another write-up's, expanded": (partial(UserSE, toys.ExpandSE), "ExpandSE", (3, 32, 32)),
}


def operated(name: str) -> tuple[nn.Module, str, Tensor]:
    """A model of the table in double precision, its gates away from where they start, and images."""
    make, kind, size = MODELS[name]
    torch.manual_seed(5)
    model = make().double().eval()
    with torch.no_grad():
        for site in find_se(model, size):
            for key, parameter in model.get_submodule(site.path).named_parameters():
                parameter.normal_(0.0, 1.0 if parameter.dim() < 2 else 2.0 * parameter[0].numel() ** -0.5)
                if key == "mix":
                    parameter.fill_(0.7)
                elif parameter.dim() in (2, 4) and len(parameter) < parameter.shape[1]:
                    # One of each pair of rows passes the ReLU, whatever comes.
                    half = len(parameter) // 2
                    parameter[half : 2 * half] = -parameter[:half]
    x = images(size, batch=13).double()
    # Noise is alike in all images once it is pooled; contrast and brightness are not.
    return model, kind, x * torch.rand(13, *[1] * (x.dim() - 1)).double() * 4 + torch.randn(13, *[1] * (x.dim() - 1))


LABELS = torch.tensor([2, 0, 0, 1, 2, 2, 2, 0, 1, 1, 0, 2, 0])


def parts(x: Tensor, y: Tensor | None, *sizes: int) -> list[Any]:
    """Batches of these sizes."""
    cut = list(sizes)
    return list(zip(x.split(cut), y.split(cut), strict=True)) if y is not None else list(x.split(cut))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert (found - expected).abs().max() <= tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_a_direct_computation(name: str) -> None:
    model, kind, x = operated(name)
    gates = directly(model, x, kind)
    found = excitations(model, parts(x, LABELS, 4, 1, 8), CLASSES)
    assert [one.site.path for one in found] == list(gates) and not found.skipped
    for path, direct in gates.items():
        one = found[path]
        assert one.count == 13
        assert_close(one.mean, direct.mean(0))
        assert_close(one.variance, direct.var(0, correction=0))
        means = torch.stack([direct[label == LABELS].mean(0) for label in range(CLASSES)])
        assert_close(one.class_means, means)
        assert one.class_counts.tolist() == [5, 3, 5]
        between = sum(n * (mean - direct.mean(0)).square() for n, mean in zip([5, 3, 5], means, strict=True)) / 13
        assert_close(one.between, between)
    assert max(direct.std(0).max() for direct in gates.values()) > 0.01, "gates that do not vary show nothing"


@pytest.mark.parametrize("name", ["ours", "timm", "eca"])
def test_batches_make_no_difference(name: str) -> None:
    model, _, x = operated(name)
    at_once = excitations(model, [(x, LABELS)])
    for sizes in ((1,) * 13, (12, 1), (6, 7)):
        streamed = excitations(model, parts(x, LABELS, *sizes))
        for one, other in zip(streamed, at_once, strict=True):
            for key in ("mean", "variance", "saturated", "class_means", "class_counts", "between"):
                assert_close(getattr(one, key), getattr(other, key))


def test_a_constant_gate_has_no_variance_and_one_of_two_values_has_a_quarter() -> None:
    """Two large sums, subtracted, would give 1e-16 and more of the square."""
    tally = Tally.empty(2)
    for value in (1e6, 1e6 + 1) * 50:
        tally.add(torch.tensor([[1e6, value]]).double(), None, None)
    assert tally.deviations.tolist() == [0.0, pytest.approx(25.0, rel=1e-9)]


def saturating(gate: str, values: list[float]) -> nn.Module:
    """An SE whose gate functions are given `values`, whatever the input."""
    torch.manual_seed(0)
    model = with_ours(gate=gate, init="paper", bias=True, rd_channels=2, stages=1, where="layer1.0").eval()
    with torch.no_grad():
        model.layer1[0].se.fc2.weight.zero_()
        model.layer1[0].se.fc2.bias.copy_(torch.tensor(values))
    return model


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("gate", "values", "expected"),
    [
        ("sigmoid", [logit(p) for p in (0.04, 0.06, 0.5, 0.94, 0.96, 0.001, 0.999, 0.1)], [1, 0, 0, 0, 1, 1, 1, 0]),
        ("hard_sigmoid", [-3.0, -2.6, 0.0, 2.6, 3.0, -9.0, 9.0, 1.0], [1, 0, 0, 0, 1, 1, 1, 0]),
        ("tanh", [-3.0, -1.0, 0.0, 1.0, 3.0, 0.5, 2.0, 1.4], [1, 0, 0, 0, 1, 0, 1, 0]),
        ("relu", [-3.0, 0.0, 0.1, 1.0, 30.0, 2.0, 3.0, 4.0], [1, 1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_saturated_is_within_a_twentieth_of_the_range(gate: str, values: list[float], expected: list[int]) -> None:
    model = saturating(gate, values)
    found = excitations(model, [images(batch=3)])
    assert found["layer1.0.se"].saturated.tolist() == expected


def test_other_kinds_of_attention_are_named_and_not_summed_up() -> None:
    """A spatial gate of cbam's is none for a channel."""
    model = with_ours(attn="cbam", stages=1)
    add_se(model, stages=2, r=4)
    with torch.no_grad():
        model.layer1[0].se.mix.fill_(1.0)
        model.layer1[1].se.mix.fill_(1.0)
    found = excitations(model, [images()])
    assert [path for path, _ in found.skipped] == ["layer1.0.se", "layer1.1.se"]
    assert [one.site.path for one in found] == ["layer2.0.se", "layer2.1.se"]
    assert "more than multiply" in found.table()


class Frames(nn.Module):
    """Looks at each frame of a clip, (B, T, C, H, W), by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UserSE(toys.SequenceSE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def test_more_maps_than_images_have_no_labels() -> None:
    model, x = Frames().eval(), images((3, 3, 32, 32), batch=2)
    assert {gates.count for gates in excitations(model, [x])} == {6}
    with pytest.raises(DataError, match=r"'net.*' gates 6 maps for the 2 images of batch 1"):
        excitations(model, [(x, [0, 1])])


def test_half_precision_models_and_integer_labels_of_any_kind() -> None:
    model = add_se(build("resnet18:half", **NARROW), r=4)
    pairs = [
        (images(), [0, 1]),
        (images(), torch.tensor([1, 1], dtype=torch.uint8)),
        (images(), torch.tensor([2, 9, 0, 9])[::2]),
        {"pixel_values": images(), "labels": [0, 2]},
    ]
    found = excitations(model, iter(pairs))
    assert found.labels == (0, 1, 2) and found.sites[0].class_counts.tolist() == [3, 3, 2]
    assert torch.equal(found.sites[0].mean, torch.ones(8).double())


# ------------------------------------------------------------------------------------------------------ shards of data


class Numbered(Dataset[tuple[Tensor, int]]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], i


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
@pytest.mark.parametrize("sampler", [DistributedSampler, OrderedDistributedSampler])
def test_what_a_distributed_sampler_repeats_counts_once(sampler: Any, processes: int) -> None:
    """Each image once over all parts, though the sampler gives all parts the same length."""
    model = add_se(build("toy/Functional"), r=4)
    data = Numbered(images((3, 32, 32), batch=13))
    counts = torch.zeros(13)
    for rank in range(processes):
        options = {} if sampler is OrderedDistributedSampler else {"shuffle": False}
        loader = DataLoader(data, batch_size=3, sampler=sampler(data, processes, rank, **options))
        found = excitations(model, loader)
        for label, count in zip(found.labels, found.sites[0].class_counts, strict=True):
            counts[label] += count
    assert counts.tolist() == [1.0] * 13


# ------------------------------------------------------------------------------------------------ the model as it was


def test_the_model_is_left_as_found(monkeypatch) -> None:
    model = with_ours().train()
    model.layer2.eval()
    seen: list[str] = []
    model.layer1[0].se.register_forward_hook(lambda *_: seen.append("hook"))
    model(images()).sum().backward()
    before, rng = snapshot(model), torch.get_rng_state()
    loader = DataLoader(TensorDataset(images(batch=6), torch.arange(6) % 3), batch_size=4, shuffle=True)
    excitations(model, loader)
    assert differences(before, snapshot(model)) == [] and torch.equal(rng, torch.get_rng_state())
    assert len(seen) == 1 + 2, "the user's own hook runs with every batch"


def broken_loader() -> Iterator[Any]:
    yield images()
    raise OSError("disk full")


def nan_images() -> Tensor:
    x = images()
    x[1, 0, 5, 5] = math.nan
    return x


# A loader, the error and what it says.
BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "empty": (lambda: [], {}, DataError, "gave no images"),
    "empty DataLoader": (lambda: DataLoader(TensorDataset(images(batch=0))), {}, DataError, "gave no images"),
    "spent generator": (lambda: iter(()), {}, DataError, "only once"),
    "not a loader": (lambda: 3, {}, DataError, "int, which gives no batches"),
    "one tensor": (images, {}, DataError, "Tensor, which gives no batches"),
    "strings": (lambda: ["a"], {}, DataError, "Batch 1 is str"),
    "arrays": (lambda: [(images().numpy(), [0, 1])], {}, DataError, "Batch 1 is ndarray, in which no images are"),
    "bytes": (lambda: [images().byte()], {}, DataError, r"batch 1 of shape \(2, 3, 64, 64\), torch.uint8"),
    "vectors": (lambda: [torch.zeros(4, 7)], {}, DataError, r"tensor of shape \(4, 7\)"),
    "wrong channels": (lambda: [images((5, 64, 64))], {}, SurgeryError, "does not run on"),
    "a later batch of wrong channels": (
        lambda: [images(), images((5, 64, 64))],
        {},
        DataError,
        r"batch 2 of shape \(2, 5, 64, 64\)",
    ),
    "NaN": (lambda: [images(), nan_images()], {}, DataError, "Batch 2 holds values that are not finite"),
    "infinite": (lambda: [images() * math.inf], {}, DataError, "not finite"),
    "negative label": (lambda: [(images(), [0, -1])], {}, DataError, "label -1, and labels count from 0"),
    "label out of range": (
        lambda: [(images(), [0, 1]), (images(), [0, 3])],
        {"classes": 3},
        DataError,
        "Batch 2 has the label 3, and labels of 3 classes go from 0 to 2",
    ),
    "label without a name": (lambda: [(images(), [0, 2])], {"classes": ["cat", "dog"]}, DataError, "label 2"),
    "a data set": (lambda: [(images()[0], 1)], {}, DataError, r"no batch but one image, of shape \(3, 64, 64\)"),
    "a data set of tensors": (lambda: TensorDataset(images(), torch.tensor([1, 2])), {}, DataError, "which gives no"),
    "mixed labels": (lambda: [(images(), torch.zeros(2, 10))], {}, DataError, r"float32 of shape \(2, 10\)"),
    "labels that are names": (lambda: [(images(), ["cat", "dog"])], {}, DataError, "labels of batch 1 are list"),
    "labels of another length": (lambda: [(images(), [1, 2, 3])], {}, DataError, r"shape \(3,\)"),
    "labels now and then": (lambda: [(images(), [1, 2]), images()], {}, DataError, "Batch 2 has no labels"),
    "classes without labels": (lambda: [images()], {"classes": 3}, DataError, "Batch 1 has no labels, and 3 classes"),
    "no classes": (lambda: [images()], {"classes": 0}, OptionError, "classes=0 is neither"),
    "classes true": (lambda: [images()], {"classes": True}, OptionError, "classes=True"),
    "classes text": (lambda: [images()], {"classes": "cats"}, OptionError, "classes='cats'"),
    "a loader that fails": (broken_loader, {}, OSError, "disk full"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_and_the_model_left_alone(name: str) -> None:
    loader, options, error, text = BAD[name]
    model = with_ours().train()
    before, rng = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=text):
        excitations(model, loader(), **options)
    assert differences(before, snapshot(model)) == [] and torch.equal(rng, torch.get_rng_state())


def test_gates_that_are_not_finite_name_the_se() -> None:
    model = with_ours(init="paper")
    with torch.no_grad():
        model.layer3[1].se.fc1.weight.fill_(math.nan)
    with pytest.raises(DataError, match=r"gates of 'layer3.1.se' are not finite for batch 1"):
        excitations(model, [images()])


def test_models_that_cannot_be_asked() -> None:
    with pytest.raises(NothingToDoError, match="has no SE"):
        excitations(build("resnet18", **NARROW), [images()])
    with pytest.raises(PatientError, match="is not an nn"):
        excitations("resnet18", [images()])
    with torch.device("meta"):
        model = timm.create_model("seresnet18", **NARROW)
    with pytest.raises(PatientError, match="meta device"):
        excitations(model, [images()])
    everything = with_ours(attn="cbam", stages=1)
    with torch.no_grad():
        everything.layer1[0].se.mix.fill_(1.0)
        everything.layer1[1].se.mix.fill_(1.0)
    with pytest.raises(NothingToDoError, match=r"No SE of the model has gates \(layer1.0.se: it does more"):
        excitations(everything, [images()])


def test_wrapped_models_are_looked_at_inside() -> None:
    model = with_ours()
    inside = excitations(nn.DataParallel(model), [images()])
    assert torch.equal(inside.sites[0].mean, excitations(model, [images()]).sites[0].mean)


# --------------------------------------------------------------------------------------------------- shown and kept


def found() -> Excitations:
    model, _, x = operated("ours")
    return excitations(model, [(x, LABELS)], ["ant", "bee", "cat"])


def test_table_shows_every_site_with_its_numbers() -> None:
    table = found().table()
    lines = [line for line in table.splitlines() if ".se" in line]
    assert table.startswith("8 SEs over 13 inputs of 3 classes") and len(lines) == 8
    one = found()["layer4.1.se"]
    for shown in (
        f"{one.mean.mean():.3f} +- {one.mean.std(correction=0):.3f}",
        f"{one.variance.mean():.2e}",
        f"{one.between.mean():.2e}",
        f"{one.saturated.mean():.1%}",
    ):
        assert shown in lines[-1]


def test_plot_draws_a_line_for_each_class_and_one_for_all(tmp_path: Path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self))
    excited = found()
    assert excited.plot(tmp_path / "gates.png") == tmp_path / "gates.png"
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == [one.site.path for one in excited]
    for panel, one in zip(panels, excited, strict=True):
        lines = {line.get_label(): line.get_ydata() for line in panel.lines}
        assert list(lines) == ["ant", "bee", "cat", "all"]
        assert (lines["bee"] == one.class_means[1].numpy()).all() and (lines["all"] == one.mean.numpy()).all()
    excited.plot(tmp_path / "one.png", classes=["cat", 0])
    assert [line.get_label() for line in drawn[1].axes[0].lines] == ["cat", "ant", "all"]
    with pytest.raises(OptionError, match=r"a class 'dog'. Take some of those that were seen: ant, bee, cat"):
        excited.plot(tmp_path / "none.png", classes=["dog"])
    for classes in ("cat", 0, True):
        with pytest.raises(OptionError, match=rf"classes={classes!r} is not a list of classes. Give names or labels"):
            excited.plot(tmp_path / "none.png", classes=classes)


def test_plot_writes_an_image(tmp_path: Path) -> None:
    path = replace(found(), sites=found().sites[:1]).plot(tmp_path / "gates.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name, text in {
        "gates.nothing": "the ending 'nothing'",
        "gates": "the ending ''",
        "no/gates.png": "cannot be",
    }.items():
        with pytest.raises(SurgeryError, match=text):
            found().plot(tmp_path / name)
    assert os.listdir(tmp_path) == ["gates.png"]


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    for excited in (found(), excitations(with_ours(attn="ese"), [images()])):
        again = Excitations.load(excited.save(tmp_path / "gates.safetensors"))
        assert (again.labels, again.names, again.skipped) == (excited.labels, excited.names, excited.skipped)
        for one, other in zip(again, excited, strict=True):
            assert one.site == other.site and one.count == other.count
            for key in ("mean", "variance", "saturated", "class_means", "class_counts"):
                assert torch.equal(getattr(one, key), getattr(other, key))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("not a file of tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_file({"a": torch.zeros(1)}, tmp_path / "damaged", {"format": "se_surgery.excitations.1", "content": "{}"})
    for name, text in {
        "missing": "cannot be read",
        "text": "cannot be read",
        "other": "holds no excitations",
        "damaged": "cannot be read as excitations",
    }.items():
        with pytest.raises(SurgeryError, match=text):
            Excitations.load(tmp_path / name)
    with pytest.raises(SurgeryError, match="cannot be written"):
        found().save(tmp_path / "no" / "folder")


def test_asking_for_an_se_that_is_not_there() -> None:
    with pytest.raises(OptionError, match=r"no gates of an SE at 'layer9'.*layer1\.0\.se"):
        found()["layer9"]
