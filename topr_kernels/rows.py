"""One block of logits rows in plain torch: log-prob of the label, log-sum-exp, entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX


class Rows(NamedTuple):
    """What a block of n rows gives: log_prob, lse, lse_low, entropy, total, each [n].

    lse + lse_low is the log-sum-exp to twice the digits; total is sum_v exp(z_v - max z).
    """

    log_prob: Tensor
    lse: Tensor
    lse_low: Tensor
    entropy: Tensor
    total: Tensor


def transform_(z: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor:
    """Applies scale, softcap and temperature, in this order, to a block in place."""
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    scale = logit_scale / temperature
    return z if scale == 1.0 else z.mul_(scale)


def softmax_rows_(z: Tensor, label: Tensor, entropy: bool) -> Rows:
    """Reduces a block of transformed logits and overwrites it with exp(z - max).

    Args:
        z: [n, V] in the arithmetic dtype.
        label: [n] int64; outside the vocabulary log_prob is NaN, at IGNORE_INDEX it means nothing.
        entropy: also compute the entropy; NaN otherwise.
    """
    vocab = z.shape[-1]
    z_label = z.gather(-1, label.clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1)
    top = z.amax(-1)
    # A row of -inf alone must not become -inf - (-inf).
    top = torch.where(top == -torch.inf, 0.0, top)
    z.sub_(top.unsqueeze(-1))
    p = z.exp() if entropy else z.exp_()
    total = p.sum(-1)
    log_total = total.log()
    lse = top + log_total
    # (z_y - max) - log sum: no large common offset to lose digits to.
    log_prob = (z_label - top) - log_total
    log_prob = torch.where((z_label == -torch.inf) & ~lse.isnan(), -torch.inf, log_prob)
    invalid = (label != IGNORE_INDEX) & ((label < 0) | (label >= vocab))
    # What rounding took from top + log_total (Knuth's two-sum); nothing where it is not finite.
    rest = lse - top
    low = (top - (lse - rest)) + (log_total - rest)
    if entropy:
        # p log p by selection: 0 * (-inf) is NaN.
        surprise = torch.where(p == 0, 0.0, p * z).sum(-1) / total
        row_entropy = log_total - surprise
        z.copy_(p)
    else:
        row_entropy = torch.full_like(total, torch.nan)
    return Rows(
        log_prob.masked_fill(invalid, torch.nan),
        lse,
        torch.where(lse.isfinite(), low, 0.0),
        row_entropy,
        total,
    )
