"""The order of training records in which samples of one prompt stand together, for prefix trees."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from topr_kernels.hf.fields import TOKENS


class SiblingSampler(Sampler[int]):
    """A permutation of the records for each epoch: groups shuffled, each whole, its records shuffled.

    It depends on the seed and the number of the epoch alone. So every process has the same order, of
    which accelerate gives each its batches, and a resumed run continues it. A group that crosses the end
    of a batch is split there.

    Args:
        groups: for each group the indices of its records.
        seed: of all epochs.
        epoch: number of the epoch that begins.
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], seed: int, epoch: Callable[[], int]
    ) -> None:
        self.groups, self.seed, self.epoch = groups, seed, epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        shuffler = random.Random(f"{self.seed} {self.epoch()}")
        for group in shuffler.sample(self.groups, len(self.groups)):
            yield from shuffler.sample(group, len(group))


def siblings(dataset: Any) -> list[list[int]] | None:
    """Indices of the records that have a prompt in common, for each prompt; None if none have.

    Args:
        dataset: token records (``prepare_records``) with a length; None for any other.
    """
    name = TOKENS[0]
    if name not in dataset[0]:
        return None
    columns = hasattr(dataset, "column_names")
    prompts = dataset[name] if columns else (dataset[i][name] for i in range(len(dataset)))
    # By hash: the prompts would take 40 bytes a token, and a collision only changes the order.
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(hash(tuple(map(int, prompt))), []).append(i)
    return None if len(groups) == len(dataset) else list(groups.values())
