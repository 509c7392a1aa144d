"""What an implementation of the fused-linear path is: four kernels over a tile of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of the n rows of a tile, by the row kernel; each [n] in the arithmetic dtype."""

    log_prob: Tensor
    lse: Tensor
    lse_low: Tensor
    entropy: Tensor
    #: What the J of the other kernels must be multiplied by, chain rule of the transforms included.
    factor: Tensor
    #: Row sums of that J before the factor; 0 but for a softcap.
    j_sum: Tensor


class Shard(NamedTuple):
    """The rows of the head that this process holds, of a vocabulary spread over a process group.

    Every process sees the same hidden states, labels and sequences, so all take the same path through
    the algorithm and meet in the same sums: of rows, of the selection of columns, and of d_hidden.
    """

    #: First of the rows, rows of the largest shard, rows of all.
    start: int
    largest: int
    vocab: int
    #: Sum over the group, in place.
    sum_: Callable[[Tensor], Tensor]

    def local(self, label: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """-> (label in this shard, clamped to it; whether it is one of its ``size`` rows)."""
        index = label - self.start
        here = (index >= 0) & (index < size)
        return index.clamp(0, size - 1), here


class TileKernels(NamedTuple):
    """The kernels over a tile of logits z [n, V] with V contiguous, in the arithmetic dtype.

    rows(z, label [n], transforms, entropy, gradient) -> RowStats
        May overwrite z with what the others understand. A label outside [0, V) gives NaN, IGNORE_INDEX
        anything finite. The result of a row must not depend on the others.
    gradient(z, label, stats, transforms, dtype) -> J [n, V] in ``dtype``; may be z itself
        stats.factor * J is the gradient of log_prob by hidden Wt + bias.
    columns(z, label, stats, transforms, coefficient [n], groups [k, n]) -> (energy [V], sums [k, V])
        energy = sum_t (coefficient factor J)^2, sums = groups (factor J); z stays as it is.
    gather(z, label, stats, transforms, columns [a], dtype) -> (J[:, columns] [n, a], its row sums [n])
        The sums in the arithmetic dtype, before any rounding to ``dtype``; z stays as it is.
    """

    rows: Callable[..., RowStats]
    gradient: Callable[..., Tensor]
    columns: Callable[..., tuple[Tensor, Tensor]]
    gather: Callable[..., tuple[Tensor, Tensor]]
    #: None for a head that is whole.
    shard: Shard | None = None
    #: Sum over the processes that hold the pieces of each sequence, in place; None for whole sequences.
    sum_pieces: Callable[[Tensor], Tensor] | None = None
