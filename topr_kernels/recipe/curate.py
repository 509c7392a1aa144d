"""Chooses which samples to train on, and gives figures of the data set before and after."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from topr_kernels import baseline_for_positive_share, effective_positive_share
from topr_kernels.choices import BALANCES
from topr_kernels.recipe.options import Options, SettingsError, option
from topr_kernels.recipe.records import Record, RecordError


@dataclass(frozen=True)
class CurationOptions(Options):
    """How samples are chosen.

    Raises:
        SettingsError: if a value is not one that its field takes.
    """

    method: str = option(
        "uniform",
        "which samples: 'uniform' draws SIZE at random; 'anna-karenina' keeps the first right answer of "
        "each question and fills up to SIZE with random wrong ones",
        choices=("uniform", "anna-karenina"),
    )
    size: int = option(0, "samples to keep before the share is made; 0 for all there are", least=0)
    positive_share: float = option(
        0.0,
        "share of right answers to make (p~ of Eq. 7; the paper recommends 0.1 to 0.2); 0 leaves it",
        least=0,
        most=1,
    )
    balance: str = option(
        "subsample",
        "how: 'subsample' leaves samples out at random, 'baseline' keeps all and has the training "
        "subtract a baseline from the rewards",
        choices=BALANCES,
    )
    dedupe: bool = option(False, "keep only the first of equal completions of a question")
    max_length: int = option(
        0,
        "leave out completions longer than this, in tokens that the policy wrote; 0 for no cap",
        least=0,
    )
    drop_truncated: bool = option(False, "leave out completions that were cut off")


@dataclass(frozen=True)
class DataFigures:
    """Figures of a data set; shares in [0, 1].

    Args:
        records: number of records.
        groups: number of questions.
        positive_share: p, share of rewards above 0.
        effective_positive_share: p~ (Eq. 7) with the baseline of the training.
        invalid_share: completions without a parsable answer; None if a record's ``valid`` is None.
        truncated_share: completions that were cut off.
        mean_length: of the completions, in tokens that the policy wrote.
    """

    records: int
    groups: int
    positive_share: float
    effective_positive_share: float
    invalid_share: float | None
    truncated_share: float
    mean_length: float

    def __str__(self) -> str:
        """The figures of samples as a line of text."""
        invalid = (
            "" if self.invalid_share is None else f"{100 * self.invalid_share:.1f} % invalid, "
        )
        return (
            f"{self.records} samples of {self.groups} questions: {100 * self.positive_share:.1f} % "
            f"right, {invalid}{100 * self.truncated_share:.1f} % cut off, mean length "
            f"{self.mean_length:.1f} tokens"
        )


@dataclass(frozen=True)
class Curation:
    """What ``curate`` chose.

    Args:
        records: the kept records, in their order.
        baseline: for the training to subtract from every reward.
        before: figures of the records given.
        after: figures of those kept, with the baseline.
    """

    records: list[Record]
    baseline: float
    before: DataFigures
    after: DataFigures


def figures(records: Sequence[Record], baseline: float = 0.0) -> DataFigures:
    """Figures of records, for a training that subtracts ``baseline``.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("records: got none; expected at least one")
    count = len(records)
    p = sum(record.reward > 0 for record in records) / count
    known = all(record.valid is not None for record in records)
    return DataFigures(
        records=count,
        groups=len({record.group for record in records}),
        positive_share=p,
        effective_positive_share=effective_positive_share(p, baseline),
        invalid_share=sum(not r.valid for r in records) / count if known else None,
        truncated_share=sum(r.finish_reason == "length" for r in records) / count,
        mean_length=sum(r.length for r in records) / count,
    )


def warn_if_none_right(records: Sequence[Record], name: str, failed: int = 0) -> None:
    """Warns if all answers are wrong, which the settings cause more often than the model.

    Args:
        records: N records, at least one.
        name: of their file.
        failed: of how many the scorer failed, where that is known.
    """
    data = figures(records)
    if data.positive_share:
        return
    unread = "" if data.invalid_share is None else f"{100 * data.invalid_share:.0f} % unreadable, "
    remedy = (
        "read a few; --max-new-tokens may be too short, --chat missing or out of place, or --task not "
        "one for this model"
    )
    if failed:
        remedy = f"the scorer failed on {failed} of them; mend that first"
    warnings.warn(
        f"none of the {data.records} answers in {name} is right ({unread}"
        f"{100 * data.truncated_share:.0f} % cut off): {remedy}",
        stacklevel=2,
    )


