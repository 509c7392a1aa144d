"""Judges answers in worker processes: an answer can hang its scorer, or be executed by it.

``verdicts`` starts a server process (``scoring_server``), which forks workers. They give up what judging
does not need (``confine``), have a limit of processor time and of memory for each answer, and are
replaced when they are over it. An answer whose scorer fails is rewarded -1 and counted by cause.

This is defence in depth, not a jail. An answer that is read as data can at worst waste its limits. One
that is executed (``Task.trusted``) can read what this user may read, and can give itself any reward; it
has a worker to itself, so that it changes no other. On Linux the kernel keeps it from writing files,
from the network and from other processes; elsewhere only Python's audit hook, which hostile code passes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from topr_kernels.recipe import scoring_server
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.scoring_server import CAUSES, read_frame, write_frame
from topr_kernels.recipe.tasks import Judge, Question

__all__ = ["CAUSES", "ScoringError", "Verdict", "count_problems", "first_detail", "verdicts"]

#: Seconds of processor time for one answer; it may take four times as long on the clock.
SECONDS = 5.0
#: Bytes that a worker may take for an answer.
MEMORY = 2**30
_MOST_WORKERS = 4
#: Environment variables that the server gets: none that hold keys or tokens.
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR")


class ScoringError(SettingsError):
    """Answers cannot be judged in worker processes."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on an answer.

    Args:
        answer: what ``parse`` found; None if nothing, or if ``problem`` says why there is no verdict.
        form: its ``canonical`` form.
        reward: -1 where there is a problem.
        problem: one of ``CAUSES``; "" for none.
        unfiltered: whether it comes from a worker whose system calls the kernel does not filter: where
            there is no seccomp, or the container refuses it.
        detail: for a problem of a custom reward, what it raised and where; one line of capped length.
    """

    answer: str | None
    form: str | None
    reward: float
    problem: str = ""
    unfiltered: bool = False
    detail: str = ""


def verdicts(
    task: Judge,
    answers: Iterable[tuple[str, str, Question]],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> list[Verdict]:
    """Judges a batch of answers, several at a time.

    Task and questions are pickled for the workers. A task with ``in_process = True`` is asked here,
    without any limit, and what it raises is raised: for one that cannot be pickled, or whose judging
    cannot go wrong.

    Args:
        task: parses and rewards.
        answers: completion, finish reason and question of each.
        seconds: of the processor for one answer; it may take four times as many of the clock.
        memory: bytes for one answer, on top of what the worker has.

    Returns:
        One verdict for each answer, in order.

    Raises:
        ScoringError: if the workers cannot have the task, or this system has no ``os.fork``.
    """
    answers = list(answers)
    if getattr(task, "in_process", False):
        return [_here(task, *answer) for answer in answers]
    if not answers:
        return []
    reply = _server().judge(task, answers, seconds, memory)
    if not reply["filtered"]:
        _warn_unfiltered()
    return [Verdict(**verdict, unfiltered=not reply["filtered"]) for verdict in reply["verdicts"]]


def count_problems(judged: Sequence[Verdict]) -> Counter[str]:
    """How many answers have no verdict, by cause."""
    return Counter(verdict.problem for verdict in judged if verdict.problem)


def first_detail(judged: Sequence[Verdict]) -> str:
    """What the first custom reward that failed says of it; "" if none does."""
    return next((verdict.detail for verdict in judged if verdict.detail), "")


@functools.cache
def _warn_unfiltered() -> None:
    """Says once that only Python's audit hook and the limits stand between answers and this machine."""
    warnings.warn(
        "scoring: this system does not filter the system calls of a process (seccomp on Linux), so the "
        "kernel refuses workers that judge answers neither writing nor the network; only Python's audit "
        "hook does. Run a scorer that executes answers in a container without a network and secrets",
        stacklevel=4,
    )


def _here(task: Judge, completion: str, finish_reason: str, question: Question) -> Verdict:
    answer = task.parse(completion, finish_reason, question)
    form = None if answer is None else task.canonical(answer)
    return Verdict(answer, form, task.reward(answer, question))


class _ServerProcess:
    """The server process, started at the first batch and kept: it ends with this process."""

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise ScoringError(
                "scoring: answers are judged in forked processes, which this system does not have; use "
                "Linux, macOS or WSL, or a task of your own with in_process = True"
            )
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._task: bytes | None = None
        # "" stands for the working folder, which the server leaves for an empty one.
        path = [os.path.abspath(p) for p in sys.path]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            # -I: what is imported comes from this process's path alone.
            [sys.executable, "-I", scoring_server.__file__, json.dumps(path)],
            # Limits of threads: workers could not start any, and each judges one answer.
            env={**environment, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for this process, which ends the server.
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def judge(
        self, task: Judge, answers: list[tuple[str, str, Question]], seconds: float, memory: int
    ) -> dict[str, Any]:
        """The server's reply: the "verdicts", and whether the kernel has "filtered" the workers."""
        with self._lock:
            try:
                pickled = pickle.dumps(task)
                order = {
                    "task": None if pickled == self._task else pickled,
                    "path": [os.path.abspath(p) for p in sys.path],
                    "items": [pickle.dumps(answer) for answer in answers],
                    "seconds": seconds,
                    "memory": memory,
                    "workers": min(_MOST_WORKERS, _processors()),
                    "each": int(getattr(task, "one_worker_each", False)),
                }
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise _not_had(task, error) from error
            try:
                write_frame(cast(Any, self._process.stdin), pickle.dumps(order))
                content = read_frame(cast(Any, self._process.stdout))
            except BaseException as error:
                # Half a batch is in the pipes: an interrupted server cannot go on.
                self.stop()
                if not isinstance(error, BrokenPipeError):
                    raise
                content = None
            if content is None:
                self.stop()
                raise ScoringError(
                    "scoring: the server of the workers ended; its own message tells why. The same "
                    "command continues"
                )
            reply = json.loads(content)
            if "error" in reply:
                self._task = None
                raise _not_had(task, reply["error"])
            self._task = pickled
            return cast(dict[str, Any], reply)

    def stop(self) -> None:
        if self.owner != os.getpid():
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _not_had(task: Judge, error: object) -> ScoringError:
    return ScoringError(
        f"task: workers cannot have {type(task).__name__} or its questions ({error}); expected a class "
        "of a module that they can import, of picklable parts; or give it in_process = True, which "
        "judges answers in this process, without limits"
    )


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_running: _ServerProcess | None = None


def _server() -> _ServerProcess:
    global _running
    if _running is None or not _running.alive:
        _running = _ServerProcess()
    return _running


@atexit.register
def _stop() -> None:
    if _running is not None:
        _running.stop()
