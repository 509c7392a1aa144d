"""Starts several processes of one torch.distributed group on this machine, by forking.

They are forked from a process that has imported what they need, the same one for all tests of a session.
``call`` runs other functions there that fork: ``recipe_server.run_job``, ``pipeline.kill_until_done``.

A test adds a case by a function of its module that every rank runs, and ``launch(2, "test_it.worker")``.
Where a worker has several cases, each stands in ``with case("its name"):``, so that one which fails does
not hide the others. A case must make its collective calls before it asserts: a rank that leaves it
early would keep the others waiting.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
#: ``PYTHONPATH`` of the processes: every folder of tests, and what pytest itself imports from.
_FOLDERS = sorted({str(path.parent) for path in TESTS.rglob("test_*.py")})
IMPORTED_FROM = os.pathsep.join(
    dict.fromkeys([str(TESTS), *_FOLDERS, str(TESTS.parent), *sys.path])
)
#: As it is when this is imported, whatever the test that asks first has set.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
#: Of the calls, so that nobody takes the answer of a test that did not wait for it.
NUMBERS = itertools.count()
#: Names of the cases of this rank that have failed.
failed: list[str] = []


@contextlib.contextmanager
def case(name: str) -> Iterator[None]:
    """A case of a worker: if it fails, the rank fails, but only after its other cases have run."""
    try:
        yield
    except AssertionError:
        print(f"case {name}")
        traceback.print_exc()
        failed.append(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    world: int,
    function: str,
    *args: Any,
    timeout: float = 150,
    env: dict[str, str] | None = None,
    imports: tuple[str, ...] = (),
) -> list[str]:
    """Runs ``function``, "module.name", with ``args`` as ``world`` ranks, after ``imports``.

    Returns:
        What each rank has printed.

    Raises:
        AssertionError: a rank failed, or was not done after ``timeout`` seconds; with what it printed.
    """
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        job = dict(world=world, function=function, args=args, timeout=timeout, env=common)
        statuses = call("processes.run", imports=imports, folder=folder, **job)
        outputs = [(Path(folder) / str(rank)).read_text() for rank in range(world)]
    for status, output in zip(statuses, outputs, strict=True):
        assert status == 0, f"status {status} (negative: killed by that signal)\n{output}"
    return outputs


def call(function: str, /, **arguments: Any) -> Any:
    """What ``function``, "module.name", returns in the process that forks; all of it as JSON.

    Raises:
        AssertionError: with the traceback of what it raised.
    """
    return receive(send(function, **arguments))


def send(function: str, /, **arguments: Any) -> int:
    """The first half of ``call``; the number of the call."""
    server, number = started(), next(NUMBERS)
    assert server.stdin is not None
    server.stdin.write(json.dumps([number, function, arguments]) + "\n")
    server.stdin.flush()
    return number


def receive(number: int) -> Any:
    """The second half of ``call``."""
    stream = started().stdout
    assert stream is not None
    answered = None
    while answered != number:
        answer = stream.readline()
        assert answer, "the process that forks has ended"
        answered, value, error = json.loads(answer)
    assert error is None, error
    return value


@functools.cache
def started() -> subprocess.Popen[str]:
    """The process that runs ``serve``, until this one ends."""
    server = subprocess.Popen(
        [sys.executable, "-c", "import processes; processes.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # With its children a group, which can be killed.
        start_new_session=True,
        cwd=TESTS,
        env={
            **ENVIRONMENT,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": IMPORTED_FROM,
        },
    )
    atexit.register(end, server)
    return server


def end(server: subprocess.Popen[str], seconds: float = 10) -> None:
    """Ends the process that forks, with its children if it does not end soon."""
    try:
        # The end of its input is the end of it; whoever measures this process is told its time as well.
        server.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def serve() -> None:
    """Makes the calls that arrive, one a line of stdin; answers with what each returned or raised."""
    answers = os.fdopen(os.dup(1), "w")
    # What an import prints is no answer.
    os.dup2(2, 1)
    for line in sys.stdin:
        number, function, arguments = json.loads(line)
        try:
            answer = number, named(function)(**arguments), None
        except Exception:
            answer = number, None, traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


def named(function: str) -> Any:
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)


def prepare(*modules: str) -> None:
    """Imports what each child would import for itself: ``modules``, and what a process group needs."""
    for module in ("torch._dynamo", "torch.distributed.tensor", *modules):
        importlib.import_module(module)
    # accelerate imports it in the middle of a training.
    if "accelerate" in sys.modules and importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")
    # A collection in a child would copy every page that it shares with this process.
    gc.freeze()


def run(
    *,
    world: int,
    function: str,
    args: list[Any],
    timeout: float,
    env: dict[str, str],
    imports: list[str],
    folder: str,
) -> list[int]:
    """Runs ``launch``'s ranks; the exit status of each."""
    prepare(*imports, function.rpartition(".")[0])
    worker = named(function)
    children = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                output = os.open(Path(folder) / str(rank), os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1), os.dup2(output, 2)
                os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
                worker(*args)
                status = len(failed)
            except BaseException:
                traceback.print_exc()
            finally:
                # Not by way of the interpreter's end: about once in ten runs (torch 2.13) the last
                # reference to a process group waits there, with the GIL, for a thread of gloo.
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        children[child] = rank
    statuses, end = [0] * world, time.monotonic() + timeout
    while children:
        for child in list(children):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return statuses
