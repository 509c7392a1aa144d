"""Learning rates: every method's from the same rates, on seeds that no comparison has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean

from benchmarks.learning.world import store
from benchmarks.learning.world.cells import Cell
from benchmarks.learning.world.run import run

RATES = (1e-4, 3e-4)
#: Tried when the comparisons had run, to see what their edges hide; no comparison uses them.
WIDER = (3e-5, 1e-3)
SEEDS = (100, 101)


def tried(cell: Cell, rates: Sequence[float] = RATES) -> list[list[Cell]]:
    """The pilot's cells for this one, by rate: its method, ratio, length and base, else defaults."""
    names = ("columns", "right", "ratio", "verifier")
    # Answers of 199 tokens take the rates of 55.
    probe = Cell(
        cell.like or cell.method,
        passes=min(cell.passes, 3),
        **{n: getattr(cell, n) for n in names},
    )
    return [[dataclasses.replace(probe, rate=r, seed=s) for s in SEEDS] for r in rates]


def rate(cell: Cell, path: Path) -> float:
    """The rate that ended with more right answers, after what the pilot's file lacks has run.

    It goes with the root of the batch, as AdamW's noise does.
    """
    complete(cell, RATES, path)
    return best(cell, store.read(path)) * (cell.batch / 32) ** 0.5


def complete(cell: Cell, rates: Sequence[float], path: Path) -> None:
    """Runs what the pilot's file lacks for a cell at these rates."""
    for one in chain.from_iterable(tried(cell, rates)):
        if one.name not in store.read(path):
            store.add(path, one.name, run(one, one.rate))


def best(cell: Cell, figures: store.Figures) -> float:
    """The rate at a batch of 32 that the pilot's figures choose; the smaller of equal ones."""
    ends = [mean(cells, figures) for cells in tried(cell)]
    return RATES[ends.index(max(ends))]


def mean(cells: Sequence[Cell], figures: store.Figures) -> float:
    """Per cent right after the last epoch, mean over these cells."""
    return fmean(_last(figures, one) for one in cells)


def _last(figures: store.Figures, cell: Cell) -> float:
    looks = figures[cell.name]["looks"]
    return float(looks[max(looks, key=int)]["right"])
