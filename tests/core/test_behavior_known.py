"""Sequences without log mu: served where no limit reads it, refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from topr_kernels import (
    SFT,
    TIS,
    TOPR,
    TOPROutput,
    linear_topr_loss,
    log_prob,
    topr_loss,
    topr_loss_from_log_prob,
)
from topr_kernels.testing import Batch, make_batch, pack

LENGTHS = [(2, 4), (1, 6), (2, 3), (1, 2)]
KNOWN = torch.tensor([False, True, True, True])


def a_batch() -> Batch:
    reward = torch.tensor([1.0, -1.0, 0.5, -0.25], dtype=torch.float64)
    return make_batch(LENGTHS, 13, seed=2)._replace(reward=reward)


def run(batch: Batch, path: str, packed: bool, **kw: Any) -> tuple[TOPROutput, Tensor]:
    """A loss and its gradient by the logits; of ``head`` the head is the identity."""
    given: Any = batch
    if packed:
        *given, kw["cu_seqlens"] = pack(batch, LENGTHS)
    logits, labels, mu, reward = given
    leaf = logits.detach().requires_grad_()
    if path == "head":
        out = linear_topr_loss(leaf, torch.eye(13, dtype=leaf.dtype), labels, mu, reward, **kw)
    elif path == "logits":
        out = topr_loss(leaf, labels, mu, reward, **kw)
    else:
        token = log_prob(leaf, labels, cu_seqlens=kw.get("cu_seqlens")).log_prob
        out = topr_loss_from_log_prob(token, labels != -100, mu, reward, **kw)
    return out, torch.autograd.grad(out.loss, leaf)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
@pytest.mark.parametrize("path", ["logits", "head", "log_prob"])
def test_what_stands_for_it_is_not_read(path: str, ratio: str, packed: bool) -> None:
    batch = a_batch()
    expected, d_expected = run(batch, path, packed, ratio=ratio)
    for filler in (0.0, -3.0, torch.nan, torch.inf):
        mu = batch.behavior_log_prob.clone()
        mu[0] = filler
        unknown = batch._replace(behavior_log_prob=mu)
        out, d = run(unknown, path, packed, ratio=ratio, behavior_known=KNOWN)
        torch.testing.assert_close(d, d_expected, rtol=1e-12, atol=1e-14)
        assert out.weight[0] == 1 and out.log_ratio[0].isnan() and out.loss.isfinite()
        torch.testing.assert_close(out.weight[1:], expected.weight[1:])
        torch.testing.assert_close(out.log_ratio[1:], expected.log_ratio[1:])
        assert out.token_log_ratio.isfinite().all() and out.token_log_ratio.abs().sum() > 0


def test_summed_per_sequence() -> None:
    batch = a_batch()._replace(behavior_log_prob=torch.tensor([torch.nan, -3.0, -2.0, -4.0]))
    out, d = run(batch, "logits", False, behavior_known=KNOWN)
    assert d.isfinite().all() and out.weight[0] == 1 and out.log_ratio[0].isnan()


def test_its_value_has_the_gradient_as_its_slope() -> None:
    batch = a_batch()
    known = torch.tensor([False, True, False, True])
    logits = batch.logits.detach().requires_grad_()
    torch.autograd.gradcheck(
        lambda x: topr_loss(x, *batch[1:], behavior_known=known).loss, logits, fast_mode=True
    )


@pytest.mark.parametrize("path", ["logits", "head", "log_prob"])
def test_refused_where_a_weight_depends_on_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    negative = torch.tensor([True, True, True, False])
    refused = [(TOPR, negative), (TIS, KNOWN)]
    for limits, known in refused:
        with pytest.raises(
            ValueError,
            match=r"behavior_known: got False for sequence [03] of reward \S+ \(baseline",
        ):
            run(a_batch(), path, False, limits=limits, behavior_known=known)
    assert run(a_batch(), path, False, limits=SFT, behavior_known=negative)[0].loss.isfinite()
    # Where values cannot be read the loss is NaN.
    monkeypatch.setattr("topr_kernels.validation.values_readable", lambda *_: False)
    for limits, known in refused:
        assert run(a_batch(), path, False, limits=limits, behavior_known=known)[0].loss.isnan()


def test_a_nan_of_a_known_log_mu_still_reaches_the_loss() -> None:
    batch = a_batch()
    mu = batch.behavior_log_prob.clone()
    mu[2, 3] = torch.nan
    assert run(batch._replace(behavior_log_prob=mu), "logits", False, behavior_known=KNOWN)[
        0
    ].loss.isnan()


def test_metrics_are_of_the_known() -> None:
    batch = a_batch()
    out, _ = run(batch, "logits", False, behavior_known=KNOWN)
    rest, _ = run(Batch(*(x[1:] for x in batch)), "logits", False)
    found, expected = out.metrics(), rest.metrics()
    for name in found:
        if name.startswith(("kl_", "log_ratio_", "weight_", "ess_")):
            torch.testing.assert_close(found[name], expected[name], equal_nan=True)
    assert found["positive_share"] == 0.5 and not found["objective"].isnan()


def test_checks_what_it_is_given() -> None:
    with pytest.raises(TypeError, match="behavior_known: expected dtype bool"):
        run(a_batch(), "logits", False, behavior_known=torch.ones(4))
    with pytest.raises(
        ValueError, match=r"behavior_known: expected one per sequence, shape \(4,\)"
    ):
        run(a_batch(), "logits", False, behavior_known=KNOWN[:2])
