"""Per-token log-probabilities of the labels, differentiable: the scorer of log pi and log mu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels import kernels, parallel, validation
from topr_kernels.fused_linear import Shard
from topr_kernels.layout import IGNORE_INDEX, scored_labels, sequence_offsets, to_labels, to_rows
from topr_kernels.ops import linear as linear_ops
from topr_kernels.ops import logits as ops
from topr_kernels.output import LogProbOutput


class LogProbInputs(NamedTuple):
    """Arguments of ``log_prob``, checked."""

    x: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    temperature: float
    softcap: float | None
    impl: str


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
    sequence_group: Any = None,
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
            number, or a DTensor of placement Shard(-1) over that group. Labels and options must be the
            same on each; so are the results. Reads 40 bytes of each on the host.
        sequence_group: over whose processes the tokens of each sequence are spread, in the order of the
            ranks; needed where labels are shifted, across its borders. The backward is collective then.
            Packed input: shift the labels before they are cut, and pass ``shift=False``.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        LogProbOutput.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or options that disagree; on eager CPU (or with ``debug``) also
            labels outside the vocabulary and unsound ``cu_seqlens``. Elsewhere those give NaN.
    """
    groups = process_group, sequence_group
    given, settled = parallel.settle(
        *groups,
        logits,
        lambda: check_logits(
            logits, labels, cu_seqlens, temperature, softcap, shift, *groups, impl
        ),
        lambda i: describe(
            i.x, i.labels, i.cu_seqlens, i.x.shape[-1], i.x.shape[:-1], (*i[3:], entropy, shift)
        ),
        lambda i, vocab: _check_values(i.x, i.labels, i.cu_seqlens, vocab or i.x.shape[-1], debug),
    )
    pieces = shift and sequence_group is not None
    if pieces:
        moved = parallel.next_tokens(given.labels, IGNORE_INDEX, sequence_group)
        given, shift = given._replace(labels=moved), False
    out = token_log_probs(given, settled.shard, process_group, entropy, shift)
    group = sequence_group if pieces else None
    return _aligned(out, labels, given.labels, given.cu_seqlens, entropy, group)


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
    sequence_group: Any = None,
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
        sequence_group: as in :func:`log_prob`.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        LogProbOutput.

    Raises:
        TypeError: wrong type or dtype of an argument, or a head sharded over processes.
        ValueError: as :func:`log_prob`.
    """

    def check() -> tuple[validation.LinearInputs, float, str]:
        parallel.check_shift(shift, sequence_group, cu_seqlens)
        head = parallel.local_rows(process_group, weight, bias)
        given = validation.check_linear(
            hidden, head[0], labels, head[1], cu_seqlens, logit_scale, temperature, softcap
        )
        tolerance = validation.check_tolerance(grad_tolerance, given.compute_dtype, False, 0.0)
        validation.check_workspace(workspace_bytes, given.x, given.weight.shape[0])
        return given, tolerance, parallel.check_impl(impl, given.x, process_group, kernels.LINEAR)

    def claims(checked: tuple[validation.LinearInputs, float, str]) -> parallel.Claims:
        i, *options = checked
        options += [*i[5:], workspace_bytes, entropy, shift]
        return describe(i.x, i.labels, i.cu_seqlens, len(i.weight), i.x.shape, options)

    (given, tolerance, name), settled = parallel.settle(
        process_group,
        sequence_group,
        hidden,
        check,
        claims,
        lambda c, vocab: _check_values(
            c[0].x, c[0].labels, c[0].cu_seqlens, vocab or len(c[0].weight), debug
        ),
    )
    y = given.labels
    pieces = shift and sequence_group is not None
    if pieces:
        y, shift = parallel.next_tokens(y, IGNORE_INDEX, sequence_group), False
    shard = settled.shard
    largest = given.weight.shape[0] if shard is None else shard.largest
    out = linear_ops.linear_log_prob_fwd(
        given.x,
        given.weight,
        given.bias,
        y,
        given.cu_seqlens,
        given.compute_dtype,
        given.logit_scale,
        given.softcap,
        given.temperature,
        entropy,
        shift,
        tolerance,
        validation.check_workspace(workspace_bytes, given.x, largest),
        parallel.serve(shard, process_group, None, name),
    )
    group = sequence_group if pieces else None
    return _aligned(out, labels, y, given.cu_seqlens, entropy, group)


def describe(
    x: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    size: int,
    shape: torch.Size,
    options: Iterable[object],
) -> parallel.Claims:
    """What the processes of the groups must agree on.

    Args:
        x: logits or hidden states.
        labels: [O, T].
        cu_seqlens: [B + 1] or None.
        size: columns of the vocabulary that are here.
        shape: what ``x`` has in common with those of other shards.
        options: of the call.
    """
    shared = {
        "options": tuple(options),
        "dtype": x.dtype,
        "requires_grad": x.requires_grad and torch.is_grad_enabled(),
        "number of sequences": len(labels) if cu_seqlens is None else len(cu_seqlens) - 1,
    }
    tensors = {"labels": labels, "cu_seqlens": cu_seqlens}
    whole = parallel.Facts({**shared, "shape": tuple(shape)}, tensors)
    return parallel.Claims(size, whole, parallel.Facts(shared, {}))


def _check_values(
    x: Tensor, labels: Tensor, cu_seqlens: Tensor | None, vocab: int, debug: bool
) -> None:
    if validation.values_readable(x, debug):
        validation.check_values(labels, vocab, cu_seqlens)


def check_logits(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    temperature: float,
    softcap: float | None,
    shift: bool,
    process_group: Any,
    sequence_group: Any,
    impl: str,
) -> LogProbInputs:
    """Checks all but values."""
    parallel.check_shift(shift, sequence_group, cu_seqlens)
    here = parallel.local_columns(process_group, logits)
    rows = validation.check_rows(here, labels, cu_seqlens)
    transforms = validation.check_transforms(temperature, softcap)
    name = parallel.check_impl(impl, rows[0], process_group, kernels.LOGITS)
    return LogProbInputs(*rows, *transforms, name)


def token_log_probs(
    given: LogProbInputs, shard: Shard | None, group: Any, entropy: bool, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, lse, entropy) [O, T] aligned with the labels; over a ``group`` for a ``shard``."""
    x, y, offsets, temperature, softcap, name = given
    if shard is None:
        log_prob, lse, _, row_entropy = ops.log_prob_fwd(
            x, y, offsets, temperature, softcap, entropy, shift, name
        )
        return log_prob, lse, row_entropy
    target = to_rows(scored_labels(y, offsets, shift), shift, IGNORE_INDEX)
    flat: tuple[Tensor, ...] = parallel.ShardedLogProb.apply(  # type: ignore[no-untyped-call]
        x, target.flatten(), shard, group, softcap, temperature, entropy
    )
    log_prob, lse, row_entropy = (to_labels(value.view(y.shape), shift) for value in flat)
    return log_prob, lse, row_entropy if entropy else torch.full_like(lse, torch.nan)


def _aligned(
    out: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    y: Tensor,
    offsets: Tensor | None,
    entropy: bool,
    group: Any,
) -> LogProbOutput:
    """Results in the shape of the labels; NaN for offsets that are not sound.

    With a ``group`` they are moved to their labels across the pieces of the sequences.
    """
    if group is not None:
        log_prob, lse, row_entropy = out
        out = (
            parallel.moved_to_labels(log_prob, 0.0, group),
            parallel.previous_tokens(lse, 0.0, group),
            parallel.previous_tokens(row_entropy, 0.0 if entropy else torch.nan, group),
        )
    if offsets is not None:
        _, sound = sequence_offsets(y, offsets)
        log_prob, lse, row_entropy = (torch.where(sound, x, torch.nan) for x in out)
        out = log_prob, lse, row_entropy
    return LogProbOutput(*(x.view(labels.shape) for x in out))
