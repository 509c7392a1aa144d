"""From token log-probs to log-ratios, tapered weights, the loss and its gradient, in torch.

The sequence stage of every implementation whose kernels stop at the token: small tensors only, no
vocabulary in sight. Sums of differences run in fp64, so a sum over 32k tokens adds no error of its
own to the fp32 log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import sequence_index, sequence_offsets
from topr_kernels.ops.options import Objective
from topr_kernels.output import TOPROutput, sequence_weight_or_ones
from topr_kernels.taper import taper, taper_by


class SequenceStage(NamedTuple):
    """What the sequence stage returns; B sequences, token tensors shaped like ``log_prob``.

    ``d_log_prob / denominator`` is the gradient of the loss with respect to the token log-probs.
    """

    loss: Tensor
    denominator: Tensor
    token_log_ratio: Tensor
    log_ratio: Tensor
    weight: Tensor
    objective: Tensor
    reward: Tensor
    length: Tensor
    d_log_prob: Tensor


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """Sums a flat tensor over segments in index order: [N], [B + 1] -> [B] fp64."""
    if offsets.numel() == 1:
        return x.new_zeros(0, dtype=torch.float64)
    return torch.segment_reduce(
        x.double(), "sum", offsets=offsets, initial=0.0, unsafe=True, axis=0
    )


def effective_reward(objective: Objective) -> Tensor:
    """[B] rewards less the baseline, in the dtype of the rewards.

    In that dtype 0.7 - 0.7 is 0, and not a negative of 1e-8 that would take the other branch.
    """
    reward, baseline = objective.reward, objective.baseline
    if reward.dtype in (torch.float32, torch.float64):
        return reward - baseline  # where a number is rounded to the dtype of the tensor
    return reward - torch.full_like(reward, baseline)


def signed_weight(objective: Objective, dtype: torch.dtype) -> Tensor:
    """[B] what multiplies the objective of a sequence: reward less baseline, times its weight.

    A weight that is negative, infinite or NaN turns it into NaN; the sign of the reward alone chooses
    the limits.
    """
    reward, weight = effective_reward(objective).to(dtype), objective.sequence_weight
    if weight is None:
        return reward
    sound = (weight >= 0) & (weight < torch.inf)
    return reward * torch.where(sound, weight, torch.nan).to(dtype)


def needs_behavior(objective: Objective) -> Tensor:
    """[B] bool: whether the weight of a sequence depends on log mu; with equal limits it does not."""
    if objective.taper is not None:
        return torch.ones_like(objective.reward, dtype=torch.bool)
    low, high = objective.log_limits[::2], objective.log_limits[1::2]
    positive, negative = (a != b for a, b in zip(low, high, strict=True))
    return torch.where(effective_reward(objective) < 0, negative, positive)


def of_tokens(x: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Repeats a value per sequence for its tokens: [B] -> [O, T], or [O, 1] where that broadcasts."""
    if cu_seqlens is None:
        return x.unsqueeze(1)
    offsets, _ = sequence_offsets(labels, cu_seqlens)
    return x[sequence_index(offsets, labels.numel())].view(labels.shape)


def without_unknown(
    out: TOPROutput, objective: Objective, labels: Tensor, cu_seqlens: Tensor | None
) -> TOPROutput:
    """Log-ratios of sequences without log mu: NaN, and 0 for their tokens."""
    known = objective.behavior_known
    if known is None:
        return out
    token = out.token_log_ratio.view(labels.shape)
    token = torch.where(of_tokens(known, labels, cu_seqlens), token, 0.0)
    log_ratio = torch.where(known, out.log_ratio, torch.nan)
    return out._replace(token_log_ratio=token, log_ratio=log_ratio)


def loss_denominator(length: Tensor, sound: Tensor, objective: Objective) -> Tensor:
    """What the sum over the sequences is divided by, 0-dim fp64; NaN for unsound offsets.

    Args:
        length: [B] int64 scored tokens.
        sound: 0-dim bool.
        objective: its normalizer, or else its reduction, decides.
    """
    if objective.normalizer is not None:
        denominator = objective.normalizer
    elif objective.reduction == "sum":
        denominator = torch.ones_like(sound)
    else:
        units = length > 0 if objective.reduction == "sequence_mean" else length
        denominator = units.sum().clamp(min=1)
    # Unsound offsets poison both the loss and every coefficient.
    return torch.where(sound, denominator.to(torch.float64), torch.nan)


