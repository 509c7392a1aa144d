"""Text and messages to ids: the border, the special tokens, what the policy wrote and what ends it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("transformers")

from test_data import ANSWER, ASK, TEMPLATE, chat, ids, prepare, text, tokenizer
from tiny import EOS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from topr_kernels.hf.data import prepare_records

TURN = "{{ m['role'] }}>"


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def merging(**options: Any) -> Any:
    """Two letters that stand together may be one token."""
    vocab = {x: i for i, x in enumerate([EOS, "a", "b", "c", "d", "ab", "cd"])}
    model = models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d")])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token=EOS, pad_token=EOS, **options
    )


def test_prompt_and_completion_are_tokenised_as_one_text():
    """PITFALLS 42: apart, they may meet in other tokens than the whole."""
    tokens = merging()
    assert tokens("abcd")["input_ids"] == [5, 6]
    found = prepare(text(prompt="ab", completion="cd"), with_tokenizer=tokens)
    assert (found["prompt_token_ids"], found["completion_token_ids"]) == ([5], [6, 0])
    message = (
        r"record 0, field 'completion': the tokenizer makes 1 ids of the prompt, .*first 0.*give"
    )
    with pytest.raises(ValueError, match=message):
        prepare(text(prompt="a", completion="bcd"), with_tokenizer=tokens)
    # The tokenizer writes a mark before every text, but only the first word of this one has it.
    marked = merging()
    marked.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("d", "first")
    assert marked("c")["input_ids"] == [4, 3]
    found = prepare(text(prompt="a", completion="c"), with_tokenizer=marked)
    assert (found["prompt_token_ids"], found["completion_token_ids"]) == ([4, 1], [3, 0])


def test_messages_are_cut_where_a_token_ends():
    plain = "{% for m in messages %}{{ m['content'] }}" + EOS + "{% endfor %}"
    tokens = merging()
    tokens.chat_template = plain + "{% if add_generation_prompt %}a{% endif %}"
    talk = chat(prompt=[{"role": "user", "content": "cd"}], completion=says("cd"))
    found = prepare(talk, with_tokenizer=tokens)
    assert (found["prompt_token_ids"], found["completion_token_ids"]) == ([6, 0, 1], [6, 0])
    with pytest.raises(
        ValueError, match=r"the chat template makes 3 ids .* only the first 2 begin"
    ):
        prepare({**talk, "completion": says("b")}, with_tokenizer=tokens)


@pytest.mark.parametrize("ends", [False, True])
def test_a_rendered_prompt_has_its_bos_once(ends: bool):
    tokens = merging(bos_token="d")
    single = f"d $A {EOS}" if ends else "d $A"
    special = [("d", 4), (EOS, 0)]
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    for prompt in ("ab", "dab"):
        found = prepare(text(prompt=prompt, completion="c"), with_tokenizer=tokens)
        assert (found["prompt_token_ids"], found["completion_token_ids"]) == ([4, 5], [3, 0])
    assert prepare(text(prompt="", completion="c"), with_tokenizer=tokens)["prompt_token_ids"] == [
        4
    ]


def test_an_answer_is_what_the_policy_wrote():
    """Templates trim answers, drop their thoughts, or write thoughts that nobody had."""
    tidy = tokenizer(
        "{% for m in messages %}<" + TURN + "{{ m['content'].split('</think>')[-1] | trim }}"
        f"{EOS}\n{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
    )
    said = "<think>2+2</think> 4 "
    found = prepare(chat(completion=says(said)), with_tokenizer=tidy)
    assert found["prompt_token_ids"] == ids(f"<user>2+2?{EOS}\n<assistant>")
    assert found["completion_token_ids"] == ids(said + EOS)
    cut = prepare(chat(completion=says(said), finish_reason="length"), with_tokenizer=tidy)
    assert cut["completion_token_ids"] == ids(said)
    thinking = TEMPLATE.replace(
        "{{ m['content']", "{{ '<think></think>' if m.role == 'assistant' }}{{ m['content']"
    )
    found = prepare(chat(), with_tokenizer=tokenizer(thinking))
    assert found["completion_token_ids"] == ids("4." + EOS)
    # A template that knows no generation prompt leaves it to the policy to write the role.
    silent = tokenizer(
        "{% for m in messages %}<" + TURN + "{{ m['content'] }}" + EOS + "{% endfor %}"
    )
    found = prepare(chat(), with_tokenizer=silent)
    assert found["completion_token_ids"] == ids("<assistant>4." + EOS)
    # An end that the record holds already is not written twice.
    found = prepare(chat(completion=says("4." + EOS)))
    assert found["completion_token_ids"] == ids("4." + EOS)


def test_an_answer_may_begin_inside_the_generation_prompt():
    begins = TEMPLATE.replace("<assistant>", "<assistant><think>\n")
    prompt = ids(f"<user>2+2?{EOS}\n<assistant><think>\n")
    for said in ("so</think>4", "<think>\nso</think>4"):
        found = prepare(chat(completion=says(said)), with_tokenizer=tokenizer(begins))
        assert found["prompt_token_ids"] == prompt
        assert found["completion_token_ids"] == ids("so</think>4" + EOS)
    with pytest.raises(
        ValueError, match=r"field 'completion': begins with '<think>', which.*leave"
    ):
        prepare(chat(completion=says("<think>so</think>4")), with_tokenizer=tokenizer(begins))
    found = prepare(chat(), chat_template_kwargs={"think": False})
    assert found["prompt_token_ids"] == ids(f"<user>2+2?{EOS}\n<assistant>[]")
    assert found["completion_token_ids"] == ids("4." + EOS)


def test_a_begun_answer_is_continued():
    begun = [*ASK, says("The sum is ")]
    found = prepare(chat(prompt=begun, completion=says("4")))
    assert found["prompt_token_ids"] == ids(f"<user>2+2?{EOS}\n<assistant>The sum is ")
    assert found["completion_token_ids"] == ids("4" + EOS)
    same = tokenizer().apply_chat_template(
        begun, continue_final_message=True, tokenize=True, return_dict=False
    )
    assert found["prompt_token_ids"] == same
    parts = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": "The"}]}]
    call = {**ANSWER, "tool_calls": [{"function": {"name": "f"}}]}
    upper = tokenizer(TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"))
    for record, tokens, message in (
        (chat(prompt=parts), tokenizer(), "expected text in both"),
        (chat(prompt=begun, completion=call), tokenizer(), "expected text in both"),
        (chat(prompt=begun), upper, "does not write it as it is"),
    ):
        with pytest.raises(
            ValueError, match=rf"record 0, field 'prompt': ends with .*{message}.*give"
        ):
            prepare(record, with_tokenizer=tokens)


def test_what_a_template_leaves_out_of_an_answer_is_told():
    thought = {**ANSWER, "reasoning_content": "two and two"}
    call = {**ANSWER, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    for answer, lost in ((thought, "'two and two'"), (call, "'add'")):
        with pytest.raises(ValueError, match=rf"field 'completion': .*does not write {lost}.*give"):
            prepare(chat(completion=answer))
    knows = TEMPLATE.replace("{{ m['content']", "{{ m.reasoning_content }}{{ m['content']")
    found = prepare(chat(completion=thought), with_tokenizer=tokenizer(knows))
    assert found["completion_token_ids"] == ids("two and two4." + EOS)
    upper = tokenizer(TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"))
    with pytest.raises(ValueError, match=r"does not write 'four' as it is.*what the policy wrote"):
        prepare(chat(completion=says("four")), with_tokenizer=upper)


def test_a_template_that_fails_is_named():
    strict = tokenizer("{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match=r"record 0: the chat template failed: .*no system"):
        prepare(chat(), with_tokenizer=strict)


def ended(tokens: Any, stops: Any) -> tuple[list[int], list[str]]:
    """What ends a text, and the warnings of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = prepare_records([text(), text()], tokens, eos_token_id=stops)
    assert len({tuple(r["completion_token_ids"]) for r in records}) == 1
    return records[0]["completion_token_ids"][1:], [str(w.message) for w in caught]


