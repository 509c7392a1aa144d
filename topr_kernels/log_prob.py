"""Per-token log-probabilities of the labels, differentiable: the scorer of log pi and log mu."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels import kernels, parallel, validation
from topr_kernels.layout import IGNORE_INDEX, scored_labels, sequence_offsets, to_labels, to_rows
from topr_kernels.ops import linear as linear_ops
from topr_kernels.ops import logits as ops


class LogProbOutput(NamedTuple):
    """Token results aligned with ``labels``, in its shape; fp32 (fp64 for fp64 logits).

    Attributes:
        log_prob: log pi of each label, <= 0, differentiable; 0 where nothing is scored.
        lse: detached log-sum-exp of the (transformed) row that predicts the label.
        entropy: detached entropy of that row in nats; NaN unless asked for.
    """

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor


def log_prob(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    shift: bool = True,
    process_group: Any = None,
    impl: str = "auto",
    debug: bool = False,
) -> LogProbOutput:
    """Computes log softmax(logits)[label] per token without an fp32 copy of the logits.

    Equivalent to ``logits.float().log_softmax(-1)`` gathered at the labels. The result has the layout
    :func:`topr_loss` expects of ``behavior_log_prob``, so under ``no_grad`` this scores log mu.

    Args:
        logits: [B, T, V], or packed [N, V] / [1, N, V] with ``cu_seqlens``; any strides; fp32, bf16,
            fp16 or fp64. Never copied; sums and exponentials run in fp32 (fp64 for fp64).
        labels: [B, T] / [N] int64, unshifted as in Hugging Face; -100 = not scored.
        cu_seqlens: [B + 1] int32 offsets of packed sequences (FlashAttention's convention).
        temperature: logits are divided by it, after ``softcap``.
        softcap: s of ``s * tanh(logits / s)``, for raw logits only: ``model(...).logits`` has it.
        entropy: also compute the entropy of every scored row.
        shift: row t predicts the label at t + 1; False when rows and labels are already aligned.
        process_group: of ``torch.distributed``, over whose processes the vocabulary is spread: the
            logits here are this process's columns, in the order of the ranks and not necessarily of one
            number. Labels must be the same on each; so are the results.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        LogProbOutput.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or options that disagree; on eager CPU (or with ``debug``) also
            labels outside the vocabulary and unsound ``cu_seqlens``. Elsewhere those give NaN.
    """
    x, y, offsets = validation.check_rows(logits, labels, cu_seqlens)
    temperature, softcap = validation.check_transforms(temperature, softcap)
    shard = None if process_group is None else parallel.check_columns(process_group, impl, x, y)
    if validation.values_readable(x, debug):
        validation.check_values(y, x.shape[-1] if shard is None else shard.vocab, offsets)
    if shard is not None:
        out = _sharded(x, y, offsets, shard, process_group, softcap, temperature, entropy, shift)
        return _aligned(out, labels, y, offsets)
    name = kernels.resolve(impl, x)
    out = ops.log_prob_fwd(x, y, offsets, temperature, softcap, entropy, shift, name)
    log_prob, lse, _, ent = out
    return _aligned((log_prob, lse, ent), labels, y, offsets)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    shift: bool = True,
    grad_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    process_group: Any = None,
    impl: str = "auto",
    debug: bool = False,
) -> LogProbOutput:
    """Computes :func:`log_prob` of a language model's head without ever making its logits.

    Differentiable with any upstream gradient per token, at the cost of one more matmul in the backward;
    under ``no_grad`` one matmul over the scored rows in all. With equal ``workspace_bytes`` it gives
    bitwise the log-probs of :func:`topr_kernels.linear_topr_loss`: score log mu with it. It copies to
    the host as that does.

    Args:
        hidden: [B, T, D], or packed [N, D] / [1, N, D] with ``cu_seqlens``: the input of the head.
        weight: [V, D], ``lm_head.weight``.
        labels: [B, T] / [N] int64, unshifted as in Hugging Face; -100 = not scored.
        bias: [V] or None.
        logit_scale: multiplies the logits, before ``softcap``.
        cu_seqlens: [B + 1] int32 offsets of packed sequences (FlashAttention's convention).
        temperature: logits are divided by it, after ``softcap``.
        softcap: s of ``s * tanh(logits / s)``.
        entropy: also compute the entropy of every scored row.
        shift: row t predicts the label at t + 1; False when rows and labels are already aligned.
        grad_tolerance: as in :func:`topr_kernels.linear_topr_loss`; None is 0.
        workspace_bytes: as in :func:`topr_kernels.linear_topr_loss`.
        process_group: as in :func:`topr_kernels.linear_topr_loss`.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        LogProbOutput.

    Raises:
        TypeError: wrong type or dtype of an argument, or a head sharded over processes.
        ValueError: as :func:`log_prob`.
    """
    x, y, offsets = validation.check_rows(hidden, labels, cu_seqlens, "hidden", "D")
    if process_group is not None:
        weight, bias = parallel.local_rows(process_group, weight, bias)
    spread = parallel.resolve(impl, process_group, None, weight, x, y)
    head, bias, compute_dtype = validation.check_head(x, weight, bias)
    logit_scale = validation.check_number("logit_scale", logit_scale, positive=True)
    temperature, softcap = validation.check_transforms(temperature, softcap)
    tolerance = validation.check_tolerance(grad_tolerance, compute_dtype, False, 0.0)
    workspace = validation.check_workspace(workspace_bytes, x, spread.largest)
    if validation.values_readable(x, debug):
        validation.check_values(y, spread.vocab, offsets)
    out = linear_ops.linear_log_prob_fwd(
        x,
        head,
        bias,
        y,
        offsets,
        compute_dtype,
        logit_scale,
        softcap,
        temperature,
        entropy,
        shift,
        tolerance,
        workspace,
        spread.impl,
    )
    return _aligned(out, labels, y, offsets)


def _sharded(
    x: Tensor,
    y: Tensor,
    offsets: Tensor | None,
    shard: Any,
    group: Any,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, lse, entropy) [O, T] of logits [O, T, V of the shard], aligned with the labels."""
    target = to_rows(scored_labels(y, offsets, shift), shift, IGNORE_INDEX)
    flat: tuple[Tensor, ...] = parallel.ShardedLogProb.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, 1), target.flatten(), shard, group, softcap, temperature, entropy
    )
    log_prob, lse, row_entropy = (to_labels(value.view(y.shape), shift) for value in flat)
    return log_prob, lse, row_entropy if entropy else torch.full_like(lse, torch.nan)


def _aligned(
    out: tuple[Tensor, Tensor, Tensor], labels: Tensor, y: Tensor, offsets: Tensor | None
) -> LogProbOutput:
    """Results in the shape of the labels; NaN for offsets that are not sound."""
    if offsets is not None:
        _, sound = sequence_offsets(y, offsets)
        log_prob, lse, entropy = (torch.where(sound, x, torch.nan) for x in out)
        out = log_prob, lse, entropy
    return LogProbOutput(*(x.view(labels.shape) for x in out))
