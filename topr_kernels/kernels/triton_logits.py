"""The logits path in Triton: one forward launch, one backward launch.

What never exists: an fp32 copy of the logits, a softmax, a shifted copy.
Memory traffic per logit of a scored row, with s the bytes of its dtype:

    forward   reads s                                             (bf16: 2)
    backward  reads s, writes s; unscored and tapered-out rows write s and read nothing  (bf16: 4)
    total     3 s                                                 (bf16: 6 bytes per logit)

Besides the gradient (none in place) everything allocated has the size of the labels or smaller. Around
the forward there are a few more launches of a few bytes each: fills of the arrival counters and of what
unsound offsets would leave unwritten, and copies of loss and denominator out of the counters' buffer.

Forward: a program streams one row, or one of SPLIT parts of it, with a lane-wide online max and sum: one
rescale per U elements, so that the special-function unit does 1 + 1/U exponentials per element. The last
program of a row joins the parts, the last of a sequence sums its log-ratio and tapers it, the last
sequence of the batch sums the loss. Who is last is decided by arrival counters; every sum has a fixed
order, so results are bitwise the same on every run.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topr_kernels.choices import RATIOS, REDUCTIONS
from topr_kernels.kernels.triton_rows import (
    IGNORE,
    finish_row,
    is_aligned,
    join,
    kernel,
    stream,
    transform,
    two_sum,
)
from topr_kernels.kernels.triton_taper import taper
from topr_kernels.layout import IGNORE_INDEX, scored_labels
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Objective, Tokens, Transforms

# What the constants RATIO and REDUCTION of the kernels mean.
_RATIO = {name: i for i, name in enumerate(RATIOS)}
_REDUCTION = {name: i for i, name in enumerate(REDUCTIONS)}


# ---- arithmetic leaves -----------------------------------------------------------------------------


@triton.jit
def _add_pairs(a_hi, a_lo, b_hi, b_lo):
    s, e = two_sum(a_hi, b_hi)
    return s, e + a_lo + b_lo


@triton.jit
def _sequence_of(p_cu_seqlens, position, B):
    """Bisects [B + 1] offsets for the sequence that holds a position; never leaves [0, B)."""
    low = position * 0
    high = low + B
    while low < high:
        middle = (low + high) // 2
        after = tl.load(p_cu_seqlens + middle + 1).to(tl.int64) <= position
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    return tl.minimum(low, B - 1)


@triton.jit
def _bounds(p_cu_seqlens, i_seq, T, B, PACKED: tl.constexpr):
    """-> (first position, end position, sound) of a sequence; unsound offsets come back as 0, 0."""
    if PACKED:
        start = tl.load(p_cu_seqlens + i_seq).to(tl.int64)
        end = tl.load(p_cu_seqlens + i_seq + 1).to(tl.int64)
        sound = (start >= 0) & (end >= start) & (end <= T)
        sound = sound & ((i_seq > 0) | (start == 0)) & ((i_seq < B - 1) | (end == T))
        start = tl.where(sound, start, 0)
        end = tl.where(sound, end, 0)
    else:
        start = i_seq * T
        end = start + T
        sound = T >= 0
    return start, end, sound


@triton.jit
def _is_last(p_counter, expected):
    """Announces an arrival; true for the last of ``expected``. Counters start at -1."""
    # Every thread's stores must precede the release below: the barrier orders them inside the block,
    # the atomic's release carries them to the device, its acquire makes the others' visible here.
    # Without either the last one may sum stale values, a race that the interpreter cannot show.
    tl.debug_barrier()
    before = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    return before == expected - 2


# ---- one sequence, one batch -----------------------------------------------------------------------


@triton.jit
def _scored(p_labels, o_t, m_t, start, SHIFT: tl.constexpr):
    label = tl.load(p_labels + o_t, mask=m_t, other=IGNORE)
    scored = m_t & (label != IGNORE)
    if SHIFT:
        scored = scored & (o_t != start)
    return scored


@triton.jit
def _sequence_stage(
    i_seq,
    start,
    end,
    sound,
    p_labels,
    p_log_prob,
    p_behavior,
    p_behavior_low,
    p_reward,
    p_token_log_ratio,
    p_log_ratio,
    p_weight,
    p_objective,
    p_reward_out,
    p_length,
    p_d_log_prob,
    log_pos_min,
    log_pos_max,
    log_neg_min,
    log_neg_max,
    baseline,
    RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    BEHAVIOR_PER_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr,
    BT: tl.constexpr,
):
    """Sums the log-ratio of a sequence in fixed order, tapers it, writes what belongs to it."""
    reward = tl.load(p_reward + i_seq).to(tl.float32) - baseline
    negative = reward < 0
    log_min = tl.where(negative, log_neg_min, log_pos_min)
    log_max = tl.where(negative, log_neg_max, log_pos_max)

    hi = tl.zeros([BT], tl.float32)
    lo = tl.zeros([BT], tl.float32)
    value_hi = tl.zeros([BT], tl.float32)
    value_lo = tl.zeros([BT], tl.float32)
    weights = tl.zeros([BT], tl.float32)
    count = tl.zeros([BT], tl.int32)
    for i in range(0, tl.cdiv(end - start, BT)):
        o_t = start + i * BT + tl.arange(0, BT)
        m_t = o_t < end
        scored = _scored(p_labels, o_t, m_t, start, SHIFT)
        # .cg: other programs wrote these; a line cached in this SM's L1 could be stale.
        d = tl.load(p_log_prob + o_t, mask=scored, other=0.0, cache_modifier=".cg")
        if BEHAVIOR_PER_TOKEN:
            d = d - tl.load(p_behavior + o_t, mask=scored, other=0.0)
            tl.store(p_token_log_ratio + o_t, d, mask=m_t)
        else:
            tl.store(p_token_log_ratio + o_t, tl.full([BT], float("nan"), tl.float32), mask=m_t)
        hi, lo = _add_pairs(hi, lo, d, tl.zeros([BT], tl.float32))
        count += scored.to(tl.int32)
        if RATIO == 2:
            value, weight = taper(d, log_min, log_max)
            value = tl.where(scored, value, 0.0)
            value_hi, value_lo = _add_pairs(value_hi, value_lo, value, tl.zeros([BT], tl.float32))
            weights += tl.where(scored, weight, 0.0)
    sum_hi, sum_lo = tl.reduce((hi, lo), 0, _add_pairs)
    length = tl.sum(count, axis=0)
    if not BEHAVIOR_PER_TOKEN:
        sum_hi = sum_hi - tl.load(p_behavior + i_seq)
        sum_lo = sum_lo - tl.load(p_behavior_low + i_seq)
    empty = length == 0
    log_ratio = tl.where(empty, 0.0, sum_hi + sum_lo)
    tokens = tl.maximum(length, 1).to(tl.float32)

    if RATIO == 2:
        v_hi, v_lo = tl.reduce((value_hi, value_lo), 0, _add_pairs)
        objective = v_hi + v_lo
        weight = tl.sum(weights, axis=0) / tokens
    else:
        if RATIO == 1:
            value, weight = taper(log_ratio / tokens, log_min, log_max)
            objective = value * tokens
        else:
            objective, weight = taper(log_ratio, log_min, log_max)
    weight = tl.where(reward == reward, weight, float("nan"))

    # Unsound offsets leave a length of -1 behind, which turns loss and denominator into NaN.
    length = tl.where(sound, length, -1)
    tl.store(p_log_ratio + i_seq, log_ratio)
    tl.store(p_weight + i_seq, tl.where(empty, 0.0, weight))
    tl.store(p_objective + i_seq, tl.where(empty, 0.0, objective))
    tl.store(p_reward_out + i_seq, reward)
    tl.store(p_length + i_seq, length.to(tl.int64))

    share = -reward
    if REDUCTION == 0:
        share = share / tokens
    for i in range(0, tl.cdiv(end - start, BT)):
        o_t = start + i * BT + tl.arange(0, BT)
        m_t = o_t < end
        scored = _scored(p_labels, o_t, m_t, start, SHIFT)
        w = weight + tl.zeros([BT], tl.float32)
        if RATIO == 2:
            d = tl.load(p_log_prob + o_t, mask=scored, other=0.0, cache_modifier=".cg")
            d = d - tl.load(p_behavior + o_t, mask=scored, other=0.0)
            _, w = taper(d, log_min, log_max)
        # Selected, not multiplied: a reward of 0 cancels an infinite weight, never a NaN.
        b_reward = reward + tl.zeros([BT], tl.float32)
        silent = (~scored) | ((b_reward == 0) & (w == w))
        tl.store(p_d_log_prob + o_t, tl.where(silent, 0.0, share * w), mask=m_t)


@triton.jit
def _loss_stage(
    B,
    p_objective,
    p_reward_out,
    p_length,
    p_normalizer,
    p_loss,
    p_denominator,
    REDUCTION: tl.constexpr,
    BT: tl.constexpr,
):
    """Sums the loss over the sequences in fixed order; writes it and its denominator."""
    hi = tl.zeros([BT], tl.float32)
    lo = tl.zeros([BT], tl.float32)
    units = tl.zeros([BT], tl.int64)
    unsound = tl.zeros([BT], tl.int64)
    for i in range(0, tl.cdiv(B, BT)):
        o_b = i * BT + tl.arange(0, BT)
        m_b = o_b < B
        length = tl.load(p_length + o_b, mask=m_b, other=0, cache_modifier=".cg")
        reward = tl.load(p_reward_out + o_b, mask=m_b, other=0.0, cache_modifier=".cg")
        objective = tl.load(p_objective + o_b, mask=m_b, other=0.0, cache_modifier=".cg")
        unsound += (length < 0).to(tl.int64)
        silent = (length <= 0) | ((reward == 0) & (objective == objective))
        term = -reward * objective
        if REDUCTION == 0:
            term = term / tl.maximum(length, 1).to(tl.float32)
            units += (length > 0).to(tl.int64)
        else:
            units += tl.maximum(length, 0)
        term = tl.where(silent, 0.0, term)
        hi, lo = _add_pairs(hi, lo, term, tl.zeros([BT], tl.float32))
    sum_hi, sum_lo = tl.reduce((hi, lo), 0, _add_pairs)
    if REDUCTION == 2:
        denominator = 1.0
    elif p_normalizer is not None:
        denominator = tl.load(p_normalizer)
    else:
        denominator = tl.maximum(tl.sum(units, axis=0), 1).to(tl.float32)
    loss = (sum_hi + sum_lo) / denominator
    # A counted denominator is 0 when nothing is scored anywhere: that loss is a plain 0.
    loss = tl.where(tl.sum(units, axis=0) == 0, 0.0, loss)
    sound = tl.sum(unsound, axis=0) == 0
    tl.store(p_denominator, tl.where(sound, denominator, float("nan")))
    tl.store(p_loss, tl.where(sound, loss, float("nan")))


# ---- kernels ---------------------------------------------------------------------------------------


@kernel
def rows_fwd_kernel(
    p_logits,
    stride_o,
    stride_t,
    stride_v,
    p_labels,
    p_cu_seqlens,
    n_positions,
    T,
    V,
    B,
    softcap,
    inv_temperature,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_entropy,
    p_parts,
    p_row_counter,
    p_behavior,
    p_behavior_low,
    p_reward,
    p_token_log_ratio,
    p_log_ratio,
    p_weight,
    p_objective,
    p_reward_out,
    p_length,
    p_d_log_prob,
    log_pos_min,
    log_pos_max,
    log_neg_min,
    log_neg_max,
    baseline,
    p_sequence_counter,
    p_batch_counter,
    p_normalizer,
    p_loss,
    p_denominator,
    FUSED: tl.constexpr,
    PACKED: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    BEHAVIOR_PER_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    U: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
):
    """Log-probs of all rows; with FUSED also everything up to the loss.

    Grid: n_positions * SPLIT programs for the rows and, if FUSED, B more, one to vouch for the bounds of
    each sequence (and to finish the sequences that have no position at all).
    """
    # 64 bits from the start: B * T * V passes 2^31 at 16 x 1024 x 151936.
    i_program = tl.program_id(0).to(tl.int64)
    V = V.to(tl.int64)
    if ALIGNED:
        stride_v = 1
    n_rows = n_positions.to(tl.int64) * SPLIT
    T = T.to(tl.int64)
    done = 0
    if i_program < n_rows:
        position = i_program // SPLIT
        i_part = i_program % SPLIT
        if PACKED:
            i_seq = _sequence_of(p_cu_seqlens, position, B)
        else:
            i_seq = position // T
        start, end, sound = _bounds(p_cu_seqlens, i_seq, T, B, PACKED)
        label = tl.load(p_labels + position)
        scored = label != IGNORE
        if SHIFT:
            scored = scored & (position != start)
        if scored:
            i_t = position % T
            if SHIFT:
                i_t = tl.maximum(i_t - 1, 0)
            offset = (position // T) * stride_o + i_t * stride_t
            p_row = p_logits + offset
            if ALIGNED:
                p_row = tl.multiple_of(p_row, 16)
            m, s, h, _ = stream(
                p_row,
                stride_v,
                V,
                softcap,
                inv_temperature,
                i_part,
                label,
                SOFTCAP,
                TEMPERATURE,
                ENTROPY,
                False,
                SPLIT,
                U,
                BV,
            )
            if SPLIT > 1:
                p_part = p_parts + i_program * 3
                tl.store(p_part, m)
                tl.store(p_part + 1, s)
                tl.store(p_part + 2, h)
                if _is_last(p_row_counter + position, SPLIT):
                    o_part = (position * SPLIT + tl.arange(0, SPLIT)) * 3
                    b_m = tl.load(p_parts + o_part, cache_modifier=".cg")
                    b_s = tl.load(p_parts + o_part + 1, cache_modifier=".cg")
                    b_h = tl.load(p_parts + o_part + 2, cache_modifier=".cg")
                    m, s, h, _ = join(b_m, b_s, b_h, b_h, ENTROPY, False)
                    done = 1
            else:
                done = 1
            if done == 1:
                finish_row(
                    p_row,
                    stride_v,
                    V,
                    label,
                    m,
                    s,
                    h,
                    softcap,
                    inv_temperature,
                    p_log_prob + position,
                    p_lse + position,
                    p_lse_low + position,
                    p_entropy + position,
                    SOFTCAP,
                    TEMPERATURE,
                    ENTROPY,
                )
        else:
            if i_part == 0:
                tl.store(p_log_prob + position, 0.0)
                tl.store(p_lse + position, 0.0)
                tl.store(p_lse_low + position, 0.0)
                if ENTROPY:
                    tl.store(p_entropy + position, 0.0)
                else:
                    tl.store(p_entropy + position, float("nan"))
                done = 1
    else:
        i_seq = i_program - n_rows
        start, end, sound = _bounds(p_cu_seqlens, i_seq, T, B, PACKED)
        done = 1
    if FUSED:
        # Programs of an unsound sequence stay away, so that the batch is never complete and the loss
        # keeps the NaN it was filled with.
        if (done == 1) & sound:
            if _is_last(p_sequence_counter + i_seq, (end - start + 1).to(tl.int32)):
                _sequence_stage(
                    i_seq,
                    start,
                    end,
                    sound,
                    p_labels,
                    p_log_prob,
                    p_behavior,
                    p_behavior_low,
                    p_reward,
                    p_token_log_ratio,
                    p_log_ratio,
                    p_weight,
                    p_objective,
                    p_reward_out,
                    p_length,
                    p_d_log_prob,
                    log_pos_min,
                    log_pos_max,
                    log_neg_min,
                    log_neg_max,
                    baseline,
                    RATIO,
                    REDUCTION,
                    BEHAVIOR_PER_TOKEN,
                    SHIFT,
                    BT,
                )
                if _is_last(p_batch_counter, B):
                    _loss_stage(
                        B,
                        p_objective,
                        p_reward_out,
                        p_length,
                        p_normalizer,
                        p_loss,
                        p_denominator,
                        REDUCTION,
                        BT,
                    )


@kernel
def sequences_fwd_kernel(
    p_labels,
    p_cu_seqlens,
    T,
    B,
    p_log_prob,
    p_behavior,
    p_behavior_low,
    p_reward,
    p_token_log_ratio,
    p_log_ratio,
    p_weight,
    p_objective,
    p_reward_out,
    p_length,
    p_d_log_prob,
    log_pos_min,
    log_pos_max,
    log_neg_min,
    log_neg_max,
    baseline,
    PACKED: tl.constexpr,
    SHIFT: tl.constexpr,
    RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    BEHAVIOR_PER_TOKEN: tl.constexpr,
    BT: tl.constexpr,
):
    """The sequence stage as a launch of its own: no fence to get wrong. Grid: B."""
    i_seq = tl.program_id(0).to(tl.int64)
    start, end, sound = _bounds(p_cu_seqlens, i_seq, T.to(tl.int64), B, PACKED)
    _sequence_stage(
        i_seq,
        start,
        end,
        sound,
        p_labels,
        p_log_prob,
        p_behavior,
        p_behavior_low,
        p_reward,
        p_token_log_ratio,
        p_log_ratio,
        p_weight,
        p_objective,
        p_reward_out,
        p_length,
        p_d_log_prob,
        log_pos_min,
        log_pos_max,
        log_neg_min,
        log_neg_max,
        baseline,
        RATIO,
        REDUCTION,
        BEHAVIOR_PER_TOKEN,
        SHIFT,
        BT,
    )


@kernel
def loss_fwd_kernel(
    B,
    p_objective,
    p_reward_out,
    p_length,
    p_normalizer,
    p_loss,
    p_denominator,
    REDUCTION: tl.constexpr,
    BT: tl.constexpr,
):
    """The loss stage as a launch of its own. Grid: 1."""
    _loss_stage(
        B, p_objective, p_reward_out, p_length, p_normalizer, p_loss, p_denominator, REDUCTION, BT
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
    softcap,
    inv_temperature,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TILES: tl.constexpr,
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
    V = V.to(tl.int64)
    i_o = row // T
    i_t = row % T
    if ALIGNED:
        stride_v = 1
        out_v = 1
    position = row
    c = 0.0
    if SHIFT:
        position = row + 1
        if i_t + 1 < T:
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
    first = i_chunk * TILES
    last = tl.minimum(first + TILES, tl.cdiv(V, BV))
    whole = tl.minimum(last, V // BV)
    if c == 0.0:
        b_zero = tl.zeros([BV], p_out.dtype.element_ty)
        for i in range(first, whole):
            tl.store(p_out_row + (i * BV + tl.arange(0, BV)) * out_v, b_zero)
        for i in range(tl.maximum(whole, first), last):
            o_v = i * BV + tl.arange(0, BV)
            tl.store(p_out_row + o_v * out_v, b_zero, mask=o_v < V)
    else:
        label = tl.load(p_labels + position)
        lse = tl.load(p_lse + position)
        low = tl.load(p_lse_low + position)
        p_label = tl.exp(tl.load(p_log_prob + position))
        if TEMPERATURE:
            c = c * inv_temperature
        # The true class in fp32, rounded once: a second read of a rounded value loses it.
        d_label = c * (1.0 - p_label)
        for i in range(first, whole):
            o_v = i * BV + tl.arange(0, BV)
            z = tl.load(p_row + o_v * stride_v).to(tl.float32)
            z, slope = transform(z, softcap, inv_temperature, SOFTCAP, TEMPERATURE)
            d = tl.where(o_v == label, d_label, -c * tl.exp((z - lse) - low)) * slope
            tl.store(p_out_row + o_v * out_v, d.to(p_out.dtype.element_ty))
        for i in range(tl.maximum(whole, first), last):
            o_v = i * BV + tl.arange(0, BV)
            m_v = o_v < V
            z = tl.load(p_row + o_v * stride_v, mask=m_v, other=0.0).to(tl.float32)
            z, slope = transform(z, softcap, inv_temperature, SOFTCAP, TEMPERATURE)
            d = tl.where(o_v == label, d_label, -c * tl.exp((z - lse) - low)) * slope
            tl.store(p_out_row + o_v * out_v, d.to(p_out.dtype.element_ty), mask=m_v)


# ---- launches --------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """Launch settings, fixed and by bucket of V, so that nothing about a batch recompiles a kernel.

    Attributes:
        BV: lanes of a tile; 1024 over 4 warps is 8 bf16 of a 128-bit load per thread.
        U: tiles in flight per rescale of the running max.
        tiles_per_program: tiles a backward program writes.
        split: programs per row when there are too few rows to fill the device.
        num_warps: warps per program.
    """

    BV: int
    U: int
    tiles_per_program: int
    split: int
    num_warps: int


#: Tokens a sequence stage sums per step.
BT = 256
#: Below this many rows per multiprocessor a row is split. Two values of `split`, so two variants.
ROWS_PER_MULTIPROCESSOR = 4
SPLIT = 8


#: What :func:`tune` has found, by (V, bytes per logit, aligned). Empty unless it was called.
TUNED: dict[tuple[int, int, bool], Settings] = {}


def settings(vocab: int, itemsize: int, aligned: bool, rows: int, multiprocessors: int) -> Settings:
    """Launch settings of both kernels: documented choices, unless :func:`tune` has found better."""
    if tuned := TUNED.get((vocab, itemsize, aligned)):
        return tuned
    if vocab <= 1024:
        return Settings(1024, 1, 1, 1, 4)
    if vocab <= 8192:
        return Settings(1024, 2, 8, 1, 4)
    split = SPLIT if rows < ROWS_PER_MULTIPROCESSOR * multiprocessors and vocab >= 32768 else 1
    # Four tiles of fp32 with softcap and entropy would spill; of narrow loads, take 208 registers.
    return Settings(1024, 4 if itemsize == 2 and aligned else 2, 8, split, 4)


def tune(vocab: int, dtype: torch.dtype, rows: int = 4096, repetitions: int = 20) -> Settings:
    """Measures launch settings for a vocabulary on this GPU and keeps the fastest for the process.

    Opt-in: without it the fixed choices of :func:`settings` serve. Works on logits of its own, so that
    nothing a caller holds is written. Results stay correct whatever it finds; log-probs may differ in
    the last bit from those under other settings.

    Args:
        vocab: V.
        dtype: of the logits.
        rows: rows to measure with; enough to fill the device.
        repetitions: launches per candidate; the median counts.

    Returns:
        The settings that later calls with this V and dtype use.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = torch.randn(1, rows, vocab, device=device).to(dtype)
    labels = torch.zeros(1, rows, dtype=torch.int64, device=device)
    token = torch.full((1, rows), -1.0, device=device)
    tokens, transforms = Tokens(labels, None, False), Transforms(1.0, None, 1.0)
    saved = ops.Saved(token, token, token, token, None, None)
    key = (vocab, logits.element_size(), is_aligned(logits))
    best: tuple[float, Settings] | None = None
    for warps, u, tiles in itertools.product((4, 8), (1, 2, 4), (4, 8, 16)):
        # 8 lanes per thread: 128-bit loads in half precision, and U reduced within the thread.
        TUNED[key] = candidate = Settings(256 * warps, u, tiles, 1, warps)
        seconds = []
        for _ in range(1 + repetitions):  # the first compiles
            start = _now(device)
            log_prob_fwd(logits, tokens, transforms, False)
            logits_bwd(logits, tokens, saved, transforms)
            seconds.append(_now(device) - start)
        median = sorted(seconds[1:])[repetitions // 2]
        if best is None or median < best[0]:
            best = (median, candidate)
    assert best is not None
    TUNED[key] = best[1]
    return best[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(logits: Tensor) -> None:
    if logits.dtype == torch.float64:
        raise TypeError(
            "logits: impl='triton' computes in fp32 and does not serve float64; use impl='torch'"
        )


def _cu_seqlens(cu_seqlens: Tensor | None, labels: Tensor) -> Tensor:
    # The pointer is never read for padded input; any int tensor will do.
    return labels if cu_seqlens is None else cu_seqlens.contiguous()


class _Rows:
    """What a forward launch needs and leaves behind, per token."""

    def __init__(
        self, logits: Tensor, tokens: Tokens, transforms: Transforms, entropy: bool
    ) -> None:
        labels, cu_seqlens, shift = tokens
        _, softcap, temperature = transforms
        _check(logits)
        self.logits, self.labels = logits, labels.contiguous()
        self.packed = cu_seqlens is not None
        self.cu_seqlens = _cu_seqlens(cu_seqlens, self.labels)
        o, self.t, self.vocab = logits.shape
        self.n = o * self.t
        self.b = o if cu_seqlens is None else cu_seqlens.shape[0] - 1
        aligned = is_aligned(logits)
        self.settings = settings(
            self.vocab, logits.element_size(), aligned, self.n, _multiprocessors(logits.device)
        )
        self.log_prob, self.lse, self.lse_low, self.entropy = (
            torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(4)
        )
        self.softcap, self.inv_temperature = softcap or 1.0, 1.0 / temperature
        self.meta = {
            "PACKED": self.packed,
            "SHIFT": shift,
            "ALIGNED": aligned,
            "SOFTCAP": softcap is not None,
            "TEMPERATURE": temperature != 1.0,
            "ENTROPY": entropy,
            "SPLIT": self.settings.split,
            "U": self.settings.U,
            "BV": self.settings.BV,
            "BT": BT,
            "num_warps": self.settings.num_warps,
        }

    def launch(
        self, counters: Tensor, sequence: _Sequences | None, ratio: str, reduction: str
    ) -> None:
        """Launches the row kernel, fused with the stages behind it if ``sequence`` is given."""
        split = self.settings.split
        parts = self.log_prob.new_empty(self.n * split * 3 if split > 1 else 0)
        rows = self.row_counters
        grid = self.n * split + (self.b if sequence else 0)
        if grid == 0:
            return
        stage = sequence.pointers() if sequence else (self.log_prob,) * 10
        scalars = sequence.scalars() if sequence else (0.0,) * 5
        tail = sequence.tail() if sequence else (None, self.log_prob, self.log_prob)
        rows_fwd_kernel[(grid,)](
            self.logits,
            *self.logits.stride(),
            self.labels,
            self.cu_seqlens,
            self.n,
            self.t,
            self.vocab,
            self.b,
            self.softcap,
            self.inv_temperature,
            self.log_prob,
            self.lse,
            self.lse_low,
            self.entropy,
            parts,
            counters,
            *stage,
            *scalars,
            counters[rows:],
            counters[rows + self.b :],
            *tail,
            FUSED=sequence is not None,
            RATIO=_RATIO[ratio],
            REDUCTION=_REDUCTION[reduction],
            BEHAVIOR_PER_TOKEN=sequence is None or sequence.per_token,
            **self.meta,
        )

    @property
    def row_counters(self) -> int:
        """How many counters rows need; they come first, then one per sequence, one for the batch."""
        return self.n if self.settings.split > 1 else 0

    def counters(self) -> Tensor:
        """Arrival counters at -1, and two words that read as NaN: denominator and loss, until known."""
        count = self.row_counters + self.b + 3
        return torch.full((count,), -1, dtype=torch.int32, device=self.logits.device)


class _Sequences:
    """What the sequence and loss stages need and leave behind."""

    def __init__(
        self,
        rows: _Rows,
        objective: Objective,
        batch: Tensor,
    ) -> None:
        behavior_log_prob, reward, normalizer = objective[:3]
        baseline = objective.baseline
        self.per_token = behavior_log_prob.dim() == 2
        if self.per_token:
            self.behavior = self.behavior_low = behavior_log_prob.float().contiguous()
        else:
            # A sum kept in fp64 reaches the kernel as two fp32 words.
            self.behavior = behavior_log_prob.float().contiguous()
            low = (behavior_log_prob - self.behavior).float()
            self.behavior_low = torch.where(self.behavior.isfinite(), low, 0.0)
        if reward.dtype != torch.float32:
            # In the dtype of the rewards, so that equal numbers give exactly 0.
            reward, baseline = (reward - torch.full_like(reward, baseline)).float(), 0.0
        self.reward_in = reward.contiguous()
        self.limits, self.baseline = objective.log_limits, baseline
        self.normalizer = None if normalizer is None else normalizer.float()
        token = rows.log_prob
        self.d_log_prob = torch.empty_like(token)
        # Offsets that turn out unsound leave sequences unfinished: they show as NaN, not as noise.

        def fresh(*shape: int) -> Tensor:
            return token.new_full(shape, torch.nan) if rows.packed else token.new_empty(shape)

        self.token_log_ratio = fresh(*token.shape)
        self.log_ratio, self.weight, self.objective, self.reward = (fresh(rows.b) for _ in range(4))
        self.length = torch.zeros(rows.b, dtype=torch.int64, device=token.device)
        self.denominator, self.loss = batch[0], batch[1]

    def pointers(self) -> tuple[Tensor, ...]:
        return (
            self.behavior,
            self.behavior_low,
            self.reward_in,
            self.token_log_ratio,
            self.log_ratio,
            self.weight,
            self.objective,
            self.reward,
            self.length,
            self.d_log_prob,
        )

    def scalars(self) -> tuple[float, ...]:
        return (*self.limits, self.baseline)

    def tail(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.normalizer, self.loss, self.denominator


def log_prob_fwd(
    logits: Tensor, tokens: Tokens, transforms: Transforms, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _Rows(logits, tokens, transforms, entropy)
    with torch.cuda.device_of(logits):
        rows.launch(rows.counters(), None, "sequence", "sum")
    return rows.log_prob, rows.lse, rows.lse_low, rows.entropy


def _topr_fwd(
    one_launch: bool,
    logits: Tensor,
    tokens: Tokens,
    objective: Objective,
    transforms: Transforms,
    entropy: bool,
) -> tuple[Tensor, ...]:
    ratio, reduction, shift = objective.ratio, objective.reduction, tokens.shift
    rows = _Rows(logits, tokens, transforms, entropy)
    with torch.cuda.device_of(logits):
        counters = rows.counters()
        # All bits set is a NaN: what is left of a batch whose offsets turn out unsound.
        batch = counters[-2:].view(torch.float32)
        seq = _Sequences(rows, objective, batch)
        if one_launch and rows.b:
            rows.launch(counters, seq, ratio, reduction)
        else:
            rows.launch(counters, None, ratio, reduction)
            stage = {"RATIO": _RATIO[ratio], "REDUCTION": _REDUCTION[reduction], "BT": BT}
            if rows.b:
                sequences_fwd_kernel[(rows.b,)](
                    rows.labels,
                    rows.cu_seqlens,
                    rows.t,
                    rows.b,
                    rows.log_prob,
                    *seq.pointers(),
                    *seq.scalars(),
                    PACKED=rows.packed,
                    SHIFT=shift,
                    BEHAVIOR_PER_TOKEN=seq.per_token,
                    **stage,
                )
            loss_fwd_kernel[(1,)](
                rows.b,
                seq.objective,
                seq.reward,
                seq.length,
                *seq.tail(),
                REDUCTION=stage["REDUCTION"],
                BT=BT,
            )
    return (
        seq.loss.clone(),
        seq.denominator.clone(),
        rows.log_prob,
        rows.lse,
        rows.lse_low,
        rows.entropy,
        seq.token_log_ratio,
        seq.log_ratio,
        seq.weight,
        seq.objective,
        seq.reward,
        seq.length,
        seq.d_log_prob,
    )


def topr_fwd(*args: Any) -> tuple[Tensor, ...]:
    """One launch."""
    return _topr_fwd(True, *args)


def topr_fwd_staged(*args: Any) -> tuple[Tensor, ...]:
    """Rows, sequences and loss in launches of their own: the form without a fence, to compare with."""
    return _topr_fwd(False, *args)


def _write_gradient(
    out: Tensor, logits: Tensor, tokens: Tokens, saved: ops.Saved, transforms: Transforms
) -> None:
    labels, shift = tokens.labels, tokens.shift
    lse, lse_low, log_prob, d_log_prob, d_loss, denominator = saved
    _, softcap, temperature = transforms
    _check(logits)
    if d_loss is None:
        # An upstream gradient of any kind may sit where nothing is scored. The loss leaves zeros there.
        scored = scored_labels(*tokens) != IGNORE_INDEX
        d_log_prob = torch.where(scored, d_log_prob, 0.0)
    o, t, vocab = logits.shape
    aligned = is_aligned(logits) and is_aligned(out)
    s = settings(vocab, logits.element_size(), aligned, o * t, _multiprocessors(logits.device))
    n_chunks = triton.cdiv(vocab, s.BV * s.tiles_per_program)
    if o * t == 0:
        return
    with torch.cuda.device_of(logits):
        logits_bwd_kernel[(o * t * n_chunks,)](
            logits,
            *logits.stride(),
            out,
            *out.stride(),
            labels.contiguous(),
            lse,
            lse_low,
            log_prob,
            d_log_prob.contiguous(),
            d_loss,
            denominator,
            t,
            vocab,
            n_chunks,
            softcap or 1.0,
            1.0 / temperature,
            SHIFT=shift,
            ALIGNED=aligned,
            SOFTCAP=softcap is not None,
            TEMPERATURE=temperature != 1.0,
            TILES=s.tiles_per_program,
            BV=s.BV,
            num_warps=s.num_warps,
        )


def logits_bwd(logits: Tensor, *args: Any) -> Tensor:
    out = logits.new_empty(logits.shape)
    _write_gradient(out, logits, *args)
    return out


def logits_bwd_(logits: Tensor, *args: Any) -> None:
    _write_gradient(logits, logits, *args)


ops.register("triton", ops.Kernels(log_prob_fwd, topr_fwd, logits_bwd, logits_bwd_))
ops.register("triton_staged", ops.Kernels(log_prob_fwd, topr_fwd_staged, logits_bwd, logits_bwd_))
