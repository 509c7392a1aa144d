"""A custom taper in the place of limits: three methods of the field against plain torch."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import golden
import pytest
import torch
from levels import PATHS, a_trajectory, assert_same, by_head, by_logits, some_segments, trained
from torch import Tensor

from topr_kernels import PRESETS, TIS, TOPRLoss, linear_topr_loss, topr_loss
from topr_kernels.limits import Taper
from topr_kernels.ops import linear as linear_ops
from topr_kernels.taper import taper
from topr_kernels.testing import LinearBatch, check_taper

RATIOS = ["sequence", "geometric", "token", "segment", "segment_geometric"]

# ---- the methods -----------------------------------------------------------------------------------


def vespo(log_ratio: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """VESPO (2602.10693), gamma weight w^k e^(lambda (1 - w)), with its antiderivative in log w."""
    k, rate = (
        torch.where(positive, 2.0, 3.0).to(log_ratio),
        torch.where(positive, 3.0, 2.0).to(log_ratio),
    )
    w = log_ratio.exp()
    weight = torch.exp(rate + k * log_ratio - rate * w)
    scale = torch.exp(rate + torch.lgamma(k) - k * rate.log())
    return scale * torch.special.gammainc(k, rate * w), weight


def band(log_ratio: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """IcePop's mask: the ratio inside of a band, nothing outside; its objective goes on, constant."""
    ratio = log_ratio.exp()
    return ratio.clamp(0.5, 2.0), torch.where((ratio > 0.5) & (ratio < 2.0), ratio, 0.0)


