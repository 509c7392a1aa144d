"""What the operators take, in a few tuples: built once in an operator's body, handed down whole.

The fields stand in the order of the operators' flat schemas. Shapes: O sequences of T positions, or
packed O = 1; B sequences; V vocabulary; D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Which rows predict which labels.

    Attributes:
        labels: [O, T] int64, -100 = not scored.
        cu_seqlens: [B + 1] offsets of packed sequences, or None.
        shift: whether the row at t predicts the label at t + 1.
    """

    labels: Tensor
    cu_seqlens: Tensor | None
    shift: bool


class Transforms(NamedTuple):
    """What happens to the logits before the softmax, in this order.

    Attributes:
        logit_scale: multiplies them; 1 on the logits path.
        softcap: s of s tanh(z / s), or None.
        temperature: divides them.
    """

    logit_scale: float
    softcap: float | None
    temperature: float


class Objective(NamedTuple):
    """The TOPR objective of a batch: what is known of its sequences, how they are weighted and summed.

    Attributes:
        behavior_log_prob: log mu, [O, T] per token or [B] summed per sequence.
        reward: [B].
        normalizer: 0-dim, replaces the count of sequences or tokens; or None.
        log_pos_min: log of a+, -inf for 0.
        log_pos_max: log of b+.
        log_neg_min: log of a-.
        log_neg_max: log of b-.
        ratio: one of ``choices.RATIOS``.
        baseline: subtracted from the rewards.
        reduction: one of ``choices.REDUCTIONS``.
    """

    behavior_log_prob: Tensor
    reward: Tensor
    normalizer: Tensor | None
    log_pos_min: float
    log_pos_max: float
    log_neg_min: float
    log_neg_max: float
    ratio: str
    baseline: float
    reduction: str

    @property
    def log_limits(self) -> tuple[float, float, float, float]:
        """Logs of (a+, b+, a-, b-)."""
        return self[3:7]


class HeadWeights(NamedTuple):
    """The head of a language model.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        compute_dtype: to which the operands of the matmuls are rounded.
    """

    weight: Tensor
    bias: Tensor | None
    compute_dtype: torch.dtype


class Wanted(NamedTuple):
    """Which gradients are computed, and how exactly.

    Attributes:
        grad_tolerance: 0 is exact.
        hidden: whether d_hidden is wanted.
        weight: whether d_weight is wanted.
        bias: whether d_bias is wanted.
    """

    grad_tolerance: float
    hidden: bool
    weight: bool
    bias: bool

    def anything(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden or self.weight or self.bias
