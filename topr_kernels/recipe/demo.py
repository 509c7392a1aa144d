"""The whole pipeline on one small model: evaluate, generate, score, train, evaluate, report."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from topr_kernels import (
    __version__,
    baseline_for_positive_share,
    effective_positive_share,
)
from topr_kernels.choices import BALANCES
from topr_kernels.recipe import report
from topr_kernels.recipe.curate import subsample_negatives
from topr_kernels.recipe.evaluate import Accuracy, Evaluation, evaluate
from topr_kernels.recipe.files import FileError, merged_folder, write_json
from topr_kernels.recipe.generate import generate
from topr_kernels.recipe.manifests import read_mapping, write_or_check_settings
from topr_kernels.recipe.models import LoadedModel, load_model, named_model
from topr_kernels.recipe.options import SettingsError, model_key, naming
from topr_kernels.recipe.records import Record, read_records, write_records
from topr_kernels.recipe.sampling import said_problems
from topr_kernels.recipe.score import max_log_ratio, score
from topr_kernels.recipe.scoring import Verdict
from topr_kernels.recipe.settings import MOST_SEED
from topr_kernels.recipe.steps import not_ours, on_error
from topr_kernels.recipe.tasks import ARITHMETIC, Task, held_out_split
from topr_kernels.recipe.train import TrainSettings, checkpoints_in, train
from topr_kernels.recipe.trained_on import write_trained_on

#: Scored batches whose log-ratios are measured before the first update.
_CHECKED_BATCHES = 2
#: What transformers and ``write_trained_on`` put into the folder of a model.
_SAVED = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "trained_on.txt",
)
#: The training runs; the folder of each has its name in small letters.
_RUNS = ("TOPR", "SFT")
#: What a demo leaves in its folder, as patterns of paths.
_RESULTS = (
    *("base/evaluation.json", "generated/batch-*.parquet", "generated/batch-*.verdicts.json"),
    *("samples.parquet", "records.parquet"),
    *("samples.json", "records.json", "report.json", "report.png"),
    *(
        f"{run.lower()}/{name}"
        for run in _RUNS
        for name in ("history.json", "evaluation.json", *(f"model/{kind}" for kind in _SAVED))
    ),
)


@dataclass(frozen=True)
class DemoSettings:
    """Everything that a demo's figures depend on.

    Args:
        model: as in ``load_model``.
        seed: of the questions, the sampling and the order of training.
        questions: training questions.
        samples: completions sampled per training question.
        held_out: held-out questions, answered before and after.
        epochs: passes over the samples.
        lr: learning rate of AdamW.
        batch_size: sequences per optimizer step of the TOPR run. The run on right answers alone takes
            as many steps, of as many right answers.
        positive_share: share of positives to make, p~ of the paper's Eq. 7, in (0, 1); 0 to leave
            the samples as they are.
        balance: how to make it: "subsample" leaves out negatives at random, "baseline" keeps all
            samples and subtracts a baseline from the rewards of the TOPR run.
        limits: preset of the TOPR run.
        ratio: level of the ratio of the TOPR run.
        max_new_tokens: length at which a completion is cut.

    Raises:
        SettingsError: if a number is outside its range.
    """

    model: str = "smollm2"
    seed: int = 0
    questions: int = 128
    samples: int = 8
    held_out: int = 128
    epochs: int = 1
    lr: float = 2e-5
    batch_size: int = 32
    positive_share: float = 0.5
    balance: str = "subsample"
    limits: str = "topr"
    ratio: str = "sequence"
    max_new_tokens: int = 5

    def __post_init__(self) -> None:
        for name in ("questions", "samples", "held_out", "epochs", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if not 0 < self.lr < math.inf:
            raise SettingsError(f"lr: got {self.lr}; expected a finite number above 0")
        if not 0 <= self.positive_share < 1:
            raise SettingsError(
                f"positive_share: got {self.positive_share}; expected a share in [0, 1), 0 to leave "
                "the samples as they are"
            )
        if self.balance not in BALANCES:
            raise SettingsError(
                f"balance: got {self.balance!r}; expected {' or '.join(map(repr, BALANCES))}"
            )
        if not 0 <= self.seed <= MOST_SEED:
            raise SettingsError(f"seed: got {self.seed}; expected 0 to {MOST_SEED}")


def run_demo(settings: DemoSettings, out: Path, *, task: Task = ARITHMETIC) -> bool:
    """Runs what is not yet in ``out`` and reports.

    Every step leaves its result in ``out``, whole or not at all; a second call with the same
    settings continues after the last finished step (inside generation: batch; inside training:
    checkpoint).

    Args:
        settings: see ``DemoSettings``.
        out: folder of this run.
        task: where the questions come from.

    Returns:
        Whether TOPR ended at least as accurate as the base model, greedy and sampled.

    Raises:
        FileError: if a result in ``out`` is damaged.
        SettingsError: if ``out`` holds results of other settings, or the task or the model cannot
            be had as asked.
    """
    # Questions first: settings that cannot be met must leave the folder alone.
    run = _Run(settings, out, task)
    made = [path for path in (out, *out.parents) if not path.exists()]
    with ExitStack() as held:
        if not (out / "settings.json").exists():
            on_error(held, lambda: _remove_settings(out, made))
        _write_or_check_settings(out, settings)
        return _run_steps(run)


def _run_steps(run: _Run) -> bool:
    settings, out = run.settings, run.out
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    # CPU seconds of steps that an earlier call finished.
    earlier_cpu_seconds = 0.0

    def step(name: str, file: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        nonlocal earlier_cpu_seconds
        path = out / file
        finished = path.exists()
        if not finished:
            start, cpu_start = time.perf_counter(), time.process_time()
            with naming(f"--model {settings.model}: {name} failed"):
                result = compute()
            write_json(
                path,
                {
                    **result,
                    "seconds": round(time.perf_counter() - start, 1),
                    "cpu_seconds": round(time.process_time() - cpu_start, 1),
                },
            )
        value: dict[str, Any] = read_mapping(path)
        if not {"seconds", "cpu_seconds"} <= value.keys():
            raise FileError(f"{path}: not a result of this demo; delete it and run again")
        seconds[name], cpu_seconds[name] = value["seconds"], value["cpu_seconds"]
        earlier_cpu_seconds += cpu_seconds[name] if finished else 0.0
        return value

    base = step("evaluate base", "base/evaluation.json", run.evaluate_base)
    data = step("generate", "samples.json", run.sample)
    data |= step("score", "records.json", run.score)
    _say_data(data)
    evaluations = {"base": _evaluation(base)}
    histories = {}
    for name, limits in zip(_RUNS, (settings.limits, "sft"), strict=True):
        folder = name.lower()
        baseline = data["baseline"] if name == "TOPR" else 0.0
        trained = step(
            f"train {name}",
            f"{folder}/history.json",
            partial(run.train, name, limits, baseline),
        )
        # Not before the history is written: a run that was killed still needs them.
        _drop_checkpoints(out / folder / "checkpoints")
        histories[name] = trained["history"]
        evaluated = step(
            f"evaluate {name}",
            f"{folder}/evaluation.json",
            partial(run.evaluate_trained, name),
        )
        evaluations[name] = _evaluation(evaluated)
    cpu_seconds["total"] = round(earlier_cpu_seconds + time.process_time(), 1)
    seconds["total"] = round(sum(seconds.values()), 1)
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return _report(settings, out, base, data, evaluations, histories, times)


def restart(out: Path) -> None:
    """Deletes what a demo left in ``out``, and nothing else.

    Raises:
        SettingsError: if ``out`` has files but was not made by a demo.
    """
    path = out / "settings.json"
    if not out.exists() or not any(out.iterdir()):
        return
    fields = {field.name for field in dataclasses.fields(DemoSettings)}
    try:
        ours = fields <= read_mapping(path).keys()
    except (FileNotFoundError, FileError):
        ours = False
    if not ours:
        raise SettingsError(
            f"--restart: {out} does not hold a demo's settings.json, so it is not a demo's folder; "
            "nothing was deleted. Choose another --out"
        )
    for file in _results(out):
        file.unlink()
    for folder in (out / name.lower() for name in _RUNS):
        _drop_checkpoints(folder / "checkpoints")
        _remove_empty(folder / "model", folder)
    _remove_empty(out / "base", out / "generated")
    # Last: after a kill in here the folder is still recognised as a demo's.
    path.unlink()


def _results(out: Path) -> list[Path]:
    """The files in ``out`` that have the names of a demo's, checkpoints apart."""
    return [path for name in _RESULTS for path in sorted(out.glob(name)) if path.is_file()]


