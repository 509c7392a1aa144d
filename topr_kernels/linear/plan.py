"""Which rows are multiplied, and which of them share a tile."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX, scored_labels, sequence_offsets
from topr_kernels.ops.options import Tokens, Units
from topr_kernels.sequence import segment_sum


class ScoredRows(NamedTuple):
    """The scored rows of a batch, N in all."""

    #: [N] positions of their labels and of their hidden states in the flattened [O * T].
    position: Tensor
    row: Tensor
    label: Tensor
    #: [B + 1] offsets of the sequences in the label positions.
    offsets: Tensor
    sound: Tensor
    #: [B] int64 rows per sequence.
    length: Tensor
    #: [O, T] bool.
    scored: Tensor


def scored_rows(
    tokens: Tokens, *per_sequence: Tensor, units: Units | None = None
) -> tuple[ScoredRows, list[list[int]]]:
    """Lists the rows that predict a scored label.

    Args:
        tokens: of the batch.
        *per_sequence: [B] tensors that the host must know too.
        units: parts of the sequences; the host is told their lengths in the place of the sequences'.

    Returns:
        (rows, [lengths of the sequences, the other tensors] on the host).
    """
    labels, cu_seqlens, shift = tokens
    target = scored_labels(labels.contiguous(), cu_seqlens, shift)
    scored = target != IGNORE_INDEX
    offsets, sound = sequence_offsets(target, cu_seqlens)
    length = segment_sum(scored.reshape(-1), offsets).to(torch.int64)
    # The one copy to the host that every call makes.
    counts = [length, *(x.to(torch.int64) for x in per_sequence)]
    if units is not None:
        of_unit = segment_sum(scored.reshape(-1), units.offsets).to(torch.int64)
        counts = [of_unit, *(x[units.owner] for x in counts[1:])]
    host = torch.stack(counts).cpu().tolist()
    # Stable: the scored positions first and in order, without another copy of their number.
    position = torch.argsort((~scored.reshape(-1)).to(torch.int8), stable=True)[: sum(host[0])]
    row, label = position - int(shift), target.reshape(-1)[position]
    return ScoredRows(position, row, label, offsets, sound, length, scored), host


class Tile(NamedTuple):
    """A slice [start, start + size) of the row order; the first ``graded_size`` have a gradient."""

    start: int
    size: int
    graded_size: int
    #: (sequence or unit, number of its rows) of those with a gradient, in order.
    parts: list[tuple[int, int]]


def plan_tiles(
    lengths: list[int],
    graded: list[bool],
    whole: list[bool],
    capacity: int,
    skip: Collection[int] = (),
) -> tuple[Tensor, list[Tile]]:
    """Packs the scored rows of sequences into tiles of ``capacity`` rows.

    Args:
        lengths: rows per sequence.
        graded: whether a sequence takes part in the backward.
        whole: whether it must lie in one tile; such a sequence has at most ``capacity`` rows.
        capacity: rows of a tile.
        skip: sequences that need no tile.

    Returns:
        (order [N] int64 on the host, tiles): order lists the rows, numbered through all sequences, as
        the tiles hold them.
    """
    first = [0, *itertools.accumulate(lengths)]
    bins: list[list[tuple[int, int, int]]] = []
    room: list[int] = []

    def put(i_bin: int, sequence: int, start: int, count: int) -> None:
        if i_bin == len(bins):
            bins.append([])
            room.append(capacity)
        bins[i_bin].append((sequence, start, count))
        room[i_bin] -= count

    sequences = [s for s in range(len(lengths)) if s not in skip]
    for s in sorted((s for s in sequences if graded[s] and whole[s]), key=lambda s: -lengths[s]):
        if lengths[s]:
            fits = (i for i, free in enumerate(room) if free >= lengths[s])
            put(next(fits, len(bins)), s, 0, lengths[s])
    # What may be cut fills the gaps, first what has a gradient: those rows come first in a tile.
    for with_gradient in (True, False):
        i_bin = 0
        for s in sequences:
            if graded[s] is not with_gradient or (with_gradient and whole[s]):
                continue
            done = 0
            while done < lengths[s]:
                while i_bin < len(bins) and room[i_bin] == 0:
                    i_bin += 1
                free = room[i_bin] if i_bin < len(bins) else capacity
                count = min(free, lengths[s] - done)
                put(i_bin, s, done, count)
                done += count
    order, tiles, start = [], [], 0
    for contents in bins:
        size = sum(count for _, _, count in contents)
        parts = [(s, count) for s, _, count in contents if graded[s]]
        tiles.append(Tile(start, size, sum(count for _, count in parts), parts))
        order += [torch.arange(first[s] + a, first[s] + a + count) for s, a, count in contents]
        start += size
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64), tiles
