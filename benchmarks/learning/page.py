"""Writes the page: tables, verdicts and pictures, all from the files of the cells."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.learning.cells import GRIDS, Cell
from benchmarks.learning.verdicts import (
    CLAIMS,
    NOT_RUN,
    Results,
    accuracy,
    differences,
    interval,
    seeds_of,
    verdict,
    with_seed,
)
from topr_kernels.recipe.files import atomic_path, read_json

#: Colour (Okabe and Ito: told apart with any common colour vision), marker and name of a line.
_METHODS = {
    Cell("topr", 0): ("#0072B2", "o", "TOPR"),
    Cell("sft", 0): ("#E69F00", "s", "positives only"),
    Cell("tis", 0): ("#009E73", "^", "TIS"),
    Cell("is", 0): ("#56B4E9", "v", "IS"),
    Cell("ppo", 0): ("#CC79A7", "P", "PPO"),
    Cell("reinforce", 0): ("#D55E00", "D", "naive REINFORCE"),
}
_RATIOS = {
    Cell("topr", 0): ("#0072B2", "o", "sequence"),
    Cell("topr", 0, "geometric"): ("#E69F00", "s", "geometric"),
    Cell("topr", 0, "token"): ("#D55E00", "D", "token"),
}
_PLANNED = {cell for cells in GRIDS.values() for cell in cells}
_SHARES = (0.01, 0.1, 0.2, 0.5, 1)
_CURATIONS = {
    Cell("topr", 0, curation="uniform"): ("#0072B2", "o", "uniform"),
    Cell("topr", 0, curation="anna-karenina"): ("#E69F00", "s", "Anna Karenina"),
}
_DEFAULT = Cell("topr", 0, curation="default")
_VERIFIER = Cell("topr", 0, verifier=True)


def load(folder: Path) -> dict[str, Any]:
    """Results by the name of their cell."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*-seed*.json"))}


def write(results: Results, readme: Path) -> list[Path]:
    """Replaces what is generated in the page, and draws the pictures beside it.

    Returns:
        What was written.

    Raises:
        ValueError: if the page lacks the marks of a generated part.
    """
    text = fill(readme.read_text(encoding="utf-8"), blocks(results))
    with atomic_path(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    written = [readme]
    for name, draw in PLOTS.items():
        path = readme.with_name(name)
        if draw_plot(draw, results, path):
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def fill(text: str, made: Mapping[str, str]) -> str:
    """The page with each generated part in place of what stands between its marks."""
    for name, block in made.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(
                f"README: expected {begin} and {end} once each, got {text.count(begin)} and "
                f"{text.count(end)}; put them where this part belongs"
            )
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text


def blocks(results: Results) -> dict[str, str]:
    """The generated parts by name."""
    return {
        "verdicts": _verdicts(results),
        "data": _data(results),
        "methods": _by_epoch(results, _METHODS, "methods.png"),
        "shares": _shares(results),
        "ratios": _by_epoch(results, _RATIOS, "ratios.png"),
        "iterations": _iterations(results, {_DEFAULT: ("", "", "default")}, "iterations.png"),
        "curation": _iterations(results, _CURATIONS, "curation.png"),
        "verifier": _verifier(results),
        "costs": _costs(results),
    }


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: Sequence[float]) -> str:
    """Mean with its interval; a single seed's figure is marked as one."""
    if not values:
        return NOT_RUN
    if len(values) == 1:
        return f"{values[0]:.1f} (one seed)"
    found = interval(values)
    return f"{found.mean:.1f} ± {found.half:.1f}"


def _each(values: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.1f}" for _, value in sorted(values.items()))


def _verdicts(results: Results) -> str:
    rows = [["claim", "paper", "difference here, points", "seeds", "verdict"]]
    for claim in CLAIMS:
        found = differences(results, claim)
        values = list(found.values())
        shown = "-"
        if len(values) > 1:
            outcome = interval(values)
            shown = f"{outcome.mean:+.1f} [{outcome.low:+.1f}, {outcome.high:+.1f}]"
        count = str(len(values))
        rows.append([claim.text, claim.source, shown, count, f"**{verdict(values)}**"])
    return _table(rows)


def _data(results: Results) -> str:
    seeds = seeds_of(results, None)
    if not seeds:
        return NOT_RUN
    rows = [["seed", "samples", "right", "unparsable", "trained on", "base, greedy", "base, T = 1"]]
    for seed in seeds:
        found = results[f"base-seed{seed}"]
        sampled, kept, outcome = (found[n] for n in ("sampled", "trained_on", "evaluation"))
        rows.append(
            [
                str(seed),
                str(sampled["records"]),
                f"{100 * sampled['positive_share']:.1f} %",
                f"{100 * sampled['invalid_share']:.1f} %",
                f"{kept['records']}, {100 * kept['positive_share']:.0f} % right",
                f"{accuracy(outcome):.1f} %",
                f"{accuracy(outcome, 'sampled'):.1f} %",
            ]
        )
    weights = results[f"base-seed{seeds[0]}"]["weights"]
    remark = f" ({weights['remark']})" if weights["remark"] else ""
    return f"{weights['name']}{remark}.\n\n{_table(rows)}"


