"""The sequence stage and the loss stage in Triton: token log-probs to log-ratios, weights and the loss.

Memory traffic per token: reads a label, a log-prob and a log mu (16 bytes), writes a log-ratio and a
gradient (8 bytes); the token-level ratio reads twice. Sums are pairs of fp32 words in a fixed order.

The stages run inside the row kernel, by the last program of a sequence and of the batch, or in the
launches of this file, which need no fence.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import triton
import triton.language as tl

from topr_kernels.kernels.triton_rows import IGNORE, kernel, two_sum
from topr_kernels.kernels.triton_taper import taper

# ---- where a sequence lies --------------------------------------------------------------------------


@triton.jit
def sequence_of(p_cu_seqlens, position, B):
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
def bounds(p_cu_seqlens, i_seq, T, B):
    """-> (first position, end position, sound) of a sequence; unsound offsets come back as 0, 0."""
    if p_cu_seqlens is not None:
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


# ---- one sequence, one batch ------------------------------------------------------------------------


@triton.jit
def _add_pairs(a_hi, a_lo, b_hi, b_lo):
    """Adds two sums, each a pair of fp32 words. -> (hi, lo)."""
    s, e = two_sum(a_hi, b_hi)
    return s, e + a_lo + b_lo


@triton.jit
def _scored(p_labels, o_t, m_t, start, SHIFT: tl.constexpr):
    """Mask of the tokens that count; with SHIFT nothing predicts the first of a sequence."""
    label = tl.load(p_labels + o_t, mask=m_t, other=IGNORE)
    scored = m_t & (label != IGNORE)
    if SHIFT:
        scored = scored & (o_t != start)
    return scored


@triton.jit
def sequence_stage(
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
    SHIFT: tl.constexpr,
    BT: tl.constexpr,
):
    """Sums the log-ratio of a sequence in fixed order, tapers it, writes its results.

    The log mu is per token, or, where p_behavior_low is given, one sum per sequence in two words.
    """
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
        if p_behavior_low is None:
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
    if p_behavior_low is not None:
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
def loss_stage(
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


# ---- kernels ----------------------------------------------------------------------------------------


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
    SHIFT: tl.constexpr,
    RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    BT: tl.constexpr,
):
    """The sequence stage as a launch of its own: no fence to get wrong. Grid: B."""
    i_seq = tl.program_id(0).to(tl.int64)
    start, end, sound = bounds(p_cu_seqlens, i_seq, T.to(tl.int64), B)
    sequence_stage(
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
    loss_stage(
        B, p_objective, p_reward_out, p_length, p_normalizer, p_loss, p_denominator, REDUCTION, BT
    )
