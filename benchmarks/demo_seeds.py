"""Runs the demo for several seeds in a row and collects every one of them, TOPR and SFT.

    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4
    python benchmarks/demo_seeds.py --quick --seeds 0 --out OUT     # does it run?

Resumes where it was stopped. Writes benchmarks/results/demo_seeds.csv (long format: seed, method,
decoding, correct, questions, settings) and prints the table of docs/demo.md with a 95 % interval of the
mean gain over the base (Student's t over seeds). Settings are the demo's defaults; nothing is chosen
per seed. Of --quick or another --model the CSV is OUT/demo_seeds.csv, and the committed one stays.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "demo_seeds.csv"
METHODS = {"base": "base model", "TOPR": "TOPR", "SFT": "positives only"}
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method and decoding of a demo's report."""
    settings = report["settings"]
    kept = [name for name in settings if name not in ("seed", "held_out")]
    return [
        {
            "seed": settings["seed"],
            "method": method,
            "decoding": decoding,
            "correct": result["correct"],
            "held_out": result["questions"],
            "train_positive_share": round(report["data"]["positive_share"], 4),
            **{f"setting_{name}": settings[name] for name in kept},
            "seconds_total": report["seconds"]["total"],
            "cpu_seconds_total": report["cpu_seconds"]["total"],
            "threads": report["environment"]["threads"],
            "commit": report["environment"]["commit"],
            "torch": report["environment"]["versions"]["torch"],
            "transformers": report["environment"]["versions"]["transformers"],
        }
        for method, accuracy in report["accuracy"].items()
        for decoding, result in accuracy.items()
    ]


def accuracies(rows: list[dict[str, Any]], method: str, decoding: str) -> dict[int, float]:
    """Accuracy in per cent by seed."""
    return {
        int(r["seed"]): 100 * int(r["correct"]) / int(r["held_out"])
        for r in rows
        if r["method"] == method and r["decoding"] == decoding
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, T95.get(n - 1, 1.96) * math.sqrt(variance / n)


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/demo.md: every seed, and the mean gain over the base with its interval."""
    seeds = sorted(accuracies(rows, "base", "greedy"))
    lines = [
        "| held-out accuracy, % | "
        + " | ".join(f"seed {s}" for s in seeds)
        + " | mean gain, 95 % |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for decoding in ("greedy", "sampled"):
        base = accuracies(rows, "base", decoding)
        for method, name in METHODS.items():
            found = accuracies(rows, method, decoding)
            cells = " | ".join(f"{found[s]:.1f}" for s in seeds)
            gain = ""
            if method != "base" and len(seeds) > 1:
                mean, half = interval([found[s] - base[s] for s in seeds])
                gain = f"{mean:+.1f} ± {half:.1f}"
            lines.append(f"| {name}, {decoding} | {cells} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, then writes and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("--table-only", action="store_true", help="print the committed table")
    parser.add_argument("--model", help="in place of the demo's own, as in topr demo --model")
    parser.add_argument(
        "--quick", action="store_true", help="as in topr demo: the figures mean nothing"
    )
    args = parser.parse_args()
    flags = [*(["--quick"] if args.quick else []), *(["--model", args.model] if args.model else [])]
    results = args.out / RESULTS.name if flags else RESULTS
    if not args.table_only:
        rows = []
        for seed in args.seeds:
            out = args.out / str(seed)
            if not (out / "report.json").exists():
                command = [Path(sys.executable).parent / "topr", "demo"]
                command += ["--seed", str(seed), "--out", out, *flags]
                done = subprocess.run([str(part) for part in command], check=False)
                # 1: TOPR got worse than the base. That seed is shown like any other.
                if done.returncode not in (0, 1):
                    raise SystemExit(f"seed {seed} stopped with status {done.returncode}")
            rows += rows_of(json.loads((out / "report.json").read_text(encoding="utf-8")))
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    with results.open(encoding="utf-8") as f:
        print(table(list(csv.DictReader(f))))


if __name__ == "__main__":
    main()
