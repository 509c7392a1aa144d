"""How everything here is measured: clocks, quantiles, interleaving, intervals, what it ran on.

Timings are cold: before each the last-level cache is overwritten. Providers of a case take turns, one
repetition each, in an order that rotates, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from topr_kernels.__main__ import cpu_name
from topr_kernels.kernels import native_library

ROOT = Path(__file__).parent.parent
PACKAGES = ("trl", "liger_kernel", "cut_cross_entropy", "quack_kernels", "verl", "transformers")
SOURCES = ("topr_kernels", "csrc", "benchmarks")
#: Larger than the last-level cache of what this has run on: 32 MiB of a CPU, 50 MiB of an H200.
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
#: How long the device sleeps before a timed call: several times what Python takes for one of ours.
SLEEP_MS = 5.0
#: A case that is over its share of the time stops after as many repetitions.
FEWEST = 3

Sample = TypeVar("Sample")


class Clock:
    """Times a call on a device, cold: the last-level cache is overwritten first.

    On CUDA the device sleeps before the first event while Python queues the call. On an empty queue the
    events would show how long Python takes, which is longer than small kernels do.

    Attributes:
        host_ms: milliseconds until the last call had returned, on CUDA, if that was while the device
            slept; NaN if the call waited for the device, so that it cannot be told from its work.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES[device], dtype=torch.int8, device=device)
        self.host_ms = math.nan
        self.sleep = self._sleep_cycles() if self.cuda else 0

    def __call__(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        self.flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # What came before must not lengthen the sleep.
        torch.cuda.synchronize()
        torch.cuda._sleep(self.sleep)
        before.record()
        start = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - start)
        self.host_ms = host_ms if host_ms < SLEEP_MS else math.nan
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after))

    @staticmethod
    def _sleep_cycles() -> int:
        """Cycles of the device's clock in SLEEP_MS."""
        tried = 10_000_000
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(tried)
        before.record()
        torch.cuda._sleep(tried)
        after.record()
        torch.cuda.synchronize()
        return round(tried * SLEEP_MS / before.elapsed_time(after))


def deciles(xs: Sequence[float]) -> tuple[float, float, float]:
    """10 % quantile, median and 90 % quantile within the range of what was seen."""
    q = statistics.quantiles(xs if len(xs) > 1 else [*xs, *xs], n=10, method="inclusive")
    return q[0], statistics.median(xs), q[-1]


def median_interval(xs: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval that holds the true median with at least the confidence, whatever the distribution.

    The k-th smallest and largest values, k as large as the binomial distribution allows; the whole
    line while there are too few (fewer than 6 at 95 %).
    """
    n, ordered = len(xs), sorted(xs)
    below, k = 0.0, 0
    while k < n // 2:
        below += math.comb(n, k) / 2**n
        if 2 * below > 1 - confidence:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)


def interleave(
    calls: Mapping[str, Callable[[], Sample]],
    repetitions: int,
    deadline: float = math.inf,
    tick: Callable[[str], None] = lambda name: None,
    now: Callable[[], float] = time.monotonic,
    failed: Callable[[str, Exception], None] | None = None,
) -> tuple[dict[str, list[Sample]], bool]:
    """Samples of every call, in turns, and whether Ctrl-C ended it.

    Args:
        calls: name to one repetition.
        repetitions: of each; fewer, but at least FEWEST, after the deadline. Ctrl-C keeps the whole
            rounds and is raised again if there is none.
        deadline: by ``now``.
        tick: told the name of each call before it.
        now: the clock of the deadline.
        failed: told of a call that raises, which then has no samples, and the rest goes on; without it
            the error is raised.
    """
    names = list(calls)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    done = 0
    try:
        while samples and done < repetitions and (done < FEWEST or now() < deadline):
            start = done % len(names)
            for name in names[start:] + names[:start]:
                if name not in samples:
                    continue
                tick(name)
                try:
                    samples[name].append(calls[name]())
                except Exception as error:
                    if failed is None:
                        raise
                    del samples[name]
                    failed(name, error)
            done += 1
    except KeyboardInterrupt:
        if not done:
            raise
        return {name: xs[:done] for name, xs in samples.items()}, True
    return samples, False


def environment(device: str) -> dict[str, Any]:
    """What a row was measured with and on."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], capture_output=True, text=True, check=False, cwd=ROOT
            )
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    # Of files that git does not know those count that are imported or compiled; notes do not.
    sources = [f"{folder}/*.{kind}" for folder in SOURCES for kind in ("py", "cpp", "h")]
    added = git("ls-files", "--others", "--exclude-standard", "--", *sources)
    return {
        "commit": commit,
        # A copy without its history cannot say that it is clean.
        "dirty": str(not commit or bool(changed) or bool(added)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "versions": "; ".join(f"{p} {v}" for p in PACKAGES if (v := version(p))),
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def version(package: str) -> str:
    """Version of an installed package, "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The CPU and the threads torch uses of it, and the instructions if ATEN_CPU_CAPABILITY says."""
    capability = os.environ.get("ATEN_CPU_CAPABILITY", "")
    held_back = f" held to {capability}" if capability in native_library.HELD_BACK else ""
    return f"cpu: {cpu_name() or 'unknown'}{held_back}, {torch.get_num_threads()} threads"
