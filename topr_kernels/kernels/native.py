"""The logits path on the CPU, in the compiled kernels of csrc/.

Per scored row and logit: one read from memory forward (chunks of a row are reduced around a running
maximum), one read and one write backward; a gradient beyond the caches is written past them. Rows that
are not scored are not read; rows with coefficient 0 are zero-filled unread. Nothing is allocated but
results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topr_kernels.choices import KERNEL_RATIOS, REDUCTIONS
from topr_kernels.kernels.native_library import DTYPES, call, library
from topr_kernels.layout import sequence_offsets
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Objective, Tokens, Transforms
from topr_kernels.sequence import effective_reward

# enum topr_ratio and topr_reduction.
_RATIO = {name: i for i, name in enumerate(KERNEL_RATIOS)}
_REDUCTION = {name: i for i, name in enumerate(REDUCTIONS)}


def _shape(logits: Tensor, transforms: Transforms, shift: bool) -> dict[str, Any]:
    outer, time, vocab = logits.shape
    stride_outer, stride_time, stride_vocab = logits.stride()
    return {
        "dtype": DTYPES[logits.dtype],
        "outer": outer,
        "time": time,
        "vocab": vocab,
        "logits": logits,
        "stride_outer": stride_outer,
        "stride_time": stride_time,
        "stride_vocab": stride_vocab,
        "logit_scale": transforms.logit_scale,
        "softcap": transforms.softcap or 0.0,
        "temperature": transforms.temperature,
        "shift": shift,
    }


def log_prob_fwd(
    logits: Tensor, tokens: Tokens, transforms: Transforms, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = tokens.labels.contiguous()
    offsets, _ = sequence_offsets(labels, tokens.cu_seqlens)
    return _log_probs(logits, labels, offsets, transforms, entropy, tokens.shift)


def _log_probs(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    transforms: Transforms,
    entropy: bool,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_prob, lse, low, ent = (
        logits.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype)) for _ in range(4)
    )
    call(
        "topr_log_prob",
        **_shape(logits, transforms, shift),
        labels=labels,
        offsets=offsets,
        sequences=len(offsets) - 1,
        entropy=entropy,
        log_prob=log_prob,
        lse=lse,
        lse_low=low,
        row_entropy=ent,
    )
    return log_prob, lse, low, ent


def topr_fwd(
    logits: Tensor, tokens: Tokens, objective: Objective, transforms: Transforms, entropy: bool
) -> tuple[Tensor, ...]:
    labels = tokens.labels.contiguous()
    offsets, sound = sequence_offsets(labels, tokens.cu_seqlens)
    per_token = _log_probs(logits, labels, offsets, transforms, entropy, tokens.shift)
    log_prob = per_token[0]
    dtype = log_prob.dtype
    behavior, normalizer = objective.behavior_log_prob.contiguous(), objective.normalizer
    reward = effective_reward(objective).to(dtype).contiguous()
    loss, denominator = (log_prob.new_empty(()) for _ in range(2))
    token_log_ratio, d_log_prob = (torch.empty_like(log_prob) for _ in range(2))
    log_ratio, weight, tapered = (torch.empty_like(reward) for _ in range(3))
    length = torch.empty_like(reward, dtype=torch.int64)
    call(
        "topr_sequences",
        dtype=DTYPES[dtype],
        outer=labels.shape[0],
        time=labels.shape[1],
        shift=tokens.shift,
        labels=labels,
        offsets=offsets,
        sequences=len(offsets) - 1,
        log_prob=log_prob,
        behavior_log_prob=behavior,
        behavior_dtype=DTYPES[behavior.dtype],
        behavior_per_sequence=behavior.dim() == 1,
        reward=reward,
        normalizer=None if normalizer is None else normalizer.to(dtype),
        log_pos_min=objective.log_pos_min,
        log_pos_max=objective.log_pos_max,
        log_neg_min=objective.log_neg_min,
        log_neg_max=objective.log_neg_max,
        ratio=_RATIO[objective.ratio],
        reduction=_REDUCTION[objective.reduction],
        loss=loss,
        denominator=denominator,
        token_log_ratio=token_log_ratio,
        log_ratio=log_ratio,
        weight=weight,
        objective=tapered,
        length=length,
        d_log_prob=d_log_prob,
    )
    if not sound:
        # Unsound offsets poison the loss, every coefficient, and what would look like a ratio of 1.
        for poisoned in (loss, denominator, token_log_ratio):
            poisoned.fill_(torch.nan)
    sequences = log_ratio, weight, tapered, reward, length
    return (loss, denominator, *per_token, token_log_ratio, *sequences, d_log_prob)


def _write_gradient(
    out: Tensor, logits: Tensor, tokens: Tokens, saved: ops.Saved, transforms: Transforms
) -> None:
    labels, shift = tokens.labels.contiguous(), tokens.shift
    offsets, _ = sequence_offsets(labels, tokens.cu_seqlens)
    stride_outer, stride_time, stride_vocab = out.stride()
    # Saved tensors come back as a hook likes to return them.
    dense = saved._asdict()
    dense["loss_denominator"] = dense.pop("denominator")
    dtype = accumulate_dtype(logits.dtype)
    call(
        "topr_gradient",
        **_shape(logits, transforms, shift),
        gradient=out,
        gradient_stride_outer=stride_outer,
        gradient_stride_time=stride_time,
        gradient_stride_vocab=stride_vocab,
        labels=labels,
        offsets=offsets,
        sequences=len(offsets) - 1,
        **{k: None if x is None else x.to(dtype).contiguous() for k, x in dense.items()},
    )


def logits_bwd(logits: Tensor, *args: Any) -> Tensor:
    out = logits.new_empty(logits.shape)
    _write_gradient(out, logits, *args)
    return out


def logits_bwd_(logits: Tensor, *args: Any) -> None:
    _write_gradient(logits, logits, *args)


library()
ops.register("native", ops.Kernels(log_prob_fwd, topr_fwd, logits_bwd, logits_bwd_))
