"""Trying: what comes of one network, by its plan and by values.

In: a name. Out: the body of its row. The plan is held against the count by hand; then the network is operated on, each
SE's place is told by its gate at one half, and everything is undone.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from se_surgery import Plan, SqueezeExcite, SurgeryError, add_se, plan_se, strip_se
from se_surgery.planning.planner import make_plan
from se_surgery.proving.promises import randomise, trials

from ..coverage.planning import silent_units
from ..coverage.pool import Answer, Task
from ..coverage.running import PASS, Finding, keys_of, modules_of
from . import zoo
from .counts import count_of
from .rows import Row, stamp

# What `verify` tries that the table asks for: outputs with gates at one, calls, places and a copy by pickle.
CHECKS = ("keys", "forward, evaluation", "where", "pickle")
REFUSED = "refused"


def work(task: Task) -> Iterator[dict[str, Any]]:
    """Answer one task: the body of its row, with the seconds it took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    body = body_of(zoo.networks()[task.name])
    yield {**body, "seconds": round(time.process_time() - start, 1), **stamp(zoo.networks()[task.name])}


def row_of(answer: Answer) -> Row:
    """An answer as a row of the file."""
    name = answer.task.name
    count = count_of(name)
    row: Row = {"name": name, "free": count.free, "all": count.all, "arithmetic": count.arithmetic}
    nothing = {"status": f"fail: {answer.trouble}", **stamp(zoo.networks()[name])}
    return {**row, **(answer.body if answer.body is not None else nothing)}


def body_of(network: zoo.Network) -> dict[str, Any]:
    """What comes of one network."""
    body: dict[str, Any] = {"checks": []}
    try:
        for check, fault in _findings(network, body):
            if fault:
                return {**body, "status": f"fail: {check}: {fault}"}
            body["checks"].append(check)
    except Exception as error:  # whatever goes wrong is what the row is for
        done = body["checks"][-1] if body["checks"] else "the start"
        return {**body, "status": f"fail: after {done}: {type(error).__name__}: {error}"}
    return {**body, "status": PASS}


def _findings(network: zoo.Network, body: dict[str, Any]) -> Iterator[Finding]:
    """Plan, operate, check, undo. The order matters: what comes first is what the rest builds on."""
    torch.manual_seed(0)
    model, count = network.build(), count_of(network.name)
    randomise(model)
    plan = plan_se(model, existing="skip", example_input=network.input)
    stacked = make_plan(plan.exam, replace(plan.options, existing="stack"))
    body.update(_told(plan, stacked))
    yield "sites", _miscounted(len(plan.sites), count.free)
    yield "stacked", _miscounted(len(stacked.sites), count.all)
    yield "silent", ", ".join(silent_units(stacked))
    existing = "skip" if count.free else "stack"
    options: dict[str, Any] = {"existing": existing, "example_input": network.input}
    if not count.all:
        yield REFUSED, _not_refused(model, options)
        return
    body["existing"] = existing
    yield from _operated(model, options, body)


def _told(plan: Plan, stacked: Plan) -> dict[str, Any]:
    """What a plan says: its sites, its census, and what is left out, by reason."""
    return {
        "sites": len(plan.sites),
        "stacked": len(stacked.sites),
        "kinds": dict(Counter(site.kind for site in stacked.sites)),
        "census": str(plan.exam.units.census),
        "left_out": dict(Counter(skip.reason for skip in stacked.skipped)),
    }


def _miscounted(found: int, expected: int) -> str:
    return "" if found == expected else f"{found} of the plan, {expected} by hand"


def _not_refused(model: nn.Module, options: dict[str, Any]) -> str:
    """What is wrong where a network without units is operated on and no error says so."""
    try:
        add_se(model, **options)
    except SurgeryError:
        return ""
    return "a network without convolutional units was operated on"


def _operated(model: nn.Module, options: dict[str, Any], body: dict[str, Any]) -> Iterator[Finding]:
    args = options["example_input"]
    keys, modules = keys_of(model), modules_of(model)
    add_se(model, **options)
    paths = [path for path, module in model.named_modules() if isinstance(module, SqueezeExcite)]
    body["operated"] = len(paths)
    yield "operated", _miscounted(len(paths), body["sites" if options["existing"] == "skip" else "stacked"])
    for trial in trials(model, args, thorough=False):
        if trial.name in CHECKS:
            check = trial.run()
            yield trial.name, "" if check.passed is not False else check.detail
            body.setdefault("seen", {})[trial.name] = check.detail
    copy = pickle.loads(pickle.dumps(model))
    yield "classes", "" if modules_of(copy) == modules_of(model) else "classes or attributes are lost in a copy"
    strip_se(model, origin="se_surgery", example_input=args)
    back = list(keys_of(model).items()) == list(keys.items()) and modules_of(model) == modules
    yield "strip", "" if back else "the keys, values, classes or attributes are not the base's"
