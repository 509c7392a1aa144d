"""The executor itself: planted faults are caught, and right kernels are computed right.

Run by ``test_ptx.py`` in a process without the interpreter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ptx import arithmetic, launch, numeric
from ptx.execute import Machine, Options
from ptx.memory import Fault, Global
from ptx.parse import Unknown, forms, parse

SEEDS = range(5)


def assemble(body: str, parameters: int = 1) -> str:
    """A module with one kernel of 64 threads whose parameters are addresses."""
    names = ",\n".join(f".param .u64 kernel_param_{n}" for n in range(parameters))
    return f"""
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{names}
)
.reqntid 64
{{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<33>;
.reg .b64 %rd<9>;
ld.param.b64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
{body}
ret;
}}
"""


def execute(
    body: str,
    *arrays: Any,
    grid: int = 1,
    options: Options | None = None,
    valid: Any = None,
    freed: bool = False,
) -> list[Any]:
    """Runs a hand-made kernel on uint8 views of arrays. -> their contents afterwards."""
    memory = Global()
    addresses = [
        memory.allocate(f"array {n}", a.view(np.uint8), valid) for n, a in enumerate(arrays)
    ]
    if freed:
        memory.free(addresses[0])
    program = parse(assemble(body, len(arrays)))
    Machine(program, addresses, memory, grid, 1024, options).run()
    return [memory.take(at).view(a.dtype) for at, a in zip(addresses, arrays, strict=True)]


def fault(kind: str, match: str = "") -> Any:
    return pytest.raises(Fault, match=rf"(?s)^{kind}: .*{match}")


# ---- arithmetic ------------------------------------------------------------------------------------


def floats(n: int, seed: int = 0) -> Any:
    """fp32 of every kind: any bit pattern, small integers, neighbours of 1."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)
    near = np.float32(1) + rng.integers(-9, 9, n).astype(np.float32) * np.float32(2**-23)
    few = rng.integers(-4, 5, n).astype(np.float32)
    return np.where(rng.random(n) < 0.5, bits, np.where(rng.random(n) < 0.5, near, few))


def nearest(x: Fraction) -> np.float32:
    """fp32 nearest to a fraction, ties to even; overflow to infinity."""
    if x == 0:
        return np.float32(0)
    exponent = max(math.floor(math.log2(abs(x))) if abs(x) > Fraction(1, 10**40) else -150, -126)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    with np.errstate(over="ignore"):
        return np.float32(float(round(x / ulp) * ulp))


def test_fma_is_rounded_once() -> None:
    a, b, c = (floats(4000, seed) for seed in range(3))
    with np.errstate(all="ignore"):
        c = np.where(np.arange(4000) % 2, -(a * b).astype(np.float32), c)  # what cancels
        got = numeric.fma(a, b, c)
    twice = 0
    for x, y, z, out in zip(a, b, c, got, strict=True):
        if np.isfinite([x, y, z]).all():
            want = nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
            assert out == want, (x, y, z)
            with np.errstate(all="ignore"):
                twice += bool(x * y + z != want)
    assert twice > 100


def test_conversions_round_to_nearest_even() -> None:
    x = floats(4000)
    with np.errstate(all="ignore"):
        for convert, dtype in ((numeric.to_bf16, torch.bfloat16), (numeric.to_fp16, torch.float16)):
            want = torch.from_numpy(x).to(dtype).float().numpy()
            got = torch.from_numpy(convert(x)).view(dtype).float().numpy()
            np.testing.assert_array_equal(got, want)
        wide = numeric.from_bf16(numeric.to_bf16(x))
    np.testing.assert_array_equal(wide, torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pair_of_halves_is_negated(dtype: torch.dtype) -> None:
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    negate = arithmetic.arithmetic("neg", (kind,), numeric.Approximate(0, 0))
    x = torch.tensor([1.5, -0.0, -2.0, math.inf], dtype=dtype)
    got = negate(x.view(torch.int16).numpy().view(np.uint32)) if negate else None
    want = (-x).view(torch.int16).numpy().view(np.uint32)
    np.testing.assert_array_equal(got, want)


def test_a_root_flushes_denormals() -> None:
    root = arithmetic.arithmetic("sqrt", ("approx", "ftz", "f32"), numeric.Approximate(0, 0))
    x = np.array([4.0, 2.0, 1e-40, math.inf], np.float32)
    got = root(x) if root else None
    np.testing.assert_array_equal(got, np.array([2.0, math.sqrt(2.0), 0.0, math.inf], np.float32))


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("max.f32", [2.0, 5.0, 5.0, 0.0]),
        ("max.NaN.f32", [2.0, math.nan, math.nan, 0.0]),
        ("min.f32", [1.0, 5.0, 5.0, -0.0]),
        ("min.NaN.xorsign.abs.f32", [1.0, math.nan, math.nan, -0.0]),
    ],
)
def test_max_drops_a_nan_unless_told_otherwise(form: str, want: list[float]) -> None:
    a = np.array([1, math.nan, 5, -0.0], np.float32)
    b = np.array([2, 5, math.nan, 0.0], np.float32)
    body = f"""
    ld.param.b64 %rd4, [kernel_param_1];
    add.s64 %rd5, %rd4, %rd2;
    setp.lt.u32 %p1, %r1, 4;
    @%p1 ld.global.b32 %r2, [%rd3];
    @%p1 ld.global.b32 %r3, [%rd5];
    {form} %r4, %r2, %r3;
    @%p1 st.global.b32 [%rd3], %r4;"""
    got = execute(body, a, b)[0]
    np.testing.assert_array_equal(got, np.array(want, np.float32))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(np.array(want, np.float32)))