def curate(records: Sequence[Record], options: CurationOptions, *, seed: int) -> Curation:
    """Leaves out duplicates, long and cut completions, draws samples, makes the share of positives.

    In that order, so that duplicates count neither for the draw nor for the share.

    Args:
        records: N records; positive means reward > 0, "first" means first in this order.
        options: see ``CurationOptions``.
        seed: of the draws.

    Raises:
        RecordError: with balance "baseline", if a reward is not +1 or -1, for which Eq. 7 holds.
        SettingsError: if nothing is left, or ``size`` is below the positives that Anna Karenina keeps.
    """
    before = figures(records)
    kept = list(records)
    if options.dedupe:
        kept = drop_duplicates(kept)
    if options.max_length:
        kept = [r for r in kept if r.length <= options.max_length]
    if options.drop_truncated:
        kept = [r for r in kept if r.finish_reason != "length"]
    if not kept:
        raise SettingsError(
            f"max_length: {options.max_length} and drop_truncated: {options.drop_truncated} leave none "
            f"of {len(records)} records; widen them"
        )
    if options.method == "anna-karenina":
        kept = anna_karenina(kept, options.size, seed)
    elif 0 < options.size < len(kept):
        chosen = _draw(seed, "size").sample(range(len(kept)), options.size)
        kept = [kept[i] for i in sorted(chosen)]
    baseline = 0.0
    share = sum(r.reward > 0 for r in kept) / len(kept)
    # Neither way changes the share if all rewards have one sign.
    if options.positive_share and 0 < share < 1:
        if options.balance == "baseline":
            _check_signs(kept)
            baseline = baseline_for_positive_share(share, options.positive_share)
        else:
            kept = to_positive_share(kept, options.positive_share, seed)
    return Curation(kept, baseline, before, figures(kept, baseline))


def _draw(seed: int, what: str) -> random.Random:
    """Random numbers of one draw: draws from the same stream would depend on each other."""
    return random.Random(f"{seed}/{what}")


def drop_duplicates(records: Iterable[Record]) -> list[Record]:
    """Keeps the first of the records whose question and completion tokens are equal."""
    first: dict[tuple[int, tuple[int, ...]], Record] = {}
    for record in records:
        first.setdefault((record.group, tuple(record.completion_token_ids)), record)
    return list(first.values())


def anna_karenina(records: Sequence[Record], size: int, seed: int) -> list[Record]:
    """The first positive of every question, and random negatives up to ``size`` (the paper, §4.3).

    Args:
        records: N records, the candidates of each question in the order they were drawn; positive
            means reward > 0, and all others are negatives: 0 is the wrong answer of 0/1 rewards.
        size: wanted number; 0, or more than there are, for all negatives.
        seed: of the draw.

    Returns:
        The kept records in their order.

    Raises:
        SettingsError: if ``size`` is below the number of first positives.
    """
    first: dict[int, int] = {}
    for i, record in enumerate(records):
        if record.reward > 0:
            first.setdefault(record.group, i)
    negative = [i for i, record in enumerate(records) if record.reward <= 0]
    if 0 < size < len(first):
        raise SettingsError(
            f"size: got {size}, but {len(first)} questions have a right answer, each of which "
            "anna-karenina keeps; expected at least that many, or fewer questions"
        )
    wanted = min(size - len(first), len(negative)) if size else len(negative)
    kept = sorted([*first.values(), *_draw(seed, "anna-karenina").sample(negative, wanted)])
    return [records[i] for i in kept]


def subsample_negatives(
    records: Sequence[Record], positive_share: float, seed: int
) -> list[Record]:
    """Keeps every positive and as many random negatives as make the given share of positives.

    It has the effect of a baseline (Eq. 7), but negatives that are left out cost no training time.

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
    positives = sum(record.reward > 0 for record in records)
    if 0 < positive_share <= 1 and positives >= positive_share * len(records):
        return list(records)
    return to_positive_share(records, positive_share, seed)


def to_positive_share(records: Sequence[Record], positive_share: float, seed: int) -> list[Record]:
    """Leaves out random records of the sign that is too frequent, until the share is as given.

    Args:
        records: N records; positive means reward > 0.
        positive_share: wanted share of positives, in (0, 1].
        seed: of the draw.

    Returns:
        The kept records in their order; all of them if there is only one sign. At least one positive
        is kept.

    Raises:
        ValueError: if ``positive_share`` is outside (0, 1].
    """
    if not 0 < positive_share <= 1:
        raise ValueError(f"positive_share: got {positive_share}; expected a share in (0, 1]")
    positive = [i for i, record in enumerate(records) if record.reward > 0]
    negative = [i for i, record in enumerate(records) if record.reward <= 0]
    if not positive or not negative:
        return list(records)
    draw = random.Random(seed)
    negatives = round(len(positive) * (1 - positive_share) / positive_share)
    if negatives < len(negative):
        negative = draw.sample(negative, negatives)
    else:
        positives = round(len(negative) * positive_share / (1 - positive_share))
        positive = draw.sample(positive, min(len(positive), max(1, positives)))
    return [records[i] for i in sorted(positive + negative)]


def as_text(before: DataFigures, after: DataFigures) -> str:
    """A table of the figures before and after."""
    names = {
        "records": "records",
        "groups": "questions",
        "positive_share": "right answers (p)",
        "effective_positive_share": "with the baseline (p~)",
        "invalid_share": "invalid",
        "truncated_share": "cut off",
        "mean_length": "mean length, tokens",
    }
    one, other = dataclasses.asdict(before), dataclasses.asdict(after)
    lines = [f"{'':24}{'before':>10}{'after':>10}"]
    lines += [f"{t:24}{_shown(n, one[n]):>10}{_shown(n, other[n]):>10}" for n, t in names.items()]
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name.endswith("share"):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _check_signs(records: Sequence[Record]) -> None:
    for i, record in enumerate(records):
        if record.reward not in (1.0, -1.0):
            raise RecordError(
                f"record {i}, field 'reward': got {record.reward}; balance='baseline' needs rewards of "
                "+1 and -1, for which Eq. 7 holds; use balance='subsample'"
            )
