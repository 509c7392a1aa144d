"""The inputs of the suites: real hidden states, raised to other shapes, or tiny ones for ``--quick``."""

from __future__ import annotations

import functools

import torch

from benchmarks import hidden_states
from benchmarks.case import LinearCase, LogitsCase
from benchmarks.hidden_states import Hidden

TAIL_MASS = 0.01
TINY = {"rows": 40, "dim": 16, "vocab": 97}


def size_of(device: str, full: bool) -> str:
    """Key of a suite's sizes: "cpu", "cpu, full" for those that take hours there, or "cuda"."""
    return f"{device}, full" if full and device == "cpu" else device


def tiny(rows: int, dim: int, vocab: int, sequence: int = 10) -> Hidden:
    """Random hidden states with labels drawn from their softmax; no real model needed."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, dim, generator=g), torch.randn(vocab, dim, generator=g)
    log_pi = (hidden @ weight.T).log_softmax(-1)
    labels = torch.multinomial(log_pi.exp(), 1, generator=g)
    mu = log_pi.gather(1, labels)[:, 0] + 0.02 * torch.randn(rows, generator=g)
    offsets = torch.arange(0, rows + sequence, sequence).to(torch.int32)
    data = Hidden(hidden, weight, labels[:, 0], mu, torch.empty(0), offsets, 1.0)
    return hidden_states.first(data, rows)


def cut_vocabulary(data: Hidden, vocab: int) -> Hidden:
    """The most likely columns of the head, the labels among them; log mu follows log pi."""
    sample = data.hidden[:: max(1, len(data.hidden) // 512)]
    likely = (sample @ data.weight.T).softmax(-1).mean(0)
    likely[data.labels] = 2.0
    kept = likely.topk(vocab).indices.sort().values
    place = torch.empty(len(data.weight), dtype=torch.long, device=kept.device)
    place[kept] = torch.arange(vocab, device=kept.device)
    smaller = data._replace(weight=data.weight[kept], labels=place[data.labels])
    before, after = (hidden_states.log_prob_and_entropy(d)[0] for d in (data, smaller))
    return smaller._replace(behavior_log_prob=data.behavior_log_prob + after - before)


@functools.lru_cache(maxsize=1)  # trained and frozen heads share the data and its fp64 truth
def linear_case(
    device: str,
    dtype: str,
    quick: bool,
    rows: int,
    dim: int = 0,
    vocab: int = 0,
    entropy: float = 0.0,
    temperature: float = 0.0,
) -> LinearCase:
    """Real rows of a temperature, or raised to a shape at an entropy.

    Args:
        device: "cpu" or "cuda".
        dtype: of hidden states and head.
        quick: tiny random data instead.
        rows: N.
        dim: D; 0 for the real one.
        vocab: V; 0 for the real one.
        entropy: nats, where dim and vocab are given.
        temperature: one of ``hidden_states.TEMPERATURES``, where they are not.
    """
    kind = getattr(torch, dtype)
    if quick:
        data = tiny(rows, dim or TINY["dim"], vocab or TINY["vocab"])
        return LinearCase("tiny, random", data, device, kind)
    if not dim:
        data = hidden_states.load(temperature, rows)
        return LinearCase(f"SmolLM2 at {temperature}", data, device, kind)
    distinct = min(rows, hidden_states.TOKENS)
    data = hidden_states.at_entropy(entropy, distinct, device=device)
    real = len(data.weight)
    data = cut_vocabulary(data, vocab) if vocab < real else data
    data = hidden_states.synthesise(data, dim, vocab, TAIL_MASS, seed=0)
    data = hidden_states.repeated(data, rows) if rows > distinct else data
    return LinearCase(f"raised, tail {TAIL_MASS}", data, device, kind)


@functools.lru_cache(maxsize=1)
def logits_case(device: str, dtype: str, rows: int, vocab: int) -> LogitsCase:
    """Random logits of a shape."""
    return LogitsCase(rows, vocab, device, getattr(torch, dtype))
