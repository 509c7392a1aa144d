"""Prints the README tables from the CSVs, draws the figures, and writes the tables into README.

    python -m benchmarks.report [FOLDER]             # default: benchmarks/results
    python -m benchmarks.report --figures            # and PNGs beside the CSVs
    python -m benchmarks.report --write README.md    # and replaces the tables of the same head there

Where something was measured several times, the last one counts; what then got no number loses the
earlier ones. What is missing, failed, red or was not measured stands under its table. A ratio to eager
is one within the rounds of a run. What ``--quick`` wrote is in a folder of its own. CSVs of before the
runner are read as well, until a new run replaces them.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine import AFTER_RED, COLUMNS, QUICK, REFERENCE, UNCHECKED

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str]
#: Metrics of a row without a number; all but the last also say that earlier numbers no longer hold.
NO_NUMBER = ("missing", "failed", "red", "does not fit", "not measured")
#: Columns that tell cases apart; a suite whose rows without a number cannot know them all has fewer.
CASE = ("device", "machine", "suite", "path", "mode", "rows", "vocab", "dtype")
CASE_MORE = ("dim", "entropy", "data")
JOB = ("device", "machine", "suite", "job")
ALONE = ", the sum alone"
#: Okabe and Ito's colours: told apart by colour-blind readers; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"


def read(path: Path) -> list[Row]:
    """Rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def load(folder: Path) -> list[Row]:
    """Rows of every CSV of the runner in a folder, older ones translated."""
    found: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        rows = read(path)
        if rows and list(rows[0]) == list(COLUMNS):
            found += rows
        elif path.name in BEFORE:
            found += [dict.fromkeys(COLUMNS, "") | row for row in BEFORE[path.name](rows)]
    return current(found)


def current(rows: list[Row]) -> list[Row]:
    """Rows that still hold, in the order of time.

    A row without a number deletes the earlier rows of its provider and case; any other row those without
    a number. "not measured" deletes nothing. A job that failed as a whole deletes its earlier rows.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    in_time = sorted(rows, key=lambda r: r["time"])  # stable: within a run the order of the file
    for row in in_time:
        if not row["provider"]:
            key = tuple(row[k] for k in JOB)
            if row["metric"] == "failed":
                for there in found.values():
                    there[:] = [r for r in there if tuple(r[k] for k in JOB) != key]
            found[key] = [row]
            continue
        key = (row["provider"].removesuffix(ALONE), *(row[k] for k in CASE))
        if row["suite"] != "memory":  # whose children alone know more of a case
            key += tuple(row[k] for k in CASE_MORE)
        there = found.setdefault(key, [])
        if row["metric"] == "not measured" and there:
            continue
        if row["metric"] in NO_NUMBER or (there and there[-1]["metric"] in NO_NUMBER):
            there.clear()
        there.append(row)
    return [row for there in found.values() for row in there]


def _linear_before(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        yield row | {"suite": "throughput", "path": "linear", "device": "cpu"}


def _logits_before(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        same = row | {"suite": "throughput", "path": "logits", "entropy": row["entropy_nats"]}
        same["device"] = "cpu" if row["machine"].startswith("cpu") else "cuda"
        yield same
        yield same | {
            "provider": "copy",
            "metric": "bytes_per_s",
            "median": row["copy_bytes_per_s"],
        }


def _memory_before(rows: list[Row]) -> Iterator[Row]:
    there = {(row["provider"], row["rows"]) for row in rows}
    for row in rows:
        yield row | {"suite": "memory", "path": "linear", "median": row["value"]}
    # That script left out in silence what did not fit, and nothing else.
    for name in dict.fromkeys(row["provider"] for row in rows):
        for size, (first, *_) in groups(rows, "rows"):
            if (name, *size) not in there:
                same = first | {"provider": name, "metric": "does not fit"}
                yield same | {"suite": "memory", "path": "linear"}


def _accuracy_before(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        alone = ALONE if row["test"] == "reduction" else ""
        what = "log_prob" if row["length"] == "1" else "log_ratio"
        for metric in ("mean", "spread", "max"):
            yield row | {
                "suite": "accuracy",
                "provider": row["provider"] + alone,
                "data": f"SmolLM2 at {row['temperature']}",
                "metric": f"{what}_error_{metric}",
                "median": row[metric],
                "device": "cpu",
            }


#: Files that the scripts before the runner wrote.
BEFORE = {
    "linear_throughput.csv": _linear_before,
    "linear_memory.csv": _memory_before,
    "linear_accuracy.csv": _accuracy_before,
    "logits_throughput.csv": _logits_before,
}


def table(rows: Iterable[list[str]]) -> str:
    """A markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_suite(rows: list[Row], suite: str, path: str | None = None) -> list[Row]:
    """Rows of a suite, and of a path where one is given."""
    return [r for r in rows if r["suite"] == suite and path in (None, r["path"])]


