"""Completions of several messages, with templates in the manner of those that models come with."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from topr_kernels.hf import CompletionCollator, prepare_records

Row = dict[str, Any]

LLAMA = (
    "{% for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end|>\n\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
HERMES = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|start|>user{% endif %}{{ '\n' }}"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|eot|>\n{% endif %}"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}}"
    "\n</tool_call>{% endfor %}<|eot|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
#: Thoughts of turns before the last question are dropped.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|start|>{{ m.role }}\n{{ said }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
MARKED = HERMES.replace("{{ m.content or '' }}", "{% generation %}{{ m.content or '' }}").replace(
    "</tool_call>{% endfor %}<|eot|>\n", "</tool_call>{% endfor %}<|eot|>\n{% endgeneration %}"
)
TEMPLATES = {"llama": LLAMA, "hermes": HERMES, "qwen3": QWEN3, "gemma": GEMMA}


def tokenizer(template: str) -> Any:
    """One token per character and per mark of a template; <|eot|> ends turns."""
    result = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|eot|>", pad_token="<eos>"
    )
    result.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    result.chat_template = template or None
    return result


def says(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def call(expression: Any, content: Any = None) -> Row:
    function = {"name": "calculate", "arguments": expression}
    return says("assistant", content, tool_calls=[{"type": "function", "function": function}])


def prepare(template: str, completion: list[Row], **changes: Any) -> Row:
    record = {"prompt": [says("user", "3*4+1?")], "completion": completion, "reward": -1.0}
    return prepare_records([{**record, **changes}], tokenizer(template))[0]


def parts(template: str, *written: tuple[str, int]) -> tuple[list[int], list[int]]:
    """Ids and mask of texts, each the policy's (1) or not."""
    ids, mask = [], []
    for text, own in written:
        new = tokenizer(template)(text)["input_ids"]
        ids, mask = ids + new, mask + [own] * len(new)
    return ids, mask


def found(record: Row) -> tuple[list[int], list[int]]:
    return record["completion_token_ids"], record["completion_mask"]


TWO_CALLS = [
    call({"expression": '3*4 "é"'}, "First."),
    says("tool", "12"),
    call({"expression": "12+1"}),
    says("tool", "13"),
    says("assistant", "It is 13. "),
]


def test_tool_calls_in_the_manner_of_llama_3():
    first, *rest = TWO_CALLS
    record = prepare(LLAMA, [call(first["tool_calls"][0]["function"]["arguments"]), *rest])
    assert found(record) == parts(
        LLAMA,
        ('{"name": "calculate", "parameters": {"expression": "3*4 \\"é\\""}}<|eot|>', 1),
        ("<|start|>ipython<|end|>\n\n12<|eot|><|start|>assistant<|end|>\n\n", 0),
        ('{"name": "calculate", "parameters": {"expression": "12+1"}}<|eot|>', 1),
        ("<|start|>ipython<|end|>\n\n13<|eot|><|start|>assistant<|end|>\n\n", 0),
        # As the policy wrote it, not as the template would trim it.
        ("It is 13. <|eot|>", 1),
    )
    # It writes calls in the place of what was said beside them.
    with pytest.raises(ValueError, match=r"record 0, message 0 .*does not write 'First.' as it is"):
        prepare(LLAMA, TWO_CALLS)


HERMES_PARTS = (
    ('First.\n<tool_call>\n{"name": "calculate", "arguments": {"expression": "3*4 \\"é\\""}}', 1),
    ("\n</tool_call><|eot|>", 1),
    ("\n<|start|>user\n<tool_response>\n12\n</tool_response><|eot|>\n<|start|>assistant\n", 0),
    ('<tool_call>\n{"name": "calculate", "arguments": {"expression": "12+1"}}', 1),
    ("\n</tool_call><|eot|>", 1),
    ("\n<|start|>user\n<tool_response>\n13\n</tool_response><|eot|>\n<|start|>assistant\n", 0),
    ("It is 13. <|eot|>", 1),
)


