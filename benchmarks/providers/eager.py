"""Plain torch: logits in the dtype of the inputs, an fp32 log-softmax, gather."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Provider, per_token, topr

LINK = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html"


def log_prob(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """[N] log-probs of the labels."""
    return F.linear(h, w).float().log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)


def from_logits(
    x: Tensor, y: Tensor, mu: Tensor, reward: Tensor, of: Tensor, length: Tensor
) -> Tensor:
    """docs/method.md's "Equivalent to" on logits [B, T, V] that are shifted here."""
    rows = x[:, :-1].float().log_softmax(-1)
    log_pi = rows.gather(-1, y[:, 1:, None]).squeeze(-1).flatten()
    return topr(log_pi, mu, reward, of, length)


def loss_of(function: object, c: Case, x: Tensor) -> Tensor:
    """``from_logits``, or a compiled form of it, on a case."""
    return function(x, c.labels, c.mu, c.reward, c.of, c.length)  # type: ignore[operator,attr-defined]


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    provider = per_token({"": lambda c, h, w: log_prob(h, w, c.row_labels())})
    return {"torch eager": provider._replace(makes_logits=True)}


def logits(device: str) -> dict[str, Provider]:
    """From logits."""
    return {"torch eager": Provider({"": lambda c, x: loss_of(from_logits, c, x)})}
