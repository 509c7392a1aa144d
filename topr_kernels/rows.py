"""The mathematics of log-softmax rows in plain torch: log-probs, log-sum-exp, entropy, gradient.

Blocks of rows [n, V] in the arithmetic dtype. The reductions over the vocabulary stand apart from what
is computed of them, so that a vocabulary may be spread over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.ops.options import Transforms


class SoftmaxRows(NamedTuple):
    """What a block of n rows gives, each [n].

    lse + lse_low is the log-sum-exp to twice the digits; sum_exp is sum_v exp(z_v - max z).
    """

    log_prob: Tensor
    lse: Tensor
    lse_low: Tensor
    entropy: Tensor
    sum_exp: Tensor

    def part(self, index: slice) -> SoftmaxRows:
        """Some of the rows."""
        return SoftmaxRows(*(x[index] for x in self))


def transform_(z: Tensor, transforms: Transforms) -> Tensor:
    """Applies scale, softcap and temperature, in this order, to a block in place."""
    logit_scale, softcap, temperature = transforms
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    scale = logit_scale / temperature
    return z if scale == 1.0 else z.mul_(scale)


def softcap_slope(z: Tensor, transforms: Transforms) -> Tensor | None:
    """Slope of the softcap's tanh at transformed logits; None without a softcap."""
    if transforms.softcap is None:
        return None
    return 1 - (z * (transforms.temperature / transforms.softcap)).square_()


def finite_max(largest: Tensor) -> Tensor:
    """The row maxima to subtract: a row of -inf alone must not become -inf - (-inf)."""
    return torch.where(largest == -torch.inf, 0.0, largest)


def exp_sums_(z: Tensor, top: Tensor, column: Tensor, entropy: bool) -> list[Tensor]:
    """Overwrites transformed logits with exp(z - top), top [n].

    Returns:
        Sum of the exps, z - top at ``column`` [n]; for the entropy also sum of exp(z - top) (z - top).
    """
    z.sub_(top.unsqueeze(-1))
    at_column = z.gather(-1, column.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return [z.exp_().sum(-1), at_column]
    p = z.exp()
    # p log p by selection: 0 * (-inf) is NaN.
    sums = [p.sum(-1), at_column, torch.where(p == 0, 0.0, p * z).sum(-1)]
    z.copy_(p)
    return sums


def finish_rows(
    top: Tensor, sums: Sequence[Tensor], label: Tensor, vocab: int, entropy: bool
) -> SoftmaxRows:
    """The results of rows from their maxima and the sums of :func:`exp_sums_` over the vocabulary.

    Args:
        top: [n].
        sums: two or three of [n].
        label: [n] int64; outside the vocabulary log_prob is NaN, at IGNORE_INDEX it means nothing.
        vocab: V.
        entropy: also compute the entropy; NaN otherwise.
    """
    sum_exp, at_label = sums[:2]
    log_sum = sum_exp.log()
    lse = top + log_sum
    # (z_y - max) - log sum: no large common offset to lose digits to.
    log_prob = at_label - log_sum
    log_prob = torch.where((at_label == -torch.inf) & ~lse.isnan(), -torch.inf, log_prob)
    invalid = (label != IGNORE_INDEX) & ((label < 0) | (label >= vocab))
    # What rounding took from top + log_sum (Knuth's two-sum); nothing where it is not finite.
    rest = lse - top
    low = (top - (lse - rest)) + (log_sum - rest)
    return SoftmaxRows(
        log_prob.masked_fill(invalid, torch.nan),
        lse,
        torch.where(lse.isfinite(), low, 0.0),
        log_sum - sums[2] / sum_exp if entropy else torch.full_like(lse, torch.nan),
        sum_exp,
    )


def softmax_rows_(z: Tensor, label: Tensor, entropy: bool) -> SoftmaxRows:
    """Reduces transformed logits and overwrites them with exp(z - max); see :func:`finish_rows`."""
    vocab = z.shape[-1]
    top = finite_max(z.amax(-1))
    sums = exp_sums_(z, top, label.clamp(0, vocab - 1), entropy)
    return finish_rows(top, sums, label, vocab, entropy)


def put_(z: Tensor, column: Tensor, value: Tensor, here: Tensor | None = None) -> Tensor:
    """Writes value [n] into one column [n] of each row; only where ``here``, if that is given."""
    column, value = column.unsqueeze(-1), value.unsqueeze(-1)
    if here is not None:
        value = torch.where(here.unsqueeze(-1), value, z.gather(-1, column))
    return z.scatter_(-1, column, value)


def onehot_minus_softmax_(
    z: Tensor,
    lse: tuple[Tensor, Tensor],
    log_prob: Tensor,
    column: Tensor,
    here: Tensor | None = None,
) -> Tensor:
    """Overwrites transformed logits with J = onehot - softmax.

    Args:
        z: [n, V].
        lse: two [n] tensors whose sum is the log-sum-exp; subtracted one after the other.
        log_prob: [n] of the labels.
        column: [n] of the label.
        here: [n] bool, whether the label is one of these columns; None for all.
    """
    z.sub_(lse[0].unsqueeze(-1)).sub_(lse[1].unsqueeze(-1)).exp_().neg_()
    # The true class in the arithmetic dtype: 1 - p_y = -expm1(log p_y) keeps every digit.
    return put_(z, column, -torch.expm1(log_prob), here)


def exp_to_gradient_(
    z: Tensor,
    softmax: SoftmaxRows,
    slope: Tensor | None,
    column: Tensor,
    here: Tensor | None = None,
) -> Tensor:
    """Overwrites exp(z - max) with -sum_exp times J times the slope; arguments as above."""
    put_(z, column, softmax.sum_exp * torch.expm1(softmax.log_prob), here)
    return z if slope is None else z.mul_(slope)
