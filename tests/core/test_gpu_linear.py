"""What only a GPU can show about the fused-linear path: half-precision products, sizes, memory."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from topr_kernels import linear_log_prob, linear_topr_loss, topr_loss
from topr_kernels.testing import LinearBatch, make_linear_batch

pytestmark = pytest.mark.gpu
LENGTHS = [(2, 40), (1, 60), (3, 0), (2, 10), (1, 1), (4, 300)]


def on_gpu(dtype: torch.dtype, vocab: int = 50257, dim: int = 256, **kw: Any) -> LinearBatch:
    batch = make_linear_batch(LENGTHS, vocab, dim, dtype=dtype, sharpness=6.0, **kw)
    return LinearBatch(*(x.cuda() for x in batch))


def step(batch: LinearBatch, **kw: Any) -> tuple[Any, Tensor, Tensor]:
    hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
    out = linear_topr_loss(hidden, weight, *batch[2:], **kw)
    out.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return out, hidden.grad, weight.grad


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_fp64(dtype: torch.dtype, softcap: float | None, impl: str) -> None:
    batch = on_gpu(dtype)
    wide = LinearBatch(*(x.double() if x.is_floating_point() else x for x in batch))
    expected, d_hidden, d_weight = step(wide, softcap=softcap)
    out, got_hidden, got_weight = step(batch, softcap=softcap, impl=impl)
    torch.testing.assert_close(out.log_prob.double(), expected.log_prob, rtol=1e-5, atol=2e-5)
    assert out.log_prob.dtype == out.loss.dtype == torch.float32
    # fp32 logits: what is left is the rounding of softmax to the operands' dtype, and of the result.
    eps = torch.finfo(dtype).eps
    assert error(got_hidden, d_hidden) < 2 * eps + 1e-5
    assert error(got_weight, d_weight) < 2 * eps + 1e-5


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_flat_softmax_over_a_large_vocabulary_in_fp16(impl: str) -> None:
    """Sums over the vocabulary are beyond the range of fp16, which operands must not see."""
    batch = on_gpu(torch.float16, vocab=128256, dim=64)
    batch = batch._replace(hidden=batch.hidden * 1e-3, reward=batch.reward * 1e-5)
    out, d_hidden, d_weight = step(batch, impl=impl)
    assert out.loss.isfinite()
    assert d_hidden.isfinite().all()
    assert d_weight.isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerance(dtype: torch.dtype, impl: str) -> None:
    batch = on_gpu(dtype)
    exact, d_hidden, d_weight = step(batch, impl=impl)
    out, got_hidden, got_weight = step(batch, impl=impl, grad_tolerance=2.0**-7)
    assert torch.equal(out.loss, exact.loss)
    assert out.active_share < 0.5
    assert 0 < out.left_out <= 2.0**-7
    eps = torch.finfo(dtype).eps
    assert error(got_hidden, d_hidden) < 2 * 2.0**-7 + 2 * eps
    assert error(got_weight, d_weight) < 2 * 2.0**-7 + 2 * eps


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_log_prob_is_bitwise_the_same_in_any_company(
    dtype: torch.dtype, softcap: float | None
) -> None:
    batch = on_gpu(dtype)
    whole, _, _ = step(batch, softcap=softcap, entropy=True)
    with torch.no_grad():
        # Without entropy and gradient the kernel is another binary.
        scorer = linear_log_prob(*batch[:3], softcap=softcap)
    assert torch.equal(whole.log_prob, scorer.log_prob)
    for order in ([5, 4, 3, 2, 1, 0], [3], [0, 4]):
        some = LinearBatch(
            batch.hidden[order],
            batch.weight,
            *(x[order] for x in batch[2:]),
        )
        out, _, _ = step(some, softcap=softcap)
        assert torch.equal(out.log_prob, whole.log_prob[order])


def test_runs_are_bitwise_equal() -> None:
    batch = on_gpu(torch.bfloat16)
    for kw in ({}, {"grad_tolerance": 2.0**-7}):
        first = step(batch, **kw)
        for _ in range(20):
            again = step(batch, **kw)
            assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))


def test_the_log_ratio_matches_the_logits_path_before_an_update() -> None:
    """mu scored by the fused scorer, then the loss: every ratio is exactly 1."""
    batch = on_gpu(torch.bfloat16)
    with torch.no_grad():
        mu = linear_log_prob(*batch[:3]).log_prob
    out, _, _ = step(batch._replace(behavior_log_prob=mu))
    assert (out.log_ratio == 0).all()
    logits = torch.nn.functional.linear(batch.hidden.float(), batch.weight.float())
    plain = topr_loss(logits, batch.labels, mu, batch.reward)
    assert plain.log_ratio.abs().max() < 1e-2


def test_copies_to_the_host_are_as_documented() -> None:
    """One per call and two per tile with a gradient: live rows, and active columns with a tolerance."""
    batch = on_gpu(torch.bfloat16)
    step(batch)  # compile first

    def syncs(**kw: Any) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                step(batch, **kw)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)

    step(batch, grad_tolerance=2.0**-7)
    counts = syncs(), syncs(grad_tolerance=2.0**-7)
    print("host copies per call, exact and with a tolerance:", counts)
    assert counts[0] <= 8
    assert counts[1] <= 10


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-10])
def test_memory_does_not_grow_with_the_tokens(tolerance: float) -> None:
    vocab, dim = 128256, 1024
    weight = (torch.randn(vocab, dim, device="cuda") / dim**0.5).bfloat16().requires_grad_()

    def peak(tokens: int) -> int:
        hidden = (8 * torch.randn(tokens // 512, 512, dim, device="cuda")).bfloat16()
        hidden.requires_grad_()
        labels = torch.randint(0, vocab, hidden.shape[:2], device="cuda")
        mu = torch.full(labels.shape, -9.0, device="cuda")
        reward = torch.ones(len(labels), device="cuda")
        reward[1::2] = -1
        weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_topr_loss(
            hidden, weight, labels, mu, reward, grad_tolerance=tolerance
        ).loss.backward()
        gradients = 2 * hidden.numel() + 2 * weight.numel()
        return torch.cuda.max_memory_allocated() - before - gradients

    peak(4096)
    small, large = peak(4096), peak(32768)
    # Results and indices of the tokens, and nothing with V or D in it.
    assert large - small < 64 * (32768 - 4096) * 4
