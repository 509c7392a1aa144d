"""What the figures say of each claim, by one rule: no verdict is written by hand."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.learning.cells import Cell

#: Results by the name of their cell, as the files have them.
Results = Mapping[str, Mapping[str, Any]]

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
TOO_SMALL = "too small to tell"
NOT_RUN = "not run"
#: Fewer seeds are no verdict.
LEAST_SEEDS = 3
#: Two-sided 95 % quantiles of Student's t for 1 to 60 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
    *(2.040, 2.037, 2.035, 2.032, 2.030, 2.028, 2.026, 2.024, 2.023, 2.021),
    *(2.020, 2.018, 2.017, 2.015, 2.014, 2.013, 2.012, 2.011, 2.010, 2.009),
    *(2.008, 2.007, 2.006, 2.005, 2.004, 2.003, 2.002, 2.002, 2.001, 2.000),
)


@dataclass(frozen=True)
class Claim:
    """That one training ends more accurate than another, or of a verifier one of ``VERIFIER``.

    Args:
        text: the claim.
        source: the paper's figures for it, or whose claim it is.
        better: the cell that should be ahead, its seed left open.
        worse: the other one; None for the model that they start from.
        figure: key of ``VERIFIER``, where ``better`` is the cell of a verifier.
    """

    text: str
    source: str
    better: Cell | None
    worse: Cell | None
    figure: str = ""


#: What is claimed of a trained verifier, as a difference in shares, from the result of its cell.
VERIFIER: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "accuracy": lambda r: r["after"]["verifier"]["accuracy"] - r["before"]["verifier"]["accuracy"],
    "parsable": lambda r: (
        r["before"]["verifier"]["unparsable_share"] - r["after"]["verifier"]["unparsable_share"]
    ),
    "vote": lambda r: r["after"]["vote"]["weighted_at_k"] - r["after"]["vote"]["maj_at_k"],
    "untrained vote": lambda r: (
        r["after"]["vote"]["weighted_at_k"] - r["before"]["vote"]["weighted_at_k"]
    ),
}


_TOPR, _SFT, _NAIVE = Cell("topr", 0), Cell("sft", 0), Cell("reinforce", 0)
_KARENINA = Cell("topr", 0, curation="anna-karenina")
_VERIFIER = Cell("topr", 0, verifier=True)
CLAIMS = (
    Claim("TOPR learns off-policy", "73.2 against a base of 49.8", _TOPR, None),
    Claim("naive REINFORCE collapses below the base", "base 49.8, naive 10, later 2", None, _NAIVE),
    Claim("TOPR beats naive REINFORCE", "73.2 against 10", _TOPR, _NAIVE),
    Claim("TOPR beats positives only", "73.2 against 70.3", _TOPR, _SFT),
    Claim("TOPR beats PPO", "73.2 against 48.8", _TOPR, Cell("ppo", 0)),
    Claim(
        "TOPR beats plain importance sampling", "§3: high variance; no figure", _TOPR, Cell("is", 0)
    ),
    Claim(
        "naive REINFORCE collapses below the base at p̃ = 10 %",
        "the same, at another share; added later",
        *(None, Cell("reinforce", 0, share=0.1)),
    ),
    Claim(
        "at p̃ = 1 % TOPR beats TIS",
        "69.9 against 65.3",
        *(Cell("topr", 0, share=0.01), Cell("tis", 0, share=0.01)),
    ),
    Claim(
        "at p̃ = 10 % TIS is a little ahead of TOPR",
        "72.4 against 71.4",
        *(Cell("tis", 0, share=0.1), Cell("topr", 0, share=0.1)),
    ),
    Claim("at p̃ = 50 % TOPR beats TIS", "70.2 against 69.1", _TOPR, Cell("tis", 0)),
    Claim("TOPR: p̃ = 10 % beats 50 %", "71.4 against 70.2", Cell("topr", 0, share=0.1), _TOPR),
    Claim(
        "TOPR: p̃ = 20 % beats 1 %",
        "71.5 against 69.9",
        *(Cell("topr", 0, share=0.2), Cell("topr", 0, share=0.01)),
    ),
    Claim("TOPR: p̃ = 20 % beats 100 %", "71.5 against 58.4", Cell("topr", 0, share=0.2), _SFT),
    Claim(
        "the ratio of the sequence beats that of each token",
        "ours; no figure in the paper",
        *(_TOPR, Cell("topr", 0, "token")),
    ),
    Claim(
        "the ratio of the sequence beats the geometric mean",
        "ours; no figure in the paper",
        *(_TOPR, Cell("topr", 0, "geometric")),
    ),
    Claim(
        "three iterations of the default recipe beat the base",
        "five, with Anna Karenina sampling: 79.6, base 49.8",
        *(Cell("topr", 0, curation="default"), None),
    ),
    Claim(
        "Anna Karenina sampling beats uniform sampling",
        "GSM8K 79.6 against 75.4, MATH 21.8 against 22.7 (five iterations)",
        *(_KARENINA, Cell("topr", 0, curation="uniform")),
    ),
    Claim("training raises the verifier's accuracy", "32.6 to 70.9", _VERIFIER, None, "accuracy"),
    Claim(
        "training lowers the verifier's unparsable share",
        "34.2 to 0.9",
        _VERIFIER,
        None,
        "parsable",
    ),
    Claim(
        "votes weighted by the trained verifier beat plain ones",
        "61.5 against 55.5",
        *(_VERIFIER, None, "vote"),
    ),
    Claim(
        "votes weighted by the trained verifier beat those weighted by the untrained one",
        "61.5 against 56.7",
        *(_VERIFIER, None, "untrained vote"),
    ),
)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of 2 to 61 values.

    Raises:
        ValueError: for fewer or more.
    """
    count = len(values)
    if not 2 <= count <= len(_T95) + 1:
        raise ValueError(f"values: got {count}; expected 2 to {len(_T95) + 1}, one per seed")
    mean = statistics.fmean(values)
    half = _T95[count - 2] * math.sqrt(statistics.variance(values) / count)
    return Interval(mean, mean - half, mean + half, count)


