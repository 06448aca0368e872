"""The Hub: the real client against a server on the loopback. What goes wrong there is an error here, and no model."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import TOKEN, fresh_cache, hub, point_to, serving  # noqa: F401 - `hub` is a fixture
from huggingface_hub import constants
from patients import assert_differs, assert_same, build, images, run
from typer.testing import CliRunner

from se_surgery import HubError, SurgeryError, add_se, from_pretrained, push_to_hub, save_pretrained
from se_surgery.commands.main import app
from se_surgery.files.artefact import MARK
from se_surgery.files.pretrained import pull_from_hub

REPO = "tester/net"
FILES = {".gitattributes", "README.md", "config.json", "model.safetensors"}


def operated(stages=None):
    return add_se(build("test_resnet"), init="paper", stages=stages)


def from_timm(place, **kwargs):
    return timm.create_model(f"hf-hub:{place}", pretrained=True, **kwargs)


def outputs(model):
    return run(model.eval(), images())


@pytest.fixture(scope="module")
def two():
    """Two models of the same base: one for each of two pushes."""
    torch.manual_seed(0)
    return operated(), operated(stages=[1, 2])


@pytest.fixture(scope="module")
def pushes(two, tmp_path_factory):
    """What two pushes leave on a Hub."""
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        point_to(server, tmp_path_factory.mktemp("pushes"), patch)
        push_to_hub(two[0], REPO, tag="v1")
        push_to_hub(two[1], REPO)
        return server


@pytest.fixture
def pushed(hub, pushes):  # noqa: F811
    """A Hub with the first model at v1, and the second at main."""
    hub.repos, hub.objects, hub.log = copy.deepcopy(pushes.repos), dict(pushes.objects), list(pushes.log)
    return hub


def test_push_and_load(pushed, two, tmp_path, monkeypatch):
    repo = pushed.repos[REPO]
    assert set(repo.resolve("main").files) == FILES and not repo.private
    assert [commit.title for commit in repo.commits.values()] == [
        "initial commit",
        *["Save the model with se-surgery"] * 2,
    ]
    assert_differs(outputs(two[0]), outputs(two[1]))
    for place, model in ((REPO, two[1]), (f"{REPO}@v1", two[0]), (f"{REPO}@main", two[1])):
        for load in (from_timm, from_pretrained):
            fresh_cache(tmp_path, monkeypatch)
            assert_same(outputs(load(place)), outputs(model))
    assert_same(outputs(from_pretrained(REPO, revision="v1")), outputs(two[0]))
    assert from_pretrained(REPO, revision="v1", num_classes=7).fc.out_features == 7
    fetched = {path.rpartition("/")[2] for path in pushed.requests("GET", "/resolve/")}
    assert fetched == {"README.md", "config.json", "model.safetensors"}


def test_the_returned_name_is_that_commit(hub, two, tmp_path, monkeypatch):  # noqa: F811
    first = push_to_hub(two[0], REPO)
    push_to_hub(two[1], REPO)
    assert first == f"{REPO}@{list(hub.repos[REPO].commits)[1]}"
    assert_same(outputs(from_timm(first)), outputs(two[0]))


def test_a_picture_is_pushed(hub, two, tmp_path):  # noqa: F811
    (tmp_path / "gates.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    push_to_hub(two[0], REPO, plot=tmp_path / "gates.png")
    files = hub.repos[REPO].resolve("main").files
    assert set(files) == {*FILES, "excitations.png"} and b"(excitations.png)" in files["README.md"]
    push_to_hub(two[1], REPO)  # another model, and no picture of it
    assert set(hub.repos[REPO].resolve("main").files) == {*FILES}


def test_pushing_the_same_again_makes_no_commit(hub, two):  # noqa: F811
    first = push_to_hub(two[0], REPO)
    assert push_to_hub(two[0], REPO) == first
    assert len(hub.repos[REPO].commits) == 2


def test_a_branch_and_a_tag(hub, two):  # noqa: F811
    push_to_hub(two[0], REPO)
    push_to_hub(two[1], REPO, revision="dev", tag="v2", message="Two stages")
    repo = hub.repos[REPO]
    assert repo.tags == {"v2": repo.branches["dev"]} and repo.branches["dev"] != repo.branches["main"]
    assert repo.resolve("dev").title == "Two stages"
    assert_same(outputs(from_pretrained(REPO)), outputs(two[0]))
    assert_same(outputs(from_pretrained(REPO, revision="dev")), outputs(two[1]))
    before = dict(repo.branches)
    with pytest.raises(HubError, match="has a tag 'v2' already"):
        push_to_hub(two[0], REPO, tag="v2")
    assert repo.branches == before


@pytest.mark.parametrize(
    ("account", "asked", "private"), [(True, None, True), (False, None, False), (False, True, True)]
)
def test_private_as_asked_or_as_the_account_has_it(account, asked, private, hub, two, monkeypatch):  # noqa: F811
    hub.default_private = account
    push_to_hub(two[0], REPO, private=asked)
    assert hub.repos[REPO].private == private
    assert_same(outputs(from_pretrained(REPO)), outputs(two[0]))


def test_a_token_of_ones_own(hub, two, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"'tester/net' cannot be created or opened .*Log in with `hf auth login`"):
        push_to_hub(two[0], REPO)
    push_to_hub(two[0], REPO, token=TOKEN, private=True)
    with pytest.raises(HubError, match=r"a private repository takes a token"):
        from_pretrained(REPO)
    assert_same(outputs(from_pretrained(REPO, token=TOKEN)), outputs(two[0]))


def test_progress_is_shown(hub, two, capfd):  # noqa: F811
    push_to_hub(two[0], REPO)
    assert "model.safetensors: 100%" in capfd.readouterr().err


def test_a_card_of_ones_own_is_kept(hub, two):  # noqa: F811
    push_to_hub(two[0], REPO)
    repo = hub.repos[REPO]
    assert MARK.encode() in repo.resolve("main").files["README.md"]
    push_to_hub(two[1], REPO)
    assert b"2 SEs put in" in repo.resolve("main").files["README.md"]
    repo.commit("main", "mine", {**repo.resolve("main").files, "README.md": b"mine"})
    push_to_hub(two[0], REPO)
    assert repo.resolve("main").files["README.md"] == b"mine"
    assert_same(outputs(from_pretrained(REPO)), outputs(two[0]))


# Where nothing is: what is asked for, and what is said.
NOWHERE = [
    ("tester/nosuch", {}, r"'config\.json' of 'tester/nosuch' cannot be had .*See that the name is right"),
    (REPO, {"revision": "nosuch"}, r"Name a branch, tag or commit that it has\."),
    (f"{REPO}@nosuch", {}, r"Name a branch, tag or commit that it has\."),
    (f"{REPO}@v1", {"revision": "v1"}, "names a revision, and revision='v1' another"),
    ("tester/other", {}, r"'config\.json' of 'tester/other' cannot be had .*se-surgery reads safetensors and no pick"),
    ("tester/..", {}, "Name it as USER/MODEL"),
    # A name with the letters of a storage in it is no hint that the Hub lacks that storage.
    ("tester/foxet", {}, r"See that the name is right[^.]*\."),
    (None, {}, "None is no folder and no repository"),
    (b"net", {}, "is no folder and no repository"),
]


@pytest.mark.parametrize(("place", "given", "message"), NOWHERE, ids=str)
def test_what_is_not_there(place, given, message, pushed):
    pushed.create("tester/other").commit("main", "other", {"pytorch_model.bin": b"\x80"})
    with pytest.raises(SurgeryError, match=message):
        from_pretrained(place, **given)


def test_names_longer_than_a_file_may_have(pushed):
    for place, message in (("n" * 300, "it names no repository"), ("n" * 300 + "/m", "Name it as USER/MODEL")):
        with pytest.raises(SurgeryError, match=message):
            from_pretrained(place)
    assert "There is no model 'nnn" in command("inspect", "n" * 300, code=1)[1]


def test_pickles_on_the_hub_are_not_read(pushed, tmp_path, monkeypatch):
    """timm by itself would take the pickle where there is no model.safetensors."""
    repo = pushed.repos[REPO]
    files = {name: data for name, data in repo.resolve("main").files.items() if name != "model.safetensors"}
    torch.save({}, tmp_path / "pytorch_model.bin")
    repo.commit("main", "evil", {**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    for load in (from_timm, from_pretrained):
        with pytest.raises(HubError, match="se-surgery reads safetensors and no pickles"):
            load(REPO)
    assert not pushed.requests("GET", r"\.bin")


# What fails while a model is pushed, and what is said.
FAILURES = {
    "modes": ({"method": "POST", "pattern": "/preupload/", "status": 403}, "was not written"),
    "the upload": ({"method": "PUT", "pattern": "/lfs/", "status": 403}, "was not written"),
    "the check of the upload": ({"method": "POST", "pattern": "/verify", "status": 400}, "was not written"),
    "the commit": ({"method": "POST", "pattern": "/commit/", "status": 500}, "was not written"),
    "the commit, by another's": ({"method": "POST", "pattern": "/commit/", "status": 412}, "was not written"),
    "the repository": (
        {"method": "GET", "pattern": "/revision/|models/tester/net$", "status": 403},
        "cannot be created or",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_push_that_fails_half_way_commits_nothing(case, pushed, two):
    fault, message = FAILURES[case]
    repo = pushed.repos[REPO]
    before, commits = dict(repo.branches), len(repo.commits)
    pushed.fault(**fault)
    with pytest.raises(HubError, match=message) as caught:
        push_to_hub(operated(stages=3), REPO)
    assert str(caught.value).endswith(".") and "xet" not in str(caught.value)
    assert repo.branches == before and len(repo.commits) == commits
    pushed.faults.clear()
    assert_same(outputs(from_timm(REPO)), outputs(two[1]))


def test_a_tag_that_fails_names_the_commit(hub, two):  # noqa: F811
    hub.fault("POST", "/tag/", status=403)
    with pytest.raises(HubError, match=r"'tester/net' has its commit [0-9a-f]{40}, but not the tag 'v1'"):
        push_to_hub(two[0], REPO, tag="v1")


# What would fail after the commit, or be lost.
NO_REFS = [
    ({"tag": ""}, "'' is not the name of a tag"),
    ({"tag": "v 1"}, "'v 1' is not the name of a tag"),
    ({"tag": 3}, "3 is not the name of a tag"),
    ({"tag": "a..b"}, "is not the name of a tag"),
    ({"revision": ""}, "'' is not the name of a branch"),
    ({"revision": "-dev"}, "is not the name of a branch"),
    ({"message": " "}, "message=' ' is not the message of a commit"),
]


@pytest.mark.parametrize(("given", "message"), NO_REFS, ids=str)
def test_names_that_git_does_not_take(given, message, hub, two):  # noqa: F811
    with pytest.raises(SurgeryError, match=message):
        push_to_hub(two[0], REPO, **given)
    assert not hub.log


def test_another_push_in_between_is_not_overwritten(pushed, two):
    repo = pushed.repos[REPO]
    pushed.fault("PUT", "/lfs/", call=lambda: repo.commit("main", "theirs", dict(repo.resolve("main").files)), times=1)
    with pytest.raises(HubError, match=r"was not written.*412"):
        push_to_hub(operated(stages=3), REPO)
    assert repo.resolve("main").title == "theirs"


def test_a_hub_without_xet(hub, two, monkeypatch):  # noqa: F811
    pytest.importorskip("hf_xet", reason="hf_xet is not installed, so that nothing is uploaded by Xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"set HF_HUB_DISABLE_XET=1 in the environment before Python starts\."):
        push_to_hub(two[0], REPO)
    assert len(hub.repos[REPO].commits) == 1


def test_no_licence_no_push(hub):  # noqa: F811
    model = add_se(build("test_resnet"))
    model.pretrained_cfg = {**model.pretrained_cfg, "license": None, "tag": None}
    with pytest.raises(SurgeryError, match=r"The licence of .* is not known.*give license='apache-2\.0'"):
        push_to_hub(model, REPO)
    assert not hub.log
    push_to_hub(model, REPO, license="mit")
    files = hub.repos[REPO].resolve("main").files
    assert b"license: mit" in files["README.md"]
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"


@pytest.mark.parametrize("name", ["net", "a/b/c", "tester/net@v1", "", 3], ids=str)
def test_names_that_are_none(name, hub, two):  # noqa: F811
    with pytest.raises(SurgeryError, match="is not the name of a repository"):
        push_to_hub(two[0], name)
    assert not hub.log


def test_main_moves_between_two_requests(pushed, two):
    """timm fetches configuration and weights in two requests; we keep to the commit of the first."""
    repo = pushed.repos[REPO]
    second = repo.branches["main"]

    def move():
        repo.branches["main"] = second

    for load in (from_pretrained, from_timm):
        repo.branches["main"] = repo.tags["v1"]
        pushed.faults[:] = []
        pushed.fault("HEAD", r"/model\.safetensors", call=move)
        if load is from_pretrained:
            assert_same(outputs(load(REPO)), outputs(two[0]))
        else:
            with pytest.raises(SurgeryError, match=r"were not saved together.*from the Hub, name a revision"):
                load(REPO, cache_dir=str(Path(constants.HF_HUB_CACHE) / "other"))


@pytest.mark.parametrize("wanted", [{}, {"num_classes": 3}], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_download_that_was_tampered_with(name, wanted, pushed, two, tmp_path, monkeypatch):
    """Of equal size, which is all that huggingface_hub compares; the change is one bit of a value."""

    def tamper(data):
        if name == "config.json":
            return data.replace(b'"rd_channels": 2', b'"rd_channels": 3').replace(
                b'"gate_scale": null', b'"gate_scale": 1e00'
            )
        return data[:-1] + bytes([data[-1] ^ 1])

    for load in (from_timm, from_pretrained):
        fresh_cache(tmp_path, monkeypatch)
        pushed.faults[:] = []
        fault = pushed.fault("GET", name.replace(".", r"\."), tamper=tamper)
        with pytest.raises(SurgeryError, match=r"is not what was saved|were not saved together|recipe is damaged"):
            load(REPO, **wanted)
        assert fault.times < 1000


def test_a_download_that_breaks_off_goes_on(pushed, two):
    pushed.fault("GET", r"model\.safetensors", cut=1000, times=1)
    assert_same(outputs(from_pretrained(REPO)), outputs(two[1]))


def test_a_file_that_is_cut_on_the_disk(pushed, tmp_path):
    from_timm(REPO)
    held = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*/model.safetensors")).resolve()
    with open(held, "r+b") as file:
        file.truncate(held.stat().st_size - 1)
    for load in (from_timm, from_pretrained):
        with pytest.raises(SurgeryError, match=r"model\.safetensors' is damaged"):
            load(REPO)


def test_without_a_network(pushed, two, monkeypatch):
    """What was fetched before is there, and what was not is an error with a reason."""
    from_pretrained(REPO)
    pushed.fault("HEAD", ".", status=503)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(outputs(from_pretrained(REPO)), outputs(two[1]))
    with pytest.raises(HubError, match="what was never downloaded is not there offline"):
        from_pretrained(f"{REPO}@v1")
    with pytest.raises(HubError, match=r"Unset HF_HUB_OFFLINE in the environment"):
        push_to_hub(two[0], REPO)


def test_pull(pushed, two, tmp_path):
    commit = pull_from_hub(f"{REPO}@v1", tmp_path / "net")
    assert commit == f"{REPO}@{pushed.repos[REPO].tags['v1']}"
    files = pushed.repos[REPO].resolve("v1").files
    assert {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()} == {
        name: data for name, data in files.items() if name != ".gitattributes"
    }
    assert_same(outputs(from_pretrained(tmp_path / "net")), outputs(two[0]))
    with pytest.raises(SurgeryError, match="is not empty"):
        pull_from_hub(REPO, tmp_path / "net")
    pushed.fault("GET", r"model\.safetensors", tamper=lambda data: data[:-1] + b"x")
    with pytest.raises(SurgeryError, match="is not what was saved"):
        pull_from_hub(REPO, tmp_path / "net", overwrite=True)
    assert_same(outputs(from_pretrained(tmp_path / "net")), outputs(two[0]))


def test_the_cache_is_never_written_to(pushed, two, tmp_path):
    """A folder of the cache holds links: saving over it replaces the link, and the blob stays."""
    from_pretrained(REPO)
    link = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*/model.safetensors"))
    blob, data = link.resolve(), link.read_bytes()
    save_pretrained(two[0], link.parent, overwrite=True)
    assert blob.read_bytes() == data != link.read_bytes()


def test_timm_pushes_what_it_loaded(pushed, two, caplog):
    """By timm's own function: no digest of the weights from before is left in its configuration."""
    model = from_timm(REPO)
    with torch.no_grad():
        model.fc.bias.add_(1)
    with caplog.at_level(logging.CRITICAL):
        timm.models.push_to_hf_hub(model, "tester/again", safe_serialization=True)
    assert_same(outputs(from_timm("tester/again")), outputs(model))