def balanced(reward: Tensor, target: float = 0.5) -> Taper:
    """In the manner of BAPO (2510.18927): the upper limit of positives rises until they weigh enough."""
    gain, loss = reward.clamp(min=0).sum(), reward.clamp(max=0).abs().sum()
    steps = [1 + i / 10 for i in range(21)]
    high = next((x for x in steps if gain * x >= target * (gain * x + loss)), steps[-1])

    def moved(log_ratio: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.full_like(log_ratio, math.log(0.8)).where(positive, -math.inf)
        return taper(
            log_ratio, low, torch.full_like(log_ratio, math.log(high)).where(positive, 0.0)
        )

    return moved


def methods(batch: LinearBatch) -> dict[str, tuple[Taper, Callable[[Tensor, Tensor], Tensor]]]:
    """Each method: its taper here, and its weight as its authors write it, of ratio and sign."""

    def gamma(w: Tensor, positive: Tensor) -> Tensor:
        k, rate = (2, 3) if positive else (3, 2)
        return math.exp(rate) * w**k * torch.exp(-rate * w)

    def masked(w: Tensor, positive: Tensor) -> Tensor:
        return w * ((w > 0.5) & (w < 2.0))

    def clipped(w: Tensor, positive: Tensor) -> Tensor:
        # The rewards of the batch are 1, -1, 0.5, -0.25, -2: 1.5 high >= 3.25 at high = 2.2.
        return w.clamp(0.8, 2.2) if positive else w.clamp(max=1.0)

    bapo = balanced(batch.reward)
    return {"vespo": (vespo, gamma), "band": (band, masked), "balanced": (bapo, clipped)}


def surrogate(
    batch: LinearBatch, weight: Callable[..., Tensor], ratio: str, segments: Tensor
) -> tuple[Tensor, Tensor]:
    """-(1 / B) sum_s R / |y| sum_t sg(w) log pi in plain torch; -> (gradient, mean weights)."""
    hidden = batch.hidden.detach().requires_grad_()
    log_probs = (hidden @ batch.weight.T).log_softmax(-1)
    parts, weights = [], []
    for s, y in enumerate(batch.labels):
        scored = [t for t in range(1, len(y)) if y[t] != -100]
        if not scored:
            weights.append(torch.zeros((), dtype=hidden.dtype))
            continue
        log_pi = torch.stack([log_probs[s, t - 1, y[t]] for t in scored])
        d = (log_pi - batch.behavior_log_prob[s, scored]).detach()
        groups = [[0]]
        for i in range(1, len(scored)):
            t = scored[i]
            near = scored[i - 1] == t - 1 and segments[s, t] == segments[s, t - 1]
            joined = near if ratio.startswith("segment") else ratio != "token"
            if joined:
                groups[-1].append(i)
            else:
                groups.append([i])
        w = torch.zeros_like(d)
        for group in groups:
            x = d[group].mean() if ratio.endswith("geometric") else d[group].sum()
            w[group] = weight(x.exp(), batch.reward[s] >= 0)
        parts.append(batch.reward[s] * (w * log_pi).mean())
        weights.append(w.mean())
    loss = -torch.stack(parts).mean()
    return torch.autograd.grad(loss, hidden)[0], torch.stack(weights)


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", ["vespo", "band", "balanced"])
def test_equals_the_method_in_plain_torch(method: str, ratio: str, impl: str) -> None:
    batch = a_trajectory()
    segments = some_segments(batch)
    own, weight = methods(batch)[method]
    kw: dict[str, Any] = {"limits": own, "ratio": ratio, "impl": impl}
    if ratio.startswith("segment"):
        kw["segments"] = segments
    expected, weights = surrogate(batch, weight, ratio, segments)
    assert expected.abs().max() > 1e-3
    d_weights = []
    for path, call in PATHS.items():
        here = trained(batch)
        out, d = call(here, **dict(kw))
        d_weights.append(here.weight.grad)
        torch.testing.assert_close(d, expected, rtol=1e-10, atol=1e-13, msg=path)
        torch.testing.assert_close(out.weight, weights, rtol=1e-10, atol=1e-13, msg=path)
        assert out.loss.isfinite()
    for other in d_weights[1:]:
        torch.testing.assert_close(other, d_weights[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradcheck(ratio: str) -> None:
    batch = a_trajectory()
    hidden = batch.hidden.detach().requires_grad_()

    def of_logits(x: Tensor) -> Tensor:
        return topr_loss(x @ batch.weight.T, *batch[2:], limits=vespo, ratio=ratio).loss

    def of_head(x: Tensor) -> Tensor:
        return linear_topr_loss(x, *batch[1:], limits=vespo, ratio=ratio).loss

    for loss in (of_logits, of_head):
        assert torch.autograd.gradcheck(loss, hidden, fast_mode=True)


# ---- what it may do --------------------------------------------------------------------------------


def as_callable(preset: str) -> Taper:
    pos_min, pos_max, neg_min, neg_max = PRESETS[preset].log()

    def own(log_ratio: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.where(positive, pos_min, neg_min).to(log_ratio)
        return taper(log_ratio, low, torch.where(positive, pos_max, neg_max).to(log_ratio))

    return own


@pytest.mark.parametrize(("preset", "reward", "log_ratio", "value", "weight"), golden.cases())
def test_golden_table(
    preset: str, reward: float, log_ratio: float, value: float, weight: float
) -> None:
    logits = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    mu = torch.tensor([[math.log(0.5) - log_ratio]], dtype=torch.float64)
    for ratio in RATIOS:
        label, given = torch.tensor([[1]]), torch.tensor([reward])
        kw: dict[str, Any] = {"limits": as_callable(preset), "ratio": ratio, "shift": False}
        out = topr_loss(logits, label, mu, given, **kw)
        assert out.objective.item() == pytest.approx(value, rel=1e-11, nan_ok=True)
        assert out.weight.item() == pytest.approx(weight, rel=1e-11, nan_ok=True)
        assert out.loss.item() == pytest.approx(-reward * value, rel=1e-11, nan_ok=True)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("path", PATHS)
def test_limits_as_a_callable_are_the_limits(path: str, ratio: str) -> None:
    batch = a_trajectory()
    weight = torch.tensor([2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64)
    kw: dict[str, Any] = {"ratio": ratio, "baseline": 0.1, "reduction": "token_mean"}
    kw |= {"sequence_weight": weight}
    found = PATHS[path](batch, limits=as_callable("tis"), **kw)
    assert_same(found, PATHS[path](batch, limits=TIS, **kw), rtol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_ratio_is_no_finite_weight(path: str) -> None:
    batch = a_trajectory()
    batch.behavior_log_prob[1, 2] = torch.nan
    out, _ = PATHS[path](batch, limits=lambda x, _: (torch.ones_like(x), torch.ones_like(x)))
    assert out.loss.isnan() and out.weight[1].isnan() and out.weight[0] == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (lambda x, _: x, TypeError, "returned Tensor; expected two tensors"),
        (lambda x, _: (x, 1.0), TypeError, "the weight of .* is float; expected a floating tensor"),
        (lambda x, p: (x, p), TypeError, "is torch.bool; expected a floating tensor"),
        (lambda x, _: (x.sum(), x), ValueError, "the objective of .* has shape"),
    ],
)
def test_refuses_what_is_no_taper(path: str, own: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"limits: .*{message}"):
        PATHS[path](a_trajectory(), limits=own)


def test_refuses_what_cannot_be_called() -> None:
    for wrong in ("topr", 1.0, dict, None):
        with pytest.raises(TypeError, match=r"limits: expected a .*Limits"):
            TOPRLoss(limits=wrong)
    assert TOPRLoss(limits=vespo).options["limits"] is vespo
    with pytest.raises(ValueError, match="inplace: got True"):
        by_logits(a_trajectory(), limits=vespo, inplace=True)
    known = torch.tensor([False, True, True, True, True])
    with pytest.raises(ValueError, match=r"sequence 0 .* but limits is a callable, .*pass Limits"):
        by_logits(a_trajectory(), limits=vespo, behavior_known=known)


def test_it_lives_as_long_as_the_graph() -> None:
    """A second backward calls it again; afterwards nothing here holds it."""
    batch, before = a_trajectory(), len(linear_ops._LENT)
    hidden = batch.hidden.detach().requires_grad_()

    class Own:
        def __call__(self, x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
            return band(x, positive)

    out = linear_topr_loss(hidden, *batch[1:], limits=Own())
    (first,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    gc.collect()
    (second,) = torch.autograd.grad(out.loss, hidden)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    del out
    gc.collect()
    assert len(linear_ops._LENT) == before


def test_in_half_precision_and_through_every_kernel() -> None:
    batch = a_trajectory(dtype=torch.bfloat16)
    outs = [by_logits(batch, limits=vespo, impl=impl)[0] for impl in ("torch", "native", "triton")]
    outs.append(by_head(batch, limits=vespo)[0])
    for out in outs:
        assert out.weight.dtype == torch.float32 and out.loss.isfinite()
        torch.testing.assert_close(out.weight, outs[0].weight, rtol=0.1, atol=1e-3)


def test_compiles_on_logits_and_says_so_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = a_trajectory(dtype=torch.float32)

    def loss(x: Tensor) -> Tensor:
        return topr_loss(x @ batch.weight.T, *batch[2:], limits=band, ratio="geometric").loss

    losses = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden = batch.hidden.detach().requires_grad_()
        out = f(hidden)
        losses.append((out.detach(), torch.autograd.grad(out, hidden)[0]))
    torch.testing.assert_close(losses[0], losses[1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="cannot be part of a compiled graph"):
        by_head(batch, limits=band)


# ---- check_taper -----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [vespo, band, balanced(torch.tensor([1.0, -1.0]))])
def test_the_weights_are_the_slopes(own: Taper) -> None:
    assert check_taper(own) is None


@pytest.mark.parametrize("preset", list(PRESETS))
def test_so_are_those_of_the_limits(preset: str) -> None:
    assert check_taper(as_callable(preset)) is None


def test_says_where_a_weight_is_no_slope() -> None:
    def switched_off(x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        _, weight = band(x, positive)
        return weight, weight

    def constant(x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.where(positive, x.clamp(max=0.0).exp(), 1.0)
        return torch.where(positive, 1.0, x), weight

    message = check_taper(switched_off)
    assert message is not None and "makes it jump" in message
    assert "near a log-ratio of 0.69" in message or "near a log-ratio of -0.69" in message
    message = check_taper(constant)
    assert message is not None and "of a positive sequence" in message
    assert "the slope of the objective 0" in message


def test_refuses_what_depends_on_the_batch() -> None:
    def by_share(x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.ones_like(x) * positive.float().mean()
        return weight * x, weight

    with pytest.raises(ValueError, match="depends on the others of a batch"):
        check_taper(by_share)
