"""Files: a safetensors file is read with suspicion, and a folder is written whole or not at all."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from se_surgery import ArtefactError
from se_surgery.files import tensorfile
from se_surgery.files.replace import check_directory, replace_files
from se_surgery.files.tensorfile import HEADER_LIMIT, read_header, read_tensors, tensors_of, to_bytes

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.half": torch.ones(2, dtype=torch.float16),
    "c": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}


def written(path, data):
    path.write_bytes(data)
    return path


def as_file(header, body=b"", length=None):
    """A safetensors file with any header, text or data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def test_there_and_back(tmp_path):
    path = written(tmp_path / "a", to_bytes(TENSORS, {"format": "pt", "of": "ü"}))
    tensors, metadata = read_tensors(path)
    assert metadata == {"format": "pt", "of": "ü"}
    assert tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor)
    assert safetensors.torch.load(path.read_bytes()).keys() == TENSORS.keys()


def test_equal_models_are_equal_files():
    metadata = {f"{n}": "text" for n in range(8)}
    assert len({to_bytes(TENSORS, metadata) for _ in range(8)}) == 1


def test_a_link_is_followed(tmp_path):
    written(tmp_path / "a", to_bytes(TENSORS, {}))
    (tmp_path / "link").symlink_to("a")
    assert read_tensors(tmp_path / "link")[0].keys() == TENSORS.keys()


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GOOD = as_file({"a": ENTRY}, b"\0" * 4)
# Content, and what is said of it.
BROKEN = {
    "nothing": (b"", "no whole safetensors file: of its 0 bytes"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "no whole safetensors file"),
    "longer than the file": (as_file({}, length=3), "no whole safetensors file: of its 10 bytes 3 would be"),
    "2^63": (as_file({}, length=2**63), "no whole safetensors file"),
    "too long": (as_file(b" " * (HEADER_LIMIT + 1)), "and 5,000,000 are taken at most"),
    "no JSON": (as_file(b"{"), "no readable header"),
    "no text": (as_file(b"\xff\xfe\xff"), "no readable header"),
    "deep": (as_file(b"[" * 100_000), "no readable header"),
    "a long number": (as_file(b'{"a":' + b"9" * 5000 + b"}"), "no readable header"),
    "a list": (as_file([]), "it is no mapping"),
    "twice": (as_file(b'{"a":%(e)s,"a":%(e)s}' % {b"e": json.dumps(ENTRY).encode()}, b"\0" * 4), "stands there twice"),
    "entry no mapping": (as_file({"a": 3}), "'a' has no dtype that is read"),
    "dtype": (as_file({"a": {**ENTRY, "dtype": "F8_E4M3"}}, b"\0" * 4), "'a' has no dtype that is read"),
    "a dtype of another kind": (as_file({"a": {**ENTRY, "dtype": {}}}, b"\0" * 4), "no dtype that is read"),
    "no dtype": (as_file({"a": {}}), "'a' has no dtype that is read"),
    "metadata": (as_file({"__metadata__": {"a": 1}}), "its metadata are no texts"),
    "metadata no mapping": (as_file({"__metadata__": []}), "its metadata are no texts"),
    "cut": (GOOD[:-1], "is damaged"),
    "longer": (GOOD + b"\0", "is damaged"),
    "shape": (as_file({"a": {**ENTRY, "shape": [2]}}, b"\0" * 4), "is damaged"),
    "overflow": (as_file({"a": {**ENTRY, "shape": [2**62, 8]}}, b"\0" * 4), "is damaged"),
    "offsets": (as_file({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"\0" * 4), "is damaged"),
    "a zip": (b"PK\x03\x04" + b"\0" * 50, "is no whole safetensors file|is a zip archive"),
    "a pickle": (pickle.dumps({"a": list(range(100))}, protocol=4), "is a pickle and no safetensors file"),
    "NumPy": (b"\x93NUMPY\1\0" + b"\0" * 50, "is a NumPy file and no safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(case, tmp_path):
    content, message = BROKEN[case]
    with pytest.raises(ArtefactError, match=message) as caught:
        read_tensors(written(tmp_path / "model.safetensors", content))
    assert str(caught.value).endswith(".")


def test_a_torch_file_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for new in (True, False):
        torch.save({"a": Evil()}, tmp_path / "model.safetensors", _use_new_zipfile_serialization=new)
        with pytest.raises(ArtefactError, match="Loading a pickle may run whatever its author wrote"):
            read_tensors(tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in ((".", "is no file"), ("pipe", "is no file"), ("none", "No such file"), ("a\0b", "null byte")):
        with pytest.raises(ArtefactError, match=message):
            read_header(tmp_path / name)


def test_a_header_that_would_not_be_read_is_not_written(monkeypatch):
    monkeypatch.setattr(tensorfile, "HEADER_LIMIT", 100)
    with pytest.raises(ArtefactError, match="and 100 are read at most"):
        to_bytes(TENSORS, {})


def test_tensors_of_any_layout():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    buffer = torch.randn(10)
    model[2].bias = nn.Parameter(buffer[3:5])
    model[2].weight.data = torch.randn(4, 2).t()
    tensors = tensors_of(model)
    back = safetensors.torch.load(to_bytes(tensors, {}))
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())


def shared(model):
    model[1].weight = model[0].weight


def overlapping(model):
    model[1].weight = nn.Parameter(model[0].weight.detach().t())


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def stateful(model):
    model[0] = Stateful(2, 2)


UNFIT = {
    "a shared parameter": (shared, r"'1\.weight' and '0\.weight' share their memory"),
    "shared memory": (overlapping, r"'1\.weight' and '0\.weight' share their memory"),
    "meta": (lambda model: model.to("meta"), r"'0\.weight' is on the meta device"),
    "extra state": (stateful, "is a dict and no tensor"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_models_that_cannot_be_saved(case):
    spoil, message = UNFIT[case]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    spoil(model)
    with pytest.raises(ArtefactError, match=message):
        tensors_of(model)


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_written_in_order(tmp_path, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(os.path.basename(b)), replace(a, b)))
    assert replace_files(tmp_path / "a" / "b", {"z": b"1", "a": b"2"}) == tmp_path / "a" / "b"
    assert replaced == ["z", "a"] and held(tmp_path / "a" / "b") == {"z": b"1", "a": b"2"}


def test_other_files_stay_and_drafts_go(tmp_path):
    for name in ("notes", ".tmpAbCdEf", ".se-surgery-0a1b-model.safetensors"):
        (tmp_path / name).write_text(name)
    replace_files(tmp_path, {"x": b"1"})
    assert sorted(held(tmp_path)) == [".tmpAbCdEf", "notes", "x"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are a POSIX matter")
def test_modes(tmp_path):
    old = os.umask(0o027)
    try:
        written(tmp_path / "kept", b"").chmod(0o604)
        replace_files(tmp_path, {"kept": b"1", "new": b"2"})
    finally:
        os.umask(old)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert modes == {"kept": "0o604", "new": "0o640"}


def test_links_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "cache").mkdir()
    written(tmp_path / "cache" / "blob", b"precious")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").symlink_to("../cache/blob")
    (tmp_path / "model" / "y").symlink_to("nowhere")
    replace_files(tmp_path / "model", {"x": b"1", "y": b"2"})
    assert (tmp_path / "cache" / "blob").read_bytes() == b"precious"
    assert held(tmp_path / "model") == {"x": b"1", "y": b"2"}
    assert not any(path.is_symlink() for path in (tmp_path / "model").iterdir())


# The call that fails, and at which time.
FAILING = [("os.fsync", 2), ("os.fsync", 3), ("os.replace", 1), ("os.open", 3), ("os.open", 4)]


@pytest.mark.parametrize(("call", "time"), FAILING, ids=str)
def test_a_failure_leaves_what_was_there(call, time, tmp_path, monkeypatch):
    written(tmp_path / "x", b"old x")
    written(tmp_path / "y", b"old y")
    right, seen = getattr(os, call.removeprefix("os.")), []

    def failing(*args, **kwargs):
        seen.append(args)
        if len(seen) == time:
            raise OSError("no space left on device")
        return right(*args, **kwargs)

    monkeypatch.setattr(call, failing)
    with pytest.raises(ArtefactError, match=r"cannot be written \(no space left on device\)\. Name"):
        replace_files(tmp_path, {"x": b"new x", "y": b"new y"})
    assert held(tmp_path) == {"x": b"old x", "y": b"old y"}


def test_a_failure_half_way_says_what_is_new(tmp_path, monkeypatch):
    written(tmp_path / "x", b"old x")
    (tmp_path / "y").mkdir()
    with pytest.raises(ArtefactError, match=r"'y' in it is no file"):
        replace_files(tmp_path, {"x": b"new x", "y": b"new y"})
    assert (tmp_path / "x").read_bytes() == b"old x"
    (tmp_path / "y").rmdir()
    replace, left = os.replace, [None]
    monkeypatch.setattr(os, "replace", lambda a, b: left.pop() or replace(a, b))
    with pytest.raises(IndexError):
        replace_files(tmp_path, {"x": b"new x", "y": b"new y"})
    assert held(tmp_path) == {"x": b"new x"}


def test_folders(tmp_path):
    assert check_directory(tmp_path) == tmp_path
    assert check_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / ".se-surgery-left").write_text("")
    assert check_directory(tmp_path) == tmp_path
    (tmp_path / "notes").write_text("")
    with pytest.raises(ArtefactError, match=r"is not empty, 'notes' is in it\. Name another folder, or ask for overw"):
        check_directory(tmp_path)
    assert check_directory(tmp_path, overwrite=True) == tmp_path
    for path in (tmp_path / "notes", tmp_path / "notes" / "a", tmp_path / "a\0b"):
        with pytest.raises(ArtefactError, match=r"is a file\. Name a folder|cannot be written"):
            check_directory(path, overwrite=True)
        with pytest.raises(ArtefactError, match="cannot be written"):
            replace_files(path, {"x": b""})


def test_one_process_writes_at_a_time(tmp_path):
    """A second process waits; it would take the first one's drafts for those of one that was killed."""
    code = (
        "import sys, os, time, types\n"
        # Without the package's __init__, which would import torch.
        "package = sys.modules['se_surgery'] = types.ModuleType('se_surgery')\n"
        "package.__path__ = [sys.argv[2]]\n"
        "import se_surgery.files.replace as r\n"
        "flush = os.fsync\n"
        "def slow(handle): time.sleep(0.05); flush(handle)\n"
        "os.fsync = slow\n"
        "for n in range(5): r.replace_files(sys.argv[1], {'x': sys.argv[3].encode() * 9, 'y': sys.argv[3].encode()})\n"
    )
    root = os.path.dirname(os.path.dirname(tensorfile.__file__))
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), root, name]) for name in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    files = held(tmp_path)
    assert sorted(files) == ["x", "y"] and files["x"] == files["y"] * 9