def verdict(differences: Sequence[float]) -> str:
    """Reproduced if the 95 % interval of the mean lies above 0, not reproduced if below.

    Args:
        differences: one per seed, in the direction of the claim, in points.
    """
    if len(differences) < LEAST_SEEDS:
        return NOT_RUN
    found = interval(differences)
    if found.low > 0:
        return REPRODUCED
    return NOT_REPRODUCED if found.high < 0 else TOO_SMALL


def with_seed(cell: Cell, seed: int) -> Cell:
    """The cell of a seed."""
    return dataclasses.replace(cell, seed=seed)


def seeds_of(results: Results, cell: Cell | None) -> list[int]:
    """Seeds that a cell was run with; of the base for None."""
    stem = "base-seed" if cell is None else with_seed(cell, 0).name.removesuffix("0")
    found = (re.fullmatch(re.escape(stem) + r"(\d+)", name) for name in results)
    return sorted(int(match[1]) for match in found if match)


def accuracy(evaluation: Mapping[str, Any], decoding: str = "greedy") -> float:
    """Accuracy in per cent; a model of NaN answers nothing right."""
    return 0.0 if evaluation["diverged"] else 100 * evaluation[decoding]["accuracy"]


def final(results: Results, cell: Cell | None, seed: int, like: Cell | None = None) -> float:
    """The one figure that verdicts look at, but those of the verifier, in per cent.

    Of a training on one data set: greedy accuracy after the last epoch. Of iterations: pass@1 after
    the last. Of the base (None): the same of the model that the other cell (``like``) started from.
    """
    if cell is None:
        if like is not None and like.curation:
            first = results[with_seed(like, seed).name]["iterations"][0]
            return 100 * float(first["evaluation"]["pass_at_1"])
        return accuracy(results[f"base-seed{seed}"]["evaluation"])
    result = results[with_seed(cell, seed).name]
    if cell.curation:
        return 100 * float(result["iterations"][-1]["evaluation"]["pass_at_1"])
    return accuracy(result["epochs"][-1]["evaluation"])


def differences(results: Results, claim: Claim) -> dict[int, float]:
    """Differences in points, in the direction of the claim, by seed.

    Both trainings of a seed share questions and samples, so the seeds are what is independent.
    """
    if claim.figure:
        found = {
            s: results[with_seed(claim.better, s).name] for s in seeds_of(results, claim.better)
        }
        return {seed: 100 * VERIFIER[claim.figure](result) for seed, result in found.items()}
    kept = None
    for cell in (claim.better, claim.worse):
        if cell is None and (claim.better or claim.worse or Cell("", 0)).curation:
            continue
        found = set(seeds_of(results, cell))
        kept = found if kept is None else kept & found
    return {
        seed: final(results, claim.better, seed, claim.worse)
        - final(results, claim.worse, seed, claim.better)
        for seed in sorted(kept or ())
    }
