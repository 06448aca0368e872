"""Files that somebody damaged, or wrote to do harm: an error of ours, or the same model. Nothing else happens.

Nothing else: no other exception, no file written, no address called, no process started, no gigabytes, not five
seconds.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from patients import assert_same, build, images, run

from se_surgery import SurgeryError, add_se, apply_recipe, from_pretrained, save_pretrained
from se_surgery.files.artefact import digest_of

SECONDS, MEGABYTES = 5.0, 500
STATUS = Path("/proc/self/status")  # Linux only; elsewhere memory is not looked at
NUMBERS = [60, pytest.param(1000, marks=pytest.mark.sweep)]
LOADERS = {
    "from_pretrained": from_pretrained,
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
}


def examples(number):
    """The same examples in every run, and no files of hypothesis' own."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def resident(which):
    """Kilobytes of memory, now (VmRSS, from where the peak is counted again) or at the peak (VmHWM)."""
    if not STATUS.exists():
        return 0
    if which == "VmRSS":
        STATUS.with_name("clear_refs").write_text("5")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1])


class Watch:
    """Notes what Python's audit events tell of writing, deleting, connecting, starting and unpickling."""

    LOUD = frozenset(
        """os.remove os.rename os.mkdir os.rmdir os.chmod os.link os.symlink os.truncate shutil.rmtree socket.connect
        socket.getaddrinfo subprocess.Popen os.system os.exec os.posix_spawn os.fork pickle.find_class""".split()
    )

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if self.on and (writes or event in self.LOUD):
            self.seen.append((event, str(args)[:200]))

    @contextlib.contextmanager
    def quiet(self):
        """What happens in this block is nothing to speak of, or an error of ours."""
        self.seen.clear()
        memory, start = resident("VmRSS"), os.times().user
        self.on = True
        try:
            with contextlib.suppress(SurgeryError):
                yield
        finally:
            self.on = False
        took = os.times().user - start
        grown = (resident("VmHWM") - memory) / 1024
        assert took < SECONDS, f"it took {took:.1f} s"
        assert grown < MEGABYTES, f"it took {grown:.0f} MB more"
        assert not self.seen, self.seen


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, what it puts out, and its files."""
    torch.manual_seed(0)
    model = add_se(build("test_resnet"), init="paper")
    folder = save_pretrained(model, tmp_path_factory.mktemp("fuzz") / "good")
    return run(model, images()), {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def spoil(saved, tmp_path):
    """A folder with the model in it, one of its files replaced."""

    def write(name, content):
        for other, data in saved[1].items():
            # A new file: the old one may be mapped into memory, and to cut it would end the process.
            (tmp_path / other).unlink(missing_ok=True)
            (tmp_path / other).write_bytes(content if other == name else data)
        return tmp_path

    return write


# Values that stand for whole classes of mistakes, and of malice.
_WORDS = """se se2 fc1 . .. a.b layer1.0 layer1.0.se layer9.9.se __class__ layer1.0.__class__ layer1.0._modules
    ../../etc/passwd /etc/passwd ~/.ssh/id_rsa C:\\x file:///etc/passwd http://127.0.0.1:9/x hf-hub:timm/resnet18
    local-dir:/tmp torchvision/resnet18 test_resnet resnet50 resnet50.a1_in1k se_resnet50 se_surgery nosuch
    add strip prune relu nn.ReLU torch.load os.system sigmoid hard_sigmoid standard pre inception F32 I64 F8_E4M3 pt
    checkpoint_path pretrained pretrained_cfg_overlay features_only in_chans num_classes output_stride
    act_layer""".split()
_INTEGERS = [-1, 0, 1, 2, 3, 7, 255, 2**20, 2**31, 2**53, 2**63, 2**64, 10**13, 10**400]
_FLOATS = [0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(_INTEGERS),
    st.sampled_from(_FLOATS),
    st.text(max_size=8),
    st.sampled_from([*_WORDS, "", "\0", "a" * 100_000, "{" * 1000]),
)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


_VALUES = st.one_of(
    _SCALARS,
    st.lists(_SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(_WORDS), _SCALARS, max_size=4),
    st.sampled_from([_deep(50), _deep(900), [0] * 30_000, {str(n): n for n in range(30_000)}]),
)


def places(document):
    """Every container and key in a document."""
    found = []
    if isinstance(document, dict):
        found = [(document, key) for key in document]
    elif isinstance(document, list):
        found = [(document, number) for number in range(len(document))]
    return [*found, *(place for holder, key in found for place in places(holder[key]))]


def nearby(value):
    """Values of the same kind: those that get furthest."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([value + 1, value - 1, 2 * value, -value, 0, 1, 2**20])
    if isinstance(value, float):
        return st.sampled_from([value / 2, -value, 0.0, 1.5])
    if isinstance(value, str):
        names = "tanh relu hard_sigmoid max avg silu gelu pre post inner eca ese paper identity replace stack".split()
        return st.sampled_from([*names, value + "x", value[:-1], value.replace("1", "2"), value.upper()])
    return st.sampled_from([None, 2, 1.5, "relu", [1], ["*"], {"2": 4}, {}])