def sequence_stage(
    log_prob: Tensor,
    scored: Tensor,
    offsets: Tensor,
    sound: Tensor,
    objective: Objective,
    length: Tensor | None = None,
    sum_pieces: Callable[[Tensor], Tensor] | None = None,
) -> SequenceStage:
    """Computes the TOPR loss (Eq. 6) and its gradient with respect to the token log-probs.

    Args:
        log_prob: [O, T] log pi of each label, fp32 or fp64, 0 where not scored.
        scored: [O, T] bool.
        offsets: [B + 1] int64 offsets of the sequences in the flattened positions.
        sound: 0-dim bool; False poisons the loss with NaN.
        objective: log mu, rewards and options.
        length: [B] int64, scored tokens of the whole sequences where only a part of them is here.
        sum_pieces: sum over the processes that hold the pieces of each sequence, in place; None where
            the sequences are here as a whole.

    Returns:
        SequenceStage, in the dtype of ``log_prob`` (``length`` int64).
    """
    dtype = log_prob.dtype
    behavior_log_prob, ratio = objective.behavior_log_prob, objective.ratio
    scored_flat = scored.reshape(-1)
    if length is None:
        length = segment_sum(scored_flat, offsets).to(torch.int64)
        if sum_pieces is not None:
            # Offsets that are unsound in one piece poison all.
            counts = sum_pieces(torch.cat([length, (~sound).to(torch.int64)[None]]))
            length, sound = counts[:-1], counts[-1] == 0
    if behavior_log_prob.dim() == 2:
        difference = log_prob.double() - behavior_log_prob.double()
        difference = torch.where(scored, difference, 0.0).reshape(-1)
        log_ratio64 = segment_sum(difference, offsets)
        if sum_pieces is not None:
            sum_pieces(log_ratio64)
        token_log_ratio = difference.to(dtype)
    else:
        difference = torch.where(scored, log_prob, 0.0).reshape(-1)
        log_ratio64 = segment_sum(difference, offsets)
        if sum_pieces is not None:
            sum_pieces(log_ratio64)
        # A sequence without a scored token has nothing to subtract from.
        log_ratio64 = torch.where(length > 0, log_ratio64 - behavior_log_prob.double(), 0.0)
        token_log_ratio = torch.full_like(log_prob, torch.nan).reshape(-1)

    reward = effective_reward(objective).to(dtype)
    negative = reward < 0  # NaN takes the positive branch and poisons it below
    sequence = sequence_index(offsets, scored_flat.numel())
    tokens = length.clamp(min=1).to(dtype)
    if ratio == "token":
        value, token_weight = _tapered(objective, token_log_ratio, negative[sequence])
        token_weight = torch.where(scored_flat, token_weight, 0.0)
        values = (torch.where(scored_flat, value, 0.0), token_weight)
        sums = torch.stack([segment_sum(x, offsets) for x in values])
        if sum_pieces is not None:
            sum_pieces(sums)
        tapered, weight = sums[0].to(dtype), (sums[1] / tokens).to(dtype)
    elif objective.units is not None:
        tapered, weight_sum, token_weight = _tapered_units(
            objective, difference, scored_flat, reward, sum_pieces
        )
        weight = (weight_sum / tokens).to(dtype)
    else:
        scale = tokens.double() if ratio == "geometric" else torch.ones_like(log_ratio64)
        value, weight = _tapered(objective, (log_ratio64 / scale).to(dtype), negative)
        tapered = (value.double() * scale).to(dtype)
        token_weight = weight[sequence]
    log_ratio = log_ratio64.to(dtype)
    weight = torch.where(reward.isnan(), torch.nan, weight)

    counted = length > 0
    denominator = loss_denominator(length, sound, objective).to(dtype)
    amount = reward if objective.sequence_weight is None else signed_weight(objective, dtype)
    share = -amount / tokens if objective.reduction == "sequence_mean" else -amount

    # Selected, not multiplied: a reward of 0 cancels an infinite objective, never a NaN.
    silent = ~counted | ((amount == 0) & ~tapered.isnan())
    contribution = torch.where(silent, 0.0, share * tapered)
    token_silent = ~scored_flat | ((amount == 0)[sequence] & ~token_weight.isnan())
    d_log_prob = torch.where(token_silent, 0.0, share[sequence] * token_weight)
    loss = (contribution.double().sum() / denominator.double()).to(dtype)
    return SequenceStage(
        # A counted denominator is 0 when nothing is scored anywhere: that loss is a plain 0.
        loss=torch.where(sound & ~counted.any(), 0.0, loss),
        denominator=denominator,
        token_log_ratio=token_log_ratio.view_as(log_prob),
        log_ratio=log_ratio,
        weight=torch.where(counted, weight, 0.0),
        objective=torch.where(counted, tapered, 0.0),
        reward=reward,
        length=length,
        d_log_prob=d_log_prob.view_as(log_prob),
    )


