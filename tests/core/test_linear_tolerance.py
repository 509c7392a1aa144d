"""The active-vocabulary backward: what it may leave out, what it puts back, when it steps aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linear import a_bias, plain, run, tiles
from torch import Tensor

from topr_kernels import TOPR, linear_log_prob, linear_topr_loss
from topr_kernels.linear import active, gradient
from topr_kernels.linear.active import COLUMN_MULTIPLE, DENSE_SHARE, cluster_rows, select_columns
from topr_kernels.testing import LinearBatch, make_linear_batch

VOCAB, DIM = 2048, 16
TAU = 2.0**-6


def peaked(
    lengths: list[tuple[int, int]], sharpness: float = 8.0, seed: int = 0, **kw: Any
) -> LinearBatch:
    batch = make_linear_batch(lengths, VOCAB, DIM, sharpness=sharpness, seed=seed, **kw)
    reward = torch.ones(len(lengths), dtype=batch.reward.dtype)
    reward[1::2] = -0.8
    return batch._replace(reward=reward)


def gradient_of_logits(batch: LinearBatch, **kw: Any) -> Tensor:
    """[N, V] c J of the scored rows in fp64, by autograd on whole logits."""
    logits = (batch.hidden.double() @ batch.weight.double().T).requires_grad_()
    from topr_kernels import reference

    rest = [x.double() if x.is_floating_point() else x for x in batch[2:]]
    reference.topr_loss(logits, *rest, **kw).loss.backward()
    assert logits.grad is not None
    rows = torch.zeros(batch.labels.shape, dtype=torch.bool)
    rows[:, :-1] = batch.labels[:, 1:] != -100
    return logits.grad[rows]


LENGTHS = [(2, 12), (1, 9), (3, 14), (1, 5)]


@pytest.mark.parametrize("tau", [2.0**-4, 2.0**-6, 2.0**-8])
@pytest.mark.parametrize("softcap", [None, 40.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_within_the_energy_left_out(
    tau: float, softcap: float | None, dtype: torch.dtype
) -> None:
    batch = peaked(LENGTHS, 14.0, dtype=dtype)
    bias = a_bias(batch) * 0.1
    kw: dict[str, Any] = {"softcap": softcap}
    with tiles(16):
        out, grads = run(batch, bias, grad_tolerance=tau, **kw)
        exact, exact_grads = run(batch, bias, **kw)
    assert torch.equal(out.loss, exact.loss)
    assert torch.equal(out.log_prob, exact.log_prob)
    assert out.active_share < DENSE_SHARE
    assert 0 < out.left_out <= tau
    assert exact.active_share == 1
    assert exact.left_out == 0
    # The energy left out is that of the logits' gradient; the head's spectrum carries it on, and half
    # precision rounds the result.
    eps = 4 * torch.finfo(dtype).eps
    for name, got, expected in zip("hw", grads, exact_grads, strict=False):
        assert got is not None
        assert expected is not None
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error <= 2 * tau + eps, name
        assert dtype == torch.bfloat16 or error > 1e-9, "nothing was left out: the test is empty"
    assert grads[2] is not None
    # The bias needs no matmul and is always exact.
    torch.testing.assert_close(grads[2], exact_grads[2])


def test_the_tail_of_equal_rows_is_put_back_exactly() -> None:
    """Rows of one cluster that are equal have equal tails: their rank-one term is no approximation."""
    batch = peaked(LENGTHS)
    some = batch.hidden[0, :4].clone()
    batch = batch._replace(hidden=some[torch.arange(batch.labels.shape[1]) % 4].expand(4, -1, -1))
    out, got = run(batch, grad_tolerance=TAU)
    _, exact = run(batch)
    assert out.active_share < DENSE_SHARE
    assert out.left_out > TAU / 10
    for a, b in zip(got, exact, strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).norm() < 1e-10 * b.norm()


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 14)), min_size=1, max_size=5),
    st.sampled_from([0.0, 1.0, 4.0, 8.0, 16.0, 64.0]),
    st.sampled_from([2.0**-3, 2.0**-6, 2.0**-10, 2.0**-16]),
    st.sampled_from([4, 16, 256]),
    st.integers(0, 10**6),
)
def test_what_is_left_out_is_measured_and_within_the_tolerance(
    lengths: list[tuple[int, int]], sharpness: float, tau: float, rows: int, seed: int
) -> None:
    """Uniform to one-hot softmax; the figure is recomputed from the kept columns of every tile."""
    batch = peaked(lengths, sharpness, seed)
    left = total = 0.0
    add = active.select_columns

    def record(energy: Tensor, label: Tensor, tolerance: float, *shard: Any) -> Any:
        nonlocal left, total
        columns, part, whole = add(energy, label, tolerance)
        kept = torch.zeros(VOCAB, dtype=torch.bool)
        kept[slice(None) if columns is None else columns] = True
        assert kept[label].all()
        assert columns is None or len(columns) % COLUMN_MULTIPLE == 0
        assert energy[~kept].sum() <= tolerance**2 * energy.sum() * (1 + 1e-9)
        torch.testing.assert_close(energy[~kept].double().sum(), part)
        return columns, part, whole

    with pytest.MonkeyPatch.context() as patch, tiles(rows):
        patch.setattr(active, "select_columns", record)
        out, grads = run(batch, grad_tolerance=tau)
    assert out.left_out <= tau
    _, expected = plain(batch)
    for got, want in zip(grads, expected, strict=True):
        assert got is not None
        assert (got - want).norm() <= (3 * tau + 1e-9) * want.norm() + 1e-12


def test_left_out_is_the_energy_of_the_true_gradient() -> None:
    """Against c J from autograd, not against the kernel's own statistics."""
    batch = peaked(LENGTHS)
    chosen = []
    select = active.select_columns

    def record(*args: Any) -> Any:
        chosen.append(select(*args))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active, "select_columns", record)
        out, _ = run(batch, grad_tolerance=TAU)
    ((columns, _, _),) = chosen
    energy = gradient_of_logits(batch).square().sum(0)
    left = energy.index_fill(0, columns, 0.0).sum() / energy.sum()
    torch.testing.assert_close(out.left_out, left.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        out.active_share, torch.tensor(len(columns) / VOCAB, dtype=torch.float64)
    )


