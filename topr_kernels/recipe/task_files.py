"""Tasks by name: reasoning-gym's, and JSONL files of questions and answers as GSM8K and MATH are."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from topr_kernels.recipe.files import FileError
from topr_kernels.recipe.rewards import RewardTask, reward_key
from topr_kernels.recipe.settings import QuestionOptions
from topr_kernels.recipe.steps import SettingsError
from topr_kernels.recipe.tasks import (
    ARITHMETIC,
    REFUSED,
    AnyTask,
    Question,
    Task,
    canonical_number,
    held_out_split,
)

#: The question, and the form of the answer that ``parse`` reads.
_PROMPTS = {
    "gsm8k": (
        "{question}\n\nLet's think step by step. End with a line of the form "
        '"The answer is: " and the number.\n'
    ),
    "math": ("{question}\n\nLet's think step by step. Put the final answer within \\boxed{{}}.\n"),
}
_ANSWER = re.compile(r"the (?:final )?answer is:?\s*([^\s:].*)", re.IGNORECASE)
_BOX = "\\boxed{"


@dataclass(frozen=True)
class FileTask:
    r"""Questions of a JSONL file, answered in free text that ends with the answer.

    Each line is an object with ``question`` (or ``problem``) and ``answer`` (or ``solution``). The
    right answer is what follows ``####`` (GSM8K), else the last ``\boxed{}`` (MATH), else all of it.

    Args:
        kind: "gsm8k" reads "The answer is: ..." of a completion, "math" its last ``\boxed{}``, and
            "The answer is" where there is none.
        path: the file.

    Raises:
        FileError: on first use, if a line is not such an object; names file, line and field.
        ValueError: if ``kind`` is another.
    """

    one_line: ClassVar[bool] = False

    kind: str
    path: Path

    def __post_init__(self) -> None:
        if self.kind not in _PROMPTS:
            raise ValueError(f"kind: got {self.kind!r}; expected one of {', '.join(_PROMPTS)}")

    def questions(self, count: int, *, seed: int, exclude: Sequence[str] = ()) -> list[Question]:
        """Draws distinct questions.

        Args:
            count: how many.
            seed: of the draw.
            exclude: texts of questions that must not occur.

        Raises:
            ValueError: if the file does not hold that many distinct questions.
        """
        left = {e["question"]: e for e in self._entries if e["question"] not in set(exclude)}
        if len(left) < count:
            raise ValueError(
                f"count: {self.path.name} holds only {len(left)} distinct questions"
                f"{' besides the held-out ones' if exclude else ''} of the {count} asked for; ask for "
                "fewer"
            )
        drawn = random.Random(seed).sample(list(left.values()), count)
        return [
            Question(i, _PROMPTS[self.kind].format(question=e["question"]), e["question"], e)
            for i, e in enumerate(drawn)
        ]

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        """The answer that a completion gives, or None if it gives none, or was cut."""
        if finish_reason != "stop":
            return None
        boxed = last_boxed(completion) if self.kind == "math" else None
        if boxed is not None:
            return boxed.strip() or None
        said = _ANSWER.findall(completion)
        return (clean(said[-1]) or None) if said else None

    def canonical(self, answer: str) -> str:
        """The answer as a number where it is one, else without spaces and what only sets it."""
        return canonical_number(clean(answer)) or plain_latex(answer)

    def reward(self, answer: str | None, question: Question) -> float:
        """+1 for a right answer, -1 for a wrong one or none.

        Equal as numbers or as text is right; otherwise math-verify decides, if it is installed.
        """
        if answer is None:
            return -1.0
        gold = str(question.entry["answer"])
        if self.canonical(answer) == self.canonical(gold):
            return 1.0
        return 1.0 if math_verify_installed() and _verify(gold, answer) else -1.0

    @cached_property
    def _entries(self) -> list[dict[str, str]]:
        try:
            with self.path.open(encoding="utf-8") as lines:
                return [_entry(x, f"{self.path.name}, line {i}") for i, x in enumerate(lines, 1)]
        except UnicodeDecodeError as error:
            raise FileError(
                f"{self.path.name}: not UTF-8 text ({error}); expected JSONL"
            ) from error


def find_task(name: str, config: str, trust_scorer: str = "") -> AnyTask:
    """The task of a ``--task``: arithmetic, gsm8k:FILE, math:FILE, or a reasoning-gym data set.

    Args:
        name: of the task.
        config: settings of a data set, as JSON.
        trust_scorer: names of ``tasks.REFUSED``, by commas, that may be had.

    Raises:
        SettingsError: if there is no such task, it refuses the configuration, or its scorer is refused.
    """
    kind, colon, file = name.partition(":")
    try:
        settings = json.loads(config)
    except json.JSONDecodeError as error:
        raise SettingsError(f"task_config: got {config!r}; not JSON ({error})") from error
    if not isinstance(settings, Mapping):
        raise SettingsError(f"task_config: got {config}; expected a JSON object")
    if settings and (colon or name == "arithmetic"):
        raise SettingsError(
            f"task_config: got {config} with the task {name!r}, which has no settings; leave it out, or "
            "name a reasoning-gym data set (that of arithmetic is chain_sum)"
        )
    try:
        if colon:
            return FileTask(kind, Path(file))
        if name == "arithmetic":
            return ARITHMETIC
        return Task(name, settings, trusted=tuple(filter(None, trust_scorer.split(","))))
    except ValueError as error:
        raise SettingsError(f"--task {name}: {error}") from error


def find_tasks(options: QuestionOptions) -> tuple[AnyTask, AnyTask]:
    """The tasks of the training and of the held-out questions."""
    # A scorer that is not asked needs no trust.
    trusted = ",".join(REFUSED) if options.reward else options.trust_scorer
    task = find_task(options.task, options.task_config, trusted)
    test = find_task(options.test_task, "{}", trusted) if options.test_task else task
    if not options.reward:
        return task, test
    try:
        return RewardTask(task, options.reward), RewardTask(test, options.reward)
    except ValueError as error:
        raise SettingsError(f"--reward {options.reward}: {error}") from error


def questions_of(options: QuestionOptions, train: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions; the held-out ones do not depend on ``train``.

    Args:
        options: where they come from, and how many are held out.
        train: number of training questions.

    Raises:
        SettingsError: if a task does not have that many.
    """
    task, test = find_tasks(options)
    seed = options.question_seed
    try:
        if not options.test_task:
            return held_out_split(task, train, options.held_out, seed)
        held_out = test.questions(options.held_out, seed=seed)
        return task.questions(train, seed=seed, exclude=[q.text for q in held_out]), held_out
    except FileError:
        raise
    except ValueError as error:
        raise SettingsError(f"questions and held_out: {error}") from error


