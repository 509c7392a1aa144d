"""What TOPRTrainer is given: types, settings, late data sets, lengths; one door for all records."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from test_trainer import config, rows
from test_trainer_data import TEXT
from tiny import random_model, tiny_config, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, TrainingArguments

from topr_kernels.hf import (
    CompletionCollator,
    TOPRTrainer,
    causal_lm_log_prob,
    causal_lm_topr_loss,
    prepare_records,
)
from topr_kernels.hf.causal_lm import _with_router_loss
from topr_kernels.hf.signature import positions
from topr_kernels.layout import IGNORE_INDEX

Row = dict[str, Any]


def make(folder: Path, data: Any = None, model: Any = None, **changes: Any) -> TOPRTrainer:
    return TOPRTrainer(
        random_model() if model is None else model,
        config(folder, **changes),
        train_dataset=rows() if data is None else data,
        processing_class=tiny_tokenizer(),
    )


# --- wrong types ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": "other"}, r"args: got a TrainingArguments; expected a TOPRConfig.*TOPRConfig\("),
        (
            {"model": "some/model"},
            r"model: got the str 'some/model'; .*from_pretrained\('some/model'",
        ),
        ({"model": None}, r"model: got None; expected a model, or model_init="),
        (
            {"model": torch.nn.DataParallel(torch.nn.Linear(1, 1))},
            r"model: got a DataParallel; expected the model in it .*Trainer wraps",
        ),
        ({"model": LlamaForCausalLM}, r"model: got a type; expected a Hugging Face causal"),
        (
            {"train_dataset": "gsm8k"},
            r"train_dataset: got the str 'gsm8k'; .*load_dataset\('gsm8k'",
        ),
        (
            {"train_dataset": {"train": rows()}},
            r"train_dataset: got a dict .*\['train'\].*data\['train'\]",
        ),
        ({"eval_dataset": "gsm8k"}, r"eval_dataset: got the str 'gsm8k'"),
        (
            {"train_dataset": Path("a.jsonl")},
            r"got the PosixPath 'a\.jsonl'; .*'json', data_files='a\.jsonl'",
        ),
        (
            {"data_collator": CompletionCollator},
            r"data_collator: got the class CompletionCollator; .*\(pad_id\)",
        ),
        ({"data_collator": {"pad": 0}}, r"data_collator: got a dict; expected an object to call"),
        ({"train_dataset": []}, r"train_dataset: has no records"),
        ({"eval_dataset": {"easy": rows(), "hard": []}}, r"eval_dataset\['hard'\]: has no records"),
        ({"tokenizer": tiny_tokenizer()}, r"tokenizer: .*pass processing_class=tokenizer"),
        ({"peft_config": object()}, r"peft_config: .*get_peft_model\(model, peft_config\)"),
        ({"reward_funcs": [len]}, r"reward_funcs: .*offline.*its reward"),
        ({"ref_model": object()}, r"ref_model: .*no KL penalty"),
    ],
)
def test_the_wrong_thing_at_the_door_is_named(tmp_path: Path, changes: Row, message: str):
    arguments: Row = {
        "model": random_model(),
        "args": config(tmp_path),
        "train_dataset": rows(),
        "processing_class": tiny_tokenizer(),
        **changes,
    }
    if arguments["args"] == "other":
        arguments["args"] = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises((TypeError, ValueError), match=message):
        TOPRTrainer(**arguments)


def test_a_data_set_of_splits_is_refused(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(rows()))
    with pytest.raises(TypeError, match=r"train_dataset: got a DatasetDict .*\['train'\]"):
        make(tmp_path, splits)


def test_arguments_may_be_left_out_as_in_trainer(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    run = TOPRTrainer(random_model(), train_dataset=rows(), processing_class=tiny_tokenizer())
    assert run.args.output_dir == "tmp_trainer" and run.args.limits.neg_max == 1


def test_a_model_may_be_made_by_a_function(tmp_path: Path):
    # Whole batches: the order of records would depend on who seeds last.
    changes = {"max_steps": 2, "per_device_train_batch_size": 8}
    passed = make(tmp_path, **changes)
    passed.train()
    arguments = {"train_dataset": rows(), "processing_class": tiny_tokenizer()}
    made = TOPRTrainer(
        args=config(tmp_path, **changes), model_init=lambda: random_model(), **arguments
    )
    made.train()
    torch.testing.assert_close(made.model.lm_head.weight, passed.model.lm_head.weight)
    assert not torch.equal(made.model.lm_head.weight, random_model().lm_head.weight)
    with pytest.raises(
        ValueError, match=r"model_init: got one with behavior='initial'.*pass model="
    ):
        TOPRTrainer(
            args=config(tmp_path, behavior="initial"),
            model_init=lambda: random_model(),
            **arguments,
        )


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_by_length_needs_the_lengths(tmp_path: Path, strategy: str):
    datasets = pytest.importorskip("datasets")
    with_length = [{**r, "length": len(r["completion_token_ids"])} for r in rows()]
    message = rf"train_sampling_strategy: got '{strategy}', .*column 'length'.*packing=True"
    for data in (rows(), with_length, datasets.Dataset.from_list(rows())):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, data, train_sampling_strategy=strategy)
    text = [{**r, "length": i} for i, r in enumerate(TEXT)]
    for data, behavior in ((with_length, "recorded"), (text, "initial")):
        data = datasets.Dataset.from_list(data)
        make(tmp_path, data, train_sampling_strategy=strategy, behavior=behavior).train()


@pytest.mark.parametrize(
    "setting",
    [
        {"include_for_metrics": ["inputs"]},
        {"batch_eval_metrics": True},
        {"label_names": ["labels"]},
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, setting: Row):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"{name}: got .* without effect.*leave it"):
        config(tmp_path, **setting)


# --- late data sets ------------------------------------------------------------------------------


def test_a_data_set_may_come_late(tmp_path: Path):
    """PITFALLS 44: the same checks and figures as for one given to the constructor."""
    late = [*TEXT[:2], {"prompt": "5+3=", "completion": "666", "reward": -1.0}]
    settings = {"behavior": "initial", "per_device_eval_batch_size": 2}
    first = TOPRTrainer(
        random_model(),
        config(tmp_path, **settings),
        train_dataset=TEXT,
        eval_dataset=late,
        processing_class=tiny_tokenizer(),
    )
    right = first.evaluate()
    tokens = prepare_records(late, tiny_tokenizer())
    for data in (late, tokens, pytest.importorskip("datasets").Dataset.from_list(late)):
        run = make(tmp_path, TEXT, **settings)
        found = run.evaluate(data), run.predict(data).metrics
        for metrics, prefix in zip(found, ("eval", "test"), strict=True):
            for name in ("loss", "objective", "length_mean", "log_ratio_negative_mean"):
                assert metrics[f"{prefix}_{name}"] == pytest.approx(right[f"eval_{name}"], abs=1e-6)
    for bad in ([{**late[0], "reward": math.nan}], [{**late[0], "completion_mask": [1, 2]}]):
        with pytest.raises(ValueError, match="record 0, field"):
            run.predict(bad)
    run.train()
    with pytest.raises(
        ValueError, match=r"test_dataset: got .* after 1 steps .*'initial'.*constructor"
    ):
        run.predict(late)
    # Its own, by name or not, it has scored.
    assert math.isfinite(run.evaluate(run.train_dataset)["eval_loss"])


def test_records_say_at_which_temperature_they_were_sampled(tmp_path: Path):
    data = [{**row, "temperature": 0.7} for row in rows(4)]
    run = make(tmp_path, data, temperature=0.7)
    with pytest.raises(ValueError, match="record 1, field 'temperature': got 1"):
        run.evaluate([data[0], {**data[1], "temperature": 1.0}])
    with pytest.raises(ValueError, match=r"record 0, field 'temperature': got 0\.7"):
        make(tmp_path, data)
    without = [{**row, "behavior_log_prob": None} for row in data]
    make(tmp_path, without, temperature=0.7, behavior="initial")
    with pytest.raises(ValueError, match=r"field 'temperature': got 0\.7.*scoring"):
        make(tmp_path, without, behavior="initial")


def test_late_records_bring_their_log_mu(tmp_path: Path):
    run = make(tmp_path)
    run.train()
    assert math.isfinite(run.evaluate(rows(4, seed=3))["eval_loss"])
    with pytest.raises(ValueError, match="record 1 has no behavior_log_prob"):
        run.evaluate(TEXT)
    named = {"easy": rows(4), "hard": rows(4, seed=1)}
    assert {"eval_easy_loss", "eval_hard_loss"} <= set(run.evaluate(named))


# --- lengths -------------------------------------------------------------------------------------


def long_rows(prompt: int) -> list[Row]:
    return [
        {
            "prompt_token_ids": [5] * n,
            "completion_token_ids": [6, 7, 0],
            "behavior_log_prob": [-1.0] * 3,
            "reward": reward,
        }
        for n, reward in ((3, 1.0), (prompt, -1.0))
    ]


def gpt2() -> Any:
    changes = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    size = {"vocab_size": 102, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, **ends, **changes))


@pytest.mark.parametrize("kind", ["learned", "rotary"])
def test_records_longer_than_the_models_positions(tmp_path: Path, kind: str):
    model = (
        gpt2() if kind == "learned" else LlamaForCausalLM(tiny_config(max_position_embeddings=32))
    )
    message = r"record 1: has 30 tokens of prompt and 3 of .* at most 32 .*truncate='prompt_left'"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, long_rows(30), model)
    make(tmp_path, long_rows(29), model).train()
    run = make(tmp_path, long_rows(30), model, truncate="prompt_left")
    assert [len(r["prompt_token_ids"]) for r in run.train_dataset] == [3, 29]
    run.train()
    with pytest.raises(ValueError, match=r"record 1: has 10 .* at most 8 together"):
        make(tmp_path, long_rows(10), model, max_length=8)
    with pytest.raises(ValueError, match="max_length: got 33, but the model has 32 positions"):
        make(tmp_path, long_rows(10), model, max_length=33)
    with pytest.raises(ValueError, match=r"record 1: has 30 tokens"):
        make(tmp_path, long_rows(10), model).evaluate(long_rows(30))


def test_scaled_rotary_positions_count():
    assert positions(random_model()) == 1024
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    scaled = LlamaForCausalLM(tiny_config(rope_parameters={**yarn, "rope_theta": 1e4}))
    assert positions(scaled) == 4096
    assert positions(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("value", [True, "8", 1, 0])
def test_a_length_is_a_number_of_tokens(tmp_path: Path, value: Any):
    with pytest.raises(
        (TypeError, ValueError), match=r"max_length: (expected an int|got .* at least 2)"
    ):
        config(tmp_path, max_length=value)
    with pytest.raises(ValueError, match="truncate: expected"):
        config(tmp_path, truncate="prompt")


def test_ids_that_the_model_does_not_know_are_named(tmp_path: Path):
    data = rows()
    data[3]["completion_token_ids"][0] = 102
    with pytest.raises(ValueError, match=r"record 3, field 'completion_token_ids': got the id 102"):
        make(tmp_path, data)


# --- one door ------------------------------------------------------------------------------------


def test_every_way_to_give_records_trains_to_the_same_weights(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    base = rows(8)
    data = datasets.Dataset.from_list(base)
    floats = [{**r, "prompt_token_ids": [float(x) for x in r["prompt_token_ids"]]} for r in base]
    tensors = [{k: torch.tensor(x) for k, x in r.items()} for r in base]
    ways: list[Any] = [base, data, floats, tensors, datasets.Dataset.from_list(floats)]
    ways += [data.with_format(name) for name in ("torch", "numpy", "arrow", "pandas")]
    found = []
    for way in ways:
        run = make(tmp_path, way, max_steps=2, per_device_train_batch_size=4)
        run.train()
        found.append(run.model.lm_head.weight)
    assert not torch.equal(found[0], random_model().lm_head.weight)
    assert all(torch.equal(x, found[0]) for x in found[1:])


MODEL = random_model()
LENGTH = st.integers(1, 6)
ID = st.integers(0, 101)


@st.composite
def records(draw: Any) -> list[Row]:
    result = []
    for _ in range(draw(st.integers(1, 4))):
        completion = draw(st.lists(ID, max_size=5))
        mu = st.floats(-8, 0, width=32)
        record: Row = {
            "prompt_token_ids": draw(st.lists(ID, min_size=1, max_size=6)),
            "completion_token_ids": completion,
            "behavior_log_prob": [draw(mu) for _ in completion],
            "reward": draw(st.floats(-2, 2, width=32)),
        }
        if draw(st.booleans()):
            record["completion_mask"] = [draw(st.integers(0, 1)) for _ in completion]
        result.append(record)
    return result


def log_probs(data: Any, *, size: int, **layout: bool) -> list[float]:
    """Of every completion token, record by record."""
    collate, found = CompletionCollator(0, **layout), []
    batch = list(data)
    for start in range(0, len(batch), size):
        part = collate(batch[start : start + size])
        out = causal_lm_log_prob(MODEL, part).log_prob
        kept = part["labels"][:, -out.shape[1] :].ne(IGNORE_INDEX)
        found += out[kept].tolist()
    return found


def plain_log_probs(data: list[Row]) -> list[float]:
    """The same in plain torch: each sequence alone, labels of -100 where the policy did not write."""
    found = []
    for record in data:
        prompt, completion = record["prompt_token_ids"], record["completion_token_ids"]
        if not completion:
            continue
        logits = MODEL(input_ids=torch.tensor([prompt + completion])).logits[
            0, len(prompt) - 1 : -1
        ]
        mask = torch.tensor(record.get("completion_mask", [1] * len(completion)))
        labels = torch.tensor(completion).masked_fill(mask == 0, -100)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        found += (-loss[labels != -100]).tolist()
    return found


@settings(max_examples=15)
@given(data=records())
@pytest.mark.filterwarnings("ignore:.*is all zeros")
def test_a_record_has_the_same_log_probs_however_it_comes(data: list[Row]):
    """List, data set, stream and formats; padded and packed; alone and with others."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "prompt_token_ids": datasets.List(datasets.Value("int64")),
            "completion_token_ids": datasets.List(datasets.Value("int64")),
            "behavior_log_prob": datasets.List(datasets.Value("float32")),
            "reward": datasets.Value("float32"),
            "completion_mask": datasets.List(datasets.Value("int8")),
        }
    )
    filled = [{"completion_mask": None, **r} for r in data]
    table = datasets.Dataset.from_list(filled, features=features)
    expected = plain_log_probs(data)
    assert log_probs(prepare_records(data, None), size=1) == pytest.approx(expected, abs=1e-5)
    ways = [data, table, table.to_iterable_dataset()]
    ways += [table.with_format(name) for name in ("torch", "numpy", "arrow")]
    for way in ways:
        prepared = list(prepare_records(way, None))
        for layout in ({}, {"packing": True}, {"share_prefix": True}):
            found = log_probs(prepared, size=len(data), **layout)
            assert found == pytest.approx(expected, abs=1e-5)


