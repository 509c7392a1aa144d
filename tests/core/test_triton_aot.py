"""The Triton kernels compile without a GPU, without spills and with the instructions they count on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import sass

#: What tests/aot.py compiles: 32 variants of the logits path, 32 of the fused-linear path.
NUMBER = 32 + 32
#: Of them, without regard to dtype.
EACH = 12 + 16
#: Kernels as they stand in the source.
FUNCTIONS = 4 + 4
#: Kernel -> most registers and most instructions per logit, under Triton 3.6, 3.8 and 3.9, any dtype. 64
#: registers leave room for 8 programs per multiprocessor, 128 for 4.
MOST = {
    "forward": (64, 8.0),
    "forward, narrow": (72, 7.5),
    "forward, all options": (64, 21.5),
    "forward, all options, narrow": (72, 22.0),
    "forward, split": (64, 7.5),
    "log_prob": (56, 7.5),
    "backward": (40, 7.0),
    "backward, narrow": (40, 10.0),
    "backward, all options": (48, 21.5),
    "backward, all options, narrow": (48, 24.0),
    "linear rows": (32, 7.5),
    "linear rows, narrow": (32, 7.0),
    "linear rows, all options": (56, 28.5),
    "linear rows, all options, narrow": (80, 28.5),
    "linear columns": (128, 19.0),
    "linear columns, narrow": (128, 18.5),
    "linear columns, all options": (168, 33.5),
    "linear columns, all options, narrow": (168, 34.0),
    "linear gradient": (32, 7.0),
    "linear gradient, narrow": (32, 9.5),
    "linear gradient, all options": (32, 21.0),
    "linear gradient, all options, narrow": (32, 24.0),
    "linear gather": (56, 21.0),
    "linear gather, narrow": (48, 23.5),
    "linear gather, all options": (64, 35.0),
    "linear gather, all options, narrow": (48, 35.0),
}
LINEAR_STREAMS = [
    f"linear {kernel}{options}"
    for kernel in ("rows", "columns", "gradient")
    for options in ("", ", all options")
]
WRITES_J = ("linear gradient", "linear gradient, all options", "linear gather")


def run(script: str, *args: str) -> list[dict[str, Any]]:
    """JSON lines of a script that must not run under the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1].joinpath(script)), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_all(*options: str) -> list[dict[str, Any]]:
    reports = run("aot.py", *options)
    for report in reports:
        print(*(f"{k}={v}" for k, v in report.items()))
    return reports


def test_loads_in_flight_are_those_before_the_first_use() -> None:
    names = [("LDG.E.128", "R8, desc[UR4][R2.64]"), ("LDG.E.128", "R12, desc[UR4][R2.64+0x800]")]
    use = ("FADD", "R4, R14, -R7")
    for order, flying in (([*names, use], 2), ([names[0], ("FADD", "R4, R9, R7"), names[1]], 1)):
        loop = [sass.Instruction(16 * i, *each) for i, each in enumerate(order)]
        assert sass.in_flight(loop) == flying
    # What a branch jumps over is not counted.
    cold = [("BRA", "0x30"), use, use, ("BRA", "0x0")]
    loop = [sass.Instruction(16 * i, *each) for i, each in enumerate(cold)]
    assert [i.address for i in sass.usual(loop)] == [0, 0x30]
    assert sass.loops(loop) == [loop]


def test_the_static_model() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "static_model.py"), "log_prob"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| log_prob")]
    assert [row[1] for row in rows] == ["fp32", "bf16"]
    # Over 8192 x 128256 logits: bf16 takes half the memory, and all else but the conversion is the same.
    assert [int(row[-1].rstrip(" |")) for row in rows] == [973, 486]
    assert all(0.9 < float(row[4]) < 1.2 for row in rows)


def test_sm_90() -> None:
    reports = compile_all("sm_90")
    assert len(reports) == NUMBER
    for r in reports:
        assert r["local"] == 0 and r["stack"] == 0, f"spills: {r}"
        assert r["f64"] == 0, f"fp64 instructions: {r}"
        # What is fused in one binary and not in another gives other bits.
        assert r["fusible"] == 0, f"products that ptxas may fuse: {r}"
        if r["kernel"] in MOST:
            registers, instructions = MOST[r["kernel"]]
            assert r["registers"] <= registers, f"registers: {r}"
            assert r["per_logit"] <= instructions, f"instructions per logit: {r}"
        # One load in flight per thread would wait for memory, not fill its bandwidth.
        two = r["kernel"] in ("backward", "linear gradient")
        assert not two or r["in_flight"] >= 2, f"one load at a time: {r}"
        capped = r["kernel"].endswith("all options")
        assert not capped or r["fma"], f"the polynomial of tanh is not fused: {r}"
        aligned = ("forward", "forward, split", "log_prob", "backward", *LINEAR_STREAMS)
        assert r["kernel"] not in aligned or r["wide_loads"], f"no 128-bit load: {r}"
        written = r["kernel"] in WRITES_J
        assert not written or r["wide_stores"], f"no 128-bit store: {r}"
        # Sums of the fused-linear path have one order.
        assert not r["kernel"].startswith("linear") or r["atomics"] == 0, f"atomics: {r}"
        if r["kernel"].startswith("forward"):
            # Without the fence or with cached loads the last program may sum stale values.
            assert r["acq_rel"] >= 2 and r["uncached_loads"], f"a fence is missing: {r}"


def test_other_targets_compile() -> None:
    targets = ("sm_80", "sm_100", "gfx942")
    # `make test-ptx` compiles every variant for each of them.
    which = os.environ.get("AOT", "turns")
    # One process: what it imports costs more than the compiler's cache.
    every = compile_all(*targets, which)
    for arch in targets:
        reports = [r for r in every if r["arch"] == arch]
        assert len({r["function"] for r in reports}) == FUNCTIONS
        assert which == "turns" or len(reports) == EACH
    assert len({r["kernel"] for r in every}) == EACH and len({r["dtype"] for r in every}) == 3
    for r in every:
        assert r.get("f64", 0) == 0, f"fp64 instructions: {r}"


def test_no_length_or_batch_size_needs_another_compilation() -> None:
    for report in run("specialisation.py"):
        # The form with one launch and the staged form share a kernel, hence two keys of it.
        assert report["first"] == {
            "rows_fwd_kernel": 2,
            "sequences_fwd_kernel": 1,
            "loss_fwd_kernel": 1,
            "logits_bwd_kernel": 1,
            "linear_rows_kernel": 1,
            "linear_gradient_kernel": 1,
            "linear_columns_kernel": 1,
            "linear_gather_kernel": 1,
        }
        assert report["last"] == report["first"], report["vocab"]
        # Every launch says it: the default depends on the version.
        assert set(report["fusion"]) == set(report["first"])
        assert all(said == [False] for said in report["fusion"].values())
