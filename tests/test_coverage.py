"""The coverage table says what was run, and what was run is complete; the command that makes it finds what is wrong.

The rows are in docs/coverage.jsonl, the lists of names that have to be in them in tests/zoo.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patients import build
from torch import Tensor, nn

from benchmarks.coverage import __main__ as command
from benchmarks.coverage import planning, render, running, structure, tasks, zoo
from benchmarks.coverage import rows as files
from benchmarks.coverage.pool import Pool, Task
from benchmarks.coverage.table import Table
from benchmarks.readme import README
from se_surgery import add_se, plan_se
from se_surgery.planning import placements

# The targets by their number in each library.
TARGETS = {"timm": 655, "torchvision": 68, "se_surgery": 6}
REPRESENTATIVES = sorted(zoo.listed("class"))
# By default two of seven are planned anew.
CHUNKS = [
    pytest.param(REPRESENTATIVES[start::14], marks=() if start < 4 else pytest.mark.sweep, id=REPRESENTATIVES[start])
    for start in range(14)
]
# What a plan comes to; how its reasons are worded is the library's business.
COUNTS = ("status", "parameters", "stages", "units", "kinds", "native", "sites", "stacked", "silent", "misplaced")


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(files.read(files.ROWS).values())


# ------------------------------------------------------------------------------------------------- the committed rows


def test_the_document_and_the_readme_are_those_of_the_rows(table):
    assert render.DOCUMENT.read_text(encoding="utf-8") == render.document_text(table)
    readme = README.read_text(encoding="utf-8")
    assert readme == render.with_section(readme, table)


def test_every_target_is_planned_with_a_site_or_with_all_its_units_named(table):
    names = zoo.listed("target")
    numbers = {library: len((zoo.LISTS / f"{library}_cnns.txt").read_text().split()) for library in TARGETS}
    assert numbers == TARGETS and len(names) == sum(TARGETS.values())
    missing = sorted(names - set(table.plans))
    assert not missing, missing[:5]
    wrong = {name: table.plans[name]["status"] for name in names if table.plans[name]["status"] not in tasks.PLANNED}
    assert not wrong, wrong
    for row in (table.plans[name] for name in names):
        held = row["skipped"].get("standard", {}).get("holds an SE already", 0)
        assert row["sites"].get("standard", 0) > 0 or 0 < held == row["units"], row["name"]
        assert row["stacked"].get("standard", 0) > 0, row["name"]
        assert row["silent"] == [] == row["misplaced"], row["name"]


def test_names_that_are_no_targets_are_planned_or_refused_and_never_an_error_of_another_kind(table):
    assert {row["name"] for row in table.others} == set(zoo.entries()) - zoo.listed("target")
    errors = {row["name"]: row["status"] for row in table.others if row["status"].startswith(planning.FAILED)}
    assert not errors, errors


def test_every_row_with_values_passed(table):
    rows = [*table.by_kind["run"], *table.by_kind["thorough"]]
    assert len(rows) > 200
    assert {(row["name"], row["placement"]): row["status"] for row in rows if row["status"] != running.PASS} == {}


@pytest.mark.parametrize("role", ["family", "class"])
def test_every_placement_of_every_representative_was_run_and_passed(table, role):
    wanted = {
        ("run", name, placement)
        for name in zoo.listed(role)
        for placement in tasks.wanted_placements(table.plans[name])
    }
    assert len(wanted) > 3 * len(zoo.listed(role))
    missing = sorted(wanted - set(table.rows))
    assert not missing, missing[:5]
    failed = {key: table.rows[key]["status"] for key in wanted if table.rows[key]["status"] != running.PASS}
    assert not failed, failed


@pytest.mark.parametrize("names", CHUNKS)
def test_plans_are_those_of_the_rows(table, names):
    for name in names:
        body, row = planning.plan_body(name), table.plans.get(name, {})
        assert {count: body.get(count) for count in COUNTS} == {count: row.get(count) for count in COUNTS}, name


# --------------------------------------------------------------------------------------------------------- the command


def run_command(path: Path, *options: str) -> int:
    chosen = ["--names", "test_resnet", "--representatives", "all", "--placements", "standard,identity", *options]
    return command.main(["--rows", str(path), "--jobs", "0", *chosen])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_plans_and_runs_and_does_nothing_twice(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert run_command(path) == 0
    done = [("plan", ""), ("run", "identity"), ("run", "standard")]
    assert [(row["kind"], row.get("placement", "")) for row in lines(path)] == done
    assert {row["name"] for row in lines(path)} == {"test_resnet"}
    assert all(len(row["checks"]) > 12 for row in lines(path) if row["kind"] == "run")

    asked: list[tuple] = []
    monkeypatch.setattr(command, "work", lambda task: asked.append((task.kind, task.parts)) or tasks.work(task))
    before = path.read_text()
    assert run_command(path) == 0
    assert not asked and path.read_text() == before


@pytest.mark.parametrize(
    ("option", "made"), [("", ["identity"]), ("--keep-other-digests", []), ("--fresh", ["", "identity", "standard"])]
)
def test_rows_of_other_sources_are_made_anew_unless_they_are_to_be_kept(tmp_path, monkeypatch, option, made):
    path = tmp_path / "rows.jsonl"
    done = [{"kind": "plan", "placement": ""}, *({"kind": "run", "placement": p} for p in ("identity", "standard"))]
    plan = {"status": "sites", "sites": {"standard": 4, "identity": 4}, "stacked": {"standard": 4, "identity": 4}}
    old = {"name": "test_resnet", "family": "resnet", "roles": ["target"], **plan, **files.stamp()}
    files.write(path, [{**old, **row, **({"digest": "old"} if row["placement"] == "identity" else {})} for row in done])

    def answer(task):
        return iter([{**plan, "status": running.PASS, **files.stamp()} for _ in task.parts])

    monkeypatch.setattr(command, "work", answer)
    seen: list[files.Row] = []
    monkeypatch.setattr(command, "append", lambda path, row: seen.append(row))
    run_command(path, *filter(None, [option]))
    assert sorted(row.get("placement", "") for row in seen) == made


def test_a_broken_placement_is_a_failure_that_the_table_shows_first(tmp_path, monkeypatch):
    """An SE on the shortcut instead of the branch changes no output and no key, and runs once: its effect tells."""
    monkeypatch.setitem(placements.PLACEMENTS["standard"], "residual", placements.PLACEMENTS["identity"]["residual"])
    path = tmp_path / "rows.jsonl"
    assert run_command(path) == 1
    status = {row.get("placement"): row["status"] for row in lines(path) if row["kind"] == "run"}
    assert status["standard"].startswith("fail: shortcut: ") and "a zero gate cuts 0 layers" in status["standard"]
    assert status["identity"] == running.PASS
    text = render.document_text(Table(lines(path)))
    assert text.index("## Failures: 1") < text.index("## What was run")
    assert "run `test_resnet` standard: fail: shortcut" in text and "**fails**" in text


def test_an_error_in_the_library_is_a_failure(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("layer1")

    monkeypatch.setitem(placements.PLACEMENTS["identity"], "residual", broken)
    path = tmp_path / "rows.jsonl"
    assert run_command(path) == 1
    assert [row["status"] for row in lines(path)] == ["failed: KeyError: 'layer1'"]


def test_a_row_that_takes_too_long_is_a_failure(tmp_path):
    path = tmp_path / "rows.jsonl"
    plan = {"kind": "plan", "status": "sites", "sites": {"standard": 4}, "stacked": {"standard": 4}, "parameters": 1}
    files.write(path, [{"name": "test_resnet", "roles": ["target"], **plan, **files.stamp()}])
    assert run_command(path, "--jobs", "1", "--timeout", "0.01") == 1
    _, row = lines(path)
    assert row["status"] == "fail: timeout (0.01 s)" and files.is_current(row)


def test_a_line_that_was_broken_off_is_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert run_command(path, "--kinds", "plan") == 0
    whole = path.read_text()
    path.write_text(whole + whole.replace("test_resnet", "test_byobnet")[:-40])
    assert list(files.read(path)) == [("plan", "test_resnet", "")]
    assert run_command(path, "--kinds", "plan", "--names", "test_byobnet") == 0
    assert [row["name"] for row in lines(path)] == ["test_byobnet", "test_resnet"]


def test_rendering_no_rows_is_a_mistake_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "write", lambda rows: pytest.fail("written"))
    with pytest.raises(SystemExit) as caught:
        command.main(["--render", "--rows", str(tmp_path / "none.jsonl")])
    assert caught.value.code == 2 and "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--names", "no_such_*"], ["--kinds", "plan,dream"], ["--placements", "beside"], ["--jobs", "-1"]]
)
def test_a_mistake_in_the_command_line_exits_with_2(tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        run_command(tmp_path / "rows.jsonl", *options)
    assert caught.value.code == 2


# ------------------------------------------------------------------------------------------------------------ the pool


WORK = """
import os, time