def _drop_checkpoints(folder: Path) -> None:
    for checkpoint in checkpoints_in(folder):
        shutil.rmtree(checkpoint)
    _remove_empty(folder)


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _remove_settings(out: Path, made: list[Path]) -> None:
    """Removes the settings of a run that failed before it had done anything."""
    if not _results(out):
        (out / "settings.json").unlink(missing_ok=True)
        _remove_empty(*made)


class _Run:
    """The steps of one demo; models and questions are made when a step first needs them."""

    def __init__(self, settings: DemoSettings, out: Path, task: Task) -> None:
        self.settings = settings
        self.out = out
        self.task = task
        self.trained: dict[str, Any] = {}
        try:
            self.train_questions, self.test_questions = held_out_split(
                task, settings.questions, settings.held_out, settings.seed
            )
        except ValueError as error:
            raise SettingsError(f"questions and held_out: {error}") from error

    @cached_property
    def base(self) -> LoadedModel:
        return named_model(self.settings.model, load_model)

    @cached_property
    def records(self) -> list[Record]:
        return read_records(self.out / "records.parquet")

    def evaluate_base(self) -> dict[str, Any]:
        return {
            "model": self.base.name,
            "remark": self.base.remark,
            **self.evaluate(self.base.model, "base"),
        }

    def evaluate(self, model: Any, label: str) -> dict[str, Any]:
        judged: list[Verdict] = []
        evaluation = evaluate(
            model,
            self.base.tokenizer,
            self.task,
            self.test_questions,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=100,
            seed=self.settings.seed,
            label=label,
            judged=judged,
        )
        return {**report.accuracy_json(evaluation), **said_problems(judged)}

    def sample(self) -> dict[str, Any]:
        """Samples and rewards; says what the data are like."""
        judged: list[Verdict] = []
        records = generate(
            self.base.model,
            self.base.tokenizer,
            self.task,
            self.train_questions,
            model_name=self.base.name,
            samples=self.settings.samples,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=128,
            seed=self.settings.seed,
            shards=self.out / "generated",
            judged=judged,
        )
        write_records(self.out / "samples.parquet", records)
        return {
            "sampled": len(records),
            "sampled_positive_share": _positive_share(records),
            "truncated_share": sum(r.finish_reason == "length" for r in records) / len(records),
            "mean_length": sum(r.length for r in records) / len(records),
            **said_problems(judged),
        }

    def score(self) -> dict[str, Any]:
        """Chooses and scores the samples; says how far pi is from mu before the first update."""
        model, pad = self.base.model, self.base.tokenizer.pad_token_id
        size = self.settings.batch_size
        samples = read_records(self.out / "samples.parquet")
        if self.settings.positive_share and self.settings.balance == "subsample":
            samples = subsample_negatives(samples, self.settings.positive_share, self.settings.seed)
        records = score(model, samples, pad_token_id=pad, batch_size=size)
        write_records(self.out / "records.parquet", records)
        checked = records[: _CHECKED_BATCHES * size]
        other = size // 3 + 1
        positive_share = _positive_share(records)
        baseline = self.baseline(positive_share)
        return {
            "records": len(records),
            "positive_share": positive_share,
            "baseline": baseline,
            "effective_positive_share": effective_positive_share(positive_share, baseline),
            "max_log_ratio_same_packing": max_log_ratio(
                model, checked, pad_token_id=pad, batch_size=size
            ),
            "max_log_ratio_other_packing": max_log_ratio(
                model, checked[::-1], pad_token_id=pad, batch_size=other
            ),
        }

    def baseline(self, positive_share: float) -> float:
        # No baseline changes the share of positives if all rewards have one sign.
        wanted = self.settings.balance == "baseline" and self.settings.positive_share > 0
        if not wanted or positive_share in (0.0, 1.0):
            return 0.0
        return baseline_for_positive_share(positive_share, self.settings.positive_share)

    def train(self, name: str, limits: str, baseline: float) -> dict[str, Any]:
        records, batch_size = self.records, self.settings.batch_size
        right = [record for record in records if record.reward > 0]
        if name == "SFT" and right:
            # Without the wrong answers: their weight is 0.
            batch_size = max(1, round(batch_size * len(right) / len(records)))
            records = right
        settings = TrainSettings(
            limits=limits,
            ratio=self.settings.ratio,
            baseline=baseline,
            learning_rate=self.settings.lr,
            batch_size=batch_size,
            epochs=self.settings.epochs,
            seed=self.settings.seed,
        )
        folder = self.out / name.lower()
        model = copy.deepcopy(self.base.model)
        history = train(
            model,
            self.base.tokenizer,
            records,
            settings,
            checkpoints=folder / "checkpoints",
            label=name,
        )
        # Overwrites what a killed run has saved; other files there are the user's.
        with merged_folder(folder / "model") as temporary:
            model.save_pretrained(temporary)
            self.base.tokenizer.save_pretrained(temporary)
            write_trained_on(temporary, self.records, self.settings.model)
        self.trained[name] = model
        # A diverged run (limits without a taper, say) logs infinities, which JSON cannot hold.
        finite = [{k: v if math.isfinite(v) else None for k, v in e.items()} for e in history]
        return {"history": finite}

    def evaluate_trained(self, name: str) -> dict[str, Any]:
        model = self.trained.pop(name, None)
        if model is None:
            model = load_model(str(self.out / name.lower() / "model")).model
        return self.evaluate(model, name)


