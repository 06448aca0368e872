"""Pool: tasks in processes of their own, each with a time for every answer, and with memory that goes back.

In: tasks and a function that answers one. Out: an `Answer` for every part of every task, whatever becomes of the
process: one that takes too long or dies is an answer too, and the parts of its task behind that one are begun anew.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")
# Gigabytes that a process may have grown to before another takes its place.
_GROWN = 1.5
# Seconds to wait for anything to happen.
_TICK = 0.5
# Seconds for an idle process to leave.
_LEAVE = 5.0
# What a fresh process says before its first task: importing torch is not the task's time.
_READY = "ready"


@dataclass(frozen=True)
class Task:
    """Something to do, in parts that are answered one by one and in order.

    Attributes:
        kind: What to do.
        name: The model to do it with.
        parts: What each answer is about.
        gigabytes: Memory it may take.
    """

    kind: str
    name: str
    parts: tuple[Any, ...]
    gigabytes: float = 0.5


@dataclass(frozen=True)
class Answer:
    """What came of one part of a task.

    Attributes:
        task: The task.
        part: The part.
        body: What the function said; None where it said nothing.
        trouble: Why it said nothing: `timeout`, `crashed`, or the exception.
    """

    task: Task
    part: Any
    body: dict[str, Any] | None
    trouble: str = ""


Work = Callable[[Task], Iterator[dict[str, Any]]]


@dataclass
class _Worker:
    """One process, and what it is at."""

    process: SpawnProcess
    pipe: Connection
    task: Task | None = None
    answered: int = 0
    since: float = field(default_factory=time.monotonic)
    ready: bool = False

    def give(self, task: Task) -> None:
        self.task, self.answered = task, 0
        with contextlib.suppress(OSError):  # a process that has died meanwhile is found out by listening to it
            self.pipe.send(task)
        self.since = time.monotonic()

    def end(self) -> None:
        """End the process: an idle one may clean up behind itself, one that is at something may not."""
        self.pipe.close()
        if self.task is None:
            self.process.join(_LEAVE)
        self.process.kill()
        self.process.join()


class Pool:
    """Runs tasks; use it once, as a context, so that no process outlives it.

    Args:
        work: Answers a task, one body a part. Importable by name, for it runs in other processes.
        jobs: Number of processes; with 0 everything runs in this one, without limits.
        timeout: Seconds for one answer.
        memory: Gigabytes for all tasks at one time; one that wants more runs alone.
    """

    def __init__(self, work: Work, jobs: int = 2, timeout: float = 900.0, memory: float = 8.0) -> None:
        self._work, self._jobs, self._timeout, self._memory = work, jobs, timeout, memory
        self._workers: list[_Worker] = []
        self._queue: list[Task] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    @property
    def running(self) -> list[str]:
        """The names of the models that are at work now."""
        return [worker.task.name for worker in self._workers if worker.task is not None]

    def answers(self, tasks: Sequence[Task]) -> Iterator[Answer | None]:
        """The answers as they come, and None from time to time while none comes."""
        if not self._jobs:
            yield from self._here(tasks)
            return
        self._queue = list(tasks)
        while self._queue or self.running:
            self._hand_out()
            ready = wait([worker.pipe for worker in self._workers], min(_TICK, self._timeout))
            found = [answer for worker in list(self._workers) for answer in self._heard(worker, worker.pipe in ready)]
            yield from found
            if not found:
                yield None

    def _here(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        for task in tasks:
            bodies = self._work(task)
            for number, part in enumerate(task.parts, 1):
                try:
                    body = next(bodies)
                except Exception as error:
                    yield Answer(task, part, None, _said(error))
                    yield from self._here([replace(task, parts=task.parts[number:])])
                    break
                yield Answer(task, part, body)

    def _hand_out(self) -> None:
        """Give idle processes the next tasks that fit into memory, and start processes as long as there is work."""
        idle = [worker for worker in self._workers if worker.task is None]
        while len(self._workers) < min(self._jobs, len(self._queue) + len(self.running)):
            idle.append(self._start())
        for worker in idle:
            taken = sum(other.task.gigabytes for other in self._workers if other.task is not None)
            fitting = (task for task in self._queue if not taken or taken + task.gigabytes <= self._memory)
            task = next(fitting, None)
            if task is not None:
                self._queue.remove(task)
                worker.give(task)

    def _start(self) -> _Worker:
        pipe, other = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(other, self._work), daemon=True)
        process.start()
        other.close()
        self._workers.append(_Worker(process, pipe))
        return self._workers[-1]

    def _heard(self, worker: _Worker, is_ready: bool) -> Iterator[Answer]:
        """What one process has to say, or what has become of it."""
        try:
            message: tuple[str, Any] = worker.pipe.recv() if is_ready else ("", None)
        except (EOFError, ConnectionResetError):
            message = "trouble", f"crashed (exit code {_exit_code(worker.process)})"
        kind, value = message
        if not kind and worker.ready and worker.task is not None and time.monotonic() - worker.since > self._timeout:
            kind, value = "trouble", f"timeout ({self._timeout:g} s)"
        if kind == _READY:
            worker.ready = True
        elif kind == "body":
            yield self._answer(worker, value)
        elif kind == "done":
            worker.task = None
            if value > _GROWN:
                self._retire(worker)
        elif kind == "trouble":
            yield from self._buried(worker, value)
        if kind:
            worker.since = time.monotonic()

    def _answer(self, worker: _Worker, body: dict[str, Any] | None, trouble: str = "") -> Answer:
        assert worker.task is not None
        worker.answered += 1
        return Answer(worker.task, worker.task.parts[worker.answered - 1], body, trouble)

    def _buried(self, worker: _Worker, trouble: str) -> Iterator[Answer]:
        """End a process that is no good any more; the parts behind the one it was at become another task."""
        task = worker.task
        if task is not None and worker.answered < len(task.parts):
            yield self._answer(worker, None, trouble)
            rest = task.parts[worker.answered :]
            if rest:
                self._queue.insert(0, replace(task, parts=rest))
        self._retire(worker)

    def _retire(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)


def _exit_code(process: SpawnProcess) -> int | None:
    process.join(5)
    return process.exitcode


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _serve(pipe: Connection, work: Work) -> None:
    """The life of a process: take tasks, answer their parts, say what it has grown to. An interrupt is its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send((_READY, None))
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            for _, body in zip(task.parts, work(task), strict=True):
                pipe.send(("body", body))
        except Exception as error:
            pipe.send(("trouble", _said(error)))
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(("done", peak / 1e6))
