"""The fused-linear path: hidden states and head to loss and gradients, one tile of logits at a time.

What never exists: the [N, V] logits, their gradient, a copy of the head (a CPU casts half precision in
blocks; a GPU casts the head once per call, under autocast alone). Only scored rows are multiplied. A
tile holds up to R rows of fp32 logits in one fixed workspace; its forward matmul always has the same
shape, so a row's log-prob does not depend on its neighbours.

The gradient of a row of logits is c J with J = onehot - softmax and c known once the sequence's
log-ratio is. c is one number per row, so it moves to the D side of both products,

    d_hidden = c * (J W)        d_weight = Jt (c * H)        d_bias = Jt c

and nothing is computed twice. A sequence that must be complete before its c is known lies in one tile;
one that is longer than a tile is scored first, at the cost of one more matmul over its rows.

With a tolerance tau > 0 only the columns A of a tile that carry its gradient enter the two products: the
smallest set, always with the labels, whose complement holds at most tau^2 of sum c^2 J^2. What is
left out is added back as a rank-one term per cluster of similar rows, with the mass m of each row's
tail, the cluster's tail profile q = sum |c| J and the mean row mu = q W / sum q of the head in it:

    d_hidden = c * (J_A W_A + m mu)    d_weight[A] += J_At (c * H),  d_weight += qt (sum c m H / sum q)

This file is the algorithm; what reads and writes the logits of a tile is a :class:`TileKernels`.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.layout import (
    IGNORE_INDEX,
    scored_labels,
    sequence_offsets,
    to_rows,
)
from topr_kernels.matmul import mm
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops import linear as ops
from topr_kernels.sequence import (
    SequenceStage,
    loss_denominator,
    segment_sum,
    sequence_stage,
)

# Rows of one forward matmul, the same for every one so that its result is too; rows of a tile; rows of
# one selection of columns, of which fewer are sparser. On a CPU BLAS packs the head once per call, which
# 256 rows pay for; on a GPU d_weight is read and written once per tile.
CPU_ROWS, CPU_TILE_ROWS, CPU_SPARSE_ROWS = 256, 512, 256
GPU_ROWS, GPU_TILE_ROWS, GPU_SPARSE_ROWS = 1024, 2048, 2048
# Columns of one forward matmul on a CPU: its result stays in cache while it is summed, a seventh faster.
CPU_COLUMNS = 2048
# Elements of a block of the head that is cast, or of active rows that are gathered.
CPU_BLOCK, GPU_BLOCK = 1 << 21, 1 << 25
# Clusters of a tile's rows, and profiles of their tails that wait so that the head is read once for all.
CLUSTERS, CLUSTER_STEPS, PENDING_PROFILES = 8, 3, 32
# Active columns come in multiples of this, as matmuls like them; more of them than half are too many.
COLUMN_MULTIPLE, DENSE_SHARE = 128, 0.5


class Transforms(NamedTuple):
    """What happens between the matmul and the softmax, in this order."""

    logit_scale: float
    softcap: float | None
    temperature: float


class RowStats(NamedTuple):
    """What the row kernel says about the n rows of a tile, each [n] in the arithmetic dtype."""

    log_prob: Tensor
    lse: Tensor
    lse_low: Tensor
    entropy: Tensor
    #: What the J of the other kernels must be multiplied by, chain rule of the transforms included.
    factor: Tensor
    #: Row sums of that J before the factor; 0 but for a softcap.
    total: Tensor


class Shard(NamedTuple):
    """The rows of the head that this process holds, of a vocabulary spread over a process group.

    Every process sees the same hidden states, labels and sequences, so all take the same path through
    this file and meet in the same sums. What is summed: [n] and [3, n] per tile in the row kernel, the
    histogram of energies and two numbers in the selection of columns, the rows of d_hidden.
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
    total: Callable[[Tensor], Tensor] | None = None


def linear_kernels(tile: TileKernels) -> ops.Kernels:
    """The operators of the fused-linear path over some tile kernels."""
    return ops.Kernels(
        partial(_log_prob_fwd, tile), partial(_log_prob_bwd, tile), partial(_topr_fwd, tile)
    )


