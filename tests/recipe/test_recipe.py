"""Records, tasks, generation, scoring and evaluation of the recipe."""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import random_model, save, tiny_config, tiny_model, tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from topr_kernels.recipe import (
    Record,
    RecordError,
    Sampling,
    Task,
    TrainSettings,
    complete,
    evaluate,
    generate,
    held_out_split,
    load_model,
    max_log_ratio,
    read_records,
    score,
    subsample_negatives,
    train,
    wilson_interval,
    write_records,
)
from topr_kernels.recipe import generate as generate_function
from topr_kernels.recipe.files import atomic_folder, write_json
from topr_kernels.recipe.generate import read_prompts, stop_token_ids
from topr_kernels.recipe.record_checks import check_positions
from topr_kernels.recipe.tasks import canonical_number

DIGITS = Task(
    "chain_sum",
    {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    examples=(("2 + 3 =", "5"), ("4 + 4 =", "8")),
)
SAMPLING = Sampling("tiny", 1.0, 0, 1.0, 6, 7)


def saved(folder: Path, **changes: Any) -> tuple[Path, Any]:
    """A random model and its tokenizer in a folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes))
    save(model, folder)
    return folder, model


def test_a_model_is_trained_without_dropout(tmp_path: Path):
    """Scored without and trained with it, every ratio would be noise."""
    folder, model = saved(tmp_path / "model", attention_dropout=0.5)
    ids = torch.arange(12).view(1, 12)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    loaded = load_model(str(folder)).model.train()
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("change", ["absent", "other shape"])
def test_a_model_without_all_its_weights_is_refused(tmp_path: Path, change: str):
    """transformers makes up what is missing."""
    from safetensors.torch import load_file, save_file

    folder, _ = saved(tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    if change == "other shape":
        weights["lm_head.weight"] = head[:, :8].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head\.weight"):
        load_model(str(folder))


def test_what_counts_as_the_number_of_an_answer():
    question = DIGITS.questions(1, seed=0)[0]
    parsed = [DIGITS.parse(f" {text}\n", "stop", question) for text in ("7", "1,000", "-3.5")]
    assert parsed == ["7", "1,000", "-3.5"]
    assert [DIGITS.parse(f" {x}\n", "stop", question) for x in (".5", "1/2", "1e5")] == [None] * 3


def test_an_answer_that_is_hard_to_reckon_is_no_number():
    start = time.perf_counter()
    for text in ("1e9999999", "9" * 10_000_000, "1/" + "9" * 5_000_000):
        assert canonical_number(text) is None
    assert time.perf_counter() - start < 1
    found = [canonical_number(x) for x in ("1,200.50", " -3/6 ", ".5", "2e3", "0x10", "1_000", "")]
    assert found == ["2401/2", "-1/2", "1/2", "2000", None, None, None]


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "group": 3,
        "prompt": "1 + 1 =",
        "completion": " 2\n",
        "prompt_token_ids": [5, 6, 7],
        "completion_token_ids": [8, 9],
        "reward": 1.0,
        "finish_reason": "stop",
        "sampling": SAMPLING,
        # Exactly representable in fp32, which Parquet stores.
        "behavior_log_prob": [-0.5, -1.25],
    }
    return Record(**{**values, **changes})


def test_records_longer_than_the_model_are_named():
    check_positions([record()], 5)
    check_positions([record(prompt_token_ids=[1] * 99)], None)
    with pytest.raises(RecordError, match=r"record 1: has 6 tokens .* 5 positions; leave it out"):
        check_positions([record(), record(prompt_token_ids=[5, 6, 7, 8])], 5)


# --- records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_records_survive_a_round_trip(tmp_path: Path, suffix: str):
    records = [
        record(),
        record(behavior_log_prob=None, completion="été, 7\n", reward=-1.0),
        record(completion_token_ids=[], behavior_log_prob=[], finish_reason="length"),
    ]
    path = tmp_path / f"records.{suffix}"
    write_records(path, records)
    assert read_records(path) == records
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_scored_log_probs_are_stored_exactly(tmp_path: Path, suffix: str):
    # A token that was certain has 0.
    values = [0.0, -torch.rand(()).item()]
    path = tmp_path / f"records.{suffix}"
    write_records(path, [record(behavior_log_prob=values)])
    assert read_records(path)[0].behavior_log_prob == values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward", None),
        ("reward", float("nan")),
        ("reward", "1"),
        ("group", -1),
        ("group", True),
        ("prompt", 3),
        ("prompt_token_ids", []),
        ("prompt_token_ids", [1.5]),
        ("completion_token_ids", "abc"),
        ("finish_reason", "eos"),
        ("behavior_log_prob", [-1.0]),
        ("behavior_log_prob", [-1.0, float("nan")]),
        ("behavior_log_prob", [-1.0, float("-inf")]),
        ("behavior_log_prob", [-1.0, 0.5]),
        ("sampling", None),
        ("sampling", {"model": "tiny"}),
        pytest.param("reward", 10**400, id="reward-long"),
        ("group", 2**63),
        ("completion_token_ids", [2**31, 1]),
        ("completion", "\ud800"),
    ],
)
def test_bad_records_are_refused_by_record_and_field(tmp_path: Path, field: str, value: Any):
    rows = [record().to_dict(), {**record().to_dict(), field: value}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecordError, match=rf"data\.jsonl, record 1, field '{field}"):
        read_records(path)


def test_missing_unknown_and_half_written_are_refused(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    row = record().to_dict()
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "reward"}))
    with pytest.raises(RecordError, match=r"record 0, field 'reward': missing"):
        read_records(path)
    path.write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 4", "reward": 1.0}))
    # All that are missing, not one a run.
    names = r"'completion_token_ids', and 'finish_reason', 'group', 'prompt_token_ids', 'sampling'"
    with pytest.raises(RecordError, match=names + r": missing; .*`topr generate`.*TOPRTrainer"):
        read_records(path)
    path.write_text(json.dumps({**row, "rewards": 1}))
    with pytest.raises(RecordError, match=r"record 0, field 'rewards': unknown"):
        read_records(path)
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:40])
    with pytest.raises(RecordError, match=r"data\.jsonl, record 1: not a line of JSON"):
        read_records(path)
    path.write_text(json.dumps(row) + "\n" + '{"reward": 1, "reward": -1}')
    with pytest.raises(RecordError, match=r"data\.jsonl, record 1: .*'reward' is there twice"):
        read_records(path)
    for line in ("9" * 5_000, "[" * 100_000):
        path.write_text(json.dumps(row) + "\n" + line)
        with pytest.raises(RecordError, match=r"data\.jsonl, record 1: (JSON that|not a line)"):
            read_records(path)
    damaged = tmp_path / "data.parquet"
    write_records(damaged, [record()])
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(RecordError, match=r"data\.parquet: not a Parquet file"):
        read_records(damaged)
    with pytest.raises(ValueError, match=r"path: got 'data.csv'"):
        read_records(tmp_path / "data.csv")


FOREIGN: dict[str, dict[str, Any]] = {
    "polars": {"prompt": pa.large_string(), "prompt_token_ids": pa.large_list(pa.int64())},
    "views": {"prompt": pa.string_view(), "completion_token_ids": pa.large_list(pa.uint16())},
    "duckdb": {"group": pa.float64(), "reward": pa.decimal128(2, 1)},
    "categories": {"finish_reason": pa.dictionary(pa.int8(), pa.string()), "group": pa.int8()},
    "half": {"reward": pa.float32(), "behavior_log_prob": pa.list_(pa.float64())},
}


@pytest.mark.parametrize("tool", list(FOREIGN))
def test_records_that_another_tool_has_written(tool: str, tmp_path: Path):
    # A folder of this name is no column.
    path = tmp_path / "seed=3" / "records.parquet"
    records = [record(), record(behavior_log_prob=None, reward=-1.0, finish_reason="length")]
    write_records(path, records)
    table = pq.read_table(path, partitioning=None)
    for name, kind in FOREIGN[tool].items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, table[i].cast(kind))
    index = pa.array([7, 3])
    pq.write_table(table.append_column("__index_level_0__", index), path)
    assert read_records(path) == records
    pq.write_table(table.append_column("extra", index), path)
    with pytest.raises(RecordError, match="record 0, field 'extra': unknown"):
        read_records(path)


def test_records_that_pandas_and_datasets_have_written(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "records.parquet"
    records = [record(), record(group=4, reward=-1.0), record(behavior_log_prob=None)]
    write_records(path, records)
    frame = pandas.read_parquet(path)
    for changed in (
        frame,
        frame.astype({"finish_reason": "category", "group": "float32", "reward": "int8"}),
        frame.iloc[[2, 0, 1]].sort_values("group", kind="stable"),
        frame.set_index("group"),
        frame.set_index(pandas.Index(["a", "b", "c"], name="mine")),
    ):
        changed.to_parquet(path)
        assert sorted(map(repr, read_records(path))) == sorted(map(repr, records))
    datasets.Dataset.from_list([r.to_dict() for r in records]).to_parquet(path)
    assert read_records(path) == records


def test_records_of_other_editors_are_read(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(record(group=i).to_dict()) for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n \r\n")
    assert read_records(path) == [record(group=i) for i in range(3)]


def test_decimals_inside_of_columns_are_numbers(tmp_path: Path):
    """DuckDB writes {'temperature': 1.0} and [-0.5, 0.0] so."""
    path = tmp_path / "records.parquet"
    rows = [record(behavior_log_prob=[-0.5, 0.0]).to_dict()]
    del rows[0]["judged"]
    rows[0]["sampling"]["temperature"] = Decimal("1.0")
    rows[0]["behavior_log_prob"] = [Decimal("-0.5"), Decimal("0.0")]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert pa.types.is_decimal(
        pq.read_schema(path).field("sampling").type.field("temperature").type
    )
    assert read_records(path) == [record(behavior_log_prob=[-0.5, 0.0])]


def test_a_gap_of_a_column_is_a_field_that_is_not_there(tmp_path: Path):
    """Columns have every field in every row, also those that a record leaves out."""
    row = {**record().to_dict(), "behavior_source": None, "judged": None}
    row["sampling"] = {**row["sampling"], "weights": None}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    assert read_records(tmp_path / "data.jsonl") == [record()]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    write_records(path, [record()])
    with pytest.raises(RecordError, match="record 1, field 'reward'"):
        write_records(path, [record(), record(reward=float("inf"))])
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "new.json", {"x": float("nan")})
    assert read_records(path) == [record()]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unscored_records_do_not_train(tmp_path: Path):
    records = [record(behavior_log_prob=None), record(behavior_log_prob=None, reward=-1.0)]
    message = (
        r"record 1, field 'behavior_log_prob': missing \(a reward of -1 .* negative.*run score"
    )
    with pytest.raises(RecordError, match=message):
        train(random_model(), tiny_tokenizer(), records, TrainSettings(), checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("positives", "negatives", "share", "kept"),
    [(3, 17, 0.5, 6), (3, 17, 0.25, 12), (3, 17, 1.0, 3), (3, 3, 0.25, 6), (0, 5, 0.5, 5)],
)
def test_subsampling_keeps_every_positive(positives: int, negatives: int, share: float, kept: int):
    records = [
        record(group=i, reward=1.0 if i < positives else -1.0) for i in range(positives + negatives)
    ]
    chosen = subsample_negatives(records, share, seed=0)
    assert len(chosen) == kept
    assert sum(r.reward > 0 for r in chosen) == positives
    assert [r.group for r in chosen] == sorted({r.group for r in chosen})
    assert chosen == subsample_negatives(records, share, seed=0)
    with pytest.raises(ValueError, match="positive_share: got 0"):
        subsample_negatives(records, 0, seed=0)


# --- tasks -----------------------------------------------------------------------------------


def test_the_scorer_is_the_data_sets_own():
    question = DIGITS.questions(1, seed=0)[0]
    answer = str(question.entry["answer"])
    assert DIGITS.reward(answer, question) == 1.0
    assert DIGITS.reward(str(int(answer) + 1), question) == -1.0
    assert DIGITS.reward(None, question) == -1.0


@pytest.mark.parametrize(
    ("completion", "reason", "answer"),
    [
        (" 12\n", "stop", "12"),
        ("-3", "stop", "-3"),
        (" 12", "length", None),
        ("\n", "stop", None),
        (" twelve\n", "stop", None),
        (" 12 = 12\n", "stop", None),
    ],
)
def test_unreadable_answers_are_none(completion: str, reason: str, answer: str | None):
    question = DIGITS.questions(1, seed=0)[0]
    assert DIGITS.parse(completion, reason, question) == answer


def test_prompts_are_the_examples_and_the_bare_problem():
    question = DIGITS.questions(1, seed=0)[0]
    assert question.prompt == "2 + 3 = 5\n4 + 4 = 8\n" + question.text
    assert question.text.endswith("=") and "State" not in question.text


def test_held_out_questions_are_disjoint_distinct_and_independent_of_the_training_set():
    for seed in range(3):
        train_set, test = held_out_split(DIGITS, 60, 40, seed)
        texts = [q.text for q in train_set + test]
        assert len(set(texts)) == 100
        assert not {"2 + 3 =", "4 + 4 ="} & set(texts)
        assert held_out_split(DIGITS, 10, 40, seed)[1] == test
    assert held_out_split(DIGITS, 5, 5, 0) != held_out_split(DIGITS, 5, 5, 1)


def test_too_many_questions_are_refused():
    with pytest.raises(ValueError, match=r"count: chain_sum gave only 1\d\d distinct"):
        DIGITS.questions(1000, seed=0)


def test_any_reasoning_gym_data_set_will_do():
    task = Task("fraction_simplification")
    question = task.questions(3, seed=1)[2]
    assert question.prompt.count("Question: ") == 4 and question.prompt.endswith("Answer:")
    answer = task.parse(f" {question.entry['answer']}\n", "stop", question)
    assert task.reward(answer, question) == 1.0
    with pytest.raises(ValueError, match="refused 'no_such_task'"):
        Task("no_such_task")


# --- generation ------------------------------------------------------------------------------


def sampled(shards: Path | None = None, seed: int = 0, model: Any = None) -> list[Record]:
    return generate(
        tiny_model() if model is None else model,
        tiny_tokenizer(),
        DIGITS,
        DIGITS.questions(12, seed=5),
        model_name="tiny",
        samples=4,
        max_new_tokens=6,
        batch_size=16,
        seed=seed,
        shards=shards,
    )


def test_generation_is_seeded_and_leaves_the_callers_random_numbers_alone():
    model = tiny_model()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    records = sampled(model=model)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(1)
    assert sampled() == records
    assert sampled(seed=1) != records
    assert len(records) == 48
    assert [r.group for r in records] == [i // 4 for i in range(48)]
    assert {r.reward for r in records} == {1.0, -1.0}


def test_an_interrupted_generation_resumes_with_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = sampled()
    module = __import__(generate_function.__module__, fromlist=["complete"])
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    monkeypatch.setattr(module, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["batch-00000.parquet", "batch-00000.verdicts.json"]
    assert sampled(tmp_path) == whole
    # The first batch was not sampled again.
    assert len(calls) == 4 and calls[0] not in calls[1:]


def test_a_damaged_shard_is_named(tmp_path: Path):
    sampled(tmp_path)
    (tmp_path / "batch-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordError, match=r"batch-00001\.parquet: not a Parquet file"):
        sampled(tmp_path)


@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.9},
        {"suppress_tokens": list(range(2, 100))},
        {"num_beams": 4},
        {"min_new_tokens": 6, "typical_p": 0.1},
    ],
)
def test_the_models_own_settings_do_not_change_the_sampler(own: dict[str, Any]):
    """The full softmax is what is sampled, whatever the model was published with."""
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "stop_ids": [0]}
    model = tiny_model()
    plain = complete(model, tiny_tokenizer(), ["1 + 2 ="] * 40, **options)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config
    assert complete(model, tiny_tokenizer(), ["1 + 2 ="] * 40, **options) == plain
    assert model.generation_config is settings


@pytest.mark.parametrize("max_new_tokens", [1, 2, 6])
def test_a_stop_token_ends_a_completion_only_where_it_was_sampled(max_new_tokens: int):
    """PITFALLS 32."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    stops = set(stop_token_ids(tokenizer))
    assert stops == {tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]}
    completions = complete(
        model,
        tokenizer,
        [q.prompt for q in DIGITS.questions(32, seed=5)],
        max_new_tokens=max_new_tokens,
        temperature=2.0,
        seed=0,
        stop_ids=sorted(stops),
    )
    for completion in completions:
        *body, last = completion.token_ids
        assert not stops & set(body)
        assert (last in stops) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == max_new_tokens or last in stops
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    reasons = {completion.finish_reason for completion in completions}
    assert reasons == ({"stop", "length"} if max_new_tokens == 6 else reasons)


