"""The TOPR loss of log-probs that a loop has made already."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from topr_kernels import IS, SFT, TIS, TOPR, log_prob, topr_loss, topr_loss_from_log_prob
from topr_kernels.output import TOPROutput


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    b, t, v = 6, 9, 13
    logits = torch.randn(b, t, v, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v, (b, t))
    labels[:, :2] = -100
    labels[2, 5:] = -100
    labels[4] = -100
    mu = torch.randn(b, t, dtype=dtype) - 2.5
    reward = torch.tensor([1.0, -1.0, -0.5, 0.0, 1.0, -2.0], dtype=dtype)
    return logits, labels, mu, reward


@pytest.mark.parametrize("limits", [TOPR, TIS, IS, SFT], ids=["TOPR", "TIS", "IS", "SFT"])
@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_equals_the_loss_of_the_logits(limits: Any, ratio: str, reduction: str, layout: str):
    logits, labels, mu, reward = batch()
    options = {"limits": limits, "ratio": ratio, "reduction": reduction, "baseline": 0.25}
    expected = topr_loss(logits, labels, mu, reward, **options)
    (d_expected,) = torch.autograd.grad(3 * expected.loss, logits)
    token, mask = log_prob(logits, labels).log_prob, labels != -100
    if layout == "packed":
        token, mask, mu = (x.reshape(-1) for x in (token, mask, mu))
        options["cu_seqlens"] = torch.arange(7, dtype=torch.int32) * labels.shape[1]
    found = topr_loss_from_log_prob(token, mask, mu, reward, **options)
    (d_found,) = torch.autograd.grad(3 * found.loss, logits)
    assert expected.loss != 0 and d_expected.abs().max() > 0.01
    torch.testing.assert_close(d_found, d_expected, rtol=1e-12, atol=1e-14)
    for name in TOPROutput._fields:
        if name in ("entropy", "active_share", "left_out"):
            continue
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-12, atol=1e-12, msg=name)
    assert {k: v for k, v in found.metrics().items() if not v.isnan()}


def test_gradcheck_with_its_own_objective():
    """Within a branch of the taper the value of Eq. 6 and its gradient agree."""
    _, labels, mu, reward = batch()
    token = (mu + 0.3 * torch.randn_like(mu)).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return topr_loss_from_log_prob(x, labels != -100, mu, reward, limits=IS).loss

    # IS has weight = ratio, so its objective is the ratio itself on both sides of 1.
    assert torch.autograd.gradcheck(loss, token)


def test_the_ratio_keeps_the_digits_of_mu():
    """log pi - log mu in fp64, whatever log pi is in."""
    token, mask = torch.full((1, 2), -1.0), torch.ones(1, 2, dtype=torch.bool)
    mu = torch.full((1, 2), -1.0 - 1e-9, dtype=torch.float64)
    out = topr_loss_from_log_prob(token, mask, mu, torch.ones(1))
    assert out.log_ratio.item() == pytest.approx(2e-9, rel=1e-3)


def test_nothing_under_the_mask_is_read():
    """PITFALLS 18: NaN and infinities under 0 reach neither the loss nor the gradient."""
    _, labels, mu, reward = batch()
    mask = labels != -100
    token = torch.where(mask, mu + 0.1, torch.nan).requires_grad_()
    found = topr_loss_from_log_prob(token, mask, mu.masked_fill(~mask, torch.inf), reward)
    found.loss.backward()
    assert found.loss.isfinite() and token.grad.isfinite().all()
    assert (token.grad[~mask] == 0).all() and (token.grad[mask] != 0).any()


def test_an_impossible_token_teaches_nothing_on_a_negative():
    token = torch.tensor([[-torch.inf, -1.0], [-2.0, -1.0]], requires_grad=True)
    mu, reward = torch.full((2, 2), -1.5), torch.tensor([-1.0, 1.0])
    found = topr_loss_from_log_prob(token, torch.ones(2, 2), mu, reward)
    (found.loss * torch.inf).backward()
    assert found.loss.isfinite() and found.weight[0] == 0
    assert (token.grad[0] == 0).all()


def test_summed_behavior_and_empty_batches():
    _, labels, mu, reward = batch()
    mask = labels != -100
    token = (mu + 0.2).requires_grad_()
    summed = torch.where(mask, mu, 0.0).sum(1)
    a = topr_loss_from_log_prob(token, mask, mu, reward)
    b = topr_loss_from_log_prob(token, mask, summed, reward)
    torch.testing.assert_close(a.loss, b.loss)
    nothing = topr_loss_from_log_prob(token, torch.zeros_like(mask), mu, reward)
    nothing.loss.backward()
    assert nothing.loss == 0 and (token.grad == 0).all()


def test_double_backward_raises():
    _, labels, mu, reward = batch()
    token = mu.clone().requires_grad_()
    out = topr_loss_from_log_prob(token, labels != -100, mu, reward)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(out.loss, token, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"log_prob": torch.zeros(2, 3).bfloat16()}, TypeError, "log_prob.*half precision"),
        ({"mask": torch.ones(2, 2)}, ValueError, r"mask: expected shape \(2, 3\)"),
        ({"log_prob": torch.zeros(6), "mask": torch.ones(6)}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "flatten the batch"),
        ({"reward": torch.tensor([1.0, torch.nan])}, ValueError, "reward: expected finite"),
        ({"behavior_log_prob": torch.zeros(2, 3, requires_grad=True)}, ValueError, "constant"),
        ({"ratio": "gspo"}, ValueError, "ratio"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], message: str):
    good = {
        "log_prob": torch.zeros(2, 3),
        "mask": torch.ones(2, 3),
        "behavior_log_prob": torch.zeros(2, 3),
        "reward": torch.ones(2),
    }
    with pytest.raises(error, match=message):
        topr_loss_from_log_prob(**{**good, **changes})
