"""Names in timm's registry: others' stay theirs, a name overwrites nothing, and is there whole or not at all."""

from __future__ import annotations

import json
import keyword
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import timm
from patients import OLD_TIMM
from timm.models import _registry as timm_registry
from timm.models import model_entrypoint, register_model
from torch import nn

import se_surgery
from se_surgery import OptionError, SqueezeExcite, SurgeryError, find_se, register_se, unregister_se
from se_surgery.models import bases, registry, se_models, tv

TABLES = [
    name
    for name, table in vars(timm_registry).items()
    if name.startswith(("_model", "_module", "_deprecated")) and isinstance(table, (dict, set))
]


def tables() -> dict[str, Any]:
    """A copy of all that timm knows, and of what this library adds by name."""
    held: dict[str, Any] = {name: getattr(timm_registry, name) for name in TABLES}
    held |= {"__all__": se_models.__all__, "default_cfgs": se_models.default_cfgs, "functions": se_models._functions}
    inner = lambda value: type(value)(value) if isinstance(value, (set, list, dict)) else value  # noqa: E731
    return {
        name: {key: inner(value) for key, value in table.items()} if isinstance(table, dict) else set(table)
        for name, table in held.items()
    }


@pytest.fixture(autouse=True)
def _tables_as_before() -> Iterator[None]:
    before, known = tables(), set(vars(se_models))
    yield
    for name in sorted(se_models._users):
        unregister_se(name)
    assert tables() == before and set(vars(se_models)) == known


