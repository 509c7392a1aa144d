"""Trajectories: completions of which the policy wrote a part, from records to the loss."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_trainer import rows as plain_rows
from test_trainer import trainer
from tiny import random_model, tiny_tokenizer

from topr_kernels import SFT, TOPR, reference
from topr_kernels.hf import (
    CompletionCollator,
    causal_lm_topr_loss,
    prepare_records,
    score_behavior,
)
from topr_kernels.layout import IGNORE_INDEX

Row = dict[str, Any]
#: By the length of a completion: begins, ends, and is interrupted by what the policy did not write.
MASKS = {1: [1], 2: [0, 1], 3: [1, 0, 1], 4: [1, 0, 0, 1], 5: [1, 1, 0, 1, 0]}


def rows(count: int = 8) -> list[Row]:
    """Records with masks, and log mu that is no number where it is not read."""
    result = []
    for r in plain_rows(count, lengths=[1 + i % 5 for i in range(count)]):
        mask = MASKS[len(r["completion_token_ids"])]
        mu = [x if m else math.nan for x, m in zip(r["behavior_log_prob"], mask, strict=True)]
        result.append({**r, "completion_mask": mask, "behavior_log_prob": mu})
    return result


def prepared(data: list[Row]) -> list[Row]:
    return prepare_records(data, tiny_tokenizer())


def plain_loss(model: Any, data: list[Row], **options: Any) -> torch.Tensor:
    """The paper's loss of one full forward pass a record, labels of -100 where nothing is scored."""
    losses = []
    for r in data:
        prompt, mask = r["prompt_token_ids"], torch.tensor(r["completion_mask"])
        ids = torch.tensor([prompt + r["completion_token_ids"]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        labels[0, len(prompt) :][mask == 0] = -100
        mu = torch.zeros(ids.shape)
        # Without log mu the objective is that of mu = 1: another constant, the same gradient.
        if r["behavior_log_prob"] is not None:
            mu[0, len(prompt) :] = torch.tensor(r["behavior_log_prob"]).nan_to_num(0)
        logits = model(input_ids=ids).logits
        segments = torch.zeros_like(labels)
        if "segments" in r:
            segments[0, len(prompt) :] = torch.tensor(r["segments"])
        reward = torch.tensor([r["reward"]])
        options["segments"] = segments
        loss = reference.topr_loss(logits, labels, mu, reward, **options).loss
        losses.append(loss * r.get("sample_weight", 1))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"share_prefix": True}])
def test_the_loss_and_its_gradient_are_those_of_labels_of_minus_100(layout: Row):
    data, model = rows(), random_model()
    expected = plain_loss(model, data)
    expected.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    out = causal_lm_topr_loss(model, CompletionCollator(0, **layout)(prepared(data)))
    out.loss.backward()
    assert out.length.tolist() == [sum(r["completion_mask"]) for r in data]
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"share_prefix": True}])
def test_a_mask_of_ones_changes_no_bit(layout: Row):
    data, collate = plain_rows(), CompletionCollator(0, **layout)
    marked = [{**r, "completion_mask": [1] * len(r["completion_token_ids"])} for r in data]
    pairs = [(collate(data), collate(marked))]
    # A tree carries the batch that is not shared, too.
    for batch, other in pairs:
        assert batch.keys() == other.keys()
        for name, x in batch.items():
            if isinstance(x, dict):
                pairs.append((x, other[name]))
            else:
                assert torch.equal(torch.as_tensor(x), torch.as_tensor(other[name])), name


def test_columns_before_the_first_written_token_are_not_kept():
    data = [{**r, "completion_mask": [0, 0, 1]} for r in plain_rows(2, lengths=[3, 3])]
    batch = CompletionCollator(0)(data)
    assert batch["logits_to_keep"] == 2
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == [1, 1]
    data[1]["completion_mask"] = [0, 0, 0]
    assert CompletionCollator(0)(data)["logits_to_keep"] == 2


def test_the_end_of_a_completion_is_that_of_what_the_policy_wrote():
    record = {**plain_rows(1, lengths=[4])[0], "completion_token_ids": [7, 0, 8, 9]}
    collate = CompletionCollator(0, mask_truncated=True, eos_token_id=0)
    for mask, scored in (([1, 1, 0, 0], 2), ([1, 1, 0, 1], 0)):
        batch = collate([{**record, "completion_mask": mask}])
        assert (batch["labels"] != IGNORE_INDEX).sum() == scored


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1, 0], ValueError, "has 2 entries, but the completion has 3 tokens.*none for the prompt"),
        ([1, 0, 2], ValueError, "got 2 at position 2; expected 1 .* and 0 .*sample_weight"),
        ([1, 0.5, 1], ValueError, "got 0.5 at position 1"),
        ([1, None, 1], ValueError, "got None at position 1"),
        ([[1, 0, 1]], ValueError, "has 1 entries"),
        (1, TypeError, "got a int; expected a sequence of one 0 or 1 per token"),
        ("101", TypeError, "got a str"),
    ],
)
def test_a_mask_that_is_none_is_named(mask: Any, error: Any, message: str):
    (record,) = plain_rows(1, lengths=[3])
    bad = {**record, "completion_mask": mask}
    with pytest.raises(error, match=rf"record 1, field 'completion_mask': {message}"):
        prepared([record, bad])
    with pytest.raises(error, match=rf"record 1 of the batch, field 'completion_mask': {message}"):
        CompletionCollator(0)([record, bad])
    with pytest.raises(error, match=rf"record 0 of the data, field 'completion_mask': {message}"):
        score_behavior(random_model(), [bad], CompletionCollator(0), batch_size=1)