@pytest.mark.parametrize("template", [HERMES, MARKED], ids=["messages", "marks"])
def test_tool_calls_in_the_manner_of_hermes_and_qwen_2_5(template: str):
    record = prepare(template, TWO_CALLS)
    assert found(record) == parts(template, *HERMES_PARTS)
    batch = CompletionCollator(0)([{**record, "behavior_log_prob": [-1.0] * len(found(record)[0])}])
    assert (batch["labels"] != -100).sum() == sum(record["completion_mask"])
    # Two results, one after another; what stands before the first turn goes with the prompt.
    both = [says("tool", "1"), TWO_CALLS[0], says("tool", "12"), says("tool", "13"), TWO_CALLS[-1]]
    record = prepare(
        template, [*both, says("user", "Thanks.")], prompt=[says("user", "3*4+1?"), call({})]
    )
    assert found(record) == parts(
        template,
        *HERMES_PARTS[:2],
        ("\n<|start|>user\n<tool_response>\n12\n</tool_response>", 0),
        ("\n<tool_response>\n13\n</tool_response><|eot|>\n<|start|>assistant\n", 0),
        ("It is 13. <|eot|>", 1),
    )


def test_arguments_of_a_call_are_written_as_they_are():
    turns = [call('{"expression":  "3*4"}'), says("tool", "12"), says("assistant", "12")]
    text = '<tool_call>\n{"name": "calculate", "arguments": {"expression":  "3*4"}}\n</tool_call><|eot|>'
    record = prepare(HERMES, turns)
    expected = parts(HERMES, (text, 1))[0]
    assert record["completion_token_ids"][: len(expected)] == expected
    # A string of JSON, written as JSON once more, is not what the policy wrote.
    message = (
        r"record 0, message 0 of the completion, field 'completion': .*does not write '\{\"expr"
    )
    with pytest.raises(ValueError, match=message):
        prepare(LLAMA, turns)
    deaf = HERMES.replace("c.function.arguments | tojson", "'{}'")
    with pytest.raises(ValueError, match=r"does not write 'expression' as it is"):
        prepare(deaf, [call({"expression": "3"}), *turns[1:]])


def test_thoughts_that_a_template_drops_are_refused_or_served_from_token_ids():
    turns = [
        says("assistant", "<think>\nhm\n</think>\n\n12"),
        says("user", "Sure?"),
        says("assistant", "<think>\nyes\n</think>\n\nSure."),
    ]
    message = (
        r"record 0, message 2 of the completion, field 'completion': the chat template rewrites earlier "
        r"turns: of (\d+) tokens .*, its rendering of all messages before it keeps the first (\d+), and "
        r"'<think>\\nhm\\n<' becomes '12<\|eot\|>.*'.*completion_token_ids and completion_mask"
    )
    with pytest.raises(ValueError, match=message) as refused:
        prepare(QWEN3, turns)
    assert "keeps the first 25," in str(refused.value)
    prompt = tokenizer(QWEN3)("<|start|>user\n3*4+1?<|eot|>\n<|start|>assistant\n")["input_ids"]
    assert len(prompt) == 25
    ids, mask = parts(QWEN3, ("12<|eot|>", 1), ("\n<|start|>user\n", 0), ("Sure.<|eot|>", 1))
    record = {"prompt_token_ids": prompt, "completion_token_ids": ids}
    # Token ids are the truth, but then they must say which of them the policy wrote.
    with pytest.raises(
        ValueError, match=r"field 'completion': has turns .* did not write.*completion_mask"
    ):
        prepare(QWEN3, turns, **record)
    assert found(prepare(QWEN3, turns, **record, completion_mask=mask)) == (ids, mask)
    # Within one question it keeps them.
    tool = [turns[0], says("tool", "12"), turns[2]]
    assert found(prepare(QWEN3, tool))[1].count(0) == len("\n|tool\n12|\n|assistant\n")


def test_turns_in_the_manner_of_gemma():
    turns = [says("assistant", "calculate(3*4)"), says("user", "12"), says("assistant", "13")]
    assert found(prepare(GEMMA, turns)) == parts(
        GEMMA,
        ("calculate(3*4)<|eot|>", 1),
        ("\n<|start|>user\n12<|eot|>\n<|start|>model\n", 0),
        ("13<|eot|>", 1),
    )
    # Trimmed, where a later turn saw it.
    turns[0]["content"] = "calculate(3*4) "
    with pytest.raises(ValueError, match=r"message 2 .*' <\|eot\|>.*' becomes '<\|eot\|>"):
        prepare(GEMMA, turns)
    with pytest.raises(ValueError, match=r"record 0, .*the chat template failed: .*must alternate"):
        prepare(GEMMA, [turns[0], says("tool", "12"), turns[2]])


