"""Tiles of the fused-linear path on the CPU, in the compiled kernels of csrc/.

Per logit of a tile: the row kernel reads it once from memory and writes exp(z - max) back; the rest is
as in ``portable_linear``. Column statistics read it once more, for the energy and all sums together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from topr_kernels.kernels.native_library import DTYPES, call, library
from topr_kernels.linear.operators import linear_kernels
from topr_kernels.linear.tile import RowStats, TileKernels
from topr_kernels.ops import linear as ops
from topr_kernels.ops.options import Transforms


def _tile(z: Tensor) -> dict[str, Tensor | float]:
    return {
        "dtype": DTYPES[z.dtype],
        "outer": 1,
        "time": z.shape[0],
        "vocab": z.shape[1],
        "stride_time": z.stride(0),
        "stride_vocab": z.stride(1),
        "logits": z,
    }


def rows(
    z: Tensor, label: Tensor, transforms: Transforms, entropy: bool, gradient: bool
) -> RowStats:
    stats = RowStats(*(z.new_empty(len(z)) for _ in RowStats._fields))
    label = label.contiguous()
    call(
        "topr_rows",
        **_tile(z),
        gradient=z,
        labels=label,
        entropy=entropy,
        grad=gradient,
        logit_scale=transforms.logit_scale,
        softcap=transforms.softcap or 0.0,
        temperature=transforms.temperature,
        log_prob=stats.log_prob,
        lse=stats.lse,
        lse_low=stats.lse_low,
        row_entropy=stats.entropy,
        factor=stats.factor,
        total=stats.j_sum,
    )
    return stats


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
    vocab = z.shape[1]
    energy, sums = z.new_empty(vocab), z.new_empty((len(groups), vocab))
    coefficient, groups = coefficient.contiguous(), groups.contiguous()
    call(
        "topr_columns",
        **_tile(z),
        factor=stats.factor,
        coefficient=coefficient,
        groups=groups,
        group_count=len(groups),
        energy=energy,
        sums=sums,
    )
    return energy, sums


def gather(
    z: Tensor,
    label: Tensor,
    stats: RowStats,
    transforms: Transforms,
    columns: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    columns = columns.contiguous()
    j, j_sum = z.new_empty((len(z), len(columns))), z.new_empty(len(z))
    call(
        "topr_gather",
        **_tile(z),
        columns=columns,
        column_count=len(columns),
        gathered=j,
        gathered_sums=j_sum,
    )
    return j.to(dtype), j_sum


library()
TILE = TileKernels(rows, gradient, columns, gather)
ops.register("native", linear_kernels(TILE))
