"""examples/finetune.py: killed and resumed, spread over processes, and what it writes and refuses."""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import WAITS
from patients import digest
from PIL import Image
from safetensors.torch import load_file
from test_distributed import TORCHRUN
from torch import nn

from se_surgery import find_se, from_pretrained

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "finetune.py"
SMALL = ("test_resnet", "--size", "16", "--reduction", "4")
LOADING = {"size": 16, "batch_size": 64, "workers": 0, "no_aug": True, "auto_augment": None}
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

Start = Callable[..., None]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Runs the script in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def start(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return start


def command(*arguments: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """The script in processes of its own, as arguments of subprocess."""
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "PYTHONWARNINGS": "error::UserWarning"}
    return {"args": [sys.executable, *launcher, str(SCRIPT), *SMALL, *arguments], "env": environment}


def spread(folder: Path, *arguments: str) -> None:
    """Run the script in two processes, with no word to accelerate that there is no GPU."""
    started = command(*arguments, "--out", str(folder), launcher=TORCHRUN)
    del started["env"]["ACCELERATE_USE_CPU"]
    done = subprocess.run(**started, capture_output=True, text=True, timeout=WAITS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / "epochs.csv").open(newline="") as file:
        return [
            {key: value if key == "phase" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def held(file: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in load_file(file).items()}


def test_a_run_that_is_killed_ends_as_one_that_is_not(here: Start, tmp_path: Path) -> None:
    """Weights, averages and optimizer, bit for bit: with momentum, averages, mixed images and dropout on the way."""
    told = ("--se-epochs", "1", "--epochs", "2", "--ema", "0.9", "--mixup", "0.2", "--clip", "1", "--opt", "lamb")
    told = (*told, "--batch-size", "128", "--model-kwargs", "drop_rate=0.2")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(**command(*told, "--out", str(killed)), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + WAITS
        while not (killed / "epochs.csv").exists() or len(rows(killed)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)  # in the midst of the last epoch
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (killed / "model").exists()
    here(*told, "--out", str(killed), "--resume")
    here(*told, "--out", str(whole))
    for file in ("checkpoint.safetensors", "model/model.safetensors"):
        assert held(killed / file) == held(whole / file)
    kept = ("phase", "epoch", "train_loss", "loss", "top1", "lr")
    assert [[row[key] for key in kept] for row in rows(killed)] == [[row[key] for key in kept] for row in rows(whole)]
    assert [(row["phase"], row["epoch"]) for row in rows(whole)] == [("SEs", 1), ("all", 1), ("all", 2)]


def test_torchrun_alone_joins_the_processes(tmp_path: Path) -> None:
    """Of 360 images each process evaluates its half, and one of them writes what both came to."""
    spread(tmp_path, "--se-epochs", "0", "--epochs", "1", "--batch-size", "239")
    assert len(rows(tmp_path)) == 1 and (tmp_path / "model" / "model.safetensors").exists()
    assert load_file(tmp_path / "checkpoint.safetensors")["optimizer.state|fc.weight|step"] == 3  # 2 x 239 images each


@pytest.mark.sweep
def test_two_processes_have_the_curve_of_one_with_twice_the_batch(here: Start, tmp_path: Path) -> None:
    """Without BatchNorm, which goes by the images of its own process: equal to 1e-3 in float32, while it falls."""
    told = ("--se-epochs", "1", "--epochs", "2", "--se-lr", "0.01", "--lr", "0.01", "--opt", "sgd")
    told = (*told, "--model-kwargs", "norm_layer=groupnorm1")
    spread(tmp_path / "two", *told, "--batch-size", "16")
    here(*told, "--batch-size", "32", "--out", str(tmp_path / "one"))
    here(*told, "--batch-size", "32", "--seed", "1", "--out", str(tmp_path / "other"))
    two, one, other = (rows(tmp_path / name) for name in ("two", "one", "other"))
    for key in ("train_loss", "loss"):
        curves = [[row[key] for row in found] for found in (two, one, other)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-3)
        assert curves[0] != pytest.approx(curves[2], rel=1e-2)
    assert one[2]["train_loss"] < 0.7 * one[0]["train_loss"]


@pytest.mark.sweep
@pytest.mark.parametrize("resumed", [False, True])
def test_fsdp_trains_and_saves_a_model_that_loads_without_it(tmp_path: Path, resumed: bool, monkeypatch: Any) -> None:
    """Resumed or not; on the way optimizers and weights are scattered over two processes."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    told = ("--fsdp", "--se-epochs", "1", "--epochs", "2", "--clip", "1", "--lr", "0.01", "--batch-size", "16")
    if resumed:
        started = command(*told, "--out", str(tmp_path), launcher=TORCHRUN)
        with subprocess.Popen(**started, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            deadline = time.monotonic() + WAITS
            while not (tmp_path / "epochs.csv").exists() or len(rows(tmp_path)) < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
    spread(tmp_path, *told, *(["--resume"] if resumed else []))
    found = rows(tmp_path)
    assert len(found) == 3 and found[2]["train_loss"] < found[1]["train_loss"] < found[0]["train_loss"]
    model = from_pretrained(tmp_path / "model").eval()
    assert len(find_se(model)) > 0 and model.num_classes == 10
    assert accuracy(model) == pytest.approx(found[-1]["top1"], abs=1 / 360) and found[-1]["top1"] > 0.5


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the digits that the script keeps for it."""
    data = importlib.import_module("tuning.data")
    _, loader = data.loaders(argparse.Namespace(**LOADING), [data.Digits(True), data.Digits(False)], model, 1)
    hits = [model(x).argmax(1) == y for x, y in loader]
    return float(torch.cat(hits).float().mean())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fsdp", "--ema", "0.9"), "--fsdp takes neither --ema nor --amp fp16"),
        (("--se-epochs", "0", "--epochs", "0"), "one at least is above 0"),
        (("--epochs", "-1"), "one at least is above 0"),
        (("--data", "nowhere"), "--data nowhere is no folder"),
        (("--placement", "none"), "--placement none puts no SEs in"),
    ],
)
def test_options_that_do_not_go_together(here: Start, arguments: Any, words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        here(*arguments)
    assert words in capsys.readouterr().err


def image_folder(root: Path) -> Path:
    """Two classes of colours, to train on and to evaluate."""
    for split, number in (("train", 8), ("validation", 4)):
        for channel, label in enumerate(("red", "green")):
            (root / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = np.full((24, 24, 3), 8 * i, np.uint8)
                pixels[..., channel] = 200
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def test_mistakes_end_in_a_line(here: Start) -> None:
    with pytest.raises(SystemExit, match=r"There is no placement 'nowhere'\. Take one of standard"):
        here("--placement", "nowhere")


# timm's reader opens files that it leaves to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_is_not_begun_over_another_nor_gone_on_with_in_another_way(here: Start, tmp_path: Path) -> None:
    """On a folder of images, with timm's augmentation."""
    colours = str(image_folder(tmp_path / "colours"))
    told = ("--data", colours, "--se-epochs", "1", "--epochs", "1", "--batch-size", "4", "--out", "run")
    here(*told)
    before = held(tmp_path / "run" / "checkpoint.safetensors")
    with pytest.raises(SystemExit, match=r"run holds a run\. Go on with it by --resume, or give another folder\."):
        here(*told)
    with pytest.raises(SystemExit, match=r"The run in run had another --lr: 0\.001\."):
        here(*told, "--resume", "--lr", "0.5")
    here(*told, "--resume")  # it was at its end
    assert held(tmp_path / "run" / "checkpoint.safetensors") == before and len(rows(tmp_path / "run")) == 2
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "- colours\n" in card and "excitations.png" in card and "Classes: 2" in card
    with pytest.raises(SystemExit, match="--fsdp scatters over several processes"):
        here(*told[:-1], "other", "--fsdp")
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"half of it")
    with pytest.raises(SystemExit, match=r"checkpoint\.safetensors cannot be read .*Take it away to begin anew"):
        here(*told, "--resume")
    with pytest.raises(SystemExit, match="has no folders of its own for test and validating"):
        here(*told[:-1], "other", "--splits", "test", "validating")


def test_what_a_frozen_base_saves_is_counted(monkeypatch: Any, capsys: Any) -> None:
    """The table of docs/finetuning.md, for a small network: what is held is the gradient and AdamW's two moments."""
    script = EXAMPLES.parent / "benchmarks" / "finetune_cost.py"
    told = [
        "resnet20_cifar",
        "--size",
        "16",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--threads",
        str(torch.get_num_threads()),
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *told])
    runpy.run_path(str(script), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| base", "| with", "| SEs"))]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    trained = [int(row[1].replace(",", "")) for row in table]
    kept, held = ([float(row[i].split(", ")[1]) for row in table] for i in (2, 3))
    assert trained[1] - trained[0] == trained[2] > trained[3] > 0
    assert kept[1] == held[1] == 1 and 1 > kept[0] > kept[2] > kept[3] > 0
    # Beside them AdamW keeps one count of its steps for each tensor.
    assert held == pytest.approx([number / trained[1] for number in trained], abs=1e-3)
