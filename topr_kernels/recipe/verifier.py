"""The generative verifier: a model that writes whether a solution is right, and weighs votes with it.

``run_verify`` asks a model about solutions and rewards its judgements; score, curate and train take
those records as they take any. ``run_vote`` asks a verifier about the answers of ``run_evaluate``.
"""

from __future__ import annotations

import dataclasses
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from topr_kernels.recipe.curate import to_positive_share
from topr_kernels.recipe.records import Judged, Record, RecordError
from topr_kernels.recipe.scoring import Verdict
from topr_kernels.recipe.settings import VerifySettings
from topr_kernels.recipe.tasks import Judge, Question
from topr_kernels.recipe.voting import judge_records, judged_answers, weighted_majority

_WORDS = {
    **dict.fromkeys(("right", "correct", "yes"), "right"),
    **dict.fromkeys(("wrong", "incorrect", "no"), "wrong"),
}
_WORD = "|".join(_WORDS)
# The word ends its line: 'Verdict: right or wrong?' decides nothing.
_VERDICT = re.compile(rf"\bverdict\b\W*\b({_WORD})\b[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
_BARE = re.compile(rf"\W*({_WORD})\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Verification:
    """The task of a verifier: its questions are solutions, its answers "right" and "wrong".

    Args:
        template: text of a question; {prompt} and {completion} stand for those of the solution.
        one_line: whether a judgement ends with its line.
    """

    #: A judgement is read as text, in one pass: it needs no worker process.
    in_process: ClassVar[bool] = True

    template: str
    one_line: bool = False

    def question(self, record: Record, number: int) -> Question:
        """The question whether a solution is right.

        Args:
            record: the solution; its reward tells whether it is right.
            number: of the solution, which becomes the group of its judgements.
        """
        # In one pass, so that {prompt} in the text of a solution stays.
        parts = {"{prompt}": record.prompt, "{completion}": record.completion.rstrip()}
        text = re.sub(r"\{prompt\}|\{completion\}", lambda m: parts[m.group()], self.template)
        return Question(number, text, text, {"right": record.reward > 0})

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        """The verdict of a judgement: "right", "wrong", or None if it gives none, or was cut.

        The last line that says "Verdict: right" (correct, yes) or "Verdict: wrong" (incorrect, no), or a
        judgement that is nothing but the word.
        """
        if finish_reason != "stop":
            return None
        bare = _BARE.fullmatch(completion)
        said = [bare.group(1)] if bare else _VERDICT.findall(completion)
        return _WORDS[said[-1].lower()] if said else None

    def canonical(self, answer: str) -> str:
        """The verdict."""
        return answer

    def reward(self, answer: str | None, question: Question) -> float:
        """+1 for the right verdict, -1 for the wrong one or none."""
        if answer is None:
            return -1.0
        return 1.0 if (answer == "right") == question.entry["right"] else -1.0


@dataclass(frozen=True)
class VerifierFigures:
    """How accurate judgements are; shares in [0, 1].

    Args:
        solutions: number of judged solutions.
        judgements: number of judgements.
        accuracy: judgements with the right verdict; one that cannot be parsed has none.
        accuracy_on_right: the same among judgements of right solutions; None if there are none.
        accuracy_on_wrong: the same among judgements of wrong solutions.
        unparsable_share: judgements without a verdict.
    """

    solutions: int
    judgements: int
    accuracy: float
    accuracy_on_right: float | None
    accuracy_on_wrong: float | None
    unparsable_share: float

    def __str__(self) -> str:
        """The figures as a line of text."""
        parts = [
            f"{100 * share:.1f} % of {name} solutions"
            for name, share in (
                ("right", self.accuracy_on_right),
                ("wrong", self.accuracy_on_wrong),
            )
            if share is not None
        ]
        return (
            f"verifier {100 * self.accuracy:5.1f} % right verdicts ({', '.join(parts)}), unparsable "
            f"{100 * self.unparsable_share:.1f} %, {self.judgements} judgements of {self.solutions} "
            "solutions"
        )


@dataclass(frozen=True)
class WeightedAccuracy:
    """Self-consistency without and with a verifier, of N answers to each of Q questions.

    Args:
        questions: Q.
        samples: N.
        votes: K.
        pass_at_1: share of right answers.
        maj_at_k: accuracy of the majority of K of the N answers, as in ``SampledAccuracy``.
        maj_at_k_error: its standard error sqrt(K V / (N - K)); None for K = N or one draw.
        weighted_at_k: accuracy of the answer whose scores have the largest sum, in the same draws.
        weighted_at_k_error: its standard error.
    """

    questions: int
    samples: int
    votes: int
    pass_at_1: float
    maj_at_k: float
    maj_at_k_error: float | None
    weighted_at_k: float
    weighted_at_k_error: float | None

    def __str__(self) -> str:
        """The figures as lines of text."""
        errors = [
            "" if error is None else f" +- {100 * error:.1f}"
            for error in (self.maj_at_k_error, self.weighted_at_k_error)
        ]
        return (
            f"{self.questions} questions, {self.samples} answer(s) each\n"
            f"pass@1   {100 * self.pass_at_1:5.1f} %\n"
            f"maj@{self.votes:<4} {100 * self.maj_at_k:5.1f} %{errors[0]}\n"
            f"weighted {100 * self.weighted_at_k:5.1f} %{errors[1]}"
        )


def verifier_figures(judgements: Sequence[Record]) -> VerifierFigures:
    """How good judgements are.

    Args:
        judgements: records of ``run_verify`` or of ``run_vote``.

    Raises:
        RecordError: if a record judges nothing.
        ValueError: if there are no records.
    """
    if not judgements:
        raise ValueError("judgements: got none; expected at least one")
    right: dict[bool, list[bool]] = {True: [], False: []}
    solutions = set()
    for i, record in enumerate(judgements):
        if record.judged is None:
            raise RecordError(
                f"record {i}, field 'judged': missing; expected a judgement, as topr verify writes"
            )
        right[record.judged.right].append(record.reward > 0)
        solutions.add(record.judged.record)
    shares = {kind: statistics.fmean(of) if of else None for kind, of in right.items()}
    return VerifierFigures(
        solutions=len(solutions),
        judgements=len(judgements),
        accuracy=sum(map(sum, right.values())) / len(judgements),
        accuracy_on_right=shares[True],
        accuracy_on_wrong=shares[False],
        unparsable_share=sum(not record.valid for record in judgements) / len(judgements),
    )


def weighted_accuracy(
    records: Sequence[Record],
    scores: Sequence[float],
    task: Judge,
    questions: Sequence[Question],
    *,
    votes: int,
    draws: int,
    seed: int,
    judged: Sequence[Verdict] | None = None,
) -> WeightedAccuracy:
    """Works out self-consistency of sampled answers, plain and weighted by a verifier's scores.

    Both vote in the same draws; how, and who wins a tie, see ``weighted_majority``.

    Args:
        records: Q * N answers, those of a question together, in the order of ``questions``.
        scores: of each answer, 0 for the worst; whole numbers have exact sums.
        task: parses, compares and scores the answers.
        questions: Q questions.
        votes: K, in 1..N.
        draws: how often K of the N answers are drawn.
        seed: of the draws.
        judged: the verdict on each record, where they are known; else they are judged.

    Raises:
        ValueError: if ``records`` are not N for each question, there is not one score, and one of
            ``judged``, for each, or ``votes`` is not in 1..N.
        ScoringError: if the answers cannot be judged.
    """
    if len(scores) != len(records):
        raise ValueError(f"scores: got {len(scores)}; expected one per answer, {len(records)}")
    answers = judged_answers(records, task, questions, votes, judged)
    samples = len(answers[0])
    accuracies = {}
    for name, weights in (("plain", [1.0] * len(records)), ("weighted", list(scores))):
        rows = [
            [(form, right, weights[i * samples + j]) for j, (form, right) in enumerate(row)]
            for i, row in enumerate(answers)
        ]
        accuracies[name] = weighted_majority(rows, votes=votes, draws=draws, seed=seed)
    return WeightedAccuracy(
        questions=len(questions),
        samples=samples,
        votes=votes,
        pass_at_1=statistics.fmean(right for row in answers for _, right in row),
        maj_at_k=accuracies["plain"][0],
        maj_at_k_error=accuracies["plain"][1],
        weighted_at_k=accuracies["weighted"][0],
        weighted_at_k_error=accuracies["weighted"][1],
    )


def verifier_scores(judgements: Sequence[Record], count: int) -> list[int]:
    """The score of each of ``count`` solutions: how many of its judgements say that it is right.

    A judgement that cannot be parsed does not count. A solution that was not judged scores 0.

    Raises:
        RecordError: if a record judges none of the solutions.
    """
    scores = [0] * count
    for i, record in enumerate(judgements):
        if record.judged is None or record.judged.record >= count:
            raise RecordError(
                f"record {i}, field 'judged': got {record.judged}; expected one of {count} solutions"
            )
        # Its verdict was "right" if it was rewarded on a right solution, or not rewarded on a wrong one.
        right_verdict = record.reward > 0
        scores[record.judged.record] += bool(record.valid) and (
            right_verdict == record.judged.right
        )
    return scores


def choose_solutions(records: Sequence[Record], settings: VerifySettings) -> list[Record]:
    """The solutions to judge, as many as the settings say; ``judged`` holds their numbers.

    Raises:
        RecordError: if a record is a judgement itself.
    """
    chosen = _numbered(records)
    if settings.solutions:
        # Its own stream of random numbers: the draw of the share below uses the seed itself.
        draw = random.Random(f"{settings.seed}/solutions")
        groups: dict[int, list[Record]] = {}
        for record in chosen:
            groups.setdefault(record.group, []).append(record)
        kept = {
            id(record)
            for group in groups.values()
            for record in draw.sample(group, min(settings.solutions, len(group)))
        }
        chosen = [record for record in chosen if id(record) in kept]
    if settings.right_share:
        chosen = to_positive_share(chosen, settings.right_share, settings.seed)
    return chosen


def answers_to_judge(
    records: Sequence[Record], task: Judge, questions: Sequence[Question], name: str
) -> tuple[list[Record], list[Verdict]]:
    """The answers that vote, with their numbers in ``judged``: those that can be parsed.

    And the verdicts on all of them.

    Args:
        records: N answers to each question, those of a question together.
        task: parses them.
        questions: the held-out questions.
        name: of the records file, for messages.

    Raises:
        RecordError: if they are not answers to these questions.
    """
    samples, rest = divmod(len(records), len(questions))
    if rest:
        raise RecordError(
            f"{name}: holds {len(records)} answers to {len(questions)} questions; expected equally many "
            "to each, as topr evaluate samples them; give its held_out"
        )
    numbered = _numbered(records)
    for i, record in enumerate(numbered):
        question = questions[i // samples]
        if (record.group, record.prompt) != (question.group, question.prompt):
            raise RecordError(
                f"{name}, record {i}, field 'prompt': is not that of held-out question "
                f"{question.group}; give the task, question_seed and held_out of topr evaluate"
            )
    verdicts = judge_records(task, records, questions)
    voting = [
        r for r, verdict in zip(numbered, verdicts, strict=True) if verdict.answer is not None
    ]
    return voting, verdicts


def _numbered(records: Sequence[Record]) -> list[Record]:
    for i, record in enumerate(records):
        if record.judged is not None:
            raise RecordError(
                f"record {i}, field 'judged': got a judgement; expected solutions, as topr generate and "
                "topr evaluate write them"
            )
        if record.images:
            raise RecordError(
                f"record {i}, field 'images': has {len(record.images)}, which a verifier is not shown; "
                "leave such records out of verify and vote"
            )
    return [
        dataclasses.replace(record, judged=Judged(i, record.group, record.reward > 0))
        for i, record in enumerate(records)
    ]
