"""Chooses which samples to train on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from topr_kernels.recipe.records import Record


def subsample_negatives(
    records: Sequence[Record], positive_share: float, seed: int
) -> list[Record]:
    """Keeps every positive and as many random negatives as make the given share of positives.

    What a baseline does to the gradient by weighing (Eq. 7), this does to the data set, and the
    negatives that are left out cost no training time.

    Args:
        records: N records; positive means reward > 0.
        positive_share: wanted share of positives, in (0, 1].
        seed: of the draw.

    Returns:
        The kept records in their order; all of them if there is no positive, or if positives are
        as frequent already.

    Raises:
        ValueError: if ``positive_share`` is outside (0, 1].
    """
    if not 0 < positive_share <= 1:
        raise ValueError(f"positive_share: got {positive_share}; expected a share in (0, 1]")
    positive = [i for i, record in enumerate(records) if record.reward > 0]
    negative = [i for i, record in enumerate(records) if record.reward <= 0]
    wanted = round(len(positive) * (1 - positive_share) / positive_share)
    if not positive or wanted >= len(negative):
        return list(records)
    kept = sorted(positive + random.Random(seed).sample(negative, wanted))
    return [records[i] for i in kept]
