"""The baseline as a choice of data-set composition: Eq. 7 of arXiv 2503.14286 and its inverse."""

from __future__ import annotations


def effective_positive_share(positive_share: float, baseline: float) -> float:
    """Share of positives that a baseline makes the data set behave as if it had (Eq. 7).

    ``p~ = p (1 - c) / (1 + (1 - 2p) c)`` for rewards of +1 and -1.

    Args:
        positive_share: p, true share of sequences with reward +1, in [0, 1].
        baseline: c, subtracted from every reward, in [-1, 1]. -1 discards the negatives.

    Returns:
        p~ in [0, 1]. The paper recommends 0.1 to 0.2.

    Raises:
        ValueError: if an argument is outside its range, or every reward equals the baseline.
    """
    p, c = _share("positive_share", positive_share), baseline
    if not -1.0 <= c <= 1.0:
        raise ValueError(f"baseline: expected a number in [-1, 1] for rewards of +-1, got {c}")
    mass = 1 + (1 - 2 * p) * c
    if mass == 0:
        raise ValueError(
            f"baseline = {c} equals every reward at positive_share = {p}: nothing is left to learn "
            "from; choose a baseline strictly between -1 and 1"
        )
    return p * (1 - c) / mass


def baseline_for_positive_share(positive_share: float, target: float) -> float:
    """Baseline that gives a target effective share of positives: the inverse of Eq. 7.

    ``c = (p - p~) / (p + p~ - 2 p p~)`` for rewards of +1 and -1 (derived).

    Args:
        positive_share: p, true share of sequences with reward +1, strictly between 0 and 1.
        target: p~, wanted effective share, in [0, 1]; 1 gives c = -1 (negatives discarded).

    Returns:
        c in [-1, 1], to be passed as ``baseline=``.

    Raises:
        ValueError: if ``positive_share`` is not strictly inside (0, 1) or ``target`` not in [0, 1].
    """
    p, q = _share("positive_share", positive_share), _share("target", target)
    if p in (0.0, 1.0):
        raise ValueError(
            f"positive_share: got {p}, but no baseline changes the effective share of a data set "
            "with a single sign of reward; sample until both signs occur"
        )
    # Rounding may step over -1 or 1 by an ulp.
    return min(1.0, max(-1.0, (p - q) / (p + q - 2 * p * q)))


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a share in [0, 1], got {value}")
    return float(value)
