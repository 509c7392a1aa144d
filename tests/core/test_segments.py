"""Ratios per segment: against the reference, and what they are at their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import PATHS, a_trajectory, assert_same, by_head, by_logits, by_reference, some_segments
from torch import Tensor
from torch.nn.functional import pad

from topr_kernels import IS, SFT, TIS, TOPR, Limits, linear_topr_loss, topr_loss
from topr_kernels.linear import workspace
from topr_kernels.testing import LinearBatch

BOTH = Limits(0.5, 2.0, 0.3, 1.5)
SEGMENT_RATIOS = ["segment", "segment_geometric"]
#: A level per segment, and what it is with one segment.
WHOLE = [("segment", "sequence"), ("segment_geometric", "geometric")]


@pytest.mark.parametrize("given_", [True, False])
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("ratio", SEGMENT_RATIOS)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference(path: str, ratio: str, impl: str, given_: bool) -> None:
    batch = a_trajectory()
    segments = some_segments(batch) if given_ else None
    for limits, reduction in ((TIS, "sequence_mean"), (BOTH, "token_mean"), (TOPR, "sum")):
        kw: dict[str, Any] = {"limits": limits, "ratio": ratio, "reduction": reduction}
        kw |= {"segments": segments, "baseline": 0.1}
        assert_same(PATHS[path](batch, impl=impl, **kw), by_reference(batch, **kw))


@pytest.mark.parametrize(("ratio", "whole"), WHOLE)
@pytest.mark.parametrize("path", PATHS)
@given(seed=st.integers(0, 10**6))
def test_one_segment_is_the_sequence(path: str, ratio: str, whole: str, seed: int) -> None:
    batch = without_gaps(a_trajectory(seed))
    kw: dict[str, Any] = {"limits": BOTH}
    assert_same(PATHS[path](batch, ratio=ratio, **kw), PATHS[path](batch, ratio=whole, **kw))


def without_gaps(batch: LinearBatch) -> LinearBatch:
    """The same, with every token scored between the first and the last scored one."""
    scored = (batch.labels != -100).int()
    inside = scored.cummax(1).values * scored.flip(1).cummax(1).values.flip(1)
    return batch._replace(labels=torch.where(inside == 1, batch.labels.clamp(min=0), -100))


@pytest.mark.parametrize("ratio", SEGMENT_RATIOS)
@pytest.mark.parametrize("path", PATHS)
@given(seed=st.integers(0, 10**6))
def test_one_token_per_segment_is_the_token_level(path: str, ratio: str, seed: int) -> None:
    batch = a_trajectory(seed)
    each = torch.arange(batch.labels.shape[1]).expand(batch.labels.shape)
    kw: dict[str, Any] = {"limits": BOTH}
    found = PATHS[path](batch, ratio=ratio, segments=each, **kw)
    assert_same(found, PATHS[path](batch, ratio="token", **kw))


@pytest.mark.parametrize("ratio", SEGMENT_RATIOS)
@pytest.mark.parametrize("path", PATHS)
@given(seed=st.integers(0, 10**6))
def test_packing_order_padding_and_splitting_change_nothing(
    path: str, ratio: str, seed: int
) -> None:
    batch, kw = a_trajectory(seed), {"limits": TIS, "ratio": ratio, "normalizer": 4.0}
    segments = some_segments(batch, seed)
    out, d = PATHS[path](batch, segments=segments, **kw)

    def same(found: tuple[Any, Tensor], index: Tensor) -> None:
        # To the bit, all of it, but for the sums over the batch.
        other, d_other = found
        for name in ("log_ratio", "weight", "objective"):
            assert torch.equal(getattr(other, name), getattr(out, name)[index]), name
        torch.testing.assert_close(d_other, d[index], rtol=1e-13, atol=1e-15)

    b, t = batch.labels.shape
    offsets = torch.arange(b + 1, dtype=torch.int32) * t
    packed = (x.flatten(0, 1) for x in (batch.labels, batch.behavior_log_prob))
    flat = LinearBatch(batch.hidden.flatten(0, 1), batch.weight, *packed, batch.reward)
    other, d_other = PATHS[path](flat, segments=segments.flatten(), cu_seqlens=offsets, **kw)
    same((other, d_other.view(d.shape)), torch.arange(b))
    torch.testing.assert_close(other.loss, out.loss, rtol=1e-13, atol=1e-15)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    same(PATHS[path](of(batch, order), segments=segments[order], **kw), order)
    parts = [torch.tensor([0, 2, 3]), torch.tensor([1, 4])]
    losses = []
    for part in parts:
        found = PATHS[path](of(batch, part), segments=segments[part], **kw)
        same(found, part)
        losses.append(found[0].loss)
    torch.testing.assert_close(torch.stack(losses).sum(), out.loss, rtol=1e-13, atol=1e-15)
    wider = LinearBatch(
        pad(batch.hidden, (0, 0, 0, 3)),
        batch.weight,
        pad(batch.labels, (0, 3), value=-100),
        pad(batch.behavior_log_prob, (0, 3), value=torch.nan),
        batch.reward,
    )
    other, d_other = PATHS[path](wider, segments=pad(segments, (0, 3)), **kw)
    same((other, d_other[:, :t]), torch.arange(b))


def of(batch: LinearBatch, index: Tensor) -> LinearBatch:
    x, weight, *rest = batch
    return LinearBatch(x[index], weight, *(y[index] for y in rest))


@pytest.mark.parametrize("ratio", SEGMENT_RATIOS)
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path: str, ratio: str) -> None:
    # IS is smooth; at TOPR positives and the middle of the ratio are too.
    batch, segments = a_trajectory(), some_segments(a_trajectory())
    hidden = batch.hidden.detach().requires_grad_()
    for limits in (IS, TOPR):

        def loss(x: Tensor, limits: Limits = limits) -> Tensor:
            kw: Any = {"limits": limits, "ratio": ratio, "segments": segments, "shift": True}
            if path == "head":
                return linear_topr_loss(x, *batch[1:], **kw).loss
            return topr_loss(x @ batch.weight.T, *batch[2:], **kw).loss

        assert torch.autograd.gradcheck(loss, hidden, fast_mode=True)


def test_a_mask_of_ones_changes_no_bit() -> None:
    batch = without_gaps(a_trajectory(dtype=torch.float32))
    for call in (by_logits, by_head):
        (out, d), (other, d_other) = (
            call(batch, ratio="segment", limits=TIS, segments=segments)
            for segments in (None, torch.full_like(batch.labels, 7))
        )
        assert torch.equal(d, d_other) and out.loss == other.loss


@pytest.mark.parametrize("ratio", SEGMENT_RATIOS)
def test_a_weight_of_the_sequence_and_tiles_smaller_than_it(
    ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of a sequence may lie in several tiles, and one may be longer than a tile."""
    batch, segments = a_trajectory(), some_segments(a_trajectory())
    segments[4] = 0
    weight = torch.tensor([2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64)
    kw: dict[str, Any] = {"limits": BOTH, "ratio": ratio, "sequence_weight": weight}
    for chosen in (segments, None):
        expected = by_reference(batch, segments=chosen, **kw)
        for rows in (2, 4, 16):
            monkeypatch.setattr(workspace, "CPU_ROWS", min(rows, 4))
            monkeypatch.setattr(workspace, "CPU_TILE_ROWS", rows)
            assert_same(by_head(batch, segments=chosen, **kw), expected)


@pytest.mark.parametrize("path", PATHS)
def test_nan_of_a_scored_token_reaches_the_loss_and_no_other(path: str) -> None:
    batch = a_trajectory()
    for place, poisons in (((0, 3), True), ((0, 4), False), ((2, 1), False)):
        mu = batch.behavior_log_prob.clone()
        mu[place] = torch.nan
        out, _ = PATHS[path](batch._replace(behavior_log_prob=mu), ratio="segment", limits=TIS)
        assert out.loss.isnan() == poisons and out.weight[0].isnan() == poisons
        assert out.weight[1:].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_nothing_scored_is_a_connected_zero(path: str) -> None:
    batch = a_trajectory()
    batch = batch._replace(labels=torch.full_like(batch.labels, -100))
    out, d = PATHS[path](batch, ratio="segment_geometric", limits=SFT)
    assert out.loss == 0 and not d.any()


def test_refuses_what_it_cannot_read() -> None:
    batch = a_trajectory()
    with pytest.raises(ValueError, match=r"segments: got some with ratio='sequence'"):
        by_logits(batch, segments=some_segments(batch))
    with pytest.raises(ValueError, match=r"segments: expected one per token, shape \(5, 13\)"):
        by_logits(batch, segments=some_segments(batch)[:, 1:], ratio="segment")
    with pytest.raises(TypeError, match="segments: expected dtype"):
        by_logits(batch, segments=some_segments(batch).float(), ratio="segment")
    summed = batch._replace(behavior_log_prob=batch.behavior_log_prob.sum(1))
    with pytest.raises(ValueError, match="ratio='segment' needs it per token"):
        by_head(summed, ratio="segment")
    with pytest.raises(ValueError, match="inplace: got True with"):
        by_logits(batch, ratio="segment", inplace=True)
