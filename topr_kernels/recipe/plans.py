"""``--dry-run``: what the commands would do and cost. Nothing is written."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from topr_kernels.recipe.commands import (
    check_trainable,
    curate_step,
    evaluate_step,
    find_baseline,
    generate_step,
    read_nonempty,
    score_step,
    train_step,
)
from topr_kernels.recipe.curate import as_text, curate
from topr_kernels.recipe.iterate import check_folder
from topr_kernels.recipe.manifests import partial_path
from topr_kernels.recipe.models import LOADED_DTYPE, count_parameters, load_tokenizer, named_model
from topr_kernels.recipe.options import pick
from topr_kernels.recipe.record_checks import check_dtype, check_full_softmax, check_sources
from topr_kernels.recipe.records import Record
from topr_kernels.recipe.sampling import check_chat, with_backend
from topr_kernels.recipe.settings import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    IterateSettings,
    SamplerOptions,
    ScoreSettings,
    TrainCommandSettings,
    TrainingOptions,
    VerifySettings,
    VoteSettings,
)
from topr_kernels.recipe.steps import Step, state_of
from topr_kernels.recipe.task_files import questions_of
from topr_kernels.recipe.verifier import Verification, choose_solutions
from topr_kernels.recipe.verifier_commands import read_answers, verify_step, vote_step
from topr_kernels.recipe.vllm_backend import check_scorable

#: Bytes in a records file: of a token with its text, and of the rest of a record.
_TOKEN_BYTES, _RECORD_BYTES = 16, 200
#: Weights and AdamW's two moments; the next checkpoint is written before the last is deleted.
_CHECKPOINT = 2 * 3
_STATES = {
    "finished": "finished: nothing to do",
    "interrupted": "continues the run that was interrupted",
    "new": "starts anew",
}


def plan_generate(settings: GenerateSettings, out: Path) -> list[str]:
    """What ``run_generate`` would do."""
    settings = with_backend(settings)
    state = _state(generate_step(settings, out))
    questions = questions_of(settings, settings.questions)[0]
    lines = _sampling(settings, [q.prompt for q in questions], settings.samples)
    return [state, *lines, f"writes: {out}"]


def plan_score(settings: ScoreSettings, records: Path, out: Path) -> list[str]:
    """What ``run_score`` would do."""
    state = _state(score_step(settings, records, out))
    to_score = read_nonempty(records)
    check_full_softmax(to_score)
    check_dtype(to_score, LOADED_DTYPE)
    prompt, completion = _tokens(to_score)
    size = records.stat().st_size + 4 * completion
    return [
        state,
        f"forward passes: {len(to_score)} records, {prompt} prompt + {completion} completion tokens",
        f"writes: {out}, about {_bytes(size)}",
    ]


def plan_curate(settings: CurateSettings, records: Path, out: Path) -> list[str]:
    """What ``run_curate`` would keep."""
    state = _state(curate_step(settings, records, out))
    candidates = read_nonempty(records)
    check_sources(candidates)
    chosen = curate(candidates, settings, seed=settings.seed)
    return [
        state,
        as_text(chosen.before, chosen.after),
        f"baseline for the training: {chosen.baseline:+.3f}",
        f"writes: {out}, at most {_bytes(records.stat().st_size)}",
    ]


def plan_train(settings: TrainCommandSettings, records: Path, out: Path) -> list[str]:
    """What ``run_train`` would do."""
    settings = dataclasses.replace(settings, baseline=find_baseline(settings, records))
    state = _state(train_step(settings, records, out))
    train_on = read_nonempty(records)
    check_trainable(train_on, settings, records.name)
    prompt, completion = _tokens(train_on)
    return [
        state,
        *_training(settings, settings.model, len(train_on)),
        f"tokens per epoch: {prompt} of prompts + {completion} of completions",
        f"baseline: {settings.baseline:+.3f}",
        f"writes: {out}",
    ]


def plan_evaluate(settings: EvaluateSettings, out: Path) -> list[str]:
    """What ``run_evaluate`` would do."""
    settings = with_backend(settings)
    state = _state(evaluate_step(settings, out))
    questions = questions_of(settings, 0)[1]
    lines = _sampling(settings, [q.prompt for q in questions], settings.eval_samples)
    return [state, *lines, f"writes: {out}, {out.with_suffix('.parquet')}"]


def plan_verify(settings: VerifySettings, records: Path, out: Path) -> list[str]:
    """What ``run_verify`` would do."""
    settings = with_backend(settings)
    state = _state(verify_step(settings, records, out))
    solutions = choose_solutions(read_nonempty(records), settings)
    prompts = [
        Verification(settings.template).question(r, i).prompt for i, r in enumerate(solutions)
    ]
    right = sum(record.reward > 0 for record in solutions)
    return [
        state,
        f"solutions: {len(solutions)}, {right} of them right",
        *_sampling(settings, prompts, settings.samples),
        f"writes: {out}",
    ]


def plan_vote(settings: VoteSettings, records: Path, out: Path) -> list[str]:
    """What ``run_vote`` would do."""
    settings = with_backend(settings)
    state = _state(vote_step(settings, records, out))
    answers, questions, voting, _ = read_answers(settings, records)
    prompts = [Verification(settings.template).question(r, i).prompt for i, r in enumerate(voting)]
    return [
        state,
        f"answers: {len(answers)} to {len(questions)} questions, {len(voting)} of them can be parsed",
        *_sampling(settings, prompts, settings.judgements),
        f"writes: {out}, {out.with_suffix('.parquet')}",
    ]


def plan_iterate(settings: IterateSettings, out: Path) -> list[str]:
    """What ``run_iterate`` would do; curation may leave less to train on."""
    settings = with_backend(settings)
    check_scorable(settings)
    train, test = questions_of(settings, settings.questions)
    check_folder(settings, out)
    generating = pick(GenerateSettings, settings)
    evaluating = pick(EvaluateSettings, settings)
    kept = settings.questions * settings.samples
    kept = min(kept, settings.size) if settings.size else kept
    rounds = range(1, settings.iterations + 1)
    done = [i for i in rounds if (out / f"iteration-{i}" / "manifest.json").exists()]
    weights = _parameters(settings.model) * 4 * settings.iterations
    return [
        f"{settings.iterations} iterations, {len(done)} of them done; in each:",
        *(
            f"  generate: {x}"
            for x in _sampling(generating, [q.prompt for q in train], settings.samples)
        ),
        f"  score:    {settings.questions * settings.samples} records",
        f"  train:    at most {'; '.join(_training(settings, settings.model, kept))}",
        "and, before the first and in each:",
        *(
            f"  evaluate: {x}"
            for x in _sampling(evaluating, [q.prompt for q in test], settings.eval_samples)
        ),
        f"writes: {out}, of which {_bytes(weights)} trained models",
    ]


def _sampling(settings: SamplerOptions, prompts: list[str], samples: int) -> list[str]:
    count = len(prompts) * samples
    encode = named_model(settings.model, load_tokenizer)
    check_chat(settings, encode)
    tokens = sum(len(encode(prompt)["input_ids"]) for prompt in prompts) * samples
    new = count * settings.max_new_tokens
    text = sum(map(len, prompts)) * samples
    size = count * _RECORD_BYTES + text + (tokens + new) * _TOKEN_BYTES
    batches = math.ceil(count / settings.sample_batch)
    return [
        f"{count} samples ({len(prompts)} questions x {samples}) in {batches} batches; {tokens} prompt "
        f"tokens, at most {new} new ones; at most about {_bytes(size)} of records"
    ]


def _training(settings: TrainingOptions, model: str, records: int) -> list[str]:
    steps = math.ceil(records / settings.batch_size) * settings.epochs
    size = _parameters(model) * 4
    return [
        f"{steps} updates ({records} records, batches of {settings.batch_size}, {settings.epochs} "
        f"epoch(s)); {_bytes(size)} of trained model, and up to {_bytes(_CHECKPOINT * size)} of "
        "checkpoints while it trains"
    ]


def _state(step: Step) -> str:
    # Raises where the command would.
    state = state_of(step)
    parts = len(list(partial_path(step.manifest).glob("parts/*.parquet")))
    return _STATES[state] + (f" ({parts} parts done)" if state == "interrupted" and parts else "")


def _tokens(records: list[Record]) -> tuple[int, int]:
    prompt = sum(len(record.prompt_token_ids) for record in records)
    return prompt, sum(len(record.completion_token_ids) for record in records)


def _parameters(model: str) -> int:
    return named_model(model, count_parameters)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
