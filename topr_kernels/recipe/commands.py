"""The steps of the pipeline on files: generate, score, curate, train, evaluate. Each resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from topr_kernels.hf.signature import positions
from topr_kernels.recipe.curate import as_text, curate, figures, warn_if_none_right
from topr_kernels.recipe.files import atomic_folder
from topr_kernels.recipe.manifests import manifest_of, manifest_path
from topr_kernels.recipe.models import (
    LoadedModel,
    Models,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from topr_kernels.recipe.options import Options, SettingsError, model_key, naming
from topr_kernels.recipe.processes import current
from topr_kernels.recipe.record_checks import (
    check_positions,
    check_processor,
    check_sources,
    check_tokens,
)
from topr_kernels.recipe.records import (
    Record,
    RecordError,
    check_suffix,
    read_records,
    write_records,
)
from topr_kernels.recipe.sampling import (
    own_share,
    refuse_broken_reward,
    said_problems,
    sample_task,
    with_backend,
)
from topr_kernels.recipe.score import score
from topr_kernels.recipe.scoring import Verdict, count_problems
from topr_kernels.recipe.server import server_facts
from topr_kernels.recipe.settings import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    ScoreSettings,
    TrainCommandSettings,
)
from topr_kernels.recipe.steps import Step, run_step
from topr_kernels.recipe.task_files import find_tasks, questions_of, scorer, task_inputs
from topr_kernels.recipe.train import TrainSettings, train, trainable_fields
from topr_kernels.recipe.trained_on import check_unseen, with_images, write_trained_on
from topr_kernels.recipe.vllm_backend import engine_facts
from topr_kernels.recipe.voting import sampled_accuracy


def run_generate(
    settings: GenerateSettings, out: Path, *, models: Models | None = None
) -> dict[str, Any]:
    """Samples and rewards answers to the training questions.

    Args:
        settings: see ``GenerateSettings``.
        out: records file to write (``.parquet`` or ``.jsonl``); the manifest goes beside it.
        models: loads the model; give the same to the next step.

    Returns:
        The manifest; its "figures" say what the records are like.

    Raises:
        SettingsError: if the model or the questions cannot be had, or ``out`` is of other settings.
        FileError, RecordError: if a file is damaged.
    """
    settings = with_backend(settings)
    step = generate_step(settings, out)
    task = find_tasks(settings)[0]
    kept = models or Models()

    def sample(partial: Path, **share: Any) -> list[Record]:
        questions = questions_of(settings, settings.questions)[0]
        return sample_task(
            settings, task, questions, settings.samples, kept, partial, "generate", **share
        )

    def compute(partial: Path) -> dict[str, Any]:
        judged: list[Verdict] = []
        records = sample(partial, judged=judged)
        refuse_broken_reward(settings.reward, records, judged, partial)
        write_records(step.draft(out), records)
        sampled = figures(records)
        print(sampled)
        warn_if_none_right(records, out.name, count_problems(judged).total())
        return dataclasses.asdict(sampled) | said_problems(judged) | server_facts(partial)

    share = functools.partial(sample, **own_share())
    return run_step(step, compute, share=share)


def generate_step(settings: GenerateSettings, out: Path) -> Step:
    """The step of ``run_generate``.

    Args:
        settings: with their backend resolved (``with_backend``).
        out: records file to write.

    Raises:
        RecordError: if ``out`` has another suffix.
    """
    check_suffix(out, "out")
    inputs = model_input(settings.model) | task_inputs(settings)
    plan = plain_settings(settings) | scorer(settings)
    return Step("generate", manifest_path(out), plan, inputs, [out])


def run_score(
    settings: ScoreSettings, records: Path, out: Path, *, models: Models | None = None
) -> dict[str, Any]:
    """Scores log mu with the kernel that training uses.

    Args:
        settings: see ``ScoreSettings``; the model is the one that sampled.
        records: records file to read.
        out: records file to write.
        models: as in ``run_generate``.

    Raises:
        RecordError: naming the record that another model or tokenizer sampled, or whose sampler was
            not the full softmax.
        SettingsError, FileError: as ``run_generate``.
    """
    step = score_step(settings, records, out)
    kept = models or Models()

    def scored_records(partial: Path, **share: Any) -> list[Record]:
        to_score = read_nonempty(records)
        loaded = kept.get(settings.model)
        weights = weights_fingerprint(loaded.model)
        check_tokens(to_score, loaded.vocabulary, tokenizer_fingerprint(loaded.tokenizer))
        check_positions(to_score, positions(loaded.model))
        check_processor(to_score, loaded.processor, loaded.no_processor)
        for i, record in enumerate(to_score):
            if record.sampling.weights not in ("", weights):
                raise RecordError(
                    f"{records.name}, record {i}, field 'sampling.weights': got "
                    f"{record.sampling.weights!r} ({record.sampling.model}), but --model has "
                    f"{weights!r}: mu is the policy that sampled; give the model that did"
                )
        with naming(f"--model {settings.model}: scoring failed", "--batch-size"):
            return score(
                loaded.model,
                to_score,
                pad_token_id=loaded.tokenizer.pad_token_id,
                batch_size=settings.batch_size,
                shards=partial / "parts",
                processor=loaded.processor,
                **share,
            )

    def compute(partial: Path) -> dict[str, Any]:
        scored = scored_records(partial)
        write_records(step.draft(out), scored)
        tokens = sum(record.length for record in scored)
        log_prob_sum = sum(sum(record.behavior_log_prob or ()) for record in scored)
        score_figures = {"records": len(scored), "mean_log_prob": log_prob_sum / max(1, tokens)}
        # The baseline that curate chose is passed on to the training, which reads these records.
        baseline = noted_baseline(records)
        return score_figures if baseline is None else score_figures | {"baseline": baseline}

    share = functools.partial(scored_records, **own_share())
    return run_step(step, compute, share=share)


def score_step(settings: ScoreSettings, records: Path, out: Path) -> Step:
    """The step of ``run_score``.

    Raises:
        RecordError: if a file has another suffix.
    """
    return records_step("score", plain_settings(settings, "seed"), settings.model, records, out)


def run_curate(settings: CurateSettings, records: Path, out: Path) -> dict[str, Any]:
    """Chooses the records to train on; its manifest holds the baseline and the figures.

    Args:
        settings: see ``CurateSettings``.
        records: records file to read.
        out: records file to write.

    Raises:
        RecordError, SettingsError: as ``curate``; RecordError if mu comes from several sources.
        FileError: if a file is damaged.
    """
    step = curate_step(settings, records, out)

    def compute(partial: Path) -> dict[str, Any]:
        candidates = read_nonempty(records)
        check_sources(candidates)
        warn_if_none_right(candidates, records.name)
        chosen = curate(candidates, settings, seed=settings.seed)
        write_records(step.draft(out), chosen.records)
        print(as_text(chosen.before, chosen.after))
        return {
            "baseline": chosen.baseline,
            "before": dataclasses.asdict(chosen.before),
            "after": dataclasses.asdict(chosen.after),
        }

    return run_step(step, compute)


def curate_step(settings: CurateSettings, records: Path, out: Path) -> Step:
    """The step of ``run_curate``.

    Raises:
        RecordError: if a file has another suffix.
    """
    return records_step("curate", plain_settings(settings), "", records, out)


def run_train(
    settings: TrainCommandSettings, records: Path, out: Path, *, models: Models | None = None
) -> dict[str, Any]:
    """Trains a model on scored records and saves it as a folder.

    Args:
        settings: see ``TrainCommandSettings``.
        records: scored records.
        out: folder of the trained model and its tokenizer; the manifest, with the history of the
            training, goes beside it.
        models: as in ``run_generate``; the model is taken out of it.

    Raises:
        RecordError: as ``train``.
        SettingsError, FileError: as ``run_generate``.
    """
    processes = current().count
    check_training_processes(settings.batch_size)
    settings = dataclasses.replace(settings, baseline=find_baseline(settings, records))
    step = train_step(settings, records, out)

    # Cached: all processes train, and then the first one saves what it has trained.
    @functools.cache
    def trained(partial: Path) -> tuple[LoadedModel, list[Record], list[dict[str, float]]]:
        trained_on = read_nonempty(records)
        if current().rank == 0:
            print(f"train on {len(trained_on)} records, baseline {settings.baseline:+.3f}")
            warn_if_none_right(trained_on, records.name)
        # Before the model, which may take minutes to load.
        check_trainable(trained_on, settings, records.name)
        loaded = (models or Models()).take(settings.model)
        check_processor(trained_on, loaded.processor, loaded.no_processor)
        # In several processes an error here may be a consequence of another's, which ``share`` reports.
        alone = naming(f"--model {settings.model}: training failed", "--batch-size")
        with alone if processes == 1 else contextlib.nullcontext():
            history = train(
                loaded.model,
                loaded.reads,
                trained_on,
                TrainSettings(
                    limits=settings.limits,
                    ratio=settings.ratio,
                    baseline=settings.baseline or 0.0,
                    learning_rate=settings.lr,
                    batch_size=settings.batch_size,
                    epochs=settings.epochs,
                    seed=settings.seed,
                    save_steps=settings.save_steps,
                ),
                checkpoints=partial / "checkpoints",
            )
        return loaded, trained_on, history

    def compute(partial: Path) -> dict[str, Any]:
        loaded, trained_on, history = trained(partial)
        # A run that was killed after it had saved the model has left a draft.
        shutil.rmtree(step.draft(out), ignore_errors=True)
        with naming(f"{out}: saving failed"), atomic_folder(step.draft(out)) as temporary:
            loaded.model.save_pretrained(temporary)
            loaded.reads.save_pretrained(temporary)
            write_trained_on(temporary, trained_on, settings.model)
        train_figures = {
            "records": len(trained_on),
            "steps": len(history),
            "history": storable(history),
        }
        # Noted because sums over several processes round in another order.
        return train_figures | ({"processes": processes} if processes > 1 else {})

    return run_step(step, compute, share=trained, lockstep=True)


def check_trainable(records: Sequence[Record], settings: TrainCommandSettings, name: str) -> None:
    """Refuses records that cannot be trained on.

    Raises:
        RecordError: as ``trainable_fields``, with the name of their file.
    """
    try:
        trainable_fields(records, settings.limits, settings.baseline or 0.0, settings.ratio)
    except RecordError as error:
        raise RecordError(f"{name}, {error}") from None


def train_step(settings: TrainCommandSettings, records: Path, out: Path) -> Step:
    """The step of ``run_train``.

    Args:
        settings: with their baseline (``find_baseline``).
        records: scored records.
        out: folder of the trained model.

    Raises:
        RecordError: if ``records`` has another suffix.
    """
    check_suffix(records, "records")
    inputs = {"records": records, **model_input(settings.model)}
    return Step("train", manifest_path(out), plain_settings(settings), inputs, [out])


def run_evaluate(
    settings: EvaluateSettings, out: Path, *, models: Models | None = None
) -> dict[str, Any]:
    """Samples answers to the held-out questions and measures them.

    Args:
        settings: see ``EvaluateSettings``.
        out: ``.json`` file of the figures, which is the manifest; the answers go beside it, as records
            in a ``.parquet`` file of the same name.
        models: as in ``run_generate``.

    Raises:
        SettingsError: as ``run_generate``, or if the model was trained on held-out questions.
        FileError, RecordError: as ``run_generate``.
    """
    settings = with_backend(settings)
    step = evaluate_step(settings, out)
    answers = step.outputs[0]
    task = find_tasks(settings)[1]
    kept = models or Models()

    def sample(partial: Path, **share: Any) -> list[Record]:
        questions = questions_of(settings, 0)[1]
        return sample_task(
            settings, task, questions, settings.eval_samples, kept, partial, "evaluate", **share
        )

    def compute(partial: Path) -> dict[str, Any]:
        questions = questions_of(settings, 0)[1]
        judged: list[Verdict] = []
        records = sample(partial, judged=judged)
        refuse_broken_reward(settings.reward, records, judged, partial)
        write_records(step.draft(answers), records)
        accuracy = sampled_accuracy(
            records,
            task,
            questions,
            votes=settings.votes,
            draws=settings.draws,
            seed=settings.seed,
            judged=judged,
        )
        print(accuracy)
        warn_if_none_right(records, answers.name, count_problems(judged).total())
        return dataclasses.asdict(accuracy) | said_problems(judged) | server_facts(partial)

    share = functools.partial(sample, **own_share())
    return run_step(step, compute, share=share)


def evaluate_step(settings: EvaluateSettings, out: Path) -> Step:
    """The step of ``run_evaluate``.

    Args:
        settings: with their backend resolved (``with_backend``).
        out: ``.json`` file of the figures.

    Raises:
        SettingsError: if ``out`` has another suffix, or the model was trained on held-out questions.
    """
    check_json(out)
    held_out = questions_of(settings, 0)[1]
    check_unseen(settings.model, [with_images(q.prompt, q.images) for q in held_out])
    inputs = model_input(settings.model) | task_inputs(settings)
    plan = plain_settings(settings, "questions") | scorer(settings)
    return Step("evaluate", out, plan, inputs, [out.with_suffix(".parquet")])


def records_step(step: str, settings: dict[str, Any], model: str, records: Path, out: Path) -> Step:
    """A step that turns records into records.

    Args:
        step: name of the command.
        settings: as plain values.
        model: the model that it uses; "" for none.
        records: records file to read.
        out: records file to write.

    Raises:
        RecordError: if a file has another suffix.
    """
    check_suffix(records, "records")
    check_suffix(out, "out")
    inputs = {"records": records, **model_input(model)}
    return Step(step, manifest_path(out), settings, inputs, [out])


def check_json(out: Path) -> None:
    """Refuses a file name for figures without the suffix of JSON.

    Raises:
        SettingsError: if the suffix is not ``.json``.
    """
    if out.suffix != ".json":
        raise SettingsError(f"out: got {out.name!r}; expected a name that ends in .json")


def find_baseline(settings: TrainCommandSettings, records: Path) -> float:
    """The baseline of the settings; else the one in the manifest of the records; else 0."""
    if settings.baseline is not None:
        return settings.baseline
    return noted_baseline(records) or 0.0


def noted_baseline(records: Path) -> float | None:
    """The baseline that ``curate``, or ``score`` after it, left in the records' manifest; else None."""
    noted = (manifest_of(records) or {}).get("figures")
    value = noted.get("baseline") if isinstance(noted, Mapping) else None
    return None if value is None else float(value)