def test_of_several_stops_the_one_that_ends_a_turn_ends_a_text():
    """PITFALLS 43: not the first."""
    first, turn, own = ids("#")[0], ids(";")[0], ids(EOS)[0]
    bare = tokenizer()
    bare.chat_template = None
    assert ended(bare, [first, turn, own]) == ([own], [])
    found, messages = ended(bare, [first, turn])
    assert (
        found == [first] and "'#', the first given; the tokenizer's EOS is '<eos>'" in messages[0]
    )
    turns = tokenizer(TEMPLATE.replace(EOS, ";"))
    found, (message,) = ended(turns, [first, own, turn])
    assert found == [turn]
    assert "ended with ';', with which the chat template ends a turn" in message
    assert "generation_config.eos_token_id" in message
    assert ended(tokenizer(), [first, turn, own]) == ([own], [])
    # A template that takes no plain talk says nothing.
    strict = tokenizer("{{ raise_exception('no') }}")
    assert ended(strict, [first, own]) == ([own], [])


def test_images_in_messages_are_refused():
    for part in ({"type": "image"}, {"type": "image_url", "image_url": "x"}, {"video": "x"}):
        asked = [{"role": "user", "content": [{"type": "text", "text": "2"}, part]}]
        with pytest.raises(ValueError, match=r"field 'prompt': got a message with content of type"):
            prepare(chat(prompt=asked))


@pytest.mark.parametrize("change", [{"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_to_be_trained_on_is_refused(change: Any):
    with pytest.raises(ValueError, match=r"field 'completion': got a message with (weight|train)="):
        prepare(chat(completion={**ANSWER, **change}))
    with pytest.raises(ValueError, match=r"field 'tools': expected none with a prompt of text"):
        prepare(text(tools=[{"type": "function"}]))