#: A model and its output with a router's balancing loss.
ROUTED = SimpleNamespace(config=None, router_aux_loss_coef=0.1, aux_loss=torch.tensor(2.0))


def test_a_default_dtype_changes_no_loss():
    """Of the user's: the numbers of records, and shares of counts, have types of their own."""
    data = rows(6)
    for i, r in enumerate(data):
        r["reward"] = 0.1 * i - 0.3
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            batch = CompletionCollator(0)(data)
            for fused in (True, False):
                out = causal_lm_topr_loss(
                    MODEL, batch, fused_head=fused, normalizer=7, baseline=0.05
                )
                out = _with_router_loss(out, ROUTED, ROUTED, "sequence_mean", 7)
                found.append((out.loss.item(), out.loss.dtype, out.weight.tolist()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[2:4] == found[:2] and found[4:] == found[:2]


def test_a_collator_takes_the_temperature_of_the_arguments(tmp_path: Path):
    args = config(tmp_path, temperature=0.7)
    data = {"train_dataset": rows(), "processing_class": tiny_tokenizer()}
    own = CompletionCollator(0)
    TOPRTrainer(random_model(), args, data_collator=own, **data)
    assert own.temperature == 0.7
    other = CompletionCollator(0, temperature=0.5)
    with pytest.raises(ValueError, match=r"data_collator has 0\.5, the arguments 0\.7"):
        TOPRTrainer(random_model(), args, data_collator=other, **data)