# ---- the plan --------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A slice [start, start + rows) of the row order; the first ``graded`` rows have a gradient."""

    start: int
    rows: int
    graded: int
    #: (sequence, rows) of the graded part, in order.
    segments: list[tuple[int, int]]


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
    for wanted in (True, False):
        i_bin = 0
        for s in (s for s in sequences if graded[s] is wanted and not (wanted and whole[s])):
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
        rows = sum(count for _, _, count in contents)
        segments = [(s, count) for s, _, count in contents if graded[s]]
        tiles.append(Tile(start, rows, sum(count for _, count in segments), segments))
        order += [torch.arange(first[s] + a, first[s] + a + count) for s, a, count in contents]
        start += rows
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64), tiles


# ---- rows and head ---------------------------------------------------------------------------------


class _Rows(NamedTuple):
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


def _find_rows(
    labels: Tensor, cu_seqlens: Tensor | None, shift: bool, *per_sequence: Tensor
) -> tuple[_Rows, list[list[int]]]:
    """-> (rows, [lengths of the sequences, what else was asked for per sequence] on the host)."""
    target = scored_labels(labels.contiguous(), cu_seqlens, shift)
    scored = target != IGNORE_INDEX
    offsets, sound = sequence_offsets(target, cu_seqlens)
    length = segment_sum(scored.reshape(-1), offsets).to(torch.int64)
    # The one copy to the host that every call makes.
    host = torch.stack([length, *(x.to(torch.int64) for x in per_sequence)]).cpu().tolist()
    # Stable: the scored positions first and in order, without another copy of their number.
    position = torch.argsort((~scored.reshape(-1)).to(torch.int8), stable=True)[: sum(host[0])]
    label = target.reshape(-1)[position]
    return _Rows(position, position - int(shift), label, offsets, sound, length, scored), host