@pytest.mark.parametrize(
    ("code", "a", "b", "want"),
    [
        ("shl.b32 %r4, %r2, %r3", 3, 31, 1 << 31),
        ("shl.b32 %r4, %r2, %r3", 3, 32, 0),
        ("shr.u32 %r4, %r2, %r3", 1 << 31, 33, 0),
        ("shr.s32 %r4, %r2, %r3", 1 << 31, 40, (1 << 32) - 1),
        ("div.s32 %r4, %r2, %r3", -7, 2, -3),
        ("rem.s32 %r4, %r2, %r3", -7, 2, -1),
        ("div.u32 %r4, %r2, %r3", -7, 2, (2**32 - 7) // 2),
        ("min.s32 %r4, %r2, %r3", -7, 2, -7),
        ("min.u32 %r4, %r2, %r3", -7, 2, 2),
        ("mul.lo.s32 %r4, %r2, %r3", 65537, 65537, 131073),
        ("bfe.u32 %r4, %r2, 5, 2", 0b1100000, 0, 3),
        ("prmt.b32 %r4, %r2, %r3, 0x5410U", 0x33221100, 0x77665544, 0x55441100),
        ("prmt.b32 %r4, %r2, %r3, 0x000F", 0, 1 << 31, 0x000000FF),
        ("mul.wide.s32 %rd6, %r2, %r3; cvt.u32.u64 %r4, %rd6", -3, 5, -15),
        (
            "mad.wide.u32 %rd6, %r2, %r3, %rd2; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r4, %rd6",
            -1,
            2,
            1,
        ),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r4, {%rs2, %rs1}", 0x12345678, 0, 0x56781234),
        ("cvt.u64.u32 %rd6, %r2; mov.b64 {_, %r4}, %rd6", -1, 0, 0),
        ("cvt.s64.s32 %rd6, %r2; mov.b64 {_, %r4}, %rd6", -1, 0, -1),
        ("setp.lt.u32 %p2, %r2, %r3; selp.b32 %r4, 1, 2, %p2", -1, 1, 2),
        ("setp.lt.s32 %p2, %r2, %r3; not.pred %p2, %p2; selp.b32 %r4, 1, 2, %p2", -1, 1, 2),
        ("setp.ne.f32 %p2, %r2, %r3; selp.b32 %r4, 1, 2, %p2", 0x7FC00000, 0, 2),
        ("setp.neu.f32 %p2, %r2, %r3; selp.b32 %r4, 1, 2, %p2", 0x7FC00000, 0, 1),
        ("setp.num.f32 %p2, %r2, %r3; selp.b32 %r4, 1, 2, %p2", 0x7FC00000, 0, 2),
        ("fma.rn.ftz.f32 %r4, %r2, 0f3F800000, 0f00000000", 0x00400000, 0, 0),
        ("fma.rn.f32 %r4, %r2, 0f3F800000, 0f00000000", 0x00400000, 0, 0x00400000),
        ("cvt.rn.f32.u32 %r4, %r2", -1, 0, 0x4F800000),
        ("cvt.rn.f16x2.f32 %r4, %r2, %r3", 0x3F800000, 0, 0x3C000000),
    ],
)
def test_integers_and_bits(code: str, a: int, b: int, want: int) -> None:
    data = np.array([a % (1 << 32), b % (1 << 32)], np.uint32)
    body = f"ld.global.b32 %r2, [%rd1]; ld.global.b32 %r3, [%rd1+4]; {code};"
    store = "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], %r4;"
    # Every warp reads what one will write.
    assert execute(body + "bar.sync 0;" + store, data)[0][0] == want % (1 << 32)


def test_approximations_stray_by_two_ulp_and_keep_what_is_promised() -> None:
    x = np.concatenate([np.linspace(-30, 30, 5000, dtype=np.float32), [0.0, -0.0, -200.0]])
    x = x.astype(np.float32)
    exact = numeric.Approximate(0, 0).ex2(x)
    got = numeric.Approximate(2, 0).ex2(x)
    off = got.view(np.int32) - exact.view(np.int32)
    assert sorted(set(off.tolist())) == [-2, -1, 0, 1, 2]
    assert (got[-3:] == [1, 1, 0]).all()
    # A device is off by the same for the same operand, another one by another.
    again, other = (numeric.Approximate(2, seed).ex2(x[::-1])[::-1] for seed in (0, 1))
    assert (again == got).all() and (other != got).any()


# ---- lanes, warps, blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bfly", "down", "up", "idx"])
def test_shuffles(how: str) -> None:
    clamp = 0 if how == "up" else 31
    body = f"shfl.sync.{how}.b32 %r2, %r1, 3, {clamp}, -1; st.global.b32 [%rd3], %r2;"
    got = execute(body, np.zeros(64, np.uint32))[0]
    lane = np.arange(32)
    want = {
        "bfly": lane ^ 3,
        "down": np.where(lane + 3 < 32, lane + 3, lane),
        "up": np.where(lane >= 3, lane - 3, lane),
        "idx": np.full(32, 3),
    }[how]
    np.testing.assert_array_equal(got, np.concatenate([want, want + 32]))


def test_lanes_that_part_meet_again() -> None:
    # Collatz: every lane goes around as often as it must, then all shuffle.
    body = """
    add.s32 %r2, %r1, 1;
    mov.b32 %r3, 0;
$L_loop:
    setp.eq.s32 %p1, %r2, 1;
    @%p1 bra $L_done;
    add.s32 %r3, %r3, 1;
    and.b32 %r4, %r2, 1;
    setp.eq.s32 %p2, %r4, 0;
    @%p2 bra $L_even;
    mul.lo.s32 %r2, %r2, 3;
    add.s32 %r2, %r2, 1;
    bra.uni $L_loop;
$L_even:
    shr.u32 %r2, %r2, 1;
    bra.uni $L_loop;
$L_done:
    redux.sync.add.s32 %r5, %r3, -1;
    st.global.b32 [%rd3], %r5;"""
    got = execute(body, np.zeros(64, np.uint32))[0]

    def length(n: int) -> int:
        return 0 if n == 1 else 1 + length(n // 2 if n % 2 == 0 else 3 * n + 1)

    each = [sum(length(n) for n in range(1 + w, 33 + w)) for w in (0, 32)]
    np.testing.assert_array_equal(got, np.repeat(each, 32))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("barrier", "bar.sync 0;"),
        ("lanes", "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"),
        ("lanes", "bar.warp.sync -1;"),
    ],
)
def test_what_all_must_reach_in_a_branch_that_some_take(kind: str, code: str) -> None:
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $L_end;" + code + "\n$L_end:\n"
    with fault(kind, "24 threads wait, 40 have returned" if kind == "barrier" else "not all lanes"):
        execute(body.format(40), np.zeros(1, np.uint32))
    execute(body.format(64), np.zeros(1, np.uint32))


