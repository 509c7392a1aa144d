"""The plain torch of eager.py under ``torch.compile(dynamic=False)``, the TOPR stage included."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Case, Provider, topr
from benchmarks.providers import eager

LINK = "https://docs.pytorch.org/docs/stable/generated/torch.compile.html"


def _loss(
    h: Tensor, w: Tensor, y: Tensor, mu: Tensor, reward: Tensor, of: Tensor, length: Tensor
) -> Tensor:
    return topr(eager.log_prob(h, w, y), mu, reward, of, length)


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    compiled = torch.compile(_loss, dynamic=False)
    log_prob = torch.compile(eager.log_prob, dynamic=False)

    def loss(c: Case, h: Tensor, w: Tensor) -> Tensor:
        return compiled(h, w, c.row_labels(), c.mu, c.reward, c.of, c.length)

    def log_probs(c: Case, h: Tensor, w: Tensor) -> Tensor:
        return log_prob(h, w, c.row_labels())

    provider = Provider({"dynamic=False": loss}, {"dynamic=False": log_probs}, makes_logits=True)
    return {"torch.compile": provider}


def logits(device: str) -> dict[str, Provider]:
    """From logits."""
    compiled = torch.compile(eager.from_logits, dynamic=False)
    return {
        "torch.compile": Provider({"dynamic=False": lambda c, x: eager.loss_of(compiled, c, x)})
    }
