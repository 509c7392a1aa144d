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

The transforms in two numbers: scale, softcap and temperature make softcap' tanh(z / softcap') factor of
a logit z, with softcap' = softcap / logit_scale and factor = logit_scale / temperature.

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
    is_aligned,
    kernel,
    stream,
    tanh,
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
    # -expm1(log p) = 2 tanh / (tanh - 1) at half of log p: a difference from 1 would lose digits.
    t = tanh(0.5 * log_prob)
    # A row of -inf alone has no softmax, at its label no more than elsewhere.
    return tl.where(lse == -INFINITY, float("nan"), 2.0 * t / (t - 1.0))


@triton.jit
def _load_rows(p_label, p_log_prob, p_lse, p_lse_low, o_t, m_t, V):
    """What :func:`_j` needs of rows. -> (label, J at the label, lse, lse_low)."""
    label = tl.load(p_label + o_t, mask=m_t, other=0)
    log_prob = tl.load(p_log_prob + o_t, mask=m_t, other=0.0)
    lse = tl.load(p_lse + o_t, mask=m_t, other=0.0)
    low = tl.load(p_lse_low + o_t, mask=m_t, other=0.0)
    # The log-prob of a label outside the vocabulary is NaN: it must show in some column. Columns are
    # compared in 32 bits, half the registers; only rows times their stride need 64.
    label = tl.where(label < 0, 0, tl.where(label < V, label, V - 1)).to(tl.int32)
    return label, _at_label(log_prob, lse), lse, low


