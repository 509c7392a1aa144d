"""Writes the generated parts of the page from the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.learning import page as large
from benchmarks.learning import verdicts
from benchmarks.learning.verdicts import interval
from benchmarks.learning.world.cells import (
    GRIDS,
    LONG,
    MOST_SEEDS,
    RATIOS,
    RIGHT,
    SEEDS,
    SHARES,
    Cell,
)
from benchmarks.learning.world.claims import CLAIMS, Claim, differences, verdict
from benchmarks.learning.world.pilot import RATES, WIDER, best, mean, tried
from benchmarks.learning.world.store import Figures
from topr_kernels.recipe.files import atomic_path

NAMES = {
    "topr": "TOPR",
    "sft": "positives only",
    "reinforce": "naive REINFORCE",
    "is": "IS",
    "tis": "TIS",
    "ppo": "PPO",
    "prefix": "prefix ratio",
}


def write(results: Figures, pilot: Figures, readme: Path) -> None:
    """Replaces what stands between the marks of the page, and draws its picture."""
    text = large.fill(readme.read_text(encoding="utf-8"), blocks(results, pilot))
    with atomic_path(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    path = readme.with_name("map.png")
    if not large.draw_plot(draw, results, path):
        path.unlink(missing_ok=True)


def blocks(results: Figures, pilot: Figures) -> dict[str, str]:
    """The generated parts by name."""
    return {
        "verdicts": _verdicts(results),
        "rates": _rates(pilot),
        "methods": _looks(results, {_name(c): c for c in GRIDS["methods"]}),
        "shares": _shares(results),
        "ratios": _ratios(results),
        "map": _map(results),
        "staleness": _looks(results, {_name(c): c for c in GRIDS["staleness"] + GRIDS["fresh"]}),
        "rounds": _looks(
            results, {_name(c): c for c in GRIDS["rounds"] + GRIDS["curation"] + GRIDS["half"]}
        ),
        "noise": _looks(results, {_name(c): c for c in GRIDS["noise"]}),
        "costs": _costs(results, pilot),
    }


def shown(values: Sequence[float]) -> str:
    """Mean and 95 % interval of differences."""
    if len(values) < 2:
        return "-"
    found = interval(values)
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def verdict_line(results: Figures, claim: Claim) -> str:
    """A claim's verdict in one line."""
    values = list(differences(results, claim).values())
    return f"{claim.text}: {shown(values)} points, {len(values)} seeds: {verdict(values)}"


def _verdicts(results: Figures) -> str:
    committed = large.load(Path(large.__file__).parent / "results")
    others = {claim.text: claim for claim in verdicts.CLAIMS}
    rows = [["", "claim", "here, points", "seeds", "verdict here", "135M, points", "verdict there"]]
    for number, claim in enumerate(CLAIMS, 1):
        values = list(differences(results, claim).values())
        row = [str(number), claim.text, shown(values), str(len(values)), f"**{verdict(values)}**"]
        there = ["-", "-"]
        if claim.text in others:
            found = list(verdicts.differences(committed, others[claim.text]).values())
            there = [shown(found), verdicts.verdict(found)]
        rows.append([*row, *there])
    return large._table(rows)


def _name(cell: Cell) -> str:
    name = NAMES[cell.method]
    told = {
        "ratio": f"ratio {cell.ratio}",
        "share": f"p̃ = {100 * cell.share:g} %",
        "rounds": f"{cell.rounds} rounds",
        "curation": {"karenina": "Anna Karenina", "half": "half right"}.get(
            cell.curation, cell.curation
        ),
        "right": f"base {cell.right} %",
        "like": f"at the rate of {NAMES.get(cell.like, '')}",
    }
    default = Cell(cell.method)
    return ", ".join(
        [name, *(t for n, t in told.items() if getattr(cell, n) != getattr(default, n))]
    )


