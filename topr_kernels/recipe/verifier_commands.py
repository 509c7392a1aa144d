"""The commands of the verifier on files: ``topr verify`` and ``topr vote``. Each resumes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topr_kernels.recipe.commands import (
    check_json,
    model_input,
    plain_settings,
    read_nonempty,
    records_step,
)
from topr_kernels.recipe.curate import figures
from topr_kernels.recipe.models import Models
from topr_kernels.recipe.options import SettingsError, model_key
from topr_kernels.recipe.records import Record, check_suffix, write_records
from topr_kernels.recipe.sampling import own_share, said_problems, sample_task, with_backend
from topr_kernels.recipe.scoring import Verdict
from topr_kernels.recipe.server import server_facts
from topr_kernels.recipe.settings import JudgementOptions, VerifySettings, VoteSettings
from topr_kernels.recipe.steps import Step, run_step
from topr_kernels.recipe.task_files import find_tasks, questions_of, scorer, task_inputs
from topr_kernels.recipe.tasks import Question
from topr_kernels.recipe.trained_on import check_unseen, count_seen, with_images
from topr_kernels.recipe.verifier import (
    Verification,
    answers_to_judge,
    choose_solutions,
    verifier_figures,
    verifier_scores,
    weighted_accuracy,
)


def run_verify(
    settings: VerifySettings, records: Path, out: Path, *, models: Models | None = None
) -> dict[str, Any]:
    """Samples judgements of solutions and rewards them: +1 for a right verdict, else -1.

    Args:
        settings: see ``VerifySettings``.
        records: the solutions, as ``run_generate`` writes them.
        out: records file to write; the group of a judgement is the number of its solution in
            ``records``, and ``judged`` tells more of it.
        models: as in ``run_generate``.

    Returns:
        The manifest; its "figures" say how good the judgements are.

    Raises:
        RecordError: if a record is a judgement itself.
        SettingsError, FileError: as ``run_generate``.
    """
    settings = with_backend(settings)
    step = verify_step(settings, records, out)
    kept = models or Models()

    def sample(partial: Path, **share: Any) -> list[Record]:
        solutions = choose_solutions(read_nonempty(records), settings)
        return _judge(settings, solutions, settings.samples, kept, partial, "verify", **share)

    def compute(partial: Path) -> dict[str, Any]:
        judgements = sample(partial)
        write_records(step.draft(out), judgements)
        verifier = verifier_figures(judgements)
        print(verifier)
        return {
            **dataclasses.asdict(figures(judgements)),
            **dataclasses.asdict(verifier),
            **server_facts(partial),
        }

    share = functools.partial(sample, **own_share())
    return run_step(step, compute, share=share)


def verify_step(settings: VerifySettings, records: Path, out: Path) -> Step:
    """The step of ``run_verify``.

    Args:
        settings: with their backend resolved (``with_backend``).
        records: the solutions.
        out: records file to write.

    Raises:
        RecordError: if a file has another suffix.
    """
    return records_step("verify", plain_settings(settings), settings.model, records, out)


def run_vote(
    settings: VoteSettings, records: Path, out: Path, *, models: Models | None = None
) -> dict[str, Any]:
    """Has a verifier judge sampled answers, and measures self-consistency with and without it.

    An answer's score is the number of its judgements that say it is right. Answers that cannot be parsed
    do not vote, so they are not judged.

    Args:
        settings: see ``VoteSettings``; the model is the verifier.
        records: the answers, as ``run_evaluate`` writes them.
        out: ``.json`` file of the figures, which is the manifest; the judgements go beside it, as
            records in a ``.parquet`` file of the same name.
        models: as in ``run_generate``.

    Raises:
        RecordError: if the records are not answers to the held-out questions.
        SettingsError, FileError: as ``run_generate``.
    """
    settings = with_backend(settings)
    step = vote_step(settings, records, out)
    written = step.outputs[0]
    task = find_tasks(settings)[1]
    kept = models or Models()

    # Once: judging takes its time.
    read = functools.cache(lambda: read_answers(settings, records))

    def sample(partial: Path, **share: Any) -> list[Record]:
        voting = read()[2]
        if not voting:
            return []
        return _judge(settings, voting, settings.judgements, kept, partial, "vote", **share)

    def compute(partial: Path) -> dict[str, Any]:
        answers, questions, _, verdicts = read()
        judgements = sample(partial)
        write_records(step.draft(written), judgements)
        accuracy = weighted_accuracy(
            answers,
            verifier_scores(judgements, len(answers)),
            task,
            questions,
            votes=settings.votes,
            draws=settings.draws,
            seed=settings.seed,
            judged=verdicts,
        )
        print(accuracy)
        # Where no answer can be parsed there is nothing to judge.
        verifier = verifier_figures(judgements) if judgements else None
        if verifier is not None:
            print(verifier)
        return {
            **dataclasses.asdict(accuracy),
            "verifier": verifier and dataclasses.asdict(verifier),
            **said_problems(verdicts),
            **server_facts(partial),
        }

    share = functools.partial(sample, **own_share())
    return run_step(step, compute, share=share)


def vote_step(settings: VoteSettings, records: Path, out: Path) -> Step:
    """The step of ``run_vote``.

    Args:
        settings: with their backend resolved (``with_backend``).
        records: the answers.
        out: ``.json`` file of the figures.

    Raises:
        RecordError, SettingsError: if a file has another suffix, or the verifier was trained to answer
            held-out questions.
    """
    check_suffix(records, "records")
    check_json(out)
    held_out = questions_of(settings, 0)[1]
    check_unseen(settings.model, [with_images(q.prompt, q.images) for q in held_out])
    inputs = {"records": records, **model_input(settings.model), **task_inputs(settings)}
    plan = plain_settings(settings, "questions") | scorer(settings)
    return Step("vote", out, plan, inputs, [out.with_suffix(".parquet")])


def read_answers(
    settings: VoteSettings, records: Path
) -> tuple[list[Record], list[Question], list[Record], list[Verdict]]:
    """The answers, their questions, those of the answers that vote, and the verdicts on all.

    Raises:
        RecordError: as ``answers_to_judge``.
        SettingsError: if a question has fewer answers than votes, or the verifier was trained to
            judge some of them.
    """
    answers = read_nonempty(records)
    questions = questions_of(settings, 0)[1]
    task = find_tasks(settings)[1]
    voting, verdicts = answers_to_judge(answers, task, questions, records.name)
    samples = len(answers) // len(questions)
    if settings.votes > samples:
        raise SettingsError(
            f"votes: got {settings.votes}; expected at most {samples}, the answers to a question in "
            f"{records.name}"
        )
    prompts = [Verification(settings.template).question(r, i).prompt for i, r in enumerate(voting)]
    seen = count_seen(settings.model, prompts)
    if seen:
        raise SettingsError(
            f"records: {seen} of the {len(voting)} answers are among those that the model "
            f"{model_key(settings.model)!r} was trained to judge; give answers to other questions than "
            "topr verify was given"
        )
    return answers, questions, voting, verdicts


def _judge(
    settings: JudgementOptions,
    solutions: Sequence[Record],
    samples: int,
    models: Models,
    partial: Path,
    label: str,
    **share: Any,
) -> list[Record]:
    """Judgements of numbered solutions, ``samples`` of each, in their order."""
    task = Verification(settings.template, settings.one_line)
    by_number = {record.judged.record: record for record in solutions if record.judged is not None}
    questions = [task.question(record, number) for number, record in by_number.items()]
    records = sample_task(settings, task, questions, samples, models, partial, label, **share)
    return [dataclasses.replace(r, judged=by_number[r.group].judged) for r in records]
