"""The results of a demo: a table, a picture, and a JSON of every figure and setting."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from topr_kernels.recipe.evaluate import Accuracy, Evaluation
from topr_kernels.recipe.files import atomic_path

#: Okabe-Ito colours: told apart with any common colour vision, and in print by their lightness.
_COLOURS = {"base": "#8c8c8c", "TOPR": "#0072B2", "SFT": "#E69F00"}
_NAMES = {"base": "base model", "TOPR": "TOPR", "SFT": "positives only (SFT)"}


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Accuracies of each model as text; ``evaluations`` maps "base", "TOPR", "SFT" to theirs."""
    head = (
        f"{'':22}{'greedy':>8}  {'95 % interval':15}{'sampled':>8}  {'95 % interval':15}"
        f"{'invalid':>8}{'length':>8}"
    )
    lines = [head, "-" * len(head)]
    for key, evaluation in evaluations.items():
        greedy, sampled = evaluation.greedy, evaluation.sampled
        lines.append(
            f"{_NAMES[key]:22}{_percent(greedy)}  {_interval(greedy)}{_percent(sampled)}  "
            f"{_interval(sampled)}{100 * greedy.invalid_share:7.1f}%{greedy.mean_length:8.1f}"
        )
    lines.append("invalid and length: of the greedy answers, length in tokens")
    return "\n".join(lines)


def plot(
    path: Path,
    evaluations: Mapping[str, Evaluation],
    histories: Mapping[str, Sequence[Mapping[str, float | None]]],
    title: str,
) -> None:
    """Draws accuracy before and after, and the weights of the negatives during training.

    Args:
        path: PNG file, written atomically.
        evaluations: "base", "TOPR", "SFT" to their evaluation.
        histories: "TOPR", "SFT" to their training log.
        title: of the whole picture.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    _plot_accuracy(axes[0, 0], evaluations)
    topr = {"TOPR": histories["TOPR"]}
    _plot_metric(axes[0, 1], topr, "weight_negative_mean", "mean weight of negatives")
    axes[0, 1].set_ylim(0, 1.05)
    _plot_metric(
        axes[1, 0], topr, "ess_negative_share", "effective sample size of negatives\n(share)"
    )
    axes[1, 0].set_ylim(0, 1.05)
    _plot_metric(axes[1, 1], histories, "objective", "objective (Eq. 6, per token)")
    axes[1, 1].axhline(0, color="black", linewidth=0.6)
    axes[1, 1].legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def environment() -> dict[str, Any]:
    """Versions, machine kind and commit; nothing that identifies the machine or its folders."""
    import torch

    packages = ("topr_kernels", "torch", "transformers", "accelerate", "reasoning_gym")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
    }


def accuracy_json(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """An evaluation as plain values, with the accuracies worked out."""
    outcomes = {"greedy": evaluation.greedy, "sampled": evaluation.sampled}
    return {n: {"accuracy": x.accuracy, **dataclasses.asdict(x)} for n, x in outcomes.items()}


def _percent(outcome: Accuracy) -> str:
    return f"{100 * outcome.accuracy:7.1f}%"


def _interval(outcome: Accuracy) -> str:
    return f"[{100 * outcome.low:4.1f}, {100 * outcome.high:5.1f}]  "


def _plot_accuracy(axis: Axes, evaluations: Mapping[str, Evaluation]) -> None:
    width = 0.8 / len(evaluations)
    for i, (key, evaluation) in enumerate(evaluations.items()):
        outcomes = (evaluation.greedy, evaluation.sampled)
        for j, outcome in enumerate(outcomes):
            x = j + (i - (len(evaluations) - 1) / 2) * width
            height = 100 * outcome.accuracy
            axis.bar(
                x, height, 0.9 * width, color=_COLOURS[key], label=_NAMES[key] if j == 0 else None
            )
            error = [[height - 100 * outcome.low], [100 * outcome.high - height]]
            axis.errorbar(x, height, yerr=error, color="black", capsize=3, linewidth=1)
            axis.text(x, 100 * outcome.high + 1.5, f"{height:.1f}", ha="center", fontsize=8)
    axis.set_xticks([0, 1], ["greedy", "sampled (T = 1)"])
    axis.set_ylabel("held-out accuracy, %")
    highest = max(max(e.greedy.high, e.sampled.high) for e in evaluations.values())
    axis.set_ylim(0, 120 * highest + 6)
    count = next(iter(evaluations.values())).greedy.questions
    axis.set_title(f"Accuracy on {count} held-out questions, 95 % intervals", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=len(evaluations))
    axis.spines[["top", "right"]].set_visible(False)


def _plot_metric(
    axis: Axes,
    histories: Mapping[str, Sequence[Mapping[str, float | None]]],
    metric: str,
    label: str,
) -> None:
    for key, history in histories.items():
        # A figure is None where it was infinite.
        known = [entry for entry in history if entry.get(metric) is not None]
        axis.plot(
            np.array([entry["step"] for entry in known], dtype=float),
            np.array([entry[metric] for entry in known], dtype=float),
            color=_COLOURS[key],
            marker="o" if key == "TOPR" else "s",
            markersize=3,
            linewidth=1.4,
            label=_NAMES[key],
        )
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package runs from, with "-dirty", or None if it is not one."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed copy may lie inside another project's repository, which does not track this file.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
