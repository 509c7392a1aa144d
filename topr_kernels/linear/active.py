"""The columns of a tile that carry its gradient, and clusters of its rows for what is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from topr_kernels.linear.tile import Shard

# Steps of k-means.
CLUSTER_STEPS = 3
# Active columns come in multiples of this, as matmuls like them; more of them than half are too many.
COLUMN_MULTIPLE, DENSE_SHARE = 128, 0.5


def cluster_rows(hidden: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Groups similar hidden states, whose softmax tails are similar too: a few steps of k-means.

    Args:
        hidden: [n, D].
        most: clusters, fewer for fewer rows.

    Returns:
        (cluster [n] int64, member [k, n], 1 where a row belongs to a cluster). No copy to the host; the
        start is every n/k-th row, so the result is the same every time.
    """
    n = hidden.shape[0]
    k = min(most, n)
    start = torch.arange(k, device=hidden.device) * n // k
    centre = hidden[start]
    member = hidden.new_zeros((k, n))
    for step in range(CLUSTER_STEPS + 1):
        distance = centre.square().sum(1) - 2 * (hidden @ centre.t())
        cluster = distance.argmin(1)
        member = torch.zeros_like(member).scatter_(0, cluster.unsqueeze(0), 1.0)
        if step < CLUSTER_STEPS:
            size = member.sum(1, keepdim=True)
            centre = torch.where(size > 0, (member @ hidden) / size.clamp(min=1), centre)
    return cluster, member


def select_columns(
    energy: Tensor, label: Tensor, tolerance: float, shard: Shard | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Finds the columns that carry all but tolerance^2 of the energy, labels always among them.

    Counts energies into bins of an eighth of an octave and drops the lowest bins that fit. The counts
    are integers, so the order of their sum does not matter.

    Args:
        energy: [V] >= 0.
        label: [n] int64.
        tolerance: > 0.
        shard: which part of the vocabulary ``energy`` is; the tolerance is that of the whole.

    Returns:
        (columns [a] int64, or None where the tile is better served dense: too many columns, or an energy
        that is not finite; energy left out here, 0 for dense; energy in all). The last two 0-dim fp64.
    """
    vocab = energy.shape[0]
    # The exponent and three bits of the mantissa: 11 bits of an fp32, 14 of an fp64.
    wide = energy.dtype == torch.float64
    bins = (energy.view(torch.int64) >> 49) if wide else (energy.view(torch.int32) >> 20)
    whole = energy.double().sum()
    if shard is not None:
        shard.sum_(whole)
    quantum = whole / (1 << 52)
    kept = torch.zeros(vocab, dtype=torch.bool, device=energy.device)
    if shard is None:
        kept[label.clamp(0, vocab - 1)] = True
    else:
        index, here = shard.local(label, vocab)
        kept[index[here]] = True
    free = torch.where(kept, 0.0, energy.double())
    # Rounded up: what is counted as left out is never less than what is.
    count = torch.where(free > 0, (free / quantum).ceil(), 0.0).nan_to_num(0, 0, 0).to(torch.int64)
    histogram = torch.zeros(1 << 14, dtype=torch.int64, device=energy.device)
    histogram.scatter_add_(0, bins.clamp(0, (1 << 14) - 1).to(torch.int64), count)
    if shard is not None:
        shard.sum_(histogram)
    # A bin is left out when all energy up to its end fits.
    fits = histogram.cumsum(0) <= int(tolerance**2 * (1 << 52))
    kept |= bins >= fits.sum()
    zero = torch.zeros_like(whole)
    numbers = kept.sum().repeat(2)
    if shard is not None:
        shard.sum_(numbers[1:])
    # The copy to the host that every tile makes: the number of columns here and in all, or -1.
    number, everywhere = torch.where(whole.isfinite(), numbers, -1).tolist()
    if number < 0:
        return None, zero, whole
    number = min(number + -number % COLUMN_MULTIPLE, vocab)
    everywhere, size = (number, vocab) if shard is None else (everywhere, shard.vocab)
    if everywhere > DENSE_SHARE * size:
        return None, zero, whole
    # The first columns of the rest fill up to the multiple.
    columns = torch.argsort((~kept).to(torch.int8), stable=True)[:number]
    left = energy.double().index_fill(0, columns, 0.0).sum()
    return columns.sort().values, left, whole
