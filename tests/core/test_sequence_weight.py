"""A weight per sequence: what it multiplies, what it leaves alone, and that it never changes a sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topr_kernels import (
    TIS,
    TOPR,
    TOPRLoss,
    TOPROutput,
    linear_topr_loss,
    log_prob,
    reference,
    topr_loss,
    topr_loss_from_log_prob,
)
from topr_kernels.testing import LinearBatch, make_linear_batch

LENGTHS = [(2, 4), (1, 6), (3, 0), (2, 1), (1, 3)]
REWARD = [1.0, -1.0, 0.5, -0.25, -2.0]
WEIGHT = [2.0, 0.5, 7.0, 0.0, 1.5]
RATIOS = ["sequence", "geometric", "token"]
Call = Callable[..., tuple[TOPROutput, Tensor]]


def a_batch(dtype: torch.dtype = torch.float64) -> LinearBatch:
    batch = make_linear_batch(LENGTHS, 13, 8, dtype=dtype, seed=4)
    return batch._replace(reward=torch.tensor(REWARD, dtype=batch.reward.dtype))


def by_logits(batch: LinearBatch, **kw: Any) -> tuple[TOPROutput, Tensor]:
    """The loss, and its gradient by the hidden states."""
    hidden = batch.hidden.detach().requires_grad_()
    out = topr_loss(hidden @ batch.weight.T, *batch[2:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


def by_head(batch: LinearBatch, **kw: Any) -> tuple[TOPROutput, Tensor]:
    hidden = batch.hidden.detach().requires_grad_()
    out = linear_topr_loss(hidden, *batch[1:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


def by_log_prob(batch: LinearBatch, **kw: Any) -> tuple[TOPROutput, Tensor]:
    hidden = batch.hidden.detach().requires_grad_()
    kw.pop("impl", None)
    scores = log_prob(hidden @ batch.weight.T, batch.labels, impl="torch")
    scored = (batch.labels != -100) & (torch.arange(batch.labels.shape[1]) > 0)
    out = topr_loss_from_log_prob(scores.log_prob, scored, *batch[3:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


def by_reference(batch: LinearBatch, **kw: Any) -> tuple[Any, Tensor]:
    hidden = batch.hidden.detach().requires_grad_()
    out = reference.topr_loss(hidden @ batch.weight.T, *batch[2:], **kw)
    return out, torch.autograd.grad(out.loss, hidden)[0]


PATHS: dict[str, Call] = {"logits": by_logits, "head": by_head, "log_prob": by_log_prob}


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum"])
def test_equals_the_reference(path: str, ratio: str, reduction: str, impl: str) -> None:
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    kw: dict[str, Any] = {"limits": TIS, "ratio": ratio, "reduction": reduction}
    out, grad = PATHS[path](a_batch(), sequence_weight=weight, impl=impl, **kw)
    expected, expected_grad = by_reference(a_batch(), sequence_weight=weight, **kw)
    plain, plain_grad = by_reference(a_batch(), **kw)
    assert (expected_grad - plain_grad).abs().max() > 1e-3
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)
    # What is reported of a sequence knows nothing of its weight, 0 included.
    torch.testing.assert_close(out.weight, plain.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.objective, plain.objective, rtol=1e-12, atol=1e-14)
    assert out.reward.tolist() == REWARD and out.sequence_weight.tolist() == WEIGHT


@pytest.mark.parametrize("path", PATHS)
@given(st.sampled_from(RATIOS), st.integers(0, 10**6))
def test_two_is_the_sequence_twice_under_one_normalizer(path: str, ratio: str, seed: int) -> None:
    batch = make_linear_batch([(2, 3), (1, 2)], 11, 4, seed=seed)
    kw: dict[str, Any] = {"ratio": ratio, "normalizer": 3.0, "limits": TIS}
    once, _ = PATHS[path](batch, sequence_weight=torch.tensor([1.0, 2.0]).double(), **kw)
    twice = [x if i == 1 else torch.cat([x, x[1:]]) for i, x in enumerate(batch)]
    out, _ = PATHS[path](LinearBatch(*twice), **kw)
    torch.testing.assert_close(once.loss, out.loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_refuses_a_weight_that_is_none(path: str, bad: float) -> None:
    weight = torch.ones(5, dtype=torch.float64)
    weight[3] = bad
    with pytest.raises(ValueError, match=r"sequence_weight: .* for sequence 3; a sign belongs to"):
        PATHS[path](a_batch(), sequence_weight=weight)


@pytest.mark.parametrize("path", PATHS)
def test_poisons_where_values_cannot_be_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topr_kernels.validation.values_readable", lambda *_: False)
    for bad in (-1.0, torch.nan, torch.inf):
        for reward in (1.0, 0.0):
            batch = a_batch()._replace(reward=torch.full((5,), reward, dtype=torch.float64))
            weight = torch.ones(5, dtype=torch.float64)
            weight[1] = bad
            out, grad = PATHS[path](batch, sequence_weight=weight)
            assert out.loss.isnan() and grad[1].isnan().any()


def test_checks_what_it_is_given() -> None:
    batch = a_batch()
    with pytest.raises(
        ValueError, match=r"sequence_weight: expected one per sequence, shape \(5,\)"
    ):
        by_logits(batch, sequence_weight=torch.ones(4))
    with pytest.raises(TypeError, match="sequence_weight: expected dtype"):
        by_logits(batch, sequence_weight=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequence_weight: requires grad"):
        by_logits(batch, sequence_weight=torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match="inplace: got True with sequence_weight"):
        by_logits(batch, sequence_weight=torch.ones(5), inplace=True)
    with pytest.raises(TypeError, match="unknown options"):
        TOPRLoss(sequence_weight=torch.ones(5))


def test_of_the_module_is_that_of_the_function() -> None:
    batch, weight = a_batch(), torch.tensor(WEIGHT, dtype=torch.float64)
    logits = batch.hidden @ batch.weight.T
    module = TOPRLoss(ratio="geometric")
    a = module(logits, *batch[2:], sequence_weight=weight)
    b = topr_loss(logits, *batch[2:], ratio="geometric", sequence_weight=weight)
    assert a.loss == b.loss != module(logits, *batch[2:]).loss


def test_in_the_metrics() -> None:
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    out, _ = by_logits(a_batch(), sequence_weight=weight, limits=TOPR)
    found, plain = out.metrics(), out._replace(sequence_weight=torch.ones(5).double()).metrics()
    counted = torch.tensor([True, True, False, True, True])
    v, r = weight[counted], out.reward[counted]
    values = v * r * out.objective[counted] / out.length[counted]
    torch.testing.assert_close(found["objective"], values.mean())
    torch.testing.assert_close(
        found["effective_positive_share"], (v * r).clamp(min=0).sum() / (v * r.abs()).sum()
    )
    w = (weight * out.weight)[out.reward < 0]
    torch.testing.assert_close(found["ess_negative"], w.sum() ** 2 / w.square().sum())
    moved = {"objective", "effective_positive_share", "ess_negative", "ess_negative_share"}
    for name, value in found.items():
        same = bool((value == plain[name]) | (value.isnan() & plain[name].isnan()))
        assert same == (name not in moved), name
