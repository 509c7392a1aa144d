"""Inputs and error budgets shared by tests and benchmarks. Needs nothing but torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.limits import Taper
from topr_kernels.taper import taper_by


class Batch(NamedTuple):
    """A padded batch: logits [B, T, V], labels [B, T], log mu [B, T], reward [B]."""

    logits: Tensor
    labels: Tensor
    behavior_log_prob: Tensor
    reward: Tensor


class Packed(NamedTuple):
    """A packed batch: logits [N, V], labels [N], log mu [N], reward [B], cu_seqlens [B + 1]."""

    logits: Tensor
    labels: Tensor
    behavior_log_prob: Tensor
    reward: Tensor
    cu_seqlens: Tensor


def make_batch(
    lengths: list[tuple[int, int]],
    vocab: int,
    *,
    dtype: torch.dtype = torch.float64,
    drift: float = 0.3,
    sharpness: float = 3.0,
    padding: int = 0,
    seed: int = 0,
) -> Batch:
    """Draws a ragged padded batch with a policy that has drifted from its behavior policy.

    Args:
        lengths: per sequence, (prompt tokens, completion tokens).
        vocab: V.
        dtype: of the logits; log mu is fp32 (fp64 for fp64) as the loss expects.
        drift: standard deviation of the noise between the logits of pi and mu.
        sharpness: scale of the logits; at V = 1000, 3 gives 3.3 nats and 4 gives 2.3.
        padding: extra padded positions at the end.
        seed: of the generator.

    Returns:
        Batch; prompts and padding have label -100, every completion token is drawn from mu, rewards
        are drawn from {-1.5, -1, -0.25, 0.5, 1}.
    """
    g = torch.Generator().manual_seed(seed)
    b, t = len(lengths), max((p + c for p, c in lengths), default=0) + padding
    mu_logits = sharpness * torch.randn(b, t, vocab, generator=g, dtype=torch.float64)
    logits = mu_logits + drift * torch.randn(b, t, vocab, generator=g, dtype=torch.float64)
    mu = mu_logits.log_softmax(-1)
    labels = torch.full((b, t), IGNORE_INDEX)
    behavior = torch.zeros(b, t, dtype=torch.float64)
    for i, (prompt, completion) in enumerate(lengths):
        for j in range(max(prompt, 1), prompt + completion):
            labels[i, j] = torch.multinomial(mu[i, j - 1].exp(), 1, generator=g)
            behavior[i, j] = mu[i, j - 1, labels[i, j]]
    choice = torch.randint(0, 5, (b,), generator=g)
    reward = torch.tensor([-1.5, -1.0, -0.25, 0.5, 1.0], dtype=torch.float64)[choice]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Batch(logits.to(dtype), labels, behavior.to(wide), reward.to(wide))


def pack(batch: Batch, lengths: list[tuple[int, int]]) -> Packed:
    """Drops the padding of a batch and concatenates its sequences."""
    sizes = [p + c for p, c in lengths]

    def cat(x: Tensor) -> Tensor:
        return torch.cat([x[i, :n] for i, n in enumerate(sizes)])

    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return Packed(
        cat(batch.logits), cat(batch.labels), cat(batch.behavior_log_prob), batch.reward, cu_seqlens
    )


def assert_within_budget(
    name: str, actual: Tensor, plain: Tensor, reference: Tensor, *, operand: float = 0.0
) -> None:
    """Asserts |actual - reference| <= 2 (|plain - reference| + eps), maxima over the elements.

    Args:
        name: what is compared, for the message.
        actual: result under test.
        plain: the same computed by plain torch in the same dtype: it sets the budget.
        reference: fp64 result.
        operand: largest magnitude of an intermediate whose rounding reaches the result (a log-prob
            of 10 nats behind a ratio near 1, say): eps is taken at it, or at the result if larger.
    """
    error = (actual.double() - reference.double()).abs().max().item()
    plain_error = (plain.double() - reference.double()).abs().max().item()
    eps = torch.finfo(actual.dtype).eps * max(reference.abs().max().item(), operand, 1e-30)
    if not error <= 2 * (plain_error + eps):
        raise AssertionError(
            f"{name}: max error {error:.3e} exceeds 2 x (plain torch {plain_error:.3e} + eps "
            f"{eps:.3e})"
        )


class LinearBatch(NamedTuple):
    """A padded batch before its head: hidden [B, T, D], weight [V, D], and as in :class:`Batch`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    behavior_log_prob: Tensor
    reward: Tensor