def test_a_loop_without_an_end() -> None:
    with fault("endless"):
        execute("$L_loop:\n bra $L_loop;", np.zeros(1, np.uint32), options=Options(steps=100))


EXCHANGE = """
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2;
    st.shared.b32 [%r4], %r1;
    bar.sync 0;
    xor.b32 %r5, %r2, 128;
    ld.shared.b32 %r6, [%r5];
    bar.sync 0;
    st.shared.b32 [%r4], %r6;
    st.global.b32 [%rd3], %r6;"""


def test_a_missing_barrier_is_a_race_in_shared_memory() -> None:
    got = execute(EXCHANGE, np.zeros(64, np.uint32), grid=1)[0]
    np.testing.assert_array_equal(got, np.arange(64) ^ 32)
    first, second = (m.start() for m in re.finditer("bar.sync 0;", EXCHANGE))
    with fault("race", "read at byte"):
        execute(EXCHANGE[:first] + EXCHANGE[first + 11 :], np.zeros(64, np.uint32))
    with fault("race", "write at byte"):
        execute(EXCHANGE[:second] + EXCHANGE[second + 11 :], np.zeros(64, np.uint32))


def test_two_warps_may_store_one_value_but_not_two() -> None:
    execute("mov.b32 %r2, 5; st.shared.b32 [global_smem], %r2;", np.zeros(1, np.uint32))
    with fault("race", "write at byte 0 of shared memory"):
        warp = "shr.u32 %r2, %r1, 5;"
        execute(f"{warp} st.shared.b32 [global_smem], %r2;", np.zeros(1, np.uint32))


