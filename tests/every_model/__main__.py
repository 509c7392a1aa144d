"""Judges every model and writes the table: ``python -m every_model``, with tests/ on the path."""

from __future__ import annotations

import argparse
import json
import sys

import transformers
from tqdm import tqdm

from every_model import table
from every_model.building import entries
from every_model.judge import ERROR, PATHS, WRONG
from every_model.sweep import quiet, sweep


def main() -> int:
    """Returns 1 if a model is wrong, breaks, or has no verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="classes to judge and print; none is all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="for each model")
    parser.add_argument("--resume", action="store_true", help="take up a run that was stopped")
    args = parser.parse_args()
    quiet()
    chosen = [e for e in entries() if not args.models or e.model in args.models]
    unknown = sorted(set(args.models) - {e.model for e in chosen})
    if unknown:
        parser.error(f"no class of the mappings is named {', '.join(unknown)}")
    saved = table.ROOT / "build" / "every_model" / f"{transformers.__version__}.jsonl"
    if args.models:
        saved = saved.with_suffix(".some.jsonl")
    done = {}
    if args.resume and saved.exists():
        done = dict(json.loads(line) for line in saved.read_text().splitlines())
    saved.parent.mkdir(parents=True, exist_ok=True)
    left = [entry for entry in chosen if entry.model not in done]
    with saved.open("a" if done else "w") as file:
        for entry, found in tqdm(sweep(left, args.jobs, args.seconds), total=len(left)):
            done[entry.model] = found
            print(json.dumps([entry.model, found]), file=file, flush=True)
    if args.models:
        print(json.dumps({name: done[name] for name in args.models}, indent=1))
    else:
        _write({entry.model: table.shortened(done[entry.model]) for entry in chosen})
    faults = [
        f"{name}: {path}: {verdict}"
        for name, found in done.items()
        for path, verdict in found.items()
        if path not in PATHS or verdict["verdict"] in (WRONG, ERROR)
    ]
    print(*faults, sep="\n")
    return int(bool(faults))


def _write(verdicts: dict[str, dict[str, object]]) -> None:
    """The verdicts into the committed table and its page."""
    made = table.read()
    made["versions"][transformers.__version__] = verdicts
    made["kinds"] |= {entry.model: entry.kind for entry in entries()}
    table.TABLE.write_text(table.written(made))
    table.PAGE.write_text(table.page(made))
    print(table.counts(verdicts))


if __name__ == "__main__":
    sys.exit(main())
