"""Custom rewards: the questions of any task, rewarded by a function of the user."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from topr_kernels.recipe.files import checksum, one_line
from topr_kernels.recipe.tasks import AnyTask, Question


class NoReward(ValueError):
    """A reward function returned what is no reward."""


@dataclass(frozen=True)
class RewardTask:
    """The questions of a task, and a function that says what a completion is worth.

    The function is called as ``function(question, completion, entry)``, with the question's text, the
    completion without surrounding white space, and ``Question.entry``. It returns the reward, or None
    for a completion without an answer, which is rewarded -1. It runs in the workers of ``scoring``,
    under their limits: it can neither write files nor use the network, and the environment is empty.
    Its file imports what it needs at the top: torch and other libraries do not load in a worker.

    Args:
        task: where the questions come from; its own scorer is not used.
        function: ``module:function``, of a module that can be imported from the working folder.

    Raises:
        ValueError: if there is no such function.
    """

    task: AnyTask
    function: str

    def __post_init__(self) -> None:
        _find(self.function)

    @property
    def one_line(self) -> bool:
        """Whether a completion ends with its line."""
        return self.task.one_line

    def questions(self, count: int, *, seed: int, exclude: Sequence[str] = ()) -> list[Question]:
        """The questions of the task."""
        return self.task.questions(count, seed=seed, exclude=exclude)

    def prepare(self) -> None:
        """Imports the function's module, before workers give up the rights that this may need."""
        _find(self.function)

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        """The completion; None if it was cut off, or the function returns None."""
        answer = completion.strip()
        if finish_reason != "stop" or self._value(answer, question) is None:
            return None
        return answer

    def canonical(self, answer: str) -> str:
        """The answer unchanged: only the function could tell which answers are equal."""
        return answer

    def reward(self, answer: str | None, question: Question) -> float:
        """The function's reward; -1 for no answer."""
        value = None if answer is None else self._value(answer, question)
        return -1.0 if value is None else value

    def explain(self, error: BaseException) -> str:
        """What the function raised, and the line: the last one in its own file, if there is one."""
        if isinstance(error, NoReward):
            return str(error)
        frames = [
            (f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)
        ]
        own = [frame for frame in frames if frame[0] == str(reward_file(self.function))]
        file, line = (own or frames)[-1]
        said = " ".join(str(error)[:200].split())
        kind = type(error).__name__
        return f"raised {kind}{': ' if said else ''}{said} ({Path(file).name}, line {line})"

    def _value(self, answer: str, question: Question) -> float | None:
        # The last value is kept: parse and reward both need it, and the function may be slow.
        if self._known[:2] != [answer, question]:
            value = _find(self.function)(question.text, answer, dict(question.entry))
            self._known[:] = [answer, question, _number(value)]
        known: float | None = self._known[2]
        return known

    @cached_property
    def _known(self) -> list[Any]:
        return [None, None, None]


def _number(value: Any) -> float | None:
    """What a function returned, as a reward.

    Raises:
        NoReward: if it is neither a finite number nor None.
    """
    if value is None:
        return None
    expected = "a finite number or None"
    try:
        number = float(value)
        if math.isfinite(number):
            return number
    except OverflowError:
        pass
    except (TypeError, ValueError):
        expected = "a number or None"
    kind = type(value).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    raise NoReward(f"returned {reprlib.repr(value)}, {article} {kind}; expected {expected}")


def reward_file(function: str) -> Path:
    """The file of a function's module.

    Raises:
        ValueError: as ``RewardTask``.
    """
    # Of a decorated function the file of the wrapped one, which its author edits.
    return Path(inspect.unwrap(_find(function)).__code__.co_filename)


def reward_key(function: str) -> dict[str, str]:
    """For a manifest: the function, and the checksum of its file, on which rewards depend."""
    return {"reward": function, "reward_sha256": checksum(reward_file(function))}


def _find(function: str) -> Any:
    module, _, name = function.partition(":")
    # The console script does not have the working folder on its path.
    if module not in sys.modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = getattr(importlib.import_module(module), name)
    # The user's module may raise anything, and may try to end the process.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward: got {function!r}; expected module:function, importable from here "
            f"({one_line(error)})"
        ) from error
    if not hasattr(imported, "__code__"):
        raise ValueError(f"reward: got {function!r}; expected a function written in Python")
    return imported
