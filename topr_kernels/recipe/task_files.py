"""Tasks by name: reasoning-gym's, and JSONL files of questions and answers like GSM8K and MATH."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from reasoning_gym.factory import DATASETS

from topr_kernels.hf.fields import IMAGES, name_here
from topr_kernels.recipe.answers import final_answer, gold_answer
from topr_kernels.recipe.equality import canonical, same_answer
from topr_kernels.recipe.files import FileError, parse_json, parse_object, user_path
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.records import is_unicode
from topr_kernels.recipe.rewards import RewardTask, reward_key
from topr_kernels.recipe.settings import QuestionOptions
from topr_kernels.recipe.tasks import (
    ARITHMETIC,
    REFUSED,
    AnyTask,
    Question,
    Task,
    held_out_split,
)
from topr_kernels.recipe.trained_on import digest

#: The question, and the form of the answer that ``parse`` reads.
_PROMPTS = {
    "gsm8k": (
        "{question}\n\nLet's think step by step. End with a line of the form "
        '"The answer is: " and the number.\n'
    ),
    "math": ("{question}\n\nLet's think step by step. Put the final answer within \\boxed{{}}.\n"),
}


@dataclass(frozen=True)
class FileTask:
    r"""Questions of a JSONL file, answered in free text that ends with the answer.

    Each line is an object with ``question`` (or ``problem``) and ``answer`` (or ``solution``), and
    ``images`` where the question is about some: paths beside the file, or ``data:`` URLs in base64. The
    right answer is what follows ``####`` (GSM8K), else the last ``\boxed{}`` or ``\fbox{}`` (MATH), else
    all of it. The last answer that a completion states counts, as ``final_answer`` says; it is right
    if it has the same value, as ``same_answer`` says.

    Args:
        kind: "gsm8k" reads "The answer is: ..." of a completion, "math" its ``\boxed{}`` too.
        path: the file.

    Raises:
        FileError: on first use, if a line is not such an object, or has no right answer, or two lines
            have one question and different answers; names file, line and field.
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
        left = {_key(e): e for e in self._entries if _key(e) not in set(exclude)}
        if len(left) < count:
            raise ValueError(
                f"count: {self.path.name} holds only {len(left)} distinct questions"
                f"{' besides the held-out ones' if exclude else ''} of the {count} asked for; ask for "
                "fewer"
            )
        drawn = random.Random(seed).sample(list(left.values()), count)
        return [
            Question(
                i,
                _PROMPTS[self.kind].format(question=e["question"]),
                _key(e),
                e,
                tuple(e.get(IMAGES, ())),
            )
            for i, e in enumerate(drawn)
        ]

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        """The answer that a completion gives, or None if it gives none, or was cut."""
        if finish_reason != "stop":
            return None
        return final_answer(completion, boxed=self.kind == "math")

    def canonical(self, answer: str) -> str:
        """The answer as a number and a unit where it is one, else without what only sets it."""
        return canonical(answer)

    def reward(self, answer: str | None, question: Question) -> float:
        """+1 for an answer of the right value, -1 for a wrong one or none."""
        if answer is None:
            return -1.0
        return 1.0 if same_answer(str(question.entry["answer"]), answer) else -1.0

    def __getstate__(self) -> dict[str, Any]:
        # Pickled without the questions of its file.
        return {"kind": self.kind, "path": self.path}

    @cached_property
    def _entries(self) -> list[dict[str, Any]]:
        try:
            # utf-8-sig: some editors write a byte order mark.
            with self.path.open(encoding="utf-8-sig") as lines:
                read = [
                    (i, _entry(line, f"{self.path.name}, line {i}", self.path.parent))
                    for i, line in enumerate(lines, 1)
                    if line.strip()
                ]
        except UnicodeDecodeError as error:
            raise FileError(
                f"{self.path.name}: not UTF-8 text ({error}); expected JSONL"
            ) from error
        _check_duplicates(read, self.path.name)
        return [entry for _, entry in read]