class _Head:
    """The head's matrix in blocks of its rows, as operand of the three products.

    On a GPU half-precision operands stay so and the products accumulate and write fp32; anywhere else
    operands have the arithmetic dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        self.arithmetic = accumulate_dtype(compute)
        half = compute in (torch.float16, torch.bfloat16)
        self.compute = compute
        self.operand = compute if weight.is_cuda and half else self.arithmetic
        # Autocast: one cast of the head per call, where its blocks are not cast anyway.
        whole = weight.is_cuda and weight.dtype != compute
        self.weight = weight.detach().to(compute) if whole else weight.detach()
        self.bias = None if bias is None else bias.detach().to(compute).to(self.arithmetic)
        self.vocab, self.dim = weight.shape
        elements = GPU_BLOCK if weight.is_cuda else CPU_BLOCK
        #: Rows of the head that are cast or gathered at a time.
        self.step = max(COLUMN_MULTIPLE, elements // max(self.dim, 1))
        self.blocks = (
            [slice(0, self.vocab)]
            if self.weight.dtype == self.compute == self.operand
            else [slice(v, v + self.step) for v in range(0, self.vocab, self.step)]
        )

    def cast(self, x: Tensor) -> Tensor:
        """Rounds to the compute dtype, then takes the dtype of operands."""
        return x.to(self.compute).to(self.operand)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden Wt + bias to out [n, V]."""
        step = self.vocab if self.weight.is_cuda else CPU_COLUMNS
        for v in range(0, self.vocab, step):
            mm(hidden, self.cast(self.weight[v : v + step]).t(), out[:, v : v + step])
        if self.bias is not None:
            out.add_(self.bias)

    def times(self, j: Tensor) -> Tensor:
        """[n, V] -> j W [n, D] in the arithmetic dtype."""
        out = j.new_empty((j.shape[0], self.dim), dtype=self.arithmetic)
        for v in self.blocks:
            mm(j[:, v], self.cast(self.weight[v]), out, accumulate=v.start > 0)
        return out

    def transposed(self, j: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """Writes jt hidden to out [V, D], or adds it."""
        for v in self.blocks:
            mm(j[:, v].t(), hidden, out[v], accumulate=accumulate)


_HELD = threading.local()


def _buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of uninitialised memory, on a CPU the same one at every call of a thread.

    A CPU gives memory of this size back to the system when it is freed; taking it again costs a page
    fault per 4 KiB, a tenth of the time of the matmul that fills it. GPU allocators keep it themselves.
    """
    if like.device.type != "cpu":
        return like.new_empty((rows, columns), dtype=dtype)
    size = rows * columns * torch.finfo(dtype).bits // 8
    held: Tensor | None = getattr(_HELD, "memory", None)
    if held is None or held.numel() < size:
        _HELD.memory = None  # frees it first: never two
        held = _HELD.memory = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(dtype).view(rows, columns)


class _Workspace:
    """The forward of the tiles of one call, and its buffers: hidden states and logits of a tile."""

    def __init__(
        self,
        kernels: TileKernels,
        head: _Head,
        hidden: Tensor,
        transforms: Transforms,
        rows: int,
        workspace_bytes: int,
    ) -> None:
        self.kernels, self.head, self.transforms = kernels, head, transforms
        self.source = hidden.detach()
        unit, most = (GPU_ROWS, GPU_TILE_ROWS) if hidden.is_cuda else (CPU_ROWS, CPU_TILE_ROWS)
        # Shards of the vocabulary may differ in size, the tiles of their processes must not.
        vocab = head.vocab if kernels.shard is None else kernels.shard.largest
        fits = workspace_bytes // (vocab * torch.finfo(head.arithmetic).bits // 8)
        #: Rows of one forward matmul, from the budget alone: a batch must not choose its own shapes.
        self.unit = unit
        while self.unit > 16 and self.unit > fits:
            self.unit //= 2
        #: Rows of a tile.
        self.capacity = self.unit * max(1, min(fits, most) // self.unit)
        n = min(self.capacity, -(-rows // self.unit) * self.unit)
        self.hidden = hidden.new_empty((n, head.dim), dtype=head.operand)
        self.logits = _buffer(hidden, n, head.vocab, head.arithmetic)

    def forward(
        self, row: Tensor, label: Tensor, entropy: bool, gradient: bool
    ) -> tuple[Tensor, Tensor, RowStats]:
        """-> (hidden states [n, D], logits [n, V], their statistics) of some rows.

        The first two are views of the workspace. Both the matmul and the row kernel see whole units of
        rows, whatever n is: then neither splits its work in another way for another batch.
        """
        n = len(row)
        padded = -(-n // self.unit) * self.unit
        # By two indices: flattening a slice of the hidden states would copy all of them.
        t = self.source.shape[1]
        self.hidden[:n] = self.head.cast(self.source[row // t, row % t])
        # Rows of an earlier tile could hold NaN, which slows some CPUs down; they reach nothing.
        self.hidden[n:padded] = 0
        for a in range(0, padded, self.unit):
            self.head.logits(self.hidden[a : a + self.unit], self.logits[a : a + self.unit])
        label = torch.nn.functional.pad(label, (0, padded - n), value=IGNORE_INDEX)
        stats = self.kernels.rows(self.logits[:padded], label, self.transforms, entropy, gradient)
        return self.hidden[:n], self.logits[:n], RowStats(*(x[:n] for x in stats))


# ---- the backward of a tile ------------------------------------------------------------------------


class _Tail(NamedTuple):
    """What a tile left out of both products, until there are enough of them for one pass over W."""

    row: Tensor
    c: Tensor
    #: [n, D] active part of the rows of d_hidden.
    product: Tensor
    #: [n] sum of the tail of every row of J, and the row's cluster.
    mass: Tensor
    cluster: Tensor
    #: [k, V] sum over a cluster of |c| J in the tail, and [k, D] of c mass H.
    profile: Tensor
    direction: Tensor


class _Gradient:
    """Accumulates the gradients of the tiles of one call.

    Rows of ``d_hidden`` are stored without their coefficient unless ``scaled``, fp16 rows divided by
    ``row_scale`` besides, so that nothing underflows before the upstream gradient is known.
    """

    def __init__(
        self,
        kernels: TileKernels,
        head: _Head,
        hidden: Tensor,
        transforms: Transforms,
        tolerance: float,
        wanted: tuple[bool, bool, bool],
        scaled: bool,
    ) -> None:
        self.kernels, self.head, self.transforms = kernels, head, transforms
        self.shard = kernels.shard
        self.vocab = head.vocab if self.shard is None else self.shard.vocab
        self.tolerance, self.scaled = tolerance, scaled
        self.want_hidden, self.want_weight, self.want_bias = wanted
        rows = hidden.shape[:-1].numel()
        self.d_hidden = hidden.new_zeros((rows, head.dim) if self.want_hidden else 0)
        wide = hidden.new_zeros(0, dtype=head.arithmetic)
        self.row_scale = wide.new_ones(rows)
        self.d_weight = wide.new_empty((head.vocab, head.dim) if self.want_weight else 0)
        self.d_bias = wide.new_zeros(head.vocab if self.want_bias else 0)
        #: d_weight holds nothing yet: the first dense product overwrites it.
        self.empty = True
        # fp16 operands: d_weight and d_bias in units of a power of two near the largest coefficient so
        # far, so that c * H neither underflows nor overflows.
        self.unit = 0.0 if head.operand == torch.float16 else None
        self.tails: list[_Tail] = []
        self.tiles, self.active = 0, 0.0
        self.left = wide.new_zeros((), dtype=torch.float64)
        self.energy = torch.zeros_like(self.left)

    def add(
        self, z: Tensor, label: Tensor, stats: RowStats, row: Tensor, hidden: Tensor, c: Tensor
    ) -> None:
        """Adds the rows of one tile with coefficients c, none of them 0.

        Args:
            z: [n, V] tile of logits, as the row kernel left it.
            label: [n].
            stats: of the row kernel.
            row: [n] positions in the flattened hidden states.
            hidden: [n, D] operand.
            c: [n].
        """
        most = GPU_SPARSE_ROWS if z.is_cuda else CPU_SPARSE_ROWS
        if self.tolerance > 0 and len(c) > most:
            for a in range(0, len(c), most):
                part = slice(a, a + most)
                stats_part = RowStats(*(x[part] for x in stats))
                self.add(z[part], label[part], stats_part, row[part], hidden[part], c[part])
            return
        self.tiles += 1
        factor = c * stats.factor
        if self.unit is not None:
            self._raise_unit(float(factor.abs().amax()))
            factor = factor / self.unit
        columns = None
        if self.tolerance > 0:
            cluster, member = cluster_rows(hidden.to(c.dtype), CLUSTERS)
            # Over the largest coefficient: the squares of small ones would underflow.
            top = c.abs().amax()
            groups = (
                torch.cat([member * c.abs(), c.unsqueeze(0)])
                if self.want_bias
                else member * c.abs()
            )
            energy, sums = self.kernels.columns(z, label, stats, self.transforms, c / top, groups)
            columns, left, total = select_columns(energy, label, self.tolerance, self.shard)
            # Tiles in one unit again.
            self.energy += total * top.double().square()
            self.left += left * top.double().square()
        if columns is None:
            self._dense(z, label, stats, row, hidden, c, factor)
            return
        product, kept = self._active(z, label, stats, hidden, factor, columns)
        if self.want_bias:
            signed = sums[-1]
            self.d_bias += signed if self.unit is None else signed / self.unit
        # Rows of J sum to 0 (but for a softcap), so the tail has what the kept columns lack.
        mass = stats.factor * (stats.total - kept)
        profile = sums[: len(member)].index_fill(1, columns, 0.0)
        direction = (member * (c * mass)) @ hidden.to(c.dtype)
        self.tails.append(_Tail(row, c, product, mass, cluster, profile, direction))
        if sum(len(t.profile) for t in self.tails) >= PENDING_PROFILES:
            self._flush()

    def _raise_unit(self, largest: float) -> None:
        """Makes the unit of d_weight and d_bias fit a tile; a copy to the host, for fp16 alone."""
        exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
        unit = 2.0**exponent
        if self.unit and unit <= self.unit:
            return
        if self.unit:
            self._flush()
            self.d_bias.mul_(self.unit / unit)
            if not self.empty:
                self.d_weight.mul_(self.unit / unit)
        self.unit = unit

    def _dense(
        self,
        z: Tensor,
        label: Tensor,
        stats: RowStats,
        row: Tensor,
        hidden: Tensor,
        c: Tensor,
        factor: Tensor,
    ) -> None:
        self.active += self.head.vocab / self.vocab
        j = self.kernels.gradient(z, label, stats, self.transforms, self.head.operand)
        if self.want_hidden:
            self._store(row, self.head.times(j).mul_(stats.factor.unsqueeze(-1)), c)
        if self.want_weight:
            weighted = self._weighted(factor, hidden)
            self.head.transposed(j, weighted, self.d_weight, accumulate=not self.empty)
            self.empty = False
        if self.want_bias:
            mm(factor.to(j.dtype).unsqueeze(0), j, self.d_bias.unsqueeze(0), accumulate=True)

    def _active(
        self,
        z: Tensor,
        label: Tensor,
        stats: RowStats,
        hidden: Tensor,
        factor: Tensor,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Products over the active columns; -> (rows of d_hidden [n, D], their sums of J [n])."""
        self.active += len(columns) / self.vocab
        if self.want_weight and self.empty:
            self.d_weight.zero_()
            self.empty = False
        weighted = self._weighted(factor, hidden)
        product = factor.new_zeros((len(factor), self.head.dim if self.want_hidden else 0))
        kept = torch.zeros_like(factor)
        # A shard of the vocabulary may have no active column.
        for part in torch.split(columns, self.head.step) if len(columns) else ():
            j, sums = self.kernels.gather(z, label, stats, self.transforms, part, self.head.operand)
            kept += sums
            if self.want_hidden:
                mm(
                    j,
                    self.head.cast(self.head.weight.index_select(0, part)),
                    product,
                    accumulate=True,
                )
            if self.want_weight:
                update = self.d_weight.new_empty((len(part), self.head.dim))
                mm(j.t(), weighted, update)
                self.d_weight.index_add_(0, part, update)
        return product.mul_(stats.factor.unsqueeze(-1)), kept

    def _flush(self) -> None:
        """Adds the waiting tails to both gradients, in one pass over the head for each."""
        if not self.tails:
            return
        profile = torch.cat([t.profile for t in self.tails])
        # Over the largest entry, so that fp16 operands keep it; sums of one sign cannot cancel.
        top = profile.abs().amax(1).clamp(min=torch.finfo(profile.dtype).tiny)
        profile.div_(top.unsqueeze(-1))
        total = profile.sum(1)
        total = torch.where(total == 0, 1.0, total)
        operand = profile.to(self.head.operand)
        if self.want_hidden:
            mean = self.head.times(operand).div_(total.unsqueeze(-1))
            sizes = [len(t.profile) for t in self.tails]
            for t, mu in zip(self.tails, torch.split(mean, sizes), strict=True):
                self._store(t.row, t.product.addcmul_(t.mass.unsqueeze(-1), mu[t.cluster]), t.c)
        if self.want_weight:
            direction = torch.cat([t.direction for t in self.tails]) / total.unsqueeze(-1)
            if self.unit is not None:
                # The range of fp16 is too small for a product of two means; bf16 has that of fp32.
                direction, operand = direction / self.unit, operand.to(torch.bfloat16)
            self.head.transposed(
                operand, direction.to(operand.dtype), self.d_weight, accumulate=True
            )
        self.tails.clear()

    def _weighted(self, factor: Tensor, hidden: Tensor) -> Tensor:
        return (factor.unsqueeze(-1) * hidden).to(self.head.operand)

    def _store(self, row: Tensor, d: Tensor, c: Tensor) -> None:
        if self.shard is not None:
            # Before any rounding.
            self.shard.sum_(d)
        if self.scaled:
            d.mul_(c.unsqueeze(-1))
        elif self.d_hidden.dtype == torch.float16:
            exponent = torch.frexp(d.abs().amax(-1)).exponent
            self.row_scale[row] = torch.ldexp(torch.ones_like(c), exponent)
            d = torch.ldexp(d, -exponent.unsqueeze(-1))
        self.d_hidden[row] = d.to(self.d_hidden.dtype)

    def finish(self) -> None:
        """Completes the gradients; call once, after the last tile."""
        self._flush()
        if self.want_weight and self.empty:
            self.d_weight.zero_()
        if self.unit:
            self.d_weight.mul_(self.unit)
            self.d_bias.mul_(self.unit)

    def report(self) -> tuple[Tensor, Tensor]:
        """-> (active_share, left_out): mean |A| / V over the tiles, root of the energy left out."""
        share = torch.full_like(self.left, self.active / self.tiles if self.tiles else torch.nan)
        if self.shard is not None and self.tiles:
            share, self.left = self.shard.sum_(torch.stack([share, self.left])).unbind()
        left = torch.where(self.energy == 0, 0.0, self.left / self.energy).sqrt()
        return share, left if self.tiles else torch.full_like(left, torch.nan)


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
    total = energy.double().sum()
    if shard is not None:
        shard.sum_(total)
    unit = total / (1 << 52)
    kept = torch.zeros(vocab, dtype=torch.bool, device=energy.device)
    if shard is None:
        kept[label.clamp(0, vocab - 1)] = True
    else:
        index, here = shard.local(label, vocab)
        kept[index[here]] = True
    free = torch.where(kept, 0.0, energy.double())
    # Rounded up: what is counted as left out is never less than what is.
    count = torch.where(free > 0, (free / unit).ceil(), 0.0).nan_to_num(0, 0, 0).to(torch.int64)
    histogram = torch.zeros(1 << 14, dtype=torch.int64, device=energy.device)
    histogram.scatter_add_(0, bins.clamp(0, (1 << 14) - 1).to(torch.int64), count)
    if shard is not None:
        shard.sum_(histogram)
    # A bin is left out when all energy up to its end fits.
    fits = histogram.cumsum(0) <= int(tolerance**2 * (1 << 52))
    kept |= bins >= fits.sum()
    zero = torch.zeros_like(total)
    numbers = kept.sum().repeat(2)
    if shard is not None:
        shard.sum_(numbers[1:])
    # The copy to the host that every tile makes: the number of columns here and in all, or -1.
    number, everywhere = torch.where(total.isfinite(), numbers, -1).tolist()
    if number < 0:
        return None, zero, total
    number = min(number + -number % COLUMN_MULTIPLE, vocab)
    everywhere, size = (number, vocab) if shard is None else (everywhere, shard.vocab)
    if everywhere > DENSE_SHARE * size:
        return None, zero, total
    # The first columns of the rest fill up to the multiple.
    columns = torch.argsort((~kept).to(torch.int8), stable=True)[:number]
    left = energy.double().index_fill(0, columns, 0.0).sum()
    return columns.sort().values, left, total


# ---- the operators ---------------------------------------------------------------------------------


def _log_prob_fwd(
    kernels: TileKernels,
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    compute_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    shift: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows, _ = _find_rows(labels, cu_seqlens, shift)
        head = _Head(head_weight, bias, compute_dtype)
        transforms = Transforms(logit_scale, softcap, temperature)
        space = _Workspace(kernels, head, hidden, transforms, len(rows.row), workspace_bytes)
        out = _TokenResults(labels, head.arithmetic)
        for a in range(0, len(rows.row), space.capacity):
            part = slice(a, a + space.capacity)
            *_, stats = space.forward(rows.row[part], rows.label[part], entropy, False)
            out.put(rows.position[part], stats)
        return out.log_prob, out.lse, out.finished_entropy(entropy)


class _TokenResults:
    """Label-aligned results, [O, T], 0 where nothing is scored."""

    def __init__(self, labels: Tensor, dtype: torch.dtype) -> None:
        self.log_prob = labels.new_zeros(labels.shape, dtype=dtype)
        self.lse, self.entropy = torch.zeros_like(self.log_prob), torch.zeros_like(self.log_prob)

    def put(self, position: Tensor, stats: RowStats) -> None:
        self.log_prob.view(-1)[position] = stats.log_prob
        self.lse.view(-1)[position] = stats.lse
        self.entropy.view(-1)[position] = stats.entropy

    def finished_entropy(self, wanted: bool) -> Tensor:
        return self.entropy if wanted else torch.full_like(self.entropy, torch.nan)


def _log_prob_bwd(
    kernels: TileKernels,
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    d_log_prob: Tensor,
    compute_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    shift: bool,
    grad_tolerance: float,
    workspace_bytes: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows, _ = _find_rows(labels, cu_seqlens, shift)
        head = _Head(head_weight, bias, compute_dtype)
        transforms = Transforms(logit_scale, softcap, temperature)
        c = d_log_prob.reshape(-1)[rows.position].to(head.arithmetic)
        gradient = _Gradient(
            kernels,
            head,
            hidden,
            transforms,
            grad_tolerance,
            (grad_hidden, grad_weight, grad_bias),
            scaled=True,
        )
        # Rows without an upstream gradient are not multiplied again.
        live = (c != 0).nonzero().squeeze(-1)
        space = _Workspace(kernels, head, hidden, transforms, len(live), workspace_bytes)
        for index in torch.split(live, space.capacity) if len(live) else ():
            row, label = rows.row[index], rows.label[index]
            h, z, stats = space.forward(row, label, False, True)
            gradient.add(z, label, stats, row, h, c[index])
        gradient.finish()
        d_weight = gradient.d_weight.to(head_weight.dtype)
        d_bias = gradient.d_bias.to(head_weight.dtype if bias is None else bias.dtype)
        return gradient.d_hidden.view(hidden.shape if grad_hidden else 0), d_weight, d_bias


def _branches(reward: Tensor, baseline: float) -> Tensor:
    """[B]: 0 without a gradient, -1 on the negative branch, 1 on the positive one (NaN too)."""
    advantage = reward - torch.full_like(reward, baseline)
    return torch.where(advantage == 0, 0, torch.where(advantage < 0, -1, 1))


class _Batch(NamedTuple):
    """What the sequence stage needs to know besides log-probs."""

    behavior_log_prob: Tensor
    reward: Tensor
    #: 0-dim, of the whole batch; what the caller gave instead of a count.
    denominator: Tensor
    normalizer: Tensor | None
    log_limits: tuple[float, float, float, float]
    ratio: str
    baseline: float
    reduction: str

    def coefficients(
        self, log_prob: Tensor, rows: _Rows, index: Tensor, segments: list[tuple[int, int]]
    ) -> Tensor:
        """Gradient of the loss by the log-probs of some rows, [n].

        Args:
            log_prob: [O, T], complete for these rows.
            rows: all rows.
            index: [n] which of them.
            segments: their (sequence, rows); a sequence whose weight depends on its ratio is whole.
        """
        device = log_prob.device
        sequence = torch.tensor([s for s, _ in segments]).to(device)
        offsets = torch.tensor([0, *(n for _, n in segments)]).cumsum(0).to(device)
        position = rows.position[index]
        here = log_prob.view(-1)[position].unsqueeze(0)
        if self.behavior_log_prob.dim() == 2:
            behavior = self.behavior_log_prob.reshape(-1)[position].unsqueeze(0)
        else:
            behavior = self.behavior_log_prob[sequence]
        stage = sequence_stage(
            here,
            torch.ones_like(here, dtype=torch.bool),
            behavior,
            self.reward[sequence],
            offsets,
            rows.sound,
            None,
            self.log_limits,
            self.ratio,
            self.baseline,
            self.reduction,
            length=rows.length[sequence],
        )
        return stage.d_log_prob[0] / self.denominator.to(log_prob.dtype)

    def stage(
        self, log_prob: Tensor, rows: _Rows, total: Callable[[Tensor], Tensor] | None
    ) -> SequenceStage:
        """The sequence stage of the whole batch, of which log_prob [O, T] is what is here."""
        return sequence_stage(
            log_prob,
            rows.scored,
            self.behavior_log_prob,
            self.reward,
            rows.offsets,
            rows.sound,
            self.normalizer,
            self.log_limits,
            self.ratio,
            self.baseline,
            self.reduction,
            length=rows.length,
            total=total,
        )

    def known_in_advance(self, branch: int) -> bool:
        """Whether a row's coefficient needs nothing of its sequence but the length."""
        low, high = self.log_limits[2:] if branch < 0 else self.log_limits[:2]
        return self.ratio == "token" or low == high


def _topr_fwd(
    kernels: TileKernels,
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    behavior_log_prob: Tensor,
    reward: Tensor,
    normalizer: Tensor | None,
    log_limits: tuple[float, float, float, float],
    ratio: str,
    baseline: float,
    reduction: str,
    compute_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    shift: bool,
    grad_tolerance: float,
    workspace_bytes: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, ...]:
    with torch.autocast(hidden.device.type, enabled=False):
        branch = _branches(reward, baseline)
        rows, (lengths, branches) = _find_rows(labels, cu_seqlens, shift, branch)
        total = kernels.total
        if total is not None:
            # Of the whole sequences; ``lengths`` are those of the pieces here.
            counts = total(torch.cat([rows.length, (~rows.sound).to(torch.int64)[None]]))
            rows = rows._replace(length=counts[:-1], sound=counts[-1] == 0)
        denominator = loss_denominator(rows.length, rows.sound, normalizer, reduction)
        batch = _Batch(
            behavior_log_prob,
            reward,
            denominator,
            normalizer,
            log_limits,
            ratio,
            baseline,
            reduction,
        )
        head = _Head(head_weight, bias, compute_dtype)
        transforms = Transforms(logit_scale, softcap, temperature)
        space = _Workspace(kernels, head, hidden, transforms, len(rows.row), workspace_bytes)
        out = _TokenResults(labels, head.arithmetic)
        wanted = (grad_hidden, grad_weight, grad_bias)
        gradient = _Gradient(
            kernels, head, hidden, transforms, grad_tolerance, wanted, scaled=False
        )

        def forward(index: Tensor, graded: bool) -> tuple[Tensor, Tensor, RowStats]:
            found = space.forward(rows.row[index], rows.label[index], entropy, graded)
            out.put(rows.position[index], found[2])
            return found

        graded = [any(wanted) and branch != 0 for branch in branches]
        whole = [not batch.known_in_advance(branch) for branch in branches]
        # Longer than a tile: scored first, so that its rows know their coefficient.
        given = torch.zeros_like(rows.label, dtype=head.arithmetic)
        scored_first = torch.zeros_like(rows.label, dtype=torch.bool)
        dead: set[int] = set()
        first = [0, *itertools.accumulate(lengths)]
        if total is not None and any(g and w for g, w in zip(graded, whole, strict=True)):
            # In pieces: no tile holds one that must be complete, so all of them are scored first.
            parts = [
                torch.arange(first[s], first[s] + lengths[s])
                for s in range(len(lengths))
                if graded[s] and whole[s]
            ]
            index = torch.cat(parts).to(hidden.device)
            for part in torch.split(index, space.capacity) if len(index) else ():
                forward(part, False)
            stage = batch.stage(out.log_prob, rows, total)
            given[index] = stage.d_log_prob.view(-1)[rows.position[index]] / stage.denominator
            scored_first[index] = True
            whole = [False] * len(whole)
        for s, length in enumerate(lengths):
            if not (graded[s] and whole[s] and length > space.capacity):
                continue
            index = torch.arange(first[s], first[s] + length, device=hidden.device)
            for part in torch.split(index, space.capacity):
                forward(part, False)
            c = batch.coefficients(out.log_prob, rows, index, [(s, length)])
            given[index], scored_first[index] = c, True
            whole[s] = False
            if not bool((c != 0).any()):
                dead.add(s)
        order, tiles = plan_tiles(lengths, graded, whole, space.capacity, dead)
        order = order.to(hidden.device)
        for tile in tiles:
            index = order[tile.start : tile.start + tile.rows]
            h, z, stats = forward(index, tile.graded > 0)
            if not tile.graded:
                continue
            index = index[: tile.graded]
            c = batch.coefficients(out.log_prob, rows, index, tile.segments)
            c = torch.where(scored_first[index], given[index], c)
            live = (c != 0).nonzero().squeeze(-1)
            if len(live):
                live = _compact_(z, live) if len(live) < tile.graded else live
                gradient.add(
                    z[: len(live)],
                    rows.label[index][live],
                    RowStats(*(x[live] for x in stats)),
                    rows.row[index][live],
                    h[live],
                    c[live],
                )
        gradient.finish()
        stage = batch.stage(out.log_prob, rows, total)
        coefficient = to_rows(stage.d_log_prob, shift, 0.0) / stage.denominator
        coefficient = coefficient * gradient.row_scale.view(coefficient.shape)
        return (
            stage.loss,
            # A NaN of a sequence that left the backward, by its reward, is in no row of d_weight.
            torch.where(rows.sound & ~stage.d_log_prob.isnan().any(), 1.0, torch.nan).to(
                stage.loss.dtype
            ),
            out.log_prob,
            out.lse,
            out.finished_entropy(entropy),
            stage.token_log_ratio,
            stage.log_ratio,
            stage.weight,
            stage.objective,
            stage.reward,
            stage.length,
            *(x.to(head.arithmetic) for x in gradient.report()),
            coefficient,
            gradient.d_hidden.view(hidden.shape if grad_hidden else 0),
            gradient.d_weight,
            gradient.d_bias,
        )


def _compact_(z: Tensor, live: Tensor) -> Tensor:
    """Moves the live rows of a tile to its front; -> [L] which row is where now.

    Args:
        z: [n, V].
        live: [L] int64, increasing.
    """
    where = torch.arange(len(live), device=z.device)
    vacant = torch.ones_like(where, dtype=torch.bool)
    vacant[live[live < len(live)]] = False
    target, source = where[vacant], live[live >= len(live)]
    # A few rows at a time: the copy must not need another tile.
    for t, s in zip(torch.split(target, 8), torch.split(source, 8), strict=True):
        z[t] = z[s]
    return where.index_copy(0, target, source)