def work(task):
    for part in task.parts:
        if part == "slow":
            time.sleep(600)
        if part == "dies":
            os._exit(3)
        if part == "raises":
            raise ValueError("no")
        yield {"part": part, "process": os.getpid()}
"""


CLOCK = """
import time

def work(task):
    start = time.time()
    time.sleep(0.3)
    yield {"at": (start, time.time())}
"""


@pytest.mark.parametrize("jobs", [0, 1, 2])
def test_what_becomes_of_a_process_is_an_answer_and_the_rest_goes_on(tmp_path, monkeypatch, jobs):
    (tmp_path / "pool_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("pool_work").work
    wanted = [Task("run", "one", ("a", "raises", "b")), Task("run", "two", ("c", "d"))]
    expected = [
        ("one", "a", ""),
        ("one", "b", ""),
        ("one", "raises", "ValueError: no"),
        ("two", "c", ""),
        ("two", "d", ""),
    ]
    if jobs:
        wanted += [Task("run", "three", ("dies", "e")), Task("run", "four", ("slow", "f"))]
        expected += [("four", "f", ""), ("four", "slow", "timeout (2 s)"), ("three", "dies", "crashed (exit code 3)")]
        expected += [("three", "e", "")]
    with Pool(work, jobs=jobs, timeout=2.0) as pool:
        answers = [answer for answer in pool.answers(wanted) if answer is not None]
        processes = [worker.process for worker in pool._workers]
    assert sorted((a.task.name, a.part, a.trouble) for a in answers) == sorted(expected)
    assert all(a.body["part"] == a.part for a in answers if not a.trouble)
    assert not any(process.is_alive() for process in processes)


def test_a_task_that_wants_much_memory_runs_alone(tmp_path, monkeypatch):
    (tmp_path / "pool_clock.py").write_text(CLOCK)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("pool_clock").work
    sizes = {"big": 7.0, "small": 2.0, "tiny": 1.0, "least": 1.0}
    with Pool(work, jobs=2, memory=8.0) as pool:
        found = [a for a in pool.answers([Task("run", n, ("",), gb) for n, gb in sizes.items()]) if a is not None]
    at = {answer.task.name: answer.body["at"] for answer in found}
    together = {name for name in at if name != "big" and at[name][0] < at["big"][1] and at["big"][0] < at[name][1]}
    assert set(at) == set(sizes) and "small" not in together


# ------------------------------------------------------------------------------------------------ checks that can fail


# The placements whose SE gates the branch alone.
ON_THE_BRANCH = ("standard", "pre", "inner")


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_035", "torchvision/shufflenet_v2_x0_5", "test_convnext"])
def test_a_zero_gate_tells_branch_sum_and_shortcut_apart(name):
    model, x = build(name), torch.randn(2, 3, 64, 64)
    for actual in ("standard", "pre", "inner", "post", "identity"):
        plan = plan_se(model, actual, existing="stack")
        sites = [site for site in plan.sites if site.kind in structure.WITH_SHORTCUT]
        if not sites:
            assert (name, actual) == ("torchvision/shufflenet_v2_x0_5", "inner")
            continue
        operated = add_se(model, actual, existing="stack", inplace=False)
        for claimed in ("standard", "post", "identity"):
            faults, number = structure.shortcut_faults(operated, [replace(s, placement=claimed) for s in sites], (x,))
            fits = claimed == actual or (claimed == "standard" and actual in ON_THE_BRANCH)
            assert (not faults) == fits, (actual, claimed, faults)
            assert number == 2


def test_an_se_in_another_one_or_in_the_classifier_is_misplaced():
    model = build("seresnet18")
    inside, head = planning.misplaced(model, ["layer1.0.se.fc1.se", "fc.se"])
    assert inside == "layer1.0.se.fc1.se is inside the SE layer1.0.se"
    assert head == "fc.se is in the classifier fc"
    assert planning.misplaced(model, ["layer1.0.se_2", "layer1.0.se_2.se"]) == [
        "layer1.0.se_2.se is inside the SE layer1.0.se_2"
    ]


def test_a_unit_that_a_plan_says_nothing_of_is_silent():
    plan = plan_se(build("test_resnet"), "identity", stages=[1, 2])
    assert not planning.silent_units(plan)
    last = next(skip for skip in reversed(plan.skipped) if skip.reason == "stage 4 was not asked for")
    dropped = replace(plan, sites=plan.sites[1:], skipped=tuple(skip for skip in plan.skipped if skip is not last))
    assert planning.silent_units(dropped) == [plan.sites[0].unit, last.unit]


def test_a_target_that_is_refused_is_a_failure_and_another_name_is_not():
    row = {"kind": "plan", "name": "x", "roles": ["target"], "status": "refused: PlacementError: no", "silent": []}
    assert tasks.failure(row) == "refused: PlacementError: no"
    assert not tasks.failure({**row, "roles": []})
    assert tasks.failure({**row, "roles": [], "status": "failed: KeyError: 'x'"}) == "failed: KeyError: 'x'"
    assert not tasks.failure({**row, "status": planning.HELD})
    assert tasks.failure({**row, "status": planning.SITES, "silent": ["a"]}) == "says nothing of a"


def test_lost_keys_and_changed_values_are_seen():
    before = {"a": "1", "b": "2"}
    assert not running._lost(before, {"a": "1", "se.w": "3", "b": "2"}, ["se"])
    for after in ({"a": "1"}, {"b": "2", "a": "1"}, {"a": "1", "b": "4"}, {**before, "other": "5"}):
        assert running._lost(before, after, ["se"])


def test_what_is_left_of_an_operation_is_seen():
    patient = running.Patient("test_resnet")
    assert patient.args[0].shape == (2, 3, 64, 64) and not running._restored(patient)
    add_se(patient.model)
    assert running._restored(patient).startswith("the keys")
    patient = running.Patient("test_resnet")
    patient.model.layer1[0].left_over = 1
    assert running._restored(patient).startswith("classes or attributes")


class Picky(nn.Module):
    """Two convolutions at an eighth of the resolution, and in training a head with a least size."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 2, least)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.conv(x))
        return self.head(x).mean((2, 3)) if self.training else x.mean((2, 3))