def test_prompts_of_different_lengths_complete_as_they_do_alone():
    """Left padding and the shared prefix change nothing: greedy completions are those of one."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    prompts = ["2 + 3 = 5\n1 + 1 =", "2 + 3 = 5\n4 - 1 = 3\n2 + 2 =", "2 + 3 = 5\n9"]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    options["stop_ids"] = stop_token_ids(tokenizer)
    alone = [complete(model, tokenizer, [p], **options)[0] for p in prompts]
    assert complete(model, tokenizer, prompts, **options) == alone
    model.config.layer_types = ["sliding_attention"] * 2
    unshared = LlamaForCausalLM(tiny_config()).eval()
    unshared.load_state_dict(model.state_dict())
    assert complete(unshared, tokenizer, prompts, **options) == alone


def tokens_read(model: Any) -> list[int]:
    """Tokens of each forward pass that the model makes from now on."""
    read: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return read


def test_equal_prompts_are_read_once():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    distinct = ["2 + 3 = 5\n1 + 1 =", "2 + 3 = 5\n4 - 1 = 3\n2 + 2 =", "2 + 3 = 5\n9"]
    # Not side by side, and not equally often.
    prompts = [distinct[i] for i in (2, 0, 1, 0, 2, 2, 0, 0)]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    options["stop_ids"] = stop_token_ids(tokenizer)
    alone = {p: complete(model, tokenizer, [p], **options)[0] for p in distinct}
    # What the model makes of padding is looked at once.
    read_prompts(model, tokenizer, prompts)
    read = tokens_read(model)
    assert complete(model, tokenizer, prompts, **options) == [alone[p] for p in prompts]
    lengths = [len(alone[p].prompt_token_ids) for p in distinct]
    prefix, rest, *last = read
    assert rest == 3 * (max(lengths) - prefix - 1)
    assert set(last) == {len(prompts)}


def test_prompts_are_completed_several_times_from_one_reading():
    """What is generated from the keys and values must not stay in them."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    prompts = [q.prompt for q in DIGITS.questions(8, seed=5)]
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": stop_token_ids(tokenizer)}
    ways = [{"temperature": t, "seed": seed} for t, seed in ((0.0, 0), (2.0, 1), (2.0, 2))]
    fresh = [complete(model, tokenizer, prompts, **options, **way) for way in ways]
    reading = read_prompts(model, tokenizer, prompts)
    assert [complete(model, tokenizer, reading, **options, **way) for way in ways] == fresh


