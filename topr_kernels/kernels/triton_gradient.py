"""The backward of the logits path in Triton: the gradient by the logits.

Memory traffic per logit, with s the bytes of its dtype: reads s, writes s. A row without a gradient
(unscored, or of weight 0) writes s and reads nothing.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import triton.language as tl

from topr_kernels.kernels.triton_rows import (
    column_stride,
    kernel,
    softmax,
    softmax_origin,
    transform,
    widen,
)


@kernel
def logits_bwd_kernel(
    p_logits,
    stride_o,
    stride_t,
    stride_v,
    p_out,
    out_o,
    out_t,
    out_v,
    p_labels,
    p_lse,
    p_lse_low,
    p_log_prob,
    p_d_log_prob,
    p_d_loss,
    p_denominator,
    T,
    V,
    n_chunks,
    inv_softcap,
    factor,
    inv_temperature,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
):
    """d_logits = d_log_prob (onehot - softmax) times the slope. Grid: rows * n_chunks.

    Out may be the logits themselves: every element is read, if at all, by the program that writes it,
    before it writes it.
    """
    i_program = tl.program_id(0).to(tl.int64)
    row = i_program // n_chunks
    i_chunk = i_program % n_chunks
    T = T.to(tl.int64)
    i_chunk = i_chunk.to(tl.int32)
    i_o = row // T
    i_t = row % T
    stride_v = column_stride(stride_v)
    out_v = column_stride(out_v)
    position = row
    c = 0.0
    if SHIFT:
        # The last row predicts nothing. It keeps its own position: a NaN scale takes it to the branch
        # that reads, and after the last row of all there is no position.
        if i_t + 1 < T:
            position = row + 1
            c = tl.load(p_d_log_prob + position)
    else:
        c = tl.load(p_d_log_prob + position)
    if p_d_loss is not None:
        # 0 stays 0 by selection, also under an infinite loss scale; a NaN scale reaches every row.
        scale = tl.load(p_d_loss) / tl.load(p_denominator)
        c = tl.where((c == 0.0) & (scale == scale), 0.0, c * scale)
    offset = i_o * stride_o + i_t * stride_t
    out_offset = i_o * out_o + i_t * out_t
    p_row = p_logits + offset
    p_out_row = p_out + out_offset
    if ALIGNED:
        p_row = tl.multiple_of(p_row, 16)
        p_out_row = tl.multiple_of(p_out_row, 16)
    # U loads in flight before the first is used. Columns are counted in 32 bits: half the registers.
    TILE: tl.constexpr = U * BV
    o_tile = tl.arange(0, U)[:, None] * BV + tl.arange(0, BV)[None, :]
    first = i_chunk * (TILES // U)
    last = tl.minimum(first + TILES // U, tl.cdiv(V, TILE))
    whole = tl.minimum(last, V // TILE)
    if c == 0.0:
        b_zero = tl.zeros([U, BV], p_out.dtype.element_ty)
        for i in range(first, whole):
            tl.store(p_out_row + (i * TILE + o_tile) * out_v, b_zero)
        for i in range(tl.maximum(whole, first), last):
            o_v = i * TILE + o_tile
            tl.store(p_out_row + o_v * out_v, b_zero, mask=o_v < V)
    else:
        label = tl.load(p_labels + position)
        k, origin, rest = softmax_origin(
            tl.load(p_lse + position), tl.load(p_lse_low + position), factor
        )
        c = c * inv_temperature
        # The true class in fp32, rounded once: a second read of a rounded value loses it. It is written
        # last, so that the loops need not look for it.
        d_label = c * (1.0 - tl.exp(tl.load(p_log_prob + position)))
        here = (label >= first * TILE) & (label < tl.minimum(last * TILE, V))
        if SOFTCAP:
            z_label = tl.load(p_row + label * stride_v, mask=here, other=0.0).to(tl.float32)
            _, slope_label = transform(z_label, inv_softcap, SOFTCAP)
            d_label = d_label * slope_label
            # Out may be the logits: every thread has read the label's before one of them writes.
            tl.debug_barrier()
        for i in range(first, whole):
            o_v = i * TILE + o_tile
            z = widen(tl.load(p_row + o_v * stride_v))
            u, slope = transform(z, inv_softcap, SOFTCAP)
            d = -c * softmax(u, k, origin, rest) * slope
            tl.store(p_out_row + o_v * out_v, d.to(p_out.dtype.element_ty))
        for i in range(tl.maximum(whole, first), last):
            o_v = i * TILE + o_tile
            m_v = o_v < V
            z = widen(tl.load(p_row + o_v * stride_v, mask=m_v, other=0.0))
            u, slope = transform(z, inv_softcap, SOFTCAP)
            d = -c * softmax(u, k, origin, rest) * slope
            tl.store(p_out_row + o_v * out_v, d.to(p_out.dtype.element_ty), mask=m_v)
        if here:
            tl.debug_barrier()
            tl.store(p_out_row + label * out_v, d_label.to(p_out.dtype.element_ty))