def make_linear_batch(
    lengths: list[tuple[int, int]],
    vocab: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float64,
    drift: float = 0.3,
    sharpness: float = 3.0,
    padding: int = 0,
    seed: int = 0,
) -> LinearBatch:
    """Draws hidden states and a head whose logits have the spread of :func:`make_batch`.

    Arguments as in :func:`make_batch`; ``dim`` is D.
    """
    g = torch.Generator().manual_seed(seed)
    b, t = len(lengths), max((p + c for p, c in lengths), default=0) + padding
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64) / dim**0.5
    hidden = sharpness * torch.randn(b, t, dim, generator=g, dtype=torch.float64)
    mu = (hidden @ weight.T).log_softmax(-1)
    labels = torch.full((b, t), IGNORE_INDEX)
    behavior = torch.zeros(b, t, dtype=torch.float64)
    for i, (prompt, completion) in enumerate(lengths):
        for j in range(max(prompt, 1), prompt + completion):
            labels[i, j] = torch.multinomial(mu[i, j - 1].exp(), 1, generator=g)
            behavior[i, j] = mu[i, j - 1, labels[i, j]]
    hidden += drift * torch.randn(b, t, dim, generator=g, dtype=torch.float64)
    choice = torch.randint(0, 5, (b,), generator=g)
    reward = torch.tensor([-1.5, -1.0, -0.25, 0.5, 1.0], dtype=torch.float64)[choice]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return LinearBatch(
        hidden.to(dtype), weight.to(dtype), labels, behavior.to(wide), reward.to(wide)
    )


def check_taper(taper: Taper, most: float = 12.0) -> str | None:
    """Compares the weight of a custom taper with the slope of its objective.

    The objective's steps over 8000 small intervals of the log-ratio are compared with the integral of
    the weight, so that a jump shows as well as a wrong slope.

    Args:
        taper: as ``limits=`` of a loss takes it, see ``limits.Taper``.
        most: nats of log-ratio that are tried, on both sides of 0.

    Returns:
        None where ``d objective / d log_ratio`` is the weight, for both signs. Else what differs where,
        and what it means.

    Raises:
        TypeError: if it does not return two floating tensors.
        ValueError: if they have another shape, or an entry depends on others than its own.
    """
    # Off the round numbers, at which limits lie.
    x = torch.linspace(-most, most, 8001, dtype=torch.float64) + 1e-4 * torch.pi
    step = float(x[1] - x[0])
    for positive in (True, False):
        _check_elementwise(taper, x, positive)
        objective, weight = taper_by(taper, x, torch.full_like(x, positive, dtype=torch.bool))
        slope, mean = objective.diff() / step, (weight[1:] + weight[:-1]) / 2
        # At a kink the slope lies between the weights on its sides.
        allowed = weight.diff().abs() / 2 + 1e-4 * mean.abs() + 1e-8
        wrong = ((slope - mean).abs() / allowed).nan_to_num(torch.inf)
        if wrong.max() > 1:
            i = int(wrong.argmax())
            kind = "positive" if positive else "negative"
            return (
                f"near a log-ratio of {float(x[i]):.4g} of a {kind} sequence the weight is "
                f"{float(mean[i]):.4g}, the slope of the objective {float(slope[i]):.4g}: training "
                "follows the weight, so the loss is a figure to log and not what is minimised, and its "
                "finite differences are not its gradient. A mask that turns a value off makes it jump; "
                "an objective that goes on without a jump, constant where the weight is 0, has none"
            )
    return None


def _check_elementwise(taper: Taper, x: Tensor, positive: bool) -> None:
    mixed = torch.arange(len(x)) % 2 == 0
    whole = taper_by(taper, x, mixed)
    for index in (mixed == positive, torch.tensor([len(x) // 2])):
        parts = taper_by(taper, x[index], mixed[index])
        for a, b in zip(whole, parts, strict=True):
            if not torch.allclose(a[index], b, equal_nan=True):
                raise ValueError(
                    "limits: an entry of this taper depends on the others of a batch, but batches come "
                    "in parts; compute what depends on the whole before the call, and close over it"
                )
