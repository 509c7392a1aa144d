"""The paper in code: full logits, a Python loop over sequences, plain autograd, any dtype to fp64.

Slow and obvious on purpose. Everything the package computes is tested against this file; nothing that
computes imports it. Equations are those of arXiv 2503.14286.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.limits import TOPR, Limits


class ReferenceOutput(NamedTuple):
    """Loss (differentiable, also twice) and per-sequence values, [B]."""

    loss: Tensor
    log_ratio: Tensor
    weight: Tensor
    objective: Tensor


def rho(log_x: Tensor, a: float, b: float) -> Tensor:
    """The taper function of Eq. 6 as printed, with x = exp(log_x) so that nothing overflows early.

    Args:
        log_x: 0-dim, log of the ratio.
        a: lower limit.
        b: upper limit.

    Returns:
        0-dim: ``a (1 + log(x/a))`` below a, ``b (1 + log(x/b))`` above b, x between.
    """
    if a > 0 and log_x < math.log(a):
        return a * (1 + log_x - math.log(a))
    if b == 0:
        # b (1 + log(x/b)) -> 0 as b -> 0, for every x; a NaN ratio stays visible.
        return torch.where(log_x.isnan(), log_x, torch.zeros_like(log_x))
    if log_x > math.log(b):
        return b * (1 + log_x - math.log(b))
    if log_x == -math.inf:
        return torch.zeros_like(log_x)
    return log_x.exp()


def clipped(log_x: Tensor, a: float, b: float) -> Tensor:
    """The weight [x]_a^b = max(min(x, b), a) of Eq. 3, NaN kept."""
    x = log_x.exp()
    return x if x.isnan() else torch.clamp(x, a, b)


def token_log_probs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log softmax at the labels for aligned rows: [n, V], [n] -> [n]."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)[torch.arange(len(labels)), labels]


def per_segment(
    token_log_ratio: Tensor, scored: Tensor, value: Tensor, a: float, b: float, ratio: str
) -> tuple[Tensor, Tensor]:
    """O_s = sum_k rho(prod r), or sum_k |k| rho((prod r)^(1/|k|)), over the segments of a sequence.

    Args:
        token_log_ratio: [n] of the scored tokens.
        scored: [T] bool.
        value: [T] integers.
        a: lower limit.
        b: upper limit.
        ratio: "segment" or "segment_geometric".

    Returns:
        (objective, mean weight over the tokens), 0-dim.
    """
    segments: list[list[int]] = []
    numbers = scored.cumsum(0) - 1
    for t in scored.nonzero().flatten().tolist():
        if t > 0 and scored[t - 1] and value[t - 1] == value[t]:
            segments[-1].append(int(numbers[t]))
        else:
            segments.append([int(numbers[t])])
    objective = weight = token_log_ratio.new_zeros(())
    for k in segments:
        log_ratio, size = token_log_ratio[k].sum(), len(k)
        if ratio == "segment":
            objective = objective + rho(log_ratio, a, b)
            weight = weight + size * clipped(log_ratio, a, b)
        else:
            objective = objective + size * rho(log_ratio / size, a, b)
            weight = weight + size * clipped(log_ratio / size, a, b)
    return objective, weight / len(token_log_ratio)


def topr_loss(
    logits: Tensor,
    labels: Tensor,
    behavior_log_prob: Tensor,
    reward: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    limits: Limits = TOPR,
    ratio: str = "sequence",
    baseline: float = 0.0,
    reduction: str = "sequence_mean",
    normalizer: float | None = None,
    sequence_weight: Tensor | None = None,
    segments: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: bool = True,
) -> ReferenceOutput:
    """The TOPR loss of Eq. 6, one sequence at a time; arguments as in ``topr_kernels.topr_loss``.

    Computes in the dtype of ``logits``: pass fp64.
    """
    if segments is None:
        segments = torch.zeros_like(labels)
    if cu_seqlens is not None:
        logits = logits.reshape(-1, logits.shape[-1])
        labels = labels.reshape(-1)
        bounds = cu_seqlens.tolist()
        spans = list(pairwise(bounds))
        per_token = behavior_log_prob.numel() == labels.numel()
        behavior, of = behavior_log_prob.reshape(-1), segments.reshape(-1)
        sequences = [
            (logits[i:j], labels[i:j], behavior[i:j] if per_token else behavior[s], of[i:j])
            for s, (i, j) in enumerate(spans)
        ]
    else:
        sequences = list(zip(logits, labels, behavior_log_prob, segments, strict=True))

    count = tokens = 0
    parts = []
    zero = logits.new_zeros(())
    log_ratios, weights, objectives = [], [], []
    for s, (z, y, mu, value) in enumerate(sequences):
        if shift:
            z, y, mu, value = z[:-1], y[1:], mu[1:] if mu.dim() else mu, value[1:]
        scored = y != -100
        length = int(scored.sum())
        if length == 0:  # contributes nothing and is not counted
            log_ratios.append(zero)
            weights.append(zero)
            objectives.append(zero)
            continue
        count, tokens = count + 1, tokens + length
        log_pi = token_log_probs(z[scored], y[scored], temperature, softcap)
        token_log_ratio = log_pi - mu[scored] if mu.dim() else None
        log_ratio = log_pi.sum() - mu if token_log_ratio is None else token_log_ratio.sum()
        # The baseline in the dtype of the rewards, so that equal numbers give exactly 0.
        advantage = float(reward[s] - torch.full_like(reward[s], baseline))
        positive = not advantage < 0
        a, b = (limits.pos_min, limits.pos_max) if positive else (limits.neg_min, limits.neg_max)
        if ratio == "sequence":
            objective, weight = rho(log_ratio, a, b), clipped(log_ratio, a, b)
        elif ratio == "geometric":
            objective = length * rho(log_ratio / length, a, b)
            weight = clipped(log_ratio / length, a, b)
        elif ratio != "token":
            assert token_log_ratio is not None
            objective, weight = per_segment(token_log_ratio, scored, value, a, b, ratio)
        else:
            assert token_log_ratio is not None
            objective = torch.stack([rho(t, a, b) for t in token_log_ratio]).sum()
            weight = torch.stack([clipped(t, a, b) for t in token_log_ratio]).mean()
        if sequence_weight is not None:  # after the sign has been taken
            advantage *= float(sequence_weight[s])
        if advantage != 0:  # a reward of 0 contributes nothing, whatever the ratio
            parts.append(advantage * objective / (length if reduction == "sequence_mean" else 1))
        log_ratios.append(log_ratio.detach())
        weights.append(weight.detach())
        objectives.append(objective.detach())

    # 0 * sum keeps the loss connected to the logits when nothing contributes.
    total = torch.stack(parts).sum() if parts else torch.where(logits == logits, 0.0, 0.0).sum()
    if reduction == "sum":
        denominator: float = 1
    elif normalizer is not None:
        denominator = normalizer
    else:
        denominator = max(count if reduction == "sequence_mean" else tokens, 1)
    return ReferenceOutput(
        -total / denominator,
        torch.stack(log_ratios),
        torch.stack(weights),
        torch.stack(objectives),
    )
