"""The table of networks of others: each has a count by hand, and the command tells what is wrong with a row.

The rows are in docs/others.jsonl; the packages of most networks are not installed where tests run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage.running import PASS
from benchmarks.others import __main__ as command
from benchmarks.others import counts, render, rows, trying, zoo
from benchmarks.others.counts import Count
from benchmarks.others.zoo import Network


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.b(torch.relu(self.a(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(2))


def listed(monkeypatch: pytest.MonkeyPatch, make: type[nn.Module], count: Count) -> str:
    """The name of a toy that is a network of the table, with a count."""
    name = "timm/toy"
    example = (3, 32, 32) if make is Net else (3, 4, 4)
    monkeypatch.setattr(zoo, "networks", lambda: {name: Network(name, make, example)})
    monkeypatch.setitem(counts._TIMM, "toy", count)
    return name


def run(path: Path) -> int:
    return command.main(["--rows", str(path), "--jobs", "0"])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_network_is_counted_and_every_count_is_of_a_network():
    names = set(zoo.networks())
    assert len(names) > 160
    for name in names:
        count = counts.count_of(name)
        assert count.free >= 0 <= count.held and any(c.isalpha() for c in count.arithmetic), name
    for package, table in counts._TABLES.items():
        assert {f"{package}/{name}" for name in table} <= names, package
    assert {f"timm/{name}" for name in counts._TIMM} <= names
    assert set(counts._SMP) == set(counts._PSPNET) == set(zoo.ENCODERS)
    assert len(zoo.HYBRIDS) == 40 == len(set(zoo.HYBRIDS))


def test_sums_in_the_arithmetic_are_right():
    """Where a count is written as a sum of numbers alone, it comes to what is counted."""
    checked = 0
    for name in zoo.networks():
        count = counts.count_of(name)
        for part in count.arithmetic.replace(":", " ").replace(",", " ").split():
            terms = part.split("+")
            if (
                len(terms) > 1
                and all(term.isdigit() for term in terms)
                and count.arithmetic.endswith(f"= {sum(map(int, terms))}")
            ):
                assert sum(map(int, terms)) == count.all, name
                checked += 1
    assert checked > 60


def test_a_network_is_planned_operated_on_and_stripped(tmp_path, monkeypatch):
    listed(monkeypatch, Net, Count(2, "2 blocks"))
    path = tmp_path / "rows.jsonl"
    assert run(path) == 0
    (row,) = lines(path)
    assert row["status"] == PASS and row["operated"] == row["sites"] == row["stacked"] == 2
    assert row["checks"] == ["sites", "stacked", "silent", "operated", *trying.CHECKS, "classes", "strip"]
    assert row["seen"]["where"] == "2 of 2 SEs where standard says"
    assert row["kinds"] == {"residual": 2} and row["census"] == "2 additions: 2 of units"
    before = path.read_text()
    assert run(path) == 0 and path.read_text() == before


def test_a_plan_that_is_not_as_counted_is_a_failure_that_the_table_shows_first(tmp_path, monkeypatch):
    listed(monkeypatch, Net, Count(3, "2 blocks and one that is not there"))
    path = tmp_path / "rows.jsonl"
    assert run(path) == 1
    (row,) = lines(path)
    assert row["status"] == "fail: sites: 2 of the plan, 3 by hand"
    text = render.section(path)
    assert "0 of 1 networks passed" in text and "**fails**" in text
    assert text.index("2 of the plan, 3 by hand") < text.index("| network |")


def test_an_se_in_another_place_is_a_failure(tmp_path, monkeypatch):
    from se_surgery.planning import placements

    monkeypatch.setitem(placements.PLACEMENTS["standard"], "residual", placements.PLACEMENTS["identity"]["residual"])
    listed(monkeypatch, Net, Count(2, "2 blocks"))
    path = tmp_path / "rows.jsonl"
    assert run(path) == 1
    assert lines(path)[0]["status"].startswith("fail: where: blocks.0.se is not where standard says")


def test_a_network_without_units_has_to_be_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    listed(monkeypatch, Mlp, Count(0, "no convolution"))
    assert run(path) == 0
    assert lines(path)[0]["checks"] == ["sites", "stacked", "silent", "refused"]
    assert "| refused |" in render.section(path)


def test_an_error_while_a_network_is_built_is_a_failure(tmp_path, monkeypatch):
    class Broken(Net):
        def __init__(self) -> None:
            raise RuntimeError("no weights")

    listed(monkeypatch, Broken, Count(2, "2 blocks"))
    path = tmp_path / "rows.jsonl"
    assert run(path) == 1
    assert lines(path)[0]["status"] == "fail: after the start: RuntimeError: no weights"


def test_a_package_that_is_not_installed_is_left_out_and_its_rows_stay(tmp_path, monkeypatch, capsys):
    name = "ultralytics/yolov8n"
    network = Network(name, Net, (3, 32, 32))
    monkeypatch.setattr(zoo, "networks", lambda: {name: network})
    monkeypatch.setattr(zoo.Network, "version", None)
    path = tmp_path / "rows.jsonl"
    rows.write(path, [{"name": name, "status": PASS}])
    assert run(path) == 0
    assert lines(path) == [{"name": name, "status": PASS}]
    assert "ultralytics is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--names", "no/such"], ["--jobs", "-1"], ["--timeout", "0"]])
def test_a_mistake_in_the_command_line_exits_with_2(tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        command.main(["--rows", str(tmp_path / "rows.jsonl"), *options])
    assert caught.value.code == 2


def test_every_committed_row_holds_the_count_of_now():
    found = rows.read(rows.ROWS)
    assert found and set(found) <= set(zoo.networks())
    for name, row in found.items():
        count = counts.count_of(name)
        assert (row["free"], row["all"], row["arithmetic"]) == (count.free, count.all, count.arithmetic), name


def test_what_fails_comes_first_in_the_documentation():
    failing = [name for name, row in rows.read(rows.ROWS).items() if row["status"] != PASS]
    text = (rows.ROWS.parent / "coverage.md").read_text()
    listed = text[text.index("## Networks of others") :]
    assert all(f"- `{name}`: " in listed for name in failing)