def test_an_evaluation_reads_each_question_once():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    questions = DIGITS.questions(8, seed=5)
    read = tokens_read(model)
    evaluate(model, tokenizer, DIGITS, questions, max_new_tokens=6, batch_size=4, seed=0)
    # Two batches: the prefix once, the rest once; all else is one token a row.
    assert sum(tokens > 4 for tokens in read) == 4


# --- scoring ---------------------------------------------------------------------------------


def test_scores_are_the_log_probs_of_the_full_softmax():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    records = sampled(model=model)
    scored = score(model, records, pad_token_id=tokenizer.pad_token_id, batch_size=5)
    for r in scored:
        row = torch.tensor([r.prompt_token_ids + r.completion_token_ids])
        with torch.no_grad():
            logits = model(row).logits[0, len(r.prompt_token_ids) - 1 : -1].double()
        tokens = torch.tensor(r.completion_token_ids)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(r.behavior_log_prob).double(), expected, rtol=0, atol=1e-5
        )
    unscored = {"behavior_log_prob": None, "behavior_source": ""}
    assert {r.behavior_source for r in scored} == {"score"}
    assert [dataclasses.replace(r, **unscored) for r in scored] == records


def test_scores_are_taken_at_the_sampling_temperature():
    model, pad = tiny_model(), tiny_tokenizer().pad_token_id
    records = sampled(model=model)[:6]
    # Mixed in one batch, to be told apart.
    warm = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=t))
        for r, t in zip(records, (1.0, 0.5, 1.0, 2.0, 0.5, 1.0), strict=True)
    ]
    scored = score(model, warm, pad_token_id=pad, batch_size=6)
    for r in scored:
        row = torch.tensor([r.prompt_token_ids + r.completion_token_ids])
        with torch.no_grad():
            logits = model(row).logits[0, len(r.prompt_token_ids) - 1 : -1].double()
        tokens = torch.tensor(r.completion_token_ids)
        expected = (logits / r.sampling.temperature).log_softmax(-1).gather(1, tokens[:, None])
        torch.testing.assert_close(
            torch.tensor(r.behavior_log_prob).double(), expected[:, 0], rtol=0, atol=1e-5
        )
    plain = score(model, records, pad_token_id=pad, batch_size=6)
    difference = sum(plain[1].behavior_log_prob) - sum(scored[1].behavior_log_prob)
    assert abs(difference) > 0.01
    assert max_log_ratio(model, scored, pad_token_id=pad, batch_size=6) == 0


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("top_k", 5), ("top_p", 0.9)])
def test_samples_of_another_policy_than_the_full_softmax_are_not_scored(field: str, value: float):
    odd = record(sampling=dataclasses.replace(SAMPLING, **{field: value}))
    with pytest.raises(RecordError, match=rf"record 1, field 'sampling.{field}': got {value}"):
        score(tiny_model(), [record(), odd], pad_token_id=0, batch_size=2)


