"""TOPR (Tapered Off-Policy REINFORCE, arXiv 2503.14286) as exact, fused loss kernels."""

from topr_kernels._version import __version__
from topr_kernels.baseline import baseline_for_positive_share, effective_positive_share
from topr_kernels.limits import IS, PRESETS, REINFORCE, SFT, TIS, TOPR, Limits
from topr_kernels.log_prob import linear_log_prob, log_prob
from topr_kernels.loss import (
    TOPRLoss,
    linear_topr_loss,
    topr_loss,
    topr_loss_from_log_prob,
)
from topr_kernels.output import LogProbOutput, TOPROutput

__all__ = [
    "IS",
    "PRESETS",
    "REINFORCE",
    "SFT",
    "TIS",
    "TOPR",
    "Limits",
    "LogProbOutput",
    "TOPRLoss",
    "TOPROutput",
    "__version__",
    "baseline_for_positive_share",
    "effective_positive_share",
    "linear_log_prob",
    "linear_topr_loss",
    "log_prob",
    "topr_loss",
    "topr_loss_from_log_prob",
]
