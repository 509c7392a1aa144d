"""The golden table: what the taper returns at every edge, for every implementation and language."""

from __future__ import annotations

import math

from topr_kernels import PRESETS

INF, NAN, E = math.inf, math.nan, math.e

LOG_RATIOS = (-INF, -1e4, -1.0, 0.0, 1.0, 1e4, INF, NAN)

#: (lower limit, upper limit) -> values of rho, then weights, in the order of LOG_RATIOS.
TABLE = {
    (1.0, 1.0): (
        (-INF, -9999.0, 0.0, 1.0, 2.0, 10001.0, INF, NAN),
        (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN),
    ),
    (0.0, 1.0): (
        (0.0, 0.0, 1 / E, 1.0, 2.0, 10001.0, INF, NAN),
        (0.0, 0.0, 1 / E, 1.0, 1.0, 1.0, 1.0, NAN),
    ),
    (0.0, INF): (
        (0.0, 0.0, 1 / E, 1.0, E, INF, INF, NAN),
        (0.0, 0.0, 1 / E, 1.0, E, INF, INF, NAN),
    ),
    (0.0, 0.0): (
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, NAN),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, NAN),
    ),
}


def cases() -> list[tuple[str, float, float, float, float]]:
    """(preset, reward, log_ratio, value, weight) for both signs of the reward."""
    rows = []
    for preset, limits in PRESETS.items():
        for reward in (1.0, -1.0):
            pair = (
                (limits.pos_min, limits.pos_max) if reward > 0 else (limits.neg_min, limits.neg_max)
            )
            values, weights = TABLE[pair]
            rows += [
                (preset, reward, x, v, w)
                for x, v, w in zip(LOG_RATIOS, values, weights, strict=True)
            ]
    return rows
