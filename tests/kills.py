"""Kill a save over an existing model, again and again, and look at what is left: a script, because it forks.

    python tests/kills.py FOLDER KILLS SEED

Three models take turns. A child saves another one over what is there and is killed with -9: at a random moment, or
right before one of the calls that write (`os.open`, `os.fsync`, `os.replace`), each of them once. Then whatever is in
the folder is loaded, in two ways. Printed is JSON: how often which of the outcomes came about. Anything else is an
AssertionError.

- old, new: that model loads, and computes what it should.
- mixed: both ways refuse, and what the message says brings the new model back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import timm
import torch
from patients import build, images, run

from se_surgery import SurgeryError, add_se, from_pretrained, save_pretrained

CALLS = ("open", "fsync", "replace")
NAMES = {"README.md", "config.json", "model.safetensors"}


def models():
    torch.manual_seed(0)
    first = add_se(build("test_resnet"), init="paper")
    second = add_se(build("test_resnet"), "pre", r=8, init="paper", stages=[1, 2])
    # Equal keys and shapes, other values: only a digest tells them apart.
    third = build("test_resnet")
    torch.manual_seed(1)
    add_se(third, init="paper")
    return [first, second, third]


def die_at(call, number):
    """Let this process be killed right before one of its calls that write."""
    right, seen = getattr(os, call), []

    def counting(*args, **kwargs):
        seen.append(args)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args, **kwargs)

    setattr(os, call, counting)


def killed(model, folder, moment):
    """Save in a child that is killed at a moment; whether it was, or had finished."""
    child = os.fork()
    if child == 0:
        if isinstance(moment, tuple):
            die_at(*moment)
        save_pretrained(model, folder, overwrite=True)
        os._exit(0)
    if not isinstance(moment, tuple):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def loaded(load, folder):
    try:
        return run(load(folder).eval(), images())
    except SurgeryError as error:
        return str(error)


def same(found, expected):
    return not isinstance(found, str) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def judged(folder, old, new):
    """What is in the folder; whatever is neither a model nor an error with a way back ends the script."""
    ours = loaded(from_pretrained, folder)
    timms = loaded(lambda path: timm.create_model(f"local-dir:{path}", pretrained=True), folder)
    for name, expected in (("old", old), ("new", new)):
        if same(ours, expected):
            assert same(timms, expected), f"{name} by one way and by the other {timms}"
            return name
    for message in (ours, timms):
        assert isinstance(message, str), "a model that is neither the old nor the new one"
        assert "were not saved together" in message and "remove config.json" in message, message
    (folder / "config.json").unlink()
    assert same(loaded(from_pretrained, folder), new), "the weights did not bring the new model back"
    return "mixed"


def main(folder, kills, seed):
    torch.set_num_threads(1)
    rng = random.Random(seed)
    patients = models()
    expected = [run(model, images()) for model in patients]
    assert not any(same(expected[i], expected[j]) for i in range(3) for j in range(i))
    start = time.perf_counter()
    save_pretrained(patients[0], folder)
    duration = time.perf_counter() - start
    moments = [(call, number) for call in CALLS for number in range(1, 12)]
    outcomes, done, current, beyond = Counter(), 0, 0, set()
    while done < kills or moments:
        moment = moments.pop(0) if moments else rng.uniform(0.3, 1.1) * duration
        if isinstance(moment, tuple) and moment[0] in beyond:
            continue
        following = (current + rng.choice([1, 2])) % len(patients)
        if not killed(patients[following], folder, moment):
            if isinstance(moment, tuple):
                beyond.add(moment[0])  # there are no more calls of this kind
            current = following
            continue
        done += 1
        outcome = judged(folder, expected[current], expected[following])
        outcomes[f"{moment[0]}: {outcome}" if isinstance(moment, tuple) else outcome] += 1
        if outcome != "old":
            save_pretrained(patients[following], folder, overwrite=True)
            current = following
    save_pretrained(patients[current], folder, overwrite=True)
    left = set(os.listdir(folder)) - NAMES
    print(json.dumps({"kills": done, "outcomes": outcomes, "left": sorted(left)}))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    main(target, int(sys.argv[2]), int(sys.argv[3]))
