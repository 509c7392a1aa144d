"""Trajectories in the recipe: completions of which the policy wrote a part, from file to model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from test_recipe_curate import SAMPLING, record
from tiny import random_model, tiny_tokenizer

from topr_kernels.recipe import (
    CurationOptions,
    Record,
    RecordError,
    TrainSettings,
    curate,
    read_records,
    score,
    train,
    write_records,
)
from topr_kernels.recipe.curate import figures
from topr_kernels.recipe.score import max_log_ratio
from topr_kernels.recipe.train import trainable_fields

MASK = [1, 0, 0, 1]


def trajectory(**changes: Any) -> Record:
    """A record with a tool's tokens inside, and no number under them."""
    mu = [-0.5, math.nan, math.nan, -0.25]
    return record(**{"tokens": 4, "completion_mask": MASK, "behavior_log_prob": mu, **changes})


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_masks_and_weights_survive_a_round_trip(tmp_path: Path, suffix: str):
    path = tmp_path / f"records.{suffix}"
    more = {"sample_weight": 0.5, "segments": [3, 3, 0, 1]}
    write_records(path, [trajectory(**more), record()])
    mu = [-0.5, 0.0, 0.0, -0.25]
    assert read_records(path) == [trajectory(**more, behavior_log_prob=mu), record()]
    plain = tmp_path / f"plain.{suffix}"
    write_records(plain, [record()])
    # Files without trajectories are what they were.
    assert b"completion_mask" in path.read_bytes() and b"completion_mask" not in plain.read_bytes()
    row = {**record(tokens=4).to_dict(), "completion_mask": [True, False, False, True]}
    row["behavior_log_prob"] = [-0.5, None, math.nan, -0.25]
    assert Record.from_dict(row, "it").completion_mask == MASK
    # As another tool writes them.
    jsonl = tmp_path / "other.jsonl"
    jsonl.write_text(json.dumps(row) + "\n")
    assert read_records(jsonl)[0].behavior_log_prob == mu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"completion_mask": [1, 0], "behavior_log_prob": None},
            "'completion_mask': 2 entries for 4 completion tokens.*prompt",
        ),
        ({"completion_mask": [1, 0, 0, 2]}, "'completion_mask': got 2 at position 3; expected 1"),
        ({"completion_mask": 1}, "'completion_mask': expected a list of 0 and 1"),
        (
            {"behavior_log_prob": [math.nan, 0.0, 0.0, -1.0]},
            r"'behavior_log_prob\[0\]': expected a f",
        ),
        ({"segments": [0, 1]}, "'segments': 2 entries for 4 completion tokens.*prompt"),
        ({"segments": [0, 1, 1, 0.5]}, "'segments': got .*expected one integer per token"),
        ({"segments": "0011"}, "'segments': expected a list of whole numbers"),
        ({"sample_weight": -1.0}, "'sample_weight': expected a number >= 0; the sign"),
        ({"sample_weight": math.inf}, "'sample_weight': expected a finite number"),
        ({"loss_mask": MASK}, "'loss_mask': unknown; rename it 'completion_mask'"),
        ({"labels": MASK}, "'labels': unknown; rename it 'completion_mask'"),
        ({"weight": 2}, "'weight': unknown; rename it 'sample_weight'"),
        ({"logprobs": [0]}, "'logprobs': unknown; rename it 'behavior_log_prob'"),
        ({"note": 1}, "'note': unknown; remove it"),
    ],
)
def test_masks_and_weights_that_are_none_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(RecordError, match=rf"data, record 3, field {message}"):
        Record.from_dict({**trajectory().to_dict(), **changes}, "data, record 3")


def test_lengths_count_what_the_policy_wrote():
    data = [trajectory(), trajectory(group=1, completion_mask=[1] * 4), record(group=2, tokens=3)]
    assert [r.length for r in data] == [2, 4, 3]
    assert figures(data).mean_length == 3
    kept = curate(data, CurationOptions(max_length=3), seed=0)
    assert [r.group for r in kept.records] == [0, 2]


def test_a_trajectory_is_scored_and_trained_on(tmp_path: Path):
    model = random_model()
    data = [
        dataclasses.replace(
            trajectory(group=i, reward=1.0 if i % 2 else -1.0), behavior_log_prob=None
        )
        for i in range(4)
    ]
    # A positive that no model sampled, and one of another weight.
    teacher = record(9, 1.0, 3, behavior_log_prob=None, sampling=dataclasses.replace(
        SAMPLING, model="teacher", temperature=0.0))  # fmt: skip
    scored = score(model, data, pad_token_id=0, batch_size=2, progress=False)
    for r in scored:
        assert [x < 0 for x in r.behavior_log_prob] == [x == 1 for x in MASK]
        ids = torch.tensor([r.prompt_token_ids + r.completion_token_ids])
        log_probs = model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
        expected = log_probs.gather(1, ids[0, 3:, None])[:, 0] * torch.tensor(MASK)
        assert r.behavior_log_prob == pytest.approx(expected.tolist(), abs=1e-5)
    # What stands under 0 is nothing.
    odd = [dataclasses.replace(r, behavior_log_prob=[x or -9.0 for x in r.behavior_log_prob])
           for r in scored]  # fmt: skip
    assert max_log_ratio(model, odd, pad_token_id=0, batch_size=2) < 1e-5
    weighted = [dataclasses.replace(scored[0], sample_weight=3.0), *scored[1:], teacher]
    settings = TrainSettings(batch_size=5)
    (log,) = train(model, tiny_tokenizer(), weighted, settings, checkpoints=tmp_path)
    assert log["length_mean"] == pytest.approx((4 * 2 + 3) / 5)
    assert log["weight_negative_mean"] == pytest.approx(1, abs=1e-4)
    assert log["reward_mean"] == pytest.approx((3 - 2) / 5)
    cut = [weighted[0], dataclasses.replace(weighted[1], segments=[0, 0, 0, 1])]
    with pytest.raises(RecordError, match="record 1, field 'segments': ratio='sequence' does not"):
        train(model, tiny_tokenizer(), cut, settings, checkpoints=tmp_path / "cut")
    fields = trainable_fields(cut, "topr", 0.0, "segment")
    assert fields[1]["segments"] == [0, 0, 0, 1] and "segments" not in fields[0]
    settings = TrainSettings(batch_size=2, ratio="segment")
    (log,) = train(model, tiny_tokenizer(), cut, settings, checkpoints=tmp_path / "cut")
    assert log["length_mean"] == 2
    # Another limit reads it.
    with pytest.raises(
        RecordError, match=r"record 4, field 'behavior_log_prob': missing \(.* posi"
    ):
        train(model, tiny_tokenizer(), weighted, TrainSettings(limits="tis"), checkpoints=tmp_path)
