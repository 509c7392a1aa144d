"""No Triton kernel touches memory that its arguments do not hold, whatever is NaN or out of range.

The tests of ``test_triton.py`` and ``test_triton_linear.py`` run under the same check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from topr_kernels import TOPR
from topr_kernels.ops.logits import Saved
from topr_kernels.ops.options import Objective, Tokens, Transforms
from topr_kernels.testing import make_batch, pack

if torch.cuda.is_available():
    pytest.skip("the check is the interpreter's", allow_module_level=True)
pytest.importorskip("triton")
import triton
import triton.language as tl
from bounds import Bounds, checked

from topr_kernels.kernels import triton_linear, triton_logits

LENGTHS = [(1, 5), (2, 0)]
VOCAB = 19
POISONS = [torch.nan, torch.inf, -torch.inf]
#: Rows in one program and in several, a step of the sequence stage shorter than a sequence.
WHOLE = triton_logits.Settings(BV=8, U=2, tiles_per_program=2, split=1, num_warps=4)
SPLIT = WHOLE._replace(split=2)


@pytest.fixture(autouse=True)
def bounds() -> Iterator[Bounds]:
    with checked() as found:
        yield found
        assert found.touched


# ---- the check itself ------------------------------------------------------------------------------


@triton.jit
def copy_kernel(p_x, p_out, shift, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + o[:, None] + shift, mask=(o < n)[:, None], other=0.0)
    tl.store(p_out + o[:, None], x, mask=(o < n)[:, None])


@triton.jit
def count_kernel(p_counter, i):  # type: ignore[no-untyped-def]
    tl.atomic_add(p_counter + i, 1)


def test_the_check_finds_what_it_is_for() -> None:
    both = torch.arange(16.0)
    x, y = both[:8], both[8:]
    out = torch.empty(8)
    copy_kernel[(1,)](x, out, 0, 8, BLOCK=8)
    assert torch.equal(out, x)
    copy_kernel[(1,)](both[::2], out, 0, 1, BLOCK=8)
    with pytest.raises(Exception, match="read outside of pointer argument 1 of copy_kernel"):
        copy_kernel[(1,)](x, out, 1, 8, BLOCK=8)  # the first element of y
    with pytest.raises(Exception, match="read outside of pointer argument 1 of copy_kernel"):
        copy_kernel[(1,)](y, out, -1, 8, BLOCK=8)
    with pytest.raises(Exception, match="read outside of pointer argument 1 of copy_kernel"):
        copy_kernel[(1,)](both[::2], out, 0, 2, BLOCK=8)  # a gap of the view
    with pytest.raises(Exception, match="write outside of pointer argument 2 of copy_kernel"):
        copy_kernel[(1,)](both, both[:4], 0, 5, BLOCK=8)
    counter = torch.zeros(2, dtype=torch.int32)
    count_kernel[(1,)](counter, 1)
    assert counter.tolist() == [0, 1]
    with pytest.raises(Exception, match="atomic outside of pointer argument"):
        count_kernel[(1,)](counter, 2)


# ---- the logits path -------------------------------------------------------------------------------


def batch_of(layout: str, lengths: Any = LENGTHS) -> tuple[list[Tensor], Tensor | None]:
    """-> ([logits, labels, behavior_log_prob, reward], cu_seqlens), each in an allocation of its own."""
    batch = make_batch(lengths, VOCAB, dtype=torch.float32)
    if layout == "padded":
        return [x.clone() for x in batch[:4]], None
    packed = pack(batch, lengths)
    rows = [x[None].clone() for x in packed[:3]]
    return [*rows, packed.reward.clone()], packed.cu_seqlens


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("split", [False, True])
def test_forward(layout: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_logits, "settings", lambda *_: SPLIT if split else WHOLE)
    monkeypatch.setattr(triton_logits, "BT", 4)
    for poisoned in (None, 0, 2, 3):
        args, cu_seqlens = batch_of(layout)
        if poisoned is not None:
            args[poisoned].fill_(torch.nan)
        args[1][0, 1] = VOCAB + 3  # a label that is no token, and one that is negative
        args[1][0, 2] = -7
        logits, labels, mu, reward = args
        for ratio, shift in (("sequence", True), ("token", False)):
            tokens = Tokens(labels, cu_seqlens, shift)
            objective = Objective(mu, reward, None, *TOPR.log(), ratio, 0.1, "sequence_mean")
            for forward in (triton_logits.topr_fwd, triton_logits.topr_fwd_staged):
                forward(logits, tokens, objective, Transforms(1.0, 5.0, 0.7), True)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("poison", POISONS)
def test_backward(shift: bool, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_logits, "settings", lambda *_: WHOLE)
    (logits, labels, token, _), _ = batch_of("padded")
    names = ("logits", "lse", "lse_low", "log_prob", "d_log_prob", "d_loss", "denominator")
    for name in names:
        values = dict.fromkeys(names[1:5], token) | dict.fromkeys(names[5:], torch.ones(()))
        values["logits"] = logits
        values = {k: v.clone() for k, v in values.items()}
        values[name].fill_(poison)
        z = values.pop("logits")
        tokens, transforms = Tokens(labels, None, shift), Transforms(1.0, 5.0, 0.7)
        triton_logits.logits_bwd(z, tokens, Saved(*values.values()), transforms)
        loose = [v if k not in names[5:] else None for k, v in values.items()]
        triton_logits.logits_bwd_(z, tokens, Saved(*loose), transforms)


def test_unsound_offsets() -> None:
    (logits, labels, mu, reward), _ = batch_of("packed", [*LENGTHS, (1, 1)])
    n = labels.numel()
    for offsets in ([0, n + 4, n - 2, n], [0, -3, 5, n], [1, 3, 5, n], [0, 3, 5, 1 << 30]):
        objective = Objective(mu, reward, None, *TOPR.log(), "sequence", 0.0, "sum")
        for forward in (triton_logits.topr_fwd, triton_logits.topr_fwd_staged):
            cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
            tokens = Tokens(labels, cu_seqlens, True)
            out = forward(logits, tokens, objective, Transforms(1.0, None, 1.0), False)
            assert out[0].isnan()


# ---- the fused-linear path -------------------------------------------------------------------------


@pytest.mark.parametrize("transforms", [Transforms(1.0, None, 1.0), Transforms(2.0, 5.0, 0.7)])
def test_linear(transforms: Transforms, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BV": 16, "GRADIENT_TILES": 2, "COLUMN_ROWS": 8, "COLUMN_BV": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(triton_linear, name, value)
    g = torch.Generator().manual_seed(0)
    for n, vocab, poisoned in ((9, 32, None), (9, 37, "z"), (7, 50, "stats"), (11, 1, "rows")):
        z = torch.randn(n, vocab, generator=g)
        label = torch.randint(0, vocab, (n,), generator=g)
        label[:3] = torch.tensor([-100, vocab + 2, -5])
        columns = torch.randperm(vocab, generator=g)[: vocab // 2 + 1]
        coefficient, groups = torch.ones(n), torch.ones(3, n)
        if poisoned == "z":
            z.fill_(torch.nan)
        stats = triton_linear.rows(z, label, transforms, True, True)
        if poisoned == "stats":
            stats = type(stats)(*(torch.full_like(x, torch.nan) for x in stats))
        if poisoned == "rows":
            coefficient.fill_(torch.nan)
            groups.fill_(torch.nan)
        tile: tuple[Any, ...] = (z, label, stats, transforms)
        triton_linear.columns(*tile, coefficient, groups)
        triton_linear.gather(*tile, columns, torch.bfloat16)
        triton_linear.gradient(*tile, torch.bfloat16)
        triton_linear.gradient(*tile, torch.float32)
