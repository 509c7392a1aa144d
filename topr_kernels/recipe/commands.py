"""The steps of the pipeline on files: generate, score, curate, train, evaluate. Each resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch

from topr_kernels.recipe.curate import as_text, curate, figures, warn_if_none_right
from topr_kernels.recipe.files import atomic_folder, one_line
from topr_kernels.recipe.generate import Completion, generate
from topr_kernels.recipe.models import LoadedModel, load_model, weights_fingerprint
from topr_kernels.recipe.processes import current
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
from topr_kernels.recipe.server import ServerSampler, server_facts, server_url
from topr_kernels.recipe.settings import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    SamplerOptions,
    ScoreSettings,
    TrainCommandSettings,
    engine_settings,
)
from topr_kernels.recipe.steps import (
    Options,
    SettingsError,
    Step,
    manifest_of,
    manifest_path,
    model_key,
    naming,
    run_step,
)
from topr_kernels.recipe.task_files import find_tasks, questions_of, scorer, task_inputs
from topr_kernels.recipe.train import TrainSettings, train
from topr_kernels.recipe.trained_on import check_unseen, write_trained_on
from topr_kernels.recipe.vllm_backend import (
    choose_backend,
    engine_facts,
    vllm_sampler,
    with_engine,
)
from topr_kernels.recipe.voting import sampled_accuracy

AnySampler = TypeVar("AnySampler", bound=SamplerOptions)


Made = TypeVar("Made")


def named_model(source: str, load: Callable[[str], Made]) -> Made:
    """What is loaded of a model; what libraries raise about its files is theirs, and of any kind.

    Raises:
        SettingsError: naming the flag, if it cannot be loaded.
    """
    try:
        return load(source)
    except Exception as error:
        raise SettingsError(f"--model {source}: {one_line(error)}") from error


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
            self._loaded = named_model(source, load_model)
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
    step = generate_step(settings, out)
    task = find_tasks(settings)[0]
    kept = models or Models()

    def sample(partial: Path, **share: Any) -> list[Record]:
        questions = questions_of(settings, settings.questions)[0]
        return sample_task(
            settings, task, questions, settings.samples, kept, partial, "generate", **share
        )

    def compute(partial: Path) -> dict[str, Any]:
        problems: Counter[str] = Counter()
        records = sample(partial, problems=problems)
        write_records(step.draft(out), records)
        found = figures(records)
        print(found)
        warn_if_none_right(records, out.name)
        return dataclasses.asdict(found) | said_problems(problems) | server_facts(partial)

    share = functools.partial(sample, **own_share())
    return run_step(step, compute, share=share)


def generate_step(settings: GenerateSettings, out: Path) -> Step:
    """What ``run_generate`` is, of settings with their backend.

    Raises:
        RecordError: if ``out`` has another suffix.
    """
    check_suffix(out, "out")
    inputs = model_input(settings.model) | task_inputs(settings)
    plan = plain(settings) | scorer(settings)
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
        found = read_nonempty(records)
        loaded = kept.get(settings.model)
        weights = weights_fingerprint(loaded.model)
        check_tokens(found, _vocabulary(loaded), tokenizer_fingerprint(loaded.tokenizer))
        for i, record in enumerate(found):
            if record.sampling.weights not in ("", weights):
                raise RecordError(
                    f"{records.name}, record {i}, field 'sampling.weights': got "
                    f"{record.sampling.weights!r} ({record.sampling.model}), but --model has "
                    f"{weights!r}: mu is the policy that sampled; give the model that did"
                )
        with naming(f"--model {settings.model}: scoring failed", "--batch-size"):
            return score(
                loaded.model,
                found,
                pad_token_id=loaded.tokenizer.pad_token_id,
                batch_size=settings.batch_size,
                shards=partial / "parts",
                **share,
            )

    def compute(partial: Path) -> dict[str, Any]:
        scored = scored_records(partial)
        write_records(step.draft(out), scored)
        tokens = sum(len(record.completion_token_ids) for record in scored)
        total = sum(sum(record.behavior_log_prob or ()) for record in scored)
        found = {"records": len(scored), "mean_log_prob": total / max(1, tokens)}
        # What curate chose is for the training, which reads these records now.
        baseline = noted_baseline(records)
        return found if baseline is None else found | {"baseline": baseline}

    share = functools.partial(scored_records, **own_share())
    return run_step(step, compute, share=share)


def score_step(settings: ScoreSettings, records: Path, out: Path) -> Step:
    """What ``run_score`` is.

    Raises:
        RecordError: if a file has another suffix.
    """
    return records_step("score", plain(settings, "seed"), settings.model, records, out)


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
        found = read_nonempty(records)
        check_sources(found)
        warn_if_none_right(found, records.name)
        chosen = curate(found, settings, seed=settings.seed)
        write_records(step.draft(out), chosen.records)
        print(as_text(chosen.before, chosen.after))
        return {
            "baseline": chosen.baseline,
            "before": dataclasses.asdict(chosen.before),
            "after": dataclasses.asdict(chosen.after),
        }

    return run_step(step, compute)


def curate_step(settings: CurateSettings, records: Path, out: Path) -> Step:
    """What ``run_curate`` is.

    Raises:
        RecordError: if a file has another suffix.
    """
    return records_step("curate", plain(settings), "", records, out)


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

    # Once: of several processes all train, and then the first saves what it has trained.
    @functools.cache
    def trained(partial: Path) -> tuple[LoadedModel, list[Record], list[dict[str, float]]]:
        found = read_nonempty(records)
        if current().rank == 0:
            print(f"train on {len(found)} records, baseline {settings.baseline:+.3f}")
        loaded = (models or Models()).take(settings.model)
        # Of several processes what fails here may be a consequence: ``share`` tells which.
        alone = naming(f"--model {settings.model}: training failed", "--batch-size")
        with alone if processes == 1 else contextlib.nullcontext():
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
        return loaded, found, history

    def compute(partial: Path) -> dict[str, Any]:
        loaded, trained_on, history = trained(partial)
        # A run that was killed after it had saved the model left it there.
        shutil.rmtree(step.draft(out), ignore_errors=True)
        with naming(f"{out}: saving failed"), atomic_folder(step.draft(out)) as temporary:
            loaded.model.save_pretrained(temporary)
            loaded.tokenizer.save_pretrained(temporary)
            write_trained_on(temporary, trained_on, settings.model)
        found = {"records": len(trained_on), "steps": len(history), "history": storable(history)}
        # Sums over several processes are rounded in another order.
        return found | ({"processes": processes} if processes > 1 else {})

    return run_step(step, compute, share=trained, lockstep=True)


def train_step(settings: TrainCommandSettings, records: Path, out: Path) -> Step:
    """What ``run_train`` is, of settings with their baseline.

    Raises:
        RecordError: if ``records`` has another suffix.
    """
    check_suffix(records, "records")
    inputs = {"records": records, **model_input(settings.model)}
    return Step("train", manifest_path(out), plain(settings), inputs, [out])


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
        problems: Counter[str] = Counter()
        records = sample(partial, problems=problems)
        write_records(step.draft(answers), records)
        accuracy = sampled_accuracy(
            records,
            task,
            questions,
            votes=settings.votes,
            draws=settings.draws,
            seed=settings.seed,
        )
        print(accuracy)
        warn_if_none_right(records, answers.name)
        return dataclasses.asdict(accuracy) | said_problems(problems) | server_facts(partial)

    share = functools.partial(sample, **own_share())
    return run_step(step, compute, share=share)


def evaluate_step(settings: EvaluateSettings, out: Path) -> Step:
    """What ``run_evaluate`` is, of settings with their backend.

    Raises:
        SettingsError: if ``out`` has another suffix, or the model was trained on held-out questions.
    """
    check_json(out)
    check_unseen(settings.model, [q.prompt for q in questions_of(settings, 0)[1]])
    inputs = model_input(settings.model) | task_inputs(settings)
    plan = plain(settings, "questions") | scorer(settings)
    return Step("evaluate", out, plan, inputs, [out.with_suffix(".parquet")])


def records_step(step: str, settings: dict[str, Any], model: str, records: Path, out: Path) -> Step:
    """A step that makes records of records.

    Args:
        step: name of the command.
        settings: as plain values.
        model: that works on them; "" for none.
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
    """Refuses a name that is not of figures.

    Raises:
        SettingsError: if the suffix is not ``.json``.
    """
    if out.suffix != ".json":
        raise SettingsError(f"out: got {out.name!r}; expected a name that ends in .json")