def test_log_ratio_is_zero_before_the_first_update_and_not_after():
    model, pad = tiny_model(), tiny_tokenizer().pad_token_id
    scored = score(model, sampled(model=model), pad_token_id=pad, batch_size=8)
    assert max_log_ratio(model, scored, pad_token_id=pad, batch_size=8) == 0
    assert max_log_ratio(model, scored[::-1], pad_token_id=pad, batch_size=3) < 1e-5
    assert max_log_ratio(random_model(), scored, pad_token_id=pad, batch_size=8) > 0.1


def test_scores_are_those_of_the_logits():
    """The fused head against the model's own logits, with a softcap and several temperatures."""
    size = {k: v for k, v in tiny_config().to_dict().items() if k != "model_type"}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**{**size, "final_logit_softcapping": 2.0})).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    records = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=t))
        for r, t in zip(sampled()[:4], (1.0, 0.5, 1.0, 2.0), strict=True)
    ]
    for r in score(model, records, pad_token_id=0, batch_size=4):
        row = torch.tensor([r.prompt_token_ids + r.completion_token_ids])
        with torch.no_grad():
            logits = model(row).logits[0, len(r.prompt_token_ids) - 1 : -1].double()
        tokens = torch.tensor(r.completion_token_ids)
        expected = (logits / r.sampling.temperature).log_softmax(-1).gather(1, tokens[:, None])
        torch.testing.assert_close(
            torch.tensor(r.behavior_log_prob).double(), expected[:, 0], rtol=0, atol=1e-5
        )


