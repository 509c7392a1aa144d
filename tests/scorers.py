"""Tasks whose scorers do what they should not; workers import this file, so it imports little."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from topr_kernels.recipe.tasks import Question


@dataclass(frozen=True)
class Executes:
    """An answer is executed, and is right if that gives True; the answer is what it gave."""

    one_line: ClassVar[bool] = True

    one_worker_each: bool = False

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        if completion == "hang":
            while True:
                pass
        if completion == "sleep":
            time.sleep(600)
        if completion == "fall":
            os._exit(3)
        if completion == "swallow":
            try:
                os.open("written", os.O_CREAT)
            except OSError:
                return "True"
        return str(eval(completion))

    def canonical(self, answer: str) -> str:
        return answer

    def reward(self, answer: str | None, question: Question) -> float:
        return 1.0 if answer == "True" else float("nan") if answer == "nan" else -1.0


class InProcess(Executes):
    """The same, asked where it is."""

    in_process = True


def count_a(question: str, completion: str, entry: object) -> float | None:
    """A reward: how many a's; "-" is no answer, and "boom" more than it bears."""
    if completion == "boom":
        raise ValueError(question)
    return None if completion == "-" else float(completion.count("a"))


class Unshown(Exception):
    """An error that has no text."""

    def __str__(self) -> str:
        raise self


def errs(question: str, completion: str, entry: dict[str, Any]) -> Any:
    """A reward that goes wrong in ways that are told."""
    if completion == "unshown":
        raise Unshown
    if completion == "long":
        raise RuntimeError("\x1b[2J\u202e\ud800\r\n" + "x" * 10_000)
    if completion == "library":
        return json.loads("{")
    if completion == "forged":
        lines = {"answer": None, "form": None, "reward": -1.0, "problem": "raised"}
        for number in range(3, 50):
            try:
                os.write(number, json.dumps({**lines, "detail": "\x1b[2J" * 5000}).encode() + b"\n")
            except OSError:
                continue
        os._exit(0)
    return entry["answr"]


def gives(question: str, completion: str, entry: object) -> Any:
    """A reward that gives what is no number, or does what it should not."""
    if completion == "exit":
        sys.exit(0)
    if completion == "fork":
        return float(os.fork())
    if completion == "print":
        print("noise" * 10_000, flush=True)
        os.write(1, b'{"answer": "1"}\n')
    values = {"text": "right", "list": [1], "huge": 10**400, "nan": float("nan"), "none": None}
    return values.get(completion, 1.0)


def spied() -> tuple[int, list[str]]:
    """For answers: how many other workers there are, and what of them and the server can be opened."""
    server = os.getppid()
    deadline = time.monotonic() + 10
    others: list[int] = []
    while not others and time.monotonic() < deadline:
        with open(f"/proc/{server}/task/{server}/children") as file:
            others = [int(pid) for pid in file.read().split() if int(pid) != os.getpid()]
    files = ("mem", "environ", "maps", *(f"fd/{number}" for number in range(20)))
    paths = [f"/proc/{pid}/{name}" for pid in (*others, server) for name in files]
    return len(others), [path for path in paths if _opens(path)]


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def by_length(question: str, completion: str, entry: object) -> float:
    """A reward: about half of whatever a model says is right."""
    return 1.0 if len(completion) % 2 else -1.0


def pid() -> int:
    """For answers: which worker executes them."""
    return os.getpid()


def deaf() -> str:
    """For answers: does not hear that its time is over."""
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    while True:
        pass
