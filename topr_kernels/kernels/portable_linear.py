"""Tiles of the fused-linear path in plain torch, any device.

Per logit of a tile: the row kernel reads and writes it once (in blocks that stay in cache) and leaves
exp(z - max) behind, so that neither gradient computes an exponential: J is that, the label's entry set
to total * expm1(log_prob), times -1 / total per row. Column statistics read it once more.

``shard_tile`` is an implementation for one shard of the vocabulary: there the maximum and the
total of a row are those of all shards, by an all-reduce of [n] and one of [3, n] per tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from topr_kernels.fused_linear import RowStats, Shard, TileKernels, Transforms, linear_kernels
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.ops import linear as ops
from topr_kernels.rows import softmax_rows_, transform_

# Elements of a block of rows or columns: its few temporaries stay in a desktop's last-level cache.
BLOCK = 1 << 19


def rows(
    z: Tensor, label: Tensor, transforms: Transforms, entropy: bool, gradient: bool
) -> RowStats:
    vocab = z.shape[-1]
    logit_scale, softcap, temperature = transforms
    parts = []
    # A power of two, as are the units of rows: blocks of one shape. A block of a single row would have
    # its sum split over the threads, to another last bit.
    step = 1 << max(0, (BLOCK // vocab).bit_length() - 1)
    for block, y in zip(torch.split(z, step), torch.split(label, step), strict=True):
        transform_(block, *transforms)
        slope = None
        if softcap is not None and gradient:
            slope = 1 - (block * (temperature / softcap)).square_()
        r = softmax_rows_(block, y, entropy)
        factor, total = -1 / r.total, torch.zeros_like(r.total)
        if gradient:
            # The true class in the arithmetic dtype: 1 - p_y = -expm1(log p_y) keeps every digit.
            at_label = (r.total * torch.expm1(r.log_prob)).unsqueeze(-1)
            block.scatter_(-1, y.clamp(0, vocab - 1).unsqueeze(-1), at_label)
            if slope is not None:
                block.mul_(slope)
                total = block.sum(-1)
            if z.is_cuda:
                # Operands may be fp16 there, and a sum over the vocabulary is beyond it.
                block.mul_(factor.unsqueeze(-1))
                factor, total = torch.ones_like(factor), total * factor
        parts.append(
            RowStats(
                r.log_prob,
                r.lse,
                r.lse_low,
                r.entropy,
                factor * (logit_scale / temperature),
                total,
            )
        )
    if not parts:
        return RowStats(*(z.new_empty(0) for _ in RowStats._fields))
    return RowStats(*(torch.cat(x) for x in zip(*parts, strict=True)))


def shard_rows(
    shard: Shard,
    max_: Callable[[Tensor], Tensor],
    z: Tensor,
    label: Tensor,
    transforms: Transforms,
    entropy: bool,
    gradient: bool,
) -> RowStats:
    """``rows`` of one shard [n, V of the shard]; log_prob, lse and entropy are those of the whole."""
    logit_scale, softcap, temperature = transforms
    n, vocab = z.shape
    blocks = torch.split(z, max(1, BLOCK // vocab))
    for block in blocks:
        transform_(block, *transforms)
    index, here = shard.local(label, vocab)
    z_label = z.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    # A NaN here may be lost by the maximum, never by the sums.
    top = max_(torch.cat([block.amax(-1) for block in blocks]))
    # A row of -inf alone must not become -inf - (-inf).
    top = torch.where(top == -torch.inf, 0.0, top)
    sums = z.new_zeros((3, n))
    sums[1] = torch.where(here, z_label - top, 0.0)
    slopes = []
    start = 0
    for block in blocks:
        part = slice(start, start + len(block))
        start += len(block)
        if softcap is not None and gradient:
            slopes.append(1 - (block * (temperature / softcap)).square_())
        block.sub_(top[part].unsqueeze(-1))
        if entropy:
            p = block.exp()
            # p log p by selection: 0 * (-inf) is NaN.
            sums[2, part] = torch.where(p == 0, 0.0, p * block).sum(-1)
            block.copy_(p)
        else:
            block.exp_()
        sums[0, part] = block.sum(-1)
    total, difference, surprise = shard.sum_(sums).unbind()
    log_total = total.log()
    lse = top + log_total
    log_prob = difference - log_total
    log_prob = torch.where((difference == -torch.inf) & ~lse.isnan(), -torch.inf, log_prob)
    outside = (label != IGNORE_INDEX) & ((label < 0) | (label >= shard.vocab))
    log_prob = log_prob.masked_fill(outside, torch.nan)
    rest = lse - top
    low = (top - (lse - rest)) + (log_total - rest)
    row_entropy = log_total - surprise / total if entropy else torch.full_like(total, torch.nan)
    factor, own = -1 / total, torch.zeros_like(total)
    if gradient:
        row = here.nonzero().squeeze(-1)
        z[row, index[row]] = (total * torch.expm1(log_prob))[row]
        for block, slope in zip(blocks, slopes, strict=False):
            block.mul_(slope)
        if z.is_cuda:
            z.mul_(factor.unsqueeze(-1))
            factor = torch.ones_like(factor)
        # Over a shard the rows of J do not sum to 0.
        own = z.sum(-1)
    low = torch.where(lse.isfinite(), low, 0.0)
    scale = logit_scale / temperature
    return RowStats(log_prob, lse, low, row_entropy, factor * scale, own)


def shard_tile(shard: Shard, max_: Callable[[Tensor], Tensor]) -> TileKernels:
    """The kernels of one shard of the vocabulary; ``max_`` is the largest over its group, in place."""
    return TileKernels(partial(shard_rows, shard, max_), gradient, columns, gather, shard)


def gradient(
    z: Tensor, label: Tensor, stats: RowStats, transforms: Transforms, dtype: torch.dtype
) -> Tensor:
    return z.to(dtype)


def columns(
    z: Tensor,
    label: Tensor,
    stats: RowStats,
    transforms: Transforms,
    coefficient: Tensor,
    groups: Tensor,
) -> tuple[Tensor, Tensor]:
    n, vocab = z.shape
    energy, sums = z.new_empty(vocab), z.new_empty((groups.shape[0], vocab))
    square = (coefficient * stats.factor).square()
    weights = groups * stats.factor
    step = max(1, BLOCK // n)
    scratch = z.new_empty((n, min(step, vocab)))
    for a in range(0, vocab, step):
        part = z[:, a : a + step]
        torch.mm(weights, part, out=sums[:, a : a + step])
        squares = torch.mul(part, part, out=scratch[:, : part.shape[1]])
        torch.mv(squares.t(), square, out=energy[a : a + step])
    return energy, sums


def gather(
    z: Tensor,
    label: Tensor,
    stats: RowStats,
    transforms: Transforms,
    columns: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    j = z.index_select(1, columns)
    return j.to(dtype), j.sum(1)


TILE = TileKernels(rows, gradient, columns, gather)
ops.register("torch", linear_kernels(TILE))