def test_the_smallest_input_shows_the_same_sites_and_trains():
    """Its own size is 224; in evaluation 64 is enough, in training its head wants maps of 10 and more."""
    assert [tuple(arg.shape) for arg in running.smallest_input(Picky(least=10))] == [(2, 3, 96, 96)]
    assert [tuple(arg.shape) for arg in running.smallest_input(Picky(least=30))] == [(2, 3, 256, 256)]


def test_digests_tell_sources_apart(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = files.digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    second = files.digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, files.digest(tmp_path)}) == 3


def test_a_readme_without_the_markers_is_refused(table):
    with pytest.raises(ValueError, match="no section to write to"):
        render.with_section("# Title\n", table)


def test_the_tables_depend_on_nothing_but_the_rows(table):
    backwards = Table(reversed(list(table.rows.values())))
    assert render.document_text(backwards) == render.document_text(table)
    assert render.section_text(backwards) == render.section_text(table)


@pytest.mark.sweep
def test_the_whole_table(tmp_path, table):
    """Everything anew: the rows have to be those that are committed."""
    path = tmp_path / "rows.jsonl"
    assert command.main(["--rows", str(path), "--jobs", "2"]) == 0
    found = files.read(path)
    counts = (*COUNTS, "existing", "checks", "units_run")
    for key, row in found.items():
        old = table.rows[key]
        assert {count: row.get(count) for count in counts} == {count: old.get(count) for count in counts}, key
    assert set(found) == {key for key in table.rows if key[0] != "thorough"}
