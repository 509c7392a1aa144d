"""The Triton kernels of the fused-linear path, run by the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_triton import SLACK
from torch import Tensor

from topr_kernels import SFT, TOPR, linear_log_prob, linear_topr_loss
from topr_kernels.kernels import portable_linear
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.linear import workspace
from topr_kernels.linear.tile import RowStats
from topr_kernels.ops.options import Transforms
from topr_kernels.testing import assert_within_budget, make_batch

pytest.importorskip("triton")
from topr_kernels.kernels import triton_linear

pytestmark = pytest.mark.usefixtures("in_bounds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = (
    "linear_rows_kernel",
    "linear_gradient_kernel",
    "linear_columns_kernel",
    "linear_gather_kernel",
)
PLAIN = Transforms(1.0, None, 1.0)
SCALED = Transforms(1.7, None, 0.6)
CAPPED = Transforms(1.7, 5.0, 0.6)


def make_tile(n: int, vocab: int, seed: int = 0, padding: int = 5) -> tuple[Tensor, Tensor]:
    """-> (z [n, V], label [n]); z is a view into memory that is NaN all around it."""
    g = torch.Generator().manual_seed(seed)
    room = torch.full((n + 3, vocab + padding), torch.nan)
    z = room[2 : n + 2, padding // 2 : padding // 2 + vocab]
    z.copy_(3 * torch.randn(n, vocab, generator=g))
    label = torch.multinomial(z.softmax(-1), 1, generator=g).squeeze(-1)
    return room.to(DEVICE)[2 : n + 2, padding // 2 : padding // 2 + vocab], label.to(DEVICE)


class Results(NamedTuple):
    """Everything four kernels say of a tile, the factor multiplied in."""

    stats: RowStats
    #: [n, V] gradient of log_prob by the logits, and its row sums, 0 without a softcap.
    gradient: Tensor
    total: Tensor
    energy: Tensor
    sums: Tensor
    gathered: Tensor
    kept: Tensor


def make_coefficients(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """-> (coefficient [n] of both signs, groups [2, n])."""
    c = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return c, torch.stack([c.clamp(min=0), c.clamp(max=0)])


def run(
    kernels: Any, z: Tensor, label: Tensor, transforms: Transforms, columns: Tensor, **kw: Any
) -> Results:
    c, groups = make_coefficients(len(z))
    stats = kernels.rows(z, label, transforms, kw.get("entropy", True), True)
    energy, sums = kernels.columns(z, label, stats, transforms, c, kw.get("groups", groups))
    j, kept = kernels.gather(z, label, stats, transforms, columns, torch.float32)
    gradient = kernels.gradient(z, label, stats, transforms, torch.float32)
    f = stats.factor.unsqueeze(-1)
    return Results(stats, gradient * f, stats.j_sum * f[:, 0], energy, sums, j * f, kept * f[:, 0])


def reference(z: Tensor, label: Tensor, transforms: Transforms, columns: Tensor) -> Results:
    """In fp64, by autograd through plain torch."""
    z = z.double().requires_grad_()
    x = z * transforms.logit_scale
    if transforms.softcap is not None:
        x = transforms.softcap * (x / transforms.softcap).tanh()
    x = x / transforms.temperature
    p = x.log_softmax(-1)
    log_prob = p.gather(1, label.clamp(0, z.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    (gradient,) = torch.autograd.grad(log_prob.sum(), z)
    p = p.detach()
    entropy = -torch.where(p == -torch.inf, 0.0, p.exp() * p).sum(-1)
    lse, zero = x.detach().logsumexp(-1), torch.zeros_like(log_prob)
    c, groups = (x.double() for x in make_coefficients(len(z)))
    total = gradient.sum(-1) if transforms.softcap is not None else zero
    return Results(
        RowStats(log_prob.detach(), lse, zero, entropy, zero, zero),
        gradient,
        total,
        (c.unsqueeze(-1) * gradient).square().sum(0),
        groups @ gradient,
        gradient[:, columns],
        gradient[:, columns].sum(-1),
    )


def check(z: Tensor, label: Tensor, transforms: Transforms, columns: Tensor | None = None) -> None:
    if columns is None:
        columns = torch.arange(0, z.shape[1], 3, device=z.device)
    exact = reference(z, label, transforms, columns)
    plain = run(portable_linear, z.clone(), label, transforms, columns)
    before = z.clone()
    got = run(triton_linear, z, label, transforms, columns)
    # Intermediates whose rounding reaches everything: the logits as they are exponentiated.
    factor = transforms.logit_scale / transforms.temperature
    operand = SLACK * max(
        1.0, *(x[x.isfinite()].abs().max().item() for x in (before * factor, exact[0].lse))
    )
    for i, name in ((0, "log_prob"), (3, "entropy")):
        assert_within_budget(name, got.stats[i], plain.stats[i], exact.stats[i], operand=operand)
    lse = [s.lse.double() + s.lse_low for s in (got.stats, plain.stats)]
    torch.testing.assert_close(lse[0].float(), got.stats.lse)
    assert_within_budget("lse", lse[0].float(), lse[1].float(), exact.stats.lse, operand=operand)
    for name in ("total", "sums", "kept"):
        a, b, c = (getattr(r, name) for r in (got, plain, exact))
        assert_within_budget(name, a, b, c, operand=operand * exact.gradient.abs().max().item())
    for name in ("gradient", "energy", "gathered"):
        a, b, c = (getattr(r, name) for r in (got, plain, exact))
        # Relative, element by element: small columns count as much as large ones.
        some = c.abs() > 1e-30
        assert not a[~some].abs().gt(1e-6).any()
        ratios = (a[some] / c[some]).float(), (b[some] / c[some]).float()
        if some.any():
            assert_within_budget(name, *ratios, torch.ones_like(ratios[0]), operand=operand)


@pytest.mark.parametrize("transforms", [PLAIN, SCALED, CAPPED], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("vocab", [2, 193, 1024, 2064, 4097])
def test_every_vocabulary_within_the_budget(vocab: int, transforms: Transforms) -> None:
    # 2064 is a multiple of 16 but of no block; in rows that start at multiples of 16 it is ALIGNED.
    check(*make_tile(6, vocab, padding=32 if vocab == 2064 else 5), transforms)


@pytest.mark.parametrize("n", [1, 8, 21])
def test_any_number_of_rows(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several parts of the rows, and blocks of columns of which the last overlaps, without the time that
    # the interpreter would take for them.
    monkeypatch.setattr(triton_linear, "COLUMN_ROWS", 8)
    monkeypatch.setattr(triton_linear, "COLUMN_BV", 64)
    check(*make_tile(n, 150), CAPPED)
    z, label = make_tile(n, 150)
    # What is read for a row that is not there, and would overflow under an lse of 0.
    z[-1] += 200
    check(z, label, PLAIN)


@pytest.mark.parametrize("transforms", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_a_vocabulary_of_one(transforms: Transforms) -> None:
    z, label = make_tile(3, 1)
    z[1] = -torch.inf
    got = run(triton_linear, z, label, transforms, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    certain = torch.tensor([True, transforms.softcap is not None, True], device=DEVICE)
    # With a softcap -inf is a logit like any other; without one that row has no softmax.
    assert torch.equal(got.stats.log_prob == 0, certain)
    for x in (got.gradient.squeeze(1), got.gathered.squeeze(1), got.kept):
        assert torch.equal(x == 0, certain) and x[~certain].isnan().all()
    assert (got.total == 0).all()


def test_z_stays_as_it_is_until_the_gradient_takes_its_place() -> None:
    z, label = make_tile(5, 193)
    before = z.clone()
    stats = triton_linear.rows(z, label, CAPPED, False, True)
    c, groups = make_coefficients(5)
    triton_linear.columns(z, label, stats, CAPPED, c, groups)
    triton_linear.gather(z, label, stats, CAPPED, torch.arange(7, device=DEVICE), torch.float32)
    half = triton_linear.gradient(z, label, stats, CAPPED, torch.float16)
    assert torch.equal(z, before) and half.is_contiguous()
    wide = triton_linear.gradient(z, label, stats, CAPPED, torch.float32)
    assert wide.data_ptr() == z.data_ptr() and torch.equal(half, wide.half())
    room = z._base if z._base is not None else z
    assert room.isnan().sum() == room.numel() - z.numel()


def test_a_row_of_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    z, label = make_tile(3, 2500)
    stats = triton_linear.rows(z, label, PLAIN, False, True)
    whole = triton_linear.gradient(z.clone(), label, stats, PLAIN, torch.float32)
    # In place an element that is written twice becomes the J of a J.
    monkeypatch.setattr(triton_linear, "GRADIENT_TILES", 1)
    assert torch.equal(triton_linear.gradient(z, label, stats, PLAIN, torch.float32), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_last(dtype: torch.dtype) -> None:
    z, label = make_tile(5, 193)
    stats = triton_linear.rows(z, label, PLAIN, False, True)
    columns = torch.arange(64, 192, device=DEVICE)
    half, half_sums = triton_linear.gather(z, label, stats, PLAIN, columns, dtype)
    wide, sums = triton_linear.gather(z, label, stats, PLAIN, columns, torch.float32)
    # The interpreter cuts bf16 off where a GPU rounds. J is the same to the bit in every binary; the
    # lanes that sum it are not.
    ulp = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    assert half.dtype == dtype
    torch.testing.assert_close(half_sums, sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(half, wide.to(dtype), rtol=ulp, atol=0)
    gradient = triton_linear.gradient(z, label, stats, PLAIN, dtype)
    whole = triton_linear.gradient(z, label, stats, PLAIN, torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, whole.to(dtype), rtol=ulp, atol=0)


@pytest.mark.parametrize("transforms", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_parts_of_the_columns_with_and_without_labels(transforms: Transforms) -> None:
    z, label = make_tile(6, 3000)
    stats = triton_linear.rows(z, label, transforms, False, True)
    columns = torch.cat([label, torch.arange(1, 3000, 7, device=DEVICE)]).unique()
    outside = columns[~torch.isin(columns, label)]
    every = torch.arange(3000, device=DEVICE)
    gathered = [
        (part, *triton_linear.gather(z, label, stats, transforms, part, torch.float32))
        for part in (columns, label.unique(), outside, columns[:5], columns[-1:], every)
    ]
    j = triton_linear.gradient(z, label, stats, transforms, torch.float32)
    assert (j.gather(1, label.unsqueeze(1)) > 0).all() and (gathered[2][1] <= 0).all()
    for part, some, sums in gathered:
        assert torch.equal(some, j[:, part])
        torch.testing.assert_close(sums, j[:, part].double().sum(1).float(), rtol=0, atol=5e-7)
    torch.testing.assert_close(stats.j_sum, gathered[-1][2], rtol=0, atol=5e-7)
    assert (stats.j_sum != 0).all() == (transforms.softcap is not None)


@pytest.mark.parametrize("k", [1, 2, 4, 7, 9, 17])
def test_any_number_of_groups(k: int) -> None:
    z, label = make_tile(7, 50)
    groups = torch.randn(k, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    columns = torch.arange(9, device=DEVICE)
    plain = run(portable_linear, z.clone(), label, SCALED, columns, groups=groups)
    got = run(triton_linear, z, label, SCALED, columns, groups=groups)
    want = groups.double() @ got.gradient.double()
    assert got.sums.shape == (k, 50) and want.abs().amax(1).min() > 0.1
    assert_within_budget("sums", got.sums, plain.sums, want, operand=10.0)


def test_banned_tokens_and_what_has_no_softmax() -> None:
    z, label = make_tile(6, 193)
    z[:, 150:] = -torch.inf
    label[:] = torch.tensor([3, 160, 5, 5, 5, 149])
    columns = torch.arange(1, 193, 2, device=DEVICE)
    check(z[[0, 5]], label[[0, 5]], SCALED, columns)
    z[2] = -torch.inf
    z[3, 100] = torch.nan
    z[4, 100] = torch.inf
    for transforms in (PLAIN, SCALED):
        got = run(triton_linear, z.clone(), label, transforms, columns)
        assert got.stats.log_prob[:3].tolist()[1:] == [-torch.inf, -torch.inf]
        assert got.stats.log_prob.isnan().tolist() == [False, False, False, True, True, False]
        assert got.stats.lse[2] == -torch.inf
        bad = got.gradient.isnan()
        assert bad[2:5].all() and not bad[[0, 1, 5]].any()
        assert got.gathered.isnan()[2:5].all() and got.kept.isnan()[2:5].all()
        assert not got.gathered.isnan()[[0, 1, 5]].any()
        factor = transforms.logit_scale / transforms.temperature
        # A banned label: J is 1 there, whatever the others hold.
        assert got.gradient[1, 160] == factor and (got.gradient[1, :150] < 0).all()
        assert (got.gradient[[0, 5], 150:] == 0).all()
        assert got.energy.isnan().all()
        # Only rows that are there and whose coefficient is not 0 reach the sums.
        rest = torch.tensor([0, 1, 5], device=DEVICE)
        clean = run(triton_linear, z[rest].clone(), label[rest], transforms, columns)
        assert clean.energy.isfinite().all() and clean.sums.isfinite().all()
    # Under a softcap -inf is -softcap.
    check(z[:3], label[:3], CAPPED, columns)


@pytest.mark.parametrize("transforms", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [-1, -101, 193, 1 << 40])
def test_a_label_outside_the_vocabulary_shows(bad: int, transforms: Transforms) -> None:
    z, label = make_tile(4, 193)
    good = run(triton_linear, z.clone(), label, transforms, label.unique())
    label[1] = bad
    columns = label.clamp(0, 192).unique()
    got = run(triton_linear, z, label, transforms, columns)
    assert got.stats.log_prob.isnan().tolist() == [False, True, False, False]
    assert got.gradient.isnan().any(1).tolist() == [False, True, False, False]
    assert got.gathered.isnan().any(1).tolist() == [False, True, False, False]
    assert got.kept.isnan().tolist() == [False, True, False, False]
    assert not got.energy.isfinite().all()
    others = [0, 2, 3]
    assert torch.equal(got.gradient[others], good.gradient[others])


@pytest.mark.parametrize("transforms", [PLAIN, Transforms(1.0, None, 2.0)], ids=["plain", "hot"])
@pytest.mark.parametrize("offset", [65536, -65536])
def test_a_large_common_offset_costs_nothing(offset: int, transforms: Transforms) -> None:
    z, label = make_tile(5, 193)
    # On a grid that the offset keeps: both tiles hold the same numbers exactly.
    z.copy_((z * 64).round() / 64)
    columns = torch.arange(0, 193, 5, device=DEVICE)
    got = run(triton_linear, z.clone(), label, transforms, columns)
    moved = run(triton_linear, z + offset, label, transforms, columns)
    for name in ("gradient", "energy", "sums", "gathered", "kept"):
        a, b = getattr(got, name), getattr(moved, name)
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(moved.stats.log_prob, got.stats.log_prob, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(moved.stats.entropy, got.stats.entropy, rtol=1e-5, atol=1e-6)


def test_confident_rows_keep_the_digits_of_the_label() -> None:
    z, label = make_tile(3, 500)
    z.scatter_add_(1, label.unsqueeze(1), torch.full((3, 1), 12.0, device=DEVICE))
    eps = torch.finfo(torch.float32).eps
    for transforms in (PLAIN, Transforms(1.0, 40.0, 1.0)):
        stats = triton_linear.rows(z, label, transforms, False, True)
        assert (stats.log_prob > -1e-2).all() and stats.log_prob.max() > -1e-4
        j = triton_linear.gradient(z.clone(), label, stats, transforms, torch.float32)
        t = (z.double() / 40).tanh() if transforms.softcap else torch.zeros_like(z).double()
        want = -stats.log_prob.double().expm1() * (1 - t.square()).gather(1, label[:, None])[:, 0]
        at_label = j.gather(1, label[:, None])[:, 0]
        torch.testing.assert_close(at_label.double(), want, rtol=16 * eps, atol=0)
        if transforms.softcap:
            # The total is that of J as it is written, so that what is kept of it can be subtracted.
            total = j.double().sum(1)
            cancelled = (at_label / total).abs().max().item()
            torch.testing.assert_close(
                stats.j_sum.double(), total, rtol=16 * eps * cancelled, atol=0
            )
            assert (stats.j_sum < 0).all()


def test_a_row_does_not_depend_on_its_tile() -> None:
    # Enough rows and columns that another order of a sum would show.
    z, label = make_tile(8, 9000)
    many = triton_linear.rows(z, label, CAPPED, True, True)
    for i in range(8):
        one = triton_linear.rows(z[i : i + 1], label[i : i + 1], CAPPED, True, True)
        for name, a, b in zip(many._fields, many, one, strict=True):
            assert torch.equal(a[i : i + 1], b), name
    graded = triton_linear.rows(z, label, CAPPED, True, True)
    scored = triton_linear.rows(z, label, CAPPED, False, False)
    assert torch.equal(graded.log_prob, scored.log_prob) and torch.equal(graded.lse, scored.lse)
    assert scored.entropy.isnan().all() and (scored.j_sum == 0).all()


@pytest.mark.parametrize("transforms", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_rows_that_fill_up_are_finite_and_never_read(transforms: Transforms) -> None:
    z, label = make_tile(5, 193)
    want = triton_linear.rows(z, label, transforms, True, True)
    z[[1, 4]] = torch.nan
    label[[1, 4]] = IGNORE_INDEX
    got = triton_linear.rows(z, label, transforms, True, True)
    rest = [0, 2, 3]
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert a.isfinite().all() and torch.equal(a[rest], b[rest]), name


def test_no_rows() -> None:
    z, label = make_tile(0, 11)
    assert all(x.shape == (0,) for x in triton_linear.rows(z, label, PLAIN, True, True))


def test_offsets_pass_two_to_the_thirty_first() -> None:
    # Rows 2^30 elements apart, a stride of 32 bits, in a buffer that is barely touched.
    z, label = make_tile(3, 48)
    columns = torch.arange(0, 48, 2, device=DEVICE)
    far = torch.empty((1 << 31) + 48, device=DEVICE).as_strided((3, 48), (1 << 30, 1))
    far.copy_(z)
    got = run(triton_linear, far, label, PLAIN, columns)
    want = run(triton_linear, z.contiguous(), label, PLAIN, columns)
    for a, b in zip((*got.stats, *got[1:]), (*want.stats, *want[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Spy:
    """Stands in for a kernel; calls ``note`` with the grid instead of running it."""

    def __init__(self, note: Callable[[tuple[int, ...]], None]) -> None:
        self.note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kw: self.note(grid)


def launch_all(z: Tensor) -> None:
    label = torch.zeros(len(z), dtype=torch.int64)
    stats = triton_linear.rows(z, label, PLAIN, False, True)
    triton_linear.columns(z, label, stats, PLAIN, stats.factor, stats.factor[None])
    triton_linear.gather(z, label, stats, PLAIN, label[:1], torch.float32)
    triton_linear.gradient(z, label, stats, PLAIN, torch.float32)


def test_grids_have_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA allows 2^31 - 1 blocks along x, but only 65535 along y and z.
    grids: list[tuple[int, ...]] = []
    for name in KERNELS:
        monkeypatch.setattr(triton_linear, name, Spy(grids.append))
    launch_all(torch.zeros(70_000, 2))
    assert len(grids) == 4 and all(len(g) == 1 for g in grids)


def test_launches_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel launched on cuda:0 with tensors of cuda:1 corrupts silently.
    inside: list[Tensor] = []
    launched: list[bool] = []

    class Guard:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            inside.append(self.x)

        def __exit__(self, *_: object) -> None:
            inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    z = torch.zeros(3, 16)
    for name in KERNELS:
        spy = Spy(lambda grid: launched.append(bool(inside) and inside[-1] is z))
        monkeypatch.setattr(triton_linear, name, spy)
    launch_all(z)
    assert launched == [True] * 4


# ---- the path that uses them -----------------------------------------------------------------------


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    behavior_log_prob: Tensor
    reward: Tensor


def make_case(vocab: int, sharpness: float = 1.0) -> Case:
    lengths = [(2, 5), (1, 6), (3, 0), (2, 3)]
    batch = make_batch(lengths, vocab, dtype=torch.float32)
    g = torch.Generator().manual_seed(3)
    b, t = batch.labels.shape
    hidden = sharpness * torch.randn(b, t, 24, generator=g)
    weight, bias = torch.randn(vocab, 24, generator=g), 0.1 * torch.randn(vocab, generator=g)
    with torch.no_grad():
        # Labels and log mu of a policy near the head's.
        p = (hidden @ weight.t() + bias).log_softmax(-1)
        drawn = torch.multinomial(p.exp().flatten(0, 1), 1, generator=g).view(b, t).roll(1, 1)
        labels = torch.where(batch.labels == -100, -100, drawn)
        mu = p.roll(1, 1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        mu = torch.where(labels == -100, 0.0, mu - 0.1 * torch.rand(b, t, generator=g))
    reward = torch.tensor([1.0, -1.0, 0.5, -0.25])
    return Case(*(x.to(DEVICE) for x in (hidden, weight, bias, labels, mu, reward)))


def step(case: Case, impl: str, dtype: torch.dtype, **kw: Any) -> tuple[Any, list[Tensor]]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in case[:3]]
    hidden, weight, bias = leaves
    rest = (case.labels, case.behavior_log_prob.to(dtype), case.reward.to(dtype))
    out = linear_topr_loss(hidden, weight, *rest, bias=bias, impl=impl, **kw)
    out.loss.backward()
    return out, [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("tolerance", [0.0, 2**-6])
@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 0.7, "softcap": 20.0, "temperature": 0.8, "limits": SFT}],
    ids=["plain", "capped"],
)
@pytest.mark.parametrize("rows", [4, pytest.param(256, marks=pytest.mark.slow)])
def test_the_loss_is_within_the_budget_of_plain_torch(
    tolerance: float, options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(2311, sharpness=2.0)
    # Small tiles: several of them, and sequences that are longer than one and scored first.
    for name in ("CPU_ROWS", "CPU_TILE_ROWS", "GPU_ROWS", "GPU_TILE_ROWS"):
        monkeypatch.setattr(workspace, name, rows)
    kw = {"entropy": True, **options}
    exact, exact_grads = step(case, "torch", torch.float64, grad_tolerance=0.0, **kw)
    plain, grads = step(case, "torch", torch.float32, grad_tolerance=tolerance, **kw)
    out, got = step(case, "triton", torch.float32, grad_tolerance=tolerance, **kw)
    nats = SLACK * exact.log_prob.abs().max().item()
    for name in ("loss", "log_prob", "entropy", "token_log_ratio", "log_ratio", "weight"):
        a, b, c = (getattr(r, name) for r in (out, plain, exact))
        assert a.dtype == torch.float32
        some = c.isfinite()
        assert_within_budget(name, a[some], b[some], c[some], operand=5 * nats)
    sparse = tolerance > 0
    assert (out.active_share < 1) == sparse and (out.left_out > 0) == sparse
    if sparse:
        torch.testing.assert_close(out.active_share, plain.active_share, rtol=0, atol=0.06)
        assert out.left_out <= tolerance
    assert len(got) == 3
    for name, a, b, c in zip(("hidden", "weight", "bias"), got, grads, exact_grads, strict=True):
        assert c.abs().max() > 0
        assert_within_budget(f"d_{name}", a, b, c, operand=nats * c.abs().max().item())


@pytest.mark.parametrize("tolerance", [0.0, 2**-6])
def test_log_prob_with_any_upstream_gradient(tolerance: float) -> None:
    case = make_case(2311, sharpness=2.0)
    upstream = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    upstream[0, 3] = 0.0
    results = []
    for impl, dtype, tau in (
        ("triton", torch.float32, tolerance),
        ("torch", torch.float32, tolerance),
        ("torch", torch.float64, 0.0),
    ):
        leaves = [x.to(dtype).detach().requires_grad_() for x in case[:2]]
        out = linear_log_prob(
            *leaves, case.labels, softcap=25.0, entropy=True, grad_tolerance=tau, impl=impl
        )
        out.log_prob.backward(upstream.to(dtype))
        grads = [x.grad for x in leaves if x.grad is not None]
        results.append((out.log_prob.detach(), out.lse, out.entropy, *grads))
    nats = results[2][0].abs().max().item()
    for name, a, b, c in zip(
        ["log_prob", "lse", "entropy", "d_hidden", "d_weight"], *results, strict=True
    ):
        some = c.isfinite()
        operand = 5 * nats * max(1.0, c[some].abs().max().item())
        assert_within_budget(name, a[some], b[some], c[some], operand=operand)


def test_the_sparse_backward_is_taken_and_masked_hidden_states_are_never_read() -> None:
    case = make_case(2311, sharpness=2.0)
    out, grads = step(case, "triton", torch.float32, grad_tolerance=2**-6)
    assert out.active_share < 1
    rows = torch.ones_like(case.labels, dtype=torch.bool)
    rows[:, :-1] = case.labels[:, 1:] == -100
    dirty = case._replace(hidden=case.hidden.masked_fill(rows.unsqueeze(-1), torch.nan))
    again, again_grads = step(dirty, "triton", torch.float32, grad_tolerance=2**-6)
    assert torch.equal(out.loss, again.loss)
    for a, b in zip(grads, again_grads, strict=True):
        assert a.any() and torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match=r"impl='triton'.*float64"):
        step(make_case(11), "triton", torch.float64, limits=TOPR)
