"""What Triton kernels over rows of logits share: transforms, the online softmax, how they are compiled.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX

LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
IGNORE = tl.constexpr(IGNORE_INDEX)

# ---- arithmetic leaves -----------------------------------------------------------------------------


@triton.jit
def tanh(x):
    # exp alone cancels near 0; below 0.625 an odd polynomial (Moshier, Cephes tanhf) keeps every digit.
    a = tl.abs(x)
    q = x * x
    p = tl.fma(q, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, q, -5.37397155531e-2)
    p = tl.fma(p, q, 1.33314422036e-1)
    p = tl.fma(p, q, -3.33332819422e-1)
    small = tl.fma(x * q, p, x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def transform(z, softcap, inv_temperature, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Softcap, then temperature, in fp32; also the slope of the softcap. -> (z, slope)."""
    slope = 1.0
    if SOFTCAP:
        t = tanh(z / softcap)
        z = softcap * t
        slope = tl.fma(-t, t, 1.0)
    if TEMPERATURE:
        z = z * inv_temperature
    return z, slope


@triton.jit
def two_sum(a, b):
    """-> (s, e) with s + e = a + b exactly; e is 0 where s is not finite."""
    s = a + b
    bb = s - a
    e = (a - (s - bb)) + (b - bb)
    return s, tl.where(tl.abs(s) < INFINITY, e, 0.0)


# ---- one row ---------------------------------------------------------------------------------------


@triton.jit
def fold(m, s, h, g, z, slope, ENTROPY: tl.constexpr, SLOPE: tl.constexpr):
    """Adds a tile [U, BV] to what each of BV lanes holds of the row.

    A lane holds the max m, s = sum e^(z-m), h = sum e^(z-m) (z-m) and g = sum e^(z-m) slope.
    """
    m_new = tl.maximum(m, tl.max(z, axis=0))
    p = tl.exp(z - m_new[None, :])
    rescale = tl.exp(m - m_new)
    if ENTROPY:
        # By selection: an empty lane has m - m_new = -inf, a banned token z - m_new = -inf.
        old = tl.where(s == 0, 0.0, rescale * tl.fma(s, m - m_new, h))
        h = old + tl.sum(tl.where(p == 0, 0.0, p * (z - m_new[None, :])), axis=0)
    if SLOPE:
        g = tl.fma(g, rescale, tl.sum(p * slope, axis=0))
    s = tl.fma(s, rescale, tl.sum(p, axis=0))
    return m_new, s, h, g


@triton.jit
def join(m, s, h, g, ENTROPY: tl.constexpr, SLOPE: tl.constexpr):
    """Joins lanes or parts of a row: vectors (m, s, h, g) -> scalars of the same meaning."""
    top = tl.max(m, axis=0)
    scale = tl.exp(m - top)
    s_all = tl.sum(s * scale, axis=0)
    if ENTROPY:
        h_all = tl.sum(tl.where(s == 0, 0.0, scale * (h + s * (m - top))), axis=0)
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
    softcap,
    inv_temperature,
    i_part,
    label,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPE: tl.constexpr,
    SPLIT: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
):
    """Streams one part of a row; -> scalars (m, s, h, g) as in fold.

    With SLOPE g sums the slopes of the softcap, all but the label's.
    """
    TILE: tl.constexpr = U * BV
    o_tile = tl.arange(0, U)[:, None] * BV + tl.arange(0, BV)[None, :]
    # The floor is finite: -inf - (-inf) would make NaN of an empty lane.
    b_m = tl.full([BV], LOWEST, tl.float32)
    b_s = tl.zeros([BV], tl.float32)
    b_h = tl.zeros([BV], tl.float32)
    b_g = tl.zeros([BV], tl.float32)
    n_tiles = tl.cdiv(V, TILE)
    n_part = tl.cdiv(n_tiles, SPLIT)
    first = i_part * n_part
    last = tl.minimum(first + n_part, n_tiles)
    whole = tl.minimum(last, V // TILE)
    # No mask in the main loop: this is where the 128-bit loads are.
    for i in range(first, whole):
        o_v = i * TILE + o_tile
        z = tl.load(p_row + o_v * stride_v).to(tl.float32)
        z, slope = transform(z, softcap, inv_temperature, SOFTCAP, TEMPERATURE)
        if SLOPE:
            slope = tl.where(o_v == label, 0.0, slope)
        b_m, b_s, b_h, b_g = fold(b_m, b_s, b_h, b_g, z, slope, ENTROPY, SLOPE)
    for i in range(tl.maximum(whole, first), last):
        o_v = i * TILE + o_tile
        m_v = o_v < V
        z = tl.load(p_row + o_v * stride_v, mask=m_v, other=0.0).to(tl.float32)
        z, slope = transform(z, softcap, inv_temperature, SOFTCAP, TEMPERATURE)
        z = tl.where(m_v, z, -INFINITY)
        if SLOPE:
            slope = tl.where(o_v == label, 0.0, slope)
        b_m, b_s, b_h, b_g = fold(b_m, b_s, b_h, b_g, z, slope, ENTROPY, SLOPE)
    return join(b_m, b_s, b_h, b_g, ENTROPY, SLOPE)


@triton.jit
def finish_row(
    p_row,
    stride_v,
    V,
    label,
    m,
    s,
    h,
    softcap,
    inv_temperature,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_entropy,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Writes log_prob, lse and entropy of one row. -> (log_prob, lse)."""
    valid = (label >= 0) & (label < V)
    z = tl.load(p_row + tl.where(valid, label, 0) * stride_v).to(tl.float32)
    z, _ = transform(z, softcap, inv_temperature, SOFTCAP, TEMPERATURE)
    log_s = tl.log(s)
    lse, low = two_sum(m, log_s)
    # (z_y - max) - log sum: no large common offset to lose digits to. A banned label is -inf even in
    # a row of -inf alone, but never hides a NaN elsewhere in the row.
    log_prob = (z - m) - log_s
    log_prob = tl.where((z == -INFINITY) & (lse == lse), -INFINITY, log_prob)
    log_prob = tl.where(valid, log_prob, float("nan"))
    tl.store(p_log_prob, log_prob)
    tl.store(p_lse, lse)
    tl.store(p_lse_low, low)
    if ENTROPY:
        tl.store(p_entropy, log_s - h / s)
    else:
        tl.store(p_entropy, float("nan"))
    return log_prob, lse


# ---- the host side --------------------------------------------------------------------------------

#: Launch option: the compiler fuses no product with a sum; where one should be fused, tl.fma says so.
#: The maximum of a row is one of its logits, rounded after softcap and temperature. A fused
#: ``z * inv_temperature - m`` would not round the product: at the maximum itself it would not be 0, and
#: the log-prob could be positive. Said at every launch, since Triton's default depends on its version.
NO_FUSION = {"enable_fp_fusion": False}


def kernel(fn: Any) -> Any:
    """``triton.jit`` that compiles once per set of constants and dtypes.

    Triton would also compile anew for integers that are 1 or multiples of 16 and for pointers that are
    16-byte aligned: lengths, batch sizes, counters and sliced tensors are all of these by chance. Where
    it matters, in the streams over the logits, ALIGNED says it.
    """
    names = [n for n, p in inspect.signature(fn).parameters.items() if p.annotation is p.empty]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(fn)


def is_aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 elements and is contiguous."""
    strides = x.stride()[:-1]
    return (
        x.stride(-1) == 1
        and x.shape[-1] % 16 == 0
        and all(s % 16 == 0 for s in strides)
        and x.data_ptr() % 16 == 0
    )