def _write_or_check_settings(out: Path, settings: DemoSettings) -> None:
    """Writes the settings into a new folder, or checks that the folder's are the same.

    Raises:
        SettingsError: if they differ, or the folder has files that a run would overwrite.
    """
    if not (out / "settings.json").exists():
        for path in _results(out):
            raise not_ours(path)
    wanted = {**dataclasses.asdict(settings), "model": model_key(settings.model)}
    write_or_check_settings(out / "settings.json", {**wanted, "version": __version__}, out)


def _evaluation(raw: dict[str, Any]) -> Evaluation:
    fields = [field.name for field in dataclasses.fields(Accuracy)]
    greedy, sampled = (
        Accuracy(**{name: raw[kind][name] for name in fields}) for kind in ("greedy", "sampled")
    )
    return Evaluation(greedy, sampled)


def _say_data(data: dict[str, Any]) -> None:
    print(
        f"\n{data['sampled']} samples, {100 * data['sampled_positive_share']:.1f} % right; trained "
        f"on: {data['records']}, {100 * data['positive_share']:.1f} % right, which weigh as "
        f"{100 * data['effective_positive_share']:.1f} % (baseline {data['baseline']:+.3f})\n"
        "largest |log_ratio| before the first update: "
        f"{data['max_log_ratio_same_packing']:.1e} nats in the batches that were scored, "
        f"{data['max_log_ratio_other_packing']:.1e} in others\n"
    )


