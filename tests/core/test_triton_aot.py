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

#: What tests/aot.py compiles: 23 variants of the logits path, 32 of the fused-linear path.
NUMBER = 23 + 32
#: Of them, without regard to dtype.
EACH = 9 + 16
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


def compile_all(arch: str, *options: str) -> list[dict[str, Any]]:
    reports = run("aot.py", arch, *options)
    for report in reports:
        print(*(f"{k}={v}" for k, v in report.items()))
    return reports


def test_sm_90() -> None:
    reports = compile_all("sm_90")
    assert len(reports) == NUMBER
    for r in reports:
        assert r["local"] == 0 and r["stack"] == 0, f"spills: {r}"
        assert r["f64"] == 0, f"fp64 instructions: {r}"
        # A product that is fused with a sum is rounded in another way than the row's maximum was.
        columns = r["kernel"].startswith("linear columns")
        assert columns or r["fusible"] == 0, f"products that ptxas may fuse: {r}"
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


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_targets_compile(arch: str) -> None:
    reports = compile_all(arch, "each")
    assert len(reports) == EACH and len({r["dtype"] for r in reports}) == 3
    for r in reports:
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
        # Every launch says it, and the same in all of them: the default depends on the version.
        fused = {name for name, said in report["fusion"].items() if said == [True]}
        assert fused == {"linear_columns_kernel"}
        assert all(said in ([True], [False]) for said in report["fusion"].values())
