"""The protocol of a measurement, and the CSV it ends in.

For each case: (1) the fp64 truth of loss and gradients from the same inputs; (2) every provider runs
at each of its settings, warm, and keeps the fastest; (3) its loss and gradients are compared with the
truth. One of ours that is red gets no number; a peer is shown with the error it has; what is missing or
fails is a row that says so. (4) The rest takes turns with the floors, cold, and the medians and deciles
of the rounds are appended to the CSV of the machine. What fails in a round is such a row, too.
"""

from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Case, Loss, Provider
from benchmarks.measure import FEWEST, Clock, deciles, environment, interleave

COLUMNS = (
    *("suite", "job", "path", "provider", "setting", "kind", "mode"),
    *("metric", "median", "q10", "q90", "repetitions", "length", "note"),
    *("data", "rows", "dim", "vocab", "dtype"),
    *("entropy", "masked_share", "positive_share", "tapered_share"),
    *("device", "machine", "threads", "time"),
    *("commit", "dirty", "python", "torch", "triton", "versions"),
)
#: Relative error of a gradient by dtype beyond which ours is red. fp32: 2.3e-4 is what eager torch was
#: measured to have on these data; half precision: several roundings of the gradient itself.
LIMITS = {"float32": 5e-4, "float16": 5e-3, "bfloat16": 1e-2}
#: With a ``grad_tolerance``: what a wrong treatment of the tail exceeds (benchmarks/LOG.md: 2.2e-2).
TOLERANCE_LIMIT = 1.5e-2
#: Absolute and relative, of the loss.
LOSS_LIMIT = 1e-3
CHUNK = 1 << 24
#: Folder of what ``--quick`` writes: figures of random data must never meet real ones.
QUICK = "quick"
#: A setting that takes so many times as long as the best is not timed again.
HOPELESS = 1.5
#: Every time is also shown as a ratio to this provider's in the same round.
REFERENCE = "torch eager"
UNCHECKED = "not compared with fp64 at this size"
#: What the note of a row starts with whose kernels had failed a test before.
AFTER_RED = "measured after red tests: "


