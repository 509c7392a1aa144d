"""The compiled CPU kernels: what only they promise; their results are in the tests of every module."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import subprocess
import sys
import types
import warnings
from itertools import pairwise
from pathlib import Path

import golden
import pytest
import torch
from torch import Tensor

from topr_kernels import PRESETS, kernels, linear_topr_loss, log_prob, topr_loss
from topr_kernels.kernels import native_library
from topr_kernels.testing import make_batch, make_linear_batch, pack

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not native_library.PATH.exists(), reason="needs the native library: a C++17 compiler"
)

BASELINE, AVX2, AVX512 = 1, 2, 3


def sets() -> list[int]:
    """Instruction sets of this machine."""
    if not native_library.PATH.exists():
        return []
    return list(range(BASELINE, native_library.library().topr_isa_available() + 1))


@pytest.mark.parametrize(("said", "isa"), [("", 0), ("avx2", 2), ("default", 1), ("AVX2", 0)])
def test_torchs_instructions_are_obeyed(monkeypatch: pytest.MonkeyPatch, said: str, isa: int):
    available = native_library.library().topr_isa_available()
    calls = []
    fake = types.SimpleNamespace(
        topr_isa_available=lambda: available, topr_exp=lambda p: calls.append(p._obj.isa)
    )
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", said)
    monkeypatch.setattr(native_library, "library", lambda: fake)
    native_library.instruction_set.cache_clear()
    try:
        native_library.call("topr_exp")
        native_library.call("topr_exp", isa=BASELINE)
    finally:
        native_library.instruction_set.cache_clear()
    assert calls == [min(isa, available), BASELINE]


def exponential(x: Tensor, isa: int) -> Tensor:
    y = torch.empty_like(x)
    native_library.call("topr_exp", dtype=0, isa=isa, outer=1, time=x.numel(), logits=x, gradient=y)
    return y


def floats(first: int, last: int, step: int = 1) -> Tensor:
    """The fp32 numbers with bit patterns in [first, last)."""
    return torch.arange(first, last, step).to(torch.uint32).view(torch.float32)


def of_bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32).item()) & 0xFFFFFFFF


def exp_error(x: Tensor) -> float:
    """The largest error of e^x in ulp, of all instruction sets; inf, 0 and NaN are asserted."""
    want = x.double().exp_()
    infinite, zero, nan = want >= 2.0**128 * (1 - 2.0**-25), x < -128, x.isnan()
    far = bool(zero.any())
    # The power of two below: fp64 without its fraction.
    power = want.clamp(2.0**-126, 2.0**127).view(torch.int64).bitwise_and_(0x7FF << 52)
    per_ulp, no_error, worst = 2.0**23 / power.view(torch.float64), infinite | nan, 0.0
    for isa in sets():
        y = exponential(x, isa)
        assert torch.equal(y.isnan(), nan) and torch.equal(y == math.inf, infinite)
        assert not far or not y.where(zero, 0).any()
        error = (y.double() - want).abs_().mul_(per_ulp).masked_fill_(no_error, 0)
        worst = max(worst, error.max().item())
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("sign", [0, 1], ids=["positive", "negative"])
def test_exp_is_within_two_ulp_of_every_float(sign: int) -> None:
    """Of each from 2^-8 to 128, of every 7th down to 2^-26, where nothing but the last term of the
    polynomial is left; beyond, e^x is 1, 0 or inf and every 61st is looked at."""
    # What fits into a cache.
    step, base = 1 << 16, sign << 31
    edges = (0, *(of_bits(x) for x in (2.0**-26, 2.0**-8, 128.0)), 1 << 31)
    worst = 0.0
    for (first, last), stride in zip(pairwise(edges), (61, 7, 1, 61), strict=True):
        for start in range(first, last, stride * step):
            end = min(start + stride * step, last)
            worst = max(worst, exp_error(floats(base + start, base + end, stride)))
    assert worst <= 2, f"{worst} ulp"


def test_exp_is_within_two_ulp_around_every_power_of_two() -> None:
    """And around infinity, and where results begin to be inf, subnormal or 0."""
    edges = [of_bits(x) for x in (88.72284, 87.33655, 103.97208, 104.0, 89.0, 128.0)]
    edges += range(0, (1 << 31) + 1, 1 << 23)
    for edge in edges:
        first, last = max(edge - 1000, 0), min(edge + 1000, 1 << 31)
        for base in (0, 1 << 31):
            assert exp_error(floats(base + first, base + last)) <= 2, edge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("preset", "reward", "log_ratio", "value", "weight"), golden.cases())
def test_golden_table_of_the_cpp_taper(
    preset: str, reward: float, log_ratio: float, value: float, weight: float, dtype: torch.dtype
) -> None:
    def number(x: float = 0.0) -> Tensor:
        return torch.tensor([x], dtype=dtype)

    pos_min, pos_max, neg_min, neg_max = PRESETS[preset].log()
    got = {k: number() for k in ("weight", "objective", "loss", "denominator", "d_log_prob")}
    native_library.call(
        "topr_sequences",
        dtype=native_library.DTYPES[dtype],
        outer=1,
        time=1,
        labels=torch.tensor([0]),
        offsets=torch.tensor([0, 1]),
        sequences=1,
        log_prob=number(log_ratio),
        behavior_log_prob=number(),
        behavior_dtype=native_library.DTYPES[dtype],
        reward=number(reward),
        log_pos_min=pos_min,
        log_pos_max=pos_max,
        log_neg_min=neg_min,
        log_neg_max=neg_max,
        token_log_ratio=number(),
        log_ratio=number(),
        length=torch.tensor([0]),
        **got,
    )
    eps = 4 * torch.finfo(dtype).eps
    close = dict(rel=eps, abs=0.0, nan_ok=True)
    assert got["objective"].item() == pytest.approx(value, **close)  # type: ignore[arg-type]
    assert got["weight"].item() == pytest.approx(weight, **close)  # type: ignore[arg-type]
    assert got["d_log_prob"].item() == pytest.approx(-reward * weight, **close)  # type: ignore[arg-type]


def test_params_mirror_the_header() -> None:
    header = (ROOT / "csrc/topr_kernels.h").read_text()
    body = re.search(r"typedef struct topr_params \{(.*?)\} topr_params;", header, re.DOTALL)
    assert body is not None
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL)
    kinds = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "double": ctypes.c_double}
    declared = []
    for statement in filter(None, (part.strip() for part in text.split(";"))):
        base, names = re.fullmatch(r"(?:const )?(\w+)\s+(.*)", statement, re.DOTALL).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            pointer = "*" in name
            declared.append((name.strip(" *\n"), ctypes.c_void_p if pointer else kinds[base]))
    assert declared == [tuple(field) for field in native_library.Params._fields_]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    lengths = [(4, 33), (0, 9), (7, 50)]
    batch = pack(make_batch(lengths, 5003, dtype=dtype), lengths)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits = batch.logits.clone().requires_grad_()
            out = topr_loss(logits, *batch[1:4], cu_seqlens=batch.cu_seqlens, impl="native")
            out.loss.backward()
            assert logits.grad is not None
            runs.append([*out[:2], *out[3:9], logits.grad])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_too_large_for_a_cache(dtype: torch.dtype, inplace: bool) -> None:
    # Those are written past it, in whole vectors: the rows here are as long as a real vocabulary.
    vocab, rows = 32064, 32 if dtype == torch.float32 else 64
    torch.manual_seed(0)
    logits = (4 * torch.randn(17, rows, vocab)).to(dtype)
    assert logits.nbytes >= 64 << 20
    labels = torch.randint(0, vocab, (17, rows))
    labels[0, :10] = -100
    reward = torch.ones(17)
    reward[3] = 0
    grads = []
    for impl in ("torch", "native"):
        x = logits.clone().requires_grad_()
        # The in-place gradient lies in the memory of the logits themselves.
        loss = topr_loss(x * 1.0, labels, torch.zeros(17), reward, inplace=inplace, impl=impl).loss
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-9)


def test_every_instruction_set_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([(3, 20), (5, 40)], 4099, dtype=torch.bfloat16)
    linear = make_linear_batch([(3, 20), (5, 40)], 513, 24, dtype=torch.float32)
    found = []
    for isa in sets():
        call = functools.partial(native_library.call, isa=isa)
        for module in ("native", "native_linear"):
            monkeypatch.setattr(f"topr_kernels.kernels.{module}.call", call)
        logits = batch.logits.clone().requires_grad_()
        out = topr_loss(logits, *batch[1:4], softcap=9.0, entropy=True, impl="native")
        out.loss.backward()
        hidden, weight = (x.clone().requires_grad_() for x in linear[:2])
        tail = linear_topr_loss(
            hidden, weight, *linear[2:5], softcap=9.0, grad_tolerance=0.1, impl="native"
        )
        tail.loss.backward()
        found.append([out.log_prob, out.entropy, logits.grad, hidden.grad, weight.grad])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 2e-5, atol=2e-6
            )


def python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loaded_when_needed_beside_one_openmp_runtime() -> None:
    script = """
