"""Accuracy of N answers per question: pass@1, majority of K, and how sure that is."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from topr_kernels.recipe.curate import DataFigures, figures
from topr_kernels.recipe.evaluate import wilson_interval
from topr_kernels.recipe.records import Record
from topr_kernels.recipe.scoring import Verdict, verdicts
from topr_kernels.recipe.tasks import Judge, Question


@dataclass(frozen=True)
class SampledAccuracy:
    """Accuracy of N sampled answers to each of Q questions.

    Args:
        questions: Q.
        samples: N.
        pass_at_1: mean over questions of the share of right answers.
        pass_at_1_low: lower end of its 95 % interval: Wilson's, with the number of independent answers
            estimated from the spread over questions, at least Q and at most Q * N.
        pass_at_1_high: upper end.
        votes: K.
        maj_at_k: accuracy of the majority of K of the N answers, mean over the draws of K. Answers
            that cannot be parsed do not vote; of equal counts the answer drawn first wins.
        maj_at_k_error: its standard error sqrt(K V / (N - K)), V the variance over the draws; None for
            K = N, where there is one draw. It covers the sampling of answers, not of questions, and is
            too large rather than too small: the mean over draws varies less than the formula assumes.
        invalid_share: answers that could not be parsed.
        truncated_share: answers that were cut off.
        mean_length: of an answer, in tokens.
    """

    questions: int
    samples: int
    pass_at_1: float
    pass_at_1_low: float
    pass_at_1_high: float
    votes: int
    maj_at_k: float
    maj_at_k_error: float | None
    invalid_share: float
    truncated_share: float
    mean_length: float

    def __str__(self) -> str:
        """The figures as lines of text."""
        error = "" if self.maj_at_k_error is None else f" +- {100 * self.maj_at_k_error:.1f}"
        return (
            f"{self.questions} questions, {self.samples} answer(s) each\n"
            f"pass@1   {100 * self.pass_at_1:5.1f} %  95 % interval "
            f"[{100 * self.pass_at_1_low:.1f}, {100 * self.pass_at_1_high:.1f}]\n"
            f"maj@{self.votes:<4} {100 * self.maj_at_k:5.1f} %{error}\n"
            f"invalid {100 * self.invalid_share:.1f} %, cut off {100 * self.truncated_share:.1f} %, "
            f"mean length {self.mean_length:.1f} tokens"
        )


def sampled_accuracy(
    records: Sequence[Record],
    task: Judge,
    questions: Sequence[Question],
    *,
    votes: int,
    draws: int,
    seed: int,
    judged: Sequence[Verdict] | None = None,
) -> SampledAccuracy:
    """Works out the accuracy of sampled answers.

    Args:
        records: Q * N records, those of a question together, in the order of ``questions``.
        task: parses, compares and scores the answers.
        questions: Q questions.
        votes: K, answers that vote, at most N.
        draws: how often K of the N answers are drawn; 1 is enough for K = N.
        seed: of the draws.
        judged: the verdict on each record, where they are known; else they are judged.

    Raises:
        ValueError: if ``records`` are not N for each question, ``judged`` not one for each of them, or
            ``votes`` is not in 1..N.
        ScoringError: if the answers cannot be judged.
    """
    answers = judged_answers(records, task, questions, votes, judged)
    samples = len(answers[0])
    right = [sum(good for _, good in row) / samples for row in answers]
    mean = statistics.fmean(right)
    low, high = _interval(right, samples)
    votes_of_one = [[(form, good, 1.0) for form, good in row] for row in answers]
    majority, error = weighted_majority(votes_of_one, votes=votes, draws=draws, seed=seed)
    data: DataFigures = figures(records)
    return SampledAccuracy(
        questions=len(questions),
        samples=samples,
        pass_at_1=mean,
        pass_at_1_low=low,
        pass_at_1_high=high,
        votes=votes,
        maj_at_k=majority,
        maj_at_k_error=error,
        invalid_share=sum(form is None for row in answers for form, _ in row) / len(records),
        truncated_share=data.truncated_share,
        mean_length=data.mean_length,
    )


def judged_answers(
    records: Sequence[Record],
    task: Judge,
    questions: Sequence[Question],
    votes: int,
    judged: Sequence[Verdict] | None = None,
) -> list[list[tuple[str | None, bool]]]:
    """For each question its N answers: canonical form, None where there is none, and whether right.

    Raises:
        ValueError, ScoringError: as ``sampled_accuracy``.
    """
    samples = len(records) // max(1, len(questions))
    groups = [record.group for record in records]
    if not samples or groups != [q.group for q in questions for _ in range(samples)]:
        raise ValueError(
            f"records: got {len(records)} of {len(questions)} questions; expected equally many of "
            "each, in the order of the questions"
        )
    if not 1 <= votes <= samples:
        raise ValueError(f"votes: got {votes}; expected 1 to {samples}, the answers per question")
    if judged is None:
        judged = judge_records(task, records, questions)
    if len(judged) != len(records):
        raise ValueError(f"judged: got {len(judged)}; expected one per record, {len(records)}")
    answers = []
    for i in range(len(questions)):
        part = judged[i * samples : (i + 1) * samples]
        # One judgement per form: equal answers must not be judged differently.
        scores: dict[str | None, bool] = {}
        for verdict in part:
            scores.setdefault(verdict.form, verdict.reward > 0)
        answers.append([(verdict.form, scores[verdict.form]) for verdict in part])
    return answers


def judge_records(
    task: Judge, records: Sequence[Record], questions: Sequence[Question]
) -> list[Verdict]:
    """The verdicts on N answers to each question, those of a question together.

    Raises:
        ScoringError: if the answers cannot be judged.
    """
    samples = len(records) // len(questions)
    return verdicts(
        task,
        [
            (record.completion, record.finish_reason, questions[i // samples])
            for i, record in enumerate(records)
        ],
    )


def _interval(right: Sequence[float], samples: int) -> tuple[float, float]:
    count, mean = len(right), statistics.fmean(right)
    variance = statistics.variance(right) / count if count > 1 else 0.0
    # Answers to one question are alike, so N of them are worth between one and N. Where the spread
    # tells nothing (all right, or all wrong) they count as one.
    effective = mean * (1 - mean) / variance if variance else 0.0
    effective = min(max(effective, count), count * samples)
    return wilson_interval(mean * effective, effective)


def weighted_majority(
    answers: Sequence[Sequence[tuple[str | None, bool, float]]],
    *,
    votes: int,
    draws: int,
    seed: int,
) -> tuple[float, float | None]:
    """Accuracy of the answer with the largest sum of weights among K of N, mean over draws of K.

    An answer of form None does not vote. Of equal sums the answer with more votes wins, so that equal
    weights give the plain majority; of equal numbers of votes, the one drawn first.

    Args:
        answers: for each question N answers: form, whether it is right, weight. Whole numbers as weights
            have exact sums, so that equal ones are.
        votes: K, in 1..N.
        draws: how often K are drawn; once for K = N.
        seed: of the draws; the same whatever the weights.

    Returns:
        The accuracy, and its standard error sqrt(K V / (N - K)), V the variance over the draws; None for
        K = N or one draw.
    """
    draw = random.Random(seed)
    samples = len(answers[0])
    accuracies = []
    for _ in range(draws if votes < samples else 1):
        correct = 0
        for row in answers:
            drawn = draw.sample(row, votes) if votes < samples else row
            sums: dict[str, tuple[float, int]] = {}
            for form, _, weight in drawn:
                if form is not None:
                    total, count = sums.get(form, (0.0, 0))
                    sums[form] = total + weight, count + 1
            # max takes the first of equals, and a dict keeps the order of the draw.
            winner = max(sums, key=sums.__getitem__) if sums else None
            correct += any(right for form, right, _ in row if form == winner and winner is not None)
        accuracies.append(correct / len(answers))
    mean = statistics.fmean(accuracies)
    if votes == samples or draws < 2:
        return mean, None
    # The paper's formula: the jackknife that leaves out N - K, with V over the draws.
    return mean, math.sqrt(votes * statistics.variance(accuracies) / (samples - votes))
