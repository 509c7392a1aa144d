"""The three ways to a loss and the reference, on one batch of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topr_kernels import (
    TOPROutput,
    linear_topr_loss,
    log_prob,
    reference,
    topr_loss,
    topr_loss_from_log_prob,
)
from topr_kernels.testing import LinearBatch, make_linear_batch

Call = Callable[..., tuple[TOPROutput, Tensor]]

VOCAB = 13


def a_trajectory(seed: int = 4, dtype: torch.dtype = torch.float64) -> LinearBatch:
    """Five sequences, in three of which tokens between scored ones are not scored; one is empty."""
    lengths = [(2, 9), (1, 6), (3, 0), (2, 1), (1, 8)]
    batch = make_linear_batch(lengths, VOCAB, 8, dtype=dtype, seed=seed, padding=2)
    labels = batch.labels.clone()
    for i, places in ((0, [4, 5, 8]), (1, [3]), (4, [2, 5])):
        labels[i, places] = -100
    reward = torch.tensor([1.0, -1.0, 0.5, -0.25, -2.0], dtype=batch.reward.dtype)
    return batch._replace(labels=labels, reward=reward)


def some_segments(batch: LinearBatch, seed: int = 0) -> Tensor:
    """Numbers of segments, of which neighbours may share one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, batch.labels.shape, generator=generator)


def by_logits(batch: LinearBatch, **kw: Any) -> tuple[TOPROutput, Tensor]:
    """The loss, and its gradient by the hidden states."""
    hidden = batch.hidden.detach().requires_grad_()
    out = topr_loss(hidden @ batch.weight.T, *batch[2:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


def by_head(batch: LinearBatch, **kw: Any) -> tuple[TOPROutput, Tensor]:
    """The same without logits."""
    hidden = batch.hidden.detach().requires_grad_()
    out = linear_topr_loss(hidden, *batch[1:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


def by_log_prob(batch: LinearBatch, **kw: Any) -> tuple[TOPROutput, Tensor]:
    """The same from the log-probs of tokens."""
    hidden = batch.hidden.detach().requires_grad_()
    given = {"cu_seqlens": kw.get("cu_seqlens"), "impl": kw.pop("impl", "auto")}
    scores = log_prob(hidden @ batch.weight.T, batch.labels, **given)
    # The first label of a sequence has no row.
    scored = (batch.labels != -100) & (scores.lse != 0)
    out = topr_loss_from_log_prob(scores.log_prob, scored, *batch[3:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


def by_reference(batch: LinearBatch, **kw: Any) -> tuple[Any, Tensor]:
    """The same as the paper has it."""
    hidden = batch.hidden.detach().requires_grad_()
    out = reference.topr_loss(hidden @ batch.weight.T, *batch[2:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


PATHS: dict[str, Call] = {"logits": by_logits, "head": by_head, "log_prob": by_log_prob}


def assert_same(
    found: tuple[Any, Tensor], expected: tuple[Any, Tensor], rtol: float = 1e-11
) -> None:
    """Compares loss, gradient and the results per sequence of two ways."""
    (out, d), (other, d_other) = found, expected
    assert d_other.abs().max() > 1e-6  # parity of zeros proves nothing
    for name in ("loss", "log_ratio", "weight", "objective"):
        a, b = getattr(out, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(d, d_other, rtol=rtol, atol=1e-13)
