"""Prints the README tables from the committed CSVs.

    python benchmarks/report.py [FOLDER]       # default: benchmarks/results

Where a setting was measured several times, the last one counts.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def table(rows: Iterable[list[str]]) -> str:
    """A markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def throughput(folder: Path) -> str:
    """Milliseconds, ratio to eager and errors of every provider, a table per mode."""
    found: dict[tuple[str, str, str, str], float] = {}
    entropies: list[str] = []
    for row in read(folder / "linear_throughput.csv"):
        key = row["mode"], row["entropy"], row["provider"], row["metric"]
        found[key] = float(row["median"])
        if row["entropy"] not in entropies:
            entropies.append(row["entropy"])
    parts = []
    for mode in dict.fromkeys(k[0] for k in found):
        names = dict.fromkeys(k[2] for k in found if k[0] == mode and k[2] != "matmul")
        head = [f"{mode} head, ms (x eager)", *(f"{float(e):.1f} nats" for e in entropies)]
        head += ["d_hidden error", "d_weight error"][: 2 if mode == "trained" else 1]
        lines = [head]
        for name in names:
            cells = []
            for entropy in entropies:
                ms = found.get((mode, entropy, name, "total_ms"))
                eager = found.get((mode, entropy, "torch eager", "total_ms"))
                share = found.get((mode, entropy, name, "active_share"), 1.0)
                if ms is None or eager is None:
                    cells.append("")
                    continue
                kept = f", {share:.1%} of V" if share < 1 else ""
                cells.append(f"{ms:.0f} ({eager / ms:.2f}{kept})")
            for metric in ("d_hidden_error", "d_weight_error")[: len(head) - len(entropies) - 1]:
                errors = [found[k] for k in found if (k[0], k[2], k[3]) == (mode, name, metric)]
                cells.append(f"{max(errors):.1e}")
            lines.append([name, *cells])
        parts.append(table(lines))
    return "\n\n".join(parts)


def logits(folder: Path) -> str:
    """Milliseconds of the logits path on a CPU, ratio to eager, and the share of a copy's bandwidth."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in read(folder / "logits_throughput.csv"):
        if row["machine"].startswith("cpu") and row["metric"] == "total_ms":
            size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
            traffic = 3 * size * int(row["rows"]) * int(row["vocab"])  # two reads and a write
            ms = float(row["median"])
            found[row["provider"], row["dtype"], f"{row['rows']} x {row['vocab']}"] = {
                "ms": ms,
                "copy": traffic / float(row["copy_bytes_per_s"]) * 1e3 / ms,
            }
    cases = list(dict.fromkeys(k[1:] for k in found))
    lines = [["ms (x eager; share of a copy's bandwidth)", *(f"{d}, {s}" for d, s in cases)]]
    for name in dict.fromkeys(k[0] for k in found):
        cells = []
        for case in cases:
            value, eager = found.get((name, *case)), found[("torch eager", *case)]
            ratio = "" if value is None else f"{eager['ms'] / value['ms']:.1f}"
            cells.append(
                "" if value is None else f"{value['ms']:.0f} ({ratio}; {value['copy']:.0%})"
            )
        lines.append([name, *cells])
    return table(lines)


def memory(folder: Path) -> str:
    """MiB beyond inputs and gradients."""
    found: dict[tuple[str, str, str], float] = {}
    for row in read(folder / "linear_memory.csv"):
        found[row["provider"], row["metric"], row["rows"]] = float(row["value"]) / 2**20
    sizes = list(dict.fromkeys(k[2] for k in found))
    lines = [["MiB beyond inputs and gradients", *(f"{n} rows" for n in sizes)]]
    for name in dict.fromkeys(k[0] for k in found):
        cells = []
        for n in sizes:
            values = [found.get((name, f"{m}_bytes", n)) for m in ("counted", "resident")]
            shown = [f"{v:.0f}" for v in values if v is not None]
            cells.append(" / ".join(shown) or "does not fit")
        lines.append([name, *cells])
    return table(lines)


def accuracy(folder: Path) -> str:
    """Error of the sequence log-ratio at temperature 1 in nats, mean and spread, by length."""
    found: dict[tuple[str, str, int], str] = {}
    for row in read(folder / "linear_accuracy.csv"):
        if float(row["temperature"]) == 1:
            name = row["provider"] + (", the sum alone" if row["test"] == "reduction" else "")
            mean, spread = float(row["mean"]), float(row["spread"])
            shown = f"{mean:+.1e}" if math.isnan(spread) else f"{mean:+.1e} ± {spread:.1e}"
            found[name, row["test"], int(row["length"])] = shown
    lengths = sorted({k[2] for k in found})
    lines = [["error of the log-ratio, nats", *(f"{n} tokens" for n in lengths)]]
    for name, test in dict.fromkeys(k[:2] for k in found):
        lines.append([name, *(found.get((name, test, n), "") for n in lengths)])
    return table(lines)


def main() -> None:
    """Prints the tables whose CSV is there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    tables = {
        "linear_throughput.csv": throughput,
        "linear_memory.csv": memory,
        "linear_accuracy.csv": accuracy,
        "logits_throughput.csv": logits,
    }
    for name, make in tables.items():
        if (folder / name).exists():
            print(make(folder), end="\n\n")


if __name__ == "__main__":
    main()