def test_a_uniform_softmax_is_served_dense() -> None:
    batch = peaked(LENGTHS, sharpness=1e-3)
    out, grads = run(batch, grad_tolerance=2.0**-10)
    _, expected = run(batch)
    assert out.active_share == 1
    assert out.left_out == 0
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_not_finite_is_served_dense() -> None:
    batch = peaked(LENGTHS)
    batch.hidden[0, 5] = torch.nan
    out, grads = run(batch, grad_tolerance=TAU)
    assert out.loss.isnan()
    assert out.active_share == 1
    assert grads[1] is not None
    assert grads[1].isnan().any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts(frozen: str) -> None:
    batch = peaked(LENGTHS)
    _, both = run(batch, grad_tolerance=TAU)
    _, one = run(batch, None, (frozen,), grad_tolerance=TAU)
    for got, expected, name in zip(one, both, ("hidden", "weight"), strict=True):
        if name == frozen:
            assert got is None
        else:
            torch.testing.assert_close(got, expected)


def test_tiles_and_pending_tails_do_not_matter_much() -> None:
    """Many tiles, flushed often or at the end: the same gradient within the tolerance."""
    batch = peaked([(1, 40), (2, 30), (1, 25), (3, 28)], sharpness=10.0)
    _, exact = run(batch)
    for rows, pending in ((16, 8), (16, 1000), (64, 64)):
        with pytest.MonkeyPatch.context() as patch, tiles(rows):
            patch.setattr(gradient, "PENDING_PROFILES", pending)
            out, grads = run(batch, grad_tolerance=TAU)
        assert out.active_share < DENSE_SHARE
        for got, expected in zip(grads, exact, strict=True):
            assert (got - expected).norm() <= 2 * TAU * expected.norm()  # type: ignore[operator]


def test_a_tile_is_cut_for_sparser_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = peaked([(1, 40), (2, 30)], sharpness=10.0)
    calls = []
    select = active.select_columns

    def record(energy: Tensor, label: Tensor, tolerance: float, *shard: Any) -> Any:
        calls.append(len(label))
        return select(energy, label, tolerance)

    monkeypatch.setattr(active, "select_columns", record)
    with tiles(128):
        monkeypatch.setattr(gradient, "CPU_SPARSE_ROWS", 32)
        run(batch, grad_tolerance=TAU)
    assert calls == [32, 32, 6]


