"""What a call returns: the results of the loss and of the scorer, and what to log about a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import sequence_offsets
from topr_kernels.ops.options import Tokens

#: A negative whose weight is below this no longer teaches anything.
DEAD_WEIGHT = 1e-6


def sequence_weight_or_ones(weight: Tensor | None, reward: Tensor) -> Tensor:
    """``sequence_weight`` of a result, [B] like its rewards."""
    return torch.ones_like(reward) if weight is None else weight.to(reward.dtype)


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

    def poisoned(self, tokens: Tokens) -> LogProbOutput:
        """NaN everywhere if the offsets are not sound."""
        if tokens.cu_seqlens is None:
            return self
        _, sound = sequence_offsets(tokens.labels, tokens.cu_seqlens)
        return LogProbOutput(*(torch.where(sound, x, torch.nan) for x in self))


class SequenceResults(NamedTuple):
    """What the metrics are computed from: the sequences of one batch, or of several joined.

    Attributes:
        log_ratio: [B].
        weight: [B].
        objective: [B].
        reward: [B].
        length: [B].
        sequence_weight: [B].
        entropy: 0-dim, summed over the tokens.
        kl_k3: 0-dim, exp(d) - 1 - d for d = log pi - log mu, summed over the tokens.
    """

    log_ratio: Tensor
    weight: Tensor
    objective: Tensor
    reward: Tensor
    length: Tensor
    sequence_weight: Tensor
    entropy: Tensor
    kl_k3: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """``TOPROutput.metrics`` of these sequences."""
        counted = self.length > 0
        # Where the ratio is NaN and the weight is not, log mu was not needed and is not known.
        known = counted & ~(self.log_ratio.isnan() & ~self.weight.isnan())
        known_tokens = torch.where(known, self.length, 0).sum().to(self.weight.dtype)
        tokens = self.length.sum().to(self.weight.dtype)
        positive, negative = counted & (self.reward > 0), counted & (self.reward < 0)
        amount = self.reward * self.sequence_weight
        magnitude = torch.where(counted, amount.abs(), 0.0)
        per_token_objective = amount * self.objective / self.length.clamp(min=1)
        objective = torch.where(amount == 0, 0.0, per_token_objective)
        w = torch.where(negative, self.weight * self.sequence_weight, 0.0)
        # Scaled to a largest weight of 1: squares of the small weights of a late epoch underflow.
        scaled = w / _extreme(w, negative, torch.amax)
        ess = scaled.sum().square() / scaled.square().sum()
        result = {
            "objective": _mean(objective, counted),
            "reward_mean": _mean(self.reward, counted),
            "length_mean": tokens / counted.sum(),
            "entropy": self.entropy / tokens,
            "positive_share": _mean(positive.to(w.dtype), counted),
            "effective_positive_share": torch.where(positive, magnitude, 0.0).sum()
            / magnitude.sum(),
            "weight_negative_mean": _mean(self.weight, negative),
            "dead_share": _mean((self.weight < DEAD_WEIGHT).to(w.dtype), negative),
            "saturated_share": _mean((self.weight == 1).to(w.dtype), negative),
            "ess_negative": ess,
            "ess_negative_share": ess / negative.sum(),
            "kl_k1": -torch.where(known, self.log_ratio, 0.0).sum() / known_tokens,
            "kl_k3": self.kl_k3 / known_tokens,
            "weight_overflow": (counted & self.weight.isposinf()).sum().to(w.dtype),
        }
        for name, members in (("positive", positive & known), ("negative", negative & known)):
            mean = _mean(self.log_ratio, members)
            variance = _mean((self.log_ratio - mean).square(), members)
            result |= {
                f"log_ratio_{name}_mean": mean,
                f"log_ratio_{name}_std": variance.sqrt(),
                f"log_ratio_{name}_min": _extreme(self.log_ratio, members, torch.amin),
                f"log_ratio_{name}_max": _extreme(self.log_ratio, members, torch.amax),
            }
        return result


class TOPROutput(NamedTuple):
    """What a TOPR loss returns; fp32 (fp64 for fp64 inputs), all but ``loss`` detached.

    Attributes:
        loss: 0-dim, differentiable: -sum_s n_s R_s O_s (Eq. 6).
        log_prob: shaped like ``labels``; log pi of each label, 0 where nothing is scored.
        entropy: shaped like ``labels``, nats per token; NaN unless asked for.
        token_log_ratio: shaped like ``labels``; log pi - log mu, 0 where nothing is scored; NaN when
            log mu came summed per sequence.
        log_ratio: [B], log of the full product pi/mu of the sequence, in nats.
        weight: [B], clipped ratio that multiplies R * grad log pi; mean over tokens where it differs
            between them ("token", "segment", "segment_geometric").
        objective: [B], O_s, the tapered ratio.
        reward: [B], baseline subtracted.
        length: [B] int64, number of scored tokens.
        active_share: 0-dim, share of the vocabulary the backward touched; NaN where not measured.
        left_out: 0-dim, relative norm of the logits' gradient left out; NaN where not measured.
        sequence_weight: [B] as given, or ones; it is in ``loss``, not in ``weight``, ``objective`` or
            ``reward``.

    A sequence whose log mu is not known (``behavior_known``) has a log_ratio of NaN, and 0 in
    token_log_ratio; its weight is its limit, its objective that of log mu = 0.
    """

    loss: Tensor
    log_prob: Tensor
    entropy: Tensor
    token_log_ratio: Tensor
    log_ratio: Tensor
    weight: Tensor
    objective: Tensor
    reward: Tensor
    length: Tensor
    active_share: Tensor
    left_out: Tensor
    sequence_weight: Tensor

    def shaped(self, shape: torch.Size) -> TOPROutput:
        """The same, what is per token in another shape."""
        if self.log_prob.shape == shape:
            return self
        log_prob, entropy, token_log_ratio = (x.view(shape) for x in self[1:4])
        return self._replace(log_prob=log_prob, entropy=entropy, token_log_ratio=token_log_ratio)

    def metrics(self) -> dict[str, Tensor]:
        """Summarises one batch; every value is a 0-dim tensor on the device of the loss.

        Only sequences with a scored token count. Positive means reward minus baseline > 0, negative < 0.
        A figure without data (no negatives in the batch, say) is NaN. A ``sequence_weight`` v
        multiplies R in ``objective`` and ``effective_positive_share`` and w in ``ess_negative``;
        everything else counts sequences, those of weight 0 too. Keys:

        - ``objective``: mean over sequences of R * O / |y|, the Eq. 6 estimate being maximised.
        - ``reward_mean``; ``length_mean`` in scored tokens; ``entropy`` per token, in nats.
        - ``positive_share``: p, by count. ``effective_positive_share``: p~ = sum of positive rewards
          over sum of absolute rewards, both after the baseline (Eq. 7 for rewards of +-1).
        - ``weight_negative_mean``; ``dead_share``: negatives with weight < 1e-6; ``saturated_share``:
          negatives with weight exactly 1.
        - ``ess_negative``: effective number of negatives (sum w)^2 / sum w^2; ``ess_negative_share``:
          the same over their count.
        - ``log_ratio_{positive,negative}_{mean,std,min,max}``: of the sequence log-ratio, in nats.
        - ``kl_k1``, ``kl_k3``: per-token estimates of KL(mu || pi) from samples of mu, mean of -d and of
          exp(d) - 1 - d for d = log pi - log mu. k3 needs per-token log mu and is NaN without it.
          These and the log-ratios are of the sequences whose log mu is known.
        - ``weight_overflow``: number of infinite weights (only possible with an infinite limit).
        """
        return self.sequences().metrics()

    def sequences(self) -> SequenceResults:
        """The part that the metrics are computed from, detached; the same of several batches joins."""
        d = self.token_log_ratio
        kl_k3 = (torch.expm1(d) - d).sum()
        return SequenceResults(
            self.log_ratio,
            self.weight,
            self.objective,
            self.reward,
            self.length,
            self.sequence_weight,
            self.entropy.sum(),
            kl_k3,
        )


def _mean(x: Tensor, members: Tensor) -> Tensor:
    # Selected, not multiplied: a non-member may be infinite. No member gives 0 / 0 = NaN.
    return torch.where(members, x, 0.0).sum() / members.sum()


def _extreme(x: Tensor, members: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    # The appended neutral element makes the reduction of an empty batch legal.
    neutral = torch.inf if reduce is torch.amin else -torch.inf
    padded = torch.cat([torch.where(members, x, neutral), x.new_full((1,), neutral)])
    return torch.where(members.any(), reduce(padded, dim=0), torch.nan)
