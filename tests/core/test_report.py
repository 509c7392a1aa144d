"""``python -m topr_kernels``: what a bug report holds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from topr_kernels import __main__ as report
from topr_kernels import __version__
from topr_kernels.kernels import native_library


def test_the_report_of_this_installation():
    command = [sys.executable, "-m", "topr_kernels"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["topr_kernels"].startswith(f"{__version__} in ")
    assert lines["torch"] == torch.__version__
    assert "flash-attn " in lines["beside it"] and "threads of torch" in lines["processor"]
    serves = lines["native library"].startswith(str(native_library.PATH))
    assert lines['impl="auto" on a CPU'] == ("native" if serves else "torch")


def test_a_missing_library_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    missing = native_library.PATH.with_name("none.so")
    monkeypatch.setattr(native_library, "library", lambda: native_library.load(missing))
    assert "not used: the native library was not built" in report.native()
    assert "install a C++17 compiler" in report.native()
