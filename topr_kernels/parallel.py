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
from topr_kernels.ops import linear as linear_ops

# torch.distributed is imported where it is used: some builds of torch come without it.


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