def read_nonempty(path: Path) -> list[Record]:
    """Reads records.

    Raises:
        RecordError: if there are none, or one is not valid.
    """
    records = read_records(path)
    if not records:
        raise RecordError(f"{path.name}: holds no records; expected at least one")
    return records


def model_input(model: str) -> dict[str, Path]:
    """The model as an input of a step, whose checksum is checked and noted, if it is a local folder."""
    return {"model": Path(model).resolve()} if model and Path(model).is_dir() else {}


def plain_settings(settings: Options, *without: str) -> dict[str, Any]:
    """Settings as plain values for a manifest, without paths of this machine."""
    values = {n: v for n, v in dataclasses.asdict(settings).items() if n not in without}
    for name in ("trust_scorer", "reward"):
        # Left out where they are not used, so that manifests from before they existed still match.
        if not values.get(name, "-"):
            del values[name]
    if "model" in values:
        values["model"] = model_key(values["model"])
    # A server that has moved is the same; what it is stands in the figures.
    values.pop("server", None)
    for name in ("task", "test_task"):
        kind, colon, file = str(values.get(name, "")).partition(":")
        if colon:
            values[name] = f"{kind}:{Path(file).name}"
    if "engine" in values:
        # A list, as JSON reads it back.
        values["engine"] = list(values["engine"])
    return values | engine_facts(values)


def storable(history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """A training log for JSON: no infinities, and no figures that differ between equal runs."""
    return [
        {
            name: value if math.isfinite(value) else None
            for name, value in entry.items()
            if "runtime" not in name and "per_second" not in name
        }
        for entry in history
    ]


def check_training_processes(batch_size: int) -> None:
    """Refuses to train in processes that would not train the model that one process would.

    Raises:
        SettingsError: if the processes cannot share a batch evenly, if they outnumber the GPUs, or if
            the launcher shards the model over them.
    """
    count = current().count
    if batch_size % count:
        raise SettingsError(
            f"batch_size: got {batch_size} with {count} processes; expected a multiple of them: each "
            "takes an equal part of every update"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    if count > 1 and gpus and here > gpus:
        raise SettingsError(
            f"processes: got {here} on a machine of {gpus} GPU(s); expected at most one for each GPU"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise SettingsError(
                f"processes: the launcher shards the model (ACCELERATE_USE_{name}), which this command "
                "does not save; launch without it, or train with topr_kernels.hf.TOPRTrainer in a "
                "script of your own"
            )
