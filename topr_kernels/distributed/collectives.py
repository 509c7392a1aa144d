"""The collectives that this package uses."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def gathered(x: Tensor, group: Any) -> Tensor:
    """[n, ...]: a tensor of every process."""
    import torch.distributed as dist

    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def rank_in(group: Any) -> int:
    """Number of this process in a group."""
    import torch.distributed as dist

    return int(dist.get_rank(group))


def sum_(group: Any, x: Tensor) -> Tensor:
    """Sum over a group, in place."""
    import torch.distributed as dist

    dist.all_reduce(x, group=group)
    return x


def max_(group: Any, x: Tensor) -> Tensor:
    """Largest over a group, in place."""
    import torch.distributed as dist

    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def over(collective: Callable[[Any, Tensor], Tensor], group: Any) -> Callable[[Tensor], Tensor]:
    """A collective that holds its group weakly, since a registered operator must not keep it alive."""
    return partial(_while_alive, collective, weakref.ref(group))


def _while_alive(
    collective: Callable[[Any, Tensor], Tensor], group: weakref.ref[Any], x: Tensor
) -> Tensor:
    alive = group()
    if alive is None:
        raise RuntimeError(
            "the process group of this call is gone; run its backward before destroy_process_group()"
        )
    return collective(alive, x)
