"""Accuracy on held-out questions, greedy and sampled, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from topr_kernels.recipe.generate import Completion, complete, read_prompts, stop_token_ids
from topr_kernels.recipe.scoring import Verdict, verdicts
from topr_kernels.recipe.tasks import AnyTask, Question


@dataclass(frozen=True)
class Accuracy:
    """Outcome of one way of answering the held-out questions, one answer each.

    Args:
        correct: number of right answers.
        questions: number of questions.
        low: lower end of the 95 % Wilson interval of the accuracy.
        high: upper end.
        invalid_share: share of completions without a parsable answer.
        mean_length: mean completion length in tokens, stop token included.
    """

    correct: int
    questions: int
    low: float
    high: float
    invalid_share: float
    mean_length: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.questions


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model: ``greedy`` decoding, and ``sampled`` at temperature 1."""

    greedy: Accuracy
    sampled: Accuracy


def wilson_interval(correct: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; 95 % by default. Counts may be effective ones.

    Raises:
        ValueError: unless 0 <= correct <= count and count > 0.
    """
    if count <= 0 or not 0 <= correct <= count:
        raise ValueError(
            f"wilson_interval: got {correct} of {count}; expected 0 <= correct <= count"
        )
    p = correct / count
    scale = 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: AnyTask,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    label: str = "",
    judged: list[Verdict] | None = None,
) -> Evaluation:
    """Answers every question once greedily and once by sampling at temperature 1.

    Args:
        model: a causal language model; it is put in eval mode.
        tokenizer: its tokenizer.
        task: parses and scores the answers.
        questions: held-out questions, at least one.
        max_new_tokens: length at which an answer is cut (and counts as invalid).
        batch_size: questions answered together.
        seed: of the sampled answers.
        label: named on the progress bar.
        judged: takes the verdicts on all answers, the greedy ones first.

    Raises:
        ValueError: if there are no questions.
        ScoringError: if the answers cannot be judged.
    """
    if not questions:
        raise ValueError("questions: got none; expected at least one held-out question")
    model.eval()
    stop_ids = stop_token_ids(tokenizer, one_line=task.one_line, model=model)
    with tqdm(total=2 * len(questions), desc=f"evaluate {label}".strip(), unit="answer") as bar:
        answers: dict[float, list[Completion]] = {0.0: [], 1.0: []}
        for start in range(0, len(questions), batch_size):
            part = [question.prompt for question in questions[start : start + batch_size]]
            prompts = read_prompts(model, tokenizer, part)
            for temperature, given in answers.items():
                given += complete(
                    model,
                    tokenizer,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed * 1_000_003 + start,
                    stop_ids=stop_ids,
                )
                bar.update(len(part))
    kept = [] if judged is None else judged
    greedy, sampled = (_accuracy(task, questions, given, kept) for given in answers.values())
    return Evaluation(greedy, sampled)


def _accuracy(
    task: AnyTask,
    questions: Sequence[Question],
    completions: Sequence[Completion],
    kept: list[Verdict],
) -> Accuracy:
    pairs = zip(questions, completions, strict=True)
    judged = verdicts(task, [(c.text, c.finish_reason, question) for question, c in pairs])
    kept += judged
    invalid = sum(verdict.answer is None for verdict in judged)
    correct = sum(verdict.reward > 0 for verdict in judged)
    tokens = sum(len(completion.token_ids) for completion in completions)
    count = len(questions)
    low, high = wilson_interval(correct, count)
    return Accuracy(correct, count, low, high, invalid / count, tokens / count)