# --- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored() -> list[Record]:
    model, pad = tiny_model(), tiny_tokenizer().pad_token_id
    return score(model, sampled(model=model), pad_token_id=pad, batch_size=8)


SETTINGS = TrainSettings(learning_rate=1e-3, batch_size=8, epochs=2, save_steps=4)


def test_training_starts_on_policy_and_moves_both_signs(scored: list[Record], tmp_path: Path):
    model = tiny_model()
    settings = TrainSettings(learning_rate=1e-3, batch_size=48, epochs=6, baseline=-0.7)
    history = train(model, tiny_tokenizer(), scored, settings, checkpoints=tmp_path)
    assert len(history) == 6
    assert history[0]["weight_negative_mean"] == pytest.approx(1, abs=1e-4)
    assert abs(history[0]["log_ratio_negative_min"]) < 1e-5
    assert history[-1]["weight_negative_mean"] < 0.999
    pad = tiny_tokenizer().pad_token_id
    gain = {1.0: 0.0, -1.0: 0.0}
    for before, after in zip(
        scored, score(model, scored, pad_token_id=pad, batch_size=8), strict=True
    ):
        gain[before.reward] += sum(after.behavior_log_prob) - sum(before.behavior_log_prob)
    assert gain[1.0] > 0 > gain[-1.0]