def find_task(name: str, config: str, trust_scorer: str = "") -> AnyTask:
    """The task of a ``--task``: arithmetic, gsm8k:FILE, math:FILE, or a reasoning-gym data set.

    Args:
        name: of the task.
        config: settings of a data set, as JSON.
        trust_scorer: names of ``tasks.REFUSED``, by commas, that may be had.

    Raises:
        SettingsError: if there is no such task, it refuses the configuration, or its scorer is refused.
    """
    file = task_file(name)
    try:
        settings = parse_json(config)
    except json.JSONDecodeError as error:
        raise SettingsError(f"task_config: got {config!r}; not JSON ({error})") from error
    except ValueError as error:
        raise SettingsError(f"task_config: {error}") from error
    if not isinstance(settings, Mapping):
        raise SettingsError(f"task_config: got {config}; expected a JSON object")
    if settings and (file or name == "arithmetic"):
        raise SettingsError(
            f"task_config: got {config} with the task {name!r}, which has no settings; leave it out, or "
            "name a reasoning-gym data set (that of arithmetic is chain_sum)"
        )
    try:
        if file:
            return FileTask(name.partition(":")[0], file)
        if name == "arithmetic":
            return ARITHMETIC
        if name not in DATASETS:
            raise ValueError(_unknown(name))
        return Task(name, settings, trusted=tuple(filter(None, trust_scorer.split(","))))
    except ValueError as error:
        raise SettingsError(f"--task {name}: {error}") from error


def _unknown(name: str) -> str:
    """Says what a name that no task has may have been meant for."""
    if name.endswith(".jsonl") or user_path(name).is_file():
        return f"a file is named with the kind of its answers; say gsm8k:{name} or math:{name}"
    near = difflib.get_close_matches(name, ["arithmetic", *DATASETS])
    meant = f"; the nearest are {', '.join(near)}" if near else ""
    return (
        f"no task has this name{meant}; expected arithmetic, gsm8k:FILE, math:FILE, or a data set of "
        "reasoning-gym"
    )


def task_file(name: str) -> Path | None:
    """The file of a ``--task``, ``~`` in it the home folder; None for a task without one."""
    _, colon, file = name.partition(":")
    return Path(file).expanduser() if colon else None


def find_tasks(options: QuestionOptions) -> tuple[AnyTask, AnyTask]:
    """The tasks of the training and of the held-out questions.

    Raises:
        SettingsError: as ``find_task``; if there is no such ``reward``; or if ``trust_scorer`` is given
            and no scorer of reasoning-gym is asked.
    """
    _check_trust(options)
    # A scorer that is not asked needs no trust.
    trusted = ",".join(REFUSED) if options.reward else options.trust_scorer
    task = find_task(options.task, options.task_config, trusted)
    test = find_task(options.test_task, "{}", trusted) if options.test_task else task
    if not options.reward:
        return task, test
    with naming_reward(options.reward):
        return RewardTask(task, options.reward), RewardTask(test, options.reward)


