"""Sequences in pieces: what is per token moves across the borders of the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topr_kernels.distributed.collectives import gathered, rank_in
from topr_kernels.layout import IGNORE_INDEX, sequence_index
from topr_kernels.ops.options import Tokens, Units
from topr_kernels.output import LogProbOutput, TOPROutput
from topr_kernels.segments import starts
from topr_kernels.sequence import segment_sum


def check_shift(tokens: Tokens, sequence_group: Any) -> None:
    """Refuses a shift across the pieces of packed sequences."""
    if tokens.shift and sequence_group is not None and tokens.cu_seqlens is not None:
        raise ValueError(
            "shift: got True with cu_seqlens and sequence_group; where the pieces of packed sequences "
            "meet is not known here: shift the labels before they are cut, and pass shift=False"
        )


def shifted(tokens: Tokens, group: Any) -> Tokens:
    """Labels aligned with the rows that are here, shifted across the pieces."""
    return tokens._replace(labels=next_tokens(tokens.labels, IGNORE_INDEX, group), shift=False)


def loss_at_labels(out: TOPROutput, entropy: bool, summed: bool, group: Any) -> TOPROutput:
    """Moves what is per token from the rows here to their labels, across the pieces.

    Args:
        out: of the rows here.
        entropy: whether it was asked for.
        summed: whether log mu came summed per sequence.
        group: over which the sequences are spread.
    """
    fills = {
        "log_prob": 0.0,
        "entropy": 0.0 if entropy else torch.nan,
        "token_log_ratio": torch.nan if summed else 0.0,
    }
    moved = {n: previous_tokens(getattr(out, n), fill, group) for n, fill in fills.items()}
    return out._replace(**moved)


def scores_at_labels(out: LogProbOutput, entropy: bool, group: Any) -> LogProbOutput:
    """The same for the results of a scorer, whose log_prob is differentiable."""
    moved: Tensor = _Moved.apply(out.log_prob, 0.0, group)  # type: ignore[no-untyped-call]
    fill = 0.0 if entropy else torch.nan
    return LogProbOutput(
        moved, previous_tokens(out.lse, 0.0, group), previous_tokens(out.entropy, fill, group)
    )


class _Moved(torch.autograd.Function):
    """``previous_tokens`` of something differentiable; its backward is a collective too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: float, group: Any) -> Tensor:
        ctx.group = group
        return previous_tokens(x, fill, group)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return next_tokens(d.contiguous(), 0.0, ctx.group), None, None


def next_tokens(x: Tensor, fill: float, group: Any) -> Tensor:
    """Moves a tensor per token one position to the left, across the pieces of the sequences.

    Args:
        x: [B, T], the columns of this process; T may differ between processes, and be 0.
        fill: for the last position of all.
        group: whose ranks hold the columns in their order.

    Returns:
        [B, T]: for each position what ``x`` has at the next one.
    """
    end = x[:, :1] if x.shape[1] else x.new_zeros((x.shape[0], 1))
    borders = _borders(end, bool(x.shape[1]), group)
    later = (border for border in borders[rank_in(group) + 1 :] if border is not None)
    following = next(later, torch.full_like(end, fill))
    return torch.cat([x, following], dim=1)[:, 1:]


def previous_tokens(x: Tensor, fill: float, group: Any) -> Tensor:
    """Moves a tensor per token one position to the right; as :func:`next_tokens`."""
    end = x[:, -1:] if x.shape[1] else x.new_zeros((x.shape[0], 1))
    borders = _borders(end, bool(x.shape[1]), group)
    earlier = [border for border in borders[: rank_in(group)] if border is not None]
    before = earlier[-1] if earlier else torch.full_like(end, fill)
    return torch.cat([before, x], dim=1)[:, :-1]


def find_units(segments: Tensor, scored: Tensor, offsets: Tensor, group: Any) -> Units:
    """The segments of sequences in pieces; one that crosses a border is one unit on both sides.

    Args:
        segments: [O, T] integers, aligned with ``scored``.
        scored: [O, T] bool, of the tokens here.
        offsets: [B + 1] int64 offsets of the pieces in the flattened positions.
        group: whose ranks hold the pieces in their order.

    Returns:
        Units, numbered alike on all processes; their number is copied to the host.
    """
    sequence = sequence_index(offsets, scored.numel())
    begins = starts(segments, scored, sequence)
    count = segment_sum(begins, offsets).to(torch.int64)
    own = torch.stack([*_ends(segments, scored, offsets), count])
    parts = gathered(own, group)
    joined = _joined(parts)
    # Segments that begin in each piece, [P, B]; in all pieces of a sequence.
    fresh = parts[:, -1] - joined
    count_in_all = fresh.sum(0)
    rank = rank_in(group)
    first = count_in_all.cumsum(0) - count_in_all + fresh[:rank].sum(0) - joined[rank]
    within = begins.cumsum(0) - (count.cumsum(0) - count)[sequence] - 1
    index = (first[sequence] + within).clamp_(min=0)
    sequences = len(count_in_all)
    number = torch.arange(
        max(int(count_in_all.sum()), min(sequences, 1)) + 1, device=offsets.device
    )
    owner = torch.searchsorted(count_in_all.cumsum(0), number[:-1], right=True)
    return Units(torch.searchsorted(index, number), owner.clamp_(max=sequences - 1))


def _ends(segments: Tensor, scored: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """-> (has tokens, first is scored, value of first, last is scored, value of last), each [B]."""
    # A process may have no token.
    value, known = (
        torch.nn.functional.pad(x.reshape(-1).long(), (0, 1)) for x in (segments, scored)
    )
    first, last = offsets[:-1], (offsets[1:] - 1).clamp(min=0)
    return offsets.diff() > 0, known[first], value[first], known[last], value[last]


def _joined(parts: Tensor) -> Tensor:
    """Whether the first segment of a piece goes on with that of the piece before it.

    Args:
        parts: [P, 6, B], of each process: the five of ``_ends``, then the number of segments.

    Returns:
        [P, B] int64.
    """
    open_, value = torch.zeros_like(parts[0, 0]), torch.zeros_like(parts[0, 0])
    joined = []
    for present, first_scored, first, last_scored, last, _ in (x.unbind() for x in parts):
        joined.append(present * first_scored * open_ * (first == value))
        open_ = torch.where(present == 1, last_scored, open_)
        value = torch.where(present == 1, last, value)
    return torch.stack(joined)


def _borders(x: Tensor, present: bool, group: Any) -> list[Tensor | None]:
    """[B, 1] of every process, None of one that has no column."""
    # One more row says whether this process has any column; a row of x may be NaN.
    parts = gathered(torch.cat([x, x.new_full((1, 1), present)]), group)
    flags = parts[:, -1, 0].tolist()
    return [part[:-1] if flag else None for part, flag in zip(parts, flags, strict=True)]
