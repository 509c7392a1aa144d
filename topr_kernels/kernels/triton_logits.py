"""The logits path in Triton: one forward launch, one backward launch.

What never exists: an fp32 copy of the logits, a softmax, a shifted copy.
Memory traffic per logit of a scored row, with s the bytes of its dtype:

    forward   reads s                                             (bf16: 2)
    backward  reads s, writes s; rows without a gradient write s  (bf16: 4)
    total     3 s                                                 (bf16: 6 bytes per logit)

Besides the gradient (none in place) everything allocated has the size of the labels or smaller. Around
the forward there are a few more launches of a few bytes each: they fill the arrival counters, and what
unsound offsets would leave unwritten, and copy loss and denominator out of the counters' buffer.

Forward: a program streams one row, or one of SPLIT parts of it. Every lane keeps a maximum and a sum of
its own and rescales the sum once per U logits: 1 + 1/U exponentials per logit. The last program of a row
joins the parts. The last of a sequence sums its log-ratio and tapers it. The last sequence of the batch
sums the loss (``triton_sequences``). Arrival counters decide who is last. Every sum has a fixed order:
results are the same to the bit on every run. The backward kernel is in ``triton_gradient``.

Dialect: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from topr_kernels.choices import KERNEL_RATIOS, REDUCTIONS
from topr_kernels.kernels.triton_gradient import logits_bwd_kernel
from topr_kernels.kernels.triton_rows import (
    IGNORE,
    NO_FUSION,
    Settings,
    column_stride,
    finish_row,
    in_base_2,
    is_aligned,
    join,
    kernel,
    stream,
    strides,
)
from topr_kernels.kernels.triton_sequences import (
    bounds,
    loss_fwd_kernel,
    loss_stage,
    sequence_of,
    sequence_stage,
    sequences_fwd_kernel,
)
from topr_kernels.layout import IGNORE_INDEX, scored_labels
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Objective, Tokens, Transforms

# What the constants RATIO and REDUCTION of the kernels mean.
_RATIO = {name: i for i, name in enumerate(KERNEL_RATIOS)}
_REDUCTION = {name: i for i, name in enumerate(REDUCTIONS)}


# ---- arrivals ----------------------------------------------------------------------------------------


@triton.jit
def _is_last(p_counter, expected):
    """Announces an arrival; true for the last of ``expected``. Counters start at -1."""
    # Every thread's stores must precede the release below: the barrier orders them inside the block,
    # the atomic's release carries them to the device, its acquire makes the others' visible here.
    # Without either the last one may sum stale values, a race that the interpreter cannot show.
    tl.debug_barrier()
    before = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    return before == expected - 2


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
    inv_softcap,
    factor,
    p_log_prob,
    p_lse,
    p_lse_low,
    p_entropy,
    p_parts,
    p_row_counter,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    SPLIT: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    p_sequence_counter=None,
    p_batch_counter=None,
    p_behavior=None,
    p_behavior_low=None,
    p_reward=None,
    p_token_log_ratio=None,
    p_log_ratio=None,
    p_weight=None,
    p_objective=None,
    p_reward_out=None,
    p_length=None,
    p_d_log_prob=None,
    log_pos_min=None,
    log_pos_max=None,
    log_neg_min=None,
    log_neg_max=None,
    baseline=None,
    p_normalizer=None,
    p_loss=None,
    p_denominator=None,
):
    """Log-probs of all rows; given the arguments that may be None, everything up to the loss.

    Grid: n_positions * SPLIT programs for the rows. With the later stages B more, one per sequence: it
    checks the offsets, and it finishes the sequences that have no position at all.
    """
    # 64 bits from the start: B * T * V passes 2^31 at 16 x 1024 x 151936.
    i_program = tl.program_id(0).to(tl.int64)
    stride_v = column_stride(stride_v)
    n_rows = n_positions.to(tl.int64) * SPLIT
    T = T.to(tl.int64)
    done = 0
    if i_program < n_rows:
        position = i_program // SPLIT
        i_part = (i_program % SPLIT).to(tl.int32)
        if p_cu_seqlens is not None:
            i_seq = sequence_of(p_cu_seqlens, position, B)
        else:
            i_seq = position // T
        start, end, sound = bounds(p_cu_seqlens, i_seq, T, B)
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
            k, _, _ = in_base_2(factor)
            m, s, h, _ = stream(
                p_row,
                stride_v,
                V,
                inv_softcap,
                k,
                i_part,
                label,
                SOFTCAP,
                ENTROPY,
                False,
                ALIGNED,
                SPLIT,
                U,
                L,
                W,
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
                    m, s, h, _ = join(b_m, b_s, b_h, b_h, k, ENTROPY, False)
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
                    inv_softcap,
                    factor,
                    p_log_prob + position,
                    p_lse + position,
                    p_lse_low + position,
                    p_entropy + position,
                    SOFTCAP,
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
        start, end, sound = bounds(p_cu_seqlens, i_seq, T, B)
        done = 1
    if p_loss is not None:
        # Programs of an unsound sequence do not arrive: the batch is never complete, and the loss keeps
        # the NaN that it was filled with.
        if (done == 1) & sound:
            if _is_last(p_sequence_counter + i_seq, (end - start + 1).to(tl.int32)):
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
                if _is_last(p_batch_counter, B):
                    loss_stage(
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


# ---- launches --------------------------------------------------------------------------------------


#: Tokens a sequence stage sums per step.
BT = 256
#: Below this many rows per multiprocessor a row is split. Two values of `split`, so two variants.
ROWS_PER_MULTIPROCESSOR = 4
SPLIT = 8


#: What :func:`tune` has found, by (V, bytes per logit, aligned). Empty unless it was called.
TUNED: dict[tuple[int, int, bool], Settings] = {}


def settings(
    vocab: int, itemsize: int, aligned: bool, n_rows: int, multiprocessors: int
) -> Settings:
    """Launch settings of both kernels: documented choices, unless :func:`tune` has found better."""
    if tuned := TUNED.get((vocab, itemsize, aligned)):
        return tuned
    bv = 128 * 16 // itemsize
    if vocab <= 1024:
        return Settings(bv, 1, 1, 1, 4)
    if vocab <= 8192:
        return Settings(bv, 2, 8192 // bv, 1, 4)
    split = SPLIT if n_rows < ROWS_PER_MULTIPROCESSOR * multiprocessors and vocab >= 32768 else 1
    return Settings(bv, 4, 8192 // bv, split, 4)


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
        bv = 32 * warps * 16 // logits.element_size()
        TUNED[key] = candidate = Settings(bv, u, tiles, 1, warps)
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


class _Rows:
    """What a forward launch needs and leaves behind, per token."""

    def __init__(
        self, logits: Tensor, tokens: Tokens, transforms: Transforms, entropy: bool
    ) -> None:
        labels, cu_seqlens, shift = tokens
        _, softcap, temperature = transforms
        _check(logits)
        self.logits, self.labels = logits, labels.contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
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
        self.inv_softcap, self.factor = 1.0 / (softcap or 1.0), (softcap or 1.0) / temperature
        self.meta = {
            "SHIFT": shift,
            "ALIGNED": aligned,
            "SOFTCAP": softcap is not None,
            "ENTROPY": entropy,
            "SPLIT": self.settings.split,
            **self.settings.lanes(aligned),
            "BT": BT,
            "num_warps": self.settings.num_warps,
            **NO_FUSION,
        }

    def launch(
        self, counters: Tensor, sequence: _Sequences | None, ratio: str, reduction: str
    ) -> None:
        """Launches the row kernel, fused with the stages behind it if ``sequence`` is given."""
        split = self.settings.split
        grid = self.n * split + (self.b if sequence else 0)
        if grid == 0:
            return
        sizes = [self.row_counters, self.b, 1, 2]
        row_counter, sequence_counter, batch_counter, _ = counters.split(sizes)
        stages: dict[str, Any] = {}
        if sequence:
            stages = {"p_sequence_counter": sequence_counter, "p_batch_counter": batch_counter}
            stages |= sequence.stage_arguments() | sequence.loss_arguments()
        rows_fwd_kernel[(grid,)](
            self.logits,
            *strides(self.logits),
            self.labels,
            self.cu_seqlens,
            self.n,
            self.t,
            self.vocab,
            self.b,
            self.inv_softcap,
            self.factor,
            self.log_prob,
            self.lse,
            self.lse_low,
            self.entropy,
            self.log_prob.new_empty(self.n * split * 3) if split > 1 else None,
            row_counter if split > 1 else None,
            RATIO=_RATIO[ratio],
            REDUCTION=_REDUCTION[reduction],
            **self.meta,
            **stages,
        )

    @property
    def row_counters(self) -> int:
        """Counters of rows; they come first, then one per sequence and one for the batch."""
        return self.n if self.settings.split > 1 else 0

    def counters(self) -> Tensor:
        """Arrival counters at -1, then room for denominator and loss, which reads as NaN until then."""
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
        self.behavior = behavior_log_prob.float().contiguous()
        self.behavior_low: Tensor | None = None
        if behavior_log_prob.dim() == 1:
            # A sum kept in fp64 reaches the kernel as two fp32 words.
            low = (behavior_log_prob - self.behavior).float()
            self.behavior_low = torch.where(self.behavior.isfinite(), low, 0.0)
        if reward.dtype != torch.float32:
            # In the dtype of the rewards, so that equal numbers give exactly 0.
            reward, baseline = (reward - torch.full_like(reward, baseline)).float(), 0.0
        self.reward_in = reward.contiguous()
        self.limits, self.baseline = objective.log_limits, baseline
        self.normalizer = None if normalizer is None else normalizer.float()
        token = rows.log_prob
        packed = rows.cu_seqlens is not None

        def fresh(*shape: int) -> Tensor:
            # Unsound offsets leave sequences unfinished: these are NaN then, not noise.
            return token.new_full(shape, torch.nan) if packed else token.new_empty(shape)

        self.token_log_ratio, self.d_log_prob = fresh(*token.shape), fresh(*token.shape)
        self.log_ratio, self.weight, self.objective, self.reward = (fresh(rows.b) for _ in range(4))
        self.length = torch.zeros(rows.b, dtype=torch.int64, device=token.device)
        self.denominator, self.loss = batch[0], batch[1]

    def stage_arguments(self) -> dict[str, Any]:
        """Arguments of the sequence stage, under their names in the kernels."""
        limits = ("log_pos_min", "log_pos_max", "log_neg_min", "log_neg_max")
        return {
            "p_behavior": self.behavior,
            "p_behavior_low": self.behavior_low,
            "p_reward": self.reward_in,
            "p_token_log_ratio": self.token_log_ratio,
            "p_log_ratio": self.log_ratio,
            "p_weight": self.weight,
            "p_d_log_prob": self.d_log_prob,
            "baseline": self.baseline,
            **dict(zip(limits, self.limits, strict=True)),
            **self.shared_arguments(),
        }

    def loss_arguments(self) -> dict[str, Any]:
        """The same of the loss stage."""
        return {
            "p_normalizer": self.normalizer,
            "p_loss": self.loss,
            "p_denominator": self.denominator,
            **self.shared_arguments(),
        }

    def shared_arguments(self) -> dict[str, Any]:
        """What the sequence stage writes and the loss stage reads."""
        return {
            "p_objective": self.objective,
            "p_reward_out": self.reward,
            "p_length": self.length,
        }


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
            constants = {"REDUCTION": _REDUCTION[reduction], "BT": BT, **NO_FUSION}
            if rows.b:
                sequences_fwd_kernel[(rows.b,)](
                    rows.labels,
                    rows.cu_seqlens,
                    rows.t,
                    rows.b,
                    rows.log_prob,
                    **seq.stage_arguments(),
                    RATIO=_RATIO[ratio],
                    SHIFT=shift,
                    **constants,
                )
            loss_fwd_kernel[(1,)](rows.b, **seq.loss_arguments(), **constants)
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
    """Three launches, for rows, sequences and loss: needs no fence; to compare with."""
    return _topr_fwd(False, *args)


def _write_gradient(
    out: Tensor, logits: Tensor, tokens: Tokens, saved: ops.Saved, transforms: Transforms
) -> None:
    labels, shift = tokens.labels, tokens.shift
    lse, lse_low, log_prob, d_log_prob, d_loss, denominator = saved
    _, softcap, temperature = transforms
    _check(logits)
    if d_loss is None:
        # Callers of log_prob may pass any gradient for unscored tokens; the loss has zeros there.
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
            *strides(logits),
            out,
            *strides(out),
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
            1.0 / (softcap or 1.0),
            (softcap or 1.0) / temperature,
            1.0 / temperature,
            SHIFT=shift,
            ALIGNED=aligned,
            SOFTCAP=softcap is not None,
            TILES=s.tiles_per_program,
            U=2 - s.tiles_per_program % 2,
            BV=s.BV,
            num_warps=s.num_warps,
            **NO_FUSION,
        )


def logits_bwd(logits: Tensor, *args: Any) -> Tensor:
    out = logits.new_empty(logits.shape)
    _write_gradient(out, logits, *args)
    return out


def logits_bwd_(logits: Tensor, *args: Any) -> None:
    _write_gradient(logits, logits, *args)


ops.register("triton", ops.Kernels(log_prob_fwd, topr_fwd, logits_bwd, logits_bwd_))
ops.register("triton_staged", ops.Kernels(log_prob_fwd, topr_fwd_staged, logits_bwd, logits_bwd_))
