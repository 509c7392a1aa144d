"""Runs the small world's comparisons that have no figures yet; see README.md beside it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.learning.world import page, pilot, store
from benchmarks.learning.world.cells import GRIDS, SEEDS, Cell, cells_of
from benchmarks.learning.world.claims import CLAIMS, cells_of_claim
from benchmarks.learning.world.run import CACHE, run

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
PILOT = FOLDER / "pilot.json"
#: The smallest cell that does everything once.
QUICK = Cell("topr", columns=2, questions=4, samples=4, epochs=1, batch=8, rate=1e-4)


def run_cells(cells: Iterable[Cell], path: Path) -> None:
    """Runs what the file lacks."""
    for cell in cells:
        if cell.name not in store.read(path):
            store.add(path, cell.name, run(cell, cell.rate or pilot.rate(cell, PILOT)))
            print(cell.name, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    part, parts = (int(x) for x in args.part.split("/"))
    seeds = range(part, args.seeds, parts)
    if args.quick:
        run_cells([QUICK], args.out)
        return 0
    if args.claim:
        claim = CLAIMS[args.claim - 1]
        out = CACHE / f"claim-{args.claim}.json" if args.out == RESULTS else args.out
        for seed in seeds:
            run_cells([dataclasses.replace(c, seed=seed) for c in cells_of_claim(claim)], out)
        print(page.verdict_line(store.read(out), claim))
        return 0
    if args.report:
        page.write(store.read(RESULTS), store.read(PILOT), FOLDER / "README.md")
        return 0
    for grid in args.grid:
        cells = list(cells_of(grid, seeds))
        if args.wider:
            for cell in GRIDS[grid]:
                pilot.complete(cell, pilot.WIDER, PILOT)
        elif args.list:
            done = store.read(args.out)
            print(f"{grid:14} {sum(c.name in done for c in cells)} of {len(cells)}")
        else:
            run_cells(cells, args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.world", description=__doc__
    )
    parser.add_argument("--grid", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many; default {SEEDS}")
    parser.add_argument(
        "--part", default="0/1", help="i/n: every n-th seed from i, for n processes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of figures")
    parser.add_argument(
        "--claim",
        type=int,
        choices=range(1, len(CLAIMS) + 1),
        metavar=f"1..{len(CLAIMS)}",
        help="run its cells anew, beside the committed figures, and say the verdict",
    )
    parser.add_argument("--report", action="store_true", help="write the page; run nothing")
    parser.add_argument("--quick", action="store_true", help="one small cell, to see that it runs")
    parser.add_argument("--wider", action="store_true", help="try the pilot's outer rates alone")
    parser.add_argument("--list", action="store_true", help="say what is done; run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
