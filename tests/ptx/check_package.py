"""The package on the executor: what neither the interpreter nor a comparison of results shows."""

from __future__ import annotations

import os
from typing import Any

import pytest
import test_triton_linear as linear
import torch
from torch import Tensor

from ptx import launch
from ptx.execute import Options
from topr_kernels import IS, TOPR, log_prob, topr_loss
from topr_kernels.kernels import triton_logits
from topr_kernels.ops import logits as ops
from topr_kernels.testing import assert_within_budget, make_batch, pack

LENGTHS = [(2, 4), (1, 6), (3, 0), (2, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(int(os.environ.get("PTX_SEEDS", "6")))


def step(batch: Any, options: Options | None = None, **kw: Any) -> tuple[Any, Tensor]:
    logits = batch.logits.detach().requires_grad_()
    with launch.device(options):
        out = topr_loss(logits, *batch[1:], **kw)
        out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


@pytest.mark.parametrize(  # ALIGNED or not
    ("dtype", "vocab"), [(torch.float32, 64), (torch.bfloat16, 61), (torch.float16, 64)]
)
def test_a_nan_coefficient_reads_nothing_beyond_the_last_row(
    dtype: torch.dtype, vocab: int
) -> None:
    batch = make_batch(LENGTHS, vocab, dtype=dtype)
    for shift in (True, False):
        # A NaN from upstream reaches every row, the one that predicts nothing too.
        logits = batch.logits.detach().requires_grad_()
        with launch.device():
            loss = topr_loss(logits, *batch[1:], shift=shift, impl="triton").loss
            loss.backward(torch.tensor(torch.nan))
        assert logits.grad is not None and logits.grad.isnan().any(-1).any(-1).all()
        # And one of a single token reaches its row alone.
        logits = batch.logits.detach().requires_grad_()
        upstream = torch.ones_like(batch.behavior_log_prob)
        upstream[1, 6] = torch.nan
        with launch.device():
            out = log_prob(logits, batch.labels, shift=shift, impl="triton")
            out.log_prob.backward(upstream)
        assert logits.grad is not None
        rows = logits.grad.isnan().all(-1)
        assert rows.nonzero().tolist() == [[1, 5 if shift else 6]]


@pytest.mark.parametrize("impl", ["triton", "triton_staged"])
@pytest.mark.parametrize(
    "offsets", [[0, 9, 6], [0, -3, 9], [1, 3, 9], [0, 3, 8], [0, 3, 1 << 30], [0, 0, 9]]
)
def test_unsound_offsets_touch_nothing_of_others(offsets: list[int], impl: str) -> None:
    lengths = [(2, 3), (1, 3)]
    packed = pack(make_batch(lengths, 61, dtype=torch.float32), lengths)
    logits, labels, mu = (x[None] for x in packed[:3])
    cu = torch.tensor(offsets, dtype=torch.int32)
    tail = (1.0, None, False, True, False, impl)
    objective = (mu, packed.reward, None, *TOPR.log(), "sequence", 0.0, "sequence_mean")
    with launch.device():
        out = ops.topr_fwd(logits, labels, cu, *objective, *tail)
        saved = (out[3], out[4], out[2], out[-1], torch.ones(()), out[1])
        grad = ops.logits_bwd(logits, labels, None, *saved, 1.0, None, True, impl)
    sound = offsets == [0, 0, 9]
    assert out[0].isnan() != sound and grad[0, :-1].isnan().all(-1).all() != sound


@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
def test_one_launch_equals_the_staged_ones_in_every_order_of_programs(ratio: str) -> None:
    batch = make_batch(LENGTHS, 193, dtype=torch.bfloat16)
    staged, staged_grad = step(batch, impl="triton_staged", ratio=ratio, limits=IS)
    for seed in SEEDS:
        options = Options(seed=seed, teams=6, late=seed % 2 == 1)
        out, grad = step(batch, options, impl="triton", ratio=ratio, limits=IS)
        for name, a, b in zip(out._fields, out, staged, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
        assert torch.equal(grad, staged_grad)


def test_rows_in_parts_in_every_order_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = triton_logits.Settings(BV=128, U=1, tiles_per_program=3, split=8, num_warps=4)
    monkeypatch.setattr(triton_logits, "settings", lambda *_: small)
    batch = make_batch([(1, 3), (2, 0), (1, 2)], 1500, dtype=torch.float32)
    want, want_grad = step(batch, impl="triton_staged", entropy=True)
    for seed in SEEDS[:10]:
        out, grad = step(batch, Options(seed=seed, teams=8), impl="triton", entropy=True)
        assert torch.equal(out.loss, want.loss) and torch.equal(out.entropy, want.entropy)
        assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("place", ["logits", "behavior"])
def test_a_nan_reaches_the_loss(place: str) -> None:
    # PTX max and min drop a NaN; the interpreter does not.
    batch = make_batch(LENGTHS, 61, dtype=torch.float32)
    for limits in (TOPR, IS):
        for ratio in ("sequence", "geometric", "token"):
            dirty = type(batch)(*(x.clone() for x in batch))
            if place == "logits":
                dirty.logits[1, 2, 50] = torch.nan
            else:
                dirty.behavior_log_prob[1, 3] = torch.nan
            out, grad = step(dirty, impl="triton", ratio=ratio, limits=limits)
            assert out.loss.isnan() and out.weight.isnan().tolist() == [False, True, False, False]
            assert grad.isnan().any(-1)[1].any() and not grad[0].isnan().any()


@pytest.mark.parametrize("seed", range(4))
def test_exponentials_that_are_two_ulp_off(seed: int) -> None:
    batch = make_batch(LENGTHS, 193, dtype=torch.float32, seed=seed)
    options = Options(seed=seed, ulps=2)
    out, grad = step(batch, options, impl="triton", entropy=True, temperature=0.8, softcap=9.0)
    exact = [x.double() if x.is_floating_point() else x for x in batch]
    plain, plain_grad = step(batch, impl="torch", entropy=True, temperature=0.8, softcap=9.0)
    ref, ref_grad = step(
        type(batch)(*exact), impl="torch", entropy=True, temperature=0.8, softcap=9.0
    )
    # Two ulp of every exponential, one and a half of its argument's rounding.
    nats = 3 * ref.log_prob.abs().max().item()
    for name in ("log_prob", "log_ratio", "entropy", "weight"):
        a, b, c = (getattr(r, name) for r in (out, plain, ref))
        some = c.isfinite()
        assert_within_budget(name, a[some], b[some], c[some], operand=nats)
    size = nats * ref_grad.abs().max().item()
    assert_within_budget("gradient", grad, plain_grad, ref_grad, operand=size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_take_the_place_of_the_logits(dtype: torch.dtype) -> None:
    batch = make_batch(LENGTHS, 193, dtype=dtype)
    _, want = step(batch, impl="triton")
    leaf = batch.logits.detach().requires_grad_()
    logits = leaf * 1
    with launch.device():
        topr_loss(logits, *batch[1:], inplace=True, impl="triton").loss.backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.7])
def test_no_log_prob_of_a_confident_row_is_positive(
    temperature: float, softcap: float | None
) -> None:
    g = torch.Generator().manual_seed(0)
    # Whole tiles: their loop is the one that the compiler contracts.
    n, vocab = 200, 1024
    logits = torch.randn(1, n, vocab, generator=g)
    labels = torch.randint(0, vocab, (1, n), generator=g)
    # The label leads by so much that all else rounds away.
    top = 25 + 60 * torch.rand(1, n, 1, generator=g)
    logits.scatter_(-1, labels.unsqueeze(-1), top)
    with launch.device(Options(resident=128)):
        out = log_prob(
            logits, labels, temperature=temperature, softcap=softcap, shift=False, impl="triton"
        )
    assert out.log_prob.max() <= 0, f"{(out.log_prob > 0).sum()} rows, {out.log_prob.max()}"
    assert out.log_prob.max() > -1e-6 or softcap is not None


def test_the_fused_linear_path() -> None:
    case = linear.make_case(300, sharpness=2.0)
    for tolerance in (0.0, 2**-6):
        kw = {"entropy": True, "softcap": 20.0, "temperature": 0.8}
        exact, exact_grads = linear.step(case, "torch", torch.float64, grad_tolerance=0.0, **kw)
        plain, grads = linear.step(case, "torch", torch.float32, grad_tolerance=tolerance, **kw)
        with launch.device() as device:
            out, got = linear.step(case, "triton", torch.float32, grad_tolerance=tolerance, **kw)
        rest = ("columns", "gather") if tolerance else ("gradient",)
        ran = {f"linear_{name}_kernel" for name in ("rows", *rest)}
        assert ran <= {run.name for run in device.launches}
        nats = 5 * exact.log_prob.abs().max().item()
        assert_within_budget("log_prob", out.log_prob, plain.log_prob, exact.log_prob, operand=nats)
        for a, b, c in zip(got, grads, exact_grads, strict=True):
            assert_within_budget("gradient", a, b, c, operand=nats * c.abs().max().item())
