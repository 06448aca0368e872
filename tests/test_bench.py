"""What is measured of networks with SEs: bytes by hand, ratios by hand, and what this library promises of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.readme import README
from benchmarks.speed import document, peers, rows
from benchmarks.speed.__main__ import main
from se_surgery import OptionError, add_se, find_se
from se_surgery.commands import bench as cli_bench
from se_surgery.commands.main import app
from se_surgery.errors import ProbeError
from se_surgery.measuring.bench import Spread, action, ratio, saved_bytes, spread, timed

# ------------------------------------------------------------------------------------------------------ how it measures


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_bytes_by_hand(device):
    """The layer keeps its input of 3 x 4, the sigmoid its output of 3 x 5, and weights are the model's own."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid()).to(device)
    assert saved_bytes(model, torch.ones(3, 4, device=device)) == 4 * (3 * 4 + 3 * 5)
    # A storage counts once, and whole, however many tensors are parts of it.
    shared = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Flatten(), nn.Sigmoid(), nn.Linear(2, 1)).to(device)
    assert saved_bytes(shared, torch.ones(6, 2, device=device)[:3]) == 4 * (6 * 2 + 3 * 2)


def test_saved_bytes_are_those_of_real_networks():
    model = add_se(timm.create_model("resnet18")).train()
    real = saved_bytes(model, torch.randn(2, 3, 64, 64))
    assert real == saved_bytes(model.to("meta"), torch.empty(2, 3, 64, 64, device="meta")) > 0


def test_every_round_is_in_another_order_and_the_first_does_not_count():
    ran, now = [], iter(range(10**6))
    takes = {"short": 1, "long": 3}

    def acted(name):
        ran.append(name)
        for _ in range(takes[name] - 1):
            next(now)

    times = timed({name: lambda name=name: acted(name) for name in takes}, 8, lambda: next(now))
    assert times == {"short": [1] * 8, "long": [3] * 8}
    rounds = [tuple(ran[start : start + 2]) for start in range(0, 18, 2)]
    assert set(rounds) == {("short", "long"), ("long", "short")}
    assert ratio(times, "long", "short") == (3, 3, 3)


def test_ratios_are_taken_within_a_round():
    """A slow round is slow for both: its ratio is like the others'."""
    times = {"a": [2.0, 20.0, 3.0, 2.0], "b": [1.0, 10.0, 1.0, 1.0]}
    assert ratio(times, "a", "b") == Spread(2.0, 2.0, 2.25)
    assert spread([5.0]) == (5.0, 5.0, 5.0) and str(spread([1, 2, 3])) == "2.000 (1.500-2.500)"


def test_what_is_timed():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.randn(4, 2)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append((module.training, out.requires_grad)))
    model[0].weight.register_hook(lambda grad: seen.append("gradient"))
    for mode in ("inference", "training"):
        action(model, mode, x)()
    assert seen == [(False, False), (True, True), "gradient"]
    assert model[0].weight.grad is None


# -------------------------------------------------------------------------------------------------- what is promised

# What a forward in training may save for backward beside the base, by what stands in front of the SEs.
SAVED = {
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenetv2_100"), 1.02),
    **dict.fromkeys(("regnetx_032", "efficientnet_lite0"), 1.02),
    **dict.fromkeys(("densenet121", "convnext_atto"), 1.10),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_activations(name):
    model, size = on_meta(name), (3, 224, 224)
    images = torch.empty(2, *size, device="meta")
    base = saved_bytes(model.train(), images)
    assert base < saved_bytes(add_se(model, example_input=size), images) <= SAVED[name] * base


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


# ------------------------------------------------------------------------------------------------------------ the peers


def test_modules_of_others_stand_where_this_librarys_do_and_do_the_same():
    x = torch.randn(2, 3, 64, 64)
    ours = add_se(timm.create_model("resnet18", zero_init_last=False), init="paper").eval()
    state = ours.state_dict()
    for peer, shape in (("torchvision's module", (-1, 1, 1)), ("Linear layers", ())):
        theirs = peers.PEERS[peer]("resnet18").eval()
        assert [site.path for site in find_se(theirs)] == [site.path for site in find_se(ours)]
        renamed = {
            key.replace(".se.fc.0.", ".se.fc1.").replace(".se.fc.2.", ".se.fc2."): key for key in theirs.state_dict()
        }
        with torch.no_grad():
            for mine, key in renamed.items():
                target = theirs.get_parameter(key) if key.endswith("weight") else theirs.state_dict()[key]
                if mine in state:
                    target.copy_(state[mine].reshape(target.shape))
                else:
                    assert mine.endswith(".bias") and shape
                    target.zero_()
            torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)


def test_composers_method_gates_every_wide_convolution():
    model = peers.composer("resnet18")
    gated = [path for path, module in model.named_modules() if isinstance(module, peers.GatedConv)]
    # Layers 2 to 4 without the convolutions that come from 64 channels: the first one and its shortcut's.
    assert len(gated) == 3 + 5 + 5 and gated[0] == "layer2.0.conv2"
    assert sum(p.numel() for p in model.layer2[0].conv2.se.parameters()) == 2 * 128 * 64
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


# --------------------------------------------------------------------------------------------------------- the document

MACHINE = {"processor": "P", "cores": 2, "threads": 1, "python": "3", "torch": "1", "timm": "2", "torchvision": "3"}


