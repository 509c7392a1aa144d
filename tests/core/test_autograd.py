"""The loss inside autograd: gradcheck, opcheck, scaling, autocast, checkpointing, compile, in place."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from topr_kernels import IS, TIS, TOPR, Limits, kernels, log_prob, topr_loss
from topr_kernels.ops import logits as ops
from topr_kernels.testing import Batch, make_batch, pack

LENGTHS = [(2, 3), (1, 2), (3, 1), (2, 0)]
# Kinks at these ratios: no drawn ratio is near one, and both sides of each are reached.
WIDE = Limits(0.71, 1.31, 0.62, 1.13)


def arguments(layout: str, dtype: torch.dtype = torch.float64, vocab: int = 5) -> dict[str, Any]:
    batch = make_batch(LENGTHS, vocab, dtype=dtype, drift=0.5, sharpness=1.5, seed=3)
    batch = batch._replace(reward=torch.tensor([1.0, -1.5, -0.5, 1.0], dtype=batch.reward.dtype))
    chosen = batch if layout == "padded" else pack(batch, LENGTHS)
    return dict(chosen._asdict())


def gradient(logits: Tensor, scale: float = 1.0, **rest: Any) -> Tensor:
    z = logits.detach().clone().requires_grad_()
    (scale * topr_loss(z, **rest).loss).backward()
    assert z.grad is not None
    return z.grad


#: Every pair of two choices, not every product.
PAIRS = [
    ("padded", "sequence", TIS, False),
    ("packed", "sequence", WIDE, True),
    ("padded", "sequence", IS, True),
    ("packed", "geometric", TIS, True),
    ("padded", "geometric", WIDE, True),
    ("packed", "geometric", IS, False),
    ("packed", "token", TIS, True),
    ("packed", "token", WIDE, False),
    ("padded", "token", IS, False),
]


@pytest.mark.parametrize(("layout", "ratio", "limits", "transformed"), PAIRS)
def test_gradcheck(layout: str, ratio: str, limits: Limits, transformed: bool) -> None:
    rest = arguments(layout)
    z = rest.pop("logits").requires_grad_()
    options: dict[str, Any] = {"ratio": ratio, "limits": limits}
    if transformed:
        options |= {"temperature": 0.7, "softcap": 4.0}
    out = topr_loss(z, **rest, **options)
    x = out.token_log_ratio[rest["labels"] != -100] if ratio == "token" else out.log_ratio
    x = x / out.length if ratio == "geometric" else x
    for kink in dataclasses.astuple(limits):
        if 0 < kink < torch.inf:
            assert (x[x.isfinite() & (x != 0)].exp() - kink).abs().min() > 1e-4, (
                "a ratio sits on a kink"
            )

    def loss(z: Tensor) -> Tensor:
        return topr_loss(z, **rest, **options).loss

    assert gradient(z, **rest, **options).any()
    assert torch.autograd.gradcheck(loss, (z,))


@pytest.mark.parametrize("reduction", ["token_mean", "sum"])
def test_gradcheck_other_reductions(reduction: str) -> None:
    rest = arguments("padded")
    z = rest.pop("logits").requires_grad_()
    mu = rest.pop("behavior_log_prob").sum(-1)  # summed per sequence, with a baseline

    def loss(z: Tensor) -> Tensor:
        out = topr_loss(z, behavior_log_prob=mu, baseline=0.3, reduction=reduction, **rest)
        return out.loss

    assert torch.autograd.gradcheck(loss, (z,))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shift", [True, False])
def test_gradcheck_log_prob(layout: str, shift: bool) -> None:
    rest = arguments(layout)
    z = rest.pop("logits").requires_grad_()
    options = {"cu_seqlens": rest.get("cu_seqlens"), "temperature": 1.3, "softcap": 3.0}

    def scores(z: Tensor) -> Tensor:
        return log_prob(z, rest["labels"], shift=shift, **options).log_prob

    assert torch.autograd.gradcheck(scores, (z,))


# --- Operator contracts ----------------------------------------------------------------------------


def rows(
    layout: str, dtype: torch.dtype = torch.float32, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    given = arguments(layout, dtype)
    packed = layout == "packed"
    x, y, mu = (
        given[k].unsqueeze(0) if packed else given[k]
        for k in ("logits", "labels", "behavior_log_prob")
    )
    return x.requires_grad_(grad), y, given.get("cu_seqlens"), mu, given["reward"]


@pytest.mark.parametrize(
    ("layout", "dtype"), [("padded", torch.float32), ("packed", torch.bfloat16)]
)
def test_opcheck_forward(layout: str, dtype: torch.dtype, cpu_impl: str) -> None:
    x, y, offsets, mu, reward = rows(layout, dtype)
    torch.library.opcheck(ops.log_prob_fwd, (x, y, offsets, 0.8, 5.0, True, True, cpu_impl))
    denominator = torch.tensor(3.0)
    for normalizer, ratio, reduction in (
        (None, "token", "sequence_mean"),
        (denominator, "sequence", "token_mean"),
        (None, "geometric", "sum"),
    ):
        choice = (ratio, 0.1, reduction, 1.0, None, True, True, False, cpu_impl)
        args = (x, y, offsets, mu, reward, normalizer, *TOPR.log(), *choice)
        torch.library.opcheck(ops.topr_fwd, args)


@pytest.mark.parametrize(
    ("layout", "dtype"), [("padded", torch.float32), ("packed", torch.bfloat16)]
)
def test_opcheck_backward(layout: str, dtype: torch.dtype, cpu_impl: str) -> None:
    x, y, offsets, *_ = rows(layout, dtype, grad=False)
    scores, lse, low, _ = ops.log_prob_fwd(x, y, offsets, 1.0, None, False, True, cpu_impl)
    d, d_loss, denominator = torch.randn_like(scores), torch.tensor(2.5), torch.tensor(3.0)
    args = (y, offsets, lse, low, scores, d, d_loss, denominator, 1.0, None, True, cpu_impl)
    torch.library.opcheck(ops.logits_bwd, (x, *args))
    torch.library.opcheck(ops.logits_bwd_, (x.clone(), *args))


# --- Upstream gradient, autocast, scaling, checkpointing -------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_scales_exactly(inplace: bool) -> None:
    rest = arguments("padded", torch.float32)
    z = rest.pop("logits")
    once = gradient(z, **rest)
    assert once.any()

    def scaled(scale: float) -> Tensor:
        x = z.clone().requires_grad_()
        (scale * topr_loss(x * 1, inplace=inplace, **rest).loss).backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(scaled(4.0), 4.0 * once)
    torch.testing.assert_close(scaled(2.5), 2.5 * once, rtol=1e-6, atol=0)
    assert not scaled(0.0).any()
    # What carries no gradient carries none under an infinite scale either.
    masked = once.abs().sum(-1) == 0
    assert masked.any() and not scaled(float("inf"))[masked].any()


def test_a_reward_of_0_has_no_gradient_under_an_infinite_scale() -> None:
    """Its rows are scored, and their coefficient is 0 all the same."""
    rest = arguments("padded", torch.float32)
    z = rest.pop("logits")
    rest["reward"][1] = 0.0
    grad = gradient(z, float("inf"), **rest)
    assert not grad[1].any() and not grad[0].isfinite().all()


def test_two_losses_of_one_graph_accumulate() -> None:
    rest = arguments("padded")
    z = rest.pop("logits").requires_grad_()
    loss = topr_loss(z, **rest).loss
    loss.backward(retain_graph=True)
    assert z.grad is not None
    once = z.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(z.grad, 4 * once)


def linear_batch(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    rest = arguments("padded", dtype, vocab=11)
    hidden = torch.randn(*rest.pop("logits").shape[:2], 8, dtype=dtype)
    return nn.Linear(8, 11, dtype=dtype), hidden, rest


def test_autocast() -> None:
    head, hidden, rest = linear_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        out = topr_loss(logits, **rest)
    assert logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    z = logits.detach().requires_grad_()
    expected = topr_loss(z, **rest)
    expected.loss.backward()
    assert z.grad is not None and z.grad.any() and torch.equal(out.loss, expected.loss)
    by_hand = torch.einsum("btv,btd->vd", z.grad.float(), hidden)
    torch.testing.assert_close(head.weight.grad, by_hand, rtol=2e-2, atol=2e-3)


def test_autocast_around_backward_changes_nothing() -> None:
    rest = arguments("padded", torch.float32)
    z = rest.pop("logits")
    expected = gradient(z, **rest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(z, **rest), expected)


def test_gradient_scaler() -> None:
    """fp16 logits: a scaled loss lifts the gradient over the underflow, before any rounding."""
    rest = arguments("padded", torch.float16, vocab=64)
    z = rest.pop("logits")
    small = {"normalizer": 1e6}
    lost = gradient(z, **rest, **small)
    scaled = gradient(z, 2.0**20, **rest, **small)
    exact = gradient(z.double(), **rest, **small)
    assert (lost == 0).float().mean() > (scaled == 0).float().mean()
    assert scaled.isfinite().all()
    error = (scaled.double() / 2**20 - exact).abs().max() / exact.abs().max()
    assert error < 2 * torch.finfo(torch.float16).eps


def test_gradient_scaler_skips_nothing_and_restores_the_gradient() -> None:
    head, hidden, rest = linear_batch()
    topr_loss(head(hidden), **rest).loss.backward()
    assert head.weight.grad is not None
    expected = head.weight.grad.clone()
    head.zero_grad()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(topr_loss(head(hidden), **rest).loss).backward()
    scaler.unscale_(optimizer)
    assert expected.any()
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_checkpointing(inplace: bool) -> None:
    head, hidden, rest = linear_batch()
    topr_loss(head(hidden), **rest).loss.backward()
    assert head.weight.grad is not None
    expected = head.weight.grad.clone()
    assert expected.any()
    head.zero_grad()

    def step(hidden: Tensor) -> Tensor:
        return topr_loss(head(hidden), **rest, inplace=inplace).loss

    checkpoint(step, hidden, use_reentrant=False).backward()
    assert torch.equal(head.weight.grad, expected)


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        pytest.param("aot_eager", "padded", marks=pytest.mark.slow),
        # Not slow: what other versions of torch are tested with.
        ("aot_eager", "packed"),
        pytest.param("inductor", "packed", marks=pytest.mark.slow),
    ],
)
def test_compile_one_graph_for_every_length(layout: str, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    first = 0

    def step(z: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out = topr_loss(z, **rest, ratio="geometric", temperature=0.9, entropy=True)
        scores = log_prob(z, rest["labels"], cu_seqlens=rest.get("cu_seqlens"))
        return out.loss + scores.log_prob.sum(), out.weight, out.metrics()["kl_k3"]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for i, lengths in enumerate(([3, 4], [2, 9], [5, 6], [7, 17], [8, 31])):
        spans = [(2, n) for n in lengths]
        batch = make_batch(spans, 13, dtype=torch.float32, seed=i)
        given = (batch if layout == "padded" else pack(batch, spans))._asdict()
        z = given.pop("logits").requires_grad_()
        expected = step(z, given)
        (d,) = torch.autograd.grad(expected[0], z)
        actual = compiled(z, given)
        (d_compiled,) = torch.autograd.grad(actual[0], z)
        assert d.any()
        for a, b in zip((*actual, d_compiled), (*expected, d), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        # fullgraph makes it one graph. Dynamo may call the backend twice for it (a restart that
        # specialises float options), but never again for another length.
        first = counter.frame_count if i == 0 else first
        assert counter.frame_count == first


# --- In place, and second derivatives --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_inplace_is_bitwise_the_same_in_the_same_storage(layout: str, dtype: torch.dtype) -> None:
    rest = arguments(layout, dtype)
    leaf = rest.pop("logits")
    options: dict[str, Any] = {"temperature": 0.9, "softcap": 6.0}
    expected = gradient(leaf, **rest, **options)
    for strided in (False, True):
        leaf.requires_grad_()
        logits = leaf * 1
        if strided:  # every other column of a larger buffer
            logits = torch.stack([leaf, leaf], -1)[..., 0]
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        topr_loss(logits, **rest, **options, inplace=True).loss.backward()
        assert expected.any() and torch.equal(seen[0], expected)
        assert seen[0].data_ptr() == logits.data_ptr()
        assert leaf.grad is not None and torch.equal(leaf.grad, expected)
        leaf.grad = None


def test_inplace_allocates_nothing_of_the_size_of_the_logits(cpu_impl: str) -> None:
    rest = arguments("padded", torch.float32)
    logits = rest.pop("logits").requires_grad_() * 1
    allocates = mock.Mock(side_effect=AssertionError("allocates"))
    forbidden = ops._KERNELS[cpu_impl]._replace(logits_bwd=allocates)
    with mock.patch.dict(ops._KERNELS, {cpu_impl: forbidden}):
        topr_loss(logits, **rest, inplace=True).loss.backward()


def test_inplace_does_not_touch_the_logits_before_backward() -> None:
    rest = arguments("padded", torch.float32)
    logits = rest.pop("logits").requires_grad_() * 1
    before, version = logits.detach().clone(), logits._version
    topr_loss(logits, **rest, inplace=True)
    assert logits._version == version and torch.equal(logits, before)


def test_inplace_second_backward_raises() -> None:
    rest = arguments("padded")
    logits = rest.pop("logits").requires_grad_() * 1
    loss = topr_loss(logits, **rest, inplace=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_refuses_logits_that_another_backward_needs() -> None:
    """tanh saves its output: overwriting it must raise, not give another gradient."""
    rest = arguments("padded")
    logits = rest.pop("logits").requires_grad_().tanh()
    loss = topr_loss(logits, **rest, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_create_graph_raises() -> None:
    rest = arguments("padded")
    z = rest.pop("logits").requires_grad_()
    loss = topr_loss(z * 1, **rest, inplace=True).loss
    with pytest.raises(RuntimeError, match=r"inplace=True .* create_graph"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_double_backward_raises() -> None:
    rest = arguments("padded")
    z = rest.pop("logits").requires_grad_()
    for value in (
        topr_loss(z, **rest).loss,
        log_prob(z, rest["labels"]).log_prob.square().sum(),
    ):
        (d,) = torch.autograd.grad(value, z, create_graph=True)
        with pytest.raises(RuntimeError, match="not differentiable a second time"):
            torch.autograd.grad(d.square().sum(), z)


# --- What is not done ------------------------------------------------------------------------------


def test_no_grad_does_no_gradient_work(cpu_impl: str) -> None:
    rest = arguments("padded", torch.float32)
    z = rest.pop("logits").requires_grad_()
    module = importlib.import_module(f"topr_kernels.kernels.{kernels.LOGITS[cpu_impl]}")
    with mock.patch.object(module, "_write_gradient") as write:
        with torch.no_grad():
            out = topr_loss(z, **rest)
            scores = log_prob(z, rest["labels"])
        assert not out.loss.requires_grad and not scores.log_prob.requires_grad
        topr_loss(z, **rest)  # a forward alone does none either
        assert not write.called
        topr_loss(z, **rest).loss.backward()
        assert write.call_count == 1  # the spy sees the backward when there is one


def test_only_loss_and_log_prob_are_differentiable() -> None:
    rest = arguments("padded", torch.float32)
    z = rest.pop("logits").requires_grad_()
    out = topr_loss(z, **rest, entropy=True)
    assert [k for k, v in out._asdict().items() if v.requires_grad] == ["loss"]
    scores = log_prob(z, rest["labels"], entropy=True)
    assert [k for k, v in scores._asdict().items() if v.requires_grad] == ["log_prob"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_with_any_upstream_gradient_equals_plain_torch(dtype: torch.dtype) -> None:
    batch: Batch = make_batch([(2, 6), (1, 9)], 17, dtype=dtype)
    z = batch.logits.requires_grad_()
    d = torch.randn(batch.labels.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    d[0, 3] = 0.0
    scored = batch.labels != -100
    plain = z[:, :-1].log_softmax(-1).gather(-1, batch.labels[:, 1:].clamp(min=0).unsqueeze(-1))
    plain = torch.where(scored[:, 1:], plain.squeeze(-1), 0.0)
    (expected,) = torch.autograd.grad(plain, z, d[:, 1:])
    out = log_prob(z, batch.labels).log_prob
    torch.testing.assert_close(out[:, 1:], plain)
    assert not out[:, 0].any() and not out[~scored].any()
    # The gradient of a position that is not scored is ignored, whatever it is.
    (actual,) = torch.autograd.grad(out, z, d.masked_fill(~scored, torch.nan))
    assert expected.any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not actual[:, -1].any() and not actual[0, 2].any()