import torch, topr_kernels
maps = lambda: open("/proc/self/maps").read()
print("_native.so" in maps())
topr_kernels.log_prob(torch.randn(2, 9, 40000), torch.zeros(2, 9, dtype=torch.int64))
print("_native.so" in maps())
print(len({line.split()[-1] for line in maps().splitlines() if "omp" in line.split("/")[-1]}))
"""
    assert python(script).split() == ["False", "True", "1"]


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"not built.*TOPR_BUILD=cpu.*impl='torch'"):
        native_library.load(tmp_path / "_native.so")
    monkeypatch.setattr(native_library, "PATH", tmp_path / "_native.so")
    monkeypatch.setattr(native_library, "REASON", tmp_path / "_native_missing.txt")
    kernels._native_loads.cache_clear()
    native_library.library.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.resolve("auto", torch.zeros(1)) == "torch"
        # pip hides what setup.py says, so it is said again where it matters.
        native_library.REASON.write_text("the compiler failed")
        kernels._native_loads.cache_clear()
        with pytest.warns(UserWarning, match=r"not built .*: the compiler failed\)"):
            assert kernels.resolve("auto", torch.zeros(1)) == "torch"
    finally:
        kernels._native_loads.cache_clear()
        native_library.library.cache_clear()


BROKEN = """
import warnings, torch
from pathlib import Path
from topr_kernels import linear_log_prob, log_prob
from topr_kernels.kernels import native_library
native_library.PATH = Path({path!r})
x, y = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(float(log_prob(x, y).log_prob.sum().exp()))
    print(float(linear_log_prob(x, torch.zeros(4, 4), y).log_prob.sum().exp()))
