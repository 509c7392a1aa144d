"""Fields of a record: those that mean something are honoured or refused, alike at every entrance."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from test_data import chat, ids, prepare, text, tokenizer
from tiny import EOS

from topr_kernels import SFT
from topr_kernels.hf import CompletionCollator, data, prepare_records, score_behavior
from topr_kernels.hf.tokenise import Reader

Row = dict[str, Any]
MU = [-1.0, -2.0, -0.5]


def tokens(**changes: Any) -> Row:
    record = {
        "prompt_token_ids": [5, 6],
        "completion_token_ids": [7, 8, 0],
        "behavior_log_prob": MU,
        "reward": -1.0,
    }
    return {**record, **changes}


def equal(a: Row, b: Row) -> bool:
    return set(a) == set(b) and all(
        torch.equal(x, b[k]) if isinstance(x, torch.Tensor) else x == b[k] for k, x in a.items()
    )


MASKS = [
    "completion_mask",
    "attention_mask",
    "loss_mask",
    "response_mask",
    "assistant_masks",
    "tool_mask",
    "action_mask",
    "mask",
]


# --- what means something ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        *((name, [1, 0, 1], "rename the field") for name in MASKS[2:]),
        ("attention_mask", [1, 0, 1], "leave it out"),
        ("loss_mask", [0, 0, 1, 0, 1], "1 where the policy wrote it; rename .*leave out .*prompt"),
        ("labels", [7, -100, 0], "said by completion_mask.*rename the field"),
        ("input_ids", [5, 6, 7, 8, 1], "correct it"),
        ("position_ids", [3, 4, 5, 6, 7], "drop the field"),
        ("token_type_ids", [0, 0, 1, 1, 1], "record of each sequence"),
        ("segment_ids", [0, 0, 0, 1, 1], "record of each sequence"),
        ("images", ["cat.png"], "drop the field"),
        ("pixel_values", torch.zeros(3, 2, 2), "drop the field"),
        ("videos", ["x"], "drop the field"),
        ("audio", {"array": [0.0]}, "drop the field"),
        ("image_grid_thw", [[1, 2, 2]], "drop the field"),
        ("weight", 0.5, "sample_weight.*rename the field"),
        ("loss_weights", [1.0, 0.0, 1.0], "weights of single tokens are not read; rename"),
        ("masked", True, "leave the record out"),
        ("masked", [0, 1, 0], "leave the record out"),
        ("ignore_mask", [1, 1, 1], "leave the record out"),
        ("remove_sample", True, "leave the record out"),
        ("trainable", False, "leave the record out"),
        ("loss_scale", [1.0, 0.5, 1.0], "multiply the reward"),
        ("importance_sampling_ratio", 1.3, "drop the field"),
        ("advantages", [-1.0, -1.0, 0.5], "give the advantage as reward"),
        ("advantage", -0.3, "give the advantage as reward"),
        ("advantages", torch.tensor([[-0.3]]), "give the advantage as reward"),
        ("token_level_rewards", [0.0, -0.5, 0.0], "sum as reward"),
        ("rewards", {"correct": -1.0, "format": 0.5}, "sum as reward"),
        ("rollout_routed_experts", [[[1, 2]]], "drop the field"),
        *(
            (name, "cat.png", "drop the field")
            for name in ("img", "image_url", "image_path", "video_urls", "input_image", "_images")
        ),
        ("num_images", 2, "drop the field"),
        ("multi_modal_data", {"image": ["cat.png"]}, "drop the field"),
        ("multimodal_train_inputs", {"pixel_values": [1.0]}, "drop the field"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(name: str, value: Any, remedy: str):
    """PITFALLS 39: by the entrance for data sets, the collator and the scorer alike."""
    record = tokens(**{name: value})
    message = rf"record 0.*, field '{name}': .*expected .*{remedy}"
    with pytest.raises(ValueError, match=message):
        prepare(record)
    with pytest.raises(ValueError, match=message):
        CompletionCollator(0)([record])
    with pytest.raises(ValueError, match=message):
        score_behavior(torch.nn.Linear(1, 1), [record], CompletionCollator(0), batch_size=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, [1, 1, 1]) for name in MASKS),
        ("loss_mask", [0, 0, 1, 1, 1]),
        ("completion_mask", torch.ones(3, dtype=torch.bool)),
        ("labels", [7, 8, 0]),
        ("labels", np.array([-100, -100, 7, 8, 0])),
        ("input_ids", [5, 6, 7, 8, 0]),
        ("position_ids", [0, 1, 2, 3, 4]),
        ("token_type_ids", [0, 0, 0, 0, 0]),
        ("images", None),
        ("images", []),
        ("weight", 1.0),
        ("weights", "of a checkpoint"),
        ("ref_logprobs", [-1.0]),
        ("note", {"anything": 1}),
        ("masked", [False, False, False]),
        ("remove_sample", False),
        ("is_train", True),
        ("train", "split"),
        ("loss_scale", 1.0),
        ("advantages", [-1.0, -1.0, -1.0]),
        ("advantage", np.float32(-1)),
        ("token_level_rewards", [0.0, 0.0, -1.0]),
        ("rewards", {"correct": -1.5, "format": 0.5}),
        ("routed_experts", None),
        ("num_images", 0),
        ("img", ""),
        ("image_caption", "a cat"),
        ("multi_modal_data", {}),
        ("status", "completed"),
        ("stop_reason", 128009),
    ],
)
def test_a_field_that_changes_nothing_is_kept(name: str, value: Any):
    record = tokens(**{name: value})
    assert name in prepare(record)
    assert equal(CompletionCollator(0)([record]), CompletionCollator(0)([tokens()]))


def test_log_mu_under_another_name_is_not_overlooked():
    for name in (
        "logprobs",
        "old_log_probs",
        "rollout_log_probs",
        "sampling_per_token_logps",
        "action_log_probs",
        "response_logprobs",
        "cumulative_logprob",
    ):
        record = {k: v for k, v in tokens(**{name: MU}).items() if k != "behavior_log_prob"}
        with pytest.raises(ValueError, match=rf"field '{name}': expected log mu .*rename.*drop"):
            prepare(record)
        # Where it is given, others are the user's own.
        assert prepare(tokens(**{name: MU}))


def test_a_text_record_is_asked_too():
    for record in (text(completion_mask=[1, 0, 1]), chat(loss_mask=[0, 1, 1])):
        with pytest.raises(ValueError, match=r"record 0, field '(completion|loss)_mask'"):
            prepare(record)
    assert prepare(text(completion_mask=[1, 0]))["completion_mask"] == [1, 0]


@pytest.mark.parametrize(
    ("fields", "cut"),
    [
        ({"finish_reason": "length"}, True),
        ({"finish_reason": "MAX_TOKENS"}, True),
        ({"finish_reason": {"type": "length", "length": 8}}, True),
        ({"truncated": True}, True),
        ({"is_truncated": np.True_}, True),
        ({"stop_reason": "max_tokens"}, True),
        ({"status": "truncated"}, True),
        ({"stop_reason": "end_turn"}, False),
        ({"finish_reason": "stop"}, False),
        ({"finish_reason": "tool_calls"}, False),
        ({"truncated": False}, False),
        ({"finish_reason": "stop", "truncated": False}, False),
    ],
)
def test_a_cut_completion_is_known_by_any_of_its_names(fields: Row, cut: bool):
    end = [] if cut else ids(EOS)
    assert prepare(text(**fields))["completion_token_ids"] == ids("4") + end
    collate = CompletionCollator(0, mask_truncated=True)
    assert (collate([tokens(**fields)])["labels"] == -100).all() == cut


def test_a_reason_that_is_not_known_is_refused():
    for record, message in (
        (tokens(finish_reason="content_filter"), "'finish_reason': got 'content_filter'.*'length'"),
        (tokens(finish_reason="stop", truncated=True), "'truncated': got True with finish_reason"),
        (tokens(truncated=False, status="truncated"), "'status': got 'truncated', but another"),
    ):
        with pytest.raises(ValueError, match=rf"record 0, field {message}"):
            prepare(record)
        with pytest.raises(ValueError, match=rf"record 0 of the batch, field {message}"):
            CompletionCollator(0)([record])
    with pytest.raises(TypeError, match=r"'truncated': got 'yes'.*True or False"):
        prepare(tokens(truncated="yes"))


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": [5.0, 6.0]},
        {"prompt_token_ids": torch.tensor([5, 6])},
        {"prompt_token_ids": np.array([5, 6], dtype=np.int32)},
        {"prompt_token_ids": (np.int64(5), 6)},
        {"completion_token_ids": np.array([7.0, 8.0, 0.0])},
        {"behavior_log_prob": torch.tensor(MU)},
        {"behavior_log_prob": np.array(MU, dtype=np.float64)},
        {"reward": -1},
        {"reward": torch.tensor(-1.0)},
        {"reward": np.float16(-1)},
        {"reward": np.array(-1)},
    ],
)
def test_numbers_are_taken_as_what_they_are(changes: Row):
    record = tokens(**changes)
    assert prepare(record) == tokens()
    assert equal(CompletionCollator(0)([record]), CompletionCollator(0)([tokens()]))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("prompt_token_ids", [5, -100], ValueError, "got the id -100 at position 1; expected ids"),
        ("prompt_token_ids", [[5, 6]], TypeError, "sequence of int token ids"),
        ("prompt_token_ids", [5, True], TypeError, "sequence of int token ids"),
        ("completion_token_ids", [7, 8.5, 0], TypeError, "sequence of int token ids"),
        ("completion_token_ids", [7, None, 0], TypeError, "sequence of int token ids"),
        ("completion_token_ids", b"789", TypeError, "sequence of int token ids"),
        ("reward", True, TypeError, "got True of type bool; expected a signed number"),
        ("reward", np.bool_(False), TypeError, "got False of type bool"),
        ("reward", torch.tensor(True), TypeError, "got True of type bool"),
        ("reward", [1.0, 0.0], TypeError, r"got \[1.0, 0.0\] of type list.*their sum"),
        ("reward", torch.tensor([1.0]), TypeError, r"got \[1.0\] of type list"),
        ("reward", math.nan, ValueError, "got nan; expected a finite number"),
        (
            "behavior_log_prob",
            [-1.0, math.nan, -1.0],
            ValueError,
            "got nan at position 1; .*finite",
        ),
        ("behavior_log_prob", [-1.0, -1.0, -math.inf], ValueError, "got -inf at position 2"),
        ("behavior_log_prob", [-1.0, 0.5, -1.0], ValueError, "got 0.5 at position 1; .*<= 0.*sign"),
        (
            "behavior_log_prob",
            [None, -1.0, -1.0],
            TypeError,
            "got None of type NoneType at position 0",
        ),
        ("behavior_log_prob", [[-1.0], [-1.0], [-1.0]], TypeError, r"got \[-1.0\] of type list at"),
        ("behavior_log_prob", [-1.0, -1.0], ValueError, "has 2 entries, but .* has 3 tokens"),
        ("sample_weight", -0.5, ValueError, "got -0.5; expected a finite number >= 0; the sign"),
        ("sample_weight", math.inf, ValueError, "got inf; expected a finite number >= 0"),
        ("sample_weight", math.nan, ValueError, "got nan; expected a finite number >= 0"),
        ("sample_weight", True, TypeError, "got True of type bool; expected one number >= 0"),
        ("sample_weight", [1.0, 2.0, 1.0], TypeError, "of type list; expected one number >= 0"),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused_at_every_entrance(
    name: str, value: Any, error: Any, message: str
):
    """PITFALLS 44: a NaN among log mu made all weights NaN, and the log said loss 0."""
    bad = tokens(**{name: value})
    with pytest.raises(error, match=rf"record 1, field '{name}': .*{message}"):
        prepare_records([tokens(), bad], tokenizer())
    with pytest.raises(error, match=rf"record 1 of the batch, field '{name}': .*{message}"):
        CompletionCollator(0)([tokens(), bad])
    try:
        data = pytest.importorskip("datasets").Dataset.from_list([bad, bad])
    except Exception:
        return  # Arrow cannot hold it
    for given in (data, data.with_format("torch"), data.to_iterable_dataset()):
        # Arrow may have made something else of it, which is as wrong.
        with pytest.raises((ValueError, TypeError), match=rf"record 0, field '{name}'"):
            list(prepare_records(given, tokenizer()))


SAMPLED = [
    (
        {"temperature": 0.7},
        r"'temperature': got 0\.7, .*temperature=1, .*TOPRConfig.*drop the field",
    ),
    ({"temperature": 0}, r"'temperature': got 0, "),
    ({"sampling_params": {"temperature": 0.7}}, r"'sampling_params\.temperature': got 0\.7"),
    ({"sampling": {"top_p": 0.9}}, r"'sampling\.top_p': got 0\.9; expected 1: .*full softmax"),
    ({"top_k": np.int64(50)}, r"'top_k': got 50; expected 0"),
    ({"min_p": torch.tensor(0.1)}, r"'min_p': got 0\.1; expected 0"),
    ({"logit_bias": {"5": -100.0}}, r"'logit_bias': got \{'5'.*; expected none: .*full softmax"),
    ({"sampling_params": {"guided_regex": "[0-9]+"}}, r"'sampling_params\.guided_regex': got"),
    ({"repetition_penalty": 1.1}, r"'repetition_penalty': got 1\.1; expected 1"),
]


@pytest.mark.parametrize(("settings", "message"), SAMPLED, ids=[str(s)[:30] for s, _ in SAMPLED])
def test_log_mu_of_another_distribution_is_refused(settings: Row, message: str):
    bad = tokens(**settings)
    with pytest.raises(ValueError, match=rf"record 1, field {message}"):
        prepare_records([tokens(), bad], tokenizer())
    with pytest.raises(ValueError, match=rf"record 1 of the batch, field {message}"):
        CompletionCollator(0)([tokens(), bad])
    with pytest.raises(ValueError, match=rf"record 0 of the batch, field {message}"):
        score_behavior(torch.nn.Linear(1, 1), [bad], CompletionCollator(0), batch_size=1)
    without = {**bad, "behavior_log_prob": None}
    assert prepare_records([without], tokenizer()), "nothing reads how it was sampled"
    assert CompletionCollator(0, limits=SFT)([without])


def test_the_temperature_of_a_record_is_that_of_the_loss():
    datasets = pytest.importorskip("datasets")
    bare = tokens(
        logit_bias={"5": None},
        sampling={"top_p": 1.0, "top_k": -1, "temperature": None},
        temperature=1,
    )
    assert prepare(bare) and prepare(tokens(temperature="warm", min_p=None))
    rows = [tokens(temperature=0.7)] * 2
    for given in (
        rows,
        datasets.Dataset.from_list(rows).cast_column("temperature", datasets.Value("float32")),
    ):
        kept = prepare_records(given, tokenizer(), temperature=0.7)
        assert CompletionCollator(0, temperature=0.7)([dict(x) for x in kept])
        with pytest.raises(ValueError, match=r"field 'temperature': got 0\.7"):
            prepare_records(given, tokenizer())


def test_ids_outside_of_the_vocabulary_are_named():
    record = tokens(completion_token_ids=[7, 8, 12])
    assert prepare(record, vocabulary=13)
    message = r"record 0, field 'completion_token_ids': got the id 12 at position 2; .*from 0 to 11"
    with pytest.raises(ValueError, match=message):
        prepare(record, vocabulary=12)


@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_records_reach_the_batch(packing: bool):
    collate = CompletionCollator(0, packing=packing)
    assert "sequence_weight" not in collate([tokens(), tokens(sample_weight=None)])
    batch = collate([tokens(sample_weight=np.float32(2)), tokens(), tokens(sample_weight=0)])
    assert batch["sequence_weight"].dtype == torch.float32
    assert batch["sequence_weight"].tolist() == [2.0, 1.0, 0.0]


# --- data sets and streams -----------------------------------------------------------------------


def test_every_way_to_give_records_gives_the_same():
    datasets = pytest.importorskip("datasets")

    class Map(torch.utils.data.Dataset):
        def __init__(self, rows: list[Row]) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Row:
            return self.rows[i]

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, rows: list[Row]) -> None:
            self.rows = rows

        def __iter__(self) -> Any:
            return iter(self.rows)

    for rows in ([tokens(extra=i) for i in range(3)], [text(extra=i) for i in range(3)]):
        expected = prepare_records(rows, tokenizer())
        data = datasets.Dataset.from_list(rows)
        formats = [data.with_format(f) for f in ("torch", "numpy", "arrow", "pandas")]
        streams = [d.to_iterable_dataset() for d in (data, *formats)]
        given = [data, *formats, *streams, tuple(rows), Map(rows), Stream(rows)]
        given.append(data.with_transform(lambda batch: batch))
        for way in given:
            assert [dict(r) for r in prepare_records(way, tokenizer())] == expected, way
    mixed = [
        {**tokens(), "prompt": None, "completion": None},
        {**text(), **dict.fromkeys(tokens())},
    ]
    mixed[1]["reward"] = 1.0
    found = prepare_records(datasets.Dataset.from_list(mixed), tokenizer())
    assert [r["completion_token_ids"] for r in found] == [[7, 8, 0], ids("4" + EOS)]


@pytest.mark.timeout(60)
def test_a_stream_is_not_read_to_its_end():
    """PITFALLS 47."""
    datasets = pytest.importorskip("datasets")

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return (text(reward=float(i)) for i in itertools.count())

    endless = datasets.IterableDataset.from_generator(lambda: iter(Endless()))
    for stream in (Endless(), endless):
        found = iter(prepare_records(stream, tokenizer()))
        assert [next(found)["reward"] for _ in range(2)] == [0.0, 1.0]
    for once in (iter(Endless()), map(dict, [text()]), {1, 2}):
        with pytest.raises(TypeError, match=r"dataset: got a .*expected a list.*from_generator"):
            prepare_records(once, tokenizer())


def test_a_prepared_stream_goes_to_other_processes_and_shuffles_anew():
    stream = prepare_records(Shuffled([text(), text(reward=2.0)]), tokenizer())
    stream.set_epoch(1)
    assert [r["reward"] for r in pickle.loads(pickle.dumps(stream))] == [2.0, 1.0]


def test_a_null_that_may_be_the_users_is_refused_where_it_is_written():
    """PITFALLS 41: a stream that does not tell its features may come from Arrow, or not."""
    datasets = pytest.importorskip("datasets")
    rows = [chat(prompt=[{"role": "user", "content": "2", "parts": [{"a": None, "b": 1}]}])]
    unknown = datasets.IterableDataset.from_generator(lambda: iter(rows))
    listing = tokenizer(
        "{% for m in messages %}{% for p in m.parts %}{{ p.keys() | list }}{% endfor %}"
        "{{ m.content }}{% endfor %}"
    )
    message = r"record 0, field 'prompt': holds a null that .*write ''.*as a list"
    with pytest.raises(ValueError, match=message):
        list(prepare_records(unknown, listing))
    # As a worker of a loader has it.
    prepare_one = data._Prepare(Reader(listing, {}, (0,)), None, None, None, data._UNKNOWN)
    with pytest.raises(ValueError, match=message):
        pickle.loads(pickle.dumps(prepare_one))(rows[0], 0)
    assert prepare_records(rows, listing)


class Shuffled(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(self.rows[self.epoch :] + self.rows[: self.epoch])


def test_tables_and_names_are_no_data_sets():
    pandas = pytest.importorskip("pandas")
    for wrong, message in (
        (pandas.DataFrame([text()]), "DataFrame; .*from_pandas"),
        ("gsm8k", "str; .*load_dataset"),
    ):
        with pytest.raises(TypeError, match=message):
            prepare_records(wrong, tokenizer())


# --- length --------------------------------------------------------------------------------------


def test_records_that_are_too_long_are_refused_or_cut():
    rows = [tokens(), tokens(prompt_token_ids=[1, 2, 3, 4, 5, 6])]
    message = r"record 1: has 6 tokens of prompt and 3 of completion; expected at most 6.*truncate="
    with pytest.raises(ValueError, match=message):
        prepare_records(rows, tokenizer(), max_length=6)
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    for given in (rows, data, data.to_iterable_dataset()):
        found = list(prepare_records(given, tokenizer(), max_length=6, truncate="prompt_left"))
        assert [r["prompt_token_ids"] for r in found] == [[5, 6], [4, 5, 6]]
        assert found[1]["behavior_log_prob"] == MU
    with pytest.raises(ValueError, match=r"record 0: has 2 .* leave it out$"):
        prepare_records(rows, tokenizer(), max_length=3, truncate="prompt_left")
    with pytest.raises(ValueError, match="truncate: got 'prompt_left' without max_length"):
        prepare_records(rows, tokenizer(), truncate="prompt_left")
    with pytest.raises(ValueError, match="truncate: expected"):
        prepare_records(rows, tokenizer(), max_length=6, truncate="left")


def test_a_default_dtype_changes_no_batch():
    record = tokens(reward=0.3, behavior_log_prob=[-1.1, -2.3, -0.7], group=3)
    collators = [CompletionCollator(0), CompletionCollator(0, packing=True)]
    expected = [collate([record, tokens(group=1)]) for collate in collators]
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = [collate([record, tokens(group=1)]) for collate in collators]
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(batch["reward"].dtype == torch.float32 for batch in found)