def test_scoring_and_training_use_one_workspace(
    scored: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only then is the log-ratio of equal hidden states exactly 0."""
    found = []

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            found.append(kwargs["workspace_bytes"])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, called)

    causal_lm = importlib.import_module("topr_kernels.hf.causal_lm")
    spy(causal_lm, "linear_log_prob")
    spy(causal_lm, "linear_topr_loss")
    model = tiny_model()
    score(model, scored[:4], pad_token_id=0, batch_size=4)
    train(model, tiny_tokenizer(), scored[:8], TrainSettings(), checkpoints=tmp_path)
    # Scored; looked at for noise, in train and in eval mode; learnt from.
    assert len(found) == 4 and len(set(found)) == 1 and found[0] is not None


def test_a_killed_training_resumes_to_the_same_weights(
    scored: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = tiny_tokenizer()
    whole = tiny_model()
    history = train(whole, tokenizer, scored, SETTINGS, checkpoints=tmp_path / "whole")
    from topr_kernels.hf import TOPRTrainer

    training_step = TOPRTrainer.training_step

    def killed(self: TOPRTrainer, *args: Any) -> Any:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return training_step(self, *args)

    monkeypatch.setattr(TOPRTrainer, "training_step", killed)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), tokenizer, scored, SETTINGS, checkpoints=folder)
    monkeypatch.undo()
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    # A second kill, in the middle of writing a checkpoint: the Trainer writes its state last.
    (folder / "checkpoint-8").mkdir()
    resumed = tiny_model()
    again = train(resumed, tokenizer, scored, SETTINGS, checkpoints=folder)
    assert [e["objective"] for e in again] == [e["objective"] for e in history]
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


# --- evaluation ------------------------------------------------------------------------------


def test_wilson_interval():
    # Textbook values, and the ends stay inside [0, 1].
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_evaluation_counts_right_wrong_and_unreadable():
    questions = DIGITS.questions(20, seed=9)
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 7, "seed": 0}
    found = evaluate(tiny_model(), tokenizer, DIGITS, questions, **options)
    assert found == evaluate(tiny_model(), tokenizer, DIGITS, questions, **options)
    assert found.greedy.questions == found.sampled.questions == 20
    assert found.greedy.low <= found.greedy.accuracy <= found.greedy.high
    assert 2 <= found.greedy.mean_length <= 6
    babble = evaluate(random_model(), tokenizer, DIGITS, questions, **options)
    assert babble.sampled.invalid_share > 0.9 and babble.sampled.correct == 0
    with pytest.raises(ValueError, match="questions: got none"):
        evaluate(random_model(), tokenizer, DIGITS, [], **options)


# --- models ----------------------------------------------------------------------------------


def test_a_local_folder_loads_by_its_name(tmp_path: Path):
    folder = tmp_path / "my-model"
    save(random_model(), folder)
    loaded = load_model(str(folder))
    assert loaded.name == "my-model" and loaded.remark == ""
    assert loaded.tokenizer("1 + 1 =\n")["input_ids"] == tiny_tokenizer()("1 + 1 =\n")["input_ids"]
    assert not loaded.model.training
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json and 0 GGUF files"):
        load_model(str(tmp_path / "empty"))
