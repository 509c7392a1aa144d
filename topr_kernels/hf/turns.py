"""Completions of several messages: the assistant's turns, and between them what others wrote.

Each turn is read as an answer to all messages before it, as the policy wrote it. What the policy had
seen before a turn must begin with what it had seen and written before the last one, token for token: a
template that writes earlier turns otherwise (Qwen 3 leaves their thoughts out) shows the policy another
text at each turn, and no single sequence is what happened.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from topr_kernels.hf.tokenise import REMEDY, Messages, Reader

#: What the assistant is called elsewhere; here such a turn would be left out as another's.
_ASSISTANTS = ("model", "gpt", "bot", "ai", "chatbot")
#: What messages call their weight, as in OpenAI's format.
_WEIGHTS = ("weight", "train", "loss")


class Turns(NamedTuple):
    """Token ids of a prompt, and of a completion with its mask: 1 where the policy wrote it."""

    prompt: list[int]
    completion: list[int]
    mask: list[int]


def read_turns(
    reader: Reader,
    prompt: Messages,
    completion: Messages,
    extra: Mapping[str, Any],
    cut: bool,
    where: str,
) -> Turns:
    """Token ids of messages and of the turns that follow them.

    Messages of the completion before its first turn of the assistant go with the prompt, those after
    the last teach nothing and are left out.

    Args:
        reader: of the tokenizer.
        prompt: messages.
        completion: messages, at least one of them the assistant's.
        extra: the record's own arguments of the template.
        cut: whether the last turn was cut off.
        where: names the record in messages.

    Raises:
        ValueError: if the messages are not turns of the assistant, or cannot be rendered as the policy
            saw and wrote them.
    """
    turns = _turns(completion, where)
    result, last = Turns([], [], []), turns[-1]
    marked = None
    for k in turns:
        at = f"{where}, message {k} of the completion" if len(completion) > 1 else where
        seen = _talk(prompt, completion[:k])
        before, said = reader.messages(seen, completion[k], extra, cut and k == last, at)
        if k == turns[0]:
            result = Turns(before, [], [])
            if last > 0:
                marked = reader.marked(_talk(prompt, completion[: last + 1]), extra, where)
        known = result.prompt + result.completion
        _check_extends(reader, known, before, "all messages before it", at)
        between, written = before[len(known) :], [1] * len(said)
        if marked is not None:
            whole, marks = marked
            _check_extends(
                reader, before + said, whole, "all turns with {% generation %} marks", at
            )
            written = [
                int(bool(mark) or token in reader.eos)
                for mark, token in zip(marks[len(before) :], said, strict=False)
            ]
            if not any(marks[len(before) : len(before) + len(said)]):
                raise ValueError(
                    f"{at}, field 'completion': the chat template's {{% generation %}} marks leave this "
                    f"turn of the assistant out; expected it inside of them, or {REMEDY}"
                )
        result = Turns(
            result.prompt,
            result.completion + between + said,
            result.mask + [0] * len(between) + written,
        )
    return result


def _talk(prompt: Messages, completion: Messages) -> Messages:
    """Messages one after another; the first of the completion may continue the last of the prompt."""
    begun = prompt[-1]
    if not completion or not begun["role"] == completion[0]["role"] == "assistant":
        return [*prompt, *completion]
    whole = {**begun, "content": begun["content"] + completion[0]["content"]}
    return [*prompt[:-1], whole, *completion[1:]]


def _turns(completion: Messages, where: str) -> list[int]:
    """Which messages of a completion are the assistant's.

    Raises:
        ValueError: if none is, two follow each other, or a message is weighted against its role.
    """
    roles = [message["role"] for message in completion]
    field = f"{where}, field 'completion': got messages of {roles}"
    turns = [k for k, role in enumerate(roles) if role == "assistant"]
    for role in roles:
        if role in _ASSISTANTS:
            raise ValueError(f"{field}; expected the policy's turns under the role 'assistant'")
    if not turns:
        raise ValueError(f"{field}; expected at least one of the assistant, which the policy wrote")
    if any(b == a + 1 for a, b in itertools.pairwise(turns)):
        raise ValueError(
            f"{field}; expected one of the assistant, then another role's, before the next: join the "
            "assistant's, or give completion_token_ids and completion_mask"
        )
    for k, message in enumerate(completion):
        for name in _WEIGHTS:
            fine = (None, 1) if k in turns else (None, 0)
            if message.get(name) not in fine:
                raise ValueError(
                    f"{where}, field 'completion': got a message with {name}={message[name]!r} and "
                    f"role={roles[k]!r}, which is not read: what the assistant wrote is scored and "
                    "nothing else; drop it, or give completion_token_ids and completion_mask"
                )
    return turns


def _check_extends(
    reader: Reader, known: Sequence[int], whole: Sequence[int], of: str, where: str
) -> None:
    """Raises where the ids of a rendering do not begin with those that are known."""
    if list(whole[: len(known)]) == list(known):
        return
    pairs = itertools.zip_longest(known, whole[: len(known)])
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    was, now = (reader.shown(ids[same : same + 12]) for ids in (known, whole))
    raise ValueError(
        f"{where}, field 'completion': the chat template rewrites earlier turns: of {len(known)} tokens "
        f"that the policy had seen and written, its rendering of {of} keeps the first {same}, and "
        f"{was!r} becomes {now!r}. So no one sequence is what the policy saw at each turn; give "
        "prompt_token_ids, completion_token_ids and completion_mask as they were sampled, or a record "
        "of each turn with all before it in the prompt (of a template that an argument keeps from it: "
        "chat_template_kwargs)"
    )