def _runs(results: Figures, cell: Cell) -> list[dict[str, object]]:
    names = (dataclasses.replace(cell, seed=seed).name for seed in range(MOST_SEEDS))
    return [results[name] for name in names if name in results]


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    found = interval(values)
    return f"{found.mean:.1f} ± {found.half:.1f}"


def _looks(results: Figures, lines: dict[str, Cell]) -> str:
    """A row a cell: per cent right at each look, mean over seeds with its 95 % interval."""
    rows = [["", "seeds", "base", "looks", "last unreadable", "weight of negatives"]]
    for name, cell in lines.items():
        runs: list[dict[str, object]] = _runs(results, cell)
        if not runs:
            rows.append([name, "0", verdicts.NOT_RUN, "", "", ""])
            continue
        looks = [list(run["looks"].values()) for run in runs]  # type: ignore[attr-defined]
        keys = list(runs[0]["looks"])  # type: ignore[call-overload]
        curve = [f"{key}: {_mean([x[i]['right'] for x in looks])}" for i, key in enumerate(keys)]
        weights = [
            "-"
            if any(x[i]["weight"] is None for x in looks)
            else f"{fmean(x[i]['weight'] for x in looks):.2g}"
            for i in (0, -1)
        ]
        rows.append(
            [
                name,
                str(len(runs)),
                _mean([run["base"]["right"] for run in runs]),  # type: ignore[index]
                "; ".join(curve),
                f"{fmean(x[-1]['unreadable'] for x in looks):.1f} %",
                " → ".join(weights),
            ]
        )
    return large._table(rows)


def _ends(results: Figures, cell: Cell) -> list[float]:
    runs = _runs(results, cell)
    return [list(run["looks"].values())[-1]["right"] for run in runs]  # type: ignore[attr-defined]


def _shares(results: Figures) -> str:
    rows = [["p̃", *(f"{100 * share:g} %" for share in SHARES)]]
    for method in ("topr", "tis", "reinforce"):
        row = [NAMES[method]]
        for share in SHARES:
            cell = Cell("sft") if (method, share) == ("topr", 1.0) else Cell(method, share=share)
            row.append(_mean(_ends(results, cell)))
        rows.append(row)
    return large._table(rows)


def _ratios(results: Figures) -> str:
    lengths = [Cell(""), Cell("", passes=3), Cell("", **LONG)]
    rows = [["", *(f"{cell.tokens} tokens" for cell in lengths)]]
    kinds = [("topr", ratio) for ratio in RATIOS]
    for method, ratio in (*kinds, ("prefix", "sequence"), ("sft", "sequence")):
        name = NAMES[method] if method != "topr" else ratio
        cells = [dataclasses.replace(cell, method=method, ratio=ratio) for cell in lengths]
        rows.append([name, *(_mean(_ends(results, cell)) for cell in cells)])
    return large._table(rows)


#: Where the map looks: what a row is called and how its cells differ from the default.
_PLACES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("19 tokens, 32 x 16 samples, batch 32", {}),
    ("19 tokens, 32 x 16 samples, batch 128", {"batch": 128}),
    ("19 tokens, 256 x 2 samples, batch 32", {"questions": 256, "samples": 2}),
    ("55 tokens, 32 x 16 samples, batch 32", {"passes": 3}),
    ("199 tokens, 16 x 16 samples, batch 16", LONG),
    ("19 tokens, errors of noise", {"errors": "noise"}),
)
_EPOCHS = ("1", "2", "4")


def _map(results: Figures) -> str:
    """TOPR minus positives only at each look."""
    rows = [["", "epoch", *(f"base {right} %" for right in RIGHT)]]
    for name, changes in _PLACES:
        for epoch in _EPOCHS:
            found = [_help(results, changes, right, epoch) for right in RIGHT]
            if any(len(values) > 1 for values in found):
                rows.append([name, epoch, *map(shown, found)])
    return large._table(rows) + (
        "\n\n![TOPR minus positives only](map.png)" if _has_map(results) else ""
    )


