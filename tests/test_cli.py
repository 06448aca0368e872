"""The command line: what it prints, what it writes, and how it ends."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from patients import assert_same, images, run
from typer.testing import CliRunner

from se_surgery import __version__, add_se, count_costs, find_se, from_pretrained, plan_se, prune_se, save_pretrained
from se_surgery.commands import app as cli_app
from se_surgery.commands import cost as cli_cost
from se_surgery.commands import main as cli
from se_surgery.commands.main import app
from se_surgery.commands.report import State, same_outputs
from se_surgery.commands.values import read_numbers, read_ratios, read_size
from se_surgery.files.config import read_config
from se_surgery.measuring.bench import saved_bytes
from se_surgery.measuring.cost import Count
from se_surgery.models.bases import create_base
from se_surgery.paper.tables import Table
from se_surgery.paper.text import document
from se_surgery.records import OPERATIONS

ROOT = str(Path(cli.__file__).parents[2])
# A small network with native SEs, and one without.
PLAIN, WITH_SE = "test_resnet", "test_efficientnet"
SMALL = ("--size", "3,64,64")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def call(*arguments, code=0):
    """Runs a command; what it left on stdout and stderr, without the colours that some environments force on it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return tuple(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in (result.stdout, result.stderr))


def as_json(*arguments):
    """Runs a command with --json: nothing else may be on stdout."""
    stdout, _ = call(*arguments, "--json")
    return json.loads(stdout)


def outputs(stdout):
    """The rows that say whether outputs are equal."""
    rows = stdout.split("Outputs on the same noise, before and after\n")[1].split("\n\n")[0]
    return [" ".join(row.split()) for row in rows.splitlines()]


