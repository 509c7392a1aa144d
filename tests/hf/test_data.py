"""Data sets as people have them, to the records that the collator takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_trainer import trainer
from tiny import EOS, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.data import prepare_records

Row = dict[str, Any]

#: Like ChatML: the turn ends with EOS, and a newline follows.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + EOS + "\n{% endfor %}"
    "{% if tools %}[{{ tools | length }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if think is false %}[]{% endif %}{% endif %}"
)
ASK = [{"role": "user", "content": "2+2?"}]
ANSWER = {"role": "assistant", "content": "4."}


def tokenizer(template: str = TEMPLATE) -> Any:
    """The tiny one, one token per character, with a chat template."""
    result = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token=EOS, pad_token=EOS
    )
    result.chat_template = template
    return result


def ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def prepare(record: Row, **options: Any) -> Row:
    (result,) = prepare_records([record], options.pop("with_tokenizer", tokenizer()), **options)
    return result


def text(**changes: Any) -> Row:
    record = {"prompt": "2+2=", "completion": "4", "reward": 1.0, **changes}
    return {k: v for k, v in record.items() if v is not None}


def chat(**changes: Any) -> Row:
    return {"prompt": ASK, "completion": [ANSWER], "reward": -1.0, **changes}


# --- text ------------------------------------------------------------------------------------


def test_text_is_cut_at_the_border_and_ended_once():
    """PITFALLS 32: decoders strip EOS, and it is appended only where generation stopped by itself."""
    prompt, answer, end = ids("2+2="), ids("4"), ids(EOS)
    assert len(end) == 1
    for record, expected in (
        (text(), answer + end),
        (text(finish_reason="stop"), answer + end),
        (text(finish_reason="length"), answer),
        (text(completion="4" + EOS), answer + end),
        (text(completion="4" + EOS, finish_reason="length"), answer + end),
        (text(completion=""), end),
        (text(completion="", finish_reason="length"), []),
    ):
        found = prepare(record)
        assert found["prompt_token_ids"] == prompt
        assert found["completion_token_ids"] == expected
        assert found["reward"] == 1.0
        assert "prompt" not in found
        assert "completion" not in found


def test_special_tokens_go_to_the_prompt_only():
    class Greedy(PreTrainedTokenizerFast):
        pass

    plain = tiny_tokenizer().backend_tokenizer
    copy = type(plain).from_str(plain.to_str())
    greedy = Greedy(tokenizer_object=copy, bos_token="!", eos_token=EOS, pad_token=EOS)
    # It begins every text with BOS and ends it with EOS, as some tokenizers of LLaMA do.
    copy.post_processor = processors.TemplateProcessing(
        single=f"! $A {EOS}",
        special_tokens=[("!", greedy.bos_token_id), (EOS, greedy.eos_token_id)],
    )
    greedy = Greedy(tokenizer_object=copy, bos_token="!", eos_token=EOS, pad_token=EOS)
    assert greedy("2")["input_ids"] == ids("!2" + EOS)
    found = prepare(text(), with_tokenizer=greedy)
    assert found["prompt_token_ids"] == ids("!2+2=")
    assert found["completion_token_ids"] == ids("4" + EOS)
    # An EOS that the user wrote stays.
    found = prepare(text(prompt="1" + EOS), with_tokenizer=greedy)
    assert found["prompt_token_ids"] == ids("!1" + EOS)
    # BOS alone is a prompt.
    assert prepare(text(prompt=""), with_tokenizer=greedy)["prompt_token_ids"] == ids("!")


def test_other_ids_may_end_a_completion():
    first, second = ids("#")[0], ids(";")[0]
    found = prepare(text(completion="4;"), eos_token_id=[first, second])
    assert found["completion_token_ids"] == ids("4;")
    with pytest.warns(UserWarning, match="ended with '#', the first given"):
        found = prepare(text(), eos_token_id=[first, second])
    assert found["completion_token_ids"] == ids("4#")
    assert prepare(text(), eos_token_id=second)["completion_token_ids"] == ids("4;")
    silent = tokenizer()
    silent.eos_token = None
    with pytest.raises(ValueError, match=r"record 0, field 'completion'.*no eos_token_id.*length"):
        prepare(text(), with_tokenizer=silent)
    assert prepare(text(finish_reason="length"), with_tokenizer=silent)["completion_token_ids"]


# --- messages --------------------------------------------------------------------------------


@pytest.mark.parametrize("completion", [ANSWER, [ANSWER]], ids=["message", "list"])
def test_messages_go_through_the_chat_template(completion: Any):
    found = prepare(chat(completion=completion))
    assert found["prompt_token_ids"] == ids(f"<user>2+2?{EOS}\n<assistant>")
    # The newline after EOS was written by the template, and never sampled.
    assert found["completion_token_ids"] == ids("4." + EOS)
    cut = prepare(chat(completion=completion, finish_reason="length"))
    assert cut["completion_token_ids"] == ids("4.")
    assert cut["prompt_token_ids"] == found["prompt_token_ids"]


def test_a_template_without_eos_leaves_the_completion_as_it_is():
    plain = tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert prepare(chat(), with_tokenizer=plain)["completion_token_ids"] == ids("4.;")
    # What was said before the cut is known, since it is the message's text.
    cut = prepare(chat(finish_reason="length"), with_tokenizer=plain)
    assert cut["completion_token_ids"] == ids("4.")
    end = ids(";")[0]
    cut = prepare(chat(finish_reason="length"), with_tokenizer=plain, eos_token_id=end)
    assert cut["completion_token_ids"] == ids("4.")
    calls = tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match=r"field 'finish_reason'.*none of the ids.*eos_token_id"):
        prepare(chat(completion=call, finish_reason="length"), with_tokenizer=calls)
    assert prepare(chat(completion=call), with_tokenizer=calls)["completion_token_ids"] == ids(
        "4.f;"
    )


def test_a_prompt_that_does_not_begin_the_whole_is_refused():
    """Where the template writes the prompt otherwise once an answer follows."""
    changing = tokenizer(
        "{% if messages | length > 1 %}*{% endif %}" + TEMPLATE,
    )
    message = (
        r"record 0, field 'completion'.*ids of the prompt.*only the first 0 begin the ids.*give"
    )
    with pytest.raises(ValueError, match=message):
        prepare(chat(), with_tokenizer=changing)
    short = tokenizer("{{ messages[0]['content'] }}{% if add_generation_prompt %}!{% endif %}")
    with pytest.raises(ValueError, match=r"makes 5 ids .* only the first 4 begin"):
        prepare(chat(), with_tokenizer=short)


def test_template_arguments_and_tools_arrive():
    spaced = tokenizer(
        TEMPLATE.replace("<{{", "{{ mark }}<{{").replace("<assistant>", "{{ mark }}<assistant>")
    )
    found = prepare(chat(), with_tokenizer=spaced, chat_template_kwargs={"mark": "~"})
    assert found["prompt_token_ids"] == ids(f"~<user>2+2?{EOS}\n~<assistant>")
    own = {**chat(), "chat_template_kwargs": {"mark": "%"}}
    found = prepare(own, with_tokenizer=spaced, chat_template_kwargs={"mark": "~"})
    assert found["prompt_token_ids"] == ids(f"%<user>2+2?{EOS}\n%<assistant>")
    tool = {"type": "function", "function": {"name": "f"}}
    counting = tokenizer(
        "{% if tools %}[{{ tools | length }}{{ tools[0].type }}]{% endif %}"
        + (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    )
    for tools in ([tool], '[{"type": "function", "function": {"name": "f"}}]'):
        found = prepare({**chat(), "tools": tools}, with_tokenizer=counting)
        assert found["prompt_token_ids"] == ids("[1function]<user>2+2?<assistant>")


def test_fields_that_arrow_filled_in_are_not_seen_by_the_template():
    """PITFALLS 41: those that the user wrote into a list are."""
    datasets = pytest.importorskip("datasets")
    asking = tokenizer(
        "{% for m in messages %}{% for key in m | sort %}{{ key }},{% endfor %}{{ m.content }}"
        "{% for part in m['parts'] or [] %}{% for key in part %}{{ key }};{% endfor %}{% endfor %}"
        "{% endfor %}"
    )
    part = {"role": "user", "content": "2", "parts": [{"b": 1}]}
    other = {"role": "user", "content": "2", "name": "x", "parts": [{"a": 1}]}
    rows = [chat(prompt=[part]), chat(prompt=[other])]
    written = ["content,parts,role,2b;", "content,name,parts,role,2a;"]
    data = datasets.Dataset.from_list(rows)
    assert data[0]["prompt"][0]["parts"] == [{"b": 1, "a": None}]
    for given in (rows, data, data.to_iterable_dataset(), _unresolved(datasets, rows)):
        found = [r["prompt_token_ids"] for r in prepare_records(given, asking)]
        assert found == [ids(x) for x in written]
    null = {**part, "parts": [{"a": None, "b": 1}]}
    found = prepare(chat(prompt=[null]), with_tokenizer=asking)
    assert found["prompt_token_ids"] == ids("content,parts,role,2a;b;")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"completion": [ANSWER, ANSWER]},
            ValueError,
            r"\['assistant', 'assistant'\]; expected one",
        ),
        ({"completion": [{"role": "tool", "content": "x"}]}, ValueError, r"\['tool'\]; expected"),
        ({"completion": []}, ValueError, "field 'completion': has no messages"),
        (
            {"completion": "4"},
            TypeError,
            "field 'completion': got a str, with a prompt of messages",
        ),
        ({"completion": [{"content": "x"}]}, TypeError, "field 'completion': got the message"),
        ({"prompt": []}, ValueError, "field 'prompt': has no messages"),
        ({"prompt": ["2+2?"]}, TypeError, "field 'prompt': got the message '2"),
        ({"prompt": 3}, TypeError, "field 'prompt': got a int"),
    ],
)
def test_messages_that_cannot_be_used_are_named(changes: Row, error: Any, message: str):
    with pytest.raises(error, match=rf"record 1, .*{message}"):
        prepare_records([chat(), chat(**changes)], tokenizer())


# --- fields ----------------------------------------------------------------------------------


def test_token_records_pass_through_untouched():
    record = {
        "prompt_token_ids": [5],
        "completion_token_ids": [6, 7],
        "behavior_log_prob": [-1.0, -2.0],
        "reward": 1,
        "prompt": "ignored",
        "question": 3,
    }
    (found,) = prepare_records([record], tokenizer())
    assert found == record


def test_columns_that_are_not_read_are_kept():
    record = text(behavior_log_prob=[-1.0, -0.5], group="q7", finish_reason="stop", extra=1)
    found = prepare(record)
    assert found == {
        "prompt_token_ids": ids("2+2="),
        "completion_token_ids": ids("4" + EOS),
        "reward": 1.0,
        "behavior_log_prob": [-1.0, -0.5],
        "group": "q7",
        "finish_reason": "stop",
        "extra": 1,
    }
    assert set(prepare({**text(), "group": None})) == {
        "prompt_token_ids",
        "completion_token_ids",
        "reward",
    }


TOKENS = {"prompt": None, "completion": None, "prompt_token_ids": [1], "completion_token_ids": [2]}


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (
            text(reward=None),
            ValueError,
            r"field 'reward': is missing; it has \['completion', 'prompt",
        ),
        (text(reward=None, label=True), ValueError, r"reward = 1.0 if label else -1.0"),
        (text(reward="1"), TypeError, r"field 'reward': got '1' of type str"),
        (
            text(reward=True),
            TypeError,
            r"field 'reward': got True of type bool.*-1.0 for a failure",
        ),
        (text(reward=float("nan")), ValueError, r"field 'reward': got nan; expected a finite"),
        (text(prompt=None), ValueError, r"field 'prompt': is missing; expected prompt and"),
        (text(completion=None), ValueError, r"field 'completion': is missing"),
        (text(prompt=""), ValueError, r"field 'prompt': has no tokens.*BOS"),
        (
            text(completion=[ANSWER]),
            TypeError,
            r"field 'completion': got a list, with a prompt of .*str",
        ),
        (text(completion=4), TypeError, r"field 'completion': got a int"),
        (
            text(behavior_log_prob=[-1.0]),
            ValueError,
            r"has 1 entries, but .* has 2 tokens \(with the EOS",
        ),
        (text(behavior_log_prob=-1.0), TypeError, r"'behavior_log_prob': got a float"),
        (text(**{**TOKENS, "prompt_token_ids": []}), ValueError, r"field 'prompt': has no tokens"),
        (
            text(**{**TOKENS, "prompt_token_ids": None}),
            ValueError,
            r"'prompt_token_ids': is missing",
        ),
        (
            text(**{**TOKENS, "completion_token_ids": [0.5]}),
            TypeError,
            r"'completion_token_ids': got",
        ),
        (text(**{**TOKENS, "completion_token_ids": "12"}), TypeError, r"sequence of int token ids"),
        (text(**TOKENS, behavior_log_prob=[]), ValueError, r"has 0 entries, but .* has 1 tokens"),
        (7, TypeError, r"got a int; expected a mapping"),
    ],
)
def test_a_bad_record_is_named_with_its_field(record: Any, error: Any, message: str):
    with pytest.raises(error, match=rf"record 2.*{message}"):
        prepare_records([text(), chat(), record], tokenizer())


def test_what_is_no_data_set_is_refused():
    with pytest.raises(TypeError, match=r"keys \['train'\].*dataset\['train'\]"):
        prepare_records({"train": [text()]}, tokenizer())
    for wrong in ("text", 3):
        with pytest.raises(
            TypeError, match=r"dataset: got a (str|int); expected a list of mappings"
        ):
            prepare_records(wrong, tokenizer())


def test_scores_may_come_later():
    """Without behavior_log_prob a record is prepared, and only the collator asks for it."""
    records = prepare_records([text(), chat()], tokenizer())
    with pytest.raises(
        ValueError, match=r"record 0 of the batch has no 'behavior_log_prob'.*Score"
    ):
        CompletionCollator(0)(records)
    for record in records:
        record["behavior_log_prob"] = [-1.0] * len(record["completion_token_ids"])
    batch = CompletionCollator(0)(records)
    eos = tokenizer().eos_token_id
    assert (batch["labels"][:, -1] == eos).all()
    assert batch["reward"].tolist() == [1.0, -1.0]


# --- data sets -------------------------------------------------------------------------------


def test_a_data_set_stays_one_and_equals_the_list():
    datasets = pytest.importorskip("datasets")
    plain = [text(finish_reason="stop", extra=i, behavior_log_prob=[-1.0, -2.0]) for i in range(3)]
    named = [{"role": "user", "content": "2", "name": "Ann"}, {"role": "user", "content": "+2"}]
    talks = [chat(), chat(prompt=named, reward=1.0)]
    for rows in (plain, talks):
        expected = prepare_records(rows, tokenizer())
        data = datasets.Dataset.from_list(rows)
        mapped = prepare_records(data, tokenizer())
        assert isinstance(mapped, datasets.Dataset)
        assert set(mapped.column_names) == set(expected[0])
        assert [dict(r) for r in mapped] == expected
        for stream in (data.to_iterable_dataset(), _unresolved(datasets, rows)):
            streamed = prepare_records(stream, tokenizer())
            assert isinstance(streamed, datasets.IterableDataset)
            assert list(streamed) == expected
            assert list(streamed) == expected
    tokens = datasets.Dataset.from_list(expected)
    assert prepare_records(tokens, tokenizer()) is tokens
    with pytest.raises(TypeError, match=r"DatasetDict with the keys \['train'\]"):
        prepare_records(datasets.DatasetDict({"train": data}), tokenizer())


def _unresolved(datasets: Any, rows: list[Row]) -> Any:
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    return stream


def test_a_data_set_names_the_record_too():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [text(), text(reward=2.0), {"prompt": "1", "completion": "2"}]
    )
    with pytest.raises(ValueError, match=r"record 2, field 'reward': is missing"):
        prepare_records(data, tokenizer())


def test_a_trl_style_data_set_trains(tmp_path: Any):
    """Prompt, completion and reward as they are, and log mu from the model that starts."""
    datasets = pytest.importorskip("datasets")
    questions = [f"{i} + {i} = " for i in range(4)]
    rows = [text(prompt=q, completion=str(i), reward=(-1.0) ** i) for i, q in enumerate(questions)]
    data = prepare_records(datasets.Dataset.from_list(rows), tiny_tokenizer())
    data = data.map(lambda r: {"behavior_log_prob": [-4.0] * len(r["completion_token_ids"])})
    run = trainer(tmp_path, data)
    run.train()
    assert torch.isfinite(torch.tensor(run.state.log_history[0]["loss"]))


def test_importing_needs_no_datasets():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "import topr_kernels.hf.data\n"
        "assert topr_kernels.hf.data.prepare_records([], None) == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
