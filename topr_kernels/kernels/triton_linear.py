"""Tiles of the fused-linear path in Triton: four kernels over a tile of fp32 logits.

What never exists: a softmax, exp(z - max), a copy of the tile but J itself in the dtype of the products.
Memory traffic per logit of a tile:

    rows       reads 4
    gradient   reads 4, writes 2                                 (fp32: writes 4, over the logits)
    columns    reads 4, writes and reads again 4 (1 + k) / COLUMN_ROWS   (k = 8 groups: 0.3)
    gather     reads 4, writes 2 per logit of a gathered column; 32-byte sectors make the reads up to 32

The exact backward is rows and gradient, 10 bytes per logit; the sparse one rows, columns and gather. The
row kernel leaves the logits as they are, so the others exponentiate once more per logit: what it would
write and they would read costs more than an exponential.

The row kernel gives a row to one program, however few rows there are: a row's log-prob must not depend
on how many others are in its tile. Nothing counts arrivals or adds atomically; all sums have one order.

The transforms in two numbers: scale, softcap and temperature make factor tanh(z / softcap') of a logit
z, with softcap' = softcap / logit_scale and factor = softcap / temperature; without a softcap they make
factor z, with factor = logit_scale / temperature. What J is multiplied by is that either way.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers; t rows, v columns.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from topr_kernels.kernels.triton_rows import (
    IGNORE,
    INFINITY,
    NO_FUSION,
    finish_row,
    in_base_2,
    is_aligned,
    kernel,
    softmax,
    softmax_origin,
    stream,
    transform,
)
from topr_kernels.linear.operators import linear_kernels
from topr_kernels.linear.tile import RowStats, TileKernels
from topr_kernels.ops import linear as ops
from topr_kernels.ops.options import Transforms

# ---- J ---------------------------------------------------------------------------------------------


@triton.jit
def _at_label(log_prob, lse):
    """1 - p of the label, before the slope."""
    # -expm1(log p) = 2 tanh / (tanh - 1) at half of log p: near 0 a difference from 1 would lose digits.
    # There tanh is an odd polynomial (Moshier, Cephes tanhf).
    x = 0.5 * log_prob
    q = x * x
    t = tl.fma(q, -5.70498872745e-3, 2.06390887954e-2)
    t = tl.fma(t, q, -5.37397155531e-2)
    t = tl.fma(t, q, 1.33314422036e-1)
    t = tl.fma(t, q, -3.33332819422e-1)
    t = tl.fma(x * q, t, x)
    rest = tl.where(x > -0.625, 2.0 * t / (t - 1.0), 1.0 - tl.exp(log_prob))
    # A row of -inf alone has no softmax, at its label no more than elsewhere.
    return tl.where(lse == -INFINITY, float("nan"), rest)


@triton.jit
def _load_rows(p_label, p_log_prob, p_lse, p_lse_low, o_t, m_t, V, factor):
    """What J needs of rows. -> (label, J there before the slope, origin, rest as in softmax_origin)."""
    label = tl.load(p_label + o_t, mask=m_t, other=0)
    log_prob = tl.load(p_log_prob + o_t, mask=m_t, other=0.0)
    lse = tl.load(p_lse + o_t, mask=m_t, other=0.0)
    low = tl.load(p_lse_low + o_t, mask=m_t, other=0.0)
    # The log-prob of a label outside the vocabulary is NaN: it must show in some column. Columns are
    # compared in 32 bits, half the registers; only rows times their stride need 64.
    label = tl.where(label < 0, 0, tl.where(label < V, label, V - 1)).to(tl.int32)
    _, origin, rest = softmax_origin(lse, low, factor)
    return label, _at_label(log_prob, lse), origin, rest


# ---- kernels ---------------------------------------------------------------------------------------


@kernel
def linear_rows_kernel(
    p_z,
    stride_t,
    p_label,
    V,
    inv_softcap,
    factor,
    slope_factor,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_entropy,
    p_factor,
    p_total,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOTAL: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
):
    """Log-prob, lse and entropy of a row, and with TOTAL the sum of its J. Grid: n."""
    # 64 bits from the start: 2048 rows of 262144 logits are 2^29, but the stride is anyone's.
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_z + i_t * stride_t
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
    label = tl.load(p_label + i_t)
    tl.store(p_factor + i_t, slope_factor)
    if label == IGNORE:
        # A row that fills a step up: nothing of it is read.
        tl.store(p_log_prob + i_t, 0.0)
        tl.store(p_lse + i_t, 0.0)
        tl.store(p_lse_low + i_t, 0.0)
        tl.store(p_entropy + i_t, 0.0)
        tl.store(p_total + i_t, 0.0)
    else:
        k, _, _ = in_base_2(factor)
        m, s, h, g = stream(
            p_row,
            1,
            V,
            inv_softcap,
            k,
            0,
            label,
            SOFTCAP,
            ENTROPY,
            TOTAL,
            ALIGNED,
            1,
            U,
            L,
            W,
        )
        log_prob, lse = finish_row(
            p_row,
            1,
            V,
            label,
            m,
            s,
            h,
            inv_softcap,
            factor,
            p_log_prob + i_t,
            p_lse + i_t,
            p_lse_low + i_t,
            p_entropy + i_t,
            SOFTCAP,
            ENTROPY,
        )
        if TOTAL:
            # Of the entries as the other kernels have them: what they keep is subtracted from it.
            z = tl.load(p_row + tl.where((label >= 0) & (label < V), label, 0))
            _, slope = transform(z, inv_softcap, SOFTCAP)
            tl.store(p_total + i_t, _at_label(log_prob, lse) * slope - g / s)
        else:
            tl.store(p_total + i_t, 0.0)


@kernel
def linear_gradient_kernel(
    p_z,
    stride_t,
    p_out,
    out_t,
    p_label,
    p_log_prob,
    p_lse,
    p_lse_low,
    V,
    n_chunks,
    inv_softcap,
    factor,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
):
    """J, rounded once. Grid: n * n_chunks.

    Out may be the logits themselves: every element is read by the program that writes it, before it
    writes it.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_t = i_program // n_chunks
    i_chunk = (i_program % n_chunks).to(tl.int32)
    p_row = p_z + i_t * stride_t
    p_out_row = p_out + i_t * out_t
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
        p_out_row = tl.multiple_of(p_out_row, 16)
    label, at_label, origin, rest = _load_rows(
        p_label, p_log_prob, p_lse, p_lse_low, i_t, True, V, factor
    )
    k, _, _ = in_base_2(factor)
    # U loads in flight before the first is used.
    TILE: tl.constexpr = U * BV
    o_tile = tl.arange(0, U)[:, None] * BV + tl.arange(0, BV)[None, :]
    first = i_chunk * (TILES // U)
    last = tl.minimum(first + TILES // U, tl.cdiv(V, TILE))
    whole = tl.minimum(last, V // TILE)
    # J at the label is written last, so that the loops need not look for it.
    here = (label >= first * TILE) & (label < last * TILE)
    if SOFTCAP:
        z_label = tl.load(p_row + label, mask=here, other=0.0)
        _, slope_label = transform(z_label, inv_softcap, SOFTCAP)
        at_label = at_label * slope_label
        # Out may be the logits: every thread has read the label's before one of them writes.
        tl.debug_barrier()
    # No mask in the main loop: this is where the 128-bit loads are.
    for i in range(first, whole):
        o_v = i * TILE + o_tile
        u, slope = transform(tl.load(p_row + o_v), inv_softcap, SOFTCAP)
        j = -softmax(u, k, origin, rest) * slope
        tl.store(p_out_row + o_v, j.to(p_out.dtype.element_ty))
    for i in range(tl.maximum(whole, first), last):
        o_v = i * TILE + o_tile
        m_v = o_v < V
        u, slope = transform(tl.load(p_row + o_v, mask=m_v, other=0.0), inv_softcap, SOFTCAP)
        j = -softmax(u, k, origin, rest) * slope
        tl.store(p_out_row + o_v, j.to(p_out.dtype.element_ty), mask=m_v)
    if here:
        tl.debug_barrier()
        tl.store(p_out_row + label, at_label.to(p_out.dtype.element_ty))


@kernel
def linear_columns_kernel(
    p_z,
    stride_t,
    p_label,
    p_log_prob,
    p_rows,
    p_parts,
    n,
    V,
    n_groups,
    n_blocks,
    inv_softcap,
    factor,
    slope_factor,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
):
    """Sums over ROWS rows of (coefficient factor J)^2 and, for up to K groups, of weight factor J.

    Grid: n_blocks * parts, with n_blocks of BV columns. Reads rows
    [parts ROWS, 3 + K] of lse, lse_low, coefficient and weights. Writes parts
    [parts, 1 + n_groups, V], energy first. Threads own columns, and all their rows.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_part = i_program // n_blocks
    if ALIGNED:
        # In a form that shows it: a 128-bit load lies inside a row or outside.
        V = V // 16 * 16
    k, _, _ = in_base_2(factor)
    i_block = (i_program % n_blocks).to(tl.int32)
    start = i_block * BV
    if WHOLE:
        # No mask in the loop: the last block ends with the row.
        start = tl.minimum(start, V - BV)
    # Two halves, added to a pointer apart from the rest: they are constants of the loads then.
    o_half = tl.arange(0, 2)[:, None] * (BV // 2)
    o_lane = tl.arange(0, BV // 2)[None, :]
    o_v = start + o_half + o_lane
    m_v = o_v < V
    b_energy = tl.zeros([2, BV // 2], tl.float32)
    b_sums = (b_energy,) * K
    first = i_part * ROWS
    n_rows = tl.minimum(n - first, ROWS).to(tl.int32)
    p_z += first * stride_t + start
    if ALIGNED:
        p_z = tl.multiple_of(p_z, 16)
    p_label += first
    p_log_prob += first
    p_rows += first * (3 + K)
    # U rows at a time, all loads in flight before the first is used.
    for i in range(0, tl.cdiv(n_rows, U)):
        zs = (b_energy,) * U
        for i_u in tl.static_range(U):
            if WHOLE:
                z = tl.load(p_z + o_lane + o_half)
            else:
                z = tl.load(p_z + o_lane + o_half, mask=m_v, other=0.0)
            zs = zs[1:] + (z,)  # noqa: RUF005
            # Of a row that is not there the last is read.
            step = tl.where(i * U + i_u + 1 < n_rows, stride_t, 0)
            if ALIGNED:
                step = tl.multiple_of(step, 16)
            p_z += step
        for i_u in tl.static_range(U):
            p_row = p_rows + i_u * (3 + K)
            lse = tl.load(p_row)
            _, origin, rest = softmax_origin(lse, tl.load(p_row + 1), factor)
            u, slope = transform(zs[i_u], inv_softcap, SOFTCAP)
            # -J; rows that are not there have 0, and weights of 0.
            p = softmax(u, k, origin, rest)
            # The block that holds the label is one of many.
            label = tl.load(p_label + i_u)
            if (label >= start) & (label < start + BV):
                p = tl.where(o_v == label, -_at_label(tl.load(p_log_prob + i_u), lse), p)
            p = p * slope
            e = tl.load(p_row + 2) * p
            b_energy = tl.fma(e, e, b_energy)
            for i_k in tl.static_range(K):
                # A queue: the group whose turn it is leaves at the front and comes back at the end.
                sums = tl.fma(tl.load(p_row + 3 + i_k), p, b_sums[0])
                b_sums = b_sums[1:] + (sums,)  # noqa: RUF005
        p_label += U
        p_log_prob += U
        p_rows += U * (3 + K)
    V = V.to(tl.int64)
    p_part = p_parts + i_part * (1 + n_groups) * V + o_v
    if WHOLE:
        # The columns that the last two blocks share are written once.
        m_v = o_v >= i_block * BV
    tl.store(p_part, b_energy * (slope_factor * slope_factor), mask=m_v)
    for i_k in tl.static_range(K):
        if n_groups > i_k:
            tl.store(p_part + (1 + i_k) * V, b_sums[i_k] * -slope_factor, mask=m_v)


@kernel
def linear_gather_kernel(
    p_z,
    stride_t,
    p_columns,
    p_out,
    p_sums,
    p_label,
    p_log_prob,
    p_lse,
    p_lse_low,
    n,
    A,
    V,
    n_chunks,
    inv_softcap,
    factor,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    U: tl.constexpr,
    BA: tl.constexpr,
):
    """J of some columns, and its sums over TILES * BA of them. Grid: blocks of U rows * n_chunks.

    Several rows per program, so that the list of columns is read once for all of them.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_rows = i_program // n_chunks
    i_chunk = (i_program % n_chunks).to(tl.int32)
    if ALIGNED:
        # In a form that shows it: a 128-bit store lies inside a row or outside.
        A = A // 16 * 16
    p_out_rows = p_out + i_rows * U * A
    if ALIGNED:
        p_out_rows = tl.multiple_of(p_out_rows, 16)
    o_u = tl.arange(0, U)
    o_t = i_rows * U + o_u
    m_t = o_t < n
    o_row = tl.minimum(o_t, n - 1)
    label, at_label, origin, rest = _load_rows(
        p_label, p_log_prob, p_lse, p_lse_low, o_t, m_t, V, factor
    )
    k, _, _ = in_base_2(factor)
    b_sum = tl.zeros([U, BA], tl.float32)
    for i in range(i_chunk * TILES, tl.minimum((i_chunk + 1) * TILES, tl.cdiv(A, BA))):
        o_a = i * BA + tl.arange(0, BA)
        m_a = o_a < A
        o_v = tl.load(p_columns + o_a, mask=m_a, other=0).to(tl.int32)
        # In bounds without a mask: of a column that is not there the first, of a row the last. A mask
        # for each element would take more predicates than there are.
        z = tl.load(p_z + o_row[:, None] * stride_t + o_v[None, :])
        u, slope = transform(z, inv_softcap, SOFTCAP)
        p = softmax(u, k, origin[:, None], rest[:, None])
        j = tl.where(o_v[None, :] == label[:, None], at_label[:, None], -p) * slope
        b_sum += tl.where(m_a[None, :], j, 0.0)
        p = p_out_rows + o_u[:, None] * A + o_a[None, :]
        tl.store(p, j.to(p_out.dtype.element_ty), mask=m_t[:, None] & m_a[None, :])
    tl.store(p_sums + o_t * n_chunks + i_chunk, tl.sum(b_sum, axis=1), mask=m_t)


# ---- launches --------------------------------------------------------------------------------------

# Fixed choices: nothing about a batch recompiles a kernel, and a row's sums depend on V alone.

#: Lanes of a row's tile, one to a thread, and logits that a lane folds at once.
LANES = 128
ROW_LOGITS = 16
#: Logits of a gradient tile, and tiles a program writes, two in flight.
BV = 512
GRADIENT_TILES = 16
#: Rows a columns program sums, and its columns: two 128-bit loads per thread and row.
COLUMN_ROWS = 128
COLUMN_BV = 1024
#: The lse of a row that is not there, above any logit over a temperature.
ABSENT = 1e20
#: Rows of a gather program, columns in flight, and steps of so many columns.
GATHER_U, GATHER_BA, GATHER_TILES = 4, 256, 8
WARPS = 4


def _row_constants(vocab: int, aligned: bool) -> dict[str, int]:
    per_lane = ROW_LOGITS if vocab > LANES * ROW_LOGITS else 4
    w = 4 if aligned else 1
    return {"U": per_lane // w, "L": LANES, "W": w}


def _column_constants(vocab: int, k: int) -> dict[str, Any]:
    # Compiled for 8 groups at least: a tile of a few rows has fewer than others. Each takes a register
    # per column of a thread.
    bv = COLUMN_BV if k <= 9 else COLUMN_BV // 2
    return {"WHOLE": vocab >= bv, "K": max(8, k), "ROWS": COLUMN_ROWS, "U": 2, "BV": bv}


def _scalars(transforms: Transforms) -> tuple[float, float, float]:
    """-> (1 / softcap', factor, slope_factor) of the file's head."""
    logit_scale, softcap, temperature = transforms
    slope_factor = logit_scale / temperature
    if softcap is None:
        return 1.0, slope_factor, slope_factor
    return logit_scale / softcap, softcap / temperature, slope_factor


def _constants(transforms: Transforms) -> dict[str, Any]:
    return {"SOFTCAP": transforms.softcap is not None, "num_warps": WARPS, **NO_FUSION}


def rows(
    z: Tensor, label: Tensor, transforms: Transforms, entropy: bool, gradient: bool
) -> RowStats:
    if z.dtype == torch.float64:
        raise TypeError(
            "hidden: impl='triton' computes in fp32 and does not serve float64; use impl='torch'"
        )
    n, vocab = z.shape
    stats = RowStats(*torch.empty((6, n), dtype=torch.float32, device=z.device))
    with torch.cuda.device_of(z):
        linear_rows_kernel[(n,)](
            z,
            z.stride(0),
            label.contiguous(),
            vocab,
            *_scalars(transforms),
            *stats,
            ALIGNED=is_aligned(z),
            ENTROPY=entropy,
            TOTAL=gradient and transforms.softcap is not None,
            **_row_constants(vocab, is_aligned(z)),
            **_constants(transforms),
        )
    return stats


def gradient(
    z: Tensor, label: Tensor, stats: RowStats, transforms: Transforms, dtype: torch.dtype
) -> Tensor:
    """J; in fp32 over the logits, which are gone afterwards."""
    n, vocab = z.shape
    out = z if dtype == z.dtype else z.new_empty((n, vocab), dtype=dtype)
    n_chunks = triton.cdiv(vocab, BV * GRADIENT_TILES)
    with torch.cuda.device_of(z):
        linear_gradient_kernel[(n * n_chunks,)](
            z,
            z.stride(0),
            out,
            out.stride(0),
            label.contiguous(),
            *stats[:3],
            vocab,
            n_chunks,
            *_scalars(transforms)[:2],
            ALIGNED=is_aligned(z) and is_aligned(out),
            TILES=GRADIENT_TILES,
            U=2 - GRADIENT_TILES % 2,
            BV=BV,
            **_constants(transforms),
        )
    return out


def columns(
    z: Tensor,
    label: Tensor,
    stats: RowStats,
    transforms: Transforms,
    coefficient: Tensor,
    groups: Tensor,
) -> tuple[Tensor, Tensor]:
    n, vocab = z.shape
    k = groups.shape[0]
    constants = _column_constants(vocab, k)
    n_blocks, n_parts = triton.cdiv(vocab, constants["BV"]), triton.cdiv(n, COLUMN_ROWS)
    parts = z.new_empty((n_parts, 1 + k, vocab))
    # What a row has beside each other, 0 after the last group. After the last row nothing weighs: the
    # softmax of any logit is 0 under so large an lse.
    padded = n_parts * COLUMN_ROWS
    rows = z.new_zeros((padded, 3 + constants["K"]))
    rows[n:, 0] = ABSENT
    rows[:n, 0], rows[:n, 1], rows[:n, 2] = stats.lse, stats.lse_low, coefficient
    rows[:n, 3 : 3 + k] = groups.t()
    # The log-prob of a label outside the vocabulary is NaN: it must show in some column.
    inside = torch.full((padded,), -1, dtype=torch.int32, device=z.device)
    inside[:n] = label.clamp(0, vocab - 1)
    with torch.cuda.device_of(z):
        linear_columns_kernel[(n_blocks * n_parts,)](
            z,
            z.stride(0),
            inside,
            stats.log_prob,
            rows,
            parts,
            n,
            vocab,
            k,
            n_blocks,
            *_scalars(transforms),
            ALIGNED=is_aligned(z),
            **constants,
            **_constants(transforms),
        )
    sums = parts.sum(0)
    return sums[0], sums[1:]


def gather(
    z: Tensor,
    label: Tensor,
    stats: RowStats,
    transforms: Transforms,
    columns: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    n, a = z.shape[0], columns.shape[0]
    out = z.new_empty((n, a), dtype=dtype)
    n_chunks = triton.cdiv(a, GATHER_BA * GATHER_TILES)
    sums = z.new_empty((n, n_chunks))
    with torch.cuda.device_of(z):
        linear_gather_kernel[(triton.cdiv(n, GATHER_U) * n_chunks,)](
            z,
            z.stride(0),
            columns.contiguous(),
            out,
            sums,
            label.contiguous(),
            *stats[:3],
            n,
            a,
            z.shape[1],
            n_chunks,
            *_scalars(transforms)[:2],
            ALIGNED=is_aligned(out),
            TILES=GATHER_TILES,
            U=GATHER_U,
            BA=GATHER_BA,
            **_constants(transforms),
        )
    return out, sums.sum(1)


TILE = TileKernels(rows, gradient, columns, gather)
ops.register("triton", linear_kernels(TILE))
