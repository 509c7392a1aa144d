"""The Triton kernels as compiled for sm_90, executed on the CPU; see ``tests/ptx``.

In a process of their own, because whether Triton is its interpreter is chosen at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_the_executor() -> None:
    folder = Path(__file__).parents[1] / "ptx"
    files = [
        str(folder / f"check_{name}.py") for name in ("executor", "mutants", "package", "fuzz")
    ]
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "--timeout=600"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout)
