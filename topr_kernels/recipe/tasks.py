"""Questions with a verifiable answer: any reasoning-gym data set, scored by its own scorer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Protocol

import reasoning_gym

# Instructions that are left out: a few-shot prompt shows the problem and the answer alone.
_INSTRUCTIONS = {
    "chain_sum": "State the final answer to the following arithmetic problem: ",
}
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d*)?")
# Each part of a split has its own range of reasoning-gym seeds (an entry's seed is the data set's plus
# its index), so that asking for more questions of one part does not change the others.
_EXAMPLE_SEED = 1_000_000_000
_SEED_STRIDE = 1_000_000

_EVAL = "its scorer evaluates the answer as Python (eval)"
_SYMPY = "its scorer evaluates the answer as Python (sympy's parse_expr)"
#: reasoning-gym's data sets that are not served unless asked for by name, and why.
REFUSED: dict[str, str] = {
    "binary_matrix": _EVAL,
    "coin_flip": "its scorer rewards a beginning of the right answer, as 0 of 0.3125",
    "complex_arithmetic": "its scorer rewards nan",
    "countdown": _SYMPY,
    "game_of_life_halting": "its scorer rewards any text where the right answer is True, and none else",
    "intermediate_integration": _SYMPY,
    "n_queens": _EVAL,
    "polynomial_multiplication": _SYMPY,
    "puzzle24": _SYMPY,
    "simple_integration": _SYMPY,
    "spiral_matrix": _EVAL,
    "string_insertion": _EVAL,
}


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Args:
        group: its number within its split.
        prompt: the text to complete, worked examples included.
        text: the question alone; questions of equal text are the same.
        entry: what the task's scorer needs: reasoning-gym's entry, or the line of a JSONL file.
        images: shown before the prompt, paths or ``data:`` URLs in base64; part of ``text``.
    """

    group: int
    prompt: str
    text: str
    entry: Mapping[str, Any]
    images: tuple[str, ...] = ()


class Judge(Protocol):
    """The methods of a task that judge an answer; ``scoring.verdicts`` calls them in worker processes.

    With the attribute ``in_process = True`` they are called in the caller's process.
    """

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        """The answer that a completion gives, or None if it gives none."""

    def canonical(self, answer: str) -> str:
        """A form in which equal answers are equal texts."""

    def reward(self, answer: str | None, question: Question) -> float:
        """+1 for a right answer, -1 for a wrong one or none."""


class AnyTask(Judge, Protocol):
    """What the pipeline needs of a task: questions, and the rewards of completions."""

    @property
    def one_line(self) -> bool:
        """Whether a completion ends with its line."""

    def questions(self, count: int, *, seed: int, exclude: Sequence[str] = ()) -> list[Question]:
        """Draws distinct questions whose texts are not in ``exclude``."""


