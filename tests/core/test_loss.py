"""The loss and its gradient against the reference, and the invariances that must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topr_kernels import (
    IS,
    PRESETS,
    REINFORCE,
    SFT,
    TIS,
    TOPR,
    Limits,
    linear_topr_loss,
    log_prob,
    reference,
    topr_loss,
)
from topr_kernels.testing import Batch, assert_within_budget, make_batch, pack

RATIOS = ["sequence", "geometric", "token"]
REDUCTIONS = ["sequence_mean", "token_mean", "sum"]

lengths_strategy = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=4
).filter(lambda ls: sum(c for _, c in ls) > 0)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "limits": PRESETS[draw(st.sampled_from(list(PRESETS)))]
        if draw(st.booleans())
        else Limits(0.2, 1.7, 0.05, 0.9),
        "ratio": draw(st.sampled_from(RATIOS)),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "baseline": draw(st.sampled_from([0.0, -0.5, 0.3])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "softcap": draw(st.sampled_from([None, 4.0])),
    }


def loss_and_grad(batch: Batch, **kw: Any) -> tuple[Any, Tensor]:
    logits = batch.logits.detach().requires_grad_()
    out = topr_loss(logits, *batch[1:], **kw)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


def reference_and_grad(batch: Batch, **kw: Any) -> tuple[Any, Tensor]:
    logits = batch.logits.detach().requires_grad_()
    out = reference.topr_loss(logits, *batch[1:], **kw)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


@given(lengths_strategy, options(), st.integers(0, 10**6))
def test_fp64_equals_the_reference(
    lengths: list[tuple[int, int]], kw: dict[str, Any], seed: int
) -> None:
    batch = make_batch(lengths, 13, seed=seed)
    out, grad = loss_and_grad(batch, **kw)
    ref, ref_grad = reference_and_grad(batch, **kw)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(out.loss, ref.loss, **close)
    torch.testing.assert_close(out.log_ratio, ref.log_ratio, **close)
    torch.testing.assert_close(out.weight, ref.weight, **close)
    torch.testing.assert_close(out.objective, ref.objective, **close)
    torch.testing.assert_close(grad, ref_grad, **close)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_preset_ratio_and_reduction(preset: str, ratio: str, reduction: str) -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 0), (2, 1)], 17, seed=3)
    batch = batch._replace(reward=torch.tensor([1.0, -1.0, 0.5, -0.25], dtype=torch.float64))
    kw: dict[str, Any] = {"limits": PRESETS[preset], "ratio": ratio, "reduction": reduction}
    out, grad = loss_and_grad(batch, **kw)
    ref, ref_grad = reference_and_grad(batch, **kw)
    assert ref_grad.abs().max() > 1e-6  # parity of zeros proves nothing
    torch.testing.assert_close(out.loss, ref.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, ref_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 10**6), kw=options())
def test_lower_precision_stays_within_the_budget_of_plain_torch(
    dtype: torch.dtype, seed: int, kw: dict[str, Any]
) -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 2)], 29, dtype=dtype, seed=seed)
    exact = Batch(*(x.double() if x.is_floating_point() else x for x in batch))
    out, grad = loss_and_grad(batch, **kw)
    ref, ref_grad = reference_and_grad(exact, **kw)
    # Plain torch at its best: fp32 logits, autograd back to the dtype of the input.
    logits = batch.logits.detach().requires_grad_()
    plain = reference.topr_loss(logits.float(), *batch[1:], **kw)
    plain.loss.backward()
    assert logits.grad is not None
    assert out.loss.dtype == torch.float32 and grad.dtype == dtype
    nats = out.log_prob.abs().max().item()
    assert_within_budget("log_ratio", out.log_ratio, plain.log_ratio, ref.log_ratio, operand=nats)
    # A rounding of the log-ratio is a relative error of everything that hangs on the weight.
    for name, got, torch_got, exact_got in (
        ("weight", out.weight, plain.weight, ref.weight),
        ("gradient", grad, logits.grad, ref_grad),
    ):
        operand = nats * exact_got.abs().max().item()
        assert_within_budget(name, got, torch_got, exact_got, operand=operand)
    # The loss is a signed sum: its terms may be far larger than what is left of them.
    per_token = {"sequence_mean": out.length, "token_mean": out.length.sum(), "sum": 1}
    terms = (out.reward * ref.objective / per_token[kw["reduction"]]).abs().sum().item()
    assert_within_budget("loss", out.loss, plain.loss, ref.loss, operand=nats * terms)


@given(lengths_strategy, options(), st.integers(0, 10**6))
def test_packed_equals_padded(
    lengths: list[tuple[int, int]], kw: dict[str, Any], seed: int
) -> None:
    batch = make_batch(lengths, 13, padding=2, seed=seed)
    packed = pack(batch, lengths)
    out, grad = loss_and_grad(batch, **kw)
    for logits in (packed.logits, packed.logits.unsqueeze(0)):
        lead = logits.shape[:-1]
        flat = logits.detach().requires_grad_()
        got = topr_loss(
            flat,
            packed.labels.view(lead),
            packed.behavior_log_prob.view(lead),
            packed.reward,
            cu_seqlens=packed.cu_seqlens,
            **kw,
        )
        got.loss.backward()
        assert flat.grad is not None
        assert got.log_prob.shape == lead
        assert torch.equal(got.log_ratio, out.log_ratio)
        torch.testing.assert_close(got.loss, out.loss, rtol=1e-13, atol=1e-15)
        rows = torch.cat([grad[i, : p + c] for i, (p, c) in enumerate(lengths)])
        torch.testing.assert_close(flat.grad.view_as(rows), rows, rtol=1e-13, atol=1e-15)


@given(options(), st.integers(0, 10**6), st.sampled_from([torch.float64, torch.float32]))
def test_padding_does_not_matter(kw: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
    lengths = [(2, 4), (1, 6), (3, 0)]
    short = make_batch(lengths, 13, seed=seed, dtype=dtype)
    t = short.labels.shape[1]

    def pad(x: Tensor, fill: float) -> Tensor:
        out = torch.full((x.shape[0], t + 5, *x.shape[2:]), fill, dtype=x.dtype)
        out[:, :t] = x
        return out

    long = Batch(
        pad(short.logits, torch.nan),
        pad(short.labels, -100),
        pad(short.behavior_log_prob, torch.nan),
        short.reward,
    )
    a, a_grad = loss_and_grad(short, **kw)
    b, b_grad = loss_and_grad(long, **kw)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.log_ratio, b.log_ratio)
    assert torch.equal(a_grad, b_grad[:, :t])
    assert b_grad[:, t:].abs().sum() == 0


@given(options(), st.permutations(range(5)), st.integers(0, 10**6))
def test_order_of_sequences_does_not_matter(
    kw: dict[str, Any], order: list[int], seed: int
) -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 0), (2, 2), (1, 1)], 11, seed=seed)
    a, a_grad = loss_and_grad(batch, **kw)
    b, b_grad = loss_and_grad(Batch(*(x[order] for x in batch)), **kw)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-13, atol=1e-15)
    assert torch.equal(a.weight[order], b.weight)
    assert torch.equal(a_grad[order], b_grad)


@given(options(), st.integers(1, 3), st.integers(0, 10**6))
def test_batch_split_with_normalizer_is_exact(kw: dict[str, Any], cut: int, seed: int) -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 0), (2, 2)], 11, seed=seed)
    whole, whole_grad = loss_and_grad(batch, **kw)
    counted = int((whole.length > 0).sum())
    normalizer = {"sequence_mean": counted, "token_mean": int(whole.length.sum()), "sum": None}
    kw = kw | {"normalizer": normalizer[kw["reduction"]]}
    parts = [
        loss_and_grad(Batch(*(x[s] for x in batch)), **kw) for s in (slice(cut), slice(cut, 4))
    ]
    torch.testing.assert_close(sum(p[0].loss for p in parts), whole.loss, rtol=1e-12, atol=1e-14)
    grads = torch.cat([p[1] for p in parts])
    torch.testing.assert_close(grads, whole_grad, rtol=1e-12, atol=1e-14)
    if kw["normalizer"] is not None:
        kw["normalizer"] = torch.tensor(kw["normalizer"])
        again, _ = loss_and_grad(batch, **kw)
        torch.testing.assert_close(again.loss, whole.loss, rtol=1e-12, atol=1e-14)


@given(st.floats(-50, 50), st.sampled_from(RATIOS), st.integers(0, 10**6))
def test_constant_logit_offset_does_not_matter(offset: float, ratio: str, seed: int) -> None:
    batch = make_batch([(2, 4), (1, 6)], 11, seed=seed)
    a, a_grad = loss_and_grad(batch, ratio=ratio)
    b, b_grad = loss_and_grad(batch._replace(logits=batch.logits + offset), ratio=ratio)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(a_grad, b_grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ratio", RATIOS)
def test_summed_behavior_log_prob_equals_per_token(ratio: str) -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 0)], 11, seed=5)
    summed = batch._replace(behavior_log_prob=batch.behavior_log_prob.sum(1))
    if ratio == "token":
        with pytest.raises(ValueError, match="behavior_log_prob"):
            loss_and_grad(summed, ratio=ratio)
        return
    a, a_grad = loss_and_grad(batch, ratio=ratio)
    b, b_grad = loss_and_grad(summed, ratio=ratio)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a_grad, b_grad, rtol=1e-12, atol=1e-14)
    assert b.token_log_ratio.isnan().all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_every_preset_but_sft_has_reinforce_gradient(ratio: str) -> None:
    batch = make_batch([(2, 4), (1, 6)], 11, drift=0.0, seed=1)
    batch = batch._replace(reward=torch.tensor([1.0, -1.0], dtype=torch.float64))
    _, expected = loss_and_grad(batch, limits=REINFORCE, ratio=ratio)
    for limits in (TOPR, TIS, IS):
        out, grad = loss_and_grad(batch, limits=limits, ratio=ratio)
        torch.testing.assert_close(out.weight, torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    _, sft = loss_and_grad(batch, limits=SFT, ratio=ratio)
    assert not torch.allclose(sft, expected)


def test_sft_equals_weighted_cross_entropy() -> None:
    batch = make_batch([(2, 4), (1, 6), (1, 3)], 11, seed=2)
    batch = batch._replace(reward=torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    _, grad = loss_and_grad(batch, limits=SFT, reduction="sum")
    logits = batch.logits.detach().requires_grad_()
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none"
    ).sum(1)
    (nll * batch.reward.clamp(min=0)).sum().backward()
    torch.testing.assert_close(grad, logits.grad)


@pytest.mark.slow
def test_canonical_objective_is_bounded_where_a_positive_lower_limit_runs_away() -> None:
    """Prop. 3.2 on a bandit: one bad arm, behavior policy uniform over three."""
    mu = torch.full((1, 1), -1.0986122886681098)

    def train(limits: Limits) -> tuple[float, float]:
        logits = torch.zeros(1, 1, 3, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=10.0)
        for _ in range(300):
            optimizer.zero_grad()
            out = topr_loss(
                logits,
                torch.zeros(1, 1, dtype=torch.long),
                mu,
                -torch.ones(1),
                limits=limits,
                shift=False,
            )
            out.loss.backward()
            optimizer.step()
        return out.loss.item(), logits.abs().max().item()

    loss, size = train(TOPR)
    assert loss >= 0 and size < 10  # the push fades as the arm dies: the objective ends at 0
    for a in (0.1, 1.0):
        runaway, size = train(Limits(1.0, 1.0, a, 1.0))
        assert runaway < -10 and size > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_a_reward_equal_to_the_baseline_is_zero(value: float, dtype: torch.dtype) -> None:
    batch = make_batch([(2, 4)], 11, dtype=torch.float32)
    batch = batch._replace(reward=torch.tensor([value], dtype=dtype))
    out, grad = loss_and_grad(batch, baseline=value)
    assert out.reward == 0 and out.loss == 0 and grad.abs().sum() == 0
    assert reference.topr_loss(*batch, baseline=value).loss == 0


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_first_label_of_every_sequence_has_no_row(layout: str) -> None:
    """It is left out wherever it lies, also at the very beginning of a pack."""
    lengths = [(1, 3), (1, 3), (1, 3)]
    batch = make_batch(lengths, 11, dtype=torch.float64)
    scored = batch._replace(labels=batch.labels.index_fill(1, torch.tensor([0]), 5))
    expected, found = (
        topr_loss(**(b if layout == "padded" else pack(b, lengths))._asdict())
        for b in (batch, scored)
    )
    assert found.length.tolist() == expected.length.tolist() == [3, 3, 3]
    assert torch.equal(found.loss, expected.loss)


def test_aligned_rows_of_a_pack_belong_to_their_own_sequence() -> None:
    """Without a shift the first row of a sequence is scored, and weighed as its others are."""
    lengths = [(1, 3), (1, 3)]
    batch = make_batch(lengths, 11, dtype=torch.float64)
    first = batch.labels.index_fill(1, torch.tensor([0]), 5)
    batch = batch._replace(labels=first, reward=torch.tensor([1.0, 2.0], dtype=torch.float64))
    _, expected = reference_and_grad(batch, shift=False)
    given = pack(batch, lengths)._asdict()
    logits = given.pop("logits").requires_grad_()
    topr_loss(logits, **given, shift=False).loss.backward()
    assert logits.grad is not None and expected[1, 0].any()
    torch.testing.assert_close(logits.grad, expected.flatten(0, 1))


def test_module_twin_equals_the_function() -> None:
    from topr_kernels import TOPRLoss

    batch = make_batch([(2, 4), (1, 6)], 11)
    module = TOPRLoss(limits=TIS, baseline=-0.2)
    assert torch.equal(module(*batch).loss, topr_loss(*batch, limits=TIS, baseline=-0.2).loss)
    assert "baseline=-0.2" in repr(module)


@pytest.mark.parametrize("packed", [False, True])
def test_constants_may_come_from_inference_mode(packed: bool) -> None:
    """Labels, log mu, rewards, offsets and denominators that a scorer made under inference_mode."""
    lengths = [(1, 3), (2, 4)]
    batch = make_batch(lengths, 7, dtype=torch.float32)
    kw: dict[str, Any] = {"normalizer": torch.tensor(3.0)}
    logits, *constants = batch
    if packed:
        logits, *constants, kw["cu_seqlens"] = pack(batch, lengths)
    expected = logits.clone().requires_grad_()
    topr_loss(expected, *constants, **kw).loss.backward()
    with torch.inference_mode():
        constants = [x.clone() for x in constants]
        kw = {name: x.clone() for name, x in kw.items()}
    assert constants[0].is_inference()
    z = logits.clone().requires_grad_()
    topr_loss(z, *constants, **kw).loss.backward()
    assert torch.equal(z.grad, expected.grad)
    scored = logits.clone().requires_grad_()
    offsets = {n: x for n, x in kw.items() if n == "cu_seqlens"}
    log_prob(scored, constants[0], **offsets).log_prob.sum().backward()
    weight = torch.randn(11, 7, requires_grad=True)
    linear_topr_loss(logits, weight, *constants, **kw).loss.backward()
    assert scored.grad.any() and weight.grad.any()
