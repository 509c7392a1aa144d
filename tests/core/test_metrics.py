"""Every key of metrics() against small cases computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from topr_kernels import (
    IS,
    TIS,
    TOPROutput,
    baseline_for_positive_share,
    effective_positive_share,
    topr_loss,
)
from topr_kernels.testing import make_batch

KEYS = {
    "objective",
    "reward_mean",
    "length_mean",
    "entropy",
    "positive_share",
    "effective_positive_share",
    "weight_negative_mean",
    "dead_share",
    "saturated_share",
    "ess_negative",
    "ess_negative_share",
    "kl_k1",
    "kl_k3",
    "weight_overflow",
    *(
        f"log_ratio_{s}_{m}"
        for s in ("positive", "negative")
        for m in ("mean", "std", "min", "max")
    ),
}


def uniform(
    token_log_ratios: list[list[float]], reward: list[float], summed: bool = False, **options: Any
) -> TOPROutput:
    """Sequences whose token log-ratios are given: pi is uniform over 4 tokens, mu makes the ratio."""
    length = max(map(len, token_log_ratios), default=0)
    labels = torch.full((len(reward), length), -100)
    mu = torch.zeros(len(reward), length, dtype=torch.float64)
    for s, ratios in enumerate(token_log_ratios):
        labels[s, : len(ratios)] = 1
        mu[s, : len(ratios)] = -math.log(4) - torch.tensor(ratios, dtype=torch.float64)
    logits = torch.zeros(*labels.shape, 4, dtype=torch.float64)
    return topr_loss(
        logits,
        labels,
        mu.sum(-1) if summed else mu,
        torch.tensor(reward, dtype=torch.float64),
        shift=False,
        **options,
    )


def values(out: TOPROutput) -> dict[str, float]:
    return {k: float(v) for k, v in out.metrics().items()}


def assert_nan(m: dict[str, float], *keys: str) -> None:
    assert [k for k in keys if not math.isnan(m[k])] == []


def test_keys_shapes_dtypes_and_no_gradient() -> None:
    batch = make_batch([(1, 3), (2, 4)], 7, dtype=torch.float32)
    batch.logits.requires_grad_()
    m = topr_loss(*batch).metrics()
    assert set(m) == KEYS
    assert all(v.shape == () and v.dtype == torch.float32 for v in m.values())
    assert not any(v.requires_grad for v in m.values())


def test_mixed_batch_by_hand() -> None:
    # Negatives at log-ratios -1 (two tokens) and +0.5; a positive at -2; one empty sequence.
    out = uniform(
        [[-0.5, -0.5], [0.5], [-1.0, -1.5, 0.5], []], [-1.0, -0.5, 2.0, 100.0], entropy=True
    )
    m = values(out)
    w, v = math.exp(-1), 1.0  # the second is truncated at 1
    above = 1 + 0.5  # value b (1 + log(x / b)) beyond b = 1
    below = 1 - 2.0  # value a (1 + log(x / a)) below a = 1
    expected = {
        "objective": (-1.0 * w / 2 - 0.5 * above / 1 + 2.0 * below / 3) / 3,
        "reward_mean": 0.5 / 3,
        "length_mean": 2.0,
        "entropy": math.log(4),
        "positive_share": 1 / 3,
        "effective_positive_share": 2.0 / 3.5,
        "weight_negative_mean": (w + v) / 2,
        "dead_share": 0.0,
        "saturated_share": 0.5,
        "ess_negative": (w + v) ** 2 / (w**2 + v**2),
        "ess_negative_share": (w + v) ** 2 / (w**2 + v**2) / 2,
        "kl_k1": 2.5 / 6,
        "kl_k3": sum(math.exp(d) - 1 - d for d in (-0.5, -0.5, 0.5, -1.0, -1.5, 0.5)) / 6,
        "weight_overflow": 0.0,
        "log_ratio_positive_mean": -2.0,
        "log_ratio_positive_std": 0.0,
        "log_ratio_positive_min": -2.0,
        "log_ratio_positive_max": -2.0,
        "log_ratio_negative_mean": -0.25,
        "log_ratio_negative_std": 0.75,
        "log_ratio_negative_min": -1.0,
        "log_ratio_negative_max": 0.5,
    }
    assert m == pytest.approx(expected, rel=1e-12)
    # With one sequence_mean over three sequences the objective is minus the loss.
    assert m["objective"] == pytest.approx(-out.loss.item())


def test_negatives_only() -> None:
    m = values(uniform([[-1.0], [-2.0]], [-1.0, -1.0]))
    assert m["positive_share"] == m["effective_positive_share"] == 0
    assert m["weight_negative_mean"] == pytest.approx((math.exp(-1) + math.exp(-2)) / 2)
    assert_nan(m, *(f"log_ratio_positive_{k}" for k in ("mean", "std", "min", "max")), "entropy")


def test_positives_only() -> None:
    m = values(uniform([[-1.0], [-2.0]], [1.0, 0.5]))
    assert m["positive_share"] == m["effective_positive_share"] == 1
    assert m["log_ratio_positive_std"] == pytest.approx(0.5)
    missing = ("weight_negative_mean", "dead_share", "saturated_share", "ess_negative")
    assert_nan(m, *missing, "ess_negative_share")
    assert_nan(m, *(f"log_ratio_negative_{k}" for k in ("mean", "std", "min", "max")))


def test_reward_zero_is_neither_positive_nor_negative() -> None:
    m = values(uniform([[-1.0], [3.0], [-math.inf]], [1.0, 0.0, 0.0]))
    assert m["positive_share"] == pytest.approx(1 / 3)
    assert m["effective_positive_share"] == 1
    assert m["objective"] == pytest.approx((1 - 1.0) / 3, abs=1e-12)
    assert m["log_ratio_positive_max"] == pytest.approx(-1)
    assert_nan(m, "weight_negative_mean")


@pytest.mark.parametrize("ratios", [[], [[], []]])
def test_empty_batch(ratios: list[list[float]]) -> None:
    m = values(uniform(ratios, [1.0] * len(ratios)))
    assert m.pop("weight_overflow") == 0
    assert_nan(m, *m)


def test_dead_and_saturated_negatives() -> None:
    edge = math.log(1e-6)
    m = values(uniform([[edge - 0.01], [edge + 0.01], [0.0], [2.0], [5.0]], [-1.0] * 4 + [1.0]))
    assert m["dead_share"] == 0.25
    assert m["saturated_share"] == 0.5
    # Positives have weight 1 in TOPR and count in neither.
    assert m["ess_negative"] == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("log_ratio", [0.0, -10.0, -60.0, -80.0])
def test_effective_sample_size_does_not_depend_on_the_scale(log_ratio: float) -> None:
    """Equal weights are all effective, also when their squares underflow fp32 (long negatives)."""
    logits, labels = torch.zeros(3, 1, 4), torch.ones(3, 1, dtype=torch.int64)
    mu = torch.full((3, 1), -math.log(4) - log_ratio)
    m = topr_loss(logits, labels, mu, -torch.ones(3), shift=False).metrics()
    assert m["weight_negative_mean"] > 0
    assert m["ess_negative"].item() == pytest.approx(3, rel=1e-5)
    assert m["ess_negative_share"].item() == pytest.approx(1, rel=1e-5)


def test_effective_sample_size_of_one_dominant_negative() -> None:
    m = values(uniform([[-30.0], [-40.0], [-0.5]], [-1.0] * 3))
    assert m["ess_negative"] == pytest.approx(1)
    assert m["ess_negative_share"] == pytest.approx(1 / 3)


def test_kl_estimates_are_those_of_samples_from_mu() -> None:
    batch = make_batch([(2, 30), (1, 40), (3, 20)], 50)
    out = topr_loss(*batch)
    scored = batch.labels != -100
    log_pi = torch.zeros_like(batch.behavior_log_prob)
    rows = batch.logits.log_softmax(-1)[:, :-1]
    log_pi[:, 1:] = rows.gather(-1, batch.labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    d = (log_pi - batch.behavior_log_prob)[scored]
    m = values(out)
    assert m["kl_k1"] == pytest.approx(-d.mean().item())
    assert m["kl_k3"] == pytest.approx((d.exp() - 1 - d).mean().item())
    assert m["kl_k3"] > 0


def test_kl_with_summed_behavior_log_prob() -> None:
    token = values(uniform([[-0.5, -0.5], [0.5]], [1.0, -1.0]))
    summed = values(uniform([[-0.5, -0.5], [0.5]], [1.0, -1.0], summed=True))
    assert_nan(summed, "kl_k3")
    assert summed["kl_k1"] == pytest.approx(token["kl_k1"]) == pytest.approx(0.5 / 3)


def test_kl_is_kept_when_a_sequence_is_empty() -> None:
    m = values(uniform([[-0.5], []], [1.0, -1.0]))
    assert m["kl_k1"] == pytest.approx(0.5)
    assert m["kl_k3"] == pytest.approx(math.exp(-0.5) - 0.5)


@pytest.mark.parametrize(
    ("ratio", "weight"), [("geometric", math.exp(-1)), ("token", 0.5 + 0.5e-2)]
)
def test_weights_of_the_other_ratio_levels(ratio: str, weight: float) -> None:
    tokens = [-2.0, 0.0] if ratio == "geometric" else [math.log(1e-2), 3.0]
    m = values(uniform([tokens], [-1.0], ratio=ratio))
    assert m["weight_negative_mean"] == pytest.approx(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overflowing_weights_are_counted(dtype: torch.dtype) -> None:
    """IS above 88.7 nats in fp32; finite limits never overflow."""
    logits, labels = torch.zeros(3, 1, 4, dtype=dtype), torch.ones(3, 1, dtype=torch.int64)
    mu = torch.tensor([[-200.0], [-1000.0], [-2.0]]).to(dtype)
    reward = torch.tensor([1.0, -1.0, 1.0])
    unlimited = topr_loss(logits, labels, mu, reward, shift=False, limits=IS).metrics()
    assert unlimited["weight_overflow"].item() == (2 if dtype == torch.float32 else 1)
    limited = topr_loss(logits, labels, mu, reward, shift=False, limits=TIS).metrics()
    assert limited["weight_overflow"].item() == 0


def rewards(positives: int, total: int) -> Tensor:
    return torch.tensor([1.0] * positives + [-1.0] * (total - positives), dtype=torch.float64)


@pytest.mark.parametrize("positives", [1, 3, 5, 9])
@pytest.mark.parametrize("baseline", [-1.0, -0.6, 0.0, 0.35, 0.9])
def test_effective_positive_share_is_equation_7(positives: int, baseline: float) -> None:
    out = uniform([[-0.1]] * 10, rewards(positives, 10).tolist(), baseline=baseline)
    p = positives / 10
    share = p * (1 - baseline) / (1 + (1 - 2 * p) * baseline)
    m = values(out)
    assert m["effective_positive_share"] == pytest.approx(share)
    assert effective_positive_share(p, baseline) == pytest.approx(share)
    assert m["positive_share"] == pytest.approx(p)
    assert m["reward_mean"] == pytest.approx(2 * p - 1 - baseline)


@pytest.mark.parametrize("share", [0.01, 0.08, 0.5, 0.97])
@pytest.mark.parametrize("target", [0.0, 0.1, 0.2, 0.5, 0.75, 1.0])
def test_baseline_and_positive_share_are_inverse(share: float, target: float) -> None:
    baseline = baseline_for_positive_share(share, target)
    assert -1 <= baseline <= 1
    assert effective_positive_share(share, baseline) == pytest.approx(target, abs=1e-12)


def test_baselines_by_hand() -> None:
    assert baseline_for_positive_share(0.5, 0.1) == pytest.approx(0.8)
    assert baseline_for_positive_share(0.2, 0.2) == 0
    assert baseline_for_positive_share(0.2, 1.0) == -1
    assert baseline_for_positive_share(0.2, 0.0) == 1
    assert effective_positive_share(0.5, 0.8) == pytest.approx(0.1)


def test_nan_of_one_sequence_is_seen() -> None:
    """A broken sequence shows in the figures that include it."""
    m = values(uniform([[math.nan], [-1.0]], [-1.0, 1.0]))
    assert_nan(m, "objective", "weight_negative_mean", "kl_k1", "log_ratio_negative_min")
    assert m["log_ratio_positive_mean"] == pytest.approx(-1)
