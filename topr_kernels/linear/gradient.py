"""The backward of a tile: its rows added to d_hidden, d_weight and d_bias."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.linear import active, matmul
from topr_kernels.linear.head import HeadProducts
from topr_kernels.linear.tile import RowStats, TileKernels
from topr_kernels.ops.options import Transforms, Wanted

# Rows of one selection of columns: fewer are sparser, more share one pass over the head.
CPU_SPARSE_ROWS, GPU_SPARSE_ROWS = 256, 2048
# Clusters of a tile's rows, and profiles of their tails that wait so that the head is read once for all.
CLUSTERS, PENDING_PROFILES = 8, 32


class GradedRows(NamedTuple):
    """Rows of one tile that have a gradient."""

    z: Tensor  # [n, V] logits as the row kernel left them
    label: Tensor  # [n]
    stats: RowStats
    row: Tensor  # [n] positions in the flattened hidden states
    hidden: Tensor  # [n, D] operand of the forward product
    c: Tensor  # [n] gradient of the loss by the log-probs, none of them 0

    def part(self, index: slice) -> GradedRows:
        """Some of the rows."""
        z, label, stats, *rest = self
        stats = RowStats(*(x[index] for x in stats))
        return GradedRows(z[index], label[index], stats, *(x[index] for x in rest))


class Tail(NamedTuple):
    """What a tile left out of both products; added later, many tiles in one pass over W."""

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


class Gradient:
    """Accumulates the gradients of the tiles of one call.

    Rows of ``d_hidden`` are stored without their coefficient unless ``scaled``, fp16 rows divided by
    ``row_scale`` besides, so that nothing underflows before the upstream gradient is known.
    """

    def __init__(
        self,
        kernels: TileKernels,
        head: HeadProducts,
        hidden: Tensor,
        transforms: Transforms,
        wanted: Wanted,
        scaled: bool,
    ) -> None:
        self.kernels, self.head, self.transforms = kernels, head, transforms
        self.shard = kernels.shard
        self.vocab = head.vocab if self.shard is None else self.shard.vocab
        self.wanted, self.scaled = wanted, scaled
        positions = hidden.shape[:-1].numel()
        self.d_hidden = hidden.new_zeros((positions, head.dim) if self.wanted.hidden else 0)
        wide = hidden.new_zeros(0, dtype=head.arithmetic)
        self.row_scale = wide.new_ones(positions)
        self.d_weight = wide.new_empty((head.vocab, head.dim) if self.wanted.weight else 0)
        self.d_bias = wide.new_zeros(head.vocab if self.wanted.bias else 0)
        #: d_weight holds nothing yet: the first dense product overwrites it.
        self.empty = True
        # fp16 operands: d_weight and d_bias in units of a power of two near the largest coefficient so
        # far, so that c * H neither underflows nor overflows.
        self.fp16_unit = 0.0 if head.operand == torch.float16 else None
        self.tails: list[Tail] = []
        self.tiles, self.active = 0, 0.0
        self.left = wide.new_zeros((), dtype=torch.float64)
        self.energy = torch.zeros_like(self.left)

    def add(self, rows: GradedRows) -> None:
        """Adds rows of one tile."""
        label, stats, c = rows.label, rows.stats, rows.c
        most = GPU_SPARSE_ROWS if rows.z.is_cuda else CPU_SPARSE_ROWS
        if self.wanted.grad_tolerance > 0 and len(c) > most:
            for start in range(0, len(c), most):
                self.add(rows.part(slice(start, start + most)))
            return
        self.tiles += 1
        factor = c * stats.factor
        if self.fp16_unit is not None:
            self._raise_fp16_unit(float(factor.abs().amax()))
            factor = factor / self.fp16_unit
        if self.wanted.grad_tolerance == 0:
            return self._dense(rows, factor)
        cluster, member = active.cluster_rows(rows.hidden.to(c.dtype), CLUSTERS)
        # Over the largest coefficient: the squares of small ones would underflow.
        top = c.abs().amax()
        groups = member * c.abs()
        if self.wanted.bias:
            groups = torch.cat([groups, c.unsqueeze(0)])
        energy, sums = self.kernels.columns(rows.z, label, stats, self.transforms, c / top, groups)
        columns, left, whole = active.select_columns(
            energy, label, self.wanted.grad_tolerance, self.shard
        )
        # In units that all tiles share.
        self.energy += whole * top.double().square()
        self.left += left * top.double().square()
        if columns is None:
            return self._dense(rows, factor)
        product, kept = self._active(rows, factor, columns)
        if self.wanted.bias:
            signed = sums[-1]
            self.d_bias += signed if self.fp16_unit is None else signed / self.fp16_unit
        # Rows of J sum to 0 (but for a softcap), so the tail has what the kept columns lack.
        mass = stats.factor * (stats.j_sum - kept)
        profile = sums[: len(member)].index_fill(1, columns, 0.0)
        direction = (member * (c * mass)) @ rows.hidden.to(c.dtype)
        self.tails.append(Tail(rows.row, c, product, mass, cluster, profile, direction))
        if sum(len(t.profile) for t in self.tails) >= PENDING_PROFILES:
            self._flush()

    def _raise_fp16_unit(self, largest: float) -> None:
        """Makes the unit of d_weight and d_bias fit a tile; a copy to the host, for fp16 alone."""
        exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
        unit = 2.0**exponent
        if self.fp16_unit and unit <= self.fp16_unit:
            return
        if self.fp16_unit:
            self._flush()
            self.d_bias.mul_(self.fp16_unit / unit)
            if not self.empty:
                self.d_weight.mul_(self.fp16_unit / unit)
        self.fp16_unit = unit

    def _dense(self, rows: GradedRows, factor: Tensor) -> None:
        """Both products over all columns."""
        self.active += self.head.vocab / self.vocab
        j = self.kernels.gradient(
            rows.z, rows.label, rows.stats, self.transforms, self.head.operand
        )
        if self.wanted.hidden:
            d = self.head.times(j).mul_(rows.stats.factor.unsqueeze(-1))
            self._store(rows.row, d, rows.c)
        if self.wanted.weight:
            weighted = self._weighted(factor, rows.hidden)
            self.head.transposed(j, weighted, self.d_weight, accumulate=not self.empty)
            self.empty = False
        if self.wanted.bias:
            matmul.mm(factor.to(j.dtype).unsqueeze(0), j, self.d_bias.unsqueeze(0), accumulate=True)

    def _active(self, rows: GradedRows, factor: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Both products over the active columns; -> (rows of d_hidden [n, D], their sums of J [n])."""
        self.active += len(columns) / self.vocab
        if self.wanted.weight and self.empty:
            self.d_weight.zero_()
            self.empty = False
        weighted = self._weighted(factor, rows.hidden)
        product = factor.new_zeros((len(factor), self.head.dim if self.wanted.hidden else 0))
        kept = torch.zeros_like(factor)
        # A shard of the vocabulary may have no active column.
        for part in torch.split(columns, self.head.step) if len(columns) else ():
            j, sums = self.kernels.gather(
                rows.z, rows.label, rows.stats, self.transforms, part, self.head.operand
            )
            kept += sums
            if self.wanted.hidden:
                weight = self.head.cast(self.head.weight.index_select(0, part))
                matmul.mm(j, weight, product, accumulate=True)
            if self.wanted.weight:
                update = self.d_weight.new_empty((len(part), self.head.dim))
                matmul.mm(j.t(), weighted, update)
                self.d_weight.index_add_(0, part, update)
        return product.mul_(rows.stats.factor.unsqueeze(-1)), kept

    def _flush(self) -> None:
        """Adds the waiting tails to both gradients, in one pass over the head for each."""
        if not self.tails:
            return
        profile = torch.cat([t.profile for t in self.tails])
        # Over the largest entry, so that fp16 operands keep it; sums of one sign cannot cancel.
        top = profile.abs().amax(1).clamp(min=torch.finfo(profile.dtype).tiny)
        profile.div_(top.unsqueeze(-1))
        weight_sum = profile.sum(1)
        weight_sum = torch.where(weight_sum == 0, 1.0, weight_sum)
        operand = profile.to(self.head.operand)
        if self.wanted.hidden:
            mean = self.head.times(operand).div_(weight_sum.unsqueeze(-1))
            sizes = [len(t.profile) for t in self.tails]
            for t, mu in zip(self.tails, torch.split(mean, sizes), strict=True):
                self._store(t.row, t.product.addcmul_(t.mass.unsqueeze(-1), mu[t.cluster]), t.c)
        if self.wanted.weight:
            direction = torch.cat([t.direction for t in self.tails]) / weight_sum.unsqueeze(-1)
            if self.fp16_unit is not None:
                # The range of fp16 is too small for a product of two means; bf16 has that of fp32.
                direction, operand = direction / self.fp16_unit, operand.to(torch.bfloat16)
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
        if self.wanted.weight and self.empty:
            self.d_weight.zero_()
        if self.fp16_unit:
            self.d_weight.mul_(self.fp16_unit)
            self.d_bias.mul_(self.fp16_unit)

    def report(self) -> tuple[Tensor, Tensor]:
        """-> (active_share, left_out): mean |A| / V over the tiles, root of the energy left out."""
        share = torch.full_like(self.left, self.active / self.tiles if self.tiles else torch.nan)
        if self.shard is not None and self.tiles:
            share, self.left = self.shard.sum_(torch.stack([share, self.left])).unbind()
        left = torch.where(self.energy == 0, 0.0, self.left / self.energy).sqrt()
        return share, left if self.tiles else torch.full_like(left, torch.nan)
