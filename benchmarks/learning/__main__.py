"""Runs the comparisons that have no file yet, in their order, and writes the page."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.learning import page
from benchmarks.learning.cells import GRIDS, SIZES, cells_of
from benchmarks.learning.run import Runner
from topr_kernels.recipe.files import FileError
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.records import RecordError

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 2 for what the user must put right."""
    args = _parser().parse_args(argv)
    name = "quick" if args.quick else args.size
    size = SIZES[name]
    if args.model:
        size = dataclasses.replace(size, model=args.model)
    # Figures that mean nothing, or are of another size, must not come between the committed ones.
    committed = args.out is None and name == "small" and not args.model
    work = ROOT / "runs" / "learning" / name if args.out is None else args.out / "work"
    results = FOLDER / "results" if committed else args.out or work / "results"
    if args.out is None and name == "large" and not args.model:
        results = FOLDER / "results" / "large"
    readme = (FOLDER if committed else results) / "README.md"
    cells = list(cells_of(args.grid, args.seeds))
    try:
        if args.list:
            for grid, cell in cells:
                state = "done" if (results / f"{cell.name}.json").exists() else "to run"
                print(f"{grid:14}{cell.name:44}{state}")
            return 0
        if not args.report:
            runner = Runner(size, results, work)
            for i, (grid, cell) in enumerate(cells):
                if (results / f"{cell.name}.json").exists():
                    runner.check(cell)
                    continue
                start = time.perf_counter()
                runner.run(cell)
                took = time.perf_counter() - start
                # After every cell: whoever looks in between finds the page of the files there are.
                _write_page(results, readme)
                print(f"[{i + 1}/{len(cells)}] {grid} {cell.name}: {took:.0f} s", flush=True)
        for path in _write_page(results, readme):
            print(f"wrote {path}")
    except (SettingsError, FileError, RecordError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument(
        "--grid", nargs="+", choices=list(GRIDS), default=list(GRIDS), help="default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=list(SIZES), default="small", help="large is for a GPU")
    parser.add_argument("--quick", action="store_true", help="the same as --size quick")
    parser.add_argument("--model", help="in place of the size's, as in topr generate --model")
    parser.add_argument("--out", type=Path, help="folder of results, work and page")
    parser.add_argument("--report", action="store_true", help="write the page; run nothing")
    parser.add_argument("--list", action="store_true", help="say what would run; run nothing")
    return parser


def _write_page(results: Path, readme: Path) -> list[Path]:
    if not readme.exists():
        readme.parent.mkdir(parents=True, exist_ok=True)
        template = (FOLDER / "README.md").read_text(encoding="utf-8")
        readme.write_text(template, encoding="utf-8")
    return page.write(page.load(results), readme)


if __name__ == "__main__":
    raise SystemExit(main())
