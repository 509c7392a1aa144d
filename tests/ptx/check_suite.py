"""gpu_suite.sh from end to end on the fake device, at small sizes and with a planted red test."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REHEARSAL = Path(__file__).parent / "rehearsal"


@pytest.mark.timeout(600)
def test_the_gpu_suite_in_its_order(tmp_path: Path) -> None:
    # A checkout whose hidden states are there; nothing reads them, since every case is tiny.
    for name in ("topr_kernels", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "benchmarks" / ".cache").mkdir(parents=True)
    (tmp_path / "benchmarks" / ".cache" / "hidden_states.pt").touch()
    for path in (ROOT / "benchmarks").iterdir():
        if path.name != ".cache":
            (tmp_path / "benchmarks" / path.name).symlink_to(path)
    folders = [str(p) for p in (REHEARSAL, ROOT / "tests")]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(folders),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GPU_SUITE_TESTS": "-k golden tests/ptx/rehearsal/planted.py",
    }
    command = ["bash", str(tmp_path / "benchmarks" / "gpu_suite.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 1
    assert "FAILED" in (tmp_path / "out" / "tests.log").read_text()
    (table,) = (tmp_path / "out").glob("*.csv")
    with table.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert all(r["note"].endswith("red tests: planted.py::test_golden_planted") for r in rows)
    ours = [r for r in rows if r["provider"].startswith("topr")]
    assert not {r["metric"] for r in ours} & {"red", "failed"}
    timed = [r for r in ours if r["metric"] == "total_ms"]
    assert {r["setting"] for r in timed} >= {"triton", "triton_staged"}
    # On a slow machine a part may end before its last job does.
    suites = dict.fromkeys(
        r["suite"] + (" " + r["path"]) * (r["suite"] == "throughput") for r in ours
    )
    order = ["throughput logits", "throughput linear", "accuracy", "scaling", "end_to_end"]
    assert list(suites) == order