def with_backend(settings: AnySampler) -> AnySampler:
    """The settings with "auto" resolved, so that a resumed run cannot change what samples.

    Raises:
        SettingsError: as ``choose_backend`` and ``with_engine``; or if vLLM or a server is asked for by
            several processes, or the URL of the server is none.
    """
    backend = choose_backend(settings.backend, settings.model)
    if settings.server:
        server_url(settings.server)
    if backend != "hf" and current().count > 1:
        if settings.backend == backend:
            raise SettingsError(
                f"backend: got {backend!r} in {current().count} processes; expected one process, or 'hf'"
            )
        backend = "hf"
    return with_engine(dataclasses.replace(settings, backend=backend))


def find_baseline(settings: TrainCommandSettings, records: Path) -> float:
    """The baseline asked for; else the one that ``curate`` noted beside the records; else 0."""
    if settings.baseline is not None:
        return settings.baseline
    return noted_baseline(records) or 0.0


def noted_baseline(records: Path) -> float | None:
    """The baseline that ``curate``, or ``score`` after it, noted beside records; else None."""
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
    """The model as an input that is checked and whose checksum is noted, if it is a local folder."""
    return {"model": Path(model).resolve()} if model and Path(model).is_dir() else {}


def plain(settings: Options, *without: str) -> dict[str, Any]:
    """Settings as plain values for a manifest, without paths of this machine."""
    values = {n: v for n, v in dataclasses.asdict(settings).items() if n not in without}
    for name in ("trust_scorer", "reward"):
        # Manifests of runs without them stay as they were.
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
        # As JSON gives it back.
        values["engine"] = list(values["engine"])
    return values | engine_facts(values)


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