@contextmanager
def naming_reward(function: str) -> Iterator[None]:
    """Has an error of looking a reward up name the flag."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(f"--reward {function}: {error}") from error


def _check_trust(options: QuestionOptions) -> None:
    """Refuses a ``trust_scorer`` that changes nothing.

    Raises:
        SettingsError: naming what judges instead.
    """
    if not options.trust_scorer:
        return
    names = {options.task, options.test_task or options.task}
    if options.reward:
        instead = (
            f"--reward {options.reward} judges in place of all scorers; leave one of the two out"
        )
    elif all(name == "arithmetic" or task_file(name) for name in names):
        instead = (
            f"no scorer of reasoning-gym judges {' and '.join(sorted(names))}; leave it out, or name "
            f"one of these data sets as --task or --test-task: {', '.join(REFUSED)}"
        )
    else:
        return
    raise SettingsError(f"trust_scorer: got {options.trust_scorer!r}, but {instead}")


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
            drawn, held_out = held_out_split(task, train, options.held_out, seed)
        else:
            held_out = test.questions(options.held_out, seed=seed)
            drawn = task.questions(train, seed=seed, exclude=[q.text for q in held_out])
    except FileError:
        raise
    except ValueError as error:
        raise SettingsError(f"questions and held_out: {error}") from error
    if task_inputs(options):
        _warn_of_near_duplicates(drawn, held_out)
    return drawn, held_out


def scorer(options: QuestionOptions) -> dict[str, Any]:
    """For the manifest: what rewards depend on, a custom function or the version of math-verify.

    Raises:
        SettingsError: if there is no such function.
    """
    if options.reward:
        with naming_reward(options.reward):
            return reward_key(options.reward)
    if not task_inputs(options):
        return {}
    return {"math_verify": importlib.metadata.version("math-verify")}


def task_inputs(options: QuestionOptions) -> dict[str, Path]:
    """The files that the questions come from, by flag."""
    files = {"task": task_file(options.task), "test_task": task_file(options.test_task)}
    return {flag: file for flag, file in files.items() if file}


def _key(entry: Mapping[str, Any]) -> str:
    """A question with its images: the same text about another picture is another question."""
    images = entry.get(IMAGES, ())
    shown = ", ".join(x if len(x) < 200 else f"{x[:30]}...{digest(x)}" for x in images)
    return f"{entry['question']} [{shown}]" if images else str(entry["question"])


def _check_duplicates(entries: Sequence[tuple[int, dict[str, Any]]], file: str) -> None:
    first: dict[str, tuple[int, str]] = {}
    for line, entry in entries:
        # Not by case: "x" and "X" may be two names.
        question = " ".join(_key(entry).split())
        earlier, answer = first.setdefault(question, (line, entry["answer"]))
        other = entry["answer"]
        if answer != other and not (same_answer(answer, other) or same_answer(other, answer)):
            raise FileError(
                f"{file}, lines {earlier} and {line}: one question with two right answers, {answer!r} "
                f"and {other!r}; remove one of them"
            )


def _warn_of_near_duplicates(train: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Warns of training questions that equal held-out ones but for case and spaces."""
    held = {" ".join(q.text.casefold().split()) for q in held_out}
    alike = [q.text for q in train if " ".join(q.text.casefold().split()) in held]
    if alike:
        warnings.warn(
            f"{len(alike)} training questions equal held-out ones but for case and spaces, for instance "
            f"{alike[0][:80]!r}; remove them from the file, or accuracy is measured on what was trained",
            stacklevel=3,
        )


def _entry(line: str, where: str, folder: Path) -> dict[str, Any]:
    raw = parse_object(line, where, FileError)
    _, question = _text(raw, ("question", "problem"), where)
    field, answer = _text(raw, ("answer", "solution"), where)
    try:
        entry = {"question": question, "answer": gold_answer(answer)}
        return entry | _shown(raw, where, folder)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(
            f"{where}, field {field!r}: {error} in {answer[-80:]!r}; expected the right answer after "
            "####, in \\boxed{}, or alone"
        ) from error


def _shown(raw: Mapping[str, Any], where: str, folder: Path) -> dict[str, list[str]]:
    """The images of a question, as commands find them; {} if it has none."""
    for name in raw:
        if name_here(name) == IMAGES and name != IMAGES and raw[name]:
            raise FileError(f"{where}, field {name!r}: expected {IMAGES!r}, a list; rename it")
    images = raw.get(IMAGES)
    if not images:
        return {}
    if not isinstance(images, list) or not all(isinstance(x, str) and x for x in images):
        raise FileError(
            f"{where}, field {IMAGES!r}: got {images!r:.60}; expected a list of paths beside the file, "
            "or data: URLs in base64"
        )
    return {IMAGES: [x if x.startswith("data:") else str(folder / x) for x in images]}


def _text(raw: Mapping[str, Any], names: tuple[str, str], where: str) -> tuple[str, str]:
    """Name and text of the first of two fields that is present."""
    name = next((name for name in names if raw.get(name) is not None), names[0])
    text = raw.get(name)
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.strip():
        raise FileError(
            f"{where}, field {names[0]!r}: expected a text there or in {names[1]!r}, got {text!r}"
        )
    if not is_unicode(text):
        raise FileError(
            f"{where}, field {name!r}: holds half a character (\\ud800 to \\udfff), which no tokenizer "
            "reads; mend the line"
        )
    return name, text.strip()
