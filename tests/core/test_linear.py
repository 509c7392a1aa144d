"""The fused-linear path in exact mode: against the reference, and what it must not compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    TOPR,
    Limits,
    linear_log_prob,
    linear_topr_loss,
    log_prob,
    reference,
    topr_loss,
)
from topr_kernels.linear import gradient, head, matmul, operators, workspace
from topr_kernels.linear.plan import plan_tiles
from topr_kernels.testing import LinearBatch, assert_within_budget, make_linear_batch

RATIOS = ["sequence", "geometric", "token"]
REDUCTIONS = ["sequence_mean", "token_mean", "sum"]
VOCAB, DIM = 61, 8

lengths_strategy = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=6
).filter(lambda ls: sum(c for _, c in ls) > 0)


@contextmanager
def tiles(rows: int, tile: int | None = None) -> Iterator[None]:
    """Small tiles, so that small batches need several."""
    before = workspace.CPU_ROWS, workspace.CPU_TILE_ROWS, gradient.CPU_SPARSE_ROWS
    workspace.CPU_ROWS, workspace.CPU_TILE_ROWS = rows, tile or rows
    try:
        yield
    finally:
        workspace.CPU_ROWS, workspace.CPU_TILE_ROWS, gradient.CPU_SPARSE_ROWS = before


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "limits": PRESETS[draw(st.sampled_from(list(PRESETS)))]
        if draw(st.booleans())
        else Limits(0.2, 1.7, 0.05, 0.9),
        "ratio": draw(st.sampled_from(RATIOS)),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "baseline": draw(st.sampled_from([0.0, -0.5, 0.3, 1.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "softcap": draw(st.sampled_from([None, 4.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.6, 2.0])),
    }


def summed(batch: LinearBatch) -> LinearBatch:
    """The same with log mu summed per sequence."""
    scored = batch.labels != -100
    return batch._replace(behavior_log_prob=(batch.behavior_log_prob * scored).sum(1))


def a_bias(batch: LinearBatch) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(len(batch.weight), generator=g, dtype=torch.float64).to(batch.weight.dtype)


def run(
    batch: LinearBatch, bias: Tensor | None = None, frozen: tuple[str, ...] = (), **kw: Any
) -> tuple[Any, list[Tensor | None]]:
    """Loss and the gradients of hidden, weight and bias."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    if bias is not None:
        bias = bias.detach().clone().requires_grad_("bias" not in frozen)
    out = linear_topr_loss(hidden, weight, *batch[2:], bias=bias, **kw)
    out.loss.backward()
    return out, [x.grad for x in (hidden, weight, *([] if bias is None else [bias]))]


def plain(
    batch: LinearBatch,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    round_to: torch.dtype | None = None,
    **kw: Any,
) -> tuple[Any, list[Tensor]]:
    """The reference on whole logits in ``dtype``; operands as they are, logits rounded if asked."""
    inputs = [x.detach().clone().requires_grad_() for x in batch[:2]]
    if bias is not None:
        inputs.append(bias.detach().clone().requires_grad_())
    logits = torch.nn.functional.linear(*(x.to(dtype) for x in inputs))
    logits = logits * kw.pop("logit_scale", 1.0)
    if round_to is not None:
        logits = logits.to(round_to).to(dtype)
    rest = [x.to(dtype) if x.is_floating_point() else x for x in batch[2:]]
    out = reference.topr_loss(logits, *rest, **kw)
    out.loss.backward()
    return out, [x.grad for x in inputs if x.grad is not None]


