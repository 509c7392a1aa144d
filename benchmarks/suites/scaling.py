"""Time and on CUDA peak memory by the number of tokens and by the vocabulary.

On two CPU cores the curves end where one run takes a quarter of a minute; on CUDA they go from 1k to 64k
tokens and from 32k to 262k columns. Real hidden states raised to the shape (hidden_states.synthesise).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import data, providers
from benchmarks.engine import Bench, Job, measure_case
from benchmarks.suites.memory import fits

ENTROPY = 1.2
#: Providers of the curves on a CPU: compiling each shape anew would take longer than measuring it.
CPU = (
    "topr exact",
    "topr tau 2^-10",
    "torch eager",
    "F.linear_cross_entropy",
    "TRL fused head tuned",
)
TOKENS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (1024, 4096, 16384, 65536)}
VOCABULARY = {"cpu": (32768, 65536, 131072, 262144), "cuda": (32768, 65536, 131072, 262144)}
#: Rows x D x V of the curve along tokens, then of the one along V; 0 is what varies.
BASE = {
    "cpu": ((0, 640, 49152), (256, 640, 0)),
    "cuda": ((0, 4096, 128256), (8192, 4096, 0)),
}
#: Multiplications of a forward product beyond which fp64 would take longer than the measurement.
CHECKED = {"cpu": 4e10, "cuda": 5e12}


def jobs(device: str, quick: bool) -> list[Job]:
    """Both curves, small sizes first, so that what is red is known before it costs time."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    tokens, vocabulary = BASE[device]
    shapes = [(n, *tokens[1:]) for n in TOKENS[device]]
    shapes += [(*vocabulary[:2], v) for v in VOCABULARY[device]]
    if quick:
        shapes = [(16, 16, 97), (32, 16, 97), (16, 16, 131)]
    found = []
    for n, d, v in shapes:
        found.append(Job(f"scaling {n}x{d}x{v} {dtype}", _job(dtype, n, d, v)))
    return found


def _job(dtype: str, rows: int, dim: int, vocab: int) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        torch._dynamo.reset()
        case = data.linear_case(bench.device, dtype, bench.quick, rows, dim, vocab, ENTROPY)
        facts = {**case.facts(), "mode": "trained"}
        found = providers.linear(bench.device)
        if bench.device == "cpu":
            found = {name: found[name] for name in CPU if name in found}
        for name, provider in list(found.items()):
            if not fits(provider, rows, vocab, bench.device):
                bench.drop(facts, name, "does not fit", "estimate beyond the free memory")
                del found[name]
        checked = rows * dim * vocab <= CHECKED[bench.device]
        measure_case(bench, case, found, facts, True, checked)

    return measure