def test_masks_come_as_any_numbers_and_log_mu_may_be_missing_under_0():
    (record,) = plain_rows(1, lengths=[3])
    mu = [-1.0, None, -2.0]
    for mask in ([True, False, True], torch.tensor([1, 0, 1]), [1.0, 0.0, 1.0]):
        (found,) = prepared([{**record, "completion_mask": mask, "behavior_log_prob": mu}])
        assert found["completion_mask"] == [1, 0, 1]
        assert found["behavior_log_prob"] == [-1.0, 0.0, -2.0]
    with pytest.raises(TypeError, match=r"'behavior_log_prob': got None .* at position 1"):
        prepared([{**record, "completion_mask": [1, 1, 0], "behavior_log_prob": mu}])


def test_a_record_of_which_nothing_was_written_is_not_counted_and_told_once():
    data = [{**r, "completion_mask": [0] * len(r["completion_token_ids"])} for r in rows(3)]
    with pytest.warns(UserWarning, match="record 0, field 'completion_mask': is all zeros") as told:
        found = prepared(data)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared([{**data[0], "completion_token_ids": [], "completion_mask": [],
                   "behavior_log_prob": []}])  # fmt: skip
    kept = rows()[3:]
    model, collate = random_model(), CompletionCollator(0)
    both = causal_lm_topr_loss(model, collate(found + kept))
    torch.testing.assert_close(both.loss, causal_lm_topr_loss(model, collate(kept)).loss)
    assert causal_lm_topr_loss(model, collate(found)).loss.item() == 0


def test_other_masks_may_say_the_same():
    (record,) = plain_rows(1, lengths=[3])
    mask, (_, second, _) = [1, 0, 1], record["completion_token_ids"]
    before = [0] * len(record["prompt_token_ids"])
    labels = [x if m else -100 for x, m in zip(record["completion_token_ids"], mask, strict=True)]
    for same in ({"loss_mask": mask}, {"loss_mask": before + mask}, {"labels": labels}):
        assert prepared([{**record, "completion_mask": mask, **same}])
    for other in ({"loss_mask": [0, 1, 1]}, {"labels": [-100, second, -100]}):
        with pytest.raises(ValueError, match=rf"field '{next(iter(other))}': .*completion_mask"):
            prepared([{**record, "completion_mask": mask, **other}])


@pytest.mark.parametrize("layout", [{}, {"packing": True}])
def test_log_mu_is_scored_of_what_the_policy_wrote(layout: Row):
    data, model = rows(), random_model()
    collate = CompletionCollator(0, **layout)
    bare = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in data]
    scored = score_behavior(model, bare, collate, batch_size=8, progress=False)
    for mu, r in zip(scored, data, strict=True):
        assert [x < 0 for x in mu] == [bool(m) for m in r["completion_mask"]]
    again = [{**r, "behavior_log_prob": mu} for r, mu in zip(bare, scored, strict=True)]
    out = causal_lm_topr_loss(model, collate(again))
    assert out.log_ratio.tolist() == [0.0] * 8


def test_the_trainer_takes_masks_and_counts_what_was_written(tmp_path: Path):
    data = [{**r, "sample_weight": 0.5 * i} for i, r in enumerate(rows())]
    run = trainer(tmp_path, data, per_device_train_batch_size=8)
    expected = plain_loss(random_model(), data)
    run.train()
    log = run.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert log["length_mean"] == pytest.approx(sum(sum(r["completion_mask"]) for r in data) / 8)
    behavior = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in data]
    initial = trainer(tmp_path, behavior, behavior="initial", packing=True)
    figures = initial.evaluate()
    for sign in ("positive", "negative"):
        assert figures[f"eval_log_ratio_{sign}_max"] == pytest.approx(0, abs=1e-5)


# --- segments ------------------------------------------------------------------------------------


def near(data: list[Row], model: Any) -> list[Row]:
    """With log mu so near the model's that ratios tell segments apart."""
    bare = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in data]
    scored = score_behavior(model, bare, CompletionCollator(0), batch_size=8, progress=False)
    return [
        {**r, "behavior_log_prob": [x + 0.5 + 0.3 * (-1) ** k for k, x in enumerate(mu)]}
        for r, mu in zip(bare, scored, strict=True)
    ]


