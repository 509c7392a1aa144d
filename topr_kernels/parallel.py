"""The loss over several processes: a vocabulary in shards, sequences in pieces.

Everything here runs on ``torch.distributed`` process groups and is collective: every process of a group
must make the same calls in the same order. What the processes of a group must agree on is compared
before any work, so that a mistake raises on all of them and nobody waits for ever.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels import kernels
from topr_kernels.fused_linear import Shard, linear_kernels
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops import linear as linear_ops
from topr_kernels.rows import transform_

# torch.distributed is imported where it is used: some builds of torch come without it.


#: Elements of a block of logits that is transformed at a time.
BLOCK = 1 << 22


class Spread(NamedTuple):
    """How a fused-linear call is served.

    Attributes:
        impl: name of the implementation.
        vocab: size of the whole vocabulary.
        largest: rows of the head in the largest shard.
    """

    impl: str
    vocab: int
    largest: int


def resolve(
    impl: str,
    vocab_group: Any,
    sequence_group: Any,
    weight: object,
    hidden: Tensor,
    labels: Tensor,
    reward: object = None,
) -> Spread:
    """Name of the implementation of a fused-linear call over process groups; registers it.

    With neither group that of a single process. Each group costs an all-gather of a few numbers.

    Args:
        impl: "auto" or a name.
        vocab_group: over which the head is spread, or None.
        sequence_group: over which the sequences are spread, or None.
        weight: the rows of the head that are here.
        hidden: [O, T, D], checked.
        labels: [O, T], checked.
        reward: [B]; for ``sequence_group``.

    Raises:
        ValueError: as :func:`topr_kernels.kernels.resolve`; on every process, if those of a group
            disagree in what they must share, or one has no rows of the head.
    """
    # A tensor that is no head raises later, on its own process.
    size = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    if vocab_group is None:
        name = kernels.resolve(impl, hidden, kernels.LINEAR)
        if sequence_group is None:
            return Spread(name, size, size)
        tile, vocab, largest = kernels.linear_tile(name), size, size
    else:
        if impl not in ("auto", "torch"):
            raise ValueError(
                f"impl: got {impl!r} with process_group, which 'torch' alone serves; use 'auto'"
            )
        shard = _shard(vocab_group, size, hidden, labels)
        kernels.load(kernels.LINEAR["torch"])
        tile = kernels.shard_tile(shard, partial(_max, vocab_group))
        name = f"vocabulary:{vocab_group.group_name}:{shard.start}:{shard.largest}:{shard.vocab}"
        vocab, largest = shard.vocab, shard.largest
    if sequence_group is not None:
        check_pieces(sequence_group, reward)
        name = f"{name}/sequences:{sequence_group.group_name}"
        tile = tile._replace(total=partial(_sum, sequence_group))
    linear_ops.register(name, linear_kernels(tile))
    return Spread(name, vocab, largest)


def check_columns(group: Any, impl: str, logits: Tensor, labels: Tensor) -> Shard:
    """Finds which columns of the logits [O, T, V of the shard] are here; one all-gather.

    Raises:
        ValueError: if ``impl`` is not served; on every process, if they disagree in the labels or one
            has no columns.
    """
    if impl not in ("auto", "torch"):
        raise ValueError(
            f"impl: got {impl!r} with process_group, which 'torch' alone serves; use 'auto'"
        )
    return _shard(group, logits.shape[-1], logits[..., :0], labels)


class ShardedLogProb(torch.autograd.Function):
    """log softmax at the labels over logits whose columns are spread; (log_prob, lse, entropy).

    Two all-reduces in the forward, of [N] and [3, N]; none in the backward. Blocks of rows bound the
    temporaries; the gradient has the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        shard: Shard,
        group: Any,
        softcap: float | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> each [N]; logits [N, V of the shard], label [N], IGNORE_INDEX for a row of no meaning."""
        wide = accumulate_dtype(logits.dtype)
        n, vocab = logits.shape
        index, here = shard.local(label, vocab)

        def block(part: slice) -> Tensor:
            return transform_(logits[part].to(wide, copy=True), 1.0, softcap, temperature)

        parts = _blocks(n, vocab)
        top = logits.new_full((n,), -torch.inf, dtype=wide)
        for part in parts:
            top[part] = block(part).amax(-1)
        top = _max(group, top)
        # A row of -inf alone must not become -inf - (-inf).
        top = torch.where(top == -torch.inf, 0.0, top)
        sums = top.new_zeros((3, n))
        for part in parts:
            z = block(part).sub_(top[part].unsqueeze(-1))
            at_label = z.gather(-1, index[part].unsqueeze(-1)).squeeze(-1)
            sums[1, part] = torch.where(here[part], at_label, 0.0)
            p = z.exp()
            sums[0, part] = p.sum(-1)
            if entropy:
                sums[2, part] = torch.where(p == 0, 0.0, p * z).sum(-1)
        total, difference, surprise = shard.sum_(sums).unbind()
        log_total = total.log()
        lse = top + log_total
        log_prob = difference - log_total
        log_prob = torch.where((difference == -torch.inf) & ~lse.isnan(), -torch.inf, log_prob)
        ignored = label == IGNORE_INDEX
        outside = ~ignored & ((label < 0) | (label >= shard.vocab))
        log_prob = log_prob.masked_fill(outside, torch.nan).masked_fill(ignored, 0.0)
        row_entropy = (log_total - surprise / total) if entropy else torch.full_like(lse, torch.nan)
        lse, row_entropy = lse.masked_fill(ignored, 0.0), row_entropy.masked_fill(ignored, 0.0)
        row_entropy = row_entropy if entropy else torch.full_like(lse, torch.nan)
        ctx.save_for_backward(logits, index, here, log_prob, top, log_total)
        ctx.transforms = softcap, temperature
        ctx.mark_non_differentiable(lse, row_entropy)
        ctx.set_materialize_grads(False)
        return log_prob, lse, row_entropy

    @staticmethod
    def backward(ctx: Any, d: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """-> d (onehot - softmax), by selection 0 in rows of coefficient 0."""
        if d is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of log_prob over a process_group is not differentiable a second time "
                "(create_graph=True); for second derivatives use topr_kernels.reference"
            )
        logits, index, here, log_prob, top, log_total = ctx.saved_tensors
        softcap, temperature = ctx.transforms
        gradient = torch.empty_like(logits)
        for part in _blocks(*logits.shape):
            z = transform_(logits[part].to(top.dtype, copy=True), 1.0, softcap, temperature)
            slope = None if softcap is None else 1 - (z * (temperature / softcap)).square()
            j = z.sub_(top[part].unsqueeze(-1)).sub_(log_total[part].unsqueeze(-1)).exp_().neg_()
            # The true class in the arithmetic dtype: 1 - p_y = -expm1(log p_y) keeps every digit.
            row = here[part].nonzero().squeeze(-1)
            j[row, index[part][row]] = -torch.expm1(log_prob[part][row])
            if slope is not None:
                j.mul_(slope)
            c = d[part].unsqueeze(-1)
            gradient[part] = torch.where(c == 0, 0.0, j * (c / temperature)).to(gradient.dtype)
        return (gradient, *(None,) * 6)


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, BLOCK // max(columns, 1))
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]


def local_rows(group: Any, *tensors: Any) -> tuple[Any, ...]:
    """The rows of head and bias that this process holds, of DTensors in shards of the vocabulary.

    Args:
        group: over which the head is spread.
        *tensors: plain tensors and None are returned as they are; a DTensor as its local rows, whose
            gradient goes back to the DTensor in the same placement.

    Raises:
        ValueError: if a DTensor is not spread by Shard(0) over that group.
    """
    import torch.distributed as dist

    for x in tensors:
        if not hasattr(x, "device_mesh"):
            continue
        mesh, ranks = x.device_mesh.mesh.tolist(), dist.get_process_group_ranks(group)
        if len(x.placements) != 1 or not x.placements[0].is_shard(0) or mesh != ranks:
            raise ValueError(
                f"weight or bias: a DTensor of placements {x.placements} over ranks {mesh}; expected "
                f"(Shard(dim=0),) over the ranks {ranks} of process_group; pass the group of its mesh "
                "(weight.device_mesh.get_group()), or redistribute it"
            )
    return tuple(x.to_local() if hasattr(x, "device_mesh") else x for x in tensors)


def next_tokens(x: Tensor, fill: float, group: Any) -> Tensor:
    """Moves a tensor per token one position to the left, across the pieces of the sequences.

    Args:
        x: [B, T], the columns of this process; T may differ between processes, and be 0.
        fill: for the last position of all.
        group: whose ranks hold the columns in their order.

    Returns:
        [B, T]: for each position what ``x`` has at the next one.
    """
    import torch.distributed as dist

    end = x[:, :1] if x.shape[1] else x.new_zeros((x.shape[0], 1))
    borders = _all_gather(end, bool(x.shape[1]), group)
    later = (border for border in borders[dist.get_rank(group) + 1 :] if border is not None)
    following = next(later, torch.full_like(end, fill))
    return torch.cat([x, following], dim=1)[:, 1:]


def previous_tokens(x: Tensor, fill: float, group: Any) -> Tensor:
    """Moves a tensor per token one position to the right; as :func:`next_tokens`."""
    import torch.distributed as dist

    end = x[:, -1:] if x.shape[1] else x.new_zeros((x.shape[0], 1))
    borders = _all_gather(end, bool(x.shape[1]), group)
    earlier = [border for border in borders[: dist.get_rank(group)] if border is not None]
    before = earlier[-1] if earlier else torch.full_like(end, fill)
    return torch.cat([before, x], dim=1)[:, :-1]


def aligned(labels: Tensor, behavior: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Labels and log mu per token (or per sequence) of the rows here, shifted across the pieces."""
    labels = next_tokens(labels, IGNORE_INDEX, group)
    return labels, next_tokens(behavior, 0.0, group) if behavior.dim() == 2 else behavior