def _positive_share(records: list[Record]) -> float:
    return sum(record.reward > 0 for record in records) / len(records)


def _report(
    settings: DemoSettings,
    out: Path,
    base: dict[str, Any],
    data: dict[str, Any],
    evaluations: dict[str, Evaluation],
    histories: dict[str, list[dict[str, float | None]]],
    times: dict[str, dict[str, float]],
) -> bool:
    before, after = evaluations["base"], evaluations["TOPR"]
    passed = (
        after.greedy.correct >= before.greedy.correct
        and after.sampled.correct >= before.sampled.correct
    )
    remark = f" ({base['remark']})" if base["remark"] else ""
    title = (
        f"{base['model']}{remark}\n{settings.questions} questions x {settings.samples} samples, "
        f"{settings.epochs} epoch(s), seed {settings.seed}"
    )
    report.plot(out / "report.png", evaluations, histories, title)
    shown = {**dataclasses.asdict(settings), "model": model_key(settings.model)}
    write_json(
        out / "report.json",
        {
            "settings": shown,
            "model": {"name": base["model"], "remark": base["remark"]},
            "environment": report.environment(),
            "data": {name: value for name, value in data.items() if name not in times},
            "accuracy": {name: report.accuracy_json(e) for name, e in evaluations.items()},
            "history": histories,
            **times,
            "topr_not_worse_than_base": passed,
        },
    )
    print(f"\n{base['model']}{remark}\n\n{report.table(evaluations)}\n")
    print(
        f"{times['cpu_seconds']['total']:.0f} CPU seconds, {times['seconds']['total']:.0f} s in all; "
        f"picture and figures: {out / 'report.png'}, ",
        end="",
    )
    print(f"{out / 'report.json'}; trained model: {out / 'topr' / 'model'}")
    return passed
