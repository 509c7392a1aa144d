"""Runs one cell: its seed's data (made once, shared by all its cells), its training, its figures."""

from __future__ import annotations

import copy
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.cells import QUESTION_SEED, Cell, Size, cell_settings
from benchmarks.learning.training import train_epochs
from topr_kernels import baseline_for_positive_share
from topr_kernels.recipe import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    IterateSettings,
    Models,
    ScoreSettings,
    TrainCommandSettings,
    VerifySettings,
    VoteSettings,
    evaluate,
    read_records,
    run_curate,
    run_evaluate,
    run_generate,
    run_iterate,
    run_score,
    run_train,
    run_verify,
    run_vote,
)
from topr_kernels.recipe.files import read_json, write_json
from topr_kernels.recipe.manifests import refuse_other_settings
from topr_kernels.recipe.options import SettingsError, model_key
from topr_kernels.recipe.report import accuracy_json, environment
from topr_kernels.recipe.steps import Step, run_step
from topr_kernels.recipe.task_files import find_tasks, questions_of

#: Figures of the training that are kept for every update.
_PER_UPDATE = (
    "objective",
    "grad_norm",
    "weight_negative_mean",
    "dead_share",
    "ess_negative_share",
    "effective_positive_share",
    "log_ratio_positive_mean",
    "log_ratio_negative_mean",
    "log_ratio_negative_min",
    "weight_overflow",
)