def _has_map(results: Figures) -> bool:
    places = ((changes, right) for _, changes in _PLACES for right in RIGHT)
    return any(len(_help(results, changes, right, "1")) > 1 for changes, right in places)


def draw(results: Figures) -> Any:
    """The map as a picture; None without figures."""
    panels = [
        (f"{name}, epoch {epoch}", [_help(results, changes, right, epoch) for right in RIGHT])
        for epoch in (_EPOCHS[0], _EPOCHS[-1])
        for name, changes in _PLACES
    ]
    panels = [(name, columns) for name, columns in panels if any(len(c) > 1 for c in columns)]
    if not _has_map(results):
        return None
    figure, axes = plt.subplots(figsize=(8.5, 1 + 0.55 * len(panels)), layout="constrained")
    for row, (_, columns) in enumerate(panels):
        for shift, (right, values) in enumerate(zip(RIGHT, columns, strict=True)):
            if len(values) > 1:
                found = interval(values)
                axes.errorbar(
                    found.mean,
                    row + 0.2 * (shift - 1),
                    xerr=found.half,
                    fmt="osD"[shift],
                    color=("#D55E00", "#0072B2", "#009E73")[shift],
                    label=f"base {right} %",
                )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(panels)), [name for name, _ in panels])
    axes.invert_yaxis()
    axes.set_xlabel("TOPR minus positives only, points, 95 % interval")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return figure


def _help(results: Figures, changes: dict[str, Any], right: int, epoch: str) -> list[float]:
    """TOPR minus positives only, a difference a seed."""
    topr, sft = (Cell(m, right=right, **changes) for m in ("topr", "sft"))
    return _between(results, topr, sft, epoch)


def _between(results: Figures, one: Cell, other: Cell, epoch: str) -> list[float]:
    values = []
    for seed in range(MOST_SEEDS):
        names = (dataclasses.replace(cell, seed=seed).name for cell in (one, other))
        looks = [results[name]["looks"].get(epoch) for name in names if name in results]
        if len(looks) == 2 and all(looks):
            values.append(looks[0]["right"] - looks[1]["right"])
    return values


def _rates(pilot: Figures) -> str:
    """What the pilot chose, of what is complete."""
    low, high = WIDER
    rates = (low, *RATES, high)
    rows = [["method", "ratio", "answer, tokens", "base, %", *(f"{r:g}" for r in rates), "chosen"]]
    known = set()
    for cell in (cell for cells in GRIDS.values() for cell in cells):
        lines = tried(cell, rates)
        if lines[0][0] in known or not all(c.name in pilot for c in chain(*lines[1:-1])):
            continue
        known.add(lines[0][0])
        ends = [
            f"{mean(line, pilot):.1f}" if all(c.name in pilot for c in line) else "-"
            for line in lines
        ]
        one = lines[0][0]
        name = "verifier" if one.verifier else NAMES[one.method]
        row = [name, one.ratio, str(one.tokens), str(one.right)]
        rows.append([*row, *ends, f"{best(cell, pilot):g}"])
    return large._table(rows)


def _costs(results: Figures, pilot: Figures) -> str:
    seconds = [run["seconds"] for run in results.values()]
    if not seconds:
        return verdicts.NOT_RUN
    wanted = {
        dataclasses.replace(cell, seed=seed).name
        for cells in GRIDS.values()
        for cell in cells
        for seed in range(SEEDS)
    }
    tried = sum(run["seconds"] for run in pilot.values())
    return (
        f"{len(results)} cells, {len(wanted - set(results))} of the {len(wanted)} planned not run; "
        f"{sum(seconds) / 3600:.2f} hours of one core's time, {fmean(seconds):.1f} seconds a cell. "
        f"The pilot's {len(pilot)} cells took {tried / 3600:.2f} hours more."
    )