def _epochs(results: Results, cell: Cell, seed: int) -> list[Mapping[str, Any]]:
    return list(results[with_seed(cell, seed).name]["epochs"])


def _by_epoch(results: Results, lines: Mapping[Cell, tuple[str, str, str]], plot: str) -> str:
    count = max(
        (len(_epochs(results, c, s)) for c in lines for s in seeds_of(results, c)), default=0
    )
    if not count:
        return NOT_RUN
    rows = [
        [
            "",
            *(f"epoch {i}" for i in range(1, count + 1)),
            "last, by seed",
            "last, T = 1",
            "unparsable",
            "tokens",
            "weight of negatives",
        ]
    ]
    for cell, (_, _, name) in lines.items():
        seeds = seeds_of(results, cell)
        if not seeds:
            rows.append([name, *[NOT_RUN] * count, *["-"] * 5])
            continue
        runs = {seed: _epochs(results, cell, seed) for seed in seeds}
        greedy = [[accuracy(e[i]["evaluation"]) for e in runs.values()] for i in range(count)]
        ends = [run[-1]["evaluation"] for run in runs.values()]
        told = [e["greedy"] for e in ends if not e["diverged"]]
        weights = [
            [run[i]["training"]["weight_negative_mean"] for run in runs.values()] for i in (0, -1)
        ]
        rows.append(
            [
                name,
                *map(_mean, greedy),
                _each({s: accuracy(e) for s, e in zip(seeds, ends, strict=True)}),
                _mean([accuracy(e, "sampled") for e in ends]),
                _of([100 * t["invalid_share"] for t in told], "{:.1f} %"),
                _of([t["mean_length"] for t in told], "{:.1f}"),
                " → ".join(_of(w, "{:.2g}") for w in weights),
            ]
        )
    return f"{_table(rows)}\n\n![accuracy by epoch]({plot})"


def _of(values: Sequence[float | None], form: str) -> str:
    """Mean of the known values."""
    known = [v for v in values if v is not None]
    return form.format(statistics.fmean(known)) if known else "not finite"


def _share_cell(method: str, share: float) -> Cell:
    # A baseline of -1 gives negatives no weight and all positives the same: positives only.
    positives_only = method == "topr" and share == 1
    return Cell("sft", 0) if positives_only else Cell(method, 0, share=share)


def _last(results: Results, cell: Cell) -> dict[int, float]:
    return {
        s: accuracy(_epochs(results, cell, s)[-1]["evaluation"]) for s in seeds_of(results, cell)
    }


def _shares(results: Results) -> str:
    rows = [["p̃", *(f"{100 * s:g} %" for s in _SHARES)]]
    found = False
    for method, name in (("topr", "TOPR"), ("tis", "TIS"), ("reinforce", "naive REINFORCE")):
        planned = [_share_cell(method, share) in _PLANNED for share in _SHARES]
        values = [_last(results, _share_cell(method, share)) for share in _SHARES]
        found = found or any(values)
        means = [
            _mean(list(v.values())) if v or p else "-" for v, p in zip(values, planned, strict=True)
        ]
        rows.append([name, *means])
        rows.append([f"{name}, by seed", *(_each(v) or "-" for v in values)])
    return f"{_table(rows)}\n\n![accuracy by p̃](shares.png)" if found else NOT_RUN


def _iterations(results: Results, lines: Mapping[Cell, tuple[str, str, str]], plot: str) -> str:
    if not any(seeds_of(results, cell) for cell in lines):
        return NOT_RUN
    rows: list[list[str]] = []
    for cell, (_, _, name) in lines.items():
        for seed in seeds_of(results, cell):
            entries = results[with_seed(cell, seed).name]["iterations"]
            if not rows:
                heads = [f"iteration {e['iteration']}" for e in entries[1:]]
                rows.append(["", "seed", "base", *heads, "p sampled", "trained on"])
            after = [_with_wilson(e["evaluation"]) for e in entries]
            right = " → ".join(f"{100 * e['sampled']['positive_share']:.0f}" for e in entries[1:])
            sizes = " → ".join(str(e["trained"]["records"]) for e in entries[1:])
            rows.append([name, str(seed), *after, f"{right} %", sizes])
    for cell, (_, _, name) in lines.items():
        runs = _passes(results, cell)
        if len(runs) > 1:
            means = [_mean(list(column)) for column in zip(*runs.values(), strict=True)]
            rows.append([name, "mean", *means, "", ""])
    return f"{_table(rows)}\n\n![pass@1 by iteration]({plot})"


