"""Curation, voting, and the refusal of records that do not belong together."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from tiny import random_model, tiny_tokenizer

from topr_kernels import effective_positive_share
from topr_kernels.recipe import (
    CurationOptions,
    Record,
    RecordError,
    Sampling,
    SettingsError,
    Task,
    TrainSettings,
    curate,
    read_records,
    sampled_accuracy,
    train,
    wilson_interval,
    write_records,
)
from topr_kernels.recipe.curate import anna_karenina, as_text, to_positive_share
from topr_kernels.recipe.models import tokenizer_fingerprint
from topr_kernels.recipe.tasks import Question

SAMPLING = Sampling("tiny", 1.0, 0, 1.0, 6, 7)


def record(group: int = 0, reward: float = -1.0, tokens: int = 2, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "group": group,
        "prompt": "1 + 1 =",
        "completion": " 2\n",
        "prompt_token_ids": [5, 6, 7],
        "completion_token_ids": list(range(8, 8 + tokens)),
        "reward": reward,
        "finish_reason": "stop",
        "sampling": SAMPLING,
        "behavior_log_prob": [-0.5] * tokens,
        "valid": True,
    }
    return Record(**{**values, **changes})


def candidates(signs: list[str]) -> list[Record]:
    """One question per text of + and -; each completion is unlike the others."""
    return [
        record(group, 1.0 if sign == "+" else -1.0, completion_token_ids=[8 + 10 * group + i, 9])
        for group, row in enumerate(signs)
        for i, sign in enumerate(row)
    ]


# --- curate ----------------------------------------------------------------------------------


def test_anna_karenina_keeps_the_first_positive_of_each_question_and_fills_with_negatives():
    records = candidates(["-++-", "----", "+-+-"])
    kept = anna_karenina(records, 5, seed=0)
    positive = [r for r in kept if r.reward > 0]
    assert positive == [records[1], records[8]]
    assert len(kept) == 5 and kept == [r for r in records if r in kept]
    assert anna_karenina(records, 5, seed=0) == kept
    assert any(anna_karenina(records, 5, seed=s) != kept for s in range(1, 6))
    # More than there are, and all: every negative once.
    for size in (0, 100):
        assert anna_karenina(records, size, seed=0) == [
            r for r in records if r.reward < 0 or r in positive
        ]
    with pytest.raises(SettingsError, match="size: got 1, but 2 questions have a right answer"):
        anna_karenina(records, 1, seed=0)


def test_a_reward_of_0_is_a_negative():
    """The wrong answer of 0/1 rewards: left out it would leave nothing but right ones."""
    records = [record(i // 3, float(i == 1), completion_token_ids=[8 + i]) for i in range(6)]
    assert anna_karenina(records, 0, seed=0) == records
    half = to_positive_share(records, 0.5, seed=0)
    assert [r.reward for r in half if r is not records[1]] == [0.0]
    mixed = [record(0, 1.0), record(0, 0.0, 3), record(0, -1.0, 4)]
    assert anna_karenina(mixed, 3, seed=0) == mixed


def test_negatives_are_drawn_alike():
    """Every negative of the candidates, whatever its question, with the same probability."""
    records = candidates(["+---", "----"])
    counts = [0] * 8
    for seed in range(700):
        for r in anna_karenina(records, 4, seed):
            counts[records.index(r)] += 1
    assert counts[0] == 700
    assert all(240 < n < 360 for n in counts[1:]), counts  # 300 expected, sd 13


def test_a_reward_of_zero_is_no_right_answer_and_is_not_lost():
    """Rewards of 0 and 1, as many tasks give them."""
    rewards = [0.0, 1.0, 0.0, 1.0]
    records = [record(0, r, completion_token_ids=[8 + i]) for i, r in enumerate(rewards)]
    assert anna_karenina(records, 0, seed=0) == records[:3]
    assert len(to_positive_share(records, 0.5, seed=0)) == 4
    assert curate(records, CurationOptions(positive_share=2 / 3), seed=0).after.records == 3


def test_each_draw_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """The draw of the share must not repeat that of the size: the two would pick the same places."""
    seeds, original = [], random.Random
    monkeypatch.setattr(random, "Random", lambda seed: seeds.append(seed) or original(seed))
    for method in ("uniform", "anna-karenina"):
        options = CurationOptions(method=method, size=30, positive_share=0.5)
        curate(candidates(["+---"] * 12), options, seed=3)
    assert len(seeds) == 4 and len(set(seeds)) == 3


def test_uniform_draws_size_records_of_both_signs():
    records = candidates(["+-+-"] * 10)
    chosen = curate(records, CurationOptions(size=12), seed=3)
    assert len(chosen.records) == chosen.after.records == 12 and chosen.before.records == 40
    assert chosen.records == [r for r in records if r in chosen.records]
    assert curate(records, CurationOptions(size=12), seed=3) == chosen
    assert curate(records, CurationOptions(size=12), seed=4).records != chosen.records
    assert curate(records, CurationOptions(), seed=3).records == records


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("signs", ["+---------", "++++++++--"])
def test_the_share_is_made_by_subsampling_or_by_a_baseline(signs: str, share: float):
    records = candidates([signs] * 10)
    p = signs.count("+") / 10
    one = curate(records, CurationOptions(positive_share=share), seed=0)
    assert one.baseline == 0
    assert one.after.positive_share == pytest.approx(share, abs=0.04)  # a whole number of records
    # As many as can be had: one sign is complete.
    kept = {s: sum(r.reward == s for r in one.records) for s in (1.0, -1.0)}
    assert kept[1.0] == 100 * p or kept[-1.0] == 100 - 100 * p
    other = curate(records, CurationOptions(positive_share=share, balance="baseline"), seed=0)
    assert other.records == records
    assert effective_positive_share(p, other.baseline) == pytest.approx(share)
    assert other.after.positive_share == pytest.approx(p)
    assert other.after.effective_positive_share == pytest.approx(share)


def test_one_kind_of_record_is_left_alone():
    for signs in ("----", "++++"):
        for balance in ("subsample", "baseline"):
            chosen = curate(
                candidates([signs]), CurationOptions(positive_share=0.2, balance=balance), seed=0
            )
            assert len(chosen.records) == 4 and chosen.baseline == 0
    with pytest.raises(ValueError, match="positive_share: got 0"):
        to_positive_share(candidates(["+-"]), 0, seed=0)


def test_duplicates_long_and_cut_completions_are_left_out_before_the_draw():
    records = [
        record(0, 1.0, 2),
        record(0, -1.0, 2),  # the same tokens, the same question
        record(1, -1.0, 2),  # the same tokens, another question
        record(1, -1.0, 9),
        record(2, -1.0, 3, finish_reason="length", valid=False),
    ]
    assert curate(records, CurationOptions(), seed=0).records == records
    alone = CurationOptions(dedupe=True)
    assert curate(records, alone, seed=0).records == [records[0], *records[2:]]
    capped = curate(records, CurationOptions(max_length=3), seed=0)
    assert capped.records == [*records[:3], records[4]]
    whole = curate(records, CurationOptions(drop_truncated=True), seed=0)
    assert whole.records == records[:4]
    # The draw is from what is left.
    assert len(curate(records, CurationOptions(size=4), seed=0).records) == 4
    with pytest.raises(SettingsError, match=r"max_length: 1 .* leave none of 5 records"):
        curate(records, CurationOptions(max_length=1), seed=0)


def test_figures_before_and_after_are_told():
    records = [
        record(0, 1.0, 2),
        record(0, -1.0, 4, finish_reason="length", valid=False),
        record(1, -1.0, 3, valid=False),
        record(2, -1.0, 3),
    ]
    options = CurationOptions(drop_truncated=True, positive_share=0.5, balance="baseline")
    chosen = curate(records, options, seed=0)
    before, after = chosen.before, chosen.after
    assert (before.records, before.groups, before.positive_share) == (4, 3, 0.25)
    assert (before.invalid_share, before.truncated_share, before.mean_length) == (0.5, 0.25, 3)
    assert (after.records, after.truncated_share) == (3, 0)
    assert after.invalid_share == pytest.approx(1 / 3)
    assert after.effective_positive_share == pytest.approx(0.5)
    text = as_text(before, after)
    assert "25.0 %" in text and "33.3 %" in text and "p~" in text and "50.0 %" in text
    unknown = curate([record(valid=None), record(1)], CurationOptions(), seed=0)
    assert unknown.before.invalid_share is None
    assert "unknown" in as_text(unknown.before, unknown.after)


def test_a_baseline_needs_signed_rewards():
    options = CurationOptions(positive_share=0.5, balance="baseline")
    with pytest.raises(RecordError, match=r"record 1, field 'reward': got 0\.0"):
        curate([record(0, 1.0), record(1, 0.0)], options, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "method: got 'best'; expected one of uniform, anna-karenina"),
        ({"size": -1}, "size: got -1; expected at least 0"),
        ({"positive_share": 1.5}, "positive_share: got 1.5; expected at most 1"),
    ],
)
def test_senseless_options_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        CurationOptions(**changes)


# --- records that do not belong together -----------------------------------------------------


@pytest.mark.parametrize("field", ["model", "weights", "tokenizer"])
def test_samples_of_several_models_do_not_train_together(field: str, tmp_path: Path):
    mixed = [
        record(0, 1.0),
        record(1, sampling=dataclasses.replace(SAMPLING, **{field: "another"})),
    ]
    with pytest.raises(RecordError, match=rf"record 1, field 'sampling.{field}': got 'another'"):
        train(random_model(), tiny_tokenizer(), mixed, TrainSettings(), checkpoints=tmp_path)


def test_mu_of_several_sources_does_not_train(tmp_path: Path):
    mixed = [record(0, 1.0, behavior_source="score"), record(1, behavior_source="sampler")]
    with pytest.raises(RecordError, match=r"record 1, field 'behavior_source': got 'sampler'"):
        train(random_model(), tiny_tokenizer(), mixed, TrainSettings(), checkpoints=tmp_path)


def test_ids_of_another_tokenizer_do_not_train(tmp_path: Path):
    tokenizer, model = tiny_tokenizer(), random_model()
    foreign = [record(sampling=dataclasses.replace(SAMPLING, tokenizer="0123456789abcdef"))]
    with pytest.raises(RecordError, match=r"record 0, field 'sampling.tokenizer'"):
        train(model, tokenizer, foreign, TrainSettings(), checkpoints=tmp_path)
    big = [record(), record(completion_token_ids=[8, len(tokenizer)])]
    with pytest.raises(
        RecordError, match=r"record 1, field 'completion_token_ids': got the id 102"
    ):
        train(model, tokenizer, big, TrainSettings(), checkpoints=tmp_path)


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again.add_tokens(["<another>"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_what_is_known_of_the_source_survives_a_round_trip(suffix: str, tmp_path: Path):
    known = dataclasses.replace(SAMPLING, tokenizer="a" * 16, weights="b" * 16)
    records = [
        record(sampling=known, behavior_source="score", valid=False),
        record(behavior_source="sampler", valid=None),
    ]
    write_records(tmp_path / f"r.{suffix}", records)
    assert read_records(tmp_path / f"r.{suffix}") == records


# --- voting ----------------------------------------------------------------------------------


class Letters:
    """Answers are single letters; "?" is none, and "r" is right whatever its case."""

    one_line = True

    def parse(self, completion: str, finish_reason: str, question: Question) -> str | None:
        return None if completion == "?" else completion

    def canonical(self, answer: str) -> str:
        return answer.lower()

    def reward(self, answer: str | None, question: Question) -> float:
        return 1.0 if answer is not None and answer.lower() == "r" else -1.0


def accuracy(rows: list[str], votes: int, **options: Any) -> Any:
    questions = [Question(i, str(i), str(i), {}) for i in range(len(rows))]
    records = [record(i, completion=letter) for i, row in enumerate(rows) for letter in row]
    return sampled_accuracy(
        records, Letters(), questions, votes=votes, **{"draws": 50, "seed": 0, **options}
    )


def test_pass_at_1_is_the_mean_of_all_samples():
    found = accuracy(["rrrr", "rxyz", "xx??"], votes=4)
    assert found.pass_at_1 == pytest.approx(5 / 12)
    assert found.invalid_share == pytest.approx(2 / 12)
    assert (found.questions, found.samples, found.mean_length) == (3, 4, 2)
    assert found.pass_at_1_low < 5 / 12 < found.pass_at_1_high


def test_the_interval_counts_answers_by_what_they_are_worth():
    # Answers to a question all alike: as good as one each. All wrong: no better, and not width 0.
    alike = accuracy(["rrrr", "xxxx", "xxxx", "rrrr"], votes=1)
    assert (alike.pass_at_1_low, alike.pass_at_1_high) == pytest.approx(wilson_interval(2, 4))
    wrong = accuracy(["xxxx"] * 10, votes=1)
    assert (wrong.pass_at_1_low, wrong.pass_at_1_high) == pytest.approx(wilson_interval(0, 10))
    # Equal shares in every question: as good as all of them apart.
    apart = accuracy(["rrxx", "rrxx", "rrxx", "rxxx"], votes=1)
    assert (apart.pass_at_1_low, apart.pass_at_1_high) == pytest.approx(wilson_interval(7, 16))


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ("rRx", True),  # equal answers in another form vote together
        ("xxr", False),
        ("r??", True),  # what cannot be parsed does not vote
        ("???", False),
        ("rx?", True),  # of equal counts the first
        ("xr?", False),
    ],
)
def test_the_majority_wins(row: str, right: bool):
    found = accuracy([row], votes=3)
    assert found.maj_at_k == right
    assert found.maj_at_k_error is None


def test_majority_of_k_of_n_and_its_standard_error():
    """K of N answers, many draws: the exact value by counting, and the paper's formula."""
    rows = ["rrxxx", "rrrxx", "rxyzw", "rrrrr"]
    found = accuracy(rows, votes=3, draws=4000)
    # Three of rrxxx: r wins with two r (3 of 10 draws). Of rrrxx: 7 of 10. Of rxyzw: r must be
    # drawn first among three different ones: 1 of 5. Of rrrrr: always.
    assert found.maj_at_k == pytest.approx((0.3 + 0.7 + 0.2 + 1) / 4, abs=0.015)
    variance = (0.3 * 0.7 + 0.7 * 0.3 + 0.2 * 0.8) / 16
    assert found.maj_at_k_error == pytest.approx(math.sqrt(3 * variance / (5 - 3)), rel=0.05)
    assert found == accuracy(rows, votes=3, draws=4000)
    assert "maj@3" in str(found) and "pass@1" in str(found)


