"""The plain loop that the frameworks are held against: the paper's formula, torch, one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, PROMPT, ANSWER = 8, 4, 6
#: Of AdamW. The default, 1e-8, makes steps of the rounding of gradients that are all but 0.
EPS = 1e-5
CONFIG = dict(
    vocab_size=102,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)


class Batch(NamedTuple):
    """Prompts padded on the left, answers on the right; row 3 has no scored token.

    Attributes:
        ids: [B, P + T] int64.
        attention: [B, P + T] int64.
        mask: [B, T] int64, which tokens of the answers are scored.
        mu: [B, T] log mu.
        score: [B] +1 or -1; two prompts of four answers.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    mu: Tensor
    score: Tensor

    @property
    def positions(self) -> Tensor:
        return (self.attention.cumsum(1) - 1).clamp(min=0)


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))


def batch(seed: int, policy: LlamaForCausalLM) -> Batch:
    """Random tokens; log mu is the policy's own, moved by up to a nat, so that negatives taper."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, CONFIG["vocab_size"], (ROWS, PROMPT + ANSWER), generator=generator)
    lengths = torch.tensor([6, 3, 5, 4, 2, 6, 4, 6])
    prompts = torch.tensor([4, 2, 3, 4, 1, 4, 4, 3])
    answered = (torch.arange(ANSWER) < lengths[:, None]).long()
    asked = (torch.arange(PROMPT) >= PROMPT - prompts[:, None]).long()
    attention = torch.cat([asked, answered], 1)
    mask = answered.clone()
    mask[3] = 0
    blank = Batch(ids * attention, attention, mask, torch.zeros(ROWS, ANSWER), torch.zeros(ROWS))
    with torch.no_grad():
        mu = log_prob(policy, blank) + torch.rand(ROWS, ANSWER, generator=generator) - 0.5
    score = torch.tensor([1.0, -1, -1, 1, -1, 1, -1, -1])
    return blank._replace(mu=torch.where(mask == 1, mu, 0.0), score=score)


def log_prob(policy: LlamaForCausalLM, data: Batch) -> Tensor:
    """[B, T] log pi of the answers."""
    logits = policy(data.ids, attention_mask=data.attention, position_ids=data.positions).logits
    rows = logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return rows.gather(-1, data.ids[:, PROMPT:, None]).squeeze(-1)


def objective(log_pi: Tensor, mu: Tensor, mask: Tensor, reward: Tensor) -> Tensor:
    """[B], R * O of Eq. 6 with TOPR's limits, in fp64."""
    log_ratio = torch.where(mask == 1, log_pi.double() - mu.double(), 0.0).sum(-1)
    low = torch.where(reward < 0, 0.0, 1.0).log()
    c = torch.minimum(torch.maximum(log_ratio, low), torch.zeros(())).detach()
    return reward * c.exp() * (1 + log_ratio - c)


def loss(
    log_pi: Tensor, data: Batch, reward: Tensor, denominators: tuple[float, bool] = (ROWS, True)
) -> Tensor:
    """-sum R O / n: n is the first denominator, times the length of each answer if the second."""
    count, by_length = denominators
    length = data.mask.sum(1)
    each = objective(log_pi, data.mu, data.mask, reward) / (length.clamp(min=1) if by_length else 1)
    return -each[length > 0].sum() / count


def train(
    policy: LlamaForCausalLM,
    steps: Iterable[tuple[Batch, Tensor, tuple[float, bool]]],
    clip: float = 1.0,
) -> dict[str, Tensor]:
    """The weights after AdamW with a rate of 0.01 and the gradient's norm clipped."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, eps=EPS, weight_decay=0)
    for data, reward, denominators in steps:
        loss(log_prob(policy, data), data, reward, denominators).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def distance(found: dict[str, Any], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far the weights are from the expected ones, in units of how far those have moved."""
    assert found.keys() >= expected.keys()

    def norm(a: dict[str, Any], b: dict[str, Tensor]) -> float:
        return float(sum((a[n].double() - b[n].double()).square().sum() for n in expected)) ** 0.5

    moved = norm(expected, start)
    assert moved > 0.1, "the plain loop has not moved"
    return norm(found, expected) / moved
