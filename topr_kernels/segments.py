"""Segments of the sequences: runs of scored tokens of equal value, which have a ratio each."""

from __future__ import annotations

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX, scored_labels, sequence_index, sequence_offsets
from topr_kernels.ops.options import Objective, Tokens, Units


def with_units(objective: Objective, tokens: Tokens) -> Objective:
    """The objective with the units of its segments, if it has any.

    Args:
        objective: checked.
        tokens: of sequences that are here as a whole; labels [O, T], or a mask in their place.
    """
    if objective.segments is None:
        return objective
    scored = scored_tokens(tokens)
    offsets, _ = sequence_offsets(tokens.labels, tokens.cu_seqlens)
    return objective._replace(units=find_units(objective.segments, scored, offsets))


def scored_tokens(tokens: Tokens) -> Tensor:
    """[O, T] bool; of labels, or of a mask in their place."""
    labels = scored_labels(*tokens)
    return labels if labels.dtype == torch.bool else labels != IGNORE_INDEX


def starts(segments: Tensor, scored: Tensor, sequence: Tensor) -> Tensor:
    """Where a segment begins: a scored token behind one that is not scored, or of another value.

    Args:
        segments: [O, T] integers, aligned with the labels.
        scored: [O, T] bool.
        sequence: [O * T] int64 number of the sequence of each position.

    Returns:
        [O * T] bool.
    """
    value, begins = segments.reshape(-1), scored.reshape(-1).clone()
    same = (value[1:] == value[:-1]) & (sequence[1:] == sequence[:-1])
    begins[1:] &= ~(same & scored.reshape(-1)[:-1])
    return begins


def find_units(segments: Tensor, scored: Tensor, offsets: Tensor) -> Units:
    """The segments of sequences that are here as a whole, in order; without a copy to the host.

    Their number is known on the device alone, so there are as many units as positions, the last of
    them empty.

    Args:
        segments: [O, T] integers, aligned with the labels.
        scored: [O, T] bool.
        offsets: [B + 1] int64 offsets of the sequences in the flattened positions.
    """
    n = scored.numel()
    sequence = sequence_index(offsets, n)
    count = starts(segments, scored, sequence).cumsum(0)
    number = torch.arange(n + 1, device=offsets.device)
    # Of a unit that is not there the begin is n.
    begin = torch.searchsorted(count, number[1:])
    # What is not scored counts to the segment before it; nothing reads it.
    bounds = torch.searchsorted((count - 1).clamp_(min=0), number)
    return Units(bounds, sequence[begin.clamp(max=max(n - 1, 0))])