def theirs(name: str, module: str = "somebody.nets") -> None:
    """Register a model of somebody else's, in a module of any name."""
    holder = sys.modules.setdefault(module, types.ModuleType(module))

    def function(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return nn.Identity()

    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    setattr(holder, name, function)
    register_model(function)


# ------------------------------------------------------------------------------------------------ theirs come first

_BEFORE = """
import json, sys, types, warnings
import timm
from timm.models import register_model
from torch import nn

def theirs(name, module):
    holder = sys.modules.setdefault(module, types.ModuleType(module))
    def function(pretrained=False, **kwargs):
        return nn.Identity()
    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    holder.default_cfgs = {name: {"url": "", "num_classes": 7}}
    register_model(function)

for name, module in TAKEN:
    theirs(name, module)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import se_surgery
from se_surgery.models import se_models
from se_surgery.models.bases import is_base

def said(call, *args):
    try:
        return call(*args)
    except se_surgery.SurgeryError as error:
        return str(error)

import importlib
number = len(se_models._functions)
with warnings.catch_warnings(record=True) as again:
    warnings.simplefilter("always")
    importlib.reload(se_models)

print(json.dumps({
    "reloaded": [str(one.message) for one in again],
    "same number": number == len(se_models._functions) == len(set(se_models.__all__)) == len(se_models.__all__),
    "warnings": [str(one.message) for one in caught],
    "built": {name: type(timm.create_model(name)).__name__ for name, _ in TAKEN},
    "cfgs": {name: timm.get_pretrained_cfg(name).num_classes for name, _ in TAKEN},
    "ours": [name for name, _ in TAKEN if name in se_models._functions],
    "bases": {name: is_base(name) for name, _ in TAKEN},
    "unregistered": {name: said(se_surgery.unregister_se, name) for name, _ in TAKEN},
    "registered": {name: said(se_surgery.register_se, name, "test_resnet") for name, _ in TAKEN},
    "resnet18": type(timm.create_model("se_resnet18")).__name__,
    "number": len(se_models._functions),
    "loaded": said(se_surgery.from_pretrained, FOLDER) if FOLDER else None,
}))
"""


def imported_after(*taken: tuple[str, str], folder: str = "") -> dict[str, Any]:
    """What comes of importing this library where others registered models before, in an interpreter of its own."""
    script = f"TAKEN = {taken!r}\nFOLDER = {folder!r}\n{_BEFORE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_names_that_others_registered_first_stay_theirs():
    """In modules of any name, that of our own too; a backbone's name takes those that are made of it along."""
    names = ("se_resnet50", "se_tv_resnet18", "se_resnet50_pre", "bn_inception", "only_theirs")
    modules = ("plugin.se_models", "se_models", "a.b", "nets", "plugin.se_models")
    found = imported_after(*zip(names, modules, strict=True))
    (warning,) = found["warnings"]
    left_out = {"se_resnet50", "se_tv_resnet18", "se_resnet50_pre", "bn_inception", "se_bn_inception"}
    left_out.add("se_bn_inception_paper")
    assert set(warning.split(": ")[1].split(". ")[0].split(", ")) == left_out and "leaves out 6 of" in warning
    assert set(found["built"].values()) == {"Identity"} and set(found["cfgs"].values()) == {7}
    assert found["ours"] == [] and set(found["bases"].values()) == {True}
    assert all("was not registered by register_se" in text for text in found["unregistered"].values())
    assert all("already. Give another name." in text for text in found["registered"].values())
    # Its own names, which timm has already, are no others' where the module is imported again.
    assert found["reloaded"] == found["warnings"] and found["same number"]
    assert found["resnet18"] == "ResNet" and found["number"] == len(se_models._functions) - 5


def test_the_name_that_saved_models_are_built_under(tmp_path):
    """Where it is somebody else's, ours cannot be loaded, and theirs is not."""
    saved = se_surgery.save_pretrained(se_surgery.add_se(timm.create_model("test_resnet")), tmp_path / "x")
    found = imported_after(("se_surgery", "their.nets"), folder=str(saved))
    assert "se_surgery. Import" in found["warnings"][0] and found["built"] == {"se_surgery": "Identity"}
    assert "'se_surgery' in timm's registry is that of 'their.nets'" in found["loaded"]


# ------------------------------------------------------------------------------------------------- theirs come later


@pytest.mark.skipif(OLD_TIMM, reason="timm before 1.0.31 leaves what it overwrites in half of its tables")
@pytest.mark.parametrize("module", ["plugin.other", "plugin.se_models"])
def test_a_name_that_others_register_afterwards_is_theirs(module):
    register_se("mine_by_now", "test_resnet")
    with pytest.warns(UserWarning, match="Overwriting mine_by_now"):
        theirs("mine_by_now", module)
    try:
        assert isinstance(timm.create_model("mine_by_now"), nn.Identity) and bases.is_base("mine_by_now")
        with pytest.raises(OptionError, match=r"'mine_by_now' was not registered by register_se. Registered are: none"):
            unregister_se("mine_by_now")
        with pytest.raises(OptionError, match="timm has a model 'mine_by_now' already"):
            register_se("mine_by_now", "test_resnet")
        assert isinstance(timm.create_model("mine_by_now"), nn.Identity)
    finally:
        registry.forget("mine_by_now", module)
        se_models._unregister("mine_by_now")
        se_models._users.discard("mine_by_now")


# ------------------------------------------------------------------------------------------------ names of all kinds

GLOBALS = [name for name in vars(se_models) if not name.startswith("__") and name.isidentifier()]


@pytest.mark.parametrize("name", [*GLOBALS, "print", "é", "_", "match", "__mine", "cls", "self", "name", "pretrained"])
def test_a_name_overwrites_nothing(name):
    """Neither the globals of the module of the functions nor anything else; what comes later works as before."""
    before = dict(vars(se_models))
    register_se(name, "test_resnet", r=4)
    assert [name for name, value in vars(se_models).items() if before.get(name) is not value] == []
    assert timm.is_model(name) and name in timm.list_models(module="se_models")
    assert model_entrypoint(name).__name__ == name
    register_se("a_later_one", "test_resnet")
    unregister_se(name)
    assert not timm.is_model(name) and timm.is_model("a_later_one")
    unregister_se("a_later_one")


def test_a_network_under_the_name_of_a_global():
    register_se("register_model", "test_resnet", r=4)
    register_se("sys", "test_resnet", r=2)
    assert [len(find_se(timm.create_model(name))) for name in ("register_model", "sys")] == [4, 4]


@pytest.mark.parametrize("name", [*keyword.kwlist, "__name__", "__all__", "__file__", "__getattr__", "__mine__"])
def test_words_of_python_are_refused(name):
    with pytest.raises(OptionError, match=r"is a word of Python itself.*Give another"):
        register_se(name, "test_resnet")


@pytest.mark.parametrize("name", ["", "two words", "a.b", "a-b", "1st", 3, None, ["x"], b"x"])
def test_what_is_no_identifier_is_refused(name):
    with pytest.raises(OptionError, match="cannot be a model's name"):
        register_se(name, "test_resnet")


@pytest.mark.parametrize("name", [[1], {}, None, 3, "se_resnet18", "resnet18", "nothing"])
def test_what_was_not_registered_is_not_unregistered(name):
    with pytest.raises(OptionError, match=r"was not registered by register_se. Registered are: none"):
        unregister_se(name)
    assert timm.is_model("se_resnet18") and timm.is_model("resnet18")


# ---------------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("name", ["torchvision/fcn_resnet50", "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_base_of_which_no_weights_are_known(name):
    """It is no classifier; a name of it has no configuration, and builds what the generic name does."""
    options = {"existing": "stack"} if "rcnn" in name else {}
    register_se("no_classifier", name, **options)
    assert timm.list_models("no_classifier") == ["no_classifier"]
    model = timm.create_model("no_classifier")
    assert sum(isinstance(module, SqueezeExcite) for module in model.modules()) > 0
    unregister_se("no_classifier")


class _Interrupted(BaseException):
    pass


STEPS = {
    "the base's weights": (tv, "configs_of", "torchvision/resnet18"),
    "weights of timm's": (se_models, "_timm_weights", "resnet18"),
    "timm's description": (se_models, "DefaultCfg", "resnet18"),
    "the function": (se_models, "register", "resnet18"),
    "timm's call": (registry, "register_model", "resnet18"),
    "in timm's call": (timm_registry, "replace", "resnet18"),
}


@pytest.mark.parametrize("error", [RuntimeError("injected"), MemoryError(), KeyboardInterrupt(), _Interrupted()])
@pytest.mark.parametrize(("module", "name", "base"), STEPS.values(), ids=STEPS)
def test_an_exception_leaves_no_half_of_a_name(module, name, base, error, monkeypatch):
    before = tables()
    real, done = getattr(module, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        # At the second call where there are several: something is written by then.
        done.append(name)
        if len(done) == 1 and name == "replace":
            return real(*args, **kwargs)
        raise error

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(BaseException) as raised:
        register_se("half", base)
    monkeypatch.undo()
    assert done and (raised.value is error or isinstance(raised.value, TypeError))
    assert tables() == before and "half" not in se_models._users
    register_se("half", base)
    unregister_se("half")
    assert tables() == before


@pytest.mark.parametrize("at", [1, 40, 100])
def test_a_call_that_is_interrupted_after_timm_wrote(at, monkeypatch):
    """At any of the lines of timm's own function."""
    before, count = tables(), 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code is register_model.__code__ and event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            register_se("half", "resnet50")
    finally:
        sys.settrace(old)
    assert count == at and tables() == before


@pytest.mark.parametrize("options", [{"r": 0}, {"lean": "no"}, {"lean": None}, {"nothing": 1}, {"where": 3}])
def test_options_that_mean_nothing_leave_no_name(options):
    with pytest.raises(SurgeryError):
        register_se("refused", "test_resnet", **options)
    assert not timm.is_model("refused")


def test_options_are_those_of_the_time():
    """What is done to the mapping afterwards is nothing to the name."""
    ratios = {1: 2, 2: 2}
    register_se("kept", "test_resnet", r=ratios)
    ratios.clear()
    assert {site.stage for site in find_se(timm.create_model("kept"))} == {1, 2}


def test_threads_register_and_unregister():
    """Each name is there once, and of those who want the same one all but one are refused."""
    refused: list[str] = []

    def work(number: int) -> None:
        for turn in range(5):
            register_se(f"by_{number}_{turn}", "test_resnet")
            try:
                register_se("wanted_by_all", "test_resnet")
            except OptionError as error:
                refused.append(str(error))
            unregister_se(f"by_{number}_{turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 29 and set(refused) == {"timm has a model 'wanted_by_all' already. Give another name."}
    assert se_models._users == {"wanted_by_all"}


# ------------------------------------------------------------------------------------------------- how SEs run, by name


def leans(model: nn.Module) -> set[bool]:
    return {module.lean for module in model.modules() if isinstance(module, SqueezeExcite)}


NAMED: dict[str, dict[str, Any]] = {
    "se_resnet18": {},
    "se_tv_resnet18": {},
    "se_resnet50_pre": {},
    "se_surgery": {"base": "test_resnet"},
    "se_test_resnet": {"features_only": True},
    "se_hardcorenas_b": {"features_only": True},  # a class of its own behind features_only
    "plainly_or_not": {},
}


@pytest.mark.parametrize("name", NAMED)
def test_ses_run_in_the_plain_form_where_a_name_is_asked_for_it(name):
    if name == "plainly_or_not":
        register_se(name, "test_resnet")
    assert leans(timm.create_model(name, se_lean=False, **NAMED[name])) == {False}
    assert leans(timm.create_model(name, **NAMED[name])) == {True}
    with pytest.raises(OptionError, match="lean='no' is neither True nor False"):
        timm.create_model(name, se_lean="no", **NAMED[name])


def test_a_name_of_ones_own_runs_plainly():
    register_se("plain_one", "test_resnet", lean=False)
    assert leans(timm.create_model("plain_one")) == {False}
    assert leans(timm.create_model("plain_one", se_lean=True)) == {True}


def test_how_ses_run_is_not_saved(tmp_path):
    model = timm.create_model("se_test_resnet", se_lean=False)
    folder = se_surgery.save_pretrained(model, tmp_path / "x")
    assert leans(se_surgery.from_pretrained(folder)) == {True}
    assert leans(timm.create_model(f"local-dir:{folder}", pretrained=True, se_lean=False)) == {False}