def test_the_document_by_hand(tmp_path):
    seconds = {"base": [1.0, 2.0], "base again": [1.0, 2.0], "this library": [1.1, 2.2], "Linear layers": [1.21, 2.42]}
    shared = {"model": "m", "side": 32, "batch": 2, "machine": MACHINE}
    rows.add({"kind": "saved", **shared, "bytes": {"base": 2**22, "this library": 2**22 + 2**21}}, tmp_path)
    for mode in ("training", "inference"):
        timing = {"kind": "time", "mode": mode, "clock": "perf_counter", "seconds": seconds}
        rows.add({**shared, **timing}, tmp_path)
        rows.add({**shared, **timing}, tmp_path)  # in the place of the one before
    found = rows.read(tmp_path)
    assert [row["kind"] for row in found] == ["saved", "time", "time"]
    text = document.text(found)
    assert "| m | 2.0 | 1.500 |" in text
    assert "| base, ms an image | 750.0 |" in text
    assert "| this library | 1.10 (1.10-1.10) |" in text
    assert "| Linear layers | 1.210 | 1.100 | 1.210 | 1.100 |  |  |" in text
    assert "Measured on: P, 2 cores, 1 thread used; Python 3, torch 1, timm 2, torchvision 3." in text


def test_the_command_renders_what_is_in_docs(tmp_path):
    (tmp_path / rows.ROWS).write_bytes((rows.DOCS / rows.ROWS).read_bytes())
    main(["--render", "--docs", str(tmp_path)])
    assert (tmp_path / document.DOCUMENT).read_text() == (rows.DOCS / document.DOCUMENT).read_text()
    assert (tmp_path / document.FIGURE).stat().st_size > 1000
    readme = README.read_text()
    assert document.with_section(readme, rows.read(rows.DOCS)) == readme


def test_the_section_of_the_readme_by_hand():
    machine = {"processor": "P", "threads": 1}
    taken = {"base": [2.0], "this library": [2.2], "timm's own": [2.5]}
    timing = {"kind": "time", "model": "m", "side": 8, "batch": 4, "seconds": taken, "machine": machine}
    kept = {"kind": "saved", "model": "m", "bytes": {"base": 100, "this library": 101, "timm's own": 125}}
    found = [kept, {**timing, "mode": "training"}, {**timing, "mode": "inference"}]
    text = document.section(found, "m")
    assert (
        "| this library's SEs | 1.010 | 1.10 | 1.10 |" in text
        and "| timm's own network | 1.250 | 1.25 | 1.25 |" in text
    )
    assert "P, 1 thread, 4 images of 8 x 8" in text
    assert document.section(found[1:], "m") == document.section(found) == ""


def test_the_command_measures(tmp_path):
    given = "--models test_resnet --size 32 --batch 2 --repeats 1 --what time"
    main([*given.split(), "--docs", str(tmp_path)])
    (inference, training) = rows.read(tmp_path)
    assert (inference["mode"], training["mode"]) == ("inference", "training")
    assert [peer for peer in peers.PEERS if peer not in training["seconds"]] == ["timm's own"]
    assert all(second > 0 for listed in training["seconds"].values() for second in listed)
    assert str(Path.home()) not in json.dumps(training)


# ----------------------------------------------------------------------------------------------------- the command line


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments, "--size", "3,32,32", "--batch", "2", "--rounds", "2"])


def test_bench_of_a_model():
    before = torch.get_num_threads()
    data = json.loads(bench("test_resnet", "--r", "4", "--threads", "1", "--json").stdout)
    assert torch.get_num_threads() == before and data["threads"] == 1
    images, model = torch.randn(2, 3, 32, 32), timm.create_model("test_resnet").train()
    base = saved_bytes(model, images)
    kept = {"without": base, "without, again": base, "with": saved_bytes(add_se(model, r=4), images)}
    plain = data["saved"].pop("with, plain form")
    assert {name: one["bytes"] for name, one in data["saved"].items()} == kept and plain["bytes"] > kept["with"]
    assert plain["ratio"] == plain["bytes"] / base
    for mode in ("inference", "training"):
        assert list(data[mode]) == [*kept, "with, plain form"]
        assert data[mode]["without"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert data[mode]["with"]["seconds"] > 0


def test_bench_of_ses_that_are_there():
    text = bench("test_efficientnet").stdout
    assert text.startswith("test_efficientnet, without its 2 SEs and with them; 2 images of 3 x 32 x 32, ")
    assert "with, plain form" not in text
    more = bench("test_efficientnet", "--existing", "replace").stdout
    assert more.startswith("test_efficientnet, before and after ") and "with, plain form" in more


@pytest.mark.parametrize("wrong", [("--batch", "1"), ("--rounds", "0"), ("--threads", "0")])
def test_bench_refuses(wrong):
    result = CliRunner().invoke(app, ["bench", "test_resnet", *wrong])
    assert result.exit_code == 1 and "--batch takes 2 or more, --rounds and --threads 1 or more." in result.stderr
    assert OptionError.__name__ not in result.stderr


class Detector(nn.Module):
    """Wants to be told what is in the images when it trains."""

    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none")
        return x


def test_bench_of_what_trains_on_more_than_images():
    with pytest.raises(ProbeError, match=r"in training on random images \(targets should not be none\)\. .* cannot be"):
        cli_bench._measured({"without": Detector()}, (torch.ones(2, 3, 8, 8),), 1)
