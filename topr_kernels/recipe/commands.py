"""The steps of the pipeline on files: generate, score, curate, train, evaluate. Each resumes."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from topr_kernels.recipe.curate import as_text, curate, figures
from topr_kernels.recipe.files import atomic_folder
from topr_kernels.recipe.generate import Completion, generate
from topr_kernels.recipe.models import LoadedModel, load_model, weights_fingerprint
from topr_kernels.recipe.records import (
    Record,
    RecordError,
    check_sources,
    check_suffix,
    check_tokens,
    read_records,
    tokenizer_fingerprint,
    write_records,
)
from topr_kernels.recipe.score import score
from topr_kernels.recipe.settings import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    SamplerOptions,
    ScoreSettings,
    TrainCommandSettings,
)
from topr_kernels.recipe.steps import (
    Options,
    SettingsError,
    manifest_path,
    model_key,
    read_mapping,
    run_step,
)
from topr_kernels.recipe.task_files import find_tasks, questions_of, scorer, task_inputs
from topr_kernels.recipe.train import TrainSettings, train
from topr_kernels.recipe.vllm_backend import choose_backend, vllm_sampler
from topr_kernels.recipe.voting import sampled_accuracy

AnySampler = TypeVar("AnySampler", bound=SamplerOptions)


class Models:
    """The model that was loaded last, so that steps in a row load it once."""

    def __init__(self) -> None:
        self._source = ""
        self._loaded: LoadedModel | None = None

    def get(self, source: str) -> LoadedModel:
        """The model; loaded, if it is not the last one.

        Raises:
            SettingsError: if it cannot be loaded.
        """
        if self._loaded is None or self._source != source:
            # Before the next is loaded: two at a time may be more than the memory holds.
            self._loaded = None
            try:
                self._loaded = load_model(source)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                raise SettingsError(f"--model {source}: {error}") from error
            self._source = source
        return self._loaded

    def take(self, source: str) -> LoadedModel:
        """The model, for a caller that changes it."""
        loaded, self._loaded = self.get(source), None
        return loaded


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
    check_suffix(out)
    task = find_tasks(settings)[0]

    def compute(partial: Path) -> dict[str, Any]:
        questions = questions_of(settings, settings.questions)[0]
        records = _sample(
            settings, task, questions, settings.samples, models or Models(), partial, "generate"
        )
        write_records(out, records)
        return _figures(records)

    inputs = model_input(settings.model) | task_inputs(settings)
    plan = plain(settings) | scorer(settings)
    return run_step("generate", manifest_path(out), plan, inputs, [out], compute)


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
    check_suffix(out)

    def compute(partial: Path) -> dict[str, Any]:
        found = read_nonempty(records)
        loaded = (models or Models()).get(settings.model)
        weights = weights_fingerprint(loaded.model)
        check_tokens(found, _vocabulary(loaded), tokenizer_fingerprint(loaded.tokenizer))
        for i, record in enumerate(found):
            if record.sampling.weights not in ("", weights):
                raise RecordError(
                    f"{records.name}, record {i}, field 'sampling.weights': got "
                    f"{record.sampling.weights!r} ({record.sampling.model}), but --model has "
                    f"{weights!r}: mu is the policy that sampled; give the model that did"
                )
        scored = score(
            loaded.model,
            found,
            pad_token_id=loaded.tokenizer.pad_token_id,
            batch_size=settings.batch_size,
            shards=partial / "parts",
        )
        write_records(out, scored)
        tokens = sum(len(record.completion_token_ids) for record in scored)
        total = sum(sum(record.behavior_log_prob or ()) for record in scored)
        return {"records": len(scored), "mean_log_prob": total / max(1, tokens)}

    inputs = {"records": records, **model_input(settings.model)}
    return run_step("score", manifest_path(out), plain(settings, "seed"), inputs, [out], compute)


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
    check_suffix(out)

    def compute(partial: Path) -> dict[str, Any]:
        found = read_nonempty(records)
        check_sources(found)
        chosen = curate(found, settings, seed=settings.seed)
        write_records(out, chosen.records)
        print(as_text(chosen.before, chosen.after))
        return {
            "baseline": chosen.baseline,
            "before": dataclasses.asdict(chosen.before),
            "after": dataclasses.asdict(chosen.after),
        }

    return run_step(
        "curate", manifest_path(out), plain(settings), {"records": records}, [out], compute
    )


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
    settings = dataclasses.replace(settings, baseline=find_baseline(settings, records))

    def compute(partial: Path) -> dict[str, Any]:
        found = read_nonempty(records)
        loaded = (models or Models()).take(settings.model)
        history = train(
            loaded.model,
            loaded.tokenizer,
            found,
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
        # A run that was killed between the model and its manifest left a model.
        shutil.rmtree(out, ignore_errors=True)
        with atomic_folder(out) as temporary:
            loaded.model.save_pretrained(temporary)
            loaded.tokenizer.save_pretrained(temporary)
        return {"records": len(found), "steps": len(history), "history": storable(history)}

    inputs = {"records": records, **model_input(settings.model)}
    return run_step("train", manifest_path(out), plain(settings), inputs, [out], compute)


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
        SettingsError, FileError, RecordError: as ``run_generate``.
    """
    if out.suffix != ".json":
        raise SettingsError(f"out: got {out.name!r}; expected a name that ends in .json")
    settings = with_backend(settings)
    answers = out.with_suffix(".parquet")
    task = find_tasks(settings)[1]

    def compute(partial: Path) -> dict[str, Any]:
        questions = questions_of(settings, 0)[1]
        records = _sample(
            *(settings, task, questions, settings.eval_samples),
            *(models or Models(), partial, "evaluate"),
        )
        write_records(answers, records)
        accuracy = sampled_accuracy(
            records,
            task,
            questions,
            votes=settings.votes,
            draws=settings.draws,
            seed=settings.seed,
        )
        print(accuracy)
        return dataclasses.asdict(accuracy)

    inputs = model_input(settings.model) | task_inputs(settings)
    plan = plain(settings, "questions") | scorer(settings)
    return run_step("evaluate", out, plan, inputs, [answers], compute)