@pytest.mark.downstream
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_from_the_hub(pushed, two):
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(REPO, revision="v1").eval()
    assert_same([model(images()).logits.detach()], outputs(two[0]))


def command(*arguments, code=0):
    """Runs a command of the command line; what it left on stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_command_line(hub, two, tmp_path):  # noqa: F811
    save_pretrained(two[0], tmp_path / "net")
    stdout, stderr = command("push", tmp_path / "net", REPO, "--tag", "v1", "--private", "--card-tag", "medical")
    repo = hub.repos[REPO]
    assert stdout.splitlines()[0] == f"Pushed as {REPO}@{repo.tags['v1']}."
    assert f"timm.create_model('hf-hub:{REPO}@v1', pretrained=True)" in stdout and "Pushing to" in stderr
    assert repo.private and b"- medical" in repo.resolve("v1").files["README.md"]
    data = json.loads(command("inspect", REPO, "--json")[0])
    assert data["base"] == "test_resnet" and len(data["existing"]) == 4 and data["operations"][0]["op"] == "add"
    assert json.loads(command("list", f"{REPO}@v1", "--json")[0])[0]["path"] == "layer1.0.se"
    command("strip", f"{REPO}@v1", "--stages", "-1", "-o", tmp_path / "stripped")
    made = json.loads(command("push", tmp_path / "stripped", REPO, "--branch", "dev", "--json")[0])
    assert made == {"commit": f"{REPO}@{repo.branches['dev']}", "model": f"hf-hub:{REPO}@dev"}
    assert command("pull", f"{REPO}@v1", "-o", tmp_path / "again")[0].startswith(f"{REPO}@{repo.tags['v1']} written to")
    assert_same(outputs(from_pretrained(tmp_path / "again")), outputs(two[0]))
    for arguments, message in (
        (("inspect", "tester/nosuch"), "See that the name is right"),
        (("pull", "tester/nosuch", "-o", tmp_path / "no"), "See that the name is right"),
        (("pull", "net", "-o", tmp_path / "no"), "is not the name of a repository"),
        (("push", "test_resnet", "net"), "is not the name of a repository"),
        (("push", tmp_path / "net", REPO, "--tag", "v1"), "has a tag 'v1' already"),
        (("plan", REPO, "--pretrained"), "has weights of its own"),
    ):
        stdout, stderr = command(*arguments, code=1)
        assert stdout == "" and message in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert not (tmp_path / "no").exists()


def test_the_server_is_the_clients_kind(pushed):
    """Beyond what se-surgery asks for: the calls of the client that a user may make of the same repository."""
    api = huggingface_hub.HfApi()
    assert [commit.title for commit in api.list_repo_commits(REPO)][-1] == "initial commit"
    assert set(api.list_repo_files(REPO)) == FILES
    folder = huggingface_hub.snapshot_download(REPO, revision="v1")
    assert set(os.listdir(folder)) == FILES
    api.delete_tag(REPO, tag="v1")
    assert not api.list_repo_refs(REPO).tags
    assert api.whoami()["name"] == "tester"