def test_bounds_and_fresh_words_of_shared_memory() -> None:
    with fault("bounds", "1024 of shared memory, which has 1024 bytes"):
        execute("st.shared.b32 [global_smem+1024], %r1;", np.zeros(1, np.uint32))
    with fault("poison", "shared memory that nobody has written"):
        execute("ld.shared.b32 %r2, [global_smem+16];", np.zeros(1, np.uint32))


# ---- global memory ---------------------------------------------------------------------------------


def test_reads_and_writes_out_of_bounds() -> None:
    for code in ("ld.global.b32 %r2, [%rd3];", "st.global.b32 [%rd3], %r1;"):
        with fault(
            "bounds", r"thread 63 of kernel: 4 bytes at 0x\w+, 0 bytes past the end of array 0"
        ):
            execute(code, np.zeros(63, np.uint32))
        execute(code, np.zeros(64, np.uint32))
    with fault("bounds", "4 bytes before array 0"):
        execute("ld.global.b32 %r2, [%rd3+-4];", np.zeros(64, np.uint32))
    with fault("bounds", "array 0"):
        execute("mov.b64 %rd4, 8; ld.global.b32 %r2, [%rd4];", np.zeros(64, np.uint32))


def test_gaps_of_a_view_and_freed_memory_are_out_of_bounds() -> None:
    valid = np.ones(256, bool)
    valid[40:44] = False
    with fault("bounds", "thread 10 .* byte 40 of array 0"):
        execute("ld.global.b32 %r2, [%rd3];", np.zeros(64, np.uint32), valid=valid)
    with fault("bounds", "array 0 .* which is freed"):
        execute("ld.global.b32 %r2, [%rd3];", np.zeros(64, np.uint32), freed=True)


def test_a_vector_load_must_be_aligned() -> None:
    load = "mad.wide.u32 %rd5, %r1, 16, %rd1;ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd5+{}];"
    execute(load.format(16), np.zeros(260, np.uint32))
    for offset in (4, 8):
        with fault("alignment", f"16 bytes at .* byte {offset} of array 0"):
            execute(load.format(offset), np.zeros(260, np.uint32))