def with_backend(settings: AnySampler) -> AnySampler:
    """The settings with "auto" resolved, so that a resumed run cannot change what samples."""
    backend = choose_backend(settings.backend, settings.model)
    return dataclasses.replace(settings, backend=backend)


def find_baseline(settings: TrainCommandSettings, records: Path) -> float:
    """The baseline asked for; else the one that ``curate`` noted beside the records; else 0."""
    if settings.baseline is not None:
        return settings.baseline
    manifest = manifest_path(records)
    figures = read_mapping(manifest).get("figures") if manifest.exists() else None
    return float(figures.get("baseline", 0.0)) if isinstance(figures, Mapping) else 0.0


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
    """The model as an input that is checked and whose checksum is noted, if it is a local folder."""
    return {"model": Path(model).resolve()} if model and Path(model).is_dir() else {}


def plain(settings: Options, *without: str) -> dict[str, Any]:
    """Settings as plain values for a manifest, without paths of this machine."""
    values = {n: v for n, v in dataclasses.asdict(settings).items() if n not in without}
    if "model" in values:
        values["model"] = model_key(values["model"])
    for name in ("task", "test_task"):
        kind, colon, file = str(values.get(name, "")).partition(":")
        if colon:
            values[name] = f"{kind}:{Path(file).name}"
    return values


def storable(history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """A training log as JSON has it: no infinities, and nothing that differs between equal runs."""
    return [
        {
            name: value if math.isfinite(value) else None
            for name, value in entry.items()
            if "runtime" not in name and "per_second" not in name
        }
        for entry in history
    ]


def _sample(
    settings: SamplerOptions,
    task: Any,
    questions: list[Any],
    samples: int,
    models: Models,
    partial: Path,
    label: str,
) -> list[Record]:
    sampler: Callable[..., list[Completion]] | None = None
    if settings.backend == "vllm":
        loaded = models.take(settings.model)
        # vLLM takes nearly all of the GPU; here the model only tells its fingerprint and stop ids.
        loaded.model.to("cpu")
        sampler = vllm_sampler(settings.model)
    else:
        loaded = models.get(settings.model)
    return generate(
        loaded.model,
        loaded.tokenizer,
        task,
        questions,
        model_name=loaded.name,
        samples=samples,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.sample_batch,
        seed=settings.seed,
        temperature=settings.temperature,
        shards=partial / "parts",
        chat=settings.chat,
        weights=weights_fingerprint(loaded.model),
        sampler=sampler,
        label=label,
    )


def _figures(records: list[Record]) -> dict[str, Any]:
    return dataclasses.asdict(figures(records))


def _vocabulary(loaded: LoadedModel) -> int:
    return int(loaded.model.get_input_embeddings().weight.shape[0])
