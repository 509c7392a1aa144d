"""The Triton kernels of the logits path, run by the interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from topr_kernels import IS, PRESETS, SFT, TOPR, Limits, log_prob, reference, topr_loss
from topr_kernels.ops import logits as ops
from topr_kernels.ops.logits import Saved
from topr_kernels.ops.options import Objective, Tokens, Transforms
from topr_kernels.testing import Batch, assert_within_budget, make_batch, pack

pytest.importorskip("triton")
import triton
import triton.language as tl

from topr_kernels.kernels import triton_logits, triton_rows, triton_taper
from topr_kernels.kernels.triton_rows import NO_FUSION, is_aligned

pytestmark = pytest.mark.usefixtures("in_bounds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Roundings that a budget allows: one, and two ulp of an exponential where it is of the hardware.
SLACK = 3 if DEVICE == "cuda" or int(os.environ.get("PTX_ULPS", "0")) else 1
VOCABS = [2, 11, 193, 1024, 4097, 50257]
RATIOS = ["sequence", "geometric", "token"]
LENGTHS = [(2, 4), (1, 6), (3, 0), (2, 1)]
#: The same kinds in fewer rows, where a row or a call takes its time.
SHORT = [(1, 2), (2, 0), (2, 1), (1, 1)]
PLAIN = Transforms(1.0, None, 1.0)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The interpreter reduces lane by lane; a short step also makes several of them per sequence.
    monkeypatch.setattr(triton_logits, "BT", 4)
    yield


def to_device(batch: Batch) -> Batch:
    return Batch(*(x.to(DEVICE) for x in batch))


def run(batch: Batch, impl: str = "triton", **kw: Any) -> tuple[Any, Tensor]:
    batch = to_device(batch)
    logits = batch.logits.detach().requires_grad_()
    out = topr_loss(logits, *batch[1:], impl=impl, **kw)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


def check_against_reference(batch: Batch, **kw: Any) -> None:
    out, grad = run(batch, **kw)
    exact = Batch(*(x.double() if x.is_floating_point() else x for x in batch))
    results = []
    for source in (exact, batch):
        logits = source.logits.detach().requires_grad_()
        wide = logits if source is exact else logits.float()
        ref = reference.topr_loss(wide, *source[1:], **kw)
        ref.loss.backward()
        results.append((ref, logits.grad))
    (ref, ref_grad), (plain, plain_grad) = results
    assert out.loss.dtype == torch.float32 and grad.dtype == batch.logits.dtype
    assert (out.log_prob <= 0).all()
    # Those of the hardware's exponentials are independent, and add up over a sequence.
    nats = max(out.log_prob.abs().max().item(), 1.0)
    if SLACK > 1:
        # A softcap has one too, and is as large as the cap.
        nats = max(nats, (kw.get("softcap") or 0.0) / kw.get("temperature", 1.0))
        nats *= SLACK * max(out.length.max().item(), 1) ** 0.5
    pairs = [
        ("log_ratio", out.log_ratio, plain.log_ratio, ref.log_ratio, nats),
        ("weight", out.weight, plain.weight, ref.weight, nats * ref.weight.max().item()),
        ("gradient", grad, plain_grad, ref_grad, nats * ref_grad.abs().max().item()),
    ]
    for name, got, torch_got, want, operand in pairs:
        assert_within_budget(name, got.cpu(), torch_got, want, operand=operand)
    torch.testing.assert_close(out.loss.cpu().double(), ref.loss, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("vocab", "ratio"),
    [
        *((v, "sequence") for v in VOCABS if v <= 4096),
        *(pytest.param(v, "sequence", marks=pytest.mark.slow) for v in VOCABS if v > 4096),
        (193, "geometric"),
        (193, "token"),
    ],
)
def test_equals_the_reference_at_every_vocabulary(vocab: int, ratio: str) -> None:
    lengths = LENGTHS if vocab <= 4096 else SHORT
    batch = make_batch(lengths, vocab, dtype=torch.float32, seed=vocab)
    batch = batch._replace(reward=torch.tensor([1.0, -1.0, 0.5, -0.25]))
    check_against_reference(batch, ratio=ratio, baseline=0.1)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=2
    ).filter(lambda ls: sum(c for _, c in ls) > 0),
    preset=st.sampled_from([*PRESETS.values(), Limits(0.2, 1.7, 0.05, 0.9)]),
    ratio=st.sampled_from(RATIOS),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "sum"]),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 10**6),
)
def test_any_batch_equals_the_reference(
    lengths: list[tuple[int, int]],
    preset: Limits,
    ratio: str,
    reduction: str,
    temperature: float,
    softcap: float | None,
    seed: int,
) -> None:
    batch = make_batch(lengths, 37, dtype=torch.float32, seed=seed)
    check_against_reference(
        batch,
        limits=preset,
        ratio=ratio,
        reduction=reduction,
        temperature=temperature,
        softcap=softcap,
    )


@pytest.mark.parametrize("reward", [[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0], [0.0] * 4])
def test_all_of_one_sign(reward: list[float]) -> None:
    batch = make_batch(LENGTHS, 61, dtype=torch.float32)._replace(reward=torch.tensor(reward))
    out, grad = run(batch)
    plain, plain_grad = run(batch, impl="torch")
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-5, atol=1e-8)
    assert (grad.abs().sum() > 0) == any(reward)


def test_dead_negatives_are_zero_filled_without_being_read() -> None:
    batch = make_batch([(1, 5), (1, 5)], 61, dtype=torch.float32)
    mu = batch.behavior_log_prob.clone()
    mu[1, 1:] += 60  # pi has abandoned the second sequence: exp(-300) is 0 in fp32
    batch = batch._replace(behavior_log_prob=mu, reward=torch.tensor([1.0, -1.0]))
    out, _ = run(batch)
    assert out.weight[1] == 0
    # The kernel itself, with the abandoned rows turned to NaN: whoever reads them shows it.
    logits = batch.logits.clone().to(DEVICE)
    logits[1] = torch.nan
    d = torch.zeros(2, 6, device=DEVICE)
    d[0, 1:] = -0.1
    ones = torch.ones((), device=DEVICE)
    zeros = torch.zeros_like(d)
    grad = triton_logits.logits_bwd(
        logits,
        Tokens(batch.labels.to(DEVICE), None, True),
        Saved(zeros, zeros, torch.full_like(d, -2.0), d, ones, ones),
        PLAIN,
    )
    assert grad[0].abs().sum() > 0 and grad[1].abs().sum() == 0


def test_all_masked_batch_is_zero() -> None:
    batch = make_batch([(4, 0), (2, 0)], 61, dtype=torch.float32)
    out, grad = run(batch)
    assert out.loss == 0 and grad.abs().sum() == 0 and out.length.sum() == 0
    out, _ = run(batch, normalizer=torch.tensor(0.0, device=DEVICE) if DEVICE == "cuda" else None)
    assert out.loss == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_masked_is_never_read(poison: float) -> None:
    batch = make_batch(LENGTHS, 61, dtype=torch.float32, padding=2)
    clean, clean_grad = run(batch)
    dirty = Batch(*(x.clone() for x in batch))
    unscored = dirty.labels == -100
    rows = torch.ones_like(unscored)
    rows[:, :-1] = unscored[:, 1:]
    dirty.logits[rows] = poison
    dirty.behavior_log_prob[unscored] = poison
    out, grad = run(dirty)
    assert torch.equal(out.loss, clean.loss) and torch.equal(grad, clean_grad)


def test_banned_tokens_and_rows_of_minus_infinity() -> None:
    batch = make_batch([(1, 3), (1, 3)], 61, dtype=torch.float32)
    batch.logits[:, :, 40:] = -torch.inf
    batch.labels[batch.labels >= 40] = 3
    batch = batch._replace(reward=torch.tensor([1.0, -1.0]))
    check_against_reference(batch)
    batch.logits[1, 0, batch.labels[1, 1]] = -torch.inf  # a banned label in a negative sequence
    out, grad = run(batch)
    assert out.weight[1] == 0 and grad[1].abs().sum() == 0 and out.loss.isfinite()
    batch.logits[1, 0] = -torch.inf
    out, grad = run(batch)
    assert out.log_prob[1, 1] == -torch.inf and grad[1].abs().sum() == 0 and out.loss.isfinite()
    batch.logits[1, 0, 5] = torch.nan
    out, _ = run(batch)
    assert out.loss.isnan() and out.weight[1].isnan()


def test_a_large_common_offset_costs_the_gradient_nothing() -> None:
    batch = make_batch([(1, 4)], 61, dtype=torch.float32)
    # On a grid that the offset keeps: both batches hold the same numbers exactly.
    batch = batch._replace(logits=(batch.logits * 128).round() / 128)
    _, grad = run(batch)
    _, moved = run(batch._replace(logits=batch.logits + 65536))
    assert grad.any()
    torch.testing.assert_close(moved, grad, rtol=2e-5, atol=1e-8)


def confident_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Rows whose token 0 is certain, at any height."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=g)
    logits[:, 0] = 40 + 400 * torch.rand(rows, generator=g)
    return logits


SCALES = [(0.7, None), (1.3, None), (0.9, 30.0), (1.0, 30.0), (0.6, 200.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "softcap"), SCALES)
def test_log_prob_of_a_confident_row_is_not_positive(
    temperature: float, softcap: float | None
) -> None:
    logits = confident_logits(20_000 if DEVICE == "cuda" else 32, 37).to(DEVICE)
    labels = torch.zeros(1, len(logits), dtype=torch.int64, device=DEVICE)
    out = log_prob(
        logits[None],
        labels,
        temperature=temperature,
        softcap=softcap,
        shift=False,
        impl="triton",
    )
    assert (out.log_prob <= 0).all() and (out.log_prob > -1e-3).any()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # The product of two fp32 numbers is exact in fp64.
    return (a.double() * b.double() + c.double()).float()


def moved(x: Tensor, exact: Tensor, generator: torch.Generator) -> Tensor:
    """Up to two ulp away from x, but where an approximate instruction promises its result."""
    ulp = torch.randint(-2, 3, x.shape, generator=generator).float() * torch.finfo(x.dtype).eps
    return torch.where(exact, x, x + ulp * x.abs())


@pytest.mark.parametrize(("temperature", "softcap"), SCALES)
@pytest.mark.parametrize("fused", [False, True])
def test_no_log_prob_of_a_hundred_thousand_rows_is_positive(
    temperature: float, softcap: float | None, fused: bool
) -> None:
    # The arithmetic of `exponential` and `finish_row` in torch, with instructions that are off; and what
    # would come of one fused operation before the exponential.
    g = torch.Generator().manual_seed(1)
    z = confident_logits(20_000, 5)
    u = z if softcap is None else moved((z / softcap).tanh(), z == 0, g)
    k = torch.tensor((softcap or 1.0) / temperature) * torch.tensor(1.4426950408889634)
    ln_2, low = torch.tensor(0.6931471824645996), torch.tensor(-1.904654299957771e-9)
    hi = k * ln_2
    lo = fma(k, ln_2, -hi) + k * low
    m = u.amax(1, keepdim=True)
    t = fma(u, k, -(m * k)) if fused else (u - m) * k
    log_s = moved(t.exp2(), t == 0, g).sum(1, keepdim=True).log()
    if not fused:
        log_s = moved(log_s, log_s == 0, g)
    d = u[:, :1] - m
    log_prob = fma(d, hi, fma(d, lo, -log_s))
    assert (log_prob > 0).any() == fused


def test_strided_sliced_and_expanded_input() -> None:
    batch = make_batch(LENGTHS, 32, dtype=torch.float32)
    batch = batch._replace(labels=batch.labels[:1].expand(4, -1))
    b, t, v = batch.logits.shape
    room = torch.full((b, t + 2, 2 * v + 3), torch.nan)
    views = [torch.empty(b, t, v), torch.empty(t, b, v).transpose(0, 1)]
    views += [room[:, 1 : t + 1, 3 : v + 3], room[:, :t, 1 : v + 1]]
    views += [room[:, :t, : 2 * v : 2], room[:, 2:, 1 : 2 * v + 1 : 2]]
    found: dict[tuple[bool, int], list[tuple[Any, Tensor]]] = {}
    for view in views:
        room.fill_(torch.nan)
        view.copy_(batch.logits)
        # What another binary is compiled for.
        binary = is_aligned(view), view.stride(-1)
        found.setdefault(binary, []).append(run(batch._replace(logits=view)))
    assert list(found) == [(True, 1), (False, 1), (False, 2)]
    # One binary gives the same bits for every layout.
    for (first, first_grad), (out, grad) in found.values():
        assert torch.equal(out.loss, first.loss) and torch.equal(grad, first_grad)
    # The lanes of another may sum in another order.
    (a, a_grad), *others = (same[0] for same in found.values())
    for c, c_grad in others:
        torch.testing.assert_close(a.log_prob, c.log_prob, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(a.loss, c.loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(a_grad, c_grad, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_launch_equals_the_staged_launches_bitwise(ratio: str) -> None:
    batch = make_batch(LENGTHS, 193, dtype=torch.float32)
    for kw in ({}, {"limits": IS, "reduction": "token_mean", "entropy": True, "softcap": 9.0}):
        a, a_grad = run(batch, ratio=ratio, **kw)
        b, b_grad = run(batch, impl="triton_staged", ratio=ratio, **kw)
        for name, x, y in zip(a._fields, a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)
        assert torch.equal(a_grad, b_grad)


@pytest.mark.parametrize("ratio", RATIOS)
def test_packed_equals_padded_bitwise(ratio: str) -> None:
    batch = make_batch(LENGTHS, 61, dtype=torch.float32, padding=1)
    packed = pack(batch, LENGTHS)
    out, grad = run(batch, ratio=ratio)
    for impl in ("triton", "triton_staged"):
        logits = packed.logits.clone().to(DEVICE).requires_grad_()
        args = [x.to(DEVICE) for x in packed[1:]]
        got = topr_loss(logits, *args[:3], cu_seqlens=args[3], ratio=ratio, impl=impl)
        got.loss.backward()
        assert torch.equal(got.loss, out.loss) and torch.equal(got.log_ratio, out.log_ratio)
        rows = torch.cat([grad[i, : p + c] for i, (p, c) in enumerate(LENGTHS)])
        assert logits.grad is not None and torch.equal(logits.grad, rows)


@pytest.mark.parametrize(
    "offsets", [[0, 9, 6], [0, -3, 9], [1, 3, 9], [0, 3, 8], [0, 3, 1 << 30], [0, 0, 9]]
)
def test_unsound_offsets_poison_loss_and_gradient(offsets: list[int]) -> None:
    lengths = [(2, 3), (1, 3)]
    packed = pack(make_batch(lengths, 61, dtype=torch.float32), lengths)
    sound = offsets == [0, 0, 9]
    logits, labels = packed.logits[None].to(DEVICE), packed.labels[None].to(DEVICE)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    objective = Objective(
        packed.behavior_log_prob[None].to(DEVICE),
        packed.reward.to(DEVICE),
        None,
        *TOPR.log(),
        "sequence",
        0.0,
        "sequence_mean",
    )
    for forward in (triton_logits.topr_fwd, triton_logits.topr_fwd_staged):
        out = forward(logits, Tokens(labels, cu_seqlens, True), objective, PLAIN, False)
        assert out[0].isnan() != sound
        scalar = torch.ones((), device=DEVICE)
        saved = Saved(out[3], out[4], out[2], out[-1], scalar, out[1])
        grad = triton_logits.logits_bwd(logits, Tokens(labels, None, True), saved, PLAIN)
        # Every row but the last, which predicts nothing.
        assert grad[0, :-1].isnan().all(-1).all() != sound
    if sound:  # an empty sequence is legal and not counted
        assert out[11].tolist()[0] == 0 and out[1] == 1


def test_same_bits_on_every_run_and_for_any_order_of_sequences() -> None:
    batch = make_batch([(2, 4), (1, 6), (3, 0), (2, 9), (1, 1)], 61, dtype=torch.float32)
    first, first_grad = run(batch)
    again, again_grad = run(batch)
    assert torch.equal(first.loss, again.loss) and torch.equal(first_grad, again_grad)
    order = [3, 0, 4, 2, 1]
    out, grad = run(Batch(*(x[order] for x in batch)))
    assert torch.equal(out.weight, first.weight[order])
    assert torch.equal(grad, first_grad[order])


@pytest.mark.slow
def test_split_rows_equal_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(SHORT, 4097, dtype=torch.float32)
    whole, whole_grad = run(batch, entropy=True)
    small = triton_logits.Settings(BV=128, U=2, tiles_per_program=3, split=8, num_warps=4)
    monkeypatch.setattr(triton_logits, "settings", lambda *_: small)
    for impl in ("triton", "triton_staged"):
        out, grad = run(batch, impl=impl, entropy=True)
        torch.testing.assert_close(out.log_prob, whole.log_prob, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inplace_equals_not_inplace_bitwise(dtype: torch.dtype) -> None:
    batch = to_device(make_batch(LENGTHS, 193, dtype=dtype))
    _, expected = run(batch)
    leaf = batch.logits.detach().requires_grad_()
    logits = leaf * 1
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    loss = topr_loss(logits, *batch[1:], inplace=True, impl="triton").loss
    loss.backward(retain_graph=True)
    assert torch.equal(seen[0], expected) and seen[0].data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    check_against_reference(make_batch(LENGTHS, 193, dtype=dtype), softcap=9.0, temperature=0.8)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_log_prob_with_any_upstream_gradient(layout: str) -> None:
    batch = make_batch(LENGTHS, 61, dtype=torch.float32)
    data: Any = batch if layout == "padded" else pack(batch, LENGTHS)
    cu = None if layout == "padded" else data.cu_seqlens.to(DEVICE)
    g = torch.randn(data.labels.shape).to(DEVICE)
    results = []
    for impl in ("triton", "torch"):
        logits = data.logits.clone().to(DEVICE).requires_grad_()
        out = log_prob(
            logits, data.labels.to(DEVICE), cu_seqlens=cu, entropy=True, impl=impl, softcap=7.0
        )
        out.log_prob.backward(g)
        assert logits.grad is not None and logits.grad.abs().sum() > 0
        results.append((out.log_prob.detach(), out.lse, out.entropy, logits.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("ratio", ["sequence", "geometric"])
def test_summed_behavior_log_prob(ratio: str) -> None:
    batch = make_batch(LENGTHS, 61, dtype=torch.float32)
    summed = batch._replace(behavior_log_prob=batch.behavior_log_prob.double().sum(1))
    a, a_grad = run(batch, ratio=ratio)
    b, b_grad = run(summed, ratio=ratio)
    torch.testing.assert_close(a.log_ratio, b.log_ratio, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a_grad, b_grad, rtol=1e-4, atol=1e-7)
    assert b.token_log_ratio.isnan().all()


def test_long_sequence_sums_to_a_tenth_of_a_millinat() -> None:
    # The reduction alone, against fp64 over the kernel's own token log-probs.
    torch.manual_seed(0)
    n = 32768
    lp, mu = -torch.rand(n) * 3, -torch.rand(n) * 3
    outputs = [torch.empty(n), torch.empty(1), torch.empty(1), torch.empty(1), torch.empty(1)]
    length, d = torch.empty(1, dtype=torch.int64), torch.empty(n)
    args = [x.to(DEVICE) for x in (torch.zeros(n, dtype=torch.int64), lp, mu, torch.ones(1))]
    labels, lp_d, mu_d, reward = args
    outputs = [x.to(DEVICE) for x in outputs]
    triton_logits.sequences_fwd_kernel[(1,)](
        labels,
        None,
        n,
        1,
        lp_d,
        mu_d,
        None,
        reward,
        *outputs,
        length.to(DEVICE),
        d.to(DEVICE),
        *TOPR.log(),
        0.0,
        SHIFT=False,
        RATIO=0,
        REDUCTION=0,
        BT=512,
    )
    exact = (lp - mu).double().sum()
    assert abs(outputs[1].item() - exact.item()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_operators_keep_their_contract(layout: str) -> None:
    batch: Any = to_device(make_batch(SHORT, 61, dtype=torch.float32))
    data = batch if layout == "padded" else pack(batch, SHORT)
    lift = (lambda x: x) if layout == "padded" else (lambda x: x[None])
    logits, labels, mu = (lift(x) for x in data[:3])
    cu = None if layout == "padded" else data.cu_seqlens.to(DEVICE)
    temperature, softcap, shift = 0.9, 5.0, True
    rest = (temperature, softcap, True, shift)
    scoring = (logits.requires_grad_(), labels, cu, *rest, "triton")
    torch.library.opcheck(ops.log_prob_fwd, scoring)
    loss = (*scoring[:3], mu, data.reward, None, *TOPR.log(), "token", 0.1, "sum", *rest)
    torch.library.opcheck(ops.topr_fwd, (*loss, False, "triton"))
    token = [torch.rand_like(mu) for _ in range(4)]
    scalar = torch.rand(2, device=DEVICE)
    tail = (*token, scalar[0].clone(), scalar[1].clone(), temperature, softcap, shift, "triton")
    torch.library.opcheck(ops.logits_bwd, (logits.detach(), labels, cu, *tail))
    torch.library.opcheck(ops.logits_bwd_, (logits.detach().clone(), labels, cu, *tail))


@pytest.mark.slow
def test_compiled_in_one_graph_for_every_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def step(z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        out = topr_loss(z, *rest, impl="triton", temperature=0.9)
        return out.loss, out.weight

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for i, lengths in enumerate(([2, 3], [1, 5], [4, 3], [6, 2])):
        batch = to_device(make_batch([(2, n) for n in lengths], 13, dtype=torch.float32, seed=i))
        z = batch.logits.requires_grad_()
        expected, actual = step(z, *batch[1:]), compiled(z, *batch[1:])
        grads = [torch.autograd.grad(out[0], z)[0] for out in (expected, actual)]
        assert grads[0].any() and torch.equal(*grads)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        first = counter.frame_count if i == 0 else first
        assert counter.frame_count == first
    with pytest.raises(Exception, match="inplace=True"):
        torch.compile(
            lambda z, *rest: topr_loss(z, *rest, impl="triton", inplace=True).loss, fullgraph=True
        )(z, *batch[1:])


@triton.jit
def taper_kernel(p_x, p_low, p_high, p_value, p_weight, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = o < n
    x, low, high = tl.load(p_x + o, m), tl.load(p_low + o, m), tl.load(p_high + o, m)
    value, weight = triton_taper.taper(x, low, high)
    tl.store(p_value + o, value, m)
    tl.store(p_weight + o, weight, m)


def test_golden_table() -> None:
    cases = golden.cases()
    bounds = [PRESETS[p].log()[:2] if r > 0 else PRESETS[p].log()[2:] for p, r, *_ in cases]
    x = torch.tensor([c[2] for c in cases], device=DEVICE)
    low, high = (torch.tensor(b, device=DEVICE) for b in zip(*bounds, strict=True))
    value, weight = torch.empty_like(x), torch.empty_like(x)
    taper_kernel[(1,)](x, low, high, value, weight, len(cases), BLOCK=128)
    for got, column in ((value, 3), (weight, 4)):
        want = torch.tensor([c[column] for c in cases])
        torch.testing.assert_close(got.cpu(), want, rtol=SLACK * 5e-7, atol=0, equal_nan=True)


@triton.jit
def tanh_kernel(p_z, p_u, p_slope, inv_softcap, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = o < n
    u, slope = triton_rows.softcap_tanh(tl.load(p_z + o, m), inv_softcap)
    tl.store(p_u + o, u, m)
    tl.store(p_slope + o, slope, m)


@pytest.mark.parametrize("softcap", [1e-5, 0.3, 30.0, 1e4])
def test_the_tanh_of_a_softcap(softcap: float) -> None:
    x = torch.cat([torch.logspace(-6, 1.5, 500), torch.tensor([1e30, torch.inf])])
    z = torch.cat([x, -x, torch.tensor([0.0, torch.nan])]) * softcap
    u, slope = torch.empty(2, len(z), device=DEVICE)
    inv_softcap = 1 / softcap
    tanh_kernel[(1,)](z.to(DEVICE), u, slope, inv_softcap, len(z), BLOCK=1024, **NO_FUSION)
    exact = (z.double() / softcap).tanh()
    # Plain torch is not better: one rounding of the tanh, and 1 - tanh^2 from it.
    torch.testing.assert_close(u.cpu().double(), exact, rtol=SLACK * 3e-7, atol=0, equal_nan=True)
    exact = 1 - exact.square()
    torch.testing.assert_close(
        slope.cpu().double(), exact, rtol=0, atol=SLACK * 3e-7, equal_nan=True
    )
    assert (slope[z.abs() > 40 * softcap] < 1e-15).all()


def test_offsets_pass_two_to_the_thirty_first() -> None:
    # Two sequences whose rows lie more than 2^31 elements apart in a buffer that is barely touched.
    batch = make_batch([(1, 2), (1, 2)], 48, dtype=torch.float16)
    expected, expected_grad = run(batch)
    far = (1 << 31) + 48
    buffer = torch.empty(far + 3 * 48, dtype=torch.float16, device=DEVICE)
    logits = buffer.as_strided((2, 3, 48), (far, 48, 1))
    logits.copy_(batch.logits)
    out, grad = run(batch._replace(logits=logits))
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)
    # Tokens beside each other, columns far apart: another binary.
    batch = make_batch([(1, 2)], 3, dtype=torch.float16)
    expected, expected_grad = run(batch)
    logits = buffer.as_strided((1, 3, 3), (3, 1, 1 << 30))
    logits.copy_(batch.logits)
    out, grad = run(batch._replace(logits=logits))
    torch.testing.assert_close(out.loss, expected.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad)


def test_grids_have_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA allows 2^31 - 1 blocks along x, but only 65535 along y and z.
    grids = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **kw: None

    for name in ("rows_fwd_kernel", "sequences_fwd_kernel", "loss_fwd_kernel", "logits_bwd_kernel"):
        monkeypatch.setattr(triton_logits, name, Spy())
    logits, mu = torch.zeros(1, 70_000, 2), torch.zeros(1, 70_000)
    tokens = Tokens(torch.zeros(1, 70_000, dtype=torch.int64), None, True)
    objective = Objective(mu, torch.ones(1), None, *SFT.log(), "sequence", 0.0, "sum")
    triton_logits.topr_fwd(logits, tokens, objective, PLAIN, False)
    triton_logits.topr_fwd_staged(logits, tokens, objective, PLAIN, False)
    triton_logits.logits_bwd(logits, tokens, Saved(mu, mu, mu, mu, None, None), PLAIN)
    assert grids and all(len(g) == 1 for g in grids) and grids[0][0] >= 70_000


def test_launches_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel launched on cuda:0 with tensors of cuda:1 corrupts silently.
    inside: list[Tensor] = []
    launched = []

    class Guard:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            inside.append(self.x)

        def __exit__(self, *_: object) -> None:
            inside.pop()

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kw: launched.append(inside[-1] is logits)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for name in ("rows_fwd_kernel", "sequences_fwd_kernel", "loss_fwd_kernel", "logits_bwd_kernel"):
        monkeypatch.setattr(triton_logits, name, Spy())
    logits, mu = torch.zeros(1, 3, 16), torch.zeros(1, 3)
    tokens = Tokens(torch.zeros(1, 3, dtype=torch.int64), None, True)
    objective = Objective(mu, torch.ones(1), None, *SFT.log(), "sequence", 0.0, "sum")
    triton_logits.topr_fwd(logits, tokens, objective, PLAIN, False)
    triton_logits.topr_fwd_staged(logits, tokens, objective, PLAIN, False)
    triton_logits.log_prob_fwd(logits, tokens, PLAIN, False)
    triton_logits.logits_bwd(logits, tokens, Saved(mu, mu, mu, mu, None, None), PLAIN)
    assert len(launched) == 6 and all(launched)


def test_tuning_is_opt_in_and_keeps_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_logits, "TUNED", {})
    batch = make_batch(LENGTHS, 64, dtype=torch.float32)
    fixed, fixed_grad = run(batch)
    assert not triton_logits.TUNED
    found = triton_logits.tune(64, torch.float32, rows=1, repetitions=1)
    assert list(triton_logits.TUNED.values()) == [found]
    assert triton_logits.settings(64, 4, True, 1, 1) is found
    assert triton_logits.settings(64, 2, True, 1, 1) is not found
    out, grad = run(batch)
    torch.testing.assert_close(out.loss, fixed.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, fixed_grad, rtol=1e-5, atol=1e-8)


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match=r"impl='triton'.*float64"):
        run(make_batch(LENGTHS, 11))
