"""The four clip limits of TOPR (Eq. 3) and the presets of Table 1, arXiv 2503.14286."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

#: A custom taper in the place of limits: ``(log_ratio [n], positive [n] bool) -> (objective [n],
#: weight [n])``, in plain torch on the device of the log-ratios, in any floating dtype. ``positive`` is
#: reward - baseline >= 0. Each entry must depend on its own arguments alone: a batch comes in parts of
#: any size and order, and some entries more than once. What moves with the batch (its share of
#: positives, say) is computed before the call and closed over. NaN log-ratios make both results NaN.
Taper = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Limits:
    """Clip limits of the ratio pi/mu, one pair per sign of the reward (Eq. 3).

    Sequences with reward >= 0 are weighted by ``[pi/mu]`` clipped to ``[pos_min, pos_max]``, those
    with reward < 0 by ``[pi/mu]`` clipped to ``[neg_min, neg_max]``. Limits are ratios (not logs).

    Args:
        pos_min: a+, finite, >= 0. Above 0 it keeps a minimum learning rate on unlikely positives.
        pos_max: b+, >= ``pos_min``; ``math.inf`` for no upper limit.
        neg_min: a-, finite, >= 0. Any value above 0 leaves the objective unbounded (Prop. 3.2).
        neg_max: b-, >= ``neg_min``; ``math.inf`` for no upper limit.

    Raises:
        TypeError: if a limit is not a number.
        ValueError: if a limit is NaN or negative, a minimum is infinite, or min > max.
    """

    pos_min: float
    pos_max: float
    neg_min: float
    neg_max: float

    def __post_init__(self) -> None:
        for name in ("pos_min", "pos_max", "neg_min", "neg_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"Limits.{name}: expected a Python number, got {type(value).__name__}; "
                    "limits are constants of the method, not tensors"
                )
            if math.isnan(value) or value < 0:
                raise ValueError(f"Limits.{name}: expected a ratio >= 0, got {value}")
        for sign in ("pos", "neg"):
            low, high = getattr(self, f"{sign}_min"), getattr(self, f"{sign}_max")
            if math.isinf(low):
                raise ValueError(f"Limits.{sign}_min: expected a finite ratio, got {low}")
            if low > high:
                raise ValueError(
                    f"Limits.{sign}_min = {low} exceeds Limits.{sign}_max = {high}; swap them"
                )

    def log(self) -> tuple[float, float, float, float]:
        """Natural logs of (pos_min, pos_max, neg_min, neg_max); log 0 is -inf."""
        return (
            _log(self.pos_min),
            _log(self.pos_max),
            _log(self.neg_min),
            _log(self.neg_max),
        )


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


#: Canonical TOPR: positives at full weight, negatives by their truncated ratio.
TOPR = Limits(1.0, 1.0, 0.0, 1.0)
#: Truncated importance sampling: both signs by their truncated ratio; slow on unlikely positives.
TIS = Limits(0.0, 1.0, 0.0, 1.0)
#: Plain importance sampling: unbiased, unbounded variance; weights overflow fp32 above 88.7 nats.
IS = Limits(0.0, math.inf, 0.0, math.inf)
#: Naive off-policy REINFORCE: no ratio at all; its objective is unbounded and training collapses.
REINFORCE = Limits(1.0, 1.0, 1.0, 1.0)
#: Positives only (STaR, RAFT, ReST).
SFT = Limits(1.0, 1.0, 0.0, 0.0)

#: Table 1 by name.
PRESETS: dict[str, Limits] = {
    "topr": TOPR,
    "tis": TIS,
    "is": IS,
    "reinforce": REINFORCE,
    "sft": SFT,
}
