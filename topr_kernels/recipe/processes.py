"""One command in several processes (torchrun, accelerate launch): sharing its work, and failures.

Batches and parts depend on the settings alone and are stored in files, so it does not matter which
process computes one. The first process locks the folder, writes the settings, merges the parts and
writes the outputs. All processes share one file system.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

#: How long a process waits for another one that does not answer; one that ended is noticed at once.
PATIENCE = timedelta(hours=1)
_REMEDY = "Mend that, and the same command continues, with any number of processes"


class ProcessError(RuntimeError):
    """Another process of the command failed or does not answer, or the environment is invalid."""


class Processes:
    """The processes of a command. This class serves a command with one process.

    Args:
        rank: of this process; the first is 0.
        count: number of processes.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    def first(self, work: Callable[[], T]) -> T:
        """Has the first process do the work; all get its result, which must be picklable.

        Raises:
            ProcessError: in the others, if it fails; in all, if one of them does not call this.
        """
        return work()

    def share(self, work: Callable[[], object], *, lockstep: bool = False) -> None:
        """Has all processes do the work, and wait for each other.

        Args:
            work: takes its share by ``take``.
            lockstep: the work itself waits for the others, as training does. A process that fails in it
                sends no message, since the others could not receive it; they notice that it ended.

        Raises:
            ProcessError: in the others, if one fails.
        """
        work()

    def take(self, count: int) -> Iterator[int]:
        """Numbers from 0 to ``count - 1``; each goes to the first process that asks for it.

        Raises:
            ProcessError: as soon as another process has failed.
        """
        return iter(range(count))


class _Joined(Processes):
    def __init__(self, timeout: timedelta) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        self._timeout = timeout
        self._store: Any = dist.distributed_c10d._get_default_store()
        # A group of its own: messages here must not mix with those of a training.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._takes = self._shares = 0
        # No process may leave while another one still connects.
        self._all_hear(None, None)

    def first(self, work: Callable[[], T]) -> T:
        value: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = work()
            except Exception as raised:
                error = raised
        return self._all_hear(value, error)[0]  # type: ignore[no-any-return]

    def share(self, work: Callable[[], object], *, lockstep: bool = False) -> None:
        error: Exception | None = None
        self._shares += 1
        try:
            work()
        except BaseException as raised:
            known = self._failure()
            # If another process has failed, an error of this training's connections is a consequence.
            if lockstep and known and isinstance(raised, RuntimeError):
                raise ProcessError(known) from raised
            if not known:
                self._note(raised)
            if lockstep or not isinstance(raised, Exception):
                raise
            error = raised
        self._all_hear(None, error)

    def take(self, count: int) -> Iterator[int]:
        self._takes += 1
        # A free process takes the next number: answers differ in length, and machines in speed.
        key = f"topr/taken-{self._takes}"
        while True:
            if known := self._failure():
                raise ProcessError(known)
            try:
                i = int(self._store.add(key, 1)) - 1
            except RuntimeError as error:
                self._lost(error)
            if i >= count:
                return
            yield i

    def _all_hear(self, value: Any, error: Exception | None) -> list[Any]:
        """The values of all processes, by rank; raises ``error``, or reports another process's error."""
        said = None if error is None else self._message(error)
        heard: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(heard, (value, said), group=self._group)
        except RuntimeError as raised:
            if error is not None:
                raise error from None
            self._lost(raised)
        if error is not None:
            raise error
        for _, problem in heard:
            if problem is not None:
                raise ProcessError(problem)
        return [result for result, _ in heard]

    def _message(self, error: BaseException) -> str:
        if isinstance(error, ProcessError):
            return str(error)
        what = str(error) or type(error).__name__
        return f"process {self.rank} of {self.count} failed: {what}\n{_REMEDY}"

    @property
    def _failed_key(self) -> str:
        # Of the current shared work alone: after a failure the next one starts without.
        return f"topr/failed-{self._shares}"

    def _note(self, error: BaseException) -> None:
        try:
            self._store.set(self._failed_key, self._message(error))
        except RuntimeError:
            # The process that holds the store has ended, which the others notice by themselves.
            return

    def _failure(self) -> str:
        """The message of another process that failed; "" if none did."""
        try:
            key = self._failed_key
            return self._store.get(key).decode() if self._store.check([key]) else ""
        except RuntimeError:
            return ""

    def _lost(self, error: RuntimeError) -> NoReturn:
        raise ProcessError(
            self._failure()
            or f"process {self.rank} of {self.count} lost another one, which ended or said nothing for "
            f"{self._timeout}; its own messages tell why. {_REMEDY}"
        ) from error


_alone = Processes()
_joined: _Joined | None = None
_current: Processes = _alone


def current() -> Processes:
    """The processes of the running command: inside ``joined`` all of them, else only this one."""
    return _current


def launched() -> tuple[int, int]:
    """Rank and number of processes from the launcher's environment: RANK, WORLD_SIZE.

    Raises:
        ProcessError: if they are not whole numbers, or no rank is given for several processes.
    """
    values = {name: os.environ.get(name) or None for name in ("RANK", "WORLD_SIZE")}
    try:
        count = int(values["WORLD_SIZE"] or 1)
        rank = int(values["RANK"] or 0) if count == 1 else int(values["RANK"] or "")
    except ValueError as error:
        raise ProcessError(
            f"environment: got WORLD_SIZE={values['WORLD_SIZE']!r}, RANK={values['RANK']!r}; expected "
            "whole numbers; start several processes with torchrun or accelerate launch, or unset them"
        ) from error
    return (rank, count) if count > 1 else (0, 1)


@contextmanager
def joined(timeout: timedelta = PATIENCE) -> Iterator[Processes]:
    """Joins the processes of a launcher into one command while the block runs.

    All of them must run the same commands in the same order. For one process nothing is started.

    Args:
        timeout: how long a process waits for another one that does not answer.

    Raises:
        ProcessError: if the environment is invalid, or the processes do not find each other.
    """
    global _current
    if launched()[1] > 1:
        _current = _join(timeout)
    try:
        yield _current
    finally:
        _current = _alone


def leave(status: int) -> NoReturn:
    """Ends the process at once: the interpreter's own exit can wait forever for a thread of gloo."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(timeout: timedelta) -> _Joined:
    global _joined
    if _joined is None:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ProcessError(
                f"environment: got WORLD_SIZE={os.environ['WORLD_SIZE']} without {missing[0]}; start "
                "several processes with torchrun or accelerate launch, or unset WORLD_SIZE"
            )
        backend = "gloo"
        if torch.cuda.is_available():
            # Before anything is put on a GPU: "cuda" then means this process's own.
            here = int(os.environ.get("LOCAL_RANK") or launched()[0])
            torch.cuda.set_device(here % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        try:
            if not dist.is_initialized():
                dist.init_process_group(backend, timeout=timeout)
            _joined = _Joined(timeout)
        except RuntimeError as error:
            raise ProcessError(
                f"the {os.environ['WORLD_SIZE']} processes did not find each other: {error}"
            ) from error
    return _joined