@pytest.mark.parametrize("ratio", ["segment", "segment_geometric"])
@pytest.mark.parametrize("layout", [{}, {"packing": True}])
def test_segments_are_the_runs_of_a_mask_or_those_of_the_record(ratio: str, layout: Row):
    model, collate = random_model(), CompletionCollator(0, **layout)
    data = near(rows(), model)
    own = [{**r, "segments": list(range(len(r["completion_token_ids"])))} for r in data]
    found = []
    for records in (data, own, [*own[:4], *data[4:]]):
        out = causal_lm_topr_loss(model, collate(prepared(records)), ratio=ratio)
        expected = plain_loss(model, records, ratio=ratio)
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
        found.append(out.loss.item())
    level = {"segment": "sequence", "segment_geometric": "geometric"}[ratio]
    found.append(causal_lm_topr_loss(model, collate(prepared(data)), ratio=level).loss.item())
    assert len({round(x, 4) for x in found}) == 3


def test_the_trainer_takes_segments(tmp_path: Path):
    data = [{**r, "segments": list(range(len(r["completion_token_ids"])))}
            for r in near(rows(), random_model())]  # fmt: skip
    run = trainer(tmp_path, data, per_device_train_batch_size=8, ratio="segment")
    run.train()
    expected = plain_loss(random_model(), data, ratio="segment").item()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    # Where nothing reads them they are not dropped without a word.
    with pytest.raises(ValueError, match="segments: got some with ratio='sequence'"):
        trainer(tmp_path, data, per_device_train_batch_size=8).train()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0, 1], ValueError, "has 2 entries, but the completion has 3 tokens"),
        ([0, 0.5, 1], TypeError, "expected one integer per token"),
        ("intro", TypeError, "drop the field if it means something else"),
    ],
)
def test_segments_that_are_none_are_named(value: Any, error: Any, message: str):
    (record,) = plain_rows(1, lengths=[3])
    with pytest.raises(error, match=rf"record 0, field 'segments': .*{message}"):
        prepared([{**record, "segments": value}])
    with pytest.raises(error, match=rf"record 0 of the batch, field 'segments': .*{message}"):
        CompletionCollator(0)([{**record, "segments": value}])


# --- records without log mu ----------------------------------------------------------------------


def without_mu(sign: float) -> list[Row]:
    """Records of which those of a sign have no log mu."""
    return [{**r, "behavior_log_prob": None} if r["reward"] == sign else r for r in rows()]


@pytest.mark.parametrize("layout", [{}, {"packing": True}])
def test_log_mu_may_be_missing_where_no_limit_reads_it(layout: Row):
    model, collate = random_model(), CompletionCollator(0, limits=TOPR, **layout)
    expected, whole = plain_loss(model, without_mu(1.0)), plain_loss(model, rows())
    batch = collate(prepared(without_mu(1.0)))
    assert batch["behavior_known"].tolist() == [r["reward"] == -1 for r in rows()]
    kept = batch["behavior_log_prob"][batch["labels"] >= 0]
    assert kept.max() == 0 and kept.min() < 0, "no log-prob is above 0, the unknown ones included"
    out = causal_lm_topr_loss(model, batch)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    head = model.lm_head.weight
    found, wanted = (torch.autograd.grad(loss, head)[0] for loss in (out.loss, whole))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    message = (
        r"record 1 of the batch has no 'behavior_log_prob'.*reward of -1 .* is a negative.*Score"
    )
    with pytest.raises(ValueError, match=message):
        collate(prepared(without_mu(-1.0)))
    with pytest.raises(
        ValueError, match=r"record 0 of the batch has no .*CompletionCollator\(limits"
    ):
        CompletionCollator(0, **layout)(without_mu(1.0))
    assert not CompletionCollator(0, limits=SFT)(without_mu(-1.0))["behavior_known"].all()
    # A baseline makes positives of negatives.
    assert CompletionCollator(0, limits=TOPR, baseline=-2.0)(without_mu(-1.0))


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
@pytest.mark.filterwarnings("ignore:100% of the negatives")
def test_the_trainer_names_a_negative_without_log_mu(tmp_path: Path, kind: str):
    datasets = pytest.importorskip("datasets")

    def given(data: list[Row]) -> Any:
        made = datasets.Dataset.from_list(data)
        return {"list": data, "dataset": made, "stream": made.to_iterable_dataset()}[kind]

    run = trainer(tmp_path, given(without_mu(1.0)), per_device_train_batch_size=8)
    run.train()
    log = run.state.log_history[0]
    expected = plain_loss(random_model(), without_mu(1.0)).item()
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert not any(math.isnan(x) for x in log.values())
    bare = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in rows()]
    with pytest.raises(ValueError, match=r"record 1 .*has no '?behavior_log_prob.* is a negative"):
        trainer(tmp_path, given(bare), per_device_train_batch_size=8).train()
    trainer(tmp_path, given(bare), per_device_train_batch_size=8, limits="sft").train()
