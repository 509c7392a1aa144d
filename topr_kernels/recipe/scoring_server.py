"""The server process of ``scoring``: forks confined workers, hands answers to them, limits their time.

Started by its path, so that it begins without torch and transformers. It does not interpret answers: it
passes them on as bytes, and checks the verdicts of workers, which are JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import math
import os
import pickle
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

#: Why an answer has no verdict.
CAUSES = ("raised", "timed out", "memory", "died", "refused operation")
#: Answers after which a worker is replaced: caches of scorers (sympy's) must not fill its memory.
_ANSWERS_EACH = 500
_LONGEST_VERDICT = 2**26
_LONGEST_DETAIL = 500
_CLONE_NEWNET = 0x40000000
#: Imported before the first fork if the task may need it: importing takes a worker half a second.
_PRELOADED = "math_verify"


def failed(cause: str, detail: str = "") -> dict[str, Any]:
    """The verdict on an answer whose scorer failed."""
    return {"answer": None, "form": None, "reward": -1.0, "problem": cause, "detail": detail}


def harmless(text: str) -> str:
    """The text in one short line, without what could control a terminal."""
    line = " ".join(text[: 2 * _LONGEST_DETAIL].split())[:_LONGEST_DETAIL]
    return "".join(c if c.isprintable() else "?" for c in line)


def write_frame(stream: BinaryIO, content: bytes) -> None:
    """Writes bytes so that ``read_frame`` finds their end."""
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """Reads what ``write_frame`` wrote; None if the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    content = stream.read(size)
    return content if len(content) == size else None


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


class _Worker:
    """A confined process that judges one answer at a time."""

    def __init__(self, task: Any, seconds: float, memory: int) -> None:
        orders, self._orders = os.pipe()
        self.verdicts, verdicts = os.pipe()
        self.item: int | None = None
        self.judged = 0
        self.deadline = math.inf
        self._buffer = b""
        self.pid = os.fork()
        if not self.pid:
            _work(task, orders, verdicts, seconds, memory)
        os.close(orders)
        os.close(verdicts)

    def give(self, item: int, content: bytes, deadline: float) -> None:
        self.item, self.deadline = item, deadline
        # A worker that has died is noticed when its pipe of verdicts ends.
        with contextlib.suppress(BrokenPipeError):
            _write(self._orders, struct.pack("<Q", len(content)) + content)

    def hear(self) -> dict[str, Any] | None:
        """The verdict; None if it is not complete yet, "died" if the worker has ended without one."""
        part = os.read(self.verdicts, 2**16)
        self._buffer += part
        if part and len(self._buffer) < _LONGEST_VERDICT and not self._buffer.endswith(b"\n"):
            return None
        line, self._buffer = self._buffer, b""
        self.judged += 1
        return _checked(line) if part else failed("died")

    def end(self) -> str:
        """Kills the worker, if it is alive; returns the cause if it died by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self._orders)
        os.close(self.verdicts)
        return (
            "timed out"
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
            else "died"
        )


def _checked(line: bytes) -> dict[str, Any]:
    """Parses a worker's verdict; "died" if it is invalid: an executed answer can write there, too."""
    try:
        verdict = json.loads(line)
        texts = all(isinstance(verdict[name], (str, type(None))) for name in ("answer", "form"))
        texts = texts and isinstance(verdict["detail"], str)
        reward = float(verdict["reward"])
        if texts and math.isfinite(reward) and verdict["problem"] in ("", *CAUSES):
            return {
                **{n: verdict[n] for n in ("answer", "form", "problem")},
                "reward": reward,
                "detail": harmless(verdict["detail"]),
            }
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return failed("died")


def _work(task: Any, orders: int, verdicts: int, seconds: float, memory: int) -> NoReturn:
    """Judges the answers that arrive at a worker, until its pipe of orders ends."""
    try:
        from topr_kernels.recipe.confine import confine

        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        low, high = sorted((orders, verdicts))
        for ends in ((3, low), (low + 1, high), (high + 1, 4096)):
            os.closerange(*ends)
        refused: list[str] = []
        confine(memory, refused.append)
        stream = os.fdopen(orders, "rb")
        while (content := read_frame(stream)) is not None:
            refused.clear()
            # Processor time, not clock time: a busy machine must not change a reward.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            verdict = judge(task, *pickle.loads(content))
            signal.setitimer(signal.ITIMER_PROF, 0)
            if refused:
                verdict = failed("refused operation")
            _write(verdicts, json.dumps(verdict).encode() + b"\n")
        os._exit(0)
    finally:
        # Without the cleanup of the server, of which this is a fork.
        os._exit(1)


