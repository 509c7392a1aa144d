"""Time and on CUDA peak memory by the number of tokens and by the vocabulary.

On two CPU cores the curves end where a round takes some seconds; on CUDA, and on a CPU with ``--full``,
they go from 1k to 64k tokens and from 32k to 262k columns. Beyond ``CHECKED`` nothing is compared with
fp64, which the rows say. Real hidden states raised to the shape (hidden_states.synthesise).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import data, providers
from benchmarks.engine import Bench, Job, measure_case
from benchmarks.suites.memory import fits

ENTROPY = 1.2
#: Providers of the curves. Each shape would have to be compiled or searched anew, which takes longer
#: than measuring it: on a CPU those without settings, on CUDA those that torch need not compile.
PROVIDERS = {
    "cpu": ("topr exact", "topr tau 2^-10", "torch eager"),
    "cuda": (
        *("topr exact", "topr tau 2^-10", "topr tau 2^-16", "torch eager"),
        *("F.linear_cross_entropy", "TRL fused head tuned"),
        *("cut cross-entropy", "Liger selective log-prob"),
    ),
}
TOKENS = {
    "cpu": (256, 512, 1024),
    "cpu, full": (1024, 4096, 16384, 65536),
    "cuda": (1024, 4096, 16384, 65536),
}
#: On a CPU the curve along tokens has the third point: 256 rows x 49152.
VOCABULARY = {
    "cpu": (24576, 98304),
    "cpu, full": (32768, 65536, 131072, 262144),
    "cuda": (32768, 65536, 131072, 262144),
}
#: Rows x D x V of the curve along tokens, then of the one along V; 0 is what varies.
BASE = {
    "cpu": ((0, 640, 49152), (256, 640, 0)),
    "cuda": ((0, 4096, 128256), (8192, 4096, 0)),
}
#: Rows x V of the job that takes longest.
LARGEST = {"cpu": 1024 * 49152, "cpu, full": 65536 * 49152, "cuda": 65536 * 128256}
#: Multiplications of a forward product beyond which fp64 would take longer than the measurement.
CHECKED = {"cpu": 4e10, "cuda": 5e12}


def jobs(device: str, quick: bool, full: bool = False) -> list[Job]:
    """Both curves, small sizes first, so that what is red is known before it costs time."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    tokens, vocabulary = BASE[device]
    size = data.size_of(device, full)
    shapes = [(n, *tokens[1:]) for n in TOKENS[size]]
    shapes += [(*vocabulary[:2], v) for v in VOCABULARY[size]]
    if quick:
        shapes = [(16, 16, 97), (32, 16, 97), (16, 16, 131)]
    found = []
    for n, d, v in shapes:
        weight = 0.3 + 2.7 * n * v / LARGEST[size]
        found.append(Job(f"scaling {n}x{d}x{v} {dtype}", _job(dtype, n, d, v), weight))
    return found


def _job(dtype: str, rows: int, dim: int, vocab: int) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        torch._dynamo.reset()
        case = data.linear_case(bench.device, dtype, bench.quick, rows, dim, vocab, ENTROPY)
        facts = {**case.facts(), "mode": "trained"}
        found = providers.linear(bench.device)
        found = {name: found[name] for name in PROVIDERS[bench.device] if name in found}
        for name, provider in list(bench.select(found).items()):
            if not fits(provider, rows, vocab, bench.device):
                bench.drop(facts, name, "does not fit", "estimate beyond the free memory")
                del found[name]
        checked = rows * dim * vocab <= CHECKED[bench.device]
        measure_case(bench, case, found, facts, True, checked)

    return measure