def total_of(group: Any) -> partial[Tensor] | None:
    """Sum over a group, in place; None for None."""
    return None if group is None else partial(_sum, group)


def _shard(group: Any, size: int, hidden: Tensor, labels: Tensor) -> Shard:
    """Shards follow each other in the order of the ranks, and may differ in size."""
    import torch.distributed as dist

    own = torch.tensor([size, hidden.shape[-1], labels.numel(), 0], device=labels.device)
    # Positions count, so that swapped labels show too.
    places = torch.arange(1, labels.numel() + 1, device=labels.device).view_as(labels)
    own[3] = (labels * places).sum()
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    sizes, *shared = torch.stack(found).t().tolist()
    names = ("D of hidden", "number of labels", "sum over labels")
    for name, values in zip(names, shared, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"process_group: its processes differ in the {name}: {values}; the vocabulary is spread "
                "over them, so each must be given the same hidden states, labels and sequences"
            )
    if min(sizes) == 0:
        raise ValueError(
            f"process_group: shards of the head have {sizes} rows; expected at least one on each process"
        )
    start = sum(sizes[: dist.get_rank(group)])
    return Shard(start, max(sizes), sum(sizes), partial(_sum, group))


def check_pieces(group: Any, reward: object) -> None:
    """Raises ``ValueError`` on all processes of a group if their sequences differ."""
    import torch.distributed as dist

    if not isinstance(reward, Tensor):
        return
    places = torch.arange(1, reward.numel() + 1, device=reward.device)
    own = torch.stack([places.sum().double(), (reward.detach().double() * places).sum()])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    # NaN compares with itself here, and raises where rewards are checked.
    values = torch.stack(found).nan_to_num(0.0).tolist()
    if any(v != values[0] for v in values):
        raise ValueError(
            "sequence_group: its processes differ in the number of sequences or in their rewards; each "
            "must be given the same sequences, of which it holds the tokens of its own piece (none, for "
            "a sequence that ends earlier)"
        )


def _all_gather(x: Tensor, present: bool, group: Any) -> list[Tensor | None]:
    """[B, 1] of every process, None of one that has no column."""
    import torch.distributed as dist

    # One more row says whether the rest means anything; a row of x may be NaN.
    own = torch.cat([x, x.new_full((1, 1), present)])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    flags = torch.stack([f[-1, 0] for f in found]).tolist()
    return [f[:-1] if flag else None for f, flag in zip(found, flags, strict=True)]


def _sum(group: Any, x: Tensor) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(x, group=group)
    return x


def _max(group: Any, x: Tensor) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x