def scorer(options: QuestionOptions) -> dict[str, Any]:
    """For the manifest: what changes rewards, a function of one's own or whether math-verify judged."""
    if options.reward:
        return reward_key(options.reward)
    return {"math_verify": math_verify_installed()} if task_inputs(options) else {}


def task_inputs(options: QuestionOptions) -> dict[str, Path]:
    """The files that the questions come from, by flag."""
    names = {"task": options.task, "test_task": options.test_task}
    return {flag: Path(n.partition(":")[2]) for flag, n in names.items() if ":" in n}


def last_boxed(text: str) -> str | None:
    r"""Contents of the last ``\boxed{...}`` whose braces close, or None."""
    start = text.rfind(_BOX)
    while start >= 0:
        depth = 1
        for end in range(start + len(_BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[start + len(_BOX) : end]
        start = text.rfind(_BOX, 0, start)
    return None


def clean(answer: str) -> str:
    """An answer without what a sentence puts around it: $, %, units of money, a last full stop."""
    text = answer.strip().strip("*").strip().removesuffix(".").strip("$ ")
    return text.removesuffix("%").removesuffix("\\").strip()


def plain_latex(answer: str) -> str:
    r"""LaTeX without spaces, \left, \right, $ and the like; \dfrac and \tfrac as \frac."""
    text = re.sub(r"\\left|\\right|\\!|\\,|\\;|\\ |\$|\s", "", clean(answer))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", text)


def math_verify_installed() -> bool:
    """Whether the optional package math-verify is there."""
    return importlib.util.find_spec("math_verify") is not None


def _verify(gold: str, answer: str) -> bool:
    math_verify: Any = importlib.import_module("math_verify")
    parsed = [math_verify.parse(f"${text}$") for text in (gold, answer)]
    return bool(math_verify.verify(*parsed))


def _entry(line: str, where: str) -> dict[str, str]:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise FileError(f"{where}: not a line of JSON ({error}); half-written?") from error
    if not isinstance(raw, Mapping):
        raise FileError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    texts = []
    for names in (("question", "problem"), ("answer", "solution")):
        text = next((raw[name] for name in names if raw.get(name) is not None), None)
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            text = str(text)
        if not isinstance(text, str) or not text.strip():
            raise FileError(
                f"{where}, field {names[0]!r}: expected a text there or in {names[1]!r}, got {text!r}"
            )
        texts.append(text.strip())
    answer = texts[1].rpartition("####")[2].strip()
    return {"question": texts[0], "answer": last_boxed(answer) or answer}