@given(
    lengths_strategy,
    options(),
    st.integers(0, 10**6),
    st.sampled_from([(2, 2), (4, 8), (16, 16), (256, 512)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_fp64_equals_the_reference(
    lengths: list[tuple[int, int]],
    kw: dict[str, Any],
    seed: int,
    rows: tuple[int, int],
    with_bias: bool,
    sum_behavior: bool,
    normalize: bool,
) -> None:
    batch = make_linear_batch(lengths, VOCAB, DIM, seed=seed)
    if sum_behavior and kw["ratio"] != "token":
        batch = summed(batch)
    if normalize and kw["reduction"] != "sum":
        kw = {**kw, "normalizer": 7.5}
    bias = a_bias(batch) if with_bias else None
    with tiles(*rows):
        out, grads = run(batch, bias, **kw)
    ref, ref_grads = plain(batch, bias, **kw)
    torch.testing.assert_close(out.loss, ref.loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.log_ratio, ref.log_ratio, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.weight, ref.weight, rtol=1e-10, atol=1e-10)
    assert len(grads) == len(ref_grads)
    for grad, expected in zip(grads, ref_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("ratio", RATIOS)
def test_fp32_stays_within_the_budget_of_plain_torch(ratio: str, rows: int) -> None:
    kw = {"ratio": ratio, "temperature": 0.8, "softcap": 9.0, "limits": Limits(0.3, 2.0, 0.1, 1.5)}
    batch = make_linear_batch([(2, 5), (1, 9), (3, 1)], 501, 24, dtype=torch.float32)
    bias = a_bias(batch)
    with tiles(rows):
        out, grads = run(batch, bias, **kw)
    ref, ref_grads = plain(batch, bias, **kw)
    ref32, grads32 = plain(batch, bias, torch.float32, **kw)
    assert ref_grads[0].abs().max() > 1e-3
    # The largest log-prob is where rounding enters a ratio.
    assert_within_budget("loss", out.loss, ref32.loss, ref.loss, operand=10)
    assert_within_budget("log_ratio", out.log_ratio, ref32.log_ratio, ref.log_ratio, operand=10)
    for name, grad, grad32, expected in zip("hwb", grads, grads32, ref_grads, strict=True):
        assert grad is not None
        assert_within_budget(name, grad, grad32, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1 << 22, 1 << 9])
def test_half_precision_is_better_than_half_precision_logits(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands are half, logits and sums fp32: the budget is the rounding of the results alone."""
    monkeypatch.setattr(head, "CPU_BLOCK", block)
    batch = make_linear_batch([(2, 5), (1, 9), (3, 1)], 501, 24, dtype=dtype)
    bias = a_bias(batch)
    with tiles(4):
        out, grads = run(batch, bias)
    # fp64 arithmetic on the very same half-precision operands; plain torch: the same in fp32.
    ref, ref_grads = plain(batch, bias)
    ref32, _ = plain(batch, bias, torch.float32)
    assert out.loss.dtype == torch.float32
    assert_within_budget("log_ratio", out.log_ratio, ref32.log_ratio, ref.log_ratio, operand=10)
    for name, grad, expected in zip("hwb", grads, ref_grads, strict=True):
        assert grad is not None
        assert grad.dtype == dtype
        # At most two roundings to half: of the row without its coefficient, and of the result.
        bound = 2.01 * torch.finfo(dtype).eps * expected.abs() + 1e-7
        assert ((grad.double() - expected).abs() <= bound).all(), name


def small_batch(**kw: Any) -> LinearBatch:
    """For gradcheck, which runs twice per number: in tiles of 2 rows, a sequence in two of them."""
    return make_linear_batch([(2, 3), (1, 2)], 7, 2, **kw)


def test_log_prob_is_differentiable_with_any_upstream_gradient() -> None:
    batch = small_batch()
    bias = a_bias(batch)
    kw: dict[str, Any] = {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3}

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_log_prob(hidden, weight, batch.labels, bias=bias, **kw).log_prob

    inputs = [x.detach().clone().requires_grad_() for x in (*batch[:2], bias)]
    with tiles(2):
        assert torch.autograd.gradcheck(f, inputs)
        out = linear_log_prob(*inputs[:2], batch.labels, bias=inputs[2], entropy=True, **kw)
    logits = 1.3 * torch.nn.functional.linear(*inputs)
    expected = log_prob(logits, batch.labels, entropy=True, softcap=5.0, temperature=0.7)
    for name in ("log_prob", "lse", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name))
    assert not out.lse.requires_grad
    assert not out.entropy.requires_grad


@pytest.mark.parametrize(
    ("ratio", "softcap"), [("sequence", None), ("geometric", 5.0), ("token", 5.0)]
)
def test_gradcheck(ratio: str, softcap: float | None) -> None:
    batch = small_batch(drift=0.1)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kw: dict[str, Any] = {"limits": IS, "ratio": ratio, "softcap": softcap}
        return linear_topr_loss(hidden, weight, *batch[2:], bias=bias, **kw).loss

    inputs = [x.detach().clone().requires_grad_() for x in (*batch[:2], a_bias(batch))]
    with tiles(2):
        assert torch.autograd.gradcheck(f, inputs)


# ---- layouts ---------------------------------------------------------------------------------------


def packed(batch: LinearBatch, lengths: list[tuple[int, int]]) -> tuple[tuple[Tensor, ...], Tensor]:
    sizes = [p + c for p, c in lengths]

    def cat(x: Tensor) -> Tensor:
        return torch.cat([x[i, :n] for i, n in enumerate(sizes)])

    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return (
        cat(batch.hidden),
        batch.weight,
        cat(batch.labels),
        cat(batch.behavior_log_prob),
        batch.reward,
    ), offsets


@given(lengths_strategy, st.integers(0, 10**6), st.sampled_from(RATIOS))
def test_packed_equals_padded(lengths: list[tuple[int, int]], seed: int, ratio: str) -> None:
    batch = make_linear_batch(lengths, VOCAB, DIM, seed=seed, padding=2)
    inputs, offsets = packed(batch, lengths)
    with tiles(4):
        a = linear_topr_loss(*batch, ratio=ratio)
        b = linear_topr_loss(*inputs, ratio=ratio, cu_seqlens=offsets)
        c = linear_topr_loss(
            inputs[0].unsqueeze(0),
            inputs[1],
            *(x.unsqueeze(0) for x in inputs[2:4]),
            inputs[4],
            ratio=ratio,
            cu_seqlens=offsets,
        )
    for x in (b, c):
        assert torch.equal(a.loss, x.loss)
        assert torch.equal(a.weight, x.weight)


def test_aligned_rows_and_summed_behavior() -> None:
    batch = make_linear_batch([(1, 6), (2, 3)], VOCAB, DIM)
    a, grads = run(batch)
    b, same = run(summed(batch))
    torch.testing.assert_close(a.loss, b.loss)
    assert b.token_log_ratio.isnan().all()
    torch.testing.assert_close(grads[0], same[0])
    aligned = batch._replace(
        hidden=batch.hidden[:, :-1],
        labels=batch.labels[:, 1:],
        behavior_log_prob=batch.behavior_log_prob[:, 1:],
    )
    c, rows = run(aligned, shift=False)
    torch.testing.assert_close(a.loss, c.loss)
    torch.testing.assert_close(grads[0][:, :-1], rows[0])  # type: ignore[index]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("dtype", "vocab", "rows"),
    [(torch.float32, 1003, 32), (torch.bfloat16, 1003, 32), (torch.bfloat16, 34000, 16)],
)
def test_a_rows_log_prob_is_bitwise_the_same_in_any_company(
    dtype: torch.dtype, vocab: int, rows: int
) -> None:
    """Equal hidden rows and head: packing, batch size, order, gradient and tile change no bit."""
    lengths = [(2, 30), (1, 9), (3, 61), (4, 1), (2, 17), (1, 44)]
    if vocab > 2000:  # more tiles than rows of one are enough
        lengths = [(2, 9), (1, 5), (3, 20), (4, 1), (2, 7), (1, 18)]
    batch = make_linear_batch(lengths, vocab, 48, dtype=dtype, seed=3)
    bias = a_bias(batch)
    workspace = rows * vocab * 4
    whole, _ = run(batch, bias, workspace_bytes=workspace)
    with torch.no_grad():
        scorer = linear_log_prob(*batch[:3], bias=bias, workspace_bytes=workspace)
    assert torch.equal(whole.log_prob, scorer.log_prob)
    assert torch.equal(whole.log_prob != 0, batch.labels != -100)
    inputs, offsets = packed(batch, lengths)
    out = linear_topr_loss(*inputs, bias=bias, cu_seqlens=offsets, workspace_bytes=workspace)
    sizes = [p + c for p, c in lengths]
    for i, part in enumerate(out.log_prob.split(sizes)):
        assert torch.equal(part, whole.log_prob[i, : sizes[i]])
    for order in ([5, 4, 3, 2, 1, 0], [2], [3, 0]):
        some = LinearBatch(
            batch.hidden[order],
            batch.weight,
            batch.labels[order],
            batch.behavior_log_prob[order],
            batch.reward[order].abs(),
        )
        out, _ = run(some, bias, workspace_bytes=workspace)
        assert torch.equal(out.log_prob, whole.log_prob[order])


@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.booleans()), min_size=0, max_size=12),
    st.integers(1, 12),
)
def test_the_plan_holds_every_row_once(
    sequences: list[tuple[int, bool, bool]], capacity: int
) -> None:
    lengths = [n for n, _, _ in sequences]
    graded = [g for _, g, _ in sequences]
    whole = [w and n <= capacity for n, _, w in sequences]
    order, planned = plan_tiles(lengths, graded, whole, capacity)
    owner = [s for s, n in enumerate(lengths) for _ in range(n)]
    assert sorted(order.tolist()) == list(range(sum(lengths)))
    assert [t.start for t in planned] == [
        sum(t.size for t in planned[:i]) for i in range(len(planned))
    ]
    homes: dict[int, set[int]] = {}
    for i, tile in enumerate(planned):
        rows = [owner[k] for k in order[tile.start : tile.start + tile.size].tolist()]
        assert 0 < len(rows) <= capacity
        assert [s for s, n in tile.parts for _ in range(n)] == rows[: tile.graded_size]
        assert not any(graded[s] for s in rows[tile.graded_size :])
        for s in rows:
            homes.setdefault(s, set()).add(i)
    for s, tiles_of in homes.items():
        assert not (whole[s] and graded[s]) or len(tiles_of) == 1


# ---- accuracy of the sequence log-ratio ------------------------------------------------------------


@pytest.mark.slow
def test_the_reduction_of_a_long_sequence_adds_no_error() -> None:
    """32768 tokens: within 1e-4 nat of fp64 over the op's own log-probs."""
    batch = make_linear_batch([(1, 32768)], 97, 8, dtype=torch.float32, drift=0.05)
    with torch.no_grad():
        out = linear_topr_loss(*batch)
    scored = batch.labels != -100
    own = (out.log_prob.double() - batch.behavior_log_prob.double())[scored].sum()
    assert own.abs() > 1
    assert abs(float(out.log_ratio[0].double() - own)) < 1e-4


@pytest.mark.slow
def test_the_whole_op_is_as_accurate_as_plain_torch_with_fp32_logits() -> None:
    """Mean and spread of the error of 2048-token log-probs apart, on bf16 hidden states and head."""
    batch = make_linear_batch([(1, 2048)] * 6, 2048, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        got = linear_log_prob(*batch[:3]).log_prob.double()
        exact = batch.hidden.double() @ batch.weight.double().T
        truth = log_prob(exact, batch.labels).log_prob
        fp32 = log_prob(batch.hidden.float() @ batch.weight.float().T, batch.labels).log_prob
        bf16 = log_prob((batch.hidden @ batch.weight.T).contiguous(), batch.labels).log_prob

    def mean_and_spread(x: Tensor) -> tuple[float, float]:
        token = (x.double() - truth)[batch.labels != -100]
        return abs(float(token.mean())), float(token.std())

    ours, plain32, plain16 = (mean_and_spread(x) for x in (got, fp32, bf16))
    eps = torch.finfo(torch.float32).eps
    assert ours[0] <= 2 * (plain32[0] + eps)
    assert ours[1] <= 2 * (plain32[1] + eps)
    # What the fp32 logits are for: rounding them to bf16 costs four digits.
    assert plain16[1] > 1000 * ours[1]


# ---- what is not computed --------------------------------------------------------------------------


class Matmuls:
    """Counts the rows that go through the forward product, that of d_hidden and that of d_weight."""

    def __init__(self) -> None:
        self.rows = {"forward": 0, "hidden": 0, "weight": 0}

    def __enter__(self) -> Matmuls:
        self.real = matmul.mm
        matmul.mm = self.record  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        matmul.mm = self.real

    def record(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        (m, k), n = a.shape, b.shape[1]
        if (k, n) == (DIM, VOCAB):  # fewer columns than a block
            self.rows["forward"] += m
        elif (k, n) == (VOCAB, DIM):
            self.rows["hidden"] += m
        elif (m, n) == (VOCAB, DIM):
            self.rows["weight"] += k
        self.real(a, b, out, accumulate)


def matmul_rows(batch: LinearBatch, frozen: tuple[str, ...] = (), **kw: Any) -> dict[str, int]:
    with Matmuls() as seen:
        run(batch, None, frozen, **kw)
    return seen.rows


LENGTHS = [(5, 6), (2, 7), (9, 3)]
SCORED = 16


def signed(reward: list[float], **kw: Any) -> LinearBatch:
    batch = make_linear_batch(LENGTHS, VOCAB, DIM, padding=3, **kw)
    return batch._replace(reward=torch.tensor(reward, dtype=batch.reward.dtype))


def test_three_matmuls_over_the_scored_rows_alone() -> None:
    with tiles(16):
        seen = matmul_rows(signed([1, -1, -1]))
    assert seen == {"forward": 16, "hidden": SCORED, "weight": SCORED}


@pytest.mark.parametrize(
    "kw",
    [
        {"ratio": "segment"},
        {"ratio": "segment_geometric", "sequence_weight": torch.ones(3)},
        {"limits": lambda x, _: (x.exp(), x.exp())},
        {"limits": lambda x, _: (x.exp(), x.exp()), "ratio": "segment"},
    ],
)
def test_three_matmuls_for_segments_and_callables_too(kw: dict[str, Any]) -> None:
    batch = signed([1, -1, -1])
    batch.labels[1, 4] = -100
    with tiles(16):
        seen = matmul_rows(batch, **kw)
    assert seen == {"forward": 16, "hidden": SCORED - 1, "weight": SCORED - 1}


def test_zero_rewards_and_dead_sequences_leave_the_backward() -> None:
    with tiles(16):
        assert matmul_rows(signed([1, 0, -1])) == {"forward": 16, "hidden": 9, "weight": 9}
        dead = signed([1, -1, -1])
        dead.behavior_log_prob[1] = 200.0  # 7 tokens: e^-1400 is 0 in fp64 too
        out, _ = run(dead)
        assert out.weight[1] == 0
        assert matmul_rows(dead) == {"forward": 16, "hidden": 9, "weight": 9}
        assert matmul_rows(signed([1, -1, -1]), limits=SFT)["hidden"] == 6
        assert matmul_rows(signed([0, 0, 0])) == {"forward": 16, "hidden": 0, "weight": 0}


def test_frozen_parts_cost_nothing() -> None:
    with tiles(16):
        assert matmul_rows(signed([1, -1, 1]), ("weight",))["weight"] == 0
        assert matmul_rows(signed([1, -1, 1]), ("hidden",))["hidden"] == 0
    batch = signed([1, -1, 1])
    _, (d_hidden, d_weight) = run(batch)
    _, (only_hidden, none) = run(batch, None, ("weight",))
    assert none is None
    torch.testing.assert_close(only_hidden, d_hidden)
    _, (none, only_weight) = run(batch, None, ("hidden",))
    assert none is None
    torch.testing.assert_close(only_weight, d_weight)


def test_no_gradient_work_without_grad() -> None:
    batch = signed([1, -1, 1])
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    with tiles(16), torch.no_grad(), Matmuls() as seen:
        out = linear_topr_loss(hidden, weight, *batch[2:])
        linear_log_prob(hidden, weight, batch.labels)
    assert seen.rows == {"forward": 32, "hidden": 0, "weight": 0}
    assert out.active_share.isnan()
    assert out.left_out.isnan()
    with_grad, _ = run(batch)
    assert torch.equal(out.loss, with_grad.loss)
    assert with_grad.active_share == 1
    assert with_grad.left_out == 0


def test_log_prob_backward_recomputes_only_rows_with_an_upstream_gradient() -> None:
    batch = signed([1, -1, 1])
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    with tiles(8):
        out = linear_log_prob(hidden, weight, batch.labels)
        with Matmuls() as seen:
            out.log_prob[1].sum().backward()
    assert seen.rows == {"forward": 8, "hidden": 7, "weight": 7}


def test_a_sequence_longer_than_a_tile() -> None:
    """Scored first when its weight must wait for its last row, and only then."""
    batch = make_linear_batch([(1, 41), (1, 33), (2, 5)], VOCAB, DIM, drift=0.05)
    batch = batch._replace(reward=torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    batch.behavior_log_prob.add_(0.05)
    with tiles(8, 16):
        out, grads = run(batch)
        seen = matmul_rows(batch)
        # 41 + 33 + 5 scored rows, the 33 of the long negative once more, each part up to 7 of padding.
        assert 41 + 33 + 5 + 33 <= seen["forward"] <= 41 + 33 + 5 + 33 + 2 * 7
        assert seen["hidden"] == seen["weight"] == 41 + 33 + 5
        # Reinforce and token ratios need nothing of the whole sequence.
        for kw in ({"limits": REINFORCE}, {"ratio": "token"}):
            assert matmul_rows(batch, **kw)["forward"] == 80
    ref, ref_grads = plain(batch)
    assert 0 < float(ref.weight[1]) < 1
    torch.testing.assert_close(out.loss, ref.loss)
    for grad, expected in zip(grads, ref_grads, strict=True):
        torch.testing.assert_close(grad, expected)
    dead = batch._replace(behavior_log_prob=batch.behavior_log_prob + 600)
    with tiles(8, 16):
        # Dead ones leave: the 33 rows are multiplied once, and not at all in the backward.
        assert matmul_rows(dead) == {"forward": 40 + 48, "hidden": 41, "weight": 41}


# ---- autograd --------------------------------------------------------------------------------------


def test_the_upstream_gradient_is_applied() -> None:
    batch = signed([1, -1, 1])
    _, (d_hidden, d_weight) = run(batch)
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    (linear_topr_loss(hidden, weight, *batch[2:]).loss * -2.5).backward()
    torch.testing.assert_close(hidden.grad, -2.5 * d_hidden)  # type: ignore[operator]
    torch.testing.assert_close(weight.grad, -2.5 * d_weight)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_coefficients_do_not_underflow(dtype: torch.dtype) -> None:
    """A loss scale arrives after the products: nothing may have been flushed to 0 by then."""
    batch = make_linear_batch([(2, 5), (1, 9)], VOCAB, DIM, dtype=dtype)
    batch = batch._replace(reward=torch.tensor([1e-6, -1e-6]))
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    (linear_topr_loss(hidden, weight, *batch[2:]).loss * 1e6).backward()
    big = batch._replace(reward=batch.reward * 1e6)
    _, (d_hidden, d_weight) = run(big)
    torch.testing.assert_close(
        hidden.grad, d_hidden, rtol=3e-3 if dtype == torch.float16 else 2e-2, atol=1e-4
    )
    torch.testing.assert_close(
        weight.grad, d_weight, rtol=3e-3 if dtype == torch.float16 else 2e-2, atol=1e-4
    )


@pytest.mark.parametrize(
    ("reward", "limits", "tolerance"),
    [
        (1e-7, TOPR, 0.0),
        (1.0, IS, 0.0),
        (3e4, IS, 0.0),
        (1e-7, TOPR, 2.0**-5),
        (3e4, IS, 2.0**-5),
    ],
)
def test_fp16_operands_neither_underflow_nor_overflow(
    reward: float, limits: Limits, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: operands of the products rounded to fp16, weights up to e^9 with unbounded limits."""

    def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)

    class Half(head.HeadProducts):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.operand = torch.float16

    batch = make_linear_batch([(2, 9), (1, 12), (2, 7)], 1024, 16, dtype=torch.float16, sharpness=9)
    batch = batch._replace(reward=reward * torch.tensor([1.0, -1.0, 0.5]))
    batch.behavior_log_prob[0] -= 1.0
    bias = a_bias(batch)
    wide = LinearBatch(*(x.double() if x.is_floating_point() else x for x in batch))
    _, expected = plain(wide, bias.double(), limits=limits)
    monkeypatch.setattr(operators, "HeadProducts", Half)
    monkeypatch.setattr(matmul, "mm", mm)
    # The loss scale that fp16 training brings, and half-precision gradients need.
    scale = 2.0**-10 / reward
    hidden, weight, b = (x.clone().requires_grad_() for x in (*batch[:2], bias))
    with tiles(8, 16):
        kw: dict[str, Any] = {"limits": limits, "grad_tolerance": tolerance}
        out = linear_topr_loss(hidden, weight, *batch[2:], bias=b, **kw)
        (scale * out.loss).backward()
    assert tolerance == 0 or out.active_share < 1
    for name, got, want in zip("hwb", (hidden.grad, weight.grad, b.grad), expected, strict=True):
        assert got is not None
        want = want * scale
        wrong = (got.double() - want.double()).norm() / want.double().norm()
        assert wrong < 4e-3 + 2 * tolerance, name


def test_buffers_of_inference_mode_and_refilled_ones() -> None:
    batch = signed([1, -1, 1])
    _, expected = run(batch)
    with torch.inference_mode():
        constants = [x.clone() for x in batch[2:]]
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    linear_topr_loss(hidden, weight, *constants).loss.backward()
    torch.testing.assert_close(weight.grad, expected[1])
    hidden.grad = weight.grad = None
    again = [x.clone() for x in batch[2:]]
    loss = linear_topr_loss(hidden, weight, *again).loss
    again[0].fill_(0)
    again[2].fill_(9)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, expected[1])
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * expected[1])  # type: ignore[operator]


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    batch = signed([1, -1, 1])
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    out = linear_topr_loss(hidden, weight, *batch[2:])
    first = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * out.loss, (hidden, weight), retain_graph=True)
    for a, b, k in zip(first, second, kept, strict=True):
        assert torch.equal(a, k)
        torch.testing.assert_close(b, 3 * k)


def test_double_backward_raises() -> None:
    batch = signed([1, -1, 1])
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    out = linear_topr_loss(hidden, weight, *batch[2:])
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.loss, hidden, create_graph=True)
    lp = linear_log_prob(hidden, weight, batch.labels).log_prob
    (grad,) = torch.autograd.grad(lp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable a second time"):
        grad.sum().backward()


def test_checkpointing_runs_it_twice_and_is_right() -> None:
    batch = signed([1, -1, 1])
    _, (d_hidden, d_weight) = run(batch)
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    loss = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_topr_loss(h * 1, w, *batch[2:]).loss,
        hidden,
        weight,
        use_reentrant=False,
    )
    loss.backward()
    torch.testing.assert_close(hidden.grad, d_hidden)
    torch.testing.assert_close(weight.grad, d_weight)


def test_tied_weights_get_their_gradient_once() -> None:
    batch = signed([1, -1, 1])
    tokens = torch.randint(0, VOCAB, batch.labels.shape)

    def gradient(fused: bool) -> Tensor:
        weight = batch.weight.clone().requires_grad_()
        hidden = torch.tanh(3 * weight[tokens])
        if fused:
            loss = linear_topr_loss(hidden, weight, *batch[2:]).loss
        else:
            loss = reference.topr_loss(hidden @ weight.T, *batch[2:]).loss
        loss.backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_strided_inputs() -> None:
    batch = signed([1, -1, 1])
    _, grads = run(batch)
    strided = batch._replace(
        hidden=batch.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight=batch.weight.T.contiguous().T,
        labels=batch.labels.T.contiguous().T,
        behavior_log_prob=batch.behavior_log_prob.T.contiguous().T,
    )
    _, same = run(strided)
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_computes_in_its_dtype_and_keeps_dw_in_fp32() -> None:
    batch = make_linear_batch([(2, 5), (1, 9)], VOCAB, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, (d_hidden, d_weight) = run(batch)
    rounded = batch._replace(
        hidden=batch.hidden.bfloat16().float(), weight=batch.weight.bfloat16().float()
    )
    expected, (h, w) = run(rounded)
    torch.testing.assert_close(out.loss, expected.loss)
    assert d_weight is not None
    assert d_hidden is not None
    assert (d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(d_hidden, h)
    torch.testing.assert_close(d_weight, w)
    half = batch._replace(hidden=batch.hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        again, (d_hidden, d_weight) = run(half)
    assert torch.equal(again.loss, out.loss)
    assert d_hidden is not None
    assert d_hidden.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.bfloat16.*autocast"):
        run(half)


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-8])
def test_operators_keep_their_contract(tolerance: float, cpu_impl: str) -> None:
    from topr_kernels.ops import linear as ops

    batch = make_linear_batch([(2, 5), (1, 9)], 1024, DIM, dtype=torch.float32)
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    linear_topr_loss(hidden, weight, *batch[2:])
    common = (torch.float32, 1.0, None, 0.9)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        ops.linear_log_prob_fwd,
        (
            hidden,
            weight,
            None,
            batch.labels,
            None,
            *common,
            True,
            True,
            tolerance,
            1 << 20,
            cpu_impl,
        ),
        test_utils=tests,
    )
    torch.library.opcheck(
        ops.linear_log_prob_bwd,
        (
            *(hidden.detach(), weight.detach(), None, batch.labels, None),
            *(torch.rand(batch.labels.shape), *common, True, tolerance, 1 << 20),
            *(True, True, False, cpu_impl),
        ),
        test_utils=tests,
    )
    torch.library.opcheck(
        ops.linear_topr_fwd,
        (
            *(hidden, weight, None, batch.labels, None, *batch[3:], None),
            *(TOPR.log(), "sequence", 0.0, "sequence_mean", None, None, None, *common),
            *(False, True),
            *(tolerance, 1 << 20, True, True, False, cpu_impl),
        ),
        test_utils=tests,
    )


def test_compiles_to_one_graph() -> None:
    batch = make_linear_batch([(2, 5), (1, 9)], VOCAB, DIM, dtype=torch.float32)
    bias = a_bias(batch)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = linear_topr_loss(torch.tanh(hidden), weight, *batch[2:], bias=bias, temperature=0.9)
        lp = linear_log_prob(hidden, weight, batch.labels).log_prob
        return 2 * out.loss + lp.mean()

    grads = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        inputs = [x.detach().clone().requires_grad_() for x in (*batch[:2], bias)]
        loss = g(*inputs)
        loss.backward()
        grads.append([loss.detach(), *(x.grad for x in inputs)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- edges -----------------------------------------------------------------------------------------


def test_nothing_scored_is_a_connected_zero() -> None:
    batch = signed([1, -1, 1])
    batch.labels.fill_(-100)
    out, grads = run(batch)
    assert out.loss == 0
    for grad in grads:
        assert grad is not None
        assert (grad == 0).all()


def test_masked_nan_never_spreads_and_scored_nan_always_does() -> None:
    batch = signed([1, -1, 1])
    _, expected = run(batch)
    rows = torch.zeros(batch.labels.shape, dtype=torch.bool)
    rows[:, :-1] = batch.labels[:, 1:] != -100
    batch.hidden[~rows] = torch.nan
    batch.behavior_log_prob[batch.labels == -100] = torch.nan
    out, grads = run(batch)
    assert out.loss.isfinite()
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
    batch.hidden[1][rows[1].nonzero()[0]] = torch.nan
    out, grads = run(batch)
    assert out.loss.isnan()
    assert grads[1] is not None
    assert grads[1].isnan().any()


def test_a_nan_of_a_sequence_with_reward_0_reaches_every_gradient() -> None:
    """It leaves the backward, and the loss is NaN all the same."""
    batch = signed([1, 0, 1])
    batch.behavior_log_prob[1][batch.labels[1] != -100] = torch.nan
    out, grads = run(batch, a_bias(batch))
    assert out.loss.isnan()
    for grad in grads:
        assert grad is not None
        assert grad.isnan().any()


def test_banned_tokens() -> None:
    """A head row whose logit is -inf everywhere, by its bias: gradient 0, never NaN."""
    batch = signed([1, -1, 1])
    bias = a_bias(batch)
    banned = next(v for v in range(VOCAB) if not (batch.labels == v).any())
    bias[banned] = -torch.inf
    out, grads = run(batch, bias)
    assert out.loss.isfinite()
    for grad in grads:
        assert grad is not None
        assert grad.isfinite().all()
    assert grads[1] is not None
    assert (grads[1][banned] == 0).all()


def test_unsound_offsets_and_labels_poison_in_graphs() -> None:
    """Where values may not be read they turn the loss into NaN; here through the operator."""
    batch = signed([1, -1, 1])
    inputs, offsets = packed(batch, LENGTHS)
    offsets[1] = 999
    with pytest.raises(ValueError, match="cu_seqlens"):
        linear_topr_loss(*inputs, cu_seqlens=offsets)

    def f(hidden: Tensor) -> Tensor:
        return linear_topr_loss(hidden, *inputs[1:], cu_seqlens=offsets).loss

    hidden = inputs[0].clone().requires_grad_()
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(hidden)
    loss.backward()
    assert loss.isnan()
    assert hidden.grad is not None
    assert hidden.grad.isnan().all()

    def g(hidden: Tensor) -> Tensor:
        return linear_log_prob(hidden, *inputs[1:3], cu_seqlens=offsets).log_prob

    assert torch.compile(g, fullgraph=True, backend="aot_eager")(hidden).isnan().all()
    wrong = torch.where(inputs[2] >= 0, inputs[2] + VOCAB, inputs[2])

    def h(hidden: Tensor) -> Tensor:
        _, sound = packed(batch, LENGTHS)
        return linear_topr_loss(hidden, inputs[1], wrong, *inputs[3:], cu_seqlens=sound).loss

    assert torch.compile(h, backend="aot_eager")(hidden).isnan()


@pytest.mark.parametrize("shift", [True, False])
def test_scoring_packed_and_aligned_rows(shift: bool) -> None:
    batch = signed([1, -1, 1])
    inputs, offsets = packed(batch, LENGTHS)
    kw: dict[str, Any] = {"cu_seqlens": offsets, "shift": shift, "entropy": True}
    got = linear_log_prob(*inputs[:3], **kw)
    want = log_prob(inputs[0] @ inputs[1].T, inputs[2], **kw)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_matches_the_logits_path() -> None:
    batch = signed([1, -0.5, -1], dtype=torch.float32)
    kw: dict[str, Any] = {"temperature": 0.8, "entropy": True, "baseline": 0.1}
    fused, _ = run(batch, **kw)
    logits = batch.hidden @ batch.weight.T
    plain_out = topr_loss(logits, *batch[2:], **kw)
    for name in set(fused._fields) - {"active_share", "left_out"}:
        a, b = getattr(fused, name), getattr(plain_out, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert set(fused.metrics()) == set(plain_out.metrics())


class FakeShard(torch.nn.Parameter):
    def full_tensor(self) -> Tensor:
        return self.data


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.nn.Linear(DIM, VOCAB)}, TypeError, "lm_head.weight, not the module"),
        ({"weight": torch.zeros(DIM, VOCAB)}, ValueError, "not its transpose"),
        ({"weight": torch.zeros(VOCAB, DIM).bfloat16()}, TypeError, "cast one of them"),
        ({"weight": FakeShard(torch.zeros(VOCAB, DIM))}, TypeError, "full_tensor"),
        ({"bias": torch.zeros(VOCAB + 1)}, ValueError, "bias: expected shape"),
        ({"hidden": torch.zeros(3, 2)}, ValueError, "labels: expected shape"),
        ({"hidden": None}, TypeError, "hidden: expected a torch.Tensor"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a finite number > 0"),
        ({"grad_tolerance": 1.0}, ValueError, "grad_tolerance: expected 0"),
        ({"grad_tolerance": -0.1}, ValueError, "grad_tolerance: expected 0"),
        ({"grad_tolerance": "0"}, TypeError, "grad_tolerance: expected a Python number"),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes: expected at least"),
        ({"workspace_bytes": 1e9}, TypeError, "workspace_bytes: expected an int"),
        ({"impl": "cuda"}, ValueError, "impl: expected 'auto' or one of"),
        ({"labels": torch.full((3, 15), VOCAB)}, ValueError, "labels: expected token ids"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = signed([1, -1, 1], dtype=torch.float32)
    inputs = {**batch._asdict(), **change}
    with pytest.raises(error, match=message):
        linear_topr_loss(**inputs)
    if not {"behavior_log_prob", "reward"} & set(change):
        inputs.pop("behavior_log_prob")
        inputs.pop("reward")
        with pytest.raises(error, match=message):
            linear_log_prob(**inputs)
