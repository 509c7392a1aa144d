"""What only a GPU can show about the Triton kernels: fences, graphs, syncs, real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from topr_kernels import IS, topr_loss
from topr_kernels.testing import Batch, make_batch

pytestmark = pytest.mark.gpu
LENGTHS = [(2, 40), (1, 60), (3, 0), (2, 10), (1, 1)]


def on_gpu(dtype: torch.dtype = torch.bfloat16, vocab: int = 4096) -> Batch:
    return Batch(*(x.cuda() for x in make_batch(LENGTHS, vocab, dtype=dtype)))


def step(batch: Batch, **kw: Any) -> tuple[Any, Tensor]:
    logits = batch.logits.detach().requires_grad_()
    out = topr_loss(logits, *batch[1:], **kw)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


@pytest.mark.parametrize("vocab", [4096, 50257])  # whole rows, and rows split over programs
@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
def test_a_thousand_runs_are_bitwise_equal_to_the_form_without_fences(
    ratio: str, vocab: int
) -> None:
    # One sequence is longer than a step of the sequence stage.
    lengths = [*LENGTHS, (2, 300)] if vocab == 4096 else LENGTHS
    batch = Batch(*(x.cuda() for x in make_batch(lengths, vocab, dtype=torch.bfloat16)))
    staged, staged_grad = step(batch, impl="triton_staged", ratio=ratio, limits=IS)
    for _ in range(1000):
        out, grad = step(batch, impl="triton", ratio=ratio, limits=IS)
        assert torch.equal(out.loss, staged.loss)
        assert torch.equal(out.log_ratio, staged.log_ratio)
    assert torch.equal(grad, staged_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [11, 1024, 50257, 128256])
def test_equals_plain_torch(dtype: torch.dtype, vocab: int) -> None:
    batch = on_gpu(dtype, vocab)
    out, grad = step(batch, impl="triton", entropy=True)
    plain, plain_grad = step(batch, impl="torch", entropy=True)
    torch.testing.assert_close(out.log_prob, plain.log_prob, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, plain.loss, rtol=2e-5, atol=1e-6)
    ulp = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad, plain_grad, rtol=max(ulp, 3e-5), atol=1e-7)


def test_nothing_waits_for_the_device() -> None:
    batch = on_gpu()
    step(batch)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph() -> None:
    batch = on_gpu()
    expected, expected_grad = step(batch)
    logits = batch.logits.detach().clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        topr_loss(logits, *batch[1:]).loss.backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    logits.grad = None
    with torch.cuda.graph(graph):
        out = topr_loss(logits, *batch[1:])
        out.loss.backward()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.loss, expected.loss)
    assert logits.grad is not None and torch.equal(logits.grad, expected_grad)


def test_no_recompilation_over_twenty_lengths() -> None:
    from topr_kernels.kernels import triton_logits

    def variants() -> int:
        kernels = (triton_logits.rows_fwd_kernel, triton_logits.logits_bwd_kernel)
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    def run(t: int) -> None:
        batch = Batch(*(x.cuda() for x in make_batch([(1, t), (1, t + 3)], 4096)))
        step(batch._replace(logits=batch.logits.bfloat16()))

    run(7)
    first = variants()
    for t in range(8, 28):
        run(t)
    assert variants() == first


def test_more_positions_than_a_grid_has_along_y() -> None:
    logits = torch.randn(1, 70_000, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 64, (1, 70_000), device="cuda")
    mu = torch.full((1, 70_000), -4.0, device="cuda")
    out, _ = step(Batch(logits, labels, mu, torch.ones(1, device="cuda")))
    plain, _ = step(Batch(logits, labels, mu, torch.ones(1, device="cuda")), impl="torch")
    torch.testing.assert_close(out.log_ratio, plain.log_ratio, rtol=1e-6, atol=1e-3)


def test_more_than_two_to_the_thirty_first_logits() -> None:
    b, t, v = 16, 1024, 151936
    logits = torch.empty(b, t, v, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, v, (b, t), device="cuda")
    mu = torch.full((b, t), -12.0, device="cuda")
    reward = torch.ones(b, device="cuda")
    logits.requires_grad_()
    whole = topr_loss(logits, labels, mu, reward, reduction="sum")
    (grad,) = torch.autograd.grad(whole.loss, logits)
    tail = logits.detach()[-1:].requires_grad_()
    last = topr_loss(tail, labels[-1:], mu[-1:], reward[-1:], reduction="sum")
    (tail_grad,) = torch.autograd.grad(last.loss, tail)
    assert torch.equal(whole.log_ratio[-1:], last.log_ratio)
    assert tail_grad.any() and torch.equal(grad[-1:], tail_grad)