def own_share() -> dict[str, Any]:
    """What ``generate`` and ``score`` take to do this process's share only."""
    return {"take": current().take, "progress": current().rank == 0}


def check_training_processes(batch_size: int) -> None:
    """Refuses to train in processes that would not give the model of one.

    Raises:
        SettingsError: if they do not share a batch evenly or are more than the GPUs, or the launcher
            shards the model over them.
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


def sample_task(
    settings: SamplerOptions,
    task: Any,
    questions: list[Any],
    samples: int,
    models: Models,
    partial: Path,
    label: str,
    take: Callable[[int], Iterable[int]] = range,
    progress: bool = True,
    problems: Counter[str] | None = None,
) -> list[Record]:
    """Samples answers to questions of a task as the settings say, in parts under ``partial``.

    Args:
        settings: the model, and how it is sampled.
        task: as in ``generate``.
        questions: as in ``generate``.
        samples: answers to each question.
        models: loads the model.
        partial: folder of an unfinished step.
        label: named on the progress bar.
        take: as in ``generate``.
        progress: as in ``generate``.
        problems: as in ``generate``.
    """
    engine = engine_settings(settings.engine)
    what = f"--model {settings.model}, --backend {settings.backend}: sampling failed"
    with naming(what, "--sample-batch"), ExitStack() as held:
        sampler: Callable[..., list[Completion]] | None = None
        positions = engine.get("max_model_len")
        if settings.backend == "vllm":
            loaded = models.take(settings.model)
            # vLLM takes nearly all of the GPU; here the model only tells its fingerprint and stop ids.
            loaded.model.to("cpu")
            sampler = held.enter_context(vllm_sampler(settings.model, engine))
        else:
            loaded = models.get(settings.model)
        check_chat(settings, loaded.tokenizer)
        if settings.backend == "server":
            server = ServerSampler(settings.server, settings.model, loaded, partial)
            sampler, positions = server, server.positions
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
            dtype=engine.get("dtype"),
            positions=positions,
            label=label,
            take=take,
            progress=progress,
            problems=problems,
        )


def said_problems(problems: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """For the figures: how many answers have no verdict, by cause; says so, if there are any."""
    if problems:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(problems.items()))
        print(f"answers whose scorer failed, rewarded -1: {causes}")
    return {"scorer_problems": dict(sorted(problems.items()))}


def check_chat(settings: SamplerOptions, tokenizer: Any) -> None:
    """Refuses to ask through a chat template that is not there or fails, and warns of one with a clock.

    Raises:
        SettingsError: if it is asked for, and the tokenizer has none, or it cannot be filled in.
    """
    if not settings.chat:
        return
    name = model_key(settings.model)
    if not tokenizer.chat_template:
        raise SettingsError(
            f"chat: the tokenizer of the model {name!r} has no chat template; leave it out, or give a "
            "model that has one"
        )
    try:
        template = tokenizer.get_chat_template()
        _asked(tokenizer, template)
    except Exception as error:
        raise SettingsError(
            f"chat: the chat template of the model {name!r} fails: {one_line(error)}; mend it, or leave "
            "--chat out"
        ) from error
    if current().rank == 0 and _reads_the_clock(tokenizer, template):
        warnings.warn(
            f"chat: the chat template of the model {name!r} writes the date into every prompt, so the "
            "same command asks other prompts tomorrow, and a run continued then is of both; put a date "
            "in the place of strftime_now(...) in the template in the model's folder",
            stacklevel=2,
        )


def _reads_the_clock(tokenizer: Any, template: str) -> bool:
    """Whether a template that can be filled in asks its only clock, ``strftime_now``, for a prompt."""
    stopped = "{% macro strftime_now(format) %}{{ raise_exception('clock') }}{% endmacro %}"
    try:
        _asked(tokenizer, stopped + template)
    except Exception:
        return True
    return False


def _asked(tokenizer: Any, template: str) -> None:
    message = [{"role": "user", "content": "1 + 1 ="}]
    tokenizer.apply_chat_template(
        message, chat_template=template, add_generation_prompt=True, tokenize=False
    )


def _vocabulary(loaded: LoadedModel) -> int:
    return int(loaded.model.get_input_embeddings().weight.shape[0])