def test_a_turn_may_be_cut_off_or_continue_the_prompt():
    begun = [says("user", "3*4+1?"), says("assistant", "First")]
    turns = [says("assistant", ", 3*4."), says("user", "12"), says("assistant", "So 1")]
    record = prepare(HERMES, turns, prompt=begun, finish_reason="length")
    assert found(record) == parts(
        HERMES,
        (", 3*4.<|eot|>", 1),
        ("\n<|start|>user\n12<|eot|>\n<|start|>assistant\n", 0),
        ("So 1", 1),
    )
    for template in (HERMES, MARKED):
        with pytest.raises(
            ValueError, match=r"field 'prompt': ends with a message of the assistant"
        ):
            prepare(template, turns, prompt=[begun[0], says("assistant", None)])


def test_marks_say_what_of_a_turn_the_policy_wrote():
    headed = HERMES.replace(
        "{{ m.content or '' }}", "{% if m.role == 'assistant' %}(calm) {% endif %}X"
    )
    marked = headed.replace("X", "{% generation %}{{ m.content or '' }}{% endgeneration %}")
    turns = [call({"expression": "3"}, "First."), says("tool", "3"), says("assistant", "3")]
    turns[2] = call({"expression": "4"}, "Then.")
    _, mask = found(prepare(headed.replace("X", "{{ m.content or '' }}"), turns))
    _, closer = found(prepare(marked, turns))
    # Neither what the template writes of itself, nor calls outside of the marks; the end of a turn.
    assert mask[:7] == [1] * 7 and closer[:7] == [0] * 7
    assert sum(closer) == len("First.") + len("Then.") + 2
    unmarked = (
        marked.replace("{% generation %}", "{% if m.content == 'Then.' %}")
        .replace(
            "{% endgeneration %}",
            "{% generation %}Then.{% endgeneration %}{% else %}First.{% endif %}",
        )
        .replace("{{ m.content or '' }}", "")
    )
    with pytest.raises(ValueError, match=r"message 0 .*marks leave this turn of the assistant out"):
        prepare(unmarked, turns)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([says("assistant", "1"), says("assistant", "2")], "expected one of the assistant, then"),
        ([says("user", "1")], "expected at least one of the assistant"),
        (
            [says("user", "1"), says("model", "2")],
            "expected the policy's turns under the role 'ass",
        ),
        ([says("assistant", "1"), says("user", "2", train=True)], "train=True and role='user'"),
        ([says("assistant", "1", weight=0), says("user", "2")], "weight=0 and role='assistant'"),
    ],
)
def test_turns_that_cannot_be_told_are_refused(completion: list[Row], message: str):
    with pytest.raises(ValueError, match=rf"record 0, field 'completion': got .*{message}"):
        prepare(HERMES, completion)


def test_a_tokenizer_without_a_template_is_named():
    turns = [says("assistant", "1"), says("user", "2"), says("assistant", "3")]
    with pytest.raises(ValueError, match=r"record 0, .*the chat template failed: .*chat_template"):
        prepare("", turns)


def test_a_mask_of_ones_own_must_be_that_of_the_roles():
    turns = [says("assistant", "1"), says("user", "2"), says("assistant", "3")]
    _, mask = found(prepare(HERMES, turns))
    assert found(prepare(HERMES, turns, completion_mask=mask))[1] == mask
    with pytest.raises(ValueError, match=r"field 'completion_mask': says otherwise than the roles"):
        prepare(HERMES, turns, completion_mask=[1] * len(mask))


def test_a_data_set_of_messages_keeps_every_mask():
    """Arrow takes the columns of the first record, and fills up the arguments of calls with nulls."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": [says("user", "1?")], "completion": completion, "reward": 1.0}
        for completion in ([says("assistant", "1")], TWO_CALLS, [call({"other": "x"})])
    ]
    given = [*rows, {**rows[0], "prompt_token_ids": [3], "completion_token_ids": [4, 5]}]
    expected = prepare_records(given, tokenizer(HERMES))
    assert expected[1]["completion_mask"].count(0) > 0
    for order in ([0, 1, 2, 3], [3, 0, 1, 2]):
        names = sorted(set().union(*given))
        data = datasets.Dataset.from_list([{n: given[i].get(n) for n in names} for i in order])
        for way in (data, data.to_iterable_dataset()):
            rest = [dict(r) for r in prepare_records(way, tokenizer(HERMES))]
            for i, record in zip(order, rest, strict=True):
                assert record["completion_token_ids"] == expected[i]["completion_token_ids"]
                mask = expected[i].get("completion_mask", [1, 1])
                assert record["completion_mask"] == mask