def test_fresh_memory_is_poisoned() -> None:
    x = torch.zeros(64)
    with launch.device():
        fresh = [torch.empty(7, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
        fresh += [x.new_empty(3), torch.empty_like(x)]
        assert all(f.isnan().all() for f in fresh)
        fresh_words = torch.empty(64).numpy()
    code = "ld.global.b32 %r2, [%rd3];"
    with fault("poison", "reads 4 bytes that nobody has written"):
        execute(code, fresh_words)
    execute(code, fresh_words, options=Options(poison=False))


def test_two_ctas_must_not_touch_one_word() -> None:
    # Without atomics there is no order between CTAs at all.
    for code in (
        "st.global.b32 [%rd3], %r1;",
        "setp.eq.s32 %p1, %r1, 0; mov.u32 %r2, %ctaid.x;"
        "setp.eq.s32 %p2, %r2, 1; and.pred %p3, %p1, %p2;"
        "ld.global.b32 %r3, [%rd1]; @%p3 st.global.b32 [%rd1], %r2;",
    ):
        with fault("race", "array 0"):
            execute(code, np.zeros(64, np.uint32), grid=2)
    execute("ld.global.b32 %r2, [%rd3];", np.zeros(64, np.uint32), grid=2)


# ---- CTAs that talk --------------------------------------------------------------------------------


@triton.jit
def sum_kernel(
    p_x,
    p_part,
    p_counter,
    p_out,
    n,
    SEM: tl.constexpr,
    SCOPE: tl.constexpr,
    CACHE: tl.constexpr,
    BARRIER: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program sums a block; the last one to finish sums the sums. As the package does it."""
    i = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + i * BLOCK + o)
    tl.store(p_part + i * BLOCK + o, x * 2)
    if BARRIER:
        tl.debug_barrier()
    before = tl.atomic_add(p_counter, 1, sem=SEM, scope=SCOPE)
    if before == n - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for k in range(N):
            total += tl.load(p_part + k * BLOCK + o, cache_modifier=CACHE)
        tl.store(p_out + o, total)


def one_launch_sum(
    options: Options,
    sem: str = "acq_rel",
    scope: str = "gpu",
    cache: str = ".cg",
    mutate: Callable[[str], str] | None = None,
) -> tuple[Tensor, Tensor]:
    n, block = 9, 256
    x = torch.randn(n * block, generator=torch.Generator().manual_seed(0))
    with launch.device(options, mutate):
        part, out = torch.empty(n * block), torch.empty(block)
        counter = torch.zeros(1, dtype=torch.int32)
        sum_kernel[(n,)](x, part, counter, out, n, sem, scope, cache, True, n, block)
    return out, 2 * x.view(n, block).sum(0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_program_sums_what_the_others_left(seed: int) -> None:
    for late in (False, True):
        out, want = one_launch_sum(Options(seed=seed, late=late))
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("race", {"sem": "relaxed"}),
        ("race", {"sem": "release"}),
        ("race", {"sem": "acquire"}),
        ("race", {"scope": "cta"}),
        ("stale", {"cache": ""}),
    ],
)
def test_a_weaker_fence_or_a_cached_load_is_caught(
    kind: str, change: dict[str, str], seed: int
) -> None:
    with fault(kind):
        one_launch_sum(Options(seed=seed), **change)
    # What a GPU would make of it: memory as it was before the launch.
    out, _ = one_launch_sum(Options(seed=seed, late=True), **change)
    assert out.isnan().any()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_barrier_other_warps_have_not_stored_yet(seed: int) -> None:
    def mutate(ptx: str) -> str:
        before, after = ptx.split("atom.", 1)
        assert "bar.sync" in before
        return re.sub(r"bar\.sync\s+0;", "", before) + "atom." + after

    with fault("race"):
        one_launch_sum(Options(seed=seed), mutate=mutate)


def test_plain_loads_are_right_for_ptx_after_an_acquire() -> None:
    for seed in SEEDS:
        out, want = one_launch_sum(Options(seed=seed, cached=True), cache="")
        torch.testing.assert_close(out, want)


def test_fences_around_relaxed_atomics() -> None:
    fenced = """
    setp.eq.s32 %p1, %r1, 0;
    mov.u32 %r2, %ctaid.x;
    ld.param.b64 %rd4, [kernel_param_1];
    mul.wide.u32 %rd5, %r2, 4;
    add.s64 %rd5, %rd5, %rd1;
    @%p1 st.global.b32 [%rd5], %r2;
    @%p1 fence.acq_rel.gpu;
    mov.b32 %r3, 1;
    @%p1 atom.global.gpu.relaxed.add.u32 %r4, [%rd4], %r3;
    @%p1 fence.acq_rel.gpu;
    setp.eq.s32 %p2, %r4, 1;
    and.pred %p3, %p1, %p2;
    @%p3 ld.global.cg.b32 %r5, [%rd1];
    @%p3 ld.global.cg.b32 %r6, [%rd1+4];"""
    for seed in SEEDS:
        options = Options(seed=seed)
        got = execute(
            fenced, np.zeros(2, np.uint32), np.zeros(1, np.uint32), grid=2, options=options
        )
        assert got[1][0] == 2
        one = fenced.replace("@%p1 fence.acq_rel.gpu;", "", 1)
        with fault("race"):
            execute(one, np.zeros(2, np.uint32), np.zeros(1, np.uint32), grid=2, options=options)


def test_ctas_come_in_every_order() -> None:
    body = """
    mov.u32 %r2, %ctaid.x;
    setp.eq.s32 %p1, %r1, 0;
    mov.b32 %r3, 1;
    ld.param.b64 %rd4, [kernel_param_1];
    @%p1 atom.global.gpu.relaxed.add.u32 %r4, [%rd1], %r3;
    mul.wide.u32 %rd5, %r2, 4;
    add.s64 %rd5, %rd5, %rd4;
    @%p1 st.global.b32 [%rd5], %r4;"""
    orders = set()
    for seed in range(60):
        arrays = np.zeros(1, np.uint32), np.zeros(3, np.uint32)
        got = execute(body, *arrays, grid=3, options=Options(seed=seed))
        assert got[0][0] == 3
        orders.add(tuple(got[1].tolist()))
    assert len(orders) == 6


# ---- Triton kernels --------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(p_x, p_out, n, stride, EXTRA: tl.constexpr, HINT: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0)
    o = tl.arange(0, B)
    p_row = p_x + i * stride
    if HINT:
        p_row = tl.multiple_of(p_row, 16)
    x = tl.load(p_row + o, mask=o < n + EXTRA, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(p_out + i * n + o, e / tl.sum(e, axis=0), mask=o < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_of_rows(dtype: torch.dtype) -> None:
    x = torch.randn(5, 200).to(dtype)
    out = torch.full((5, 200), torch.nan)
    for ulps in (0, 2):
        launch.run(softmax_kernel, 5, x, out, 200, 200, 0, False, 256, options=Options(ulps=ulps))
        torch.testing.assert_close(out, x.float().softmax(-1), rtol=2e-6, atol=0)


def test_approximate_results_are_off_but_not_what_is_exact() -> None:
    x = np.array([3.3, 1e4, np.inf, 0.0, -1e4], np.float32)
    devices = [numeric.Approximate(2, seed).ex2(x).tolist() for seed in range(40)]
    assert len({values[0] for values in devices}) == 5
    assert all(values[1:] == [np.inf, np.inf, 1.0, 0.0] for values in devices)


def test_a_mask_off_by_one_and_a_false_hint() -> None:
    x, out = torch.randn(5, 201), torch.empty(5, 201)
    with fault("bounds", "0 bytes past the end of p_x float32"):
        launch.run(softmax_kernel, 5, x, out, 201, 201, 1, False, 256)
    wide = torch.randn(5, 256)
    launch.run(softmax_kernel, 4, wide, torch.empty(4, 256), 256, 256, 0, True, 256)
    with fault("alignment"):
        launch.run(
            softmax_kernel, 4, wide.view(-1)[1:], torch.empty(4, 256), 256, 256, 0, True, 512
        )


@triton.jit
def maximum_kernel(p_x, p_out, PROPAGATE: tl.constexpr, B: tl.constexpr):
    x = tl.load(p_x + tl.arange(0, B))
    if PROPAGATE:  # noqa: SIM108 (kernel code is not Python)
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        y = tl.maximum(x, 0.0)
    tl.store(p_out + tl.arange(0, B), y)


def test_a_nan_lost_to_max_shows() -> None:
    x, out = torch.full((128,), torch.nan), torch.empty(128)
    launch.run(maximum_kernel, 1, x, out, False, 128)
    assert (out == 0).all()
    launch.run(maximum_kernel, 1, x, out, True, 128)
    assert out.isnan().all()


# ---- what is not known -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "sin.approx.f32 %r2, %r1;",
        "add.sat.f32 %r2, %r1, %r1;",
        "add.f64 %rd2, %rd1, %rd1;",
        "ld.global.nc.b32 %r2, [%rd3];",
        "ld.local.b32 %r2, [%r1];",
        "cp.async.ca.shared.global [%r1], [%rd1], 16;",
        "cvt.rz.bf16.f32 %rs1, %r1;",
        "setp.lt.and.f32 %p1, %r1, %r1, %p2;",
        "bar.sync 1, 32;",
        "atom.global.gpu.acq_rel.inc.u32 %r2, [%rd1], %r1;",
        "mov.b32 %r2, %clock;",
        "griddepcontrol.wait;",
        "redux.sync.add.s32 %r2, %r1, 15;",
    ],
)
def test_what_is_not_known_is_refused_by_name(code: str) -> None:
    with pytest.raises(Unknown, match=re.escape(code[:-1])):
        execute(code, np.zeros(64, np.uint32))


def test_forms_of_a_program() -> None:
    assert forms(assemble("fma.rn.f32 %r2, %r1, %r1, %r1;")) == {
        "ld.param.b64",
        "mov.u32",
        "mul.wide.u32",
        "add.s64",
        "fma.rn.f32",
        "ret",
    }