def test_the_standard_error_is_what_repeated_sampling_shows():
    """The jackknife against the truth, N answers drawn anew 300 times: never far below it."""
    draw = random.Random(0)
    values, errors = [], []
    for i in range(300):
        rows = ["".join(draw.choices("rxy", weights=(5, 4, 1), k=8)) for _ in range(12)]
        found = accuracy(rows, votes=4, draws=60, seed=i)
        values.append(found.maj_at_k)
        errors.append(found.maj_at_k_error)
    # It is of one draw of K; the mean over draws is a little surer (here 0.12 to 0.085).
    assert 1 < statistics.fmean(errors) / statistics.stdev(values) < 1.6


def test_records_of_other_questions_and_too_many_votes_are_refused():
    with pytest.raises(ValueError, match="votes: got 5; expected 1 to 4"):
        accuracy(["rrxx"], votes=5)
    questions = [Question(0, "a", "a", {}), Question(1, "b", "b", {})]
    options: dict[str, Any] = {"votes": 1, "draws": 1, "seed": 0}
    for groups in ([0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1]):
        with pytest.raises(ValueError, match="expected equally many of each"):
            sampled_accuracy([record(g) for g in groups], Letters(), questions, **options)


def test_numbers_vote_together_however_they_are_written():
    task = Task("chain_sum", {"min_terms": 2, "max_terms": 2})
    assert task.canonical("1,200") == task.canonical(" 1200.0") == "1200"
    assert task.canonical("yes ") == "yes"