@st.composite
def mutated(draw, document):
    """A document with one to three changes: a value is replaced, left out, added, doubled or put elsewhere."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        known = places(changed)
        if not known:
            return draw(_VALUES)
        holder, key = known[draw(st.integers(0, len(known) - 1))]
        action = draw(st.sampled_from(["nearby", "nearby", "replace", "leave out", "add", "double", "elsewhere"]))
        if action in ("nearby", "replace"):
            # A copy: the next change may be inside it.
            holder[key] = copy.deepcopy(draw(nearby(holder[key]) if action == "nearby" else _VALUES))
        elif action == "leave out":
            del holder[key]
        elif action == "elsewhere":
            other, name = known[draw(st.integers(0, len(known) - 1))]
            holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key] if action == "double" else draw(_VALUES)))
        else:
            value = holder[key] if action == "double" else draw(_VALUES)
            holder[draw(st.sampled_from(_WORDS))] = copy.deepcopy(value)
    return changed


class File(bytes):
    """A file's content that is shown by its beginning, where a test fails on it."""

    def __repr__(self):
        return f"{self[:3000]!r}... of {len(self)} bytes"


def broken_weights(data):
    """A safetensors file whose header was changed: as text, as JSON, in its length, or by cutting the file."""
    return _broken(File(data)).map(File)


@st.composite
def _broken(draw, data):
    start = 8 + int.from_bytes(data[:8], "little")
    how = draw(st.sampled_from(["bytes", "bytes", "JSON", "JSON", "twice", "length", "cut", "more"]))
    if how == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * start))) + data[8:]
    if how == "cut":
        return data[: draw(st.integers(0, 2 * start) | st.integers(0, len(data) - 1))]
    if how == "more":
        return data + draw(st.binary(min_size=1, max_size=9))
    if how == "bytes":
        text = bytearray(data[:start])
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, len(text) - 1))
            text[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
        return bytes(text) + data[start:]
    header = json.loads(data[8:start])
    text = json.dumps(draw(mutated(header)) if how == "JSON" else header).encode()
    if how == "twice":
        name = draw(st.sampled_from(sorted(header)))
        text = text[:-1] + b"," + json.dumps({name: header[draw(st.sampled_from(sorted(header)))]}).encode()[1:]
    return struct.pack("<Q", len(text)) + text + data[start:]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("how", LOADERS)
def test_headers(how, number, saved, spoil, watch):
    expected, files = saved
    taken = []

    @examples(number)
    @given(broken_weights(files["model.safetensors"]))
    def check(data):
        folder = spoil("model.safetensors", data)
        with watch.quiet():
            model = LOADERS[how](folder)
            taken.append(True)
            assert_same(run(model, images()), expected)

    check()
    print(f"{len(taken)} of {number} were loaded")


@pytest.mark.parametrize("number", NUMBERS)
def test_configurations(number, saved, spoil, watch):
    expected, files = saved
    taken = []

    @examples(number)
    @given(mutated(json.loads(files["config.json"])))
    def check(config):
        folder = spoil("config.json", json.dumps(config).encode())
        with watch.quiet():
            model = from_pretrained(folder)
            taken.append(True)
            assert_same(run(model, images()), expected)

    check()
    print(f"{len(taken)} of {number} were loaded")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("part", ["recipe", "pretrained_cfg"])
def test_recipes_and_descriptions_by_timms_way(part, number, saved, spoil, watch):
    expected, files = saved
    config = json.loads(files["config.json"])
    holder = config["model_args"] if part == "recipe" else config

    @examples(number)
    @given(mutated(holder[part]))
    def check(changed):
        # timm itself reads this part before it calls us, and raises what it raises.
        if part == "pretrained_cfg" and not isinstance(changed, dict):
            return
        before, holder[part] = holder[part], changed
        folder = spoil("config.json", json.dumps(config).encode())
        holder[part] = before
        with watch.quiet():
            assert_same(run(LOADERS["timm"](folder), images()), expected)

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_recipes_whose_digest_is_right(number, saved, spoil, watch):
    """Who writes a recipe can write its digest, too; what comes of it is a model of that recipe, or an error."""
    _, files = saved
    config = json.loads(files["config.json"])
    tensors = safetensors.torch.load(files["model.safetensors"])
    plain = safetensors.torch.save(tensors, {"format": "pt"})
    built = []

    @examples(number)
    @given(mutated(config["model_args"]["recipe"]))
    def check(recipe):
        with contextlib.suppress(TypeError, ValueError):
            digest = digest_of(tensors, json.loads(json.dumps(recipe)))
            arguments = {"recipe": recipe, "digest": {"sha256": digest}}
            folder = spoil("model.safetensors", plain)
            (folder / "config.json").write_text(json.dumps({**config, "model_args": arguments}))
        with watch.quiet():
            built.append(from_pretrained(folder))

    check()
    print(f"{len(built)} of {number} were built")


@pytest.mark.parametrize("number", NUMBERS)
def test_recipes_by_themselves(number, saved, watch):
    recipe = json.loads(saved[1]["config.json"])["model_args"]["recipe"]
    built = []

    @examples(number)
    @given(mutated(recipe))
    def check(changed):
        base = build("test_resnet")
        with watch.quiet():
            built.append(apply_recipe(base, changed))

    check()
    print(f"{len(built)} of {number} were built")


def test_the_watch_sees(watch, tmp_path):
    """What the tests above rely on."""
    for harm in (
        lambda: (tmp_path / "a").write_text(""),
        lambda: os.mkdir(tmp_path / "b"),
        lambda: os.system("true"),
        *([lambda: bytearray(600 * 2**20)] if STATUS.exists() else []),
    ):
        with pytest.raises(AssertionError), watch.quiet():
            harm()
    with pytest.raises(KeyError), watch.quiet():
        raise KeyError
    with watch.quiet():
        raise SurgeryError
