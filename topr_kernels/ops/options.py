"""What the operators take, in a few tuples: built once in an operator's body, handed down whole.

The fields stand in the order of the operators' flat schemas. Shapes: O sequences of T positions, or
packed O = 1; B sequences; V vocabulary; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Which rows predict which labels."""

    labels: Tensor  # [O, T] int64, -100 = not scored
    cu_seqlens: Tensor | None  # [B + 1] offsets of packed sequences
    shift: bool  # whether the row at t predicts the label at t + 1


class Transforms(NamedTuple):
    """What happens to the logits before the softmax, in this order."""

    logit_scale: float  # multiplies them; 1 on the logits path
    softcap: float | None  # s of s tanh(z / s)
    temperature: float  # divides them


class Units(NamedTuple):
    """Parts of the sequences that have a ratio each, in the order of their tokens; S of them."""

    offsets: Tensor  # [S + 1] int64 in the flattened label positions
    owner: Tensor  # [S] int64 sequence

    def packed(self) -> Tensor:
        """One tensor of both: every argument of an operator costs time at each call."""
        return torch.stack([self.offsets, torch.nn.functional.pad(self.owner, (0, 1))])

    @staticmethod
    def unpacked(x: Tensor) -> Units:
        """The units of what ``packed`` gave."""
        return Units(x[0], x[1, :-1])


class Objective(NamedTuple):
    """The TOPR objective of a batch: what is known of its sequences, how they are weighted and summed.

    The limits are (a+, b+, a-, b-); ratio and reduction are named in ``choices``.
    """

    behavior_log_prob: Tensor  # log mu, [O, T] per token or [B] summed per sequence
    reward: Tensor  # [B]
    normalizer: Tensor | None  # 0-dim, replaces the count of sequences or tokens
    log_pos_min: float
    log_pos_max: float
    log_neg_min: float
    log_neg_max: float
    ratio: str
    baseline: float  # subtracted from the rewards
    reduction: str
    # What the kernels with a sequence stage of their own do not know, see ``in_kernels``.
    sequence_weight: Tensor | None = None  # [B], multiplies n_s
    units: Units | None = None  # what has a ratio in the place of a sequence
    # [B] bool, whose log mu is known; where it is not, what stands for it has been filled in.
    behavior_known: Tensor | None = None
    segments: Tensor | None = None  # [O, T] integers, from which the units are found
    # (log_ratio, positive) -> (objective, weight) in the place of the limits, see ``limits.Taper``
    taper: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def in_kernels(self) -> bool:
        """Whether the first ten fields say all: what kernels with a sequence stage compute."""
        return self.sequence_weight is None and self.segments is None and self.taper is None

    @property
    def operands(self) -> tuple[Any, ...]:
        """Arguments, in order, of the operators whose sequence stage is torch."""
        units = None if self.units is None else self.units.packed()
        return (*self[:3], self.log_limits, *self[7:11], units)

    def of_sequences(self, index: Tensor, behavior: Tensor, units: Units | None) -> Objective:
        """The same of some sequences, whose log mu and units are given; without a normalizer."""
        weight = self.sequence_weight
        return self._replace(
            behavior_log_prob=behavior,
            reward=self.reward[index],
            normalizer=None,
            sequence_weight=None if weight is None else weight[index],
            units=units,
        )

    @property
    def log_limits(self) -> tuple[float, float, float, float]:
        """Logs of (a+, b+, a-, b-)."""
        return self[3:7]


class HeadWeights(NamedTuple):
    """The head of a language model."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    compute_dtype: torch.dtype  # to which the operands of the matmuls are rounded


class Wanted(NamedTuple):
    """Which gradients are computed, and how exactly: a ``grad_tolerance`` of 0 is exact."""

    grad_tolerance: float
    hidden: bool
    weight: bool
    bias: bool

    def anything(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden or self.weight or self.bias