def test_log_prob_takes_a_tolerance_too() -> None:
    batch = peaked(LENGTHS)
    upstream = torch.randn(batch.labels.shape, dtype=torch.float64)

    def gradient(tau: float) -> Tensor:
        hidden = batch.hidden.clone().requires_grad_()
        out = linear_log_prob(hidden, batch.weight, batch.labels, grad_tolerance=tau)
        (out.log_prob * upstream).sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    exact = gradient(0.0)
    error = (gradient(TAU) - exact).norm() / exact.norm()
    assert 1e-9 < error <= 2 * TAU


def test_the_default_is_exact_but_for_a_frozen_head_in_half_precision() -> None:
    wide = peaked(LENGTHS, dtype=torch.float32)
    half = peaked(LENGTHS, dtype=torch.bfloat16)
    for batch, frozen, exact in (
        (wide, (), True),
        (wide, ("weight",), True),
        (half, (), True),
        (half, ("weight",), False),
    ):
        out, _ = run(batch, None, frozen)
        assert (out.left_out == 0) == exact
        if not exact:
            assert out.left_out <= 2.0**-11


# ---- its parts -------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 2.0, 10.0, 40.0]),
    st.sampled_from([2.0**-3, 2.0**-10]),
)
def test_selection_is_nearly_the_smallest(seed: int, spread: float, tau: float) -> None:
    g = torch.Generator().manual_seed(seed)
    energy = torch.exp(-spread * torch.rand(VOCAB, generator=g, dtype=torch.float64)).float()
    energy[torch.randint(0, VOCAB, (7,), generator=g)] = 0
    label = torch.randint(0, VOCAB, (5,), generator=g)
    columns, left, total = select_columns(energy, label, tau)
    rest = energy.double().clone()
    rest[label] = 0
    smallest = int((rest.sort().values.cumsum(0) > tau**2 * total).sum())
    smallest = len({*label.tolist(), *rest.argsort(descending=True)[:smallest].tolist()})
    if columns is None:
        assert smallest + 2 * COLUMN_MULTIPLE > 0.8 * DENSE_SHARE * VOCAB
        assert left == 0
        return
    assert left <= tau**2 * total
    assert len(set(columns.tolist())) == len(columns)
    # Bins of an eighth of an octave, a multiple of 128.
    assert len(columns) <= 1.3 * smallest + 2 * COLUMN_MULTIPLE


def test_clusters_find_clusters() -> None:
    g = torch.Generator().manual_seed(0)
    centre = 10 * torch.randn(4, 12, generator=g)
    truth = torch.arange(40) % 4
    hidden = centre[truth] + 0.1 * torch.randn(40, 12, generator=g)
    cluster, member = cluster_rows(hidden, 4)
    assert len({(int(a), int(b)) for a, b in zip(cluster, truth, strict=True)}) == 4
    assert torch.equal(member.argmax(0), cluster)
    assert (member.sum(0) == 1).all()
    assert cluster_rows(hidden[:2], 8)[1].shape == (2, 2)


def test_the_limits_reach_the_selection() -> None:
    """Rows the taper has switched off do not decide which columns are active."""
    batch = peaked([(1, 10), (1, 10)])
    dead = batch._replace(behavior_log_prob=batch.behavior_log_prob.clone())
    dead.behavior_log_prob[1] += 1e4
    alone = LinearBatch(batch.hidden[:1], batch.weight, *(x[:1] for x in batch[2:]))
    a, _ = run(dead, grad_tolerance=TAU, limits=TOPR)
    b, _ = run(alone, grad_tolerance=TAU, limits=TOPR)
    assert torch.equal(a.active_share, b.active_share)
    torch.testing.assert_close(a.left_out, b.left_out)


def test_tolerance_needs_a_gradient() -> None:
    batch = peaked(LENGTHS)
    out = linear_topr_loss(*batch, grad_tolerance=TAU)
    assert out.left_out.isnan()
