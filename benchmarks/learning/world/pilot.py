"""Learning rates: every method's from the same rates, on seeds that no comparison has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean

from benchmarks.learning.world import store
from benchmarks.learning.world.cells import Cell
from benchmarks.learning.world.run import run

RATES = (1e-4, 3e-4)
SEEDS = (100, 101)


def tried(cell: Cell) -> list[list[Cell]]:
    """The pilot's cells for this one, by rate: its method, ratio, length and base, else defaults."""
    names = ("columns", "right", "ratio", "verifier")
    # Answers of 199 tokens take the rates of 55.
    probe = Cell(
        cell.like or cell.method,
        passes=min(cell.passes, 3),
        **{n: getattr(cell, n) for n in names},
    )
    return [[dataclasses.replace(probe, rate=r, seed=s) for s in SEEDS] for r in RATES]


def rate(cell: Cell, path: Path) -> float:
    """The rate that ended with more right answers, after what the pilot's file lacks has run.

    It goes with the root of the batch, as AdamW's noise does.
    """
    for cells in tried(cell):
        for one in cells:
            if one.name not in store.read(path):
                store.add(path, one.name, run(one, one.rate))
    return best(cell, store.read(path)) * (cell.batch / 32) ** 0.5


def best(cell: Cell, figures: store.Figures) -> float:
    """The rate at a batch of 32 that the pilot's figures choose; the smaller of equal ones."""
    ends = [fmean(_last(figures, one) for one in cells) for cells in tried(cell)]
    return RATES[ends.index(max(ends))]


def _last(figures: store.Figures, cell: Cell) -> float:
    looks = figures[cell.name]["looks"]
    return float(looks[max(looks, key=int)]["right"])
