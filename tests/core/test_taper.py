"""The taper against Eq. 6 as printed, against its own slope, and on the golden table."""

from __future__ import annotations

import math

import golden
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topr_kernels import PRESETS, Limits, reference, topr_loss
from topr_kernels.taper import taper

limit = st.sampled_from([0.0, 1e-3, 0.3, 1.0, 2.5, math.inf])
pairs = st.tuples(limit, limit).filter(lambda p: p[0] <= p[1] and math.isfinite(p[0]))
log_ratios = st.floats(-60, 60)


def logs(a: float, b: float) -> tuple[float, float]:
    return Limits(a, b, a, b).log()[:2]


@given(log_ratios, pairs)
def test_value_and_weight_equal_the_printed_equations(x: float, ab: tuple[float, float]) -> None:
    a, b = ab
    log_x = torch.tensor(x, dtype=torch.float64)
    value, weight = taper(log_x, *logs(a, b))
    torch.testing.assert_close(value, reference.rho(log_x, a, b), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(weight, reference.clipped(log_x, a, b), rtol=1e-12, atol=1e-300)


@given(log_ratios, pairs)
def test_slope_in_log_x_is_the_weight(x: float, ab: tuple[float, float]) -> None:
    # d rho / d log x = x rho'(x) = [x]_a^b: the reason Eq. 6 has Eq. 3 as its gradient.
    a, b = ab
    log_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = reference.rho(log_x, a, b)
    slope = torch.autograd.grad(value, log_x)[0] if value.requires_grad else torch.zeros(())
    _, weight = taper(log_x.detach(), *logs(a, b))
    torch.testing.assert_close(weight, slope.double(), rtol=1e-12, atol=1e-300)


@given(log_ratios, pairs)
def test_taper_never_exceeds_the_ratio(x: float, ab: tuple[float, float]) -> None:
    a, b = ab
    log_x = torch.tensor(x, dtype=torch.float64)
    value, _ = taper(log_x, *logs(a, b))
    ratio = log_x.exp()
    assert value <= ratio * (1 + 1e-12)
    if a <= ratio <= b:
        torch.testing.assert_close(value, ratio)


@given(log_ratios, pairs)
def test_finite_limits_never_overflow_in_fp32(x: float, ab: tuple[float, float]) -> None:
    a, b = ab
    if math.isinf(b):
        return
    value, weight = taper(torch.tensor(x * 1e30), *logs(a, b))
    assert weight.isfinite() and not value.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("preset", "reward", "log_ratio", "value", "weight"), golden.cases())
def test_golden_table(
    preset: str, reward: float, log_ratio: float, value: float, weight: float, dtype: torch.dtype
) -> None:
    pos_min, pos_max, neg_min, neg_max = PRESETS[preset].log()
    bounds = (pos_min, pos_max) if reward > 0 else (neg_min, neg_max)
    got_value, got_weight = taper(torch.tensor(log_ratio, dtype=dtype), *bounds)
    eps = 4 * torch.finfo(dtype).eps
    close = dict(rel=eps, abs=0.0, nan_ok=True)
    assert got_value.item() == pytest.approx(value, **close)  # type: ignore[arg-type]
    assert got_weight.item() == pytest.approx(weight, **close)  # type: ignore[arg-type]


@pytest.mark.parametrize(("preset", "reward", "log_ratio", "value", "weight"), golden.cases())
def test_golden_table_through_the_loss(
    preset: str, reward: float, log_ratio: float, value: float, weight: float
) -> None:
    # One sequence of one token at probability 1/2; log mu puts its ratio where the table wants it.
    logits = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    mu = math.log(0.5) - log_ratio
    out = topr_loss(
        logits,
        torch.tensor([[1]]),
        torch.tensor([[mu]], dtype=torch.float64),
        torch.tensor([reward]),
        limits=PRESETS[preset],
        shift=False,
    )
    out.loss.backward()
    assert out.objective.item() == pytest.approx(value, rel=1e-11, nan_ok=True)
    assert out.weight.item() == pytest.approx(weight, rel=1e-11, nan_ok=True)
    assert out.loss.item() == pytest.approx(-reward * value, rel=1e-11, nan_ok=True)
    assert logits.grad is not None
    half = reward * weight * 0.5  # d log softmax of two equal logits
    assert logits.grad[0, 0].tolist() == pytest.approx([half, -half], rel=1e-11, nan_ok=True)


@pytest.mark.parametrize("log_ratio", [-math.inf, -1e4, 0.0, 1e4, math.inf])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_zero_reward_contributes_zero_by_selection(preset: str, log_ratio: float) -> None:
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    mu = torch.tensor([[math.log(0.5) - log_ratio]])
    out = topr_loss(
        logits,
        torch.tensor([[1]]),
        mu,
        torch.zeros(1),
        limits=PRESETS[preset],
        shift=False,
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad is not None and logits.grad.abs().sum() == 0
