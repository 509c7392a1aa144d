"""What Triton kernels over rows of logits share: transforms, the online softmax, how they are compiled.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX

LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
IGNORE = tl.constexpr(IGNORE_INDEX)
LOG2_E = tl.constexpr(1.4426950408889634)
#: log 2 in two fp32 words.
LN_2 = tl.constexpr(0.6931471824645996)
LN_2_LOW = tl.constexpr(-1.904654299957771e-9)

# ---- arithmetic leaves -----------------------------------------------------------------------------


@triton.jit
def column_stride(stride):
    """A stride in 64 bits; None stands for 1, which spares every product with a column."""
    if stride is None:
        stride = 1
    else:
        # V of them pass 2^31 where tokens lie beside each other.
        stride = stride.to(tl.int64)
    return stride


@triton.jit
def widen(z):
    """A logit in fp32."""
    if z.dtype == tl.bfloat16:
        # Its bits are the upper half. Said so, the compiler takes one instruction for each of a pair.
        bits = z.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return z.to(tl.float32)


@triton.jit
def softcap_tanh(z, inv_softcap):
    """tanh(z inv_softcap), and its slope 1 - tanh^2."""
    # s / sqrt(1 + s^2) with s = z P(z^2), near the hyperbolic sine: of this form the closest to tanh
    # (1e-8, relative; 2e-7 after rounding). The slope is 1 / (1 + s^2), 2e-7 off at most: where it is
    # near 0 its digits are those of s. The scale is in the coefficients, from 1e-5 to 1e5
    # (`validation.check_transforms`). The bound, far behind where tanh is 1, keeps the square finite,
    # and keeps a NaN.
    a = inv_softcap
    b = a * a
    c = a * tl.sqrt(a)
    most = tl.full(z.shape, 64.0 / a, tl.float32)
    z = tl.clamp(z, -most, most, propagate_nan=tl.PropagateNan.ALL)
    q = z * z
    h = tl.fma(q, 7.514061202403725e-7 * c * b * b * b, 9.668274463263017e-5 * c * b * b)
    h = tl.fma(tl.fma(h, q, 0.011271788166151863 * c * b), q, 0.3696446093654045 * c)
    s = z * tl.fma(tl.fma(h, h, 0.030029633067240206 * a * b), q, a)
    r = tl.rsqrt(tl.fma(s, s, 1.0))
    return s * r, r * r


@triton.jit
def transform(z, inv_softcap, SOFTCAP: tl.constexpr):
    """A logit in units of its factor: itself, or under a softcap its tanh. -> (u, slope of the tanh)."""
    slope = 1.0
    if SOFTCAP:
        z, slope = softcap_tanh(z, inv_softcap)
    return z, slope


@triton.jit
def in_base_2(factor):
    """-> (k, hi, lo) with 2^(k u) = e^((hi + lo) u): hi + lo is the factor but for the rounding of k.

    What is in nats takes hi + lo, so that a row has one temperature, off by an ulp, and not two that
    would bias its log-prob.
    """
    k = factor * LOG2_E
    hi = k * LN_2
    return k, hi, tl.fma(k, LN_2, -hi) + k * LN_2_LOW


@triton.jit
def exponential(u, origin, k):
    """e^(factor (u - origin)), and its exponent in base 2. At the origin it is exactly 1."""
    t = (u - origin) * k
    return tl.exp2(t), t


@triton.jit
def softmax_origin(lse, low, factor):
    """-> (k, origin, rest) with softmax = 2^(k (u - origin) - rest).

    lse + low is in nats. The origin is near it in units of u, so that no large common offset takes
    digits away; the rest is what its rounding left out.
    """
    k, hi, lo = in_base_2(factor)
    origin = lse * (1.0 / hi)
    rest = (tl.fma(-origin, hi, lse) + low) - origin * lo
    return k, origin, rest * LOG2_E


@triton.jit
def softmax(u, k, origin, rest):
    return tl.exp2(tl.fma(u - origin, k, -rest))


@triton.jit
def two_sum(a, b):
    """-> (s, e) with s + e = a + b exactly; e is 0 where s is not finite."""
    s = a + b
    bb = s - a
    e = (a - (s - bb)) + (b - bb)
    return s, tl.where(tl.abs(s) < INFINITY, e, 0.0)


# ---- one row ---------------------------------------------------------------------------------------


@triton.jit
def _max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def fold(m, s, h, g, u, slope, k, ENTROPY: tl.constexpr, SLOPE: tl.constexpr, FINITE: tl.constexpr):
    """Adds a tile [U, L, W] to what each of L lanes holds of the row. FINITE: no u is -inf.

    A lane holds the max m, s = sum 2^t, h = sum 2^t t and g = sum 2^t slope, with t = k (u - m).
    """
    m_new = tl.maximum(m, _max(u))
    p, t = exponential(u, m_new[None, :, None], k)
    rescale, moved = exponential(m, m_new, k)
    if ENTROPY:
        # An empty lane has moved by -inf, a banned token has t = -inf: 0 times as little as that is 0.
        old = tl.where(s == 0, 0.0, rescale * tl.fma(s, moved, h))
        if not FINITE:
            t = tl.maximum(t, LOWEST)
        h = old + _sum(p * t)
    if SLOPE:
        g = tl.fma(g, rescale, _sum(p * slope))
    s = tl.fma(s, rescale, _sum(p))
    return m_new, s, h, g


@triton.jit
def join(m, s, h, g, k, ENTROPY: tl.constexpr, SLOPE: tl.constexpr):
    """Joins lanes or parts of a row: vectors (m, s, h, g) -> scalars of the same meaning."""
    top = tl.max(m, axis=0)
    scale, moved = exponential(m, top, k)
    s_all = tl.sum(s * scale, axis=0)
    if ENTROPY:
        h_all = tl.sum(tl.where(s == 0, 0.0, scale * tl.fma(s, moved, h)), axis=0)
    else:
        h_all = s_all * 0.0
    if SLOPE:
        g_all = tl.sum(g * scale, axis=0)
    else:
        g_all = s_all * 0.0
    return top, s_all, h_all, g_all


@triton.jit
def stream(
    p_row,
    stride_v,
    V,
    inv_softcap,
    k,
    i_part,
    label,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
):
    """Streams one part of a row; -> scalars (m, s, h, g) as in fold.

    With SLOPE g sums the slopes of the softcap, all but the label's.
    """
    TILE: tl.constexpr = U * L * W
    # A lane is a thread: the maximum moves, and with it the sums, once for U W of its logits.
    o_w = tl.arange(0, L)[:, None] * W + tl.arange(0, W)[None, :]
    o_u = tl.arange(0, U)[:, None, None] * (L * W)
    o_tile = o_u + o_w[None, :, :]
    # Added to a pointer one after the other, the offsets within a tile are constants of the loads.
    p_lanes = p_row + o_w[None, :, :] * stride_v
    # The floor is finite: -inf - (-inf) would make NaN of an empty lane.
    b_m = tl.full([L], LOWEST, tl.float32)
    b_s = tl.zeros([L], tl.float32)
    b_h = tl.zeros([L], tl.float32)
    b_g = tl.zeros([L], tl.float32)
    n_tiles = tl.cdiv(V, TILE)
    n_part = tl.cdiv(n_tiles, SPLIT)
    first = i_part * n_part
    last = tl.minimum(first + n_part, n_tiles)
    whole = tl.minimum(last, V // TILE)
    # No mask in the main loop: this is where the 128-bit loads are.
    for i in range(first, whole):
        o_v = i * TILE + o_tile
        p_tile = p_lanes + i * TILE * stride_v + o_u * stride_v
        z = widen(tl.load(p_tile))
        u, slope = transform(z, inv_softcap, SOFTCAP)
        if SLOPE:
            slope = tl.where(o_v == label, 0.0, slope)
        b_m, b_s, b_h, b_g = fold(b_m, b_s, b_h, b_g, u, slope, k, ENTROPY, SLOPE, SOFTCAP)
    if ALIGNED:
        # In a form that shows it: a 128-bit load lies inside the row or outside.
        V = V // 16 * 16
    for i in range(tl.maximum(whole, first), last):
        o_v = i * TILE + o_tile
        m_v = o_v < V
        p_tile = p_lanes + i * TILE * stride_v + o_u * stride_v
        z = widen(tl.load(p_tile, mask=m_v, other=0.0))
        u, slope = transform(z, inv_softcap, SOFTCAP)
        if SLOPE:
            slope = tl.where(o_v == label, 0.0, slope)
        u = tl.where(m_v, u, -INFINITY)
        b_m, b_s, b_h, b_g = fold(b_m, b_s, b_h, b_g, u, slope, k, ENTROPY, SLOPE, False)
    return join(b_m, b_s, b_h, b_g, k, ENTROPY, SLOPE)


@triton.jit
def finish_row(
    p_row,
    stride_v,
    V,
    label,
    m,
    s,
    h,
    inv_softcap,
    factor,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_entropy,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Writes log_prob, lse and entropy of one row. -> (log_prob, lse)."""
    valid = (label >= 0) & (label < V)
    z = tl.load(p_row + tl.where(valid, label, 0) * stride_v).to(tl.float32)
    u, _ = transform(z, inv_softcap, SOFTCAP)
    _, hi, lo = in_base_2(factor)
    # The logit at the maximum adds exactly 1 to the sum: its logarithm is not negative, even where the
    # instruction is 2^-22 off.
    log_s = tl.log(s)
    log_s = tl.where((s >= 1.0) & (log_s < 0.0), 0.0, log_s)
    # (u - max) - log sum: no large common offset to lose digits to. A banned label is -inf even in
    # a row of -inf alone, but never hides a NaN elsewhere in the row.
    top = m * hi
    lse, low = two_sum(top, log_s)
    log_prob = tl.fma(u - m, hi, tl.fma(u - m, lo, -log_s))
    log_prob = tl.where((u == -INFINITY) & (lse == lse), -INFINITY, log_prob)
    log_prob = tl.where(valid, log_prob, float("nan"))
    low = tl.where(tl.abs(lse) < INFINITY, low + (tl.fma(m, hi, -top) + m * lo), 0.0)
    lse, low = two_sum(lse, low)
    tl.store(p_log_prob, log_prob)
    tl.store(p_lse, lse)
    tl.store(p_lse_low, low)
    if ENTROPY:
        tl.store(p_entropy, log_s - LN_2 * (h / s))
    else:
        tl.store(p_entropy, float("nan"))
    return log_prob, lse


