"""The runner: measures this package beside its peers and appends to the CSV of this machine.

    python -m benchmarks                                # all suites on the CPU
    python -m benchmarks --suite gpu --out OUT          # on a CUDA device
    python -m benchmarks --filter throughput linear     # jobs whose name has all of these words
    python -m benchmarks --quick                        # tiny random inputs: does everything run?
    python -m benchmarks --full                         # 2048 rows, 64k tokens: hours on two cores
    python -m benchmarks --compare HEAD~1               # is this tree slower than that revision?
    python -m benchmarks --list                         # jobs, providers, settings, links; runs nothing

benchmarks/README.md has the method.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers
from benchmarks.engine import QUICK, Bench, Interrupted, Job, Results, of_providers, summary
from benchmarks.suites.end_to_end import WHOLE

SUITES = ("throughput", "accuracy", "memory", "end_to_end", "scaling")
DEVICES = {"cpu": "cpu", "gpu": "cuda"}
OUT = Path("runs/benchmarks")


def all_jobs(device: str, quick: bool, full: bool = False) -> list[tuple[str, Job]]:
    """(suite, job), in the order of SUITES."""
    modules = {name: importlib.import_module(f"benchmarks.suites.{name}") for name in SUITES}
    return [
        (name, job) for name, module in modules.items() for job in module.jobs(device, quick, full)
    ]


class Progress:
    """A bar over the jobs where tqdm and a terminal are there, lines everywhere."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self.bar = tqdm(total=total, unit="job", dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def tick(self, name: str) -> None:
        """Shows what runs."""
        if self.bar is not None:
            self.bar.set_postfix_str(name)

    def job(self, name: str) -> None:
        """Shows which job runs."""
        if self.bar is not None:
            self.bar.set_description(name)

    def done(self) -> None:
        """One job more."""
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        """Leaves the terminal in order."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as ``timeout`` sends it, keeps what was measured, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    bench: Bench,
    jobs: list[tuple[str, Job]],
    minutes: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Runs jobs; 0, 1 if one of ours was red or a job failed, 130 after Ctrl-C.

    Args:
        bench: where they run.
        jobs: (suite, job).
        minutes: in all; every job may use its share of what is left, and one for which nothing is left
            is listed as not measured.
        now: the clock of the deadline.
    """
    progress = Progress(len(jobs))
    bench.say, bench.tick, bench.now = progress.say, progress.tick, now
    i = 0
    end = now() + 60 * minutes if minutes is not None else None
    failed = False
    try:
        for i, (suite, job) in enumerate(jobs):
            bench.suite, bench.job, bench.hurried = suite, job.name, False
            progress.job(job.name)
            bench.say(f"\n[{i + 1}/{len(jobs)}] {job.name}")
            if end is not None:
                left = sum(j.weight for _, j in jobs[i:])
                bench.deadline = now() + (end - now()) * job.weight / left
                if now() >= end:
                    bench.drop({}, "", "not measured", f"out of time after {minutes:g} minutes")
                    bench.flush()
                    continue
            try:
                job.measure(bench)
            except Interrupted:
                raise
            except ImportError as error:
                bench.drop({}, "", "missing", str(error))
                bench.flush()
                continue
            except Exception as error:
                bench.drop({}, "", "failed", summary(error))
                bench.flush()
                failed = True
                continue
            if bench.hurried:
                bench.add({}, "", "partly measured", note="out of time")
            else:
                bench.add({}, "", "finished", note=of_providers(bench.wanted))
            bench.flush()
            progress.done()
    except KeyboardInterrupt:
        for suite, job in jobs[i:]:
            bench.suite, bench.job = suite, job.name
            kept = job is jobs[i][1]
            bench.add({}, "", "partly measured" if kept else "not measured", note="interrupted")
        bench.flush()
        bench.say(f"interrupted: what was measured is in {bench.results.path}")
        return 130
    finally:
        progress.close()
    bench.say(f"\nappended to {bench.results.path}")
    if bench.red:
        bench.say("RED, without a number: " + ", ".join(sorted(bench.red)))
    return int(failed or bool(bench.red))


