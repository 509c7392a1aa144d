"""Judges models in processes of their own, so that a crash or a hang of one ends nothing but itself."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers

from every_model.building import Entry, build
from every_model.further import further_of
from every_model.judge import PATHS, judge

#: The model could not be built.
NOT_BUILT = "not built"
_MEMORY = 12 << 30


def judged(entry: Entry, paths: Sequence[str] = PATHS) -> dict[str, Any]:
    """Verdict by path, or why there is none."""
    try:
        model = build(entry)
    except Exception as error:
        return {NOT_BUILT: f"{type(error).__name__}: {error}"[:300]}
    return judge(model, further_of(model), paths)


def quiet() -> None:
    """One thread, and no warnings: of tiny random models there are hundreds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def sweep(
    entries: Sequence[Entry], jobs: int, seconds: float
) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """The verdicts on models, as they come.

    Args:
        entries: the models.
        jobs: processes at a time.
        seconds: of wall-clock time for each model.
    """
    # A fork has everything imported.
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(entries))
    running: dict[Connection, tuple[Entry, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            entry = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(entry, theirs))
            process.start()
            theirs.close()
            running[ours] = entry, process, time.monotonic() + seconds
        ready = wait(list(running), timeout=1.0)
        for pipe, (entry, process, deadline) in list(running.items()):
            if pipe not in ready and time.monotonic() < deadline:
                continue
            yield entry, _result(pipe, process, pipe in ready, seconds)
            del running[pipe]


def _result(pipe: Connection, process: Any, ready: bool, seconds: float) -> dict[str, Any]:
    try:
        result: dict[str, Any] = (
            pipe.recv() if ready else {"crashed": f"no verdict in {seconds:g} s"}
        )
    except EOFError:
        process.join()
        result = {"crashed": f"its process ended with {process.exitcode}"}
    process.kill()
    process.join()
    pipe.close()
    return result


def _child(entry: Entry, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    quiet()
    try:
        pipe.send(judged(entry))
    except Exception as error:
        pipe.send({"crashed": f"{type(error).__name__}: {error}"[:300]})
