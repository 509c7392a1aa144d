"""Shared settings of the tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from topr_kernels import kernels
from topr_kernels.kernels import native_library

# Two workers share two cores: more threads than cores, in them or in what they start, would slow both.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Derandomised, so that a red run on one machine is red on all of them.
settings.register_profile(
    "topr",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("topr")

# Else inductor compiles a program for each vector extension, to see whether the compiler has it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# Triton kernels run in its interpreter where there is no GPU; set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Of other environments, see `make test-vllm`, `make test-loops` and `make test-axolotl`; a test that can
# never run here is none that was skipped.
ELSEWHERE = {
    "vllm": ["recipe/test_vllm_real.py"],
    "verl": ["loops/test_verl_real.py"],
    "trinity": ["loops/test_trinity_real.py"],
    "areal": ["loops/test_areal_real.py"],
    "skyrl": ["loops/test_skyrl_real.py", "loops/test_prime_rl_real.py"],
    "tinker": ["loops/test_tinker_real.py"],
    "axolotl": ["loops/test_axolotl_real.py"],
}
collect_ignore = [
    path
    for name, paths in ELSEWHERE.items()
    if not importlib.util.find_spec(name)
    for path in paths
]

NEEDS_GPU = "needs a GPU"

#: Tests of what impl="auto" computes on a CPU run once with each implementation it may stand for.
ONCE_PER_CPU_IMPL = {
    "test_autograd",
    "test_linear",
    "test_linear_tolerance",
    "test_loss",
    "test_metrics",
    "test_pitfalls",
    "test_taper",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ in ONCE_PER_CPU_IMPL:
        metafunc.parametrize("cpu_impl", ["torch", "native"], indirect=True)


@pytest.fixture(autouse=True)
def cpu_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What "auto" is on a CPU; as installed where a test is not run once per implementation."""
    name: str | None = getattr(request, "param", None)
    if name is not None:
        if name == "native" and not native_library.PATH.exists():
            pytest.skip("needs the native library: a C++17 compiler")
        monkeypatch.setattr(kernels, "native_serves", lambda: name == "native")
        kernels.load(kernels.LOGITS[name])
        kernels.load(kernels.LINEAR[name])
    return name


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_collected() -> None:
    """Every training collects garbage; among all that is imported it would look for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter without half of its work, where a module of tests has imported it."""
    # A name of Triton's own: where it is another, tests take their time.
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if torch.cuda.is_available() or not hasattr(interpreter, "_patch_lang"):
        yield
        return
    from bounds import patched_once

    with patched_once():
        yield


@pytest.fixture
def in_bounds() -> Iterator[None]:
    """Triton's interpreter compares every access with the argument that it came from."""
    if torch.cuda.is_available():
        yield
        return
    from bounds import checked  # after the interpreter was asked for

    with checked():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    ran = sum(len(stats.get(outcome, [])) for outcome in ("passed", "failed", "xfailed", "xpassed"))
    waiting = sum(NEEDS_GPU in str(r.longrepr) for r in stats.get("skipped", []))
    others = len(stats.get("skipped", [])) - waiting
    line = f"tests run: {ran}; not run because they need a GPU: {waiting}"
    # A skip that nobody reads looks like a pass.
    terminalreporter.write_line(
        line + (f"; SKIPPED FOR ANOTHER REASON: {others}" if others else "")
    )