EQUAL = {"as_it_is": True, "normalisations_drawn_anew": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an operated model; no test writes into it."""
    path = tmp_path_factory.mktemp("cli") / "se"
    torch.manual_seed(0)
    save_pretrained(add_se(timm.create_model(PLAIN), r=4, init="paper"), path)
    return path


def test_plan_prints_the_plan():
    stdout, stderr = call("plan", "resnet18")
    assert stdout == str(plan_se(timm.create_model("resnet18"))) + "\n"
    assert "Building resnet18" in stderr and "Traceback" not in stderr


# Every option, and the argument of plan_se that it stands for.
OPTIONS = [
    (["--placement", "pre"], {"placement": "pre"}),
    (["-p", "inner"], {"placement": "inner"}),
    (["--r", "8"], {"r": 8}),
    (["--r", "3=8,-1=4"], {"r": {3: 8, -1: 4}}),
    (["--stages", "3,4"], {"stages": (3, 4)}),
    (["--stages", "-1"], {"stages": (-1,)}),
    (["--where", "layer1.*"], {"where": ["layer1.*"]}),
    (["--where", "layer1.*", "--where", "*.se"], {"where": ["layer1.*", "*.se"]}),
    (["--rd-channels", "5"], {"rd_channels": 5}),
    (["--rd-divisor", "8"], {"rd_divisor": 8}),
    (["--bias"], {"bias": True}),
    (["--no-bias"], {"bias": False}),
    (["--squeeze", "max"], {"squeeze": "max"}),
    (["--act", "silu"], {"act": "silu"}),
    (["--gate", "hard_sigmoid"], {"gate": "hard_sigmoid"}),
    (["--gate-scale", "1.5", "--init", "paper"], {"gate_scale": 1.5, "init": "paper"}),
    (["--attn", "eca"], {"attn": "eca"}),
    (["--existing", "stack"], {"existing": "stack"}),
    (["--name", "gate"], {"name": "gate"}),
    (["--size", "3,64,64"], {"example_input": (3, 64, 64)}),
]


@pytest.mark.parametrize(
    ("arguments", "options"), OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_options_mean_what_they_mean_in_python(arguments, options):
    expected = json.loads(plan_se(timm.create_model(PLAIN), **options).to_json())
    assert as_json("plan", PLAIN, *arguments) == expected
    assert expected["operations"][0]["sites"]


def test_add_and_plan_take_the_same_options():
    given = [{o.name for o in command.params} for command in commands().values() if command.name in ("add", "plan")]
    assert given[0] ^ given[1] == {"output", "overwrite", "draw"}


def commands():
    from typer.main import get_command

    return get_command(app).commands


def test_add_prints_and_writes(tmp_path):
    out = tmp_path / "out"
    stdout, stderr = call("add", PLAIN, "--r", "4", "-o", out, *SMALL)
    plan = plan_se(timm.create_model(PLAIN), r=4, example_input=(3, 64, 64))
    assert stdout.startswith(str(plan) + "\n\nCounted on the model\n")
    before, after = plan.params_before, plan.params_before + plan.params_added
    counted = stdout.split("Counted on the model")[1].split("\n\n")[0]
    assert [line.split()[:4] for line in counted.splitlines() if line.startswith(" parameters")] == [
        ["parameters", f"{before:,}", f"{after:,}", f"{plan.params_added:+,}"]
    ]
    assert f"{plan.macs_added:+,}" in counted
    assert "forward, evaluation: with gates at one bit-equal to the base" in stdout
    assert outputs(stdout) == ["as it is bit-equal", "normalisations drawn anew bit-equal"]
    assert stdout.endswith(f"Written to {out}.\n")
    for step in ("Building", "Looking", "Running", "Verifying", "Writing"):
        assert step in stderr
    assert find_se(from_pretrained(out)) == find_se(add_se(timm.create_model(PLAIN), r=4))
    assert read_config(out)["model_args"]["base"] == PLAIN


def test_add_as_json(tmp_path):
    data = as_json("add", PLAIN, "-o", tmp_path / "out", *SMALL)
    assert set(data) == {
        "format", "version", "base", "base_args", "operations",
        "plan", "parameters", "with_statistics", "multiply_adds", "outputs_equal", "checks", "output"
    }  # fmt: skip
    added = data["plan"]["params_added"]
    assert data["parameters"]["after"] - data["parameters"]["before"] == added > 0
    assert data["with_statistics"]["after"] - data["with_statistics"]["before"] == added
    assert data["multiply_adds"]["after"] - data["multiply_adds"]["before"] == data["plan"]["macs_added"]
    assert data["outputs_equal"] == EQUAL
    assert {check["passed"] for check in data["checks"]} == {True, None}
    assert data["output"] == str(tmp_path / "out")


def test_random_start_changes_outputs_and_is_written(tmp_path):
    data = as_json("add", PLAIN, "--init", "paper", "-o", tmp_path / "out", *SMALL)
    assert data["outputs_equal"]["normalisations_drawn_anew"] is False
    assert len(find_se(from_pretrained(tmp_path / "out"))) == 4


def test_replacing_changes_outputs_and_is_written(tmp_path):
    data = as_json("add", WITH_SE, "--existing", "replace", "-o", tmp_path / "out", *SMALL)
    assert data["outputs_equal"]["normalisations_drawn_anew"] is False
    replaced = [path for site in data["operations"][0]["sites"] for path in site["replaces"]]
    assert replaced and all(site.origin == "se_surgery" for site in find_se(from_pretrained(tmp_path / "out")))


def test_changed_outputs_of_an_identity_start_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "same_outputs", lambda before, after: {**EQUAL, "as_it_is": False})
    _, stderr = call("add", PLAIN, "-o", tmp_path / "out", *SMALL, code=1)
    assert "outputs of 'test_resnet' have changed. Nothing was written" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "base", ["torchvision/shufflenet_v2_x0_5", pytest.param("mobilenetv2_050", marks=pytest.mark.sweep)]
)
def test_add_to_other_libraries_and_blocks(base, tmp_path):
    data = as_json("add", base, "-o", tmp_path / "out", *SMALL)
    assert data["outputs_equal"] == EQUAL
    back = from_pretrained(tmp_path / "out")
    assert len(find_se(back)) == len(data["operations"][0]["sites"]) > 0
    assert type(back) is type(create_base(base))


def test_second_operation_on_a_folder(folder, tmp_path):
    data = as_json("add", folder, "--placement", "post", "--existing", "stack", "-o", tmp_path / "out", *SMALL)
    assert data["outputs_equal"] == EQUAL
    assert len(data["plan"]["existing"]) == len(data["operations"][0]["sites"]) == 4
    model = from_pretrained(folder).eval()
    assert_same(run(model, images()), run(from_pretrained(tmp_path / "out").eval(), images()))


def test_strip_from_a_folder(folder, tmp_path):
    stdout, _ = call("strip", folder, "--stages", "-1", "-o", tmp_path / "out")
    assert stdout.startswith("1 of 4 SEs taken out\n") and "layer4.0.se" in stdout
    # The branches of a fresh network of this kind are multiplied by zero: that an SE is gone shows in one row only.
    assert outputs(stdout) == ["as it is bit-equal", "normalisations drawn anew not equal"]
    assert [site.stage for site in find_se(from_pretrained(tmp_path / "out"))] == [1, 2, 3]


def test_strip_all_of_ours_gives_the_base_back(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model(PLAIN).eval()
    outputs = run(base, images())
    save_pretrained(add_se(base, init="paper"), tmp_path / "se")
    data = as_json("strip", tmp_path / "se", "--origin", "se_surgery", "-o", tmp_path / "out")
    assert len(data["removed"]) == 4
    assert data["parameters"]["after"] == sum(p.numel() for p in timm.create_model(PLAIN).parameters())
    assert_same(run(from_pretrained(tmp_path / "out").eval(), images()), outputs)
    assert read_config(tmp_path / "out")["model_args"]["recipe"]["operations"] == []


def test_strip_native_ones(tmp_path):
    sites = find_se(timm.create_model(WITH_SE))
    data = as_json("strip", WITH_SE, "--where", sites[0].path, "-o", tmp_path / "out", *SMALL)
    assert [site["path"] for site in data["removed"]] == [sites[0].path]
    assert [site.path for site in find_se(from_pretrained(tmp_path / "out"))] == [site.path for site in sites[1:]]


def test_list(folder):
    stdout, _ = call("list", folder)
    assert "layer1.0.se" in stdout and "se_surgery" in stdout
    assert as_json("list", "seresnet18") == [
        {
            "path": f"layer{stage}.{block}.se",
            "unit": f"layer{stage}.{block}",
            "stage": stage,
            "channels": channels,
            "rd_channels": width,
            "params": 2 * channels * width + channels + width,
            "macs": 2 * channels * width + channels * side**2,
            "activations": width + channels + channels * side**2,
            "origin": "timm",
            "layers": [],
            "block": None,
        }
        for stage, channels, width, side in ((1, 64, 8, 56), (2, 128, 8, 28), (3, 256, 16, 14), (4, 512, 32, 7))
        for block in (0, 1)
    ]
    assert call("list", PLAIN)[0] == "no SE\n"


def test_inspect_counts_what_was_pruned_in_layers(tmp_path):
    """The two layers of each of the four SEs, one of which may keep all."""
    model = prune_se(add_se(timm.create_model(PLAIN), r=4, init="paper"), 0.5, example_input=(3, 64, 64))
    save_pretrained(model, tmp_path)
    pruned = len(model.__dict__[OPERATIONS][-1]["sites"])
    lines = call("inspect", tmp_path, *SMALL)[0].splitlines()
    assert lines[-2:] == [
        "     1  add 4 SEs (placement=standard, r=4, init=paper)",
        f"     2  prune {pruned} layers",
    ], lines
    assert pruned in (6, 8)


def test_inspect_a_name():
    data = as_json("inspect", "resnet18")
    assert data["base"] == "resnet18" and data["class"] == "ResNet"
    assert (data["parameters"], data["with_statistics"]) == (11_689_512, 11_699_112)
    assert data["stages"] == [{"stage": stage, "units": {"residual": 2}} for stage in (1, 2, 3, 4)]
    assert data["places"] == {**dict.fromkeys(("standard", "pre", "post", "identity", "inner"), 8), "inception": 0}
    assert data["existing"] == data["operations"] == []
    assert [reject["unit"] for reject in data["rejected"]] == ["conv1"]
    stdout, _ = call("inspect", "resnet18")
    for part in ("resnet18 (ResNet), 4 stages", "11,689,512", "8 units", "Units with a place", "0 SEs"):
        assert part in stdout
    assert "Operations" not in stdout


def test_inspect_names_the_joins_that_are_no_units():
    stdout, _ = call("inspect", "hrnet_w18_small")
    assert "Joins that are no units" in stdout and "a sum of 3 maps is a fusion" in stdout


def test_inspect_a_folder(folder, tmp_path):
    call("strip", folder, "--stages", "1", "-o", tmp_path / "out")
    data = as_json("inspect", tmp_path / "out")
    assert data["base"] == PLAIN
    assert [operation["op"] for operation in data["operations"]] == ["add", "strip"]
    assert len(data["existing"]) == 3
    stdout, _ = call("inspect", tmp_path / "out")
    assert "1  add 4 SEs (placement=standard, r=4, init=paper)" in stdout and "2  strip 1 SE\n" in stdout


def test_cost_before_and_after():
    """Of a model without SEs, and of one for which options ask for more."""
    data = as_json("cost", PLAIN, "--r", "4", "--stages", "3,4", *SMALL)
    model = timm.create_model(PLAIN)
    before = count_costs(model, (3, 64, 64)).parts
    after = count_costs(add_se(model, r=4, stages=(3, 4)), (3, 64, 64)).parts
    assert data["image"] == [3, 64, 64]
    images = torch.randn(2, 3, 64, 64)
    networks = timm.create_model(PLAIN).train(), model.train()
    assert data["saved_bytes"] == [saved_bytes(network, images) // 2 for network in networks]
    for side, costs in (("before", before), ("after", after)):
        assert data[side].pop("whole") == asdict(sum(costs.values(), Count()))
        assert data[side] == {part: asdict(cost) for part, cost in costs.items()}
    assert data["before"]["stage 2"] == data["after"]["stage 2"] and data["before"] != data["after"]
    more = as_json("cost", WITH_SE, "--existing", "replace", "--r", "2", *SMALL)
    assert more["before"]["whole"] == as_json("cost", WITH_SE, *SMALL)["after"]["whole"] != more["after"]["whole"]
    stdout, stderr = call("cost", PLAIN, *SMALL)
    assert stdout.startswith(
        f"{PLAIN}, before and after 4 SEs are put in\n\nFor one image of 3 x 64 x 64\n\nParameters\n"
    )
    assert "Counting ..." in stderr
    assert re.search(r"\n\nSaved for the backward pass in training: [\d.]+ MiB before, [\d.]+ MiB after \(\+", stdout)


def test_cost_says_what_it_cannot_count(monkeypatch):
    def refuse(*_):
        raise ValueError("targets should not be none when in training mode")

    monkeypatch.setattr(cli_cost, "saved_bytes", refuse)
    assert as_json("cost", PLAIN, *SMALL)["saved_bytes"] == [None, None]
    assert call("cost", PLAIN, *SMALL)[0].endswith("not counted, because it does not train on images alone.\n")


def test_cost_of_the_ses_that_are_there(folder):
    assert call("cost", folder, *SMALL)[0].startswith(f"{folder}, without its 4 SEs and with them\n\n")
    data = as_json("cost", folder, *SMALL)
    assert data["before"] == as_json("cost", PLAIN, *SMALL)["before"]
    added = as_json("cost", PLAIN, "--r", "4", "--init", "paper", *SMALL)
    assert data["after"] == added["after"] and data["saved_bytes"] == added["saved_bytes"]


def test_paper(monkeypatch):
    made = [Table("A title", "A text.", ("", ">paper", ">here"), [("one", "1.0", "1.04")], ["A reason."])]
    monkeypatch.setattr("se_surgery.paper.tables.tables", lambda: made)
    stdout, _ = call("paper")
    assert stdout == document(made)
    assert stdout.startswith("# The paper, row by row\n")
    assert "| one |   1.0 | 1.04 |\n\n1. A reason.\n" in stdout
    assert as_json("paper") == [
        {
            "title": "A title",
            "text": "A text.",
            "columns": ["", ">paper", ">here"],
            "rows": [["one", "1.0", "1.04"]],
            "notes": ["A reason."],
        }
    ]


def test_verify(folder):
    stdout, _ = call("verify", folder, "--quick")
    assert "forward, training" in stdout and "BROKEN" not in stdout
    checks = as_json("verify", folder, "--quick", *SMALL)
    assert {"name", "passed", "detail"} == set(checks[0]) and all(check["passed"] is not False for check in checks)


def test_a_name_is_never_taken_for_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    for file in folder.iterdir():
        (tmp_path / "resnet18" / file.name).write_bytes(file.read_bytes())
    assert as_json("list", "resnet18") == []
    assert len(as_json("list", "./resnet18")) == 4


# Refused, with what the message says.
REFUSED = [
    (["plan", "nosuch"], "There is no model 'nosuch'"),
    (["plan", "resnet_18"], "Did you mean resnet18"),
    (["plan", "hf-hub:timm/resnet18"], "Names with a colon"),
    (["plan", "torchvision/nosuch"], "There is no model 'torchvision/nosuch'"),
    (["plan", PLAIN, "--r", "0"], "r=0 is not a whole number"),
    (["plan", PLAIN, "--placement", "middle"], "There is no placement 'middle'"),
    (["plan", PLAIN, "--stages", "9"], "There is no stage 9"),
    (["plan", PLAIN, "--act", "nosuch"], "act='nosuch' is not the name"),
    (["plan", PLAIN, "--size", "7,64,64"], "does not run on"),
    (["add", PLAIN, "--placement", "inception", "-o", "out"], "no place for 'inception'"),
    (["add", WITH_SE, "-o", "out"], "holds an SE already"),
    (["add", PLAIN, "--where", "nosuch", "-o", "out"], "where leaves it out"),
    (["strip", PLAIN, "-o", "out"], "The model has no SE"),
    (["strip", "seresnet18", "--origin", "nobody", "-o", "out"], "origin='nobody' is not known"),
    (["strip", WITH_SE, "--batch-size", "8", "-o", "out"], "--batch-size is about the images of --fold. Give --fold"),
    (["verify", PLAIN], "holds no SE of this library"),
    (["list", "."], "has no model.safetensors. Name a folder that save_pretrained wrote"),
    (["recipe", PLAIN, "-o", "."], "'.' cannot be written: it is a folder or in none. Name a file"),
    (["recipe", PLAIN, "-o", "no/recipe.json"], "'no/recipe.json' cannot be written: it is a folder or in none"),
    (["plan", "./nosuch"], "There is no folder './nosuch'"),
    (["bench", PLAIN, "--threads", "9999"], "--threads 9999 is more than the"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = call(*arguments, code=1)
    assert stdout == ""
    last = stderr.splitlines()[-1]
    assert last.startswith("se-surgery: ") and message in last
    assert "Traceback" not in stderr and not list(tmp_path.iterdir())


def test_folders_that_hold_something_are_refused_before_any_work(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for arguments in (("add", PLAIN), ("strip", "seresnet18")):
        _, stderr = call(*arguments, "-o", folder, code=1)
        assert stderr.startswith("se-surgery:") and "is not empty" in stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_overwrite(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    call("add", PLAIN, "--stages", "1", "-o", tmp_path, "--overwrite", *SMALL)
    call("add", tmp_path, "--stages", "2", "-o", tmp_path, "--overwrite", *SMALL)
    assert [site.stage for site in find_se(from_pretrained(tmp_path))] == [1, 2]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_pretrained_is_for_names(folder):
    _, stderr = call("plan", folder, "--pretrained", code=1)
    assert "has weights of its own" in stderr


def test_pretrained_reaches_the_library(monkeypatch):
    asked = []

    def create(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create_base(name)

    monkeypatch.setattr(cli_app, "create_base", create)
    call("plan", PLAIN, "--pretrained")
    call("plan", PLAIN)
    assert asked == [(PLAIN, True), (PLAIN, False)]


USAGE = [
    ["plan"],
    ["nosuch"],
    ["add", PLAIN],
    ["plan", PLAIN, "--nosuch"],
    ["plan", PLAIN, "--r", "many"],
    ["plan", PLAIN, "--r", "1=2=3"],
    ["plan", PLAIN, "--r", "3=8,3=4"],
    ["plan", PLAIN, "--r", "3=8,4"],
    ["plan", PLAIN, "--stages", "one"],
    ["plan", PLAIN, "--stages", ""],
    ["plan", PLAIN, "--size", "224,224"],
    ["plan", PLAIN, "--size", "3,0,224"],
    ["plan", PLAIN, "--rd-channels", "wide"],
    ["plan", PLAIN, "--gate-scale", "big"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_mistakes_in_the_command_line(arguments):
    stdout, stderr = call(*arguments, code=2)
    assert stdout == "" and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (read_ratios, "16", 16),
        (read_ratios, "-1=8", {-1: 8}),
        (read_ratios, "3=8, 4=16", {3: 8, 4: 16}),
        (read_numbers, "3", (3,)),
        (read_numbers, "3, 4", (3, 4)),
        (read_size, "1,28,28", (1, 28, 28)),
        (read_size, "3,16,112,112", (3, 16, 112, 112)),
        (read_size, "64", (3, 64, 64)),
    ],
)
def test_reading(read, text, expected):
    assert read(text) == expected


def test_help_has_examples_that_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "se-surgery add resnext50_32x4d --r 16 -o se_resnext50_32x4d" in call("--help")[0]
    for name, command in commands().items():
        text = call(name, "--help")[0]
        assert "Examples:" in text and f"se-surgery {name}" in " ".join(text.split())
        for line in command.epilog.split("\n\n")[1:]:
            context = command.make_context(name, line.split()[2:])
            assert set(context.params) == {parameter.name for parameter in command.params if parameter.name != "help"}


def test_version():
    assert call("--version")[0] == f"se-surgery {__version__}\n"


def test_without_a_command_it_helps():
    result = CliRunner().invoke(app, [])
    assert "Usage:" in result.output


NAN = float("nan")


@pytest.mark.parametrize(
    ("before", "after", "equal"),
    [
        ([1.0, NAN], [1.0, NAN], True),
        ([0.0, NAN], [NAN, 0.0], False),
        ([0.0], [NAN], False),
        ([1.0], [1.0, 1.0], False),
        ([1.0], None, False),
    ],
)
def test_nan_is_equal_to_nan_in_its_place_only(before, after, equal):
    states = [State(0, 0, 0, (), () if values is None else (torch.tensor(values),)) for values in (before, after)]
    assert same_outputs(*states) == {**EQUAL, "normalisations_drawn_anew": equal}


def test_in_a_process_of_its_own(tmp_path):
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from se_surgery.commands.main import app; app()"
    command = [sys.executable, "-c", code, "plan", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "There is no model 'nosuch'" in done.stderr and "Traceback" not in done.stderr
