"""The loss over several processes: a vocabulary in shards, sequences in pieces, one normaliser.

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
from topr_kernels.fused_linear import Shard


class VocabShard(NamedTuple):
    """What ``vocab_shard`` found.

    Attributes:
        impl: name of the implementation that serves this shard.
        vocab: size of the whole vocabulary.
        largest: rows of the largest shard.
    """

    impl: str
    vocab: int
    largest: int


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


def vocab_shard(
    group: Any, impl: str, weight: Tensor, hidden: Tensor, labels: Tensor
) -> VocabShard:
    """Finds which part of the vocabulary the head of this process is; one all-gather of 4 integers.

    Shards follow each other in the order of the ranks, and may differ in size.

    Raises:
        ValueError: if ``impl`` is not served; on every process, if they disagree in the shape of the
            hidden states or in the labels, or if one has no rows.
    """
    import torch.distributed as dist

    if impl not in ("auto", "torch"):
        raise ValueError(
            f"impl: got {impl!r} with process_group; expected 'auto' or 'torch', which serve it"
        )
    # A tensor that is no head raises later, on its own process; here it has no rows.
    size = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    own = torch.tensor([size, hidden.shape[-1], labels.numel(), 0], device=labels.device)
    # Positions count, so that swapped labels show too.
    own[3] = (
        labels * torch.arange(1, labels.numel() + 1, device=labels.device).view_as(labels)
    ).sum()
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    sizes, *shared = torch.stack(found).t().tolist()
    for name, values in zip(
        ("D of hidden", "number of labels", "sum over labels"), shared, strict=True
    ):
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
    shard = Shard(start, max(sizes), sum(sizes), partial(_sum, group))
    name = f"vocab_parallel:{group.group_name}:{start}:{max(sizes)}:{sum(sizes)}"
    kernels.register_shard(name, shard, partial(_max, group))
    return VocabShard(name, shard.vocab, shard.largest)


def _sum(group: Any, x: Tensor) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(x, group=group)
    return x


def _max(group: Any, x: Tensor) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x