def describe(device: str, jobs: list[tuple[str, Job]]) -> None:
    """Prints jobs and providers."""
    for suite, job in jobs:
        print(f"{suite:12} {job.name}")
    for path in (providers.linear, providers.logits):
        print(f"\n{path.__name__}:")
        for name, p in path(device).items():
            what = f"missing: {p.missing}" if p.missing else ", ".join(filter(None, p.settings))
            print(f"  {name:34} {p.kind:5} {what}  {p.link}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=list(DEVICES), default="cpu")
    parser.add_argument(
        "--filter", nargs="+", default=[], metavar="WORD", help="jobs whose name has all of them"
    )
    parser.add_argument(
        "--providers", nargs="+", default=[], metavar="WORD", help="those with one in their name"
    )
    parser.add_argument(
        "--full", action="store_true", help="on a CPU the larger sizes; without --minutes, hours"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"tiny inputs; figures mean nothing and go to a folder of their own, {QUICK}",
    )
    parser.add_argument("--out", type=Path, help=f"folder of CSVs, default {OUT}")
    parser.add_argument("--repetitions", type=int, default=None, help="default 5; quick: 2")
    parser.add_argument(
        "--minutes", type=float, default=None, help="fewer repetitions in this time"
    )
    parser.add_argument(
        "--red-tests",
        default="",
        metavar="NAMES",
        help="tests of the kernels that failed before, for the note of every row",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what this commit finished")
    parser.add_argument("--list", action="store_true", help="jobs and providers; runs nothing")
    parser.add_argument("--compare", metavar="REV", help="this tree against a revision")
    parser.add_argument("--limit", type=float, default=1.1, help="ratio that --compare allows")
    args = parser.parse_args(arguments)
    if args.repetitions is not None and args.repetitions < 1:
        parser.error(
            f"--repetitions: expected at least 1, got {args.repetitions}; leave it out for the default"
        )
    if args.minutes is not None and not args.minutes >= 0:
        parser.error(
            f"--minutes: expected at least 0, got {args.minutes}; leave it out for no limit"
        )
    if args.compare:
        ignored = ("providers", "minutes", "out", "red_tests", "resume", "list")
        given = [
            f"--{name.replace('_', '-')}"
            for name in ignored
            if getattr(args, name) not in (None, [], False, "")
        ]
        if given:
            parser.error(
                f"--compare: expected no {', '.join(given)}, which it has no use for: it measures two "
                "revisions of this package and writes no CSV; leave out what it does not take"
            )
    return args


def known(words: list[str], device: str) -> None:
    """Refuses a word of ``--providers`` that is in no provider's name."""
    if not words:  # the peers take seconds to import
        return
    names = dict.fromkeys((*providers.linear(device), *providers.logits(device), WHOLE))
    for word in words:
        if not any(word in name for name in names):
            raise SystemExit(
                f"--providers: expected words that are in a provider's name, got {word!r}; there are "
                + ", ".join(names)
            )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    args = parse(arguments)
    device = DEVICES[args.suite]
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--suite gpu: torch sees no CUDA device; run it where there is one")
    if args.compare:
        from benchmarks.compare import compare

        try:
            with terminated_as_interrupted():
                return compare(
                    args.compare, device, args.filter, args.quick, args.repetitions, args.limit
                )
        except KeyboardInterrupt:
            print("interrupted: what was compared stands above")
            return 130
    known(args.providers, device)
    jobs = [
        (suite, job)
        for suite, job in all_jobs(device, args.quick, args.full)
        if all(word in f"{suite} {job.name}" for word in args.filter)
    ]
    if args.list:
        describe(device, jobs)
        return 0
    results = Results(args.out or OUT, device, args.quick)
    if args.resume:
        there = results.finished(args.providers)
        jobs = [(suite, job) for suite, job in jobs if job.name not in there]
        print(f"--resume: {len(there)} jobs are finished, {len(jobs)} to do")
        if not jobs:
            return 0
    if not jobs:
        raise SystemExit(f"--filter: no job has all of {args.filter} in its name; see --list")
    bench = Bench(
        device,
        results,
        quick=args.quick,
        full=args.full,
        repetitions=args.repetitions or (2 if args.quick else 5),
        wanted=args.providers,
        red_tests=args.red_tests,
    )
    with terminated_as_interrupted():
        return run(bench, jobs, args.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
