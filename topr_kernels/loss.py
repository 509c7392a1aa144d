"""The TOPR loss, on logits or on hidden states and the head, for any training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels import choices, kernels, validation
from topr_kernels.distributed import calls
from topr_kernels.distributed.agreement import Groups
from topr_kernels.layout import IGNORE_INDEX, scored_labels
from topr_kernels.limits import TOPR, Limits, Taper
from topr_kernels.ops import linear as linear_ops
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Objective, Tokens, Transforms
from topr_kernels.output import TOPROutput, sequence_weight_or_ones
from topr_kernels.segments import with_units
from topr_kernels.sequence import topr_from_log_prob, without_unknown

#: ``grad_tolerance`` of a frozen head in half precision; benchmarks/LOG.md says why.
FROZEN_HEAD_TOLERANCE = 2.0**-11


def topr_loss(
    logits: Tensor,
    labels: Tensor,
    behavior_log_prob: Tensor,
    reward: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    limits: Limits | Taper = TOPR,
    ratio: str = "sequence",
    baseline: float = 0.0,
    reduction: str = "sequence_mean",
    normalizer: float | Tensor | None = None,
    sequence_weight: Tensor | None = None,
    behavior_known: Tensor | None = None,
    segments: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    shift: bool = True,
    inplace: bool = False,
    process_group: Any = None,
    sequence_group: Any = None,
    impl: str = "auto",
    debug: bool = False,
) -> TOPROutput:
    """Computes the TOPR objective of a batch as a loss, with its exact gradient.

    ``loss = -sum_s n_s R_s O_s`` with O_s the taper of Eq. 6 (arXiv 2503.14286) of the ratio pi/mu of
    the completion; its gradient is Eq. 3, ``-sum_s n_s R_s [pi/mu]_a^b sum_t grad log pi_t``.

    Args:
        logits: [B, T, V], or packed [N, V] / [1, N, V] with ``cu_seqlens``; any strides; fp32, bf16,
            fp16 or fp64. Never copied; everything after them runs in fp32 (fp64 for fp64).
        labels: [B, T] / [N] int64, unshifted as in Hugging Face; -100 = not scored.
        behavior_log_prob: log mu in nats, fp32 or fp64: per token and aligned with ``labels`` (values
            under -100 are never read), or summed per sequence, [B]. With N = B packed tokens it is
            taken per token. A sum is best kept in fp64.
        reward: [B] floating, signed.
        cu_seqlens: [B + 1] int32 offsets of packed sequences (FlashAttention's convention).
        limits: clip limits per sign of the reward; presets TOPR, TIS, IS, REINFORCE, SFT. Or a custom
            taper, ``(log_ratio, positive) -> (objective, weight)``, see ``limits.Taper``: its objective
            is the value of the loss, its weight the gradient of each scored token
            (``testing.check_taper`` compares them). At "geometric" it gets the mean log-ratio, and its
            objective is multiplied by |y|. Every implementation then computes rows and gradient in its
            kernels, and the sequence stage in torch.
        ratio: "sequence" (the paper: product over tokens), "geometric" (its |y|-th root, as in GSPO),
            "token" (each token clipped alone), "segment" (O_s = sum_k rho of the product over segment
            k) or "segment_geometric" (sum_k |k| rho of its |k|-th root). The last three need
            ``behavior_log_prob`` per token.
        baseline: subtracted from every reward; the difference also decides the sign.
        reduction: "sequence_mean" (the paper: n_s = 1 / (B |y_s|), B the non-empty sequences),
            "token_mean" (1 / total tokens) or "sum".
        normalizer: denominator that replaces the count of non-empty sequences (or of tokens, for
            "token_mean"): number or 0-dim tensor. Makes accumulation and data parallelism exact.
        sequence_weight: [B] floating, finite, >= 0; multiplies n_s. Not part of the reward, so it never
            changes a sign: 2 is the sequence twice under one normalizer, 0 leaves it out of the
            gradient, though not out of the count. None is 1.
        behavior_known: [B] bool, False for a sequence without log mu (records of a teacher, of people);
            its ``behavior_log_prob`` is then not read. Served where the limits of its sign are equal
            (positives under TOPR, SFT), since its weight is that limit whatever mu was.
        segments: integers, shaped and aligned like log mu per token, for the ratios per segment: runs of
            scored tokens of equal value. None: a token that is not scored ends a segment, nothing
            else does (the turns of a trajectory).
        temperature: logits are divided by it, after ``softcap``.
        softcap: s of ``s * tanh(logits / s)``, 1e-5 to 1e5, for raw logits only: ``model(...).logits``
            has it.
        entropy: also compute the entropy of every scored row.
        shift: row t predicts the label at t + 1; False when rows and labels are already aligned.
        inplace: the backward overwrites the logits with their gradient and allocates nothing. A second
            backward through the same graph raises.
        process_group: of ``torch.distributed``, over whose processes the vocabulary is spread: the
            logits here are this process's columns, see :func:`topr_kernels.log_prob`. All else must be
            the same on each; so are the results.
        sequence_group: over whose processes the tokens of each sequence are spread, see
            :func:`linear_topr_loss`.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        TOPROutput.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or options that disagree; on eager CPU (or with ``debug``) also
            labels outside the vocabulary, unsound ``cu_seqlens`` and rewards that are not finite.
            On an accelerator and in compiled graphs those turn the loss into NaN.
    """
    tokens, transforms = Tokens(labels, cu_seqlens, shift), Transforms(1.0, softcap, temperature)
    given = validation.LogitsArguments(logits, tokens, transforms, entropy, impl, debug)
    sequences = validation.SequenceArguments(
        *(behavior_log_prob, reward, normalizer, limits, ratio, baseline, reduction),
        *(sequence_weight, behavior_known, segments),
    )
    if process_group is not None or sequence_group is not None:
        return calls.topr_loss(Groups(process_group, sequence_group), given, sequences, inplace)
    x, tokens, transforms, *_ = validation.check_logits(given)
    objective = validation.check_objective(tokens, sequences)
    if inplace:
        _check_inplace(x, objective)
    if validation.values_readable(x, debug):
        validation.check_values(tokens, x.shape[-1], objective, normalizer)
    impl = kernels.resolve(impl, x)
    if not objective.in_kernels:
        given = given._replace(logits=x, tokens=tokens, transforms=transforms, impl=impl)
        return _staged(given, objective).shaped(labels.shape)
    options = transforms.temperature, transforms.softcap, entropy, shift, inplace
    out = ops.topr_fwd(x, *tokens[:2], *objective[:10], *options, impl)
    loss, _, log_prob, _, _, row_entropy, token_log_ratio, *rest, _ = out
    nan = torch.full_like(loss, torch.nan, requires_grad=False)
    rest += nan, nan, sequence_weight_or_ones(None, rest[3])
    result = TOPROutput(loss, log_prob, row_entropy, token_log_ratio, *rest)
    return without_unknown(result, objective, *tokens[:2]).shaped(labels.shape)


def linear_topr_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    behavior_log_prob: Tensor,
    reward: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    limits: Limits | Taper = TOPR,
    ratio: str = "sequence",
    baseline: float = 0.0,
    reduction: str = "sequence_mean",
    normalizer: float | Tensor | None = None,
    sequence_weight: Tensor | None = None,
    behavior_known: Tensor | None = None,
    segments: Tensor | None = None,
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
) -> TOPROutput:
    """Computes :func:`topr_loss` of a language model's head without ever making its logits.

    Equivalent to ``topr_loss(logits, ...)`` with ``logits = logit_scale * F.linear(hidden, weight,
    bias)`` in fp32. Only scored rows are multiplied, a tile at a time; the gradients are computed with
    the loss, so nothing is recomputed, and sequences of weight or reward 0 cost no gradient work. It
    copies to the host, one small tensor per call and a few per tile of a backward: not for CUDA graphs.

    Args:
        hidden: [B, T, D], or packed [N, D] / [1, N, D] with ``cu_seqlens``: the input of the head;
            fp32, bf16, fp16 or fp64. Logits, sums and d_weight are fp32 (fp64 for fp64); fp32 inputs
            follow torch's own setting of TF32.
        weight: [V, D], ``lm_head.weight``, in the dtype of ``hidden``; under autocast both are rounded
            to its dtype inside. A head that does not require grad costs no matmul for it.
        labels: as in :func:`topr_loss`.
        behavior_log_prob: as in :func:`topr_loss`; score it with :func:`linear_log_prob`.
        reward: as in :func:`topr_loss`.
        bias: [V] or None.
        logit_scale: multiplies the logits, before ``softcap`` (Cohere multiplies, for Granite pass 1
            over ``logits_scaling``).
        cu_seqlens: as in :func:`topr_loss`.
        limits: as in :func:`topr_loss`.
        ratio: as in :func:`topr_loss`.
        baseline: as in :func:`topr_loss`.
        reduction: as in :func:`topr_loss`.
        normalizer: as in :func:`topr_loss`.
        sequence_weight: as in :func:`topr_loss`.
        behavior_known: as in :func:`topr_loss`.
        segments: as in :func:`topr_loss`.
        temperature: as in :func:`topr_loss`.
        softcap: s of ``s * tanh(logits / s)`` (Gemma's ``final_logit_softcapping``), 1e-5 to 1e5 times
            ``logit_scale``.
        entropy: as in :func:`topr_loss`.
        shift: as in :func:`topr_loss`.
        grad_tolerance: 0 is exact. With tau > 0 the gradient of every tile leaves out columns of the
            vocabulary that hold at most tau^2 of the energy of the logits' gradient, and adds their mean
            back; ``left_out`` <= tau of the result is what was left out, ``active_share`` the columns
            kept. None is 0, and 2 ** -11 for a frozen head in half precision.
        workspace_bytes: budget for a tile of logits; None is 192 MiB on CPU and 2 GiB on GPU. A tile
            has up to 512 rows in steps of 256 on CPU, 2048 in steps of 1024 on GPU, smaller powers of
            two where they do not fit; a small batch is padded to a step, so it wants a small budget.
            A CPU thread keeps the largest it has used.
        process_group: of ``torch.distributed``, over whose processes the head is spread: ``weight`` (and
            ``bias``) are this process's rows of the vocabulary, in the order of the ranks and not
            necessarily of one size, or a DTensor of placement Shard(0) over that group. All else must
            be the same on each; so are the results and d_hidden. The tolerance holds for the whole.
        sequence_group: over whose processes the tokens of each sequence are spread, in the order of the
            ranks (context parallelism): ``hidden``, ``labels`` and a ``behavior_log_prob`` per token
            are this process's columns, of any number; ``reward`` and a log mu per sequence are the
            same on each. Log-ratios are summed over the group before any weight, labels shifted across
            its borders (packed input: shift them yourself, ``shift=False``). Results per sequence and
            the loss are those of the whole on each process; d_weight and d_bias are of the tokens here
            and must be summed over the group. Costs one more matmul over the rows whose weight
            depends on their ratio.
        impl: "auto" or the name of an implementation; an explicit one never falls back.
        debug: check values on the host even where that costs a device sync.

    Returns:
        TOPROutput; ``active_share`` and ``left_out`` are NaN where no gradient is computed. For equal
        rows of ``hidden`` and one ``workspace_bytes`` ``log_prob`` is bitwise equal whatever else is in
        the batch. A second backward through a retained graph computes everything again;
        ``create_graph=True`` raises.

    Raises:
        TypeError: wrong type or dtype of an argument, or a head sharded over processes.
        ValueError: as :func:`topr_loss`.
    """
    tokens = Tokens(labels, cu_seqlens, shift)
    transforms = Transforms(logit_scale, softcap, temperature)
    given = validation.LinearArguments(
        *(hidden, weight, bias, tokens, transforms),
        *(entropy, grad_tolerance, workspace_bytes, impl, debug),
    )
    sequences = validation.SequenceArguments(
        *(behavior_log_prob, reward, normalizer, limits, ratio, baseline, reduction),
        *(sequence_weight, behavior_known, segments),
    )
    if process_group is not None or sequence_group is not None:
        groups = Groups(process_group, sequence_group)
        return calls.linear_topr_loss(groups, given, sequences, FROZEN_HEAD_TOLERANCE)
    x, weights, tokens, transforms, wanted = validation.check_linear(given, FROZEN_HEAD_TOLERANCE)
    objective = validation.check_objective(tokens, sequences)
    vocab = weights.weight.shape[0]
    workspace_bytes = validation.check_workspace(workspace_bytes, x, vocab)
    impl = kernels.resolve(impl, x, kernels.LINEAR)
    if validation.values_readable(x, debug):
        validation.check_values(tokens, vocab, objective, normalizer)
    objective = with_units(objective, tokens)
    lent = linear_ops.lend(objective.taper)
    out = linear_ops.linear_topr_fwd(
        *(x, *weights[:2], *tokens[:2], *objective.operands, lent and lent.number),
        *(weights.compute_dtype, *transforms, entropy, shift),
        *(wanted.grad_tolerance, workspace_bytes, *wanted[1:], impl),
    )
    loss, _, log_prob, _, row_entropy, token_log_ratio, *rest = out[:13]
    rest.append(sequence_weight_or_ones(objective.sequence_weight, rest[3]))
    result = TOPROutput(loss, log_prob, row_entropy, token_log_ratio, *rest)
    return without_unknown(result, objective, *tokens[:2]).shaped(labels.shape)


def topr_loss_from_log_prob(
    log_prob: Tensor,
    mask: Tensor,
    behavior_log_prob: Tensor,
    reward: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    limits: Limits | Taper = TOPR,
    ratio: str = "sequence",
    baseline: float = 0.0,
    reduction: str = "sequence_mean",
    normalizer: float | Tensor | None = None,
    sequence_weight: Tensor | None = None,
    behavior_known: Tensor | None = None,
    segments: Tensor | None = None,
    sequence_group: Any = None,
    debug: bool = False,
) -> TOPROutput:
    """Computes :func:`topr_loss` from log-probs per token, for loops that have made them already.

    The sequence stage alone: what remains for the caller is exact only if the log-probs are, so let
    :func:`log_prob` or :func:`linear_log_prob` make them where there is a choice.

    Args:
        log_prob: [B, T], or packed [N] / [1, N] with ``cu_seqlens``; log pi per token in nats, fp32 or
            fp64, differentiable.
        mask: bool, or 0 and 1, in the shape of ``log_prob``: which tokens are scored. Nothing under 0 is
            read, NaN included.
        behavior_log_prob: log mu, fp32 or fp64, per token in the shape of ``log_prob``, or summed, [B].
        reward: as in :func:`topr_loss`.
        cu_seqlens: as in :func:`topr_loss`.
        limits: as in :func:`topr_loss`.
        ratio: as in :func:`topr_loss`.
        baseline: as in :func:`topr_loss`.
        reduction: as in :func:`topr_loss`.
        normalizer: as in :func:`topr_loss`.
        sequence_weight: as in :func:`topr_loss`.
        behavior_known: as in :func:`topr_loss`.
        segments: as in :func:`topr_loss`.
        sequence_group: of ``torch.distributed``, over whose processes the tokens of each sequence are
            spread: the tensors per token are this process's part, ``reward`` and a log mu per sequence
            the same on each. Log-ratios are summed over the group before any weight. Results per
            sequence and the loss are those of the whole on each process.
        debug: check values on the host even where that costs a device sync.

    Returns:
        TOPROutput; ``entropy``, ``active_share`` and ``left_out`` are NaN. A double backward raises.

    Raises:
        TypeError: wrong type or dtype of an argument; half-precision log-probs among them.
        ValueError: as :func:`topr_loss`.
    """
    given = validation.TokenArguments(log_prob, mask, cu_seqlens, debug)
    sequences = validation.SequenceArguments(
        *(behavior_log_prob, reward, normalizer, limits, ratio, baseline, reduction),
        *(sequence_weight, behavior_known, segments),
    )
    if sequence_group is not None:
        return calls.topr_loss_from_log_prob(sequence_group, given, sequences)
    given = validation.check_token_log_prob(given)
    objective = validation.check_objective(given.tokens, sequences)
    if validation.values_readable(given.log_prob, debug):
        validation.check_sequence_values(given.tokens, objective, normalizer)
    objective = with_units(objective, given.tokens)
    return topr_from_log_prob(*given[:3], objective).shaped(log_prob.shape)


def _staged(given: validation.LogitsArguments, objective: Objective) -> TOPROutput:
    """The loss in two stages, for an objective that no kernel has compiled in: rows, sequences."""
    x, tokens, transforms, entropy, impl, _ = given
    options = transforms.temperature, transforms.softcap, entropy, tokens.shift, impl
    log_prob, _, _, row_entropy = ops.log_prob_fwd(x, *tokens[:2], *options)
    scored = scored_labels(*tokens) != IGNORE_INDEX
    objective = with_units(objective, tokens)
    out = topr_from_log_prob(log_prob, scored, tokens.cu_seqlens, objective)
    return out._replace(entropy=row_entropy)


def _check_inplace(logits: Tensor, objective: Objective) -> None:
    if not objective.in_kernels:
        raise ValueError(
            "inplace: got True with sequence_weight, a ratio per segment or a callable in limits, where "
            "it is not served; pass inplace=False"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "inplace=True writes into the saved logits, which a compiled graph cannot track; pass "
            "inplace=False under torch.compile"
        )
    span = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < span:
            raise ValueError(
                f"inplace=True: logits of shape {tuple(logits.shape)} and strides {logits.stride()} "
                "are expanded or overlap, so rows share memory; pass inplace=False or "
                "logits.contiguous()"
            )
        span += stride * (size - 1)


#: Keywords of a call, not of a module.
_PER_CALL = {"cu_seqlens", "normalizer", "sequence_weight", "behavior_known", "segments"}


class TOPRLoss(nn.Module):
    """Module twin of :func:`topr_loss`: options once, tensors at every call.

    Args:
        **options: every keyword of :func:`topr_loss` but those of its ``forward``.

    Raises:
        TypeError: on an unknown option, or limits that are neither ``Limits`` nor callable.
        ValueError: on an unknown ratio or reduction.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        allowed = set(topr_loss.__kwdefaults__ or {}) - _PER_CALL
        if unknown := sorted(set(options) - allowed):
            raise TypeError(
                f"TOPRLoss: unknown options {unknown}; expected some of {sorted(allowed)}"
            )
        validation.check_limits(options.get("limits", TOPR))
        validation.check_choice("ratio", options.get("ratio", "sequence"), choices.RATIOS)
        validation.check_choice(
            "reduction", options.get("reduction", "sequence_mean"), choices.REDUCTIONS
        )
        self.options = options

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        behavior_log_prob: Tensor,
        reward: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        sequence_weight: Tensor | None = None,
        behavior_known: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> TOPROutput:
        """Calls :func:`topr_loss` with the options of the module."""
        return topr_loss(
            logits,
            labels,
            behavior_log_prob,
            reward,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            sequence_weight=sequence_weight,
            behavior_known=behavior_known,
            segments=segments,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Options, as they were given."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