def judge(task: Any, completion: str, finish_reason: str, question: Any) -> dict[str, Any]:
    """The verdict on one answer."""
    try:
        answer = task.parse(completion, finish_reason, question)
        form = None if answer is None else task.canonical(answer)
        reward = float(task.reward(answer, question))
        if not math.isfinite(reward):
            raise ValueError(f"reward: got {reward}; expected a finite number")
        return {"answer": answer, "form": form, "reward": reward, "problem": "", "detail": ""}
    except MemoryError:
        return failed("memory")
    # An executed answer may raise anything.
    except BaseException as error:
        return failed("raised", _explained(task, error))


def _explained(task: Any, error: BaseException) -> str:
    """What a task says of its scorer's error; "" if it says nothing, or the error cannot be shown."""
    try:
        return harmless(task.explain(error)) if hasattr(task, "explain") else ""
    # The error is of a class of the scorer's, whose text may raise in turn.
    except BaseException:
        return ""


class _Server:
    def __init__(self, requests: BinaryIO, replies: BinaryIO, filtered: bool) -> None:
        self._requests, self._replies = requests, replies
        self._parent = os.getppid()
        self._filtered = filtered
        self._task: Any = None
        self._settings: Any = None
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def run(self) -> None:
        while (content := self._next()) is not None:
            order = pickle.loads(content)
            try:
                self._take(order)
                verdicts = self._batch(order["items"], order["workers"], order["each"])
                reply: dict[str, Any] = {"verdicts": verdicts, "filtered": self._filtered}
            except Exception:
                reply = {"error": traceback.format_exc(limit=-1).strip().splitlines()[-1]}
            write_frame(self._replies, json.dumps(reply).encode())
        self.end()

    def end(self) -> None:
        for worker in self._idle + self._busy:
            worker.end()
        self._idle, self._busy = [], []

    def _next(self) -> bytes | None:
        while not select.select([self._requests], [], [], 1.0)[0]:
            if os.getppid() != self._parent:
                return None
        return read_frame(self._requests)

    def _take(self, order: dict[str, Any]) -> None:
        settings = (order["seconds"], order["memory"])
        if order["task"] is None and settings == self._settings:
            return
        self.end()
        self._settings = settings
        if order["task"] is not None:
            sys.path[:] = order["path"]
            self._task = pickle.loads(order["task"])
            if "topr_kernels.recipe.task_files" in sys.modules and importlib.util.find_spec(
                _PRELOADED
            ):
                importlib.import_module(_PRELOADED)
            prepare = getattr(self._task, "prepare", None)
            if prepare is not None:
                prepare()
            # A collection in a worker would copy every page that it shares with this process.
            gc.freeze()

    def _batch(self, items: list[bytes], workers: int, each: int) -> list[dict[str, Any]]:
        """The verdicts on pickled answers, ``workers`` at a time."""
        verdicts: dict[int, dict[str, Any]] = {}
        seconds, memory = self._settings
        given = 0
        while len(verdicts) < len(items):
            while given < len(items) and len(self._busy) < workers:
                worker = self._idle.pop() if self._idle else _Worker(self._task, seconds, memory)
                self._busy.append(worker)
                # An answer that sleeps uses no processor time, so the clock limits it too.
                worker.give(given, items[given], time.monotonic() + 4 * seconds)
                given += 1
            streams: list[Any] = [self._requests, *(worker.verdicts for worker in self._busy)]
            ready = select.select(streams, [], [], 0.2)[0]
            if self._requests in ready or os.getppid() != self._parent:
                # The parent sends nothing during a batch: it has ended.
                self.end()
                os._exit(1)
            for worker in list(self._busy):
                verdict = worker.hear() if worker.verdicts in ready else None
                if verdict is None and time.monotonic() > worker.deadline:
                    verdict = failed("timed out")
                if verdict is None:
                    continue
                self._busy.remove(worker)
                if verdict["problem"] or worker.judged >= (each or _ANSWERS_EACH):
                    cause = worker.end()
                    if verdict["problem"] == "died":
                        verdict = failed(cause)
                else:
                    self._idle.append(worker)
                assert worker.item is not None
                verdicts[worker.item] = verdict
        return [verdicts[i] for i in range(len(items))]


class _Light(types.ModuleType):
    """A package whose ``__init__``, which imports torch, runs only when one of its names is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _lighten() -> None:
    recipe = Path(__file__).resolve().parent
    for name, folder in (("topr_kernels", recipe.parent), ("topr_kernels.recipe", recipe)):
        light = _Light(name)
        light.__path__ = [str(folder)]
        sys.modules[name] = light


def main() -> None:
    """Serves the parent, by standard input and output, until it is gone."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _lighten()
    from topr_kernels.recipe.confine import filters, hide

    sys.path[:] = json.loads(sys.argv[1])
    if sys.platform == "linux":
        # A network name space of its own, where that is allowed, is one without a network.
        ctypes.CDLL(None).unshare(_CLONE_NEWNET)
    hide()
    folder = tempfile.mkdtemp(prefix="topr-scoring-")
    os.chdir(folder)
    try:
        _Server(requests, replies, filters()).run()
    finally:
        os.rmdir(folder)


if __name__ == "__main__":
    main()