# ---- the host side --------------------------------------------------------------------------------

#: Launch option: the compiler fuses no product with a sum; where one should be fused, tl.fma says so.
#: What a kernel computes of a logit is then the same to the bit in every kernel and binary, and at the
#: maximum of a row the exponent is exactly 0. Said at every launch: the default depends on the version.
NO_FUSION = {"enable_fp_fusion": False}


class Settings(NamedTuple):
    """Launch settings, fixed and by bucket of V, so that nothing about a batch recompiles a kernel.

    Attributes:
        BV: logits of a tile: over the threads of a program a 128-bit load for each.
        U: tiles in flight, and per move of the running max.
        tiles_per_program: tiles a backward program writes, two in flight if they are even.
        split: programs per row when there are too few rows to fill the device.
        num_warps: warps per program.
    """

    BV: int
    U: int
    tiles_per_program: int
    split: int
    num_warps: int

    def lanes(self, aligned: bool) -> dict[str, int]:
        """Constants of a row's tile: L lanes, one to a thread, hold U times W neighbours."""
        lanes = min(32 * self.num_warps, self.BV)
        w = self.BV // lanes if aligned else 1
        return {"U": self.U * self.BV // (lanes * w), "L": lanes, "W": w}


def kernel(fn: Any) -> Any:
    """``triton.jit`` that compiles once per set of constants, dtypes and strides that are None.

    Triton would also compile anew for integers that are 1 or multiples of 16 and for pointers that are
    16-byte aligned: lengths, batch sizes, counters and sliced tensors are all of these by chance. Where
    it matters, in the streams over the logits, ALIGNED says it.
    """
    names = [n for n, p in inspect.signature(fn).parameters.items() if p.annotation is p.empty]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(fn)


def strides(x: Tensor) -> tuple[int | None, ...]:
    """Strides as kernels take them: the last is None where neighbours lie side by side."""
    *rows, last = x.stride()
    return (*rows, None if last == 1 else last)


def is_aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 elements and is contiguous."""
    *rows, last = x.stride()
    return (
        last == 1
        and x.shape[-1] % 16 == 0
        and all(s % 16 == 0 for s in rows)
        and x.data_ptr() % 16 == 0
    )
