"""Time of forward and backward, from hidden states and from logits, beside every peer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import data, providers
from benchmarks.engine import Bench, Job, measure_case

#: Rows x D x V: BAR.md's, then the micro-batches usual with Hugging Face.
SHAPES = (
    (8192, 4096, 128256),
    (16384, 2048, 151936),
    (4096, 896, 151936),
    (2048, 4096, 128256),
    (1024, 4096, 128256),
)
ENTROPIES = (1.2, 0.5, 2.6)
#: Two cores take 11 s for a round of all providers at so many rows and a trained head. Times of peers do
#: not depend on the values, so one data set is enough for a frozen head: (temperature, heads).
BOTH = ("trained", "frozen")
CPU_ROWS = 512
CPU = ((1.0, BOTH), (0.75, ("trained",)))
FULL_CPU_ROWS = 2048
FULL_CPU = ((1.0, BOTH), (0.6, BOTH), (0.75, BOTH))
#: Shares of the time of a run: on a CPU the first job of each head searches the settings of the peers.
WEIGHTS = {"T 1.0 trained": 15.0, "T 1.0 frozen": 10.0, "T 0.75 trained": 8.0}
LOGITS = {
    "cuda": ((8192, 128256), (16384, 151936), (4096, 151936), (2048, 50257)),
    "cpu": ((1024, 49152), (512, 151936)),
    "cpu, full": ((1024, 49152), (1024, 151936)),
}


def jobs(device: str, quick: bool, full: bool = False) -> list[Job]:
    """What matters most first: with a limit of time the last go without."""
    found = []
    dtype = "float32" if device == "cpu" else "bfloat16"
    size = data.size_of(device, full)
    linear: list[tuple[dict[str, float], str, tuple[str, ...]]]
    if quick:
        linear = [({**data.TINY}, "tiny", BOTH)]
    elif device == "cpu":
        rows, cases = (FULL_CPU_ROWS, FULL_CPU) if full else (CPU_ROWS, CPU)
        # The names differ, so that --resume knows one size from the other.
        many = f" {rows} rows" if full else ""
        linear = [({"rows": rows, "temperature": t}, f"T {t}{many}", heads) for t, heads in cases]
    else:
        linear = [
            ({"rows": n, "dim": d, "vocab": v, "entropy": e}, f"{e} nats {n}x{d}x{v}", BOTH)
            for e in ENTROPIES
            for n, d, v in SHAPES
        ]
    for shape, label, heads in linear:
        for mode in heads:
            weight = WEIGHTS.get(f"{label} {mode}", 3.0 if mode == "trained" else 2.0)
            name = f"throughput linear {label} {mode} {dtype}"
            found.append(Job(name, _linear(dtype, shape, mode), weight))
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    for kind in dtypes:
        for rows, vocab in ((16, 97),) if quick else LOGITS[size]:
            name = f"throughput logits {rows}x{vocab} {kind}"
            found.append(Job(name, _logits(kind, rows, vocab), 2.0))
    return found


def _linear(dtype: str, shape: dict[str, float], mode: str) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        torch._dynamo.reset()
        case = data.linear_case(bench.device, dtype, bench.quick, **shape)
        found = providers.linear(bench.device)
        measure_case(bench, case, found, case.facts(), mode == "trained")

    return measure


def _logits(dtype: str, rows: int, vocab: int) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        torch._dynamo.reset()
        case = data.logits_case(bench.device, dtype, rows, vocab)
        measure_case(bench, case, providers.logits(bench.device), case.facts())

    return measure