def groups(rows: list[Row], *names: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Rows by the values of columns, in the order of their first appearance."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    yield from found.items()


def milliseconds(value: float, device: str) -> str:
    """As many digits as mean something there."""
    return f"{value:.0f}" if device == "cpu" and value >= 10 else f"{value:.2f}"


def absent(
    part: list[Row], case_of: Callable[[Row], str], numbers: Iterable[tuple[str, str]]
) -> list[str]:
    """A line that lists who got no number where, and why; none if there is nobody.

    Args:
        part: rows of a table.
        case_of: the name of a row's case.
        numbers: (provider, case) of every cell that has a number.
    """
    there = dict.fromkeys(numbers)
    part = [r for r in part if r["provider"]]
    why = {
        (r["provider"], case_of(r)): r["metric"] + (f": {why_absent(r)}" if why_absent(r) else "")
        for r in part
        if r["metric"] in NO_NUMBER
    }
    cases = list(dict.fromkeys(case_of(r) for r in part))
    listed = []
    for name in dict.fromkeys(k[0] for k in (*there, *why)):
        reasons: dict[str, list[str]] = {}
        for case in cases:
            if (name, case) not in there:
                reasons.setdefault(why.get((name, case), "not measured"), []).append(case)
        for reason, at in reasons.items():
            where = "" if len(at) == len(cases) else " at " + ", ".join(at)
            listed.append(f"{name}{where} ({reason})")
    return ["Without a number: " + "; ".join(listed) + "."] if listed else []


def why_absent(row: Row) -> str:
    """Note of a row without what all rows of its run say."""
    return row["note"].partition(AFTER_RED)[0].removesuffix("; ")


def unfinished(rows: list[Row]) -> Iterator[str]:
    """A line with the jobs that did not run to their end the last time, and why."""
    jobs = [r for r in rows if not r["provider"] and r["metric"] != "finished"]
    for (device, machine), here in groups(jobs, "device", "machine"):
        where = "" if device == "cpu" else f" on {machine}"
        listed = (
            f"{r['job']} ({r['metric']}{': ' * bool(why_absent(r))}{why_absent(r)})" for r in here
        )
        yield f"Jobs that did not run to their end{where}: " + "; ".join(listed) + "."


def after_red(rows: list[Row]) -> Iterator[str]:
    """A line with the tests that had failed where a row was measured."""
    suites: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        _, marked, names = row["note"].partition(AFTER_RED)
        if marked:
            suites.setdefault((row["machine"], names), {})[row["suite"]] = None
    for (machine, names), found in suites.items():
        yield f"Measured on {machine} after red tests ({', '.join(found)}): {names}."


def nats(row: Row) -> str:
    """The case of a row where cases differ by entropy."""
    return f"{float(row['entropy']):.1f} nats"


def ratio_to_eager(own: Row, measured: Row | None, eager: Row | None) -> float | None:
    """How many times as long eager takes: of the rounds of the run that gave the time.

    Args:
        own: row of the provider's time.
        measured: row of the ratio, where there is one.
        eager: of eager's time; CSVs of before the runner have no ratios.
    """

    def same_run(other: Row) -> bool:
        return all(own[k] == other[k] for k in ("time", "commit"))

    if measured is not None:
        return float(measured["median"]) if same_run(measured) else None
    if eager is not None and not own["time"] and same_run(eager):
        return float(eager["median"]) / float(own["median"])
    return None


def place(row: Row) -> str:
    """Shape and machine for a head; on the CPU the text above the table has them."""
    if row["device"] == "cpu":
        return ""
    return f" {row['rows']} x {row['dim']} x {row['vocab']} {row['dtype']}, {row['machine']}:"


def throughput(rows: list[Row]) -> Iterator[str]:
    """Milliseconds, ratio to eager and errors of every provider, a table per mode and shape."""
    keys = ("device", "machine", "rows", "dim", "vocab", "dtype", "mode")
    for (device, *_, mode), part in groups(of_suite(rows, "throughput", "linear"), *keys):
        found: dict[tuple[str, str, str], Row] = {}
        for r in part:
            if r["metric"] not in NO_NUMBER:
                found[r["entropy"], r["provider"], r["metric"]] = r
        entropies = list(dict.fromkeys(k[0] for k in found))
        names = dict.fromkeys(
            k[1] for k in found if not k[1].endswith(("matmul", "matmuls", "DNN"))
        )
        head = [f"{mode} head,{place(part[0])} ms (x eager)"]
        head += [f"{float(e):.1f} nats" for e in entropies]
        metrics = ("d_hidden_error", "d_weight_error")[: 2 if mode == "trained" else 1]
        head += [metric.replace("_error", " error") for metric in metrics]
        lines = [head]
        timed = []
        for name in names:
            cells = []
            for entropy in entropies:
                ms = found.get((entropy, name, "total_ms"))
                if ms is None:
                    cells.append("")
                    continue
                timed.append((name, nats(ms)))
                ratio = ratio_to_eager(
                    ms,
                    found.get((entropy, name, "eager_per_total")),
                    found.get((entropy, REFERENCE, "total_ms")),
                )
                share = found.get((entropy, name, "active_share"))
                about = [] if ratio is None else [f"{ratio:.2f}"]
                if share is not None and float(share["median"]) < 1:
                    about.append(f"{float(share['median']):.1%} of V")
                shown = milliseconds(float(ms["median"]), device)
                cells.append(shown + (f" ({', '.join(about)})" if about else ""))
            for metric in metrics:
                wrong = [float(r["median"]) for k, r in found.items() if k[1:] == (name, metric)]
                cells.append(f"{max(wrong):.1e}" if wrong else "")
            lines.append([name, *cells])
        if names:
            yield table(lines)
        yield from absent(part, nats, timed)


def logits_shape(row: Row) -> str:
    """The case of a row of the logits path."""
    return f"{row['dtype']}, {row['rows']} x {row['vocab']}"


def logits(rows: list[Row]) -> Iterator[str]:
    """Milliseconds of the logits path, ratio to eager, and the share of a copy's bandwidth."""
    for (device, machine), part in groups(
        of_suite(rows, "throughput", "logits"), "device", "machine"
    ):
        found: dict[tuple[str, str, str], Row] = {}
        copies: dict[str, float] = {}
        traffic: dict[str, float] = {}
        for r in part:
            case = logits_shape(r)
            if (r["provider"], r["metric"]) == ("copy", "bytes_per_s"):
                size = 4 if r["dtype"] == "float32" else 2
                copies[case] = float(r["median"])
                traffic[case] = 3.0 * size * int(r["rows"]) * int(r["vocab"])  # 2 reads, 1 write
            elif r["metric"] in ("total_ms", "eager_per_total") and r["provider"] != "copy":
                found[r["provider"], case, r["metric"]] = r
        where = "" if device == "cpu" else f"{machine}, "
        cases = list(dict.fromkeys(k[1] for k in found))
        lines = [[f"{where}ms (x eager; share of a copy's bandwidth)", *cases]]
        timed = []
        for name in dict.fromkeys(k[0] for k in found):
            cells = []
            for case in cases:
                row = found.get((name, case, "total_ms"))
                if row is None:
                    cells.append("")
                    continue
                timed.append((name, case))
                ms = float(row["median"])
                measured = found.get((name, case, "eager_per_total"))
                ratio = ratio_to_eager(row, measured, found.get((REFERENCE, case, "total_ms")))
                about = [] if ratio is None else [f"{ratio:.1f}"]
                if case in copies:
                    about.append(f"{traffic[case] / copies[case] * 1e3 / ms:.0%}")
                shown = f"{ms:.0f}" if device == "cpu" else f"{ms:.2f}"
                cells.append(shown + (f" ({'; '.join(about)})" if about else ""))
            lines.append([name, *cells])
        if timed:
            yield table(lines)
        yield from absent(part, logits_shape, timed)


def row_count(row: Row) -> str:
    """The case of a row of the memory of the fused-linear path."""
    return f"{row['rows']} rows"


def memory(rows: list[Row]) -> Iterator[str]:
    """MiB beyond inputs and gradients, from hidden states."""
    for (device, machine), part in groups(of_suite(rows, "memory", "linear"), "device", "machine"):
        found: dict[tuple[str, str], dict[str, float]] = {}
        too_large = {
            (r["provider"], row_count(r)): {} for r in part if r["metric"] == "does not fit"
        }
        for r in part:
            if r["metric"].endswith("_bytes"):
                at = found.setdefault((r["provider"], row_count(r)), {})
                at[r["metric"].removesuffix("_bytes")] = float(r["median"]) / 2**20
        shown = found | too_large
        sizes = list(dict.fromkeys(k[1] for k in shown))
        where = "" if device == "cpu" else f", {machine}"
        lines = [[f"MiB beyond inputs and gradients{where}", *sizes]]
        for name in dict.fromkeys(k[0] for k in shown):
            cells = []
            for n in sizes:
                at = found.get((name, n), {})
                values = [at[m] for m in ("counted", "resident", "allocator") if m in at]
                empty = "does not fit" if (name, n) in too_large else ""
                cells.append(" / ".join(f"{v:.0f}" for v in values) or empty)
            lines.append([name, *cells])
        if shown:
            yield table(lines)
        yield from absent(part, row_count, shown)


def logits_memory(rows: list[Row]) -> Iterator[str]:
    """Bytes beyond the logits and their gradient, as a share of the logits."""
    for (device, machine), part in groups(of_suite(rows, "memory", "logits"), "device", "machine"):
        found: dict[tuple[str, str], dict[str, float]] = {}
        for r in part:
            if r["metric"].endswith("_bytes"):
                at = found.setdefault((r["provider"], logits_shape(r)), {})
                at[r["metric"]] = float(r["median"])
        cases = list(dict.fromkeys(k[1] for k in found))
        where = "" if device == "cpu" else f", {machine}"
        lines = [[f"beyond logits and gradient, share of the logits{where}", *cases]]
        for name in dict.fromkeys(k[0] for k in found):
            cells = []
            for case in cases:
                at = found.get((name, case), {})
                parts = [at[f"{m}_bytes"] for m in ("counted", "resident") if f"{m}_bytes" in at]
                cells.append(" / ".join(f"{v / at['logits_bytes']:.1%}" for v in parts))
            lines.append([name, *cells])
        if found:
            yield table(lines)
        yield from absent(part, logits_shape, found)


def accuracy(rows: list[Row]) -> Iterator[str]:
    """Error of the sequence log-ratio at temperature 1 in nats, mean and spread, by length."""
    part = [r for r in of_suite(rows, "accuracy") if r["data"].endswith((" 1.0", "random"))]
    for (device, machine), here in groups(part, "device", "machine"):
        found: dict[tuple[str, int], dict[str, str]] = {}
        for r in here:
            metric, _, which = r["metric"].rpartition("_")
            if metric in ("log_prob_error", "log_ratio_error"):
                found.setdefault((r["provider"], int(r["length"])), {})[which] = r["median"]
        lengths = sorted({k[1] for k in found})
        where = "" if device == "cpu" else f", {machine}"
        lines = [[f"error of the log-ratio, nats{where}", *(f"{n} tokens" for n in lengths)]]
        for name in dict.fromkeys(k[0] for k in found):
            cells = []
            for n in lengths:
                at = found.get((name, n))
                if at is None:
                    cells.append("")
                    continue
                mean, spread = float(at["mean"]), float(at["spread"])
                shown = f"{mean:+.1e}" if math.isnan(spread) else f"{mean:+.1e} ± {spread:.1e}"
                cells.append(shown)
            lines.append([name, *cells])
        if found:
            yield table(lines)
        ratios = [r for r in here if r["mode"] == ""]
        yield from absent(ratios, lambda r: "", ((name, "") for name, _ in found))


def weights_and_gradients(rows: list[Row]) -> Iterator[str]:
    """Largest error of min(1, ratio) by length, and errors of the gradients, bf16 inputs."""
    part = [r for r in of_suite(rows, "accuracy") if r["data"].endswith((" 1.0", "random"))]
    for (device, machine), here in groups(part, "device", "machine"):
        weight: dict[tuple[str, int], float] = {}
        gradient: dict[tuple[str, str], float] = {}
        names: dict[str, None] = {}
        metrics = ("d_hidden_error", "d_weight_error", "d_weight_sign_agreement")
        for r in here:
            if r["metric"] == "weight_error_max":
                weight[r["provider"], int(r["length"])] = float(r["median"])
            elif r["metric"] in metrics:
                gradient[r["provider"], r["metric"]] = float(r["median"])
            else:
                continue
            names[r["provider"]] = None
        lengths = sorted({k[1] for k in weight})
        where = "" if device == "cpu" else f", {machine}"
        lines = [[f"bf16 inputs{where}: largest error of min(1, ratio)"]]
        lines[0] += [f"{n} tokens" for n in lengths]
        lines[0] += ["d_hidden error", "d_weight error", "d_weight, right signs"]
        for name in names:
            cells = [f"{weight[name, n]:.1e}" if (name, n) in weight else "" for n in lengths]
            for metric in metrics:
                value = gradient.get((name, metric))
                style = ".1%" if metric.endswith("agreement") else ".1e"
                cells.append("" if value is None else format(value, style))
            lines.append([name, *cells])
        if names:
            yield table(lines)
        checked = [r for r in here if r["mode"] == "trained"]
        yield from absent(checked, lambda r: "", ((name, "") for name, _ in gradient))


def end_to_end(rows: list[Row]) -> Iterator[str]:
    """Milliseconds of a training step and its parts."""
    for (device, machine, model), part in groups(
        of_suite(rows, "end_to_end"), "device", "machine", "data"
    ):
        found: dict[tuple[str, str], float] = {}
        for r in part:
            if r["metric"].endswith("_ms"):
                found[r["provider"], r["metric"]] = float(r["median"])
        names = [n for n in dict.fromkeys(k[0] for k in found) if (n, "optimizer_ms") in found]
        where = "" if device == "cpu" else f", {machine}"
        lines = [[f"a step of {model}{where}, ms", "forward", "backward", "optimizer", "all"]]
        for name in names:
            parts = ("forward_ms", "backward_ms", "optimizer_ms", "total_ms")
            lines.append([name, *(milliseconds(found[name, p], device) for p in parts)])
        if names:
            yield table(lines)
        yield from absent(part, lambda r: "", ((name, "") for name in names))


def scaling(rows: list[Row]) -> Iterator[str]:
    """Milliseconds by tokens and by vocabulary."""
    keys = ("device", "machine", "dtype", "dim")
    for (device, machine, dtype, dim), part in groups(of_suite(rows, "scaling"), *keys):
        if not dim:
            continue
        found = {
            (r["provider"], r["rows"], r["vocab"]): float(r["median"])
            for r in part
            if r["metric"] == "total_ms"
        }
        shapes = list(dict.fromkeys(k[1:] for k in found))
        where = "" if device == "cpu" else f", {machine}"
        lines = [[f"ms by rows x V, D = {dim}, {dtype}{where}"]]
        lines[0] += [" x ".join(shape) for shape in shapes]
        for name in dict.fromkeys(k[0] for k in found):
            values = [found.get((name, *shape)) for shape in shapes]
            cells = ["" if v is None else milliseconds(v, device) for v in values]
            lines.append([name, *cells])
        if found:
            yield table(lines)
        timed = [(name, f"{n} x {v}") for name, n, v in found]
        yield from absent(part, lambda r: f"{r['rows']} x {r['vocab']}", timed)
        large = dict.fromkeys(f"{r['rows']} x {r['vocab']}" for r in part if UNCHECKED in r["note"])
        if large:
            yield f"{UNCHECKED[0].upper()}{UNCHECKED[1:].replace('this size', ', '.join(large))}."


TABLES = (
    throughput,
    memory,
    accuracy,
    weights_and_gradients,
    logits,
    logits_memory,
    end_to_end,
    scaling,
    unfinished,
    after_red,
)


def tables(folder: Path) -> list[str]:
    """Every table that has rows."""
    rows = load(folder)
    return [text for make in TABLES for text in make(rows)]


def _axes(width: float = 8.3, height: float = 4.0):  # type: ignore[no-untyped-def]
    # README is about 830 pixels wide: at 200 a picture is sharp there, and its text 9 points tall.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 9, "savefig.dpi": 200, "axes.axisbelow": True})
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return figure, axes


def _save(figure: object, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Software": None})  # type: ignore[attr-defined]
    pyplot.close(figure)  # type: ignore[arg-type]
    return path


def roofline(rows: list[Row], folder: Path) -> Iterator[Path]:
    """Time over one forward matmul of every provider, with the floors that were measured."""
    keys = ("machine", "rows", "dim", "vocab", "dtype", "mode")
    for key, part in groups(of_suite(rows, "throughput", "linear"), *keys):
        ratio = [r for r in part if r["metric"] == "total_per_matmul"]
        floors = {r["provider"]: float(r["median"]) for r in ratio if "matmuls" in r["provider"]}
        points = {
            (r["provider"], r["entropy"]): tuple(float(r[q]) for q in ("q10", "median", "q90"))
            for r in ratio
            if "matmuls" not in r["provider"]
        }
        if not points:
            continue
        names = list(dict.fromkeys(k[0] for k in points))
        entropies = sorted({k[1] for k in points}, key=float)
        figure, axes = _axes(height=1.3 + 0.3 * len(names))
        for i, entropy in enumerate(entropies):
            here = [(names.index(n), *points[n, e]) for n, e in points if e == entropy]
            y, low, middle, high = zip(*here, strict=True)
            offset = 0.2 * (i - (len(entropies) - 1) / 2)
            error = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            axes.errorbar(
                middle,
                [v + offset for v in y],
                xerr=error,
                fmt=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                markersize=5,
                linewidth=1,
                label=f"{float(entropy):.1f} nats",
            )
        for style, (label, value) in zip(
            ("-", "--", ":"), {"one matmul": 1.0, **floors}.items(), strict=False
        ):
            axes.axvline(value, color="#555555", linestyle=style, linewidth=1.2, label=label)
        axes.set_xscale("log")
        largest = max(v[2] for v in points.values()) * 1.15
        smallest = min([0.9, *(v[0] * 0.9 for v in points.values())])
        axes.set_xlim(smallest, largest)
        _plain_ticks(axes.xaxis, smallest, largest)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        machine, n, d, v, dtype, mode = key
        axes.set_xlabel("time of forward and backward over one forward matmul (10 to 90 % of runs)")
        axes.set_title(f"{mode} head, {n} x {d} x {v}, {dtype}, {machine}", fontsize=9)
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
        yield _save(figure, folder / f"roofline-{_slug(machine)}-{n}x{d}x{v}-{mode}.png")


def error_by_length(rows: list[Row], folder: Path) -> Iterator[Path]:
    """Largest error of the log-ratio by length of the sequence."""
    part = [r for r in of_suite(rows, "accuracy") if r["data"].endswith((" 1.0", "random"))]
    for (machine,), here in groups(part, "machine"):
        curves: dict[str, dict[int, float]] = {}
        for r in here:
            if r["metric"] == "log_ratio_error_max" and "alone" not in r["provider"]:
                curves.setdefault(r["provider"], {})[int(r["length"])] = float(r["median"])
        if curves:
            title = f"bf16 hidden states and head, {machine}"
            path = folder / f"accuracy-{_slug(machine)}.png"
            labels = "tokens of a sequence", "largest error of the log-ratio, nats"
            yield _curves(curves, title, *labels, path)


def times_by_size(rows: list[Row], folder: Path) -> Iterator[Path]:
    """Time over one forward matmul by tokens and by vocabulary."""
    for (machine,), part in groups(of_suite(rows, "scaling"), "machine"):
        ratio = [r for r in part if r["metric"] == "total_per_matmul"]
        for size, fixed in (("rows", "vocab"), ("vocab", "rows")):
            for (value, dim), here in groups(ratio, fixed, "dim"):
                curves: dict[str, dict[int, float]] = {}
                for r in here:
                    curves.setdefault(r["provider"], {})[int(r[size])] = float(r["median"])
                if max(map(len, curves.values())) > 1:
                    title = f"{fixed} {value}, D = {dim}, {machine}"
                    path = folder / f"scaling-{size}-{_slug(machine)}.png"
                    yield _curves(curves, title, size, "time over one forward matmul", path)


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    shown = [t for t in ticks if low <= t <= high]
    axis.set_ticks(shown, [str(t) for t in shown])
    axis.set_ticks([], minor=True)


def _slug(machine: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in machine.lower()).split())


def _curves(curves: dict[str, dict[int, float]], title: str, x: str, y: str, path: Path) -> Path:
    figure, axes = _axes()
    for i, (name, points) in enumerate(curves.items()):
        at = sorted(points)
        axes.plot(
            at,
            [points[n] for n in at],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="-" if i < len(COLOURS) else "--",
            markersize=5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({n for points in curves.values() for n in points})
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    values = [v for points in curves.values() for v in points.values()]
    if min(values) > 0.1 and max(values) < 128:  # else powers of ten
        _plain_ticks(axes.yaxis, min(values) * 0.9, max(values) * 1.1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, path)


def write(readme: Path, made: list[str]) -> list[str]:
    """Replaces the tables of the same head in a README; heads of tables that it has not."""
    text = readme.read_text(encoding="utf-8")
    lines, unknown = text.split("\n"), []
    for new in (t for t in made if t.startswith("|")):
        head = new.split("|")[1]
        starts = [
            i
            for i, line in enumerate(lines)
            if line.startswith(f"|{head}|") and not lines[i - 1].startswith("|")
        ]
        if not starts:
            unknown.append(head.strip())
            continue
        end = starts[0]
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        lines[starts[0] : end] = new.split("\n")
    readme.write_text("\n".join(lines), encoding="utf-8")
    return unknown


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables; draws and writes where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--figures", action="store_true", help="PNGs into the folder")
    parser.add_argument("--write", type=Path, metavar="README", help="replace the tables there")
    args = parser.parse_args(arguments)
    made = tables(args.folder)
    print("\n\n".join(made))
    if not made:
        print(f"no results in {args.folder}; those of --quick are in {args.folder / QUICK}")
    if args.figures:
        rows = load(args.folder)
        for draw in (roofline, error_by_length, times_by_size):
            for path in draw(rows, args.folder):
                print(f"\nwrote {path}")
    if args.write:
        for head in write(args.write, made):
            print(f"\nnot in {args.write}, put it there by hand: {head}")


if __name__ == "__main__":
    main()