def _tapered(objective: Objective, log_ratio: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Objective and weight of some log-ratios, given which of them are of negative sequences."""
    if objective.taper is not None:
        return taper_by(objective.taper, log_ratio, ~negative)
    pos_min, pos_max, neg_min, neg_max = objective.log_limits
    log_min = torch.full_like(log_ratio, pos_min).masked_fill(negative, neg_min)
    log_max = torch.full_like(log_ratio, pos_max).masked_fill(negative, neg_max)
    return taper(log_ratio, log_min, log_max)


def _tapered_units(
    objective: Objective,
    difference: Tensor,
    scored: Tensor,
    reward: Tensor,
    sum_pieces: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The taper of every unit of the sequences, summed over them.

    Args:
        objective: with units.
        difference: [N] log pi - log mu, 0 where not scored.
        scored: [N] bool.
        reward: [B] in the dtype of the results.
        sum_pieces: as in :func:`sequence_stage`.

    Returns:
        (objective [B], weight summed over the tokens [B] fp64, weight of the unit of each token [N]).
    """
    units = objective.units
    assert units is not None
    dtype, owner = reward.dtype, units.owner
    sums = torch.stack([segment_sum(x, units.offsets) for x in (difference, scored)])
    if sum_pieces is not None:
        sum_pieces(sums)
    log_ratio, size = sums
    scale = size.clamp(min=1) if objective.ratio == "geometric" else torch.ones_like(size)
    value, weight = _tapered(objective, (log_ratio / scale).to(dtype), (reward < 0)[owner])
    # Units lie in the order of their sequences.
    number = torch.arange(len(reward) + 1, device=owner.device)
    of_sequences = torch.searchsorted(owner, number)
    values = value.double() * scale, weight.double() * size
    tapered, weight_sum = (segment_sum(torch.where(size > 0, x, 0.0), of_sequences) for x in values)
    return tapered.to(dtype), weight_sum, weight[sequence_index(units.offsets, scored.numel())]


class SequenceLoss(torch.autograd.Function):
    """The sequence stage as a differentiable function of the token log-probs; see ``sequence_stage``."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """-> the fields of SequenceStage; all but the loss are constants."""
        stage = sequence_stage(log_prob.detach(), *args)
        ctx.save_for_backward(stage.d_log_prob, stage.denominator)
        ctx.mark_non_differentiable(*stage[1:])
        ctx.set_materialize_grads(False)
        return tuple(stage)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """-> d_loss * d_log_prob / denominator, for the log-probs alone."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the TOPR loss has no double backward (create_graph=True); for second derivatives use "
                "topr_kernels.reference"
            )
        d_log_prob, denominator = ctx.saved_tensors
        nothing = [None] * 6
        if d_loss is None:
            return None, *nothing
        # Selected, not multiplied: a coefficient of 0 stays 0 under an infinite loss scale.
        gradient = d_log_prob * (d_loss / denominator)
        return torch.where(d_log_prob == 0, 0.0, gradient), *nothing


def topr_from_log_prob(
    log_prob: Tensor,
    scored: Tensor,
    cu_seqlens: Tensor | None,
    objective: Objective,
    sum_pieces: Callable[[Tensor], Tensor] | None = None,
) -> TOPROutput:
    """The TOPR loss of token log-probs [O, T], differentiable; results per token [O, T].

    Entropy, ``active_share`` and ``left_out`` are NaN. Arguments as in :func:`sequence_stage`.
    """
    offsets, sound = sequence_offsets(scored, cu_seqlens)
    log_prob = torch.where(scored, log_prob, 0.0)
    stage = SequenceStage(
        *SequenceLoss.apply(  # type: ignore[no-untyped-call]
            log_prob, scored, offsets, sound, objective, None, sum_pieces
        )
    )
    not_measured = torch.full_like(stage.loss, torch.nan, requires_grad=False)
    out = TOPROutput(
        stage.loss,
        log_prob.detach(),
        not_measured.expand(log_prob.shape),
        *stage[2:8],
        not_measured,
        not_measured,
        sequence_weight_or_ones(objective.sequence_weight, stage.reward),
    )
    return without_unknown(out, objective, scored, cu_seqlens)