@triton.jit
def _j(
    z,
    o_v,
    label,
    at_label,
    lse,
    low,
    softcap,
    factor,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Onehot - softmax, times the slope of the softcap."""
    z, slope = transform(z, softcap, factor, SOFTCAP, FACTOR)
    # (z - lse) - low: no large common offset to lose digits to.
    return tl.where(o_v == label, at_label, -tl.exp((z - lse) - low)) * slope


# ---- kernels ---------------------------------------------------------------------------------------


@kernel
def linear_rows_kernel(
    p_z,
    stride_t,
    p_label,
    V,
    softcap,
    factor,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_entropy,
    p_factor,
    p_total,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOTAL: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
):
    """Log-prob, lse and entropy of a row, and with TOTAL the sum of its J. Grid: n."""
    # 64 bits from the start: 2048 rows of 262144 logits are 2^29, but the stride is anyone's.
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_z + i_t * stride_t
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
    label = tl.load(p_label + i_t)
    tl.store(p_factor + i_t, factor)
    if label == IGNORE:
        # A row that fills a unit up: nothing of it is read.
        tl.store(p_log_prob + i_t, 0.0)
        tl.store(p_lse + i_t, 0.0)
        tl.store(p_lse_low + i_t, 0.0)
        tl.store(p_entropy + i_t, 0.0)
        tl.store(p_total + i_t, 0.0)
    else:
        m, s, h, g = stream(
            p_row,
            1,
            V,
            softcap,
            factor,
            0,
            label,
            SOFTCAP,
            FACTOR,
            ENTROPY,
            TOTAL,
            1,
            U,
            BV,
        )
        log_prob, lse = finish_row(
            p_row,
            1,
            V,
            label,
            m,
            s,
            h,
            softcap,
            factor,
            p_log_prob + i_t,
            p_lse + i_t,
            p_lse_low + i_t,
            p_entropy + i_t,
            SOFTCAP,
            FACTOR,
            ENTROPY,
        )
        if TOTAL:
            # Of the entries as the other kernels have them: what they keep is subtracted from it.
            z = tl.load(p_row + tl.where((label >= 0) & (label < V), label, 0))
            _, slope = transform(z, softcap, factor, SOFTCAP, FACTOR)
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
    softcap,
    factor,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    TILES: tl.constexpr,
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
    label, at_label, lse, low = _load_rows(p_label, p_log_prob, p_lse, p_lse_low, i_t, True, V)
    first = i_chunk * TILES
    last = tl.minimum(first + TILES, tl.cdiv(V, BV))
    whole = tl.minimum(last, V // BV)
    # No mask in the main loop: this is where the 128-bit loads are.
    for i in range(first, whole):
        o_v = i * BV + tl.arange(0, BV)
        z = tl.load(p_row + o_v)
        j = _j(z, o_v, label, at_label, lse, low, softcap, factor, SOFTCAP, FACTOR)
        tl.store(p_out_row + o_v, j.to(p_out.dtype.element_ty))
    for i in range(tl.maximum(whole, first), last):
        o_v = i * BV + tl.arange(0, BV)
        m_v = o_v < V
        z = tl.load(p_row + o_v, mask=m_v, other=0.0)
        j = _j(z, o_v, label, at_label, lse, low, softcap, factor, SOFTCAP, FACTOR)
        tl.store(p_out_row + o_v, j.to(p_out.dtype.element_ty), mask=m_v)


@kernel
def linear_columns_kernel(
    p_z,
    stride_t,
    p_label,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_coefficient,
    p_groups,
    p_parts,
    n,
    V,
    n_groups,
    n_blocks,
    softcap,
    factor,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
):
    """Sums over ROWS rows of (coefficient factor J)^2 and, for up to K groups, of weight factor J.

    Grid: n_blocks * parts, with n_blocks of BV columns. Writes parts [parts, 1 + n_groups, V], energy
    first. Threads own columns, all rows of a step [U, BV], so nothing crosses threads.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_part = i_program // n_blocks
    if ALIGNED:
        # In a form that shows it: a 128-bit load lies inside a row or outside.
        V = V // 16 * 16
        stride_t = stride_t // 16 * 16
    p_rows = p_z + i_part * ROWS * stride_t
    if ALIGNED:
        p_rows = tl.multiple_of(p_rows, 16)
    o_v = (i_program % n_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_energy = tl.zeros([BV], tl.float32)
    b_sums = (tl.zeros([BV], tl.float32),) * K
    for i in range(0, tl.cdiv(tl.minimum(n - i_part * ROWS, ROWS), U)):
        o_u = i * U + tl.arange(0, U)
        o_t = i_part * ROWS + o_u
        m_t = o_t < n
        label, at_label, lse, low = _load_rows(p_label, p_log_prob, p_lse, p_lse_low, o_t, m_t, V)
        c = tl.load(p_coefficient + o_t, mask=m_t, other=0.0) * factor
        p = p_rows + o_u.to(tl.int64)[:, None] * stride_t + o_v[None, :]
        z = tl.load(p, mask=m_t[:, None] & m_v[None, :], other=0.0)
        j = _j(
            z,
            o_v[None, :],
            label[:, None],
            at_label[:, None],
            lse[:, None],
            low[:, None],
            softcap,
            factor,
            SOFTCAP,
            FACTOR,
        )
        # Rows that are not there have J = -1 and a coefficient of 0.
        e = c[:, None] * j
        b_energy += tl.sum(e * e, axis=0)
        for k in tl.static_range(K):
            # One comparison: the interpreter makes an integer of a block of booleans & a scalar one.
            m_w = o_t < tl.where(n_groups > k, n, 0)
            w = tl.load(p_groups + k * n + o_t, mask=m_w, other=0.0) * factor
            # A queue: the group whose turn it is leaves at the front and comes back at the end.
            b_sums = b_sums[1:] + (b_sums[0] + tl.sum(w[:, None] * j, axis=0),)  # noqa: RUF005
    V = V.to(tl.int64)
    p_part = p_parts + i_part * (1 + n_groups) * V + o_v
    tl.store(p_part, b_energy, mask=m_v)
    for k in tl.static_range(K):
        if n_groups > k:
            tl.store(p_part + (1 + k) * V, b_sums[k], mask=m_v)


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
    softcap,
    factor,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
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
    label, at_label, lse, low = _load_rows(p_label, p_log_prob, p_lse, p_lse_low, o_t, m_t, V)
    b_sum = tl.zeros([U, BA], tl.float32)
    for i in range(i_chunk * TILES, tl.minimum((i_chunk + 1) * TILES, tl.cdiv(A, BA))):
        o_a = i * BA + tl.arange(0, BA)
        m_a = o_a < A
        o_v = tl.load(p_columns + o_a, mask=m_a, other=0).to(tl.int32)
        m = m_t[:, None] & m_a[None, :]
        z = tl.load(p_z + o_t[:, None] * stride_t + o_v[None, :], mask=m, other=0.0)
        j = _j(
            z,
            o_v[None, :],
            label[:, None],
            at_label[:, None],
            lse[:, None],
            low[:, None],
            softcap,
            factor,
            SOFTCAP,
            FACTOR,
        )
        b_sum += tl.where(m, j, 0.0)
        p = p_out_rows + o_u[:, None] * A + o_a[None, :]
        tl.store(p, j.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_sums + o_t * n_chunks + i_chunk, tl.sum(b_sum, axis=1), mask=m_t)


# ---- launches --------------------------------------------------------------------------------------

# Fixed choices: nothing about a batch recompiles a kernel, and a row's sums depend on V alone.

#: Lanes of a row's tile; 1024 over 4 warps is two 128-bit loads of fp32 per thread.
BV = 1024
#: Tiles a gradient program writes.
GRADIENT_TILES = 8
#: Rows a columns program sums.
COLUMN_ROWS = 128
#: Rows of a gather program, columns in flight, and steps of so many columns.
GATHER_U, GATHER_BA, GATHER_TILES = 4, 256, 8
WARPS = 4
#: The column kernel sums a product per group and logit. Nothing there is compared with a maximum.
SUM_FUSION = {"enable_fp_fusion": True}


def _tiles_in_flight(vocab: int) -> int:
    return 1 if vocab <= BV else 2


def _column_constants(k: int) -> dict[str, int]:
    # Compiled for multiples of 4 groups, 8 at least: a tile of a few rows has fewer than others. Each
    # takes a register per column of a thread and one per row in flight.
    groups = max(8, triton.cdiv(k, 4) * 4)
    return {"K": groups, "ROWS": COLUMN_ROWS, "U": 4 if groups == 8 else 2, "BV": BV // 2}


def _scalars(transforms: Transforms) -> tuple[float, float]:
    """-> (softcap', factor) of the file's head."""
    logit_scale, softcap, temperature = transforms
    return (softcap or 1.0) / logit_scale, logit_scale / temperature


def _constants(transforms: Transforms) -> dict[str, Any]:
    scaled = transforms.logit_scale != transforms.temperature
    softcap = transforms.softcap is not None
    return {"SOFTCAP": softcap, "FACTOR": scaled, "num_warps": WARPS, **NO_FUSION}


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
            U=_tiles_in_flight(vocab),
            BV=BV,
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
            *_scalars(transforms),
            ALIGNED=is_aligned(z) and is_aligned(out),
            TILES=GRADIENT_TILES,
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
    constants = _column_constants(k)
    n_blocks, n_parts = triton.cdiv(vocab, constants["BV"]), triton.cdiv(n, COLUMN_ROWS)
    parts = z.new_empty((n_parts, 1 + k, vocab))
    with torch.cuda.device_of(z):
        linear_columns_kernel[(n_blocks * n_parts,)](
            z,
            z.stride(0),
            label.contiguous(),
            *stats[:3],
            coefficient.contiguous(),
            groups.contiguous(),
            parts,
            n,
            vocab,
            k,
            n_blocks,
            *_scalars(transforms),
            ALIGNED=is_aligned(z),
            **constants,
            **_constants(transforms) | SUM_FUSION,
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
            *_scalars(transforms),
            ALIGNED=is_aligned(out),
            TILES=GATHER_TILES,
            U=GATHER_U,
            BA=GATHER_BA,
            **_constants(transforms),
        )
    return out, sums.sum(1)


TILE = TileKernels(rows, gradient, columns, gather)
ops.register("triton", linear_kernels(TILE))
