"""Inputs and error budgets shared by tests and benchmarks. Needs nothing but torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX


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