@dataclass
class Runner:
    """Runs cells of one size and leaves a JSON file of each.

    Args:
        size: see ``Size``.
        results: folder of the files.
        work: folder for what a killed run needs to continue.
    """

    size: Size
    results: Path
    work: Path
    models: Models = field(default_factory=Models)
    #: Taken at the start: by the end the checkout may hold another commit than the code that ran.
    environment: dict[str, Any] = field(default_factory=environment)

    def check(self, cell: Cell) -> dict[str, Any]:
        """The settings of a cell, which must be those of its file if it has one.

        Raises:
            SettingsError: if they are not.
        """
        path = self.results / f"{cell.name}.json"
        settings = {"model": model_key(self.size.model), **cell_settings(cell, self.size)}
        if path.exists():
            refuse_other_settings(read_json(path), {"settings": settings}, path)
        return settings

    def run(self, cell: Cell) -> Path:
        """Runs a cell unless it has its file; returns the file.

        Raises:
            SettingsError: if the file there is of other settings.
        """
        path = self.results / f"{cell.name}.json"
        settings = self.check(cell)
        if not path.exists():
            figures = self._figures(cell, settings)
            write_json(path, {"cell": cell.name, "settings": settings, **figures})
        self._drop_models(cell)
        return path

    def _figures(self, cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
        if cell.curation:
            return self._iterate(cell, settings)
        self.base(cell.seed)
        if cell.verifier:
            return self._verify(cell, settings)
        inputs = {"records": self._data(cell.seed) / "train.parquet"}
        manifest = run_step(
            Step("learning", self.work / "cells" / f"{cell.name}.json", settings, inputs, []),
            lambda partial: self._train(cell, partial),
        )
        return {**manifest["figures"], "seconds": manifest["seconds"]}

    def base(self, seed: int) -> Path:
        """Makes a seed's data and measures the model that sampled them, unless both are there.

        Raises:
            SettingsError: if the file there is of other settings.
        """
        path = self.results / f"base-seed{seed}.json"
        folder, size = self._data(seed), self.size
        common: dict[str, Any] = {"model": size.model, "seed": seed}
        asked = {**self._asked(seed), "questions": size.questions}
        sampler = {**common, **self._sampler(), "max_new_tokens": size.max_new_tokens}
        stated = {**sampler, **asked, "model": model_key(size.model)}
        settings = {**stated, "samples": size.samples}
        samples, scored, chosen = (
            folder / f"{name}.parquet" for name in ("samples", "scored", "train")
        )
        if path.exists():
            refuse_other_settings(read_json(path), {"settings": settings}, path)
            if chosen.exists():
                return path
        generating = GenerateSettings(**sampler, **asked, samples=size.samples)
        made = run_generate(generating, samples, models=self.models)
        scoring = run_score(
            ScoreSettings(**common, batch_size=size.batch_size),
            *(samples, scored),
            models=self.models,
        )
        # Samples of mu as they came: leaving out duplicates would change what is estimated.
        curating = run_curate(
            CurateSettings(positive_share=0.5, balance="subsample", dedupe=False, seed=seed),
            *(scored, chosen),
        )
        kept = curating["figures"]["after"]
        if not 0 < kept["positive_share"] < 1:
            raise SettingsError(
                f"seed {seed}: {100 * kept['positive_share']:.0f} % of its {kept['records']} samples "
                "are right, so there is nothing to compare; choose another seed, or a larger size"
            )
        # The samples of a checkout that has only the figures are made anew; their figures stand.
        if path.exists():
            return path
        measured = run_step(
            Step("base", folder / "base.json", stated, {}, []),
            lambda partial: self._evaluate(self.models.get(size.model).model, seed),
        )
        loaded = self.models.get(size.model)
        write_json(
            path,
            {
                "cell": f"base-seed{seed}",
                "settings": settings,
                "weights": {"name": loaded.name, "remark": loaded.remark},
                "sampled": made["figures"],
                "trained_on": kept,
                "evaluation": measured["figures"],
                "seconds": {
                    "generate": made["seconds"],
                    "score": scoring["seconds"],
                    "evaluate": measured["seconds"],
                },
                "environment": self.environment,
            },
        )
        return path

    def _asked(self, seed: int) -> dict[str, Any]:
        """Which questions a seed has."""
        size = self.size
        return {
            "task": size.task,
            "task_config": size.task_config,
            "held_out": size.held_out,
            "question_seed": QUESTION_SEED + seed,
        }

    def _sampler(self) -> dict[str, Any]:
        return {"sample_batch": self.size.sample_batch, "backend": "hf"}

    def _data(self, seed: int) -> Path:
        return self.work / f"data-seed{seed}"

    def _evaluate(self, model: Any, seed: int) -> dict[str, Any]:
        options = GenerateSettings(**self._asked(seed))
        # A model of NaN samples nothing at all.
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            return {"diverged": True}
        outcome = evaluate(
            model,
            self.models.get(self.size.model).tokenizer,
            find_tasks(options)[1],
            questions_of(options, 0)[1],
            max_new_tokens=self.size.max_new_tokens,
            batch_size=100,
            seed=seed,
        )
        return {"diverged": False, **accuracy_json(outcome)}

    def _train(self, cell: Cell, partial: Path) -> dict[str, Any]:
        records = read_records(self._data(cell.seed) / "train.parquet")
        share = sum(record.reward > 0 for record in records) / len(records)
        baseline = 0.0 if cell.share == share else baseline_for_positive_share(share, cell.share)
        loaded = self.models.get(self.size.model)
        model = copy.deepcopy(loaded.model)

        def look(epoch: int) -> None:
            write_json(partial / f"epoch-{epoch}.json", self._evaluate(model, cell.seed))

        history = train_epochs(
            model,
            loaded.tokenizer,
            records,
            limits=cell.method,
            ratio=cell.ratio,
            baseline=baseline,
            epochs=self.size.epochs,
            lr=self.size.lr,
            batch_size=self.size.batch_size,
            seed=cell.seed,
            checkpoints=partial / "checkpoints",
            after_epoch=look,
        )
        epochs = []
        for epoch in range(1, self.size.epochs + 1):
            part = [e for e in history if math.ceil(e["epoch"] - 1e-6) == epoch]
            epochs.append(
                {
                    "epoch": epoch,
                    "updates": len(part),
                    "evaluation": read_json(partial / f"epoch-{epoch}.json"),
                    "training": {name: _mean([e.get(name) for e in part]) for name in _PER_UPDATE},
                }
            )
        return {
            "data": {"records": len(records), "positive_share": share, "baseline": baseline},
            "epochs": epochs,
            "updates": [
                {"step": e["step"], **{n: _stored(e.get(n)) for n in _PER_UPDATE}} for e in history
            ],
            "environment": self.environment,
        }

    def _iterate(self, cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
        size, out = self.size, self.work / cell.name
        report = run_iterate(
            IterateSettings(
                model=size.model,
                seed=cell.seed,
                **self._asked(cell.seed),
                **self._sampler(),
                max_new_tokens=size.max_new_tokens,
                lr=size.lr,
                batch_size=size.batch_size,
                **settings["iterate"],
            ),
            out,
        )
        manifests = [read_json(p) for p in sorted(out.glob("iteration-*/manifest.json"))]
        seconds = [sum(m["seconds"].values()) for m in manifests]
        return {
            "iterations": report,
            "seconds": round(sum(seconds), 1),
            "environment": self.environment,
        }

    def _verify(self, cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
        """Trains a verifier on judgements of the seed's samples.

        Before and after it judges answers of the model to held-out questions.
        """
        size, out, chosen = self.size, self.work / cell.name, settings["verifier"]
        asked, sampler = self._asked(cell.seed), self._sampler()
        common: dict[str, Any] = {"model": size.model, "seed": cell.seed}
        judging: dict[str, Any] = {
            "template": chosen["template"],
            "one_line": True,
            "max_new_tokens": chosen["max_new_tokens"],
            "temperature": 1.0,
            **sampler,
        }
        answers, judged, scored, model = (
            out / name for name in ("answers.parquet", "judged.parquet", "scored.parquet", "model")
        )
        evaluating = EvaluateSettings(
            **common,
            **asked,
            **sampler,
            max_new_tokens=size.max_new_tokens,
            eval_samples=chosen["answers"],
            votes=chosen["answers"],
            draws=1,
        )
        manifests = [run_evaluate(evaluating, answers.with_suffix(".json"), models=self.models)]
        solutions = VerifySettings(**common, **judging, samples=chosen["samples"], right_share=0.5)
        samples = self._data(cell.seed) / "samples.parquet"
        made = run_verify(solutions, samples, judged, models=self.models)
        manifests.append(made)
        scoring = ScoreSettings(**common, batch_size=size.batch_size)
        manifests.append(run_score(scoring, judged, scored, models=self.models))
        training = TrainCommandSettings(
            **common,
            limits=cell.method,
            ratio=cell.ratio,
            baseline=0.0,
            epochs=chosen["epochs"],
            lr=size.lr,
            batch_size=size.batch_size,
        )
        manifests.append(run_train(training, scored, model, models=self.models))
        looks: dict[str, Any] = {}
        for name, judge in (("before", size.model), ("after", str(model))):
            held_out = VerifySettings(
                **{**common, "model": judge},
                **judging,
                samples=chosen["judgements"],
                right_share=0.5,
            )
            voting = VoteSettings(
                **{**common, "model": judge},
                **judging,
                **asked,
                judgements=chosen["vote_judgements"],
                votes=chosen["answers"],
                draws=1,
            )
            found = [
                run_verify(held_out, answers, out / f"{name}.parquet", models=self.models),
                run_vote(voting, answers, out / f"{name}-votes.json", models=self.models),
            ]
            manifests += found
            looks[name] = dict(
                zip(("verifier", "vote"), (m["figures"] for m in found), strict=True)
            )
        return {
            "trained_on": made["figures"],
            **looks,
            "seconds": round(sum(m["seconds"] for m in manifests), 1),
            "environment": self.environment,
        }

    def _drop_models(self, cell: Cell) -> None:
        """Models of half a gigabyte or more per cell; the figures are what it was run for."""
        for pattern in ("iteration-*/model-*", "model"):
            for folder in (self.work / cell.name).glob(pattern):
                if folder.is_dir():
                    shutil.rmtree(folder)


def _stored(value: float | None) -> float | None:
    """A figure as JSON has it: None for what is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    # An infinite weight makes the mean infinite, which is not the mean of the others.
    return _stored(statistics.fmean(known)) if known else None