class Job(NamedTuple):
    """A named part of a suite, and its share of the time beside the others'."""

    name: str
    measure: Callable[[Bench], None]
    weight: float = 1.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after which rows were kept."""


class Results:
    """Appends to the CSV of this machine in a folder; ``quick`` to one in a folder of its own inside."""

    def __init__(self, folder: Path, device: str, quick: bool = False) -> None:
        self.where = environment(device)
        folder = folder / QUICK if quick else folder
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", self.where["machine"].lower()).strip("-")
        self.path = folder / f"{name}.csv"

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows, with a header when the file is new.

        Raises:
            ValueError: if the file has other columns.
        """
        new = not self.path.exists()
        if not new:
            with self.path.open(newline="", encoding="utf-8") as f:
                there = next(csv.reader(f), [])
            if there != list(COLUMNS):
                raise ValueError(
                    f"--out: {self.path} has other columns than this version writes; "
                    "move it away or pass another folder"
                )
        with self.path.open("a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, fieldnames=COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerows({**row, **self.where} for row in rows)

    def finished(self, wanted: Iterable[str] = ()) -> set[str]:
        """Jobs that this commit has finished on this machine with these versions, nothing dirty.

        Args:
            wanted: the words of ``--providers``; a run of all providers has finished these too.
        """
        if not self.path.exists() or self.where["dirty"] == "True":
            return set()
        same = ("commit", "dirty", "machine", "torch", "versions")
        with self.path.open(newline="", encoding="utf-8") as f:
            return {
                row["job"]
                for row in csv.DictReader(f)
                if row["metric"] == "finished" and row["note"] in ("", of_providers(wanted))
                if all(row[k] == self.where[k] for k in same)
            }


def of_providers(wanted: Iterable[str]) -> str:
    """Note of a job that was run with ``--providers``; "" without."""
    words = sorted(set(wanted))
    return "--providers " + " | ".join(words) if words else ""


class Bench:
    """One run of the runner: its options, clock and results.

    Args:
        device: "cpu" or "cuda".
        results: where rows go.
        quick: tiny random inputs, to see that everything works; the figures mean nothing.
        full: the sizes that take hours on a CPU.
        repetitions: of a provider in a case.
        wanted: words, one of which a provider's name must contain; empty for all.
        red_tests: names of tests that failed before, which the note of every row tells; "" for none.
        say: prints a line.
        tick: told what runs.
    """

    def __init__(
        self,
        device: str,
        results: Results,
        *,
        quick: bool = False,
        full: bool = False,
        repetitions: int = 5,
        wanted: Iterable[str] = (),
        red_tests: str = "",
        say: Callable[[str], None] = print,
        tick: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.device, self.results, self.quick, self.full = device, results, quick, full
        self.repetitions, self.wanted = repetitions, tuple(wanted)
        self.mark = AFTER_RED + red_tests if red_tests else ""
        self.say, self.tick = say, tick
        self.clock = Clock(device)
        self.now: Callable[[], float] = time.monotonic
        self.deadline = math.inf
        self.suite = self.job = ""
        self.red: set[str] = set()
        self.hurried = False
        self.best: dict[Any, str] = {}
        self._rows: list[dict[str, Any]] = []

    def select(self, found: Mapping[str, Provider]) -> dict[str, Provider]:
        """The providers that were asked for."""
        chosen = {
            name: provider
            for name, provider in found.items()
            if not self.wanted or any(word in name for word in self.wanted)
        }
        return chosen

    def add(
        self,
        facts: Mapping[str, Any],
        provider: str,
        metric: str,
        values: float | tuple[float, ...] | str = "",
        **columns: Any,
    ) -> None:
        """Keeps a row: a value, or its 10 % quantile, median and 90 % quantile."""
        if isinstance(values, tuple) and len(values) == 3:
            q10, median, q90 = values
        else:
            q10 = median = q90 = values[0] if isinstance(values, tuple) else values  # type: ignore[assignment]
        self._rows.append(
            {
                **facts,
                **{"suite": self.suite, "job": self.job, "provider": provider, "metric": metric},
                **{"median": median, "q10": q10, "q90": q90},
                **columns,
            }
        )

    def flush(self) -> None:
        """Writes what was kept."""
        rows, self._rows = self._rows, []
        if self.mark:
            for row in rows:
                row["note"] = "; ".join(filter(None, (row.get("note"), self.mark)))
        self.results.append(rows)

    def drop(
        self, facts: Mapping[str, Any], provider: str, why: str, note: str, ours: bool = False
    ) -> None:
        """Lists a provider that gets no number.

        Args:
            facts: columns of the case.
            provider: its name; "" for the whole job.
            why: "missing", "failed", "red", "does not fit" or "not measured".
            note: the reason.
            ours: one of ours that fails is red.
        """
        self.add(facts, provider, why, note=note)
        self.say(f"  {provider}: {why}: {note}")
        if ours:
            self.red.add(provider)


def compare(got: Tensor, exact: Tensor) -> dict[str, tuple[float, ...]]:
    """Errors of a gradient [..., n] against fp64: by norm, by rows, and the share of right signs."""
    got, exact = got.flatten(0, -2), exact.flatten(0, -2)
    wrong, rows, right = [], [], 0.0
    step = max(1, CHUNK // exact.shape[1])
    for g, e in zip(got.split(step), exact.split(step), strict=True):
        g = g.double()
        wrong.append((g - e).norm(dim=1))
        rows.append(e.norm(dim=1))
        right += (g.sign() == e.sign()).double().sum().item()
    error, size = torch.cat(wrong), torch.cat(rows)
    # A row whose true gradient underflows (a tapered-out sequence) has no relative error.
    relative = (error / size)[size > 1e-30].sort().values
    found = {"error": ((error.norm() / size.norm()).item(),)}
    found["sign_agreement"] = (right / exact.numel(),)
    if len(relative):
        at = [relative[round(q * (len(relative) - 1))].item() for q in (0.1, 0.5, 0.9, 1.0)]
        found |= {"row_error": tuple(at[:3]), "row_error_max": (at[3],)}
    return found


def errors(
    case: Case, provider: Provider, loss: Loss, trained: bool
) -> dict[str, tuple[float, ...]]:
    """Metric to a value or to (q10, median, q90), against fp64."""
    want = case.reference(provider.kind)
    case.aside = {}
    leaves = case.leaves(trained, copy=True)
    value = loss(case, *leaves)
    value.backward()
    found: dict[str, tuple[float, ...]] = {
        "loss_error": (abs(value.item() - want.loss.item()),),
        "loss": (want.loss.item(),),
    }
    for name, leaf in zip(case.leaf_names, leaves, strict=True):
        if not leaf.requires_grad:
            continue
        if leaf.grad is None:
            raise RuntimeError(f"no gradient {name}")
        against = compare(leaf.grad, want.gradients[name])
        found |= {f"{name}_{metric}": values for metric, values in against.items()}
    found |= {k: (float(v),) for k, v in case.aside.items() if not math.isnan(float(v))}
    case.aside = {}
    return found


def why_red(provider: Provider, dtype: str, against: Mapping[str, tuple[float, ...]]) -> str:
    """What is wrong with one of ours, "" if nothing is."""
    limit = TOLERANCE_LIMIT if provider.tolerance else LIMITS[dtype]
    for metric, (value, *_) in against.items():
        if metric in ("d_hidden_error", "d_weight_error", "d_logits_error") and not value <= limit:
            return f"{metric} {value:.1e}, at most {limit:.1e} is right"
    allowed = LOSS_LIMIT * (1 + abs(against["loss"][0]))
    if not against["loss_error"][0] <= allowed:
        return f"loss_error {against['loss_error'][0]:.1e}, at most {allowed:.1e} is right"
    return ""


def summary(error: BaseException) -> str:
    """First line of an error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def fastest(
    bench: Bench, name: str, provider: Provider, case: Case, facts: Mapping[str, Any], trained: bool
) -> tuple[str, Loss]:
    """The setting whose better of two warm runs is the fastest; only one setting is not run at all.

    A shape is searched once, on its first data; times depend on values in ours alone, which have one.
    """
    key = (name, trained, *(facts.get(k) for k in ("path", "rows", "dim", "vocab", "dtype")))
    settings = dict(provider.settings)
    if key in bench.best:
        settings = {bench.best[key]: settings[bench.best[key]]}
    if len(settings) == 1:
        return next(iter(settings.items()))

    def run(setting: str) -> float:
        bench.tick(f"{name} {setting}")
        return case.search(provider, settings[setting], bench.clock, trained)

    times: dict[str, float] = {}
    last = ""
    for setting in settings:
        try:
            run(setting)  # compiles and tunes: its time says nothing about the setting
            times[setting] = run(setting)
        except Exception as error:  # one setting may be illegal at this shape
            last = f"{setting}: {summary(error)}"
            bench.say(f"  {name}, {last}")
    if not times:
        raise RuntimeError(f"no setting works; {last}")
    hopeless = HOPELESS * min(times.values())
    for setting, first in times.items():
        if first <= hopeless:
            times[setting] = min(first, run(setting))
    bench.say(f"  {name}: " + ", ".join(f"{k} {v:.1f} ms" for k, v in times.items()))
    best = bench.best[key] = min(times, key=times.__getitem__)
    return best, settings[best]


def measure_case(
    bench: Bench,
    case: Case,
    found: Mapping[str, Provider],
    facts: Mapping[str, Any],
    trained: bool = True,
    checked: bool = True,
) -> None:
    """Measures every provider on a case and writes the rows; raises Interrupted after Ctrl-C.

    Args:
        bench: the run. Peers for which its deadline leaves no time are listed as not measured.
        case: the inputs.
        found: providers by name.
        facts: columns of the case.
        trained: with a gradient of the head.
        checked: False where fp64 of the case takes too long, which the rows say; what was red before
            stays out.
    """
    facts = {**facts, "mode": ("trained" if trained else "frozen") if "dim" in facts else ""}
    bench.say(", ".join(f"{k} {v}" for k, v in facts.items() if v != ""))
    selected = bench.select(found)
    if not selected:
        bench.say(f"  nothing here has a name with one of {list(bench.wanted)}")
        return
    chosen: dict[str, tuple[str, Loss]] = {}
    wrong: dict[str, dict[str, tuple[float, ...]]] = {}
    spent = 0.0
    for name, provider in selected.items():
        if provider.missing:
            bench.drop(facts, name, "missing", provider.missing)
            continue
        if name in bench.red:
            bench.drop(facts, name, "red", "in an earlier case of this run")
            continue
        # The rounds are still to come. A first run takes longer than those: two for three.
        late = bench.now() + (FEWEST - 1) * spent > bench.deadline
        if late and not (provider.ours or name == REFERENCE):
            bench.drop(facts, name, "not measured", "out of time")
            bench.hurried = True
            continue
        bench.tick(name)
        try:
            setting, loss = fastest(bench, name, provider, case, facts, trained)
            start = bench.now()
            against = errors(case, provider, loss, trained) if checked else {}
            if case.whole or not checked:  # else the check has warmed it up
                case.repetition(provider, loss, bench.clock, trained)
            spent += bench.now() - start
        except Exception as error:  # a peer that cannot do this shape says so and is left out
            bench.drop(facts, name, "failed", summary(error), provider.ours)
            continue
        finally:
            _release(case)
        about = {"setting": setting, "kind": provider.kind}
        red = why_red(provider, facts["dtype"], against) if provider.ours and checked else ""
        if red:
            bench.drop(facts, name, "red", red, ours=True)
            continue
        chosen[name], wrong[name] = (setting, loss), against
        for metric, value in against.items():
            bench.add(facts, name, metric, value, **about)

    def failed(name: str, error: Exception) -> None:
        ours = name in found and found[name].ours
        bench.drop(facts, name, "failed", f"in a round: {summary(error)}", ours)
        _release(case)

    calls: dict[str, Callable[[], dict[str, float]]] = {}
    floors = case.floors(bench.clock, trained)
    for name, floor in floors.items():
        try:
            floor()  # warm-up; the others had theirs
            calls[name] = floor
        except Exception as error:
            failed(name, error)
    for name, (_, loss) in chosen.items():
        calls[name] = lambda p=found[name], f=loss: case.repetition(p, f, bench.clock, trained)
    samples, interrupted = interleave(
        calls, bench.repetitions, bench.deadline, bench.tick, bench.now, failed
    )
    totals = {name: [run["total_ms"] for run in runs] for name, runs in samples.items()}
    unit, reference = totals.get("matmul", []), totals.get(REFERENCE, [])
    for name, runs in samples.items():
        count: dict[str, Any] = {"repetitions": len(runs)}
        if name not in floors:
            count |= {"setting": chosen[name][0], "kind": found[name].kind}
            count |= {} if checked else {"note": UNCHECKED}
        for metric in runs[0]:
            values = [run[metric] for run in runs if not math.isnan(run[metric])]
            if values:
                bench.add(facts, name, metric, deciles(values), **count)
        if unit and name != "matmul":
            ratios = [total / one for total, one in zip(totals[name], unit, strict=True)]
            bench.add(facts, name, "total_per_matmul", deciles(ratios), **count)
        if reference and name not in floors:
            ratios = [one / total for total, one in zip(totals[name], reference, strict=True)]
            bench.add(facts, name, "eager_per_total", deciles(ratios), **count)
        _show(bench, name, runs, unit, wrong.get(name, {}), chosen.get(name, ("",))[0])
    bench.flush()
    if interrupted:
        raise Interrupted


def _release(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.empty_cache()


def _show(
    bench: Bench,
    name: str,
    runs: list[dict[str, float]],
    unit: list[float],
    wrong: Mapping[str, tuple[float, ...]],
    setting: str,
) -> None:
    total = deciles([run["total_ms"] for run in runs])
    line = f"  {name:32} {total[1]:10.2f} ms ({total[0]:.2f} to {total[2]:.2f})"
    if unit:
        line += f" {total[1] / deciles(unit)[1]:7.2f} matmuls"
    for metric in ("d_hidden", "d_weight", "d_logits"):
        if f"{metric}_error" in wrong:
            line += f"  {metric} {wrong[f'{metric}_error'][0]:.1e}"
    if wrong.get("active_share", (1.0,))[0] < 1:
        line += f"  |A|/V {wrong['active_share'][0]:.1%}"
    bench.say(f"{line}  {setting}")
