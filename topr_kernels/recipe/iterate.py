"""Several iterations: generate, score, curate, train, evaluate, with mu_i = pi_(i-1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from topr_kernels import __version__
from topr_kernels.recipe.commands import (
    check_training_processes,
    model_input,
    plain_settings,
    run_curate,
    run_evaluate,
    run_generate,
    run_score,
    run_train,
)
from topr_kernels.recipe.files import FileError, checksum, read_json, write_json
from topr_kernels.recipe.manifests import check_settings, read_mapping, write_or_check_settings
from topr_kernels.recipe.models import Models
from topr_kernels.recipe.options import pick
from topr_kernels.recipe.processes import current
from topr_kernels.recipe.sampling import with_backend
from topr_kernels.recipe.settings import (
    CurateSettings,
    EvaluateSettings,
    GenerateSettings,
    IterateSettings,
    ScoreSettings,
    TrainCommandSettings,
)
from topr_kernels.recipe.steps import is_there, locked, not_ours, on_error
from topr_kernels.recipe.task_files import questions_of, scorer, task_inputs
from topr_kernels.recipe.vllm_backend import check_scorable


def run_iterate(settings: IterateSettings, out: Path) -> list[dict[str, Any]]:
    """Runs what is not yet in ``out``.

    ``out/iteration-0`` holds the evaluation of the given model, ``out/iteration-i`` the samples of
    iteration i, what was scored and curated of them, the trained model, its evaluation, and
    ``manifest.json`` with settings, checksums and figures; ``out/report.json`` all figures. The same
    call continues a run that was killed, after its last finished part (batch of samples, checkpoint).

    Several processes (``processes.joined``), each of which must call this, share the work of the steps.

    Args:
        settings: see ``IterateSettings``. ``seed`` changes the samples from iteration to iteration; the
            questions stay those of ``question_seed``.
        out: folder of this run.

    Returns:
        The figures, one mapping for the given model and for each iteration.

    Raises:
        SettingsError: if ``out`` is of other settings, or what is asked for cannot be had.
        FileError, RecordError: if a file is damaged.
    """
    settings = with_backend(settings)
    check_scorable(settings)
    # Questions first: settings that cannot be met must leave the folder alone.
    questions_of(settings, settings.questions)
    check_training_processes(settings.batch_size)
    models = Models()
    crew = current()
    with ExitStack() as held:
        crew.first(lambda: _lock(held, settings, out))
        report = [_start(settings, out, models)]
        source = settings.model
        for i in range(1, settings.iterations + 1):
            figures, source = _iteration(settings, i, source, out / f"iteration-{i}", models)
            report.append(figures)
        crew.first(lambda: write_json(out / "report.json", {"iterations": report}))
    if crew.rank == 0:
        print(f"\n{as_text(report)}\n\nfigures: {out / 'report.json'}; last model: {source}")
    return report


def _lock(held: ExitStack, settings: IterateSettings, out: Path) -> None:
    """Locks the folder of the run and writes or checks its settings."""
    wanted = _wanted(settings)
    _refuse_foreign(out)
    held.enter_context(locked(out))
    settings_file = out / "settings.json"
    # Settings without any work done are discarded.
    if not _begun(out):
        settings_file.unlink(missing_ok=True)
    on_error(held, lambda: _remove_settings(out))
    write_or_check_settings(settings_file, wanted, out)


def _remove_settings(out: Path) -> None:
    """Removes the settings of a run that failed before it had done anything."""
    if not _begun(out):
        (out / "settings.json").unlink(missing_ok=True)
        with suppress(OSError):
            (out / "iteration-0").rmdir()


def _refuse_foreign(out: Path) -> None:
    """Refuses a folder with files of the user under the names that this command writes.

    Raises:
        SettingsError: naming such a file.
    """
    settings_file = out / "settings.json"
    try:
        stored = read_json(settings_file)
        ours = isinstance(stored, Mapping) and stored.get("step") == "iterate"
    except FileNotFoundError:
        ours = False
    except FileError:
        # Damaged, which the check of the settings reports. Where nothing was done it may not be ours.
        ours = _begun(out)
    for path in () if ours else (settings_file, out / "report.json"):
        if is_there(path):
            raise not_ours(path)


def check_folder(settings: IterateSettings, out: Path) -> None:
    """Refuses a folder of other settings, as ``run_iterate`` does.

    Args:
        settings: with their backend resolved (``with_backend``).
        out: folder of the run.

    Raises:
        SettingsError: naming what differs.
    """
    _refuse_foreign(out)
    if _begun(out) and (out / "settings.json").exists():
        check_settings(out / "settings.json", _wanted(settings), out)


def _wanted(settings: IterateSettings) -> dict[str, Any]:
    inputs = model_input(settings.model) | task_inputs(settings)
    return {
        "step": "iterate",
        "version": __version__,
        # An iteration does not depend on how many follow.
        "settings": plain_settings(settings, "iterations") | scorer(settings),
        "inputs": {name: checksum(path) for name, path in inputs.items()},
    }


def _begun(out: Path) -> bool:
    """Whether any work was done: a step that did none leaves at most its settings."""
    return any(
        path.is_file()
        for path in out.glob("iteration-*/**/*")
        if path.name[0] != "."
        and not (path.name == "settings.json" and path.parent.name.endswith(".partial"))
    )


def _start(settings: IterateSettings, out: Path, models: Models) -> dict[str, Any]:
    evaluating = pick(EvaluateSettings, settings)
    manifest = run_evaluate(evaluating, out / "iteration-0" / "evaluation.json", models=models)
    return {"iteration": 0, "evaluation": manifest["figures"]}


def _iteration(
    settings: IterateSettings, i: int, source: str, folder: Path, models: Models
) -> tuple[dict[str, Any], str]:
    """Runs one iteration from the model ``source``; returns its figures and its model."""
    if current().rank == 0:
        print(f"\niteration {i} of {settings.iterations}")
    # The same questions get other samples, and the same records another order, in each iteration.
    seed = settings.seed * 1009 + i
    samples, scored, curated = (
        folder / f"{name}.parquet" for name in ("samples", "scored", "curated")
    )
    model = folder / f"model-{i}"
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "generate": lambda: run_generate(
            pick(GenerateSettings, settings, model=source, seed=seed), samples, models=models
        ),
        "score": lambda: run_score(
            pick(ScoreSettings, settings, model=source, seed=seed), samples, scored, models=models
        ),
        "curate": lambda: run_curate(pick(CurateSettings, settings, seed=seed), scored, curated),
        "train": lambda: run_train(
            pick(TrainCommandSettings, settings, model=source, seed=seed),
            curated,
            model,
            models=models,
        ),
        # With the seed of the whole run: all models are measured on the same random numbers.
        "evaluate": lambda: run_evaluate(
            pick(EvaluateSettings, settings, model=str(model)),
            folder / "evaluation.json",
            models=models,
        ),
    }
    results = {name: step() for name, step in steps.items()}
    figures = {
        "iteration": i,
        "sampled": results["generate"]["figures"],
        "trained": results["curate"]["figures"]["after"],
        "baseline": results["curate"]["figures"]["baseline"],
        "updates": results["train"]["figures"]["steps"],
        "evaluation": results["evaluate"]["figures"],
    }
    manifest = {
        "iteration": i,
        "version": __version__,
        "settings": {name: result["settings"] for name, result in results.items()},
        "inputs": {name: result["inputs"] for name, result in results.items()},
        "outputs": {n: sha for r in results.values() for n, sha in r["outputs"].items()},
        "figures": figures,
        "seconds": {name: result["seconds"] for name, result in results.items()},
    }
    current().first(lambda: _write_manifest(folder / "manifest.json", manifest))
    return figures, str(model)


def _write_manifest(path: Path, value: Mapping[str, Any]) -> None:
    if not path.exists():
        write_json(path, value)
    elif read_mapping(path) != value:
        raise FileError(
            f"{path}: disagrees with the manifests of the steps beside it; delete it and run again"
        )


def as_text(report: Sequence[Mapping[str, Any]]) -> str:
    """The figures of each iteration as a table."""
    votes = report[0]["evaluation"]["votes"]
    head = (
        f"{'':5}{'sampled p':>11}{'trained on':>12}{'p~':>7}{'pass@1':>9}  {'95 % interval':15}"
        f"{f'maj@{votes}':>8}{'+-':>6}{'invalid':>9}{'length':>8}"
    )
    return "\n".join([head, "-" * len(head), *(_row(entry) for entry in report)])


def _row(entry: Mapping[str, Any]) -> str:
    evaluation = entry["evaluation"]
    data = f"{'':30}"
    if entry["iteration"]:
        data = (
            f"{100 * entry['sampled']['positive_share']:10.1f}%{entry['trained']['records']:12}"
            f"{100 * entry['trained']['effective_positive_share']:6.1f}%"
        )
    error = evaluation["maj_at_k_error"]
    interval = (
        f"[{100 * evaluation['pass_at_1_low']:.1f}, {100 * evaluation['pass_at_1_high']:.1f}]"
    )
    return (
        f"{entry['iteration'] or 'base':<5}{data}{100 * evaluation['pass_at_1']:8.1f}%  {interval:15}"
        f"{100 * evaluation['maj_at_k']:7.1f}%{'' if error is None else f'{100 * error:.1f}':>6}"
        f"{100 * evaluation['invalid_share']:8.1f}%{evaluation['mean_length']:8.1f}"
    )