def _with_wilson(found: Mapping[str, Any]) -> str:
    low, high = 100 * found["pass_at_1_low"], 100 * found["pass_at_1_high"]
    return f"{100 * found['pass_at_1']:.1f} [{low:.1f}, {high:.1f}]"


def _passes(results: Results, cell: Cell) -> dict[int, list[float]]:
    return {
        seed: [
            100 * e["evaluation"]["pass_at_1"]
            for e in results[with_seed(cell, seed).name]["iterations"]
        ]
        for seed in seeds_of(results, cell)
    }


def _verifier(results: Results) -> str:
    seeds = seeds_of(results, _VERIFIER)
    if not seeds:
        return NOT_RUN
    figures: dict[str, Callable[[Any], float]] = {
        "right verdicts": lambda look: look["verifier"]["accuracy"],
        "of those given": lambda look: _given(look["verifier"]),
        "on right solutions": lambda look: look["verifier"]["accuracy_on_right"],
        "on wrong solutions": lambda look: look["verifier"]["accuracy_on_wrong"],
        "unparsable": lambda look: look["verifier"]["unparsable_share"],
        "pass@1": lambda look: look["vote"]["pass_at_1"],
        f"maj@{_cell(results, seeds[0])['before']['vote']['votes']}": lambda look: look["vote"][
            "maj_at_k"
        ],
        "weighted": lambda look: look["vote"]["weighted_at_k"],
    }
    rows = [["verifier", "seed", "solutions judged", *figures]]
    for name, key in (("untrained", "before"), ("trained", "after")):
        looks = {seed: _cell(results, seed)[key] for seed in seeds}
        for seed, look in looks.items():
            judged = str(look["verifier"]["solutions"])
            shown = [f"{100 * figure(look):.1f} %" for figure in figures.values()]
            rows.append([name, str(seed), judged, *shown])
        means = [_mean([100 * f(look) for look in looks.values()]) for f in figures.values()]
        rows.append([name, "mean", "", *means])
    trained = ", ".join(
        f"{found['judgements']} of {found['solutions']}"
        for found in (_cell(results, seed)["trained_on"] for seed in seeds)
    )
    return f"Trained on judgements of solutions, by seed: {trained}.\n\n{_table(rows)}"


def _given(judged: Mapping[str, Any]) -> float:
    """Right verdicts as a share of the judgements that give one."""
    given = 1 - float(judged["unparsable_share"])
    return float(judged["accuracy"]) / given if given else 0.0


def _cell(results: Results, seed: int) -> Mapping[str, Any]:
    return results[with_seed(_VERIFIER, seed).name]


def _costs(results: Results) -> str:
    if not results:
        return NOT_RUN
    trained = [r["seconds"] for r in results.values() if "epochs" in r]
    resampled = [r["seconds"] for r in results.values() if "iterations" in r]
    verified = [r["seconds"] for r in results.values() if "before" in r]
    rows = [["", "cells", "minutes, mean", "minutes, all"]]
    made = [sum(r["seconds"].values()) for n, r in results.items() if n.startswith("base-")]
    for name, seconds in (
        ("samples and base of a seed", made),
        ("epochs on one data set", trained),
        ("iterations", resampled),
        ("verifier", verified),
    ):
        if seconds:
            mean = statistics.fmean(seconds) / 60
            rows.append([name, str(len(seconds)), f"{mean:.1f}", f"{sum(seconds) / 60:.0f}"])
    environments = [r["environment"] for r in results.values()]
    commits = sorted({str(e["commit"])[:7] + _dirt(e["commit"]) for e in environments})
    versions = sorted(
        {f"{n} {v}" for e in environments for n, v in e["versions"].items() if v is not None}
    )
    threads = sorted({str(e["threads"]) for e in environments})
    return (
        f"{_table(rows)}\n\nThreads: {', '.join(threads)}. Commit: {', '.join(commits)}. "
        f"{', '.join(versions)}."
    )


def _dirt(commit: str | None) -> str:
    return "-dirty" if str(commit).endswith("-dirty") else ""


def fingerprint(results: Results, draw: Callable[..., Any]) -> str:
    """What a picture was drawn from: it goes into the file, so that a test can tell a stale one."""
    text = json.dumps(results, sort_keys=True) + draw.__name__
    return hashlib.sha256(text.encode()).hexdigest()


def draw_plot(draw: Callable[[Results], Any], results: Results, path: Path) -> bool:
    """Draws a picture; False if there is nothing to draw."""
    figure = draw(results)
    if figure is None:
        return False
    metadata = {"Software": None, "Description": fingerprint(results, draw)}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata=metadata)
    plt.close(figure)
    return True