@dataclass(frozen=True)
class Task:
    """A reasoning-gym data set in few-shot prompts; an answer is one line.

    Args:
        name: the data set, for instance "chain_sum".
        config: its settings, for instance ``{"min_terms": 2, "max_terms": 2}``.
        examples: worked (question, answer) pairs in front of every question, the same for every
            seed; None draws three from the data set.
        trusted: data sets of ``REFUSED`` to take all the same. ``scoring.verdicts`` gives each of their
            answers a worker of its own; ``reward`` itself confines nothing.

    Raises:
        ValueError: if reasoning-gym has no such data set or refuses the settings, if the data set is one
            of ``REFUSED`` and not ``trusted``, or if ``trusted`` names one that is not refused.
    """

    one_line: ClassVar[bool] = True

    name: str = "chain_sum"
    config: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] | None = None
    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.trusted:
            if name not in REFUSED:
                raise ValueError(
                    f"trust_scorer: got {name!r}; expected some of {', '.join(REFUSED)}"
                )
        for name in self._refused():
            if name not in self.trusted:
                raise ValueError(
                    f"the data set {name!r} is refused: {REFUSED[name]}; choose another, give a "
                    f"--reward of your own, or take it as it is with --trust-scorer {name} (in Python "
                    f"trusted=({name!r},))"
                )
        self._dataset(size=1, seed=0)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled without the data set that ``prepare`` made.
        return Task, (self.name, self.config, self.examples, self.trusted)

    @property
    def one_worker_each(self) -> bool:
        """Whether an answer could change what others are worth: it may be executed."""
        return bool(self._refused())

    def prepare(self) -> None:
        """Makes the data set that ``reward`` needs, which can take a second."""
        _ = self._scorer

    def questions(self, count: int, *, seed: int, exclude: Sequence[str] = ()) -> list[Question]:
        """Draws distinct questions, also distinct from the worked examples.

        Args:
            count: how many.
            seed: of the draw; the same seed gives the same questions.
            exclude: texts of questions that must not occur.

        Raises:
            ValueError: if the data set does not have that many distinct questions.
        """
        examples = self._drawn_examples() if self.examples is None else self.examples
        seen = {question for question, _ in examples} | set(exclude)
        header = "".join(f"{question} {answer}\n" for question, answer in examples)
        questions: list[Question] = []
        tries = 20 * (count + len(seen)) + 100
        for entry in self._dataset(size=tries, seed=seed):
            if len(questions) == count:
                break
            text = self._line(entry)
            if text in seen:
                continue
            seen.add(text)
            questions.append(Question(len(questions), header + text, text, entry))
        if len(questions) < count:
            raise ValueError(
                f"count: {self.name} gave only {len(questions)} distinct questions of the {count} "
                f"asked for in {tries} draws; ask for fewer, or widen its config {self.config}"
            )
        return questions

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        """The answer that a completion gives, or None if it gives none.

        A completion that was cut at the length limit has not answered; where the right answer is a
        number, anything but a number is not an answer.
        """
        answer = completion.strip()
        if finish_reason != "stop" or not answer:
            return None
        numeric = _NUMBER.fullmatch(str(question.entry["answer"]))
        if numeric and not _NUMBER.fullmatch(answer):
            return None
        return answer

    def reward(self, answer: str | None, question: Question) -> float:
        """+1 for a right answer by the data set's own scorer, -1 for a wrong one or none."""
        if answer is None:
            return -1.0
        return 1.0 if self._scorer.score_answer(answer, dict(question.entry)) >= 1.0 else -1.0

    def canonical(self, answer: str) -> str:
        """The answer as a number where it is one, else as it stands."""
        return canonical_number(answer) or answer.strip()

    @cached_property
    def _scorer(self) -> Any:
        return self._dataset(size=1, seed=0)

    def _refused(self) -> list[str]:
        """The data sets of ``REFUSED`` whose scorers judge: this one, or parts of a composite one."""
        parts = self.config.get("datasets", ()) if self.name == "composite" else ()
        names = [self.name, *(getattr(part, "name", None) for part in parts)]
        return [str(name) for name in names if name in REFUSED]

    def _drawn_examples(self) -> tuple[tuple[str, str], ...]:
        drawn: dict[str, str] = {}
        for entry in self._dataset(size=100, seed=_EXAMPLE_SEED):
            drawn.setdefault(self._line(entry), str(entry["answer"]))
            if len(drawn) == 3:
                break
        return tuple(drawn.items())

    def _line(self, entry: Mapping[str, Any]) -> str:
        question = str(entry["question"])
        instruction = _INSTRUCTIONS.get(self.name)
        if instruction is not None:
            return question.removeprefix(instruction).strip()
        return f"Question: {question.strip()}\nAnswer:"

    def _dataset(self, size: int, seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self.name, size=size, seed=seed, **self.config)
        except (ValueError, TypeError, AssertionError, AttributeError) as error:
            raise ValueError(
                f"task: reasoning-gym refused {self.name!r} with {dict(self.config)}: {error}"
            ) from error


_LONGEST_NUMBER = 100
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
_FRACTION = re.compile(r"[+-]?(\d+/\d+|(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?)", re.IGNORECASE)

#: Sums and differences of two two-digit numbers, after three worked lines.
ARITHMETIC = Task(
    "chain_sum",
    {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    examples=(("23 + 45 =", "68"), ("71 - 38 =", "33"), ("56 + 87 =", "143")),
)


def canonical_number(text: str) -> str | None:
    """A number (commas, decimals, fractions a/b) in one form; None for anything else."""
    plain = text.strip()
    # "1,2,3" is not 123.
    if "," in plain and not _GROUPED.fullmatch(plain[:_LONGEST_NUMBER]):
        return None
    plain = plain.replace(",", "")
    # A power such as 1e9999999, or a very long number, would take minutes to convert.
    if len(plain) > _LONGEST_NUMBER or not _FRACTION.fullmatch(plain):
        return None
    try:
        return str(Fraction(plain))
    except ZeroDivisionError:
        return None


def held_out_split(
    task: AnyTask, train: int, held_out: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Draws training questions and held-out questions that share no question text.

    Args:
        task: where they come from.
        train: number of training questions.
        held_out: number of held-out questions. They are drawn first, so that they do not depend on
            ``train``.
        seed: of both draws.

    Returns:
        Training questions, held-out questions.

    Raises:
        ValueError: if the task does not have that many distinct questions.
    """
    base = 2 * _SEED_STRIDE * (seed + 1)
    test = task.questions(held_out, seed=base)
    return (
        task.questions(train, seed=base + _SEED_STRIDE, exclude=[q.text for q in test]),
        test,
    )
