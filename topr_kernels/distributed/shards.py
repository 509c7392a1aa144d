"""A vocabulary in shards: log-softmax over the columns of all processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from topr_kernels import kernels
from topr_kernels.distributed.collectives import max_, over
from topr_kernels.layout import IGNORE_INDEX, scored_labels, to_labels, to_rows
from topr_kernels.linear.tile import RowStats, Shard, TileKernels
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops.options import Tokens, Transforms
from topr_kernels.output import LogProbOutput
from topr_kernels.rows import (
    SoftmaxRows,
    exp_sums_,
    exp_to_gradient_,
    finish_rows,
    finite_max,
    onehot_minus_softmax_,
    softcap_slope,
    transform_,
)

#: Elements of a block of logits that is transformed at a time; of a block of a tile.
BLOCK, TILE_BLOCK = 1 << 22, 1 << 19


def check_impl(impl: str, x: Tensor, process_group: Any, path: dict[str, str]) -> str:
    """Name of the implementation of a call, on ``path``.

    Raises:
        ValueError: as :func:`topr_kernels.kernels.resolve`; if ``impl`` has no kernels for shards.
    """
    if process_group is None:
        return kernels.resolve(impl, x, path)
    if impl not in ("auto", "torch"):
        raise ValueError(
            f"impl: got {impl!r} with process_group, which 'torch' alone serves; use 'auto'"
        )
    return kernels.resolve("torch", x, path)


def local_head(group: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """The rows of head and bias that this process holds, of DTensors in shards of the vocabulary.

    Args:
        group: over which the head is spread, or None.
        weight: a plain tensor is returned as it is; a DTensor as its local rows, whose gradient goes
            back to the DTensor in the same placement.
        bias: the same, or None.

    Raises:
        ValueError: if a DTensor is not spread by Shard(0) over that group.
    """
    if group is None:
        return weight, bias
    remedy = "; pass the group of its mesh (weight.device_mesh.get_group()), or redistribute it"
    weight, bias = (_local(group, x, "weight or bias", 0, remedy) for x in (weight, bias))
    return weight, bias


def local_columns(group: Any, logits: Any) -> Any:
    """The columns of the logits that this process holds, of a DTensor as loss parallelism has them.

    Raises:
        ValueError: if a DTensor is not spread over its last dimension and that group.
    """
    return logits if group is None else _local(group, logits, "logits", -1, "")


def _local(group: Any, x: Any, name: str, dim: int, remedy: str) -> Any:
    import torch.distributed as dist

    if not hasattr(x, "device_mesh"):
        return x
    mesh, ranks = x.device_mesh.mesh.tolist(), dist.get_process_group_ranks(group)
    dim = dim % x.dim()
    if len(x.placements) != 1 or not x.placements[0].is_shard(dim) or mesh != ranks:
        raise ValueError(
            f"{name}: a DTensor of placements {x.placements} over ranks {mesh}; expected "
            f"(Shard(dim={dim}),) over the ranks {ranks} of process_group{remedy}"
        )
    return x.to_local()


def shard_tile(shard: Shard, group: Any) -> TileKernels:
    """The kernels over a tile of one shard: those of torch, but for the rows."""
    tile: TileKernels = kernels.linear_tile("torch")
    rows = partial(_tile_rows, shard, over(max_, group))
    return tile._replace(rows=rows, shard=shard)


def _tile_rows(
    shard: Shard,
    largest: Callable[[Tensor], Tensor],
    z: Tensor,
    label: Tensor,
    transforms: Transforms,
    entropy: bool,
    gradient: bool,
) -> RowStats:
    """The row kernel of a tile [n, V of the shard]; log_prob, lse and entropy are those of the whole."""
    blocks = _blocks(len(z), z.shape[1], TILE_BLOCK)
    column, here = shard.local(label, z.shape[1])
    for block in blocks:
        transform_(z[block], transforms)
    # A NaN here may be lost by the maximum, never by the sums.
    top = finite_max(largest(torch.cat([z[block].amax(-1) for block in blocks])))
    sums = z.new_zeros((3, len(z)))
    slopes = []
    for block in blocks:
        slopes.append(softcap_slope(z[block], transforms) if gradient else None)
        of_block = exp_sums_(z[block], top[block], column[block], entropy)
        sums[: len(of_block), block] = torch.stack(of_block)
    sums[1] = torch.where(here, sums[1], 0.0)
    softmax = finish_rows(top, shard.sum_(sums).unbind(), label, shard.vocab, entropy)
    factor, j_sum = -1 / softmax.sum_exp, torch.zeros_like(softmax.sum_exp)
    if gradient:
        for block, slope in zip(blocks, slopes, strict=True):
            exp_to_gradient_(z[block], softmax.part(block), slope, column[block], here[block])
        if z.is_cuda:
            z.mul_(factor.unsqueeze(-1))
            factor = torch.ones_like(factor)
        # Over a shard the rows of J do not sum to 0.
        j_sum = z.sum(-1)
    return RowStats(*softmax[:4], factor * (transforms.logit_scale / transforms.temperature), j_sum)


def log_probs(
    logits: Tensor, tokens: Tokens, transforms: Transforms, entropy: bool, shard: Shard, group: Any
) -> LogProbOutput:
    """``ops.log_prob_fwd`` over the columns of all processes; differentiable."""
    labels, shift = tokens.labels, tokens.shift
    target = to_rows(scored_labels(*tokens), shift, IGNORE_INDEX).flatten()
    flat: tuple[Tensor, ...] = _ShardedLogProb.apply(  # type: ignore[no-untyped-call]
        logits, target, shard, group, transforms, entropy
    )
    log_prob, lse, row_entropy = (to_labels(x.view(labels.shape), shift) for x in flat)
    return LogProbOutput(log_prob, lse, row_entropy if entropy else torch.full_like(lse, torch.nan))


class _ShardedLogProb(torch.autograd.Function):
    """Log softmax at the labels over logits whose columns are spread; (log_prob, lse, entropy).

    Two all-reduces in the forward, of [N] and [3, N]; none in the backward. Blocks of rows bound the
    temporaries; the gradient has the dtype of the logits. Rows of label IGNORE_INDEX have no gradient,
    whatever comes from above, and cannot affect other rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        shard: Shard,
        group: Any,
        transforms: Transforms,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> each [N]; logits [O, T, V of the shard], label [N], IGNORE_INDEX in rows of no meaning."""
        wide = accumulate_dtype(logits.dtype)
        n, vocab = label.numel(), logits.shape[-1]
        column, here = shard.local(label, vocab)
        blocks = _blocks(n, vocab, BLOCK)
        top = logits.new_full((n,), -torch.inf, dtype=wide)
        for block in blocks:
            top[block] = transform_(_copied_rows(logits, block, wide), transforms).amax(-1)
        top = finite_max(max_(group, top))
        sums = top.new_zeros((3, n))
        for block in blocks:
            z = transform_(_copied_rows(logits, block, wide), transforms)
            of_block = exp_sums_(z, top[block], column[block], entropy)
            sums[: len(of_block), block] = torch.stack(of_block)
        sums[1] = torch.where(here, sums[1], 0.0)
        softmax: SoftmaxRows = finish_rows(
            top, shard.sum_(sums).unbind(), label, shard.vocab, entropy
        )
        ignored = label == IGNORE_INDEX
        log_prob, lse = (x.masked_fill(ignored, 0.0) for x in softmax[:2])
        row_entropy = softmax.entropy.masked_fill(ignored, 0.0)
        ctx.save_for_backward(logits, column, here, log_prob, top, softmax.sum_exp.log(), ignored)
        ctx.transforms = transforms
        ctx.mark_non_differentiable(lse, row_entropy)
        ctx.set_materialize_grads(False)
        return log_prob, lse, row_entropy

    @staticmethod
    def backward(ctx: Any, d: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """-> d (onehot - softmax), by selection 0 in rows of coefficient 0."""
        if d is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of log_prob over a process_group is not differentiable a second time "
                "(create_graph=True); for second derivatives use topr_kernels.reference"
            )
        logits, column, here, log_prob, top, log_sum, ignored = ctx.saved_tensors
        transforms = ctx.transforms
        d = d.masked_fill(ignored, 0.0)
        gradient = logits.new_empty(logits.shape)
        flat = gradient.view(-1, logits.shape[-1])
        for block in _blocks(len(flat), flat.shape[1], BLOCK):
            z = transform_(_copied_rows(logits, block, top.dtype), transforms)
            slope = softcap_slope(z, transforms)
            j = onehot_minus_softmax_(
                z, (top[block], log_sum[block]), log_prob[block], column[block], here[block]
            )
            if slope is not None:
                j.mul_(slope)
            c = d[block].unsqueeze(-1)
            flat[block] = torch.where(c == 0, 0.0, j * (c / transforms.temperature)).to(flat.dtype)
        return (gradient, *(None,) * 5)


def _copied_rows(x: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
    """A copy of some of the rows of [O, T, V], whatever its strides."""
    t = x.shape[1]
    row = torch.arange(block.start, block.stop, device=x.device)
    # By two indices: flattening a slice of the logits would copy all of them.
    return x[row // t, row % t].to(dtype)


def _blocks(n: int, columns: int, elements: int) -> list[slice]:
    """Blocks of n rows, of at most so many elements but at least a row each."""
    step = max(1, elements // max(columns, 1))
    return [slice(a, min(a + step, n)) for a in range(0, n, step)]
