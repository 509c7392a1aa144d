"""The claims, and what the figures say of each by one rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from benchmarks.learning.verdicts import NOT_REPRODUCED, NOT_RUN, REPRODUCED, TOO_SMALL, interval
from benchmarks.learning.world.cells import LONG, MOST_SEEDS, SLOW, Cell
from benchmarks.learning.world.store import Figures

NO_DIFFERENCE = "no difference of interest"
#: Effect of interest in points: an interval inside of this on both sides of 0 is decided.
INTEREST = 2.0
#: Fewer seeds are no verdict.
LEAST_SEEDS = 10


@dataclass(frozen=True)
class Claim:
    """That one training ends with more right answers than another.

    Args:
        text: the claim; where the page of the large world has it, in the same words.
        better: what should be ahead, its seed left open; None for the base model.
        worse: the other one; the base model for None.
        figure: key of ``FIGURES``, of what is compared within the cell ``better``; "" for trainings.
    """

    text: str
    better: Cell | None
    worse: Cell | None
    figure: str = ""


#: Differences in points within a cell.
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "majority": lambda cell: cell["votes"]["majority"] - cell["votes"]["single"],
    "weighted": lambda cell: cell["votes"]["trained"] - cell["votes"]["majority"],
    "trained": lambda cell: cell["votes"]["trained"] - cell["votes"]["untrained"],
    "readable": lambda cell: cell["base"]["unreadable"] - _last(cell)["unreadable"],
}


def _last(cell: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], list(cell["looks"].values())[-1])


_VERIFIER = Cell("topr", verifier=True, votes=8)
_VOTES = Cell("topr", epochs=1, votes=8)
_TOPR, _SFT = Cell("topr"), Cell("sft")
_HALF, _SFT_HALF = (Cell(m, right=10, curation="half", epochs=16) for m in ("topr", "sft"))
_SLOW = Cell("reinforce", rate=3e-5)
_FRESH = Cell("topr", rounds=16, epochs=1)


def _share(method: str, share: float) -> Cell:
    return Cell(method, share=share)


def _curated(right: int, curation: str) -> Cell:
    return Cell("topr", rounds=3, epochs=2, samples=32, right=right, curation=curation)


def _middle(ratio: str, method: str = "topr") -> Cell:
    return Cell(method, passes=3, ratio=ratio)


def _long(ratio: str, method: str = "topr") -> Cell:
    return Cell(method, ratio=ratio, **LONG)


CLAIMS: tuple[Claim, ...] = (
    Claim("TOPR learns off-policy", _TOPR, None),
    Claim("naive REINFORCE collapses below the base", None, Cell("reinforce")),
    Claim("TOPR beats naive REINFORCE", _TOPR, Cell("reinforce")),
    Claim("TOPR beats positives only", _TOPR, _SFT),
    Claim("TOPR beats PPO", _TOPR, Cell("ppo")),
    Claim("TOPR beats plain importance sampling", _TOPR, Cell("is")),
    Claim("naive REINFORCE collapses below the base at p̃ = 10 %", None, _share("reinforce", 0.1)),
    Claim("at p̃ = 1 % TOPR beats TIS", _share("topr", 0.01), _share("tis", 0.01)),
    Claim("at p̃ = 10 % TIS is a little ahead of TOPR", _share("tis", 0.1), _share("topr", 0.1)),
    Claim("at p̃ = 50 % TOPR beats TIS", _share("topr", 0.5), _share("tis", 0.5)),
    Claim("TOPR: p̃ = 10 % beats 50 %", _share("topr", 0.1), _share("topr", 0.5)),
    Claim("TOPR: p̃ = 20 % beats 1 %", _share("topr", 0.2), _share("topr", 0.01)),
    Claim("TOPR: p̃ = 20 % beats 100 %", _share("topr", 0.2), _SFT),
    Claim("the ratio of the sequence beats that of each token", _TOPR, Cell("topr", ratio="token")),
    Claim(
        "the ratio of the sequence beats the geometric mean", _TOPR, Cell("topr", ratio="geometric")
    ),
    Claim(
        "three iterations of the default recipe beat the base",
        Cell("topr", rounds=3, epochs=2, right=10),
        None,
    ),
    Claim(
        "Anna Karenina sampling beats uniform sampling",
        _curated(10, "karenina"),
        _curated(10, "uniform"),
    ),
    Claim(
        "Anna Karenina beats uniform sampling where 80 % are right",
        _curated(80, "karenina"),
        _curated(80, "uniform"),
    ),
    Claim(
        "TOPR beats positives only where 10 % are right",
        Cell("topr", right=10),
        Cell("sft", right=10),
    ),
    Claim(
        "TOPR beats positives only where 80 % are right",
        Cell("topr", right=80),
        Cell("sft", right=80),
    ),
    Claim("the ratio of the sequence beats the prefix ratio", _TOPR, Cell("prefix")),
    Claim(
        "the ratio of the sequence beats that of each column", _TOPR, Cell("topr", ratio="segment")
    ),
    Claim(
        "naive REINFORCE collapses at TOPR's learning rate", None, Cell("reinforce", like="topr")
    ),
    Claim(
        "55 tokens: the sequence's ratio beats each token's",
        _middle("sequence"),
        _middle("token"),
    ),
    Claim(
        "55 tokens: the sequence's ratio beats the geometric mean",
        _middle("sequence"),
        _middle("geometric"),
    ),
    Claim(
        "55 tokens: the sequence's ratio beats each column's",
        _middle("sequence"),
        _middle("segment"),
    ),
    Claim(
        "55 tokens: the sequence's ratio beats the prefix ratio",
        _middle("sequence"),
        _middle("sequence", "prefix"),
    ),
    Claim(
        "199 tokens: the sequence's ratio beats each token's",
        _long("sequence"),
        _long("token"),
    ),
    Claim(
        "199 tokens: the sequence's ratio beats the geometric mean",
        _long("sequence"),
        _long("geometric"),
    ),
    Claim(
        "199 tokens: the sequence's ratio beats each column's",
        _long("sequence"),
        _long("segment"),
    ),
    Claim(
        "199 tokens: the sequence's ratio beats the prefix ratio",
        _long("sequence"),
        _long("sequence", "prefix"),
    ),
    Claim(
        "256 updates old: the sequence's ratio beats the geometric mean",
        Cell("topr", epochs=16),
        Cell("topr", ratio="geometric", epochs=16),
    ),
    Claim(
        "256 updates old: TOPR beats positives only",
        Cell("topr", epochs=16),
        Cell("sft", epochs=16),
    ),
    Claim(
        "TOPR at p̃ = 50 % beats positives only where 10 % are right (added later)",
        Cell("topr", right=10, share=0.5),
        Cell("sft", right=10),
    ),
    Claim(
        "TOPR at p̃ = 80 % beats positives only where 10 % are right (added later)",
        Cell("topr", right=10, share=0.8),
        Cell("sft", right=10),
    ),
    Claim(
        "three rounds: TOPR beats positives only where 10 % are right",
        Cell("topr", rounds=3, epochs=2, right=10),
        Cell("sft", rounds=3, epochs=2, right=10),
    ),
    Claim("majority of 8 answers beats single ones, TOPR", _VOTES, None, "majority"),
    Claim(
        "errors of noise: TOPR beats positives only",
        Cell("topr", errors="noise"),
        Cell("sft", errors="noise"),
    ),
    Claim(
        "errors of noise: TOPR beats naive REINFORCE",
        Cell("topr", errors="noise"),
        Cell("reinforce", errors="noise"),
    ),
    Claim(
        "errors of noise: TOPR beats positives only where 10 % are right",
        Cell("topr", errors="noise", right=10),
        Cell("sft", errors="noise", right=10),
    ),
    Claim(
        "errors of noise: TOPR beats positives only where 80 % are right",
        Cell("topr", errors="noise", right=80),
        Cell("sft", errors="noise", right=80),
    ),
    Claim(
        "16 rounds of fresh samples: TOPR beats positives only",
        _FRESH,
        Cell("sft", rounds=16, epochs=1),
    ),
    Claim(
        "16 rounds of fresh samples: the sequence's ratio beats the geometric mean",
        _FRESH,
        Cell("topr", ratio="geometric", rounds=16, epochs=1),
    ),
    Claim(
        "half of the records right, as the recipe makes it: TOPR beats positives only",
        _HALF,
        _SFT_HALF,
    ),
    Claim(
        "half of the records right, as the recipe makes it, beats all where 10 % are right",
        _HALF,
        Cell("topr", right=10),
    ),
    Claim("training raises the verifier's accuracy", _VERIFIER, None),
    Claim("training lowers the verifier's unparsable share", _VERIFIER, None, "readable"),
    Claim("votes weighted by the trained verifier beat plain ones", _VERIFIER, None, "weighted"),
    Claim(
        "votes weighted by the trained verifier beat those weighted by the untrained one",
        *(_VERIFIER, None, "trained"),
    ),
    Claim("naive REINFORCE at 3e-5 collapses below the base", None, _SLOW),
    Claim("TOPR beats naive REINFORCE at 3e-5", _TOPR, _SLOW),
    *(
        Claim(
            f"{tokens} tokens: the sequence's ratio beats {name} at {length['rate']:g}",
            Cell("topr", **{**length, "rate": 0.0}),
            Cell("topr", ratio=ratio, **length),
        )
        for tokens, length in zip((19, 55, 199), SLOW, strict=True)
        for ratio, name in (
            ("token", "each token's"),
            ("geometric", "the geometric mean"),
            ("segment", "each column's"),
        )
    ),
    Claim(
        "256 updates old: the sequence's ratio beats the geometric mean at 3e-05",
        Cell("topr", epochs=16),
        Cell("topr", ratio="geometric", epochs=16, rate=3e-5),
    ),
    Claim(
        "16 rounds of fresh samples: the sequence's ratio beats the geometric mean at 3e-05",
        _FRESH,
        dataclasses.replace(_FRESH, ratio="geometric", rate=3e-5),
    ),
)


def end(results: Figures, cell: Cell | None, seed: int, like: Cell | None = None) -> float | None:
    """The figure that verdicts look at: of the last look, or of the base of ``like`` for None."""
    at = dataclasses.replace(cell or like or Cell(""), seed=seed)
    found = results.get(at.name)
    if found is None:
        return None
    look = found["base"] if cell is None else _last(found)
    return float(look["right"])


def differences(results: Figures, claim: Claim) -> dict[int, float]:
    """By seed, in points, in the direction of the claim."""
    found = {}
    for seed in range(MOST_SEEDS):
        if claim.figure and claim.better:
            cell = results.get(dataclasses.replace(claim.better, seed=seed).name)
            if cell:
                found[seed] = FIGURES[claim.figure](cell)
            continue
        better = end(results, claim.better, seed, claim.worse)
        worse = end(results, claim.worse, seed, claim.better)
        if better is not None and worse is not None:
            found[seed] = better - worse
    return found


def verdict(values: Sequence[float]) -> str:
    """One of five words: decided for, against, no difference of interest, too small, not run."""
    if len(values) < LEAST_SEEDS:
        return NOT_RUN
    found = interval(values)
    if found.low > -INTEREST and found.high < INTEREST:
        return NO_DIFFERENCE
    if found.low > 0:
        return REPRODUCED
    return NOT_REPRODUCED if found.high < 0 else TOO_SMALL


def cells_of_claim(claim: Claim) -> list[Cell]:
    """The cells that decide it, seeds left open."""
    return list({cell for cell in (claim.better, claim.worse) if cell is not None})
