"""Tiles of the fused-linear path in plain torch, any device.

Per logit of a tile: the row kernel reads and writes it once (in blocks that stay in cache) and leaves
exp(z - max) behind, so that neither gradient computes an exponential: J is that, the label's entry set
to sum_exp * expm1(log_prob), times -1 / sum_exp per row. Column statistics read it once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from topr_kernels.linear.operators import linear_kernels
from topr_kernels.linear.tile import RowStats, TileKernels
from topr_kernels.ops import linear as ops
from topr_kernels.ops.options import Transforms
from topr_kernels.rows import exp_to_gradient_, softcap_slope, softmax_rows_, transform_

# Elements of a block of rows or columns: its few temporaries stay in a desktop's last-level cache.
BLOCK = 1 << 19


def rows(
    z: Tensor, label: Tensor, transforms: Transforms, entropy: bool, gradient: bool
) -> RowStats:
    vocab = z.shape[-1]
    parts = []
    # A power of two, as are the steps of rows: blocks of one shape. A block of a single row would have
    # its sum split over the threads, to another last bit.
    step = 1 << max(0, (BLOCK // vocab).bit_length() - 1)
    for block, y in zip(torch.split(z, step), torch.split(label, step), strict=True):
        transform_(block, transforms)
        slope = softcap_slope(block, transforms) if gradient else None
        softmax = softmax_rows_(block, y, entropy)
        factor, j_sum = -1 / softmax.sum_exp, torch.zeros_like(softmax.sum_exp)
        if gradient:
            exp_to_gradient_(block, softmax, slope, y.clamp(0, vocab - 1))
            if slope is not None:
                j_sum = block.sum(-1)
            if z.is_cuda:
                # Operands may be fp16 there, and a sum over the vocabulary is beyond it.
                block.mul_(factor.unsqueeze(-1))
                factor, j_sum = torch.ones_like(factor), j_sum * factor
        factor = factor * (transforms.logit_scale / transforms.temperature)
        parts.append(RowStats(*softmax[:4], factor, j_sum))
    if not parts:
        return RowStats(*(z.new_empty(0) for _ in RowStats._fields))
    return RowStats(*(torch.cat(x) for x in zip(*parts, strict=True)))


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
    scaled = groups * stats.factor
    step = max(1, BLOCK // n)
    scratch = z.new_empty((n, min(step, vocab)))
    for a in range(0, vocab, step):
        part = z[:, a : a + step]
        torch.mm(scaled, part, out=sums[:, a : a + step])
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