def _panels(count: int) -> Any:
    figure, axes = plt.subplots(1, count, figsize=(8.5, 3.8), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _line(axis: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], look: Any) -> None:
    """The mean over seeds, and each seed as a small mark."""
    colour, marker, name = look
    means = [statistics.fmean(column) for column in zip(*runs, strict=True)]
    for run in runs:
        axis.plot(x, run, marker, color=colour, markersize=3, alpha=0.45, linestyle="none")
    axis.plot(x, means, color=colour, marker=marker, markersize=6, linewidth=1.6, label=name)


def _legend(figure: Any, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def _plot_epochs(results: Results, lines: Mapping[Cell, Any], title: str) -> Any:
    known = {cell: look for cell, look in lines.items() if seeds_of(results, cell)}
    if not known:
        return None
    figure, (left, right) = _panels(2)
    for cell, look in known.items():
        seeds = seeds_of(results, cell)
        runs, weights = [], []
        for seed in seeds:
            epochs = _epochs(results, cell, seed)
            base = accuracy(results[f"base-seed{seed}"]["evaluation"])
            runs.append([base, *(accuracy(e["evaluation"]) for e in epochs)])
            weights.append([e["training"]["weight_negative_mean"] for e in epochs])
        _line(left, range(len(runs[0])), runs, look)
        if all(w is not None for row in weights for w in row):
            _line(right, range(1, len(weights[0]) + 1), weights, look)
    left.set_ylim(bottom=-1)
    left.set_ylabel("held-out accuracy, greedy, %")
    right.set_ylabel("mean weight of negatives")
    for axis in (left, right):
        axis.set_xlabel("epoch over one data set")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=10)
    _legend(figure, left)
    return figure


def plot_methods(results: Results) -> Any:
    """Accuracy and weight of the negatives by epoch, for each method."""
    return _plot_epochs(results, _METHODS, "Off-policy on one data set: lines are means over seeds")


def plot_ratios(results: Results) -> Any:
    """The same for TOPR by level of the ratio."""
    return _plot_epochs(results, _RATIOS, "TOPR by level of the ratio: lines are means over seeds")


def plot_shares(results: Results) -> Any:
    """Accuracy after the last epoch by effective share of positives."""
    figure: Any = None
    axis: Any = None
    for method in ("topr", "tis", "reinforce"):
        look = _METHODS[Cell(method, 0)]
        found = {s: _last(results, _share_cell(method, s)) for s in _SHARES}
        points = {s: list(v.values()) for s, v in found.items() if v}
        if not points:
            continue
        if figure is None:
            figure, (axis,) = _panels(1)
        colour, marker, name = look
        for share, values in points.items():
            axis.plot([share] * len(values), values, marker, color=colour, markersize=3, alpha=0.45)
        means = [statistics.fmean(v) for v in points.values()]
        axis.plot(list(points), means, color=colour, marker=marker, markersize=6, label=name)
    if figure is None:
        return None
    axis.set_xscale("log")
    axis.set_xticks(list(_SHARES), [f"{100 * s:g}" for s in _SHARES])
    axis.minorticks_off()
    axis.set_ylim(bottom=-1)
    axis.set_xlabel("effective share of positives p̃, %")
    axis.set_ylabel("held-out accuracy, greedy, %")
    axis.set_title("After the last epoch: lines are means over seeds", fontsize=10)
    _legend(figure, axis)
    return figure


def _plot_iterations(results: Results, lines: Mapping[Cell, Any]) -> Any:
    known = {cell: look for cell, look in lines.items() if seeds_of(results, cell)}
    if not known:
        return None
    figure, (axis,) = _panels(1)
    for cell, look in known.items():
        runs = list(_passes(results, cell).values())
        _line(axis, range(len(runs[0])), runs, look)
        for run in runs:
            axis.plot(range(len(run)), run, color=look[0], linewidth=0.7, alpha=0.5)
    axis.set_ylim(bottom=-1)
    axis.set_xlabel("iteration (0: base)")
    axis.set_ylabel("held-out pass@1, %")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("Thick: mean over seeds; thin: each seed", fontsize=10)
    _legend(figure, axis)
    return figure


def plot_iterations(results: Results) -> Any:
    """pass@1 by iteration of the default recipe."""
    return _plot_iterations(results, {_DEFAULT: ("#0072B2", "o", "TOPR, default recipe")})


def plot_curation(results: Results) -> Any:
    """pass@1 by iteration and way of choosing the samples."""
    return _plot_iterations(results, _CURATIONS)


PLOTS: dict[str, Callable[[Results], Any]] = {
    "methods.png": plot_methods,
    "shares.png": plot_shares,
    "ratios.png": plot_ratios,
    "iterations.png": plot_iterations,
    "curation.png": plot_curation,
}