print(len(caught), caught[0].filename == "<string>", caught[0].message)
try:
    log_prob(x, y, impl="native")
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_broken_library_warns_once_and_an_explicit_name_raises(tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF, but no more than that")
    first, second, warned, raised = python(BROKEN.format(path=str(broken))).splitlines()
    assert float(first) == float(second) == pytest.approx(1 / 16)
    # Once for both paths, and at the line of the caller.
    assert warned.startswith("1 True cannot load the native library") and "impl='torch'" in warned
    assert raised.startswith("cannot load the native library") and "TOPR_BUILD=cpu" in raised


def test_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shorter(ctypes.Structure):
        _fields_ = native_library.Params._fields_[:-1]

    monkeypatch.setattr(native_library, "Params", Shorter)
    with pytest.raises(ImportError, match=r"other sources .* expected \d+"):
        native_library.load(native_library.PATH)


def test_refused_params_say_why() -> None:
    with pytest.raises(RuntimeError, match=r"topr_exp: dtype: "):
        native_library.call("topr_exp", dtype=1)


def test_call_refuses_what_it_would_misread() -> None:
    with pytest.raises(AttributeError, match="tiem"):
        native_library.call("topr_exp", tiem=3)
    with pytest.raises(RuntimeError, match="topr_exp: labels must be contiguous"):
        native_library.call("topr_exp", labels=torch.zeros(4, 4)[:, 0])


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    batch = make_batch([(3, 20), (5, 40)], 1003, dtype=torch.float32)

    def transposed(x: Tensor) -> Tensor:
        return x.t().contiguous() if x.dim() == 2 else x

    grads = []
    for impl in ("torch", "native"):
        logits = batch.logits.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            transposed, lambda x: x.t() if x.dim() == 2 else x
        ):
            loss = topr_loss(logits, *batch[1:], impl=impl).loss
        loss.backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads)


def test_sources_of_an_instruction_set_use_nothing_the_linker_could_share() -> None:
    for name in ("rows.h", "simd.h", "elements.h", "parallel.h"):
        code = re.sub(r"//.*", "", (ROOT / "csrc" / name).read_text())
        # The form for ThreadSanitizer is in no library that ships.
        code = re.sub(r"#if defined\(TOPR_STD_THREADS\).*?#e", "", code, flags=re.DOTALL)
        assert not re.search(r"\bstd::|(?<!_)\bis(nan|inf|finite)\(", code), name


def test_native_wants_tensors_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"impl: 'native' needs tensors on the CPU, got meta"):
        kernels.resolve("native", torch.empty(1, device="meta"))


def test_auto_is_native_on_a_cpu() -> None:
    assert kernels.resolve("auto", torch.zeros(1)) == "native"
    assert kernels.resolve("auto", torch.zeros(1), kernels.LINEAR) == "native"


def test_log_prob_error_does_not_grow_with_the_vocabulary() -> None:
    # Lanes sum 32 numbers at a time and chunks are summed in fp64; one running fp32 sum is a hundred
    # times worse here.
    torch.manual_seed(0)
    logits = torch.randn(16, 1, 151936)
    labels = torch.zeros(16, 1, dtype=torch.int64)
    got = log_prob(logits, labels, shift=False, impl="native").log_prob
    want = logits.double().log_softmax(-1)[..., 0]
    assert (got - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * want.abs().max()
